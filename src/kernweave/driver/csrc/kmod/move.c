// SPDX-License-Identifier: GPL-2.0-or-later
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt
/*
 * Move tasks between functions and their clones, with the machine stopped: return
 * addresses on their stacks, those that tracers hide, and the ips of interrupted code.
 *
 * Who had a place changed may have read it before, and hold the old address in a
 * register: tracers do.  So after a grace period they are looked at again, until nobody
 * is found twice.  One more passes then.
 */
#include <linux/delay.h>
#include <linux/ftrace.h>
#include <linux/kprobes.h>
#include <linux/ktime.h>
#include <linux/rethook.h>
#include <linux/sched/signal.h>
#include <linux/sched/task_stack.h>
#include <linux/stop_machine.h>
#include <asm/unwind.h>

#include "weaving.h"

#define KW_SETTLE_JIFFIES max(HZ / 100, 1)
#define KW_SETTLE_AT_MOST (10 * HZ) /* for who waits until closed functions are left */
#define KW_SETTLE_PAUSE_MOST (32 * HZ) /* between tries: who stays may stay for days */
#define KW_LOOKS 2 /* that must find nobody */
#define KW_PACE 20 /* times what a stop took pass before the next one, at most that much */
#define KW_PACE_MOST_NS (NSEC_PER_SEC / 2)

static void kw_settle(struct work_struct *work);
static DECLARE_DELAYED_WORK(kw_settler, kw_settle);
static unsigned long kw_pause; /* before the settler tries again; in jiffies */

void kw_settle_soon(void)
{
	WRITE_ONCE(kw_pause, KW_SETTLE_JIFFIES);
	mod_delayed_work(kw_works, &kw_settler, 0);
}

struct kw_move {
	const struct kw_weaving *w;
	enum kw_side side;
	bool some; /* only who is in a function that is closed */
	atomic_t places;
	atomic_t visitors;
	atomic_t pid;
	s64 stop_ns;
};

/* The other side of a place, 0: it has none.  Of several the last: behind counters. */
static u64 kw_other_side(const struct kw_weaving *w, const struct kw_place *places, u32 count,
			 enum kw_side side, u64 addr)
{
	u64 base = side == KW_NATIVE ? w->start : w->n.native_base;
	u64 other = side == KW_NATIVE ? w->n.native_base : w->start;
	u32 lo = 0, hi = count, key;

	if (addr < base || addr - base > U32_MAX)
		return 0;
	while (lo < hi) {
		u32 mid = lo + (hi - lo) / 2;

		key = side == KW_NATIVE ? places[mid].clone : places[mid].native;
		if (key <= addr - base)
			lo = mid + 1;
		else
			hi = mid;
	}
	if (!lo--)
		return 0;
	key = side == KW_NATIVE ? places[lo].clone : places[lo].native;
	if (key != addr - base)
		return 0;
	return other + (side == KW_NATIVE ? places[lo].native : places[lo].clone);
}

/* The function that a native address is in, as a row of its entries, -1: it is not woven. */
static s64 kw_function_of(const struct kw_weaving *w, u64 native)
{
	s64 row = kw_find_row(w->parts, w->n.parts, native);

	return row >= 0 && native < w->parts[row].end ? (s64)w->parts[row].entry : -1;
}

static bool kw_is_closed(const struct kw_weaving *w, u64 native)
{
	s64 row = kw_function_of(w, native);

	return row >= 0 && w->closed[row];
}

/* The native instruction at or before a place in a clone. */
static u64 kw_native_near(const struct kw_weaving *w, u64 clone)
{
	u32 lo = 0, hi = w->n.insns;

	while (lo < hi) {
		u32 mid = lo + (hi - lo) / 2;

		if (w->insns[mid].clone <= clone - w->start)
			lo = mid + 1;
		else
			hi = mid;
	}
	return lo ? w->n.native_base + w->insns[lo - 1].native : 0;
}

/* Whether what the instruction around an address does is to be moved. */
static bool kw_is_concerned(const struct kw_move *m, u64 inside)
{
	if (m->side == KW_CLONE)
		return kw_function_of(m->w, inside) >= 0 && !kw_is_closed(m->w, inside);
	if (!kw_is_clone(m->w, inside))
		return false;
	return !m->some || kw_is_closed(m->w, kw_native_near(m->w, inside));
}

