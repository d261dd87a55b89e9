"""Captured plans against the planner in double precision, whatever changed since the capture."""

from __future__ import annotations

import collections
import copy

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch.utils._python_dispatch import TorchDispatchMode

from tdmpc2_sb3.fast.plans import DirectPlanning, plan, planning_networks
from tdmpc2_sb3.kernels import capture
from tdmpc2_sb3.kernels.products import MIN_ROWS, operation_counter, usable_product
from tdmpc2_sb3.model.layers import MLP
from tdmpc2_sb3.model.world_model import Architecture, WorldModel
from tdmpc2_sb3.planner import (
    Plan,
    PlannerConfig,
    PlanNoise,
    sample_plan_noise,
)

ACTION_DIM = 2
VECTOR = spaces.Box(-np.inf, np.inf, (5,), np.float32)
VECTORS = spaces.Dict({"one": VECTOR, "other": spaces.Box(-1, 1, (2, 2), np.float64)})
CONFIG = PlannerConfig(3, 64, 12, 8, 4, 0.5, 0.05, 2.0, 0.9)


@pytest.fixture(autouse=True)
def _kernels_multiply():
    if not usable_product(MIN_ROWS, 16):
        pytest.skip("no products by kernels here: torch alone plans, which the other tests cover")


def generator(seed):
    return th.Generator().manual_seed(seed)


def make_model(roughen, space=VECTOR, dynamics="mlp", episodic=False, **dynamics_kwargs):
    th.manual_seed(0)
    sizes = Architecture(16, 12, 14, 2, 4)
    model = WorldModel(space, ACTION_DIM, sizes, dynamics, dynamics_kwargs, episodic)
    roughen(model)
    return model


def draw(space, num_envs, seed):
    if isinstance(space, spaces.Dict):
        return {key: draw(each, num_envs, seed) for key, each in space.items()}
    dtype = th.float32 if space.dtype == np.float32 else th.float64
    return th.randn(num_envs, *space.shape, generator=generator(seed), dtype=dtype)


def in_double(values):
    if isinstance(values, dict):
        return {key: each.double() for key, each in values.items()}
    return values.double()


def exact_plan(model, observation, mean, noise, config, explore):
    exact = copy.deepcopy(model).double()
    exact.bins = model.bins.double()
    heads = noise.heads
    noise = PlanNoise(*(each if each is None else each.double() for each in noise))
    latent = exact.encode(in_double(observation))
    return plan(exact, latent, mean.double(), noise._replace(heads=heads), config, explore)


def assert_same(ours, exact):
    for name in Plan._fields:
        expected = getattr(exact, name)
        th.testing.assert_close(getattr(ours, name).double(), expected, rtol=1e-5, atol=1e-5)


class Margins(TorchDispatchMode):
    """The least margin by which a sequence was the best, or was among the elites."""

    def __init__(self, num_elites):
        super().__init__()
        self.num_elites = num_elites
        self.least = np.inf

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is th.ops.aten.sort.stable:
            falls = -result[0].diff(dim=1)
            for rank in {0, min(self.num_elites, falls.shape[1]) - 1}:
                self.least = min(self.least, float(falls[:, rank].min()))
        return result


def make_inputs(model, config, num_envs, seed, shared=False):
    """An observation, the mean that a plan starts from, and random numbers.

    Where two sequences are worth nearly the same, rounding chooses between them: those numbers are
    drawn anew.
    """
    for each in range(seed, seed + 2000, 100):
        noise = sample_plan_noise(model, config, num_envs, generator(each), shared)
        # Gumbel noise goes by rank, which rounding changes for two elites of nearly the same value.
        noise = noise._replace(gumbel=th.zeros_like(noise.gumbel))
        mean = th.rand(num_envs, config.horizon, ACTION_DIM, generator=generator(each)) - 0.5
        observation = draw(model.observation_space, num_envs, each)
        with Margins(config.num_elites) as margins:
            exact_plan(model, observation, mean, noise, config, True)
        if margins.least > 1e-5:
            break
    return observation, mean, noise


