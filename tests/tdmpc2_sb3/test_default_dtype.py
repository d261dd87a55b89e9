"""Agents compute in float32, whatever type torch gives to new tensors."""

from __future__ import annotations

import pytest
import torch as th
from same_models import assert_same

from tdmpc2_sb3 import TDMPC2


@pytest.fixture
def default_dtype():
    """Return a function that sets it for the rest of the test."""
    before = th.get_default_dtype()
    yield th.set_default_dtype
    th.set_default_dtype(before)


def run(make_agent, point_env, tmp_path, kind, **settings):
    """Everything that an agent makes: parameters, optimisers' state, actions, plans."""
    model = make_agent(point_env(kind=kind, edge=0.6), **settings)
    model.learn(36)
    observation = model.env.observation_space.sample()
    if not isinstance(observation, dict):
        observation = observation * 0
    else:
        observation = {key: each * 0 for key, each in observation.items()}
    results = [model.get_parameters()]
    results += model.predict(observation, deterministic=True)
    results += [
        model.predict(observation)[0],
        model.policy.predict(observation, use_planner=False)[0],
    ]
    model.save(tmp_path / "model")
    loaded = TDMPC2.load(tmp_path / "model", env=model.env)
    loaded.replay_buffer = model.replay_buffer
    loaded.learn(12, reset_num_timesteps=False)
    return [*results, loaded.get_parameters()]


def types(value):
    if isinstance(value, dict):
        return set().union(*map(types, value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(types, value))
    return {value.dtype} if isinstance(value, th.Tensor) and value.is_floating_point() else set()


@pytest.mark.parametrize("dtype", [th.float64, th.bfloat16])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("vector", {}),
        ("vector", {"policy": "SSMPolicy", "exploration_noise": "pink"}),
        ("vector", {"policy_kwargs": {"dynamics": "ssm", "dynamics_kwargs": {"selective": False}}}),
        ("dict", {"policy": "MultiInputPolicy"}),
        ("image", {"policy": "CnnPolicy"}),
    ],
    ids=["mlp", "ssm, pink noise", "time-invariant ssm", "dictionary", "image"],
)
def test_results_are_the_same(
    make_agent, point_env, tmp_path, default_dtype, kind, settings, dtype
):
    expected = run(make_agent, point_env, tmp_path, kind, **settings)
    default_dtype(dtype)
    results = run(make_agent, point_env, tmp_path, kind, **settings)
    assert types(results) == types(expected) == {th.float32}
    assert_same(results, expected)
