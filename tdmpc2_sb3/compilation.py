"""``torch.compile`` that never stops a run: whatever fails, the plain function goes on, said once."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, compile: bool | str) -> Function:
    """The function compiled at its first call, if asked for and possible.

    :param function: pure, of tensors
    :param compile: True compiles; False does not; "auto" leaves it to :func:`worth_compiling`
    :raises ValueError: if ``compile`` is neither
    """
    if compile not in (True, False, "auto"):
        raise ValueError(f"compile is {compile!r}: use True, False or 'auto'.")
    if compile is not True:
        return function

    import torch as th

    fast = th.compile(function)
    failed = False

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal failed
        if failed:
            return function(*args, **kwargs)
        try:
            return fast(*args, **kwargs)
        except Exception as error:  # a compiler may fail in any way
            failed = True
            warnings.warn(
                f"torch.compile failed on {function.__name__} ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no message'}); going on without "
                "compiling. Pass compile=False to silence this.",
                RuntimeWarning,
                stacklevel=2,
            )
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]
