# SPDX-License-Identifier: GPL-2.0-or-later
"""What any driver must do: the same tests for the fake and for the real one.

A test module subclasses `DriverContract` and gives it a fixture `target`.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pytest

from kernweave.driver import uapi
from kernweave.driver.client import Area, Chunk, CommitError, Driver, Rows
from kernweave.driver.uapi import Op, Owner, State
from kernweave.errors import DriverError
from kernweave.session.attach import make_pokes
from kernweave.splice.layout import COUNTER_BYTES, bind, draft, make_entries

NOP5 = bytes.fromhex("0f1f440000")
MANY = uapi.BATCH + 44  # pokes: more than one batch
UNMAPPED = 0xFFFF_FFFF_FFFF_0000  # in the hole at the end of the address space
PAGE = 4096


class Session(Protocol):
    """An open descriptor of the driver, wherever it is."""

    def call(self, request: bytes, /) -> bytes | bytearray | memoryview: ...


S = TypeVar("S", bound=Session)


class Target(Protocol[S]):
    """A kernel with a driver; `close` returns when the session's changes are undone."""

    def connect(self) -> S: ...

    def close(self, session: S, /) -> None: ...


class Sessions:
    """Sessions of one test, closed in reverse order at its end."""

    def __init__(self, target: Target[Any]) -> None:
        self._target = target
        self._open: list[Session] = []

    def raw(self) -> Session:
        session: Session = self._target.connect()
        self._open.append(session)
        return session

    def driver(self, *, writer: bool = True) -> Driver:
        return Driver(self.raw().call, writer=writer)

    def close_last(self) -> None:
        self._target.close(self._open.pop())

    def close(self) -> None:
        while self._open:
            self.close_last()


@dataclass(frozen=True)
class Splice:
    """Counters on ftrace nops: sealed code and the pokes that lead to it, not committed."""

    area: Area
    chunk: Chunk
    pokes: Rows

    def text(self, driver: Driver) -> bytes:
        return driver.read_ranges(self.pokes["addr"], self.pokes["addr"] + np.uint64(5))


def nop_sites(driver: Driver, count: int) -> npt.NDArray[np.uint64]:
    """Addresses of ftrace nops where a probe is allowed."""
    records = np.sort(driver.ftrace_records()["ip"])
    start, end = driver.facts.text_start, driver.facts.text_end
    ips = records[(records >= start) & (records + np.uint64(5) <= end)][: 4 * count]
    text = np.frombuffer(driver.read_ranges(ips, ips + np.uint64(5)), "V5")
    denied = driver.denylist()
    allowed = [
        not ((denied["start"] <= ip) & (ip < denied["end"])).any() and bytes(now) == NOP5
        for ip, now in zip(ips, text, strict=True)
    ]
    sites: npt.NDArray[np.uint64] = ips[np.array(allowed, bool)][:count]
    assert len(sites) == count, "the target has too few ftrace nops"
    return sites


def make_splice(driver: Driver, count: int = 2, *, seal: bool = True) -> Splice:
    """Lay counters for some nops out and write them into an area."""
    rough = draft(make_entries(nop_sites(driver, count), np.zeros(count, np.uint32)), [])
    area = driver.area(rough.size)
    chunk = driver.percpu(area, COUNTER_BYTES * count)
    offsets = chunk.offset + COUNTER_BYTES * np.arange(count)
    plan = bind(rough, area.addr, offsets.astype(np.uint64))
    driver.write(area, 0, plan.code)
    if seal:
        driver.seal(area)
    return Splice(area, chunk, make_pokes(plan.pokes))


def take_out(driver: Driver, splice: Splice, txn: int) -> None:
    driver.undo(txn)
    driver.forget(txn)
    driver.quiesce()
    driver.free(splice.area)


@dataclass(frozen=True)
class Reply:
    status: int
    detail: int
    version: int
    body: bytes


def ask(session: Session, op: int, payload: bytes = b"", *, version: int = uapi.VERSION) -> Reply:
    """Exchange one request without the client's own checks."""
    head = np.zeros(1, uapi.REQ)
    head["magic"], head["version"], head["op"] = uapi.MAGIC, version, op
    head["len"] = len(payload)
    reply = bytes(session.call(head.tobytes() + payload))
    rep = np.frombuffer(reply[: uapi.REP.itemsize], uapi.REP)[0]
    assert rep["magic"] == uapi.MAGIC
    assert rep["op"] == op
    body = reply[uapi.REP.itemsize :]
    assert rep["len"] == len(body)
    return Reply(int(rep["status"]), int(rep["detail"]), int(rep["version"]), body)


