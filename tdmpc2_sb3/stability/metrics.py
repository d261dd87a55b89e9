"""The seven measures of planning stability, for one agent's episodes; pure functions of arrays.

Shapes: T steps, K lags, O observation, A action, H horizon, Z latent, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th

from tdmpc2_sb3.stability.agent import PlanningAgent
from tdmpc2_sb3.stability.recording import Episode
from tdmpc2_sb3.stability.simulation import state_values

MAX_LAG = 20  # K
RIDGE = 1e-3  # penalty relative to the mean variance of a latent entry
ENCODING_ROWS = 4096  # observations encoded at once

Scalars = dict[str, float]
Curves = dict[str, np.ndarray]


# -- 1: open-loop prediction -------------------------------------------------------------------


class LinearProbe(NamedTuple):
    """Observations read from latents by ridge regression: a space common to all models."""

    weight: np.ndarray  # [Z + 1, O]
    offset: np.ndarray  # mean observation, [O]
    scale: np.ndarray  # standard deviation, 1 where constant, [O]

    def error(self, latents: np.ndarray, observations: np.ndarray) -> np.ndarray:
        """Mean squared error in standard deviations, over the entries, [...]."""
        target = (observations - self.offset) / self.scale
        prediction = latents @ self.weight[:-1] + self.weight[-1]
        return np.square(prediction - target).mean(-1)


def fit_probe(latents: np.ndarray, observations: np.ndarray, ridge: float = RIDGE) -> LinearProbe:
    """Ridge regression of standardised observations [N, O] on latents [N, Z]."""
    offset, scale = observations.mean(0), observations.std(0)
    scale = np.where(scale > 1e-8, scale, 1.0)
    centre = latents.mean(0)
    x = (latents - centre).astype(np.float64)
    gram = x.T @ x
    penalty = ridge * np.trace(gram) / len(gram) + 1e-12
    slope = np.linalg.solve(
        gram + penalty * np.eye(len(gram)), x.T @ ((observations - offset) / scale)
    )
    return LinearProbe(np.vstack([slope, -centre @ slope]), offset, scale)


class Rollouts(NamedTuple):
    """Open-loop predictions along one episode under its own actions."""

    latents: np.ndarray  # z_t = encode(o_t), [T + 1, Z]
    predicted: np.ndarray  # z_hat_{t+k} from z_t, [K, W, Z]
    reward_error: np.ndarray  # |r_hat - r| at (z_hat_{t+k}, a_{t+k}), k = 0..K-1, [K]


@th.no_grad()
def open_loop(planner: PlanningAgent, episode: Episode, max_lag: int = MAX_LAG) -> Rollouts:
    """Predicts every window of ``max_lag`` steps from its first observation alone."""
    observations = stack_observations(episode.observations)
    latents = encode_all(planner, observations, len(episode) + 1)
    count = len(episode) - max_lag + 1  # W
    if count < 1:
        raise ValueError(
            f"An episode has {len(episode)} steps: predictions over {max_lag} steps need longer "
            "ones; lower the lag or record longer episodes."
        )
    device = latents.device
    actions = th.as_tensor(np.array(episode.actions, dtype=np.float32), device=device)
    windows = th.arange(max_lag, device=device)[:, None] + th.arange(count, device=device)
    sequences = actions[windows]  # [K, W, A]
    dynamics = planner.model.dynamics
    predicted = dynamics.rollout(dynamics.initial_state(latents[:count]), sequences)
    before = th.cat([latents[None, :count], predicted[:-1]])
    rewards = th.as_tensor(np.array(episode.rewards, dtype=np.float32), device=device)[windows]
    error = (planner.model.reward(before, sequences) - rewards).abs().mean(1)
    return Rollouts(latents.cpu().numpy(), predicted.cpu().numpy(), error.cpu().numpy())


def latent_error(rollouts: Rollouts, variance: float) -> np.ndarray:
    """E_k = E|z_hat_{t+k} - z_{t+k}|^2 / Var(z), [K].

    :param variance: of the latents over all episodes, summed over the entries
    """
    lags, count, _ = rollouts.predicted.shape
    truth = rollouts.latents[np.arange(1, lags + 1)[:, None] + np.arange(count)]
    return np.square(rollouts.predicted - truth).sum(-1).mean(1) / variance


def probe_error(rollouts: Rollouts, observations: np.ndarray, probe: LinearProbe) -> np.ndarray:
    """Error of the observation read from z_hat_{t+k}, in standard deviations squared, [K]."""
    lags, count, _ = rollouts.predicted.shape
    truth = observations[np.arange(1, lags + 1)[:, None] + np.arange(count)]
    return probe.error(rollouts.predicted, truth).mean(1)


def growth_rate(errors: np.ndarray) -> float:
    """Slope of log E_k against k by least squares: how fast an error grows a step."""
    lags = np.arange(1, len(errors) + 1)
    return float(np.polyfit(lags, np.log(np.maximum(errors, 1e-12)), 1)[0])


# -- 2, 3, 6, 7: the plans themselves ----------------------------------------------------------


def gaussian_kl(
    mean: np.ndarray, std: np.ndarray, other_mean: np.ndarray, other_std: np.ndarray
) -> np.ndarray:
    """KL(N(mean, std) || N(other_mean, other_std)) of each entry."""
    ratio = np.square(std / other_std)
    shift = np.square((mean - other_mean) / other_std)
    return 0.5 * (ratio + shift - 1.0 - np.log(ratio))


def plan_changes(episode: Episode) -> Scalars:
    """How far plans move from one step to the next, beside replanning with other noise.

    mu_{t+1}[j] against mu_t[j+1]; the floor compares two plans of one state, at the same j.
    """
    means, stds = np.array(episode.plan_means), np.array(episode.plan_stds)  # [T, H, A]
    if means.shape[0] < 2 or means.shape[1] < 2:
        return {}
    new, old = means[1:, :-1], means[:-1, 1:]
    result = {
        "plan_change": float(np.square(new - old).mean()),
        "plan_change_kl": float(gaussian_kl(new, stds[1:, :-1], old, stds[:-1, 1:]).mean()),
    }
    if episode.probes:
        steps = [probe.step for probe in episode.probes]
        other = np.array([probe.replan[0] for probe in episode.probes])[:, :-1]
        other_std = np.array([probe.replan[1] for probe in episode.probes])[:, :-1]
        first, first_std = means[steps, :-1], stds[steps, :-1]
        result["plan_change_floor"] = float(np.square(other - first).mean())
        kl = gaussian_kl(other, other_std, first, first_std)
        result["plan_change_kl_floor"] = float(kl.mean())
    return result


def elite_statistics(episode: Episode) -> Scalars:
    """Spread of the elites' values, effective sample size, and the last iteration's change."""
    values = np.maximum(np.abs(episode.values), 1e-6)
    return {
        "elite_spread": float(np.mean(np.array(episode.elite_stds) / values)),
        "effective_samples": float(np.mean(episode.effective_samples)),
        "mean_change": float(np.mean(episode.mean_changes)),
    }


def action_jerk(actions: np.ndarray) -> float:
    """E|a_{t+3} - 3 a_{t+2} + 3 a_{t+1} - a_t|^2 / A for actions [T, A]; NaN below 4 steps."""
    if len(actions) < 4:
        return float("nan")
    return float(np.square(np.diff(actions, n=3, axis=0)).mean())


# -- 4, 5: planned against realised ------------------------------------------------------------


def realised_returns(rewards: Sequence[float], gamma: float, tail: float) -> np.ndarray:
    """Discounted return from every step on, [T].

    :param tail: value of the state after the last reward: 0 if terminated
    """
    returns, following = np.empty(len(rewards)), tail
    for t in range(len(rewards) - 1, -1, -1):
        following = rewards[t] + gamma * following
        returns[t] = following
    return returns


def value_pairs(planner: PlanningAgent, episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """Planned and realised returns at the steps of the episode's first half.

    Where the time limit cut the episode, the agent's own value stands for the rest; in the first
    half of an episode it weighs little.
    """
    tail = 0.0
    if not episode.terminated:
        last = stack_observations(episode.observations[-1:])
        tail = float(state_values(planner, last)[0])
    realised = realised_returns(episode.rewards, planner.gamma, tail)
    half = max(1, len(episode) // 2)
    return np.array(episode.values[:half]), realised[:half]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation, ties at their mean rank; NaN if either is constant."""
    ranks = [_ranks(values) for values in (x, y)]
    centred = [rank - rank.mean() for rank in ranks]
    norm = np.sqrt(np.square(centred[0]).sum() * np.square(centred[1]).sum())
    return float("nan") if norm == 0 else float((centred[0] * centred[1]).sum() / norm)


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - 0.5 * (counts - 1))[inverse.reshape(-1)]


