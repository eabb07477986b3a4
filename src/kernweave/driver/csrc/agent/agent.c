// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The agent: relays driver requests between one virtio port and /dev/kernweave
 * and runs commands; nothing more. The records are described in agent.h.
 *
 * usage: agent PORT SHARED_FD INDEX (struct kw_port array in SHARED_FD)
 *
 * There is one output slot. Records are taken one at a time and only while the
 * slot is empty, so memory is bounded and a host that does not read stops us;
 * input is read all the same, because a RESET must be seen at any time.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>

#include "agent.h"
#include "command.h"

enum state { ADRIFT, NONCE, SESSION };	/* before RESET, after its magic, after its nonce */

static unsigned char reset_magic[KW_MAGIC_LEN];
static int port = -1, driver = -1;
static struct kw_port *shared;
static enum state state;
static unsigned int ended;	/* sessions so far */

static unsigned char *in; /* received, not yet taken; a whole record, and what came meanwhile */
static size_t in_len;
#define IN_MAX	(sizeof(struct kw_record) + KW_PAYLOAD_MAX + 1 + KW_CHUNK_MAX)

static unsigned char *out;		/* the slot: header, payload, end */
static size_t out_off, out_len;
#define OUT_PAYLOAD	(out + sizeof(struct kw_record))

static unsigned char window[KW_MAGIC_LEN - 1 + (64 << 10)];	/* the last bytes, then a chunk */
static size_t window_len;

static struct kw_command command = KW_COMMAND_NONE;
static uint16_t command_tag;

static void *reserve(size_t bytes)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		exit(1);
	return p;
}

/* The payload is already at OUT_PAYLOAD. */
static void answer(uint16_t type, uint16_t tag, size_t len)
{
	struct kw_record head = { .len = len, .type = type, .tag = tag };

	memcpy(out, &head, sizeof(head));
	OUT_PAYLOAD[len] = KW_END;
	out_off = 0;
	out_len = sizeof(head) + len + 1;
}

static void answer_error(uint16_t tag, const char *text)
{
	size_t len = strlen(text);

	memcpy(OUT_PAYLOAD, text, len);
	answer(KW_ERROR, tag, len);
}

/* Answers {err, 0} and @len bytes that follow it in the slot. */
static void answer_status(uint16_t type, uint16_t tag, int32_t err, size_t len)
{
	int32_t status[2] = { err, 0 };

	memcpy(OUT_PAYLOAD, status, sizeof(status));
	answer(type, tag, sizeof(status) + (err ? 0 : len));
}

static void end_session(void)
{
	if (driver >= 0)
		close(driver);
	driver = -1;
	kw_command_detach(&command);
	in_len = out_off = out_len = 0;
	state = ADRIFT;
	ended++;
	/* Give large buffers back. */
	madvise(in, IN_MAX, MADV_DONTNEED);
	madvise(out, IN_MAX, MADV_DONTNEED);
}

static bool host_is_gone(void)
{
	struct pollfd host = { .fd = port };

	return poll(&host, 1, 0) == 1 && host.revents & POLLHUP;
}

static void receive(void);

static void let_sigio(int how)
{
	sigset_t sigio;

	sigemptyset(&sigio);
	sigaddset(&sigio, SIGIO);
	sigprocmask(how, &sigio, NULL);
}

/*
 * A commit is interrupted by SIGIO: the host has left, or it is there again, or it
 * sent something. Only in the last case there is still somebody who wants it.
 */
static int call_driver(struct kw_call *call)
{
	unsigned int mine = ended;
	int err;

	do {
		let_sigio(SIG_UNBLOCK);
		err = ioctl(driver, KW_IOC_CALL, call) ? errno : 0;
		let_sigio(SIG_BLOCK);
		if (err == EINTR)
			receive();	/* a RESET ends the session */
	} while (err == EINTR && ended == mine && !host_is_gone());
	return err;
}

static void do_call(uint16_t tag, const unsigned char *req, size_t len)
{
	struct kw_call call = {
		.req = (uintptr_t)req,
		.req_len = len,
		.rep = (uintptr_t)(OUT_PAYLOAD + 8),
		.rep_cap = KW_REPLY_MAX,
	};
	unsigned int mine = ended;
	int err = 0;

	if (driver < 0)
		driver = open("/dev/kernweave", O_RDWR | O_CLOEXEC);
	if (driver < 0)
		err = errno;
	else
		err = call_driver(&call);
	if (!err && call.rep_len > KW_REPLY_MAX)
		err = EOVERFLOW;
	if (ended == mine)
		answer_status(KW_REPLY, tag, -err, call.rep_len);
}

