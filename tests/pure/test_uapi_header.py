# SPDX-License-Identifier: GPL-2.0-or-later
"""kw_uapi.h and driver/uapi.py say the same: the compiler is asked about every name in both."""

from __future__ import annotations

import re
import subprocess
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest

from kernweave.driver import uapi

HEADER = Path(uapi.__file__).parent / "csrc" / "kmod" / "kw_uapi.h"
NOT_FOR_PYTHON = {"KW_UAPI_H", "KW_IOC_CALL"}  # include guard; only the agent calls ioctl
RENAMED = {"VERSION": "KW_UAPI_VERSION"}

Numbers = dict[str, tuple[int, int]]


def c_names(header: str) -> tuple[dict[str, list[str]], list[str]]:
    """Struct name -> field names, and the names of enum values and of macros."""
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    structs = {
        name: re.findall(r"(\w+)(?:\[\w+\])?;", body)
        for name, body in re.findall(r"struct (\w+) \{(.*?)\};", header, re.DOTALL)
    }
    enums = re.findall(r"enum \w+ \{(.*?)\};", header, re.DOTALL)
    constants = [name for body in enums for name in re.findall(r"(\w+)\s*=", body)]
    constants += re.findall(r"#define (\w+)", header)
    return structs, [name for name in constants if name not in NOT_FOR_PYTHON]


def c_program(structs: dict[str, list[str]], constants: list[str]) -> str:
    lines = ["#include <stddef.h>", "#include <stdio.h>", '#include "kw_uapi.h"']
    lines.append('#define SHOW(name, a, b) printf(name " %lld %lld\\n", (long long)(a), b)')
    lines.append("int main(void) {")
    lines += [f'SHOW("{name}", {name}, 0LL);' for name in constants]
    for struct, fields in structs.items():
        lines.append(f'SHOW("{struct}", sizeof(struct {struct}), 0LL);')
        lines += [
            f'SHOW("{struct}.{field}", offsetof(struct {struct}, {field}), '
            f"(long long)sizeof(((struct {struct} *)0)->{field}));"
            for field in fields
        ]
    return "\n".join([*lines, "return 0; }\n"])


def header_numbers(header: str, folder: Path) -> Numbers:
    """Name -> value, struct -> size, field -> offset and size; as gcc sees them."""
    (folder / "kw_uapi.h").write_text(header)
    (folder / "show.c").write_text(c_program(*c_names(header)))
    subprocess.run(
        ["gcc", "-Wall", "-Werror", "-o", "show", "show.c"], cwd=folder, check=True, text=True
    )
    shown = subprocess.run([folder / "show"], check=True, text=True, capture_output=True).stdout
    rows = [line.split() for line in shown.splitlines()]
    return {name: (int(a), int(b)) for name, a, b in rows}


def python_constants() -> Numbers:
    found = {
        RENAMED.get(name, f"KW_{name}"): (int(value), 0)
        for name, value in vars(uapi).items()
        if name.isupper() and isinstance(value, int)
    }
    enums: tuple[tuple[str, type[IntEnum]], ...] = (
        ("KW", uapi.State),
        ("KW", uapi.Owner),
        ("KW_OP", uapi.Op),
        ("KW", uapi.PatchedKind),
        ("KW", uapi.Side),
    )
    for prefix, enum in enums:
        found |= {f"{prefix}_{member.name}": (int(member), 0) for member in enum}
    found |= {f"KW_POKE_{bit.name}": (int(bit), 0) for bit in uapi.PokeFlag}
    return found | {f"KW_FACT_{bit.name}": (int(bit), 0) for bit in uapi.Fact}


def python_structs() -> Numbers:
    found: Numbers = {}
    for name, dtype in uapi.STRUCTS.items():
        found[name] = (dtype.itemsize, 0)
        for field, (kind, offset, *_) in (dtype.fields or {}).items():
            found[f"{name}.{field}"] = (offset, kind.itemsize)
    return found


def differences(header: Numbers, python: Numbers) -> dict[str, tuple[object, object]]:
    names = header.keys() | python.keys()
    both = {name: (header.get(name), python.get(name)) for name in names}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def test_header_and_python_agree_on_everything(tmp_path: Path) -> None:
    header = header_numbers(HEADER.read_text(), tmp_path)
    assert differences(header, python_constants() | python_structs()) == {}


def test_every_dtype_of_the_module_is_a_structure() -> None:
    dtypes = {name for name, value in vars(uapi).items() if isinstance(value, np.dtype)}
    assert {f"kw_{name.lower()}" for name in dtypes} == uapi.STRUCTS.keys()


def test_structures_have_no_hidden_padding() -> None:
    for name, dtype in uapi.STRUCTS.items():
        ends = [offset + kind.itemsize for kind, offset, *_ in (dtype.fields or {}).values()]
        starts = [offset for _, offset, *_ in (dtype.fields or {}).values()]
        assert [*starts[1:], dtype.itemsize] == ends, name


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("__u64 evicted;", "", {"kw_undone", "kw_undone.evicted", "kw_undone.stuck"}),
        ("__u64 evicted;", "__u64 evicted; __u8 extra[8];", {"kw_undone.extra"}),
        ("__u32 flags;\n\t__u32 cpus;", "__u32 cpus; __u32 flags;", {"kw_facts.cpus"}),
        ("__u32 magic;", "__u64 magic;", {"kw_req.magic", "kw_req"}),
        ("KW_STUCK = 4", "KW_STUCK = 5", {"KW_STUCK"}),
        ("KW_OP_FORGET = 19", "KW_OP_DROP = 19", {"KW_OP_FORGET", "KW_OP_DROP"}),
        ("#define KW_BATCH 256u", "#define KW_BATCH 255u", {"KW_BATCH"}),
        ("#define KW_WRITER 1u", "#define KW_WRITER 1u\n#define KW_NEW 2u", {"KW_NEW"}),
    ],
)
def test_difference_seeded_in_header_is_found(
    tmp_path: Path, old: str, new: str, names: set[str]
) -> None:
    header = HEADER.read_text()
    assert old in header
    changed = header_numbers(header.replace(old, new), tmp_path)
    found = differences(changed, python_constants() | python_structs())
    assert names <= found.keys()
