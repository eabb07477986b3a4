# SPDX-License-Identifier: GPL-2.0-or-later
"""Names of functions over all images: what a user types, and what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernweave.errors import Reason
from kernweave.image.symbols import Symbols
from kernweave.model.point import PointSpec


@dataclass(frozen=True, slots=True)
class NotOne:
    """Why a name does not mean one function."""

    reason: Reason
    detail: str


def images_of(images: Sequence[Symbols], kmod: str | None) -> list[Symbols]:
    """The images a point may mean: one kmod's, the kernel's (`vmlinux`), or all."""
    return [image for image in images if kmod in (None, image.kmod or "vmlinux")]


def find_one(images: Sequence[Symbols], spec: PointSpec) -> tuple[Symbols, int] | NotOne:
    """The image and address of the function that a point without pattern names."""
    chosen = images_of(images, spec.kmod)
    found = sorted(
        ((addr, image) for image in chosen for addr in image.find(spec.function)),
        key=lambda pair: pair[0],
    )
    if not found:
        near = [name for image in chosen for name in image.near(spec.function)][:3]
        hint = f"; near: {', '.join(near)}" if near else ""
        where = f" in {spec.kmod}" if spec.kmod else ""
        return NotOne(Reason.NO_SUCH_NAME, f"no function {spec.function}{where}{hint}")
    if spec.number is None and len(found) > 1:
        names = ", ".join(f"{spec.function}#{i + 1}" for i in range(len(found)))
        return NotOne(Reason.AMBIGUOUS, f"{len(found)} functions: {names}")
    if (spec.number or 1) > len(found):
        return NotOne(Reason.NO_SUCH_NAME, f"{spec.function} has {len(found)} addresses")
    addr, image = found[(spec.number or 1) - 1]
    return image, addr


def printed_name(images: Sequence[Symbols], image: Symbols, symbol: str, addr: int) -> str:
    """The name of a function such that it means the same when typed."""
    if image.kmod:
        addrs, prefix = image.find(symbol), f"{image.kmod}:"
    else:
        addrs, prefix = [addr for one in images for addr in one.find(symbol)], ""
    number = f"#{sorted(addrs).index(addr) + 1}" if len(addrs) > 1 else ""
    return f"{prefix}{symbol}{number}"
