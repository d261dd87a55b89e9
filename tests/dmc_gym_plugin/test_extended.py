"""The extended tasks: their rewards, computed a second time from the simulator's numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from dm_control.suite import reacher

import dmc_gym_plugin
from dmc_gym_plugin import tasks
from dmc_gym_plugin.fast_rewards import tolerance

NAMES = [(domain, task) for domain, names in tasks.EXTENDED.items() for task in names]


def bell(x: float, height: float) -> float:
    """Return 1 above height; below, a Gaussian that is 0.1 at half of it."""
    missing = max(0.0, height - x) / (height / 2)
    return math.exp(math.log(0.1) * missing**2)


def clip(x: float) -> float:
    return min(1.0, max(0.0, x))


def walker(physics: Any, speed: float) -> float:
    height = physics.named.data.xpos["torso", "z"]
    upright = (1 + physics.named.data.xmat["torso", "zz"]) / 2
    backwards = -physics.named.data.sensordata["torso_subtreelinvel"][0]
    move = clip(0.5 + (backwards - speed / 2) / speed)  # 0 at 0, 0.5 at half speed, 1 at speed
    return (3 * bell(height, 1.2) + upright) / 4 * (5 * move + 1) / 6


def cheetah_one_foot(physics: Any, foot: str) -> float:
    z = physics.named.data.xpos[:, "z"]
    names = physics.named.data.xpos.axes.row.names
    up = (3 * bell(z[names.index(foot)], 1.2) + 2 * bell(z[names.index("torso")], 1.2)) / 5
    return up * (5 * clip(physics.speed() / 6) + 1) / 6


def cheetah_jump(physics: Any) -> float:
    xpos = physics.named.data.xpos
    still = clip(2 - abs(physics.speed()) / 0.5)
    means = [(xpos["torso", "z"] + xpos[foot, "z"]) / 2 for foot in ("bfoot", "ffoot")]
    return sum((5 * bell(mean, 1.2) + still) / 6 for mean in means) / 2


def hopper(physics: Any) -> float:
    height = physics.named.data.xipos["torso", "z"] - physics.named.data.xipos["foot", "z"]
    return float(0.6 <= height <= 2) * clip(-physics.speed())


def ball(physics: Any) -> float:
    if physics.in_target():
        return 0.0
    distance = math.hypot(*(physics.data.site_xpos[1, [0, 2]] - physics.data.xpos[2, [0, 2]]))
    speed = math.hypot(*physics.data.qvel[2:])
    return (clip(distance / 0.5) + 2 * clip(speed / 6)) / 3


def reach(physics: Any) -> float:
    gap = physics.named.data.geom_xpos["target"] - physics.named.data.geom_xpos["finger"]
    return float(math.hypot(gap[0], gap[1]) <= physics.named.model.geom_size["target", 0] + 0.01)


REWARDS: dict[tuple[str, str], Callable[[Any], float]] = {
    ("walker", "walk_backwards"): lambda p: walker(p, 1.0),
    ("walker", "run_backwards"): lambda p: walker(p, 8.0),
    ("cheetah", "run_backwards"): lambda p: clip(-p.speed() / 8),
    ("cheetah", "run_front"): lambda p: cheetah_one_foot(p, "bfoot"),
    ("cheetah", "run_back"): lambda p: cheetah_one_foot(p, "ffoot"),
    ("cheetah", "jump"): cheetah_jump,
    ("hopper", "hop_backwards"): hopper,
    ("reacher", "three_easy"): reach,
    ("reacher", "three_hard"): reach,
    ("ball_in_cup", "spin"): ball,
    ("pendulum", "spin"): lambda p: clip(abs(p.data.qvel[0]) / 9),
}


@pytest.mark.parametrize(("domain", "task"), NAMES)
def test_rewards(domain: str, task: str) -> None:
    env = gymnasium.make(f"DMC/{domain}-{task}-v0")
    base = env.unwrapped
    random = np.random.RandomState(0)
    seen = []
    for seed in range(3):
        env.reset(seed=seed)
        for step in range(60):
            if step % 20 == 10:  # states that random actions never reach: fast, in both directions
                base.physics.data.qvel[:] = random.normal(0, 4, base.physics.model.nv)
            action = random.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            _, reward, _, _, _ = env.step(action)
            assert reward == pytest.approx(REWARDS[domain, task](base.physics), abs=1e-12)
            assert 0 <= reward <= 1
            seen.append(reward)
    if task not in ("hop_backwards", "three_easy", "three_hard"):  # rare by chance
        assert max(seen) > 0.1
    assert base.max_episode_steps == 1000


def test_reacher_touches_its_target() -> None:
    env = dmc_gym_plugin.DMControlEnv("reacher", "three_easy")
    env.reset(seed=0)
    physics = env.physics
    assert physics.model.nu == 3
    physics.named.model.geom_pos["target", :2] = 0.27, 0.0  # three links of 9 cm, stretched out
    physics.data.qpos[:] = 0
    physics.data.qvel[:] = 0
    physics.forward()
    assert physics.named.data.geom_xpos["finger", 0] == pytest.approx(0.27)
    assert env.step(np.zeros(3, np.float32))[1] == 1.0
    assert reacher._BIG_TARGET == physics.named.model.geom_size["target", 0] == 0.05


def test_ball_starts_in_the_cup_nine_times_of_ten() -> None:
    env = dmc_gym_plugin.DMControlEnv("ball_in_cup", "spin")
    env.reset(seed=0)
    inside = 0.0
    for _ in range(100):
        env.reset()
        inside += env.physics.in_target()
    assert 80 <= inside <= 99  # binomial(100, 0.9): outside this once in a thousand


@pytest.mark.parametrize("margin", [0.0, 1.5])
@pytest.mark.parametrize(
    ("sigmoid", "value"),
    [("linear", 0.0), ("linear", 0.5), ("gaussian", 0.1), ("quadratic", 0.0), ("long_tail", 0.1)]
    + [("hyperbolic", 0.2), ("cosine", 0.0), ("reciprocal", 0.1), ("tanh_squared", 0.3)],
)
def test_fast_tolerance_is_dm_controls(sigmoid: str, value: float, margin: float) -> None:
    from dm_control.utils import rewards

    values = np.random.RandomState(0).normal(0, 3, 400)
    bounds = [(0.0, 0.0), (-1, 1), (0.5, math.inf), (-math.inf, -0.5)]
    for x in [*values, 0.0, 1.0, -1.0, math.inf, math.nan]:
        for interval in bounds:
            arguments = (np.float64(x), interval, margin, sigmoid, value)
            with np.errstate(invalid="ignore"):
                expected = rewards.tolerance(*arguments)
                got = tolerance(*arguments)
            assert type(got) is type(expected) is float
            assert got == expected or (math.isnan(got) and math.isnan(expected))
    array = np.array([values[:5]])
    np.testing.assert_array_equal(
        tolerance(array, (0, 1), margin, sigmoid, value),
        rewards.tolerance(array, (0, 1), margin, sigmoid, value),
    )
    with pytest.raises(ValueError, match="Lower bound"):
        tolerance(0.0, (1, 0))
