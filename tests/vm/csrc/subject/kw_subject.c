// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Functions of a kmod that are called once per write to a parameter: `work` runs them, `key` and
 * `call` flip a static key and change a static call inside them; `warn` warns, `bug` ends the task
 * that writes, `oddity` has the kernel itself warn, and `vanish` runs an int3 that is none any more
 * when it is looked at; `scribble` takes an address of kernel text and flips a bit there;
 * `linger` has who prints a kmod of kernweave wait until it is about to be freed.
 */
#include <linux/bug.h>
#include <linux/delay.h>
#include <linux/jump_label.h>
#include <linux/kprobes.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/static_call.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>

static ulong plain, keyed, first, second, warned, gone; /* what was really called, seen from inside */
module_param(plain, ulong, 0444);
module_param(keyed, ulong, 0444);
module_param(first, ulong, 0444);
module_param(second, ulong, 0444);
module_param(warned, ulong, 0444);
module_param(gone, ulong, 0444);

static DEFINE_STATIC_KEY_FALSE(kw_key);

static void kw_first(void)
{
	first++;
}

static void kw_second(void)
{
	second++;
}

DEFINE_STATIC_CALL(kw_call, kw_first);

noinline void kw_subject_work(ulong value);
noinline void kw_subject_work(ulong value)
{
	WRITE_ONCE(plain, READ_ONCE(plain) + 0x1000001 * value);
	if (static_branch_unlikely(&kw_key))
		WRITE_ONCE(keyed, READ_ONCE(keyed) + 1);
	static_call(kw_call)();
	WRITE_ONCE(plain, READ_ONCE(plain) - 0x1000000 * value);
}

static int set_work(const char *text, const struct kernel_param *kp)
{
	kw_subject_work(1);
	return 0;
}

noinline void kw_subject_warn(ulong value);
noinline void kw_subject_warn(ulong value)
{
	WARN_ON(value == 1);
	WARN_ON_ONCE(value == 1);
	BUG_ON(value == 2);
	WRITE_ONCE(warned, READ_ONCE(warned) + 1);
}

static int set_warn(const char *text, const struct kernel_param *kp)
{
	kw_subject_warn(1);
	return 0;
}

static int set_bug(const char *text, const struct kernel_param *kp)
{
	kernel_param_unlock(THIS_MODULE); /* nobody is there to do it afterwards */
	kw_subject_warn(2);
	return 0;
}

/* flush_work() warns of what was never initialised, each time. */
static int set_oddity(const char *text, const struct kernel_param *kp)
{
	static struct work_struct never;

	flush_work(&never);
	return 0;
}

static int set_key(const char *text, const struct kernel_param *kp)
{
	if (*text == '1')
		static_branch_enable(&kw_key);
	else
		static_branch_disable(&kw_key);
	return 0;
}

static int set_call(const char *text, const struct kernel_param *kp)
{
	static_call_update(kw_call, *text == '1' ? kw_second : kw_first);
	return 0;
}

/* int3 in two bytes, so the byte before where it leads is none: doubles the value if it is run. */
static int set_gone(const char *text, const struct kernel_param *kp)
{
	ulong value = 1;

	asm volatile(".byte 0xcd, 0x03, 0xc0 /* int $3; or behind its first byte add %%eax, %%eax */"
		     : "+a" (value) : : "cc");
	gone = value;
	return 0;
}

/* Behind everybody's back: through another mapping, without the lock. */
static int set_scribble(const char *text, const struct kernel_param *kp)
{
	unsigned long addr;
	struct page *page;
	u8 *alias;

	if (kstrtoul(text, 0, &addr))
		return -EINVAL;
	page = pfn_to_page(__pa_symbol(addr) >> PAGE_SHIFT);
	alias = vmap(&page, 1, VM_MAP, PAGE_KERNEL);
	if (!alias)
		return -ENOMEM;
	alias[offset_in_page(addr)] ^= 1;
	vunmap(alias);
	return 0;
}

#define LONGEST_MS 20

/* Behind print_modules()'s own look at the state. */
static int linger(struct kprobe *kp, struct pt_regs *regs)
{
	struct module *mod = (void *)regs->di;
	int i;

	if (strstarts(mod->name, "kernweave"))
		for (i = 0; i < LONGEST_MS && READ_ONCE(mod->state) != MODULE_STATE_UNFORMED; i++)
			mdelay(1);
	return 0;
}

static struct kprobe lingering = { .symbol_name = "module_flags", .pre_handler = linger };

static int set_linger(const char *text, const struct kernel_param *kp)
{
	return register_kprobe(&lingering);
}

static const struct kernel_param_ops work_ops = { .set = set_work };
static const struct kernel_param_ops warn_ops = { .set = set_warn };
static const struct kernel_param_ops bug_ops = { .set = set_bug };
static const struct kernel_param_ops vanish_ops = { .set = set_gone };
static const struct kernel_param_ops oddity_ops = { .set = set_oddity };
static const struct kernel_param_ops scribble_ops = { .set = set_scribble };
static const struct kernel_param_ops linger_ops = { .set = set_linger };
static const struct kernel_param_ops key_ops = { .set = set_key };
static const struct kernel_param_ops call_ops = { .set = set_call };
module_param_cb(work, &work_ops, NULL, 0200);
module_param_cb(warn, &warn_ops, NULL, 0200);
module_param_cb(bug, &bug_ops, NULL, 0200);
module_param_cb(vanish, &vanish_ops, NULL, 0200);
module_param_cb(oddity, &oddity_ops, NULL, 0200);
module_param_cb(scribble, &scribble_ops, NULL, 0200);
module_param_cb(linger, &linger_ops, NULL, 0200);
module_param_cb(key, &key_ops, NULL, 0200);
module_param_cb(call, &call_ops, NULL, 0200);

static int __init kw_subject_init(void)
{
	return 0;
}

static void __exit kw_subject_exit(void)
{
	if (lingering.addr)
		unregister_kprobe(&lingering);
}

module_init(kw_subject_init);
module_exit(kw_subject_exit);
MODULE_DESCRIPTION("kernweave: functions to put points in");
MODULE_LICENSE("GPL");
