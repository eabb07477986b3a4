/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the driver's files share: sessions, areas, transactions, resolved symbols. */
#ifndef KW_H
#define KW_H

#include <linux/kprobes.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/types.h>

#include "kw_uapi.h"

#define KW_KPROBE_BUCKETS 64 /* KPROBE_TABLE_SIZE, private to kernel/kprobes.c */

#define KW_INT3 0xcc
#define KW_JMP_OPCODE 0xe9
#define KW_JMP_LEN 5
#define KW_SHORT_OPCODE 0xeb
#define KW_SHORT_LEN 2

struct dyn_ftrace;
struct ftrace_rec_iter;
struct kprobe;
struct vm_struct;

/* One reply under construction; handlers reserve what they need, once. */
struct kw_out {
	u8 *buf;
	size_t len; /* payload bytes */
	size_t cap; /* payload bytes the caller can take */
	u32 detail;
	bool nomem; /* there was no memory for it */
};

struct kw_weaving;

struct kw_session {
	struct mutex lock; /* one request at a time */
	struct kw_hello who;
	bool greeted;
	bool writer;
	struct list_head areas;
	struct list_head txns;
	struct list_head sets;
};

/* A copy that is looked up by its address. */
struct kw_known {
	u64 addr;
	u64 native;
	u64 end; /* of its window, once nothing leads to it any more; else 0 */
};

/* Executable memory and the per-CPU chunks its code writes. */
struct kw_code {
	struct list_head link;
	u64 id;
	u8 *mem;
	size_t size;
	bool filled; /* read-only from here on */
	bool sealed;
	u32 users;  /* transactions whose jumps lead here and are not undone */
	u64 stamp;  /* kw_stamp when it became unreachable, 0: never was reachable */
	struct kw_known *copies; /* ascending; NULL: none */
	u32 nr_copies;
	struct list_head copied; /* among all areas with copies */
	bool held;               /* by a reference to this kmod: its session is gone */
	struct kw_weaving *weaving; /* clones in another kmod; then mem is NULL */
	u32 nr_chunks;
	u32 max_chunks;
	struct kw_percpu {
		void __percpu *mem;
		u32 bytes;
	} *chunks;
};

struct kw_txn {
	struct list_head link;   /* in its session, or in the pinned list */
	struct list_head global; /* in kw_txns, under text_mutex */
	u64 id;
	struct kw_code *code;
	u32 count;
	bool pinned;
	u64 stamp;  /* kw_stamp when the last short jump was restored, 0: none was placed */
	u8 *states; /* enum kw_state per poke, under text_mutex */
	struct kw_poke *pokes; /* ascending, disjoint */
	u32 nr_mods;
	struct module **mods; /* kmods whose text we changed; a reference each */
};

/* Kprobes armed by one request. */
struct kw_set {
	struct list_head link;
	u64 id;
	struct kw_code *code; /* whose per-CPU chunks they count in; NULL: disarmed */
	u32 count;
	u32 nr_armed;
	struct kprobe **armed; /* those the kernel allowed */
	struct kw_probe {
		struct kprobe kp;
		u64 __percpu *counter;
	} *probes;
};

