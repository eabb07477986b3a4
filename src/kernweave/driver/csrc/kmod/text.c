// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Change kernel text: compare, poke, verify, in batches, all or none at return.
 *
 * Recipe of a commit:
 *   1. check every poke before the first one is written;
 *   2. link the transaction, so that ftrace's hook sees its sites;
 *   3. empty the groups (group.c);
 *   4. per batch, under kprobe_mutex and text_mutex: look for kprobes, compare
 *      old bytes, poke (poke.c), read back; short jumps last, when their
 *      springboards are there;
 *   5. on a mismatch, undo the earlier batches and name the poke; undo them as
 *      well if a signal is pending before a batch: whoever asked may have died.
 */
#include <linux/cpu.h>
#include <linux/kprobes.h>
#include <linux/memory.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "kw.h"

static u64 kw_next_txn = 1;

int kw_text_matches(const struct kw_poke *p, const u8 *bytes)
{
	u8 now[KW_POKE_BYTES];

	if (copy_from_kernel_nofault(now, (void *)p->addr, p->len))
		return 0;
	return !memcmp(now, bytes, p->len);
}

bool kw_is_short(const struct kw_poke *p)
{
	return p->new_[0] == KW_SHORT_OPCODE;
}

static bool kw_kprobes_exist; /* at all, since kprobe_mutex was taken */

void kw_look_for_kprobes(void)
{
	int i;

	lockdep_assert_held(kw_syms.kprobe_mutex);
	kw_kprobes_exist = false;
	for (i = 0; i < KW_KPROBE_BUCKETS; i++)
		kw_kprobes_exist |= !hlist_empty(&kw_syms.kprobe_table[i]);
}

/*
 * For who writes int3: a CPU that is on its way up or down runs kernel text, and is not
 * synchronised.
 */
void kw_poke_lock(void)
{
	cpus_read_lock();
	mutex_lock(kw_syms.text_mutex);
}

void kw_poke_unlock(void)
{
	mutex_unlock(kw_syms.text_mutex);
	cpus_read_unlock();
}

/* In the order of the kernel's own register_kprobe(). */
void kw_text_lock(void)
{
	mutex_lock(kw_syms.kprobe_mutex);
	kw_poke_lock();
	kw_look_for_kprobes();
}

void kw_text_unlock(void)
{
	kw_poke_unlock();
	mutex_unlock(kw_syms.kprobe_mutex);
}

/*
 * A registered kprobe keeps a copy of the instruction it was put on, runs the
 * copy when it is hit and writes its first byte back when it is disarmed.  The
 * text does not tell: the kprobe may be disabled now and enabled later.  Those
 * that go through ftrace do neither; one that is gone comes back only by being
 * registered again, which is told before (yield.c).
 */
bool kw_text_has_kprobe(const struct kw_poke *p)
{
	struct kprobe *kp;
	u32 i;

	lockdep_assert_held(kw_syms.kprobe_mutex);
	if (!kw_kprobes_exist)
		return false;
	for (i = 1; i < KW_JMP_LEN; i++) { /* its jump would reach to our first byte */
		kp = kw_syms.get_kprobe((void *)(p->addr - i));
		if (kp && !kprobe_ftrace(kp) && !kprobe_gone(kp) && kw_may_jump(kp))
			return true;
	}
	for (i = 0; i < p->len; i++) {
		kp = kw_syms.get_kprobe((void *)(p->addr + i));
		if (kp && !kprobe_ftrace(kp) && !kprobe_gone(kp))
			return true;
	}
	return false;
}

static bool kw_is_core_text(const struct kw_poke *p)
{
	return p->addr >= kw_syms.stext && p->addr <= kw_syms.etext - p->len;
}

/* Keep the kmod that owns the text of poke i loaded; one reference per kmod. */
static int kw_hold_kmod(struct kw_txn *t, const struct kw_poke *p)
{
	struct module *m, **more;
	u32 i;

	preempt_disable();
	m = kw_syms.module_text_address(p->addr);
	if (m && (kw_syms.module_text_address(p->addr + p->len - 1) != m || m == THIS_MODULE))
		m = NULL;
	for (i = 0; m && i < t->nr_mods; i++)
		if (t->mods[i] == m) {
			preempt_enable();
			return 0;
		}
	if (m && !try_module_get(m))
		m = NULL;
	if (m && m->state != MODULE_STATE_LIVE) { /* its init may fail, and frees it then */
		module_put(m);
		m = NULL;
	}
	preempt_enable();
	if (!m)
		return -EFAULT;
	more = krealloc(t->mods, (t->nr_mods + 1) * sizeof(*more), GFP_KERNEL);
	if (!more) {
		module_put(m);
		return -ENOMEM;
	}
	t->mods = more;
	t->mods[t->nr_mods++] = m;
	return 0;
}

static int kw_check_pokes(struct kw_txn *t, u32 *bad)
{
	u32 i;
	int ret;

	ret = kw_check_jumps(t, bad);
	if (!ret)
		ret = kw_copies_check(t, bad);
	for (i = 0; i < t->count && !ret; i++) {
		*bad = i;
		if (!kw_is_core_text(&t->pokes[i]))
			ret = kw_hold_kmod(t, &t->pokes[i]);
	}
	return ret;
}

