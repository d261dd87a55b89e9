"""One update against a plain computation written straight from the specification.

Dropout masks, chosen heads and normal draws are handed to both; everything else is computed twice.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3.common.utils import ConstantSchedule

from tdmpc2_sb3 import losses as losses_module
from tdmpc2_sb3.fast.doorman import unknown_to_gradients
from tdmpc2_sb3.losses import (
    TERMS,
    LossConfig,
    model_losses,
    policy_loss,
    sample_update_noise,
    step_weights,
    td_targets,
    term,
    updated_scale,
)
from tdmpc2_sb3.policies import MlpPolicy
from tdmpc2_sb3.replay.buffer import SequenceBatch
from tdmpc2_sb3.update import UpdateStep

GAMMA, TAU, RATE, ENC_SCALE = 0.97, 0.01, 3e-4, 0.3
CONFIG = LossConfig(gamma=GAMMA, entropy="gaussian")  # as PlainUpdate has it
ENCODED = CONFIG._replace(encoded_terminations=True)
OBS_DIM, ACTION_DIM, BATCH = 5, 3, 7


def make_policy(roughen, episodic=False, dtype=th.float32, dropout=0.01, num_q=4):
    th.manual_seed(0)
    policy = MlpPolicy(
        spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float32),
        spaces.Box(-1, 1, (ACTION_DIM,), np.float32),
        ConstantSchedule(RATE),
        gamma=GAMMA,
        episodic=episodic,
        latent_dim=16,
        enc_dim=12,
        mlp_dim=14,
        num_q=num_q,
        dropout=dropout,
        compile=False,
    )
    roughen(policy.world_model)
    roughen(policy.world_model.q_ensemble.layers[-1], 1.0)  # values that differ by more than 1
    roughen(policy.world_model.target_q_ensemble, 0.05, seed=8)
    return policy.to(dtype)


def make_batch(steps, dtype=th.float32, seed=0, past_terminations=False):
    generator = th.Generator().manual_seed(seed)

    def draw(*shape):
        return th.randn(*shape, generator=generator).to(dtype)

    terminations = (th.rand(steps, BATCH, generator=generator) < 0.3).to(dtype)
    batch = SequenceBatch(
        draw(steps + 1, BATCH, OBS_DIM),
        draw(steps, BATCH, ACTION_DIM).clamp(-1, 1),
        3 * draw(steps, BATCH),
        terminations,
    )
    if not past_terminations:
        return batch
    valid = th.ones(steps, BATCH, dtype=dtype)
    for t in range(1, steps):
        valid[t] = valid[t - 1] * (1 - terminations[t - 1])
    return batch._replace(terminations=terminations * valid, valid=valid)


def make_noise(policy, steps, dtype=th.float32, seed=3):
    generator = th.Generator().manual_seed(seed)
    noise = sample_update_noise(policy.world_model, steps, BATCH, generator)
    return noise._replace(
        next_action=noise.next_action.to(dtype),
        policy=noise.policy._replace(action=noise.policy.action.to(dtype)),
    )


class PlainUpdate:
    """One gradient step as the specification tells it, on tensors by name."""

    def __init__(self, policy, plain_model, rho=0.5, max_grad_norm=20.0, encoded=False):
        self.state = {k: v.detach().clone() for k, v in policy.world_model.state_dict().items()}
        self.make_model = plain_model
        self.rho, self.max_grad_norm = rho, max_grad_norm
        self.encoded = encoded
        self.scale = 1.0
        self.moments: dict[str, Any] = {}
        self.steps = 0

    def names(self, *prefixes):
        return [name for name in self.state if name.startswith(prefixes)]

    def model_loss(self, plain, batch, noise, episodic):
        steps = len(batch.rewards)
        valid = th.ones_like(batch.rewards) if batch.valid is None else batch.valid
        with th.no_grad():
            next_z = plain.encode(batch.observations[1:])
            next_a = plain.policy_action(next_z, noise.next_action)
            first, second = (
                plain.q(next_z, next_a, head, target=True) for head in noise.target_heads
            )
            q = th.minimum(first, second)
            targets = batch.rewards + GAMMA * (1 - batch.terminations) * q
        z = plain.encode(batch.observations[0])
        zs = [z]
        consistency = reward = value = 0.0
        for t in range(steps):
            weight = self.rho**t
            action = batch.actions[t]
            logits = plain.reward_logits(z, action)
            ce = plain.cross_entropy(logits, batch.rewards[t])
            reward = reward + weight * (valid[t] * ce).mean()
            for head in range(plain.num_q):
                mask = None
                if noise.q_dropout is not None:
                    mask = noise.q_dropout.mask()[head].view(steps, BATCH, -1)[t]
                logits = plain.q_logits(z, action, head, mask)
                ce = plain.cross_entropy(logits, targets[t])
                value = value + weight * (valid[t] * ce).mean()
            z = plain.next(z, action)
            error = (z - next_z[t]).square().mean(-1)
            consistency = consistency + weight * (valid[t] * error).mean()
            zs.append(z)
        losses = {
            "consistency": consistency / steps,
            "reward": reward / steps,
            "value": value / (steps * plain.num_q),
            "termination": th.zeros(()),
        }
        if episodic:
            d, means = batch.terminations, []
            for states in [th.stack(zs[1:]), plain.encode(batch.observations[1:])]:
                x = plain.termination_logit(states)  # -log p and -log(1 - p) without p
                cross_entropy = d * (1 + (-x).exp()).log() + (1 - d) * (1 + x.exp()).log()
                means.append((valid * cross_entropy).mean())
            losses["termination"] = (means[0] + means[1]) / 2 if self.encoded else means[0]
        total = (
            20 * losses["consistency"]
            + 0.1 * losses["reward"]
            + 0.1 * losses["value"]
            + 1 * losses["termination"]
        )
        return total, losses, [z.detach() for z in zs]

    def prior_loss(self, plain, zs, noise, batch):
        values, objective = [], []
        alive = [th.ones(BATCH)] * len(zs)
        if batch.valid is not None:  # no action follows a termination
            for t in range(1, len(zs)):
                alive[t] = alive[t - 1] * (batch.terminations[t - 1] == 0)
        for t, z in enumerate(zs):
            mean, log_std = plain.policy_moments(z)
            eps = noise.policy.action[t]
            action = th.tanh(mean + eps * log_std.exp())
            gaussian = (-0.5 * eps**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
            log_prob = gaussian - th.log(F.relu(1 - action**2) + 1e-6).sum(-1)
            entropy = -log_prob * (gaussian * ACTION_DIM) / (log_prob + 1e-8)
            heads = []
            for row, head in enumerate(noise.policy.heads):
                mask = None
                if noise.policy.dropout is not None:
                    mask = noise.policy.dropout.mask()[row].view(len(zs), BATCH, -1)[t]
                heads.append(plain.scalar(plain.q_logits(z, action, head, mask)))
            values.append((heads[0] + heads[1]) / 2)
            objective.append(1e-4 * entropy)
        first = values[0].detach().numpy()
        spread = max(np.percentile(first, 95) - np.percentile(first, 5), 1.0)
        self.scale += TAU * (spread - self.scale)  # before it divides
        loss = 0.0
        for t in range(len(zs)):
            gain = objective[t] + values[t] / self.scale
            loss = loss - self.rho**t * (alive[t] * gain).mean()
        return loss / len(zs)

    def adam(self, gradients, eps, rate_of):
        """Clips to the norm, then Adam's step with betas 0.9 and 0.999."""
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        factor = min(1.0, self.max_grad_norm / (norm + 1e-6))
        for name, gradient in gradients.items():
            g = gradient * factor
            m, v = self.moments.get(name, (th.zeros_like(g), th.zeros_like(g)))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            self.moments[name] = m, v
            m_hat = m / (1 - 0.9**self.steps)
            v_hat = v / (1 - 0.999**self.steps)
            self.state[name] = self.state[name] - rate_of(name) * m_hat / (v_hat.sqrt() + eps)
        return norm

    def __call__(self, batch, noise, episodic):
        self.steps += 1
        names = self.names("encoder", "dynamics", "reward", "termination", "q_ensemble")
        leaves = {n: self.state[n].clone().requires_grad_(True) for n in names}
        plain = self.make_model({**self.state, **leaves})
        total, losses, zs = self.model_loss(plain, batch, noise, episodic)
        gradients = dict(zip(names, th.autograd.grad(total, list(leaves.values())), strict=True))
        norm = self.adam(
            gradients, 1e-8, lambda n: RATE * (ENC_SCALE if n.startswith("encoder") else 1.0)
        )
        names = self.names("policy_net")
        leaves = {n: self.state[n].clone().requires_grad_(True) for n in names}
        plain = self.make_model({**self.state, **leaves})  # with the updated Q heads
        prior = self.prior_loss(plain, zs, noise, batch)
        gradients = dict(zip(names, th.autograd.grad(prior, list(leaves.values())), strict=True))
        prior_norm = self.adam(gradients, 1e-5, lambda n: RATE)
        for name in self.names("target_q_ensemble"):
            online = self.state[name[len("target_") :]]
            self.state[name] = self.state[name] + TAU * (online - self.state[name])
        return {
            "train/loss": total,
            **{f"train/{name}_loss": value for name, value in losses.items()},
            "train/policy_loss": prior,
            "train/grad_norm": norm,
            "train/policy_grad_norm": prior_norm,
            "train/q_scale": self.scale,
        }


