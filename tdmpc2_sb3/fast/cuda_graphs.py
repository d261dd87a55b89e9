"""Functions of tensors whose CUDA kernels are recorded once and then launched by one call.

A plan or a gradient step of the paper's 5M model is a thousand kernels of some microseconds each,
and Python takes longer to launch them one after the other than they run. A CUDA graph keeps the
launches with the addresses that they were made with, and makes all of them again on other numbers
at those addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch as th

from tdmpc2_sb3.fast.torch_compile import warn_of_failure
from tdmpc2_sb3.kernels.recordings import Recording, Recordings, own_inputs, places_of
from tdmpc2_sb3.kernels.tensor_trees import with_tensors, without_tensors

Result = TypeVar("Result")

MAX_GRAPHS = 64  # of a function; each keeps its inputs and results


class Recorder:
    """Records what functions launch on a CUDA device.

    :param device: of all their tensors
    """

    def __init__(self, device: th.device):
        self._device = device
        self._prepare()

    def _prepare(self) -> None:
        # Of its own, as recording asks for, and the first call's too: autograd remembers the
        # stream on which a parameter was first used.
        self._stream = th.cuda.Stream(self._device)
        # Graphs follow each other, and none reads what another left: all may share their memory.
        self._pool = th.cuda.graph_pool_handle()

    def __getstate__(self) -> dict[str, Any]:
        return {"_device": self._device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def warm_up(self, function: Callable[[], Result]) -> Result:
        """The result of a call in which libraries and compilers may set themselves up."""
        caller = th.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        with th.cuda.stream(self._stream):
            result = function()
        caller.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """What launches the function's kernels, none of which has run yet, and its result, whose
        tensors they write to."""
        graph = th.cuda.CUDAGraph()
        with (
            th.cuda.device(self._device),
            th.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            result = function()
        return graph.replay, result


def recorder_for(device: th.device) -> Recorder | None:
    """A recorder, or None for devices without CUDA graphs."""
    return Recorder(device) if device.type == "cuda" else None


class _Graphs(Recordings[Result]):
    """The graphs of a function."""

    def forget(self, places: list[int]) -> None:
        super().forget(places)
        self.called: set[Hashable] = set()  # once, with arguments of these sizes

    def move_to(self, places: list[int]) -> None:
        """The function itself moved its state, as an optimiser does that makes it."""
        if places != self.places:
            self.by_key.clear()
            self.places = places


class Graphed(Generic[Result]):
    """A function that is called when its arguments have new sizes, recorded at the next such call
    and replayed from then on.

    It may compute on the device alone and draw no random numbers; what it changes besides, it
    changes in place. Arguments are tensors, other hashable values, and tuples and dictionaries of
    them; the values are part of what a graph is for. If recording fails for any reason, a
    warning says so once and the function is called as it is.

    :param function: to be called
    :param state: what it reads and writes besides its arguments: a graph holds while that stands
        where it stood
    :param recorder: of the device
    """

    def __init__(
        self,
        function: Callable[..., Result],
        state: Callable[[], Sequence[th.Tensor]],
        recorder: Recorder,
    ):
        self._function = function
        self._state = state
        self._recorder = recorder
        self._failed = False
        self._graphs: _Graphs[Result] = _Graphs(MAX_GRAPHS)

    def __getstate__(self) -> dict[str, Any]:
        return {"function": self._function, "state": self._state, "recorder": self._recorder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def replays(self) -> int:
        """How many there were since the state moved."""
        return self._graphs.replays

    def __call__(self, *arguments: object) -> Result:
        """What the function makes of the arguments."""
        if self._failed:
            return self._function(*arguments)
        tensors: list[th.Tensor] = []
        key = without_tensors(arguments, tensors)
        graphs = self._graphs
        graphs.follow(self._state())
        graph = graphs.by_key.get(key)
        if graph is None and key not in graphs.called:
            result = self._recorder.warm_up(lambda: self._function(*arguments))
            graphs.called.add(key)
            graphs.move_to(places_of(self._state()))
            return result
        if graph is None:
            try:
                graph = self._record(arguments, tensors)
            except Exception as error:  # a driver may fail in any way
                self._failed = True
                graphs.forget([])
                failure = "A CUDA graph could not be recorded"
                warn_of_failure(failure, error, "without, which is slower")
                return self._function(*arguments)
            graphs.keep(key, graph)
        graphs.replays += 1
        result = graph.replay(tensors)
        results: list[th.Tensor] = []
        without_tensors(result, results)
        kept = [each.clone() for each in results]  # the next replay writes to them
        return with_tensors(result, iter(kept))  # type: ignore[no-any-return]

    def _record(self, arguments: tuple[object, ...], tensors: list[th.Tensor]) -> Recording[Result]:
        inputs, rebuilt = own_inputs(arguments, tensors)
        launch, result = self._recorder.record(lambda: self._function(*rebuilt))
        return Recording(inputs, launch, result)
