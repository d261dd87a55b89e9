"""The world model: sizes, the policy prior's densities, Q heads and their targets."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from tdmpc2_sb3.losses import scaled_entropy
from tdmpc2_sb3.model.world_model import Architecture, WorldModel, resolve_architecture

SPACE = spaces.Box(-np.inf, np.inf, (5,), np.float32)
SMALL = Architecture(16, 12, 14, 2, 4)


def generator(seed=0):
    return th.Generator().manual_seed(seed)


@pytest.fixture
def model(roughen):
    th.manual_seed(0)
    model = WorldModel(SPACE, 3, SMALL, episodic=True)
    roughen(model)
    return model


def inputs(model, *shape):
    z = th.randn(*shape, model.architecture.latent_dim, generator=generator(1)).softmax(-1)
    return z, th.rand(*shape, model.action_dim, generator=generator(2)) * 2 - 1


def test_all_networks_are_the_plain_ones(model, plain_model):
    plain = plain_model(model.state_dict())
    o = th.randn(2, 6, 5, generator=generator())
    z, a = inputs(model, 2, 6)
    close = {"rtol": 1e-5, "atol": 1e-5}
    th.testing.assert_close(model.encode(o), plain.encode(o), **close)
    state = model.dynamics.initial_state(z)
    th.testing.assert_close(model.dynamics.step(state, a)[0], plain.next(z, a), **close)
    th.testing.assert_close(model.reward_logits(z, a), plain.reward_logits(z, a), **close)
    th.testing.assert_close(model.reward(z, a), plain.reward(z, a), **close)
    th.testing.assert_close(model.termination_logit(z), plain.termination_logit(z), **close)
    heads = th.tensor([3, 1])
    for values, target in ((model.q_values(z, a, heads), False),
                           (model.target_q_values(z, a, heads), True)):  # fmt: skip
        expected = th.stack([plain.q(z, a, head, target) for head in (3, 1)])
        th.testing.assert_close(values, expected, **close)
    eps = th.randn(2, 6, 3, generator=generator(3))
    th.testing.assert_close(model.policy_action(z, eps), plain.policy_action(z, eps), **close)
    squashed_mean = th.tanh(plain.policy_moments(z)[0])
    th.testing.assert_close(model.policy_action(z, None), squashed_mean, **close)


def test_policy_density_is_that_of_a_squashed_gaussian(model, plain_model):
    z, _ = inputs(model, 50)
    eps = 0.5 * th.randn(50, 3, generator=generator(3))
    sample = model.policy(z, eps)
    mean, log_std = plain_model(model.state_dict()).policy_moments(z)
    gaussian = th.distributions.Normal(mean, log_std.exp())
    squashed = th.distributions.TransformedDistribution(
        gaussian, th.distributions.TanhTransform(cache_size=1)
    )
    inside = sample.action.abs().amax(-1) < 0.99  # where the epsilon of 1e-6 is not felt
    assert inside.sum() > 20
    expected = squashed.log_prob(sample.action).sum(-1)
    th.testing.assert_close(sample.log_prob[inside], expected[inside], rtol=1e-3, atol=2e-3)
    th.testing.assert_close(sample.mean, th.tanh(mean), rtol=1e-5, atol=1e-6)


def test_log_prob_and_scaled_entropies_by_hand(model):
    for parameter in model.policy_net.parameters():
        parameter.data.zero_()
    model.policy_net[-1].bias.data.copy_(th.tensor([0.1, 0.2, 0.3, 0.0, 0.5, -0.5]))
    z, _ = inputs(model, 1)
    eps = th.tensor([[0.5, -1.0, 0.0]])
    sample = model.policy(z, eps)
    gaussian = squash = 0.0
    actions = []
    for mean, s, e in ((0.1, 0.0, 0.5), (0.2, 0.5, -1.0), (0.3, -0.5, 0.0)):
        log_std = -10.0 + 6.0 * (math.tanh(s) + 1.0)
        a = math.tanh(mean + e * math.exp(log_std))
        actions.append(a)
        gaussian += -0.5 * e * e - log_std - 0.5 * math.log(2 * math.pi)
        squash += math.log(max(1 - a * a, 0) + 1e-6)
    log_prob = gaussian - squash
    scaled = -log_prob * (gaussian * 3) / (log_prob + 1e-8)
    published = -(gaussian * 3 - squash)
    assert sample.action[0].tolist() == pytest.approx(actions, abs=1e-5)
    assert sample.log_prob.item() == pytest.approx(log_prob, rel=1e-5)
    assert sample.gaussian_log_prob.item() == pytest.approx(gaussian, rel=1e-5)
    assert scaled_entropy(sample, "gaussian").item() == pytest.approx(scaled, rel=1e-5)
    assert scaled_entropy(sample, "squashed").item() == pytest.approx(published, rel=1e-5)


def test_saturated_actions_have_finite_log_probabilities(model):
    z, _ = inputs(model, 4)
    sample = model.policy(z, th.full((4, 3), 1e4))
    assert sample.action.abs().max() == 1.0
    assert sample.log_prob.isfinite().all()


@pytest.mark.parametrize("num_q", [2, 5])
def test_two_different_heads_and_every_pair_as_often(num_q):
    model = WorldModel(SPACE, 3, SMALL._replace(num_q=num_q))
    pairs = model.sample_heads(generator(), rows=6000)
    assert pairs.shape == (6000, 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    counts = Counter(map(tuple, pairs.tolist()))
    number = num_q * (num_q - 1)
    assert len(counts) == number
    for count in counts.values():
        assert count / 6000 == pytest.approx(1 / number, rel=0.25)


def test_a_single_head_is_taken_twice():
    model = WorldModel(SPACE, 3, SMALL._replace(num_q=1))
    assert model.sample_heads(generator(), rows=2).tolist() == [[0, 0], [0, 0]]


def test_targets_start_equal_and_take_no_gradients():
    model = WorldModel(SPACE, 3, SMALL)
    online, target = model.q_ensemble.state_dict(), model.target_q_ensemble.state_dict()
    assert all(th.equal(online[name], target[name]) for name in online)
    assert not any(p.requires_grad for p in model.target_q_ensemble.parameters())
    assert online["layers.0.weight"].data_ptr() != target["layers.0.weight"].data_ptr()


def test_rewards_and_values_start_at_zero():
    model = WorldModel(SPACE, 3, SMALL)
    z, a = inputs(model, 4)
    assert model.reward(z, a).abs().max() < 1e-5
    assert model.q_values(z, a).abs().max() < 1e-5


def test_only_episodic_models_have_a_termination_head():
    model = WorldModel(SPACE, 3, SMALL)
    assert not model.episodic
    with pytest.raises(RuntimeError, match="no termination head: build it episodic"):
        model.termination_logit(th.zeros(1, 16))


def normed(width_in, width_out):
    return width_in * width_out + 3 * width_out  # weight, bias, LayerNorm's two


@pytest.mark.parametrize("model_size", [1, 5, 19, 48, 317])
def test_sizes(model_size):
    enc, mlp, latent, num_layers, num_q = {
        1: (256, 384, 128, 2, 2),
        5: (256, 512, 512, 2, 5),
        19: (1024, 1024, 768, 3, 5),
        48: (1792, 1792, 768, 4, 5),
        317: (4096, 4096, 1376, 5, 8),
    }[model_size]
    arch = resolve_architecture(model_size, {"num_q": None})
    assert arch[:5] == (latent, enc, mlp, num_layers, num_q)
    assert arch[5:] == (8, 101, -10.0, 10.0, 0.01)
    if model_size > 19:
        return  # the same code, at the price of gigabytes
    model = WorldModel(SPACE, 3, arch)
    pair, head = latent + 3, normed(mlp, mlp) + mlp * 101 + 101
    expected = {
        "encoder": normed(5, enc) + (num_layers - 2) * normed(enc, enc) + normed(enc, latent),
        "dynamics": normed(pair, mlp) + normed(mlp, mlp) + normed(mlp, latent),
        "reward_net": normed(pair, mlp) + head,
        "policy_net": normed(latent, mlp) + normed(mlp, mlp) + mlp * 6 + 6,
        "q_ensemble": num_q * (normed(pair, mlp) + head),
    }
    counts = {name: sum(p.numel() for p in getattr(model, name).parameters()) for name in expected}
    assert counts == expected
    # The reference names its sizes after the sum, for an observation and action of some size.
    assert sum(counts.values()) / 1e6 == pytest.approx(model_size, rel=0.35)


def test_explicit_sizes_override_the_models():
    arch = resolve_architecture(1, {"latent_dim": 64, "mlp_dim": None})
    assert (arch.latent_dim, arch.mlp_dim) == (64, 384)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dim": 20}, "latent_dim is 20: it must be a multiple of simnorm_dim, 8"),
        ({"mlp_dim": 25.6}, "mlp_dim is 25.6: it must be a whole number"),
        ({"mlp_dim": 0}, "mlp_dim is 0: it must be at least 1"),
        ({"num_q": 0}, "num_q is 0: it must be at least 1"),
        ({"dropout": 1.0}, r"dropout is 1.0: it must lie in \[0, 1\)"),
        ({"num_bins": 1}, "num_bins is 1: two-hot needs at least 2 bins"),
    ],
)
def test_bad_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        WorldModel(SPACE, 3, SMALL._replace(**changes))


def test_unknown_names():
    with pytest.raises(ValueError, match=r"dynamics is 'gru': .* use one of \['mlp'"):
        WorldModel(SPACE, 3, SMALL, dynamics="gru")
    with pytest.raises(ValueError, match=r"model_size is 7: choose one of \[1, 5, 19, 48, 317\]"):
        resolve_architecture(7, {})