def make_update(policy, steps, rho=0.5, max_grad_norm=20.0, config=CONFIG):
    return UpdateStep(
        policy,
        config,
        rho ** th.arange(steps, dtype=policy.scale.dtype) / steps,
        rho ** th.arange(steps + 1, dtype=policy.scale.dtype) / (steps + 1),
        TAU,
        max_grad_norm,
    )


CASES = {
    "plain": {},
    "episodic": {"episodic": True, "rho": 0.7},
    "past terminations": {"episodic": True, "rho": 0.7, "past_terminations": True},
    "encoded terminations": {
        "episodic": True,
        "rho": 0.7,
        "past_terminations": True,
        "encoded": True,
    },
    "long": {"steps": 6},
    "one step": {"steps": 1},
    "clipped": {"max_grad_norm": 0.05},
    "no dropout": {"dropout": 0.0},
}


@pytest.mark.parametrize("case", CASES)
def test_two_updates_give_the_losses_and_weights_of_the_specification(case, roughen, plain_model):
    settings = {"episodic": False, "rho": 0.5, "steps": 3, "max_grad_norm": 20.0, **CASES[case]}
    steps, episodic = settings["steps"], settings["episodic"]
    policy = make_policy(roughen, episodic, th.float64, settings.get("dropout", 0.1))
    policy.world_model.bins = th.linspace(-10, 10, 101, dtype=th.float64)
    encoded = settings.get("encoded", False)
    options = settings["rho"], settings["max_grad_norm"]
    plain = PlainUpdate(policy, plain_model, *options, encoded)
    update = make_update(policy, steps, *options, ENCODED if encoded else CONFIG)
    before = {k: v.clone() for k, v in policy.world_model.state_dict().items()}
    for seed in range(2):
        batch = make_batch(steps, th.float64, seed, settings.get("past_terminations", False))
        noise = make_noise(policy, steps, th.float64, seed)
        logged = update(batch, noise)
        expected = plain(batch, noise, episodic)
        for name, value in logged.items():
            if name in expected:
                assert float(value.detach()) == pytest.approx(
                    float(th.as_tensor(expected[name]).detach()), rel=1e-6, abs=1e-6
                ), name
        compared = set(expected) - ({"train/termination_loss"} if not episodic else set())
        assert compared <= set(logged)
    after = policy.world_model.state_dict()
    for name, value in plain.state.items():
        th.testing.assert_close(after[name], value, rtol=0, atol=3e-8)  # of steps of 3e-4
        assert not th.equal(after[name], before[name]), f"{name} did not move"
    assert float(policy.scale) == pytest.approx(plain.scale, rel=1e-6)
    assert float(policy.scale) != 1.0


