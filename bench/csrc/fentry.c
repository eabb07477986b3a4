// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * fentry FUNCTION empty|count COMMAND...: run a command with a BPF program at
 * the entry of a kernel function; `count` adds one to a map and fails if the
 * map says 0 afterwards. Only bpf(2), no library.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/bpf.h>
#include <linux/btf.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define BTF_ROOM	(64 << 20)
#define KIND_ENUM64	19	/* newer than some headers */
#define EXIT_BROKEN	125

static void die(const char *what)
{
	fprintf(stderr, "fentry: cannot %s: %s\n", what, strerror(errno));
	exit(EXIT_BROKEN);
}

static int bpf(int command, union bpf_attr *attr)
{
	return syscall(SYS_bpf, command, attr, sizeof(*attr));
}

static char *read_btf(void)
{
	char *data = malloc(BTF_ROOM);
	int fd = open("/sys/kernel/btf/vmlinux", O_RDONLY | O_CLOEXEC);
	size_t used = 0;
	ssize_t got;

	if (fd < 0 || !data)
		die("open the kernel's BTF");
	while ((got = read(fd, data + used, BTF_ROOM - used)) > 0)
		used += got;
	close(fd);
	return data;
}

/* Bytes behind the head of a type. References: Documentation/bpf/btf.rst of the kernel. */
static size_t tail_bytes(const struct btf_type *type)
{
	size_t n = BTF_INFO_VLEN(type->info);

	switch (BTF_INFO_KIND(type->info)) {
	case BTF_KIND_INT:
	case BTF_KIND_VAR:
	case BTF_KIND_DECL_TAG:
		return 4;
	case BTF_KIND_ARRAY:
		return sizeof(struct btf_array);
	case BTF_KIND_STRUCT:
	case BTF_KIND_UNION:
		return n * sizeof(struct btf_member);
	case BTF_KIND_ENUM:
		return n * sizeof(struct btf_enum);
	case BTF_KIND_FUNC_PROTO:
		return n * sizeof(struct btf_param);
	case BTF_KIND_DATASEC:
		return n * sizeof(struct btf_var_secinfo);
	case KIND_ENUM64:
		return n * 12;
	}
	return 0;
}

/* Types have no numbers of their own: the n-th one is n, from 1. */
static int find_function(const char *name)
{
	char *data = read_btf();
	const struct btf_header *head = (void *)data;
	char *at = data + head->hdr_len + head->type_off, *end = at + head->type_len;
	const char *strings = data + head->hdr_len + head->str_off;
	const struct btf_type *type;
	int id;

	for (id = 1; at < end; id++, at += sizeof(*type) + tail_bytes(type)) {
		type = (void *)at;
		if (BTF_INFO_KIND(type->info) == BTF_KIND_FUNC &&
		    !strcmp(strings + type->name_off, name))
			return id;
	}
	errno = ENOENT;
	die("find the function in BTF");
	return 0;
}

static int make_map(void)
{
	union bpf_attr attr = {
		.map_type = BPF_MAP_TYPE_ARRAY,
		.key_size = 4,
		.value_size = 8,
		.max_entries = 1,
	};
	int map = bpf(BPF_MAP_CREATE, &attr);

	if (map < 0)
		die("make a map");
	return map;
}

static unsigned long long count_of(int map)
{
	unsigned long long value = 0;
	unsigned int key = 0;
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.map_fd = map;
	attr.key = (unsigned long)&key;
	attr.value = (unsigned long)&value;
	if (bpf(BPF_MAP_LOOKUP_ELEM, &attr))
		die("read the map");
	return value;
}

static int load_program(const struct bpf_insn *insns, int count, int function)
{
	static char log[65536];
	union bpf_attr attr;
	int program;

	memset(&attr, 0, sizeof(attr));
	attr.prog_type = BPF_PROG_TYPE_TRACING;
	attr.expected_attach_type = BPF_TRACE_FENTRY;
	attr.attach_btf_id = function;
	attr.insns = (unsigned long)insns;
	attr.insn_cnt = count;
	attr.license = (unsigned long)"GPL";
	attr.log_buf = (unsigned long)log;
	attr.log_size = sizeof(log);
	attr.log_level = 1;
	program = bpf(BPF_PROG_LOAD, &attr);
	if (program < 0) {
		fputs(log, stderr);
		die("load the program");
	}
	return program;
}

static int load_empty(int function)
{
	const struct bpf_insn insns[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 0 },
		{ .code = BPF_JMP | BPF_EXIT },
	};

	return load_program(insns, sizeof(insns) / sizeof(*insns), function);
}

static int load_counting(int function, int map)
{
	const struct bpf_insn insns[] = {
		/* r1 = address of the map's value, in two slots */
		{ .code = BPF_LD | BPF_DW | BPF_IMM, .dst_reg = 1,
		  .src_reg = BPF_PSEUDO_MAP_VALUE, .imm = map },
		{ 0 },
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 2, .imm = 1 },
		{ .code = BPF_STX | BPF_DW | BPF_ATOMIC, .dst_reg = 1, .src_reg = 2,
		  .imm = BPF_ADD },
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 0 },
		{ .code = BPF_JMP | BPF_EXIT },
	};

	return load_program(insns, sizeof(insns) / sizeof(*insns), function);
}

static void attach(int program)
{
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.raw_tracepoint.prog_fd = program;
	if (bpf(BPF_RAW_TRACEPOINT_OPEN, &attr) < 0)
		die("attach the program");
}

static int run(char **argv)
{
	pid_t pid = fork();
	int status;

	if (!pid) {
		execvp(argv[0], argv);
		_exit(127);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		die("run the command");
	return WIFEXITED(status) ? WEXITSTATUS(status) : EXIT_BROKEN;
}

int main(int argc, char **argv)
{
	int function, map, status, count;

	if (argc < 4)
		return 2;
	count = !strcmp(argv[2], "count");
	function = find_function(argv[1]);
	map = make_map();
	attach(count ? load_counting(function, map) : load_empty(function));
	status = run(argv + 3);
	if (count && !count_of(map)) {
		fprintf(stderr, "fentry: the program was never run\n");
		return EXIT_BROKEN;
	}
	return status;
}