/* The bytes of an armed group are its own, but for the int3. */
static bool kw_is_as_before(struct kw_txn *t, u32 i)
{
	struct kw_poke expected = t->pokes[i];

	if (kw_text_has_kprobe(&t->pokes[i]))
		return false;
	if (t->states[i] == KW_ARMED)
		expected.old[0] = KW_INT3;
	return kw_text_matches(&t->pokes[i], expected.old);
}

static bool kw_in_pass(const struct kw_txn *t, u32 i, bool shorts)
{
	return kw_is_short(&t->pokes[i]) == shorts;
}

/* Groups wait until they are empty; those of a later round are not armed yet. */
static bool kw_is_ready(const struct kw_txn *t, u32 i)
{
	if (t->pokes[i].flags & KW_POKE_GROUP)
		return t->states[i] == KW_ARMED;
	return t->states[i] == KW_WAITING;
}

/* A batch: the next pokes from *next on whose turn it is, ascending. */
static u32 kw_next_batch(const struct kw_txn *t, u32 *next, bool shorts, u32 *rows)
{
	u32 n = 0;

	for (; *next < t->count && n < KW_BATCH; ++*next)
		if (kw_in_pass(t, *next, shorts) && kw_is_ready(t, *next))
			rows[n++] = *next;
	return n;
}

static int kw_poke_batch(struct kw_txn *t, const u32 *rows, u32 n, u32 *bad)
{
	const struct kw_poke *p;
	u32 i;

	lockdep_assert_held(kw_syms.text_mutex);
	for (i = 0; i < n; i++) {
		*bad = rows[i];
		if (!kw_is_as_before(t, rows[i]) ||
		    kw_is_closed_entry(t->code, &t->pokes[rows[i]]))
			return -ESTALE;
	}
	if (t->code->weaving && kw_weave_is_probed(t->code->weaving))
		return -ESTALE;
	if (!t->code->weaving) {
		for (i = 0; i < n; i++)
			kw_weave_mark(t->pokes[rows[i]].addr, t->pokes[rows[i]].len);
		kw_weave_close_marked();
	}
	kw_poke_rows(t, rows, n, false);
	for (i = 0; i < n; i++)
		t->states[rows[i]] = KW_PLACED;
	for (i = 0; i < n; i++) {
		*bad = rows[i];
		p = &t->pokes[rows[i]];
		if (WARN_ON_ONCE(!kw_text_matches(p, p->new_)))
			return -EIO;
	}
	return 0;
}

/*
 * Whether the int3 of a group that never got its jump is to go; its state is set as if
 * it were gone.  It must go whoever has armed what is behind it: soon nobody answers
 * for it any more.
 */
static bool kw_is_to_disarm(struct kw_txn *t, u32 i)
{
	const struct kw_poke *p = &t->pokes[i];
	bool ours = !kw_syms.get_kprobe((void *)p->addr) && *(u8 *)p->addr == KW_INT3;

	t->states[i] = ours || kw_text_matches(p, p->old) ? KW_RESTORED : KW_STUCK;
	return ours;
}

/* Whether the old bytes are to be written; its state is set as if they were. */
static bool kw_is_to_restore(struct kw_txn *t, u32 i)
{
	const struct kw_poke *p = &t->pokes[i];
	bool free = !kw_text_has_kprobe(p);
	bool ours = free && kw_text_matches(p, p->new_);

	free = ours || (free && kw_text_matches(p, p->old));
	t->states[i] = free ? KW_RESTORED : KW_STUCK;
	return ours;
}

static bool kw_may_restore(struct kw_txn *t, u32 i)
{
	u32 flags = t->pokes[i].flags;
	bool held = (flags & KW_POKE_HOST && !kw_stamp_passed(t->stamp)) ||
		    (flags & KW_POKE_KEEP && kw_copies_exist()) ||
		    (flags & KW_POKE_STAY && kw_weavings_exist());

	if (held)
		t->states[i] = KW_HELD;
	return !held;
}

/*
 * Write the old bytes of what is placed in [from, to), at most a batch; read them
 * again and compare.  What was restored before may be somebody else's by now.
 */
void kw_text_restore(struct kw_txn *t, u32 from, u32 to, bool shorts)
{
	static DECLARE_BITMAP(before, KW_BATCH); /* under text_mutex */
	static u32 rows[KW_BATCH], armed[KW_BATCH];
	u32 i, n = 0, nr_armed = 0;

	lockdep_assert_held(kw_syms.text_mutex);
	for (i = from; i < to; i++)
		__assign_bit(i - from, before, t->states[i] == KW_RESTORED);
	for (i = from; i < to; i++) {
		if (!kw_in_pass(t, i, shorts))
			continue;
		if (t->states[i] == KW_ARMED) {
			if (kw_is_to_disarm(t, i))
				armed[nr_armed++] = i;
		} else if (t->states[i] != KW_PLACED && t->states[i] != KW_STUCK &&
			   t->states[i] != KW_HELD) {
			continue;
		} else if (kw_may_restore(t, i) && kw_is_to_restore(t, i)) {
			rows[n++] = i;
		}
	}
	kw_poke_disarm(t, armed, nr_armed);
	kw_poke_rows(t, rows, n, true);
	for (i = from; i < to; i++)
		if (t->states[i] == KW_RESTORED && !test_bit(i - from, before) &&
		    !kw_text_matches(&t->pokes[i], t->pokes[i].old))
			t->states[i] = KW_STUCK;
}

