/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The one command of a session: start, feed, read, end. Nothing here blocks. For agent.c only. */
#ifndef KW_COMMAND_H
#define KW_COMMAND_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "agent.h"

#define LINGER_NS	(200 * 1000 * 1000ull)

struct kw_command {
	int running;			/* started, its end not yet taken */
	pid_t pid;			/* also its process group and session */
	int pidfd;			/* -1 once it has been reaped */
	int fds[3];			/* our ends of stdin, stdout, stderr; -1 when closed */
	int owed[3];			/* bytes that lay in the pipe when it exited */
	unsigned char *food;		/* for stdin */
	size_t food_off, food_len;
	int fed;			/* food is gone, and the host does not know yet */
	uint64_t start_ns, end_ns;
	int wstatus;
};

#define KW_COMMAND_NONE	{ .pidfd = -1, .fds = { -1, -1, -1 } }
#define KW_COMMAND_FDS	4

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* Leaves the process to itself. */
static void kw_command_detach(struct kw_command *cmd)
{
	int i;

	for (i = 0; i < 3; i++)
		close_fd(&cmd->fds[i]);
	close_fd(&cmd->pidfd);
	free(cmd->food);
	*cmd = (struct kw_command)KW_COMMAND_NONE;
}

/* Points the entries of a new NULL-terminated vector at @count strings from *@text. */
static char **cut(char **text, const char *end, uint32_t count)
{
	char **vec;
	uint32_t i;

	if (count > (size_t)(end - *text) || !(vec = calloc(count + 1, sizeof(*vec))))
		return NULL;
	for (i = 0; i < count; i++) {
		if (*text >= end) {
			free(vec);
			return NULL;
		}
		vec[i] = *text;
		*text += strlen(*text) + 1;	/* the payload is followed by a NUL */
	}
	return vec;
}

/*
 * Pages and names of host files may be stale. First 4: no kernel messages. Then
 * twice: the overlay's names must go before those they pin in the file system below.
 */
static void forget_host_files(void)
{
	static const char values[] = "433";
	int i, fd = open("/proc/sys/vm/drop_caches", O_WRONLY | O_CLOEXEC);

	for (i = 0; values[i]; i++)
		if (pwrite(fd, &values[i], 1, 0) < 0)
			break;
	close_fd(&fd);
}

