// SPDX-License-Identifier: GPL-2.0-or-later
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt
/* Find the kernel functions the driver needs by name; never by version. */
#include <linux/kprobes.h>

#include "kw.h"

struct kw_syms kw_syms;

struct kw_wanted {
	void *slot;
	const char *names[3]; /* the first that exists is taken */
	bool optional;
};

#define WANT(field, ...) { &kw_syms.field, { __VA_ARGS__ }, false }
#define MAY(field, ...) { &kw_syms.field, { __VA_ARGS__ }, true }

static const struct kw_wanted kw_wanted[] = {
	WANT(poke_queue, "text_poke_queue", "smp_text_poke_batch_add"),
	WANT(poke_finish, "text_poke_finish", "smp_text_poke_batch_finish"),
	WANT(poke, "text_poke"),
	WANT(poke_sync, "text_poke_sync", "smp_text_poke_sync_each_cpu"),
	WANT(text_mutex, "text_mutex"),
	MAY(module_alloc, "module_alloc"),
	MAY(execmem_alloc, "execmem_alloc"),
	WANT(free_code, "module_memfree", "execmem_free"),
	WANT(find_vm_area, "find_vm_area"),
	WANT(set_ro, "set_memory_ro"),
	WANT(set_x, "set_memory_x"),
	MAY(rec_start, "ftrace_rec_iter_start"),
	MAY(rec_next, "ftrace_rec_iter_next"),
	MAY(rec_record, "ftrace_rec_iter_record"),
	MAY(rec_test, "ftrace_test_record"),
	MAY(ftrace_lock, "ftrace_lock"),
	WANT(kprobe_blacklist, "kprobe_blacklist"),
	WANT(kprobe_table, "kprobe_table"),
	WANT(kprobe_mutex, "kprobe_mutex"),
	WANT(get_kprobe, "get_kprobe"),
	WANT(modules, "modules"),
	WANT(module_mutex, "module_mutex"),
	WANT(module_text_address, "__module_text_address"),
	MAY(smp_alt_modules, "smp_alt_modules"),
	WANT(stext, "_stext"),
	WANT(etext, "_etext"),
};

static int kw_resolve_one(const struct kw_wanted *w)
{
	unsigned long addr = 0;
	int i;

	for (i = 0; i < ARRAY_SIZE(w->names) && w->names[i] && !addr; i++)
		addr = kw_syms.lookup_name(w->names[i]);
	if (!addr && !w->optional) {
		pr_err("this kernel has no symbol %s\n", w->names[0]);
		return -EOPNOTSUPP;
	}
	*(unsigned long *)w->slot = addr;
	return 0;
}

/*
 * kallsyms_lookup_name() is not exported since 5.7 (0bd476e6c671, "kallsyms:
 * unexport kallsyms_lookup_name()"); registering a kprobe tells its address.
 */
int kw_resolve(void)
{
	struct kprobe kp = { .symbol_name = "kallsyms_lookup_name" };
	int i, ret = register_kprobe(&kp);

	if (ret)
		return ret;
	kw_syms.lookup_name = (void *)kp.addr;
	unregister_kprobe(&kp);
	for (i = 0; i < ARRAY_SIZE(kw_wanted); i++) {
		ret = kw_resolve_one(&kw_wanted[i]);
		if (ret)
			return ret;
	}
	if (!kw_syms.module_alloc && !kw_syms.execmem_alloc)
		return -EOPNOTSUPP;
	return 0;
}
