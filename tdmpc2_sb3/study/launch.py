"""A run's process: what it inherits, and where its output goes."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tdmpc2_sb3.saving.files import printable
from tdmpc2_sb3.study import runs
from tdmpc2_sb3.study.machine import Cores
from tdmpc2_sb3.study.plan import Cell, Plan

PR_SET_PDEATHSIG = 1


def log_path(plan: Plan, cell: Cell) -> Path:
    """The file with what a cell's runs print."""
    folder = plan.folder / runs.log_folder(plan, cell)
    return folder / f"{cell.task.name}.log"


def start(plan: Plan, cell: Cell, arguments: list[str], cores: Cores) -> subprocess.Popen[bytes]:
    """Start a run in the study's folder, on these cores.

    :param arguments: of the interpreter
    """
    threads = str(plan.threads)
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)}
    options: dict[str, Any] = {}
    if os.name == "posix":
        # A session of its own: Ctrl-C in the terminal reaches the runner, and through it runs.
        options = {"preexec_fn": lambda: _prepare(cores.numbers), "start_new_session": True}
    with log_path(plan, cell).open("ab") as file:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=plan.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            **options,
        )


def _prepare(cores: list[int]) -> None:
    """In a run's process, before the zoo: its cores, and what the death of the runner means."""
    # A runner started by a script in the background ignores Ctrl-C, and its children would.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if cores:
        os.sched_setaffinity(0, cores)
    if sys.platform == "linux":  # Ctrl-C when the runner dies, kill -9 included: a checkpoint
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def last_line(plan: Plan, cell: Cell) -> str:
    """The last line that a cell's runs printed."""
    text = log_path(plan, cell).read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return printable(lines[-1]) if lines else "it printed nothing"
