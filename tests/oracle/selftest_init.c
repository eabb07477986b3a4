// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The only process of the oracle's self-test machine: obeys lines from the console, without
 * libc, so that the number of system calls it makes is known exactly.
 *
 *   g CPU N      pin to CPU, call getppid N times
 *   b N          fork; child on CPU 1 and parent on CPU 0 call getppid N times each
 *   t N          time(pointer into a fresh page) N times: N page faults in a kernel store
 *   r PATH       read a file into fresh pages: page faults inside string instructions
 *   c PATH       print a file
 *   w PATH TEXT  write TEXT to a file
 *   k NAME...    print the rows of /proc/kallsyms with these names, kmods' rows left out
 *
 * Each answer ends in a line `done`.
 */
typedef unsigned long ul;

static long call(long nr, long a, long b, long c, long d, long e)
{
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = 0;
	long ret;

	__asm__ volatile("syscall" : "=a"(ret)
			 : "0"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return ret;
}

enum { READ = 0, WRITE = 1, OPEN = 2, CLOSE = 3, MMAP = 9, MUNMAP = 11, FORK = 57, EXIT = 60,
       WAIT4 = 61, GETPPID = 110, MOUNT = 165, MKDIR = 83, TIME = 201, SETAFFINITY = 203 };

static char line[512];
static char chunk[1 << 16];

static ul length(const char *text)
{
	ul n = 0;

	while (text[n])
		n++;
	return n;
}

static void say(const char *text)
{
	call(WRITE, 1, (long)text, length(text), 0, 0);
}

static ul number(const char **at)
{
	ul n = 0;

	while (**at == ' ')
		(*at)++;
	while (**at >= '0' && **at <= '9')
		n = n * 10 + *(*at)++ - '0';
	return n;
}

static void pin(ul cpu)
{
	ul mask = 1ul << cpu;

	call(SETAFFINITY, 0, sizeof(mask), (long)&mask, 0, 0);
}

static void getppid_times(ul n)
{
	while (n--)
		call(GETPPID, 0, 0, 0, 0, 0);
}

static void on_both(ul n)
{
	long child = call(FORK, 0, 0, 0, 0, 0);

	pin(child ? 0 : 1);
	getppid_times(n);
	if (!child)
		call(EXIT, 0, 0, 0, 0, 0);
	call(WAIT4, child, 0, 0, 0, 0);
}

static char *fresh(ul pages)
{
	return (char *)call(MMAP, 0, pages * 4096, 3, 0x22, -1);
}

static void time_into_fresh(ul n)
{
	char *pages = fresh(n);

	for (ul i = 0; i < n; i++)
		call(TIME, (long)(pages + i * 4096), 0, 0, 0, 0);
	call(MUNMAP, (long)pages, n * 4096, 0, 0, 0);
}

/* One page per system call; a page that was written before is never used again. */
static void read_file(const char *path, int print)
{
	long fd = call(OPEN, (long)path, 0, 0, 0, 0), got = 1;

	while (got > 0) {
		char *page = fresh(1);

		got = call(READ, fd, (long)page, 4096, 0, 0);
		if (print && got > 0)
			call(WRITE, 1, (long)page, got, 0, 0);
		call(MUNMAP, (long)page, 4096, 0, 0, 0);
	}
	call(CLOSE, fd, 0, 0, 0, 0);
}

static void write_to(char *path)
{
	char *text = path;
	long fd;

	while (*text && *text != ' ')
		text++;
	*text++ = 0;
	fd = call(OPEN, (long)path, 1, 0, 0, 0);
	call(WRITE, fd, (long)text, length(text), 0, 0);
	call(CLOSE, fd, 0, 0, 0, 0);
}

static int is_one_of(const char *names, const char *name, ul len)
{
	while (*names) {
		ul same = 0;

		while (*names == ' ')
			names++;
		while (same < len && names[same] == name[same])
			same++;
		if (same == len && (names[len] == ' ' || !names[len]))
			return 1;
		while (*names && *names != ' ')
			names++;
	}
	return 0;
}

/* A row is "ADDRESS T NAME\n": the name begins at byte 19. A row may straddle two reads. */
static void find_names(const char *names)
{
	long fd = call(OPEN, (long)"/proc/kallsyms", 0, 0, 0, 0), got;
	static char row[512];
	ul at = 0;

	while ((got = call(READ, fd, (long)chunk, sizeof(chunk), 0, 0)) > 0) {
		for (long i = 0; i < got; i++) {
			if (at < sizeof(row) - 1)
				row[at++] = chunk[i];
			if (chunk[i] != '\n')
				continue;
			row[at] = 0;
			if (is_one_of(names, row + 19, at - 20))
				say(row);
			at = 0;
		}
	}
	call(CLOSE, fd, 0, 0, 0, 0);
}

static void obey(void)
{
	const char *rest = line + 1;
	ul n = number(&rest);

	if (line[0] == 'g') {
		pin(n);
		getppid_times(number(&rest));
	} else if (line[0] == 'b') {
		on_both(n);
	} else if (line[0] == 't') {
		time_into_fresh(n);
	} else if (line[0] == 'r' || line[0] == 'c') {
		read_file(line + 2, line[0] == 'c');
	} else if (line[0] == 'w') {
		write_to(line + 2);
	} else if (line[0] == 'k') {
		find_names(line + 2);
	}
	say("done\n");
}

void run(void)
{
	long got;

	call(MKDIR, (long)"/proc", 0555, 0, 0, 0);
	call(MOUNT, (long)"none", (long)"/proc", (long)"proc", 0, 0);
	call(MOUNT, (long)"none", (long)"/dev", (long)"devtmpfs", 0, 0);
	say("ready\n");
	while ((got = call(READ, 0, (long)line, sizeof(line) - 1, 0, 0)) > 0) {
		line[got - 1] = 0;
		obey();
	}
	for (;;)
		call(34 /* pause */, 0, 0, 0, 0, 0);
}

__asm__(".globl _start\n_start: and $-16, %rsp\n call run\n");
