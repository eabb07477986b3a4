// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Areas: executable memory and the per-CPU chunks its code writes.  The code may be
 * in another kmod instead (weave.c).
 *
 * Life of an area:
 *   1. allocated writable, not executable;
 *   2. filled;
 *   3. sealed: read-only, then executable, then all CPUs synchronised;
 *   4. reachable while a transaction's jumps lead into it;
 *   5. unreachable again (stamped), but tasks may still be inside;
 *   6. quiescent, and no task is going to come back into a copy that faulted
 *      (fault.c), then freed.
 */
#include <linux/cpu.h>
#include <linux/mm.h>
#include <linux/percpu.h>
#include <linux/rcupdate.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>

#include "kw.h"

static LIST_HEAD(kw_retired); /* areas of closed sessions; under kw_lock */
static u64 kw_stamp = 1;      /* under kw_lock */
static u64 kw_quiesced;       /* areas stamped up to here are free of visitors; kw_lock */
static u64 kw_next_id = 1;

#define KW_SHORTEST_PAUSE ((unsigned long)HZ / 2)
#define KW_LONGEST_PAUSE (64ul * HZ)
#define KW_PERCPU_TRIES 3 /* each gives up rather than that the kernel ends processes */
#define KW_MOST_LOOKS 5 /* in a row */

static void kw_idle_pass(struct work_struct *work)
{
}

/*
 * Make each CPU's idle task pass through the scheduler: RCU tasks skips idle
 * tasks, and an idle task cannot run while a worker of its CPU does.
 */
static void kw_pass_idle_tasks(void)
{
	static DEFINE_PER_CPU(struct work_struct, works);
	static DEFINE_MUTEX(one); /* at a time */
	int cpu;

	mutex_lock(&one);
	cpus_read_lock();
	for_each_online_cpu(cpu) {
		INIT_WORK(per_cpu_ptr(&works, cpu), kw_idle_pass);
		schedule_work_on(cpu, per_cpu_ptr(&works, cpu));
	}
	for_each_online_cpu(cpu)
		flush_work(per_cpu_ptr(&works, cpu));
	cpus_read_unlock();
	mutex_unlock(&one);
}

/* May sleep for a tenth of a second, so kw_lock is held only at both ends. */
void kw_quiesce(void)
{
	u64 upto;

	mutex_lock(&kw_lock);
	upto = kw_stamp++;
	mutex_unlock(&kw_lock);
	kw_yield_drain();
	kw_pass_idle_tasks();
	mutex_lock(&kw_lock);
	kw_quiesced = max(kw_quiesced, upto);
	mutex_unlock(&kw_lock);
}

/* For what becomes unreachable now: quiesced once kw_stamp_passed() says so. */
u64 kw_stamp_now(void)
{
	lockdep_assert_held(&kw_lock);
	return kw_stamp;
}

bool kw_stamp_passed(u64 stamp)
{
	lockdep_assert_held(&kw_lock);
	return stamp && stamp <= kw_quiesced;
}

/* Its copies are no longer known. */
static void kw_code_free(struct kw_code *code)
{
	bool held = code->held;
	u32 i;

	for (i = 0; i < code->nr_chunks; i++)
		free_percpu(code->chunks[i].mem);
	kfree(code->chunks);
	if (code->weaving)
		kw_weave_free(code);
	if (code->mem)
		kw_syms.free_code(code->mem);
	kfree(code);
	if (held)
		module_put(THIS_MODULE);
}

bool kw_code_is_free(const struct kw_code *code)
{
	return !code->users && code->stamp <= kw_quiesced;
}

void kw_area_unreachable(struct kw_code *code)
{
	lockdep_assert_held(&kw_lock);
	if (--code->users)
		return;
	if (code->weaving)
		kw_weave_close(code);
	code->stamp = kw_stamp;
}

/* Tasks that no grace period waits for; none: its code is not known to anybody any more. */
static u32 kw_visitors(struct kw_code *code)
{
	return code->weaving ? kw_weave_visitors(code) : kw_copies_visitors(code);
}

/*
 * How long to wait for what has been waited for since then, in jiffies.  Who is waited for
 * may sleep for days, and a look stops the machine.
 */
unsigned long kw_pause_since(unsigned long since)
{
	return clamp((jiffies - since) / 8, KW_SHORTEST_PAUSE, KW_LONGEST_PAUSE);
}