CASES = {
    "mlp": {},
    "vectors": {"space": VECTORS},
    "episodic": {"episodic": True},
    "ssm": {"dynamics": "ssm"},
    "time-invariant ssm": {"dynamics": "ssm", "selective": False, "depth": 3},
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attempts", [0, capture.ATTEMPTS])
def test_replayed_plans(roughen, threads, monkeypatch, attempts, case, num_envs, shared):
    """And those that are not, without an attempt at a capture."""
    monkeypatch.setattr(capture, "ATTEMPTS", attempts)
    model = make_model(roughen, **CASES[case])
    direct = DirectPlanning(model)
    assert direct.takes(CONFIG)
    for turn in range(3):
        roughen(model, 0.02, seed=turn)
        observation, mean, noise = make_inputs(model, CONFIG, num_envs, turn, shared)
        ours = direct.plan(observation, mean, noise, CONFIG, explore=True)
        assert_same(ours, exact_plan(model, observation, mean, noise, CONFIG, True))
    assert direct._captured.replays == (2 if attempts else 0), direct._captured.computed_by_torch


@pytest.mark.parametrize("name", PlannerConfig._fields)
def test_every_setting_is_heeded_or_declined(roughen, name):
    """Also one that is added tomorrow to the plain planner alone."""
    value = getattr(CONFIG, name)
    if isinstance(value, bool):
        other = not value
    elif isinstance(value, (int, float)):
        other = value + 1 if isinstance(value, int) else 0.5 * value + 0.1
    else:
        other = f"other than {value}"
    config = CONFIG._replace(**{name: other})
    model = make_model(roughen, episodic=True)
    direct = DirectPlanning(model)
    if direct.takes(config):
        for turn in range(2):
            observation, mean, noise = make_inputs(model, config, 1, turn)
            ours = direct.plan(observation, mean, noise, config, explore=True)
            assert_same(ours, exact_plan(model, observation, mean, noise, config, True))


def test_a_setting_of_the_plain_planner_alone(roughen):
    extended = collections.namedtuple("Extended", [*PlannerConfig._fields, "added"])
    extended.__new__.__defaults__ = (*PlannerConfig(), 0.0)
    extended._field_defaults = {**PlannerConfig._field_defaults, "added": 0.0}
    model = make_model(roughen)
    direct = DirectPlanning(model)
    assert direct.takes(extended(*CONFIG))
    assert not direct.takes(extended(*CONFIG, added=0.1))
    assert planning_networks(model, 0, extended(*CONFIG)) is not None
    assert planning_networks(model, 0, extended(*CONFIG, added=0.1)) is None


@pytest.mark.parametrize(
    "path",
    ["reward_net.1", "policy_net.2", "q_ensemble.layers.1", "termination_net.1", "q_ensemble",
     "dynamics.net.0", "dynamics", "encoder.state.net.0", "encoder.state", "encoder"],
)  # fmt: skip
def test_a_changed_layer_is_planned_with(roughen, path):
    model = make_model(roughen, episodic=True)
    part = model.get_submodule(path)
    original, name = type(part), "step" if path == "dynamics" else "forward"

    def halved(self, *args, **kwargs):
        result = getattr(original, name)(self, *args, **kwargs)
        if name == "step":
            latent, _ = result
            return 0.5 * latent, (0.5 * latent,)
        return 0.5 * result

    part.__class__ = type("Halved", (original,), {name: halved})
    assert not DirectPlanning(model).takes(CONFIG)
    observation, mean, noise = make_inputs(model, CONFIG, 2, 1)
    latent = model.encode(observation)
    ours = plan(model, latent, mean, noise, CONFIG, True)
    assert_same(ours, exact_plan(model, observation, mean, noise, CONFIG, True))


@pytest.mark.parametrize("case", ["mlp", "ssm"])
def test_plans_of_many_sequences(roughen, threads, case):
    """Of more than go through the networks together; all are elites, whose order is rounding's."""
    model = make_model(roughen, **CASES[case])
    config = CONFIG._replace(num_samples=700, num_elites=700)
    observation, mean, noise = make_inputs(model, config, 1, 0)
    ours = DirectPlanning(model).plan(observation, mean, noise, config, explore=False)
    exact = exact_plan(model, observation, mean, noise, config, False)
    for name in ("mean", "std", "value"):
        found, expected = getattr(ours, name), getattr(exact, name)
        th.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_settings_may_change_between_plans(roughen):
    model = make_model(roughen)
    direct = DirectPlanning(model)
    longer = CONFIG._replace(horizon=5, num_iterations=2, num_pi_trajs=0)
    settings = [(CONFIG, 1, True), (CONFIG, 1, False), (longer, 2, True), (CONFIG, 1, True)]
    for turn, (config, num_envs, explore) in enumerate(settings):
        observation, mean, noise = make_inputs(model, config, num_envs, turn)
        ours = direct.plan(observation, mean, noise, config, explore)
        assert_same(ours, exact_plan(model, observation, mean, noise, config, explore))
    assert direct._captured.replays == 1


def test_plans_are_kept_by_whoever_got_them(roughen):
    model = make_model(roughen)
    direct = DirectPlanning(model)
    plans = [direct.plan(*make_inputs(model, CONFIG, 1, turn), CONFIG, True) for turn in (0, 1, 0)]
    for name in Plan._fields:
        first, second, third = (getattr(each, name) for each in plans)
        assert th.equal(first, third), name
        assert not th.equal(first, second), name


def test_the_most_likely_elite_by_gumbel_numbers(roughen):
    """By the kernel and by torch, from the same elites."""
    model = make_model(roughen)
    config = CONFIG._replace(num_iterations=1, num_pi_trajs=0)
    for seed in range(20):
        observation, mean, noise = make_inputs(model, config, 2, seed)
        noise = noise._replace(gumbel=-th.log(-th.log(th.rand(2, 12, generator=generator(seed)))))
        ours = DirectPlanning(model).plan(observation, mean, noise, config, False)
        theirs = plan(model, model.encode(observation), mean, noise, config, False)
        th.testing.assert_close(ours.action, theirs.action, rtol=1e-5, atol=1e-5)


def test_parts_that_were_put_in_are_planned_with(make_agent):
    """Another network, another parameter, or parameters that stand elsewhere."""
    policy = make_agent().policy
    model = policy.world_model

    def value(of=policy):
        mean, start = of.zero_plan(1), th.ones(1, dtype=th.bool)
        observation = th.ones(1, *of.observation_space.shape)
        return of.plan(observation, mean, start, generator(0), explore=False).value

    def assert_changed(before):
        now = value()
        assert not th.equal(now, before)
        assert th.equal(now, value(copy.deepcopy(policy)))  # which knows of no capture
        return now

    first = value()
    with th.no_grad():
        model.reward_net[-1].bias.add_(th.arange(len(model.bins)) * 0.1)
    second = assert_changed(first)
    layer = model.q_ensemble.layers[-1]
    layer.bias = th.nn.Parameter(layer.bias + th.arange(len(model.bins)) * 0.1)
    third = assert_changed(second)
    for parameter in policy.parameters():
        parameter.data = 1.1 * parameter.data
    fourth = assert_changed(third)
    model.bins = model.bins * 2.0
    fifth = assert_changed(fourth)
    arch = model.architecture
    model.reward_net = MLP(arch.latent_dim + model.action_dim, [arch.mlp_dim] * 2, arch.num_bins)
    assert_changed(fifth)


def test_a_first_plan_in_inference_mode(make_agent):
    agent = make_agent()
    observation = np.ones((1, *agent.observation_space.shape), np.float32)
    with th.inference_mode():
        first, _ = agent.predict(observation, deterministic=True)
    for value in (0.5, 1.0):
        again, _ = agent.predict(value * observation, deterministic=True)
    np.testing.assert_array_equal(again, first)


def test_operations_are_counted_by_torch(make_agent):
    """As many as the networks have, by the very plan."""
    policy = make_agent(num_samples=32, num_pi_trajs=0, num_iterations=2, horizon=1).policy
    mean, start = policy.zero_plan(1), th.ones(1, dtype=th.bool)
    observation = th.ones(1, *policy.observation_space.shape)
    plans = [policy.plan(observation, mean, start, generator(0), explore=False)]
    with operation_counter() as counter:
        plans.append(policy.plan(observation, mean, start, generator(0), explore=False))
    assert_same(plans[0], plans[1]._replace(**in_double(plans[1]._asdict())))
    model = policy.world_model
    layers = [*model.reward_net, *model.dynamics.net, *model.policy_net]
    once = sum(layer.weight.numel() for layer in layers)
    once += 2 * sum(layer.weight[0].numel() for layer in model.q_ensemble.layers)
    shared = sum(net[0].weight[:, : model.architecture.latent_dim].numel()
                 for net in (model.reward_net, model.dynamics.net))  # fmt: skip
    encoder = sum(layer.weight.numel() for layer in model.encoder.state.net)
    assert counter.get_total_flops() == 2 * (2 * (32 * once - 31 * shared) + encoder)


def test_what_has_no_kernels_is_planned_as_before(roughen):
    image = spaces.Dict({"seen": spaces.Box(0, 255, (3, 64, 64), np.uint8), "felt": VECTOR})
    assert not DirectPlanning(make_model(roughen, image)).takes(CONFIG)
    fed_back = make_model(roughen, dynamics="ssm", autoregressive=True)
    assert not DirectPlanning(fed_back).takes(CONFIG)

    class Other(MLP):
        def forward(self, x):
            return 2.0 * super().forward(x)

    model = make_model(roughen)
    model.encoder.state.net.__class__ = Other
    assert not DirectPlanning(model).takes(CONFIG)
