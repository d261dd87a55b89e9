"""The automatic gamma, warm-up and kind of ending, read from live environments."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

import dmc_gym_plugin  # noqa: F401  # registers DMC/
from tdmpc2_sb3.replay.environment_facts import (
    automatic_gamma,
    automatic_learning_starts,
    check_action_space,
    read_facts,
)


@pytest.mark.parametrize(
    ("steps", "episodic", "gamma"),
    [
        (500, False, 0.99),  # (100 - 1) / 100
        (1000, False, 0.995),  # (200 - 1) / 200
        (10_000, False, 0.995),  # 0.9995, capped
        (50, False, 0.95),  # 0.9, raised
        (200, False, 0.975),  # (40 - 1) / 40
        (3, False, 0.95),
        (None, False, 0.99),
        (1000, True, 0.99),
        (200, True, 0.975),
        (None, True, 0.99),
    ],
)
def test_gamma_by_hand(steps, episodic, gamma):
    assert automatic_gamma(steps, episodic) == pytest.approx(gamma)


@pytest.mark.parametrize(("steps", "starts"), [(500, 2500), (1000, 5000), (50, 1000), (None, 1000)])
def test_learning_starts_by_hand(steps, starts):
    assert automatic_learning_starts(steps) == starts


@pytest.mark.parametrize("vec_env", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize(
    ("repeat", "steps", "gamma", "starts"), [(1, 1000, 0.995, 5000), (2, 500, 0.99, 2500)]
)
def test_walker_walk(make_agent, vec_env, repeat, steps, gamma, starts):
    env = make_vec_env(
        "DMC/walker-walk-v0",
        n_envs=2,
        env_kwargs={"action_repeat": repeat},
        vec_env_cls=vec_env,
    )
    facts = read_facts(env)
    assert (facts.episode_steps, facts.terminates) == (steps, False)
    agent = make_agent(env, gamma="auto", learning_starts="auto", episodic="auto")
    assert agent.gamma == agent.policy.planner.gamma == pytest.approx(gamma)
    assert agent.learning_starts == starts
    assert agent.episodic is False
    assert not agent.policy.world_model.episodic
    env.close()


@pytest.mark.parametrize(
    ("name", "steps", "terminates"),
    [
        ("Pendulum-v1", 200, False),
        ("HalfCheetah-v5", 1000, False),
        ("InvertedPendulum-v5", 1000, True),
        ("Hopper-v5", 1000, True),
        ("Walker2d-v5", 1000, True),
        ("DMC/cheetah-run-v0", 1000, False),
        ("DMC/lqr-lqr_2_1-v0", 1000, True),
    ],
)
def test_endings(name, steps, terminates):
    env = make_vec_env(name)
    facts = read_facts(env)
    assert (facts.episode_steps, facts.terminates) == (steps, terminates), facts.reason
    env.close()


def test_worker_processes_survive_being_asked():
    env = make_vec_env("Pendulum-v1", n_envs=2, vec_env_cls=SubprocVecEnv)
    assert read_facts(env)[:2] == (200, False)  # it has no attribute `terminates`
    env.reset()
    env.close()


def test_it_is_read_through_wrappers():
    env = VecNormalize(make_vec_env("DMC/walker-walk-v0", env_kwargs={"action_repeat": 2}))
    assert read_facts(env)[:2] == (500, False)


def test_a_time_limit_put_on_by_hand_counts(point_env):
    env = DummyVecEnv([lambda: TimeLimit(point_env(limit=1000), 40)])
    assert read_facts(env).episode_steps == 40
    registered = DummyVecEnv([lambda: TimeLimit(gym.make("Pendulum-v1"), 150)])
    assert read_facts(registered).episode_steps == 150


def test_an_environment_of_ones_own_may_say_whether_it_terminates(point_env):
    for edge, terminates in ((np.inf, False), (0.5, True)):
        facts = read_facts(DummyVecEnv([lambda edge=edge: point_env(edge=edge)]))
        assert facts == (None, terminates, "the environment says so")


def test_what_was_decided_is_said(make_agent, capsys):
    make_agent("Pendulum-v1", gamma="auto", learning_starts="auto", verbose=1)
    said = capsys.readouterr().out
    assert "Automatic settings for episodes of 200 steps: gamma = 0.975" in said
    assert ", episodic = False\n" in said
    assert "gamma = 0.975" in said
    assert "learning_starts = 1000" in said
    assert "The task never terminates: Pendulum-v1 is known to end by its time limit" in said
    assert "Pass episodic=True or False to overrule" in said


def test_what_is_given_is_kept(make_agent):
    agent = make_agent("Pendulum-v1", gamma=0.9, learning_starts=7, episodic=True)
    assert (agent.gamma, agent.learning_starts, agent.episodic) == (0.9, 7, True)
    assert agent.policy.planner.gamma == 0.9
    assert agent.policy.world_model.episodic


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Discrete(3), r"Discrete\(3\): TDMPC2 plans continuous actions, use .* Box"),
        (spaces.Box(-np.inf, np.inf, (2,)), "infinite bounds: .*TransformAction"),
        (spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, np.inf])), "infinite bounds"),
        (spaces.Box(-1.0, 1.0, (0,)), "has no dimension: there is nothing to plan, use"),
    ],
)
def test_action_spaces_that_cannot_be_planned_in(space, message, make_agent, point_env):
    with pytest.raises(ValueError, match=message):
        check_action_space(space)
    env = point_env()
    env.action_space = space
    with pytest.raises(ValueError, match=message):
        make_agent(env)


@pytest.mark.parametrize("limit", [np.int64(300), np.int16(300), 300.0, np.array(300)])
def test_time_limits_of_any_kind_of_number(make_agent, point_env, limit):
    env = point_env()
    env.max_episode_steps = limit
    agent = make_agent(env, gamma="auto", learning_starts="auto")
    assert agent.gamma == pytest.approx((300 / 5 - 1) / (300 / 5))
    assert agent.learning_starts == 1500


@pytest.mark.parametrize(
    "limit", [0, -1, np.int64(-1), 2.5, math.nan, "300", [300], True, np.array([5, 7])]
)
def test_time_limits_that_are_none(make_agent, point_env, limit):
    env = point_env()
    env.max_episode_steps = limit
    with pytest.raises(ValueError, match=r"max_episode_steps of the environment is .*: it must be"):
        make_agent(env, gamma="auto")


def test_no_time_limit_by_an_infinite_one(make_agent, point_env):
    env = point_env()
    env.max_episode_steps = math.inf
    assert make_agent(env, gamma="auto").gamma == pytest.approx(0.99)
