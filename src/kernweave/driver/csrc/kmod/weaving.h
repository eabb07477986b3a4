/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What weave.c and move.c share: generations, and rows of their tables. */
#ifndef KW_WEAVING_H
#define KW_WEAVING_H

#include "kw.h"

enum kw_closed {
	KW_OPEN = 0,
	KW_MARKED = 1, /* its slot is going to be written */
	KW_CLOSED = 2,
};

struct kw_weaving {
	struct list_head link; /* among all; under text_mutex */
	struct module *mod;    /* a reference */
	u64 start;             /* of the clones */
	u64 end;
	struct kw_weave n; /* numbers of rows */
	u8 *rows;          /* holds all that follow */
	const struct kw_entry *entries;
	const struct kw_part *parts;
	const struct kw_mirror *mirrors;
	const struct kw_place *returns;
	const struct kw_place *insns;
	u8 *closed; /* enum kw_closed per entry; under text_mutex */
	bool marked;  /* some are KW_MARKED */
	bool closing; /* somebody may still be in what is closed */
	u32 looks;    /* one after another that found nobody in any clone; under kw_lock */
	struct kprobe_blacklist_entry denied; /* no kprobes on clones */
	struct rcu_head gone;
};

extern struct list_head kw_weavings; /* under text_mutex */

static inline bool kw_is_clone(const struct kw_weaving *w, u64 addr)
{
	return addr - w->start < w->end - w->start;
}

/* The row of the last element whose first u64 is at most addr, -1: none. */
static inline s64 kw_last_row(const void *rows, u32 count, size_t size, u64 addr)
{
	u32 lo = 0, hi = count;

	while (lo < hi) {
		u32 mid = lo + (hi - lo) / 2;

		if (*(const u64 *)(rows + mid * size) <= addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	return (s64)lo - 1;
}

#define kw_find_row(rows, count, addr) kw_last_row(rows, count, sizeof(*(rows)), addr)

void kw_settle_soon(void);

int kw_exiting_watch(void);
void kw_exiting_unwatch(void);
void kw_exiting_visit(void (*visit)(void *data, struct task_struct *task), void *data);
bool kw_exiting_complete(void);

#endif
