"""Operations on many arrays at once, the parameters of a model, for which threads wake once.

torch's own take an array after the other and wake the threads for each.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch as th

from tdmpc2_sb3.kernels.functions import usable
from tdmpc2_sb3.kernels.library import INTEGER, REAL, addresses, call

PARALLEL_FROM = 2**17  # numbers, of which a thread takes some tens of microseconds


def readable(arrays: Sequence[th.Tensor]) -> bool:
    """Whether the functions here take them: float32 on a CPU, and contiguous."""
    if not arrays or not usable(arrays[0]):
        return False
    return all(each.is_contiguous() and each.is_cpu and each.dtype is th.float32 for each in arrays)


def _sizes(arrays: Sequence[th.Tensor]) -> tuple[ctypes.Array[Any], int]:
    """Of each array, and threads for all."""
    sizes = [each.numel() for each in arrays]
    threads = th.get_num_threads() if sum(sizes) >= PARALLEL_FROM else 1
    return (INTEGER * len(sizes))(*sizes), threads


def total_norm(arrays: Sequence[th.Tensor]) -> th.Tensor:
    """Root of the sum of all squares, [].

    :param arrays: that are :func:`readable`
    """
    sizes, threads = _sizes(arrays)
    norm = th.empty(())
    call("total_norm", addresses(arrays), sizes, norm, len(arrays), threads)
    return norm


def lerp_(arrays: Sequence[th.Tensor], targets: Sequence[th.Tensor], weight: float) -> None:
    """Moves the arrays towards the targets, ``x += weight * (target - x)``.

    :param arrays: that are :func:`readable`
    :param targets: of the same shapes, readable too
    :param weight: in [0, 1]
    """
    sizes, threads = _sizes(arrays)
    call("lerp_arrays", addresses(arrays), addresses(targets), sizes, weight, len(arrays), threads)


def adam_step(
    parameters: Sequence[th.Tensor],
    gradients: Sequence[th.Tensor],
    means: Sequence[th.Tensor],
    squares: Sequence[th.Tensor],
    steps: Sequence[th.Tensor],
    rates: Sequence[float],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """A step of Adam (arXiv:1412.6980) on all parameters.

    :param parameters: that are :func:`readable`, as are the next three
    :param gradients: of the same shapes
    :param means: running means of the gradients
    :param squares: running means of their squares
    :param steps: made so far by each parameter, [] each, float32
    :param rates: learning rate of each
    :param betas: decay rates of the two means
    :param eps: added to the root of the mean square
    """
    sizes, threads = _sizes(parameters)
    call(
        "adam_step",
        *map(addresses, (parameters, gradients, means, squares, steps)),
        sizes,
        (REAL * len(rates))(*rates),
        *betas,
        eps,
        len(parameters),
        threads,
    )
