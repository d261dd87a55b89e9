"""What torch would do in an operation of its own, for functions that are replayed
(:mod:`tdmpc2_sb3.kernels.capture`), and rows of numbers that lie apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch as th

from tdmpc2_sb3.kernels.conditions import threads_for, usable
from tdmpc2_sb3.kernels.library import call


def zeros(like: th.Tensor, *shape: int) -> th.Tensor:
    """An array of zeros."""
    x = like.new_empty(shape)
    clear_(x)
    return x


def clear_(x: th.Tensor) -> None:
    """``x.zero_()`` of a contiguous x."""
    call("clear_array", x, x.numel())


def copy_(x: th.Tensor, to: th.Tensor) -> None:
    """``to.copy_(x)`` of arrays of one shape, of which each may be a cut of columns."""
    x_row, to_row, cols = even_rows(x), even_rows(to), x.shape[-1]
    assert x_row, "rows lie at uneven distances"
    assert to_row, "rows lie at uneven distances"
    call("copy_rows", x, x_row, to, to_row, x.numel() // cols, cols, threads_for(x.numel()))


def join(parts: Sequence[th.Tensor], dim: int = -1) -> th.Tensor:
    """``th.cat(parts, dim)`` of parts that may be cuts of columns.

    :param dim: the last axis, or the first one of contiguous parts
    """
    if not usable(parts[0]):
        return th.cat(list(parts), dim)
    sizes = [part.shape[dim] for part in parts]
    shape = list(parts[0].shape)
    shape[dim] = sum(sizes)
    joined = parts[0].new_empty(shape)
    for part, place in zip(parts, joined.split(sizes, dim), strict=True):
        copy_(part, place)
    return joined


def add(a: th.Tensor, b: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
    """a + b of contiguous arrays.

    :param a: [..., D]
    :param b: whose axes are the last ones of a
    :param y: where the sum is written, which may be a; made anew if None
    """
    if y is None:
        y = th.empty_like(a)
    cols = a.shape[-1]
    sizes = a.numel() // cols, b.numel() // cols, cols
    call("add_rows", a, b, y, *sizes, threads_for(a.numel()))
    return y


def exponential(x: th.Tensor, factors: th.Tensor | None = None, added: float = 0.0) -> th.Tensor:
    """factors e^x + added of contiguous arrays of one shape; without factors these are 1."""
    y = th.empty_like(x)
    call("exponential", x, factors, added, y, x.numel())
    return y


def least(values: th.Tensor) -> th.Tensor:
    """``values.amin(0)`` of contiguous values, [Q', ...] to [...]."""
    out = values.new_empty(values.shape[1:])
    call("least_values", values, out, len(values), out.numel())
    return out


def even_rows(x: th.Tensor) -> int:
    """The elements from each row to the next; 0 if that differs, or numbers do not stand side by
    side in a row."""
    if x.stride(-1) != 1:
        return 0
    axes = [axis for axis in range(x.dim() - 1) if x.shape[axis] > 1]
    even = all(
        x.stride(outer) == x.stride(inner) * x.shape[inner]
        for outer, inner in itertools.pairwise(axes)
    )
    if not axes:
        return x.shape[-1]
    return x.stride(axes[-1]) if even else 0


def with_even_rows(x: th.Tensor) -> tuple[th.Tensor, int]:
    """x, or a copy if need be, and the elements from each row to the next.

    A cut of columns needs no copy.
    """
    distance = even_rows(x)
    return (x, distance) if distance else (x.contiguous(), x.shape[-1])
