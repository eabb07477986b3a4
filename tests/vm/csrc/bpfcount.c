// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A BPF program that counts, as a tracer would load it; it stays when this process ends.
 *
 *   bpfcount attach kprobe|kretprobe|fentry|fexit FUNCTION OFFSET NAME
 *   bpfcount read NAME      prints the count
 *   bpfcount detach NAME
 */
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <linux/bpf.h>
#include <linux/btf.h>
#include <linux/magic.h>
#include <linux/perf_event.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>

#define FOLDER "/sys/fs/bpf"

static int bpf(int cmd, union bpf_attr *attr, const char *what)
{
	long ret = syscall(SYS_bpf, cmd, attr, sizeof(*attr));

	if (ret < 0)
		err(1, "%s", what);
	return ret;
}

static const char *path_of(const char *name, const char *suffix)
{
	static char path[200];

	snprintf(path, sizeof(path), FOLDER "/%s_%s", name, suffix);
	return path;
}

static void mount_once(void)
{
	struct statfs fs;

	if (statfs(FOLDER, &fs) ||
	    (fs.f_type != BPF_FS_MAGIC && mount("bpf", FOLDER, "bpf", 0, NULL)))
		err(1, "mount " FOLDER);
}

static void pin(int fd, const char *name, const char *suffix)
{
	union bpf_attr attr = { .pathname = (uintptr_t)path_of(name, suffix), .bpf_fd = fd };

	bpf(BPF_OBJ_PIN, &attr, "pin");
}

/* ---- BTF: the number of a function ---------------------------------------------------------- */

static size_t rest_of(const struct btf_type *t)
{
	static const uint8_t per_member[NR_BTF_KINDS] = {
		[BTF_KIND_STRUCT] = sizeof(struct btf_member),
		[BTF_KIND_UNION] = sizeof(struct btf_member),
		[BTF_KIND_ENUM] = sizeof(struct btf_enum),
		[BTF_KIND_ENUM64] = sizeof(struct btf_enum64),
		[BTF_KIND_FUNC_PROTO] = sizeof(struct btf_param),
		[BTF_KIND_DATASEC] = sizeof(struct btf_var_secinfo),
	};
	static const uint8_t once[NR_BTF_KINDS] = {
		[BTF_KIND_INT] = sizeof(uint32_t),
		[BTF_KIND_ARRAY] = sizeof(struct btf_array),
		[BTF_KIND_VAR] = sizeof(struct btf_var),
		[BTF_KIND_DECL_TAG] = sizeof(struct btf_decl_tag),
	};
	int kind = BTF_INFO_KIND(t->info);

	return once[kind] + (size_t)per_member[kind] * BTF_INFO_VLEN(t->info);
}

static uint32_t btf_id_of(const char *function)
{
	const char *file = "/sys/kernel/btf/vmlinux", *names;
	int fd = open(file, O_RDONLY | O_CLOEXEC);
	struct btf_header *header;
	struct stat st;
	uint32_t id = 1;
	ssize_t have = 0, got;
	char *data, *at;

	if (fd < 0 || fstat(fd, &st))
		err(1, "%s", file);
	data = malloc(st.st_size);
	while (data && have < st.st_size && (got = read(fd, data + have, st.st_size - have)) > 0)
		have += got;
	header = (void *)data;
	if (!data || have < st.st_size || header->magic != BTF_MAGIC)
		errx(1, "%s cannot be read", file);
	at = data + header->hdr_len + header->type_off;
	names = data + header->hdr_len + header->str_off;
	for (char *end = at + header->type_len; at < end; id++) {
		struct btf_type *t = (void *)at;

		if (BTF_INFO_KIND(t->info) == BTF_KIND_FUNC && !strcmp(names + t->name_off, function))
			return id;
		at += sizeof(*t) + rest_of(t);
	}
	errx(1, "BTF knows no function %s", function);
}

/* ---- the program ---------------------------------------------------------------------------- */

static int create_map(void)
{
	union bpf_attr attr = {
		.map_type = BPF_MAP_TYPE_ARRAY,
		.key_size = sizeof(uint32_t),
		.value_size = sizeof(uint64_t),
		.max_entries = 1,
	};

	return bpf(BPF_MAP_CREATE, &attr, "create a map");
}