def test_without_a_policy_step_all_else_is_the_same(roughen):
    """The policy prior and the running scale stand still."""
    steps = {}
    for with_policy in (True, False):
        policy = make_policy(roughen)
        before = {k: v.clone() for k, v in policy.world_model.state_dict().items()}
        noise = make_noise(policy, 3)
        noise = noise if with_policy else noise._replace(policy=None)
        logged = make_update(policy, 3)(make_batch(3), noise)
        steps[with_policy] = logged, policy.world_model.state_dict(), float(policy.scale)
    (both, moved, _), (alone, after, scale) = steps[True], steps[False]
    assert scale == 1.0
    for name, value in after.items():
        assert th.equal(value, before[name] if name.startswith("policy_net") else moved[name])
        assert name.startswith("policy_net") or not th.equal(value, before[name])
    assert set(both) - set(alone) == {
        *(f"train/policy_{name}" for name in ("loss", "entropy", "scaled_entropy", "grad_norm")),
        "train/q_scale",
    }
    assert {name: float(value.detach()) for name, value in alone.items()} == {
        name: float(both[name].detach()) for name in alone
    }


def test_in_single_precision_too(roughen, plain_model):
    policy = make_policy(roughen, True)
    plain = PlainUpdate(make_policy(roughen, True, th.float64), plain_model)
    update = make_update(policy, 3)
    noise = make_noise(policy, 3)
    logged = update(make_batch(3), noise)
    expected = plain(make_batch(3, th.float64), make_noise(policy, 3, th.float64), True)
    for name in ("loss", "consistency_loss", "reward_loss", "value_loss", "termination_loss"):
        value = float(logged[f"train/{name}"])
        assert value == pytest.approx(float(expected[f"train/{name}"].detach()), rel=2e-5), name
    # Adam divides each gradient by its own size: where that is a rounding error, so is the step.
    for name, value in policy.world_model.state_dict().items():
        difference = (value - plain.state[name]).abs()
        assert difference.max() < RATE / 3, name
        assert difference.mean() < 1e-6, name


