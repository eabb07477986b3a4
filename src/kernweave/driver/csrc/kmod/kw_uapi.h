/* SPDX-License-Identifier: GPL-2.0-or-later WITH Linux-syscall-note */
/*
 * The interface between the brain and the driver, /dev/kernweave.
 *
 * One ioctl carries one request and its reply.  A request is struct kw_req and
 * a payload, a reply is struct kw_rep and a payload; all integers are little
 * endian, all structures have explicit padding, every length is checked.
 * Python's mirror of this file is driver/uapi.py; a test compares the two.
 */
#ifndef KW_UAPI_H
#define KW_UAPI_H

#include <linux/ioctl.h>
#include <linux/types.h>

#ifndef KW_UAPI_VERSION
#define KW_UAPI_VERSION 5
#endif

#define KW_MAGIC 0x5245574bu /* "KWER" */

#define KW_MAX_REQUEST (64u << 20)  /* bytes of one request, header included */
#define KW_MAX_REPLY (33u << 20)    /* bytes of one reply, header included */
#define KW_MAX_READ (32u << 20)     /* bytes read by one request */
#define KW_MAX_POKES (1u << 20)     /* pokes in one transaction */
#define KW_MAX_CODE (256u << 20)    /* bytes of executable memory in one area */
#define KW_MAX_PERCPU (32u << 10)   /* bytes of one per-CPU chunk */
#define KW_BATCH 256u               /* pokes applied while text_mutex is held */
#define KW_POKE_BYTES 24u           /* room for old and new bytes of a poke */

struct kw_call {
	__u64 req;     /* user pointer to the request */
	__u64 req_len; /* its bytes */
	__u64 rep;     /* user pointer to the reply buffer */
	__u64 rep_cap; /* its bytes */
	__u64 rep_len; /* out: bytes written */
};

/* EINTR: a signal came before a commit was done, which was rolled back; there is no reply. */
#define KW_IOC_CALL _IOWR('K', 0x57, struct kw_call)

struct kw_req {
	__u32 magic;
	__u16 version;
	__u16 op;
	__u64 len; /* payload bytes that follow */
};

struct kw_rep {
	__u32 magic;
	__u16 version; /* the driver's, also when it differs from the request's */
	__u16 op;
	__s32 status; /* 0 or a negative errno */
	__u32 detail; /* index of the item the status is about */
	__u64 len;    /* payload bytes that follow */
};

enum kw_op {
	KW_OP_HELLO = 1,    /* kw_hello -> kw_facts; EBUSY -> kw_hello of the owner */
	KW_OP_LOOKUP = 2,   /* names, each NUL-terminated -> u64 address or 0 per name */
	KW_OP_READ = 3,     /* kw_range[] -> the bytes, one after the other */
	KW_OP_KMODS = 4,    /* -> kw_kmod[] */
	KW_OP_DENYLIST = 5, /* -> kw_range[] no kprobe may be placed in */
	KW_OP_KPROBES = 6,  /* -> kw_patched[] armed kprobes */
	KW_OP_FTRACE = 7,   /* -> kw_record[] of every ftrace record */
	KW_OP_PLACED = 8,   /* -> kw_patched[] sites of every session and of pinned ones */
	KW_OP_AREA = 9,     /* kw_size -> kw_area: executable memory, writable until sealed */
	KW_OP_PERCPU = 10,  /* kw_slice{area, 0, bytes} -> kw_chunk */
	KW_OP_WRITE = 11,   /* kw_slice{area, offset, bytes} and the bytes */
	KW_OP_SEAL = 12,    /* kw_slice{area}: read-only, executable, CPUs synchronised */
	KW_OP_COMMIT = 13,  /* kw_commit and kw_poke[] -> kw_size{transaction} */
	KW_OP_UNDO = 14,    /* kw_size{transaction} -> kw_undone and u64[] stuck addresses */
	KW_OP_STATES = 15,  /* kw_size{transaction} -> u8 kw_state per poke */
	KW_OP_QUIESCE = 16, /* wait until nobody can be in unreachable code */
	KW_OP_COUNTERS = 17, /* kw_slice{area, chunk, bytes} -> per possible CPU the bytes */
	KW_OP_FREE = 18,    /* kw_slice{area} -> kw_size{visitors}; EAGAIN until quiesced */
	KW_OP_FORGET = 19,  /* kw_size{transaction}: drop an undone transaction */
	KW_OP_ARM = 20,     /* kw_commit and kw_trap[] -> s64: the set, then a status per trap */
	KW_OP_DISARM = 21,  /* kw_size{set} -> u64 missed hits per trap */
	KW_OP_COPIES = 22,  /* kw_slice{area, 0, count} and kw_copy[], before it is sealed */
	KW_OP_RETURNS = 23, /* -> u64[] where tasks may go on that left by unreachable copies */
	KW_OP_WEAVE = 24,   /* kw_weave and its rows: an empty area gets a loaded kmod's clones */
	KW_OP_MOVE = 25,    /* kw_slice{area, kw_side} -> kw_moved: tasks between both sides */
	KW_OP_CLOSED = 26,  /* kw_slice{area} -> u8 per entry: given back */
};