static void child(const int *fds, uint32_t flags, const char *cwd, char **argv, char **env)
{
	sigset_t none;
	int missing, i, err;

	setsid();
	for (i = 0; i < 3; i++)
		dup2(fds[i], i);
	/* now, not at exec, which may take its time: the driver's descriptor is the session */
	syscall(SYS_close_range, 3, ~0U, 0);
	if (flags & KW_PTY)
		ioctl(0, TIOCSCTTY, 0);
	signal(SIGPIPE, SIG_DFL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	missing = chdir(cwd);
	if (missing && chdir("/"))
		_exit(126);
	environ = env;		/* its PATH is the one to search */
	execvp(argv[0], argv);
	err = errno;
	dprintf(2, "kernweave: %s: %s", argv[0], strerror(err));
	if (missing)
		dprintf(2, " (run in /, for the target has no directory %s)", cwd);
	dprintf(2, "\n");
	_exit(err == ENOENT ? 127 : 126);
}

static int open_pipes(int *ours, int *theirs, uint32_t flags)
{
	int i, pair[2];

	for (i = 0; i < 3; i++) {
		if (i == 0 && (flags & KW_STDIN_NULL)) {
			theirs[0] = open("/dev/null", O_RDWR | O_CLOEXEC);
			continue;
		}
		if (pipe2(pair, O_CLOEXEC))
			return -1;
		ours[i] = pair[i == 0];
		theirs[i] = pair[i != 0];
		fcntl(ours[i], F_SETFL, O_NONBLOCK);
	}
	return 0;
}

/* The other end belongs to nobody's session until the child makes it its own. */
static int open_pty(int *ours, int *theirs)
{
	int unlocked = 0, flags = O_RDWR | O_NOCTTY | O_CLOEXEC;

	ours[1] = open("/dev/ptmx", flags | O_NONBLOCK);
	if (ours[1] < 0 || ioctl(ours[1], TIOCSPTLCK, &unlocked))
		return -1;
	theirs[0] = ioctl(ours[1], TIOCGPTPEER, flags);
	theirs[1] = fcntl(theirs[0], F_DUPFD_CLOEXEC, 0);
	theirs[2] = fcntl(theirs[0], F_DUPFD_CLOEXEC, 0);
	ours[0] = fcntl(ours[1], F_DUPFD_CLOEXEC, 0);
	return theirs[0] < 0 || theirs[1] < 0 || theirs[2] < 0 || ours[0] < 0 ? -1 : 0;
}

static void kw_command_resize(struct kw_command *cmd, uint16_t rows, uint16_t columns)
{
	struct winsize size = { .ws_row = rows, .ws_col = columns };

	if (cmd->fds[1] >= 0)
		ioctl(cmd->fds[1], TIOCSWINSZ, &size);	/* fails on a pipe, as it should */
}

static int spawn(struct kw_command *cmd, const struct kw_exec *exec, const char *cwd, char **argv,
		 char **env)
{
	int theirs[3] = { -1, -1, -1 }, i, err, failed;

	cmd->pid = -1;
	if (exec->flags & KW_PTY)
		failed = open_pty(cmd->fds, theirs);
	else
		failed = open_pipes(cmd->fds, theirs, exec->flags);
	if (!failed) {
		if (exec->flags & KW_PTY)
			kw_command_resize(cmd, exec->rows, exec->columns);
		cmd->start_ns = now_ns();
		cmd->pid = fork();
		if (!cmd->pid)
			child(theirs, exec->flags, cwd, argv, env);
	}
	err = errno;
	for (i = 0; i < 3; i++)
		close_fd(&theirs[i]);
	if (cmd->pid < 0) {
		kw_command_detach(cmd);
		errno = err;
		return -1;
	}
	cmd->pidfd = syscall(SYS_pidfd_open, cmd->pid, 0);
	cmd->running = 1;
	return 0;
}

/* @payload is that of an EXEC and is cut into strings. 0, or -1 with errno set. */
static int kw_command_start(struct kw_command *cmd, char *payload, size_t len)
{
	struct kw_exec *exec = (struct kw_exec *)payload;
	char *text = payload + sizeof(*exec), *end = payload + len;
	char **cwd = NULL, **argv = NULL, **env = NULL;
	int ret = -1;

	if (len > sizeof(*exec) && exec->argc && (cwd = cut(&text, end, 1)) &&
	    (argv = cut(&text, end, exec->argc)) && (env = cut(&text, end, exec->envc))) {
		if (exec->flags & KW_FRESH)
			forget_host_files();
		ret = spawn(cmd, exec, cwd[0], argv, env);
	} else {
		errno = EINVAL;
	}
	free(cwd);
	free(argv);
	free(env);
	return ret;
}

/* Fills @fds with what to wait for, output only if @reading; returns how many. */
static int kw_command_poll(struct kw_command *cmd, struct pollfd *fds, int reading, int *timeout_ms)
{
	int i, n = 0;

	if (!cmd->running)
		return 0;
	if (cmd->pidfd >= 0)
		fds[n++] = (struct pollfd){ .fd = cmd->pidfd, .events = POLLIN };
	else if (reading)
		*timeout_ms = 10;	/* lingering */
	if (cmd->food && cmd->fds[0] >= 0)
		fds[n++] = (struct pollfd){ .fd = cmd->fds[0], .events = POLLOUT };
	for (i = 1; reading && i < 3; i++)
		if (cmd->fds[i] >= 0)
			fds[n++] = (struct pollfd){ .fd = cmd->fds[i], .events = POLLIN };
	return n;
}

static void eat(struct kw_command *cmd)
{
	ssize_t n = 0;

	if (!cmd->food)
		return;
	if (cmd->fds[0] >= 0 && cmd->pidfd >= 0) {
		n = write(cmd->fds[0], cmd->food + cmd->food_off, cmd->food_len - cmd->food_off);
		if (n < 0 && errno == EAGAIN)
			return;
	}
	if (n > 0)
		cmd->food_off += n;
	else
		close_fd(&cmd->fds[0]);	/* nobody reads, or end of file asked for */
	if (n > 0 && cmd->food_off < cmd->food_len)
		return;
	free(cmd->food);
	cmd->food = NULL;
	cmd->fed = 1;
}

/* Does what is due without waiting: feeds stdin, notices the exit. */
static void kw_command_step(struct kw_command *cmd)
{
	int i;

	eat(cmd);
	if (cmd->pidfd < 0 || waitpid(cmd->pid, &cmd->wstatus, WNOHANG) != cmd->pid)
		return;
	cmd->end_ns = now_ns();
	close_fd(&cmd->pidfd);
	for (i = 1; i < 3; i++)
		if (cmd->fds[i] < 0 || ioctl(cmd->fds[i], FIONREAD, &cmd->owed[i]))
			cmd->owed[i] = 0;
}

/* Queues bytes for stdin, none meaning end of file; kw_command_ate() tells when they are gone. */
static void kw_command_feed(struct kw_command *cmd, const unsigned char *bytes, size_t len)
{
	free(cmd->food);
	cmd->food = malloc(len + 1);
	if (!cmd->food)
		return;
	memcpy(cmd->food, bytes, len);
	cmd->food_off = 0;
	cmd->food_len = len;
	eat(cmd);
}

static int kw_command_ate(struct kw_command *cmd)
{
	int fed = cmd->fed;

	cmd->fed = 0;
	return fed;
}

static void kw_command_signal(struct kw_command *cmd, int signo)
{
	/* The child may not have reached its setsid() yet. */
	if (cmd->pidfd >= 0 && kill(-cmd->pid, signo))
		kill(cmd->pid, signo);
}

/* Reads output of stream 1 or 2; <= 0 if there is none now. */
static ssize_t kw_command_read(struct kw_command *cmd, int stream, void *buf, size_t len)
{
	ssize_t n;

	if (cmd->fds[stream] < 0)
		return 0;
	n = read(cmd->fds[stream], buf, len);
	if (n > 0)
		cmd->owed[stream] -= n;
	else if (n == 0 || errno != EAGAIN)
		close_fd(&cmd->fds[stream]);
	return n;
}

/*
 * True once: the process ended and its pipes are at their end, or 200 ms have
 * passed and what it wrote itself is read (a daemon may keep its pipes open).
 */
static int kw_command_ended(struct kw_command *cmd, struct kw_exited *exited)
{
	int open = cmd->fds[1] >= 0 || cmd->fds[2] >= 0;
	int owed = (cmd->fds[1] >= 0 && cmd->owed[1] > 0) || (cmd->fds[2] >= 0 && cmd->owed[2] > 0);
	int lingering = open && (owed || now_ns() - cmd->end_ns < LINGER_NS);

	if (!cmd->running || cmd->pidfd >= 0 || lingering)
		return 0;
	exited->signal = WIFSIGNALED(cmd->wstatus) ? WTERMSIG(cmd->wstatus) : 0;
	exited->status = exited->signal ? 128 + exited->signal : WEXITSTATUS(cmd->wstatus);
	exited->duration_ns = cmd->end_ns - cmd->start_ns;
	kw_command_detach(cmd);
	return 1;
}

#endif
