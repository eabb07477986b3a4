// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Copies of instructions that the kernel looks up by their address: when one of
 * these faults or traps, the exception table or the bug table is asked, which know
 * the native address only.
 *
 * The brain splices a call to kw_native_addr() into the functions that search
 * these tables.  The splices stay as long as there are such copies, whoever made
 * them (KW_POKE_KEEP).
 *
 * A task may sleep while a fault is handled, and then comes back into the copy:
 * no grace period waits for it.  So the frames on the stacks of all tasks are
 * looked at, with the machine stopped, before an area with such copies is freed.
 * Then no CPU is in kw_native_addr() either, which runs with interrupts off.
 *
 * Until then such a task goes on, when it wakes, behind the window it came by; so
 * no other window may have that place inside.
 */
#include <linux/rculist.h>
#include <linux/sched/signal.h>
#include <linux/sched/task_stack.h>
#include <linux/slab.h>
#include <linux/stop_machine.h>
#include <asm/unwind.h>

#include "kw.h"

static LIST_HEAD(kw_copied); /* areas with copies; written under kw_lock */

static bool kw_is_inside(const struct kw_code *code, unsigned long addr)
{
	return addr - (unsigned long)code->mem < code->size;
}
NOKPROBE_SYMBOL(kw_is_inside);

static unsigned long kw_find_native(const struct kw_code *code, unsigned long addr)
{
	u32 lo = 0, hi = code->nr_copies;

	while (lo < hi) {
		u32 mid = lo + (hi - lo) / 2;

		if (code->copies[mid].addr == addr)
			return code->copies[mid].native;
		if (code->copies[mid].addr < addr)
			lo = mid + 1;
		else
			hi = mid;
	}
	return addr;
}
NOKPROBE_SYMBOL(kw_find_native);

/*
 * Called by the trampolines in whatever context faults: also where RCU does not
 * watch, and in an NMI.  Every other address is returned as it is.
 */
unsigned long kw_native_addr(unsigned long addr)
{
	const struct kw_code *code;
	unsigned long flags;

	raw_local_irq_save(flags);
	list_for_each_entry_rcu(code, &kw_copied, copied, true) {
		if (!kw_is_inside(code, addr))
			continue;
		addr = kw_find_native(code, addr);
		break;
	}
	raw_local_irq_restore(flags);
	return addr;
}
NOKPROBE_SYMBOL(kw_native_addr);

bool kw_copies_exist(void)
{
	return !list_empty(&kw_copied);
}

/* Whether the session's splices are in force that ask kw_native_addr(). */
static bool kw_is_asked(const struct kw_session *s)
{
	const struct kw_txn *t;
	u32 i;

	list_for_each_entry(t, &s->txns, link)
		for (i = 0; i < t->count; i++)
			if (t->pokes[i].flags & KW_POKE_KEEP && t->states[i] == KW_PLACED)
				return true;
	return false;
}

static bool kw_are_copies(const struct kw_code *code, const struct kw_copy *rows, u64 count)
{
	u64 i;

	for (i = 0; i < count; i++)
		if (!kw_is_inside(code, rows[i].addr) || (i && rows[i].addr <= rows[i - 1].addr))
			return false;
	return true;
}

/* The copies of an area that is not in use yet; once. */
int kw_copies_set(struct kw_session *s, const struct kw_slice *req, const struct kw_copy *rows,
		  size_t len)
{
	struct kw_code *code = kw_area_find(s, req->area);
	u64 i;

	if (!code)
		return -ENOENT;
	if (!req->len || len % sizeof(*rows) || len / sizeof(*rows) != req->len ||
	    !kw_are_copies(code, rows, req->len))
		return -EINVAL;
	if (code->copies || code->sealed)
		return -EPERM;
	if (!kw_is_asked(s))
		return -ENOLINK;
	code->copies = kw_alloc(array_size(req->len, sizeof(*code->copies)), __GFP_ZERO);
	if (!code->copies)
		return -ENOMEM;
	for (i = 0; i < req->len; i++)
		code->copies[i] = (struct kw_known){ rows[i].addr, rows[i].native };
	code->nr_copies = req->len;
	list_add_rcu(&code->copied, &kw_copied);
	return 0;
}

