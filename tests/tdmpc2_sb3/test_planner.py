"""MPPI: against a plain loop over environments and samples, and in models whose best is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from tdmpc2_sb3.fast.plans import plan, planning_networks
from tdmpc2_sb3.kernels import count_simplices
from tdmpc2_sb3.kernels.arguments import SIMPLEX
from tdmpc2_sb3.kernels.products import MIN_ROWS, usable_product
from tdmpc2_sb3.model.dynamics import LatentDynamics, MLPDynamics
from tdmpc2_sb3.model.world_model import Architecture, WorldModel
from tdmpc2_sb3.planner import (
    PlannerConfig,
    PlanNoise,
    check_planner,
    sample_plan_noise,
    shift_plan,
    sum_rewards,
)

OBS_DIM, ACTION_DIM = 5, 2
FLOAT32 = np.finfo(np.float32)
SPACE = spaces.Box(-np.inf, np.inf, (OBS_DIM,), np.float32)
CONFIG = PlannerConfig(3, 64, 12, 8, 4, 0.5, 0.05, 2.0, 0.9)


def generator(seed=0):
    return th.Generator().manual_seed(seed)


def make_model(roughen, episodic=False, dynamics="mlp"):
    th.manual_seed(0)
    kind, kwargs = dynamics, None
    if dynamics == "time-invariant ssm":
        kind, kwargs = "ssm", {"selective": False, "depth": 3}
    model = WorldModel(SPACE, ACTION_DIM, Architecture(16, 12, 14, 2, 4), kind, kwargs, episodic)
    roughen(model)
    if episodic:  # so that some trajectories end and others do not
        with th.no_grad():
            model.termination_net[-1].weight.mul_(3.0)
    return model


def of_env(noise, env):
    """The random numbers of one environment alone."""
    rows = slice(env, env + 1)
    return noise._replace(
        policy=noise.policy[:, rows],
        samples=noise.samples[:, :, rows],
        terminal=noise.terminal[:, rows],
        gumbel=noise.gumbel[rows],
        exploration=noise.exploration[rows],
    )


# -- the specification's planner, one environment and one trajectory at a time ------------------


def plain_value(plain, z, actions, terminal_noise, heads, config, episodic):
    """G of one action sequence: [H, A]."""
    total, discount, alive = 0.0, 1.0, 1.0
    for action in actions:
        total += discount * alive * plain.reward(z, action)
        z = plain.next(z, action)
        discount *= config.gamma
        if episodic and th.sigmoid(plain.termination_logit(z)) > 0.5:
            alive = 0.0
    action = plain.policy_action(z, terminal_noise)
    q = sum(plain.q(z, action, head) for head in heads) / 2
    return float(total + discount * alive * q)


def plain_plan(plain, z, mean, noise, config, explore, episodic):
    """One environment's plan; every tensor of ``noise`` has a single environment."""
    prior = []
    for p in range(config.num_pi_trajs):
        latent, sequence = z, []
        for t in range(config.horizon):
            action = plain.policy_action(latent, noise.policy[t, 0, p])
            sequence.append(action)
            latent = plain.next(latent, action)
        prior.append(th.stack(sequence))
    std = th.full_like(mean, config.max_std)
    for i in range(config.num_iterations):
        samples = noise.samples[i, :, 0].transpose(0, 1)  # [S, H, A]
        candidates = prior + [(mean + std * eps).clamp(-1, 1) for eps in samples]
        values = [
            plain_value(plain, z, actions, noise.terminal[i, 0, n], noise.heads[i].tolist(),
                        config, episodic)
            for n, actions in enumerate(candidates)
        ]  # fmt: skip
        values = [0.0 if math.isnan(value) else value for value in values]
        order = sorted(range(len(values)), key=lambda n: -values[n])[: config.num_elites]
        elites = th.stack([candidates[n] for n in order])  # [elites, H, A]
        best = th.tensor([values[n] for n in order])
        weights = th.exp(config.temperature * (best - best.max()))
        weights = weights / weights.sum()
        mean = th.einsum("e,eha->ha", weights, elites)
        variance = th.einsum("e,eha->ha", weights, (elites - mean) ** 2)
        std = variance.sqrt().clamp(config.min_std, config.max_std)
    chosen = int((weights.log() + noise.gumbel[0]).argmax())
    action = elites[chosen, 0]
    if explore:
        action = action + std[0] * noise.exploration[0]
    return action.clamp(-1, 1), mean, std, float((weights * best).sum())


