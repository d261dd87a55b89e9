"""Figures of one run, and what several of them tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tdmpc2_sb3.study.results import Result

#: Training episodes whose mean is a run's final return.
LAST = 10


class Estimate(NamedTuple):
    """A mean with the bounds of its 95% interval, both NaN where one figure alone was given."""

    mean: float
    low: float
    high: float
    runs: int


def last_returns(result: Result) -> float | None:
    """Mean return of the last ten training episodes, of all if there are fewer."""
    returns = result.training[1]
    return float(returns[-LAST:].mean()) if len(returns) else None


def last_evaluation(result: Result) -> float | None:
    """Mean return of the last evaluation."""
    means = result.evaluation_means[1]
    return float(means[-1]) if len(means) else None


def first_above(result: Result, floor: float) -> int | None:
    """Steps at the end of the first training episode whose return is above the floor."""
    steps, returns = result.training
    above = np.flatnonzero(returns > floor)
    return int(steps[above[0]]) if len(above) else None


def curve(result: Result, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Frames and returns, of the evaluations' means or of the training episodes, each [N]."""
    steps, returns = result.evaluation_means if kind == "evaluation" else result.training
    return steps * result.frames_a_step, returns


def value_at(result: Result, frames: int, kind: str) -> float | None:
    """The return at some frames, None if the curve does not reach there.

    Between evaluations it is interpolated; of training episodes it is the mean of the last ten.
    """
    places, returns = curve(result, kind)
    if frames > result.frames or (not result.finished and frames > max(places, default=0)):
        return None
    if kind == "training":
        returns = returns[places <= frames]
        return float(returns[-LAST:].mean()) if len(returns) else None
    if len(places) == 0 or frames < places[0]:
        return None
    return float(np.interp(frames, places, returns))


def area(result: Result, frames: int, low: float, high: float, kind: str) -> float | None:
    """Mean height of the curve up to some frames, as a share of the range from low to high.

    Training: an episode's return holds for all its frames. Evaluation: straight lines between the
    points, from `low` at the start; behind the last point its value. None where the run is not
    finished before `frames`, or shorter, or has no point.
    """
    places, returns = curve(result, kind)
    if len(places) == 0 or frames > result.frames:
        return None
    if not result.finished and places[-1] < frames:
        return None
    heights = (returns - low) / (high - low)
    if kind == "training":
        ends = np.minimum(np.append(places, frames), frames)
        if places[-1] < frames:
            heights = np.append(heights, heights[-1])
        else:
            ends = ends[:-1]
        widths = np.diff(np.append(0, ends))
        return float((widths * heights).sum() / frames)
    x, y = np.append(0, places), np.append(0.0, heights)
    grid = np.append(x[x < frames], frames)
    ys = np.interp(grid, x, y)
    return float((np.diff(grid) * (ys[1:] + ys[:-1]) / 2).sum() / frames)


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean with Student's 95% interval: right for few values, if they are about normal."""
    from scipy.stats import t

    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return Estimate(mean, math.nan, math.nan, count)
    half = float(t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half, count)


def paired(base: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    """Differences of two arms by seed, over the seeds that both have."""
    return {seed: other[seed] - base[seed] for seed in base if seed in other}


def contrast(
    figures: Mapping[str, Mapping[int, float]], weights: Mapping[str, float]
) -> dict[int, float]:
    """The weighted sum of arms by seed, over the seeds that all of them have.

    :param figures: by arm and seed
    :param weights: by arm
    """
    seeds = set.intersection(*(set(figures.get(arm, {})) for arm in weights))
    return {
        seed: sum(weight * figures[arm][seed] for arm, weight in weights.items())
        for seed in sorted(seeds)
    }


def median_first(steps: Sequence[int | None]) -> float:
    """Median of first steps, those of runs that never got there counted as infinite."""
    return float(np.median([math.inf if each is None else each for each in steps]))
