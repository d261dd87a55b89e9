"""What a function was recorded as, for arguments of the same sizes: captures, CUDA graphs.

Both keep what a call of the function launched, with the addresses that this was launched with, and
launch it again on other numbers at those addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch as th

from tdmpc2_sb3.kernels.tensor_trees import with_tensors

Result = TypeVar("Result")


class Recording(NamedTuple, Generic[Result]):
    """One call."""

    inputs: list[th.Tensor]  # that it reads
    launch: Callable[[], object]
    result: Result  # whose tensors it writes to
    kept: object = None  # whatever else has to stay where it is

    def replay(self, tensors: list[th.Tensor]) -> Result:
        """The result for other numbers, good until the next replay."""
        if tensors:
            th._foreach_copy_(self.inputs, tensors)
        self.launch()
        return self.result


class Recordings(Generic[Result]):
    """Those of one function, which hold while the numbers that it reads and writes besides its
    arguments stand where they stood.

    :param most: how many there may be; the next one takes the place of all
    """

    def __init__(self, most: int):
        self._most = most
        self.forget([])

    def forget(self, places: list[int]) -> None:
        """Begins anew, for numbers that stand there."""
        self.places = places
        self.by_key: dict[Hashable, Recording[Result]] = {}
        self.replays = 0

    def follow(self, tensors: Sequence[th.Tensor]) -> None:
        """Begins anew if the numbers of these have moved."""
        places = places_of(tensors)
        if places != self.places:
            self.forget(places)

    def keep(self, key: Hashable, recording: Recording[Result]) -> None:
        """Keeps a recording for arguments of that key."""
        if len(self.by_key) == self._most:
            self.by_key.clear()
        self.by_key[key] = recording


def places_of(tensors: Sequence[th.Tensor]) -> list[int]:
    """Where the numbers of tensors stand."""
    return list(map(th.Tensor.data_ptr, tensors))


def own_inputs(
    arguments: tuple[object, ...], tensors: Sequence[th.Tensor]
) -> tuple[list[th.Tensor], tuple[Any, ...]]:
    """Copies that a recording reads, and the arguments with these in the place of their tensors."""
    with th.inference_mode(False):  # or they could not be written to outside that mode
        inputs = [each.clone(memory_format=th.contiguous_format) for each in tensors]
    return inputs, with_tensors(arguments, iter(inputs))