static void do_readfile(uint16_t tag, const char *path)
{
	size_t len = 0, cap = KW_PAYLOAD_MAX - 8;
	int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : 1;
	int err;

	while (n > 0 && len < cap) {
		/* In pieces: some files of /proc allocate what is asked for. */
		n = read(fd, OUT_PAYLOAD + 8 + len, cap - len < 65536 ? cap - len : 65536);
		if (n > 0)
			len += n;
	}
	err = n < 0 ? -errno : n > 0 ? -EFBIG : 0;
	if (fd >= 0)
		close(fd);
	answer_status(KW_FILE, tag, err, len);
}

static void do_load(uint16_t tag, const unsigned char *image, size_t len)
{
	long ret = syscall(SYS_init_module, image, len, "");

	answer_status(KW_DONE, tag, ret ? -errno : 0, 0);
}

static void do_unload(uint16_t tag, const char *name)
{
	long ret = syscall(SYS_delete_module, name, O_NONBLOCK);

	answer_status(KW_DONE, tag, ret ? -errno : 0, 0);
}

static void do_getpid(uint16_t tag)
{
	uint32_t pid[2] = { getpid(), 0 };
	struct utsname uts;

	uname(&uts);
	memcpy(OUT_PAYLOAD, pid, sizeof(pid));
	memcpy(OUT_PAYLOAD + sizeof(pid), uts.release, strlen(uts.release));
	answer(KW_PID, tag, sizeof(pid) + strlen(uts.release));
}

static void do_exec(uint16_t tag, char *payload, size_t len)
{
	if (command.running) {
		answer_error(tag, "a command is already running in this session");
		return;
	}
	if (kw_command_start(&command, payload, len)) {
		answer_error(tag, errno == EINVAL ? "malformed EXEC" : strerror(errno));
		return;
	}
	command_tag = tag;
}

static void dispatch(const struct kw_record *head, unsigned char *payload)
{
	payload[head->len] = '\0';	/* over KW_END: every payload is a string, too */
	switch (head->type) {
	case KW_CALL:
		do_call(head->tag, payload, head->len);
		break;
	case KW_EXEC:
		do_exec(head->tag, (char *)payload, head->len);
		break;
	case KW_STDIN:
		if (command.running)
			kw_command_feed(&command, payload, head->len);
		break;
	case KW_SIGNAL:
		kw_command_signal(&command, head->len == 4 ? *(int32_t *)payload : 0);
		break;
	case KW_RESIZE:
		if (head->len == 4)
			kw_command_resize(&command, ((uint16_t *)payload)[0],
					  ((uint16_t *)payload)[1]);
		break;
	case KW_READFILE:
		do_readfile(head->tag, (char *)payload);
		break;
	case KW_GETPID:
		do_getpid(head->tag);
		break;
	case KW_LOAD:
		do_load(head->tag, payload, head->len);
		break;
	case KW_UNLOAD:
		do_unload(head->tag, (char *)payload);
		break;
	default:
		answer_error(head->tag, "unknown record type");
	}
}

/* Takes one complete record, if there is one; false if not. */
static int take_record(void)
{
	struct kw_record head;
	unsigned int mine = ended;
	size_t size;

	if (state != SESSION || in_len < sizeof(head))
		return 0;
	memcpy(&head, in, sizeof(head));
	size = sizeof(head) + head.len + 1;
	if (head.len > KW_PAYLOAD_MAX || (in_len >= size && in[size - 1] != KW_END)) {
		answer_error(head.tag, "malformed record");
		state = ADRIFT;
		return 0;
	}
	if (in_len < size)
		return 0;
	dispatch(&head, in + sizeof(head));
	if (ended != mine)	/* meanwhile: what is there now came after it */
		return 0;
	in_len -= size;
	memmove(in, in + size, in_len);
	return 1;
}

static void take_nonce(void)
{
	if (state != NONCE || in_len < KW_MAGIC_LEN)
		return;
	kw_magic(out, KW_ACK);
	memcpy(out + KW_MAGIC_LEN, in, KW_MAGIC_LEN);
	out_off = 0;
	out_len = 2 * KW_MAGIC_LEN;
	in_len -= KW_MAGIC_LEN;
	memmove(in, in + KW_MAGIC_LEN, in_len);
	state = SESSION;
}

static void keep(const unsigned char *bytes, size_t len)
{
	if (state == ADRIFT)
		return;
	if (len > IN_MAX - in_len) {	/* the host must wait for answers */
		end_session();
		answer_error(0, "too many requests ahead of their answers");
		return;
	}
	memcpy(in + in_len, bytes, len);
	in_len += len;
	take_nonce();
}

