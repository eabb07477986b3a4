// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * One kprobe or kretprobe that does what a counter of kernweave does: it adds
 * one to a per-CPU counter. It is in from load to unload.
 */
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/percpu.h>

static char *symbol = "vfs_read";
module_param(symbol, charp, 0444);
MODULE_PARM_DESC(symbol, "function to probe");

static unsigned int offset;
module_param(offset, uint, 0444);
MODULE_PARM_DESC(offset, "bytes from the function's start, an instruction's first byte");

static bool post;
module_param(post, bool, 0444);
MODULE_PARM_DESC(post, "with a post handler: single-stepped, never boosted nor optimised");

static bool at_return;
module_param(at_return, bool, 0444);
MODULE_PARM_DESC(at_return, "a kretprobe: count the function's returns");

static DEFINE_PER_CPU(u64, counter);

static int on_hit(struct kprobe *kp, struct pt_regs *regs)
{
	this_cpu_inc(counter);
	return 0;
}
NOKPROBE_SYMBOL(on_hit);

static void after_hit(struct kprobe *kp, struct pt_regs *regs, unsigned long flags)
{
}
NOKPROBE_SYMBOL(after_hit);

static int on_return(struct kretprobe_instance *ri, struct pt_regs *regs)
{
	this_cpu_inc(counter);
	return 0;
}
NOKPROBE_SYMBOL(on_return);

static struct kprobe probe = { .pre_handler = on_hit };
static struct kretprobe return_probe = { .handler = on_return, .maxactive = 64 };

static int get_hits(char *buffer, const struct kernel_param *kp)
{
	u64 sum = 0;
	int cpu;

	for_each_possible_cpu(cpu)
		sum += per_cpu(counter, cpu);
	return sysfs_emit(buffer, "%llu\n", sum);
}

static const struct kernel_param_ops hits_ops = { .get = get_hits };
module_param_cb(hits, &hits_ops, NULL, 0444);
MODULE_PARM_DESC(hits, "hits so far, of all CPUs");

static int get_boosted(char *buffer, const struct kernel_param *kp)
{
	return sysfs_emit(buffer, "%d\n", probe.ainsn.boostable && !probe.post_handler);
}

static const struct kernel_param_ops boosted_ops = { .get = get_boosted };
module_param_cb(boosted, &boosted_ops, NULL, 0444);
MODULE_PARM_DESC(boosted, "1: behind the copied instruction a jump leads back, no second trap");

static int __init kw_bench_init(void)
{
	if (at_return) {
		return_probe.kp.symbol_name = symbol;
		return register_kretprobe(&return_probe);
	}
	probe.symbol_name = symbol;
	probe.offset = offset;
	if (post)
		probe.post_handler = after_hit;
	return register_kprobe(&probe);
}

static void __exit kw_bench_exit(void)
{
	if (at_return)
		unregister_kretprobe(&return_probe);
	else
		unregister_kprobe(&probe);
}

module_init(kw_bench_init);
module_exit(kw_bench_exit);
MODULE_DESCRIPTION("One counting kprobe, for comparison with kernweave");
MODULE_LICENSE("GPL");
