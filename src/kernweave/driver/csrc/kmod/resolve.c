// SPDX-License-Identifier: GPL-2.0-or-later
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt
/* Find the kernel functions the driver needs by name; never by version. */
#include <linux/kprobes.h>
#include <linux/uaccess.h>

#include <asm/cpufeature.h>
#include <asm/ibt.h>

#include "kw.h"

struct kw_syms kw_syms;

struct kw_wanted {
	void *slot;
	const char *names[3]; /* the first that exists is taken */
	bool optional;
	bool called;
	bool local; /* not called if it cannot be: it may have no endbr64 at all */
};

#define WANT(field, ...) { &kw_syms.field, { __VA_ARGS__ }, false, true }
#define MAY(field, ...) { &kw_syms.field, { __VA_ARGS__ }, true, true }
#define WANT_DATA(field, ...) { &kw_syms.field, { __VA_ARGS__ }, false, false }
#define MAY_DATA(field, ...) { &kw_syms.field, { __VA_ARGS__ }, true, false }

static const struct kw_wanted kw_wanted[] = {
	WANT_DATA(module_mutex, "module_mutex"), /* first: who fails after this needs it */
	WANT(poke_queue, "text_poke_queue", "smp_text_poke_batch_add"),
	WANT(poke_finish, "text_poke_finish", "smp_text_poke_batch_finish"),
	WANT(poke, "text_poke"),
	{ &kw_syms.poke_with, { "__text_poke" }, true, true, true },
	WANT(poke_sync, "text_poke_sync", "smp_text_poke_sync_each_cpu"),
	/* for who holds the CPUs */
	{ &kw_syms.stop_machine, { "stop_machine_cpuslocked" }, true, true, true },
	WANT_DATA(text_mutex, "text_mutex"),
	MAY(module_alloc, "module_alloc"),
	/* writable also where executable memory comes from a read-only cache:
	 * 838955f64ae7 ("execmem: introduce execmem_alloc_rw()")
	 */
	MAY(execmem_alloc, "execmem_alloc_rw", "execmem_alloc"),
	WANT(free_code, "module_memfree", "execmem_free"),
	WANT(find_vm_area, "find_vm_area"),
	MAY(set_rox, "set_memory_rox"),
	WANT(set_ro, "set_memory_ro"),
	WANT(set_x, "set_memory_x"),
	MAY(rec_start, "ftrace_rec_iter_start"),
	MAY(rec_next, "ftrace_rec_iter_next"),
	MAY(rec_record, "ftrace_rec_iter_record"),
	MAY(rec_test, "ftrace_test_record"),
	MAY(graph_ret_stack, "ftrace_graph_get_ret_stack"),
	MAY(idle_task, "idle_task"),
	MAY_DATA(ftrace_lock, "ftrace_lock"),
	WANT_DATA(kprobe_blacklist, "kprobe_blacklist"),
	WANT_DATA(kprobe_table, "kprobe_table"),
	WANT_DATA(kprobe_mutex, "kprobe_mutex"),
	WANT(get_kprobe, "get_kprobe"),
	WANT_DATA(modules, "modules"),
	WANT(module_text_address, "__module_text_address"),
	MAY_DATA(smp_alt_modules, "smp_alt_modules"),
	WANT_DATA(stext, "_stext"),
	WANT_DATA(etext, "_etext"),
};

/*
 * With IBT an indirect call must arrive at an endbr64, and the kernel removes
 * those of functions whose address it takes nowhere.  Calling one of these
 * through kw_syms would be fatal.
 */
static bool kw_may_call(unsigned long addr)
{
#if HAS_KERNEL_IBT
	return !boot_cpu_has(X86_FEATURE_IBT) || *(u32 *)addr == gen_endbr();
#else
	return true;
#endif
}

static int kw_check_call(unsigned long addr)
{
	if (kw_may_call(addr))
		return 0;
	pr_err("%ps cannot be called with IBT: boot with ibt=off\n", (void *)addr);
	return -EOPNOTSUPP;
}

/* Whether an endbr64 is at addr, or the nop the kernel put in its place. */
bool kw_is_endbr(unsigned long addr)
{
#if HAS_KERNEL_IBT
	u32 now;

	if (copy_from_kernel_nofault(&now, (void *)addr, sizeof(now)))
		return false;
	return now == gen_endbr() || now == gen_endbr_poison();
#else
	return false;
#endif
}

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
	if (addr && w->local && !kw_may_call(addr))
		addr = 0;
	*(unsigned long *)w->slot = addr;
	return addr && w->called ? kw_check_call(addr) : 0;
}

/*
 * Whether the driver's own code may write through the mapping that __text_poke() makes:
 * with LASS it faults there, as the mapping is in the lower half of the address space.
 * Then the kernel writes each site by itself.
 */
static bool kw_may_write_mapped(void)
{
#ifdef KW_SEED_WRITE_ALONE
	return false;
#elif defined(X86_FEATURE_LASS)
	return !boot_cpu_has(X86_FEATURE_LASS);
#else
	return true;
#endif
}

/*
 * kallsyms_lookup_name() is not exported since 5.7 (0bd476e6c671, "kallsyms:
 * unexport kallsyms_lookup_name()"); registering a kprobe tells its address.
 */
int kw_resolve(void)
{
	struct kprobe kp = { .symbol_name = "kallsyms_lookup_name" };
	int i, ret = register_kprobe(&kp);
	unsigned long addr;

	if (ret)
		return ret;
	addr = (unsigned long)kp.addr;
	unregister_kprobe(&kp);
	if (kw_is_endbr(addr - ENDBR_INSN_SIZE)) /* where a kprobe at a function is put behind it */
		addr -= ENDBR_INSN_SIZE;
	kw_syms.lookup_name = (void *)addr;
	ret = kw_check_call(addr);
	for (i = 0; i < ARRAY_SIZE(kw_wanted) && !ret; i++)
		ret = kw_resolve_one(&kw_wanted[i]);
	if (ret)
		return ret;
	if (!kw_may_write_mapped())
		kw_syms.poke_with = NULL;
	if (!kw_syms.module_alloc && !kw_syms.execmem_alloc)
		return -EOPNOTSUPP;
	if (kw_syms.lookup_name("execmem_is_rox") && !kw_syms.lookup_name("execmem_alloc_rw")) {
		pr_err("this kernel has no symbol execmem_alloc_rw\n");
		return -EOPNOTSUPP;
	}
	return 0;
}
