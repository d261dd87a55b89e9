"""The report's pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tdmpc2_sb3.study import aggregate, statistics
from tdmpc2_sb3.study.plan import Plan, Task
from tdmpc2_sb3.study.plot import draw_published, thousands
from tdmpc2_sb3.study.results import Result

#: Training episodes are averaged over so many stretches of a run.
STRETCHES = 40
COLUMNS = 3
PUBLISHED_COLOURS = {"tdmpc2": "black", "sac": "grey"}

Grid = Mapping[str, Mapping[str, Mapping[int, Result]]]  # task -> arm -> seed
Beside = Sequence[tuple[Plan, Grid]]


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def lines(runs: Sequence[Result], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Frames [K] and the returns of several runs there [runs, K], as far as all of them reach.

    :param kind: `evaluation` at the places of its evaluations, `training` in means over stretches
    """
    curves = [statistics.curve(run, kind) for run in runs]
    curves = [curve for curve in curves if len(curve[0])]
    if not curves:
        return np.empty(0), np.empty((0, 0))
    end = min(places[-1] for places, _ in curves)
    if kind == "evaluation":
        densest = max((places for places, _ in curves), key=len)
        first = max(places[0] for places, _ in curves)
        grid = densest[(densest >= first) & (densest <= end)]
        grid = grid if len(grid) else np.array([end])
        return grid, np.stack([np.interp(grid, *curve) for curve in curves])
    begin = max(places[0] for places, _ in curves)
    count = min(STRETCHES, *(len(places) for places, _ in curves))
    grid = np.linspace(begin, end, count) if count > 1 else np.array([end])
    width = grid[1] - grid[0] if len(grid) > 1 else end
    return grid, np.stack([_stretches(*curve, grid, width) for curve in curves])


def _stretches(
    places: np.ndarray, returns: np.ndarray, grid: np.ndarray, width: float
) -> np.ndarray:
    """Mean return of the episodes that end within a stretch before each place, else the last."""
    means = []
    for place in grid:
        before = places <= place + 1e-9
        inside = before & (places > place - width)
        means.append(returns[inside].mean() if inside.any() else returns[before][-1])
    return np.array(means)


def learning_curves(plan: Plan, grid: Grid, path: Path, kind: str, beside: Beside = ()) -> None:
    """Return against frames, a picture a task, with 95% intervals.

    Returns of whole episodes have the published curves and the tasks' references beside them.

    :param kind: `evaluation` or `training`
    :param beside: other studies with their runs, drawn dashed as far as this one's frames go
    """
    tasks = [task for task in plan.tasks if any(grid.get(task.env, {}).values())]
    columns = min(COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = _figure(4.6 * columns + 0.4, 3.6 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, task in zip(axes, tasks, strict=False):
        arms = [
            (arm.name, style, list(runs.get(task.env, {}).get(arm.name, {}).values()))
            for each, runs, style in ((plan, grid, "-"), *((*other, "--") for other in beside))
            for arm in each.arms
        ]
        _learning_curve(axis, task, arms, kind)
    for axis in axes[len(tasks) :]:
        axis.remove()
    figure.savefig(path, dpi=120)


def _learning_curve(
    axis: Any, task: Task, arms: Sequence[tuple[str, str, Sequence[Result]]], kind: str
) -> None:
    ends = []
    for number, (name, style, runs) in enumerate(arms):
        places, returns = lines(runs, kind)
        if len(places) == 0:
            continue
        if style == "-":
            ends.append(places[-1])
        mean, low, high = aggregate.mean_curve(returns)
        label, colour = f"{name} ({len(returns)})", f"C{number % 10}"
        axis.plot(places, mean, style, color=colour, label=label, linewidth=2, marker=".")
        axis.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set_xlim(left=0)
    if ends and any(style == "--" for _, style, _ in arms):
        axis.set_xlim(right=max(ends))
    if kind == "evaluation" or task.is_whole:
        _draw_others(axis, task)
    axis.set(title=task.env, xlabel="frames", ylabel=f"{kind} return")
    axis.xaxis.set_major_formatter(lambda value, _: thousands(value))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize="small")


def _draw_others(axis: Any, task: Task) -> None:
    """The published curves, and the returns that the task's references have."""
    if task.env.startswith("DMC/"):
        draw_published(axis, task.name, PUBLISHED_COLOURS)
    for number, (name, frames, height) in enumerate(task.references):
        if frames is None:
            axis.axhline(height, color="black", linestyle=(number, (1, 4)), label=name)
        else:
            axis.plot([frames], [height], "x", color="black", markersize=8, label=name)


def profiles(scores: Mapping[str, np.ndarray], colours: Mapping[str, int], path: Path) -> None:
    """Performance profiles: the share of runs above each normalised score.

    :param scores: [runs, tasks] of each arm
    """
    places = np.linspace(0.0, 1.0, 51)
    figure = _figure(5.5, 3.8)
    axis = figure.subplots()
    for arm, matrix in scores.items():
        share, low, high = aggregate.profile(matrix, places)
        axis.plot(places, share, color=f"C{colours[arm]}", label=arm, linewidth=2)
        axis.fill_between(places, low, high, color=f"C{colours[arm]}", alpha=0.2, linewidth=0)
    axis.set(xlabel="normalised score", ylabel="share of runs above it", xlim=(0, 1))
    axis.set_ylim(-0.02, 1.02)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def aggregates(
    figures: Mapping[str, Mapping[str, statistics.Estimate]],
    colours: Mapping[str, int],
    path: Path,
) -> None:
    """Aggregate figures of each arm with their intervals.

    :param figures: arm -> figure's name -> estimate
    """
    names = list(next(iter(figures.values())))
    figure = _figure(3.0 * len(names), 0.8 + 0.5 * len(figures))
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axis, name in zip(axes, names, strict=True):
        for row, (arm, estimates) in enumerate(figures.items()):
            mean, low, high, _ = estimates[name]
            axis.barh(row, high - low, left=low, color=f"C{colours[arm]}", alpha=0.4, height=0.6)
            axis.plot([mean, mean], [row - 0.3, row + 0.3], color=f"C{colours[arm]}", linewidth=2)
        axis.set_yticks(range(len(figures)), list(figures))
        axis.set(title=name, xlabel="normalised score")
        axis.grid(alpha=0.3, axis="x")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