def test_learning_rates_and_optimisers(roughen):
    policy = make_policy(roughen, True)
    groups = policy.model_optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([RATE * ENC_SCALE, RATE])
    assert {group["eps"] for group in groups} == {1e-8}
    (group,) = policy.prior_optimizer.param_groups
    assert (group["lr"], group["eps"]) == (pytest.approx(RATE), 1e-5)
    assert {tuple(g["betas"]) for g in [*groups, group]} == {(0.9, 0.999)}
    model = policy.world_model
    owned = {id(p) for g in groups for p in g["params"]}
    assert owned == {
        id(p)
        for net in (model.encoder, model.dynamics, model.reward_net, model.q_ensemble,
                    model.termination_net)
        for p in net.parameters()
    }  # fmt: skip
    policy.set_learning_rate(1e-3)
    assert [group["lr"] for group in groups] == pytest.approx([3e-4, 1e-3])


def test_terminated_steps_do_not_bootstrap_and_truncated_ones_do(roughen, plain_model):
    policy = make_policy(roughen)
    model = policy.world_model
    batch = make_batch(3)
    terminations = th.zeros(3, BATCH)
    terminations[1, 2] = 1.0  # a terminated step; a truncated one is stored as 0
    batch = batch._replace(terminations=terminations)
    noise = make_noise(policy, 3)
    next_z = model.encode(batch.observations[1:])
    targets = td_targets(model, next_z, batch, noise, CONFIG)
    assert targets[1, 2] == batch.rewards[1, 2]
    plain = plain_model(model.state_dict())
    action = plain.policy_action(next_z, noise.next_action)
    first, second = (plain.q(next_z, action, h, target=True) for h in noise.target_heads)
    expected = batch.rewards + GAMMA * th.minimum(first, second)
    others = terminations == 0
    th.testing.assert_close(targets[others], expected[others], rtol=1e-4, atol=1e-5)
    assert (targets[1, 2] - expected[1, 2]).abs() > 1e-3


