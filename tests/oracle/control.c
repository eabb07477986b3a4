// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Control: lines over a unix socket, one client at a time, one answer line per command,
 * `ok NUMBER [NUMBER]` or `error TEXT`:
 *
 *   snapshot FILE          write all counter rows; rows, translations without a slot
 *   mark ADDR...           record executions of these (for the next audit)
 *   text LO HI ...         virtual ranges whose pages are executable (for the next audit)
 *   exec PHYS...           further executable pages (for the next audit)
 *   audit on PHYS_BASE     start recording
 *   audit off FILE         stop, write events; events, events lost
 *   faults ADDR...         exception entries that push an error code (for the next watch)
 *   watch ADDR+LEN ...     measure restarts of these instructions, ascending
 *   unwatch FILE           stop, write restarts; rows, contexts lost
 *   transfers on           record transfers from the next return to user mode on; counts go on
 *   transfers off          stop
 *   transfers get FILE     write all recorded so far; rows, transfers dropped
 *
 * A thread of its own serves it: no virtual CPU ever waits for it, nor for a file.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include "oracle.h"

static struct sockaddr_un ctl_addr = { .sun_family = AF_UNIX };

static void answer(FILE *to, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	vfprintf(to, format, args);
	va_end(args);
	fputc('\n', to);
	fflush(to);
}

static void write_file(FILE *to, const char *path, long (*write_rows)(FILE *),
		       uint64_t (*count_lost)(void))
{
	FILE *file = path ? fopen(path, "wb") : NULL;
	uint64_t lost = count_lost();
	long n;

	if (!file) {
		answer(to, "error cannot open %s", path ? path : "a file without a name");
		return;
	}
	n = write_rows(file);
	if (fclose(file) || n < 0)
		answer(to, "error cannot write %s", path);
	else
		answer(to, "ok %ld %llu", n, (unsigned long long)lost);
}

static bool add_fault(uint64_t vaddr, uint64_t unused)
{
	(void)unused;
	return restart_add_fault_entry(vaddr);
}

static bool add_mark(uint64_t vaddr, uint64_t unused)
{
	(void)unused;
	return audit_add_mark(vaddr);
}

static bool add_exec(uint64_t phys, uint64_t unused)
{
	(void)unused;
	return audit_add_page(phys);
}

/* Feeds ADDR..., or pairs ADDR SECOND or ADDR+SECOND. False: the error was answered. */
static bool add_all(FILE *to, char *words, bool pairs, bool (*add)(uint64_t, uint64_t))
{
	char *end;

	for (;;) {
		uint64_t first = strtoull(words, &end, 0), second = 0;

		if (end == words)
			break;
		words = end + (*end == '+');
		if (pairs) {
			second = strtoull(words, &end, 0);
			words = end;
		}
		if (!add(first, second)) {
			answer(to, "error 0x%llx: out of range, out of order, or too many",
			       (unsigned long long)first);
			return false;
		}
	}
	return true;
}

static void switch_and_answer(FILE *to, struct features features)
{
	bool done = oracle_switch_to(features);

	answer(to, done ? "ok 0" : "error no virtual CPU took the switch in time");
}

static void begin_audit(FILE *to, const char *phys_base)
{
	const char *problem = oracle_active.audit ? "the audit is on already" :
			      audit_begin(strtoull(phys_base, NULL, 0));
	struct features features = oracle_active;

	features.audit = true;
	if (problem)
		answer(to, "error %s", problem);
	else
		switch_and_answer(to, features);
}

static void end_audit(FILE *to, const char *path)
{
	struct features features = oracle_active;

	features.audit = false;
	if (!oracle_active.audit)
		answer(to, "error the audit is off");
	else if (!oracle_switch_to(features))
		answer(to, "error no virtual CPU took the switch in time");
	else
		write_file(to, path, audit_write, audit_lost);
}

static void begin_watch(FILE *to, char *words)
{
	struct features features = oracle_active;

	features.watch = true;
	if (oracle_active.watch || !restart_ready()) {
		answer(to, "error %s",
		       oracle_active.watch ? "unwatch first" : "rsp is not readable");
		return;
	}
	if (!add_all(to, words, true, restart_add_watch))
		restart_clear();
	else
		switch_and_answer(to, features);
}

