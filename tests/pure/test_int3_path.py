# SPDX-License-Identifier: GPL-2.0-or-later
"""What real kernels call between an int3 and the driver's notifier is left alone."""

from __future__ import annotations

import numpy as np
import pytest

from kernweave.analysis.code import build_code
from kernweave.analysis.imagefile import load_file
from kernweave.image.vmlinuz import open_image
from kernweave.lab.packages import KERNEL_SERIES, fetched_kernel
from kernweave.x86.decode import Flow

WAY = ("exc_int3", "do_int3", "notify_die", "atomic_notifier_call_chain", "notifier_call_chain",
       "irqentry_nmi_enter", "irqentry_nmi_exit", "kprobe_exceptions_notify")  # fmt: skip
#: only what is not ours gets there: user mode, an oops
ENDS = ("arch_exit_to_user_mode_prepare.isra.0", "rcu_nocb_flush_deferred_wakeup",
        "exit_to_user_mode_loop", "__hrtimer_rearm_deferred",
        "irqentry_enter_from_user_mode", "irqentry_exit_to_user_mode", "do_trap", "die",
        "__stack_chk_fail", "cond_local_irq_enable", "cond_local_irq_disable")  # fmt: skip


@pytest.mark.parametrize("series", KERNEL_SERIES)
def test_calls_between_int3_and_notifier_lead_to_denied_text(series: str) -> None:
    tree = fetched_kernel(series)
    if tree is None:
        pytest.skip(f"kernel {series} was not fetched (kernweave lab up)")
    file = load_file(open_image(tree.vmlinuz))
    parts = [part for part in file.parts() if part.symbol in WAY]
    assert {part.symbol for part in parts} >= {"exc_int3", "notify_die", "notifier_call_chain"}
    code = build_code(parts, file.sites)
    leaves = np.isin(code.flow, (Flow.CALL, Flow.JUMP)) & (code.target != 0)
    targets = np.unique(code.target[leaves])
    names = {target: file.symbols.name_at.get(int(target)) for target in targets.tolist()}
    called = np.array([t for t, name in names.items() if name and name not in ENDS], np.uint64)
    denied = np.zeros(len(called), bool)
    for ranges in file.sites.ranges:
        denied |= ranges.overlap(called, called + np.uint64(1))
    free = [names[target] for target in called[~denied].tolist()]
    assert len(called) >= 4 and not free
