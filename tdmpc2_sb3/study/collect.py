"""CSV files from log folders that the zoo's command wrote without the runner."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tdmpc2_sb3.study import results, runs
from tdmpc2_sb3.study.plan import Cell, Plan
from tdmpc2_sb3.zoo.yaml_files import read_yaml


def collect(plan: Plan, arm: str, folder: Path, commit: str) -> Iterator[str]:
    """Write a CSV for every run of an arm below a folder, and yield a line about each.

    An unfinished run is written as far as it has come.

    :param commit: that made the runs, which a log folder does not tell
    :raises ValueError: if there is no run, or one that the study does not plan
    """
    if arm not in (each.name for each in plan.arms):
        known = ", ".join(each.name for each in plan.arms)
        raise ValueError(f"The study has no arm '{arm}': it has {known}.")
    found = sorted(folder.rglob("args.yml"))
    if not found:
        raise ValueError(f"There is no run of the zoo below '{folder}': name its log folder.")
    for file in found:
        run = file.parent.parent
        args = read_yaml(file, strict=False)
        cell = _planned(plan, arm, run, args)
        before = results.read_result(plan, cell)
        if before is not None and before.finished:
            yield f"{cell.title}: is there already"
            continue
        finished = runs.saved_steps(run, cell.task.name) >= cell.steps
        attempts = [_attempt(file.parent, commit)]
        text = results.make_csv(plan, cell, run, attempts, finished)
        results.write_csv(plan, cell, text)
        steps = results.parse_csv(text, cell.name).training[0]
        made = f"{max(steps, default=0)} of {cell.steps} steps"
        yield f"{cell.title}: {'finished' if finished else 'unfinished, ' + made}"


def _planned(plan: Plan, arm: str, run: Path, args: dict[str, Any]) -> Cell:
    """The cell of the grid that a run belongs to."""
    env, seed = args.get("env"), args.get("seed")
    for cell in plan.cells:
        if (cell.arm.name, cell.task.env, cell.seed) == (arm, env, seed):
            break
    else:
        raise ValueError(f"'{run}' is {env} with seed {seed}, which arm '{arm}' does not plan.")
    made = {
        "algo": args.get("algo"),
        "params": results.plain(args.get("hyperparams") or {}),
        "conf_file": args.get("conf_file"),
        "steps": args.get("n_timesteps"),
        "eval_episodes": args.get("eval_episodes"),
    }
    if cell.eval_freq is not None:
        made["eval_freq"] = args.get("eval_freq")
    for key, value in made.items():
        if value != cell.settings[key]:
            raise ValueError(
                f"'{run}' was made with {key} = {value!r}, arm '{arm}' has {cell.settings[key]!r}."
            )
    return cell


def _attempt(folder: Path, commit: str) -> dict[str, Any]:
    """What a run's folder tells of how it was made."""
    file = folder / "command.txt"
    # The zoo joins the arguments by blanks, unquoted; the first is an interpreter's path.
    _, _, arguments = (file.read_text() if file.is_file() else "").partition(" ")
    began = datetime.fromtimestamp((folder / "args.yml").stat().st_mtime, timezone.utc)
    return {
        "started": began.strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"python {arguments}" if arguments else "not recorded",
        "commit": commit,
        "versions": "not recorded",
        "machine": "not recorded",
    }
