# SPDX-License-Identifier: GPL-2.0-or-later
"""Where indirect calls arrive nothing is put, and nothing is displaced from there."""

import numpy as np
import pytest

from exec.asm import NOP5, RET, Item, op, program
from kernweave.analysis.code import Part, build_code
from kernweave.errors import Reason
from kernweave.image.sites import Sites
from kernweave.model.plan import Tactic
from kernweave.splice.place import Rules, place

ADDR = 0xFFFF_FFFF_8100_1000
MOVE = op("MOV_R64_RM64", "rax", "rbx")  # 3 bytes
ENDBR = b"\xf3\x0f\x1e\xfa"


@pytest.mark.parametrize("head", [ENDBR, b"\x66\x0f\x1f\x00", b"\x0f\x1f\x40\xd6"], ids=bytes.hex)
@pytest.mark.parametrize("behind", [NOP5, MOVE], ids=["ftrace", "none"])
def test_endbr_or_what_sealed_it_is_refused(head: bytes, behind: Item) -> None:
    source = program(ADDR, head, behind, MOVE, MOVE, RET)
    code = build_code([Part("f", "f", None, ADDR, source.code, ADDR, True)], Sites())
    found = place(code, np.arange(3), Sites(), Rules())
    assert (found.tactic[0], found.reason[0]) == (None, Reason.TOO_SHORT)
    assert found.tactic[2] is Tactic.GROUP
