// SPDX-License-Identifier: GPL-2.0-or-later
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt
/*
 * Undo: restore text, compare, and pin what somebody else has armed.
 *
 * A site whose bytes are not ours any more, or that a kprobe was registered on
 * (armed or not), cannot be restored without breaking the other side.  Its
 * transaction, its area and this kmod stay until a worker finds it ours again.
 *
 * Short jumps are restored first, their springboards a grace period later: a task
 * may have been preempted between the two.
 */
#include <linux/slab.h>
#include <linux/workqueue.h>

#include "kw.h"

LIST_HEAD(kw_txns);
LIST_HEAD(kw_pinned);

struct kw_txn *kw_txn_find(struct kw_session *s, u64 id)
{
	struct kw_txn *t;

	list_for_each_entry(t, &s->txns, link)
		if (t->id == id)
			return t;
	return NULL;
}

void kw_txn_free(struct kw_txn *t)
{
	u32 i;

	if (!list_empty(&t->global)) {
		kw_poke_lock();
		list_del(&t->global);
		kw_syms.poke_sync(); /* who hit somebody's int3 may be looking for it in t */
		kw_poke_unlock();
	}
	list_del(&t->link);
	for (i = 0; i < t->nr_mods; i++)
		module_put(t->mods[i]);
	kfree(t->mods);
	kvfree(t->states);
	kvfree(t->pokes);
	kfree(t);
}

static void kw_sum_states(struct kw_txn *t, struct kw_undone *sum)
{
	u32 i;

	for (i = 0; i < t->count; i++) {
		sum->restored += t->states[i] == KW_RESTORED;
		sum->evicted += t->states[i] == KW_EVICTED;
		sum->stuck += t->states[i] == KW_STUCK || t->states[i] == KW_HELD;
	}
}

static void kw_restore_pass(struct kw_txn *t, bool shorts)
{
	u32 from, to;

	for (from = 0; from < t->count; from = to) {
		to = min(from + KW_BATCH, t->count);
		kw_text_lock();
		kw_text_restore(t, from, to, shorts);
		kw_text_unlock();
		cond_resched();
	}
}

/* Whether all short jumps are gone; if so springboards may go a grace period later. */
static bool kw_has_short(const struct kw_txn *t)
{
	u32 i;

	for (i = 0; i < t->count; i++)
		if (kw_is_short(&t->pokes[i]) &&
		    (t->states[i] == KW_PLACED || t->states[i] == KW_STUCK))
			return true;
	return false;
}

static bool kw_is_host(const struct kw_txn *t)
{
	u32 i;

	for (i = 0; i < t->count; i++)
		if (t->pokes[i].flags & KW_POKE_HOST)
			return true;
	return false;
}

/*
 * Idempotent; called with kw_lock held, which is dropped for a grace period if
 * there are springboards and wait is set; else they stay, held.  The area is
 * released with the last site.
 */
void kw_undo_all(struct kw_txn *t, struct kw_undone *sum, bool wait)
{
	if (!t->stamp && kw_is_host(t)) {
		kw_restore_pass(t, true);
		t->stamp = kw_has_short(t) ? 0 : kw_stamp_now();
		if (t->stamp && wait) {
			mutex_unlock(&kw_lock);
			kw_quiesce();
			mutex_lock(&kw_lock);
		}
	}
	kw_restore_pass(t, false);
	kw_sum_states(t, sum);
	if (!sum->stuck && t->code) {
		kw_copies_unreachable(t->code, t);
		kw_area_unreachable(t->code);
		t->code = NULL;
	}
}

int kw_undo(struct kw_session *s, const struct kw_size *req, struct kw_out *out)
{
	struct kw_txn *t = kw_txn_find(s, req->value);
	struct kw_undone sum = {};
	struct kw_undone *rep;
	u64 *addr;
	u32 i;

	if (!t)
		return -ENOENT;
	kw_undo_all(t, &sum, true);
	rep = kw_reserve(out, sizeof(*rep) + sum.stuck * sizeof(*addr));
	if (!rep)
		return -ENOSPC;
	*rep = sum;
	addr = (u64 *)(rep + 1);
	for (i = 0; i < t->count; i++)
		if (t->states[i] == KW_STUCK || t->states[i] == KW_HELD)
			*addr++ = t->pokes[i].addr;
	return 0;
}