@pytest.mark.parametrize("lam", [0.3, 1.0])
def test_lambda_returns_by_hand(lam, roughen, plain_model):
    policy = make_policy(roughen)
    model = policy.world_model
    terminations = th.zeros(3, BATCH)
    terminations[1, 2] = 1.0
    batch = make_batch(3)._replace(terminations=terminations)
    noise = make_noise(policy, 3)
    next_z = model.encode(batch.observations[1:])
    targets = td_targets(model, next_z, batch, noise, CONFIG._replace(td_lambda=lam))
    plain = plain_model(model.state_dict())
    action = plain.policy_action(next_z, noise.next_action)
    v = th.minimum(*(plain.q(next_z, action, h, target=True) for h in noise.target_heads))
    r = batch.rewards
    last = r[2] + GAMMA * v[2]
    middle = r[1] + GAMMA * ((1 - lam) * v[1] + lam * last)
    middle[2] = r[1, 2]  # ends there
    first = r[0] + GAMMA * ((1 - lam) * v[0] + lam * middle)
    th.testing.assert_close(targets, th.stack([first, middle, last]), rtol=1e-4, atol=1e-5)


def test_the_policys_loss_leaves_the_model_alone_and_the_targets_take_no_gradient(roughen):
    policy = make_policy(roughen, True)
    model = policy.world_model
    losses = model_losses(model, make_batch(3), make_noise(policy, 3), CONFIG,
                          step_weights(3, 3, 0.5, False))  # fmt: skip
    assert not losses.latents.requires_grad
    grads = th.autograd.grad(losses.total, policy.prior_parameters, allow_unused=True,
                             retain_graph=True)  # fmt: skip
    assert all(g is None for g in grads)
    noise = make_noise(policy, 3).policy
    policy_losses = policy_loss(model, losses.latents, policy.scale, noise, CONFIG,
                                step_weights(4, 3, 0.5, False), TAU)  # fmt: skip
    before = [p.detach().clone() for p in policy.model_parameters]
    policy_losses.total.backward(inputs=policy.prior_parameters)
    assert all(p.grad is None for p in policy.model_parameters)
    assert all(map(th.equal, before, policy.model_parameters))


# -- terms by name ---------------------------------------------------------------------------------


class Extended(NamedTuple):
    """A configuration with a coefficient that the package lacks."""

    gamma: float = GAMMA
    consistency_coef: float = 20.0
    reward_coef: float = 0.1
    value_coef: float = 0.1
    termination_coef: float = 1.0
    entropy_coef: float = 1e-4
    entropy: str = "gaussian"
    encoded_terminations: bool = False
    td_lambda: float = 0.0
    change_coef: float = 0.0


@pytest.fixture
def change_term(monkeypatch):
    """How much a prediction changes from step to step, as a term."""
    monkeypatch.setattr(losses_module, "LossConfig", Extended)
    known = dict(losses_module._terms)
    calls = []

    @term
    def change_loss(prediction):
        calls.append(prediction)
        return (prediction.predicted - prediction.states).square().mean()

    yield calls
    losses_module._terms.clear()
    losses_module._terms.update(known)


