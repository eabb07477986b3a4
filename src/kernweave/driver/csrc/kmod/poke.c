// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Write batches of jumps into text that is executed meanwhile.
 *
 * The protocol is the kernel's own, of text_poke_bp():
 *   1. int3 on the first byte of each site; synchronise all CPUs;
 *   2. the tails; synchronise;
 *   3. the first bytes; synchronise.
 * Whoever hits an int3 meanwhile is sent where the jump leads, which is right before
 * as well as after (group.c).
 *
 * The kernel asks kprobes at an int3 before it asks us, but after it has looked for its
 * own.  A kprobe that goes through ftrace, or whose kmod is gone, has no instruction to
 * run instead: whoever hit our int3 there would go on at address 0.  So where any
 * kprobe is registered the kernel writes, one site after the other; under QEMU the
 * machine is stopped for these, and there is no int3 at all.
 *
 * The kernel maps and unmaps a page for each write, three times a site, which takes
 * longer than all the rest.  So here one mapping serves all sites of a page, where the
 * kernel's function that maps can be called.
 *
 * An emulated CPU may stay at an int3 that is gone (docs/design/0007): as long as nobody
 * writes there, and with interrupts off unable to answer.  For QEMU, and for it alone,
 * the first bytes are written again while a CPU does not answer, and once more when all
 * have, before they are synchronised.
 */
#include <linux/ktime.h>
#include <linux/percpu.h>
#include <linux/smp.h>
#include <linux/stop_machine.h>
#include <linux/version.h>
#include <asm/cpufeature.h>
#include <asm/processor.h>
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 16, 0)
#include <asm/cpuid/api.h>
#endif

#include "kw.h"

/* How long a CPU may take to answer before first bytes are written again. */
#define KW_PATIENCE_US 10000

#define KW_CPUID_HYPERVISOR 0x40000000

struct kw_batch {
	struct kw_txn *t;
	const u32 *rows; /* ascending */
	u32 count;
	bool restore; /* write the old bytes */
};

enum kw_step {
	KW_STEP_INT3,
	KW_STEP_TAIL,
	KW_STEP_HEAD,
	KW_STEP_JUMP, /* tail and head at once */
	KW_STEP_REST, /* what is behind the jump, and dead while it is in force */
};

struct kw_piece {
	u64 addr;
	u32 len; /* 0: this site has nothing to be written */
	const u8 *bytes;
};

static struct kw_txn *kw_writing; /* whose int3 are in the text; written under text_mutex */

/* Bytes of the jump at the beginning. */
static u32 kw_head(const struct kw_poke *p)
{
	return kw_is_short(p) ? KW_SHORT_LEN : KW_JMP_LEN;
}

static struct kw_piece kw_piece(const struct kw_batch *b, u32 i, enum kw_step step)
{
	static const u8 int3 = KW_INT3;
	const struct kw_poke *p = &b->t->pokes[b->rows[i]];
	const u8 *bytes = b->restore ? p->old : p->new_;
	u32 head = kw_head(p);

	switch (step) {
	case KW_STEP_INT3:
		return (struct kw_piece){ p->addr, 1, &int3 };
	case KW_STEP_TAIL:
		return (struct kw_piece){ p->addr + 1, head - 1, bytes + 1 };
	case KW_STEP_HEAD:
		return (struct kw_piece){ p->addr, 1, bytes };
	case KW_STEP_REST:
		return (struct kw_piece){ p->addr + head, p->len - head, bytes + head };
	default:
		return (struct kw_piece){ p->addr, head, bytes };
	}
}

/* The row behind those, from row i on, that can be written together with it. */
static u32 kw_run_end(const struct kw_batch *b, u32 i, enum kw_step step)
{
	u64 page = kw_piece(b, i, step).addr >> PAGE_SHIFT;
	struct kw_piece piece;

	do {
		piece = kw_piece(b, i, step);
		if (!piece.len || (piece.addr + piece.len - 1) >> PAGE_SHIFT != page)
			break;
	} while (++i < b->count);
	return i;
}

