"""The report of a study, from its CSV files alone: the same files give the same report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tdmpc2_sb3.saving.files import atomic_write
from tdmpc2_sb3.study import aggregate, pictures, statistics
from tdmpc2_sb3.study.plan import Cell, Plan, Task, read_plan
from tdmpc2_sb3.study.plot import PUBLISHED_LABELS, published_return
from tdmpc2_sb3.study.results import Result, csv_path, read_results
from tdmpc2_sb3.study.statistics import LAST, Estimate

FILE = "README.md"


def write(plan: Plan) -> str:
    """Write the report into the results folder and return where it lies, and its main table.

    :raises ValueError: if there is no CSV yet
    """
    results = read_results(plan)
    if not results:
        raise ValueError(f"There is no CSV in '{plan.results_folder}' yet: `run` writes them.")
    report = Report(plan, results)
    text = report.text()

    def writer(file: Any) -> None:
        file.write(text.encode())

    path = atomic_write(plan.results_folder / FILE, writer)
    return f"{report.main_table()}\nwritten to {path}"


class Report:
    """A study's tables and pictures.

    :param plan: the study
    :param results: by the names of the cells that have one
    """

    def __init__(self, plan: Plan, results: Mapping[str, Result]) -> None:
        self.plan = plan
        self.results = results
        self.grid = _grid(plan, results)
        self.colours = {arm.name: number for number, arm in enumerate(plan.arms)}

    def text(self) -> str:
        """The whole report; draws the pictures on the way."""
        plan = self.plan
        parts = [
            f"# {plan.name}",
            _explanation(plan),
            "## Tasks",
            self.main_table(),
            self.curves(),
            self.differences(),
            self.contrasts(),
            self.over_tasks(),
            "## Runs",
            self.runs(),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def curves(self) -> str:
        """Learning curves; of a study that is judged by training episodes also the evaluations'."""
        plan, runs = self.plan, self.grid
        beside = []
        for file in plan.beside:
            other = read_plan(plan.folder / file)
            beside.append((other, _grid(other, read_results(other))))
        folder, training = plan.results_folder, plan.curve == "training"
        drawn = ["![Learning curves](curves.png)"]
        pictures.learning_curves(
            plan, runs, folder / "curves.png", plan.curve, () if training else beside
        )
        if training and any(len(run.evaluations[0]) for run in self.results.values()):
            pictures.learning_curves(plan, runs, folder / "evaluations.png", "evaluation", beside)
            drawn.append("![Evaluations](evaluations.png)")
        return "\n\n".join(drawn)

    def frames(self, task: Task) -> int:
        """Frames to which all arms of a task are compared: those of its shortest run."""
        return min(run.frames for arm in self.grid[task.env].values() for run in arm.values())

    def _cells(self) -> list[tuple[Task, str, dict[int, Result]]]:
        return [
            (task, arm.name, self.grid[task.env][arm.name])
            for task in self.plan.tasks
            for arm in self.plan.arms
            if arm.name in self.grid.get(task.env, {})
        ]

    def _figures(self, task: Task, runs: Mapping[int, Result]) -> dict[str, dict[int, float]]:
        """Figures of every run by their names and seeds; a run without one is left out."""
        frames, kind = self.frames(task), self.plan.curve
        found = {
            f"last {LAST} episodes": {
                seed: statistics.last_returns(run) if run.finished else None
                for seed, run in runs.items()
            },
            "last evaluation": {
                seed: statistics.last_evaluation(run) if run.finished else None
                for seed, run in runs.items()
            },
            "area": {
                seed: statistics.area(run, frames, task.low, task.high, kind)
                for seed, run in runs.items()
            },
            **{
                f"at {place:,}": {
                    seed: statistics.value_at(run, place, kind) for seed, run in runs.items()
                }
                for place in self.plan.at_frames
            },
        }
        return {
            name: {seed: value for seed, value in values.items() if value is not None}
            for name, values in found.items()
        }

    def main_table(self, columns: Sequence[str] | None = None) -> str:
        """A line for every arm on every task.

        :param columns: those wanted, None for all
        """
        published = list(PUBLISHED_LABELS)
        rows = []
        for task, arm, runs in self._cells():
            figures = self._figures(task, runs)
            estimates = [
                _shown(aggregate.mean(list(values.values())) if values else None, name == "area")
                for name, values in figures.items()
            ]
            done = sum(run.finished for run in runs.values())
            seeds = f"{len(runs)}" if done == len(runs) else f"{len(runs)}, {done} finished"
            minutes = [float(run.header["minutes"]) for run in runs.values() if run.finished]
            frames = self.frames(task)
            rows.append(
                [
                    task.env,
                    arm,
                    f"{frames:,}",
                    seeds,
                    *estimates,
                    _first(task, runs),
                    f"{np.mean(minutes):.0f}" if minutes else "-",
                    *(_published(task, algo, frames) for algo in published),
                ]
            )
        names = list(self._figures(*self._cells()[0][::2]))
        head = ["task", "arm", "frames", "seeds", *names, "above the floor", "minutes"]
        head += [f"published {algo}" for algo in published]
        kept = [n for n, name in enumerate(head) if columns is None or name in columns]
        return table([head[n] for n in kept], [[row[n] for n in kept] for row in rows])

    def differences(self) -> str:
        """The differences of every arm to the first one, by seed."""
        base = self.plan.arms[0].name
        rows = []
        for task, arm, runs in self._cells():
            if arm == base or base not in self.grid[task.env]:
                continue
            before = self._figures(task, self.grid[task.env][base])
            after = self._figures(task, runs)
            for name, values in after.items():
                pairs = statistics.paired(before[name], values)
                if pairs:
                    rows.append([task.env, arm, name, *_by_seed(pairs, name == "area")])
        if not rows:
            return ""
        head = ["task", "arm", "figure", f"difference to {base}", "by seed"]
        return f"## Differences by seed\n\n{table(head, rows)}"

    def sums(self, task: Task, contrast: str) -> dict[str, dict[int, float]]:
        """A contrast of the study on a task: figure -> seed -> weighted sum of the arms.

        :return: empty if an arm has no run there
        """
        weights, runs = self.plan.contrasts[contrast], self.grid.get(task.env, {})
        if not weights.keys() <= runs.keys():
            return {}
        figures = {arm: self._figures(task, runs[arm]) for arm in weights}
        found = {
            name: statistics.contrast({arm: figures[arm][name] for arm in weights}, weights)
            for name in figures[next(iter(weights))]
        }
        return {name: values for name, values in found.items() if values}

    def contrast_rows(self, figures: Sequence[str] | None = None) -> list[list[str]]:
        """Contrast, task, figure, estimate and values by seed; at last areas over all tasks.

        :param figures: those wanted, None for all
        """
        rows = []
        for name in self.plan.contrasts:
            areas: dict[str, list[float]] = {}
            for task in self.plan.tasks:
                for figure, values in self.sums(task, name).items():
                    if figures is None or figure in figures:
                        rows.append([name, task.env, figure, *_by_seed(values, figure == "area")])
                    if figure == "area":
                        areas[task.env] = list(values.values())
            if len(areas) > 1:
                together = aggregate.over_tasks(aggregate.score_matrix(areas))["mean"]
                rows.append([name, "all of them", "area", _shown(together, True), ""])
        return rows

    def contrasts(self) -> str:
        """The contrasts that the study names: on every task, and their mean over all tasks."""
        rows = self.contrast_rows()
        if not rows:
            return ""
        return "\n\n".join(
            [
                "## Contrasts",
                "Weighted sums of arms by seed, with Student's interval; over all tasks their mean "
                "with that of the stratified bootstrap.",
                *(
                    f"{name}: " + " ".join(f"{w:+g} {arm}" for arm, w in weights.items())
                    for name, weights in self.plan.contrasts.items()
                ),
                table(["contrast", "task", "figure", "sum", "by seed"], rows),
            ]
        )

    def over_tasks(self) -> str:
        """Aggregates, probability of improvement and profiles over the tasks of all arms."""
        arms = [arm.name for arm in self.plan.arms]
        tasks = [t for t in self.plan.tasks if set(arms) <= set(self.grid.get(t.env, {}))]
        scores: dict[str, dict[str, list[float]]] = {arm: {} for arm in arms}
        for task in tasks:
            for arm in arms:
                last = self._figures(task, self.grid[task.env][arm])[f"last {LAST} episodes"]
                values = [(each - task.low) / (task.high - task.low) for each in last.values()]
                scores[arm][task.env] = values
        tasks = [task for task in tasks if all(scores[arm][task.env] for arm in arms)]
        if not tasks:
            return "## Over tasks\n\nNo task has a finished run of every arm yet."
        matrices = {
            arm: aggregate.score_matrix({task.env: scores[arm][task.env] for task in tasks})
            for arm in arms
        }
        figures = {arm: aggregate.over_tasks(matrix) for arm, matrix in matrices.items()}
        pictures.aggregates(figures, self.colours, self.plan.results_folder / "aggregates.png")
        pictures.profiles(matrices, self.colours, self.plan.results_folder / "profiles.png")
        base = matrices[arms[0]]
        rows = [
            [
                arm,
                f"{len(matrix)} x {len(tasks)}",
                *(_shown(each, True) for each in figures[arm].values()),
                "-" if arm == arms[0] else _shown(aggregate.improvement(base, matrix), True),
            ]
            for arm, matrix in matrices.items()
        ]
        head = ["arm", "runs x tasks", *figures[arms[0]], f"better than {arms[0]}"]
        names = ", ".join(task.env for task in tasks)
        return (
            f"## Over tasks\n\nScores are the last {LAST} training episodes, normalised, on "
            f"{names}.\n\n{table(head, rows)}\n\n![Aggregates](aggregates.png)\n\n"
            "![Performance profiles](profiles.png)"
        )

    def runs(self) -> str:
        """Every planned run: what there is of it, and how it was made."""
        return table(
            ["run", "state", "minutes", "commit", "machine", "command"],
            [self._run_row(cell) for cell in self.plan.cells],
        )

    def _run_row(self, cell: Cell) -> list[str]:
        result = self.results.get(cell.name)
        if result is None:
            return [cell.title, "missing", "", "", "", ""]
        attempts = result.header["attempts"] or [{}]
        steps = max(result.training[0], default=0)
        state = "finished" if result.finished else f"{steps:,} of {cell.steps:,} steps"
        if len(attempts) > 1:
            state += f", {len(attempts)} starts"
        commits = dict.fromkeys(str(each.get("commit")) for each in attempts)
        machines = dict.fromkeys(str(each.get("machine")) for each in attempts)
        link = f"[{cell.title}]({csv_path(self.plan, cell).name})"
        command = str(attempts[0].get("command")).replace("|", "\\|")
        minutes = f"{result.header['minutes']:.0f}"
        return [link, state, minutes, ", ".join(commits), "; ".join(machines), f"`{command}`"]