static u64 kw_other_return(const struct kw_move *m, u64 addr)
{
	return kw_other_side(m->w, m->w->returns, m->w->n.returns, m->side, addr);
}

/* Whether a place had to be changed and could not be. */
static bool kw_move_place(struct kw_move *m, unsigned long *at, u64 inside, u64 to)
{
	if (!kw_is_concerned(m, inside))
		return false;
	if (to) {
		WRITE_ONCE(*at, to);
		atomic_inc(&m->places);
		return false;
	}
	return m->side == KW_NATIVE;
}

static bool kw_move_return(struct kw_move *m, unsigned long *at)
{
	return kw_move_place(m, at, *at - 1, kw_other_return(m, *at));
}

/* Whether one of our jumps that begins before is there, or may be soon. */
static bool kw_is_in_window(u64 native)
{
	const struct kw_poke *p;
	struct kw_txn *t;

	list_for_each_entry(t, &kw_txns, global) {
		p = kw_poke_around(t, native);
		if (p && p->addr != native && t->states[p - t->pokes] != KW_RESTORED &&
		    !(t->states[p - t->pokes] == KW_EVICTED && kw_text_matches(p, p->old)))
			return true;
	}
	return false;
}

/* Whether a jump that begins before is there, or may be soon; nobody changes the lists. */
static bool kw_is_replaced(u64 native)
{
	struct kprobe *kp;
	u32 i;

	for (i = 1; i < KW_JMP_LEN; i++) {
		kp = kw_syms.get_kprobe((void *)(native - i));
		if (kp && !kprobe_ftrace(kp) && kw_may_jump(kp))
			return true;
	}
	return kw_is_in_window(native);
}

/* Who is interrupted has arrived before it is moved in, and so is not counted there. */
static bool kw_move_ip(struct kw_move *m, struct pt_regs *regs)
{
	const struct kw_weaving *w = m->w;
	u64 to = kw_other_side(w, w->insns, w->n.insns, m->side, regs->ip);

	if (to && m->side == KW_NATIVE && kw_is_replaced(to))
		to = 0;
	return kw_move_place(m, &regs->ip, regs->ip, to);
}

/* Return addresses that a tracer keeps beside the stack. */
static bool kw_move_hidden(struct kw_move *m, struct task_struct *task)
{
	bool stays = false;

#ifdef CONFIG_RETHOOK
	struct llist_node *node;

	llist_for_each(node, task->rethooks.first) {
		struct rethook_node *hook = llist_entry(node, struct rethook_node, llist);

		stays |= kw_move_return(m, &hook->ret_addr);
	}
#endif
#ifdef CONFIG_FUNCTION_GRAPH_TRACER
	struct ftrace_ret_stack *ret;
	int i = 0;

	while (kw_syms.graph_ret_stack && (ret = kw_syms.graph_ret_stack(task, i++)))
		stays |= kw_move_return(m, &ret->ret);
#endif
	return stays;
}

/*
 * Whether what the unwinder did not reach may be a return address of a clone, or the
 * ip of a frame that an exception left.
 */
static bool kw_may_return(const struct kw_move *m, struct task_struct *task)
{
	unsigned long *at = (unsigned long *)task->thread.sp;
	unsigned long *end = (unsigned long *)task_pt_regs(task);

	for (; at < end; at++) {
		u64 ip = READ_ONCE_NOCHECK(*at);

		if (kw_is_concerned(m, ip - 1) && kw_other_return(m, ip))
			return true;
		if (kw_is_concerned(m, ip) && at + 1 < end &&
		    (u16)READ_ONCE_NOCHECK(at[1]) == __KERNEL_CS)
			return true;
	}
	return false;
}

/* Where the frame that was reached has its return address; NULL: it has none. */
static unsigned long *kw_return_at(const struct unwind_state *state)
{
#ifdef CONFIG_UNWINDER_ORC
	if (!state->regs && state->sp)
		return (unsigned long *)state->sp - 1;
#endif
	return NULL;
}

