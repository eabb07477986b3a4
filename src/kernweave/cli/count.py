# SPDX-License-Identifier: GPL-2.0-or-later
"""`kernweave count`: how often does each point run?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from kernweave import connect
from kernweave.cli.files import check_path, write_rows
from kernweave.cli.output import (
    print_error,
    print_json,
    print_refused,
    print_table,
    print_warning,
    progress,
)
from kernweave.errors import UsageError
from kernweave.model.plan import Tactic
from kernweave.session.attach import overwrite_dead
from kernweave.session.commands import Completed
from kernweave.session.counts import Count, Counts
from kernweave.session.engines import ENGINES
from kernweave.session.session import Session
from kernweave.session.woven import CLONE

END_SCHEMA = "kernweave.end/1"
_SHOWN_ROWS = 30
_TACTICS = ", ".join((*Tactic, CLONE))

#: options whose mechanism is not there yet
_LATER = ("--scope", "--syscall", "--root", "--pid", "--follow")


class _CountCommand(click.Command):
    """Takes the command behind `--` along, which click must not parse."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        for option in args:
            if option.split("=", 1)[0] in _LATER:
                raise click.UsageError(f"{option.split('=', 1)[0]} is not there yet")
        return super().make_context(info_name, args, parent, **extra)


@click.command(cls=_CountCommand)
@click.argument("points", nargs=-1, required=True, metavar="POINT...")
@click.option("--for", "seconds", type=float, metavar="SECONDS", help="Count for so long.")
@click.option("--partial", is_flag=True, help="Place what can be placed, refuse the rest.")
@click.option("--tactic", metavar="A,B", help=f"Allow only these tactics: {_TACTICS}.")
@click.option("--no-trap", is_flag=True, help="Refuse points where only a trap fits.")
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    help="splice: at the points themselves; weave: in clones of their functions; auto: weave "
    "functions of which edges are asked for, or where a jump does not fit everywhere.",
)
@click.option(
    "--poison",
    is_flag=True,
    help="Overwrite what is dead before each counter, so that wrong liveness shows; labs only.",
)
@click.option("--all", "every", is_flag=True, help="Print every row, not the first 30.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.option(
    "-o",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write every row to FILE: .jsonl, .csv or .parquet.",
)
@click.pass_obj
def count(
    obj: dict[str, Any],
    points: tuple[str, ...],
    seconds: float | None,
    partial: bool,
    tactic: str | None,
    no_trap: bool,
    engine: str,
    poison: bool,
    every: bool,
    as_json: bool,
    file: Path | None,
) -> int:
    """Count how often each POINT runs, in the whole system, while CMD runs.

    \b
    Examples:
      kernweave count vfs_read -- dd if=/dev/zero of=/dev/null count=1000
      kernweave count 'vfs_read@blocks' --for 2
      kernweave count vfs_read+0x31 'tcp_*' --json -- curl localhost
      kernweave count vfs_read@edges --all -- dd if=/dev/zero of=/dev/null count=1000
    \b
    POINT:  [kmod:]function[#N][+0xOFF[->[part]+0xOFF] | @selector]  or  0xADDR
            selectors: entry (default) return insns blocks edges calls loads stores
            edges, as 'f+0x36->+0x3c', are counted by weaving only
    \b
    CMD follows `--`, runs on the target, and its exit status is passed on. Without CMD and
    --for, counting goes on until Ctrl-C.
    """  # noqa: D301
    _check(obj["target"], seconds, file, poison)
    tactics = _tactics(tactic, no_trap, engine)
    with connect(obj["target"], progress=progress) as session:
        hits = _attach(session, points, engine, partial, tactics, poison)
        done = _watch(session, hits, obj["command"], seconds)
        report = _print_json if as_json else _print_human
        report(session, hits, done, every)
        if file is not None:
            write_rows(file, hits, end_row(session, hits, done))
    _print_unrestored(hits)
    return _status(done, hits)


def _check(target: str, seconds: float | None, file: Path | None, poison: bool) -> None:
    """Find wrong options before anything is connected."""
    if seconds is not None and seconds <= 0:
        raise UsageError(f"--for {seconds:g} is no time", help="give a number of seconds above 0")
    if file is not None:
        check_path(file)
    if poison and target.partition(":")[0] != "lab":
        raise UsageError(
            f"--poison may crash the kernel: not on {target}",
            help="use a lab: kernweave --target lab count ...",
        )


