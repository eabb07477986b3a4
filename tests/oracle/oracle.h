/* SPDX-License-Identifier: GPL-2.0-or-later */
/* What the files of the plug-in share: plugin.c and control.c call the others. */
#ifndef ORACLE_H
#define ORACLE_H

#include <stdio.h>
#include "qemu_api.h"

#define MAX_INSN 15

/* One translated instruction, copied out of QEMU's handle. */
struct insn {
	struct qemu_plugin_insn *handle;
	uint64_t vaddr;
	uintptr_t haddr;		/* host address of its first byte */
	uint8_t len;
	uint8_t code[MAX_INSN];		/* zero padded */
};

/* Of all returns from the kernel's own exceptions and interrupts. */
static inline bool is_iretq(const struct insn *insn)
{
	return insn->len == 2 && insn->code[0] == 0x48 && insn->code[1] == 0xcf;
}

/* Addresses at and above: kernel half of the address space, where stores are audited. */
#define KERNEL_HALF 0xffff800000000000ull
#define IMAGE_BASE 0xffffffff80000000ull
#define IMAGE_END 0xffffffffc0000000ull	/* the module area begins */

extern uint64_t oracle_lo, oracle_hi;

void *oracle_zalloc(size_t bytes);	/* touched pages only; exits on failure */

/* plugin.c: what is instrumented beside the counters */
struct features {
	bool audit;
	bool watch;
	bool transfers;
};

extern struct features oracle_active;	/* changes only inside oracle_switch_to() */
bool oracle_switch_to(struct features features);	/* false: no vCPU came by in time */

/* control.c */
bool control_set_path(const char *path);
void control_start(void);

/* count.c */
void count_init(void);
void count_insn(const struct insn *insn);
long count_write(FILE *to);		/* rows written, -1 on error */
uint64_t count_lost(void);		/* translations without a slot: counts are not exact */

/* audit.c */
void audit_init(void);
void audit_note_page(const struct insn *insn, bool active);
void audit_insn(const struct insn *insn);
bool audit_add_mark(uint64_t vaddr);
bool audit_add_text(uint64_t lo, uint64_t hi);
bool audit_add_page(uint64_t phys);
const char *audit_begin(uint64_t phys_base);	/* NULL, or why not */
long audit_write(FILE *to);
uint64_t audit_lost(void);

/* restart.c */
void restart_find_registers(void);
void restart_clear(void);
bool restart_add_watch(uint64_t vaddr, uint64_t len);
bool restart_add_fault_entry(uint64_t vaddr);
bool restart_ready(void);
void restart_insn(const struct insn *insn);
long restart_write(FILE *to);
uint64_t restart_lost(void);

/* transfer.c */
void transfer_init(void);
void transfer_insn(const struct insn *insn);
void transfer_block(struct qemu_plugin_tb *tb);
void transfer_switched(void);		/* on or off; all vCPUs are stopped */
const char *transfer_problem(void);	/* NULL, or why there is nothing to write */
long transfer_write(FILE *to);
uint64_t transfer_dropped(void);

#endif
