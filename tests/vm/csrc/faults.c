// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * System calls whose arguments fault.
 *
 *	faults bad N		N times pointers to nothing: each call must say EFAULT
 *	faults lazy N		N times pointers to memory that is there only after a fault
 *	faults sleep GO		the kernel sleeps in a fault until the file GO exists
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096
#define NOWHERE ((char *)0x123456789000)

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void expect_fault(long ret, const char *what)
{
	if (ret != -1 || errno != EFAULT)
		fail(what);
}

/* The last bytes before a page that is not there: a fault in the middle of a copy. */
static char *brink(size_t bytes)
{
	char *mem = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	munmap(mem + PAGE, PAGE);
	memset(mem, 'x', PAGE);
	return mem + PAGE - bytes;
}

static void bad(long rounds)
{
	int dir = open("/", O_RDONLY | O_DIRECTORY), zero = open("/dev/zero", O_RDONLY);
	char *edge = brink(7);
	struct sigaction *act = (void *)NOWHERE;
	int ends[2];

	if (pipe(ends))
		fail("pipe");
	while (rounds--) {
		expect_fault(open(NOWHERE, O_RDONLY), "open");
		expect_fault(open(edge, O_RDONLY), "open at the brink");
		expect_fault(write(ends[1], NOWHERE, 100), "write");
		expect_fault(read(zero, NOWHERE, 100), "read");
		lseek(dir, 0, SEEK_SET);
		expect_fault(syscall(SYS_getdents64, dir, NOWHERE, PAGE), "getdents64");
		expect_fault(syscall(SYS_rt_sigaction, 10, act, NULL, 8), "rt_sigaction");
		expect_fault(syscall(SYS_futex, NOWHERE, 0, 0, NULL), "futex");
		expect_fault(syscall(SYS_clock_gettime, 0, NOWHERE), "clock_gettime");
		expect_fault(syscall(SYS_execve, "/bin/true", NOWHERE, NULL), "execve");
	}
}

static void lazy(long rounds)
{
	int zero = open("/dev/zero", O_RDONLY), i;
	const int pages = 16;

	while (rounds--) {
		char *mem = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (read(zero, mem, pages * PAGE) != pages * PAGE)
			fail("read");
		for (i = 0; i < pages * PAGE; i++)
			if (mem[i])
				fail("contents");
		munmap(mem, pages * PAGE);
	}
}

static void *sleeper(void *mem)
{
	errno = 0;
	return (void *)(long)open(mem, O_RDONLY);
}

/* strncpy_from_user() sleeps on a page that userfaultfd gives only when GO is there. */
static void sleep_in_fault(const char *go)
{
	char *mem = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC);
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register reg = {
		.range = { (unsigned long)mem, PAGE },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	static char page[PAGE] __attribute__((aligned(PAGE))) = "/dev/null";
	struct uffdio_copy copy = { (unsigned long)mem, (unsigned long)page, PAGE, 0, 0 };
	struct pollfd wait = { .fd = fd, .events = POLLIN };
	struct uffd_msg msg;
	pthread_t thread;
	void *ret;

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &reg))
		fail("userfaultfd");
	pthread_create(&thread, NULL, sleeper, mem);
	if (poll(&wait, 1, -1) != 1 || read(fd, &msg, sizeof(msg)) != sizeof(msg))
		fail("no fault");
	puts("asleep");
	fflush(stdout);
	while (access(go, F_OK))
		usleep(1000);
	if (ioctl(fd, UFFDIO_COPY, &copy))
		fail("UFFDIO_COPY");
	pthread_join(thread, &ret);
	if ((long)ret < 0)
		fail("open");
	puts("awake");
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	if (!strcmp(argv[1], "bad"))
		bad(atol(argv[2]));
	else if (!strcmp(argv[1], "lazy"))
		lazy(atol(argv[2]));
	else if (!strcmp(argv[1], "sleep"))
		sleep_in_fault(argv[2]);
	else
		return 2;
	return 0;
}
