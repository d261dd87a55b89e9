"""Frozen parameters stay as they are, bit for bit, with their optimisers' states."""

from __future__ import annotations

import copy

import pytest
import torch as th

from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.losses import sample_update_noise

PARTS = {
    "encoder": "world_model.encoder",
    "dynamics": "world_model.dynamics",
    "reward": "world_model.reward_net",
    "termination": "world_model.termination_net",
    "Q": "world_model.q_ensemble",
    "policy": "world_model.policy_net",
    "one weight": "world_model.reward_net.1.weight",
    "one layer of Q": "world_model.q_ensemble.layers.0",
    "a bias of the dynamics": "world_model.dynamics.net.2.ln.bias",
    "the world model": "world_model",
    "everything": "",
}


def trainable(agent, prefix=None):
    named = agent.policy.named_parameters()
    named = {k: p for k, p in named if ".target_q_ensemble." not in k}
    if prefix is None:
        return named
    frozen = {k: p for k, p in named.items() if k == prefix or k.startswith(f"{prefix}.")}
    if prefix == "world_model":  # apart from the policy prior, which still learns
        frozen = {k: p for k, p in frozen.items() if ".policy_net." not in k}
    return frozen if prefix else named


def state_of(agent):
    """Every parameter's numbers and its optimiser's."""
    policy = agent.policy
    moments = {**policy.model_optimizer.state, **policy.prior_optimizer.state}
    return {
        name: [p.detach().clone(), *(v.clone() for v in moments.get(p, {}).values())]
        for name, p in trainable(agent).items()
    }


def same(one, other):
    return len(one) == len(other) and all(map(th.equal, one, other))


def make(make_agent, point_env, kind="mlp", **kwargs):
    env = {"image": point_env(kind="image"), "dict": point_env(kind="dict")}.get(kind, point_env())
    policy = {"image": "CnnPolicy", "dict": "MultiInputPolicy", "ssm": "SSMPolicy"}.get(kind)
    return make_agent(env, policy or "MlpPolicy", episodic=True, **kwargs)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["mlp", "ssm"])
def test_only_the_others_learn(make_agent, point_env, kind, part):
    if kind == "ssm" and part == "a bias of the dynamics":
        pytest.skip("the MLP's")
    agent = make(make_agent, point_env, kind)
    agent.learn(24)
    frozen = trainable(agent, PARTS[part])
    assert frozen
    for each in frozen.values():
        each.requires_grad_(False)
    before = state_of(agent)
    agent.learn(4, reset_num_timesteps=False)
    after = state_of(agent)
    for name in before:
        assert same(before[name], after[name]) == (name in frozen), name
    for each in frozen.values():
        each.requires_grad_(True)
    agent.learn(2, reset_num_timesteps=False)
    thawed = state_of(agent)
    assert not any(same(after[name], thawed[name]) for name in before)


@pytest.mark.parametrize("kind", ["image", "dict"])
def test_a_frozen_encoder_of_images(make_agent, point_env, kind):
    agent = make(make_agent, point_env, kind, learning_starts=12)
    agent.policy.world_model.encoder.requires_grad_(False)
    before = state_of(agent)
    agent.learn(14)
    after = state_of(agent)
    for name in before:
        assert same(before[name], after[name]) == ("encoder" in name), name


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["mlp", "ssm", "dict"])
def test_the_others_learn_what_autograd_says(make_agent, point_env, kind, part):
    """Gradients by hand beside autograd's, norms of those that are taken included."""
    if kind != "mlp" and part == "a bias of the dynamics":
        pytest.skip("the MLP's")
    agent = make(make_agent, point_env, kind, learning_starts=12, max_grad_norm=0.5)
    agent.learn(13)
    for each in trainable(agent, PARTS[part]).values():
        each.requires_grad_(False)
    plain = copy.deepcopy(agent)
    for each in (agent, plain):
        each._renew_update_step()
    plain._update_step._direct = None
    for turn in range(3):
        batch = agent.replay_buffer.sample(8)
        generator = th.Generator().manual_seed(turn)
        noise = sample_update_noise(agent.policy.world_model, 3, 8, generator)
        ours, theirs = (each._update_step(batch, noise) for each in (agent, plain))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].item() == pytest.approx(value.item(), rel=2e-3, abs=1e-5), name
    for (name, one), other in zip(
        agent.policy.named_parameters(), plain.policy.parameters(), strict=True
    ):
        th.testing.assert_close(one, other, rtol=0.0, atol=2e-5, msg=name)


def test_frozen_parameters_are_frozen_again_when_loaded(make_agent, tmp_path):
    agent = make_agent()
    agent.learn(24)
    agent.policy.world_model.encoder.requires_grad_(False)
    agent.save(tmp_path / "agent.zip")
    loaded = TDMPC2.load(tmp_path / "agent.zip", env=agent.env, device="cpu")
    for name, parameter in trainable(loaded).items():
        assert parameter.requires_grad == (".encoder." not in name), name


def test_a_part_with_gradients_left_over_stays_too(make_agent):
    agent = make_agent()
    agent.learn(24)
    encoder = agent.policy.world_model.encoder
    for each in encoder.parameters():
        each.grad = th.ones_like(each)
    encoder.requires_grad_(False)
    before = copy.deepcopy(encoder.state_dict())
    agent.train(1, 8)
    assert all(th.equal(value, before[name]) for name, value in encoder.state_dict().items())
