// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Measures, for watched addresses, the executions that are no arrivals: restarts after a
 * fault, and the re-entries of rep string instructions. hits = executions - restarts.
 *
 * An interrupted context is told by its (rip, rsp): while the context is away, no other one
 * uses that stack at that depth, wherever the task runs next.
 *
 * Fault: at the first instruction of an exception entry that pushes an error code, the
 * frame names the instruction that started and did not finish. It is restarted if an iretq
 * goes back to the same (rip, rsp); it is not if an iretq goes to a fix-up (same rsp, other
 * rip). Interrupts never count: QEMU takes them before an instruction starts.
 *
 * rep: an execution opens (rip, rsp), execution of the instruction behind it or an iretq
 * elsewhere at that rsp closes it; executions while open are re-entries, whatever the cause
 * (interrupt, fault, or QEMU leaving its own loop).
 */
#include <pthread.h>
#include <string.h>
#include "oracle.h"

#define MAX_WATCHES 65536
#define MAX_OPEN 4096
#define MAX_ENTRIES 16

struct watch {
	uint64_t vaddr;
	uint64_t restarts;
};

struct open {
	uint64_t vaddr;
	uint64_t rsp;
	uint32_t watch;
	bool rep;
};

struct frame {
	uint64_t rip, cs, rflags, rsp, ss;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct watch watches[MAX_WATCHES];
static uint8_t lengths[MAX_WATCHES];
static uint32_t n_watches;
static struct open opened[MAX_OPEN];
static uint32_t n_opened;
static uint64_t entries[MAX_ENTRIES];
static uint32_t n_entries;
static uint64_t lost;
static struct qemu_plugin_register *rsp_register;
static __thread GByteArray *buffer;

/* In a vCPU's own context, as the plug-in interface demands. */
void restart_find_registers(void)
{
	GArray *registers = qemu_plugin_get_registers();
	const qemu_plugin_reg_descriptor *all = (const void *)registers->data;

	for (unsigned int i = 0; i < registers->len; i++)
		if (!strcmp(all[i].name, "rsp"))
			rsp_register = all[i].handle;
	g_array_free(registers, 1);
}

void restart_clear(void)
{
	pthread_mutex_lock(&lock);
	n_watches = 0;
	n_opened = 0;
	n_entries = 0;
	lost = 0;
	pthread_mutex_unlock(&lock);
}

/* Watches come in ascending order: the search below halves. */
bool restart_add_watch(uint64_t vaddr, uint64_t len)
{
	if (n_watches == MAX_WATCHES || (n_watches && watches[n_watches - 1].vaddr >= vaddr))
		return false;
	watches[n_watches].vaddr = vaddr;
	watches[n_watches].restarts = 0;
	lengths[n_watches++] = len;
	return true;
}

bool restart_add_fault_entry(uint64_t vaddr)
{
	if (n_entries == MAX_ENTRIES)
		return false;
	entries[n_entries++] = vaddr;
	return true;
}

bool restart_ready(void)
{
	return rsp_register != NULL;
}

/* Returns the row of the last watch at or below vaddr, or -1. */
static long find_watch(uint64_t vaddr)
{
	long lo = 0, hi = n_watches;

	while (lo < hi) {
		long mid = (lo + hi) / 2;

		if (watches[mid].vaddr <= vaddr)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo - 1;
}

static long find_exact(uint64_t vaddr)
{
	long i = find_watch(vaddr);

	return i >= 0 && watches[i].vaddr == vaddr ? i : -1;
}

static GByteArray *scratch(void)
{
	if (!buffer)
		buffer = g_byte_array_new();
	g_byte_array_set_size(buffer, 0);
	return buffer;
}

static uint64_t read_rsp(void)
{
	GByteArray *to = scratch();
	uint64_t rsp = 0;

	if (qemu_plugin_read_register(rsp_register, to) == sizeof(rsp))
		memcpy(&rsp, to->data, sizeof(rsp));
	return rsp;
}

static bool read_frame(uint64_t at, struct frame *frame)
{
	GByteArray *to = scratch();

	if (!qemu_plugin_read_memory_vaddr(at, to, sizeof(*frame)))
		return false;
	memcpy(frame, to->data, sizeof(*frame));
	return !(frame->cs & 3);	/* user instructions are not watched */
}

/* The functions below: caller holds the lock. */
static void open_one(uint64_t vaddr, uint64_t rsp, uint32_t watch, bool rep)
{
	if (n_opened == MAX_OPEN) {
		lost++;
		return;
	}
	opened[n_opened++] = (struct open){ vaddr, rsp, watch, rep };
}

static long find_open(uint64_t vaddr, uint64_t rsp)
{
	for (uint32_t i = 0; i < n_opened; i++)
		if (opened[i].vaddr == vaddr && opened[i].rsp == rsp)
			return i;
	return -1;
}

static void close_one(long i)
{
	if (i >= 0)
		opened[i] = opened[--n_opened];
}

static void on_fault_entry(unsigned int cpu, void *data)
{
	struct frame frame;
	long watch;

	(void)cpu, (void)data;
	if (!read_frame(read_rsp() + 8, &frame))
		return;
	watch = find_exact(frame.rip);
	if (watch < 0)
		return;
	pthread_mutex_lock(&lock);
	if (find_open(frame.rip, frame.rsp) < 0)	/* a rep opened itself */
		open_one(frame.rip, frame.rsp, watch, false);
	pthread_mutex_unlock(&lock);
}

static void on_iretq(unsigned int cpu, void *data)
{
	struct frame frame;

	(void)cpu, (void)data;
	if (!n_opened || !read_frame(read_rsp(), &frame))
		return;
	pthread_mutex_lock(&lock);
	for (uint32_t i = n_opened; i-- > 0;) {
		bool back = opened[i].vaddr == frame.rip;

		if (opened[i].rsp != frame.rsp || (opened[i].rep && back))
			continue;
		watches[opened[i].watch].restarts += back;
		close_one(i);
	}
	pthread_mutex_unlock(&lock);
}

static void on_rep(unsigned int cpu, void *watch)
{
	uint32_t row = (uintptr_t)watch;
	uint64_t rsp = read_rsp();

	(void)cpu;
	pthread_mutex_lock(&lock);
	if (find_open(watches[row].vaddr, rsp) >= 0)
		watches[row].restarts++;
	else
		open_one(watches[row].vaddr, rsp, row, true);
	pthread_mutex_unlock(&lock);
}

static void on_behind_rep(unsigned int cpu, void *watch)
{
	uint64_t rsp = read_rsp();

	(void)cpu;
	pthread_mutex_lock(&lock);
	close_one(find_open(watches[(uintptr_t)watch].vaddr, rsp));
	pthread_mutex_unlock(&lock);
}

static bool is_prefix(uint8_t byte)
{
	return byte == 0x66 || byte == 0x67 || byte == 0x2e || byte == 0x36 || byte == 0x3e ||
	       byte == 0x26 || byte == 0x64 || byte == 0x65 || byte == 0xf2 || byte == 0xf3 ||
	       (byte & 0xf0) == 0x40;
}

static bool is_rep_string(const struct insn *insn)
{
	bool rep = false;
	int i;

	for (i = 0; i < insn->len && is_prefix(insn->code[i]); i++)
		rep |= insn->code[i] == 0xf2 || insn->code[i] == 0xf3;
	return rep && i + 1 == insn->len &&
	       ((insn->code[i] & 0xfc) == 0x6c || (insn->code[i] & 0xfc) == 0xa4 ||
		(insn->code[i] >= 0xaa && insn->code[i] <= 0xaf));
}

static void watch_with(const struct insn *insn, exec_cb cb, uintptr_t data)
{
	qemu_plugin_register_vcpu_insn_exec_cb(insn->handle, cb, QEMU_PLUGIN_CB_R_REGS,
					       (void *)data);
}

/* Called for each translated instruction of the kernel half while something is watched. */
void restart_insn(const struct insn *insn)
{
	long here = find_exact(insn->vaddr), before = find_watch(insn->vaddr - 1);

	for (uint32_t i = 0; i < n_entries; i++)
		if (entries[i] == insn->vaddr)
			watch_with(insn, on_fault_entry, 0);
	if (is_iretq(insn))
		watch_with(insn, on_iretq, 0);
	if (before >= 0 && watches[before].vaddr + lengths[before] == insn->vaddr)
		watch_with(insn, on_behind_rep, before);
	if (here >= 0 && is_rep_string(insn))
		watch_with(insn, on_rep, here);
}

long restart_write(FILE *to)
{
	long n;

	pthread_mutex_lock(&lock);
	n = fwrite(watches, sizeof(*watches), n_watches, to) == n_watches ? (long)n_watches : -1;
	pthread_mutex_unlock(&lock);
	return n;
}

uint64_t restart_lost(void)
{
	return lost;
}
