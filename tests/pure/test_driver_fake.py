# SPDX-License-Identifier: GPL-2.0-or-later
"""The fake driver keeps the contract, and tells more than the real one."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from contract import DriverContract
from contract_sessions import UNMAPPED
from contract_splice import MANY, NOP5, make_splice
from contract_weave import generation
from kernweave.driver import uapi
from kernweave.driver.client import CommitError, Driver
from kernweave.driver.fake import TEXT_START, FakeKernel, FakeSession
from kernweave.driver.uapi import Owner, PokeFlag, State
from kernweave.errors import DriverError, UnsupportedError

STRIDE = 16
INT3 = b"\xcc"
KMOD_TEXT = 0xFFFF_FFFF_C800_0000


def make_kernel() -> FakeKernel:
    """Functions of a nop and a ret, 16 bytes apart."""
    function = NOP5 + b"\xc3" + INT3 * (STRIDE - 6)
    kernel = FakeKernel(function * (MANY + 4), symbols={"_stext": TEXT_START}, cpus=3)
    kernel.ftrace = np.zeros(MANY + 4, uapi.RECORD)
    kernel.ftrace["ip"] = np.uint64(TEXT_START) + np.arange(MANY + 4, dtype=np.uint64) * np.uint64(
        STRIDE
    )
    kernel.denylist = np.zeros(1, uapi.RANGE)
    kernel.denylist["start"], kernel.denylist["end"] = TEXT_START, TEXT_START + STRIDE
    return kernel


class FakeTarget:
    """The fake as the contract sees a target."""

    def __init__(self) -> None:
        self._kernel = make_kernel()

    def connect(self) -> FakeSession:
        return self._kernel.open()

    def close(self, session: FakeSession) -> None:
        session.close()

    def vanish(self, session: FakeSession, request: bytes) -> None:
        self._kernel.text.patience = 3  # groups are armed, some are placed
        with pytest.raises(DriverError, match="signal"):
            session.call(request)
        self._kernel.text.patience = None
        session.close()


class TestFakeDriver(DriverContract):
    @pytest.fixture
    def target(self) -> FakeTarget:
        return FakeTarget()


def test_log_of_commit_and_undo_has_batches_in_order() -> None:
    kernel = make_kernel()
    driver = Driver(kernel.open().call)
    splice = make_splice(driver, MANY)
    driver.undo(driver.commit(splice.area, splice.pokes))
    shape = [(batch.undo, len(batch.writes)) for batch in kernel.log]
    rest = MANY - uapi.BATCH
    assert shape == [(False, uapi.BATCH), (False, rest), (True, uapi.BATCH), (True, rest)]
    placed = [write for batch in kernel.log[:2] for write in batch.writes]
    restored = [write for batch in kernel.log[2:] for write in batch.writes]
    assert [write.addr for write in placed] == splice.pokes["addr"].tolist()
    assert [(w.addr, w.after, w.before) for w in placed] == [
        (w.addr, w.before, w.after) for w in restored
    ]


def test_log_of_stale_poke_in_second_batch_is_one_batch_and_its_undo() -> None:
    kernel = make_kernel()
    driver = Driver(kernel.open().call)
    splice = make_splice(driver, MANY)
    splice.pokes["old"][uapi.BATCH] ^= 1
    with pytest.raises(CommitError):
        driver.commit(splice.area, splice.pokes)
    assert [(b.undo, len(b.writes)) for b in kernel.log] == [
        (False, uapi.BATCH),
        (True, uapi.BATCH),
    ]


@pytest.mark.parametrize("patience", range(6))
def test_log_of_interrupted_commit_is_some_batches_and_their_undo(patience: int) -> None:
    kernel = make_kernel()
    driver = Driver(kernel.open().call)
    splice = make_splice(driver, MANY)
    splice.pokes["flags"] = PokeFlag.GROUP
    kernel.text.patience = patience
    with pytest.raises(DriverError) as error:
        driver.commit(splice.area, splice.pokes)
    assert error.value.errno == errno.EINTR
    done = min(patience, 4)  # the last pass, of short jumps, has none to write
    assert [batch.undo for batch in kernel.log] == [False] * done + [True] * min(patience, 2)
    assert splice.text(driver) == MANY * NOP5
    kernel.text.patience = None
    assert driver.states(driver.commit(splice.area, splice.pokes)).tolist() == [State.PLACED] * MANY


def test_log_of_refused_poke_is_empty() -> None:
    kernel = make_kernel()
    driver = Driver(kernel.open().call)
    splice = make_splice(driver)
    splice.pokes["addr"][1] = UNMAPPED
    with pytest.raises(CommitError):
        driver.commit(splice.area, splice.pokes)
    assert kernel.log == []


def test_counters_with_hits_show_them_per_cpu() -> None:
    kernel = make_kernel()
    driver = Driver(kernel.open().call)
    splice = make_splice(driver)
    kernel.add_hits(splice.chunk.offset + 8, 23, cpu=2)
    assert driver.counters(splice.area, splice.chunk, 16).tolist() == [[0, 0], [0, 0], [0, 23]]


def test_undo_of_foreign_site_is_stuck_until_they_leave() -> None:
    kernel = make_kernel()
    driver = Driver(kernel.open().call)
    splice = make_splice(driver)
    txn = driver.commit(splice.area, splice.pokes)
    site = int(splice.pokes["addr"][1])
    kernel.write_foreign(site, INT3)
    done = driver.undo(txn)
    assert (done.restored, done.stuck, done.stuck_addrs) == (1, 1, (site,))
    assert driver.states(txn).tolist() == [State.RESTORED, State.STUCK]
    with pytest.raises(DriverError) as error:
        driver.free(splice.area)
    assert error.value.errno == errno.EBUSY
    kernel.write_foreign(site, b"\xe9")
    assert driver.undo(txn).restored == 2
    assert splice.text(driver) == 2 * NOP5


def test_close_with_foreign_site_pins_it_until_they_leave() -> None:
    kernel = make_kernel()
    with kernel.open() as session:
        driver = Driver(session.call)
        splice = make_splice(driver)
        driver.commit(splice.area, splice.pokes)
        site = int(splice.pokes["addr"][1])
        kernel.write_foreign(site, INT3)
    reader = Driver(kernel.open().call, writer=False)
    kernel.retry_pinned()
    assert reader.facts.pinned == 1
    assert reader.placed()[["addr", "owner"]].tolist() == [(site, Owner.LEFT)]
    assert reader.read(splice.area.addr, 1) != b""  # its jump still leads there
    kernel.write_foreign(site, b"\xe9")
    kernel.retry_pinned()
    assert splice.text(reader) == 2 * NOP5
    assert kernel.pinned_sites() == 0
    assert not len(reader.placed())
    with pytest.raises(DriverError):
        reader.read(splice.area.addr, 1)


def test_close_frees_areas_and_is_final() -> None:
    kernel = make_kernel()
    session = kernel.open()
    area = Driver(session.call).area(8)
    session.close()
    session.close()
    reader = Driver(kernel.open().call, writer=False)
    with pytest.raises(DriverError) as error:
        reader.read(area.addr, 1)
    assert error.value.errno == errno.EFAULT
    with pytest.raises(DriverError) as error:
        session.call(b"")
    assert error.value.errno == errno.EBADF


def test_yield_to_ftrace_evicts_only_that_site() -> None:
    kernel = make_kernel()
    driver = Driver(kernel.open().call)
    splice = make_splice(driver)
    txn = driver.commit(splice.area, splice.pokes)
    kernel.yield_to_ftrace(splice.pokes["addr"][:1].tolist())
    assert driver.states(txn).tolist() == [State.EVICTED, State.PLACED]
    assert splice.text(driver)[:5] == NOP5
    assert len(driver.placed()) == 1
    done = driver.undo(txn)
    assert (done.restored, done.evicted) == (1, 1)


def test_commit_in_kmod_holds_it_until_forgotten() -> None:
    kernel = make_kernel()
    kernel.memory.map(KMOD_TEXT, NOP5 * 2)
    kernel.kmods = np.zeros(1, uapi.KMOD)
    kernel.kmods["name"] = b"ext4"
    kernel.kmods["text_start"], kernel.kmods["text_end"] = KMOD_TEXT, KMOD_TEXT + 8
    driver = Driver(kernel.open().call)
    splice = make_splice(driver, 1)
    moved = KMOD_TEXT - int(splice.pokes["addr"][0])
    target = int.from_bytes(splice.pokes["new_"][0, 1:5].tobytes(), "little", signed=True)
    splice.pokes["addr"] = KMOD_TEXT
    splice.pokes["new_"][0, 1:5] = list((target - moved).to_bytes(4, "little", signed=True))
    txn = driver.commit(splice.area, splice.pokes)
    driver.undo(txn)
    assert kernel.text.held_kmods() == {"ext4"}
    driver.forget(txn)
    assert kernel.text.held_kmods() == set()
    splice.pokes["addr"] += np.uint64(5)  # its last two bytes are not the kmod's
    with pytest.raises(CommitError) as error:
        driver.commit(splice.area, splice.pokes)
    assert error.value.errno == errno.EFAULT


def test_kprobe_of_others_blocks_commit_and_undo() -> None:
    kernel = make_kernel()
    driver = Driver(kernel.open().call)
    splice = make_splice(driver)
    txn = driver.commit(splice.area, splice.pokes)
    kernel.kprobes = np.zeros(1, uapi.PATCHED)
    kernel.kprobes["addr"] = splice.pokes["addr"][1] + np.uint64(4)  # bytes are still ours
    assert driver.undo(txn).stuck == 1
    kernel.kprobes = kernel.kprobes[:0]
    assert driver.undo(txn).restored == 2
    kernel.kprobes = np.zeros(1, uapi.PATCHED)
    kernel.kprobes["addr"] = splice.pokes["addr"][1]
    with pytest.raises(CommitError) as error:
        driver.commit(splice.area, splice.pokes)
    assert (error.value.errno, error.value.index) == (errno.ESTALE, 1)


def test_commit_of_longer_instruction_fills_its_rest_with_int3() -> None:
    kernel = make_kernel()
    driver = Driver(kernel.open().call)
    splice = make_splice(driver, 1)
    splice.pokes["len"] = 6
    splice.pokes["old"][0, 5] = 0xC3
    splice.pokes["new_"][0, 5] = 0xCC
    site = int(splice.pokes["addr"][0])
    txn = driver.commit(splice.area, splice.pokes)
    assert driver.read(site + 5, 1) == INT3
    driver.undo(txn)
    assert driver.read(site, 6) == NOP5 + b"\xc3"


def test_kernel_without_orc_is_told_so_when_it_is_to_be_woven() -> None:
    kernel = make_kernel()
    kernel.has_orc = False
    driver = Driver(kernel.open().call)
    with pytest.raises(UnsupportedError, match="cannot be woven: it has no ORC"):
        driver.weave(driver.area(0), generation("kernweave_1"))
