"""``torch.compile`` that never stops a run: if it fails, the plain function goes on, said once."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch as th

Result = TypeVar("Result")


def compiled(
    function: Callable[..., Result],
    compile: bool | str,
    finish: Callable[[Result], object] | None = None,
) -> Callable[..., Result]:
    """The function, compiled at its first call if asked for and possible.

    Compiling takes minutes and is not faster than :mod:`tdmpc2_sb3.kernels` on a CPU, so "auto"
    leaves functions as they are. (On CUDA :mod:`tdmpc2_sb3.cuda_graphs` records them.)

    :param function: pure, of tensors
    :param compile: True compiles; False and "auto" do not
    :param finish: called with each result, e.g. a backward pass, which is compiled along and may
        fail like the function itself
    :raises ValueError: if ``compile`` is none of these
    """
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile is {compile!r}: use True, False or 'auto'.")

    def run(chosen: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        result = chosen(*args, **kwargs)
        if finish is not None:
            finish(result)
        return result

    plain = functools.partial(run, function)
    if compile is not True:
        return plain
    fast: Callable[..., Result] | None = None
    failed = False

    def call(*args: Any, **kwargs: Any) -> Result:
        nonlocal fast, failed
        if failed:
            return plain(*args, **kwargs)
        try:
            if fast is None:
                fast = th.compile(function)
            return run(fast, *args, **kwargs)
        except Exception as error:  # a compiler may fail in any way
            failed = True
            name = getattr(function, "__name__", "a function")
            warn_of_failure(f"torch.compile failed on {name}", error, "without compiling")
            return plain(*args, **kwargs)

    return call


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
