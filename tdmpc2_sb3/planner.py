"""MPPI in latent space as functions: model, latent and previous plan in, new plan out.

Nothing is remembered between calls and nothing is drawn inside: the previous plan and the random
numbers are arguments. The leading axis is the environment, so any number is planned at once.

Shapes: E environments, I iterations, H horizon, N samples, P policy trajectories, S = N - P
Gaussian samples, A action, Z latent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch as th

from tdmpc2_sb3.model.operations import TERMINATION_LOGIT, fixed_weights
from tdmpc2_sb3.model.world_model import WorldModel
from tdmpc2_sb3.settings import AUTOMATIC, SETTINGS, check_setting

DEFAULT_ITERATIONS = 6
EXTRA_ITERATIONS = 2  # where the action has at least
MANY_ACTIONS = 20  # dimensions
TERMINATION_THRESHOLD = 1.0 / (1.0 + math.exp(-TERMINATION_LOGIT))  # a probability


class PlannerConfig(NamedTuple):
    """Settings of MPPI; the defaults are the paper's (TD-MPC2, table 7)."""

    horizon: int = 3
    num_samples: int = 512
    num_elites: int = 64
    num_pi_trajs: int = 24
    num_iterations: int = DEFAULT_ITERATIONS
    temperature: float = 0.5
    min_std: float = 0.05
    max_std: float = 2.0
    gamma: float = 0.99


PAPER = PlannerConfig()


def automatic_iterations(num_iterations: Any, action_dim: int) -> Any:
    """Iterations of planning: what is given, or for "auto" what suits the action's dimensions."""
    if isinstance(num_iterations, str) and num_iterations == AUTOMATIC:
        return DEFAULT_ITERATIONS + EXTRA_ITERATIONS * (action_dim >= MANY_ACTIONS)
    return num_iterations


class PlanNoise(NamedTuple):
    """All random numbers of one plan."""

    policy: th.Tensor  # standard normal, [H, E, P, A]
    samples: th.Tensor  # standard normal, [I, H, E, S, A]
    terminal: th.Tensor  # standard normal, actions at z_H, [I, E, N, A]
    heads: th.Tensor  # Q heads, [I, 2]
    gumbel: th.Tensor  # standard Gumbel, choice of the elite, [E, elites]
    exploration: th.Tensor  # standard normal, [E, A]
    offsets: th.Tensor | None  # random shifts of images, [images, E, 2]


class Plan(NamedTuple):
    """Result of one plan."""

    action: th.Tensor  # in [-1, 1], [E, A]
    mean: th.Tensor  # final mean, the next step's warm start, [E, H, A]
    std: th.Tensor  # final standard deviation, [E, H, A]
    value: th.Tensor  # weighted mean of the elites' values, [E]
    elite_std: th.Tensor  # standard deviation of the elites' values, [E]
    effective_samples: th.Tensor  # 1 / sum of squared weights, [E]
    mean_change: th.Tensor  # squared change of the mean in the last iteration, [E]


def check_planner(config: PlannerConfig) -> PlannerConfig:
    """The settings, as Python's own numbers.

    :raises ValueError: naming the setting that is out of range and the remedy
    """
    known = [name for name in config._fields if name in SETTINGS]
    config = config._replace(**{name: check_setting(name, getattr(config, name)) for name in known})
    if config.num_elites > config.num_samples:
        raise ValueError(
            f"num_elites is {config.num_elites} but there are only {config.num_samples} samples: "
            "lower num_elites or raise num_samples."
        )
    if config.num_pi_trajs >= config.num_samples:
        raise ValueError(
            f"num_pi_trajs is {config.num_pi_trajs}: it must be at least 0 and below num_samples, "
            f"{config.num_samples}."
        )
    if config.min_std > config.max_std:
        raise ValueError(
            f"min_std is {config.min_std} and max_std {config.max_std}: "
            "0 < min_std <= max_std is needed."
        )
    return config


def fitted_plan(mean: th.Tensor, num_envs: int, horizon: int, action_dim: int) -> th.Tensor | None:
    """A plan's mean for another horizon: cut off, or 0 where it had not planned yet, [E, H, A].

    :param mean: of E environments' plans
    :param num_envs: E
    :param horizon: H
    :param action_dim: A
    :return: None if it is of other environments or actions
    """
    if mean.dim() != 3 or (mean.shape[0], mean.shape[2]) != (num_envs, action_dim):
        return None
    steps = min(horizon, mean.shape[1])
    fitted = mean.new_zeros(num_envs, horizon, action_dim)
    fitted[:, :steps] = mean[:, :steps]
    return fitted