static void kw_reap(struct work_struct *work);
static DECLARE_DELAYED_WORK(kw_reaper, kw_reap);
static unsigned long kw_retired_at; /* the last one, in jiffies; under kw_lock */

static void kw_reap(struct work_struct *work)
{
	struct kw_code *code, *next;
	bool visited = false, empty = false, freed = false;
	u32 visitors;

	kw_quiesce();
	mutex_lock(&kw_lock);
	list_for_each_entry_safe(code, next, &kw_retired, link) {
		if (!kw_code_is_free(code))
			continue;
		visitors = kw_visitors(code);
		if (visitors || !kw_code_is_free(code)) {
			visited = true;
			empty |= !visitors; /* one more look is needed */
			continue;
		}
		list_del(&code->link);
		kw_code_free(code);
		freed = true;
	}
	if (visited)
		queue_delayed_work(kw_works, &kw_reaper,
				   empty ? KW_SHORTEST_PAUSE : kw_pause_since(kw_retired_at));
	if (freed)
		kw_undo_soon();
	mutex_unlock(&kw_lock);
}

/* Hand an area over to be freed when nobody can be in it; never waits. */
void kw_area_retire(struct kw_code *code)
{
	lockdep_assert_held(&kw_lock);
	list_move(&code->link, &kw_retired);
	if ((code->copies || code->weaving) && !code->held) {
		__module_get(THIS_MODULE);
		code->held = true;
	}
	kw_retired_at = jiffies;
	mod_delayed_work(kw_works, &kw_reaper, 0);
}

static bool kw_clones_are_left(void)
{
	struct kw_code *code;
	bool found = false;

	mutex_lock(&kw_lock);
	list_for_each_entry(code, &kw_retired, link)
		found |= !!code->weaving;
	mutex_unlock(&kw_lock);
	return found;
}

/* Free what can be freed by now; clones need several looks. */
void kw_areas_settle(void)
{
	int round = 0;

	do {
		flush_delayed_work(&kw_reaper);
	} while (++round < KW_MOST_LOOKS && kw_clones_are_left());
}

/* Nothing that is held is left here. */
void kw_areas_exit(void)
{
	flush_delayed_work(&kw_reaper);
	kw_reap(NULL);
	WARN_ON(!list_empty(&kw_retired));
}

struct kw_code *kw_area_find(struct kw_session *s, u64 id)
{
	struct kw_code *code;

	list_for_each_entry(code, &s->areas, link)
		if (code->id == id)
			return code;
	return NULL;
}

/*
 * Sealing makes the direct map read-only, too; module_alloc() itself asks for
 * its reset only since 4c4eb3ecc91f ("x86/modules: Set VM_FLUSH_RESET_PERMS in
 * module_alloc()").
 */
static void *kw_code_alloc(size_t size)
{
	struct vm_struct *vm;
	void *mem;

	if (kw_syms.execmem_alloc)
		mem = kw_syms.execmem_alloc(0, size); /* EXECMEM_DEFAULT */
	else
		mem = kw_syms.module_alloc(size);
	vm = mem ? kw_syms.find_vm_area(mem) : NULL;
	if (vm)
		vm->flags |= VM_FLUSH_RESET_PERMS;
	return mem;
}

int kw_area_alloc(struct kw_session *s, const struct kw_size *req, struct kw_out *out)
{
	struct kw_area *rep = kw_reserve(out, sizeof(*rep));
	struct kw_code *code;

	if (!rep)
		return -ENOSPC;
	if (req->value > KW_MAX_CODE)
		return -E2BIG;
	code = kzalloc(sizeof(*code), GFP_KERNEL);
	if (!code)
		return -ENOMEM;
	code->size = PAGE_ALIGN(req->value);
	if (code->size) {
		code->mem = kw_code_alloc(code->size);
		if (!code->mem) {
			kfree(code);
			return -ENOMEM;
		}
		memset(code->mem, 0xcc, code->size);
	}
	code->id = kw_next_id++;
	list_add_tail(&code->link, &s->areas);
	*rep = (struct kw_area){ code->id, (unsigned long)code->mem, code->size };
	return 0;
}