def _grid(plan: Plan, results: Mapping[str, Result]) -> dict[str, dict[str, dict[int, Result]]]:
    """Results by task, arm and seed, in the plan's order."""
    found: dict[str, dict[str, dict[int, Result]]] = {}
    for cell in plan.cells:
        if cell.name in results:
            arms = found.setdefault(cell.task.env, {})
            arms.setdefault(cell.arm.name, {})[cell.seed] = results[cell.name]
    return found


def _explanation(plan: Plan) -> str:
    curve = "evaluations" if plan.curve == "evaluation" else "training episodes"
    return (
        f"Means over seeds with 95% intervals by stratified bootstrap ({aggregate.DRAWS} samples; "
        "too narrow for two or three seeds); differences by seed with Student's interval. "
        f"*Last {LAST} episodes*: the last training episodes of a run. *Area*: the mean height of "
        f"the curve of {curve} up to the frames, as a share of the task's range. *Above the "
        "floor*: runs with a training episode above it, and the median of their agent steps until "
        "then, runs without one counted as later than all. Published figures are means over three "
        "seeds, interpolated between points every 100,000 frames."
    )


def _first(task: Task, runs: Mapping[int, Result]) -> str:
    if task.floor is None:
        return "-"
    steps = [statistics.first_above(run, task.floor) for run in runs.values()]
    reached = sum(each is not None for each in steps)
    median = statistics.median_first(steps)
    shown = f"{median:,.0f}" if math.isfinite(median) else "not reached"
    return f"{task.floor:g}: {reached} of {len(steps)}, {shown}"


def _published(task: Task, algo: str, frames: int) -> str:
    value = published_return(task.name, algo, frames) if task.env.startswith("DMC/") else None
    return "-" if value is None else f"{value:.0f}"


def _number(value: float, fine: bool) -> str:
    return f"{value:.3f}" if fine else f"{value:.1f}"


def _shown(estimate: Estimate | None, fine: bool) -> str:
    if estimate is None:
        return "-"
    mean, low, high, _ = estimate
    if math.isnan(low):
        return _number(mean, fine)
    return f"{_number(mean, fine)} [{_number(low, fine)}, {_number(high, fine)}]"


def _by_seed(values: Mapping[int, float], fine: bool) -> tuple[str, str]:
    """Mean with Student's interval, and the value of each seed."""
    each = ", ".join(f"{seed}: {_number(value, fine)}" for seed, value in values.items())
    return _shown(statistics.t_interval(list(values.values())), fine), each


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
