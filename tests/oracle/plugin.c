// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * The correctness oracle: a TCG plug-in for QEMU 10.0, parallel vCPUs included.
 *
 *   qemu-system-x86_64 -plugin FILE.so,ctl=SOCKET[,lo=ADDR][,hi=ADDR][,transfers=on] ...
 *
 * It counts every instruction executed in [lo, hi) from boot on (count.c), and on demand
 * audits writes to executable pages (audit.c), measures restarts (restart.c) and records
 * transfers of control (transfer.c).
 *
 * These three need callbacks in translations, and QEMU's interface has one way
 * to drop translations: qemu_plugin_reset(), which must be called on a vCPU. Each translated
 * `iretq` therefore asks a per-vCPU flag (inline: no callback while it is 0), and so does
 * each wake-up of an idle vCPU. The reset happens with all vCPUs stopped, and the new
 * callbacks are registered before they run again: no execution is missed, and counters go on.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include "oracle.h"

#define SWITCH_TIMEOUT_S 60

ORACLE_EXPORT int qemu_plugin_version = ORACLE_PLUGIN_API;
ORACLE_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info,
				      int argc, char **argv);

uint64_t oracle_lo = 0xffffffff80000000ull, oracle_hi = 0xffffffffff000000ull;

static qemu_plugin_id_t plugin_id;
static qemu_plugin_u64 asked;		/* per vCPU: 1 = call on_asked at the next iretq */
static int switch_asked;		/* taken by the vCPU that resets */
struct features oracle_active;		/* changed only while all vCPUs are stopped */
static struct features wanted;
static pthread_mutex_t switch_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t switch_done = PTHREAD_COND_INITIALIZER;
static unsigned int switches;

void *oracle_zalloc(size_t bytes)
{
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED) {
		perror("oracle: mmap");
		exit(1);
	}
	return memory;
}

/* --- switching what is instrumented --- */

static void set_asked(uint64_t value)
{
	for (int cpu = 0; cpu < qemu_plugin_num_vcpus(); cpu++)
		__atomic_store_n((uint64_t *)qemu_plugin_scoreboard_find(asked.score, cpu), value,
				 __ATOMIC_RELAXED);
}

static void register_all(qemu_plugin_id_t id);

/* All vCPUs are stopped, no translation and no callback is left. */
static void on_reset(qemu_plugin_id_t id)
{
	set_asked(0);
	if (oracle_active.transfers != wanted.transfers)
		transfer_switched();
	oracle_active = wanted;
	register_all(id);
	pthread_mutex_lock(&switch_lock);
	switches++;
	pthread_cond_signal(&switch_done);
	pthread_mutex_unlock(&switch_lock);
}

static void on_asked(unsigned int cpu, void *data)
{
	(void)cpu, (void)data;
	if (__atomic_exchange_n(&switch_asked, 0, __ATOMIC_ACQUIRE))
		qemu_plugin_reset(plugin_id, on_reset);
}

static void on_resume(qemu_plugin_id_t id, unsigned int cpu)
{
	(void)id;
	on_asked(cpu, NULL);
}

/* On the control thread; vCPUs never wait for it. Returns false if no vCPU came by. */
bool oracle_switch_to(struct features features)
{
	struct timespec until;
	unsigned int before;
	int error = 0;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += SWITCH_TIMEOUT_S;
	pthread_mutex_lock(&switch_lock);
	before = switches;
	wanted = features;
	__atomic_store_n(&switch_asked, 1, __ATOMIC_RELEASE);
	set_asked(1);
	while (switches == before && !error)
		error = pthread_cond_timedwait(&switch_done, &switch_lock, &until);
	pthread_mutex_unlock(&switch_lock);
	return !error;
}

/* --- translation --- */

static void translate_insn(struct qemu_plugin_insn *handle)
{
	struct insn insn = { .handle = handle, .vaddr = qemu_plugin_insn_vaddr(handle) };

	if (insn.vaddr < KERNEL_HALF)
		return;
	insn.len = qemu_plugin_insn_size(handle);
	qemu_plugin_insn_data(handle, insn.code, sizeof(insn.code));
	if (is_iretq(&insn))
		qemu_plugin_register_vcpu_insn_exec_cond_cb(handle, on_asked,
							    QEMU_PLUGIN_CB_NO_REGS,
							    QEMU_PLUGIN_COND_NE, asked, 0, NULL);
	if (insn.vaddr >= oracle_lo && insn.vaddr < oracle_hi) {
		insn.haddr = (uintptr_t)qemu_plugin_insn_haddr(handle);
		audit_note_page(&insn, oracle_active.audit);
		count_insn(&insn);
	}
	if (oracle_active.audit)
		audit_insn(&insn);
	if (oracle_active.watch)
		restart_insn(&insn);
	if (oracle_active.transfers)
		transfer_insn(&insn);
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	size_t n = qemu_plugin_tb_n_insns(tb);

	(void)id;
	if (oracle_active.transfers)
		transfer_block(tb);
	for (size_t i = 0; i < n; i++)
		translate_insn(qemu_plugin_tb_get_insn(tb, i));
}

/* --- installation --- */

/* The thread starts with the first vCPU: QEMU may fork before, not after. */
static void on_vcpu(qemu_plugin_id_t id, unsigned int cpu)
{
	static pthread_once_t once = PTHREAD_ONCE_INIT;

	(void)id, (void)cpu;
	if (!restart_ready())
		restart_find_registers();
	pthread_once(&once, control_start);
}

static void register_all(qemu_plugin_id_t id)
{
	qemu_plugin_register_vcpu_init_cb(id, on_vcpu);
	qemu_plugin_register_vcpu_resume_cb(id, on_resume);
	qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
}

static bool take_argument(const char *arg)
{
	if (!strncmp(arg, "lo=", 3))
		oracle_lo = strtoull(arg + 3, NULL, 0);
	else if (!strncmp(arg, "hi=", 3))
		oracle_hi = strtoull(arg + 3, NULL, 0);
	else if (!strcmp(arg, "transfers=on"))
		oracle_active.transfers = true;
	else
		return !strncmp(arg, "ctl=", 4) && control_set_path(arg + 4);
	return true;
}

int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
	if (!info->system_emulation || strcmp(info->target_name, "x86_64")) {
		fprintf(stderr, "oracle: needs system emulation of x86_64\n");
		return -1;
	}
	for (int i = 0; i < argc; i++) {
		if (!take_argument(argv[i])) {
			fprintf(stderr, "oracle: bad argument %s\n", argv[i]);
			return -1;
		}
	}
	if (oracle_lo < KERNEL_HALF || oracle_hi <= oracle_lo || (oracle_lo | oracle_hi) & 4095) {
		fprintf(stderr, "oracle: needs whole pages with 0x%llx <= lo < hi\n", KERNEL_HALF);
		return -1;
	}
	plugin_id = id;
	asked.score = qemu_plugin_scoreboard_new(sizeof(uint64_t));
	count_init();
	audit_init();
	transfer_init();
	register_all(id);
	return 0;
}
