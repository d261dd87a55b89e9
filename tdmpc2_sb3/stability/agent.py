"""An agent as it acts when it is evaluated, with a random stream of its own."""

from __future__ import annotations

from typing import Any

import torch as th

from tdmpc2_sb3.planner import Plan
from tdmpc2_sb3.policies import TDMPC2Policy
from tdmpc2_sb3.tdmpc2 import TDMPC2


class PlanningAgent:
    """Plans on one environment by the policy's own way of planning, without exploration noise.

    :param agent: loaded
    :param seed: of its random stream
    """

    def __init__(self, agent: TDMPC2, seed: int):
        assert isinstance(agent.policy, TDMPC2Policy)
        self.policy = agent.policy
        self.model = self.policy.world_model
        self.generator = th.Generator(agent.device).manual_seed(seed)
        self.policy.set_training_mode(False)

    @property
    def gamma(self) -> float:
        """Discount a step of the agent's planner."""
        return self.policy.planner.gamma

    @th.no_grad()
    def encode(self, observation: Any) -> th.Tensor:
        """z of one observation or of a batch of them, [B, Z]."""
        tensor, _ = self.policy.obs_to_tensor(observation)
        return self.model.encode(tensor, self.model.encoder.sample_offsets(1, self.generator))

    def plan(self, observation: Any, previous_mean: th.Tensor, episode_start: th.Tensor) -> Plan:
        """A plan for one observation.

        :param observation: as the environment gave it
        :param previous_mean: the previous step's plan, [1, H, A]
        :param episode_start: whether that is void, [1], bool
        """
        tensor, _ = self.policy.obs_to_tensor(observation)
        return self.policy.plan(tensor, previous_mean, episode_start, self.generator, explore=False)
