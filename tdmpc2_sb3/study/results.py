"""One small CSV a run: a header in YAML behind `#`, then every episode and every evaluation."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tdmpc2_sb3.saving.attribute_checks import is_whole, short
from tdmpc2_sb3.saving.files import atomic_write
from tdmpc2_sb3.study.plan import Cell, Plan
from tdmpc2_sb3.study.plot import minutes_at, read_action_repeat, read_episodes, read_evaluations
from tdmpc2_sb3.zoo.yaml_files import check_size, read_yaml

#: Of a CSV: a run of four million steps in episodes of 25 has 10 MB.
MAX_BYTES = 1 << 26

COLUMNS = ("kind", "steps", "frames", "minutes", "return", "length")


@dataclass(frozen=True)
class Result:
    """A run as its CSV holds it.

    :param header: study, arm, task, seed, settings, commit, versions, machine, command, ...
    :param training: steps, returns of the training episodes, each [N]
    :param evaluations: steps, returns of the evaluations' episodes, each [M]
    """

    header: dict[str, Any]
    training: tuple[np.ndarray, np.ndarray]
    evaluations: tuple[np.ndarray, np.ndarray]

    @property
    def frames_a_step(self) -> int:
        """The action repeat."""
        return int(self.header["action_repeat"])

    @property
    def frames(self) -> int:
        """Frames that the run was to make."""
        return int(self.header["steps"]) * self.frames_a_step

    @property
    def finished(self) -> bool:
        """Whether it made all its steps."""
        return bool(self.header["finished"])

    @cached_property
    def evaluation_means(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and mean return of every evaluation, each [E]."""
        steps, returns = self.evaluations
        places = np.unique(steps)
        return places, np.array([returns[steps == place].mean() for place in places])


def make_csv(
    plan: Plan, cell: Cell, run: Path, attempts: list[dict[str, Any]], finished: bool
) -> str:
    """Return the text of a run's CSV.

    :param run: the zoo's folder of it
    :param attempts: commands, commits, versions and machines that made it, in their order
    :param finished: whether it made all its steps
    """
    repeat = read_action_repeat(run, cell.task.name)
    episodes = read_episodes(run)
    rows = [
        ("training", int(step), round(minute, 2), value, int(length))
        for step, minute, value, length in zip(*episodes, strict=True)
    ]
    rows += _evaluation_rows(run)
    rows.sort(key=lambda row: row[1])  # stable: an episode before the evaluation at its end
    steps = cell.steps if finished else (episodes.steps[-1:].sum() or 0)
    minutes = float(minutes_at(run, np.array([steps]))[0])
    header = {
        "study": plan.name,
        "arm": cell.arm.name,
        "task": cell.task.env,
        **cell.settings,
        "action_repeat": repeat,
        "finished": finished,
        "minutes": round(minutes, 1),
        "threads": plan.threads,
        "attempts": attempts,
        "hyperparameters": plain(read_yaml(run / cell.task.name / "config.yml", strict=False)),
    }
    text = io.StringIO()
    head = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1_000_000)
    text.write("".join(f"# {line}\n" for line in head.splitlines()))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for kind, steps, minutes, value, length in rows:
        writer.writerow((kind, steps, steps * repeat, minutes, round(float(value), 6), length))
    return text.getvalue()


def _evaluation_rows(run: Path) -> list[tuple[str, int, float, float, int]]:
    file = run / "evaluations.npz"
    if not file.is_file():
        return []
    steps, returns, lengths = read_evaluations(file)
    minutes = minutes_at(run, steps)
    return [
        ("evaluation", int(step), round(float(minute), 2), float(value), int(length))
        for step, minute, values, sizes in zip(steps, minutes, returns, lengths, strict=True)
        for value, length in zip(values, sizes, strict=True)
    ]


def plain(value: Any) -> Any:
    """What a YAML of the zoo holds, in types that every YAML reader knows."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def csv_path(plan: Plan, cell: Cell) -> Path:
    """Where a cell's CSV lies."""
    return plan.results_folder / f"{cell.name}.csv"


def write_csv(plan: Plan, cell: Cell, text: str) -> None:
    """Write a cell's CSV, whole or not at all."""

    def writer(file: Any) -> None:
        file.write(text.encode())

    atomic_write(csv_path(plan, cell), writer)


def parse_csv(text: str, source: str) -> Result:
    """Read a CSV.

    :param source: for the sentence
    :raises ValueError: if it is none of ours, or damaged
    """
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES} bytes")
        lines = text.splitlines()
        header = yaml.safe_load("\n".join(line[2:] for line in lines if line.startswith("#")))
        check_size(header)
        rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
        series = []
        for kind in ("training", "evaluation"):
            own = [row for row in rows if row["kind"] == kind]
            steps = np.array([int(row["steps"]) for row in own], dtype=int)
            series.append((steps, np.array([float(row["return"]) for row in own])))
        for key in ("arm", "task", "seed", "finished"):
            header[key]
        for key in ("steps", "action_repeat"):
            if not is_whole(header[key], 1, 2**53):
                raise ValueError(f"{key} of {short(header[key])}")
    except (
        *(yaml.YAMLError, KeyError, TypeError, ValueError),
        *(OverflowError, RecursionError, csv.Error),
    ) as error:
        raise ValueError(
            f"'{source}' is damaged or no result of a study ({' '.join(str(error).split())}): "
            "remove it, and `run` or `collect` writes it again."
        ) from error
    return Result(header, series[0], series[1])


def read_result(plan: Plan, cell: Cell) -> Result | None:
    """Read a cell's CSV; None if there is none.

    :raises ValueError: if it is damaged or was made with other settings
    """
    path = csv_path(plan, cell)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1).decode(errors="replace")
    result = parse_csv(text, str(path))
    for key, value in cell.settings.items():
        if result.header.get(key) != value:
            raise ValueError(
                f"'{path}' was made with {key} = {result.header.get(key)!r}, the study has "
                f"{value!r}: remove it, or give the changed arm another name."
            )
    return result


def read_results(plan: Plan) -> dict[str, Result]:
    """Read the CSV of every cell that has one, by the cell's name, in the grid's order."""
    found = {cell.name: read_result(plan, cell) for cell in plan.cells}
    return {name: result for name, result in found.items() if result is not None}