def test_the_sum_of_the_terms_is_the_loss(roughen):
    policy = make_policy(roughen, episodic=True)
    weights = step_weights(3, 3, 0.5, False)
    for episodic in (True, False):
        policy = make_policy(roughen, episodic)
        losses = model_losses(
            policy.world_model, make_batch(3), make_noise(policy, 3), CONFIG, weights
        )
        names = [name for name in TERMS if episodic or name != "termination"]
        assert list(losses.terms) == names
        by_hand = {"consistency": 20.0, "reward": 0.1, "value": 0.1, "termination": 1.0}
        expected = sum(by_hand[name] * float(losses.terms[name]) for name in names)
        assert losses.total.item() == pytest.approx(expected, rel=1e-6)


def test_a_term_of_ones_own(change_term, roughen):
    """It is added by its coefficient, has its gradient and is logged; without one it is not
    computed."""
    policy = make_policy(roughen)
    model, batch, noise = policy.world_model, make_batch(3), make_noise(policy, 3)
    weights = step_weights(3, 3, 0.5, False)
    parameter = next(iter(model.dynamics.parameters()))

    def evaluate(config):
        found = model_losses(model, batch, noise, config, weights)
        (gradient,) = th.autograd.grad(found.total, [parameter])
        return found, gradient

    without, before = evaluate(Extended())
    assert "change" not in without.terms
    assert not change_term
    found, after = evaluate(Extended(change_coef=3.0))
    assert len(change_term) == 1
    z = [model.encode(batch.observations[0])]
    for action in batch.actions:
        z.append(model.dynamics.rollout(model.dynamics.initial_state(z[-1]), action[None])[0])
    change = sum((z[t + 1] - z[t]).square().mean() for t in range(3)) / 3
    assert float(found.terms["change"]) == pytest.approx(float(change.detach()), rel=1e-4)
    assert found.total.item() == pytest.approx(
        without.total.item() + 3.0 * float(change.detach()), rel=1e-5
    )
    (wanted,) = th.autograd.grad(change, [parameter])
    th.testing.assert_close(after - before, 3.0 * wanted, rtol=1e-2, atol=1e-5)

    update = make_update(policy, 3, config=Extended(change_coef=3.0))
    assert update._direct is None
    assert unknown_to_gradients(model, Extended(change_coef=3.0)) == ["change_coef"]
    logged = update(batch, noise)
    assert float(logged["train/change_loss"]) == pytest.approx(float(change.detach()), rel=1e-4)
    assert "train/change_loss" not in make_update(policy, 3, config=Extended())(batch, noise)


def test_a_term_that_is_not_finite_is_named_and_changes_nothing(change_term, roughen):
    policy = make_policy(roughen)
    update = make_update(policy, 3, config=Extended(change_coef=math.inf))
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"loss inf, gradient norm \S+: not finite"):
        update(make_batch(3), make_noise(policy, 3))
    assert all(th.equal(value, before[name]) for name, value in policy.state_dict().items())
    rewards = make_batch(3).rewards.clone()
    rewards[0, 0] = math.nan
    with pytest.raises(RuntimeError, match=r"\(the reward loss nan, the value loss nan\): not fin"):
        make_update(policy, 3)(make_batch(3)._replace(rewards=rewards), make_noise(policy, 3))


def test_terms_without_a_coefficient_of_their_own_are_refused():
    def lost_loss(prediction):
        return prediction.predicted.sum()

    def reward_loss(prediction):
        return prediction.predicted.sum()

    def entropy_loss(prediction):
        return prediction.predicted.sum()

    with pytest.raises(TypeError, match="lost_loss has no coefficient: give LossConfig a lost_coe"):
        term(lost_loss)
    for function in (reward_loss, entropy_loss):  # the hand-written gradients would ignore it
        with pytest.raises(
            TypeError, match=r"_coef is another loss's, .* give .*_loss another nam"
        ):
            term(function)
    assert list(TERMS) == ["consistency", "reward", "value", "termination"]


@pytest.mark.parametrize("size", [1, 2, 10, 37, 256])
def test_scale_follows_the_percentile_range(size):
    q = 5 * th.randn(size, generator=th.Generator().manual_seed(size))
    spread = max(np.percentile(q.numpy(), 95) - np.percentile(q.numpy(), 5), 1.0)
    scale = updated_scale(th.tensor(3.0), q, 0.01)
    assert float(scale) == pytest.approx(3.0 + 0.01 * (spread - 3.0), rel=1e-5)


