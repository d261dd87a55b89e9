"""Values of a YAML, checked one by one; whatever is wrong is a ValueError of one sentence."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any


def mapping(value: Any, what: str, allowed: Iterable[str] | None = None) -> dict[Any, Any]:
    """A mapping, empty where nothing stands.

    :param allowed: its keys, None for any
    :raises ValueError: if it is none, or has others
    """
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {value!r}: it must be a mapping in YAML.")
    for key in value:
        if allowed is not None and key not in allowed:
            raise ValueError(
                f"{what} has the unknown key {key!r}{closest(key, allowed)}; "
                f"known are {', '.join(allowed)}."
            )
    return value


def closest(word: Any, known: Iterable[str]) -> str:
    """The word that may have been meant, as a remark; empty if none is like it."""
    found = difflib.get_close_matches(str(word), known, 1)
    return f" (did you mean '{found[0]}'?)" if found else ""


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_plain(value: Any) -> bool:
    """Whether it is made of plain values, so that Python reads back what `repr` writes."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(each) for key, each in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, str | bool) or is_number(value)


def count(value: Any, what: str, least: int = 1) -> int:
    """A whole number, at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"'{what}' is {value!r}: it must be a whole number of at least {least}.")
    return value


def counts(value: Any, what: str, least: int = 1) -> list[int]:
    """A list of whole numbers."""
    if not isinstance(value, list):
        raise ValueError(f"'{what}' is {value!r}: it must be a list of whole numbers.")
    return [count(each, what, least) for each in value]


def text(value: Any, what: str) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} is {value!r}: it must be text.")
    return value


def name(value: Any, what: str) -> str:
    """Text that can be a part of a file's name."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", value):
        raise ValueError(
            f"{what} is {value!r}: it names files, so give letters, digits, '_', '.', '+' and '-'."
        )
    return value
