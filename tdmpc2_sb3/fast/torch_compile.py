"""``torch.compile`` that never stops a run: if it fails, the plain function goes on, said once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch as th

Result = TypeVar("Result")


class Compiled(Generic[Result]):
    """A function, compiled at its first call if asked for and possible.

    Compiling takes minutes and is not faster than :mod:`tdmpc2_sb3.kernels` on a CPU, so "auto"
    leaves functions as they are. (On CUDA :mod:`tdmpc2_sb3.fast.cuda_graphs` records them.) Copies
    and pickles compile anew.

    :param function: pure, of tensors
    :param compile: True compiles; False and "auto" do not
    :param finish: called with each result, e.g. a backward pass, which is compiled along and may
        fail like the function itself
    :raises ValueError: if ``compile`` is none of these
    """

    def __init__(
        self,
        function: Callable[..., Result],
        compile: bool | str,
        finish: Callable[[Result], object] | None = None,
    ):
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile is {compile!r}: use True, False or 'auto'.")
        self._function = function
        self._compile = compile is True
        self._finish = finish
        self._fast: Callable[..., Result] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fast": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        """The function's result."""
        if not self._compile:
            return self._run(self._function, *args, **kwargs)
        try:
            if self._fast is None:
                self._fast = th.compile(self._function)
            return self._run(self._fast, *args, **kwargs)
        except Exception as error:  # a compiler may fail in any way
            self._compile = False
            name = getattr(self._function, "__name__", "a function")
            warn_of_failure(f"torch.compile failed on {name}", error, "without compiling")
            return self._run(self._function, *args, **kwargs)

    def _run(self, chosen: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        result = chosen(*args, **kwargs)
        if self._finish is not None:
            self._finish(result)
        return result


def warn_of_failure(failure: str, error: Exception, goes_on: str) -> None:
    """Says that something which makes plans and updates faster failed, as a RuntimeWarning.

    :param failure: what failed
    :param error: why, of which the first line is told
    :param goes_on: how the run goes on
    """
    reason = (str(error).splitlines() or ["no message"])[0]
    warnings.warn(
        f"{failure} ({type(error).__name__}: {reason}); going on {goes_on}. Pass compile=False to "
        "silence this.",
        RuntimeWarning,
        stacklevel=3,
    )