static int kw_grow_chunks(struct kw_code *code)
{
	u32 max = code->max_chunks ? 2 * code->max_chunks : 8;
	void *more;

	if (code->nr_chunks < code->max_chunks)
		return 0;
	more = krealloc(code->chunks, max * sizeof(*code->chunks), GFP_KERNEL);
	if (!more)
		return -ENOMEM;
	code->chunks = more;
	code->max_chunks = max;
	return 0;
}

int kw_area_percpu(struct kw_session *s, const struct kw_slice *req, struct kw_out *out)
{
	struct kw_chunk *rep = kw_reserve(out, sizeof(*rep));
	struct kw_code *code = kw_area_find(s, req->area);
	struct kw_percpu *chunk;
	u32 i;

	if (!rep)
		return -ENOSPC;
	if (!code)
		return -ENOENT;
	if (!req->len || req->len > KW_MAX_PERCPU || req->len % 8)
		return -E2BIG;
	if (kw_grow_chunks(code))
		return -ENOMEM;
	chunk = &code->chunks[code->nr_chunks];
	chunk->bytes = req->len;
	for (i = 0, chunk->mem = NULL; i < KW_PERCPU_TRIES && !chunk->mem; i++)
		chunk->mem = __alloc_percpu_gfp(req->len, 8,
						GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN);
	if (!chunk->mem)
		return -ENOMEM;
	*rep = (struct kw_chunk){ code->nr_chunks++, (__force unsigned long)chunk->mem };
	return 0;
}

int kw_area_write(struct kw_session *s, const struct kw_slice *req, const u8 *data, size_t len)
{
	struct kw_code *code = kw_area_find(s, req->area);

	if (!code)
		return -ENOENT;
	if (code->filled)
		return -EPERM;
	if (req->len != len || req->off > code->size || len > code->size - req->off)
		return -E2BIG;
	memcpy(code->mem + req->off, data, len);
	return 0;
}

/* In one step where the kernel can: it may then map the pages as a large one again. */
static int kw_code_protect(struct kw_code *code)
{
	unsigned long addr = (unsigned long)code->mem;
	int ret, pages = code->size >> PAGE_SHIFT;

	if (kw_syms.set_rox)
		return kw_syms.set_rox(addr, pages);
	ret = kw_syms.set_ro(addr, pages);
	return ret ? ret : kw_syms.set_x(addr, pages);
}

int kw_area_seal(struct kw_session *s, const struct kw_slice *req)
{
	struct kw_code *code = kw_area_find(s, req->area);
	int ret;

	if (!code)
		return -ENOENT;
	if (code->sealed)
		return 0;
	if (!code->mem)
		return -EPERM;
	code->filled = true;
	ret = kw_code_protect(code);
	if (ret)
		return ret;
	kw_syms.poke_sync();
	code->sealed = true;
	return 0;
}

int kw_area_counters(struct kw_session *s, const struct kw_slice *req, struct kw_out *out)
{
	struct kw_code *code = kw_area_find(s, req->area);
	struct kw_percpu *chunk;
	u64 *to, i;
	int cpu;

	if (!code || req->off >= code->nr_chunks)
		return -ENOENT;
	chunk = &code->chunks[req->off];
	if (req->len > chunk->bytes || req->len % 8)
		return -E2BIG;
	to = kw_reserve(out, req->len * num_possible_cpus());
	if (!to)
		return -ENOSPC;
	for_each_possible_cpu(cpu) {
		const u64 *from = per_cpu_ptr(chunk->mem, cpu);

		for (i = 0; i < req->len / 8; i++)
			*to++ = READ_ONCE(from[i]); /* others write meanwhile: no tearing */
	}
	return 0;
}

/* What tasks are going to come back to is handed over, and freed when they have left. */
int kw_area_free(struct kw_session *s, const struct kw_slice *req, struct kw_out *out)
{
	struct kw_code *code = kw_area_find(s, req->area);
	struct kw_size *rep = kw_reserve(out, sizeof(*rep));

	if (!rep)
		return -ENOSPC;
	if (!code)
		return -ENOENT;
	if (code->users)
		return -EBUSY;
	if (!kw_code_is_free(code))
		return -EAGAIN;
	rep->value = kw_visitors(code);
	if (rep->value) {
		kw_area_retire(code);
		return 0;
	}
	if (!kw_code_is_free(code))
		return -EAGAIN;
	list_del(&code->link);
	kw_code_free(code);
	return 0;
}
