"""A cell's log folder: the zoo's command for it, how far it has come, and how to go on."""

from __future__ import annotations

import datetime
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tdmpc2_sb3.callbacks import latest_checkpoint
from tdmpc2_sb3.saving.files import atomic_write, open_zip, read_json
from tdmpc2_sb3.study.machine import describe, try_lock
from tdmpc2_sb3.study.plan import Cell, Plan
from tdmpc2_sb3.study.plot import read_episodes
from tdmpc2_sb3.zoo import trust
from tdmpc2_sb3.zoo.algorithms import ALGORITHMS
from tdmpc2_sb3.zoo.checkpoints import LOCK_FILE


class Next(NamedTuple):
    """What a cell needs.

    :param action: `start`, `resume`, `wait` for a process at work in it, or `record` as it ended
    :param run: the run's folder, None to start
    """

    action: str
    run: Path | None


def check_names(plan: Plan) -> None:
    """Compare a study with what the zoo knows.

    :raises ValueError: if an algorithm or an environment is unknown
    """
    import gymnasium
    import rl_zoo3.import_envs  # noqa: F401  (registers ids)
    from rl_zoo3.utils import ALGOS

    from tdmpc2_sb3.zoo.register import install

    install()
    for arm in plan.arms:
        if arm.algo not in ALGOS:
            raise ValueError(
                f"'algo' of arm '{arm.name}' is '{arm.algo}': the zoo has {', '.join(ALGOS)}."
            )
    for task in plan.tasks:
        if task.env not in gymnasium.registry:
            raise ValueError(
                f"There is no environment '{task.env}': suite tasks are named like "
                "DMC/walker-walk-v0."
            )


def log_folder(plan: Plan, cell: Cell) -> str:
    """The zoo's `-f` for a cell, relative to the study's folder; it holds one cell a task."""
    return f"{plan.logs}/{cell.arm.name}/seed{cell.seed}"


def train_arguments(plan: Plan, cell: Cell) -> list[str]:
    """The zoo's command for a cell, without the interpreter."""
    options: dict[str, Any] = {
        "--algo": cell.arm.algo,
        "--env": cell.task.env,
        "--seed": cell.seed,
        "-n": cell.steps,
        "--eval-freq": cell.eval_freq,
        "--eval-episodes": cell.eval_episodes,
        "--save-freq": cell.save_freq,
        "--num-threads": plan.threads,
        "--device": plan.device,
        "--conf-file": cell.arm.conf_file,
        "-f": log_folder(plan, cell),
    }
    command = ["-m", "rl_zoo3.train"]
    for option, value in options.items():
        if value is not None:
            command += [option, str(value)]
    if cell.arm.params:  # the zoo evaluates them as Python
        command += ["-params", *(f"{key}:{value!r}" for key, value in cell.arm.params.items())]
    return command


def resume_arguments(plan: Plan, run: Path) -> list[str]:
    """The command that goes on with a run, without the interpreter.

    What the run imports and evaluates is what the study's own command named.
    """
    return ["-m", "tdmpc2_sb3.zoo", "resume", str(run.relative_to(plan.folder)), trust.OPTION]


def newest_run(plan: Plan, cell: Cell) -> Path | None:
    """The run's folder that the zoo numbered last, None if none was started."""
    folder = plan.folder / log_folder(plan, cell) / cell.arm.algo
    runs = [
        path
        for path in folder.glob(f"{cell.task.name}_*")
        if path.name.removeprefix(f"{cell.task.name}_").isdigit()
    ]
    return max(runs, key=lambda path: int(path.name.rpartition("_")[2]), default=None)


def saved_steps(run: Path, name: str) -> int:
    """Steps of a run's final model, 0 if there is none or it was never written to its end."""
    try:
        with open_zip(run / f"{name}.zip", "zip", "model") as archive:
            if "data.json" in archive.namelist():  # ours
                return int(read_json(archive, "data.json")["data"]["num_timesteps"])
            return int(read_json(archive, "data")["num_timesteps"])
    except (OSError, KeyError, TypeError, ValueError):
        return 0


def checkpoint_steps(run: Path) -> int:
    """Steps of a run's newest checkpoint, 0 if there is none."""
    newest = latest_checkpoint(run)
    return 0 if newest is None else int(newest.name.split("_")[1].split(".")[0])


def is_busy(run: Path) -> bool:
    """Whether a process is at work in a run's folder, as far as locks tell."""
    if not (run / LOCK_FILE).exists():
        return False
    lock = try_lock(run / LOCK_FILE)
    if lock is not None:
        lock.close()
    return lock is None and sys.platform != "win32"


def what_next(plan: Plan, cell: Cell) -> Next:
    """What is to be done for a cell, from its log folder alone."""
    run = newest_run(plan, cell)
    if run is None:
        return Next("start", None)
    if is_busy(run):
        return Next("wait", run)
    if saved_steps(run, cell.task.name) >= cell.steps:
        return Next("record", run)
    if cell.arm.algo in ALGORITHMS and checkpoint_steps(run):
        return Next("resume", run)
    return Next("start", None)


def steps_done(plan: Plan, cell: Cell) -> tuple[int, float]:
    """Steps in finished episodes of a cell's newest run, and minutes for them."""
    run = newest_run(plan, cell)
    episodes = None if run is None else read_episodes(run)
    if episodes is None or len(episodes.steps) == 0:
        return 0, 0.0
    return int(episodes.steps[-1]), float(episodes.minutes[-1])


def _facts_file(plan: Plan, cell: Cell) -> Path:
    return plan.folder / log_folder(plan, cell) / f"{cell.task.name}.yml"


def note_attempt(plan: Plan, cell: Cell, arguments: list[str]) -> None:
    """Write down with what a run is started or resumed, beside its log.

    :raises ValueError: if there are runs of a cell of this name with other settings
    """
    file = _facts_file(plan, cell)
    facts: dict[str, Any] = {"settings": cell.settings, "attempts": []}
    if file.is_file():
        facts = yaml.safe_load(file.read_text())
        if facts["settings"] != cell.settings:
            raise ValueError(
                f"'{file}' tells of runs of this arm with other settings: remove them, or give the "
                "changed arm another name."
            )
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    command = shlex.join(["python", *arguments])
    facts["attempts"].append({"started": now, "command": command, **describe()})
    text = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
    atomic_write(file, lambda out: _write(out, text))


def _write(out: Any, text: str) -> None:
    out.write(text.encode())


def attempts(plan: Plan, cell: Cell) -> list[dict[str, Any]]:
    """What :func:`note_attempt` wrote, in its order."""
    file = _facts_file(plan, cell)
    return list(yaml.safe_load(file.read_text())["attempts"]) if file.is_file() else []
