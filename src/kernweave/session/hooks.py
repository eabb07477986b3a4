# SPDX-License-Identifier: GPL-2.0-or-later
"""Where others are about to look at the text: there the driver gives kernweave's sites back."""

from __future__ import annotations

import numpy as np

from kernweave.analysis.code import Code, Part, build_code
from kernweave.driver.client import Driver
from kernweave.driver.uapi import Fact
from kernweave.session.attach import make_pokes
from kernweave.session.view import KernelView
from kernweave.splice.hook import bind_hook, call_row, hook_row, hook_size

_FTRACE_UPDATE = "ftrace_replace_code"
#: it asks for the text at a kprobe's address before anything else
_KPROBE_CHECK = ("arch_prepare_kprobe", "alternatives_text_reserved")


class Hooks:
    """Splices of a session that call the driver; each is made when it is first needed."""

    def __init__(self, driver: Driver, view: KernelView) -> None:
        """Remember where to look; nothing is changed yet."""
        self._driver, self._view = driver, view
        self._ftrace = False
        self._kprobes = False

    def can_yield_to_ftrace(self) -> bool:
        """Whether nops of ftrace may be used."""
        return self._ftrace or self._ftrace_site() is not None

    def yield_to_ftrace(self) -> None:
        """Before any nop of ftrace is used: get told when ftrace changes text."""
        if self._ftrace:
            return
        site = self._ftrace_site()
        assert site is not None, "the nop5 tactic is offered only with a hook"
        self._splice(*site, self._driver.facts.yield_addr)
        self._ftrace = True

    def yield_to_kprobes(self) -> None:
        """Before several instructions are replaced by one jump: get told of new kprobes.

        Where the kernel has no such place, a kprobe between them is refused by the kernel.
        """
        if self._kprobes:
            return
        self._kprobes = True
        name, callee = _KPROBE_CHECK
        code, found = self._code(name), self._view.images[0].find(callee)
        row = call_row(code, found[0], self._view.sites) if code and len(found) == 1 else -1
        if code and row >= 0:
            self._splice(code, row, self._driver.facts.kprobe_yield_addr)

    def _ftrace_site(self) -> tuple[Code, int] | None:
        if not self._driver.facts.flags & Fact.FTRACE_YIELD:
            return None
        code = self._code(_FTRACE_UPDATE)
        row = hook_row(code, 0, self._view.sites) if code else -1
        return (code, row) if code and row >= 0 else None

    def _code(self, name: str) -> Code | None:
        """A function of the kernel; None if there is none, or several, of that name."""
        view = self._view
        found = view.images[0].find(name)
        if len(found) != 1:
            return None
        bounds = view.images[0].bounds(found[0])
        assert bounds is not None
        start, end = (np.array([addr], np.uint64) for addr in bounds)
        text = view.read_text(start, end)[0]
        part = Part(name, name, None, bounds[0], text, bounds[0], False)
        return build_code([part], view.sites)

    def _splice(self, code: Code, row: int, target: int) -> None:
        area = self._driver.area(hook_size(code, row))
        body, pokes = bind_hook(code, row, target, area.addr)
        self._driver.write(area, 0, body)
        self._driver.seal(area)
        self._driver.commit(area, make_pokes(pokes))
