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
DENIED_PREFIXES = ("bpf_dispatcher_", "optprobe_template_", "xen_hypercall_")

DENIED_NAMES = frozenset((*INT3_PATH, *COPIED))


def is_denied(name: str) -> bool:
    """Whether nothing may be placed in a function or part of this name."""
    return name.partition(".")[0] in DENIED_NAMES or name.startswith(DENIED_PREFIXES)
