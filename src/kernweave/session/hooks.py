# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the kernel's own code has to ask the driver: about sites, and about addresses of copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kernweave.analysis.code import Code, Part, build_code
from kernweave.driver.client import Driver
from kernweave.driver.uapi import Fact
from kernweave.errors import UnsupportedError
from kernweave.session.attach import Choice, Known, make_pokes
from kernweave.session.view import KernelView
from kernweave.splice.hook import (
    Hook,
    bind_hooks,
    call_row,
    entry_window,
    hook_row,
    hook_size,
)

_FTRACE_UPDATE = "ftrace_replace_code"
#: it asks for the text at a kprobe's address before anything else
_KPROBE_CHECK = ("arch_prepare_kprobe", "alternatives_text_reserved")
#: through which all text is patched that may be executed meanwhile: pairs of newer kernels first
_PATCHERS = (
    ("smp_text_poke_batch_add", "smp_text_poke_single"),
    ("text_poke_queue", "text_poke_bp"),
)
#: it looks where all tasks are, after the functions that are patched were changed
_LIVEPATCH = "klp_start_transition"
#: where the address of what faulted or trapped is looked up, or printed, and the register it is in
SEARCHES = {"search_exception_tables": "rdi", "find_bug": "rdi", "__warn": "rdx"}


class Hooks:
    """Splices of a session that call the driver; each is made when it is first needed."""

    def __init__(self, driver: Driver, view: KernelView, known: Known) -> None:
        """Remember where to look; nothing is changed yet."""
        self._driver, self._view, self._known = driver, view, known
        self._ftrace = False
        self._kprobes: bool | None = None  # not looked for yet
        self._searches = False
        self._patches = False
        self._spliced: list[tuple[int, int]] = []  # start and end of what was changed

    def prepare(self, choice: Choice) -> bool:
        """Make the hooks that a choice needs; whether one of them is where it has a site."""
        before = len(self._spliced)
        if len(choice.entries.addr):
            self._yield_to_ftrace()
        if any(len(site.insns) > 1 for site in choice.sites):
            self._yield_to_kprobes()
        if any(insn.searched for site in choice.sites for insn in site.insns):
            self._translate()
        starts = np.array([site.addr for site in (*choice.sites, *choice.traps)], np.uint64)
        sizes = [len(site.code) for site in (*choice.sites, *choice.traps)]
        ends = starts + np.array(sizes, np.uint64)
        return any(
            bool(((starts < end) & (ends > start)).any()) for start, end in self._spliced[before:]
        )

    def can_yield_to_ftrace(self) -> bool:
        """Whether nops of ftrace may be used."""
        return self._ftrace or self._ftrace_site() is not None

    def _yield_to_ftrace(self) -> None:
        """Before any nop of ftrace is used: get told when ftrace changes text."""
        if self._ftrace:
            return
        site = self._ftrace_site()
        assert site is not None, "the nop5 tactic is offered only with a hook"
        code, row = site
        self._splice([Hook(code, row, row + 1, self._driver.facts.yield_addr)])
        self._ftrace = True

    def _yield_to_kprobes(self) -> bool:
        """Before several instructions are replaced by one jump: get told of new kprobes.

        Where the kernel has no such place, which is told, a kprobe between them is refused by the
        kernel.
        """
        if self._kprobes is None:
            name, callee = _KPROBE_CHECK
            code, found = self._code(name), self._view.images[0].find(callee)
            row = call_row(code, found[0], self._view.sites) if code and len(found) == 1 else -1
            self._kprobes = code is not None and row >= 0
            if code and self._kprobes:
                self._splice([Hook(code, row, row + 1, self._driver.facts.kprobe_yield_addr)])
        return self._kprobes

    def mirror(self) -> None:
        """Before anything is woven: get told of all that changes text, to change clones as well.

        Raises:
            UnsupportedError: there is no room for a jump where the kernel does so.
        """
        if self._patches:
            return
        hooks = self._patch_hooks()
        if hooks and self._view.images[0].find(_LIVEPATCH):
            hook = self._entry_hook(_LIVEPATCH, self._driver.facts.livepatch_yield_addr)
            hooks = [*hooks, hook] if hook else []
        if not hooks or not self.can_yield_to_ftrace() or not self._yield_to_kprobes():
            raise UnsupportedError("the functions that patch this kernel's text cannot be spliced")
        self._yield_to_ftrace()
        self._splice(sorted(hooks, key=lambda hook: hook.addr))
        self._patches = True

    def _patch_hooks(self) -> list[Hook]:
        """One hook in each function of the first pair that this kernel has; all or none."""
        for names in _PATCHERS:
            found = [self._entry_hook(name, self._driver.facts.text_yield_addr) for name in names]
            hooks = [hook for hook in found if hook]
            if len(hooks) == len(names):
                return hooks
        return []

    def can_translate(self) -> bool:
        """Whether instructions may be displaced that the kernel looks up by their address."""
        return self._searches or len(self._search_hooks()) == len(SEARCHES)

    def _translate(self) -> None:
        """Before such an instruction is displaced: searches for its copy find its native address.

        These hooks stay until the driver has seen that nobody is in a copy.
        """
        if self._searches:
            return
        hooks = self._search_hooks()
        assert len(hooks) == len(SEARCHES), "such instructions are displaced only with all of them"
        self._splice(sorted(hooks, key=lambda hook: hook.addr))
        self._searches = True

    def _search_hooks(self) -> list[Hook]:
        """One hook per search, as far as there is room where the argument is untouched."""
        found = [
            self._entry_hook(name, self._driver.facts.native_addr, register)
            for name, register in SEARCHES.items()
        ]
        return [hook for hook in found if hook]

    def _entry_hook(self, name: str, target: int, translates: str | None = None) -> Hook | None:
        """A hook where a function has done nothing yet; None if there is no room."""
        code = self._code(name)
        if code is None:
            return None
        code = replace(code, landing=code.landing | self._known.landing(code))
        window = entry_window(code, self._view.sites)
        return Hook(code, *window, target, translates) if window else None

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

    def _splice(self, hooks: Sequence[Hook]) -> None:
        area = self._driver.area(hook_size(hooks))
        body, pokes = bind_hooks(hooks, area.addr)
        self._driver.write(area, 0, body)
        self._driver.seal(area)
        self._driver.commit(area, make_pokes(pokes))
        self._spliced += [(hook.addr, hook.addr + len(hook.old)) for hook in hooks]