struct kw_run {
	const struct kw_batch *b;
	u32 from;
	u32 to;
	enum kw_step step;
	u64 start;
};

/* Called back by __text_poke(), where `to` is a writable mapping of the run's start. */
static void kw_write_run(void *to, const void *src, size_t len)
{
	const struct kw_run *run = src;
	struct kw_piece piece;
	u32 i;

	for (i = run->from; i < run->to; i++) {
		piece = kw_piece(run->b, i, run->step);
		memcpy(to + (piece.addr - run->start), piece.bytes, piece.len);
	}
}

static void kw_write_step(const struct kw_batch *b, enum kw_step step)
{
	struct kw_piece first, last;
	u32 i, end;

	for (i = 0; i < b->count; i = end) {
		first = kw_piece(b, i, step);
		end = kw_syms.poke_with ? kw_run_end(b, i, step) : i;
		if (end > i + 1) {
			struct kw_run run = { b, i, end, step, first.addr };

			last = kw_piece(b, end - 1, step);
			kw_syms.poke_with(kw_write_run, (void *)first.addr, &run,
					  last.addr + last.len - first.addr);
		} else if (first.len) {
			kw_syms.poke((void *)first.addr, first.bytes, first.len);
		}
		end = max(end, i + 1);
	}
}

static void kw_answer(void *silent)
{
	atomic_dec(silent);
}

static DEFINE_PER_CPU(call_single_data_t, kw_questions);
static atomic_t kw_silent; /* CPUs that have not answered; under text_mutex */

/* Not by smp_call_function_many(): it waits for what a silent CPU was asked before. */
static void kw_ask_all(void)
{
	call_single_data_t *question;
	int cpu;

	preempt_disable();
	atomic_set(&kw_silent, 0);
	for_each_online_cpu(cpu) {
		if (cpu == smp_processor_id())
			continue;
		question = per_cpu_ptr(&kw_questions, cpu);
		INIT_CSD(question, kw_answer, &kw_silent);
		atomic_inc(&kw_silent);
		if (smp_call_function_single_async(cpu, question))
			atomic_dec(&kw_silent);
	}
	preempt_enable();
}

/*
 * Free every emulated CPU of an int3 that is gone.  The last write comes when none is
 * translating what it read before the first.
 */
static void kw_free_emulated(const struct kw_batch *b)
{
	ktime_t since = ktime_get();

	kw_ask_all();
	while (atomic_read(&kw_silent)) {
		if (ktime_us_delta(ktime_get(), since) > KW_PATIENCE_US) {
			kw_write_step(b, KW_STEP_HEAD);
			since = ktime_get();
		}
		cpu_relax();
	}
	kw_write_step(b, KW_STEP_HEAD);
}

static bool kw_is_emulated(void)
{
	u32 last, name[3];

#ifdef KW_SEED_REAL_CPUS
	return false;
#endif
	if (!boot_cpu_has(X86_FEATURE_HYPERVISOR))
		return false;
	cpuid(KW_CPUID_HYPERVISOR, &last, &name[0], &name[1], &name[2]);
	return !memcmp(name, "TCGTCGTCGTCG", sizeof(name));
}

/* Replace the int3 of some sites, ascending; no CPU is at one afterwards. */
static void kw_write_heads(const struct kw_batch *b)
{
	migrate_disable(); /* another CPU may be at an int3 that is gone */
	kw_write_step(b, KW_STEP_HEAD);
	if (kw_is_emulated())
		kw_free_emulated(b);
	kw_syms.poke_sync();
	migrate_enable();
}

static void kw_write_jumps(const struct kw_batch *b)
{
#ifdef KW_SEED_NO_SYNC
	/* a fault for the audit to find: whole jumps written at once, CPUs not synchronised */
	kw_write_step(b, KW_STEP_JUMP);
#else
	WRITE_ONCE(kw_writing, b->t);
	kw_write_step(b, KW_STEP_INT3);
	kw_syms.poke_sync();
	kw_write_step(b, KW_STEP_TAIL);
	kw_syms.poke_sync();
	kw_write_heads(b);
	WRITE_ONCE(kw_writing, NULL);
#endif
}