/* Takes a chunk of the stream; a RESET in it ends what was before. */
static void receive(void)
{
	unsigned char *fresh = window + window_len, *magic;
	ssize_t n = read(port, fresh, sizeof(window) - window_len);

	if (n <= 0)
		return;
	window_len += n;
	while ((magic = memmem(window, window_len, reset_magic, KW_MAGIC_LEN))) {
		end_session();
		state = NONCE;
		fresh = magic + KW_MAGIC_LEN;
		window_len -= fresh - window;
		memmove(window, fresh, window_len);
		fresh = window;
	}
	keep(fresh, window + window_len - fresh);
	if (window_len > KW_MAGIC_LEN - 1) {
		memmove(window, window + window_len - (KW_MAGIC_LEN - 1), KW_MAGIC_LEN - 1);
		window_len = KW_MAGIC_LEN - 1;
	}
}

static void transmit(void)
{
	ssize_t n = write(port, out + out_off, out_len - out_off);

	if (n > 0)
		out_off += n;
	if (out_off == out_len)
		out_off = out_len = 0;
}

/* Fills the slot with output of the command, or its end. */
static void take_output(void)
{
	struct kw_exited exited;
	ssize_t n;
	int i;

	if (kw_command_ate(&command)) {
		answer(KW_STDIN, command_tag, 0);
		return;
	}
	for (i = 1; i < 3; i++) {
		n = kw_command_read(&command, i, OUT_PAYLOAD, KW_CHUNK_MAX);
		if (n > 0) {
			answer(i == 1 ? KW_STDOUT : KW_STDERR, command_tag, n);
			return;
		}
	}
	if (kw_command_ended(&command, &exited)) {
		memcpy(OUT_PAYLOAD, &exited, sizeof(exited));
		answer(KW_EXITED, command_tag, sizeof(exited));
	}
}

/* Wait for a sign of the host; true if there is none for some time. */
static bool host_stays_away(long limit_ms)
{
	struct timespec limit = { .tv_nsec = limit_ms * 1000 * 1000 };
	sigset_t sigio;

	sigemptyset(&sigio);
	sigaddset(&sigio, SIGIO);
	while (host_is_gone())
		if (sigtimedwait(&sigio, NULL, &limit) < 0)
			return host_is_gone();
	return false;
}

/*
 * The guest may learn of a disconnect only after it has the first bytes of the
 * next connection: such a disconnect passes at once, and ended nothing.
 */
static void wait_host(void)
{
	if (!host_stays_away(100))
		return;
	shared->connected = 0;
	end_session();
	host_stays_away(200);
}

static void serve(void)
{
	struct pollfd fds[1 + KW_COMMAND_FDS] = { { .fd = port, .events = POLLIN } };
	int timeout = -1, n;

	if (out_len)
		fds[0].events |= POLLOUT;
	n = kw_command_poll(&command, fds + 1, !out_len, &timeout);
	if (poll(fds, 1 + n, timeout) < 0)
		return;
	if (fds[0].revents & POLLHUP) {
		wait_host();
		return;
	}
	shared->connected = 1;
	if (fds[0].revents & POLLIN)
		receive();
	if (out_len)
		transmit();
	kw_command_step(&command);
	while (!out_len && take_record())
		;
	if (!out_len && command.running)
		take_output();
	while (!command.running && waitpid(-1, NULL, WNOHANG) > 0)
		;		/* detached commands */
}

static void interrupt(int signo)
{
	(void)signo;
}

static void open_port(const char *path)
{
	struct sigaction act = { .sa_handler = interrupt };	/* no SA_RESTART */

	while ((port = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC)) < 0)
		usleep(20 * 1000);	/* one opener at a time: the last agent is still going */
	let_sigio(SIG_BLOCK);
	sigaction(SIGIO, &act, NULL);
	fcntl(port, F_SETOWN, getpid());
	fcntl(port, F_SETFL, O_NONBLOCK | O_ASYNC);
}

int main(int argc, char **argv)
{
	struct pollfd host;

	if (argc != 4)
		return 2;
	shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[2]), 0);
	if (shared == MAP_FAILED)
		return 1;
	close(atoi(argv[2]));
	shared += atoi(argv[3]);
	prctl(PR_SET_NAME, "kw-agent");
	signal(SIGPIPE, SIG_IGN);
	kw_magic(reset_magic, KW_RESET);
	in = reserve(IN_MAX);
	out = reserve(IN_MAX);
	open_port(argv[1]);
	host = (struct pollfd){ .fd = port };
	poll(&host, 1, 0);
	if (!(host.revents & POLLHUP)) {
		kw_magic(out, KW_RESTARTED);
		out_len = KW_MAGIC_LEN;
	}
	for (;;)
		serve();
}
