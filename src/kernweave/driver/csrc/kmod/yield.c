// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Yield to ftrace and to kprobes: give sites back before they look at the text.
 *
 * The brain splices a call to kw_ftrace_yield() into ftrace_replace_code(),
 * where text_mutex and ftrace_lock are held.  ftrace expects its own nop at a
 * record it is about to enable; a jump there would be an ftrace bug, which
 * turns ftrace off for good.
 *
 * It splices a call to kw_kprobe_yield() into arch_prepare_kprobe() as well, where
 * kprobe_mutex and text_mutex are held.  The kernel lets a kprobe be put only
 * where an instruction begins, and would find none inside of what a jump replaced.
 */
#include <linux/ftrace.h>
#include <linux/srcu.h>

#include "kw.h"

static atomic_t kw_inside = ATOMIC_INIT(0);
static atomic_t kw_entered = ATOMIC_INIT(0); /* how often, ever; may wrap */
DEFINE_STATIC_SRCU(kw_yielding);

static bool kw_any_sites(void)
{
	return !list_empty(&kw_txns);
}

/* Give back the site at addr, and what is woven there; flushed by the caller. */
void kw_yield_evict(u64 addr)
{
	struct kw_txn *t;
	struct kw_poke *p;

	list_for_each_entry(t, &kw_txns, global) {
		p = kw_poke_at(t, addr);
		if (!p || t->states[p - t->pokes] != KW_PLACED)
			continue;
		kw_text_give_back(t, p - t->pokes);
		return;
	}
}

/*
 * Groups only: a kprobe on the jump of a single instruction is no harm.  One with
 * springboards stays, as somebody may be on one, and so do those that faults in
 * copies need, and one whose jump a kprobe has already copied: then the kernel
 * refuses the new kprobe.
 */
static void kw_evict_around(u64 addr)
{
	struct kw_txn *t;
	struct kw_poke *p;

	list_for_each_entry(t, &kw_txns, global) {
		p = kw_poke_around(t, addr);
		if (!p || !(p->flags & KW_POKE_GROUP) ||
		    p->flags & (KW_POKE_HOST | KW_POKE_KEEP | KW_POKE_STAY))
			continue;
		if (!kw_text_has_kprobe(p))
			kw_text_give_back(t, p - t->pokes);
	}
}

static void kw_give_back(u64 addr)
{
	kw_yield_evict(addr);
	kw_weave_mark(addr, KW_JMP_LEN);
}

/* Somebody whose stack has the address of a trampoline on it is going to sleep; for the end. */
int kw_yield_begin(void) __acquires(&kw_yielding)
{
	int idx = srcu_read_lock(&kw_yielding);

	atomic_inc(&kw_inside);
	atomic_inc(&kw_entered);
	return idx;
}

void kw_yield_end(int idx) __releases(&kw_yielding)
{
	atomic_dec(&kw_inside);
	srcu_read_unlock(&kw_yielding, idx);
}

/*
 * Called by the trampoline in ftrace_replace_code(), text_mutex held; may
 * sleep.  The trampoline's address is on this stack, so the area it is in is
 * freed only when kw_ftrace_drain() saw nobody inside.
 */
void kw_ftrace_yield(void)
{
	struct ftrace_rec_iter *it;
	int idx = kw_yield_begin();

	for (it = kw_any_sites() ? kw_syms.rec_start() : NULL; it; it = kw_syms.rec_next(it)) {
		struct dyn_ftrace *rec = kw_syms.rec_record(it);

		if (kw_syms.rec_test(rec, true) != FTRACE_UPDATE_IGNORE)
			kw_give_back(rec->ip);
		cond_resched();
	}
	kw_text_flush();
	kw_weave_close_marked();
	kw_yield_end(idx);
}

/* Called in the same way with the address at which a kprobe is going to be put. */
void kw_kprobe_yield(unsigned long addr)
{
	int idx = kw_yield_begin();

	kw_look_for_kprobes();
	kw_evict_around(addr);
	kw_weave_mark(addr, 1);
	kw_text_flush();
	kw_weave_close_marked();
	kw_yield_end(idx);
}

/*
 * Wait until every task has left every unreachable trampoline.  A grace period
 * is not enough for one that slept in a yield meanwhile: it still has
 * the end of its trampoline before it.  Then who is in a yield by now is waited for,
 * and one more grace period; who yields later came by another trampoline, so there is
 * an end to it however often others patch.
 */
void kw_yield_drain(void)
{
	int before = atomic_read(&kw_entered);
	bool inside = atomic_read(&kw_inside);

	synchronize_rcu_tasks();
	if (!inside && before == atomic_read(&kw_entered))
		return;
	synchronize_srcu(&kw_yielding);
	synchronize_rcu_tasks();
}
