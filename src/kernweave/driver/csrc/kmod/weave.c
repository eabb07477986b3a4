// SPDX-License-Identifier: GPL-2.0-or-later
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt
/*
 * Weaving: clones of functions in a kmod of their own, which the kernel's loader
 * has placed with all their tables.
 *
 * Life of a generation:
 *   1. its kmod is loaded; nothing leads to it;
 *   2. an empty area takes it over (KW_OP_WEAVE): from here on what the kernel
 *      patches natively is patched in the clones before;
 *   3. entered: a transaction puts jumps on ftrace's nops;
 *   4. left: the transaction is undone, then the slots of all clones are closed, so
 *      that calls from clone to clone go to native code as well;
 *   5. after a grace period whoever still is in a clone sleeps there, or was
 *      preempted after it had slept: its return addresses are made native;
 *   6. nobody is: the kmod is let go.
 *
 * A function whose text is changed in a way that has no counterpart in its clone
 * is closed: it loses its jump and its slot, and soon everybody in it.
 */
#include <linux/ftrace.h>
#include <linux/ktime.h>
#include <linux/rethook.h>
#include <linux/sched/signal.h>
#include <linux/sched/task_stack.h>
#include <linux/slab.h>
#include <linux/stop_machine.h>
#include <linux/uaccess.h>
#include <asm/unwind.h>

#include "kw.h"

#define KW_MAX_ROWS (1u << 23)
#define KW_SETTLE_JIFFIES max(HZ / 100, 1)
#define KW_SETTLE_TRIES 500

static const u8 kw_nop5[KW_JMP_LEN] = { 0x0f, 0x1f, 0x44, 0x00, 0x00 };

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
};

static LIST_HEAD(kw_weavings); /* under text_mutex */
static bool kw_mirroring;      /* what is written now is for a clone; under text_mutex */

static void kw_settle(struct work_struct *work);
static DECLARE_DELAYED_WORK(kw_settler, kw_settle);
static unsigned long kw_pause; /* before the settler tries again; in jiffies */

static void kw_settle_soon(void)
{
	WRITE_ONCE(kw_pause, KW_SETTLE_JIFFIES);
	mod_delayed_work(system_wq, &kw_settler, 0);
}

/* ---- rows ---- */

static bool kw_is_clone(const struct kw_weaving *w, u64 addr)
{
	return addr - w->start < w->end - w->start;
}

/* The row of the last element whose first u64 is at most addr, -1: none. */
static s64 kw_last_row(const void *rows, u32 count, size_t size, u64 addr)
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

static s64 kw_entry_row(const struct kw_weaving *w, u64 site)
{
	s64 row = kw_find_row(w->entries, w->n.entries, site);

	return row >= 0 && w->entries[row].site == site ? row : -1;
}

/* Whether a jump from addr to target enters a clone that is not closed. */
bool kw_weave_is_entry(const struct kw_code *code, u64 addr, u64 target)
{
	const struct kw_weaving *w = code->weaving;
	s64 row = kw_entry_row(w, addr);

	return row >= 0 && w->entries[row].clone == target && !w->closed[row];
}

static bool kw_are_entries(const struct kw_weaving *w)
{
	const struct kw_entry *e = w->entries;
	u32 i;

	for (i = 0; i < w->n.entries; i++)
		if ((i && e[i].site <= e[i - 1].site) || !kw_is_clone(w, e[i].clone) ||
		    !kw_is_clone(w, e[i].slot) || e[i].slot > w->end - KW_JMP_LEN ||
		    memcmp((void *)e[i].slot, kw_nop5, KW_JMP_LEN))
			return false;
	return true;
}

static bool kw_are_parts(const struct kw_weaving *w)
{
	const struct kw_part *p = w->parts;
	u32 i;

	for (i = 0; i < w->n.parts; i++)
		if (p[i].end <= p[i].start || (i && p[i].start < p[i - 1].end) ||
		    p[i].entry >= w->n.entries)
			return false;
	return true;
}

