"""Gradients by hand against those that autograd takes of the losses in double precision.

Encoders of images compute in single precision alone, so with images autograd does all of it.
"""

from __future__ import annotations

import collections
import contextlib
import copy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from tdmpc2_sb3 import update as update_module
from tdmpc2_sb3.fast.gradients import (
    DirectGradients,
    has_direct_gradients,
)
from tdmpc2_sb3.kernels import PolicyDraw, fixed_weights, library
from tdmpc2_sb3.kernels.products import MIN_ROWS, operation_counter, usable_product
from tdmpc2_sb3.losses import (
    LossConfig,
    alive_states,
    model_losses,
    policy_loss,
    sample_update_noise,
    scaled_entropy,
    step_weights,
)
from tdmpc2_sb3.model.dynamics.mlp import MLPDynamics
from tdmpc2_sb3.model.layers import MLP, SimNorm
from tdmpc2_sb3.model.world_model import Architecture, WorldModel
from tdmpc2_sb3.replay.buffer import SequenceBatch
from tdmpc2_sb3.settings import ENTROPIES

ACTION_DIM, TAU, TOLERANCE = 3, 0.02, 5e-5
VECTOR = spaces.Box(-np.inf, np.inf, (5,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 64, 64), np.uint8)
SPACES = {
    "vector": VECTOR,
    "matrix": spaces.Box(-np.inf, np.inf, (5, 2), np.float32),
    "vectors": spaces.Dict({"one": VECTOR, "other": VECTOR}),
    "image and vector": spaces.Dict({"seen": IMAGE, "felt": VECTOR}),
}


@pytest.fixture(autouse=True)
def _kernels_are_built():
    if library() is None:
        pytest.skip("no C compiler here: autograd is used, which the other tests cover")


def make_model(
    roughen, space="vector", dynamics="mlp", episodic=False, num_q=4, dropout=0.1, **dynamics_kwargs
):
    th.manual_seed(0)
    sizes = Architecture(16, 12, 24, num_q=num_q, dropout=dropout, num_bins=21)
    model = WorldModel(SPACES[space], ACTION_DIM, sizes, dynamics, dynamics_kwargs, episodic)
    roughen(model)
    roughen(model.q_ensemble.layers[-1], 1.0)
    roughen(model.target_q_ensemble, 0.05, seed=8)
    return model


def make_observations(space, leading, generator):
    if isinstance(space, spaces.Dict):
        return {key: make_observations(each, leading, generator) for key, each in space.items()}
    if space.dtype == np.uint8:
        return th.randint(0, 256, (*leading, *space.shape), generator=generator, dtype=th.uint8)
    return th.randn(*leading, *space.shape, generator=generator)


def make_batch(space, steps, rows, past_terminations, seed=1):
    generator = th.Generator().manual_seed(seed)
    terminations = (th.rand(steps, rows, generator=generator) < 0.3).float()
    valid = None
    if past_terminations:
        valid = th.ones(steps, rows)
        for t in range(1, steps):
            valid[t] = valid[t - 1] * (1 - terminations[t - 1])
        terminations = terminations * valid
    return SequenceBatch(
        make_observations(SPACES[space], (steps + 1, rows), generator),
        th.randn(steps, rows, ACTION_DIM, generator=generator).clamp(-1, 1),
        3 * th.randn(steps, rows, generator=generator),
        terminations,
        valid,
    )


def in_double(values):
    """Tensors of a named tuple or dictionary, those that are floats in double precision."""
    if isinstance(values, dict):
        return {key: in_double(each) for key, each in values.items()}
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return type(values)(*map(in_double, values))
    if isinstance(values, th.Tensor) and values.is_floating_point():
        return values.double()
    return values


def assert_close(ours, theirs, what, least_scale=1e-3):
    difference = float((ours.double() - theirs.double()).abs().max())
    scale = max(least_scale, float(theirs.abs().max()))
    assert difference <= TOLERANCE * scale, (what, difference)


