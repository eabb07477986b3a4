# SPDX-License-Identifier: GPL-2.0-or-later
"""The tables as users see them: names, calls between functions and images, HTML."""

from __future__ import annotations

import pytest

from kernweave.errors import Reason, RefusedError, UsageError
from pure.kernels import HELPER, TWICE_2, A, B, make_kernel


def test_names_have_the_number_and_kmod_that_points_need() -> None:
    names = ["a", "b#1", "a.cold", "twice#1", "twice#2", "km:m", "km:b"]
    kernel = make_kernel()
    assert kernel.names == names
    assert [kernel.functions[name].name for name in names] == names


def test_functions_are_found_by_other_names_of_theirs() -> None:
    functions = make_kernel().functions
    assert functions["also_b"].addr == functions["vmlinux:b"].addr == B
    assert functions["km:b"].addr == functions["b#2"].addr == HELPER
    assert "also_b" in functions and "b" not in functions and "a+0x5" not in functions


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such", Reason.NO_SUCH_NAME),
        ("other:a", Reason.NO_SUCH_NAME),
        ("twice", Reason.AMBIGUOUS),
        ("b#3", Reason.NO_SUCH_NAME),
    ],
)
def test_name_of_no_function_is_refused_with_a_reason(name: str, reason: Reason) -> None:
    with pytest.raises(RefusedError) as error:
        make_kernel().find(name)
    assert [one[:2] for one in error.value.refused] == [(name, reason)]


@pytest.mark.parametrize("text", ["a*", "a+5", "a@blocks", "0xffffffff81000000", "a b"])
def test_what_is_no_name_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        make_kernel().find(text)


def test_point_at_names_places_inside_functions_only() -> None:
    kernel = make_kernel()
    assert kernel.point_at(A) == "a"
    assert kernel.point_at(HELPER + 5) == "km:b+0x5"
    assert kernel.point_at(A - 1) == f"{A - 1:#x}"
    assert kernel.point_at(TWICE_2 + 0x1000) == f"{TWICE_2 + 0x1000:#x}"


def test_calls_out_have_every_site_and_those_of_the_cold_part() -> None:
    functions = make_kernel().functions
    expected = {
        ("b#1", "call"): ("a+0xb", "a+0x10"),
        ("twice#1", "sibling"): ("a+0x17",),
        ("twice#2", "call"): ("a.cold+0x0",),
    }
    for name in ("a", "a.cold"):
        found = {(call.callee.name, call.kind): call.sites for call in functions[name].calls_out}
        assert found == {key: tuple(map(_at_start, sites)) for key, sites in expected.items()}
    assert [one.name for one in functions["a"].callees] == ["b#1", "twice#1", "twice#2"]


def _at_start(point: str) -> str:
    return point.removesuffix("+0x0")


def test_calls_in_come_from_other_images_too() -> None:
    functions = make_kernel().functions
    found = {(call.caller.name, call.kind): len(call.sites) for call in functions["b#1"].calls_in}
    assert found == {("a", "call"): 2, ("km:m", "call"): 1}
    assert [one.name for one in functions["a"].callers] == ["km:m"]
    assert [call.kind for call in functions["a"].calls_in] == ["sibling"]
    assert [one.name for one in functions["km:b"].callers] == ["km:m"]


def test_indirect_sites_and_the_functions_that_fit_agree() -> None:
    kernel = make_kernel()
    (site,) = kernel.functions["a"].indirect_sites
    assert site.point == "a+0x15"
    (edge,) = kernel.indirect_sites().tolist()
    fitting = {one.name for one in kernel.candidates(edge)}
    # b needs arguments, and they are gone; nothing of its own image leads to a or to m
    assert fitting == {"a", "km:m", "twice#2"}
    assert len(kernel.candidates(edge)) == site.candidates == 3
    assert fitting == {one.name for one in kernel.functions if one.fitting_sites}
    assert kernel.functions["a"].address_taken
    assert not kernel.functions["twice#1"].address_taken


def test_html_has_the_first_rows_and_their_number() -> None:
    kernel = make_kernel()
    shown = kernel.functions._repr_html_()
    assert "<td>km:m</td>" in shown and f"<td>{A:#x}</td>" in shown and "7 rows" in shown
    assert kernel.instructions._repr_html_().count("<tr>") == 11
    assert "taken a.cold" in kernel.functions["a"]._repr_html_()
