// SPDX-License-Identifier: GPL-2.0-or-later
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt
/*
 * Weaving: clones of functions in a kmod of their own, which the kernel's loader
 * has placed with all their tables.
 *
 * Life of a generation:
 *   1. its kmod is loaded; nothing leads to it;
 *   2. an empty area takes it over (KW_OP_WEAVE): from here on what the kernel
 *      patches natively is patched in the clones before, and what it patched since
 *      they were made is made up for;
 *   3. entered: a transaction puts jumps on ftrace's nops;
 *   4. left: the transaction is undone, then the slots of all clones are closed, so
 *      that calls from clone to clone go to native code as well;
 *   5. after a grace period whoever still is in a clone sleeps there, or was
 *      preempted after it had slept: its return addresses are made native (move.c);
 *   6. a grace period after nobody was found the kmod is let go.
 *
 * A function whose text is changed in a way that has no counterpart in its clone
 * is closed: it loses its jump and its slot, and soon everybody in it.
 */
#include <linux/kprobes.h>
#include <linux/rculist.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "weaving.h"

#define KW_MAX_ROWS (1u << 23)

static const u8 kw_nop5[KW_JMP_LEN] = { 0x0f, 0x1f, 0x44, 0x00, 0x00 };

LIST_HEAD(kw_weavings);
static bool kw_own; /* what is written now is no news for clones; under text_mutex */

/* Whether what is written from here on is the driver's own: in a clone, or a jump of its. */
void kw_weave_own(bool own)
{
	lockdep_assert_held(kw_syms.text_mutex);
	kw_own = own;
}

/* ---- rows ---- */

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

static bool kw_is_slot(const struct kw_weaving *w, u64 addr)
{
	return kw_is_clone(w, addr) && addr <= w->end - KW_JMP_LEN &&
	       !memcmp((void *)addr, kw_nop5, KW_JMP_LEN);
}