/* Queue the old bytes of one site for somebody else, who holds text_mutex. */
void kw_text_give_back(struct kw_txn *t, u32 i)
{
	const struct kw_poke *p = &t->pokes[i];

	lockdep_assert_held(kw_syms.text_mutex);
	if (t->states[i] == KW_ARMED) {
		kw_syms.poke((void *)p->addr, p->old, 1);
		t->states[i] = KW_EVICTED;
	}
	if (t->states[i] != KW_PLACED || !kw_text_matches(p, p->new_))
		return;
	kw_poke_back(p);
	t->states[i] = KW_EVICTED;
}

void kw_text_flush(void)
{
	lockdep_assert_held(kw_syms.text_mutex);
	kw_syms.poke_finish();
}

static int kw_poke_pass(struct kw_txn *t, bool shorts, u32 *bad)
{
	static u32 rows[KW_BATCH]; /* under text_mutex */
	u32 next = 0;
	int ret = 0;

	while (next < t->count && !ret) {
		if (signal_pending(current))
			return -EINTR;
		kw_text_lock();
		ret = kw_poke_batch(t, rows, kw_next_batch(t, &next, shorts, rows), bad);
		kw_text_unlock();
		cond_resched();
	}
	return ret;
}

/* May drop kw_lock for a grace period; the session's own lock keeps the rest away. */
static int kw_poke_all(struct kw_txn *t, u32 *bad)
{
	u32 round = 0; /* groups to arm at once; 0: not known yet */
	int ret;

	do {
		ret = kw_group_arm(t, &round, bad);
		if (!ret)
			ret = kw_poke_pass(t, false, bad);
	} while (!ret && kw_group_left(t));
	if (!ret)
		ret = kw_poke_pass(t, true, bad);
	return ret;
}

static struct kw_txn *kw_txn_alloc(const struct kw_poke *pokes, u32 count)
{
	struct kw_txn *t = kzalloc(sizeof(*t), GFP_KERNEL);

	if (!t)
		return NULL;
	INIT_LIST_HEAD(&t->link);
	INIT_LIST_HEAD(&t->global);
	t->count = count;
	t->states = kw_alloc(count, __GFP_ZERO);
	t->pokes = kw_alloc(array_size(count, sizeof(*pokes)), 0);
	if (!t->states || !t->pokes) {
		kw_txn_free(t);
		return NULL;
	}
	memcpy(t->pokes, pokes, count * sizeof(*pokes));
	return t;
}

static void kw_txn_link(struct kw_txn *t, struct kw_session *s)
{
	t->id = kw_next_txn++;
	t->code->users++;
	list_add_tail(&t->link, &s->txns);
	mutex_lock(kw_syms.text_mutex);
	list_add_tail(&t->global, &kw_txns);
	mutex_unlock(kw_syms.text_mutex);
}

int kw_text_commit(struct kw_session *s, const struct kw_commit *req, const struct kw_poke *pokes,
		   size_t len, struct kw_out *out)
{
	struct kw_size *rep = kw_reserve(out, sizeof(*rep));
	struct kw_code *code = kw_area_find(s, req->area);
	struct kw_undone sum = {};
	struct kw_txn *t;
	int ret;

	if (!rep)
		return -ENOSPC;
	if (!req->count || req->count > KW_MAX_POKES || len != req->count * sizeof(*pokes))
		return -EINVAL;
	if (!code || !code->sealed)
		return -ENOENT;
	t = kw_txn_alloc(pokes, req->count);
	if (!t)
		return -ENOMEM;
	t->code = code;
	ret = kw_check_pokes(t, &out->detail);
	if (ret) {
		kw_txn_free(t);
		return ret;
	}
	ret = code->weaving ? 0 : kw_weave_leave_for(t);
	if (ret) {
		kw_txn_free(t);
		return ret;
	}
	kw_txn_link(t, s);
	ret = kw_poke_all(t, &out->detail);
	rep->value = t->id;
	if (ret)
		kw_undo_all(t, &sum, true);
	kw_group_done(t);
	if (ret && !sum.stuck)
		kw_txn_free(t);
	return ret;
}

int kw_text_states(struct kw_session *s, const struct kw_size *req, struct kw_out *out)
{
	struct kw_txn *t = kw_txn_find(s, req->value);
	u8 *to;

	if (!t)
		return -ENOENT;
	to = kw_reserve(out, t->count);
	if (!to)
		return -ENOSPC;
	mutex_lock(kw_syms.text_mutex);
	memcpy(to, t->states, t->count);
	mutex_unlock(kw_syms.text_mutex);
	return 0;
}
