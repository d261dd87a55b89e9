"""Observations and rewards are dm_control's own, to the last bit, on every task."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
from dm_control import suite

import dmc_gym_plugin

FAST = [("walker", "walk"), ("cheetah", "run"), ("hopper", "hop"), ("reacher", "easy")]
SEED = 11


def dm_flat(observation: Any) -> np.ndarray:
    """Flatten a dm_control observation independently of the package."""
    return np.concatenate([np.ravel(value) for value in observation.values()]).astype(np.float32)


def compare(domain: str, task: str, steps: int) -> None:
    theirs = suite.load(domain, task, task_kwargs={"random": SEED})
    env = gymnasium.make(f"DMC/{domain}-{task}-v0")
    spec = theirs.action_spec()
    actions = np.random.RandomState(0)
    lqr = domain == "lqr"
    low = np.full(spec.shape, -10.0) if lqr else np.broadcast_to(spec.minimum, spec.shape)
    high = np.full(spec.shape, 10.0) if lqr else np.broadcast_to(spec.maximum, spec.shape)
    observation, _ = env.reset(seed=SEED)
    first = theirs.reset()
    assert observation.dtype == np.float32
    np.testing.assert_array_equal(observation, dm_flat(first.observation))
    plain = bool(np.all(low == -1) and np.all(high == 1))
    for step in range(1, steps + 1):
        action = actions.uniform(-1, 1, spec.shape).astype(np.float32)
        if step % 50 == 0:  # the bounds themselves
            action = np.sign(action)
        # The stretch, written out a second time; bounds of +-1 leave the action untouched.
        wide = action.astype(np.float64)
        stretched = low * ((1 - wide) / 2) + high * ((1 + wide) / 2)
        control = wide if plain else np.where((low == -1) & (high == 1), wide, stretched)
        expected = theirs.step(control)
        observation, reward, terminated, truncated, _ = env.step(action)
        np.testing.assert_array_equal(observation, dm_flat(expected.observation), f"step {step}")
        assert reward == expected.reward, step
        assert isinstance(reward, float)
        if not lqr:  # dm_control's LQR never ends by time
            assert truncated == expected.last()
        assert not terminated
    env.close()


@pytest.mark.parametrize(("domain", "task"), FAST)
def test_equals_dm_control(domain: str, task: str) -> None:
    compare(domain, task, 1000)


@pytest.mark.parametrize(("domain", "task"), [pair for pair in suite.ALL_TASKS if pair not in FAST])
def test_equals_dm_control_briefly(domain: str, task: str) -> None:
    if domain != "dog":  # its model takes seconds to compile: in the slow group
        compare(domain, task, 60)


@pytest.mark.slow
@pytest.mark.parametrize(("domain", "task"), [pair for pair in suite.ALL_TASKS if pair not in FAST])
def test_equals_dm_control_for_an_episode(domain: str, task: str) -> None:
    compare(domain, task, 1000)


def test_a_repeated_action_sums_the_rewards() -> None:
    once = gymnasium.make("DMC/walker-walk-v0")
    twice = gymnasium.make("DMC/walker-walk-v0", action_repeat=2)
    once.reset(seed=1)
    twice.reset(seed=1)
    for _ in range(5):
        action = once.action_space.sample()
        first, second = once.step(action), once.step(action)
        both = twice.step(action)
        np.testing.assert_array_equal(both[0], second[0])
        assert both[1] == first[1] + second[1]
        np.testing.assert_array_equal(both[4]["frame_rewards"], [first[1], second[1]])
        assert both[4]["physics_time"] == second[4]["physics_time"]
    assert once.unwrapped.metadata["render_fps"] == 40  # a control step of 0.025 s
    assert twice.unwrapped.metadata["render_fps"] == 20


def test_actions_at_the_bounds_are_the_actuators_bounds() -> None:
    env = dmc_gym_plugin.DMControlEnv("quadruped", "walk")
    low, high = env.simulation.action_bounds()
    assert len(set(zip(low.tolist(), high.tolist(), strict=True))) == 3  # mixed bounds
    env.reset(seed=0)
    for sign, bound in ((1, high), (-1, low)):
        env.step(np.full(12, sign, np.float32))
        np.testing.assert_array_equal(env.physics.data.ctrl, bound)
