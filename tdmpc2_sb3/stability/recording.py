"""Plays held-out episodes and records what the planner thought at every step.

Shapes: T steps, O observation, A action, H horizon, E environments (one here).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.preprocessing import is_image_space

from tdmpc2_sb3.planner import Plan
from tdmpc2_sb3.saving.attribute_checks import short
from tdmpc2_sb3.stability.agent import PlanningAgent
from tdmpc2_sb3.stability.simulation import Candidates, can_restore, try_candidates
from tdmpc2_sb3.tdmpc2 import TDMPC2


@dataclass(frozen=True)
class RecordingConfig:
    """What is recorded.

    :param episodes: number of episodes
    :param seed: of the first episode; the next ones count on
    :param max_steps: an episode is left after so many steps; None: at its end
    :param probe_every: steps between two probes (replanning, restored simulator)
    :param candidates: action sequences tried in the simulator at a probe
    """

    episodes: int = 10
    seed: int = 10_000
    max_steps: int | None = None
    probe_every: int = 25
    candidates: int = 64

    def __post_init__(self) -> None:
        for name in ("episodes", "probe_every", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}: it must be at least 1, or None.")


@dataclass
class Probe:
    """One state looked at more closely."""

    step: int
    replan: tuple[np.ndarray, np.ndarray]  # mean and std of a plan with other noise, [H, A]
    candidates: Candidates | None  # None: the simulator cannot be restored


@dataclass
class Episode:
    """One episode under the planner, in the order of its steps."""

    observations: list[Any] = field(default_factory=list)  # T + 1
    actions: list[np.ndarray] = field(default_factory=list)  # in [-1, 1], [A]
    rewards: list[float] = field(default_factory=list)
    plan_means: list[np.ndarray] = field(default_factory=list)  # mu_t [H, A]
    plan_stds: list[np.ndarray] = field(default_factory=list)  # [H, A]
    values: list[float] = field(default_factory=list)  # planned return
    elite_stds: list[float] = field(default_factory=list)
    effective_samples: list[float] = field(default_factory=list)
    mean_changes: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)  # milliseconds
    probes: list[Probe] = field(default_factory=list)
    terminated: bool = False

    def __len__(self) -> int:
        return len(self.rewards)

    def note(self, result: Plan, milliseconds: float) -> None:
        """Keep the figures of one plan."""
        self.plan_means.append(result.mean[0].cpu().numpy())
        self.plan_stds.append(result.std[0].cpu().numpy())
        self.values.append(float(result.value))
        self.elite_stds.append(float(result.elite_std))
        self.effective_samples.append(float(result.effective_samples))
        self.mean_changes.append(float(result.mean_change))
        self.latencies.append(milliseconds)


def record_episodes(agent: TDMPC2, env: gym.Env, config: RecordingConfig) -> Iterator[Episode]:
    """Plays the episodes one after another.

    :param agent: whose planner acts
    :param env: one environment; with ``get_state`` and ``set_state`` of its unwrapped form, plans
        are also tried in the simulator
    :raises RuntimeError: if the environment's spaces are not the agent's
    """
    if env.action_space != agent.action_space:
        raise RuntimeError(
            f"The environment's actions {short(env.action_space, 200)} are not the agent's "
            f"{short(agent.action_space, 200)}: give the environment that it was trained on."
        )
    for seed in range(config.seed, config.seed + config.episodes):
        yield _record_episode(PlanningAgent(agent, seed), env, config, seed)


def _record_episode(
    planner: PlanningAgent, env: gym.Env, config: RecordingConfig, seed: int
) -> Episode:
    episode = Episode()
    observation, _ = env.reset(seed=seed)
    episode.observations.append(observation)
    mean = planner.policy.zero_plan(1)
    start = th.ones(1, dtype=th.bool, device=mean.device)
    restorable = can_restore(env)
    ended = False
    while not ended and (config.max_steps is None or len(episode) < config.max_steps):
        step = len(episode)
        begin = time.perf_counter()
        result = planner.plan(observation, mean, start)
        action = result.action[0].cpu().numpy()  # waits for the device
        episode.note(result, 1e3 * (time.perf_counter() - begin))
        if step % config.probe_every == config.probe_every - 1:
            other = planner.plan(observation, mean, start)
            replan = other.mean[0].cpu().numpy(), other.std[0].cpu().numpy()
            tried = None
            if restorable:
                tried = try_candidates(planner, env, observation, result, config.candidates)
            episode.probes.append(Probe(step, replan, tried))
        observation, reward, terminated, truncated, _ = env.step(
            planner.policy.unscale(result.action)[0]
        )
        episode.observations.append(observation)
        episode.actions.append(action.reshape(-1))
        episode.rewards.append(float(reward))
        mean, start = result.mean, th.zeros_like(start)
        episode.terminated, ended = bool(terminated), bool(terminated or truncated)
    return episode


def is_vector(space: gym.Space) -> bool:
    """Whether observations are plain vectors, which a linear probe can be fitted to."""
    return isinstance(space, gym.spaces.Box) and not is_image_space(space)