def assert_same_losses(ours, theirs):
    found, expected = (_by_name(each) for each in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # A loss may be the small sum of large terms of either sign.
        assert_close(found[name].detach(), value.detach(), name, 0.02)


def _by_name(losses):
    numbers = losses._asdict()
    return {**numbers.pop("terms", {}), **numbers}


def assert_same_gradients(model, exact, taken, names):
    expected = dict(exact.named_parameters())
    found = dict(model.named_parameters())
    for name, parameter in found.items():
        if not name.startswith(names):
            assert parameter.grad is None, name
        else:
            assert_close(parameter.grad, expected[name].grad, name)
    squares = sum(float(each.double().square().sum()) for each in taken.arrays)
    wanted = sum(float(expected[n].grad.square().sum()) for n in found if n.startswith(names))
    assert squares == pytest.approx(wanted, rel=1e-4)
    assert float(taken.norm) == pytest.approx(wanted**0.5, rel=1e-4)


CASES = {
    "reference": {},
    "one step": {"steps": 1},
    "long": {"steps": 6},
    "lambda 1": {"config": {"td_lambda": 1.0}},
    "lambda between": {"config": {"td_lambda": 0.6, "entropy_coef": 0.3}},
    "entropy of squashed actions": {"config": {"entropy": "squashed", "entropy_coef": 0.3}},
    "entropy of the Gaussian": {"config": {"entropy": "gaussian", "entropy_coef": 0.3}},
    "one row": {"rows": 1},
    "many rows": {"rows": 130},
    "no dropout": {"dropout": 0.0},
    "one Q head": {"num_q": 1},
    "two Q heads": {"num_q": 2},
    "matrix": {"space": "matrix"},
    "vectors": {"space": "vectors"},
    "images": {"space": "image and vector"},
    "state space": {"dynamics": "ssm"},
    "state space of one layer": {"dynamics": "ssm", "depth": 1, "rows": 1},
    "state space of three layers": {"dynamics": "ssm", "depth": 3, "rows": 40},
    "time-invariant state space": {"dynamics": "ssm", "selective": False},
    "autoregressive state space": {"dynamics": "ssm", "autoregressive": True},
    "episodic": {"episodic": True},
    "past terminations": {"episodic": True, "past_terminations": True},
    "encoded terminations": {
        "episodic": True,
        "past_terminations": True,
        "config": {"encoded_terminations": True, "termination_coef": 0.7},
    },
    "all at once": {
        "episodic": True,
        "past_terminations": True,
        "space": "image and vector",
        "dynamics": "ssm",
        "config": {"encoded_terminations": True, "td_lambda": 0.5},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case, threads, roughen):
    compare(case, roughen, by_torch=False)


@pytest.mark.parametrize("case", CASES)
def test_where_torch_multiplies(case, roughen):
    compare(case, roughen, by_torch=True)


def compare(case, roughen, by_torch):
    """By torch: as on a processor on which it multiplies the matrices."""
    settings = CASES[case] if isinstance(case, str) else case
    settings = {"steps": 3, "rows": 9, "space": "vector", **settings}
    config = LossConfig(**{"gamma": 0.97, **settings.pop("config", {})})
    steps, rows, space = (settings.pop(name) for name in ("steps", "rows", "space"))
    past_terminations = settings.pop("past_terminations", False)
    model = make_model(roughen, space, **settings)
    weights = step_weights(steps, steps, 0.5, True)
    exact = copy.deepcopy(model)
    dtype = th.float32 if model.encoder.image_keys else th.float64
    if dtype is th.float64:
        exact = exact.double()
        exact.bins = model.bins.double()
    assert has_direct_gradients(model)
    direct = DirectGradients(model, config)
    policy_weights, scale = step_weights(steps + 1, steps, 0.5, True), th.tensor(1.7)

    target_heads, policy_heads = set(), set()
    # Captured, replayed over the first one's gradients, captured for other heads, replayed again.
    for turn, heads_of in enumerate((0, 0, 1, 0)):
        roughen(model, 0.02, seed=turn)
        model.bins = model.bins * 1.01  # a new array
        exact.bins = model.bins.to(exact.bins.dtype)
        exact.load_state_dict(model.state_dict())
        batch = make_batch(space, steps, rows, past_terminations, seed=turn)
        noise = make_noise(model, steps, rows, turn, heads_of)
        target_heads.add(tuple(noise.target_heads.tolist()))
        policy_heads.add(tuple(noise.policy.heads.tolist()))
        exact_batch, exact_noise = batch, noise
        if dtype is th.float64:
            exact_batch, exact_noise = in_double(batch), in_double(noise)

        for each in (*model.parameters(), *exact.parameters()):
            each.grad = None
        expected = model_losses(exact, exact_batch, exact_noise, config, weights.to(dtype))
        expected.total.backward()
        with operation_counter() if by_torch else contextlib.nullcontext(), fixed_weights():
            losses, taken = direct.model_losses(batch, noise, weights)
        assert_same_losses(losses, expected)
        names = ("encoder", "dynamics", "reward_net", "q_ensemble", "termination_net")
        assert_same_gradients(model, exact, taken, names)

        for each in (*model.parameters(), *exact.parameters()):
            each.grad = None
        alive = alive_states(batch)
        prior = policy_loss(
            exact,
            expected.latents,
            scale.to(dtype),
            exact_noise.policy,
            config,
            policy_weights.to(dtype),
            TAU,
            None if alive is None else alive.to(dtype),
        )
        prior.total.backward()
        with operation_counter() if by_torch else contextlib.nullcontext(), fixed_weights():
            ours, taken = direct.policy_loss(
                expected.latents.float(), scale, noise.policy, policy_weights, TAU, alive
            )
        assert_same_losses(ours, prior)
        for name, each in exact.named_parameters():
            if not name.startswith("policy_net"):
                each.grad = None
        assert_same_gradients(model, exact, taken, ("policy_net",))
    # As on a Mac: torch's operations are not captured.
    if by_torch or not usable_product(MIN_ROWS, 16):
        assert direct._policy_results.replays == direct._model_results.replays == 0
        return
    assert direct._policy_results.replays == 4 - len(policy_heads)
    is_captured = direct._rollout is not None or direct._state_space is not None
    expected = 4 - len(target_heads) if is_captured else 0
    assert direct._model_results.replays == expected, direct._model_results.computed_by_torch


def make_noise(model, steps, rows, seed, seed_of_heads):
    """Random numbers of a gradient step, the Q heads those of another seed."""
    noise, other = (
        sample_update_noise(model, steps, rows, th.Generator().manual_seed(each))
        for each in (seed, seed_of_heads)
    )
    return noise._replace(
        target_heads=other.target_heads, policy=noise.policy._replace(heads=other.policy.heads)
    )


@pytest.mark.parametrize("entropy", ENTROPIES)
@pytest.mark.parametrize("spread", [0.1, 1.0, 20.0])
def test_gradients_of_the_policys_draw(spread, entropy, threads, roughen):
    """At 20 most actions lie at their bounds, where the squashed density's slope is cut off."""
    rows = 700
    generator = th.Generator().manual_seed(5)
    moments = spread * th.randn(rows, 2 * ACTION_DIM, generator=generator)
    noise = th.randn(rows, ACTION_DIM, generator=generator)
    grad_actions = th.randn(rows, ACTION_DIM, generator=generator)
    grad_entropy = th.randn(rows, generator=generator)
    latents = th.randn(rows, 2, generator=generator)
    draw = PolicyDraw(moments, noise, latents, squashed=entropy == "squashed")
    grad_moments = draw.backward(grad_actions, grad_entropy)

    model = make_model(roughen)
    leaf = moments.requires_grad_()
    model.policy_net = _Constant(leaf)  # type: ignore[assignment]
    sample = model.policy(th.zeros(rows, 16), noise)  # single precision: where a is 1 matters
    entropies = scaled_entropy(sample, entropy)
    total = (sample.action * grad_actions).sum() + (entropies * grad_entropy).sum()
    total.backward()
    assert th.equal(draw.pairs[:, :2], latents)
    th.testing.assert_close(draw.pairs[:, 2:], sample.action, rtol=1e-5, atol=1e-6)
    th.testing.assert_close(draw.log_prob, sample.log_prob, rtol=1e-4, atol=1e-4)
    th.testing.assert_close(draw.scaled_entropy, entropies, rtol=1e-3, atol=1e-3)
    th.testing.assert_close(grad_moments, leaf.grad, rtol=1e-3, atol=1e-4)


class _Constant(th.nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, _):
        return self.outputs


def test_whoever_changed_a_part_keeps_autograd(roughen):
    class OtherModel(WorldModel):
        pass

    class OtherMLP(MLP):
        pass

    model = make_model(roughen)
    assert has_direct_gradients(model)
    other = copy.deepcopy(model)
    other.__class__ = OtherModel
    assert not has_direct_gradients(other)
    for name in ("reward_net", "policy_net"):
        other = copy.deepcopy(model)
        getattr(other, name).__class__ = OtherMLP
        assert not has_direct_gradients(other)
    other = copy.deepcopy(model)
    other.reward_net[0].activation = th.nn.Tanh()
    assert not has_direct_gradients(other)


def other_value(config, name):
    """Another value than a setting has."""
    value = getattr(config, name)
    if name == "entropy":
        return next(each for each in ENTROPIES if each != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1 if isinstance(value, int) else 0.5 * value + 0.1
    return f"other than {value}"


@pytest.mark.parametrize("name", LossConfig._fields)
def test_every_setting_is_heeded_or_declined(name, roughen):
    """Also one that is added tomorrow to the plain losses alone."""
    config = LossConfig()._replace(**{name: other_value(LossConfig(), name)})
    if has_direct_gradients(make_model(roughen, episodic=True), config):
        settings = {"episodic": True, "past_terminations": True, "config": config._asdict()}
        compare(settings, roughen, by_torch=False)


@pytest.mark.parametrize(("default", "other"), [(0.0, 0.1), (False, True), ("no", "yes"), (0, 2)])
def test_a_setting_of_the_plain_losses_alone(default, other, roughen):
    fields = {**LossConfig._field_defaults, "added": default}
    extended = collections.namedtuple("Extended", fields, defaults=fields.values())
    model = make_model(roughen)
    assert has_direct_gradients(model, extended())
    assert not has_direct_gradients(model, extended(added=other))


def test_a_number_that_is_not_0_is_in_use_by_default(roughen):
    fields = {**LossConfig._field_defaults, "added_coef": 0.5}
    extended = collections.namedtuple("Extended", fields, defaults=fields.values())
    assert not has_direct_gradients(make_model(roughen), extended())


def changed_layer(layer, attribute="forward"):
    """Turns a module into a subclass that halves what it returns."""
    original = type(layer)

    def halved(self, *args, **kwargs):
        return 0.5 * getattr(original, attribute)(self, *args, **kwargs)

    layer.__class__ = type("Halved", (original,), {attribute: halved})


@pytest.mark.parametrize(
    "path",
    ["reward_net.0", "reward_net.1", "reward_net.2", "policy_net.2", "q_ensemble.layers.1",
     "target_q_ensemble.layers.0", "termination_net.1", "dynamics.net.1", "encoder.state.net.0",
     "q_ensemble", "reward_net.0.activation"],
)  # fmt: skip
def test_a_changed_layer_is_learnt_with(path, roughen):
    """Losses and gradients are those of torch in double precision, whichever way they go."""
    model = make_model(roughen, episodic=True)
    changed_layer(model.get_submodule(path))
    exact = copy.deepcopy(model).double()
    exact.bins = model.bins.double()
    batch, config = make_batch("vector", 3, 9, False), LossConfig()
    noise = sample_update_noise(model, 3, 9, th.Generator().manual_seed(3))
    weights = step_weights(3, 3, 0.5, True)
    expected = model_losses(exact, in_double(batch), in_double(noise), config, weights.double())
    expected.total.backward()
    knows = has_direct_gradients(model)
    assert knows == path.startswith(("dynamics", "encoder"))  # which autograd takes then
    with fixed_weights():
        if knows:
            losses, _ = DirectGradients(model, config).model_losses(batch, noise, weights)
        else:
            losses = model_losses(model, batch, noise, config, weights)
            losses.total.backward()
    assert_same_losses(losses, expected)
    for (name, one), other in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        if other[1].grad is not None:
            assert_close(one.grad, other[1].grad, name)


def test_a_part_changed_later_goes_the_plain_way(make_agent, capsys):
    agent = make_agent(verbose=1, episodic=True)
    agent.learn(24)
    assert agent._update_step._direct is not None
    assert "plain way" not in capsys.readouterr().out
    changed_layer(agent.policy.world_model.reward_net[1])
    agent.learn(3, reset_num_timesteps=False)
    assert agent._update_step._direct is None
    assert agent.policy.ways.direct_planning(agent.policy.planner) is None
    lines = [line for line in capsys.readouterr().out.splitlines() if "plain way" in line]
    assert len(lines) == 2  # gradient steps, plans
    assert all("reward_net" in line for line in lines)


def test_latents_known_to_be_of_simplices(roughen):
    assert make_model(roughen).latent_simplices() == 2
    assert make_model(roughen, dynamics="ssm").latent_simplices() == 2
    assert make_model(roughen, "vectors", episodic=True).latent_simplices() == 2
    assert make_model(roughen, "image and vector").latent_simplices() == 0  # not by kernels
    for part in ("encoder", "dynamics"):
        model = make_model(roughen)
        net = model.encoder.state.net if part == "encoder" else model.dynamics.net
        net[-1].activation = SimNorm(4)
        assert model.latent_simplices() == 0
    model = make_model(roughen)
    model.dynamics.__class__ = type("Other", (MLPDynamics,), {})
    assert model.latent_simplices() == 0


def test_other_dynamics_are_rolled_out_by_themselves(roughen):
    """A subclass of the MLP's dynamics has its own gradients, not the MLP's."""

    class Halved(MLPDynamics):
        def step(self, state, action):
            latent, _ = super().step(state, 0.5 * action)
            return latent, (latent,)

    model = make_model(roughen)
    model.dynamics.__class__ = Halved
    exact = copy.deepcopy(model).double()
    exact.bins = model.bins.double()
    batch = make_batch("vector", 3, 9, False)
    noise = sample_update_noise(model, 3, 9, th.Generator().manual_seed(3))
    weights = step_weights(3, 3, 0.5, True)
    expected = model_losses(
        exact, in_double(batch), in_double(noise), LossConfig(), weights.double()
    )
    expected.total.backward()
    with fixed_weights():
        losses, taken = DirectGradients(model, LossConfig()).model_losses(batch, noise, weights)
    assert_same_losses(losses, expected)
    names = ("encoder", "dynamics", "reward_net", "q_ensemble")
    assert_same_gradients(model, exact, taken, names)


def test_a_gradient_step_takes_the_direct_way(make_agent, monkeypatch):
    """Unless it is to be compiled; parameters that were put elsewhere are found."""
    calls = []
    original = DirectGradients.model_losses

    def counted(self, *args):
        calls.append(self)
        return original(self, *args)

    monkeypatch.setattr(update_module.DirectGradients, "model_losses", counted)
    agent = make_agent()
    agent.learn(40)
    assert len(calls) == agent._n_updates
    for parameter in agent.policy.parameters():
        parameter.data = parameter.data.clone()
    before = copy.deepcopy(agent.policy.world_model.state_dict())
    agent.train(1, 8)
    for name, value in agent.policy.world_model.state_dict().items():
        assert not th.equal(value, before[name]), name


@pytest.mark.parametrize("dynamics", ["mlp", "ssm"])
def test_a_copied_agent_learns_by_itself(dynamics, make_agent):
    agent = make_agent(dynamics=dynamics)
    agent.learn(30)
    copied = copy.deepcopy(agent)
    before = copy.deepcopy(agent.policy.world_model.state_dict())
    copied.train(1, 8)
    for name, value in copied.policy.world_model.state_dict().items():
        assert not th.equal(value, before[name]), name
        assert th.equal(agent.policy.world_model.state_dict()[name], before[name]), name
