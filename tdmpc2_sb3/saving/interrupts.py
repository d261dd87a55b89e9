"""Ctrl-C, SIGTERM and SIGHUP take effect between the steps of learning, not within one.

What is saved after an interrupted step can then be resumed exactly: the simulator, the replay
buffer and the weights agree with one another.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from tdmpc2_sb3.saving.workers import WorkerDiedError

#: A step that takes longer than this after Ctrl-C (it may be compiling) is broken off.
GRACE_SECONDS = 3.0

#: A terminal that closes sends SIGHUP twice, from the system and from the shell: that is one.
SAME_SIGNAL_SECONDS = 0.25

#: By which a cluster, a service manager or a closed terminal ends a job.
ENDING_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Ended(SystemExit, KeyboardInterrupt):
    """SIGTERM or SIGHUP came.

    For a program that saves its work at Ctrl-C this is one; uncaught, it ends the interpreter with
    the exit code that a shell gives to the signal.

    :param signum: the signal's number
    """

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


class _Hold:
    """A stop that waits for the end of a block.

    :ivar signum: of the signal that came, None before
    :ivar expired: whether the block has had its time
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.expired = False
        self._timer: threading.Timer | None = None

    def receive(self, signum: int) -> None:
        self.signum = signum
        if self._timer is None:
            self._timer = threading.Timer(GRACE_SECONDS, self._expire)
            self._timer.daemon = True
            self._timer.start()

    def _expire(self) -> None:
        self.expired = True
        assert self.signum is not None
        _thread.interrupt_main(signal.Signals(self.signum))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


_broken_off = False
_hold: _Hold | None = None  # of the block at work
_first_signal: float | None = None  # when the first of the ending signals came
_ended_by: int | None = None


def _stop(signum: int) -> BaseException:
    return KeyboardInterrupt() if signum == signal.SIGINT else Ended(signum)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Hold a stop back until the end of the block; a second Ctrl-C, or 3 s, breaks it off.

    Only in the main thread, and only where the signals mean what they usually do: a handler of the
    program's own stays. SIGTERM and SIGHUP are held back within :func:`ending_signals` alone.

    :raises KeyboardInterrupt: at the end of the block, or when it is broken off
    """
    global _broken_off, _hold
    _broken_off = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    hold = _hold = _Hold()
    if usual:
        signal.signal(signal.SIGINT, _handle_ctrl_c)
    try:
        yield
    except (EOFError, OSError, WorkerDiedError) as error:
        # The terminal sends its signals to the environments' processes too.
        if hold.signum is None:
            raise
        _broken_off = True
        raise _stop(hold.signum) from error
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _hold = None
        hold.close()
    if hold.signum is not None:
        raise _stop(hold.signum)


def _handle_ctrl_c(signum: int, frame: FrameType | None) -> None:
    assert _hold is not None
    if _hold.signum is not None:
        _break_off(_hold)
    _hold.receive(signum)


def _break_off(hold: _Hold) -> None:
    global _broken_off
    _broken_off = True
    assert hold.signum is not None
    raise _stop(hold.signum)


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does; a second one ends the process at once.

    Only in the main thread, and only where they would end the process: a handler of the program's
    own stays, and so does nohup.

    :raises Ended: in the block, when one came
    """
    global _first_signal, _ended_by
    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [each for each in ENDING_SIGNALS if signal.getsignal(each) is signal.SIG_DFL]
    if taken:
        _first_signal = _ended_by = None
    for each in taken:
        signal.signal(each, _handle_ending)
    try:
        yield
    finally:
        for each in taken:
            signal.signal(each, signal.SIG_DFL)


def _handle_ending(signum: int, frame: FrameType | None) -> None:
    global _first_signal, _ended_by
    if _first_signal is None:
        _first_signal, _ended_by = time.monotonic(), signum
        drop_closed_output()
        if _hold is None:
            raise Ended(signum)
        _hold.receive(signum)
    elif _hold is not None and _hold.expired:
        _break_off(_hold)
    elif time.monotonic() - _first_signal > SAME_SIGNAL_SECONDS:
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)


def drop_closed_output() -> None:
    """Print into nothing where the terminal, or the program behind the pipe, is gone.

    A line printed to it would be an error, and keep the last checkpoint from being written.
    """
    if not hasattr(select, "poll"):
        return
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no file, or closed
            descriptor = stream.fileno()  # type: ignore[union-attr]
            poll = select.poll()
            poll.register(descriptor, 0)  # what is asked for here is always reported
            if poll.poll(0):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, descriptor)
                os.close(nothing)


def ended_by() -> int | None:
    """Return the signal that ended the latest :func:`ending_signals`, None if none did."""
    return _ended_by


def broken_off() -> bool:
    """Return whether the latest block was left in the middle, its effects in no known state."""
    return _broken_off
