"""What a result must be read with: commit, versions and machine; and the cores that runs get."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import IO, Any

import tdmpc2_sb3

PACKAGES = ("torch", "stable-baselines3", "rl_zoo3", "gymnasium", "dm_control", "mujoco", "numpy")


def processor() -> str:
    """Return the processor's name as the system writes it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(*packages: str) -> str:
    """Return ``name version`` of installed distributions, with commas between them."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def commit() -> str:
    """Return the package's commit, with ``+`` if its files differ from it; or its version."""
    folder = Path(tdmpc2_sb3.__file__).parent

    def git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError):
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                return done.stdout.strip()
        return None

    if git("ls-files", "--error-unmatch", "__init__.py") is not None:
        return f"{git('rev-parse', '--short=12', 'HEAD')}{'+' if git('diff', 'HEAD', '.') else ''}"
    return f"tdmpc2-sb3 {importlib.metadata.version('tdmpc2-sb3')}"


def describe() -> dict[str, Any]:
    """Return commit, versions and machine, as they are written beside a result."""
    return {
        "commit": commit(),
        "versions": f"Python {platform.python_version()}, {versions(*PACKAGES)}",
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
    }


def available_cores() -> list[int]:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def try_lock(path: Path) -> IO[str] | None:
    """Lock a file until the returned object is closed or the process ends.

    What it holds stays, and a link is not followed: others may have put it there.

    :return: None if another process has it, or where there are no locks
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    file = open(os.open(path, flags, 0o666), "r+")  # noqa: SIM115  (it stays open)
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        file.close()
        return None
    return file


class Cores:
    """Some cores, kept from other runners on this machine until they are given back."""

    def __init__(self, numbers: list[int], locks: list[IO[str]]) -> None:
        self.numbers = numbers
        self._locks = locks

    @classmethod
    def take(cls, count: int) -> Cores:
        """Take that many; none at all where so many are not free, or cannot be pinned to."""
        if not hasattr(os, "sched_setaffinity"):
            return cls([], [])
        folder = Path(tempfile.gettempdir()) / f"tdmpc2_sb3_cores_{os.getuid()}"
        taken = cls([], [])
        with contextlib.suppress(OSError):  # a file of that name, or no room
            folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat() if os.path.lexists(folder) else None
        if status is None or not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return taken  # somebody else's
        for core in available_cores():
            if len(taken.numbers) < count and (lock := try_lock(folder / str(core))):
                taken.numbers.append(core)
                taken._locks.append(lock)
        if len(taken.numbers) < count:
            taken.give_back()
        return taken

    def give_back(self) -> None:
        """Let others have them."""
        for lock in self._locks:
            lock.close()
        self.numbers, self._locks = [], []