def sample_plan_noise(
    model: WorldModel,
    config: PlannerConfig,
    num_envs: int,
    generator: th.Generator,
    shared: bool = False,
) -> PlanNoise:
    """Draws the random numbers of one plan on the generator's device.

    :param model: planned with
    :param config: settings
    :param num_envs: E
    :param generator: drawn from
    :param shared: whether every environment gets the same numbers, so that its action does not
        depend on how many are planned at once
    """
    device, rows = generator.device, 1 if shared else num_envs
    horizon, num_iterations, action_dim = config.horizon, config.num_iterations, model.action_dim
    num_gaussian = config.num_samples - config.num_pi_trajs

    def normal(*shape: int) -> th.Tensor:
        return th.randn(*shape, generator=generator, device=device, dtype=th.float32)

    chances = (rows, config.num_elites)
    uniform = th.rand(chances, generator=generator, device=device, dtype=th.float32)
    noise = PlanNoise(
        policy=normal(horizon, rows, config.num_pi_trajs, action_dim),
        samples=normal(num_iterations, horizon, rows, num_gaussian, action_dim),
        terminal=normal(num_iterations, rows, config.num_samples, action_dim),
        heads=model.sample_heads(generator, rows=num_iterations),
        gumbel=-th.log(-th.log(uniform.clamp(1e-20, 1.0 - 1e-7))),
        exploration=normal(rows, action_dim),
        offsets=model.encoder.sample_offsets(rows, generator),
    )
    if not shared or num_envs == 1:
        return noise
    return PlanNoise(
        policy=noise.policy.expand(-1, num_envs, -1, -1),
        samples=noise.samples.expand(-1, -1, num_envs, -1, -1),
        terminal=noise.terminal.expand(-1, num_envs, -1, -1),
        heads=noise.heads,
        gumbel=noise.gumbel.expand(num_envs, -1),
        exploration=noise.exploration.expand(num_envs, -1),
        offsets=None if noise.offsets is None else noise.offsets.expand(-1, num_envs, -1),
    )


def steady_noise(
    model: WorldModel, config: PlannerConfig, ages: Sequence[int], seed: int, device: th.device
) -> PlanNoise:
    """The random numbers of deterministic plans: functions of each plan's age alone.

    :param model: planned with
    :param config: settings
    :param ages: steps since each plan began, [E]
    :param seed: to which the ages are added
    :param device: of the numbers
    """
    different = sorted(set(ages))
    rows = [different.index(age) for age in ages]
    draws = []
    for age in different:
        generator = th.Generator(device).manual_seed(seed + age)
        shared_by = len(ages) if len(different) == 1 else 1
        draws.append(sample_plan_noise(model, config, shared_by, generator, shared=True))
    # All environments evaluate the same Q heads: the same for every age, so that an action
    # does not depend on the ages of the plans beside it.
    generator = th.Generator(device).manual_seed(seed)
    heads = model.sample_heads(generator, rows=config.num_iterations)
    if len(different) == 1:
        return draws[0]._replace(heads=heads)
    index = th.as_tensor(rows, device=device)

    def gather(parts: list[th.Tensor], axis: int) -> th.Tensor:
        return th.cat(parts, axis).index_select(axis, index)

    offsets = [draw.offsets for draw in draws if draw.offsets is not None]
    return PlanNoise(
        policy=gather([draw.policy for draw in draws], 1),
        samples=gather([draw.samples for draw in draws], 2),
        terminal=gather([draw.terminal for draw in draws], 1),
        heads=heads,
        gumbel=gather([draw.gumbel for draw in draws], 0),
        exploration=gather([draw.exploration for draw in draws], 0),
        offsets=gather(offsets, 1) if offsets else None,
    )


def shift_plan(previous_mean: th.Tensor, episode_start: th.Tensor) -> th.Tensor:
    """The previous plan moved by one step: a warm start; zero where an episode starts.

    :param previous_mean: [E, H, A]
    :param episode_start: [E], bool
    """
    shifted = th.zeros_like(previous_mean)
    shifted[:, :-1] = previous_mean[:, 1:]
    return shifted.masked_fill_(episode_start[:, None, None], 0.0)


class Elites(NamedTuple):
    """The best action sequences of an iteration, and what they make of the Gaussian."""

    values: th.Tensor  # the highest first, [E, elites]
    weights: th.Tensor  # [E, elites]
    actions: th.Tensor  # the first of each sequence, [E, elites, A]
    previous_mean: th.Tensor  # of the Gaussian before, [H, E, A]
    mean: th.Tensor  # [H, E, A]
    std: th.Tensor  # [H, E, A]


