"""Plans against the simulator: its state is restored, and the planned actions are executed.

Shapes: N candidates, H horizon, A action, Z latent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th

from tdmpc2_sb3.planner import Plan, sum_rewards
from tdmpc2_sb3.stability.agent import PlanningAgent

# Candidates spread over what the planner weighs, not only over the narrow rest of its last
# iteration, where all plans are nearly one.
CANDIDATE_STD = 0.5


class Candidates(NamedTuple):
    """Action sequences from one state, the plan's mean first; returns over the plan's horizon.

    Rewards are discounted sums over H steps. Values add the discounted value of the last state,
    from the predicted latent when planned and from the true observation when simulated.
    """

    planned_rewards: np.ndarray  # [1 + N]
    simulated_rewards: np.ndarray  # [1 + N]
    planned_values: np.ndarray  # [1 + N]
    simulated_values: np.ndarray  # [1 + N]


def can_restore(env: gym.Env) -> bool:
    """Whether the simulator's state can be read and set."""
    base = env.unwrapped
    return callable(getattr(base, "get_state", None)) and callable(getattr(base, "set_state", None))


@th.no_grad()
def try_candidates(
    planner: PlanningAgent, env: gym.Env, observation: Any, plan: Plan, num_candidates: int
) -> Candidates:
    """Values action sequences by the model and by the simulator.

    The simulator is left as it was.

    :param planner: the agent's
    :param env: at the state to start from
    :param observation: of that state
    :param plan: made there; its mean is the first candidate
    :param num_candidates: N further ones, drawn around the mean
    """
    mean, std = plan.mean[0], plan.std[0].clamp_min(CANDIDATE_STD)  # [H, A]
    shape = num_candidates, *mean.shape
    generator = planner.generator
    noise = th.randn(shape, generator=generator, device=mean.device, dtype=mean.dtype)
    sequences = th.cat([mean[None], mean + std * noise]).clamp(-1.0, 1.0)  # [1 + N, H, A]
    rewards, values = predicted_returns(planner, planner.encode(observation), sequences)
    simulated, last, alive = simulate(planner, env, sequences)
    gamma = planner.gamma ** sequences.shape[1]
    tail = gamma * alive * _state_values(planner, planner.encode(last)).cpu().numpy()
    return Candidates(rewards, simulated, values, simulated + tail)


@th.no_grad()
def predicted_returns(
    planner: PlanningAgent, latent: th.Tensor, sequences: th.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Discounted rewards over the horizon, without and with the last latent's value, [N].

    :param latent: z_0, [1, Z]
    :param sequences: [N, H, A]
    """
    model, gamma = planner.model, planner.gamma
    actions = sequences.transpose(0, 1).unsqueeze(1)  # [H, 1, N, A]
    start = latent.unsqueeze(1)  # [1, 1, Z]
    latents = model.dynamics.rollout(model.dynamics.initial_state(start), actions)  # [H, 1, N, Z]
    total, discount = sum_rewards(model, start, actions, latents, gamma)  # [1, N]
    values = total + discount * _state_values(planner, latents[-1])
    return total[0].cpu().numpy(), values[0].cpu().numpy()


def _state_values(planner: PlanningAgent, latents: th.Tensor) -> th.Tensor:
    """Mean of all Q heads at the policy prior's mean action, [...]."""
    model = planner.model
    return model.q_values(latents, model.policy_action(latents, None)).mean(0)


def state_values(planner: PlanningAgent, observations: Any) -> np.ndarray:
    """What the agent expects from states, [N]: mean of all Q heads, prior's mean action."""
    with th.no_grad():
        return _state_values(planner, planner.encode(observations)).cpu().numpy()


def simulate(
    planner: PlanningAgent, env: gym.Env, sequences: th.Tensor
) -> tuple[np.ndarray, Any, np.ndarray]:
    """Executes action sequences from the simulator's present state, and restores it.

    The unwrapped environment is stepped: its wrappers' counters stay out of it.

    :param sequences: in [-1, 1], [N, H, A]
    :return: discounted rewards [N], last observations [N, ...], whether still running [N]
    """
    base: Any = env.unwrapped
    state = base.get_state()
    gamma = planner.gamma
    totals, alive, last = np.zeros(len(sequences)), np.ones(len(sequences)), []
    for row, sequence in enumerate(sequences):
        base.set_state(state)
        for k, action in enumerate(planner.policy.unscale(sequence)):
            observation, reward, terminated, truncated, _ = base.step(action)
            totals[row] += gamma**k * float(reward)
            if terminated:
                alive[row] = 0.0
            if terminated or truncated:
                break
        last.append(observation)
    base.set_state(state)
    if isinstance(last[0], dict):
        return totals, {key: np.stack([o[key] for o in last]) for key in last[0]}, alive
    return totals, np.stack(last), alive