#define KW_WRITER 1u /* kw_hello.flags: this session will change text */

struct kw_hello {
	__u32 flags;
	__u32 pid; /* of the client, as it sees itself */
	char name[32];
};

#define KW_FACT_LOCKS_LIVE 1u   /* lock prefixes may still be re-patched */
#define KW_FACT_FTRACE_YIELD 2u /* the driver can yield to ftrace */
#define KW_FACT_CALL_DEPTH 4u   /* calls are counted: push; jmp is not a call */
#define KW_FACT_LINE 8u         /* indirect branches may be safe by their address only (ITS) */

struct kw_facts {
	__u64 text_start;   /* _stext */
	__u64 text_end;     /* _etext */
	__u64 yield;        /* address to be called before ftrace changes text */
	__u64 kprobe_yield; /* the same before a kprobe is put at its argument */
	__u64 text_yield;   /* the same before text is patched: the arguments of text_poke_bp() */
	__u64 livepatch_yield; /* the same before a livepatch looks where tasks are */
	__u64 native;       /* address that gives the native address for that of a copy */
	__u64 pinned;       /* sites that could not be restored yet */
	__u32 flags;
	__u32 cpus;         /* possible CPUs = rows of KW_OP_COUNTERS */
	__u32 sizes[6];     /* of jump_entry, static_call_site, exception entry, bug entry; 0; 0 */
	char release[64];   /* uname -r */
	char version[64];   /* uname -v */
};

struct kw_range {
	__u64 start;
	__u64 end; /* exclusive */
};

struct kw_kmod {
	char name[56];
	__u64 text_start;
	__u64 text_end;
	__u64 symtab; /* Elf64_Sym[symbols] */
	__u64 strtab;
	__u64 symbols;
	struct kw_range jump_labels;
	struct kw_range static_calls;
	struct kw_range exceptions;
	struct kw_range bugs;
};

enum kw_owner {
	KW_OTHERS = 0, /* somebody else's kprobe */
	KW_OURS = 1,   /* a session's */
	KW_LEFT = 2,   /* left behind by a session that is gone */
};

struct kw_patched {
	__u64 addr;
	__u32 len;      /* bytes of original[] in force */
	__u32 owner;    /* enum kw_owner */
	__u8 original[KW_POKE_BYTES];
};

struct kw_record {
	__u64 ip;
	__u64 flags; /* dyn_ftrace.flags */
};

struct kw_size {
	__u64 value;
};

struct kw_area {
	__u64 id;
	__u64 addr;
	__u64 size;
};

struct kw_slice {
	__u64 area;
	__u64 off;
	__u64 len;
};

struct kw_chunk {
	__u64 index;
	__u64 offset; /* gs-relative address of the chunk on every CPU */
};

