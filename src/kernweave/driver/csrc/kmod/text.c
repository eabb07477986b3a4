// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Change kernel text: compare, poke, verify, in batches, all or none at return.
 *
 * Recipe of a commit:
 *   1. check every poke before the first one is written;
 *   2. link the transaction, so that ftrace's hook sees its sites;
 *   3. per batch, under kprobe_mutex and text_mutex: look for kprobes, compare
 *      old bytes, poke through the kernel's int3 protocol, read back;
 *   4. on a mismatch, undo the earlier batches and name the poke.
 */
#include <linux/kprobes.h>
#include <linux/memory.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "kw.h"

#define KW_JMP_LEN 5
#define KW_JMP_OPCODE 0xe9
#define KW_INT3_OPCODE 0xcc

static u64 kw_next_txn = 1;

int kw_text_matches(const struct kw_poke *p, const u8 *bytes)
{
	u8 now[KW_POKE_BYTES];

	if (copy_from_kernel_nofault(now, (void *)p->addr, p->len))
		return 0;
	return !memcmp(now, bytes, p->len);
}

#ifdef KW_SEED_NO_SYNC
/* A fault for the audit to find: whole jumps written at once, CPUs not synchronised. */
static void kw_queue(u64 addr, const u8 *bytes, const u8 *jump)
{
	kw_syms.poke((void *)addr, bytes, KW_JMP_LEN);
}

static void kw_finish(void)
{
}
#else
/*
 * The int3 handler needs to know what a CPU that hits the int3 is to do; the
 * jump is right before as well as after, so it is given in both directions.
 */
static void kw_queue(u64 addr, const u8 *bytes, const u8 *jump)
{
	kw_syms.poke_queue((void *)addr, bytes, KW_JMP_LEN, jump);
}

static void kw_finish(void)
{
	kw_syms.poke_finish();
}
#endif

/*
 * What is left of a longer instruction behind the jump is dead: it is written
 * only while the jump is in force, so no CPU can be about to execute it.  It
 * becomes int3, so that whoever decodes the function finds its boundaries.
 */
static void kw_write_rest(const struct kw_poke *p, const u8 *bytes)
{
	lockdep_assert_held(kw_syms.text_mutex);
	if (p->len > KW_JMP_LEN)
		kw_syms.poke((void *)(p->addr + KW_JMP_LEN), bytes + KW_JMP_LEN,
			     p->len - KW_JMP_LEN);
}

/* In the order of the kernel's own register_kprobe(). */
void kw_text_lock(void)
{
	mutex_lock(kw_syms.kprobe_mutex);
	mutex_lock(kw_syms.text_mutex);
}

void kw_text_unlock(void)
{
	mutex_unlock(kw_syms.text_mutex);
	mutex_unlock(kw_syms.kprobe_mutex);
}

/*
 * A registered kprobe keeps a copy of the instruction it was put on, runs the
 * copy when it is hit and writes its first byte back when it is disarmed.  The
 * text does not tell: the kprobe may be disabled now and enabled later.  Those
 * that go through ftrace do neither, those that are gone never come back.
 */
static bool kw_has_kprobe(const struct kw_poke *p)
{
	struct kprobe *kp;
	u32 i;

	lockdep_assert_held(kw_syms.kprobe_mutex);
	for (i = 0; i < p->len; i++) {
		kp = kw_syms.get_kprobe((void *)(p->addr + i));
		if (kp && !kprobe_ftrace(kp) && !kprobe_gone(kp))
			return true;
	}
	return false;
}