/* Kernel functions and data that are not exported, found by name. */
struct kw_syms {
	unsigned long (*lookup_name)(const char *name);
	void (*poke_queue)(void *addr, const void *opcode, size_t len, const void *emulate);
	void (*poke_finish)(void);
	void *(*poke)(void *addr, const void *opcode, size_t len);
	void *(*poke_with)(void (*write)(void *to, const void *src, size_t len), void *addr,
			   const void *src, size_t len);
	void (*poke_sync)(void);
	int (*stop_machine)(int (*fn)(void *data), void *data, const struct cpumask *cpus);
	struct mutex *text_mutex;
	void *(*module_alloc)(unsigned long size);
	void *(*execmem_alloc)(int type, size_t size);
	void (*free_code)(void *mem);
	struct vm_struct *(*find_vm_area)(const void *mem);
	int (*set_rox)(unsigned long addr, int pages);
	int (*set_ro)(unsigned long addr, int pages);
	int (*set_x)(unsigned long addr, int pages);
	struct ftrace_rec_iter *(*rec_start)(void);
	struct ftrace_rec_iter *(*rec_next)(struct ftrace_rec_iter *iter);
	struct dyn_ftrace *(*rec_record)(struct ftrace_rec_iter *iter);
	int (*rec_test)(struct dyn_ftrace *rec, bool enable);
	struct ftrace_ret_stack *(*graph_ret_stack)(struct task_struct *task, int idx);
	struct task_struct *(*idle_task)(int cpu);
	struct mutex *ftrace_lock;
	struct list_head *kprobe_blacklist;
	struct hlist_head *kprobe_table;
	struct mutex *kprobe_mutex;
	struct kprobe *(*get_kprobe)(void *addr);
	struct list_head *modules;
	struct mutex *module_mutex;
	struct module *(*module_text_address)(unsigned long addr);
	struct list_head *smp_alt_modules;
	unsigned long stext;
	unsigned long etext;
};

extern struct kw_syms kw_syms;
extern struct list_head kw_txns;   /* every live transaction; under text_mutex */
extern struct list_head kw_pinned; /* transactions with stuck sites; under kw_lock */
/* areas, transactions, the writer; before kprobe_mutex, which comes before text_mutex */
extern struct mutex kw_lock;
extern struct workqueue_struct *kw_works; /* what waits, and stops the machine */

int kw_resolve(void);
bool kw_is_endbr(unsigned long addr);

void *kw_reserve(struct kw_out *out, size_t bytes);

int kw_facts(struct kw_out *out);
int kw_lookup(const u8 *req, size_t len, struct kw_out *out);
int kw_read(const u8 *req, size_t len, struct kw_out *out);

int kw_kmods(struct kw_out *out);
struct kw_range kw_kmod_text(const struct module *m);
int kw_denylist(struct kw_out *out);
int kw_kprobes(struct kw_out *out);
int kw_ftrace_records(struct kw_out *out);
int kw_placed(struct kw_out *out);

int kw_area_alloc(struct kw_session *s, const struct kw_size *req, struct kw_out *out);
int kw_area_percpu(struct kw_session *s, const struct kw_slice *req, struct kw_out *out);
int kw_area_write(struct kw_session *s, const struct kw_slice *req, const u8 *data, size_t len);
int kw_area_seal(struct kw_session *s, const struct kw_slice *req);
int kw_area_counters(struct kw_session *s, const struct kw_slice *req, struct kw_out *out);
int kw_area_free(struct kw_session *s, const struct kw_slice *req, struct kw_out *out);
struct kw_code *kw_area_find(struct kw_session *s, u64 id);
bool kw_code_is_free(const struct kw_code *code);
void kw_area_unreachable(struct kw_code *code);
void kw_area_retire(struct kw_code *code);
void kw_areas_settle(void);
void kw_areas_exit(void);
void kw_quiesce(void);
u64 kw_stamp_now(void);
bool kw_stamp_passed(u64 stamp);

unsigned long kw_native_addr(unsigned long addr);
bool kw_copies_exist(void);
int kw_copies_set(struct kw_session *s, const struct kw_slice *req, const struct kw_copy *rows,
		  size_t len);
void kw_copies_unreachable(struct kw_code *code, struct kw_txn *t);
int kw_copies_check(struct kw_txn *t, u32 *bad);
int kw_copies_returns(struct kw_out *out);
u32 kw_copies_visitors(struct kw_code *code);