static bool kw_are_mirrors(const struct kw_weaving *w)
{
	const struct kw_mirror *m = w->mirrors;
	u32 i;

	for (i = 0; i < w->n.mirrors; i++)
		if ((i && m[i].native <= m[i - 1].native) || !kw_is_clone(w, m[i].clone) ||
		    m[i].clone > w->end - KW_JMP_LEN || m[i].kind > KW_STATIC_CALL ||
		    (m[i].kind == KW_STATIC_CALL && m[i].len != KW_JMP_LEN))
			return false;
	return true;
}

static bool kw_are_places(const struct kw_weaving *w, const struct kw_place *p, u32 count)
{
	u32 i;

	for (i = 0; i < count; i++)
		if (p[i].clone > w->end - w->start ||
		    (i && (p[i].clone < p[i - 1].clone || p[i].native < p[i - 1].native)))
			return false;
	return true;
}

/* Point at the rows of each kind; false if they are not what they should be. */
static bool kw_split_rows(struct kw_weaving *w, size_t len)
{
	const struct kw_weave *n = &w->n;
	u8 *at = w->rows;

	if (n->entries > KW_MAX_ROWS || n->parts > KW_MAX_ROWS || n->mirrors > KW_MAX_ROWS ||
	    n->returns > KW_MAX_ROWS || n->insns > KW_MAX_ROWS)
		return false;
	w->entries = (void *)at;
	at += n->entries * sizeof(*w->entries);
	w->parts = (void *)at;
	at += n->parts * sizeof(*w->parts);
	w->mirrors = (void *)at;
	at += n->mirrors * sizeof(*w->mirrors);
	w->returns = (void *)at;
	at += n->returns * sizeof(*w->returns);
	w->insns = (void *)at;
	at += n->insns * sizeof(*w->insns);
	return at - w->rows == len && n->entries && kw_are_entries(w) && kw_are_parts(w) &&
	       kw_are_mirrors(w) && kw_are_places(w, w->returns, n->returns) &&
	       kw_are_places(w, w->insns, n->insns);
}

/* ---- take over and let go ---- */

/* The kmod of that name, alive, with a reference. */
static struct module *kw_get_kmod(const char *name)
{
	struct module *m, *found = NULL;

	mutex_lock(kw_syms.module_mutex);
	list_for_each_entry(m, kw_syms.modules, list)
		if (m->state == MODULE_STATE_LIVE && m != THIS_MODULE && !strcmp(m->name, name))
			found = m;
	if (found && !try_module_get(found))
		found = NULL;
	mutex_unlock(kw_syms.module_mutex);
	return found;
}

static void kw_weaving_free(struct kw_weaving *w)
{
	if (w->mod)
		module_put(w->mod);
	kvfree(w->rows);
	kvfree(w->closed);
	kfree(w);
}

int kw_weave(struct kw_session *s, const struct kw_weave *req, const u8 *rows, size_t len)
{
	struct kw_code *code = kw_area_find(s, req->area);
	struct kw_range text;
	struct kw_weaving *w;
	int ret = -ENOMEM;

	if (!IS_ENABLED(CONFIG_UNWINDER_ORC) || !kw_syms.idle_task)
		return -EOPNOTSUPP;
	if (!code)
		return -ENOENT;
	if (code->mem || code->weaving)
		return -EPERM;
	if (strnlen(req->kmod, sizeof(req->kmod)) == sizeof(req->kmod))
		return -EINVAL;
	w = kzalloc(sizeof(*w), GFP_KERNEL);
	if (!w)
		return -ENOMEM;
	w->n = *req;
	w->rows = kvmalloc(len ?: 1, GFP_KERNEL);
	w->closed = kvzalloc(min(req->entries, KW_MAX_ROWS) + 1, GFP_KERNEL);
	if (!w->rows || !w->closed)
		goto fail;
	memcpy(w->rows, rows, len);
	ret = -ENOENT;
	w->mod = kw_get_kmod(req->kmod);
	if (!w->mod)
		goto fail;
	text = kw_kmod_text(w->mod);
	w->start = text.start;
	w->end = text.end;
	ret = -EINVAL;
	if (!kw_split_rows(w, len))
		goto fail;
	code->weaving = w;
	code->filled = true;
	code->sealed = true;
	mutex_lock(kw_syms.text_mutex);
	list_add_tail(&w->link, &kw_weavings);
	mutex_unlock(kw_syms.text_mutex);
	return 0;
fail:
	kw_weaving_free(w);
	return ret;
}