static bool kw_is_jump_into(const struct kw_poke *p, const struct kw_code *code)
{
	u64 target, start = (unsigned long)code->mem;
	s32 rel;
	u32 i;

	if (p->len < KW_JMP_LEN || p->len >= KW_POKE_BYTES || p->new_[0] != KW_JMP_OPCODE)
		return false;
	for (i = KW_JMP_LEN; i < p->len; i++)
		if (p->new_[i] != KW_INT3_OPCODE)
			return false;
	memcpy(&rel, p->new_ + 1, sizeof(rel));
	target = p->addr + KW_JMP_LEN + rel;
	return target >= start && target < start + code->size;
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
	u64 end = 0;
	u32 i;
	int ret;

	for (i = 0; i < t->count; i++) {
		const struct kw_poke *p = &t->pokes[i];

		*bad = i;
		if (p->addr < end || !kw_is_jump_into(p, t->code))
			return -EINVAL;
		if (!kw_is_core_text(p)) {
			ret = kw_hold_kmod(t, p);
			if (ret)
				return ret;
		}
		end = p->addr + p->len;
	}
	return 0;
}

static int kw_poke_batch(struct kw_txn *t, u32 from, u32 to, u32 *bad)
{
	u32 i;

	lockdep_assert_held(kw_syms.text_mutex);
	for (i = from; i < to; i++) {
		*bad = i;
		if (kw_has_kprobe(&t->pokes[i]))
			return -ESTALE;
		if (!kw_text_matches(&t->pokes[i], t->pokes[i].old))
			return -ESTALE;
	}
	for (i = from; i < to; i++) {
		kw_queue(t->pokes[i].addr, t->pokes[i].new_, t->pokes[i].new_);
		t->states[i] = KW_PLACED;
	}
	kw_finish();
	for (i = from; i < to; i++)
		kw_write_rest(&t->pokes[i], t->pokes[i].new_);
	for (i = from; i < to; i++) {
		*bad = i;
		if (WARN_ON_ONCE(!kw_text_matches(&t->pokes[i], t->pokes[i].new_)))
			return -EIO;
	}
	return 0;
}

/* Write the old bytes of what is placed in [from, to), read again and compare. */
void kw_text_restore(struct kw_txn *t, u32 from, u32 to)
{
	u32 i;

	lockdep_assert_held(kw_syms.text_mutex);
	for (i = from; i < to; i++) {
		const struct kw_poke *p = &t->pokes[i];

		if (t->states[i] != KW_PLACED && t->states[i] != KW_STUCK)
			continue;
		if (kw_has_kprobe(p)) {
			t->states[i] = KW_STUCK;
		} else if (kw_text_matches(p, p->new_)) {
			kw_write_rest(p, p->old);
			kw_queue(p->addr, p->old, p->new_);
			t->states[i] = KW_RESTORED;
		} else {
			t->states[i] = kw_text_matches(p, p->old) ? KW_RESTORED : KW_STUCK;
		}
	}
	kw_finish();
	for (i = from; i < to; i++)
		if (t->states[i] == KW_RESTORED && !kw_text_matches(&t->pokes[i], t->pokes[i].old))
			t->states[i] = KW_STUCK;
}

/* Queue the old bytes of one site for ftrace, which holds text_mutex. */
void kw_text_give_back(struct kw_txn *t, u32 i)
{
	const struct kw_poke *p = &t->pokes[i];

	lockdep_assert_held(kw_syms.text_mutex);
	if (!kw_text_matches(p, p->new_))
		return;
	kw_write_rest(p, p->old);
	kw_queue(p->addr, p->old, p->new_);
	t->states[i] = KW_EVICTED;
}

void kw_text_flush(void)
{
	lockdep_assert_held(kw_syms.text_mutex);
	kw_finish();
}

static int kw_poke_all(struct kw_txn *t, u32 *bad)
{
	u32 from, to;
	int ret = 0;

	for (from = 0; from < t->count && !ret; from = to) {
		to = min(from + KW_BATCH, t->count);
		kw_text_lock();
		ret = kw_poke_batch(t, from, to, bad);
		kw_text_unlock();
		cond_resched();
	}
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
	t->states = kvzalloc(count, GFP_KERNEL);
	t->pokes = kvmalloc_array(count, sizeof(*pokes), GFP_KERNEL);
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
	kw_txn_link(t, s);
	ret = kw_poke_all(t, &out->detail);
	rep->value = t->id;
	if (ret) {
		kw_undo_all(t, &sum);
		if (!sum.stuck)
			kw_txn_free(t);
	}
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
