# SPDX-License-Identifier: GPL-2.0-or-later
"""Faults, warnings and stack traces in functions that are entered and left meanwhile."""

from __future__ import annotations

import re

from guest import CSRC, ENV, booted, kmodctl, program, shell, target

import kernweave
from kernweave.driver.link import Link
from kernweave.driver.records import ExitStatus
from kernweave.lab.build import build_kmod
from kernweave.lab.packages import fetch_kernel

ODDITY = "/sys/module/kw_subject/parameters/oddity"
#: what these events run through
SCOPE = ("vfs_read", "ksys_read", "read_iter_zero", "clear_user*", "copy_*", "_copy_*",
         "iov_iter_*", "strncpy_from_user", "getname*", "do_sys_open*", "put_timespec64",
         "__x64_sys_*", "do_syscall_64", "kobject_get", "refcount_warn_saturate", "__warn*",
         "report_bug", "proc_pid_stack", "proc_single_show", "seq_read*", "stack_trace_save*",
         "arch_stack_walk*", "unwind_*", "ksys_pread64", "vfs_write", "param_attr_store",
         "module_attr_store", "kernfs_fop_*", "fixup_exception", "ex_handler_*", "exc_page_fault",
         "do_user_addr_fault", "search_*", "sprint_*", "kallsyms_*")  # fmt: skip
_QUIET = "echo 0 > /sys/module/printk/parameters/ignore_loglevel; echo 1 > /proc/sys/kernel/printk"


def events_while_scopes_come_and_go(series: str, number: int) -> int:
    """Run each kind of event so often; how often the scope was woven meanwhile."""
    with (
        booted(f"weave-events-{series}", kernel=series, loud=True) as machine,
        machine.connect() as link,
        kernweave.connect(target(machine), progress=print) as k,
    ):
        kmod = build_kmod(fetch_kernel(series, print), CSRC / "subject", progress=print)
        assert kmodctl(link, "load", str(kmod)) == "ok"
        shell(link, _QUIET)
        warned = _warnings(link)
        with machine.connect() as runner:
            command = [program("events"), str(number), ODDITY]
            runner.exec_start(command, env=ENV, cwd="/", fresh=True)
            output = bytearray()
            rounds, status = 0, None
            while status is None:
                points = [f"{glob}@blocks" for glob in SCOPE]
                with k.weave(*points, partial=True) as woven:
                    status = _follow(runner, output)
                assert woven.text_restored and woven.in_flight == 0
                rounds += 1
        assert (status, output.decode()) == (0, f"{number}\n"), (status, bytes(output), rounds)
        assert _warnings(link) - warned == number
        bad = re.findall(r"BUG|Oops|general protection|lockup|stall", machine.log())
        assert not bad
    return rounds


def _warnings(link: Link) -> int:
    return int(shell(link, "cat /sys/kernel/warn_count", fresh=False))


def _follow(runner: Link, output: bytearray) -> int | None:
    """Exit status, None if the command still runs."""
    try:
        for _, data in runner.exec_events(0.1):
            if isinstance(data, ExitStatus):
                return data.exit
            output += data
    except TimeoutError:
        return None
    return None
