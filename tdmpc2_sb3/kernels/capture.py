"""Functions that work by ``kernels.c`` alone, captured once and then replayed.

Between the kernels of a gradient step Python finds out which arrays they read, where their results
go and what has to be laid out; with small networks that takes a quarter of the time. For inputs of
the same sizes all of it comes out the same. So, as CUDA graphs do, a capture keeps the calls with
the addresses that they were made with, and makes them again on other numbers at those addresses.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch as th
from torch.utils._python_dispatch import TorchDispatchMode

from tdmpc2_sb3.kernels.library import Call, calls_written_down
from tdmpc2_sb3.kernels.products import goes_by_torch, weights_held_anew

Result = TypeVar("Result")

MAX_CAPTURES = 256  # of a function; heads of an ensemble of five are chosen in twenty ways
ATTEMPTS = 2  # the first one may make what is kept
ALIGNMENT = 64  # bytes

_ALLOCATIONS = (
    th.ops.aten.empty.memory_format,
    th.ops.aten.empty_like.default,
    th.ops.aten.new_empty.default,
)


class _Memory:
    """Blocks for the arrays that a function makes on its way.

    A capture makes them in the same order as the one before, so that it finds the same blocks, and
    an array that is let go of leaves its block to the next, as with malloc.
    """

    def __init__(self) -> None:
        self._blocks: list[Any] = []  # NumPy's: whether one is in use shows in its references

    def like(self, x: th.Tensor) -> th.Tensor:
        """An array of the same shape and type in a block that no other array is in."""
        size = x.numel() * x.element_size()
        if not size:
            return x
        flat = th.from_numpy(self._block(size))  # refers to the block for as long as it lives
        return flat[:size].view(x.dtype).view(x.shape)

    def _block(self, size: int) -> Any:
        sizes = [len(block) for block in self._blocks]
        fitting = [  # by positions: a name for a block would be one more reference
            (found, position)
            for position, found in enumerate(sizes)
            if size <= found <= 2 * size and self._is_idle(position)
        ]
        if fitting:
            return self._blocks[min(fitting)[1]]
        rounded = -(-size // ALIGNMENT) * ALIGNMENT
        block = th.empty(rounded, dtype=th.uint8).numpy()
        self._blocks.append(block)
        return block

    def _is_idle(self, position: int) -> bool:
        return _references(self._blocks, position) == _REFERENCES_OF_LIST


def _references(blocks: list[Any], position: int) -> int:
    return sys.getrefcount(blocks[position])


_REFERENCES_OF_LIST = _references([th.empty(1).numpy()], 0)


class _Watch(TorchDispatchMode):
    """Notes what torch computes itself, and takes new arrays from the memory of captures."""

    def __init__(self, memory: _Memory):
        super().__init__()
        self._memory = memory
        self.computed: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and result.is_cpu:
            return self._memory.like(result)
        if not func.is_view:
            self.computed.append(str(func))
        return result


class _Capture(NamedTuple, Generic[Result]):
    inputs: list[th.Tensor]  # that the calls read
    calls: list[Call]
    result: Result
    kept: object  # whatever the calls point to


class Captured(Generic[Result]):
    """A function that is captured when it is called with arguments of new sizes, and replayed
    afterwards.

    It may make arrays and views, call ``kernels.c``, and act by :func:`with_calls`. If torch
    computes anything in it, it is called as it is; what it reads by ``tolist`` or ``numpy`` stays
    as it was, unseen. Arguments are tensors, which are read only, other hashable values, and tuples
    of them; the values are part of what the capture is for. What a result's tensors hold is good
    until the next call.

    :param function: to be called without recording gradients
    :param parameters: what the function reads and writes besides: a capture holds while their
        numbers stand where they stood
    """

    def __init__(self, function: Callable[..., Result], parameters: Sequence[th.Tensor]):
        self._function = function
        self._parameters = parameters
        self._forget()

    def _forget(self) -> None:
        self._places: list[int] = []
        self._captures: dict[Hashable, _Capture[Result]] = {}
        self._memory = _Memory()
        self._failures: Counter[Hashable] = Counter()
        self.replays = 0
        self.computed_by_torch: list[str] = []  # in the last attempt at a capture that failed

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self._function, "parameters": self._parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __call__(self, *arguments: object) -> Result:
        """What the function makes of the arguments."""
        if goes_by_torch():
            return self._function(*arguments)
        tensors: list[th.Tensor] = []
        key = threading.get_ident(), th.get_num_threads(), _without_tensors(arguments, tensors)
        places = list(map(th.Tensor.data_ptr, self._parameters))
        if places != self._places:
            self._forget()
            self._places = places
        captured = self._captures.get(key)
        if captured is not None:
            for static, tensor in zip(captured.inputs, tensors, strict=True):
                static.copy_(tensor)
            for function, values in captured.calls:
                function(*values)
            self.replays += 1
            return captured.result
        if self._failures[key] == ATTEMPTS:
            return self._function(*arguments)
        return self._capture(key, arguments, tensors)

    def _capture(
        self, key: Hashable, arguments: tuple[object, ...], tensors: list[th.Tensor]
    ) -> Result:
        inputs = [each.clone(memory_format=th.contiguous_format) for each in tensors]
        rebuilt = _with_tensors(arguments, iter(inputs))
        watch = _Watch(self._memory)
        with weights_held_anew() as made, calls_written_down() as calls, watch:
            result = self._function(*rebuilt)
            kept = list(made.values())
        if watch.computed:
            self._failures[key] += 1
            self.computed_by_torch = watch.computed
        else:
            if len(self._captures) == MAX_CAPTURES:
                self._captures.clear()
            self._captures[key] = _Capture(inputs, calls, result, kept)
        return result


def _without_tensors(value: object, tensors: list[th.Tensor]) -> Hashable:
    """The value with its tensors' sizes and types in their place.

    :param tensors: to which they are added
    """
    if isinstance(value, th.Tensor):
        tensors.append(value)
        return value.shape, value.dtype
    if isinstance(value, tuple):
        return type(value), tuple([_without_tensors(each, tensors) for each in value])
    return value  # type: ignore[return-value]


def _with_tensors(value: Any, tensors: Iterator[th.Tensor]) -> Any:
    """The value with the next tensors in the place of its own."""
    if isinstance(value, th.Tensor):
        return next(tensors)
    if isinstance(value, tuple):
        parts = [_with_tensors(each, tensors) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