def hello(flags: int = 0) -> bytes:
    row = np.zeros(1, uapi.HELLO)
    row["flags"], row["pid"], row["name"] = flags, os.getpid(), b"contract"
    return row.tobytes()


def refusal(error: pytest.ExceptionInfo[DriverError]) -> str:
    return errno.errorcode[error.value.errno]


class HelloContract:
    """Who may talk, in which language, and who may write."""

    def test_hello_once_tells_facts(self, sessions: Sessions) -> None:
        facts = sessions.driver(writer=False).facts
        assert facts.text_start < facts.text_end
        assert facts.cpus >= 1
        assert facts.release and facts.version

    def test_hello_twice_is_refused(self, sessions: Sessions) -> None:
        session = sessions.raw()
        assert ask(session, Op.HELLO, hello()).status == 0
        assert ask(session, Op.HELLO, hello()).status == -errno.EINVAL

    def test_hello_unknown_flag_is_refused(self, sessions: Sessions) -> None:
        session = sessions.raw()
        assert ask(session, Op.HELLO, hello(2)).status == -errno.EINVAL
        assert ask(session, Op.HELLO, hello()).status == 0

    def test_hello_too_short_is_refused(self, sessions: Sessions) -> None:
        assert ask(sessions.raw(), Op.HELLO, hello()[:-1]).status == -errno.EINVAL

    def test_request_before_hello_is_refused(self, sessions: Sessions) -> None:
        assert ask(sessions.raw(), Op.PLACED).status == -errno.ENOTCONN

    @pytest.mark.parametrize("version", [0, uapi.VERSION + 1])
    def test_request_of_wrong_version_names_the_drivers(
        self, sessions: Sessions, version: int
    ) -> None:
        reply = ask(sessions.raw(), Op.HELLO, hello(), version=version)
        assert (reply.status, reply.version) == (-errno.EPROTO, uapi.VERSION)

    @pytest.mark.parametrize("op", [0, max(Op) + 1, 0xFFFF])
    def test_request_unknown_is_refused(self, sessions: Sessions, op: int) -> None:
        session = sessions.raw()
        ask(session, Op.HELLO, hello())
        assert ask(session, op).status == -errno.EOPNOTSUPP

    @pytest.mark.parametrize("at", [0, 8])
    def test_request_with_wrong_frame_fails(self, sessions: Sessions, at: int) -> None:
        head = np.zeros(1, uapi.REQ)
        head["magic"], head["version"], head["op"] = uapi.MAGIC, uapi.VERSION, Op.PLACED
        broken = bytearray(head.tobytes())
        broken[at] ^= 1  # the magic, the length
        with pytest.raises(DriverError) as error:
            sessions.raw().call(bytes(broken))
        assert refusal(error) == "EBADMSG"

    def test_reader_writing_is_refused(self, sessions: Sessions) -> None:
        reader = sessions.driver(writer=False)
        with pytest.raises(DriverError) as error:
            reader.area(PAGE)
        assert refusal(error) == "EPERM"
        with pytest.raises(DriverError) as error:
            reader.quiesce()
        assert refusal(error) == "EPERM"

    def test_writer_second_is_told_who_writes(self, sessions: Sessions) -> None:
        sessions.driver()
        with pytest.raises(DriverError) as error:
            sessions.driver()
        assert refusal(error) == "EBUSY"
        program = Path(sys.argv[0]).name[:31]
        assert f"pid {os.getpid()} ({program})" in error.value.message

    def test_writer_refused_may_still_read(self, sessions: Sessions) -> None:
        sessions.driver()
        second = sessions.raw()
        assert ask(second, Op.HELLO, hello(uapi.WRITER)).status == -errno.EBUSY
        assert ask(second, Op.HELLO, hello()).status == 0

    def test_writer_gone_leaves_its_place(self, sessions: Sessions) -> None:
        sessions.driver()
        sessions.close_last()
        assert sessions.driver().area(PAGE).size == PAGE