def _tactics(names: str | None, no_trap: bool, engine: str) -> list[str] | None:
    """The tactics allowed, None: all; a trap that is asked for and forbidden is an error."""
    chosen = names.split(",") if names else None
    if not no_trap or engine == "weave":
        return chosen
    if chosen and Tactic.INT3 in chosen:
        raise UsageError("--no-trap and --tactic int3 contradict each other")
    jumps = [tactic.value for tactic in Tactic if tactic is not Tactic.INT3]
    return chosen or (jumps if engine == "splice" else [*jumps, CLONE])


def _attach(
    session: Session,
    points: tuple[str, ...],
    engine: str,
    partial: bool,
    tactics: list[str] | None,
    poison: bool,
) -> Counts:
    """Put the counters in; interrupted, those that were placed, taken out again."""
    clobber = overwrite_dead if poison else None
    try:
        return session.count(
            *points, engine=engine, partial=partial, tactics=tactics, clobber=clobber
        )
    except KeyboardInterrupt:  # once something is placed, an interrupt is the normal end
        if not session.attachments:
            raise
        hits = session.attachments[-1]
        hits.detach()
        return hits


def _watch(
    session: Session, hits: Counts, command: list[str] | None, seconds: float | None
) -> Completed | None:
    """Let the counters count, and take them out; the command that ran meanwhile, if any."""
    _warn_traps(hits)
    with hits:
        return _wait(session, command, seconds) if hits.attached else None


def _warn_traps(hits: Counts) -> None:
    """A slow tactic is never silent."""
    traps = hits.tactics().get(Tactic.INT3, 0)
    if traps:
        print_warning(
            f"{traps:,} of {len(hits.placed):,} points trap, about 500 instructions per hit",
            help="--no-trap refuses them",
        )


def _wait(session: Session, command: list[str] | None, seconds: float | None) -> Completed | None:
    if command:
        return session.run(command, limit_s=seconds)
    session.sleep(seconds)
    return None


def _print_unrestored(hits: Counts) -> None:
    if hits.unrestored:
        print_error(
            f"{len(hits.unrestored)} sites are armed by somebody else and stay for now",
            help="they are restored by themselves when the other side leaves",
        )


def _status(done: Completed | None, hits: Counts) -> int:
    if hits.unrestored:
        return 125 if done else 1
    return done.exit if done else 0


def end_row(session: Session, hits: Counts, done: Completed | None) -> dict[str, Any]:
    """The object of kernweave.end/1."""
    command = None
    if done is not None:
        command = {"argv": done.argv, "exit": done.exit, "signal": done.signal}
    return {
        "schema": END_SCHEMA,
        "requested": len(hits.placed) + len(hits.refused),
        "placed": len(hits.placed),
        "refused": [
            {"point": one.point, "reason": one.reason.value, "detail": one.detail}
            for one in hits.refused
        ],
        "tactics": hits.tactics(),
        "hits": int(hits.hits().sum()),
        "missed": int(hits.missed().sum()),
        "in_flight": hits.in_flight,
        "evicted": hits.evicted,
        "text_restored": hits.text_restored,
        "unrestored": [f"{addr:#x}" for addr in hits.unrestored],
        "duration_ns": hits.duration_ns,
        "command": command,
        "target": session.target,
        "kernel": session.kernel,
    }


def _print_json(session: Session, hits: Counts, done: Completed | None, every: bool) -> None:
    for row in hits.rows():
        print_json(row)
    print_json(end_row(session, hits, done))
    sys.stdout.flush()


def _print_human(session: Session, hits: Counts, done: Completed | None, every: bool) -> None:
    rows = sorted(hits.rows(), key=lambda row: -row.hits)
    shown = rows if every else rows[:_SHOWN_ROWS]
    cells = [(_hits(row), row.point, row.tactic) for row in shown]
    print_table(("hits", "point", "tactic"), cells, (True, False, False))
    if len(shown) < len(rows):
        print(f"... {len(rows) - len(shown):,} more rows: add --all")
    print_refused(hits.refused)
    print(_summary(hits))


def _hits(row: Count) -> str:
    return f"{row.hits:,}" if row.exact else f">={row.hits:,}"


def _summary(hits: Counts) -> str:
    used = ", ".join(f"{tactic} {number:,}" for tactic, number in hits.tactics().items())
    text = "text restored" if hits.text_restored else "TEXT NOT RESTORED"
    evicted = f", {hits.evicted} given back" if hits.evicted else ""
    inside = f", {hits.in_flight} tasks asleep inside" if hits.in_flight else ""
    total = len(hits.placed) + len(hits.refused)
    noun = "point" if total == 1 else "points"
    slow = " (slow)" if Tactic.INT3 in hits.tactics() else ""
    missed = int(hits.missed().sum())
    rest = f"{len(hits.refused):,} refused, {missed:,} missed{evicted}{inside}; {text}"
    return f"{total:,} {noun}: {used}{slow}; {rest}"
