// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A mixed workload in a migration storm: `storm SEED ROUNDS SPAWNS`.
 *
 * WORKERS threads do ROUNDS rounds each of the jobs below, in an order told by the seed, and
 * hop to a random CPU all the time; each has a partner that answers it through a pipe and hops
 * too. It says "running" when all of them exist. Any system call that fails where it should not
 * ends the program with status 1.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <net/if.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define WORKERS 4
#define CPUS 2
#define READS 120		/* per round: for the hottest points */

struct worker {
	pthread_t thread, partner;
	uint64_t random, partner_random;
	int zero, udp, local[2], ask[2], answer[2];
	struct sockaddr_in self;
};

static struct worker workers[WORKERS];
static pthread_mutex_t crowded = PTHREAD_MUTEX_INITIALIZER;
static long rounds, spawns;
static char *program;

static void need(int ok, const char *what)
{
	if (ok)
		return;
	fprintf(stderr, "storm: %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t next(uint64_t *random)
{
	*random ^= *random << 13;
	*random ^= *random >> 7;
	*random ^= *random << 17;
	return *random;
}

static void hop(uint64_t *random)
{
	cpu_set_t cpus;

	CPU_ZERO(&cpus);
	CPU_SET(next(random) % CPUS, &cpus);
	need(!sched_setaffinity(0, sizeof(cpus), &cpus), "sched_setaffinity");
}

/* --- jobs --- */

static void job_read(struct worker *w)
{
	char buffer[64];

	for (int i = 0; i < READS; i++)
		need(read(w->zero, buffer, sizeof(buffer)) == sizeof(buffer), "read");
	need(write(w->zero, buffer, sizeof(buffer)) == sizeof(buffer), "write");
}

static void job_getppid(struct worker *w)
{
	(void)w;
	for (int i = 0; i < 8; i++)
		syscall(SYS_getppid);
}

static void job_ping(struct worker *w)
{
	char byte = 'x';

	need(write(w->ask[1], &byte, 1) == 1, "write to a pipe");
	need(read(w->answer[0], &byte, 1) == 1, "read from a pipe");
}

static void job_memory(struct worker *w)
{
	char *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	need(page != MAP_FAILED, "mmap");
	page[0] = page[4096] = w->random;
	need(!munmap(page, 8192), "munmap");
}

static void job_unix(struct worker *w)
{
	char text[32] = "";

	need(send(w->local[0], text, sizeof(text), 0) == sizeof(text), "send");
	need(recv(w->local[1], text, sizeof(text), 0) == sizeof(text), "recv");
}

static void job_udp(struct worker *w)
{
	char text[32] = "";

	need(sendto(w->udp, text, sizeof(text), 0, (void *)&w->self, sizeof(w->self)) > 0, "sendto");
	need(recv(w->udp, text, sizeof(text), 0) == sizeof(text), "recv from loopback");
}

static void job_stat(struct worker *w)
{
	struct stat found;

	need(!stat("/dev/zero", &found), "stat");
	need(!fstat(w->zero, &found), "fstat");
	need(stat("/dev/nowhere", &found) == -1 && errno == ENOENT, "stat of nothing");
}

static void job_futex(struct worker *w)
{
	struct timespec shortly = { 0, 20000 };
	uint32_t word = 1;

	(void)w;
	syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 1, &shortly, NULL, 0);
	syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 2, NULL, NULL, 0);
	syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
	pthread_mutex_lock(&crowded);
	sched_yield();
	pthread_mutex_unlock(&crowded);
}

static void job_sleep(struct worker *w)
{
	struct timespec shortly = { 0, 1 + next(&w->random) % 20000 };

	need(!nanosleep(&shortly, NULL), "nanosleep");
}

static void job_open(struct worker *w)
{
	int fd = open("/dev/null", O_RDWR);

	(void)w;
	need(fd >= 0 && !close(fd), "open and close");
}

static void (*const jobs[])(struct worker *) = {
	job_read, job_getppid, job_ping, job_memory, job_unix, job_udp,
	job_stat, job_futex, job_sleep, job_open,
};

#define N_JOBS (sizeof(jobs) / sizeof(jobs[0]))

static void spawn(void)
{
	char *argv[] = { program, NULL }, *env[] = { NULL };
	int status;
	pid_t pid;

	need(!posix_spawn(&pid, program, NULL, NULL, argv, env), "posix_spawn");
	need(waitpid(pid, &status, 0) == pid && !status, "waitpid");
}

/* --- threads --- */

static void *work(void *data)
{
	struct worker *w = data;

	for (long round = 0; round < rounds; round++) {
		uint64_t first = next(&w->random);

		for (unsigned int i = 0; i < N_JOBS; i++) {
			if (next(&w->random) % 4 == 0)
				hop(&w->random);
			jobs[(first + i) % N_JOBS](w);
		}
		if (spawns && round % (rounds / spawns + 1) == 0)
			spawn();
	}
	close(w->ask[1]);
	return NULL;
}

static void *answer(void *data)
{
	struct worker *w = data;
	char byte;

	while (read(w->ask[0], &byte, 1) == 1) {
		if (next(&w->partner_random) % 8 == 0)
			hop(&w->partner_random);
		need(write(w->answer[1], &byte, 1) == 1, "answer");
	}
	return NULL;
}

static void raise_loopback(void)
{
	struct ifreq lo = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	need(fd >= 0 && !ioctl(fd, SIOCSIFFLAGS, &lo) && !close(fd), "loopback up");
}

static void prepare(struct worker *w, uint64_t seed)
{
	socklen_t size = sizeof(w->self);

	w->random = seed * 0x9e3779b97f4a7c15ull | 1;
	w->partner_random = ~w->random;
	w->zero = open("/dev/zero", O_RDWR | O_CLOEXEC);
	need(w->zero >= 0, "/dev/zero");
	need(!pipe2(w->ask, O_CLOEXEC) && !pipe2(w->answer, O_CLOEXEC), "pipe");
	need(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, w->local), "socketpair");
	w->udp = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	w->self.sin_family = AF_INET;
	w->self.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	need(!bind(w->udp, (void *)&w->self, size), "bind");
	need(!getsockname(w->udp, (void *)&w->self, &size), "getsockname");
}

int main(int argc, char **argv)
{
	if (argc == 1)
		return 0;	/* what spawn() starts */
	need(argc == 4, "usage: storm SEED ROUNDS SPAWNS");
	program = argv[0];
	rounds = atol(argv[2]);
	spawns = atol(argv[3]);
	raise_loopback();
	for (int i = 0; i < WORKERS; i++)
		prepare(&workers[i], strtoull(argv[1], NULL, 0) + i);
	for (int i = 0; i < WORKERS; i++) {
		need(!pthread_create(&workers[i].thread, NULL, work, &workers[i]), "thread");
		need(!pthread_create(&workers[i].partner, NULL, answer, &workers[i]), "thread");
	}
	need(puts("running") >= 0 && !fflush(stdout), "stdout");
	for (int i = 0; i < WORKERS; i++) {
		pthread_join(workers[i].thread, NULL);
		pthread_join(workers[i].partner, NULL);
	}
	return 0;
}
