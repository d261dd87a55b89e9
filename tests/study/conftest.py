"""Small studies, as files on the disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tdmpc2_sb3.study.plan import Plan, read_plan
from tdmpc2_sb3.study.results import csv_path

#: A model so small that a test can train it, on episodes of 25 steps.
TINY = {
    "latent_dim": 16,
    "enc_dim": 32,
    "mlp_dim": 32,
    "num_samples": 16,
    "num_elites": 4,
    "num_pi_trajs": 2,
    "num_iterations": 1,
    "batch_size": 8,
    "learning_starts": 40,
    "initial_gradient_steps": 4,
    "gradient_steps": 1,
    "env_kwargs": {"action_repeat": 40},
    "callback": [{"tdmpc2_sb3.callbacks.ResumableCheckpointCallback": {"save_freq": 25}}],
}


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Hyperparameters of a run that takes seconds."""
    return dict(TINY)


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., Plan]:
    """Return a function that writes a study's YAML and reads it."""

    def write(**content: Any) -> Plan:
        content = {
            "name": "mini",
            "arms": {"a": None},
            "tasks": ["DMC/walker-walk-v0"],
            "steps": 100,
            **content,
        }
        file = tmp_path / "mini.yml"
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return read_plan(file)

    return write


@pytest.fixture
def made_csv() -> Callable[..., None]:
    """Return a function that writes the CSV of a planned run with given returns."""

    def write(
        plan: Plan,
        name: str,
        training: list[tuple[int, float]],
        evaluations: list[tuple[int, float]] = (),  # type: ignore[assignment]
        finished: bool = True,
    ) -> None:
        (cell,) = [each for each in plan.cells if each.name == name]
        header = {
            "study": plan.name,
            "arm": cell.arm.name,
            "task": cell.task.env,
            **cell.settings,
            "action_repeat": 2,
            "finished": finished,
            "minutes": 3.0,
            "attempts": [{"commit": "abc", "machine": "a laptop", "command": "python -m ..."}],
        }
        lines = [f"# {line}" for line in yaml.safe_dump(header, sort_keys=False).splitlines()]
        lines.append("kind,steps,frames,minutes,return,length")
        lines += [f"training,{s},{2 * s},0.0,{r},10" for s, r in training]
        lines += [f"evaluation,{s},{2 * s},0.0,{r},10" for s, r in evaluations]
        path = csv_path(plan, cell)
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")

    return write
