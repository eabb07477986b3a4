// SPDX-License-Identifier: GPL-2.0-or-later
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt
/*
 * Groups: several instructions replaced by one jump, once nobody is between them.
 *
 * int3 goes on the first byte of each group, and whoever hits it is sent to the
 * trampoline.  After one grace period for all of them no task, no idle task and
 * no handler has its instruction pointer behind a first byte: nothing in a group
 * sleeps (calls are last, what may fault for long is first), so a task in its
 * middle was preempted there, and RCU tasks waits for it.  Then the other bytes
 * are free.
 *
 * While they wait each group costs a trap.  If every instruction of the tick's
 * handlers did, they would take longer than a tick, and nothing else would run.
 * So groups are armed in rounds, each spread evenly over all that still wait: what
 * its int3 cost tells what those of the next round will.  The first is small, and
 * the next is twice as large if no CPU spent much on them, half as large if one did.
 * What the kernel calls on the way from an int3 to the notifier has none: the
 * brain leaves it alone.
 *
 * Many rounds take long, so a signal ends them before any batch; the undo of what
 * is armed and placed by then goes on to its end.
 */
#include <linux/cpu.h>
#include <linux/kdebug.h>
#include <linux/ktime.h>
#include <linux/notifier.h>
#include <linux/percpu.h>
#include <linux/sched/signal.h>

#include "kw.h"

/* Groups armed at once. */
#define KW_ROUND_FIRST 512
#define KW_ROUND_MIN 256
#define KW_ROUND_MAX 16384

/* int3 per second of one CPU: 5% and 20% of its time at 3 us each, as under emulation. */
#define KW_RATE_LOW 16000
#define KW_RATE_HIGH 64000

static struct kw_txn *kw_arming; /* whose groups have an int3; set under kw_lock */
static DEFINE_PER_CPU(u32, kw_hits);

static unsigned int kw_gone;
module_param_named(gone, kw_gone, uint, 0444);
MODULE_PARM_DESC(gone, "int3 that were gone when somebody hit them; about");

/* Find the poke at addr: pokes ascend. */
struct kw_poke *kw_poke_at(struct kw_txn *t, u64 addr)
{
	u32 lo = 0, hi = t->count;

