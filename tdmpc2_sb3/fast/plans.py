"""Plans from vectors by the CPU kernels alone, which are captured once and then replayed.

See :mod:`tdmpc2_sb3.planner` for the algorithm and :mod:`tdmpc2_sb3.kernels.capture` for why.

Shapes: E environments, I iterations, H horizon, N samples, P policy trajectories, S = N - P
Gaussian samples, A action, Z latent.
"""

from __future__ import annotations

import torch as th

from tdmpc2_sb3 import kernels
from tdmpc2_sb3.fast.module_parts import Parts
from tdmpc2_sb3.model.encoders import Observation
from tdmpc2_sb3.model.world_model import WorldModel
from tdmpc2_sb3.planner import Plan, PlannerConfig, PlanNoise, planning_networks


class DirectPlanning:
    """Plans of one model, as long as its parts stay the same objects.

    :param model: planned with
    """

    def __init__(self, model: WorldModel):
        self._model = model
        self._parts = Parts(model)
        self._simplices = model.latent_simplices()
        self._encoder = model.encoder.as_kernel()
        self._captured = kernels.Captured(self._plan_from_rows, list(model.parameters()))
        self._asked: PlannerConfig | None = None
        self._takes = False

    def is_of(self, model: WorldModel) -> bool:
        """Whether the model is this one with the parts that it had."""
        return model is self._model and self._parts.are_the_same()

    def takes(self, config: PlannerConfig) -> bool:
        """Whether the kernels know every part and setting."""
        if config is not self._asked:
            self._asked = config
            networks = planning_networks(self._model, self._simplices, config)
            self._takes = self._encoder is not None and networks is not None
        return self._takes

    def plan(
        self,
        observation: Observation,
        initial_mean: th.Tensor,
        noise: PlanNoise,
        config: PlannerConfig,
        explore: bool,
    ) -> Plan:
        """See :func:`tdmpc2_sb3.planner.plan`, without gradients.

        :param observation: of E environments
        """
        result = self._captured(
            self._model.observation_rows(observation),
            initial_mean.transpose(0, 1),
            _shared(noise.policy, 1),
            _shared(noise.samples, 2),
            _shared(noise.terminal, 1),
            noise.heads,
            noise.gumbel,
            noise.exploration if explore else None,
            config,
            self._model.bins,
        )
        return Plan(*(each.clone() for each in result))

    def _plan_from_rows(
        self,
        rows: th.Tensor,
        initial_mean: th.Tensor,
        policy: th.Tensor,
        samples: th.Tensor,
        terminal: th.Tensor,
        heads: th.Tensor,
        gumbel: th.Tensor,
        exploration: th.Tensor | None,
        config: PlannerConfig,
        bins: th.Tensor,
    ) -> Plan:
        """
        :param rows: observations, [E, in]
        :param initial_mean: [H, E, A]
        :param policy: of :class:`PlanNoise` like all that follow; without the axis of environments
            being repeated where they share it
        """
        networks = planning_networks(self._model, self._simplices, config)
        assert self._encoder is not None
        assert networks is not None
        num_envs = len(rows)
        latent = kernels.evaluation(rows, self._encoder).forward(keep=False)[0]
        draws = kernels.Draws(
            policy.expand(-1, num_envs, -1, -1),
            samples.expand(-1, -1, num_envs, -1, -1),
            terminal.expand(-1, num_envs, -1, -1),
            heads,
        )
        elites = kernels.search(
            networks,
            bins,
            latent,
            initial_mean,
            draws,
            num_elites=config.num_elites,
            gamma=config.gamma,
            temperature=config.temperature,
            min_std=config.min_std,
            max_std=config.max_std,
        )
        return Plan(*kernels.choose_action(elites, gumbel, exploration))


def _shared(noise: th.Tensor, axis: int) -> th.Tensor:
    """The noise of one environment if all share it."""
    return noise.narrow(axis, 0, 1) if noise.stride(axis) == 0 else noise
