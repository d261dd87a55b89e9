"""When ``kernels.c`` multiplies matrices in float32 on a CPU, and the weights laid out for it.

torch's products come from MKL or oneDNN, which lay the right matrix out anew in every call and
wake their threads for the product alone. ``kernels.c`` reads a weight that is laid out once for as
long as it stays the same (:func:`fixed_weights`).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch as th

from tdmpc2_sb3.kernels.library import library

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

# Deeper, rows of the left matrix lie so far apart that a tile of them falls out of the first cache.
MAX_DEPTH = 768
MIN_ROWS = 8  # fewer cost less than laying the right matrix out, unless that is kept
PARALLEL_FROM = 2**18  # multiply-adds; waking a second thread costs more than fewer would save

T = TypeVar("T")


class _Period:
    """What is made once while weights are fixed."""

    def __init__(self) -> None:
        self.made: dict[object, Any] = {}


class _Thread(threading.local):
    """What holds in one thread."""

    period: _Period | None = None
    by_torch = False


_thread = _Thread()


@contextlib.contextmanager
def fixed_weights() -> Iterator[None]:
    """No weight changes within, so that each is laid out for products once (in this thread)."""
    if _thread.period is not None:
        yield
        return
    with fixed_weights_anew():
        yield


@contextlib.contextmanager
def fixed_weights_anew() -> Iterator[dict[object, Any]]:
    """The same, but nothing counts as laid out that was so outside; yields what is made within."""
    before = _thread.period
    holding = _thread.period = _Period()
    try:
        yield holding.made
    finally:
        _thread.period = before
        holding.made.clear()


def period() -> object | None:
    """Stands for the time for which weights are fixed in this thread; None while none are."""
    return _thread.period


def made_once(key: object, make: Callable[[], T]) -> T:
    """What ``make`` returns, made once while weights are fixed; anew where none are."""
    if _thread.period is None:
        return make()
    made = _thread.period.made
    if key not in made:
        made[key] = make()
    return made[key]  # type: ignore[no-any-return]


@contextlib.contextmanager
def operation_counter() -> Iterator[FlopCounterMode]:
    """torch's counter of operations; products go by torch within, whose operations it sees."""
    # Not at the top: it imports triton where there is one, whose library crashes the process once
    # a software renderer (Mesa's) has brought its own LLVM.
    from torch.utils.flop_counter import FlopCounterMode

    before = _thread.by_torch
    _thread.by_torch = True
    try:
        with FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        _thread.by_torch = before


def goes_by_torch() -> bool:
    """Whether torch multiplies in this thread, so that its operations are counted."""
    return _thread.by_torch


@functools.cache
def _panel_width() -> int:
    loaded = library()
    return 0 if loaded is None else int(loaded.panel_width())


def product_threads(multiply_adds: int) -> int:
    """Threads for that much work."""
    return th.get_num_threads() if multiply_adds >= PARALLEL_FROM else 1


def usable_product(rows: int, depth: int) -> bool:
    """Whether ``kernels.c`` is to multiply a matrix of that size from the left, rather than torch.

    :param rows: of the left matrix
    :param depth: its columns, the rows of the right one
    """
    if not _panel_width() or _thread.by_torch or not 0 < depth <= MAX_DEPTH or not rows:
        return False
    return rows >= MIN_ROWS or _thread.period is not None


def panels(depth: int, cols: int) -> int:
    """Numbers that a right matrix takes once it is laid out."""
    width = _panel_width()
    return -(-cols // width) * depth * width
