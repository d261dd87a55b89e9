"""Learning rates that are functions: they train, are saved as tables, and load."""

from __future__ import annotations

import functools
import math

import pytest
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.saving.schedules import TableSchedule, tabulated


def linear_schedule(initial_value):
    """SB3's documented way."""

    def func(progress_remaining):
        return progress_remaining * initial_value

    return func


class Falling:
    def __call__(self, progress_remaining):
        return 1e-3 * math.exp(progress_remaining - 1.0)


FUNCTIONS = {
    "closure": linear_schedule(3e-4),
    "lambda": lambda progress: 1e-3 * progress**2,
    "partial": functools.partial(math.pow, 1e-3),
    "object": Falling(),
    "wrapped": FloatSchedule(linear_schedule(1e-3)),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_are_saved_as_tables(make_agent, tmp_path, kind):
    schedule = FUNCTIONS[kind]
    agent = make_agent(learning_rate=schedule)
    agent.learn(30)
    agent.save(tmp_path / "agent.zip")
    assert agent.learning_rate is schedule
    loaded = TDMPC2.load(tmp_path / "agent.zip", device="cpu")
    for progress in (1.0, 0.9371, 0.5, 0.25, 0.0004, 0.0):
        expected = schedule(progress)
        assert loaded.lr_schedule(progress) == pytest.approx(expected, rel=1e-5, abs=1e-9)
        assert agent.lr_schedule(progress) == expected
    loaded.save(tmp_path / "again.zip")  # a table is written as it is
    again = TDMPC2.load(tmp_path / "again.zip", device="cpu")
    assert again.lr_schedule(0.123) == loaded.lr_schedule(0.123)


@pytest.mark.parametrize(
    "schedule", [ConstantSchedule(1e-4), LinearSchedule(1e-3, 1e-5, 0.3), 2e-4]
)
def test_sb3s_own_are_exact(make_agent, tmp_path, schedule):
    agent = make_agent(learning_rate=schedule)
    agent.save(tmp_path / "agent.zip")
    loaded = TDMPC2.load(tmp_path / "agent.zip", device="cpu")
    assert type(loaded.learning_rate) is type(schedule)
    for progress in (1.0, 0.12345, 0.0):
        assert loaded.lr_schedule(progress) == agent.lr_schedule(progress)


def test_tables():
    table = TableSchedule([1.0, 3.0, 4.0])
    points = (-0.1, 0.0, 0.25, 0.5, 0.9, 1.0, 1.1)
    assert [table(p) for p in points] == pytest.approx([1.0, 1.0, 2.0, 3.0, 3.8, 4.0, 4.0])
    assert tabulated(lambda progress: 5.0, "x").values == [5.0] * 1001


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda progress: 1e-4 / progress, "learning_rate fails at a remaining progress of 0"),
        (lambda progress: math.nan, "learning_rate is nan at a remaining progress of 0"),
        (lambda progress: progress - 0.5, "learning_rate is -0.5"),
        ("3e-4", "learning_rate is '3e-4': it must be a finite number"),
        (-1.0, "learning_rate is -1.0: it must be at least 0"),
    ],
)
def test_what_is_no_schedule_is_refused_at_once(make_agent, schedule, message):
    with pytest.raises(ValueError, match=message):
        make_agent(learning_rate=schedule)
