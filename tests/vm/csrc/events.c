// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * events WARN: until SIGTERM, in turn: faults in copies to and from user space, a warning of the
 * kernel itself (by writing to the file WARN), and the reader's own stack. Prints the first stack
 * and an empty line at once; in the end the number of turns, and each stack that was read, behind
 * how often it was.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define NOWHERE ((char *)0x123456789000)
#define MOST_STACKS 4096

static struct {
	char *text;
	long times;
} stacks[MOST_STACKS];

static volatile sig_atomic_t over;

static void end(int signo)
{
	(void)signo;
	over = 1;
}

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

static void keep(const char *text)
{
	int i;

	for (i = 0; i < MOST_STACKS && stacks[i].text; i++)
		if (!strcmp(stacks[i].text, text)) {
			stacks[i].times++;
			return;
		}
	if (i == MOST_STACKS)
		fail("too many different stacks");
	stacks[i].text = strdup(text);
	stacks[i].times = 1;
}

int main(int argc, char **argv)
{
	int stack = open_file("/proc/self/stack", O_RDONLY);
	int zero = open_file("/dev/zero", O_RDONLY);
	int root = open_file("/", O_RDONLY | O_DIRECTORY);
	int warn = open_file(argv[argc - 1], O_WRONLY);
	char text[4096];
	long turns = 0;
	ssize_t got;
	int i;

	signal(SIGTERM, end);
	while (!over) {
		expect_fault(read(zero, NOWHERE, 100), "read");
		expect_fault(open(NOWHERE, O_RDONLY), "open");
		expect_fault(syscall(SYS_clock_gettime, 0, NOWHERE), "clock_gettime");
		expect_fault(syscall(SYS_waitid, P_ALL, 0, NOWHERE, WEXITED | WNOHANG, NULL),
			     "waitid");
		lseek(root, 0, SEEK_SET);
		expect_fault(syscall(SYS_getdents64, root, NOWHERE, 1000), "getdents64");
		if (pwrite(warn, "1", 1, 0) != 1)
			fail("warn");
		got = pread(stack, text, sizeof(text) - 1, 0);
		if (got < 0)
			fail("stack");
		text[got] = 0;
		keep(text);
		if (!turns++) {
			puts(text);
			fflush(stdout);
		}
	}
	printf("%ld turns\n", turns);
	for (i = 0; i < MOST_STACKS && stacks[i].text; i++)
		printf("%ld times\n%s", stacks[i].times, stacks[i].text);
	return 0;
}