/* The last jump into the area is gone. */
void kw_copies_unreachable(struct kw_code *code, struct kw_txn *t)
{
	const struct kw_poke *p;
	u32 i;

	lockdep_assert_held(&kw_lock);
	for (i = 0; code->copies && i < code->nr_copies; i++) {
		p = kw_poke_around(t, code->copies[i].native);
		if (p)
			code->copies[i].end = p->addr + p->len;
	}
}

/* Whether anybody may come back to a place inside one of the pokes. */
int kw_copies_check(struct kw_txn *t, u32 *bad)
{
	const struct kw_code *code;
	const struct kw_poke *p;
	u32 i;

	lockdep_assert_held(&kw_lock);
	list_for_each_entry(code, &kw_copied, copied)
		for (i = 0; i < code->nr_copies; i++) {
			p = kw_poke_around(t, code->copies[i].end);
			if (p && p->addr != code->copies[i].end) {
				*bad = p - t->pokes;
				return -EBUSY;
			}
		}
	return 0;
}

int kw_copies_returns(struct kw_out *out)
{
	const struct kw_code *code;
	u64 *to;
	u32 i, n = 0;

	lockdep_assert_held(&kw_lock);
	list_for_each_entry(code, &kw_copied, copied)
		for (i = 0; i < code->nr_copies; i++)
			n += !!code->copies[i].end;
	to = kw_reserve(out, n * sizeof(*to));
	if (!to)
		return -ENOSPC;
	list_for_each_entry(code, &kw_copied, copied)
		for (i = 0; i < code->nr_copies; i++)
			if (code->copies[i].end)
				*to++ = code->copies[i].end;
	return 0;
}

struct kw_scan {
	struct kw_code *code;
	u32 visitors;
};

/*
 * What an exception in the kernel left: ip, cs, flags, sp, ss; the stack goes on
 * behind.  ss may be anything: an interrupt of user mode leaves none.
 */
static bool kw_is_frame(const struct kw_code *code, const unsigned long *at,
			const unsigned long *end)
{
	unsigned long sp = READ_ONCE_NOCHECK(at[3]);

	return kw_is_inside(code, READ_ONCE_NOCHECK(at[0])) &&
	       (u16)READ_ONCE_NOCHECK(at[1]) == __KERNEL_CS &&
	       sp >= (unsigned long)(at + 5) && sp <= (unsigned long)end;
}

/*
 * Whether the task is going to come back, or nobody knows: what looks like a frame
 * may be left over from an earlier call, below one that has not written there.
 */
static bool kw_comes_back(const struct kw_code *code, struct task_struct *task)
{
	struct unwind_state state;
	const struct pt_regs *regs;

	if (!kw_may_unwind(task))
		return true;
	unwind_start(&state, task, NULL, NULL);
	for (; !unwind_done(&state); unwind_next_frame(&state)) {
		regs = unwind_get_entry_regs(&state, NULL);
		if (regs && kw_is_inside(code, regs->ip))
			return true;
	}
	return unwind_error(&state);
}

static void kw_scan_task(struct kw_scan *scan, struct task_struct *task)
{
	unsigned long base = (unsigned long)task_stack_page(task);
	unsigned long sp = task->thread.sp;
	const unsigned long *at, *end;

	if (!base || !refcount_read(&task->stack_refcount))
		return;
	end = (unsigned long *)task_pt_regs(task);
	if (sp < base || sp > (unsigned long)end)
		sp = base;
	for (at = (unsigned long *)sp; at + 5 <= end; at++)
		if (kw_is_frame(scan->code, at, end)) {
			scan->visitors += kw_comes_back(scan->code, task);
			return;
		}
}

/* With the machine stopped every task but the stoppers has its state on its stack. */
static int kw_scan_stacks(void *data)
{
	struct kw_scan *scan = data;
	struct task_struct *process, *task;

	for_each_process_thread(process, task)
		kw_scan_task(scan, task);
	if (!scan->visitors)
		list_del_rcu(&scan->code->copied);
	return 0;
}

/*
 * How many tasks are going to come back into an area that is quiescent
 * otherwise.  None: its copies are no longer known, it may be freed.
 */
u32 kw_copies_visitors(struct kw_code *code)
{
	struct kw_scan scan = { code, 0 };

	lockdep_assert_held(&kw_lock);
	if (!code->copies)
		return 0;
	stop_machine(kw_scan_stacks, &scan, NULL);
	if (scan.visitors)
		return scan.visitors;
	kvfree(code->copies);
	code->copies = NULL;
	return 0;
}
