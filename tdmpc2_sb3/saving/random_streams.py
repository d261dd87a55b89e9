"""Whether the state of a random generator that a file holds is one that NumPy can go on with.

NumPy takes some states as they come: a position behind its table is read there, and an even
increment or a table of zeros never gives other numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")

_WORDS = 2**128


def checked_stream(state: Any, kind: str | None = None) -> dict[str, Any]:
    """Return the state of a bit generator, if it is one.

    :param state: what ``bit_generator.state`` or ``RandomState.get_state(legacy=False)`` gave
    :param kind: the bit generator that it must be of; None: any
    :raises ValueError: it is no such state
    """
    name = state.get("bit_generator") if isinstance(state, dict) else None
    if name not in BIT_GENERATORS or kind not in (None, name):
        raise ValueError(
            f"a random state of {str(name)[:40]!r} where {kind or 'a known one'} is needed"
        )
    try:
        fits = _fits(name, state)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"a damaged random state of {name} ({error!r})") from error
    if not fits:
        raise ValueError(f"a random state of {name} with numbers out of range")
    return state


def _fits(name: str, state: dict[str, Any]) -> bool:
    inner = state["state"]
    if name == "MT19937":
        key = inner["key"]
        moving = _words(key, np.uint32, 624) and bool(key[1:].any() or key[0] >> 31)
        has, gauss = state.get("has_gauss", 0), state.get("gauss", 0.0)
        known = _whole(has, 2) and isinstance(gauss, (int, float)) and math.isfinite(gauss)
        return moving and _whole(inner["pos"], 625) and known
    buffered = _whole(state["has_uint32"], 2) and _whole(state["uinteger"], 2**32)
    if name == "Philox":
        tables = ((inner["counter"], 4), (inner["key"], 2), (state["buffer"], 4))
        arrays = all(_words(table, np.uint64, size) for table, size in tables)
        return buffered and arrays and _whole(state["buffer_pos"], 5)
    if name == "SFC64":
        return buffered and _words(inner["state"], np.uint64, 4)
    odd = _whole(inner["inc"], _WORDS) and inner["inc"] % 2 == 1
    return buffered and odd and _whole(inner["state"], _WORDS)


def _whole(value: Any, end: int) -> bool:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and 0 <= int(value) < end


def _words(value: Any, dtype: type, size: int) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == dtype and value.shape == (size,)
