# SPDX-License-Identifier: GPL-2.0-or-later
"""Machine code and masks as text."""

from __future__ import annotations

import iced_x86 as iced

from kernweave.x86.effect import FLAG_NAMES, FLAGS_MASK, FLAGS_SHIFT, REG_NAMES


def disassemble(code: bytes, addr: int, target: str | None = None) -> str:
    """One instruction in Intel syntax.

    Args:
        code: its bytes.
        addr: its run-time address.
        target: what a direct branch or call leads to, written instead of the address.

    Example:
        >>> disassemble(bytes.fromhex("e800000000"), 0x1000, "memcpy")
        'call memcpy'
    """
    ins = iced.Decoder(64, code, ip=addr).decode()
    formatter = iced.Formatter(iced.FormatterSyntax.NASM)
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    formatter.uppercase_hex = False
    formatter.show_branch_size = formatter.branch_leading_zeros = False
    if target is None:
        return formatter.format(ins)
    return f"{formatter.format_mnemonic(ins)} {target}"


def mask_names(mask: int) -> str:
    """Registers and flags of a mask; all six status flags are called `flags`.

    Example:
        >>> mask_names(0x3F0801)
        'rax r11 flags'
    """
    names = [name for bit, name in enumerate(REG_NAMES) if mask >> bit & 1]
    flags = [name for bit, name in enumerate(FLAG_NAMES) if mask >> FLAGS_SHIFT + bit & 1]
    return " ".join(names + (["flags"] if mask & FLAGS_MASK == FLAGS_MASK else flags))
