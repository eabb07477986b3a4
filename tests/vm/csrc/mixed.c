// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A mixed workload of known shape: files, pipes, sockets, signals, memory, timers, threads,
 * processes, faults.  usage: mixed ROUNDS; each round forks one child that does all of it.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <netinet/in.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>

static volatile sig_atomic_t caught;

static void on_signal(int signo)
{
	(void)signo;
	caught++;
}

static void files(const char *dir)
{
	char path[200], other[210], buf[5000];
	struct stat st;
	int fd, i;

	snprintf(path, sizeof(path), "%s/kw-mixed-%d", dir, getpid());
	snprintf(other, sizeof(other), "%s.new", path);
	fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	memset(buf, 'x', sizeof(buf));
	for (i = 0; i < 20; i++)
		if (write(fd, buf, sizeof(buf)) < 0)
			break;
	fsync(fd);
	for (i = 0; i < 20; i++)
		if (pread(fd, buf, 100 * i, 4000 * i) < 0)
			break;
	ftruncate(fd, 100);
	fstat(fd, &st);
	close(fd);
	rename(path, other);
	symlink(other, path);
	stat(path, &st);
	unlink(path);
	unlink(other);
	fd = open("/proc/self/maps", O_RDONLY);
	while (read(fd, buf, sizeof(buf)) > 0)
		;
	close(fd);
	fd = open("/etc", O_RDONLY | O_DIRECTORY);
	while (syscall(SYS_getdents64, fd, buf, sizeof(buf)) > 0)
		;
	syscall(SYS_getdents64, fd, (void *)8, sizeof(buf));	/* a fault in the kernel */
	close(fd);
}

static void sockets(void)
{
	struct sockaddr_in at = { .sin_family = AF_INET,
				  .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t len = sizeof(at);
	int s = socket(AF_INET, SOCK_STREAM, 0), c, a, pair[2], i;
	char buf[3000] = "";

	if (!bind(s, (void *)&at, len) && !listen(s, 5) && !getsockname(s, (void *)&at, &len)) {
		c = socket(AF_INET, SOCK_STREAM, 0);
		if (!connect(c, (void *)&at, len)) {
			a = accept(s, NULL, NULL);
			for (i = 0; i < 10; i++)
				if (send(c, buf, sizeof(buf), MSG_NOSIGNAL) < 0 ||
				    recv(a, buf, sizeof(buf), 0) < 0)
					break;
			close(a);
		}
		close(c);
	}
	close(s);
	socketpair(AF_UNIX, SOCK_DGRAM, 0, pair);
	for (i = 0; i < 10; i++)
		if (write(pair[0], buf, 500) < 0 || read(pair[1], buf, 500) < 0)
			break;
	close(pair[0]);
	close(pair[1]);
	s = socket(AF_INET, SOCK_DGRAM, 0);
	sendto(s, buf, 100, MSG_DONTWAIT, (void *)&at, sizeof(at));
	close(s);
}

static void *thread(void *arg)
{
	int i;

	for (i = 0; i < 50; i++)
		sched_yield();
	return arg;
}

static void signals_and_timers(void)
{
	struct itimerval fast = { .it_value.tv_usec = 500 };
	struct timespec nap = { .tv_nsec = 1000000 };
	int i, e = epoll_create1(0), p[2];
	struct epoll_event ev = { .events = EPOLLIN };
	pthread_t t[3];

	signal(SIGUSR1, on_signal);
	signal(SIGALRM, on_signal);
	for (i = 0; i < 20; i++)
		kill(getpid(), SIGUSR1);
	setitimer(ITIMER_REAL, &fast, NULL);
	nanosleep(&nap, NULL);
	if (!pipe(p)) {
		epoll_ctl(e, EPOLL_CTL_ADD, p[0], &ev);
		if (write(p[1], "x", 1) == 1)
			epoll_wait(e, &ev, 1, 10);
		close(p[0]);
		close(p[1]);
	}
	close(e);
	for (i = 0; i < 3; i++)
		pthread_create(&t[i], NULL, thread, NULL);
	for (i = 0; i < 3; i++)
		pthread_join(t[i], NULL);
}

static void memory(void)
{
	size_t size = 1 << 20, i;
	char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	for (i = 0; i < size; i += 4096)
		p[i] = 1;
	mprotect(p, size / 2, PROT_READ);
	madvise(p + size / 2, size / 2, MADV_DONTNEED);
	p = mremap(p, size, 2 * size, MREMAP_MAYMOVE);
	munmap(p, 2 * size);
}

static void processes(void)
{
	int status, i;
	pid_t pid;

	for (i = 0; i < 3; i++) {
		pid = fork();
		if (!pid) {
			if (i == 0)
				execl("/bin/true", "true", NULL);
			if (i == 1)
				raise(SIGSEGV);
			pause();
			_exit(1);
		}
		if (i == 2)
			kill(pid, SIGKILL);
		waitpid(pid, &status, 0);
	}
	pid = fork();
	if (!pid) {
		ptrace(PTRACE_TRACEME, 0, NULL, NULL);
		raise(SIGSTOP);
		_exit(0);
	}
	waitpid(pid, &status, 0);
	for (i = 0; i < 20 && !ptrace(PTRACE_SINGLESTEP, pid, NULL, NULL); i++)
		waitpid(pid, &status, 0);
	ptrace(PTRACE_CONT, pid, NULL, NULL);
	waitpid(pid, &status, 0);
}

int main(int argc, char **argv)
{
	int rounds = argc > 1 ? atoi(argv[1]) : 1, i, status, bad = 0;
	pid_t pid;

	for (i = 0; i < rounds; i++) {
		pid = fork();
		if (!pid) {
			alarm(60);
			files("/tmp");
			files("/dev/shm");
			sockets();
			signals_and_timers();
			memory();
			processes();
			_exit(0);
		}
		if (waitpid(pid, &status, 0) != pid || status)
			bad++;
	}
	return bad ? 1 : 0;
}
