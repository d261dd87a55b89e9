"""Figures over several tasks, and intervals, by `rliable` as the zoo's own plots have it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tdmpc2_sb3.study.statistics import Estimate

DRAWS = 2000


@contextlib.contextmanager
def _rliable() -> Iterator[tuple]:
    """The library and its metrics, drawing the same samples every time."""
    try:
        from rliable import library, metrics
    except ImportError as error:
        raise ValueError("The report needs rliable: pip install 'rl_zoo3[plots]'.") from error
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002  (rliable draws from NumPy's global generator)
    try:
        yield library, metrics
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _intervals(
    scores: np.ndarray | list[np.ndarray], function: Callable[..., np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Figures with the bounds of their 95% intervals by stratified bootstrap, each [K]."""
    with _rliable() as (library, _):
        points, bounds = library.get_interval_estimates({"": scores}, function, reps=DRAWS)
    return points[""], bounds[""][0], bounds[""][1]


def mean_curve(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over runs with its interval, each [K]; bounds are NaN for one run.

    :param lines: [runs, K]
    """
    if len(lines) < 2:
        nothing = np.full(lines.shape[1], np.nan)
        return lines.mean(axis=0), nothing, nothing
    return _intervals(lines[:, None, :], lambda scores: scores.mean(axis=(0, 1)))


def mean(values: Sequence[float]) -> Estimate:
    """Mean over runs with its interval."""
    point, low, high = mean_curve(np.array(values, dtype=float)[:, None])
    return Estimate(float(point[0]), float(low[0]), float(high[0]), len(values))


def score_matrix(scores: Mapping[str, Sequence[float]]) -> np.ndarray:
    """[runs, tasks] of normalised scores, with as many runs as the task with fewest has.

    :param scores: of the runs of each task, in the order of their seeds
    """
    count = min(len(values) for values in scores.values())
    return np.array([values[:count] for values in scores.values()], dtype=float).T


def over_tasks(scores: np.ndarray) -> dict[str, Estimate]:
    """Interquartile mean, mean and median over runs and tasks, with intervals.

    :param scores: [runs, tasks], of one arm
    """
    with _rliable() as (_, metrics):
        functions = {
            "IQM": metrics.aggregate_iqm,
            "mean": metrics.aggregate_mean,
            "median": metrics.aggregate_median,
        }
    together = lambda each: np.array([function(each) for function in functions.values()])  # noqa: E731
    if len(scores) < 2:
        return {
            name: Estimate(float(value), np.nan, np.nan, len(scores))
            for name, value in zip(functions, together(scores), strict=True)
        }
    return {
        name: Estimate(float(point), float(low), float(high), len(scores))
        for name, point, low, high in zip(functions, *_intervals(scores, together), strict=True)
    }


def improvement(base: np.ndarray, other: np.ndarray) -> Estimate:
    """Probability that a run of `other` is better than one of `base`, over tasks.

    :param base: [runs, tasks]
    :param other: [runs, tasks]
    """
    with _rliable() as (_, metrics):
        probability = metrics.probability_of_improvement
    count = min(len(base), len(other))
    if count < 2:
        return Estimate(float(probability(other, base)), np.nan, np.nan, count)
    function = lambda x, y: np.array([probability(x, y)])  # noqa: E731
    point, low, high = _intervals([other, base], function)
    return Estimate(float(point[0]), float(low[0]), float(high[0]), count)


def profile(scores: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of runs above each score with its interval, each [K].

    :param scores: [runs, tasks]
    :param places: the scores, [K]
    """
    with _rliable() as (library, _):
        profiles, bounds = library.create_performance_profile({"": scores}, places, reps=DRAWS)
    return profiles[""], bounds[""][0], bounds[""][1]
