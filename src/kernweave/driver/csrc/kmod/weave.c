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
 * is closed: it loses its jump and its slot.
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

static const u8 kw_nop5[KW_JMP_LEN] = { 0x0f, 0x1f, 0x44, 0x00, 0x00 };

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
	u8 *closed; /* per entry; under text_mutex */
};

static LIST_HEAD(kw_weavings); /* under text_mutex */
static bool kw_mirroring;      /* what is written now is for a clone; under text_mutex */

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
		    m[i].clone > w->end - KW_JMP_LEN || m[i].kind > KW_STATIC_CALL)
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

/* Write to a clone through the kernel's int3 protocol; flushed by the caller. */
static void kw_write_clone(u64 addr, const u8 *bytes)
{
	lockdep_assert_held(kw_syms.text_mutex);
	kw_mirroring = true;
	kw_syms.poke_queue((void *)addr, bytes, KW_JMP_LEN, NULL);
	kw_mirroring = false;
}

static void kw_flush_clones(void)
{
	kw_mirroring = true;
	kw_syms.poke_finish();
	kw_mirroring = false;
}

/* From now on calls between clones go to the native function; false: so they did. */
static bool kw_close_slot(struct kw_weaving *w, u32 row)
{
	const struct kw_entry *e = &w->entries[row];
	u8 jump[KW_JMP_LEN];

	if (w->closed[row])
		return false;
	w->closed[row] = 1;
	kw_jump(jump, e->slot, e->body);
	kw_write_clone(e->slot, jump);
	return true;
}

/* Close all slots of a generation that nothing native leads to any more. */
void kw_weave_close(struct kw_code *code)
{
	struct kw_weaving *w = code->weaving;
	u32 i = 0, n;

	while (i < w->n.entries) {
		mutex_lock(kw_syms.text_mutex);
		for (n = 0; i < w->n.entries && n < KW_BATCH; i++)
			n += kw_close_slot(w, i);
		kw_flush_clones();
		mutex_unlock(kw_syms.text_mutex);
		cond_resched();
	}
}

/* Give one function back: somebody is going to change its text. */
static void kw_close_entry(struct kw_weaving *w, u32 row)
{
	kw_yield_evict(w->entries[row].site);
	if (kw_close_slot(w, row))
		pr_info_ratelimited("%ps is native again: its text is changed\n",
				    (void *)w->entries[row].body);
	kw_flush_clones();
}

static void kw_close_around(struct kw_weaving *w, u64 addr, u64 len)
{
	s64 row = kw_find_row(w->parts, w->n.parts, addr + len - 1);

	if (row >= 0 && w->parts[row].end > addr)
		kw_close_entry(w, w->parts[row].entry);
}

/* Give back what is woven of some bytes of native text; text_mutex held, may sleep. */
void kw_weave_close_at(u64 addr, u64 len)
{
	struct kw_weaving *w;

	lockdep_assert_held(kw_syms.text_mutex);
	list_for_each_entry(w, &kw_weavings, link)
		kw_close_around(w, addr, len);
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

/* What the copy is to be, if the native bytes become these; false: nobody knows. */
static bool kw_mirror_bytes(const struct kw_mirror *m, const u8 *bytes, u8 *to)
{
	s32 rel;

	if (m->kind == KW_JUMP_LABEL) {
		if (bytes[0] == KW_JMP_OPCODE || bytes[0] == KW_SHORT_OPCODE)
			kw_jump(to, m->clone, m->target);
		else
			memcpy(to, kw_nop5, KW_JMP_LEN);
		return true;
	}
	memcpy(to, bytes, KW_JMP_LEN);
	if (bytes[0] == CALL_INSN_OPCODE || bytes[0] == KW_JMP_OPCODE) {
		memcpy(&rel, bytes + 1, sizeof(rel));
		kw_jump(to, m->clone, m->native + KW_JMP_LEN + rel);
		to[0] = bytes[0];
	}
	return true;
}

static bool kw_mirror(struct kw_weaving *w, u64 addr, const u8 *bytes, size_t len)
{
	s64 row = kw_find_row(w->mirrors, w->n.mirrors, addr);
	const struct kw_mirror *m = &w->mirrors[row];
	u8 copy[KW_JMP_LEN];

	if (row < 0 || m->native != addr || m->len != len || !kw_mirror_bytes(m, bytes, copy))
		return false;
	if (memcmp((void *)m->clone, copy, sizeof(copy))) {
		kw_write_clone(m->clone, copy);
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
void kw_text_yield(unsigned long addr, const u8 *bytes, size_t len)
{
	struct kw_weaving *w;

	if (kw_mirroring || list_empty(&kw_weavings))
		return;
	kw_yield_begin();
	list_for_each_entry(w, &kw_weavings, link)
		if (!kw_mirror(w, addr, bytes, len) && !kw_is_own(w, addr, bytes, len))
			kw_close_around(w, addr, len);
	kw_yield_end();
}

/* ---- move ---- */

struct kw_move {
	const struct kw_weaving *w;
	enum kw_side side;
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

static u64 kw_other_return(const struct kw_move *m, u64 addr)
{
	return kw_other_side(m->w, m->w->returns, m->w->n.returns, m->side, addr);
}

/* Whether a place had to be changed and could not be. */
static bool kw_move_place(struct kw_move *m, unsigned long *at, u64 to)
{
	if (to) {
		WRITE_ONCE(*at, to);
		atomic_inc(&m->places);
		return false;
	}
	return m->side == KW_NATIVE && kw_is_clone(m->w, *at);
}

static bool kw_move_return(struct kw_move *m, unsigned long *at)
{
	return kw_move_place(m, at, kw_other_return(m, *at));
}

/* Who is interrupted is moved out only: what is before a counter there is behind one here. */
static bool kw_move_ip(struct kw_move *m, struct pt_regs *regs)
{
	const struct kw_weaving *w = m->w;

	if (m->side != KW_NATIVE || !kw_is_clone(w, regs->ip))
		return false;
	return kw_move_place(m, &regs->ip,
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

/* Whether what the unwinder did not reach may be a return address of a clone. */
static bool kw_may_return(const struct kw_move *m, struct task_struct *task)
{
	unsigned long *at = (unsigned long *)task->thread.sp;
	unsigned long *end = (unsigned long *)task_pt_regs(task);

	for (; at < end; at++)
		if (kw_other_return(m, READ_ONCE_NOCHECK(*at)))
			return true;
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
	return !READ_ONCE(task->on_cpu) && task_stack_page(task) &&
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
		if (kw_syms.idle_task && kw_has_stack(kw_syms.idle_task(cpu)))
			kw_move_task(m, kw_syms.idle_task(cpu));
	m->stop_ns = ktime_to_ns(ktime_sub(ktime_get(), since));
	return 0;
}

static void kw_move(struct kw_move *m)
{
	stop_machine(kw_move_all, m, cpu_online_mask);
}

/* Tasks that are still in clones of a generation that is quiescent otherwise. */
u32 kw_weave_visitors(struct kw_code *code)
{
	struct kw_move m = { .w = code->weaving, .side = KW_NATIVE };

	kw_move(&m);
	return atomic_read(&m.visitors);
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
	kw_move(&m);
	*rep = (struct kw_moved){ atomic_read(&m.places), atomic_read(&m.visitors),
				  atomic_read(&m.pid), m.stop_ns };
	return 0;
}
