# SPDX-License-Identifier: GPL-2.0-or-later
"""One BTF type at a time, with its names: members, parameters, values, C declarations."""

from __future__ import annotations

from typing import NamedTuple

from kernweave.errors import InternalError, UnsupportedError, UsageError
from kernweave.image.btf import Btf, Kind

#: tags of the kernel's own macros; others print as an attribute
_TAGS = {"user": "__user", "rcu": "__rcu", "percpu": "__percpu"}
_QUALIFIERS = {Kind.CONST: "const", Kind.VOLATILE: "volatile", Kind.RESTRICT: "restrict"}
_TAGGED = {
    Kind.STRUCT: "struct ", Kind.UNION: "union ", Kind.ENUM: "enum ", Kind.ENUM64: "enum ",
    Kind.FWD: "struct ",
}  # fmt: skip
_DEEPEST = 8  # prototypes as parameters of prototypes; kernels have 2


class Member(NamedTuple):
    """One member at its place in the outermost struct.

    Attributes:
        name: as in C.
        type_id: its type.
        bit_off: bits from the start of the struct.
        bits: size of a bit-field, 0 for any other member.
    """

    name: str
    type_id: int
    bit_off: int
    bits: int

    @property
    def off(self) -> int:
        """Bytes from the start of the struct to the byte that holds the first bit."""
        return self.bit_off // 8


def members_of(btf: Btf, type_id: int) -> list[Member]:
    """Members of a struct or union as C sees them: anonymous ones give way to their own.

    Returns:
        In the order of declaration; empty for other types. Typedefs are followed.

    Raises:
        UnsupportedError: the struct holds itself.
    """
    return _flat_members(btf, type_id, 0, ())


def _flat_members(btf: Btf, type_id: int, start: int, outer: tuple[int, ...]) -> list[Member]:
    row = int(btf.resolved[type_id])
    if row in outer:
        raise UnsupportedError(f"this kernel's BTF has a struct that holds itself: type {row}")
    found: list[Member] = []
    rows = slice(*btf.members.first[row : row + 2].tolist())
    columns = [column[rows].tolist() for column in btf.members[1:]]
    for name_off, inner, bit_off, bits in zip(*columns, strict=True):
        if name_off:
            found.append(Member(btf.name(name_off), inner, start + bit_off, bits))
        else:
            found += _flat_members(btf, inner, start + bit_off, (*outer, row))
    return found


def offset_of(btf: Btf, struct: str, path: str) -> Member:
    """Where a member is in a struct; `path` may go on with dots into structs inside.

    Raises:
        UsageError: no struct of that name, several, or no such member.

    Example:
        offset_of(btf, "task_struct", "se.load.weight").off
    """
    ids = btf.find_struct(struct)
    if len(ids) != 1:
        raise UsageError(
            f"{len(ids)} structs of this kernel are called {struct}, 1 is needed",
            notes=[f"type {type_id} has {btf.sizes[type_id]} bytes" for type_id in ids],
        )
    found = Member(struct, ids[0], 0, 0)
    for name in path.split("."):
        fits = [member for member in members_of(btf, found.type_id) if member.name == name]
        if not fits:
            raise UsageError(f"{declare(btf, found.type_id)} has no member {name}")
        found = fits[0]._replace(bit_off=found.bit_off + fits[0].bit_off)
    return found


def parameters(btf: Btf, func_id: int) -> list[tuple[str, int]]:
    """(name, type id) of each parameter of a FUNC; `...` is ("", 0), the last."""
    return _parameters(btf, int(btf.target[_expect(btf, func_id, Kind.FUNC)]))


def _parameters(btf: Btf, proto: int) -> list[tuple[str, int]]:
    rows = slice(*btf.params.first[proto : proto + 2].tolist())
    names = map(btf.name, btf.params.name_off[rows].tolist())
    return list(zip(names, btf.params.type_id[rows].tolist(), strict=True))


