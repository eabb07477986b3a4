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
 * The kernel maps and unmaps a page for each write, three times a site, which takes
 * longer than all the rest.  So here one mapping serves all sites of a page, where the
 * kernel's function that maps can be called.
 */
#include "kw.h"

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

static void kw_write_jumps(const struct kw_batch *b)
{
#ifdef KW_SEED_NO_SYNC
	/* a fault for the audit to find: whole jumps written at once, CPUs not synchronised */
	kw_write_step(b, KW_STEP_JUMP);
#else
	static const enum kw_step steps[] = { KW_STEP_INT3, KW_STEP_TAIL, KW_STEP_HEAD };
	int i;

	WRITE_ONCE(kw_writing, b->t);
	for (i = 0; i < ARRAY_SIZE(steps); i++) {
		kw_write_step(b, steps[i]);
		kw_syms.poke_sync();
	}
	WRITE_ONCE(kw_writing, NULL);
#endif
}

/*
 * Place or restore some pokes of a transaction, ascending.  What is replaced behind a
 * jump is written only while the jump is in force, so no CPU can be about to execute
 * it.  It becomes int3, so that whoever decodes the function finds its boundaries.
 */
void kw_poke_rows(struct kw_txn *t, const u32 *rows, u32 count, bool restore)
{
	struct kw_batch b = { t, rows, count, restore };

	lockdep_assert_held(kw_syms.text_mutex);
	if (!count)
		return;
	if (restore)
		kw_write_step(&b, KW_STEP_REST);
	kw_write_jumps(&b);
	if (!restore)
		kw_write_step(&b, KW_STEP_REST);
}

/* The same for a single site, by the kernel's own protocol; flushed by the caller. */
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
