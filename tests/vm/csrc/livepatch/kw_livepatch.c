// SPDX-License-Identifier: GPL-2.0-or-later
/* A livepatch of sched_rr_get_interval() that counts its calls. */
#include <linux/livepatch.h>
#include <linux/module.h>
#include <linux/time64.h>

static ulong calls;
module_param(calls, ulong, 0444);

static int kw_rr_get_interval(pid_t pid, struct timespec64 *t)
{
	calls++; /* the workload is one task */
	t->tv_sec = 0;
	t->tv_nsec = 4242;
	return 0;
}

static struct klp_func kw_funcs[] = {
	{ .old_name = "sched_rr_get_interval", .new_func = kw_rr_get_interval },
	{}
};

static struct klp_object kw_objects[] = { { .funcs = kw_funcs }, {} };

static struct klp_patch kw_patch = { .mod = THIS_MODULE, .objs = kw_objects };

static int __init kw_livepatch_init(void)
{
	return klp_enable_patch(&kw_patch);
}

static void __exit kw_livepatch_exit(void)
{
}

module_init(kw_livepatch_init);
module_exit(kw_livepatch_exit);
MODULE_DESCRIPTION("kernweave: a livepatch to live with");
MODULE_LICENSE("GPL");
MODULE_INFO(livepatch, "Y");