/* Nobody is in a clone. */
void kw_weave_free(struct kw_code *code)
{
	struct kw_weaving *w = code->weaving;

	mutex_lock(kw_syms.text_mutex);
	list_del(&w->link);
	mutex_unlock(kw_syms.text_mutex);
	kw_weaving_free(w);
}

/* ---- close ---- */

static void kw_jump(u8 *to, u64 from, u64 target)
{
	s32 rel = target - (from + KW_JMP_LEN);

	to[0] = KW_JMP_OPCODE;
	memcpy(to + 1, &rel, sizeof(rel));
}

/*
 * Write to a clone through the kernel's int3 protocol; flushed by the caller.  Who
 * hits the int3 does what `emulate` says, or else the bytes.
 */
static void kw_write_clone(u64 addr, const u8 *bytes, const u8 *emulate)
{
	lockdep_assert_held(kw_syms.text_mutex);
	kw_mirroring = true;
	kw_syms.poke_queue((void *)addr, bytes, KW_JMP_LEN, emulate);
	kw_mirroring = false;
}

static void kw_flush_clones(void)
{
	kw_mirroring = true;
	kw_syms.poke_finish();
	kw_mirroring = false;
}

/* Once this is flushed calls between clones go to the native function. */
static void kw_close_slot(struct kw_weaving *w, u32 row)
{
	const struct kw_entry *e = &w->entries[row];
	u8 jump[KW_JMP_LEN];

	w->closed[row] = KW_CLOSED;
	kw_jump(jump, e->slot, e->body);
	kw_write_clone(e->slot, jump, NULL);
}

/* Close all slots of a generation that nothing native leads to any more. */
void kw_weave_close(struct kw_code *code)
{
	struct kw_weaving *w = code->weaving;
	u32 i = 0, n;

	while (i < w->n.entries) {
		mutex_lock(kw_syms.text_mutex);
		for (n = 0; i < w->n.entries && n < KW_BATCH; i++)
			if (w->closed[i] != KW_CLOSED) {
				kw_close_slot(w, i);
				n++;
			}
		kw_flush_clones();
		mutex_unlock(kw_syms.text_mutex);
		cond_resched();
	}
}

/* Whether it is marked now and was not before. */
static bool kw_mark_around(struct kw_weaving *w, u64 addr, u64 len)
{
	s64 row = kw_find_row(w->parts, w->n.parts, addr + len - 1);
	u32 entry;

	if (row < 0 || w->parts[row].end <= addr)
		return false;
	entry = w->parts[row].entry;
	if (w->closed[entry])
		return false;
	kw_yield_evict(w->entries[entry].site);
	w->closed[entry] = KW_MARKED;
	w->marked = true;
	pr_info_ratelimited("%ps is native again: its text is changed\n",
			    (void *)w->entries[entry].body);
	return true;
}

/*
 * Give back what is woven of some bytes of native text: somebody is going to change
 * them.  Done when kw_weave_close_marked() was called.
 */
void kw_weave_mark(u64 addr, u64 len)
{
	struct kw_weaving *w;

	lockdep_assert_held(kw_syms.text_mutex);
	list_for_each_entry(w, &kw_weavings, link)
		kw_mark_around(w, addr, len);
}

static void kw_close_marked(struct kw_weaving *w)
{
	u32 i;

	for (i = 0; i < w->n.entries; i++)
		if (w->closed[i] == KW_MARKED) {
			kw_close_slot(w, i);
			cond_resched();
		}
	w->marked = false;
	w->closing = true;
	kw_settle_soon();
}

/*
 * Whether anything was marked.  Else nothing is flushed: ftrace queues sites by tens of
 * thousands, and asks here for each.
 */
bool kw_weave_close_marked(void)
{
	struct kw_weaving *w;
	bool found = false;

	lockdep_assert_held(kw_syms.text_mutex);
	list_for_each_entry(w, &kw_weavings, link)
		if (w->marked) {
			kw_close_marked(w);
			found = true;
		}
	if (found)
		kw_flush_clones();
	return found;
}

