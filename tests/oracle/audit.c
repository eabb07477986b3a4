// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Records writes to executable kernel pages and executions of marked addresses, in one
 * total order.
 *
 * The kernel pokes its text through another mapping than the one it runs from, therefore
 * pages are told by physical address. A page is executable when
 *   - it lies in a virtual range given as text (`text`): kernel image by arithmetic, module
 *     area by where its code was last translated from; or
 *   - code in [lo, hi) was translated from it since `audit on` (which drops all
 *     translations, so whatever runs is seen again); or
 *   - it was named (`exec`).
 * Earlier translations alone do not count: init text is freed and becomes data.
 * Writes by devices (DMA) are not seen; no stock kernel loads code that way.
 *
 * QEMU gives a host address for code and a physical one for data. Their difference is
 * constant for RAM below the 3 GB hole and follows from the kernel's phys_base.
 *
 * Order: the callback of a store runs after it, the one of a mark before the instruction,
 * each takes its sequence number before its vCPU goes on. So if one vCPU waits for another
 * (as text_poke_sync does), their events are numbered in that order.
 */
#include <string.h>
#include "oracle.h"

#define MAX_EVENTS (8u << 20)
#define MAX_MARKS 256
#define MAX_RANGES 4096
#define N_PHYS_PAGES (1u << 20)		/* 4 GiB */
#define PAGE 4096ull

enum kind { KIND_WRITE = 1, KIND_MARK = 2 };

struct event {
	uint64_t seq;
	uint8_t kind;
	uint8_t cpu;
	uint8_t size;
	uint8_t pad[5];
	uint64_t addr;			/* text address of a write, 0 if unknown; or the mark */
	uint64_t phys;
	uint64_t value;			/* new */
	uint64_t pc;
};

_Static_assert(sizeof(struct event) == 48, "events are packed");

static struct event *events;
static uint64_t n_events;		/* also the next sequence number */
static uint64_t marks[MAX_MARKS];
static unsigned int n_marks;
static struct { uint64_t lo, hi; } ranges[MAX_RANGES];
static unsigned int n_ranges;
static uint64_t *bitmap;		/* [phys page / 64] */
static uint64_t *text_page;		/* [phys page]: virtual page, 0 = unknown */
static uintptr_t *host_page;		/* [page of (lo, hi)]: host page last translated from */
static uint64_t image_vaddr;		/* a translated instruction of the kernel image ... */
static uintptr_t image_haddr;		/* ... and where the host keeps it */
static uintptr_t ram_base;		/* host address of guest physical 0 */

void audit_init(void)
{
	events = oracle_zalloc(MAX_EVENTS * sizeof(*events));
	bitmap = oracle_zalloc(N_PHYS_PAGES / 8);
	text_page = oracle_zalloc(N_PHYS_PAGES * sizeof(*text_page));
	host_page = oracle_zalloc((oracle_hi - oracle_lo) / PAGE * sizeof(*host_page));
}

static bool add_page(uint64_t phys, uint64_t vaddr)
{
	uint64_t page = phys / PAGE;

	if (page >= N_PHYS_PAGES)
		return false;
	if (vaddr)
		__atomic_store_n(&text_page[page], vaddr & -PAGE, __ATOMIC_RELAXED);
	if (!(__atomic_load_n(&bitmap[page / 64], __ATOMIC_RELAXED) >> page % 64 & 1))
		__atomic_fetch_or(&bitmap[page / 64], 1ull << page % 64, __ATOMIC_RELAXED);
	return true;
}

/* Only the first byte's page: a next page has instructions of its own sooner or later. */
void audit_note_page(const struct insn *insn, bool active)
{
	if (!insn->haddr || insn->haddr == UINTPTR_MAX)
		return;
	if (insn->vaddr >= IMAGE_BASE && insn->vaddr < IMAGE_END) {
		image_vaddr = insn->vaddr;
		image_haddr = insn->haddr;
	}
	host_page[(insn->vaddr - oracle_lo) / PAGE] = insn->haddr & -PAGE;
	if (active)
		add_page(insn->haddr - ram_base, insn->vaddr);
}

bool audit_add_mark(uint64_t vaddr)
{
	if (n_marks == MAX_MARKS)
		return false;
	marks[n_marks++] = vaddr;
	return true;
}

bool audit_add_text(uint64_t lo, uint64_t hi)
{
	if (n_ranges == MAX_RANGES || lo < oracle_lo || hi > oracle_hi || lo >= hi)
		return false;
	ranges[n_ranges].lo = lo;
	ranges[n_ranges++].hi = hi;
	return true;
}

bool audit_add_page(uint64_t phys)
{
	return add_page(phys, 0);
}