static void end_watch(FILE *to, const char *path)
{
	struct features features = oracle_active;

	features.watch = false;
	if (!oracle_active.watch) {
		answer(to, "error nothing is watched");
	} else if (!oracle_switch_to(features)) {
		answer(to, "error no virtual CPU took the switch in time");
	} else {
		write_file(to, path, restart_write, restart_lost);
		restart_clear();
	}
}

static void switch_transfers(FILE *to, bool on)
{
	struct features features = oracle_active;

	features.transfers = on;
	if (oracle_active.transfers == on)
		answer(to, "error transfers are %s already", on ? "on" : "off");
	else
		switch_and_answer(to, features);
}

static void get_transfers(FILE *to, const char *path)
{
	const char *problem = transfer_problem();

	if (problem)
		answer(to, "error %s", problem);
	else
		write_file(to, path, transfer_write, transfer_dropped);
}

/* What the callbacks read must not change under them. */
static void add_for_audit(FILE *to, char *words, bool pairs, bool (*add)(uint64_t, uint64_t))
{
	if (oracle_active.audit)
		answer(to, "error the audit is on");
	else if (add_all(to, words, pairs, add))
		answer(to, "ok 0");
}

static void add_faults(FILE *to, char *words)
{
	if (oracle_active.watch)
		answer(to, "error unwatch first");
	else if (add_all(to, words, false, add_fault))
		answer(to, "ok 0");
}

static void obey(FILE *to, char *line)
{
	char *rest = line + strcspn(line, " \n");

	line[strcspn(line, "\n")] = 0;
	if (*rest)
		*rest++ = 0;
	if (!strcmp(line, "snapshot"))
		write_file(to, rest, count_write, count_lost);
	else if (!strcmp(line, "mark"))
		add_for_audit(to, rest, false, add_mark);
	else if (!strcmp(line, "text"))
		add_for_audit(to, rest, true, audit_add_text);
	else if (!strcmp(line, "exec"))
		add_for_audit(to, rest, false, add_exec);
	else if (!strcmp(line, "audit") && !strncmp(rest, "on ", 3))
		begin_audit(to, rest + 3);
	else if (!strcmp(line, "audit") && !strncmp(rest, "off ", 4))
		end_audit(to, rest + 4);
	else if (!strcmp(line, "faults"))
		add_faults(to, rest);
	else if (!strcmp(line, "watch"))
		begin_watch(to, rest);
	else if (!strcmp(line, "unwatch"))
		end_watch(to, rest);
	else if (!strcmp(line, "transfers") && !strcmp(rest, "on"))
		switch_transfers(to, true);
	else if (!strcmp(line, "transfers") && !strcmp(rest, "off"))
		switch_transfers(to, false);
	else if (!strcmp(line, "transfers") && !strncmp(rest, "get ", 4))
		get_transfers(to, rest + 4);
	else
		answer(to, "error unknown or untimely command %s", line);
}

static void serve_client(int fd)
{
	FILE *from = fdopen(fd, "r"), *to = fdopen(dup(fd), "w");
	char *line = NULL;
	size_t room = 0;

	while (from && to && getline(&line, &room, from) > 0)
		obey(to, line);
	free(line);
	if (from)
		fclose(from);
	if (to)
		fclose(to);
}

static void *serve(void *data)
{
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	(void)data;
	unlink(ctl_addr.sun_path);
	if (fd < 0 || bind(fd, (struct sockaddr *)&ctl_addr, sizeof(ctl_addr)) || listen(fd, 4)) {
		perror("oracle: control socket");
		exit(1);
	}
	for (;;) {
		int client = accept4(fd, NULL, NULL, SOCK_CLOEXEC);

		if (client >= 0)
			serve_client(client);
	}
	return NULL;
}

/* Signals stay QEMU's: the thread inherits a mask that blocks them all. */
void control_start(void)
{
	sigset_t all, old;
	pthread_t thread;

	if (!ctl_addr.sun_path[0])
		return;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	if (pthread_create(&thread, NULL, serve, NULL)) {
		fprintf(stderr, "oracle: no control thread\n");
		exit(1);
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
}

bool control_set_path(const char *path)
{
	if (strlen(path) >= sizeof(ctl_addr.sun_path))
		return false;
	strcpy(ctl_addr.sun_path, path);
	return true;
}
