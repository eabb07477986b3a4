// SPDX-License-Identifier: GPL-2.0-or-later
/* Lists the kernel keeps that are not plain memory: kmods, denylist, kprobes, ftrace, sites. */
#include <linux/ftrace.h>
#include <linux/hashtable.h>
#include <linux/kprobes.h>
#include <linux/sched.h>

#include <asm/text-patching.h>

#include "kw.h"

static void kw_span(struct kw_range *r, const void *start, size_t bytes)
{
	r->start = (unsigned long)start;
	r->end = r->start + bytes;
}

/* The part of it that is executed. */
struct kw_range kw_kmod_text(const struct module *m)
{
	struct kw_range text;

#ifdef KW_HAVE_MOD_MEM
	kw_span(&text, m->mem[MOD_TEXT].base, m->mem[MOD_TEXT].size);
#else
	kw_span(&text, m->core_layout.base, m->core_layout.text_size);
#endif
	return text;
}

static void kw_fill_kmod(struct kw_kmod *k, struct module *m)
{
	struct mod_kallsyms *syms;
	struct kw_range text;

	memset(k, 0, sizeof(*k));
	strscpy(k->name, m->name, sizeof(k->name));
	text = kw_kmod_text(m);
	k->text_start = text.start;
	k->text_end = text.end;
	/* module_mutex is held; the pointer changes only while the kmod loads */
	syms = rcu_dereference_protected(m->kallsyms, true);
	if (syms) {
		k->symtab = (unsigned long)syms->symtab;
		k->strtab = (unsigned long)syms->strtab;
		k->symbols = syms->num_symtab;
	}
	kw_span(&k->jump_labels, m->jump_entries,
		m->num_jump_entries * sizeof(struct jump_entry));
	kw_span(&k->static_calls, m->static_call_sites,
		m->num_static_call_sites * sizeof(struct static_call_site));
	kw_span(&k->exceptions, m->extable,
		m->num_exentries * sizeof(struct exception_table_entry));
	kw_span(&k->bugs, m->bug_table, m->num_bugs * sizeof(struct bug_entry));
}

int kw_kmods(struct kw_out *out)
{
	struct module *m;
	struct kw_kmod *k, *end;
	size_t n = 0;

	mutex_lock(kw_syms.module_mutex);
	list_for_each_entry(m, kw_syms.modules, list)
		n += m->state == MODULE_STATE_LIVE;
	k = kw_reserve(out, n * sizeof(*k));
	end = k + n;
	if (k) /* one becomes alive without the mutex: there may be more by now */
		list_for_each_entry(m, kw_syms.modules, list)
			if (m->state == MODULE_STATE_LIVE && k < end)
				kw_fill_kmod(k++, m);
	mutex_unlock(kw_syms.module_mutex);
	return k ? 0 : -ENOSPC;
}

int kw_denylist(struct kw_out *out)
{
	struct kprobe_blacklist_entry *e;
	struct kw_range *r;
	size_t n = 0;

	mutex_lock(kw_syms.kprobe_mutex);
	list_for_each_entry(e, kw_syms.kprobe_blacklist, list)
		n++;
	r = kw_reserve(out, n * sizeof(*r));
	if (r)
		list_for_each_entry(e, kw_syms.kprobe_blacklist, list)
			*r++ = (struct kw_range){ e->start_addr, e->end_addr };
	mutex_unlock(kw_syms.kprobe_mutex);
	return r ? 0 : -ENOSPC;
}

/*
 * Only kprobes that write text of their own: what goes through ftrace is told
 * by its record, and the text of a kprobe that is gone is somebody else's now.
 */
static bool kw_writes_text(struct kprobe *kp)
{
	return !kprobe_ftrace(kp) && !kprobe_gone(kp);
}

/*
 * Whether the kernel has made, or may make later, a jump of a kprobe: it decides
 * when one is registered, and does it when one is enabled, when it is allowed to,
 * or when what stood in the way has left.  It never asks whether the text behind
 * the kprobe is still what it was.  One with a post handler is in the way, and may
 * leave before the others do.  Our traps never are jumps (trap.c).
 */