/* The kernel warns of it where the return address may change: the task could run. */
bool kw_may_unwind(struct task_struct *task)
{
#ifdef CONFIG_RETHOOK
	return task == current || !task->rethooks.first || !task_is_running(task);
#else
	return true;
#endif
}

/* Whether a place had to be changed and could not be. */
static bool kw_move_frames(struct kw_move *m, struct task_struct *task)
{
	struct unwind_state state;
	struct pt_regs *regs;
	unsigned long *at;
	bool stays = false;

	unwind_start(&state, task, NULL, NULL);
	for (; !unwind_done(&state); unwind_next_frame(&state)) {
		regs = unwind_get_entry_regs(&state, NULL);
		at = kw_return_at(&state);
		if (regs)
			stays |= kw_move_ip(m, regs);
		else if (at)
			stays |= kw_move_return(m, at);
	}
	if (unwind_error(&state))
		stays |= task == current || kw_may_return(m, task);
	return stays;
}

static void kw_move_task(struct kw_move *m, struct task_struct *task)
{
	bool stays = kw_move_hidden(m, task);

	if (kw_may_unwind(task))
		stays |= kw_move_frames(m, task);
	else
		stays |= kw_may_return(m, task);
	if (!stays)
		return;
	atomic_inc(&m->visitors);
	atomic_set(&m->pid, task->pid);
}

static bool kw_has_stack(struct task_struct *task)
{
	return task && !READ_ONCE(task->on_cpu) && task_stack_page(task) &&
	       refcount_read(&task->stack_refcount);
}

static void kw_move_away(void *data, struct task_struct *task)
{
	if (kw_has_stack(task))
		kw_move_task(data, task);
}

/* Every CPU looks at what it runs itself, one of them at all the rest. */
static int kw_move_all(void *data)
{
	struct kw_move *m = data;
	struct task_struct *process, *task;
	ktime_t since = ktime_get();
	int cpu;

	kw_move_task(m, current);
	if (smp_processor_id() != cpumask_first(cpu_online_mask))
		return 0;
	for_each_process_thread(process, task)
		kw_move_away(m, task);
	for_each_possible_cpu(cpu)
		kw_move_away(m, kw_syms.idle_task(cpu)); /* none if the CPU was never there */
	kw_exiting_visit(kw_move_away, m);
	m->stop_ns = ktime_to_ns(ktime_sub(ktime_get(), since));
	return 0;
}

static void kw_move(struct kw_move *m)
{
	static ktime_t next; /* under kw_lock */
	s64 early_us = ktime_us_delta(next, ktime_get());

	lockdep_assert_held(&kw_lock);
	if (early_us > 0)
		fsleep(early_us);
	stop_machine(kw_move_all, m, cpu_online_mask);
	next = ktime_add_ns(ktime_get(), min_t(s64, KW_PACE * m->stop_ns, KW_PACE_MOST_NS));
}

static u32 kw_move_some(struct kw_weaving *w)
{
	struct kw_move m = { .w = w, .side = KW_NATIVE, .some = true };

	kw_move(&m);
	if (atomic_read(&m.places))
		w->looks = 0;
	return atomic_read(&m.visitors);
}

/* Send who is in a function that was closed back to native code; again until nobody is. */
static void kw_settle(struct work_struct *work)
{
	struct kw_weaving *w;
	bool again = false;

	mutex_lock(&kw_lock);
	list_for_each_entry(w, &kw_weavings, link) { /* changed with kw_lock held, too */
		mutex_lock(kw_syms.text_mutex);
		if (!w->closing) {
			mutex_unlock(kw_syms.text_mutex);
			continue;
		}
		w->closing = false;
		mutex_unlock(kw_syms.text_mutex);
		if (!kw_move_some(w))
			continue;
		mutex_lock(kw_syms.text_mutex);
		w->closing = true;
		mutex_unlock(kw_syms.text_mutex);
		again = true;
	}
	mutex_unlock(&kw_lock);
	if (!again)
		return;
	WRITE_ONCE(kw_pause, min_t(unsigned long, 2 * READ_ONCE(kw_pause), KW_SETTLE_PAUSE_MOST));
	queue_delayed_work(kw_works, &kw_settler, READ_ONCE(kw_pause));
}

bool kw_weavings_exist(void)
{
	return !list_empty(&kw_weavings);
}

