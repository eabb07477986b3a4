// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Runs machine code from a given state and reports the state in which it stops.
 *
 * Each job comes on stdin and is run in a child of its own: a signal handler
 * loads the start state by returning to it, and another signal (int3 at every
 * place code may arrive at, or a fault) is the end.  The layout of jobs and
 * replies is in cpu.py.
 */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#define MAX_MAPS 8
#define MAX_MEMORY (1 << 20)
#define LIMIT_S 5

struct state {
	uint64_t regs[16]; /* in encoding order */
	uint64_t flags;
	uint64_t rip;
};

struct job {
	struct state state;
	uint64_t gs;
	uint64_t maps;
	struct map {
		uint64_t addr;
		uint64_t size;
		uint64_t code;
	} map[MAX_MAPS];
};

struct reply {
	int64_t signal; /* that ended the code; negative: it killed the child */
	uint64_t fault;
	struct state state;
	uint8_t memory[MAX_MEMORY]; /* of maps that are not code */
};

static const int places[16] = {
	REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
	REG_R8,	 REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
};

static struct job job;
static struct reply *reply; /* shared with the child */
static uint8_t content[MAX_MEMORY];

static void read_all(void *to, size_t size)
{
	for (uint8_t *at = to; size;) {
		ssize_t got = read(0, at, size);

		if (got <= 0)
			exit(got < 0);
		at += got;
		size -= got;
	}
}

static void write_all(const void *from, size_t size)
{
	for (const uint8_t *at = from; size;) {
		ssize_t put = write(1, at, size);

		if (put <= 0)
			exit(1);
		at += put;
		size -= put;
	}
}

static void enter(int signal, siginfo_t *info, void *context)
{
	greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;

	(void)signal, (void)info;
	for (int i = 0; i < 16; i++)
		regs[places[i]] = job.state.regs[i];
	regs[REG_EFL] = job.state.flags;
	regs[REG_RIP] = job.state.rip;
}

static void leave(int signal, siginfo_t *info, void *context)
{
	greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
	uint8_t *to = reply->memory;

	for (int i = 0; i < 16; i++)
		reply->state.regs[i] = regs[places[i]];
	reply->state.flags = regs[REG_EFL];
	reply->state.rip = regs[REG_RIP];
	reply->fault = (uintptr_t)info->si_addr;
	for (uint64_t i = 0; i < job.maps; i++) {
		if (job.map[i].code)
			continue;
		memcpy(to, (void *)job.map[i].addr, job.map[i].size);
		to += job.map[i].size;
	}
	reply->signal = signal;
	_exit(0);
}

static void catch(int signal, void (*handler)(int, siginfo_t *, void *))
{
	struct sigaction action = { .sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK };

	sigaction(signal, &action, NULL);
}

/* Never writable and executable at the same time. */
static void map_all(void)
{
	const uint8_t *from = content;

	for (uint64_t i = 0; i < job.maps; i++) {
		struct map *m = &job.map[i];
		void *mem = mmap((void *)m->addr, m->size, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);

		if (mem != (void *)m->addr)
			_exit(2);
		memcpy(mem, from, m->size);
		from += m->size;
		if (m->code && mprotect(mem, m->size, PROT_READ | PROT_EXEC))
			_exit(3);
	}
}

static void run(void)
{
	static uint8_t stack[1 << 16];
	stack_t other = { .ss_sp = stack, .ss_size = sizeof(stack) };
	const int ends[] = { SIGTRAP, SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGSYS };

	alarm(LIMIT_S);
	map_all();
	sigaltstack(&other, NULL);
	for (size_t i = 0; i < sizeof(ends) / sizeof(ends[0]); i++)
		catch(ends[i], leave);
	catch(SIGUSR1, enter);
	syscall(SYS_arch_prctl, ARCH_SET_GS, job.gs);
	raise(SIGUSR1);
	_exit(4);
}

int main(void)
{
	reply = mmap(NULL, sizeof(*reply), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
		     0);
	for (;;) {
		size_t total = 0, data = 0;
		pid_t child;
		int status;

		read_all(&job, sizeof(job));
		for (uint64_t i = 0; i < job.maps; i++) {
			total += job.map[i].size;
			data += job.map[i].code ? 0 : job.map[i].size;
		}
		if (job.maps > MAX_MAPS || total > MAX_MEMORY)
			return 1;
		read_all(content, total);
		memset(reply, 0, offsetof(struct reply, memory) + data);
		child = fork();
		if (!child)
			run();
		waitpid(child, &status, 0);
		if (!reply->signal)
			reply->signal = -(WIFSIGNALED(status) ? WTERMSIG(status) : 1000 + WEXITSTATUS(status));
		write_all(reply, offsetof(struct reply, memory) + data);
	}
}