int kw_weave(struct kw_session *s, const struct kw_weave *req, const u8 *rows, size_t len);
int kw_weave_move(struct kw_session *s, const struct kw_slice *req, struct kw_out *out);
int kw_weave_closed(struct kw_session *s, const struct kw_slice *req, struct kw_out *out);
void kw_weave_free(struct kw_code *code);
void kw_weave_exit(void);
u32 kw_weave_visitors(struct kw_code *code);
bool kw_weave_is_entry(const struct kw_code *code, u64 addr, u64 target);
bool kw_weave_is_probed(const struct kw_weaving *w);
void kw_weave_close(struct kw_code *code);
void kw_weave_mark(u64 addr, u64 len);
void kw_weave_own(bool own);
bool kw_weave_close_marked(void);
int kw_weave_leave_for(const struct kw_txn *t);
bool kw_weavings_exist(void);
bool kw_may_unwind(struct task_struct *task);
void kw_livepatch_yield(void);
void kw_text_yield(unsigned long addr, const u8 *bytes, size_t len, const u8 *emulate);

int kw_text_commit(struct kw_session *s, const struct kw_commit *req, const struct kw_poke *pokes,
		   size_t len, struct kw_out *out);
int kw_text_states(struct kw_session *s, const struct kw_size *req, struct kw_out *out);
int kw_text_matches(const struct kw_poke *p, const u8 *bytes);
bool kw_text_has_kprobe(const struct kw_poke *p);
void kw_look_for_kprobes(void);
bool kw_may_jump(struct kprobe *kp);
bool kw_is_short(const struct kw_poke *p);
void kw_text_restore(struct kw_txn *t, u32 from, u32 to, bool shorts);
void kw_text_give_back(struct kw_txn *t, u32 i);
void kw_text_flush(void);
void kw_text_lock(void);
void kw_text_unlock(void);
void kw_poke_lock(void);
void kw_poke_unlock(void);
unsigned long kw_pause_since(unsigned long since);
void *kw_alloc(size_t bytes, gfp_t zero);

void kw_poke_rows(struct kw_txn *t, const u32 *rows, u32 count, bool restore);
void kw_poke_disarm(struct kw_txn *t, const u32 *rows, u32 count);
void kw_poke_back(const struct kw_poke *p);
struct kw_txn *kw_poke_writing(void);

int kw_check_jumps(struct kw_txn *t, u32 *bad);
bool kw_is_closed_entry(const struct kw_code *code, const struct kw_poke *p);
struct kw_poke *kw_poke_at(struct kw_txn *t, u64 addr);
struct kw_poke *kw_poke_around(struct kw_txn *t, u64 addr);

int kw_going_init(void);
void kw_going_exit(void);
void kw_unlist(struct module *mod);

int kw_group_init(void);
void kw_group_exit(void);
u32 kw_group_left(const struct kw_txn *t);
int kw_group_arm(struct kw_txn *t, u32 *round, u32 *bad);
void kw_group_done(struct kw_txn *t);

int kw_undo(struct kw_session *s, const struct kw_size *req, struct kw_out *out);
int kw_forget(struct kw_session *s, const struct kw_size *req);
void kw_undo_all(struct kw_txn *t, struct kw_undone *sum, bool wait);
void kw_txn_free(struct kw_txn *t);
struct kw_txn *kw_txn_find(struct kw_session *s, u64 id);
void kw_undo_session(struct kw_session *s);
void kw_undo_exit(void);
void kw_undo_settle(void);
void kw_undo_soon(void);

int kw_trap_arm(struct kw_session *s, const struct kw_commit *req, const struct kw_trap *traps,
		size_t len, struct kw_out *out);
int kw_trap_disarm(struct kw_session *s, const struct kw_size *req, struct kw_out *out);
void kw_trap_session(struct kw_session *s);
void kw_traps_exit(void);
bool kw_is_trap(const struct kprobe *kp);

void kw_ftrace_yield(void);
void kw_kprobe_yield(unsigned long addr);
void kw_yield_drain(void);
int kw_yield_begin(void);
void kw_yield_end(int idx);
void kw_yield_evict(u64 addr);

#endif
