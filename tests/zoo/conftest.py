"""Runs the zoo's programs as a user does: a new process, another working directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

#: A model so small that a test can train it: for `-params`.
TINY = [
    "latent_dim:16",
    "enc_dim:32",
    "mlp_dim:32",
    "num_samples:16",
    "num_elites:4",
    "num_pi_trajs:2",
    "num_iterations:1",
    "batch_size:8",
    "learning_starts:40",
    "initial_gradient_steps:4",
]


def _environment(**extra: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**clean, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **extra}


@pytest.fixture
def zoo(tmp_path: Path) -> Run:
    """Return a function that runs `python -m rl_zoo3.<program> <arguments>` in `tmp_path`.

    It checks the exit code and returns the finished process; `environment` adds variables,
    `module` runs another module than the zoo's, `check=False` leaves the exit code to the test.
    """

    def run(
        program: str,
        *arguments: str,
        module: str | None = None,
        check: bool = True,
        environment: dict[str, str] | None = None,
        timeout: int = 1200,
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module or f"rl_zoo3.{program}", *arguments]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=_environment(**(environment or {})),
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        if check:
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def tiny() -> list[str]:
    """Return `-params` values that make TD-MPC2 small enough for a test."""
    return list(TINY)
