# SPDX-License-Identifier: GPL-2.0-or-later
"""results/hit_cost.json for people: a table and a chart."""

from __future__ import annotations

import json
from typing import Any

from _record import RESULTS

_COLOURS = {"kernweave": "#1f5fa8", "BPF": "#6b8f3c", "": "#9a9a9a"}
_LEAST_NS = 1.0


def _known(estimate: dict[str, float]) -> bool:
    """Whether the interval excludes zero."""
    return estimate["low"] > 0


# ---- table -------------------------------------------------------------------------------------


def write_table(result: dict[str, Any]) -> None:
    """Write results/hit_cost.md."""
    native = result["native_per_call"]
    lines = [
        f"# What one hit costs at `{result['function']}`",
        "",
        f"Linux {result['kernel']} under QEMU's TCG; medians, 95% bootstrap intervals in brackets.",
        f"Natively one call of `read` takes {native['instructions']['median']:.0f} instructions "
        f"and {native['wall_ns']['median']:.0f} ns. Written by bench/hit_cost.py at "
        f"{result['commit']}.",
        "",
        "| counter | at | instructions added | wall ns added |",
        "|---|---|---:|---:|",
        *(_row(name, one) for name, one in result["methods"].items()),
        "",
        *by_tactic(result["added_instructions_per_hit"]),
        "",
        *_latency(result["one_point_ms"]),
    ]
    (RESULTS / "hit_cost.md").write_text("\n".join(lines) + "\n")


def _row(name: str, one: dict[str, Any]) -> str:
    wall = one["wall_ns"]
    cells = [
        name,
        f"`{one['point']}`",
        f"{one['instructions']['median']:.1f}",
        f"{wall['median']:.0f} [{wall['low']:.0f}, {wall['high']:.0f}]",
    ]
    return f"| {' | '.join(cells)} |"


def by_tactic(added: dict[str, Any]) -> list[str]:
    """Points all along some system calls; what is saved, and what hosts add, is told apart."""
    apart = ("spills", "springboards")
    kinds = {tactic: one for tactic, one in added.items() if tactic not in apart}
    kinds |= {f"saves {what.replace('+', ' and ')}": one for what, one in added["spills"].items()}
    return [
        "Instructions added per hit at points all along four system calls, where nothing is saved",
        "unless it says so:",
        "",
        "| tactic | points | median | most |",
        "|---|---:|---:|---:|",
        *(
            f"| {name} | {one['points']} | {one['median']:.1f} | {one['max']:.1f} |"
            for name, one in kinds.items()
        ),
        "",
        "Springboards along the same calls, one at a time, nothing saved. Neighbours displaced to",
        "give one room (its host) cost whoever runs through them, whether the point is hit or not:",
        "that is measured with the short jump left out, and apart; `most together` is both, as",
        "is `kernweave springboard` above.",
        "",
        "| springboard | points | median | most | its host: median | most | most together |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(_springboard_row(kind, one) for kind, one in added["springboards"].items()),
    ]


def _springboard_row(kind: str, one: dict[str, Any]) -> str:
    keys = ("median", "max", "host_median", "host_max", "whole_max")
    cells = [kind, str(one["points"]), *(f"{one[key]:.1f}" for key in keys)]
    return f"| {' | '.join(cells)} |"


def _latency(latency: dict[str, Any]) -> list[str]:
    requests = ", ".join(
        f"{name} {value:.1f}" for name, value in list(latency["requests"].items())[:6]
    )
    return [
        f"One point in and out (`{latency['point']}`, {latency['runs']} times), milliseconds:",
        "",
        "| what | p50 | p99 |",
        "|---|---:|---:|",
        *(
            f"| {what} | {latency[key]['p50']:.2f} | {latency[key]['p99']:.2f} |"
            for key, what in (
                ("commit", "the text changes (`driver.commit`)"),
                ("undo", "the text changes back (`driver.undo`)"),
                ("round_trip", "a request that does nothing, for comparison"),
                ("count", "all of `Session.count()`"),
                ("detach", "all of `detach()`, with its grace period"),
            )
        ),
        "",
        f"Of one attach and detach, at the median: {requests} ms.",
    ]


# ---- chart -------------------------------------------------------------------------------------


def draw_chart(result: dict[str, Any]) -> None:
    """Write results/hit_cost.png, or say what is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no chart without matplotlib: pip install -e '.[bench]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods = dict(
        sorted(result["methods"].items(), key=lambda item: -item[1]["instructions"]["median"])
    )
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10})
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(10.5, 5.2))
    _bars(left, methods, "instructions")
    _bars(right, methods, "wall_ns")
    left.set_xlim(1, 3000)
    right.set_xlim(_LEAST_NS, 20000)
    left.set_xlabel("instructions added per hit (log scale)")
    right.set_xlabel("wall ns added per hit, 95% interval (log scale)")
    figure.suptitle(
        f"Cost of counting one arrival at {result['function']}, Linux {result['kernel']}, QEMU TCG",
        fontsize=12, x=0.01, ha="left",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 1))
    figure.savefig(RESULTS / "hit_cost.png", dpi=120, metadata={"Software": None})
    plt.close(figure)


def _bars(axes: Any, methods: dict[str, Any], measure: str) -> None:
    axes.set_xscale("log")
    for row, (name, one) in enumerate(methods.items()):
        estimate = one[measure]
        colour = _COLOURS[next(head for head in _COLOURS if name.startswith(head))]
        if _known(estimate):
            axes.barh(row, estimate["median"], color=colour, height=0.66)
            text, end = f"{estimate['median']:,.0f}", estimate["high"]
            if estimate["high"] > estimate["low"]:
                axes.plot(
                    [max(estimate["low"], _LEAST_NS), estimate["high"]], [row, row],
                    color="#222222", linewidth=1.2,
                )  # fmt: skip
        else:
            end = max(estimate["high"], 2 * _LEAST_NS)
            axes.barh(row, end, color="none", edgecolor=colour, height=0.66, linestyle=":")
            text = f"< {end:,.0f}, not told from 0"
        axes.text(end * 1.12, row, text, va="center", fontsize=9)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
    axes.set_yticks(range(len(methods)), list(methods))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


if __name__ == "__main__":
    last = json.loads((RESULTS / "hit_cost.json").read_text())
    write_table(last)
    draw_chart(last)