int kw_weave_closed(struct kw_session *s, const struct kw_slice *req, struct kw_out *out)
{
	struct kw_code *code = kw_area_find(s, req->area);
	u8 *to;

	if (!code || !code->weaving)
		return -ENOENT;
	to = kw_reserve(out, code->weaving->n.entries);
	if (!to)
		return -ENOSPC;
	mutex_lock(kw_syms.text_mutex);
	memcpy(to, code->weaving->closed, code->weaving->n.entries);
	mutex_unlock(kw_syms.text_mutex);
	return 0;
}

/* ---- mirror ---- */

/* What the copy is to be if the native bytes become these. */
static void kw_mirror_bytes(const struct kw_mirror *m, const u8 *bytes, u8 *to)
{
	s32 rel;

	if (m->kind == KW_JUMP_LABEL) {
		if (bytes[0] == KW_JMP_OPCODE || bytes[0] == KW_SHORT_OPCODE)
			kw_jump(to, m->clone, m->target);
		else
			memcpy(to, kw_nop5, KW_JMP_LEN);
		return;
	}
	memcpy(to, bytes, KW_JMP_LEN);
	if (bytes[0] == CALL_INSN_OPCODE || bytes[0] == KW_JMP_OPCODE) {
		memcpy(&rel, bytes + 1, sizeof(rel));
		kw_jump(to, m->clone, m->native + KW_JMP_LEN + rel);
		to[0] = bytes[0];
	}
}

static bool kw_mirror(struct kw_weaving *w, u64 addr, const u8 *bytes, size_t len,
		      const u8 *emulate)
{
	s64 row = kw_find_row(w->mirrors, w->n.mirrors, addr);
	const struct kw_mirror *m = &w->mirrors[row];
	u8 copy[KW_JMP_LEN], instead[KW_JMP_LEN];

	if (row < 0 || m->native != addr || m->len != len)
		return false;
	kw_mirror_bytes(m, bytes, copy);
	if (emulate)
		kw_mirror_bytes(m, emulate, instead);
	if (memcmp((void *)m->clone, copy, sizeof(copy))) {
		kw_write_clone(m->clone, copy, emulate ? instead : NULL);
		kw_flush_clones();
	}
	return true;
}

/* The driver's own jump to a clone, or ftrace's nop in its place. */
static bool kw_is_own(const struct kw_weaving *w, u64 addr, const u8 *bytes, size_t len)
{
	s64 row = kw_entry_row(w, addr);
	u8 jump[KW_JMP_LEN];

	if (row < 0 || len != KW_JMP_LEN)
		return false;
	kw_jump(jump, addr, w->entries[row].clone);
	return !memcmp(bytes, jump, len) || !memcmp(bytes, kw_nop5, len);
}

/*
 * Called by the trampolines in the functions through which all text is patched
 * that may be executed meanwhile, text_mutex held; may sleep.
 */
void kw_text_yield(unsigned long addr, const u8 *bytes, size_t len, const u8 *emulate)
{
	struct kw_weaving *w;
	bool marked = false; /* by this call, not by one that is going to mark more */

	if (kw_mirroring || list_empty(&kw_weavings))
		return;
	kw_yield_begin();
	list_for_each_entry(w, &kw_weavings, link)
		if (!kw_mirror(w, addr, bytes, len, emulate) && !kw_is_own(w, addr, bytes, len))
			marked |= kw_mark_around(w, addr, len);
	if (marked)
		kw_weave_close_marked();
	kw_yield_end();
}

/* ---- move ---- */

struct kw_move {
	const struct kw_weaving *w;
	enum kw_side side;
	bool some; /* only who is in a function that is closed */
	atomic_t places;
	atomic_t visitors;
	atomic_t pid;
	s64 stop_ns;
};

/* The other side of a place, 0: it has none. */
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
		if (key == addr - base)
			return other + (side == KW_NATIVE ? places[mid].native : places[mid].clone);
		if (key < addr - base)
			lo = mid + 1;
		else
			hi = mid;
	}
	return 0;
}

