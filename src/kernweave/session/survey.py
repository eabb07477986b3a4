# SPDX-License-Identifier: GPL-2.0-or-later
"""What could be done, without doing it: verdicts on points, lists of functions."""

from __future__ import annotations

from dataclasses import dataclass

from kernweave.image.btf import Btf
from kernweave.image.btf_text import prototype
from kernweave.model.plan import Point
from kernweave.model.point import PointSpec
from kernweave.session.attach import Choice
from kernweave.session.names import images_of, printed_name
from kernweave.session.resolve import Resolved
from kernweave.session.view import KernelView

SITE_SCHEMA = "kernweave.site/1"


@dataclass(frozen=True, slots=True)
class SiteVerdict:
    """One point and what would happen to it: the fields of kernweave.site/1."""

    schema: str
    point: str
    addr: str | None
    kmod: str | None
    function: str | None
    offset: int | None
    kind: str | None
    tactic: str | None
    reason: str | None
    detail: str | None
    site_addr: str | None
    site_bytes: str | None


@dataclass(frozen=True, slots=True)
class FunctionInfo:
    """A function: name as a point, kmod, run-time address, bytes up to the next symbol, symbol."""

    name: str
    kmod: str | None
    addr: int
    size: int
    symbol: str


def verdicts(resolved: Resolved, choice: Choice) -> list[SiteVerdict]:
    """One verdict per point, in the order asked for; points that do not exist come last."""
    sites = {
        (point.addr, point.kind): choice.sites[row]
        for point, row in zip(choice.points, choice.site.tolist(), strict=True)
    }
    refused = {one.point: one for one in choice.refused}
    found = []
    for point, row in zip(resolved.points, resolved.rows.tolist(), strict=True):
        site = sites.get((point.addr, point.kind))
        no = None if site else refused[point.text]
        found.append(
            SiteVerdict(
                *_place(point),
                tactic=site.tactic.value if site else None,
                reason=no.reason.value if no else None,
                detail=no.detail if no else None,
                site_addr=f"{site.addr:#x}" if site else None,
                site_bytes=site.code.hex() if site else resolved.code.raw(row).hex(),
            )
        )
    nowhere = (None,) * 5
    found += [
        SiteVerdict(
            SITE_SCHEMA, one.point, *nowhere, None, one.reason.value, one.detail, None, None
        )
        for one in resolved.refused
    ]
    return found


def _place(point: Point) -> tuple[str, str, str, str | None, str, int, str]:
    return (
        SITE_SCHEMA,
        point.text,
        f"{point.addr:#x}",
        point.kmod,
        point.function,
        point.offset,
        point.kind.value,
    )


def list_functions(view: KernelView, spec: PointSpec) -> list[FunctionInfo]:
    """Functions that match a glob; the names are points."""
    found = []
    for image in images_of(view.images, spec.kmod):
        for symbol, addr in image.match(spec.function):
            bounds = image.bounds(addr) or (addr, addr)
            name = printed_name(view.images, image, symbol, addr)
            found.append(FunctionInfo(name, image.kmod, addr, bounds[1] - addr, symbol))
    return found


def prototype_of(btf: Btf | None, kmod: str | None, symbol: str) -> str | None:
    """C declaration of a function; None for a kmod's, and where BTF has none or several."""
    found = btf.find_function(symbol) if btf and kmod is None else None
    return prototype(btf, found) if btf and found is not None else None