def test_scale_is_never_drawn_below_one():
    assert float(updated_scale(th.tensor(1.0), th.full((10,), 4.0), 0.5)) == 1.0


def test_step_weights_by_hand():
    def weights(*arguments):
        return step_weights(*arguments).tolist()

    assert weights(3, 3, 0.5, False) == pytest.approx([1 / 3, 0.5 / 3, 0.25 / 3])
    assert weights(4, 3, 0.5, False) == pytest.approx([1 / 4, 1 / 8, 1 / 16, 1 / 32])
    assert weights(5, 5, 0.5, False) == pytest.approx([0.5**t / 5 for t in range(5)])
    # Horizon 3 is the reference exactly, whatever the decay.
    for rho in (0.5, 0.7):
        for n in (3, 4):
            assert weights(n, 3, rho, True) == weights(n, 3, rho, False)


@pytest.mark.parametrize("horizon", [1, 2, 5, 10])
def test_horizon_aware_weights(horizon):
    weights = step_weights(horizon, horizon, 0.5, True)
    # rho_H = 0.25^(1 / (H - 1)), so the last step weighs a quarter of the first, as at H = 3 ...
    decay = 1.0 if horizon == 1 else 0.25 ** (1 / (horizon - 1))
    relative = th.tensor([decay**t for t in range(horizon)])
    th.testing.assert_close(weights / weights[0], relative)
    # ... and the sum is that of H = 3.
    assert float(weights.sum()) == pytest.approx((1 + 0.5 + 0.25) / 3, rel=1e-6)
    policy_weights = step_weights(horizon + 1, horizon, 0.5, True)
    assert float(policy_weights.sum()) == pytest.approx((1 + 0.5 + 0.25 + 0.125) / 4, rel=1e-6)


@pytest.mark.parametrize("field", ["rewards", "observations"])
def test_a_loss_that_is_not_finite_changes_nothing(field, roughen):
    policy = make_policy(roughen)
    update = make_update(policy, 3)
    batch = make_batch(3)
    broken = getattr(batch, field).clone()
    broken[1, 2] = float("nan")
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"loss nan, .* not finite\. Lower the learning rate"):
        update(batch._replace(**{field: broken}), make_noise(policy, 3))
    for name, value in policy.state_dict().items():
        assert th.equal(value, before[name]), name
    assert all(p.grad is None for p in policy.model_parameters)
    update(batch, make_noise(policy, 3))  # and it goes on with a good batch
    assert all(v.isfinite().all() for v in policy.state_dict().values())


def numbers_of(noise):
    """All of them that are hardly ever the same, once each."""
    policy = noise.policy
    dropped = [each.mask() for each in (noise.q_dropout, policy.dropout)]
    return [noise.next_action, policy.action, *dropped]


def test_update_noise_is_seeded_and_each_number_is_used_once(roughen):
    policy = make_policy(roughen, dropout=0.2)
    first, same, other = (make_noise(policy, 3, seed=seed) for seed in (1, 1, 2))
    for one, again, else_ in zip(*map(numbers_of, (first, same, other)), strict=True):
        assert th.equal(one, again)
        assert not th.equal(one, else_)
    assert th.equal(first.target_heads, same.target_heads)
    assert th.equal(first.policy.heads, same.policy.heads)
    assert first.first_offsets is None
    assert first.next_offsets is None
    generator = th.Generator().manual_seed(1)
    assert sample_update_noise(policy.world_model, 3, BATCH, generator, False).policy is None
    assert first.next_action.shape == (3, BATCH, ACTION_DIM)
    assert first.policy.action.shape == (4, BATCH, ACTION_DIM)
    assert not th.equal(first.next_action, first.policy.action[:3])
    assert first.target_heads.unique().numel() == first.policy.heads.unique().numel() == 2