/* (*value)++, for all CPUs at once; return 0 */
static int load(int map, uint32_t type, uint32_t attach_type, uint32_t btf_id)
{
	struct bpf_insn code[] = {
		{ .code = BPF_LD | BPF_DW | BPF_IMM, .dst_reg = BPF_REG_1,
		  .src_reg = BPF_PSEUDO_MAP_VALUE, .imm = map },
		{},
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_2, .imm = 1 },
		{ .code = BPF_STX | BPF_DW | BPF_ATOMIC, .dst_reg = BPF_REG_1,
		  .src_reg = BPF_REG_2, .imm = BPF_ADD },
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	static char log[10000];
	union bpf_attr attr = {
		.prog_type = type,
		.insn_cnt = sizeof(code) / sizeof(code[0]),
		.insns = (uintptr_t)code,
		.license = (uintptr_t)"GPL",
		.log_buf = (uintptr_t)log,
		.log_size = sizeof(log),
		.log_level = 1,
		.expected_attach_type = attach_type,
		.attach_btf_id = btf_id,
	};
	long ret = syscall(SYS_bpf, BPF_PROG_LOAD, &attr, sizeof(attr));

	if (ret < 0)
		err(1, "load: %s", log);
	return ret;
}

static int attach_tracing(int map, const char *function, uint32_t attach_type)
{
	union bpf_attr attr = {
		.raw_tracepoint.prog_fd =
			load(map, BPF_PROG_TYPE_TRACING, attach_type, btf_id_of(function)),
	};

	return bpf(BPF_RAW_TRACEPOINT_OPEN, &attr, "attach");
}

static int attach_kprobe(int map, const char *function, uint64_t offset, int is_return)
{
	struct perf_event_attr event = {
		.size = sizeof(event),
		.config = is_return,
		.kprobe_func = (uintptr_t)function,
		.probe_offset = offset,
	};
	union bpf_attr attr = { .link_create.attach_type = BPF_PERF_EVENT };
	FILE *file = fopen("/sys/bus/event_source/devices/kprobe/type", "re");
	int fd;

	if (!file || fscanf(file, "%u", &event.type) != 1)
		err(1, "the kprobe event source");
	fclose(file);
	fd = syscall(SYS_perf_event_open, &event, -1, 0, -1, PERF_FLAG_FD_CLOEXEC);
	if (fd < 0)
		err(1, "perf_event_open");
	attr.link_create.target_fd = fd;
	attr.link_create.prog_fd = load(map, BPF_PROG_TYPE_KPROBE, 0, 0);
	return bpf(BPF_LINK_CREATE, &attr, "attach");
}

static int attach(const char *how, const char *function, uint64_t offset, const char *name)
{
	int map = create_map(), link;

	if (!strcmp(how, "fentry") || !strcmp(how, "fexit"))
		link = attach_tracing(map, function,
				      how[1] == 'e' && how[2] == 'n' ? BPF_TRACE_FENTRY :
								       BPF_TRACE_FEXIT);
	else
		link = attach_kprobe(map, function, offset, !strcmp(how, "kretprobe"));
	mount_once();
	pin(map, name, "map");
	pin(link, name, "link");
	return 0;
}

static int show(const char *name)
{
	union bpf_attr attr = { .pathname = (uintptr_t)path_of(name, "map") };
	int map = bpf(BPF_OBJ_GET, &attr, "open the map");
	uint32_t key = 0;
	uint64_t value;
	union bpf_attr look = {
		.map_fd = map,
		.key = (uintptr_t)&key,
		.value = (uintptr_t)&value,
	};

	bpf(BPF_MAP_LOOKUP_ELEM, &look, "read the map");
	return printf("%llu\n", (unsigned long long)value) < 0;
}

static int detach(const char *name)
{
	if (unlink(path_of(name, "link")))
		err(1, "detach");
	return unlink(path_of(name, "map"));
}

int main(int argc, char **argv)
{
	if (argc == 6 && !strcmp(argv[1], "attach"))
		return attach(argv[2], argv[3], strtoull(argv[4], NULL, 0), argv[5]);
	if (argc == 3 && !strcmp(argv[1], "read"))
		return show(argv[2]);
	if (argc == 3 && !strcmp(argv[1], "detach"))
		return detach(argv[2]);
	return 2;
}