@pytest.mark.parametrize(
    ("horizon", "episodic", "explore", "num_pi_trajs"),
    [(3, False, False, 4), (3, True, True, 4), (1, True, False, 4), (5, False, True, 0)],
)
def test_plans_are_those_of_the_plain_loop(
    roughen, plain_model, horizon, episodic, explore, num_pi_trajs
):
    model = make_model(roughen, episodic)
    config = PlannerConfig(horizon, 24, 6, num_pi_trajs, 3, 0.5, 0.05, 2.0, 0.9)
    num_envs = 2
    noise = sample_plan_noise(model, config, num_envs, generator(1))
    latents = model.encode(th.randn(num_envs, OBS_DIM, generator=generator(2))).detach()
    initial = (th.rand(num_envs, horizon, ACTION_DIM, generator=generator(3)) - 0.5).detach()
    result = plan(model, latents, initial, noise, config, explore)
    plain = plain_model({k: v.detach() for k, v in model.state_dict().items()})
    close = {"rtol": 0, "atol": 1e-5}
    for env in range(num_envs):
        action, mean, std, value = plain_plan(
            plain, latents[env], initial[env], of_env(noise, env), config, explore, episodic
        )
        th.testing.assert_close(result.action[env], action, **close)
        th.testing.assert_close(result.mean[env], mean, **close)
        th.testing.assert_close(result.std[env], std, **close)
        assert result.value[env].item() == pytest.approx(value, abs=1e-4)


