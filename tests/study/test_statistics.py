"""Every figure against one worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tdmpc2_sb3.study import aggregate, statistics
from tdmpc2_sb3.study.results import Result


def result(training=(), evaluations=(), steps=100, finished=True) -> Result:
    header = {"action_repeat": 2, "steps": steps, "finished": finished}
    pairs = [
        (np.array([s for s, _ in rows], dtype=int), np.array([r for _, r in rows], dtype=float))
        for rows in (training, evaluations)
    ]
    return Result(header, pairs[0], pairs[1])


def test_last_ten_episodes_and_last_evaluation():
    run = result([(10 * n, n) for n in range(1, 13)], [(50, 1), (50, 3), (100, 5), (100, 9)])
    assert statistics.last_returns(run) == 7.5  # of 3 to 12
    assert statistics.last_evaluation(run) == 7.0
    assert statistics.last_returns(result([(10, 4), (20, 6)])) == 5.0
    assert statistics.last_returns(result()) is None
    assert statistics.last_evaluation(result()) is None


def test_first_above_a_floor_is_strict_and_censored():
    run = result([(10, 0), (20, 50), (30, 51), (40, 90)])
    assert statistics.first_above(run, 50) == 30
    assert statistics.first_above(run, 90) is None
    assert statistics.median_first([30, None, 10]) == 30
    assert statistics.median_first([30, None, None]) == math.inf


def test_area_of_training_episodes_weights_them_by_their_frames():
    # 200 frames: 20 at 0, 60 at 500, 120 at 1000 of a range of 1000.
    run = result([(10, 0), (40, 500), (100, 1000)])
    assert statistics.area(run, 200, 0, 1000, "training") == pytest.approx(0.75)
    # Up to 60 frames: 20 at 0 and 40 at 500.
    assert statistics.area(run, 60, 0, 1000, "training") == pytest.approx(1 / 3)
    # The episode in progress at the end counts as the last: 20 at 0, 180 at 500.
    short = result([(10, 0), (40, 500)])
    assert statistics.area(short, 200, 0, 1000, "training") == pytest.approx(0.45)
    assert statistics.area(result([(10, 0)], finished=False), 200, 0, 1000, "training") is None


def test_area_of_evaluations_is_that_of_straight_lines():
    # From 0 to 400 in 100 frames, to 800 in 100 more: mean 200 and 600.
    run = result(evaluations=[(50, 300), (50, 500), (100, 800)])
    assert statistics.area(run, 200, 0, 1000, "evaluation") == pytest.approx(0.4)
    # Up to 150 frames: 100 at 200, then from 400 to 600.
    assert statistics.area(run, 150, 0, 1000, "evaluation") == pytest.approx(0.3)
    # A range from -1000: 0.5 at its start would be 0; heights 0, 0.7 and 0.9.
    assert statistics.area(run, 200, -1000, 1000, "evaluation") == pytest.approx(
        (0.5 * (0 + 0.7) + 0.5 * (0.7 + 0.9)) / 2
    )
    assert statistics.area(run, 201, 0, 1000, "evaluation") is None


def test_return_at_some_frames():
    run = result([(10, 1), (20, 2), (30, 6)], [(50, 10), (100, 20)])
    assert statistics.value_at(run, 40, "training") == 1.5
    assert statistics.value_at(run, 150, "evaluation") == 15.0
    assert statistics.value_at(run, 60, "evaluation") is None  # before the first
    assert statistics.value_at(run, 202, "training") is None  # the run was shorter
    unfinished = result([(10, 1), (20, 2)], finished=False)
    assert statistics.value_at(unfinished, 40, "training") == 1.5
    assert statistics.value_at(unfinished, 42, "training") is None


def test_differences_by_seed_with_students_interval():
    pairs = statistics.paired({1: 10.0, 2: 20.0, 3: 30.0, 9: 1.0}, {1: 12.0, 2: 24.0, 3: 36.0})
    assert pairs == {1: 2.0, 2: 4.0, 3: 6.0}
    estimate = statistics.t_interval(list(pairs.values()))
    # Deviation 2, error 2 / sqrt(3), Student's 0.975 quantile for two degrees of freedom 4.302653.
    assert estimate.mean == 4.0
    assert estimate.high == pytest.approx(4 + 4.302653 * 2 / math.sqrt(3), abs=1e-5)
    assert estimate.low == pytest.approx(4 - 4.302653 * 2 / math.sqrt(3), abs=1e-5)
    assert math.isnan(statistics.t_interval([4.0]).low)


def test_aggregates_over_runs_and_tasks():
    scores = np.array([[0.0, 0.4], [0.1, 0.5], [0.2, 0.6], [0.3, 0.7]])
    found = aggregate.over_tasks(scores)
    assert found["IQM"].mean == pytest.approx((0.2 + 0.3 + 0.4 + 0.5) / 4)
    assert found["mean"].mean == pytest.approx(0.35)
    assert found["median"].mean == pytest.approx(0.35)  # of the means 0.15 and 0.55
    # Resampled within tasks: no mean leaves the range of all-lowest to all-highest runs.
    assert 0.2 <= found["mean"].low < 0.35 < found["mean"].high <= 0.5
    assert aggregate.over_tasks(scores) == found  # the same samples every time
    one = aggregate.over_tasks(scores[:1])
    assert one["mean"].mean == pytest.approx(0.2)
    assert math.isnan(one["mean"].low)


def test_an_intervals_bounds_are_those_of_all_samples():
    # Of 0, 0, 3 the means of 27 equally likely samples: 0 (8), 1 (12), 2 (6), 3 (1 of 27 = 3.7%).
    estimate = aggregate.mean([0.0, 0.0, 3.0])
    assert (estimate.mean, estimate.low, estimate.high) == (1.0, 0.0, 3.0)
    # Of two equal figures all samples are alike.
    assert aggregate.mean([5.0, 5.0])[:3] == (5.0, 5.0, 5.0)


def test_probability_of_improvement_counts_pairs():
    base, other = np.array([[0.1], [0.3]]), np.array([[0.2], [0.3]])
    # 0.2 above 0.1 alone, 0.3 above 0.1 and equal to 0.3: (1 + 1.5) of 4 pairs.
    assert aggregate.improvement(base, other).mean == pytest.approx(0.625)
    assert aggregate.improvement(base, base).mean == 0.5


def test_profile_is_the_share_of_runs_above():
    scores = np.array([[0.1, 0.5], [0.3, 0.9]])
    share, low, high = aggregate.profile(scores, np.array([0.0, 0.3, 0.6]))
    np.testing.assert_allclose(share, [1.0, 0.5, 0.25])
    assert (low <= share).all()
    assert (share <= high).all()


def test_runs_are_as_many_as_the_task_with_fewest_has():
    matrix = aggregate.score_matrix({"a": [1.0, 2.0, 3.0], "b": [4.0, 5.0]})
    np.testing.assert_array_equal(matrix, [[1.0, 4.0], [2.0, 5.0]])


def test_numpys_generator_is_left_as_it_was():
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.rand()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    aggregate.mean([1.0, 2.0])
    assert np.random.rand() == expected  # noqa: NPY002
