# SPDX-License-Identifier: GPL-2.0-or-later
"""The judge of stacks takes what is right, and nothing else."""

from __future__ import annotations

import pytest

from stacks import Frame, is_right, parse_stack

NATIVE = """\
[<0>] proc_pid_stack+0xab/0x120
[<0>] vfs_read+0xa5/0x310
[<0>] do_syscall_64+0x5d/0xb0
"""
FRAMES = parse_stack(NATIVE)
CLONES = {
    "kernweave_7": {
        FRAMES[0]: Frame("proc_pid_stack.kw", 0x11E, "kernweave_7"),
        FRAMES[1]: Frame("vfs_read.kw", 0x11F, "kernweave_7"),
    }
}
STACK, READ, SYSCALL = NATIVE.splitlines()
STACK_KW = "[<0>] proc_pid_stack.kw+0x11e/0x200 [kernweave_7]"
READ_KW = "[<0>] vfs_read.kw+0x11f/0x500 [kernweave_7]"


def judge(*lines: str) -> bool:
    return is_right("".join(f"{line}\n" for line in lines), FRAMES, CLONES)


@pytest.mark.parametrize("stack", [STACK, STACK_KW])
@pytest.mark.parametrize("read", [READ, READ_KW])
def test_native_and_woven_frames_in_any_mix_are_right(stack: str, read: str) -> None:
    assert judge(stack, read, SYSCALL)


@pytest.mark.parametrize(
    "lines",
    [
        (),
        (STACK_KW, SYSCALL),  # one is missing
        (STACK_KW, READ_KW),
        (STACK_KW, READ_KW, READ, SYSCALL),
        (READ_KW, STACK_KW, SYSCALL),
        (STACK_KW, "[<0>] 0xffffffffc0123456", SYSCALL),
        (STACK_KW, f"? {READ_KW}", SYSCALL),
        (STACK, READ.replace("a5", "a6"), SYSCALL),
        (STACK, READ_KW.replace("11f", "120"), SYSCALL),
        (STACK, READ_KW.replace("_7", "_8"), SYSCALL),
        (STACK, READ_KW.replace("kernweave_7", "kernweave"), SYSCALL),
        (STACK, READ_KW.replace(".kw", ""), SYSCALL),
        (STACK, READ_KW.replace("vfs_read", "vfs_write"), SYSCALL),
    ],
    ids=range(13),
)
def test_anything_else_is_wrong(lines: tuple[str, ...]) -> None:
    assert not judge(*lines)
