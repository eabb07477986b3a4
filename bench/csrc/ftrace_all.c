// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * ftrace_all on, ftrace_all off: the function tracer on functions that standard
 * input gives by their numbers among ftrace's records (from 1, one per line),
 * and off again.
 *
 * Prints two times in ns: `on` what setting the filter took and what switching
 * on took, `off` the same the other way round. Nothing is recorded meanwhile.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define ROOM		(1 << 20)
#define EXIT_BROKEN	125

static long long now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void die(const char *what)
{
	fprintf(stderr, "ftrace_all: %s: %s\n", what, strerror(errno));
	exit(EXIT_BROKEN);
}

/* The kernel takes one word per call. */
static void put(const char *name, const char *data, size_t size)
{
	int fd = open(name, O_WRONLY | O_TRUNC | O_CLOEXEC);
	ssize_t took;

	if (fd < 0)
		die(name);
	for (; size; data += took, size -= took) {
		took = write(fd, data, size);
		if (took <= 0)
			die(name);
	}
	if (close(fd))
		die(name);
}

static void put_word(const char *name, const char *word)
{
	put(name, word, strlen(word));
}

static size_t slurp(char *data)
{
	size_t used = 0;
	ssize_t got;

	while ((got = read(0, data + used, ROOM - used)) > 0)
		used += got;
	return used;
}

int main(int argc, char **argv)
{
	static char numbers[ROOM];
	long long began, middle;
	size_t size = 0;

	if (argc != 2)
		return 2;
	if (!strcmp(argv[1], "on"))
		size = slurp(numbers);
	if (chdir("/sys/kernel/tracing"))
		die("no tracefs");
	put_word("tracing_on", "0\n");
	began = now_ns();
	if (size)
		put("set_ftrace_filter", numbers, size);
	else
		put_word("current_tracer", "nop\n");
	middle = now_ns();
	if (size)
		put_word("current_tracer", "function\n");
	else
		put_word("set_ftrace_filter", "\n");
	printf("%lld %lld\n", middle - began, now_ns() - middle);
	return 0;
}
