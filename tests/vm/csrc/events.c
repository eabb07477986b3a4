// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * events N WARN: N times a fault in each of three copies from and to user space, a warning of the
 * kernel itself (by writing to the file WARN), and the reader's own stack; prints how many stacks
 * had the reader's function in them.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

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

static int open_file(const char *name, int flags)
{
	int fd = open(name, flags);

	if (fd < 0)
		fail(name);
	return fd;
}

int main(int argc, char **argv)
{
	int stack = open_file("/proc/self/stack", O_RDONLY);
	int zero = open_file("/dev/zero", O_RDONLY);
	int warn = open_file(argv[2], O_WRONLY);
	long n = atol(argv[1]), i, found = 0;
	char text[4096];
	ssize_t got;

	for (i = 0; i < n; i++) {
		expect_fault(read(zero, NOWHERE, 100), "read");
		expect_fault(open(NOWHERE, O_RDONLY), "open");
		expect_fault(syscall(SYS_clock_gettime, 0, NOWHERE), "clock_gettime");
		if (pwrite(warn, "1", 1, 0) != 1)
			fail("warn");
		got = pread(stack, text, sizeof(text) - 1, 0);
		if (got <= 0)
			fail("stack");
		text[got] = 0;
		found += strstr(text, "proc_pid_stack") && strstr(text, "vfs_read") &&
			 strstr(text, "do_syscall_64");
	}
	printf("%ld\n", found);
	return 0;
}
