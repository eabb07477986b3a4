// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Counts executions per (address, instruction bytes), exactly, with parallel vCPUs.
 *
 * Each key owns one slot for ever: QEMU throws translations away and makes new ones as it
 * likes, and the same key must go on counting where it stopped. A slot is one u64 per vCPU
 * in a scoreboard, incremented inline by the vCPU that owns it, so nothing is lost and
 * nothing is locked. QEMU allocates and clears a scoreboard for 16 vCPUs at once, 128 bytes
 * per slot; therefore slots come in chunks of 8 MiB, made when needed.
 *
 * What is counted, against what a *hit* is (docs: one arrival of control at an instruction):
 * - An instruction is counted when it starts. If it faults and is restarted, it is counted
 *   at each start. restart.c measures that for the addresses it is asked for.
 * - A rep string instruction counts once per entry of QEMU into its loop, not once per
 *   iteration and not always once per arrival (it leaves the loop for interrupts and after
 *   64 Ki iterations). restart.c measures that too.
 * - An access that QEMU cannot do in the middle of a translation (device memory) is
 *   retranslated and repeated without the counter: counted once.
 * - An atomic that the host cannot do in parallel is restarted alone with all other vCPUs
 *   stopped: counted twice. With 16-byte atomics on the host, stock kernels have none.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include "oracle.h"

#define MAX_SLOTS (4u << 20)
#define CHUNK_SLOTS (1u << 16)
#define N_BUCKETS (MAX_SLOTS * 2)

struct key {
	uint64_t vaddr;
	uint8_t len;
	uint8_t code[MAX_INSN];
};

struct row {
	struct key key;
	uint64_t count;			/* all vCPUs */
	uint64_t per_cpu[2];
};

_Static_assert(sizeof(struct key) == 24 && sizeof(struct row) == 48, "rows are packed");

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct key *keys;		/* [slot], never changed once below n_slots */
static uint32_t *buckets;		/* open addressing: slot + 1, 0 = free */
static uint32_t n_slots;
static uint64_t lost;
static struct qemu_plugin_scoreboard *chunks[MAX_SLOTS / CHUNK_SLOTS];

void count_init(void)
{
	keys = oracle_zalloc(MAX_SLOTS * sizeof(*keys));
	buckets = oracle_zalloc(N_BUCKETS * sizeof(*buckets));
}

static uint64_t hash_key(const struct key *key)
{
	uint64_t words[3], hash = 0;

	memcpy(words, key, sizeof(words));
	for (int i = 0; i < 3; i++) {
		hash = (hash ^ words[i]) * 0x9e3779b97f4a7c15ull;
		hash ^= hash >> 29;
	}
	return hash;
}

static bool add_slot(uint32_t *bucket, const struct key *key)
{
	uint32_t chunk = n_slots / CHUNK_SLOTS;

	if (n_slots == MAX_SLOTS)
		return false;
	if (!chunks[chunk])
		chunks[chunk] = qemu_plugin_scoreboard_new(CHUNK_SLOTS * sizeof(uint64_t));
	keys[n_slots] = *key;
	*bucket = ++n_slots;
	return true;
}

/* Caller holds the lock. Returns the slot, or MAX_SLOTS when all are taken. */
static uint32_t find_slot(const struct key *key)
{
	uint32_t i = hash_key(key) % N_BUCKETS;

	while (buckets[i]) {
		if (!memcmp(&keys[buckets[i] - 1], key, sizeof(*key)))
			return buckets[i] - 1;
		i = (i + 1) % N_BUCKETS;
	}
	return add_slot(&buckets[i], key) ? buckets[i] - 1 : MAX_SLOTS;
}

void count_insn(const struct insn *insn)
{
	struct key key = { .vaddr = insn->vaddr, .len = insn->len };
	qemu_plugin_u64 entry;
	uint32_t slot;

	memcpy(key.code, insn->code, MAX_INSN);
	pthread_mutex_lock(&lock);
	slot = find_slot(&key);
	lost += slot == MAX_SLOTS;
	pthread_mutex_unlock(&lock);
	if (slot == MAX_SLOTS)
		return;
	entry.score = chunks[slot / CHUNK_SLOTS];
	entry.offset = slot % CHUNK_SLOTS * sizeof(uint64_t);
	qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(insn->handle,
							    QEMU_PLUGIN_INLINE_ADD_U64, entry, 1);
}

static void fill_row(struct row *row, uint32_t slot, int n_cpus)
{
	memset(row, 0, sizeof(*row));
	row->key = keys[slot];
	for (int cpu = 0; cpu < n_cpus; cpu++) {
		const volatile uint64_t *board =
			qemu_plugin_scoreboard_find(chunks[slot / CHUNK_SLOTS], cpu);
		uint64_t n = board[slot % CHUNK_SLOTS];

		row->count += n;
		if (cpu < 2)
			row->per_cpu[cpu] = n;
	}
}

/*
 * Rows are in slot order, which never changes: row i of a later snapshot is the same key.
 * Each number is the value at some moment while vCPUs run; exact when they are quiescent.
 * The lock is held for the length of the table only: translation never waits for a file.
 */
long count_write(FILE *to)
{
	int n_cpus = qemu_plugin_num_vcpus();
	uint32_t n, slot;
	struct row row;

	pthread_mutex_lock(&lock);
	n = n_slots;
	pthread_mutex_unlock(&lock);
	for (slot = 0; slot < n; slot++) {
		fill_row(&row, slot, n_cpus);
		if (fwrite(&row, sizeof(row), 1, to) != 1)
			return -1;
	}
	return n;
}

uint64_t count_lost(void)
{
	return __atomic_load_n(&lost, __ATOMIC_RELAXED);
}
