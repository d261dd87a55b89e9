"""Whether a function of the user's may remember something from one call to the next."""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

_PLAIN = (int, float, complex, str, bytes, type(None), np.generic)
#: Modules whose functions compute by their arguments alone, but for what is named random.
_MODULES = ("math", "numpy")
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, np.ufunc, type(np.clip))
#: What changes something that outlives the call, or gets at it in a way that is not followed here.
_CHANGES = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR", "IMPORT_NAME"}
_NAMES = {"random", "globals", "vars", "setattr", "delattr", "exec", "eval", "open", "input"}


def remembers_nothing(function: Any) -> bool:
    """Whether a function has nothing that may change between calls: no object, no variable outside
    of it that it assigns, no random numbers. False where that cannot be told.

    :param function: written in Python, or a builtin one
    """
    return _is_pure(function, [])


def _is_pure(function: Any, seen: list[Any]) -> bool:
    """
    :param seen: functions that are being looked at
    """
    if isinstance(function, np.ufunc) or any(function is each for each in seen):
        return True
    if isinstance(function, types.BuiltinFunctionType):  # no method of an object
        return isinstance(function.__self__, types.ModuleType | None)
    if not isinstance(function, types.FunctionType) or vars(function):
        return False
    held: list[Any] = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    try:
        held += [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # nothing has been assigned yet
        return False
    codes = list(_codes(function.__code__))
    names = {name for code in codes for name in code.co_names}
    if not names.isdisjoint(_NAMES) or any(_changes(code, function.__code__) for code in codes):
        return False
    found = [function.__globals__[name] for name in names if name in function.__globals__]
    return all(isinstance(each, _PLAIN) for each in held) and all(
        _is_constant(each, [*seen, function]) for each in found
    )


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions within it."""
    yield code
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _codes(each)


def _changes(code: types.CodeType, outermost: types.CodeType) -> bool:
    """Whether code assigns to what the outermost function did not make itself."""
    return any(
        step.opname in _CHANGES
        or (step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in outermost.co_freevars)
        for step in dis.get_instructions(code)
    )


def _is_constant(value: Any, seen: list[Any]) -> bool:
    """Whether what a function finds by a global name is the same at every call."""
    if isinstance(value, types.ModuleType):
        return value.__name__ in _MODULES
    if isinstance(value, _PLAIN) or (isinstance(value, type) and issubclass(value, _PLAIN)):
        return True
    if isinstance(value, _FUNCTIONS) and getattr(value, "__module__", None) in _MODULES:
        return True
    return _is_pure(value, seen)
