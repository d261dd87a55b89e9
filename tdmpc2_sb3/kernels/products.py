"""Matrix products in float32 on a CPU, by ``kernels.c`` or by torch, whichever is faster.

torch's products come from MKL or oneDNN, which lay the right matrix out anew in every call and
wake their threads for the product alone. Here a weight is laid out once for as long as it stays
the same (:func:`weights_held`), and norm and activation follow while a tile is in the cache.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch as th

from tdmpc2_sb3.kernels.library import call, library

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

# Deeper, rows of the left matrix lie so far apart that a tile of them falls out of the first cache.
MAX_DEPTH = 768
MIN_ROWS = 8  # fewer cost less than laying the right matrix out, unless that is kept
PARALLEL_FROM = 2**18  # multiply-adds; waking a second thread costs more than fewer would save


class _Thread(threading.local):
    """What holds in one thread."""

    held: dict[tuple[object, ...], tuple[th.Tensor, th.Tensor]] | None = None
    by_torch = False


_thread = _Thread()


@contextlib.contextmanager
def weights_held() -> Iterator[None]:
    """No weight changes within, so that each is laid out for products once (in this thread)."""
    before = _thread.held
    _thread.held = {} if before is None else before
    try:
        yield
    finally:
        _thread.held = before


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


@functools.cache
def _panel_width() -> int:
    loaded = library()
    return 0 if loaded is None else int(loaded.panel_width())


def product_threads(rows: int, depth: int, cols: int) -> int:
    """Threads for a product of that size."""
    return th.get_num_threads() if rows * depth * cols >= PARALLEL_FROM else 1


def laid_out(b: th.Tensor, rows: int, is_weight: bool) -> th.Tensor | None:
    """The right matrix of a product as ``kernels.c`` reads it; None where torch is to multiply.

    :param b: [depth, cols], any strides
    :param rows: of the left matrix
    :param is_weight: whether b stays the same within :func:`weights_held`
    """
    depth, cols = b.shape
    width = _panel_width()
    if not width or _thread.by_torch or not 0 < depth <= MAX_DEPTH or not cols:
        return None
    held = _thread.held if is_weight else None
    if held is None:
        return _pack(b, width, rows) if rows >= MIN_ROWS else None
    key = (b.data_ptr(), b.shape, b.stride())
    if key not in held:
        held[key] = (b, _pack(b, width, rows))  # b, lest another take its address
    return held[key][1]


def _pack(b: th.Tensor, width: int, rows: int) -> th.Tensor:
    depth, cols = b.shape
    packed = b.new_empty(-(-cols // width), depth, width)
    threads = product_threads(rows, depth, cols)
    call("pack", b, *b.stride(), packed, depth, cols, threads)
    return packed


def product(
    a: th.Tensor,
    b: th.Tensor,
    bias: th.Tensor | None = None,
    out: th.Tensor | None = None,
    is_weight: bool = True,
) -> th.Tensor:
    """a b + bias, without gradients.

    :param a: [rows, depth], any strides
    :param b: [depth, cols], any strides
    :param bias: [cols] or None
    :param out: contiguous, [rows, cols]
    :param is_weight: whether b stays the same within :func:`weights_held`
    """
    rows, depth = a.shape
    packed = laid_out(b, rows, is_weight) if rows else None
    if packed is None:
        return th.mm(a, b, out=out) if bias is None else th.addmm(bias, a, b, out=out)
    cols = b.shape[1]
    c = a.new_empty(rows, cols) if out is None else out
    threads = product_threads(rows, depth, cols)
    call("product", a, *a.stride(), packed, bias, c, rows, depth, cols, threads)
    return c
