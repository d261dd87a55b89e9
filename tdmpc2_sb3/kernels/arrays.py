"""Operations on many arrays at once, the parameters of a model, for which threads wake once.

torch's own take an array after the other and wake the threads for each.
"""

from __future__ import annotations

import ctypes
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch as th

from tdmpc2_sb3.kernels.conditions import usable
from tdmpc2_sb3.kernels.library import addresses, call, check_array

PARALLEL_FROM = 2**17  # numbers, of which a thread takes some tens of microseconds


def usable_arrays(arrays: Sequence[th.Tensor]) -> bool:
    """Whether the functions here take them: float32 on a CPU, and contiguous."""
    if not arrays or not usable(arrays[0]):
        return False
    return all(each.is_contiguous() and each.is_cpu and each.dtype is th.float32 for each in arrays)


def _sizes(arrays: Sequence[th.Tensor]) -> tuple[ctypes.Array[Any], int]:
    """Of each array, and of all together."""
    sizes = [each.numel() for each in arrays]
    return (ctypes.c_int64 * len(sizes))(*sizes), sum(sizes)


def _threads(numbers: int) -> int:
    return th.get_num_threads() if numbers >= PARALLEL_FROM else 1


def total_norm(arrays: Sequence[th.Tensor]) -> th.Tensor:
    """Root of the sum of all squares, [].

    :param arrays: that are :func:`usable_arrays`
    """
    sizes, numbers = _sizes(arrays)
    norm = arrays[0].new_empty(())
    call("total_norm", addresses(arrays), sizes, norm, len(arrays), _threads(numbers))
    return norm


def lerp_(arrays: Sequence[th.Tensor], targets: Sequence[th.Tensor], weight: float) -> None:
    """Moves the arrays towards the targets, ``x += weight * (target - x)``.

    :param arrays: that are :func:`usable_arrays`
    :param targets: of the same shapes, as usable
    :param weight: in [0, 1]
    """
    sizes, numbers = _sizes(arrays)
    for array, target in zip(arrays, targets, strict=True):
        check_array("A target", target, array.shape)
    columns = addresses(arrays), addresses(targets), sizes
    call("lerp_arrays", *columns, weight, len(arrays), _threads(numbers))


class AdamArrays:
    """What steps of Adam read and write, looked up once and not with every step.

    :param arrays: of each parameter: itself, its gradient, the running means of the gradient and
        of its square, and the steps made so far, []; all :func:`usable_arrays`
    :raises RuntimeError: if their shapes differ
    """

    def __init__(self, arrays: Sequence[tuple[th.Tensor, ...]]):
        for parameter, *others, steps in arrays:
            for each in others:
                check_array(
                    "A gradient, or its running mean in the optimiser,", each, parameter.shape
                )
            check_array("A count of steps in the optimiser", steps, ())
        self._flat = list(itertools.chain(*arrays))
        self._places = list(map(th.Tensor.data_ptr, self._flat))
        self.addresses = [addresses(column) for column in zip(*arrays, strict=True)]
        self.sizes, self.numbers = _sizes([parameter for parameter, *_ in arrays])

    def are(self, arrays: Sequence[tuple[th.Tensor, ...]]) -> bool:
        """Whether they are these very arrays, at the same places."""
        flat = list(itertools.chain(*arrays))
        return (
            len(flat) == len(self._flat)
            and all(map(operator.is_, flat, self._flat))
            and list(map(th.Tensor.data_ptr, flat)) == self._places
        )


def adam_step(
    arrays: AdamArrays, rates: Sequence[float], betas: tuple[float, float], eps: float
) -> None:
    """A step of Adam (arXiv:1412.6980) on all parameters.

    :param rates: learning rate of each
    :param betas: decay rates of the two means
    :param eps: added to the root of the mean square
    """
    call(
        "adam_step",
        *arrays.addresses,
        arrays.sizes,
        (ctypes.c_float * len(rates))(*rates),
        *betas,
        eps,
        len(rates),
        _threads(arrays.numbers),
    )
