// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Traps: counters behind the kernel's own kprobes, for what no jump fits.
 *
 * A probe has a post handler only so that the kernel does not optimise it: an
 * optimised probe overwrites the instructions behind it as well.  Who joins a probe of
 * ours later has no such handler, and may stay when ours has left; so the kernel is told
 * that there is nothing it could make a jump of.
 */
#include <linux/kprobes.h>
#include <linux/percpu.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "kw.h"

static u64 kw_next_set = 1;

static int kw_trap_hit(struct kprobe *kp, struct pt_regs *regs)
{
	struct kw_probe *probe = container_of(kp, struct kw_probe, kp);

	this_cpu_inc(*probe->counter);
	return 0;
}
NOKPROBE_SYMBOL(kw_trap_hit);

static void kw_trap_done(struct kprobe *kp, struct pt_regs *regs, unsigned long flags)
{
}
NOKPROBE_SYMBOL(kw_trap_done);

bool kw_is_trap(const struct kprobe *kp)
{
	struct kprobe *each;

	if (kp->pre_handler == kw_trap_hit)
		return true;
	if (list_empty(&kp->list))
		return false;
	list_for_each_entry(each, &kp->list, list)
		if (each->pre_handler == kw_trap_hit)
			return true;
	return false;
}

static bool kw_is_only_trap(const struct kprobe *kp)
{
	struct kprobe *each;

	list_for_each_entry(each, &kp->list, list)
		if (each->pre_handler != kw_trap_hit)
			return false;
	return !list_empty(&kp->list);
}

/* If somebody has joined already, no jump of ours is placed behind it (kw_may_jump()). */
static void kw_trap_stay(struct kw_probe *probe)
{
#ifdef CONFIG_OPTPROBES
	struct kprobe *kp;

	mutex_lock(kw_syms.kprobe_mutex);
	kp = kw_syms.get_kprobe(probe->kp.addr);
	if (kp && kw_is_only_trap(kp))
		container_of(kp, struct optimized_kprobe, kp)->optinsn.size = 0;
	mutex_unlock(kw_syms.kprobe_mutex);
#endif
}

static int kw_trap_init(struct kw_probe *probe, const struct kw_trap *t, struct kw_code *code)
{
	struct kw_percpu *chunk;

	if (t->chunk >= code->nr_chunks)
		return -ENOENT;
	chunk = &code->chunks[t->chunk];
	if (t->off % 8 || t->off >= chunk->bytes)
		return -E2BIG;
	if (kw_is_endbr(t->addr)) /* the kernel would put it behind, on ftrace's nop */
		return -EADDRNOTAVAIL;
	probe->counter = (u64 __percpu *)((u8 __percpu *)chunk->mem + t->off);
	probe->kp.addr = (kprobe_opcode_t *)t->addr;
	probe->kp.pre_handler = kw_trap_hit;
	probe->kp.post_handler = kw_trap_done;
	return 0;
}

static void kw_set_free(struct kw_set *set)
{
	list_del(&set->link);
	kvfree(set->probes);
	kvfree(set->armed);
	kfree(set);
}

static struct kw_set *kw_set_alloc(struct kw_session *s, struct kw_code *code, u32 count)
{
	struct kw_set *set = kzalloc(sizeof(*set), GFP_KERNEL);

	if (!set)
		return NULL;
	set->id = kw_next_set++;
	set->count = count;
	set->code = code;
	list_add_tail(&set->link, &s->sets);
	set->probes = kw_alloc(array_size(count, sizeof(*set->probes)), __GFP_ZERO);
	set->armed = kw_alloc(array_size(count, sizeof(*set->armed)), __GFP_ZERO);
	if (!set->probes || !set->armed) {
		kw_set_free(set);
		return NULL;
	}
	return set;
}

static struct kw_set *kw_set_find(struct kw_session *s, u64 id)
{
	struct kw_set *set;

	list_for_each_entry(set, &s->sets, link)
		if (set->id == id)
			return set;
	return NULL;
}

/* Waits for a grace period of RCU; called without kw_lock held when a session ends. */
static void kw_set_disarm(struct kw_set *set)
{
	if (set->nr_armed)
		unregister_kprobes(set->armed, set->nr_armed);
	set->nr_armed = 0;
}

/* Arm what the kernel allows; the reply has a status per trap, the set's number first. */
int kw_trap_arm(struct kw_session *s, const struct kw_commit *req, const struct kw_trap *traps,
		size_t len, struct kw_out *out)
{
	struct kw_code *code = kw_area_find(s, req->area);
	struct kw_set *set;
	s64 *status;
	u32 i;

	if (!req->count || req->count > KW_MAX_POKES || len != req->count * sizeof(*traps))
		return -EINVAL;
	if (!code)
		return -ENOENT;
	status = kw_reserve(out, (req->count + 1) * sizeof(*status));
	if (!status)
		return -ENOSPC;
	set = kw_set_alloc(s, code, req->count);
	if (!set)
		return -ENOMEM;
	code->users++;
	*status++ = set->id;
	for (i = 0; i < set->count; i++) {
		if (signal_pending(current)) { /* each takes milliseconds */
			kw_set_disarm(set);
			kw_area_unreachable(code);
			kw_set_free(set);
			return -EINTR;
		}
		status[i] = kw_trap_init(&set->probes[i], &traps[i], code);
		if (!status[i])
			status[i] = register_kprobe(&set->probes[i].kp);
		if (!status[i]) {
			kw_trap_stay(&set->probes[i]);
			set->armed[set->nr_armed++] = &set->probes[i].kp;
		}
		cond_resched();
	}
	return 0;
}

/* Idempotent; the reply is the number of missed hits of each trap. */
int kw_trap_disarm(struct kw_session *s, const struct kw_size *req, struct kw_out *out)
{
	struct kw_set *set = kw_set_find(s, req->value);
	u64 *missed;
	u32 i;

	if (!set)
		return -ENOENT;
	missed = kw_reserve(out, set->count * sizeof(*missed));
	if (!missed)
		return -ENOSPC;
	kw_set_disarm(set);
	for (i = 0; i < set->count; i++)
		missed[i] = set->probes[i].kp.nmissed;
	if (set->code)
		kw_area_unreachable(set->code);
	set->code = NULL;
	return 0;
}

static LIST_HEAD(kw_leaving); /* sets of closed sessions; under kw_lock */

static void kw_traps_leave(struct work_struct *work)
{
	struct kw_set *set;

	mutex_lock(&kw_lock);
	while (!list_empty(&kw_leaving)) {
		set = list_first_entry(&kw_leaving, struct kw_set, link);
		kw_set_disarm(set);
		kw_area_unreachable(set->code);
		kw_area_retire(set->code);
		kw_set_free(set);
	}
	mutex_unlock(&kw_lock);
}

static DECLARE_WORK(kw_leaver, kw_traps_leave);

/*
 * A session ends: its probes are disabled, which restores the text at once,
 * and removed later, which waits for a grace period.
 */
void kw_trap_session(struct kw_session *s)
{
	struct kw_set *set, *next;
	u32 i;

	lockdep_assert_held(&kw_lock);
	list_for_each_entry_safe(set, next, &s->sets, link) {
		if (!set->code) {
			kw_set_free(set);
			continue;
		}
		for (i = 0; i < set->nr_armed; i++) {
			disable_kprobe(set->armed[i]);
			cond_resched();
		}
		list_move(&set->link, &kw_leaving);
		schedule_work(&kw_leaver);
	}
}

void kw_traps_exit(void)
{
	flush_work(&kw_leaver);
	kw_traps_leave(NULL);
}
