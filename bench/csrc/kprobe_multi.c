// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * kprobe_multi: one BPF program that does nothing at the entries of many
 * functions, and off again. Standard input gives their run-time addresses,
 * 8 bytes each. Only bpf(2), no library.
 *
 * Prints what attaching took and what detaching took, in ns, and on how many
 * functions the kernel said something was attached in between.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/bpf.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MOST		(1 << 17)
#define ENABLED		"/sys/kernel/tracing/enabled_functions"
#define EXIT_BROKEN	125

static long long now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void die(const char *what)
{
	fprintf(stderr, "kprobe_multi: cannot %s: %s\n", what, strerror(errno));
	exit(EXIT_BROKEN);
}

static int bpf(int command, union bpf_attr *attr)
{
	return syscall(SYS_bpf, command, attr, sizeof(*attr));
}

static int load_program(void)
{
	const struct bpf_insn insns[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 0 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	union bpf_attr attr;
	int program;

	memset(&attr, 0, sizeof(attr));
	attr.prog_type = BPF_PROG_TYPE_KPROBE;
	attr.expected_attach_type = BPF_TRACE_KPROBE_MULTI;
	attr.insns = (unsigned long)insns;
	attr.insn_cnt = sizeof(insns) / sizeof(*insns);
	attr.license = (unsigned long)"GPL";
	program = bpf(BPF_PROG_LOAD, &attr);
	if (program < 0)
		die("load the program");
	return program;
}

static int attach(int program, const unsigned long long *addrs, int count)
{
	union bpf_attr attr;
	int link;

	memset(&attr, 0, sizeof(attr));
	attr.link_create.prog_fd = program;
	attr.link_create.attach_type = BPF_TRACE_KPROBE_MULTI;
	attr.link_create.kprobe_multi.cnt = count;
	attr.link_create.kprobe_multi.addrs = (unsigned long)addrs;
	link = bpf(BPF_LINK_CREATE, &attr);
	if (link < 0)
		die("attach the program");
	return link;
}

static int count_enabled(void)
{
	FILE *file = fopen(ENABLED, "r");
	int c, lines = 0;

	if (!file)
		die("open " ENABLED);
	while ((c = fgetc(file)) != EOF)
		lines += c == '\n';
	fclose(file);
	return lines;
}

int main(void)
{
	static unsigned long long addrs[MOST];
	long long began, attached, enabled;
	int program, count, link;

	count = fread(addrs, sizeof(*addrs), MOST, stdin);
	program = load_program();
	began = now_ns();
	link = attach(program, addrs, count);
	attached = now_ns() - began;
	enabled = count_enabled();
	began = now_ns();
	if (close(link))
		die("detach the program");
	printf("%lld %lld %lld\n", attached, now_ns() - began, enabled);
	return 0;
}