static bool kw_is_probed(u64 addr)
{
	bool found;

	preempt_disable();
	found = kw_syms.get_kprobe((void *)addr);
	preempt_enable();
	return found;
}

/* Sort the rows of a batch by whether a kprobe would take our int3 for its own. */
static void kw_split(const struct kw_batch *b, struct kw_batch *probed, struct kw_batch *others)
{
	static u32 rows[2][KW_BATCH]; /* under text_mutex */
	u32 i;

	*probed = (struct kw_batch){ b->t, rows[0], 0, b->restore };
	*others = (struct kw_batch){ b->t, rows[1], 0, b->restore };
	for (i = 0; i < b->count; i++)
		if (kw_is_probed(b->t->pokes[b->rows[i]].addr))
			rows[0][probed->count++] = b->rows[i];
		else
			rows[1][others->count++] = b->rows[i];
}

static int kw_write_stopped(void *batch)
{
	kw_write_step(batch, KW_STEP_JUMP);
	return 0;
}

/* No CPU is translating the places, as all wait; false: it cannot be done. */
static bool kw_write_emulated(struct kw_batch *b)
{
	if (!kw_is_emulated() || !kw_syms.stop_machine)
		return false;
	kw_syms.stop_machine(kw_write_stopped, b, NULL);
	kw_syms.poke_sync();
	return true;
}

/*
 * Nobody can register a kprobe meanwhile: whoever places or restores holds kprobe_mutex,
 * and slots of clones are denied.
 */
static void kw_write_probed(struct kw_batch *b)
{
	struct kw_piece piece;
	u32 i;

	if (!b->count || kw_write_emulated(b))
		return;
	kw_weave_own(true);
	for (i = 0; i < b->count; i++) {
		piece = kw_piece(b, i, KW_STEP_JUMP);
		kw_syms.poke_queue((void *)piece.addr, piece.bytes, piece.len,
				   b->t->pokes[b->rows[i]].new_);
	}
	kw_syms.poke_finish();
	kw_weave_own(false);
}

/*
 * Place or restore some pokes of a transaction, ascending, at most a batch.  What is
 * replaced behind a jump is written only while the jump is in force, so no CPU can be
 * about to execute it.  It becomes int3, so that whoever decodes the function finds its
 * boundaries.
 */
void kw_poke_rows(struct kw_txn *t, const u32 *rows, u32 count, bool restore)
{
	struct kw_batch b = { t, rows, count, restore };
	struct kw_batch probed, others;

	lockdep_assert_held(kw_syms.text_mutex);
	if (!count)
		return;
	if (restore)
		kw_write_step(&b, KW_STEP_REST);
	kw_split(&b, &probed, &others);
	kw_write_probed(&probed);
	if (others.count)
		kw_write_jumps(&others);
	if (!restore)
		kw_write_step(&b, KW_STEP_REST);
}

/* Take the int3 off groups that never got their jumps. */
void kw_poke_disarm(struct kw_txn *t, const u32 *rows, u32 count)
{
	struct kw_batch b = { t, rows, count, true };

	lockdep_assert_held(kw_syms.text_mutex);
	if (count)
		kw_write_heads(&b);
}

/* Place or restore a single site by the kernel's own protocol; flushed by the caller. */
void kw_poke_back(const struct kw_poke *p)
{
	u32 head = kw_head(p);

	lockdep_assert_held(kw_syms.text_mutex);
	if (p->len > head)
		kw_syms.poke((void *)(p->addr + head), p->old + head, p->len - head);
	kw_syms.poke_queue((void *)p->addr, p->old, head, p->new_);
}

/* The transaction whose int3 somebody may have hit; also in an NMI. */
struct kw_txn *kw_poke_writing(void)
{
	return READ_ONCE(kw_writing);
}
NOKPROBE_SYMBOL(kw_poke_writing);
