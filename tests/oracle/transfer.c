// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Records every transfer of control between translation blocks of the kernel half, as pairs
 * (from, to) with exact counts, with parallel vCPUs. Off unless asked for.
 *
 *   from	the instruction begun last on this vCPU, whether it completed or not
 *   to		the first instruction of the block that runs next on it
 *
 * Every kernel instruction stores its address inline; every block calls on_block, which
 * counts the pair before the block's first instruction. QEMU ends a block behind each
 * instruction that can go elsewhere; falling through inside a block is no pair. Behind some
 * others it ends one too (sti, wrmsr, out, rep, a page's end, device memory, 512
 * instructions): then the pair is a fall-through, told by the length of `from`.
 *
 * Exceptions and interrupts. QEMU 10.0 has no callback for them; they are told by `to`, the
 * entry of a gate in the IDT. For a fault `from` is the instruction that faulted: it began and
 * did not complete. For an interrupt, and a fault on fetching the next instruction, `from`
 * completed, and what it would have gone to comes after the iretq as a pair (iretq, to), if
 * at all: between the two the task may have moved to another vCPU. The same holds for an
 * interrupt that is taken at once behind an iretq or a sysretq: from = that.
 *
 * A pair (x, x) where x does not jump is a restart by QEMU: rep leaves its loop now and then,
 * an atomic that the host cannot do is repeated alone, code that writes to itself too.
 *
 * The lower half of the address space is one place, ORACLE_USER: which user instruction does
 * not matter, and user blocks pay one inline comparison. Early boot code runs there too; so
 * recording begins at the first return (iretq, sysret) from the kernel half to the lower one,
 * the first user process: init text and unpatched alternatives ran before.
 *
 * Each vCPU fills a table of its own, without a lock. A table that grew is left to whoever
 * may be reading it, and never freed: all old ones together are as large as the new one.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include "oracle.h"

#ifndef TRANSFER_MAX_SLOTS
#define TRANSFER_MAX_SLOTS (1u << 24)	/* per vCPU: 384 MiB */
#endif
#define FIRST_SLOTS 4u			/* few, so that every test grows it */

/* Linux maps its IDT here, read-only, KASLR or not, with 4 and 5 levels: CPU_ENTRY_AREA_BASE */
#define IDT_ADDR 0xfffffe0000000000ull
#define N_GATES 256
#define MIN_GATES 20			/* exceptions alone */

/* A place: an instruction of the kernel half with its length and kind, or one of these. */
enum { NOWHERE = 0, USER = 1 };
#define PLACE_ADDR ((1ull << 48) - 1)
#define PLACE_LEN_SHIFT 48
#define PLACE_IS_RETURN (1ull << 52)

enum class {				/* names as in transfers.py */
	CLASS_SYNC,
	CLASS_ENTER,			/* from the lower half */
	CLASS_DELIVER,			/* kernel half to the entry of a gate */
	CLASS_RESUME,			/* from iretq or sysret to the kernel half */
	CLASS_LEAVE,			/* to the lower half */
};

struct slot {
	uint64_t from;			/* place, NOWHERE = free; written last */
	uint64_t to;			/* address, or USER */
	uint64_t count;
};

struct table {
	uint32_t n_slots;		/* a power of two */
	struct slot slots[];
};

/* Written by the vCPU that owns it; as large as two cache lines: no other one is slowed down. */
struct vcpu {
	uint64_t last;			/* place */
	struct table *table;
	uint64_t n_used;
	uint64_t dropped;		/* transfers, for want of memory */
	uint64_t pad[12];
};

struct row {
	uint64_t from;
	uint64_t to;
	uint64_t count;
	uint8_t class;
	uint8_t from_len;		/* bytes, 0 = from the lower half */
	uint8_t pad[6];
};

_Static_assert(sizeof(struct vcpu) == 128 && sizeof(struct row) == 32, "as described");

static struct qemu_plugin_scoreboard *vcpus;
static bool recording;
static pthread_once_t idt_once = PTHREAD_ONCE_INIT;
static uint64_t entries[N_GATES];	/* ascending */
static size_t n_entries;

/* --- the IDT --- */

static int compare_u64(const void *left, const void *right)
{
	uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

	return (a > b) - (a < b);
}