class _Trajectories(NamedTuple):
    """Action sequences with the part of their value that needs no further randomness."""

    actions: th.Tensor  # [H, E, N, A]
    rewards: th.Tensor  # discounted sum of predicted rewards, [E, N]
    last_latent: th.Tensor  # z_H, [E, N, Z]
    discount: th.Tensor | float  # of the terminal value; 0 where terminated, [E, N]


class _Search:
    """Evaluates action sequences of one plan, by any model on any device.

    :param model: planned with
    :param latent: z_0, [E, Z]
    :param config: settings
    :param policy_noise: of the policy prior's sequences, drawn once a plan and reused in every
        iteration, [H, E, P, A]
    """

    def __init__(
        self, model: WorldModel, latent: th.Tensor, config: PlannerConfig, policy_noise: th.Tensor
    ):
        self.model = model
        self.latent = latent.unsqueeze(1)  # [E, 1, Z]
        self.config = config
        self.start = model.dynamics.initial_state(self.latent)
        self.prior: _Trajectories | None = None
        if config.num_pi_trajs:
            self.prior = self._sum_rewards(*self._policy_rollout(policy_noise))

    def run(self, mean: th.Tensor, noise: PlanNoise) -> Elites:
        """The last iteration's elites.

        :param mean: of the first Gaussian, [H, E, A]
        :param noise: of the plan
        """
        std = th.full_like(mean, self.config.max_std)
        for iteration in range(self.config.num_iterations):
            samples, terminal = noise.samples[iteration], noise.terminal[iteration]
            elites = self._improve(mean, std, samples, terminal, noise.heads[iteration])
            mean, std = elites.mean, elites.std
        return elites

    def _improve(
        self,
        mean: th.Tensor,
        std: th.Tensor,
        samples: th.Tensor,
        terminal_noise: th.Tensor,
        heads: th.Tensor,
    ) -> Elites:
        """
        :param mean: of the Gaussian, [H, E, A]
        :param std: its standard deviation, [H, E, A]
        :param samples: standard normal, [H, E, S, A]
        :param terminal_noise: of the actions at z_H, [E, N, A]
        :param heads: Q heads, [2]
        :return: the best of its samples and of the policy prior's sequences
        """
        config = self.config
        actions = th.addcmul(mean.unsqueeze(2), std.unsqueeze(2), samples).clamp_(-1.0, 1.0)
        latents = self.model.dynamics.rollout(self.start, actions)  # z_1..z_H [H, E, S, Z]
        trajectories = self._sum_rewards(actions, latents)
        if self.prior is not None:
            trajectories = _joined(self.prior, trajectories)
        terminal_values = self._terminal_values(trajectories.last_latent, terminal_noise, heads)
        values = trajectories.rewards + trajectories.discount * terminal_values
        # Not topk, which leaves open who is taken among equals: sequences that end the episode by
        # the same action, of which there are many at the bounds.
        ranked = values.nan_to_num(0.0).sort(dim=1, descending=True, stable=True)
        elite_values, indices = (each[:, : config.num_elites] for each in ranked)
        elite_actions = trajectories.actions.gather(
            2, indices[None, :, :, None].expand(config.horizon, -1, -1, self.model.action_dim)
        )  # [H, E, elites, A]
        scores = th.exp(config.temperature * (elite_values - elite_values[:, :1]))
        weights = scores / scores.sum(1, keepdim=True)  # [E, elites]
        shares = weights[None, :, :, None]  # [1, E, elites, 1]
        new_mean = (shares * elite_actions).sum(2)  # [H, E, A]
        variance = (shares * (elite_actions - new_mean.unsqueeze(2)).square()).sum(2)
        new_std = variance.sqrt().clamp(config.min_std, config.max_std)
        return Elites(elite_values, weights, elite_actions[0], mean, new_mean, new_std)

    def _policy_rollout(self, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """Rolls the policy prior out from z_0.

        :param noise: [H, E, P, A]
        :return: actions [H, E, P, A] and z_1..z_H [H, E, P, Z]
        """
        z, state = self.latent, self.start
        actions, latents = [], []
        for step_noise in noise:
            action = self.model.policy_action(z, step_noise)  # a ~ pi(z); z_0 broadcasts over P
            z, state = self.model.dynamics.step(state, action)
            actions.append(action)
            latents.append(z)
        return th.stack(actions), th.stack(latents)

    def _sum_rewards(self, actions: th.Tensor, latents: th.Tensor) -> _Trajectories:
        """
        :param actions: [H, E, N, A]
        :param latents: z_1..z_H under them, [H, E, N, Z]
        """
        gamma = self.config.gamma
        total, discount = sum_rewards(self.model, self.latent, actions, latents, gamma)
        return _Trajectories(actions, total, latents[-1], discount)

    def _terminal_values(
        self, last_latent: th.Tensor, noise: th.Tensor, heads: th.Tensor
    ) -> th.Tensor:
        """Mean of two Q heads at (z_H, a ~ pi(z_H)), [E, N]."""
        actions = self.model.policy_action(last_latent, noise)
        return self.model.q_values(last_latent, actions, heads).mean(0)


def sum_rewards(
    model: WorldModel, latent: th.Tensor, actions: th.Tensor, latents: th.Tensor, gamma: float
) -> tuple[th.Tensor, th.Tensor | float]:
    """Discounted sum of the rewards that a model predicts over a horizon, [E, N], and the discount
    of what follows: gamma^H, or 0 where an episode has ended, [E, N].

    :param model: that predicts
    :param latent: z_0, [E, 1, Z]
    :param actions: [H, E, N, A]
    :param latents: z_1..z_H under them, [H, E, N, Z]
    :param gamma: discount a step
    """
    horizon = len(actions)
    # z_0 is shared by all samples and broadcasts; the later steps are one batch.
    rewards = [model.reward(latent, actions[0])]
    if horizon > 1:
        rewards.extend(model.reward(latents[:-1], actions[1:]).unbind(0))
    total = rewards[0]
    if model.episodic:
        ended = model.termination_logit(latents).sigmoid() > TERMINATION_THRESHOLD  # [H, E, N]
        alive = 1.0 - ended.float().cumsum(0).clamp(max=1.0)
        for t in range(1, horizon):
            # The step that enters a terminal latent keeps its reward; later ones lose theirs.
            total = total + gamma**t * alive[t - 1] * rewards[t]
        return total, gamma**horizon * alive[-1]
    for t in range(1, horizon):
        total = total + gamma**t * rewards[t]
    return total, gamma**horizon


def _joined(first: _Trajectories, second: _Trajectories) -> _Trajectories:
    discount: th.Tensor | float = second.discount
    if isinstance(first.discount, th.Tensor) and isinstance(second.discount, th.Tensor):
        discount = th.cat([first.discount, second.discount], dim=1)
    return _Trajectories(
        th.cat([first.actions, second.actions], dim=2),
        th.cat([first.rewards, second.rewards], dim=1),
        th.cat([first.last_latent, second.last_latent], dim=1),
        discount,
    )


@th.no_grad()
@fixed_weights()
def plan(
    model: WorldModel,
    latent: th.Tensor,
    initial_mean: th.Tensor,
    noise: PlanNoise,
    config: PlannerConfig,
    explore: bool,
) -> Plan:
    """Model predictive path integral control (TD-MPC2, section 3.2; arXiv:1509.01149).

    :param model: planned with
    :param latent: z_0, [E, Z]
    :param initial_mean: of :func:`shift_plan`, zero for a cold start, [E, H, A]
    :param noise: of :func:`sample_plan_noise`
    :param config: settings
    :param explore: whether noise of the plan's own spread is added to the action
    """
    search = _Search(model, latent, config, noise.policy)
    return choose(search.run(initial_mean.transpose(0, 1), noise), noise, explore)


def choose(elites: Elites, noise: PlanNoise, explore: bool) -> Plan:
    """The plan of one elite, which is drawn by its weight.

    :param elites: of the last iteration
    :param noise: of the plan
    :param explore: see :func:`plan`
    """
    chosen = (elites.weights.log() + noise.gumbel).argmax(1)  # one elite by its weight
    action = elites.actions.take_along_dim(chosen[:, None, None], 1).squeeze(1)  # [E, A]
    if explore:
        action = action + elites.std[0] * noise.exploration
    return Plan(
        action=action.clamp(-1.0, 1.0),
        mean=elites.mean.transpose(0, 1).contiguous(),
        std=elites.std.transpose(0, 1).contiguous(),
        value=(elites.weights * elites.values).sum(1),
        elite_std=elites.values.std(1, correction=0),
        effective_samples=elites.weights.square().sum(1).reciprocal(),
        mean_change=(elites.mean - elites.previous_mean).square().mean((0, 2)),
    )
