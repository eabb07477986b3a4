// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Yield to ftrace: give nop sites back before ftrace verifies them.
 *
 * The brain splices a call to kw_ftrace_yield() into ftrace_replace_code(),
 * where text_mutex and ftrace_lock are held.  ftrace expects its own nop at a
 * record it is about to enable; a jump there would be an ftrace bug, which
 * turns ftrace off for good.
 */
#include <linux/ftrace.h>
#include <linux/wait.h>

#include "kw.h"

static atomic_t kw_inside = ATOMIC_INIT(0);
static atomic_t kw_entered = ATOMIC_INIT(0); /* how often, ever; may wrap */
static DECLARE_WAIT_QUEUE_HEAD(kw_left);

static bool kw_any_sites(void)
{
	return !list_empty(&kw_txns);
}

static void kw_evict(u64 addr)
{
	struct kw_txn *t;
	struct kw_poke *p;
	u32 i;

	list_for_each_entry(t, &kw_txns, global) {
		p = kw_poke_at(t, addr);
		i = p ? p - t->pokes : 0;
		if (!p || t->states[i] != KW_PLACED)
			continue;
		kw_text_give_back(t, i);
		return;
	}
}

/*
 * Called by the trampoline in ftrace_replace_code(), text_mutex held; may
 * sleep.  The trampoline's address is on this stack, so the area it is in is
 * freed only when kw_ftrace_drain() saw nobody inside.
 */
void kw_ftrace_yield(void)
{
	struct ftrace_rec_iter *it;

	atomic_inc(&kw_inside);
	atomic_inc(&kw_entered);
	for (it = kw_any_sites() ? kw_syms.rec_start() : NULL; it; it = kw_syms.rec_next(it)) {
		struct dyn_ftrace *rec = kw_syms.rec_record(it);

		if (kw_syms.rec_test(rec, true) != FTRACE_UPDATE_IGNORE)
			kw_evict(rec->ip);
		cond_resched();
	}
	kw_text_flush();
	if (atomic_dec_and_test(&kw_inside))
		wake_up(&kw_left);
}

/*
 * Wait until every task has left every unreachable trampoline.  A grace period
 * is not enough for one that slept in kw_ftrace_yield() meanwhile: it still has
 * the end of its trampoline before it.
 */
void kw_ftrace_drain(void)
{
	int before;

	do {
		before = atomic_read(&kw_entered);
		wait_event(kw_left, !atomic_read(&kw_inside));
		synchronize_rcu_tasks();
	} while (before != atomic_read(&kw_entered));
}