static bool kw_are_entries(const struct kw_weaving *w)
{
	const struct kw_entry *e = w->entries;
	u32 i;

	for (i = 0; i < w->n.entries; i++) {
		if (!kw_is_clone(w, e[i].clone) || !kw_is_slot(w, e[i].slot))
			return false;
		if (i && (e[i].site <= e[i - 1].site || e[i].slot < e[i - 1].slot + KW_JMP_LEN))
			return false;
	}
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

/* ---- bytes ---- */

static void kw_jump(u8 *to, u64 from, u64 target)
{
	s32 rel = target - (from + KW_JMP_LEN);

	to[0] = KW_JMP_OPCODE;
	memcpy(to + 1, &rel, sizeof(rel));
}

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
	if (bytes[0] == RET_INSN_OPCODE) { /* may be safe only where it is */
		kw_jump(to, m->clone, m->native);
		return;
	}
	memcpy(to, bytes, KW_JMP_LEN);
	if (bytes[0] == CALL_INSN_OPCODE || bytes[0] == KW_JMP_OPCODE) {
		memcpy(&rel, bytes + 1, sizeof(rel));
		kw_jump(to, m->clone, m->native + KW_JMP_LEN + rel);
		to[0] = bytes[0];
	}
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

static void kw_weaving_free(struct rcu_head *gone)
{
	kfree(container_of(gone, struct kw_weaving, gone));
}

/* All but what it is itself. */
static void kw_weaving_empty(struct kw_weaving *w)
{
	if (w->mod)
		module_put(w->mod);
	kvfree(w->rows);
	kvfree(w->closed);
}

/* What the native bytes are now; false: there is nothing the kernel would write. */
static bool kw_read_native(const struct kw_mirror *m, u8 *to)
{
	return !copy_from_kernel_nofault(to, (void *)m->native, KW_JMP_LEN) && to[0] != KW_INT3;
}

/* Nobody is in the clones yet. */
static int kw_catch_up(const struct kw_weaving *w)
{
	const struct kw_mirror *m = w->mirrors;
	u8 bytes[KW_JMP_LEN], copy[KW_JMP_LEN];
	u32 i;

	for (i = 0; i < w->n.mirrors; i++) {
		if (!kw_read_native(&m[i], bytes))
			return -ESTALE;
		kw_mirror_bytes(&m[i], bytes, copy);
		if (memcmp((void *)m[i].clone, copy, sizeof(copy)))
			kw_syms.poke((void *)m[i].clone, copy, sizeof(copy));
	}
	return 0;
}

/*
 * Kprobes on clones: from before they were denied, or of somebody who was allowed one
 * then and had not registered it yet.
 */
bool kw_weave_is_probed(const struct kw_weaving *w)
{
	struct kprobe *kp;
	int i;

	lockdep_assert_held(kw_syms.kprobe_mutex);
	for (i = 0; i < KW_KPROBE_BUCKETS; i++)
		hlist_for_each_entry(kp, &kw_syms.kprobe_table[i], hlist)
			if (kw_is_clone(w, (unsigned long)kp->addr) && !kprobe_gone(kp))
				return true;
	return false;
}

/*
 * From here on the clones are what the native functions are, and nobody else's.  Who
 * flips a static key drops text_mutex between queueing and writing.
 */
static int kw_take_over(struct kw_weaving *w)
{
	int ret;

	kw_text_lock();
	kw_text_flush();
	ret = kw_weave_is_probed(w) ? -EBUSY : kw_catch_up(w);
	if (!ret) {
		list_add_tail(&w->link, &kw_weavings);
		w->denied.start_addr = w->start;
		w->denied.end_addr = w->end;
		list_add_tail_rcu(&w->denied.list, kw_syms.kprobe_blacklist);
	}
	kw_text_unlock();
	return ret;
}

int kw_weave(struct kw_session *s, const struct kw_weave *req, const u8 *rows, size_t len)
{
	struct kw_code *code = kw_area_find(s, req->area);
	struct kw_range text;
	struct kw_weaving *w;
	int ret = -ENOMEM;

	if (!IS_ENABLED(CONFIG_UNWINDER_ORC) || IS_ENABLED(CONFIG_PREEMPT_RT) ||
	    !kw_syms.idle_task || !kw_syms.kprobe_blacklist)
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
	w->rows = kw_alloc(len, 0);
	w->closed = kw_alloc(min(req->entries, KW_MAX_ROWS), __GFP_ZERO);
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
	ret = kw_exiting_watch();
	if (ret)
		goto fail;
	ret = kw_take_over(w);
	if (ret) {
		kw_exiting_unwatch();
		goto fail;
	}
	code->weaving = w;
	code->filled = true;
	code->sealed = true;
	return 0;
fail:
	kw_weaving_empty(w);
	kfree(w);
	return ret;
}

/*
 * Nobody is in a clone.  Who looks whether a kprobe is denied holds no lock, and in newer
 * kernels is in no RCU section either, but never sleeps there.
 */
void kw_weave_free(struct kw_code *code)
{
	struct kw_weaving *w = code->weaving;

	kw_text_lock();
	list_del(&w->link);
	list_del_rcu(&w->denied.list);
	kw_text_unlock();
	kw_exiting_unwatch();
	kw_weaving_empty(w);
	call_rcu_tasks(&w->gone, kw_weaving_free);
}

/* ---- close ---- */

/*
 * Write to a clone through the kernel's int3 protocol; flushed by the caller.  Who
 * hits the int3 does what `emulate` says, or else the bytes.
 */
static void kw_write_clone(u64 addr, const u8 *bytes, const u8 *emulate)
{
	kw_weave_own(true);
	kw_syms.poke_queue((void *)addr, bytes, KW_JMP_LEN, emulate);
	kw_weave_own(false);
}

static void kw_flush_clones(void)
{
	kw_weave_own(true);
	kw_syms.poke_finish();
	kw_weave_own(false);
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

/*
 * Close the slots of the next entries at once; the row behind them.  Whoever hits an
 * int3 meanwhile goes to native code, and finds the way there in `batch`.
 */
static u32 kw_close_batch(struct kw_weaving *w, u32 row)
{
	static struct kw_poke pokes[KW_BATCH]; /* all under text_mutex */
	static u32 rows[KW_BATCH];
	static struct kw_txn batch = { .pokes = pokes };
	const struct kw_entry *e;
	u32 n = 0;

	lockdep_assert_held(kw_syms.text_mutex);
	kw_syms.poke_sync(); /* nobody looks for the int3 of the batch before */
	for (; row < w->n.entries && n < KW_BATCH; row++) {
		e = &w->entries[row];
		if (w->closed[row] == KW_CLOSED)
			continue;
		w->closed[row] = KW_CLOSED;
		pokes[n] = (struct kw_poke){ .addr = e->slot, .len = KW_JMP_LEN };
		memcpy(pokes[n].old, kw_nop5, KW_JMP_LEN);
		kw_jump(pokes[n].new_, e->slot, e->body);
		rows[n] = n;
		n++;
	}
	batch.count = n;
	kw_poke_rows(&batch, rows, n, false);
	while (n--)
		WARN_ON_ONCE(memcmp((void *)pokes[n].addr, pokes[n].new_, KW_JMP_LEN));
	return row;
}

/*
 * Close all slots of a generation that nothing native leads to any more.  Whoever waits
 * for closed functions to be left waits for these, too.
 */
void kw_weave_close(struct kw_code *code)
{
	struct kw_weaving *w = code->weaving;
	u32 row = 0;

	w->looks = 0;
	while (row < w->n.entries) {
		kw_poke_lock();
		row = kw_close_batch(w, row);
		w->closing = true;
		kw_poke_unlock();
		cond_resched();
	}
}

/* Whether it is marked now and was not before. */
static bool kw_mark_around(struct kw_weaving *w, u64 addr, u64 len)
{
	s64 row = kw_find_row(w->parts, w->n.parts, addr + len - 1);
	bool marked = false;
	u32 entry;

	for (; row >= 0 && w->parts[row].end > addr; row--) {
		entry = w->parts[row].entry;
		if (w->closed[entry])
			continue;
		kw_yield_evict(w->entries[entry].site);
		w->closed[entry] = KW_MARKED;
		w->marked = true;
		marked = true;
		pr_info_ratelimited("%ps is native again: its text is changed\n",
				    (void *)w->entries[entry].body);
	}
	return marked;
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

static bool kw_any_marked(void)
{
	const struct kw_weaving *w;

	list_for_each_entry(w, &kw_weavings, link)
		if (w->marked)
			return true;
	return false;
}

/*
 * Whether anything was marked.  Else nothing is flushed: ftrace queues sites by tens of
 * thousands, and asks here for each.  A function's entry is native before its slot leads
 * there: whoever hit int3 at both would go round and round.
 */
bool kw_weave_close_marked(void)
{
	struct kw_weaving *w;

	lockdep_assert_held(kw_syms.text_mutex);
	if (!kw_any_marked())
		return false;
	kw_flush_clones();
	list_for_each_entry(w, &kw_weavings, link)
		if (w->marked)
			kw_close_marked(w);
	kw_flush_clones();
	return true;
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

static bool kw_mirror(struct kw_weaving *w, u64 addr, const u8 *bytes, size_t len,
		      const u8 *emulate)
{
	s64 row = kw_find_row(w->mirrors, w->n.mirrors, addr);
	const struct kw_mirror *m = row < 0 ? NULL : &w->mirrors[row];
	u8 copy[KW_JMP_LEN], instead[KW_JMP_LEN];

	if (!m || m->native != addr || m->len != len)
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
	int idx;

	if (kw_own || list_empty(&kw_weavings))
		return;
	idx = kw_yield_begin();
	list_for_each_entry(w, &kw_weavings, link)
		if (!kw_mirror(w, addr, bytes, len, emulate) && !kw_is_own(w, addr, bytes, len))
			marked |= kw_mark_around(w, addr, len);
	if (marked)
		kw_weave_close_marked();
	kw_yield_end(idx);
}
