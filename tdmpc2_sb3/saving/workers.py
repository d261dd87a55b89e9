"""The processes of vectorised environments: one that dies is noticed and named.

SB3's SubprocVecEnv waits for each process's answer. Where other processes hold copies of its pipe,
the answer of a dead one never comes; and closing then waits for answers that came already.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

#: How often a process is looked at whose end the system does not tell of.
POLL_SECONDS = 2.0

#: How long the closing of an environment may take once its first process has ended.
CLOSING_SECONDS = 8.0

#: How long an error in a pipe may precede the news that a process has ended.
NEWS_SECONDS = 10.0


#: How long a process may be stopped (SIGSTOP, a debugger) until a line tells why nothing happens.
STOPPED_SECONDS = 10.0


class WorkerDiedError(RuntimeError):
    """A process of a vectorised environment has ended without being asked to."""


def processes_of(env: VecEnv | None) -> SubprocVecEnv | None:
    """Return the SubprocVecEnv within an environment's wrappers, None if there is none."""
    layer: Any = env
    while hasattr(layer, "venv"):
        layer = layer.venv
    return layer if isinstance(layer, SubprocVecEnv) else None


class Watch:
    """Watches environments' processes in a thread that sleeps until one ends.

    Its pipe is then shut down, so that whoever waits for its answer gets an error at once.

    :param envs: environments of any kind; only those with processes are watched
    :raises RuntimeError: if one of those is closed
    """

    def __init__(self, envs: Iterable[VecEnv | None] = ()):
        found = {id(each): each for each in map(processes_of, envs) if each is not None}
        if any(env.closed for env in found.values()):
            raise RuntimeError(
                "A SubprocVecEnv is closed, so that its processes have ended: make another "
                "(for a model: model.set_env(env))."
            )
        self._watched = [_Watched(env) for env in found.values()]
        self._dead: _Watched | None = None
        self._over = False
        for each in self._watched:
            threading.Thread(target=self._wait, args=(each,), daemon=True).start()

    def _wait(self, watched: _Watched) -> None:
        while not self._over and not watched.closed:
            multiprocessing.connection.wait(watched.sentinels, timeout=POLL_SECONDS)
            if not self._over and watched.find_dead():
                self._dead = watched
                return
            watched.tell_stopped()
            time.sleep(0.05)  # an environment at its closing

    def check(self) -> None:
        """Raise if a process has died; costs nothing otherwise.

        :raises WorkerDiedError: naming it
        """
        if self._dead is not None:
            raise WorkerDiedError(self._dead.end())

    def explain(self, error: BaseException) -> None:
        """Raise in place of an error in a pipe if the cause is that a process has died.

        :raises WorkerDiedError: naming it
        """
        broken = isinstance(error, (EOFError, ConnectionError)) or "end of file" in str(error)
        deadline = time.monotonic() + (NEWS_SECONDS if broken and self._watched else 0.0)
        while self._dead is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if self._dead is not None:
            raise WorkerDiedError(self._dead.end()) from error

    def close(self) -> None:
        """Watch no longer."""
        self._over = True
        self._dead = None
        for each in self._watched:
            each.release()


class _Watched:
    """One environment's processes and pipes, known without keeping the environment alive."""

    def __init__(self, env: SubprocVecEnv):
        self._env = weakref.ref(env)
        self._processes = list(env.processes)
        self.sentinels = [process.sentinel for process in self._processes]
        self._lines = [_copy_of_line(remote) for remote in env.remotes]
        # An environment that is thrown away ends its processes by the end of its pipes.
        self.release = weakref.finalize(env, _close_all, self._lines)
        self.dead: int | None = None
        self._stopped: dict[int, float] = {}  # since when, infinity once it is told

    @property
    def closed(self) -> bool:
        env = self._env()
        return env is None or bool(env.closed)

    def find_dead(self) -> bool:
        """Whether a process has died; the pipes are then shut down."""
        ended = [i for i, process in enumerate(self._processes) if process.exitcode is not None]
        if not ended or self.closed:
            return False
        if self._processes[ended[0]].exitcode == 0:  # a closing environment ends like this
            deadline = time.monotonic() + CLOSING_SECONDS
            while time.monotonic() < deadline:
                time.sleep(0.05)
                if self.closed:
                    return False
        self.dead = ended[0]
        for line in self._lines:
            if line is not None:
                with contextlib.suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)
        return True

    def tell_stopped(self) -> None:
        """Print a line about each process that stands still: it may go on, so the run waits."""
        for number, process in enumerate(self._processes):
            if not _is_stopped(process.pid):
                self._stopped.pop(number, None)
                continue
            since = self._stopped.setdefault(number, time.monotonic())
            if time.monotonic() - since > STOPPED_SECONDS:
                self._stopped[number] = math.inf
                print(
                    f"Environment process {number} of {len(self._processes)} (pid {process.pid}) "
                    f"is stopped, and the run waits for it: kill -CONT {process.pid} lets it go "
                    f"on, kill -KILL {process.pid} ends the run.",
                    file=sys.stderr,
                    flush=True,
                )

    def end(self) -> str:
        """End the other processes, so that closing waits for none, and say which one died."""
        assert self.dead is not None
        process = self._processes[self.dead]
        message = (
            f"Environment process {self.dead} of {len(self._processes)} (pid {process.pid}) "
            f"{_describe(process.exitcode)}."
        )
        env = self._env()
        if env is not None:
            kill(env)
        return message


def _is_stopped(pid: int | None) -> bool:
    """Whether a signal or a debugger has stopped a process; known on Linux alone."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[:1] in (["T"], ["t"])


def _describe(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"ended with exit code {exitcode}; what it said of the cause stands above"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"number {-exitcode}"
    hint = " (as the system does when memory is short)" if name == "SIGKILL" else ""
    return f"died by signal {name}{hint}"


def _copy_of_line(remote: Any) -> socket.socket | None:
    """The same pipe under a number of its own: None on Windows, where its end is seen at once."""
    if os.name != "posix":
        return None
    return socket.socket(fileno=os.dup(remote.fileno()))


def _close_all(lines: list[socket.socket | None]) -> None:
    for line in lines:
        if line is not None:
            line.close()


def kill(env: VecEnv) -> None:
    """End an environment's processes whatever they are doing; closing it is then done."""
    inner = processes_of(env)
    if inner is None or inner.closed:
        return
    for process in inner.processes:
        process.kill()
    for process in inner.processes:
        process.join(NEWS_SECONDS)
    for remote in inner.remotes:
        remote.close()
    inner.waiting = False
    inner.closed = True


def kill_at_exit(env: VecEnv) -> None:
    """End an environment's processes with this one.

    Python asks them by SIGTERM and waits: for ever, where they ignore it.
    """
    inner = processes_of(env)
    if inner is None:
        return
    reference, owner = weakref.ref(inner), os.getpid()

    def end() -> None:
        alive = reference()
        if alive is not None and os.getpid() == owner:
            kill(alive)

    atexit.register(end)


@contextlib.contextmanager
def watched(envs: Iterable[VecEnv | None]) -> Iterator[Watch]:
    """Watch the environments' processes in the block.

    :raises WorkerDiedError: in place of the error in a pipe that the death of one caused
    """
    watch = Watch(envs)
    try:
        yield watch
    except (EOFError, OSError) as error:
        watch.explain(error)
        raise
    finally:
        watch.close()