/* On a vCPU. A gate: offset 15..0, selector, flags (bit 15: present), offset 31..16, 63..32. */
static void read_idt(void)
{
	GByteArray *idt = g_byte_array_new();
	uint16_t words[8];

	if (!qemu_plugin_read_memory_vaddr(IDT_ADDR, idt, N_GATES * sizeof(words)))
		return;
	for (int i = 0; i < N_GATES; i++) {
		memcpy(words, idt->data + i * sizeof(words), sizeof(words));
		if (words[2] >> 15)
			entries[n_entries++] = (uint64_t)words[5] << 48 | (uint64_t)words[4] << 32 |
					       (uint64_t)words[3] << 16 | words[0];
	}
	qsort(entries, n_entries, sizeof(*entries), compare_u64);
}

static bool is_entry(uint64_t addr)
{
	return bsearch(&addr, entries, n_entries, sizeof(addr), compare_u64);
}

/* --- a vCPU's table --- */

static struct slot *find_slot(struct table *table, uint64_t from, uint64_t to)
{
	uint64_t hash = (from ^ (to << 23 | to >> 41)) * 0x9e3779b97f4a7c15ull;
	uint32_t mask = table->n_slots - 1, i = (hash ^ hash >> 32) & mask;

	while (table->slots[i].from &&
	       (table->slots[i].from != from || table->slots[i].to != to))
		i = (i + 1) & mask;
	return &table->slots[i];
}

static bool grow(struct vcpu *here)
{
	struct table *old = here->table, *table;
	uint32_t n = old ? old->n_slots * 2 : FIRST_SLOTS;

	if (n > TRANSFER_MAX_SLOTS)
		return false;
	table = calloc(1, sizeof(*table) + n * sizeof(struct slot));
	if (!table)
		return false;
	table->n_slots = n;
	for (uint32_t i = 0; old && i < old->n_slots; i++)
		if (old->slots[i].from)
			*find_slot(table, old->slots[i].from, old->slots[i].to) = old->slots[i];
	__atomic_store_n(&here->table, table, __ATOMIC_RELEASE);
	return true;
}

/* Half of the slots stay free; all but one are taken when there is no memory for more. */
static struct slot *add_slot(struct vcpu *here, uint64_t from, uint64_t to)
{
	struct slot *slot;

	if ((!here->table || here->n_used >= here->table->n_slots / 2) && !grow(here) &&
	    (!here->table || here->n_used + 1 >= here->table->n_slots))
		return NULL;
	here->n_used++;
	slot = find_slot(here->table, from, to);
	slot->to = to;
	__atomic_store_n(&slot->from, from, __ATOMIC_RELEASE);
	return slot;
}

static void count_pair(struct vcpu *here, uint64_t from, uint64_t to)
{
	struct slot *slot = here->table ? find_slot(here->table, from, to) : NULL;

	if (!slot || !slot->from)
		slot = add_slot(here, from, to);
	if (slot)
		slot->count++;
	else
		here->dropped++;
}

/* --- execution --- */

static void on_block(unsigned int cpu, void *vaddr)
{
	struct vcpu *here = qemu_plugin_scoreboard_find(vcpus, cpu);

	if (__atomic_load_n(&recording, __ATOMIC_RELAXED) && here->last != NOWHERE)
		count_pair(here, here->last, (uint64_t)vaddr);
}

/* A block of the lower half after one of the kernel half. */
static void on_lower_block(unsigned int cpu, void *unused)
{
	struct vcpu *here = qemu_plugin_scoreboard_find(vcpus, cpu);

	(void)unused;
	if (here->last & PLACE_IS_RETURN && !__atomic_load_n(&recording, __ATOMIC_RELAXED)) {
		pthread_once(&idt_once, read_idt);
		__atomic_store_n(&recording, true, __ATOMIC_RELAXED);
	}
	if (__atomic_load_n(&recording, __ATOMIC_RELAXED) && here->last != NOWHERE)
		count_pair(here, here->last, USER);
	here->last = USER;
}

/* --- translation --- */

static bool is_sysret(const struct insn *insn)
{
	unsigned int rex = (insn->code[0] & 0xf0) == 0x40;

	return insn->len == rex + 2 && insn->code[rex] == 0x0f && insn->code[rex + 1] == 0x07;
}

