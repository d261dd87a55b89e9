"""How steadily a study's agents plan: at the ends of their runs, and at matched skill.

An agent's skill is the mean return of the last ten training episodes before it was saved.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tdmpc2_sb3.stability.metrics import spearman
from tdmpc2_sb3.stability.recording import RecordingConfig
from tdmpc2_sb3.study import runs
from tdmpc2_sb3.study.plan import Cell, Plan, Task
from tdmpc2_sb3.study.plot import read_episodes
from tdmpc2_sb3.study.statistics import LAST

#: Figures of an agent between which rank correlations over all agents are given.
GROWTH = "latent_error_growth"
OUTCOMES = ("realisation_gap_abs", "rank_correlation", "plan_change", "return")


class Kept(NamedTuple):
    """A saved agent of a cell.

    :param steps: of its run when it was saved
    :param skill: mean return of the last ten training episodes until then, NaN if fewer had ended
    """

    cell: Cell
    path: Path
    steps: int
    skill: float


def kept_models(plan: Plan, cell: Cell) -> list[Kept]:
    """The agents of a cell's run, by steps: those of ``save_freq``, and the last one."""
    run = runs.newest_run(plan, cell)
    if run is None:
        return []
    found = {
        int(name[1]): path
        for path in run.glob("rl_model_*_steps.zip")
        if (name := re.fullmatch(r"rl_model_(\d+)_steps\.zip", path.name))
    }
    last = runs.saved_steps(run, cell.task.name)
    if last:
        found[last] = run / f"{cell.task.name}.zip"
    episodes = read_episodes(run)
    kept = []
    for steps, path in sorted(found.items()):
        returns = episodes.returns[episodes.steps <= steps]
        skill = float(returns[-LAST:].mean()) if len(returns) >= LAST else float("nan")
        kept.append(Kept(cell, path, steps, skill))
    return kept


def at_the_end(plan: Plan, task: Task) -> list[Kept]:
    """The last agent of every finished run on a task."""
    cells = [cell for cell in plan.cells if cell.task == task]
    last = [kept_models(plan, cell)[-1:] for cell in cells]
    return [kept for each in last for kept in each if kept.steps >= kept.cell.steps]


def matched_pairs(
    plan: Plan, task: Task, arms: tuple[str, str], least: float, within: float
) -> Iterator[tuple[Kept, Kept]]:
    """For each seed the agents of two arms whose skills differ least.

    :param least: skill that both must have
    :param within: how far apart they may be, relative to the better one
    """
    by_seed: dict[int, dict[str, list[Kept]]] = {}
    for cell in plan.cells:
        if cell.task == task and cell.arm.name in arms:
            skilled = [each for each in kept_models(plan, cell) if each.skill >= least]
            by_seed.setdefault(cell.seed, {})[cell.arm.name] = skilled
    for models in by_seed.values():
        pairs = list(product(models.get(arms[0], []), models.get(arms[1], [])))
        alike = [pair for pair in pairs if _difference(pair) <= within]
        if alike:
            # Of equally good matches the more skilled one.
            yield min(alike, key=lambda pair: (_difference(pair), -pair[0].skill))


def _difference(pair: Sequence[Kept]) -> float:
    skills = [each.skill for each in pair]
    return (max(skills) - min(skills)) / max(max(skills), 1e-9)


def two_arms(plan: Plan, contrast: str) -> tuple[str, str]:
    """The arms of a contrast of two.

    :raises ValueError: if the study has no such contrast
    """
    weights = plan.contrasts.get(contrast, {})
    if sorted(weights.values()) != [-1.0, 1.0]:
        pairs = [name for name, each in plan.contrasts.items() if len(each) == 2]
        raise ValueError(
            f"'{contrast}' is no contrast of two arms of '{plan.name}': it has "
            f"{', '.join(map(repr, pairs)) or 'none'}."
        )
    first, second = sorted(weights, key=weights.__getitem__, reverse=True)
    return first, second


def groups(
    plan: Plan, task: Task, contrasts: Sequence[str], least: float, within: float
) -> dict[str, list[Kept]]:
    """What is measured together on a task, by name.

    :param contrasts: of two arms, whose pairs of equal skill are a group of their own
    :raises ValueError: if there is no agent, or no pair of a contrast
    """
    ends = at_the_end(plan, task)
    if not ends:
        raise ValueError(
            f"There is no agent of a finished run on {task.env} in '{plan.folder / plan.logs}': "
            "measure on the machine that made the runs."
        )
    found = {"end": ends}
    for contrast in contrasts:
        arms = two_arms(plan, contrast)
        pairs = list(matched_pairs(plan, task, arms, least, within))
        if not pairs:
            raise ValueError(
                f"No seed on {task.env} has agents of {arms[0]} and {arms[1]} whose skills are at "
                f"least {least:g} and within {within:.0%}: pass other --least or --within, and "
                "give the study 'save_freq' for more agents."
            )
        name = re.sub(r"\W+", "_", contrast).strip("_")
        found[name] = [each for pair in pairs for each in pair]
    return found


def correlations(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Spearman's rank correlation of open-loop growth with each outcome, over agents.

    :param values: agent -> figure -> mean over its episodes
    """
    found = {}
    for outcome in OUTCOMES:
        both = [(v[GROWTH], v[outcome]) for v in values.values() if {GROWTH, outcome} <= v.keys()]
        if len(both) > 2:
            found[outcome] = spearman(*np.array(both).T)
    return found


def measure(
    task: Task,
    kept: Sequence[Kept],
    folder: Path,
    config: RecordingConfig,
    say: Callable[[str], None],
) -> str:
    """Measure agents of one task together, and write tables and picture.

    :param folder: of the files
    :return: the table
    """
    import gymnasium as gym

    import dmc_gym_plugin  # noqa: F401  registers DMC/ ids
    from tdmpc2_sb3.stability.report import format_table, write
    from tdmpc2_sb3.stability.study import Subject, run_study
    from tdmpc2_sb3.tdmpc2 import TDMPC2
    from tdmpc2_sb3.zoo.algorithms import zoo_env_kwargs

    env = gym.make(task.env, **zoo_env_kwargs(task.env))
    subjects = [
        Subject(
            each.cell.arm.name,
            f"{each.cell.name}_{each.steps}",
            TDMPC2.load(each.path, device="cpu"),
        )
        for each in kept
    ]
    study = run_study(subjects, env, config, progress=say)
    write(study, folder, task.env)
    with (folder / "agents.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", "steps", "skill"])
        for each in kept:
            writer.writerow([each.cell.arm.name, each.cell.seed, each.steps, round(each.skill, 1)])
    means: dict[str, dict[str, float]] = {}
    single = [each for each in study.measurements if len(each.values) == 1]
    for name in {each.name for each in single}:
        for metric in {each.metric for each in single}:
            own = [e.values[0] for e in single if (e.name, e.metric) == (name, metric)]
            if own and np.isfinite(own).any():
                means.setdefault(name, {})[metric] = float(np.nanmean(own))
    lines = [format_table(study.estimates), ""]
    lines += [
        f"{GROWTH} and {outcome}: rank correlation {value:+.2f} over {len(means)} agents"
        for outcome, value in correlations(means).items()
    ]
    return "\n".join(lines)
