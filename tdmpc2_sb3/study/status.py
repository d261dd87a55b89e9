"""How far a study is, and how long it will still take."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from tdmpc2_sb3.study import results, runs
from tdmpc2_sb3.study.claims import Claims
from tdmpc2_sb3.study.plan import Cell, Plan


class Progress(NamedTuple):
    """Of one cell.

    :param state: `waiting`, `running`, `finished` or `failed`
    :param host: that runs it
    :param steps: made
    :param minutes: that they took
    :param failure: one sentence, empty without one
    """

    cell: Cell
    state: str
    host: str
    steps: int
    minutes: float
    failure: str


def fetch(plan: Plan, claims: Claims, present: Collection[str] = ()) -> None:
    """Write the CSVs that other machines have put into the storage.

    :param present: names of cells whose CSV is known to be here
    :raises ValueError: if one is damaged; it is not written
    """
    missing = [cell for cell in plan.cells if cell.name not in present]
    texts = claims.csv_texts() if missing else {}
    for cell in missing:
        if cell.name in texts and not results.csv_path(plan, cell).is_file():
            results.parse_csv(texts[cell.name], f"{cell.name} in the storage")
            results.write_csv(plan, cell, texts[cell.name])


def survey(plan: Plan, claims: Claims) -> list[Progress]:
    """How far every cell is, in the grid's order."""
    states = claims.states()
    found = []
    for cell in plan.cells:
        state, host, steps, minutes, failure = states[cell.name]
        result = results.read_result(plan, cell)
        if result is not None and result.finished:
            state, steps, minutes = "finished", cell.steps, float(result.header["minutes"])
        elif state != "finished":
            here = runs.steps_done(plan, cell)
            steps, minutes = max((steps, minutes), here)
        found.append(Progress(cell, state, host, steps, minutes, failure))
    return found


def minutes_left(survey: Sequence[Progress]) -> list[float | None]:
    """Minutes that each cell will still take at the pace of the likest run; None if unknown."""
    left: list[float | None] = []
    for each in survey:
        if each.state in ("finished", "failed"):
            left.append(0.0)
            continue
        pace = _pace(survey, each.cell)
        left.append(None if pace is None else pace * max(0, each.cell.steps - each.steps))
    return left


def _pace(survey: Sequence[Progress], cell: Cell) -> float | None:
    """Minutes a step: of this cell, its arm on its task, its arm, its algorithm, or any run."""
    known = [each for each in survey if each.minutes > 0 and each.steps > 0]
    likeness = (
        lambda other: other is cell,
        lambda other: (other.arm.name, other.task) == (cell.arm.name, cell.task),
        lambda other: other.arm.name == cell.arm.name,
        lambda other: other.arm.algo == cell.arm.algo,
        lambda other: True,
    )
    for alike in likeness:
        chosen = [each for each in known if alike(each.cell)]
        if chosen:
            return sum(each.minutes for each in chosen) / sum(each.steps for each in chosen)
    return None


def estimate(survey: Sequence[Progress], jobs: int) -> str:
    """Cells done, and the time for the rest.

    :param jobs: runs at a time
    """
    done = sum(each.state == "finished" for each in survey)
    text = f"{done} of {len(survey)} cells done"
    left = minutes_left(survey)
    if not any(each is None or each > 0 for each in left):
        return text
    if any(each is None for each in left):
        return f"{text}, time left unknown until a run has made some episodes"
    return f"{text}, about {duration(sum(each or 0.0 for each in left) / jobs)} left"


def duration(minutes: float) -> str:
    """Write a time with the unit that fits."""
    if minutes < 1:
        return f"{60 * minutes:.0f} s"
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def table(plan: Plan, survey: Sequence[Progress]) -> str:
    """Every cell in a line, and the time for the rest."""
    lines = []
    for each, left in zip(survey, minutes_left(survey), strict=True):
        line = f"{each.state:9} {each.cell.title:52} {each.steps:>8} of {each.cell.steps} steps"
        if each.state == "running":
            still = "" if left is None else f", {duration(left)} left"
            line += f", {duration(each.minutes)}{still}, on {each.host}"
        elif each.state == "finished":
            line += f", {duration(each.minutes)}"
        lines.append(f"{line}: {each.failure}" if each.failure else line)
    jobs = max(1, sum(each.state == "running" for each in survey))
    together = "one run" if jobs == 1 else f"{jobs} runs"
    return "\n".join([*lines, f"{plan.name}: {estimate(survey, jobs)} (at {together} at a time)"])
