"""The interface of Python and C, as ``interface.h`` has it: it is written there alone.

The header is read by a few patterns, which understand just what it uses and refuse the rest. So no
compiler and no package is asked at start-up. That C lays its structures out as Python does is
checked by the compiler, when the kernels are built (:func:`layout_checks`).
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch as th

HEADER = Path(__file__).with_name("interface.h")

_NUMBERS: dict[str, Any] = {
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_DTYPES = {"float": th.float32, "int64_t": th.int64}  # of the tensors that pointers point to

_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_SKIPPED = re.compile(r"\s+|#pragma once\n|#include <stdint\.h>\n")
_CONSTANT = re.compile(r"#define (\w+) +\(?(-?[\d.]+(?:e-?\d+)?)f?\)? *\n")
_ENUM = re.compile(r"enum \{([^{}]*)\};")
_STRUCTURE = re.compile(r"typedef struct \{([^{}]*)\} (\w+);")
_FUNCTION = re.compile(r"(void|int64_t) (\w+)\(([^()]*)\);")
_DECLARATION = re.compile(r"(?:const )?(\w+) ((?:\*(?:const )?)*)(\w+)")


class InterfaceError(RuntimeError):
    """Python and C disagree, or ``interface.h`` holds what Python does not understand."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. Mend the kernels' sources, or install tdmpc2_sb3 anew.")


class Structure(ctypes.Structure):
    """A structure of ``interface.h``: made with all of its fields by name, or as zeros."""

    __slots__ = ()
    names: ClassVar[frozenset[str]]

    def __init__(self, **fields: Any) -> None:
        if fields and fields.keys() != self.names:
            wrong = ", ".join(sorted(fields.keys() ^ self.names))
            raise InterfaceError(
                f"The structure {type(self).__name__} of interface.h is not made of these fields: "
                f"{wrong} is on one side only"
            )
        super().__init__(**fields)


class Parameter(NamedTuple):
    """What a function takes."""

    name: str
    type: Any  # of ctypes
    dtype: th.dtype | None  # of a tensor whose address it may be
    rows_apart: bool  # whether the tensor's rows may lie apart; it is contiguous otherwise


class Function(NamedTuple):
    """A function's parameters, and what it returns: a number or nothing."""

    parameters: tuple[Parameter, ...]
    result: Any  # of ctypes, None for nothing


class Interface(NamedTuple):
    """All that the header declares, by name."""

    constants: dict[str, float]
    structures: dict[str, type[Structure]]
    functions: dict[str, Function]


def read(header: Path) -> Interface:
    """
    :raises InterfaceError: naming the line that is not understood
    """
    text = _COMMENT.sub(lambda comment: "\n" * comment[0].count("\n"), header.read_text("utf-8"))
    found = Interface({}, {}, {})
    position = 0
    while position < len(text):
        try:
            position = _read_next(text, position, found)
        except ValueError as error:
            line = text.count("\n", 0, position) + 1
            raise InterfaceError(f"Line {line} of {header.name}: {error}") from None
    return found


def _read_next(text: str, position: int, found: Interface) -> int:
    """Adds what stands at that position; returns where it ends.

    :raises ValueError: saying what is not understood
    """
    if match := _SKIPPED.match(text, position):
        pass
    elif match := _CONSTANT.match(text, position):
        found.constants[match[1]] = float(match[2]) if "." in match[2] else _number(match[2])
    elif match := _ENUM.match(text, position):
        for each in match[1].split(","):
            name, _, value = each.partition("=")
            found.constants[name.strip()] = int(value)
    elif match := _STRUCTURE.match(text, position):
        types = {**_NUMBERS, **found.structures}
        fields = _fields(match[1], types)
        found.structures[match[2]] = type(
            match[2],
            (Structure,),
            {"__slots__": (), "_fields_": fields, "names": frozenset(name for name, _ in fields)},
        )
    elif match := _FUNCTION.match(text, position):
        result = _NUMBERS.get(match[1])
        found.functions[match[2]] = Function(_parameters(match[3], found), result)
    else:
        raise ValueError(f"'{text[position:].splitlines()[0]}' is not understood")
    return match.end()