class ReadContract:
    """Names and memory."""

    def test_lookup_unknown_name_is_zero(self, sessions: Sessions) -> None:
        driver = sessions.driver(writer=False)
        start, nothing = driver.lookup(["_stext", "no_such_name_kw"])
        assert (start, nothing) == (driver.facts.text_start, 0)

    def test_lookup_nothing_is_empty(self, sessions: Sessions) -> None:
        assert sessions.driver(writer=False).lookup([]) == []

    def test_lookup_unterminated_name_is_refused(self, sessions: Sessions) -> None:
        session = sessions.raw()
        ask(session, Op.HELLO, hello())
        assert ask(session, Op.LOOKUP, b"_stext").status == -errno.EINVAL

    def test_read_unmapped_address_faults(self, sessions: Sessions) -> None:
        with pytest.raises(DriverError) as error:
            sessions.driver(writer=False).read(UNMAPPED, 8)
        assert refusal(error) == "EFAULT"

    def test_read_user_address_is_refused(self, sessions: Sessions) -> None:
        with pytest.raises(DriverError) as error:
            sessions.driver(writer=False).read(PAGE, 8)
        assert refusal(error) == "ERANGE"

    def test_read_fault_names_the_range(self, sessions: Sessions) -> None:
        driver = sessions.driver(writer=False)
        starts = np.array([driver.facts.text_start, UNMAPPED], np.uint64)
        with pytest.raises(DriverError, match=r"\(item 1\)"):
            driver.read_ranges(starts, starts + np.uint64(8))

    @pytest.mark.parametrize(
        ("sizes", "item"), [((uapi.MAX_READ + 1,), 0), ((uapi.MAX_READ, 1), 1), ((-1,), 0)]
    )
    def test_read_too_large_is_refused_at_its_range(
        self, sessions: Sessions, sizes: tuple[int, ...], item: int
    ) -> None:
        session = sessions.raw()
        start = Driver(session.call, writer=False).facts.text_start
        rows = np.zeros(len(sizes), uapi.RANGE)
        rows["start"] = start
        rows["end"] = [start + size for size in sizes]
        reply = ask(session, Op.READ, rows.tobytes())
        assert (reply.status, reply.detail) == (-errno.E2BIG, item)

    def test_read_part_of_a_row_is_refused(self, sessions: Sessions) -> None:
        session = sessions.raw()
        ask(session, Op.HELLO, hello())
        odd = bytes(uapi.RANGE.itemsize + 8)
        assert ask(session, Op.READ, odd).status == -errno.EINVAL

    def test_read_ranges_are_joined_in_order(self, sessions: Sessions) -> None:
        driver = sessions.driver(writer=False)
        start = driver.facts.text_start
        whole = driver.read(start, 64)
        starts = np.array([start + 32, start], np.uint64)
        assert driver.read_ranges(starts, starts + np.uint64(32)) == whole[32:] + whole[:32]
        assert len(set(whole)) > 1

    def test_read_nothing_is_empty(self, sessions: Sessions) -> None:
        driver = sessions.driver(writer=False)
        assert driver.read(driver.facts.text_start, 0) == b""

    def test_tables_have_whole_rows(self, sessions: Sessions) -> None:
        driver = sessions.driver(writer=False)
        assert len(driver.ftrace_records()) >= MANY
        assert (driver.denylist()["start"] <= driver.denylist()["end"]).all()
        assert (driver.kmods()["text_start"] < driver.kmods()["text_end"]).all()
        assert not len(driver.kprobes())
        assert not len(driver.placed())