	while (lo < hi) {
		u32 mid = lo + (hi - lo) / 2;

		if (t->pokes[mid].addr == addr)
			return &t->pokes[mid];
		if (t->pokes[mid].addr < addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	return NULL;
}
NOKPROBE_SYMBOL(kw_poke_at);

/* The poke whose bytes hold addr. */
struct kw_poke *kw_poke_around(struct kw_txn *t, u64 addr)
{
	u32 lo = 0, hi = t->count;

	while (lo < hi) {
		u32 mid = lo + (hi - lo) / 2;

		if (t->pokes[mid].addr + t->pokes[mid].len <= addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo < t->count && t->pokes[lo].addr <= addr ? &t->pokes[lo] : NULL;
}
NOKPROBE_SYMBOL(kw_poke_around);

static u64 kw_target(u64 addr, const u8 *jump)
{
	s32 rel;

	memcpy(&rel, jump + 1, sizeof(rel));
	return addr + KW_JMP_LEN + rel;
}
NOKPROBE_SYMBOL(kw_target);

static u64 kw_short_target(const struct kw_poke *p)
{
	return p->addr + KW_SHORT_LEN + (s8)p->new_[1];
}
NOKPROBE_SYMBOL(kw_short_target);

/* Where a hit of the poke is to go on: in the trampoline. */
static u64 kw_trampoline_of(struct kw_txn *t, const struct kw_poke *p)
{
	u64 at = p->addr;
	const u8 *jump = p->new_;

	if (jump[0] != KW_JMP_OPCODE) {
		at = kw_short_target(p);
		p = kw_poke_around(t, at);
		jump = p->new_ + (at - p->addr);
	}
	return kw_target(at, jump);
}
NOKPROBE_SYMBOL(kw_trampoline_of);

static bool kw_group_hit(struct pt_regs *regs)
{
	struct kw_txn *t = READ_ONCE(kw_arming);
	struct kw_poke *p = t ? kw_poke_at(t, regs->ip - 1) : NULL;

	if (!p || !(p->flags & KW_POKE_GROUP))
		return false;
	this_cpu_inc(kw_hits);
	regs->ip = kw_trampoline_of(t, p);
	return true;
}
NOKPROBE_SYMBOL(kw_group_hit);

/* An int3 that is there while a batch is written. */
static bool kw_batch_hit(struct pt_regs *regs)
{
	struct kw_txn *t = kw_poke_writing();
	struct kw_poke *p = t ? kw_poke_at(t, regs->ip - 1) : NULL;

	if (!p)
		return false;
	regs->ip = kw_trampoline_of(t, p);
	return true;
}
NOKPROBE_SYMBOL(kw_batch_hit);

/*
 * The kernel's protocol leaves no CPU behind with an int3 that is gone.  An
 * emulator may, for good: QEMU translates what it runs, and another CPU may do so
 * between the write's throwing the translation away and the write itself
 * (docs/design/0007).  What is there now is run; with RF set QEMU looks for another
 * translation, and real CPUs just take no instruction breakpoint there.
 */
static bool kw_int3_is_gone(struct pt_regs *regs)
{
	if (READ_ONCE(*(u8 *)(regs->ip - 1)) == INT3_INSN_OPCODE)
		return false;
	kw_gone++;
	regs->ip--;
	regs->flags |= X86_EFLAGS_RF;
	return true;
}
NOKPROBE_SYMBOL(kw_int3_is_gone);

static int kw_int3(struct notifier_block *nb, unsigned long event, void *data)
{
	struct pt_regs *regs = ((struct die_args *)data)->regs;

	if (event != DIE_INT3 || user_mode(regs))
		return NOTIFY_DONE;
	if (kw_group_hit(regs) || kw_batch_hit(regs) || kw_int3_is_gone(regs))
		return NOTIFY_STOP;
	return NOTIFY_DONE;
}
NOKPROBE_SYMBOL(kw_int3);

static struct notifier_block kw_int3_notifier = {
	.notifier_call = kw_int3,
	/* a debugger would take the int3 for its own, and what is asked before may have one */
	.priority = INT_MAX,
};

int kw_group_init(void)
{
	return register_die_notifier(&kw_int3_notifier);
}

void kw_group_exit(void)
{
	unregister_die_notifier(&kw_int3_notifier);
}

/*
 * int3 per second since then, of the CPU that had most, and start anew.  A hit
 * meanwhile may undo the start, which makes the next figure too high: no harm.
 */
static u64 kw_hit_rate(ktime_t *since)
{
	ktime_t now = ktime_get();
	u64 us = max_t(s64, ktime_us_delta(now, *since), 1);
	u32 most = 0;
	int cpu;

	for_each_possible_cpu(cpu) {
		most = max(most, per_cpu(kw_hits, cpu));
		per_cpu(kw_hits, cpu) = 0;
	}
	*since = now;
	return div64_u64((u64)most * USEC_PER_SEC, us);
}

static bool kw_is_waiting(const struct kw_txn *t, u32 i)
{
	return t->pokes[i].flags & KW_POKE_GROUP && t->states[i] == KW_WAITING;
}

/* Groups that have no int3 yet. */
u32 kw_group_left(const struct kw_txn *t)
{
	u32 i, n = 0;

	for (i = 0; i < t->count; i++)
		n += kw_is_waiting(t, i);
	return n;
}

/* Some of many, evenly spread. */
struct kw_spread {
	u32 some;
	u32 many;
	u32 sum;
};

static bool kw_takes_next(struct kw_spread *s)
{
	s->sum += s->some;
	if (s->sum < s->many)
		return false;
	s->sum -= s->many;
	return true;
}

/* A batch of a round, from *next on. */
static int kw_arm_batch(struct kw_txn *t, u32 *next, struct kw_spread *s, u32 *bad)
{
	static const u8 int3 = KW_INT3;
	u32 n = 0;

	for (; *next < t->count && n < KW_BATCH; ++*next) {
		const struct kw_poke *p = &t->pokes[*next];

		if (!kw_is_waiting(t, *next) || !kw_takes_next(s))
			continue;
		*bad = *next;
		if (kw_text_has_kprobe(p) || kw_syms.get_kprobe((void *)p->addr) ||
		    !kw_text_matches(p, p->old))
			return -ESTALE;
		t->states[*next] = KW_ARMED;
		kw_syms.poke((void *)p->addr, &int3, sizeof(int3));
		n++;
	}
	if (n)
		kw_syms.poke_sync();
	return 0;
}

static int kw_arm_round(struct kw_txn *t, struct kw_spread *s, u32 *bad)
{
	u32 next = 0;
	int ret = 0;

	while (next < t->count && !ret) {
		if (signal_pending(current))
			return -EINTR;
		kw_text_lock();
		ret = kw_arm_batch(t, &next, s, bad);
		kw_text_unlock();
		cond_resched();
	}
	return ret;
}

static u32 kw_next_round(u32 round, u64 rate)
{
	if (rate > KW_RATE_HIGH)
		return max_t(u32, round / 2, KW_ROUND_MIN);
	if (rate < KW_RATE_LOW)
		return min_t(u32, round * 2, KW_ROUND_MAX);
	return round;
}

/*
 * Empty the groups of one round; kw_lock is dropped while it waits.  A CPU that
 * arms has ticks, one that waits may not: both times count, and in the first only
 * half of the groups have an int3 at an average.
 */
int kw_group_arm(struct kw_txn *t, u32 *round, u32 *bad)
{
	struct kw_spread s = { .many = kw_group_left(t) };
	ktime_t since = ktime_get();
	u64 arming, waiting;
	int ret;

	if (!s.many)
		return 0;
	s.some = min(*round ?: KW_ROUND_FIRST, s.many);
	WRITE_ONCE(kw_arming, t);
	kw_hit_rate(&since);
	ret = kw_arm_round(t, &s, bad);
	if (ret)
		return ret;
	arming = 2 * kw_hit_rate(&since);
	mutex_unlock(&kw_lock);
	kw_quiesce();
	mutex_lock(&kw_lock);
	waiting = kw_hit_rate(&since);
	pr_debug("%u of %u groups: %llu and %llu int3/s\n", s.some, s.many, arming, waiting);
	*round = kw_next_round(s.some, max(arming, waiting));
	return 0;
}

/* All int3 are gone, and the last sync saw every handler of one end. */
void kw_group_done(struct kw_txn *t)
{
	if (READ_ONCE(kw_arming) != t)
		return;
	cpus_read_lock();
	kw_syms.poke_sync();
	cpus_read_unlock();
	WRITE_ONCE(kw_arming, NULL);
}

/* ---- what a transaction may write ---- */

static bool kw_leads_into(const struct kw_code *code, u64 addr, const u8 *jump)
{
	u64 start = (unsigned long)code->mem, target = kw_target(addr, jump);

	if (jump[0] != KW_JMP_OPCODE)
		return false;
	if (code->weaving)
		return kw_weave_is_entry(code, addr, target);
	return target >= start && target < start + code->size;
}

/* Whether a jump leads to a clone that was closed since it was checked. */
bool kw_is_closed_entry(const struct kw_code *code, const struct kw_poke *p)
{
	return code->weaving && !kw_leads_into(code, p->addr, p->new_);
}

/*
 * Walk the jumps of a poke: the offset of the first at or behind off, its length
 * if there is none, 0 if there is anything but jumps into the area and int3.
 */
static u32 kw_next_jump(const struct kw_code *code, const struct kw_poke *p, u32 off)
{
	for (; off < p->len && p->new_[off] == KW_INT3; off++)
		;
	if (off >= p->len)
		return p->len;
	if (p->len - off < KW_JMP_LEN || !kw_leads_into(code, p->addr + off, p->new_ + off))
		return 0;
	return off;
}

static bool kw_is_long_jump(const struct kw_code *code, const struct kw_poke *p)
{
	u32 off;

	if (p->len < KW_JMP_LEN || !kw_leads_into(code, p->addr, p->new_))
		return false;
	for (off = KW_JMP_LEN; off < p->len; off += KW_JMP_LEN) {
		off = kw_next_jump(code, p, off);
		if (!off || (off < p->len && !(p->flags & KW_POKE_HOST)))
			return false;
	}
	return true;
}

static bool kw_is_springboard(const struct kw_code *code, const struct kw_poke *p, u64 addr)
{
	u32 off = 0;

	if (!p || !(p->flags & KW_POKE_HOST) || kw_is_short(p))
		return false;
	while (off < p->len && p->addr + off < addr)
		off = kw_next_jump(code, p, off + KW_JMP_LEN);
	return p->addr + off == addr;
}

static bool kw_is_short_jump(struct kw_txn *t, const struct kw_poke *p)
{
	u64 target = kw_short_target(p);
	u32 i;

	if (p->len < KW_SHORT_LEN)
		return false;
	for (i = KW_SHORT_LEN; i < p->len; i++)
		if (p->new_[i] != KW_INT3)
			return false;
	return kw_is_springboard(t->code, kw_poke_around(t, target), target);
}

/* Check form, order and aim of all pokes. */
int kw_check_jumps(struct kw_txn *t, u32 *bad)
{
	u64 end = 0;
	u32 i;

	for (i = 0; i < t->count; i++) {
		const struct kw_poke *p = &t->pokes[i];

		*bad = i;
		if (p->addr < end || p->len > KW_POKE_BYTES)
			return -EINVAL;
		if (!kw_is_short(p) && !kw_is_long_jump(t->code, p))
			return -EINVAL;
		end = p->addr + p->len;
	}
	for (i = 0; i < t->count; i++) {
		*bad = i;
		if (kw_is_short(&t->pokes[i]) && !kw_is_short_jump(t, &t->pokes[i]))
			return -EINVAL;
	}
	return 0;
}
