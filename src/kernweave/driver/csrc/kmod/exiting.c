// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Tasks that are about to end: in the last part of do_exit() they are on none of the
 * kernel's lists, and may sleep there.  They are kept on one of ours while there are
 * clones, from the tracepoint before that until their stack is gone.
 *
 * Those that were past the tracepoint when the first clones came are not on it.  They
 * would have to come to a clone after that, and sleep there until it is freed.
 */
#include <linux/mempool.h>
#include <linux/sched/task.h>
#include <linux/sched/task_stack.h>
#include <linux/tracepoint.h>

#include "weaving.h"

struct kw_exiting {
	struct list_head link;
	struct task_struct *task; /* a reference */
};

/* Tasks that may end at once when memory is short. */
#define KW_RESERVE 1024

static LIST_HEAD(kw_exiting);
static mempool_t *kw_pool;
static DEFINE_SPINLOCK(kw_exiting_lock);
static bool kw_lost;      /* somebody is not on the list */
static u32 kw_watchers;   /* under kw_lock */
static struct tracepoint *kw_exit_tracepoint;

static bool kw_is_gone(const struct kw_exiting *e)
{
	return !refcount_read(&e->task->stack_refcount);
}

/* Take those off that are gone, or all. */
static void kw_exiting_drop(bool all, struct list_head *to)
{
	struct kw_exiting *e, *next;

	spin_lock(&kw_exiting_lock);
	list_for_each_entry_safe(e, next, &kw_exiting, link)
		if (all || kw_is_gone(e))
			list_move(&e->link, to);
	spin_unlock(&kw_exiting_lock);
}

static void kw_exiting_free(struct list_head *from)
{
	struct kw_exiting *e, *next;

	list_for_each_entry_safe(e, next, from, link) {
		put_task_struct(e->task);
		mempool_free(e, kw_pool);
	}
}

/* The tracepoint's probe. */
static void kw_task_exits(void *data, struct task_struct *task)
{
	struct kw_exiting *e = mempool_alloc(kw_pool, GFP_ATOMIC | __GFP_NOWARN);
	LIST_HEAD(gone);

	if (!e) {
		WRITE_ONCE(kw_lost, true);
		return;
	}
	e->task = get_task_struct(task);
	kw_exiting_drop(false, &gone);
	spin_lock(&kw_exiting_lock);
	list_add_tail(&e->link, &kw_exiting);
	spin_unlock(&kw_exiting_lock);
	kw_exiting_free(&gone);
}

static void kw_find_tracepoint(struct tracepoint *tp, void *data)
{
	if (!strcmp(tp->name, "sched_process_exit"))
		kw_exit_tracepoint = tp;
}

static int kw_exiting_begin(void)
{
	int ret;

	kw_pool = mempool_create_kmalloc_pool(KW_RESERVE, sizeof(struct kw_exiting));
	if (!kw_pool)
		return -ENOMEM;
	ret = tracepoint_probe_register(kw_exit_tracepoint, kw_task_exits, NULL);
	if (ret)
		mempool_destroy(kw_pool);
	return ret;
}

int kw_exiting_watch(void)
{
	int ret = 0;

	lockdep_assert_held(&kw_lock);
	if (!kw_exit_tracepoint)
		for_each_kernel_tracepoint(kw_find_tracepoint, NULL);
	if (!kw_exit_tracepoint)
		return -EOPNOTSUPP;
	if (!kw_watchers)
		ret = kw_exiting_begin();
	if (!ret)
		kw_watchers++;
	return ret;
}

void kw_exiting_unwatch(void)
{
	LIST_HEAD(rest);

	lockdep_assert_held(&kw_lock);
	if (--kw_watchers)
		return;
	tracepoint_probe_unregister(kw_exit_tracepoint, kw_task_exits, NULL);
	tracepoint_synchronize_unregister();
	kw_exiting_drop(true, &rest);
	kw_exiting_free(&rest);
	mempool_destroy(kw_pool);
	WRITE_ONCE(kw_lost, false);
}

/* With the machine stopped: nobody has the lock, as who has it is not preempted. */
void kw_exiting_visit(void (*visit)(void *data, struct task_struct *task), void *data)
{
	struct kw_exiting *e;

	list_for_each_entry(e, &kw_exiting, link)
		visit(data, e->task);
}

/* Whether all are on the list. */
bool kw_exiting_complete(void)
{
	return !READ_ONCE(kw_lost);
}