static bool kw_is_closing(void)
{
	struct kw_weaving *w;
	bool found = false;

	mutex_lock(kw_syms.text_mutex);
	list_for_each_entry(w, &kw_weavings, link)
		found |= w->closing;
	mutex_unlock(kw_syms.text_mutex);
	return found;
}

/*
 * A splice is going into functions that may be woven: who is in a clone of them has to
 * leave before, as it may go on natively at places that the splice replaces.  kw_lock
 * is dropped for a grace period.
 */
int kw_weave_leave_for(const struct kw_txn *t)
{
	unsigned long end = jiffies + KW_SETTLE_AT_MOST;
	bool found;
	u32 i;

	lockdep_assert_held(&kw_lock);
	if (list_empty(&kw_weavings))
		return 0;
	kw_poke_lock();
	for (i = 0; i < t->count; i++)
		kw_weave_mark(t->pokes[i].addr, t->pokes[i].len);
	found = kw_weave_close_marked();
	kw_poke_unlock();
	if (!found && !kw_is_closing())
		return 0;
	while (time_before(jiffies, end) && kw_is_closing()) {
		mutex_unlock(&kw_lock);
		kw_quiesce();
		kw_settle_soon();
		flush_delayed_work(&kw_settler);
		mutex_lock(&kw_lock);
		if (signal_pending(current))
			return -EINTR;
	}
	return kw_is_closing() ? -EBUSY : 0;
}

/*
 * Called by the trampoline in klp_start_transition(), when the functions that are
 * patched were closed: who is in a clone is in the old function, which the kernel
 * would not see.
 */
void kw_livepatch_yield(void)
{
	unsigned long end = jiffies + KW_SETTLE_AT_MOST;
	int idx = kw_yield_begin();

	for (;;) {
		kw_settle_soon();
		flush_delayed_work(&kw_settler);
		if (!kw_is_closing() || time_after(jiffies, end))
			break;
		schedule_timeout_uninterruptible(KW_SETTLE_JIFFIES);
	}
	if (kw_is_closing())
		pr_warn("somebody stays in a clone of a function that is patched\n");
	kw_yield_end(idx);
}

void kw_weave_exit(void)
{
	cancel_delayed_work_sync(&kw_settler);
	WARN_ON(!list_empty(&kw_weavings));
	rcu_barrier_tasks();
}

/* Tasks that are, or were a moment ago, in clones; as far as is known. */
static u32 kw_found(const struct kw_move *m)
{
	return atomic_read(&m->visitors) + atomic_read(&m->places) + !kw_exiting_complete();
}

static void kw_move_out(struct kw_code *code, struct kw_move *m)
{
	bool quiescent = kw_code_is_free(code);

	kw_move(m);
	if (quiescent && !kw_found(m))
		code->weaving->looks++;
	else
		code->weaving->looks = 0;
	if (code->stamp) /* else nobody ever got there */
		code->stamp = kw_stamp_now();
}

/*
 * Tasks in clones of a generation that is quiescent otherwise.  If there are none it may
 * not be so any more: a grace period has to pass after each look.
 */
u32 kw_weave_visitors(struct kw_code *code)
{
	struct kw_move m = { .w = code->weaving, .side = KW_NATIVE };

	if (code->weaving->looks >= KW_LOOKS)
		return 0;
	kw_move_out(code, &m);
	return kw_found(&m);
}

int kw_weave_move(struct kw_session *s, const struct kw_slice *req, struct kw_out *out)
{
	struct kw_code *code = kw_area_find(s, req->area);
	struct kw_moved *rep = kw_reserve(out, sizeof(*rep));
	struct kw_move m = { .side = req->off };

	if (!rep)
		return -ENOSPC;
	if (!code || !code->weaving)
		return -ENOENT;
	if (req->off > KW_CLONE)
		return -EINVAL;
	if ((req->off == KW_NATIVE) != !code->users)
		return -EBUSY;
	m.w = code->weaving;
	if (m.side == KW_NATIVE)
		kw_move_out(code, &m);
	else
		kw_move(&m);
	*rep = (struct kw_moved){ atomic_read(&m.places), atomic_read(&m.visitors),
				  atomic_read(&m.pid), m.stop_ns };
	return 0;
}
