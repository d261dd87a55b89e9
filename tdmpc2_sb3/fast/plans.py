"""Plans by the CPU kernels: their search alone, or all of a plan, captured and replayed.

See :mod:`tdmpc2_sb3.planner` for the algorithm and :mod:`tdmpc2_sb3.kernels.capture` for why.

Shapes: E environments, I iterations, H horizon, N samples, P policy trajectories, S = N - P
Gaussian samples, A action, Z latent.
"""

from __future__ import annotations

import torch as th

from tdmpc2_sb3 import kernels
from tdmpc2_sb3.fast.doorman import unknown_to_search
from tdmpc2_sb3.fast.module_parts import Parts
from tdmpc2_sb3.kernels.planning import SearchSettings
from tdmpc2_sb3.model.encoders import Observation
from tdmpc2_sb3.model.operations import fixed_weights
from tdmpc2_sb3.model.world_model import WorldModel
from tdmpc2_sb3.planner import (
    PAPER,
    Elites,
    Plan,
    PlannerConfig,
    PlanNoise,
    choose,
)
from tdmpc2_sb3.planner import plan as plain_plan


def planning_networks(
    model: WorldModel, simplices: int, config: PlannerConfig = PAPER
) -> kernels.PlanningNetworks | None:
    """The model as the CPU kernels plan with it; None if they cannot, by these settings.

    :param model: planned with
    :param simplices: of how many z_0 consists, see :func:`tdmpc2_sb3.kernels.on_simplices`
    :param config: settings
    """
    if unknown_to_search(model, config):
        return None
    dynamics, reward = model.dynamics.as_kernel(), model.reward_net.as_kernel()
    policy, q = model.policy_net.as_kernel(), model.q_ensemble.as_kernel()
    if dynamics is None or reward is None or policy is None or q is None:
        return None
    head = model.termination_net
    termination = None if head is None else head.as_kernel()
    networks = kernels.PlanningNetworks(dynamics, reward, policy, q, termination)
    networks = networks.from_simplices(simplices)
    return networks if kernels.usable_plan(networks) else None


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
    """:func:`tdmpc2_sb3.planner.plan`, whose search is one call of the kernels where they know
    every part and setting."""
    networks: kernels.PlanningNetworks | None = None
    if kernels.usable(latent):
        networks = planning_networks(model, kernels.count_simplices(latent), config)
    if networks is None:
        return plain_plan(model, latent, initial_mean, noise, config, explore)
    draws = kernels.Draws(noise.policy, noise.samples, noise.terminal, noise.heads)
    settings, mean = _search_settings(config), initial_mean.transpose(0, 1)
    found = kernels.search(networks, model.bins, latent, mean, draws, settings)
    return choose(Elites(*found), noise, explore)


def _search_settings(config: PlannerConfig) -> SearchSettings:
    return SearchSettings(*(getattr(config, name) for name in SearchSettings._fields))


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
        settings = _search_settings(config)
        elites = kernels.search(networks, bins, latent, initial_mean, draws, settings)
        return Plan(*kernels.choose_action(elites, gumbel, exploration))


def _shared(noise: th.Tensor, axis: int) -> th.Tensor:
    """The noise of one environment if all share it."""
    return noise.narrow(axis, 0, 1) if noise.stride(axis) == 0 else noise