bool kw_may_jump(struct kprobe *kp)
{
#ifdef CONFIG_OPTPROBES
	struct optimized_kprobe *op = container_of(kp, struct optimized_kprobe, kp);

	return !list_empty(&kp->list) && op->optinsn.size; /* else not the head of a list: no op */
#else
	return false;
#endif
}

static void kw_fill_kprobe(struct kw_patched *p, struct kprobe *kp)
{
	memset(p, 0, sizeof(*p));
	p->addr = (unsigned long)kp->addr;
	p->original[0] = kp->opcode;
	p->len = 1;
	p->owner = kw_is_trap(kp) ? KW_OURS : KW_OTHERS;
#ifdef CONFIG_OPTPROBES
	if (kw_may_jump(kp)) {
		struct optimized_kprobe *op = container_of(kp, struct optimized_kprobe, kp);
		const void *tail = kp->addr + INT3_INSN_SIZE;

		if (*(u8 *)kp->addr == JMP32_INSN_OPCODE)
			tail = op->optinsn.copied_insn;
		memcpy(p->original + INT3_INSN_SIZE, tail, DISP32_SIZE);
		p->len = INT3_INSN_SIZE + DISP32_SIZE;
	}
#endif
}

int kw_kprobes(struct kw_out *out)
{
	struct kw_patched *p;
	struct kprobe *kp;
	size_t n = 0;
	int i;

	kw_text_lock();
	for (i = 0; i < KW_KPROBE_BUCKETS; i++)
		hlist_for_each_entry(kp, &kw_syms.kprobe_table[i], hlist)
			n += kw_writes_text(kp);
	p = kw_reserve(out, n * sizeof(*p));
	for (i = 0; p && i < KW_KPROBE_BUCKETS; i++)
		hlist_for_each_entry(kp, &kw_syms.kprobe_table[i], hlist)
			if (kw_writes_text(kp))
				kw_fill_kprobe(p++, kp);
	kw_text_unlock();
	return p ? 0 : -ENOSPC;
}

int kw_ftrace_records(struct kw_out *out)
{
	struct ftrace_rec_iter *it;
	struct kw_record *r;
	size_t n = 0;

	if (!kw_syms.rec_start || !kw_syms.rec_next || !kw_syms.rec_record || !kw_syms.ftrace_lock)
		return kw_reserve(out, 0) ? 0 : -ENOSPC;
	mutex_lock(kw_syms.ftrace_lock);
	for (it = kw_syms.rec_start(); it; it = kw_syms.rec_next(it))
		n++;
	r = kw_reserve(out, n * sizeof(*r));
	for (it = kw_syms.rec_start(); r && it; it = kw_syms.rec_next(it)) {
		struct dyn_ftrace *rec = kw_syms.rec_record(it);

		*r++ = (struct kw_record){ rec->ip, rec->flags };
	}
	mutex_unlock(kw_syms.ftrace_lock);
	return r ? 0 : -ENOSPC;
}

static bool kw_is_ours(u8 state)
{
	return state != KW_WAITING && state != KW_EVICTED && state != KW_RESTORED;
}

int kw_placed(struct kw_out *out)
{
	struct kw_patched *p;
	struct kw_txn *t;
	size_t n = 0;
	u32 i;

	mutex_lock(kw_syms.text_mutex);
	list_for_each_entry(t, &kw_txns, global)
		for (i = 0; i < t->count; i++)
			n += kw_is_ours(t->states[i]);
	p = kw_reserve(out, n * sizeof(*p));
	if (p) {
		list_for_each_entry(t, &kw_txns, global)
			for (i = 0; i < t->count; i++) {
				if (!kw_is_ours(t->states[i]))
					continue;
				memset(p, 0, sizeof(*p));
				p->addr = t->pokes[i].addr;
				p->len = t->pokes[i].len;
				p->owner = t->pinned ? KW_LEFT : KW_OURS;
				memcpy(p->original, t->pokes[i].old, KW_POKE_BYTES);
				p++;
			}
	}
	mutex_unlock(kw_syms.text_mutex);
	return p ? 0 : -ENOSPC;
}