/*
 * A copy that is looked up by its address when it faults or traps.  Ascending by
 * addr.  ENOLINK until a poke with KW_POKE_KEEP is placed.
 */
struct kw_copy {
	__u64 addr;
	__u64 native;
};

/*
 * A generation: clones of functions, in the text of a loaded kmod.  Behind it the
 * rows of every kind, in this order.
 */
struct kw_weave {
	__u64 area;        /* of no bytes; may have per-CPU memory */
	__u64 native_base; /* what the native addresses of kw_place count from */
	__u32 entries;
	__u32 parts;
	__u32 mirrors;
	__u32 returns;
	__u32 insns;
	__u32 pad;
	char kmod[56];
};

/* A function; ascending by site. */
struct kw_entry {
	__u64 site;  /* ftrace's nop, where a jump to the clone goes */
	__u64 clone; /* where that jump leads: behind the slot */
	__u64 slot;  /* five bytes of nop in the clone, the copy of ftrace's; ascending, too */
	__u64 body;  /* where a jump in the slot leads: ftrace's nop */
};

/* Native text of a function or a part of it; ascending, disjoint. */
struct kw_part {
	__u64 start;
	__u64 end;
	__u64 entry; /* row of its kw_entry */
};

enum kw_patched_kind {
	KW_JUMP_LABEL = 0,
	KW_STATIC_CALL = 1,
};

/* What the kernel rewrites, and its copy of five bytes; ascending by native. */
struct kw_mirror {
	__u64 native;
	__u64 clone;
	__u64 target; /* of the jump of a jump label, in the clone */
	__u32 len;    /* bytes natively */
	__u32 kind;   /* enum kw_patched_kind */
};

/*
 * Two places that are the same to a task: where a call returns to, or where an
 * instruction begins.  Ascending by both.
 */
struct kw_place {
	__u32 clone;  /* bytes from the start of the kmod's text */
	__u32 native; /* bytes from native_base */
};

enum kw_side {
	KW_NATIVE = 0, /* whoever is in a clone goes on natively; its entries must be undone */
	KW_CLONE = 1,  /* whoever will return to a native place returns to the clone */
};

struct kw_moved {
	__u64 places;   /* return addresses and others that were changed */
	__u64 visitors; /* tasks that are in clones still, or may be in native code */
	__u64 pid;      /* of one of them */
	__u64 stop_ns;  /* how long the machine was stopped */
};

struct kw_commit {
	__u64 area; /* every new jump must lead into it */
	__u64 count;
};

#define KW_POKE_GROUP 1u /* replaces several instructions: somebody may be between them */
#define KW_POKE_HOST 2u  /* has springboards behind its jump, or is one itself */
#define KW_POKE_KEEP 4u  /* stays as long as any area has copies */
#define KW_POKE_STAY 8u  /* stays as long as any area has clones */

/*
 * new_ is a 5-byte jump into the area, and for the rest of what it replaces int3
 * or springboards: more such jumps.  Or it is a 2-byte jump to a springboard of
 * the same transaction, and int3.
 */
struct kw_poke {
	__u64 addr;
	__u32 len;
	__u32 flags;
	__u8 old[KW_POKE_BYTES];
	__u8 new_[KW_POKE_BYTES];
};

struct kw_trap {
	__u64 addr;
	__u64 chunk; /* of the area */
	__u64 off;   /* of the counter, in the chunk */
};

enum kw_state {
	KW_WAITING = 0,  /* not written yet */
	KW_PLACED = 1,   /* new bytes are in the text */
	KW_EVICTED = 2,  /* given back because ftrace or a kprobe wanted the site */
	KW_RESTORED = 3, /* old bytes written, read again and compared */
	KW_STUCK = 4,    /* somebody else's bytes are there: pinned until they leave */
	KW_ARMED = 5,    /* int3 is on the first byte: waiting until nobody is behind it */
	KW_HELD = 6,     /* its springboards or copies may still be in use: pinned until not */
};

struct kw_undone {
	__u64 restored;
	__u64 evicted;
	__u64 stuck;
};

#endif