static void add_range(uint64_t lo, uint64_t hi, uint64_t phys_base)
{
	for (uint64_t page = lo & -PAGE; page < hi; page += PAGE) {
		uintptr_t host = host_page[(page - oracle_lo) / PAGE];

		if (page < IMAGE_END)
			add_page(page - IMAGE_BASE + phys_base, page);
		else if (host)
			add_page(host - ram_base, page);
	}
}

/* Called while nothing is being audited. Pages named by `exec` stay, once. */
const char *audit_begin(uint64_t phys_base)
{
	if (!image_vaddr)
		return "no code of the kernel image was translated yet";
	ram_base = image_haddr - (image_vaddr - IMAGE_BASE + phys_base);
	if (ram_base & (PAGE - 1))
		return "phys_base is not page aligned";
	for (unsigned int i = 0; i < n_ranges; i++)
		add_range(ranges[i].lo, ranges[i].hi, phys_base);
	n_events = 0;
	return NULL;
}

static void record(struct event event)
{
	event.seq = __atomic_fetch_add(&n_events, 1, __ATOMIC_SEQ_CST);
	if (event.seq < MAX_EVENTS)
		events[event.seq] = event;
}

/* Records bytes [from, to) of the 16 in value, which do not cross a page. */
static void record_write(unsigned int cpu, qemu_plugin_meminfo_t info, uint64_t vaddr,
			 const uint8_t *value, unsigned int size, uint64_t pc)
{
	struct qemu_plugin_hwaddr *hwaddr = qemu_plugin_get_hwaddr(info, vaddr);
	struct event event = { .kind = KIND_WRITE, .cpu = cpu, .pc = pc };
	uint64_t page;

	if (!hwaddr || qemu_plugin_hwaddr_is_io(hwaddr))
		return;
	event.phys = qemu_plugin_hwaddr_phys_addr(hwaddr);
	page = event.phys / PAGE;
	if (page >= N_PHYS_PAGES ||
	    !(__atomic_load_n(&bitmap[page / 64], __ATOMIC_RELAXED) >> page % 64 & 1))
		return;
	if (text_page[page])
		event.addr = text_page[page] + event.phys % PAGE;
	for (unsigned int done = 0; done < size; done += event.size) {
		event.size = size - done < 8 ? size - done : 8;
		event.value = 0;
		memcpy(&event.value, value + done, event.size);
		record(event);
		event.phys += event.size;
		event.addr += event.addr ? event.size : 0;
	}
}

static void on_store(unsigned int cpu, qemu_plugin_meminfo_t info, uint64_t vaddr, void *pc)
{
	unsigned int size = 1u << qemu_plugin_mem_size_shift(info);
	unsigned int first = PAGE - vaddr % PAGE < size ? PAGE - vaddr % PAGE : size;
	qemu_plugin_mem_value value = qemu_plugin_mem_get_value(info);
	const uint8_t *bytes = (const uint8_t *)value.data.words;

	record_write(cpu, info, vaddr, bytes, first, (uint64_t)pc);
	if (first < size)
		record_write(cpu, info, vaddr + first, bytes + first, size - first, (uint64_t)pc);
}

static void on_mark(unsigned int cpu, void *vaddr)
{
	record((struct event){ .kind = KIND_MARK, .cpu = cpu,
			       .addr = (uint64_t)vaddr, .pc = (uint64_t)vaddr });
}

/* Called for each translated instruction of the kernel half while the audit is on. */
void audit_insn(const struct insn *insn)
{
	for (unsigned int i = 0; i < n_marks; i++)
		if (marks[i] == insn->vaddr)
			qemu_plugin_register_vcpu_insn_exec_cb(insn->handle, on_mark,
							       QEMU_PLUGIN_CB_NO_REGS,
							       (void *)insn->vaddr);
	qemu_plugin_register_vcpu_mem_cb(insn->handle, on_store, QEMU_PLUGIN_CB_NO_REGS,
					 QEMU_PLUGIN_MEM_W, (void *)insn->vaddr);
}

/* Called when the audit is off. Forgets marks, ranges and pages: each audit names its own. */
long audit_write(FILE *to)
{
	uint64_t n = n_events < MAX_EVENTS ? n_events : MAX_EVENTS;

	n_marks = 0;
	n_ranges = 0;
	memset(bitmap, 0, N_PHYS_PAGES / 8);
	memset(text_page, 0, N_PHYS_PAGES * sizeof(*text_page));
	return fwrite(events, sizeof(*events), n, to) == n ? (long)n : -1;
}

uint64_t audit_lost(void)
{
	return n_events > MAX_EVENTS ? n_events - MAX_EVENTS : 0;
}
