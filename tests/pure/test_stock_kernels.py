# SPDX-License-Identifier: GPL-2.0-or-later
"""The stock kernels' files, those that were fetched: symbols and tables against their own text."""

import pytest

from kernweave.image.columns import BUG_ARGS
from kernweave.image.orc import OrcReg
from kernweave.image.symbols import make_symbols
from kernweave.image.tables import FREED_AFTER_BOOT, Tables, find_spans, read_tables
from kernweave.image.vmlinuz import KernelFile, open_image
from kernweave.lab.packages import KERNEL_SERIES, fetched_kernel

Stock = tuple[KernelFile, Tables]

#: symbols, functions, then rows of exceptions, orc, bugs, jump labels, static calls and
#: alternatives, by build id
KNOWN = {
    "eb4fbcd037e7253717950bf2b93bd5566f47c56f": (
        94266, 47092, 600, 384849, 7743, 6299, 4085, 4667,
    ),
    "780f2f47538a4f6dd89290f22e78060edf2b1cfb": (
        162756, 52763, 662, 438522, 9596, 9243, 7698, 9431,
    ),
    "f8da1e460d1343b62f4a8880ae5ce63634756e7a": (
        199097, 65297, 787, 409174, 11032, 10197, 10228, 10139,
    ),
}  # fmt: skip
UD2, ENDBR, CALL = b"\x0f\x0b", b"\xf3\x0f\x1e\xfa", b"\xe8"
LOCKS = (b"\xf0", b"\x66\xf0")


@pytest.fixture(scope="module", params=KERNEL_SERIES)
def stock(request: pytest.FixtureRequest) -> Stock:
    tree = fetched_kernel(request.param)
    if tree is None:
        pytest.skip(f"kernel {request.param} was not fetched (kernweave lab up)")
    kernel = open_image(tree.vmlinuz)
    assert kernel.release == tree.release
    return kernel, read_tables(kernel.read, find_spans(kernel.lookup, live=False), kernel.bounds)


def test_stock_kernel_names_its_functions(stock: Stock) -> None:
    kernel, tables = stock
    start, end = kernel.text_start, kernel.text_end
    assert kernel.lookup(["_text", "_stext", "_etext"]) == [start, start, end]
    functions = make_symbols(None, *kernel.symbols, start, end)
    (vfs_read,) = functions.find("vfs_read")
    entry = kernel.read(vfs_read, 9)
    assert entry.removeprefix(ENDBR).startswith(CALL)  # of __fentry__, until boot
    assert vfs_read + entry.index(CALL) in tables.ftrace.tolist()


def test_stock_kernel_has_the_known_numbers(stock: Stock) -> None:
    kernel, tables = stock
    rows = (
        tables.exceptions, tables.orc, tables.bugs, tables.jump_labels, tables.static_calls,
        tables.alternatives,
    )  # fmt: skip
    functions = make_symbols(None, *kernel.symbols, kernel.text_start, kernel.text_end)
    counts = (len(kernel.symbols[1]), len(functions.names), *(len(table.addr) for table in rows))
    assert counts == KNOWN.get(kernel.build_id or "", counts)
    assert set(tables.missing) <= {"call_sites", "endbr_seals"}


def test_stock_kernel_has_the_instructions_that_its_tables_name(stock: Stock) -> None:
    kernel, tables = stock

    def at(addrs: list[int], size: int) -> list[bytes]:
        return [kernel.read(addr, size) for addr in addrs]

    bugs = tables.bugs
    traps = [code == UD2 for code in at(bugs.addr.tolist(), 2)]
    assert traps == ((bugs.flags & BUG_ARGS) == 0).tolist()
    assert set(at(tables.endbr_seals.tolist(), 4)) <= {ENDBR}
    assert all(code.startswith(LOCKS) for code in at(tables.lock_prefixes.tolist(), 2))
    assert set(at(tables.call_sites.tolist(), 1)) <= {CALL}
    assert set(at(tables.ftrace.tolist(), 1)) <= {CALL, b"\x0f"}
    assert set(tables.denylist.tolist()) <= set(kernel.symbols[0].tolist())


def test_stock_kernel_unwinds_from_the_stack_pointer_at_function_entry(stock: Stock) -> None:
    kernel, tables = stock
    (vfs_read,) = kernel.lookup(["vfs_read"])
    orc = tables.orc
    row = int(orc.addr.searchsorted(vfs_read, side="right")) - 1
    assert (orc.sp_reg[row], orc.sp_offset[row]) == (OrcReg.SP, 8)
    assert orc.bp_reg[row] == OrcReg.UNDEFINED


def test_stock_kernel_frees_the_tables_that_are_said_to_be_freed(stock: Stock) -> None:
    kernel, _ = stock
    start, end = kernel.lookup(["__init_begin", "__init_end"])
    spans = find_spans(kernel.lookup, live=False)
    freed = {name for name, span in spans.items() if start <= span[0] < end}
    assert freed | {"lock_prefixes"} == FREED_AFTER_BOOT & spans.keys()
