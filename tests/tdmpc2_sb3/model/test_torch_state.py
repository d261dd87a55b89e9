"""What of torch's modes and conversions is refused, with its remedy, and that the remedies help."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th

from tests.helpers.same_models import assert_same_models

MODES = {
    "inference_mode": th.inference_mode,
    "autocast": lambda: th.autocast("cpu", dtype=th.bfloat16),
}


@pytest.mark.parametrize("name", MODES)
def test_learning_inside_a_mode(make_agent, point_env, name):
    agent, other = (make_agent(point_env()) for _ in range(2))
    with MODES[name](), pytest.raises(RuntimeError, match=f"Inside torch.{name}.* outside of it"):
        agent.learn(24)
    assert agent.num_timesteps == 0
    assert_same_models(agent.learn(24), other.learn(24))


@pytest.mark.parametrize("name", MODES)
def test_acting_inside_a_mode(make_agent, point_env, name):
    agent = make_agent(point_env())
    observation = agent.observation_space.sample()
    plain, _ = agent.predict(observation, deterministic=True)
    with MODES[name]():
        inside, _ = agent.predict(observation, deterministic=True)
    np.testing.assert_array_equal(plain, inside)


def test_a_model_made_inside_inference_mode(make_agent, point_env):
    with th.inference_mode():
        agent = make_agent(point_env())
    assert agent.action_space.contains(agent.predict(agent.observation_space.sample())[0])
    with pytest.raises(RuntimeError, match=r"made inside torch.inference_mode\(\).*outside of it"):
        agent.learn(24)


@pytest.mark.parametrize("part", ["policy", "policy.world_model", "policy.world_model.encoder"])
@pytest.mark.parametrize("dtype", [th.float64, th.float16])
@pytest.mark.parametrize("kernels", [True, False])
def test_other_types(make_agent, point_env, part, dtype, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr("tdmpc2_sb3.kernels.usable", lambda *tensors: False)
    agent = make_agent(point_env())
    module = agent
    for name in part.split("."):
        module = getattr(module, name)
    before = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    module.to(dtype)
    said = rf"is {dtype}, but TDMPC2 computes in float32: call model.policy.float\(\)"
    with pytest.raises(RuntimeError, match=said):
        agent.learn(24)
    with pytest.raises(RuntimeError, match=said):
        agent.predict(agent.observation_space.sample())
    agent.policy.float()
    if dtype is th.float64:
        after = agent.policy.state_dict()
        assert all(th.equal(after[name], value) for name, value in before.items())
    agent.learn(24)
    assert agent._n_updates > 0


def test_a_policy_moved_by_hand(make_agent, point_env):
    agent = make_agent(point_env())
    agent.policy.to("meta")
    with pytest.raises(RuntimeError, match=r"is on meta, but the model on cpu: .*device="):
        agent.learn(24)