class AreaContract:
    """Executable memory and counters."""

    def test_area_new_is_whole_pages_of_int3(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        area = driver.area(PAGE + 1)
        assert area.size == 2 * PAGE
        assert driver.read(area.addr, area.size) == b"\xcc" * area.size

    @pytest.mark.parametrize("size", [0, uapi.MAX_CODE + 1, 1 << 63])
    def test_area_of_wrong_size_is_refused(self, sessions: Sessions, size: int) -> None:
        with pytest.raises(DriverError) as error:
            sessions.driver().area(size)
        assert refusal(error) == "E2BIG"

    def test_area_written_holds_the_bytes(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        area = driver.area(PAGE)
        driver.write(area, PAGE - 3, b"abc")
        assert driver.read(area.addr + PAGE - 4, 4) == b"\xccabc"

    @pytest.mark.parametrize("off", [PAGE - 2, PAGE, PAGE + 1, 1 << 63, (1 << 64) - 1])
    def test_area_write_beyond_its_end_is_refused(self, sessions: Sessions, off: int) -> None:
        driver = sessions.driver()
        area = driver.area(PAGE)
        with pytest.raises(DriverError) as error:
            driver.write(area, off, b"abc")
        assert refusal(error) == "E2BIG"
        assert driver.read(area.addr, PAGE) == b"\xcc" * PAGE

    def test_area_write_with_wrong_length_is_refused(self, sessions: Sessions) -> None:
        session = sessions.raw()
        area = Driver(session.call).area(PAGE)
        row = np.zeros(1, uapi.SLICE)
        row["area"], row["len"] = area.id, 4
        assert ask(session, Op.WRITE, row.tobytes() + b"abc").status == -errno.E2BIG

    def test_area_write_after_seal_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        area = driver.area(PAGE)
        driver.write(area, 0, b"abc")
        driver.seal(area)
        driver.seal(area)
        with pytest.raises(DriverError) as error:
            driver.write(area, 0, b"xyz")
        assert refusal(error) == "EPERM"
        assert driver.read(area.addr, 3) == b"abc"

    def test_area_never_reachable_is_freed_at_once(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        area = driver.area(PAGE)
        driver.free(area)
        with pytest.raises(DriverError) as error:
            driver.free(area)
        assert refusal(error) == "ENOENT"

    def test_area_of_another_number_is_unknown(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        wrong = Area(driver.area(PAGE).id + 1000, 0, PAGE)
        for use in (driver.seal, driver.free, lambda area: driver.percpu(area, 8)):
            with pytest.raises(DriverError) as error:
                use(wrong)
            assert refusal(error) == "ENOENT"

    def test_counters_new_are_zero_for_every_cpu(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        area = driver.area(PAGE)
        first, second = driver.percpu(area, 24), driver.percpu(area, uapi.MAX_PERCPU)
        assert (first.index, second.index) == (0, 1)
        assert first.offset != second.offset
        hits = driver.counters(area, first, 24)
        assert hits.shape == (driver.facts.cpus, 3)
        assert not hits.any()
        assert driver.counters(area, second, 8).shape == (driver.facts.cpus, 1)

    @pytest.mark.parametrize("size", [0, 12, uapi.MAX_PERCPU + 8])
    def test_counters_of_wrong_size_are_refused(self, sessions: Sessions, size: int) -> None:
        driver = sessions.driver()
        with pytest.raises(DriverError) as error:
            driver.percpu(driver.area(PAGE), size)
        assert refusal(error) == "E2BIG"

    @pytest.mark.parametrize(
        ("index", "size", "code"), [(1, 8, "ENOENT"), (0, 24, "E2BIG"), (0, 4, "E2BIG")]
    )
    def test_counters_read_outside_are_refused(
        self, sessions: Sessions, index: int, size: int, code: str
    ) -> None:
        driver = sessions.driver()
        area = driver.area(PAGE)
        chunk = driver.percpu(area, 16)
        with pytest.raises(DriverError) as error:
            driver.counters(area, Chunk(index, chunk.offset), size)
        assert refusal(error) == code


class CommitContract:
    """What may be poked."""

    def test_commit_into_unsealed_area_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver, seal=False)
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, splice.pokes)
        assert refusal(error) == "ENOENT"
        assert splice.text(driver) == 2 * NOP5

    def test_commit_without_pokes_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, splice.pokes[:0])
        assert refusal(error) == "EINVAL"

    def test_commit_with_another_count_is_refused(self, sessions: Sessions) -> None:
        session = sessions.raw()
        driver = Driver(session.call)
        splice = make_splice(driver)
        head = np.zeros(1, uapi.COMMIT)
        head["area"], head["count"] = splice.area.id, 3
        request = head.tobytes() + splice.pokes.tobytes()
        assert ask(session, Op.COMMIT, request).status == -errno.EINVAL
        assert splice.text(driver) == 2 * NOP5

    def test_commit_outside_text_is_refused_at_the_poke(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver, 2)
        pokes = splice.pokes.copy()
        pokes["addr"][1] = splice.area.addr  # executable, but nobody's text
        pokes["new_"][1, 1:5] = np.frombuffer((0).to_bytes(4, "little"), np.uint8)
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, pokes)
        assert (refusal(error), error.value.index) == ("EFAULT", 1)
        assert splice.text(driver) == 2 * NOP5

    @pytest.mark.parametrize("shift", [-1, +1])
    def test_commit_of_jump_beside_the_area_is_refused(
        self, sessions: Sessions, shift: int
    ) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        target = splice.area.addr - 1 if shift < 0 else splice.area.addr + splice.area.size
        pokes = splice.pokes.copy()
        distance = target - (int(pokes["addr"][1]) + 5)
        pokes["new_"][1, 1:5] = list(distance.to_bytes(4, "little", signed=True))
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, pokes)
        assert (refusal(error), error.value.index) == ("EINVAL", 1)
        assert splice.text(driver) == 2 * NOP5

    @pytest.mark.parametrize(
        ("field", "value"),
        [("len", 4), ("len", 6), ("len", 0), ("len", 16), ("new_", 0xE8), ("new_", 0xEB)],
    )
    def test_commit_of_other_than_jump_is_refused(
        self, sessions: Sessions, field: str, value: int
    ) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        pokes = splice.pokes.copy()
        if field == "len":
            pokes["len"][0] = value
        else:
            pokes["new_"][0, 0] = value
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, pokes)
        assert (refusal(error), error.value.index) == ("EINVAL", 0)
        assert splice.text(driver) == 2 * NOP5

    def test_commit_not_ascending_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, splice.pokes[::-1])
        assert (refusal(error), error.value.index) == ("EINVAL", 1)
        assert splice.text(driver) == 2 * NOP5

    @pytest.mark.parametrize("distance", [0, 4])
    def test_commit_overlapping_is_refused(self, sessions: Sessions, distance: int) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        pokes = splice.pokes[[0, 0]]
        pokes["addr"][1] += np.uint64(distance)
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, pokes)
        assert (refusal(error), error.value.index) == ("EINVAL", 1)
        assert splice.text(driver) == 2 * NOP5

    @pytest.mark.parametrize("stale", [0, uapi.BATCH - 1, uapi.BATCH, MANY - 1])
    def test_commit_of_stale_poke_rolls_back_and_names_it(
        self, sessions: Sessions, stale: int
    ) -> None:
        driver = sessions.driver()
        splice = make_splice(driver, MANY)
        pokes = splice.pokes.copy()
        pokes["old"][stale, 4] ^= 1
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, pokes)
        assert (refusal(error), error.value.index) == ("ESTALE", stale)
        assert splice.text(driver) == MANY * NOP5
        assert not len(driver.placed())
        driver.quiesce()
        driver.free(splice.area)

    def test_commit_places_every_poke(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver, MANY)
        txn = driver.commit(splice.area, splice.pokes)
        assert splice.text(driver) == splice.pokes["new_"][:, :5].tobytes()
        assert driver.states(txn).tolist() == [State.PLACED] * MANY
        take_out(driver, splice, txn)

    def test_commit_twice_finds_the_first_in_its_way(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        txn = driver.commit(splice.area, splice.pokes)
        with pytest.raises(CommitError) as error:
            driver.commit(splice.area, splice.pokes)
        assert (refusal(error), error.value.index) == ("ESTALE", 0)
        assert splice.text(driver) == splice.pokes["new_"][:, :5].tobytes()
        take_out(driver, splice, txn)


class UndoContract:
    """How everything is put back."""

    def test_undo_restores_identical_bytes(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver, MANY)
        before = splice.text(driver)
        txn = driver.commit(splice.area, splice.pokes)
        assert splice.text(driver) != before
        done = driver.undo(txn)
        assert (done.restored, done.evicted, done.stuck) == (MANY, 0, 0)
        assert done.stuck_addrs == ()
        assert splice.text(driver) == before
        assert driver.states(txn).tolist() == [State.RESTORED] * MANY

    def test_undo_twice_says_the_same(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        txn = driver.commit(splice.area, splice.pokes)
        assert driver.undo(txn) == driver.undo(txn)
        assert splice.text(driver) == 2 * NOP5
        take_out(driver, splice, txn)

    def test_undo_of_unknown_transaction_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        txn = driver.commit(splice.area, splice.pokes)
        for use in (driver.undo, driver.states, driver.forget):
            with pytest.raises(DriverError) as error:
                use(txn + 1000)
            assert refusal(error) == "ENOENT"

    def test_free_of_reachable_area_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        driver.commit(splice.area, splice.pokes)
        driver.quiesce()
        with pytest.raises(DriverError) as error:
            driver.free(splice.area)
        assert refusal(error) == "EBUSY"

    def test_free_before_quiesce_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        driver.quiesce()  # one that comes too early does not count
        driver.undo(driver.commit(splice.area, splice.pokes))
        with pytest.raises(DriverError) as error:
            driver.free(splice.area)
        assert refusal(error) == "EAGAIN"
        driver.quiesce()
        driver.free(splice.area)

    def test_free_needs_every_transaction_undone(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        first = driver.commit(splice.area, splice.pokes[:1])
        second = driver.commit(splice.area, splice.pokes[1:])
        driver.undo(first)
        with pytest.raises(DriverError) as error:
            driver.free(splice.area)
        assert refusal(error) == "EBUSY"
        assert splice.text(driver)[:5] == NOP5
        assert splice.text(driver)[5:] != NOP5
        driver.undo(second)
        driver.quiesce()
        driver.free(splice.area)

    def test_counters_outlive_the_undo(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        driver.undo(driver.commit(splice.area, splice.pokes))
        assert driver.counters(splice.area, splice.chunk, 16).shape == (driver.facts.cpus, 2)

    def test_placed_lists_original_bytes(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        txn = driver.commit(splice.area, splice.pokes)
        rows = sessions.driver(writer=False).placed()
        assert rows["addr"].tolist() == splice.pokes["addr"].tolist()
        assert rows["len"].tolist() == [5, 5]
        assert rows["owner"].tolist() == [Owner.OURS] * 2
        assert rows["original"][:, :5].tobytes() == 2 * NOP5
        driver.undo(txn)
        assert not len(driver.placed())

    def test_traps_are_armed_where_allowed_and_taken_out(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        site = int(nop_sites(driver, 1)[0]) + 5  # the instruction behind an ftrace nop
        area = driver.area(PAGE)
        chunk = driver.percpu(area, 16)
        traps = np.zeros(4, uapi.TRAP)
        traps["addr"] = [site, area.addr, site, site]
        traps["chunk"] = [chunk.index, chunk.index, chunk.index + 1, chunk.index]
        traps["off"] = [8, 0, 0, 16]
        before = driver.read(site, 1)
        number, statuses = driver.arm(area, traps)
        codes = [0, -errno.ENOENT, -errno.ENOENT, -errno.E2BIG]  # no text, no chunk, no room
        assert statuses.tolist() == codes, f"{statuses} at {site:#x}"
        rows = driver.kprobes()
        found = rows[["addr", "len", "owner"]].tolist()
        assert found == [(site, 1, Owner.OURS)], found
        assert rows["original"][0, :1].tobytes() == before
        with pytest.raises(DriverError) as error:
            driver.free(area)
        assert refusal(error) == "EBUSY"
        assert driver.disarm(number).shape == (4,)
        assert driver.read(site, 1) == before
        assert not len(driver.kprobes())
        assert driver.disarm(number).shape == (4,)
        driver.quiesce()
        driver.free(area)

    def test_traps_are_taken_out_by_close(self, sessions: Sessions) -> None:
        reader, writer = sessions.driver(writer=False), sessions.driver()
        site = int(nop_sites(writer, 1)[0]) + 5
        before = reader.read(site, 1)
        area = writer.area(PAGE)
        traps = np.zeros(1, uapi.TRAP)
        traps["addr"], traps["chunk"] = site, writer.percpu(area, 8).index
        assert writer.arm(area, traps)[1].tolist() == [0]
        assert reader.read(site, 1) == b"\xcc" != before
        sessions.close_last()
        assert reader.read(site, 1) == before

    def test_forget_of_placed_transaction_is_refused(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        txn = driver.commit(splice.area, splice.pokes)
        with pytest.raises(DriverError) as error:
            driver.forget(txn)
        assert refusal(error) == "EBUSY"
        assert len(driver.placed()) == 2

    def test_forget_of_undone_transaction_drops_it(self, sessions: Sessions) -> None:
        driver = sessions.driver()
        splice = make_splice(driver)
        txn = driver.commit(splice.area, splice.pokes)
        driver.undo(txn)
        driver.forget(txn)
        with pytest.raises(DriverError) as error:
            driver.states(txn)
        assert refusal(error) == "ENOENT"

    def test_close_restores_everything(self, sessions: Sessions) -> None:
        reader = sessions.driver(writer=False)
        writer = sessions.driver()
        splice = make_splice(writer, MANY)
        writer.commit(splice.area, splice.pokes)
        assert len(reader.placed()) == MANY
        sessions.close_last()
        assert splice.text(reader) == MANY * NOP5
        assert not len(reader.placed())


class DriverContract(HelloContract, ReadContract, AreaContract, CommitContract, UndoContract):
    """All of it; a subclass adds the fixture `target`."""

    @pytest.fixture
    def sessions(self, target: Target[Any]) -> Iterator[Sessions]:
        opened = Sessions(target)
        yield opened
        opened.close()
