"""Brings agents, episodes and measures together, with intervals over episodes and seeds.

Agents of one label are seeds of one arm. Every agent plays its own episodes, for what concerns its
plans; but open-loop predictions of all agents are compared on the same, pooled episodes of all of
them, because an agent that visits easier states would look like a better predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import gymnasium as gym
import numpy as np

from tdmpc2_sb3.model.dynamics import DYNAMICS
from tdmpc2_sb3.policies import TDMPC2Policy
from tdmpc2_sb3.stability import metrics
from tdmpc2_sb3.stability.agent import PlanningAgent
from tdmpc2_sb3.stability.recording import (
    Episode,
    RecordingConfig,
    is_vector,
    record_episodes,
)
from tdmpc2_sb3.tdmpc2 import TDMPC2

BOOTSTRAP_DRAWS = 2000
CONFIDENCE = 0.95


@dataclass
class Subject:
    """One trained agent.

    :param arm: label shared by the agents that differ in their seed alone
    :param name: of this agent
    :param agent: loaded
    """

    arm: str
    name: str
    agent: TDMPC2
    episodes: list[Episode] = field(default_factory=list)


class Measurement(NamedTuple):
    """A figure, or a curve over k = first_k, first_k + 1, ..., of one agent on one episode."""

    arm: str
    name: str
    episode: int
    metric: str
    values: np.ndarray  # [1] or [K]
    first_k: int | None  # None for a single figure


class Estimate(NamedTuple):
    """Mean of an arm with the bounds of its 95% interval."""

    arm: str
    metric: str
    k: int | None
    mean: float
    low: float
    high: float
    agents: int
    episodes: int


class Study(NamedTuple):
    """What a study found."""

    measurements: list[Measurement]
    estimates: list[Estimate]
    pairs: dict[str, tuple[np.ndarray, np.ndarray]]  # arm -> planned, realised returns


def default_label(agent: TDMPC2) -> str:
    """The agent's kind of dynamics and horizon, such as ``ssm, H = 3``."""
    assert isinstance(agent.policy, TDMPC2Policy)
    dynamics = agent.policy.world_model.dynamics
    names = [name for name, kind in DYNAMICS.items() if type(dynamics) is kind]
    kind = names[0] if names else type(dynamics).__name__
    return f"{kind}, H = {agent.policy.planner.horizon}"


def run_study(
    subjects: Sequence[Subject],
    env: gym.Env,
    config: RecordingConfig,
    max_lag: int = metrics.MAX_LAG,
    progress: Callable[[str], None] = lambda message: None,
) -> Study:
    """Plays the episodes and measures all agents.

    :param subjects: agents of one task
    :param env: one environment, as the agents were trained on
    :param config: what is recorded
    :param max_lag: K, steps of the open-loop predictions
    :param progress: told what is going on
    :raises ValueError: if no episode is long enough
    """
    for subject in subjects:
        for episode in record_episodes(subject.agent, env, config):
            subject.episodes.append(episode)
            progress(
                f"{subject.name} ({subject.arm}): episode {len(subject.episodes)} of "
                f"{config.episodes}, return {sum(episode.rewards):.1f}, "
                f"{np.median(episode.latencies):.0f} ms a plan"
            )
    measurements = []
    for subject in subjects:
        progress(f"{subject.name} ({subject.arm}): measuring")
        measurements += _planning(subject)
    measurements += _predictions(subjects, env.observation_space, max_lag)
    pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for subject in subjects:
        planner = PlanningAgent(subject.agent, config.seed)
        found = [metrics.value_pairs(planner, episode) for episode in subject.episodes]
        found.append(pairs.get(subject.arm, (np.empty(0), np.empty(0))))
        pairs[subject.arm] = (
            np.concatenate([pair[0] for pair in found]),
            np.concatenate([pair[1] for pair in found]),
        )
    return Study(measurements, estimate(measurements), pairs)


def _planning(subject: Subject) -> list[Measurement]:
    """Measures 2 to 7, and the return, on the agent's own episodes."""
    planner = PlanningAgent(subject.agent, 0)
    found = []
    for index, episode in enumerate(subject.episodes):
        planned, realised = metrics.value_pairs(planner, episode)
        figures = {
            "return": float(np.sum(episode.rewards)),
            **metrics.plan_changes(episode),
            **metrics.elite_statistics(episode),
            "value_bias": float(np.mean(planned - realised)),
            **metrics.realisation_gap(episode),
            "action_jerk": metrics.action_jerk(np.array(episode.actions)),
            "latency_ms_median": float(np.median(episode.latencies)),
            "latency_ms_p95": float(np.percentile(episode.latencies, 95)),
        }
        found += [
            Measurement(subject.arm, subject.name, index, metric, np.array([value]), None)
            for metric, value in figures.items()
        ]
    return found


