# SPDX-License-Identifier: GPL-2.0-or-later
"""Functions in which nothing is placed, by name, each group with its reason.

A name stands for the function's variants and parts, too: `name.isra.0`, `name.cold`.
"""

from __future__ import annotations

#: what the kernel calls, and kprobes survive, between an int3 and those who asked to be told of it:
#: an int3 of a group there would lead to itself
INT3_PATH = (
    "__rcu_read_lock", "__rcu_read_unlock", "rcu_read_unlock_special",
    "hw_breakpoint_exceptions_notify", "kprobe_exceptions_notify",
    # those who are asked through the event notifier_run, where there is one
    "__bpf_trace_notifier_info", "__traceiter_notifier_run", "perf_trace_notifier_info",
    "trace_event_raw_event_notifier_info",
)  # fmt: skip

#: what ftrace calls back before or behind the guard against its own recursion, and what that calls
#: there: notify_die() is traced like others, so each int3 would lead to the next.  Callbacks that
#: kprobes survive no better are denied by the kernel's own list; what runs under the guard may be
#: probed.
TRACER_ENTRIES = (
    "call_direct_funcs", "fprobe_kprobe_handler", "ftrace_graph_func", "ftrace_pid_func",
    "function_args_trace_call", "function_graph_enter_regs", "function_no_repeats_trace_call",
    "function_stack_no_repeats_trace_call", "function_stack_trace_call", "function_trace_call",
    "function_trace_probe_call", "klp_ftrace_handler", "perf_ftrace_function_call",
    "prepare_ftrace_return", "rcu_is_watching", "stack_trace_call",
)  # fmt: skip

#: what runs, mostly without a guard, when a traced function returns: of the graph tracer, which
#: reads the clock before it looks, and of rethooks
TRACER_RETURNS = (
    "fgraph_get_task_var", "ftrace_graph_ret_stub", "ftrace_return_to_handler", "objpool_push",
    "return_run", "trace_graph_return", "trace_graph_thresh_return",
    "kvm_sched_clock_read", "native_read_msr", "native_sched_clock", "pvclock_clocksource_read",
    "read_hv_clock_tsc", "read_hv_sched_clock_msr", "read_hv_sched_clock_tsc", "sched_clock",
    "trace_clock_local", "vmware_sched_clock", "xen_sched_clock",
)  # fmt: skip

#: what a BPF trampoline calls before a program's own counter of recursion guards it, when the
#: counter says no, and behind it; together with `__bpf_prog_enter*` and `__bpf_prog_exit*`
BPF_TRAMPOLINES = (
    "__bpf_tramp_enter", "__bpf_tramp_exit", "bpf_prog_inc_misses_counter", "migrate_disable",
    "migrate_enable", "update_prog_stats",
)  # fmt: skip

#: what a CPU that comes up runs before it has loaded an IDT with a handler of int3: a triple fault
AP_START = (
    "__pi_startup_64_load_idt", "cc_platform_has", "common_startup_64", "cpu_init_fred_exceptions",
    "cpu_init_exception_handling", "cpu_init_fred_rsps", "cpu_init_secondary", "cr4_init",
    "cr4_set_bits", "cr4_update_irqsoff", "early_setup_idt", "load_current_idt", "load_direct_gdt",
    "load_fixmap_gdt", "memset", "memset_erms", "memset_orig", "native_load_gdt",
    "native_load_tr_desc", "native_write_cr4", "native_write_gdt_entry", "native_write_msr",
    "set_bringup_idt_handler", "setup_ghcb", "sev_es_negotiate_protocol", "sev_verify_cbit",
    "snp_register_ghcb_early", "startup_64_load_idt", "verify_cpu",
)  # fmt: skip

#: what runs when the machine wakes from suspension, before gs base and IDT are its own again
RESUME = ("native_write_cr0", "native_write_cr3")

#: what runs when an image is restored with the gs base of the kernel that read it, or is copied for
#: that
HIBERNATION = (
    "core_restore_code", "create_image", "hibernation_snapshot", "restore_image",
    "restore_registers", "swsusp_arch_suspend",
)  # fmt: skip

#: bytes that are no instructions: the prefix by which Xen emulates the next one
NOT_CODE = ("xen_cpuid",)

#: where a CPU that went offline stays: nobody waits until it has left a copy, and some come back
PLAY_DEAD = (
    "acpi_idle_play_dead", "acpi_mp_play_dead", "acpi_processor_ffh_play_dead",
    "asm_acpi_mp_play_dead", "cpuidle_play_dead", "hlt_play_dead", "mwait_play_dead",
    "native_play_dead", "play_dead_common", "resume_play_dead", "sev_es_play_dead",
    "xen_pv_play_dead",
)  # fmt: skip

#: functions that are copied elsewhere, patched by others, or run without their per-CPU data
COPIED = (
    "__fentry__", "ftrace_caller", "ftrace_caller_op_ptr", "ftrace_call", "ftrace_caller_end",
    "ftrace_regs_caller", "ftrace_regs_caller_op_ptr", "ftrace_regs_call",
    "ftrace_regs_caller_jmp", "ftrace_regs_caller_end", "ftrace_epilogue", "ftrace_stub",
    "ftrace_stub_direct_tramp", "ftrace_graph_caller", "return_to_handler",
    "arch_rethook_trampoline", "__kretprobe_trampoline", "relocate_kernel", "identity_mapped",
    "virtual_mapped", "swap_pages", "__restore_processor_state", "restore_processor_state",
    "load_percpu_segment", "native_load_gs_index", "asm_load_gs_index", "machine_kexec",
    "secondary_startup_64", "secondary_startup_64_no_verify", "start_secondary",
    "startup_64", "__startup_64", "x86_64_start_kernel", "xen_hypercall_page",
    "hypercall_page", "wakeup_long64", "do_suspend_lowlevel",
)  # fmt: skip

#: functions that are denied with all whose names begin so
DENIED_PREFIXES = (
    "bpf_dispatcher_", "optprobe_template_", "xen_hypercall_", "__bpf_prog_enter",
    "__bpf_prog_exit",
)  # fmt: skip

DENIED_NAMES = frozenset(
    (
        *INT3_PATH, *TRACER_ENTRIES, *TRACER_RETURNS, *BPF_TRAMPOLINES, *AP_START, *RESUME,
        *HIBERNATION, *NOT_CODE, *PLAY_DEAD, *COPIED,
    )
)  # fmt: skip


def is_denied(name: str) -> bool:
    """Whether nothing may be placed in a function or part of this name."""
    return name.partition(".")[0] in DENIED_NAMES or name.startswith(DENIED_PREFIXES)
