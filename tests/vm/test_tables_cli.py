# SPDX-License-Identifier: GPL-2.0-or-later
"""`analyze`, `callers`, `callees`, `query`, and what `list` and `show` take from the tables."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from command import Kernweave, rows

from kernweave import connect
from kernweave.lab.machine import Lab
from kernweave.session.analysis import Analysis


@pytest.fixture
def run(machine: Lab) -> Kernweave:
    return Kernweave(machine.name)


def test_analyze_counts_rows_and_comes_from_the_cache_the_second_time(run: Kernweave) -> None:
    run("analyze")
    (found,) = rows(run("analyze", "--json"))
    assert found["schema"] == "kernweave.analyze/1" and found["from_cache"]
    sizes = [found[name] for name in ("functions", "blocks", "edges", "instructions")]
    assert sizes[0] > 10_000 and sizes == sorted(sizes)
    assert 1_000 < found["indirect_sites"] < found["calls"] < found["edges"]
    assert 0 < found["kernel_seconds"] < found["seconds"] and found["peak_bytes"] > 1 << 26
    assert min(found["no_save"].values()) > 0.9


def test_analysis_is_of_native_text_while_something_is_placed(machine: Lab, tmp_path: Path) -> None:
    with connect(f"lab:{machine.name}") as k:
        analysis = Analysis(k.view, tmp_path, print)
        with k.count("vfs_*", partial=True) as hits:
            analysed = analysis.kernel
            assert len(hits.placed) > 50
        k.view.refresh()
        again = Analysis(k.view, tmp_path, print).kernel
        assert not analysed.from_cache and again.from_cache
        assert not again.changed.any()


def test_callers_have_the_call_sites_that_count_finds(run: Kernweave) -> None:
    *calls, end = rows(run("callers", "vfs_read", "--json"))
    assert {one["schema"] for one in calls} == {"kernweave.call/1"}
    assert "ksys_read" in {one["caller"] for one in calls}
    sites = [site for one in calls for site in one["sites"]]
    assert end["schema"] == "kernweave.callers/1" and end["sites"] == len(sites)
    verdicts = rows(run("sites", *sites, *(f"{one['caller']}@calls" for one in calls), "--json"))
    assert {one["addr"] for one in verdicts[:-1] if one["kind"] == "insn"} <= {
        one["addr"] for one in verdicts[:-1] if one["kind"] == "call"
    }


def test_callers_of_an_operation_say_that_its_address_is_taken(run: Kernweave) -> None:
    assert "may be called indirectly" in run("callers", "shmem_file_read_iter").stdout


def test_callees_cross_from_a_kmod_into_the_kernel_and_other_kmods(run: Kernweave) -> None:
    *calls, end = rows(run("callees", "9p:v9fs_mount", "--json"))
    names = {one["callee"] for one in calls}
    assert {"9p:v9fs_session_init", "sget"} <= names
    assert any(name.startswith("9pnet:") for name in names)
    assert end == {
        "schema": "kernweave.callees/1",
        "function": "9p:v9fs_mount",
        "callees": len(names),
        "sites": sum(len(one["sites"]) for one in calls),
        "indirect_sites": 0,
    }
    verdicts = rows(run("sites", *names, "--json"))[:-1]
    assert not {one["reason"] for one in verdicts} & {"no_such_name", "ambiguous"}


def test_callees_indirect_sites_stand_apart(run: Kernweave) -> None:
    *_, end = lines = run("callees", "vfs_read").stdout.splitlines()
    indirect = [line for line in lines if line.startswith("indirect at vfs_read+0x")]
    assert indirect and end.endswith(f"; {len(indirect)} indirect call sites")


def test_name_of_no_single_function_is_one_error(run: Kernweave) -> None:
    assert run("callers", "no_such", status=1).stderr.splitlines() == [
        "error: cannot find no_such: no function no_such",
        "  help: check the spelling: kernweave list GLOB",
    ]


def test_list_has_prototypes_within_80_columns(run: Kernweave) -> None:
    found = {one["function"]: one["prototype"] for one in rows(run("list", "vfs_*", "--json"))}
    assert found["vfs_read"].startswith("ssize_t vfs_read(struct file *file, char *buf, ")
    text = run("list", "vfs_*").stdout
    assert f"    {found['vfs_read']}\n" in text
    lines = text.splitlines()
    assert max(len(line) for line in lines if line.startswith(" ")) < 80
    folded = {line.strip() for line in lines if line.startswith(" " * 8)}
    assert folded and not any(line.startswith(("*", ",")) for line in folded)


def test_show_edges_lead_to_instructions_that_it_shows(run: Kernweave) -> None:
    shown = rows(run("show", "vfs_read", "--json"))
    assert {one["schema"] for one in shown} == {"kernweave.insn/1"}
    edges = [edge for one in shown for edge in one["edges"]]
    kinds = {edge["kind"] for edge in edges}
    assert {"fall", "taken", "call", "indirect", "return"} <= kinds
    leaders = {one["addr"] for one in shown if one["leader"]}
    inside = {edge["to_addr"] for edge in edges if edge["kind"] in ("fall", "taken")}
    assert inside <= leaders
    assert {"rw_verify_area"} <= {edge["to"] for edge in edges if edge["kind"] == "call"}


def test_show_points_are_those_of_sites_in_kmods_and_cold_parts(run: Kernweave) -> None:
    name = "9p:v9fs_session_init"
    shown = rows(run("show", name, "--json"))
    assert [one["point"] for one in shown] == [
        one["point"] for one in rows(run("sites", f"{name}@insns", "--json"))[:-1]
    ]
    functions = [one["function"] for one in shown]
    assert {"v9fs_session_init", "v9fs_session_init.cold"} == set(functions)
    cold = rows(run("show", f"{name}.cold", "--json"))
    assert [one["addr"] for one in cold] == [
        one["addr"] for one in shown if one["function"].endswith(".cold")
    ]


def test_show_dot_is_a_graph_and_svg_needs_graphviz(run: Kernweave, tmp_path: Path) -> None:
    graph = run("show", "vfs_read", "--dot").stdout
    assert graph.startswith('digraph "vfs_read" {\n') and graph.endswith("}\n")
    no_dot = {**os.environ, "PATH": str(tmp_path)}
    done = run("show", "vfs_read", "--svg", str(tmp_path / "x.svg"), status=3, env=no_dot)
    assert "apt install graphviz" in done.stderr and not (tmp_path / "x.svg").exists()
    assert "exclude each other" in run("show", "vfs_read", "--dot", "--json", status=2).stderr


def test_query_rows_are_those_of_the_tables(run: Kernweave, tmp_path: Path) -> None:
    sql = (
        "select point(f.row, f.addr) point, f.addr, count(*) n from blocks b "
        "join functions f on b.function = f.row where f.name = 'vfs_read' group by all"
    )
    (found,) = rows(run("query", sql, "--json", "-o", str(tmp_path / "rows.csv")))
    (shown, *_) = rows(run("sites", "vfs_read", "--json"))
    blocks = rows(run("sites", "vfs_read@blocks", "--json"))[:-1]
    assert found == {
        "schema": "kernweave.row/1",
        "point": "vfs_read",
        "addr": shown["addr"],
        "n": len(blocks),
    }
    head, row = (tmp_path / "rows.csv").read_text().splitlines()
    assert head == "point,addr,n" and row == f"vfs_read,{int(found['addr'], 16)},{len(blocks)}"


def test_query_says_how_many_rows_it_left_out(run: Kernweave) -> None:
    lines = run("query", "select row, addr from functions limit 1000").stdout.splitlines()
    assert len(lines) == 32 and lines[-1] == "... 970 more rows: add --all"


def test_query_that_is_no_sql_is_one_usage_error(run: Kernweave) -> None:
    error = run("query", "select nope from blocks", status=2).stderr
    assert error.startswith('error: cannot run the query: referenced column "nope" not found')
    assert "end it in" in run("query", "select 1", "-o", "rows.xlsx", status=2).stderr