def realisation_gap(episode: Episode) -> Scalars:
    """Planned minus simulated reward of the plan, and rank correlations over the candidates."""
    tried = [probe.candidates for probe in episode.probes if probe.candidates is not None]
    if not tried:
        return {}
    gaps = np.array([c.planned_rewards[0] - c.simulated_rewards[0] for c in tried])
    return {
        "realisation_gap": float(gaps.mean()),
        "realisation_gap_abs": float(np.abs(gaps).mean()),
        "rank_correlation": _mean_spearman(
            [(c.planned_values[1:], c.simulated_values[1:]) for c in tried]
        ),
        "rank_correlation_rewards": _mean_spearman(
            [(c.planned_rewards[1:], c.simulated_rewards[1:]) for c in tried]
        ),
    }


def _mean_spearman(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    values = np.array([spearman(x, y) for x, y in pairs])
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


# -- helpers -----------------------------------------------------------------------------------


def stack_observations(observations: Sequence[Any]) -> Any:
    """A batch of observations, entry by entry where they are dictionaries."""
    if isinstance(observations[0], dict):
        return {key: np.stack([o[key] for o in observations]) for key in observations[0]}
    return np.stack(observations)


def encode_all(planner: PlanningAgent, observations: Any, count: int) -> th.Tensor:
    """Latents of many observations, [count, Z], in bounded portions."""
    portions = []
    for begin in range(0, count, ENCODING_ROWS):
        rows = slice(begin, begin + ENCODING_ROWS)
        part = (
            {key: value[rows] for key, value in observations.items()}
            if isinstance(observations, dict)
            else observations[rows]
        )
        portions.append(planner.encode(part))
    return th.cat(portions)