def values_of(btf: Btf, type_id: int) -> list[tuple[str, int]]:
    """(name, value) of each enumerator of an enum; empty for other types."""
    row = int(btf.resolved[type_id])
    rows = slice(*btf.enumerators.first[row : row + 2].tolist())
    values = btf.enumerators.value[rows]
    values = values if btf.kind_flag[row] else values.view("u8")
    names = map(btf.name, btf.enumerators.name_off[rows].tolist())
    return list(zip(names, values.tolist(), strict=True))


def prototype(btf: Btf, func_id: int) -> str:
    """C declaration of a FUNC, without linkage and semicolon."""
    name = btf.type_name(_expect(btf, func_id, Kind.FUNC))
    return declare(btf, int(btf.target[func_id]), name)


def describe(btf: Btf, type_id: int) -> str:
    """One line about any row: what it declares, in C where C has a word for it."""
    name, target = btf.type_name(type_id), int(btf.target[type_id])
    match Kind(btf.kind[type_id]):
        case Kind.FUNC:
            return prototype(btf, type_id)
        case Kind.VAR:
            return declare(btf, target, name)
        case Kind.TYPEDEF:
            return f"typedef {declare(btf, target, name)}"
        case Kind.DATASEC:
            return f"section {name}"
        case Kind.DECL_TAG:
            return f"{describe(btf, target)} {_tag(btf, type_id)}"
        case _:
            return declare(btf, type_id)


def declare(btf: Btf, type_id: int, name: str = "") -> str:
    """C declaration of something called `name`; without a name the type alone."""
    return _declare(btf, type_id, name, 0)


def _declare(btf: Btf, type_id: int, text: str, depth: int) -> str:
    """Go from the name outwards; what qualifies waits for the type it qualifies."""
    if depth > _DEEPEST:
        raise UnsupportedError(f"this kernel's BTF nests prototypes {depth} deep: type {type_id}")
    quals: set[Kind] = set()
    tags: list[str] = []
    while True:
        kind = Kind(btf.kind[type_id])
        if kind in _QUALIFIERS:
            quals.add(kind)
        elif kind == Kind.TYPE_TAG:
            tags.append(_tag(btf, type_id))
        elif kind == Kind.PTR:
            words = " ".join(_words(quals) + tags)
            text = f"*{words} {text}" if words and text else f"*{words}{text}"
            quals, tags = set(), []
        elif kind == Kind.ARRAY:  # its qualifiers are those of its elements
            text = f"{_group(text)}[{btf.count[type_id]}]"
        elif kind == Kind.FUNC_PROTO:  # C has no form for a qualified function
            text = f"{_group(text)}({_parameter_list(btf, type_id, depth)})"
            quals, tags = set(), []
        else:
            words = " ".join([*_words(quals), _type_word(btf, type_id), *tags])
            return f"{words} {text}" if text else words
        type_id = int(btf.target[type_id])


def _words(quals: set[Kind]) -> list[str]:
    return [word for kind, word in _QUALIFIERS.items() if kind in quals]


def _group(text: str) -> str:
    return f"({text})" if text.startswith("*") else text


def _parameter_list(btf: Btf, proto: int, depth: int) -> str:
    listed = [
        _declare(btf, type_id, name, depth + 1) if type_id else "..."
        for name, type_id in _parameters(btf, proto)
    ]
    return ", ".join(listed) or "void"


def _type_word(btf: Btf, type_id: int) -> str:
    kind, name = Kind(btf.kind[type_id]), btf.type_name(type_id)
    if kind == Kind.VOID:
        return "void"
    if kind == Kind.FWD and btf.kind_flag[type_id]:
        return f"union {name}"
    return _TAGGED[kind] + (name or "{...}") if kind in _TAGGED else name


def _tag(btf: Btf, type_id: int) -> str:
    name = btf.type_name(type_id)
    if btf.kind_flag[type_id]:
        return f"__attribute__(({name}))"
    if btf.kind[type_id] == Kind.TYPE_TAG:
        return _TAGS.get(name, f'__attribute__((btf_type_tag("{name}")))')
    return f'__attribute__((btf_decl_tag("{name}")))'


def _expect(btf: Btf, type_id: int, kind: Kind) -> int:
    if btf.kind[type_id] != kind:
        raise InternalError(f"type {type_id} is {Kind(btf.kind[type_id]).name}, not {kind.name}")
    return type_id