def _number(text: str) -> float:
    return float(text) if "e" in text else int(text)


def _declared(text: str, types: dict[str, Any]) -> tuple[str, str, str, Any]:
    """The name of the type, the stars behind it, the name of what is declared, and ctypes' type."""
    text = " ".join(text.split())
    match = _DECLARATION.fullmatch(text)
    if match is None or match[1] not in types:
        raise ValueError(f"'{text}' is not understood")
    base, stars, name = match.groups()
    return base, stars, name, ctypes.c_void_p if stars else types[base]


def _fields(text: str, types: dict[str, Any]) -> list[tuple[str, Any]]:
    fields = []
    *declarations, rest = text.split(";")
    if rest.strip():
        raise ValueError(f"'{rest.strip()}' is not understood")
    for declaration in declarations:
        first, *others = declaration.split(",")
        base = _declared(first, types)[0]
        for each in (first, *(f"{base} {other.strip()}" for other in others)):
            *_, name, kind = _declared(each, types)
            fields.append((name, kind))
    return fields


def _parameters(text: str, found: Interface) -> tuple[Parameter, ...]:
    if text == "void":
        return ()
    types = {**_NUMBERS, **found.structures}
    declared = [_declared(each, types) for each in text.split(",")]
    names = {name for _, _, name, _ in declared}
    return tuple(
        Parameter(name, kind, _DTYPES.get(base) if stars == "*" else None, f"{name}_row" in names)
        for base, stars, name, kind in declared
    )


def layout_checks(interface: Interface) -> str:
    """C that does not compile where a structure is laid out otherwise than here."""
    lines = ["#include <stddef.h>", '#include "interface.h"']

    def check(condition: str, what: str) -> None:
        lines.append(f'_Static_assert({condition}, "{what} is laid out otherwise in Python");')

    for name, structure in interface.structures.items():
        check(f"sizeof({name}) == {ctypes.sizeof(structure)}", name)
        for field, *_ in structure._fields_:
            place = getattr(structure, field)
            check(
                f"offsetof({name}, {field}) == {place.offset} && "
                f"sizeof((({name} *)0)->{field}) == {place.size}",
                f"{field} of {name}",
            )
    return "\n".join(lines) + "\n"


INTERFACE = read(HEADER)


def _structure(name: str) -> type[Structure]:
    if name not in INTERFACE.structures:
        raise InterfaceError(f"The kernels' {HEADER.name} lacks the structure {name}")
    return INTERFACE.structures[name]


def _constant(name: str) -> float:
    if name not in INTERFACE.constants:
        raise InterfaceError(f"The kernels' {HEADER.name} lacks the constant {name}")
    return INTERFACE.constants[name]


LayerArgument = _structure("layer")
NetworkArgument = _structure("network")
StateSpaceLayerArgument = _structure("state_space_layer")
DynamicsArgument = _structure("dynamics")
SearchArgument = _structure("search")

SIMPLEX = int(_constant("SIMPLEX"))
ACTIVATION_NONE, ACTIVATION_MISH, ACTIVATION_SIMNORM = (
    int(_constant(f"ACTIVATION_{name}")) for name in ("NONE", "MISH", "SIMNORM")
)
DT_MIN, DT_MAX = _constant("DT_MIN"), _constant("DT_MAX")
LOG_STD_MIN, LOG_STD_MAX = _constant("LOG_STD_MIN"), _constant("LOG_STD_MAX")
SQUASH_EPSILON = _constant("SQUASH_EPSILON")
ENTROPY_EPSILON = _constant("ENTROPY_EPSILON")
SCALE_LOW, SCALE_HIGH = _constant("SCALE_LOW"), _constant("SCALE_HIGH")
TERMINATION_LOGIT = _constant("TERMINATION_LOGIT")
