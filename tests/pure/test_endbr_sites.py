# SPDX-License-Identifier: GPL-2.0-or-later
"""Where indirect calls arrive nothing is put; the nop that stands for it is one like others."""

import numpy as np
import pytest

from exec.asm import NOP5, RET, Item, op, program
from kernweave.analysis.code import Part, build_code
from kernweave.errors import Reason
from kernweave.image.sites import Sites
from kernweave.model.plan import Tactic
from kernweave.splice.place import Placement, Rules, place

ADDR = 0xFFFF_FFFF_8100_1000
MOVE = op("MOV_R64_RM64", "rax", "rbx")  # 3 bytes
ENDBR = b"\xf3\x0f\x1e\xfa"


SEALED = (b"\x66\x0f\x1f\x00", b"\x0f\x1f\x40\xd6")


def placed(head: bytes, behind: Item, rules: Rules) -> Placement:
    source = program(ADDR, head, behind, MOVE, MOVE, RET)
    code = build_code([Part("f", "f", None, ADDR, source.code, ADDR, True)], Sites())
    return place(code, np.arange(3), Sites(), rules)


@pytest.mark.parametrize("behind", [NOP5, MOVE], ids=["ftrace", "none"])
def test_endbr_is_refused(behind: Item) -> None:
    found = placed(ENDBR, behind, Rules())
    assert (found.tactic[0], found.reason[0]) == (None, Reason.TOO_SHORT)
    assert found.tactic[2] is Tactic.GROUP


@pytest.mark.parametrize("head", SEALED, ids=bytes.hex)
def test_nop_of_a_sealed_endbr_is_displaced_but_never_trapped(head: bytes) -> None:
    assert placed(head, MOVE, Rules()).tactic[0] is Tactic.GROUP
    found = placed(head, MOVE, Rules(tactics=(Tactic.INT3,)))
    assert (found.tactic[0], found.reason[0]) == (None, Reason.TOO_SHORT)
    assert found.tactic[1] is Tactic.INT3
