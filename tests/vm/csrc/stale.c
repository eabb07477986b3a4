/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * stale ROUNDS: one CPU changes an instruction that another one runs in a loop, and tells it;
 * prints how many times the other still ran the old one after a serialising instruction.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static unsigned char *code; /* mov $N, %eax; ret */
static _Atomic unsigned int told, done;
static unsigned long stale;

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		exit(2);
}

static void serialise(void)
{
	unsigned int a = 0, b, c = 0, d;

	__asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d) : : "memory");
}

static void *run(void *rounds)
{
	unsigned int (*function)(void) = (unsigned int (*)(void))code;

	pin(1);
	while (done != *(unsigned int *)rounds) {
		unsigned int now = told;

		function();
		if (now == done)
			continue;
		serialise();
		stale += function() != (now & 0x7f);
		done = now;
	}
	return NULL;
}

int main(int argc, char **argv)
{
	unsigned int rounds = argc > 1 ? atoi(argv[1]) : 30000;
	pthread_t other;

	code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
		    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (code == MAP_FAILED)
		return 2;
	memcpy(code, "\xb8\0\0\0\0\xc3", 6);
	pin(0);
	if (pthread_create(&other, NULL, run, &rounds))
		return 2;
	for (unsigned int i = 1; i <= rounds; i++) {
		code[1] = i & 0x7f;
		told = i;
		while (done != i)
			;
		for (volatile int pause = 0; pause < 200; pause++)
			;
	}
	pthread_join(other, NULL);
	printf("%lu\n", stale);
	return 0;
}