/* Called for each translated instruction of the kernel half while this is on. */
void transfer_insn(const struct insn *insn)
{
	qemu_plugin_u64 last = { .score = vcpus, .offset = offsetof(struct vcpu, last) };
	uint64_t place = (insn->vaddr & PLACE_ADDR) | (uint64_t)insn->len << PLACE_LEN_SHIFT;

	if (is_iretq(insn) || is_sysret(insn))
		place |= PLACE_IS_RETURN;
	qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(insn->handle,
							    QEMU_PLUGIN_INLINE_STORE_U64, last,
							    place);
}

/* Called for each translated block while this is on. */
void transfer_block(struct qemu_plugin_tb *tb)
{
	qemu_plugin_u64 last = { .score = vcpus, .offset = offsetof(struct vcpu, last) };
	uint64_t vaddr = qemu_plugin_tb_vaddr(tb);

	if (vaddr >= KERNEL_HALF)
		qemu_plugin_register_vcpu_tb_exec_cb(tb, on_block, QEMU_PLUGIN_CB_NO_REGS,
						     (void *)vaddr);
	else
		qemu_plugin_register_vcpu_tb_exec_cond_cb(tb, on_lower_block,
							  QEMU_PLUGIN_CB_NO_REGS,
							  QEMU_PLUGIN_COND_NE, last, USER, NULL);
}

void transfer_init(void)
{
	vcpus = qemu_plugin_scoreboard_new(sizeof(struct vcpu));
}

/* All vCPUs are stopped. Counts stay; where each vCPU was last is not known any more. */
void transfer_switched(void)
{
	recording = false;
	for (int cpu = 0; cpu < qemu_plugin_num_vcpus(); cpu++)
		((struct vcpu *)qemu_plugin_scoreboard_find(vcpus, cpu))->last = NOWHERE;
}

/* --- reading, on the control thread --- */

const char *transfer_problem(void)
{
	for (int cpu = 0; cpu < qemu_plugin_num_vcpus(); cpu++) {
		struct vcpu *there = qemu_plugin_scoreboard_find(vcpus, cpu);

		if (__atomic_load_n(&there->table, __ATOMIC_ACQUIRE))
			return n_entries < MIN_GATES ? "the IDT is not where Linux has it" : NULL;
	}
	return "nothing is recorded: off, or no user process yet";
}

static enum class classify(uint64_t from, uint64_t to)
{
	if (from == USER)
		return CLASS_ENTER;
	if (to == USER)
		return CLASS_LEAVE;
	if (is_entry(to))
		return CLASS_DELIVER;
	return from & PLACE_IS_RETURN ? CLASS_RESUME : CLASS_SYNC;
}

static bool write_slot(FILE *to, const struct slot *slot, uint64_t from)
{
	struct row row = {
		.from = from == USER ? 0 : from | ~PLACE_ADDR,
		.to = slot->to == USER ? 0 : slot->to,
		.count = __atomic_load_n(&slot->count, __ATOMIC_RELAXED),
		.class = classify(from, slot->to),
		.from_len = from >> PLACE_LEN_SHIFT & 15,
	};

	return fwrite(&row, sizeof(row), 1, to) == 1;
}

static long write_table(FILE *to, const struct table *table)
{
	long n = 0;

	for (uint32_t i = 0; table && i < table->n_slots; i++) {
		uint64_t from = __atomic_load_n(&table->slots[i].from, __ATOMIC_ACQUIRE);

		if (!from)
			continue;
		if (!write_slot(to, &table->slots[i], from))
			return -1;
		n++;
	}
	return n;
}

/* A pair has a row per vCPU that made it. Exact when the vCPUs are stopped or quiescent. */
long transfer_write(FILE *to)
{
	long rows = 0;

	for (int cpu = 0; cpu < qemu_plugin_num_vcpus(); cpu++) {
		struct vcpu *there = qemu_plugin_scoreboard_find(vcpus, cpu);
		long n = write_table(to, __atomic_load_n(&there->table, __ATOMIC_ACQUIRE));

		if (n < 0)
			return -1;
		rows += n;
	}
	return rows;
}

uint64_t transfer_dropped(void)
{
	uint64_t dropped = 0;

	for (int cpu = 0; cpu < qemu_plugin_num_vcpus(); cpu++) {
		struct vcpu *there = qemu_plugin_scoreboard_find(vcpus, cpu);

		dropped += __atomic_load_n(&there->dropped, __ATOMIC_RELAXED);
	}
	return dropped;
}
