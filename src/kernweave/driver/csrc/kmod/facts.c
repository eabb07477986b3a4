// SPDX-License-Identifier: GPL-2.0-or-later
/* What the brain asks about the kernel: facts, addresses of names, memory. */
#include <linux/extable.h>
#include <linux/jump_label.h>
#include <linux/static_call.h>
#include <linux/uaccess.h>
#include <linux/utsname.h>

#include "kw.h"

static u32 kw_fact_flags(void)
{
	u32 flags = 0;

	if (!kw_syms.smp_alt_modules || !list_empty(kw_syms.smp_alt_modules))
		flags |= KW_FACT_LOCKS_LIVE;
	if (kw_syms.rec_start && kw_syms.rec_next && kw_syms.rec_record && kw_syms.rec_test)
		flags |= KW_FACT_FTRACE_YIELD;
#ifdef X86_FEATURE_CALL_DEPTH
	if (boot_cpu_has(X86_FEATURE_CALL_DEPTH))
		flags |= KW_FACT_CALL_DEPTH;
#endif
#ifdef X86_BUG_ITS
	if (boot_cpu_has_bug(X86_BUG_ITS))
		flags |= KW_FACT_LINE;
#endif
	return flags;
}

static u64 kw_count_pinned(void)
{
	struct kw_txn *t;
	u64 n = 0;
	u32 i;

	list_for_each_entry(t, &kw_pinned, link)
		for (i = 0; i < t->count; i++)
			n += t->states[i] == KW_STUCK || t->states[i] == KW_HELD;
	return n;
}

/* Called with kw_lock held. */
int kw_facts(struct kw_out *out)
{
	struct kw_facts *f = kw_reserve(out, sizeof(*f));

	if (!f)
		return -ENOSPC;
	memset(f, 0, sizeof(*f));
	f->text_start = kw_syms.stext;
	f->text_end = kw_syms.etext;
	f->yield = (unsigned long)kw_ftrace_yield;
	f->kprobe_yield = (unsigned long)kw_kprobe_yield;
	f->text_yield = (unsigned long)kw_text_yield;
	f->livepatch_yield = (unsigned long)kw_livepatch_yield;
	f->native = (unsigned long)kw_native_addr;
	f->pinned = kw_count_pinned();
	f->flags = kw_fact_flags();
	f->cpus = num_possible_cpus();
	f->sizes[0] = sizeof(struct jump_entry);
	f->sizes[1] = sizeof(struct static_call_site);
	f->sizes[2] = sizeof(struct exception_table_entry);
	f->sizes[3] = sizeof(struct bug_entry);
	strscpy(f->release, init_utsname()->release, sizeof(f->release));
	strscpy(f->version, init_utsname()->version, sizeof(f->version));
	return 0;
}

int kw_lookup(const u8 *req, size_t len, struct kw_out *out)
{
	size_t i, n = 0;
	u64 *addrs;
	const char *name = (const char *)req;

	if (!len || req[len - 1])
		return -EINVAL;
	for (i = 0; i < len; i++)
		n += !req[i];
	addrs = kw_reserve(out, n * sizeof(*addrs));
	if (!addrs)
		return -ENOSPC;
	for (i = 0; i < n; i++, name += strlen(name) + 1) {
		addrs[i] = kw_syms.lookup_name(name);
		cond_resched();
	}
	return 0;
}

static int kw_read_range(u8 *to, u64 start, u64 end)
{
	u64 at, step;
	int ret;

	for (at = start; at < end; at += step) {
		step = min_t(u64, end - at, PAGE_SIZE - (at & ~PAGE_MASK));
		ret = copy_from_kernel_nofault(to + (at - start), (void *)at, step);
		if (ret)
			return ret;
		cond_resched();
	}
	return 0;
}

int kw_read(const u8 *req, size_t len, struct kw_out *out)
{
	const struct kw_range *r = (const void *)req;
	size_t i, n = len / sizeof(*r), total = 0;
	u8 *to;
	int ret = 0;

	if (!n || len % sizeof(*r))
		return -EINVAL;
	for (i = 0; i < n; i++) {
		out->detail = i;
		if (r[i].end < r[i].start || r[i].end - r[i].start > KW_MAX_READ - total)
			return -E2BIG;
		total += r[i].end - r[i].start;
	}
	to = kw_reserve(out, total);
	if (!to)
		return -ENOSPC;
	mutex_lock(kw_syms.text_mutex); /* no int3 of a poke under way is seen */
	for (i = 0; i < n && !ret; to += r[i].end - r[i].start, i++) {
		out->detail = i;
		ret = kw_read_range(to, r[i].start, r[i].end);
	}
	mutex_unlock(kw_syms.text_mutex);
	return ret;
}