int kw_forget(struct kw_session *s, const struct kw_size *req)
{
	struct kw_txn *t = kw_txn_find(s, req->value);

	if (!t)
		return -ENOENT;
	if (t->code)
		return -EBUSY;
	kw_txn_free(t);
	return 0;
}

static void kw_retry(struct work_struct *work);
static DECLARE_DELAYED_WORK(kw_retrier, kw_retry);
static unsigned long kw_pinned_at; /* the last one, in jiffies; under kw_lock */

#define KW_RETRY_MOST (4ul * HZ)

static void kw_report_stuck(struct kw_txn *t)
{
	u32 i;

	for (i = 0; i < t->count; i++)
		if (t->states[i] == KW_STUCK) {
			pr_info("%pS is armed by somebody else, restored when they leave\n",
				(void *)t->pokes[i].addr);
			return;
		}
}

/* The session is gone: keep the transaction, its area and this kmod. */
static void kw_pin(struct kw_txn *t)
{
	kw_report_stuck(t);
	__module_get(THIS_MODULE);
	t->pinned = true;
	list_move(&t->link, &kw_pinned);
	kw_pinned_at = jiffies;
	mod_delayed_work(kw_works, &kw_retrier, t->stamp ? 0 : kw_pause_since(kw_pinned_at));
}

static bool kw_any_held(void)
{
	struct kw_txn *t;
	bool found = false;
	u32 i;

	mutex_lock(&kw_lock);
	list_for_each_entry(t, &kw_pinned, link)
		for (i = 0; i < t->count && !found; i++)
			found = t->states[i] == KW_HELD;
	mutex_unlock(&kw_lock);
	return found;
}

static void kw_retry(struct work_struct *work)
{
	struct kw_txn *t, *next;

	if (kw_any_held())
		kw_quiesce();
	mutex_lock(&kw_lock);
	list_for_each_entry_safe(t, next, &kw_pinned, link) {
		struct kw_undone sum = {};
		struct kw_code *code = t->code;

		kw_undo_all(t, &sum, false);
		if (sum.stuck)
			continue;
		kw_txn_free(t);
		kw_area_retire(code);
		module_put(THIS_MODULE);
	}
	if (!list_empty(&kw_pinned))
		queue_delayed_work(kw_works, &kw_retrier,
				   min(kw_pause_since(kw_pinned_at), KW_RETRY_MOST));
	mutex_unlock(&kw_lock);
}

/* Something was freed that a pinned transaction may have waited for. */
void kw_undo_soon(void)
{
	lockdep_assert_held(&kw_lock);
	if (!list_empty(&kw_pinned))
		mod_delayed_work(kw_works, &kw_retrier, 0);
}

/*
 * A new session finds nothing that only waits for a grace period, or for the next try:
 * in the first round springboards go, in the second their areas, and what had to
 * outlive those.
 */
void kw_undo_settle(void)
{
	int round;

	for (round = 0; round < 2 && kw_any_held(); round++) {
		kw_areas_settle();
		flush_delayed_work(&kw_retrier);
	}
	flush_delayed_work(&kw_retrier);
}

/* Called with kw_lock held when a session ends, however it ends; never waits for a grace period. */
void kw_undo_session(struct kw_session *s)
{
	struct kw_txn *t, *next;
	struct kw_code *code, *more;

	list_for_each_entry_safe_reverse(t, next, &s->txns, link) {
		struct kw_undone sum = {};

		if (t->code)
			kw_undo_all(t, &sum, false);
		if (sum.stuck)
			kw_pin(t);
		else
			kw_txn_free(t);
	}
	list_for_each_entry_safe(code, more, &s->areas, link)
		kw_area_retire(code);
}

void kw_undo_exit(void)
{
	cancel_delayed_work_sync(&kw_retrier);
	WARN_ON(!list_empty(&kw_pinned));
}
