"""The SSM dynamics against independent computations, known solutions and the MLP."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st

from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.model.dynamics import MLPDynamics, SSMDynamics
from tdmpc2_sb3.model.dynamics.base import LatentDynamics
from tdmpc2_sb3.model.dynamics.ssm import (
    DT_MAX,
    DT_MIN,
    RING_INNER,
    RING_OUTER,
    SSMLayer,
    discretise,
    gelu_sum,
    scan,
)

LATENT, ACTION, MLP_DIM = 32, 3, 48
HORIZONS = [1, 3, 10, 50]
OPTIONS: list[dict[str, object]] = [
    {},
    {"selective": False},
    {"depth": 1, "selective": False},
    {"depth": 3, "modes": 5},
    {"autoregressive": True},
]


def make_dynamics(seed: int = 0, **options: object) -> SSMDynamics:
    """Dynamics away from its initial values, where a step size depends on its input."""
    th.manual_seed(seed)
    dynamics = SSMDynamics(LATENT, ACTION, MLP_DIM, **options)  # type: ignore[arg-type]
    with th.no_grad():
        for parameter in dynamics.parameters():
            parameter.add_(0.1 * th.randn_like(parameter))
    return dynamics


def make_inputs(
    horizon: int, dtype: th.dtype, batch: tuple[int, ...] = (2, 5)
) -> tuple[th.Tensor, th.Tensor]:
    th.manual_seed(1)
    latent = th.randn(batch[0], 1, LATENT // 8, 8).softmax(-1).flatten(-2).to(dtype)
    actions = (2 * th.rand(horizon, *batch, ACTION) - 1).to(dtype)
    return latent, actions


def by_steps(dynamics: SSMDynamics, latent: th.Tensor, actions: th.Tensor) -> th.Tensor:
    state, latents = dynamics.initial_state(latent), []
    for action in actions:
        z, state = dynamics.step(state, action)
        latents.append(z)
    return th.stack(latents)


def values_and_gradients(
    dynamics: SSMDynamics, outputs: th.Tensor, latent: th.Tensor, actions: th.Tensor
) -> list[th.Tensor]:
    th.manual_seed(2)
    weights = th.randn(outputs.shape).to(outputs.dtype)
    inputs = [latent, actions, *dynamics.parameters()]
    # A mean over the horizon, so that the tolerance means the same at every horizon.
    gradients = th.autograd.grad((outputs * weights).sum() / len(outputs), inputs)
    return [outputs, *gradients]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(th.float32, 1e-5), (th.float64, 1e-9)])
def test_step_and_rollout_agree(
    options: dict[str, object], horizon: int, dtype: th.dtype, tolerance: float
) -> None:
    dynamics = make_dynamics(**options).to(dtype)
    latent, actions = make_inputs(horizon, dtype)
    latent.requires_grad_()
    actions.requires_grad_()
    batched = dynamics.rollout(dynamics.initial_state(latent), actions)
    assert batched.shape == (horizon, 2, 5, LATENT)
    stepped = by_steps(dynamics, latent, actions)
    for one, other in zip(
        values_and_gradients(dynamics, batched, latent, actions),
        values_and_gradients(dynamics, stepped, latent, actions),
        strict=True,
    ):
        # Relative to the largest entry: a gradient's rounding is that of its largest terms.
        scale = max(1.0, one.abs().max().item())
        assert (one - other).abs().max().item() <= tolerance * scale


def layer_norm(x: th.Tensor, norm: th.nn.Module) -> th.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * norm.weight + norm.bias


def complex_reference(dynamics: SSMDynamics, latent: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """The docstring's equations in complex128, one row and one step at a time."""
    p = {name: value.detach().double() for name, value in dynamics.named_parameters()}

    def normed(name: str, x: th.Tensor) -> th.Tensor:
        y = p[f"{name}.weight"] @ x + p[f"{name}.bias"]
        y = (y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt()
        return y * p[f"{name}.ln.weight"] + p[f"{name}.ln.bias"]

    c = th.nn.functional.mish(normed("features", latent))
    context = p["features_in.weight"] @ c + p["features_in.bias"]
    modes = dynamics.sizes.modes
    starts = (p["starts.weight"] @ c).view(dynamics.depth, 2, modes)
    states = [th.complex(start[0], start[1]) for start in starts]
    latents = []
    for action in actions:
        u = p["action_in.weight"] @ action + context
        for index, layer in enumerate(dynamics.layers):
            name = f"layers.{index}."
            v = layer_norm(u, layer.norm.double())
            lam = th.complex(-(1e-3 + p[name + "nu"].exp()), p[name + "omega"])
            raw = p[name + "beta"]
            if dynamics.selective:
                raw = raw + p[name + "select_out.weight"] @ p[name + "select_in.weight"] @ v
            dt = (1 + raw.exp()).log().clamp(DT_MIN, DT_MAX)
            decay = (lam * dt).exp()
            b = p[name + "drive.weight"] @ v
            states[index] = decay * states[index] + (decay - 1) / lam * th.complex(
                b[:modes], b[modes:]
            )
            x = th.cat([states[index].real, states[index].imag])
            y = p[name + "readout.weight"] @ x + p[name + "direct.weight"] @ v
            u = u + p[name + "mix.weight"] @ th.nn.functional.gelu(y, approximate="tanh")
        y = p["out.weight"] @ u + p["out.bias"]
        y = (y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt()
        y = y * p["out.ln.weight"] + p["out.ln.bias"]
        latents.append(y.view(-1, 8).softmax(-1).flatten())
    return th.stack(latents)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_rollout_equals_a_complex_recurrence(options: dict[str, object]) -> None:
    dynamics = make_dynamics(**options)
    latent, actions = make_inputs(10, th.float32, batch=(2, 2))
    single = dynamics.rollout(dynamics.initial_state(latent), actions)
    dynamics = dynamics.double()
    double = dynamics.rollout(dynamics.initial_state(latent.double()), actions.double())
    for env in range(2):
        for sample in range(2):
            expected = complex_reference(
                dynamics, latent[env, 0].double(), actions[:, env, sample].double()
            )
            th.testing.assert_close(double[:, env, sample], expected, rtol=0, atol=1e-12)
            th.testing.assert_close(single[:, env, sample].double(), expected, rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(1e-3, 1e4),
    shift=st.floats(-50.0, 50.0),
    seed=st.integers(0, 2**20),
)
def test_every_input_gives_a_contracting_state(scale: float, shift: float, seed: int) -> None:
    th.manual_seed(seed)
    layer = SSMLayer(12, 6, selective=True)
    with th.no_grad():
        layer.nu.normal_(shift / 5, 3.0)
        layer.omega.normal_(0.0, 10.0)
        layer.beta.normal_(shift, 5.0)
        layer.select_out.weight.normal_(0.0, scale)
        dt = layer.step_sizes(layer.products(scale * th.randn(64, 12))[2])
        system = layer.discretise(dt)
    assert ((dt >= DT_MIN) & (dt <= DT_MAX)).all()
    modulus = th.hypot(system.decay_real.double(), system.decay_imag.double())
    assert modulus.max().item() < 1.0
    assert all(th.isfinite(part).all() for part in system)


def test_states_stay_bounded_over_a_long_horizon() -> None:
    """|x| <= |x_0| + |G b|_max / (1 - |Abar|_max) for a contraction."""
    th.manual_seed(0)
    system = discretise(th.tensor([0.01, 0.5]), th.tensor([1.0, 0.1]), th.tensor([1.0, 2.0]))
    drive = 2 * th.rand(2000, 4) - 1
    states = scan(system, drive, th.ones(4))
    gain = th.hypot(system.gain_real, system.gain_imag) * math.sqrt(2)
    decay = th.hypot(system.decay_real, system.decay_imag)
    bound = math.sqrt(2) + gain / (1 - decay)
    assert (th.hypot(states[:, :2], states[:, 2:]) <= bound + 1e-4).all()


def test_a_damped_oscillator_is_reproduced() -> None:
    """q'' + 2 zeta w q' + w^2 q = w^2 a from rest under a unit step: a textbook response."""
    natural, damping, interval = 1.3, 0.15, 0.4
    damped = natural * math.sqrt(1 - damping**2)
    alpha, omega, dt = th.tensor([[natural * damping], [damped], [interval]], dtype=th.float64)
    system = discretise(alpha, omega, dt)
    # q = Im(x) of x' = lambda x + b with b = w^2 a / damped: its imaginary part obeys the equation.
    drive = th.zeros(40, 2, dtype=th.float64)
    drive[:, 0] = natural**2 / damped
    states = scan(system, drive, th.zeros(2, dtype=th.float64))
    t = interval * th.arange(1, 41, dtype=th.float64)
    ratio = damping / math.sqrt(1 - damping**2)
    response = 1 - th.exp(-natural * damping * t) * (
        th.cos(damped * t) + ratio * th.sin(damped * t)
    )
    th.testing.assert_close(states[:, 1], response, rtol=0, atol=1e-12)


@pytest.mark.parametrize("step_size", [1e-5, 1e-3, 1.0, 5.0])
def test_single_precision_keeps_the_gain_of_small_steps(step_size: float) -> None:
    alpha, omega = th.tensor([0.3, 0.01]), th.tensor([1.2, 0.0])
    system = discretise(alpha, omega, th.tensor([step_size]))
    lam = th.complex(-alpha.double(), omega.double())
    exact = (th.exp(lam * th.tensor(step_size).double()) - 1) / lam
    gain = th.complex(system.gain_real.double(), system.gain_imag.double())
    assert ((gain - exact).abs() / exact.abs()).max().item() < 1e-6


def test_gelu_is_torch_s_tanh_form() -> None:
    a = th.linspace(-6, 6, 200, dtype=th.float64)
    b = 0.5 * a.flip(0)
    expected = th.nn.functional.gelu(a + b, approximate="tanh")
    th.testing.assert_close(gelu_sum(a, b), expected, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 100),
    action_dim=st.integers(1, 60),
    mlp_dim=st.integers(8, 1024),
    depth=st.integers(1, 3),
    selective=st.booleans(),
)
def test_parameters_match_the_mlp(
    groups: int, action_dim: int, mlp_dim: int, depth: int, selective: bool
) -> None:
    with th.device("meta"):
        mlp = MLPDynamics(8 * groups, action_dim, mlp_dim)
        ssm = SSMDynamics(8 * groups, action_dim, mlp_dim, depth=depth, selective=selective)
    assert count(ssm) == pytest.approx(count(mlp), rel=0.02)


@pytest.mark.parametrize(
    ("latent_dim", "mlp_dim"), [(128, 256), (128, 384), (512, 512), (768, 1024), (1376, 4096)]
)
@pytest.mark.parametrize("action_dim", [1, 6, 38])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parameters_match_at_the_standard_sizes(
    latent_dim: int, mlp_dim: int, action_dim: int, options: dict[str, object]
) -> None:
    with th.device("meta"):
        mlp = MLPDynamics(latent_dim, action_dim, mlp_dim)
        ssm = SSMDynamics(latent_dim, action_dim, mlp_dim, **options)  # type: ignore[arg-type]
    assert count(ssm) == pytest.approx(count(mlp), rel=0.02)


def count(module: th.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_initial_eigenvalues_lie_on_the_ring() -> None:
    dynamics = SSMDynamics(512, 6, 512)
    radii = []
    for layer in dynamics.layers:
        dt = layer.step_sizes(layer.products(th.randn(10, dynamics.sizes.width))[2])
        th.testing.assert_close(dt, th.ones_like(dt))  # one agent step, whatever the input
        system = layer.discretise(dt[0])
        radii.append(th.hypot(system.decay_real, system.decay_imag))
        assert layer.omega.min() >= 0.0
        assert layer.omega.max() <= math.pi / 2
    radius = th.cat(radii)
    assert radius.min() >= RING_INNER - 1e-5
    assert radius.max() <= RING_OUTER + 1e-5
    # Uniform by area: the mean of r^2 is that of its bounds, within 4 standard errors.
    middle = (RING_INNER**2 + RING_OUTER**2) / 2
    spread = (RING_OUTER**2 - RING_INNER**2) / math.sqrt(12 * len(radius))
    assert abs(radius.square().mean().item() - middle) < 4 * spread


def test_a_fresh_model_feels_its_actions() -> None:
    """Not blind at a planner's horizon: actions move z_3 by a visible part of what z_0 does."""
    th.manual_seed(0)
    dynamics = SSMDynamics(128, 6, 256)
    latents = th.randn(64, 16, 8).softmax(-1).flatten(-2)
    actions = 2 * th.rand(3, 64, 6) - 1
    fixed_latent = dynamics.rollout(dynamics.initial_state(latents[:1]), actions)[-1]
    fixed_actions = dynamics.rollout(
        dynamics.initial_state(latents), actions[:, :1].expand_as(actions)
    )[-1]
    assert fixed_latent.var(0).mean() > 0.1 * fixed_actions.var(0).mean()


def test_a_global_initialiser_is_undone_by_reset_parameters() -> None:
    dynamics = SSMDynamics(64, 2, 64)
    slow = list(dynamics.slow_parameters())
    assert len(slow) == 3 * dynamics.depth
    for parameter in dynamics.parameters():
        th.nn.init.trunc_normal_(parameter, std=0.02)
    dynamics.reset_parameters()
    for layer in dynamics.layers:
        assert th.nn.functional.softplus(layer.beta).allclose(th.ones(()))
        assert layer.select_out.weight.eq(0).all()
        assert layer.omega.max() > 0.5


def test_terms_of_the_first_latent_are_computed_once() -> None:
    """The planner's broadcast latent [E, 1, Z] gives what a copy for every sample gives."""
    dynamics = make_dynamics()
    latent, actions = make_inputs(4, th.float32, batch=(2, 7))
    state = dynamics.initial_state(latent)
    assert {part.shape[:-1] for part in state} == {(2, 1)}
    copies = dynamics.initial_state(latent.expand(2, 7, LATENT))
    th.testing.assert_close(
        dynamics.rollout(state, actions), dynamics.rollout(copies, actions), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth=0"),
        ({"modes": 0}, "modes=0"),
        ({"width": 16}, "give both"),
        ({"modes": 4000}, "reduce depth or modes"),
        ({"depth": "2"}, "depth='2'.*whole number"),
        ({"modes": 2.5}, r"modes=2\.5"),
        ({"lr_scale": 0.0}, "lr_scale=0.0.*above 0, at most 100"),
        ({"lr_scale": float("nan")}, "lr_scale=nan"),
        ({"lr_scale": "3"}, "lr_scale='3'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSMDynamics(LATENT, ACTION, MLP_DIM, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_rollout_compiles_without_a_graph_break() -> None:
    dynamics = make_dynamics()
    latent, actions = make_inputs(5, th.float32)

    def rollout(latent: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return dynamics.rollout(dynamics.initial_state(latent), actions)

    with th.no_grad():
        compiled = th.compile(rollout, fullgraph=True)(latent, actions)
        th.testing.assert_close(compiled, rollout(latent, actions), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_agent_learns_saves_and_loads_with_it(
    make_agent: Callable[..., TDMPC2], tmp_path: Path, scale: float
) -> None:
    agent = make_agent(policy="SSMPolicy", horizon=4, dynamics_kwargs={"lr_scale": scale})
    dynamics = agent.policy.world_model.dynamics
    assert isinstance(dynamics, SSMDynamics)
    rates = {
        id(parameter): group["lr"]
        for group in agent.policy.model_optimizer.param_groups
        for parameter in group["params"]
    }
    slow = {id(parameter) for parameter in dynamics.slow_parameters()}
    for parameter in dynamics.parameters():
        expected = 3e-4 * scale * (0.3 if id(parameter) in slow else 1.0)
        assert rates[id(parameter)] == pytest.approx(expected)
    heads = agent.policy.world_model.reward_net.parameters()
    assert {rates[id(parameter)] for parameter in heads} == {3e-4}
    before = {name: value.clone() for name, value in dynamics.state_dict().items()}
    agent.learn(40)
    changed = {n for n, value in dynamics.state_dict().items() if not value.equal(before[n])}
    # W_1 moves only after W_2 has left zero, which it has by now.
    assert changed == set(before)
    agent.save(tmp_path / "agent")
    loaded = TDMPC2.load(tmp_path / "agent", device="cpu")
    scales = [group["lr_scale"] for group in loaded.policy.model_optimizer.param_groups]
    own = [1.0] if scale == 1.0 else [1.0, scale]
    assert scales == pytest.approx([0.3, *own, 0.3 * scale])
    observation = agent.observation_space.sample()
    action, _ = agent.predict(observation, deterministic=True)
    np.testing.assert_array_equal(action, loaded.predict(observation, deterministic=True)[0])


class Pendulum:
    """Recorded latents and actions of Pendulum-v1 under random torques, 80 episodes of 40 steps.

    The encoder is fixed and random: only the dynamics is compared.
    """

    latent_dim, episodes, steps = 32, 80, 40

    def __init__(self) -> None:
        import gymnasium as gym

        env = gym.make("Pendulum-v1")
        env.action_space.seed(0)
        observations, actions = [], []
        for seed in range(self.episodes):
            observation, _ = env.reset(seed=seed)
            episode = [observation]
            for _ in range(self.steps):
                actions.append(env.action_space.sample())
                episode.append(env.step(actions[-1])[0])
            observations.append(episode)
        states = th.tensor(np.array(observations)) / th.tensor([1.0, 1.0, 4.0])
        th.manual_seed(0)
        features = th.tanh(states @ th.randn(3, 64)) @ th.randn(64, self.latent_dim) / 4
        self.latents = features.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)
        self.actions = th.tensor(np.array(actions)).view(self.episodes, self.steps, 1) / 2

    def sample(
        self, episodes: range, rows: int, horizon: int, generator: th.Generator
    ) -> tuple[th.Tensor, th.Tensor]:
        """Latents [H+1, rows, Z] and actions [H, rows, A]."""
        index = th.randint(episodes.start, episodes.stop, (rows, 1), generator=generator)
        start = th.randint(0, self.steps - horizon + 1, (rows, 1), generator=generator)
        window = start + th.arange(horizon + 1)
        latents, actions = self.latents[index, window], self.actions[index, window[:, :-1]]
        return latents.transpose(0, 1), actions.transpose(0, 1)

    def train(self, dynamics: LatentDynamics, updates: int = 700, horizon: int = 10) -> None:
        generator = th.Generator().manual_seed(0)
        optimizer = th.optim.Adam(dynamics.parameters(), lr=2e-3)
        for update in range(updates):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - update / updates)
            latents, actions = self.sample(range(60), 128, horizon, generator)
            predicted = dynamics.rollout(dynamics.initial_state(latents[0]), actions)
            loss = (predicted - latents[1:]).square().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            th.nn.utils.clip_grad_norm_(dynamics.parameters(), 1.0)
            optimizer.step()

    @th.no_grad()
    def ten_step_errors(self, dynamics: LatentDynamics) -> tuple[float, float]:
        """Of the dynamics, and of predicting no change, on held-out episodes."""
        generator = th.Generator().manual_seed(1)
        latents, actions = self.sample(range(60, 80), 1000, 10, generator)
        predicted = dynamics.rollout(dynamics.initial_state(latents[0]), actions)[-1]
        error = (predicted - latents[-1]).square().sum(-1).mean()
        no_change = (latents[0] - latents[-1]).square().sum(-1).mean()
        return error.item(), no_change.item()


@pytest.mark.slow
def test_a_trained_ssm_predicts_the_pendulum_as_well_as_the_mlp() -> None:
    pendulum = Pendulum()
    errors = {}
    for name, kind in (("mlp", MLPDynamics), ("ssm", SSMDynamics)):
        found = []
        for seed in range(6):  # single trainings differ by a tenth, in either direction
            th.manual_seed(seed)
            dynamics = kind(pendulum.latent_dim, 1, 64)
            pendulum.train(dynamics)
            error, no_change = pendulum.ten_step_errors(dynamics)
            found.append(error)
        errors[name] = float(np.mean(found))
    assert errors["ssm"] < 0.5 * no_change, (errors, no_change)
    assert errors["ssm"] < 1.1 * errors["mlp"], (errors, no_change)