/* Whether a native address is in a function that is closed. */
static bool kw_is_closed(const struct kw_weaving *w, u64 native)
{
	s64 row = kw_find_row(w->parts, w->n.parts, native);

	return row >= 0 && w->closed[w->parts[row].entry];
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
		return !kw_is_closed(m->w, inside);
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

/* Who is interrupted is moved out only: what is before a counter there is behind one here. */
static bool kw_move_ip(struct kw_move *m, struct pt_regs *regs)
{
	const struct kw_weaving *w = m->w;

	if (m->side != KW_NATIVE)
		return false;
	return kw_move_place(m, &regs->ip, regs->ip,
			     kw_other_side(w, w->insns, w->n.insns, KW_NATIVE, regs->ip));
}

/* Return addresses that a tracer keeps beside the stack. */
static bool kw_move_hidden(struct kw_move *m, struct task_struct *task)
{
	bool stays = false;

#ifdef CONFIG_RETHOOK
	struct llist_node *node;

	llist_for_each(node, task->rethooks.first)
		stays |= kw_move_return(m, &llist_entry(node, struct rethook_node, llist)->ret_addr);
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

static void kw_move_task(struct kw_move *m, struct task_struct *task)
{
	struct unwind_state state;
	struct pt_regs *regs;
	unsigned long *at;
	bool stays;

	stays = kw_move_hidden(m, task);
	unwind_start(&state, task, NULL, NULL);
	for (; !unwind_done(&state); unwind_next_frame(&state)) {
		regs = unwind_get_entry_regs(&state, NULL);
		at = kw_return_at(&state);
		if (regs)
			stays |= kw_move_ip(m, regs);
		else if (at)
			stays |= kw_move_return(m, at);
	}
	if (unwind_error(&state) && m->side == KW_NATIVE && task != current)
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
		if (kw_has_stack(task))
			kw_move_task(m, task);
	for_each_possible_cpu(cpu)
		if (kw_has_stack(kw_syms.idle_task(cpu))) /* none if the CPU was never there */
			kw_move_task(m, kw_syms.idle_task(cpu));
	m->stop_ns = ktime_to_ns(ktime_sub(ktime_get(), since));
	return 0;
}

static void kw_move(struct kw_move *m)
{
	stop_machine(kw_move_all, m, cpu_online_mask);
}

static u32 kw_move_some(struct kw_weaving *w)
{
	struct kw_move m = { .w = w, .side = KW_NATIVE, .some = true };

	kw_move(&m);
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
	WRITE_ONCE(kw_pause, min_t(unsigned long, 2 * READ_ONCE(kw_pause), HZ));
	schedule_delayed_work(&kw_settler, READ_ONCE(kw_pause));
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
	bool found;
	u32 i;

	lockdep_assert_held(&kw_lock);
	if (list_empty(&kw_weavings))
		return 0;
	mutex_lock(kw_syms.text_mutex);
	for (i = 0; i < t->count; i++)
		kw_weave_mark(t->pokes[i].addr, t->pokes[i].len);
	found = kw_weave_close_marked();
	mutex_unlock(kw_syms.text_mutex);
	if (!found && !kw_is_closing())
		return 0;
	for (i = 0; i < KW_SETTLE_TRIES && kw_is_closing(); i++) {
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
	int tries;

	kw_yield_begin();
	for (tries = 0; tries < KW_SETTLE_TRIES; tries++) {
		kw_settle_soon();
		flush_delayed_work(&kw_settler);
		if (!kw_is_closing())
			break;
		schedule_timeout_uninterruptible(KW_SETTLE_JIFFIES);
	}
	if (tries == KW_SETTLE_TRIES)
		pr_warn("somebody stays in a clone of a function that is patched\n");
	kw_yield_end();
}

void kw_weave_exit(void)
{
	cancel_delayed_work_sync(&kw_settler);
	WARN_ON(!list_empty(&kw_weavings));
}

/*
 * Whoever had a place changed may have read it before, and hold the old address in a
 * register: tracers do.  So one more grace period has to pass.
 */
static void kw_move_out(struct kw_code *code, struct kw_move *m)
{
	kw_move(m);
	if (atomic_read(&m->places))
		code->stamp = kw_stamp_now();
}

/* Tasks that are, or were a moment ago, in clones of a generation that is quiescent otherwise. */
u32 kw_weave_visitors(struct kw_code *code)
{
	struct kw_move m = { .w = code->weaving, .side = KW_NATIVE };

	kw_move_out(code, &m);
	return atomic_read(&m.visitors) + atomic_read(&m.places);
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
