// SPDX-License-Identifier: GPL-2.0-or-later
/* calls NAME COUNT REPEAT: nanoseconds per system call (or per mix of four), the least of
 * REPEAT rounds; NAME is read, getppid or mix.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

static int zero, null;

static void call_mix(void)
{
	char byte;

	syscall(SYS_read, zero, &byte, 1);
	syscall(SYS_write, null, &byte, 1);
	syscall(SYS_lseek, zero, 0, SEEK_SET);
	syscall(SYS_getppid);
}

static void call_read(void)
{
	char byte;

	syscall(SYS_read, zero, &byte, 1);
}

static void call_getppid(void)
{
	syscall(SYS_getppid);
}

static double one_round(void (*call)(void), long count)
{
	double began = now_ns();
	long i;

	for (i = 0; i < count; i++)
		call();
	return (now_ns() - began) / count;
}

int main(int argc, char **argv)
{
	double ns, least = 1e18;
	void (*call)(void);
	int round;

	if (argc != 4)
		return 2;
	zero = open("/dev/zero", O_RDONLY);
	null = open("/dev/null", O_WRONLY);
	call = !strcmp(argv[1], "mix") ? call_mix :
	       !strcmp(argv[1], "read") ? call_read : call_getppid;
	for (round = 0; round < atoi(argv[3]); round++) {
		ns = one_round(call, atol(argv[2]));
		if (ns < least)
			least = ns;
	}
	printf("%.3f\n", least);
	return 0;
}