def _predictions(subjects: Sequence[Subject], space: gym.Space, max_lag: int) -> list[Measurement]:
    """Measure 1 of every agent, on the episodes of all agents."""
    pool = [e for subject in subjects for e in subject.episodes if len(e) >= max_lag]
    if not pool:
        raise ValueError(
            f"No episode has the {max_lag} steps that the open-loop predictions need: "
            "give a smaller --lag or longer episodes."
        )
    found = []
    for subject in subjects:
        planner = PlanningAgent(subject.agent, 0)
        rollouts = [metrics.open_loop(planner, episode, max_lag) for episode in pool]
        latents = np.concatenate([r.latents for r in rollouts])
        variance = float(latents.var(0).sum())
        probe_errors = _probe_errors(rollouts, pool) if is_vector(space) else None
        for index, rollout in enumerate(rollouts):
            error = metrics.latent_error(rollout, variance)
            curves = {"latent_error": (error, 1), "reward_error": (rollout.reward_error, 0)}
            if probe_errors is not None:
                curves["probe_error"] = (probe_errors[index], 1)
            if max_lag > 1:
                curves["latent_error_growth"] = (np.array([metrics.growth_rate(error)]), -1)
            found += [
                Measurement(subject.arm, subject.name, index, metric, values, k if k >= 0 else None)
                for metric, (values, k) in curves.items()
            ]
    return found


def _probe_errors(
    rollouts: Sequence[metrics.Rollouts], pool: Sequence[Episode]
) -> list[np.ndarray]:
    """Probe errors of each episode, by a probe fitted to the episodes of the other half."""
    observations = [
        np.stack([np.asarray(o, dtype=np.float64).reshape(-1) for o in episode.observations])
        for episode in pool
    ]
    everything = range(len(pool))
    probes = []
    for half in (0, 1):
        fitted = [i for i in everything if i % 2 != half] or list(everything)
        probes.append(
            metrics.fit_probe(
                np.concatenate([rollouts[i].latents for i in fitted]),
                np.concatenate([observations[i] for i in fitted]),
            )
        )
    return [metrics.probe_error(rollouts[i], observations[i], probes[i % 2]) for i in everything]


def estimate(measurements: Sequence[Measurement], draws: int = BOOTSTRAP_DRAWS) -> list[Estimate]:
    """Means with 95% intervals by a two-stage bootstrap: agents first, then their episodes."""
    groups: dict[tuple[str, str], dict[str, list[np.ndarray]]] = {}
    first_k: dict[str, int | None] = {}
    for m in measurements:
        groups.setdefault((m.arm, m.metric), {}).setdefault(m.name, []).append(m.values)
        first_k[m.metric] = m.first_k
    rows = []
    for (arm, metric), agents in groups.items():
        by_agent = [_finite(np.array(values)) for values in agents.values()]
        by_agent = [values for values in by_agent if len(values)]
        if not by_agent:
            continue
        mean, low, high = bootstrap_interval(by_agent, draws)
        start, episodes = first_k[metric], sum(len(values) for values in by_agent)
        for i in range(len(mean)):
            k = None if start is None else start + i
            bounds = float(mean[i]), float(low[i]), float(high[i])
            rows.append(Estimate(arm, metric, k, *bounds, len(by_agent), episodes))
    return rows


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values).all(axis=1)]


def bootstrap_interval(
    by_agent: Sequence[np.ndarray], draws: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of the agents' means with its 95% interval, each [K].

    :param by_agent: for every agent its episodes' values, [episodes, K]
    """
    rng = np.random.default_rng(seed)
    mean = np.mean([values.mean(0) for values in by_agent], axis=0)
    samples = np.empty((draws, len(mean)))
    for draw in range(draws):
        chosen = rng.integers(len(by_agent), size=len(by_agent))
        samples[draw] = np.mean(
            [
                by_agent[i][rng.integers(len(by_agent[i]), size=len(by_agent[i]))].mean(0)
                for i in chosen
            ],
            axis=0,
        )
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(samples, [tail, 100 - tail], axis=0)
    return mean, low, high
