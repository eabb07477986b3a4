# SPDX-License-Identifier: GPL-2.0-or-later
"""Kmods of ours that are unloaded while warnings print the list of kmods."""

from __future__ import annotations

import signal

import pytest
from guest import CSRC, ENV, booted, kmodctl, shell, target, until

import kernweave
from kernweave.lab.build import build_kmod
from kernweave.lab.packages import fetch_kernel

PARAMETERS = "/sys/module/kw_subject/parameters"
#: the kernel warns again and again; little of it on the console
WARNING = f"""
echo 0 > /sys/module/printk/parameters/ignore_loglevel
echo 4 > /proc/sys/kernel/printk
while :; do echo 1 > {PARAMETERS}/oddity; done
"""
ROUNDS = 3


@pytest.mark.parametrize("series", ["6.1", "6.12"])
def test_unload_while_kmods_are_printed_ends_in_no_bug(series: str) -> None:
    with (
        booted(f"going-{series}", kernel=series) as machine,
        machine.connect() as link,
        machine.connect() as runner,
    ):
        kmod = build_kmod(fetch_kernel(series, print), CSRC / "subject", progress=print)
        assert kmodctl(link, "load", str(kmod)) == "ok"
        shell(link, f"echo 1 > {PARAMETERS}/linger")
        runner.exec_start(["sh", "-c", WARNING], env=ENV, cwd="/", fresh=True)
        for _ in range(ROUNDS):
            with kernweave.connect(target(machine)) as k, k.weave("vfs_read@blocks"):
                pass
        until("rmmod", lambda: kmodctl(link, "unload", "kernweave") == "ok")
        runner.signal(signal.SIGKILL)
        list(runner.exec_events(None))
        assert int(shell(link, "cat /sys/kernel/warn_count")) > ROUNDS
