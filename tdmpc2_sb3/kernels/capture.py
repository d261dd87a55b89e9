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
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch as th
from torch.utils._python_dispatch import TorchDispatchMode

from tdmpc2_sb3.kernels.library import calls_written_down
from tdmpc2_sb3.kernels.products import fixed_weights, fixed_weights_anew, goes_by_torch
from tdmpc2_sb3.kernels.recordings import Recording, Recordings, own_inputs
from tdmpc2_sb3.kernels.tensor_trees import without_tensors

Result = TypeVar("Result")

MAX_CAPTURES = 256  # of a function; heads of an ensemble of five are chosen in twenty ways
ATTEMPTS = 2  # the first one may make what is kept
CHUNK = 128 * 2**20  # bytes, of which the system gives what is written to
ALIGNMENT = 64
PADDING = 128  # so that arrays of whole pages do not all begin at the same place of one

_ALLOCATIONS = (
    th.ops.aten.empty.memory_format,
    th.ops.aten.empty_like.default,
    th.ops.aten.new_empty.default,
)


class _Memory:
    """Room for the arrays that functions make on their way.

    A capture writes an array before it reads it, so whatever no object is in any more is free for
    others, and what was used last is still in the caches.
    """

    def __init__(self) -> None:
        self._chunks: list[th.Tensor] = []
        self._views: list[Any] = []  # of NumPy: whether one is in use shows in its references
        self._places: list[tuple[int, int, int]] = []  # their chunk, begin and end

    def like(self, x: th.Tensor) -> th.Tensor:
        """An array of the same shape and type where no other array is."""
        size = x.numel() * x.element_size()
        if not size:
            return x
        self._forget_idle()
        chunk, begin, end = place = self._find(size + PADDING)
        self._views.append(self._chunks[chunk][begin:end].numpy())
        self._places.append(place)
        flat = th.from_numpy(self._views[-1])  # refers to the view for as long as it lives
        return flat[:size].view(x.dtype).view(x.shape)

    def _forget_idle(self) -> None:
        used = [  # by positions: a name for a view would be one more reference
            position
            for position in range(len(self._views))
            if _references(self._views, position) > _REFERENCES_OF_LIST
        ]
        self._views = [self._views[position] for position in used]
        self._places = [self._places[position] for position in used]

    def _find(self, size: int) -> tuple[int, int, int]:
        """The first place that is large enough."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        for chunk, memory in enumerate(self._chunks):
            begin = 0
            for other, taken_from, taken_to in sorted(self._places):
                if other != chunk:
                    continue
                if taken_from - begin >= size:
                    break
                begin = taken_to
            if begin + size <= len(memory):
                return chunk, begin, begin + size
        self._chunks.append(th.empty(max(size, CHUNK), dtype=th.uint8))  # and kept
        return len(self._chunks) - 1, 0, size


def _references(views: list[Any], position: int) -> int:
    return sys.getrefcount(views[position])


_REFERENCES_OF_LIST = _references([th.empty(1).numpy()], 0)


class _Thread(threading.local):
    """What holds in one thread."""

    def __init__(self) -> None:
        self.memory = _Memory()  # shared by its captures, whose calls follow each other


_thread = _Thread()


class _Watch(TorchDispatchMode):
    """Notes what torch computes itself, and takes new arrays from the memory of captures."""

    def __init__(self, memory: _Memory) -> None:
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


class _Captures(threading.local, Recordings[Result]):
    """A thread's captures of a function. They go when the thread ends: another one may take its
    identity, but neither its captures nor the memory that these write to."""

    def forget(self, places: list[int]) -> None:
        super().forget(places)
        self.failures: Counter[Hashable] = Counter()


class Captured(Generic[Result]):
    """A function that is captured when it is called with arguments of new sizes, and replayed
    afterwards.

    It may make arrays and views, call ``kernels.c``, and act by :func:`with_calls`. If torch
    computes anything in it, it is called as it is; what it reads by ``tolist`` or ``numpy`` stays
    as it was, unseen. Arguments are tensors, which are read only, other hashable values, and tuples
    of them; the values are part of what the capture is for, and so is the thread. Weights are fixed
    within. What a result's tensors hold is good until the thread calls a captured function again.

    :param function: to be called without recording gradients
    :param parameters: what the function reads and writes besides: a capture holds while their
        numbers stand where they stood
    """

    def __init__(self, function: Callable[..., Result], parameters: Sequence[th.Tensor]):
        self._function = function
        self._parameters = parameters
        self._captures: _Captures[Result] = _Captures(MAX_CAPTURES)
        self.computed_by_torch: list[str] = []  # in the last attempt at a capture that failed

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self._function, "parameters": self._parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def replays(self) -> int:
        """How many there were in this thread since parameters moved."""
        return self._captures.replays

    def __call__(self, *arguments: object) -> Result:
        """What the function makes of the arguments."""
        tensors: list[th.Tensor] = []
        key = th.get_num_threads(), without_tensors(arguments, tensors)
        own = self._captures
        own.follow(self._parameters)
        if goes_by_torch() or own.failures[key] == ATTEMPTS:
            with fixed_weights():
                return self._function(*arguments)
        captured = own.by_key.get(key)
        if captured is None:
            return self._capture(key, arguments, tensors)
        own.replays += 1
        return captured.replay(tensors)

    def _capture(
        self, key: Hashable, arguments: tuple[object, ...], tensors: list[th.Tensor]
    ) -> Result:
        own, memory = self._captures, _thread.memory
        inputs, rebuilt = own_inputs(arguments, tensors)
        watch = _Watch(memory)
        with fixed_weights_anew() as made, calls_written_down() as calls, watch:
            result = self._function(*rebuilt)
            kept = list(made.values()), memory  # that the calls point to and write to

        def launch() -> None:
            for function, values in calls:
                function(*values)

        if watch.computed:
            own.failures[key] += 1
            self.computed_by_torch = watch.computed
        else:
            own.keep(key, Recording(inputs, launch, result, kept))
        return result
