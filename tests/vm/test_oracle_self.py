# SPDX-License-Identifier: GPL-2.0-or-later
"""The oracle against a machine whose every system call is known: exact, or caught."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kernweave.errors import UnsupportedError
from kernweave.lab.packages import fetch_kernel, fetch_qemu
from oracle.audit import Poke, check_pokes
from oracle.bare import BareMachine, build_initrd
from oracle.oracle import MARK, WRITE, Oracle, Records, build_plugin, qemu_args

CPUS = 2
STATIC_KEY = "w /proc/sys/kernel/sched_schedstats"
SYMBOLS = (
    *("_text", "_etext", "__x64_sys_getppid", "__put_user_8", "copy_user_enhanced_fast_string"),
    *("do_sync_core", "arch_jump_label_transform_apply", "text_poke_finish"),
    *("asm_exc_page_fault", "asm_exc_general_protection"),
)


class Machine:
    """The running machine, its oracle and its symbols."""

    def __init__(self, bare: BareMachine, oracle: Oracle) -> None:
        self.tell = bare.tell
        self.oracle = oracle
        self.symbols = bare.symbols(*SYMBOLS)

    def audit(self, *lines: str) -> Records:
        marks = ("do_sync_core", "arch_jump_label_transform_apply", "text_poke_finish")
        text = (self.symbols["_text"], self.symbols["_etext"])
        self.oracle.audit_on(0, [self.symbols[name] for name in marks], [text])
        for line in lines:
            self.tell(line)
        return self.oracle.audit_off()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    wanted = os.environ.get("KERNWEAVE_VM")
    if wanted == "0":
        pytest.skip("KERNWEAVE_VM=0")
    try:
        qemu, kernel = fetch_qemu(), fetch_kernel("6.1")
    except UnsupportedError as error:
        if wanted == "1":
            raise
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("oracle")
    plugin = qemu_args(build_plugin(folder), folder / "ctl")
    argv = [str(qemu.binary), "-L", str(qemu.data)]
    env = {"LD_LIBRARY_PATH": ":".join(map(str, qemu.libs))}
    initrd = build_initrd(folder)
    with (
        BareMachine(argv, env, kernel.vmlinuz, initrd, plugin) as bare,
        Oracle(Path(folder / "ctl")) as oracle,
    ):
        yield Machine(bare, oracle)


def test_counts_known_system_calls_on_both_cpus_are_exact(machine: Machine) -> None:
    before = machine.oracle.snapshot()
    machine.tell("g 0 1000")
    machine.tell("g 1 300")
    machine.tell("b 20000")
    counts = machine.oracle.snapshot().since(before)
    rows = counts.vaddr == np.uint64(machine.symbols["__x64_sys_getppid"])
    assert counts.per_cpu[rows].sum(axis=0).tolist() == [21000, 20300]
    assert counts.at([machine.symbols["__x64_sys_getppid"]]).tolist() == [41300]


def test_counts_across_audit_switches_stay_exact(machine: Machine) -> None:
    before = machine.oracle.snapshot()
    machine.tell("g 0 1000")
    machine.audit("b 20000")
    machine.tell("g 1 1000")
    counts = machine.oracle.snapshot().since(before)
    assert counts.at([machine.symbols["__x64_sys_getppid"]]).tolist() == [42000]


def planned(events: Records) -> list[Poke]:
    """The pokes of a static key that was switched on and off again, as the events show them."""
    writes = events[events["kind"] == WRITE]
    sites = np.unique(writes["addr"][(writes["value"] == 0xCC) & (writes["size"] == 1)])
    on: list[Poke] = []
    for site in sites.tolist():
        here = writes[(writes["addr"] >= site) & (writes["addr"] < site + 5)]
        here = here[here["addr"].astype(np.int64) + here["size"] <= site + 5]
        contents = _contents(site, here)
        on.append((site, contents[1], contents[0]))
    return on + [(addr, new, old) for addr, old, new in on]


def _contents(site: int, writes: Records) -> tuple[bytes, bytes]:
    """What the site held after the first and after the second poke."""
    nop_or_jump = {0xEB: 2, 0x66: 2, 0xE9: 5, 0x0F: 5}
    heads = [int(v) for v in writes["value"][writes["addr"] == site] if v != 0xCC]
    length = nop_or_jump[heads[0]]
    results = []
    for nth in range(2):
        content = bytearray([heads[nth], *bytes(length - 1)])
        for off in range(1, length):
            hits = [int(w["value"]) for w in _covering(writes, site + off, site)]
            content[off] = hits[nth]
        results.append(bytes(content))
    return results[0], results[1]


def _covering(writes: Records, addr: int, site: int) -> list[dict[str, int]]:
    found = []
    for write in writes:
        nth = addr - int(write["addr"])
        if int(write["addr"]) > site and 0 <= nth < int(write["size"]):
            found.append({"value": int(write["value"]) >> 8 * nth & 0xFF})
    return found


def test_audit_static_key_follows_the_protocol_and_seeded_faults_do_not(machine: Machine) -> None:
    events = machine.audit(f"{STATIC_KEY} 1", f"{STATIC_KEY} 0")
    pokes, sync = planned(events), machine.symbols["do_sync_core"]
    assert len(pokes) > 20
    assert check_pokes(events, pokes, sync, CPUS) == ([], [])
    is_sync = (events["kind"] == MARK) & (events["addr"] == np.uint64(sync))
    syncs = np.flatnonzero(is_sync)
    assert len(syncs) == 2 * 3 * CPUS
    for drop in syncs.tolist():
        assert check_pokes(np.delete(events, drop), pokes, sync, CPUS).violations


def test_audit_writes_outside_the_plan_are_told_with_their_caller(machine: Machine) -> None:
    events = machine.audit(f"{STATIC_KEY} 1", f"{STATIC_KEY} 0")
    violations, foreign = check_pokes(events, [], machine.symbols["do_sync_core"], CPUS)
    assert violations == []
    assert len(foreign) == (events["kind"] == WRITE).sum() > 100
    names = ("arch_jump_label_transform_apply", "text_poke_finish")
    assert {write.caller for write in foreign} <= {machine.symbols[name] for name in names}


@pytest.mark.parametrize(
    ("function", "code", "work"),
    [
        ("__put_user_8", "488901", "t 1000"),  # mov %rax,(%rcx) into a fresh page
        ("copy_user_enhanced_fast_string", "f3a4", "r /proc/kallsyms"),
    ],
)
def test_restarts_of_faulting_instructions_are_discounted(
    machine: Machine, function: str, code: str, work: str
) -> None:
    entry = machine.symbols[function]
    faults = [machine.symbols["asm_exc_page_fault"], machine.symbols["asm_exc_general_protection"]]
    addr = entry + find_code(machine, entry, bytes.fromhex(code))
    before = machine.oracle.snapshot()
    machine.oracle.watch([addr], [len(code) // 2], faults)
    machine.tell(work)
    restarts = machine.oracle.unwatch()["restarts"].tolist()
    counts = machine.oracle.snapshot().since(before)
    arrivals, executions = counts.at([addr + len(code) // 2, addr]).tolist()
    assert executions - restarts[0] == arrivals
    assert restarts[0] >= 500


def find_code(machine: Machine, entry: int, code: bytes) -> int:
    machine.tell("t 1")
    machine.tell("r /proc/version")
    seen = machine.oracle.snapshot()
    addrs = list(range(entry, entry + 64))
    return int(np.flatnonzero(seen.at_code(addrs, [code] * 64))[0])
