"""Ctrl-C takes effect between the steps of learning, not within one.

What is saved after an interrupted step can then be resumed exactly: the simulator, the replay
buffer and the weights agree with one another.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

#: A step that takes longer than this after Ctrl-C (it may be compiling) is broken off.
GRACE_SECONDS = 3.0

_broken_off = False


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Hold a Ctrl-C back until the end of the block; a second one, or 3 s, breaks it off.

    Only in the main thread, and only where Ctrl-C means what it usually does: a handler of the
    program's own stays.

    :raises KeyboardInterrupt: at the end of the block, or when it is broken off
    """
    global _broken_off
    _broken_off = False
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    timer: threading.Timer | None = None

    def handle(signum: int, frame: FrameType | None) -> None:
        global _broken_off
        nonlocal timer
        if timer is not None:
            _broken_off = True
            raise KeyboardInterrupt
        timer = threading.Timer(GRACE_SECONDS, _thread.interrupt_main)
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if timer is not None:
            timer.cancel()
    if timer is not None:
        raise KeyboardInterrupt


def broken_off() -> bool:
    """Return whether the latest block was left in the middle, its effects in no known state."""
    return _broken_off