def assert_planned_as_by_torch(model, config, num_envs, of_simplices=True):
    """That kernels plan as torch does in double precision, to which it turns the model.

    :param of_simplices: whether they plan from what the encoder may return
    """
    if not usable_product(MIN_ROWS, 16):
        pytest.skip("no products by kernels here: torch alone plans, which the other tests cover")
    noise = sample_plan_noise(model, config, num_envs, generator(1), shared=num_envs > 1)
    # Gumbel noise goes by rank, which rounding changes for two elites of nearly the same value.
    noise = noise._replace(gumbel=th.zeros_like(noise.gumbel))
    latents = model.encode(th.randn(num_envs, OBS_DIM, generator=generator(2))).detach()
    if not of_simplices:
        latents = latents + 0.1
    initial = th.rand(num_envs, config.horizon, ACTION_DIM, generator=generator(3)) - 0.5
    networks = planning_networks(model, count_simplices(latents))
    assert networks is not None
    known = model.architecture.latent_dim // SIMPLEX if of_simplices else 0
    networks_of_latents = [networks.reward, networks.policy, networks.q]
    networks_of_latents += [networks.termination] if model.episodic else []
    is_network = isinstance(model.dynamics, MLPDynamics)
    networks_of_latents += [networks.dynamics if is_network else [networks.dynamics.features]]
    assert [each[0].simplices for each in networks_of_latents] == [known] * len(networks_of_latents)
    fast = plan(model, latents, initial, noise, config, True)
    exact_noise = PlanNoise(*(x.double() if x is not None else None for x in noise))
    exact_noise = exact_noise._replace(heads=noise.heads)
    exact = plan(model.double(), latents.double(), initial.double(), exact_noise, config, True)
    for name, value in fast._asdict().items():
        th.testing.assert_close(value.double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("num_pi_trajs", [0, 30])
@pytest.mark.parametrize("episodic", [False, True])
@pytest.mark.parametrize("dynamics", ["mlp", "ssm", "time-invariant ssm"])
def test_kernels_plan_as_torch_does_in_double_precision(
    roughen, threads, dynamics, episodic, num_pi_trajs, num_envs
):
    model = make_model(roughen, episodic, dynamics)
    config = CONFIG._replace(num_samples=150, num_pi_trajs=num_pi_trajs)
    assert_planned_as_by_torch(model, config, num_envs)


@pytest.mark.parametrize("dynamics", ["mlp", "ssm"])
def test_kernels_plan_from_any_latent(roughen, dynamics):
    model = make_model(roughen, True, dynamics)
    config = CONFIG._replace(num_samples=150, num_pi_trajs=30)
    assert_planned_as_by_torch(model, config, 2, of_simplices=False)


def test_latents_may_lie_apart(roughen):
    model = make_model(roughen)
    noise = sample_plan_noise(model, CONFIG, 2, generator(1))
    latents = model.encode(th.randn(2, OBS_DIM, generator=generator(2))).detach()
    initial = th.zeros(2, CONFIG.horizon, ACTION_DIM)
    apart = latents.t().contiguous().t()
    assert not apart.is_contiguous()
    plans = [plan(model, each, initial, noise, CONFIG, True) for each in (latents, apart)]
    # torch's products, where the kernels have none, round by where numbers lie.
    tolerance = 0.0 if usable_product(MIN_ROWS, 16) else 1e-4
    th.testing.assert_close(plans[0].mean, plans[1].mean, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize(
    ("horizon", "num_samples", "num_elites", "num_pi_trajs"),
    [(1, 1, 1, 0), (3, 150, 1, 30), (3, 150, 2, 149), (2, 150, 149, 3), (4, 150, 150, 3)],
)
def test_kernels_choose_any_number_of_elites(
    roughen, horizon, num_samples, num_elites, num_pi_trajs
):
    config = PlannerConfig(horizon, num_samples, num_elites, num_pi_trajs, 2, 0.5, 0.05, 2.0, 0.9)
    assert_planned_as_by_torch(make_model(roughen, True), config, 2)


def kernel_plan(model, config, num_envs, shared=False):
    """A plan by the kernels and its random numbers."""
    if not usable_product(MIN_ROWS, 16):
        pytest.skip("no products by kernels here: torch alone plans, which the other tests cover")
    noise = sample_plan_noise(model, config, num_envs, generator(1), shared)
    latents = model.encode(th.randn(num_envs, OBS_DIM, generator=generator(2))).detach()
    assert planning_networks(model, count_simplices(latents)) is not None
    initial = th.zeros(num_envs, config.horizon, ACTION_DIM)
    return plan(model, latents, initial, noise, config, True), noise


@pytest.mark.parametrize(
    ("bins", "worth"), [(200.0, FLOAT32.max), (-200.0, FLOAT32.min), (math.nan, 0.0)]
)
def test_kernels_choose_the_first_among_equals(roughen, bins, worth):
    model = make_model(roughen)
    model.bins.fill_(bins)  # every value is infinite, or not a number
    config = CONFIG._replace(num_pi_trajs=0, num_iterations=1, num_elites=1)
    alone, noise = kernel_plan(model, config, 3)
    first = (2.0 * noise.samples[0, :, :, 0]).clamp(-1, 1).transpose(0, 1)  # [E, H, A]
    assert th.equal(alone.mean, first)
    assert alone.value.tolist() == [worth] * 3
    several, noise = kernel_plan(model, config._replace(num_elites=5), 3)
    first = (2.0 * noise.samples[0, :, :, :5]).clamp(-1, 1)
    th.testing.assert_close(several.mean, first.mean(2).transpose(0, 1))
    spread = first.std(2, correction=0).clamp(0.05, 2.0).transpose(0, 1)
    th.testing.assert_close(several.std, spread)


@pytest.mark.parametrize("dynamics", ["mlp", "ssm"])
@pytest.mark.parametrize("num_envs", [1, 5])
def test_threads_and_shared_noise_do_not_change_a_bit(roughen, dynamics, num_envs):
    model = make_model(roughen, True, dynamics)
    config = CONFIG._replace(num_samples=700, num_pi_trajs=300)
    before = th.get_num_threads()
    plans = []
    try:
        for num_threads in (1, 2, 7):  # as many as have too little to do
            th.set_num_threads(num_threads)
            result, noise = kernel_plan(model, config, num_envs, shared=True)
            plans.append(result)
    finally:
        th.set_num_threads(before)
    own = PlanNoise(*(each if each is None else each.clone() for each in noise))
    latents = model.encode(th.randn(num_envs, OBS_DIM, generator=generator(2))).detach()
    plans.append(plan(model, latents, th.zeros(num_envs, 3, ACTION_DIM), own, config, True))
    for other in plans[1:]:
        for name, value in plans[0]._asdict().items():
            assert th.equal(value, getattr(other, name)), name


def test_what_the_kernels_do_not_plan_with(roughen):
    wide = WorldModel(SPACE, ACTION_DIM, Architecture(16, 12, 800, 2, 4))
    assert planning_networks(wide, 2) is None  # torch multiplies those faster
    hand_made = HandMade(lambda z, a: a[..., 0])  # has methods of its own
    assert planning_networks(hand_made, 2) is None
    own = make_model(roughen)
    own.dynamics = Adding(16, ACTION_DIM, 8)
    assert planning_networks(own, 2) is None

    class Bold(MLPDynamics):
        def step(self, state, action):
            return super().step(state, 2 * action)

    own.dynamics = Bold(16, ACTION_DIM, 8)
    assert planning_networks(own, 2) is None
    fed_back = {"autoregressive": True}
    ssm = WorldModel(SPACE, ACTION_DIM, Architecture(16, 12, 14, 2, 4), "ssm", fed_back)
    assert planning_networks(ssm, 2) is None


@pytest.mark.parametrize("dynamics", ["mlp", "ssm"])
@pytest.mark.parametrize("episodic", [False, True])
def test_a_batch_of_environments_is_each_alone(roughen, dynamics, episodic):
    model = make_model(roughen, episodic, dynamics)
    noise = sample_plan_noise(model, CONFIG, 3, generator(1))
    latents = model.encode(th.randn(3, OBS_DIM, generator=generator(2)))
    initial = th.rand(3, 3, ACTION_DIM, generator=generator(3)) - 0.5
    together = plan(model, latents, initial, noise, CONFIG, True)
    for env in range(3):
        rows = slice(env, env + 1)
        alone = plan(model, latents[rows], initial[rows], of_env(noise, env), CONFIG, True)
        for name, value in together._asdict().items():
            th.testing.assert_close(value[rows], getattr(alone, name), rtol=1e-4, atol=1e-5)


# -- models made by hand ------------------------------------------------------------------------


class Adding(LatentDynamics):
    """z' = z + a on the first entries: the latent is the sum of the actions."""

    def initial_state(self, latent):
        return (latent,)

    def step(self, state, action):
        pad = th.zeros(*action.shape[:-1], self.latent_dim - self.action_dim)
        latent = state[0] + th.cat([action, pad], -1)
        return latent, (latent,)


class HandMade(WorldModel):
    """Rewards and values are what the test says; ``ended`` is the termination's condition."""

    def __init__(self, reward, value=None, ended=None):
        super().__init__(SPACE, ACTION_DIM, Architecture(16, 12, 14, 2, 4), "mlp", None,
                         ended is not None)  # fmt: skip
        self.dynamics = Adding(16, ACTION_DIM, 8)
        self.reward_rule, self.value_rule, self.ended_rule = reward, value, ended

    def reward(self, z, a):
        z = z.expand(*a.shape[:-1], z.shape[-1])
        return self.reward_rule(z, a)

    def q_values(self, z, a, heads=None, dropped=None):
        value = th.zeros(z.shape[:-1]) if self.value_rule is None else self.value_rule(z)
        return value.expand(2, *value.shape)

    def termination_logit(self, z):
        return th.where(self.ended_rule(z), 5.0, -5.0)


def plan_by_hand(model, config=None, seed=0, initial=None, explore=False):
    config = config or PlannerConfig(3, 512, 32, 24, 8, 0.5, 0.05, 2.0, 0.99)
    noise = sample_plan_noise(model, config, 1, generator(seed))
    mean = th.zeros(1, config.horizon, ACTION_DIM) if initial is None else initial
    return plan(model, th.zeros(1, 16), mean, noise, config, explore)


@pytest.mark.parametrize(
    ("ended", "total", "discount"),
    [(None, 1.0 + 0.5 * 2.0 + 0.25 * 4.0, 0.125), (1, 1.0, 0.0), (2, 2.0, 0.0), (3, 3.0, 0.0)],
)
def test_rewards_are_summed_until_the_end(ended, total, discount):
    """Rewards are the actions, 1, 2 and 4; latents count the steps; that to the end counts."""
    rule = None if ended is None else lambda z: z[..., 0] >= ended
    model = HandMade(lambda z, a: a[..., 0], ended=rule)
    actions = th.tensor([1.0, 2.0, 4.0]).view(3, 1, 1, 1).expand(3, 1, 5, ACTION_DIM)
    latents = th.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1).expand(3, 1, 5, 16)
    found, rest = sum_rewards(model, th.zeros(1, 1, 16), actions, latents, 0.5)
    assert found.tolist() == [[total] * 5]
    assert th.as_tensor(rest).expand(1, 5).tolist() == [[discount] * 5]


def test_the_best_action_is_found():
    best = th.tensor([0.6, -0.3])
    model = HandMade(lambda z, a: -20.0 * (a - best).square().sum(-1))
    result = plan_by_hand(model)
    th.testing.assert_close(result.mean[0], best.expand(3, 2), atol=0.06, rtol=0)
    th.testing.assert_close(result.action[0], best, atol=0.15, rtol=0)
    assert result.value.item() > -0.5
    assert (result.std < 0.3).all()


def test_dynamics_are_planned_through():
    # Only the third latent counts: three equal steps, or any that add up to (1.5, -0.9).
    goal = th.tensor([1.5, -0.9])
    model = HandMade(
        lambda z, a: th.zeros(a.shape[:-1]),
        value=lambda z: -20.0 * (z[..., :2] - goal).square().sum(-1),
    )
    result = plan_by_hand(model)
    th.testing.assert_close(result.mean[0].sum(0), goal, atol=0.15, rtol=0)


def test_the_terminal_value_outweighs_a_small_reward():
    # Going up costs 0.1 a step; being up at the end is worth 1.
    cost = HandMade(lambda z, a: -0.1 * a[..., 0])
    worth = HandMade(lambda z, a: -0.1 * a[..., 0], value=lambda z: 1.0 * z[..., 0])
    config = PlannerConfig(3, 512, 32, 24, 8, 20.0, 0.05, 2.0, 0.99)
    assert plan_by_hand(cost, config).mean[0, :, 0].max() < -0.8
    assert plan_by_hand(worth, config).mean[0, :, 0].min() > 0.8


def test_an_ended_trajectory_earns_no_more():
    # Stepping beyond 0.5 ends the episode. The step that enters the end keeps its reward.
    def reward(z, a):
        return th.where(z[..., 0] > 0.5, 100.0, a[..., 0])

    model = HandMade(reward, value=lambda z: th.full(z.shape[:-1], 50.0),
                     ended=lambda z: z[..., 0] > 0.5)  # fmt: skip
    config = PlannerConfig(3, 512, 32, 24, 8, 20.0, 0.05, 2.0, 1.0)
    result = plan_by_hand(model, config)
    # Unmasked, going up would earn 100 a step; masked, staying alive for the value of 50 is best.
    assert result.value.item() == pytest.approx(50.5, abs=0.3)
    sums = result.mean[0, :, 0].cumsum(0)
    assert (sums < 0.55).all()
    unmasked = HandMade(reward, value=lambda z: th.full(z.shape[:-1], 50.0))
    assert plan_by_hand(unmasked, config).value.item() > 200


def test_the_step_that_ends_keeps_its_reward_and_an_end_stays_an_end():
    # Every trajectory ends at once, then seems alive again: only the first reward counts.
    model = HandMade(lambda z, a: th.ones(a.shape[:-1]), value=lambda z: th.full(z.shape[:-1], 9.0),
                     ended=lambda z: z[..., 2] == 0)  # fmt: skip

    class Twice(Adding):
        def step(self, state, action):
            latent, _ = super().step(state, action)
            latent = latent.clone()
            latent[..., 2] = state[0][..., 2] + 1  # 1, 2, 3
            return latent, (latent,)

    model.dynamics = Twice(16, ACTION_DIM, 8)
    model.ended_rule = lambda z: z[..., 2] == 1
    assert plan_by_hand(model).value.item() == pytest.approx(1.0)
    model.ended_rule = lambda z: z[..., 2] == 2
    assert plan_by_hand(model).value.item() == pytest.approx(1.0 + 0.99)
    model.ended_rule = lambda z: z[..., 2] == 3
    assert plan_by_hand(model).value.item() == pytest.approx(1.0 + 0.99 + 0.99**2)
    model.ended_rule = lambda z: z[..., 2] == 4
    everything = 1.0 + 0.99 + 0.99**2 + 0.99**3 * 9.0
    assert plan_by_hand(model).value.item() == pytest.approx(everything)


def test_nan_counts_as_zero():
    def reward(z, a):
        return th.where(a[..., 0] > 0.5, float("nan"), -1.0)

    result = plan_by_hand(HandMade(reward))
    # A sum with a NaN counts as 0, the others are negative: what is NaN is chosen.
    assert result.value.item() == 0.0
    assert all(value.isfinite().all() for value in result)
    worse = plan_by_hand(HandMade(lambda z, a: th.where(a[..., 0] > 0.5, float("nan"), 1.0)))
    assert worse.mean[0, :, 0].max() < 0.5
    nothing = plan_by_hand(HandMade(lambda z, a: th.full(a.shape[:-1], float("nan"))))
    assert all(value.isfinite().all() for value in nothing)


def test_a_broken_network_makes_no_broken_plan(roughen):
    model = make_model(roughen)
    with th.no_grad():
        model.reward_net[-1].bias.fill_(float("nan"))
    noise = sample_plan_noise(model, CONFIG, 1, generator(1))
    result = plan(model, th.ones(1, 16), th.zeros(1, 3, ACTION_DIM), noise, CONFIG, True)
    assert result.value.item() == 0.0
    assert all(value.isfinite().all() for value in result)


def test_exploration_adds_the_plans_own_spread():
    best = th.tensor([0.2, -0.3])
    model = HandMade(lambda z, a: -5.0 * (a - best).square().sum(-1))
    config = PlannerConfig(2, 64, 16, 0, 3, 0.5, 0.05, 2.0, 0.99)
    noise = sample_plan_noise(model, config, 1, generator(4))
    noise = noise._replace(exploration=0.1 * noise.exploration)
    start = (th.zeros(1, 16), th.zeros(1, 2, ACTION_DIM))
    still = plan(model, *start, noise, config, False)
    moved = plan(model, *start, noise, config, True)
    expected = (still.action + still.std[:, 0] * noise.exploration).clamp(-1, 1)
    th.testing.assert_close(moved.action, expected)
    assert th.equal(moved.mean, still.mean)  # the warm start is without it
    wild = plan(model, *start, noise._replace(exploration=th.full((1, 2), 1e3)), config, True)
    assert th.equal(wild.action, th.ones(1, 2))


def test_elites_are_chosen_by_their_weights():
    # One iteration over three known sequences: values 0, 1, 2 give weights e^0, e^0.5, e^1.
    config = PlannerConfig(1, 3, 3, 0, 1, 0.5, 0.05, 2.0, 0.99)
    model = HandMade(lambda z, a: 10.0 * a[..., 0] + 5.0)
    num_envs = 20000
    noise = sample_plan_noise(model, config, num_envs, generator(5))
    fixed = th.tensor([-0.25, -0.2, -0.15]).view(1, 1, 1, 3, 1).expand(1, 1, num_envs, 3, 2)
    latent, initial = th.zeros(num_envs, 16), th.zeros(num_envs, 1, ACTION_DIM)
    actions = plan(model, latent, initial, noise._replace(samples=fixed), config, False).action
    weights = np.exp(0.5 * 10.0 * 2.0 * np.array([-0.25, -0.2, -0.15]))
    weights /= weights.sum()
    for sample, weight in zip((-0.5, -0.4, -0.3), weights, strict=True):
        share = (actions[:, 0] - sample).abs() < 1e-5
        assert share.float().mean().item() == pytest.approx(weight, abs=0.015)


def test_statistics_by_hand():
    config = PlannerConfig(1, 3, 2, 0, 1, 0.5, 0.05, 2.0, 0.99)
    model = HandMade(lambda z, a: 10.0 * a[..., 0])
    noise = sample_plan_noise(model, config, 1, generator())
    fixed = th.tensor([-0.4, 0.1, 0.0]).view(1, 1, 1, 3, 1).expand(1, 1, 1, 3, 2)  # times std 2
    noise = noise._replace(samples=fixed)
    initial = th.full((1, 1, 2), 0.1)
    result = plan(model, th.zeros(1, 16), initial, noise, config, False)
    # Actions -0.7, 0.3, 0.1; the elites' values 3 and 1, scores 1 and e^-1.
    low = math.exp(-1.0) / (1 + math.exp(-1.0))
    high = 1.0 - low
    mean = 0.3 * high + 0.1 * low
    std = math.sqrt(high * (0.3 - mean) ** 2 + low * (0.1 - mean) ** 2)
    assert result.mean[0, 0, 0].item() == pytest.approx(mean, abs=1e-6)
    assert result.std[0, 0, 0].item() == pytest.approx(max(std, 0.05), abs=1e-6)
    assert result.value.item() == pytest.approx(3 * high + 1 * low, abs=1e-5)
    assert result.elite_std.item() == pytest.approx(1.0, abs=1e-6)
    assert result.effective_samples.item() == pytest.approx(1 / (high**2 + low**2), rel=1e-5)
    assert result.mean_change.item() == pytest.approx((mean - 0.1) ** 2, abs=1e-6)


def test_std_stays_within_its_bounds():
    config = PlannerConfig(3, 64, 1, 0, 3, 0.5, 0.3, 0.7, 0.99)  # one elite: no spread of its own
    model = HandMade(lambda z, a: -a.square().sum(-1))
    assert th.equal(plan_by_hand(model, config).std, th.full((1, 3, 2), 0.3))


# -- the warm start, noise and settings ---------------------------------------------------------


def test_warm_start_is_the_previous_plan_shifted_by_one_step():
    previous = th.arange(12.0).view(2, 3, 2)
    shifted = shift_plan(previous, th.tensor([False, True]))
    assert shifted[0].tolist() == [[2.0, 3.0], [4.0, 5.0], [0.0, 0.0]]
    assert not shifted[1].any()
    assert th.equal(previous, th.arange(12.0).view(2, 3, 2))  # the argument is left alone


def test_a_warm_start_matters():
    # With hardly any samples the plan stays near where it starts.
    model = HandMade(lambda z, a: th.zeros(a.shape[:-1]))
    config = PlannerConfig(3, 64, 64, 0, 1, 0.5, 0.05, 0.1, 0.99)
    warm = th.full((1, 3, 2), 0.5)
    assert plan_by_hand(model, config).mean.abs().max() < 0.1
    th.testing.assert_close(plan_by_hand(model, config, initial=warm).mean, warm, atol=0.1, rtol=0)


def test_shared_noise_makes_equal_environments_equal(roughen):
    model = make_model(roughen)
    one = sample_plan_noise(model, CONFIG, 1, generator(9), shared=True)
    many = sample_plan_noise(model, CONFIG, 4, generator(9), shared=True)
    for name, value in one._asdict().items():
        if name in ("heads", "offsets"):
            continue
        axis = {"policy": 1, "samples": 2, "terminal": 1}.get(name, 0)
        for env in range(4):
            row = getattr(many, name).select(axis, env)
            assert th.equal(row, value.select(axis, 0)), name
    apart = sample_plan_noise(model, CONFIG, 2, generator(9))
    assert not th.equal(apart.samples[:, :, 0], apart.samples[:, :, 1])


def test_gumbel_noise_has_the_gumbel_distribution(roughen):
    noise = sample_plan_noise(make_model(roughen), CONFIG, 5000, generator()).gumbel
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.03)
    assert noise.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "horizon is 0: it must be at least 1"),
        ({"num_iterations": 0}, "num_iterations is 0: give a whole number or 'auto'"),
        ({"num_samples": 64.5}, "num_samples is 64.5: it must be a whole number"),
        ({"num_pi_trajs": 4.5}, "num_pi_trajs is 4.5: it must be a whole number"),
        ({"num_elites": 65}, "num_elites is 65 but there are only 64 samples: lower num_elites"),
        ({"num_pi_trajs": 64}, "num_pi_trajs is 64: it must be at least 0 and below num_samples"),
        ({"num_pi_trajs": -1}, "num_pi_trajs is -1"),
        ({"min_std": 3.0}, "min_std is 3.0 and max_std 2.0: 0 < min_std <= max_std"),
        ({"min_std": 0.0}, "min_std is 0.0"),
        ({"temperature": 0.0}, "temperature is 0.0: it must be positive"),
    ],
)
def test_bad_settings(changes, message):
    check_planner(CONFIG)
    with pytest.raises(ValueError, match=message):
        check_planner(CONFIG._replace(**changes))
