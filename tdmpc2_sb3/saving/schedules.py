"""Learning-rate schedules that can be written to a file without pickled code."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from stable_baselines3.common.utils import FloatSchedule

from tdmpc2_sb3.saving.json_classes import RECORDS, qualified_name

POINTS = 1001


class TableSchedule:
    """Values at equal distances of the remaining progress, and straight lines between them.

    :param values: at 0, ..., 1
    """

    def __init__(self, values: Sequence[float]):
        self.values = list(values)

    def __call__(self, progress_remaining: float) -> float:
        """The value at a remaining progress; outside [0, 1] that of the nearer end."""
        last = len(self.values) - 1
        position = min(max(progress_remaining, 0.0), 1.0) * last
        low = min(int(position), last - 1)
        share = position - low
        return (1.0 - share) * self.values[low] + share * self.values[low + 1]

    def __repr__(self) -> str:
        return f"TableSchedule({len(self.values)} values from {self.values[-1]:g} on)"


def tabulated(schedule: Callable[[float], float], name: str) -> TableSchedule:
    """A schedule's values over the whole progress.

    :param schedule: function of the remaining progress
    :param name: how to call it in an error
    :raises ValueError: if it has no finite value at least 0 at some progress
    """
    values = []
    for index in range(POINTS):
        progress = index / (POINTS - 1)
        try:
            value = float(schedule(progress))
        except Exception as error:  # a user's function may fail in any way
            raise ValueError(
                f"{name} fails at a remaining progress of {progress:g} ({error!r}): it must give a "
                "number for every progress from 1 to 0."
            ) from error
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(
                f"{name} is {value} at a remaining progress of {progress:g}: it must be a finite "
                "number, at least 0, for every progress from 1 to 0."
            )
        values.append(value)
    return TableSchedule(values)


def can_be_written(schedule: object) -> bool:
    """Whether a schedule is written to a file as it is: a number, or one of SB3's classes."""
    if isinstance(schedule, FloatSchedule):
        return can_be_written(schedule.value_schedule)
    return not callable(schedule) or qualified_name(type(schedule)) in RECORDS


def for_writing(schedule: object, name: str) -> object:
    """The schedule, or its table where it is a function, of which no code is written.

    :param schedule: a number or a function of the remaining progress
    :param name: how to call it in an error
    """
    if can_be_written(schedule) or not callable(schedule):
        return schedule
    table = tabulated(schedule, name)
    return FloatSchedule(table) if isinstance(schedule, FloatSchedule) else table
