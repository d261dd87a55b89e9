"""Which way a whole plan and a whole gradient step goes; policies and gradient steps ask here.

Where the CPU kernels may work and know every part and setting (:mod:`tdmpc2_sb3.fast.doorman`), a
plan is one captured call (:mod:`tdmpc2_sb3.fast.plans`) and gradients are taken by hand
(:mod:`tdmpc2_sb3.fast.gradients`). On CUDA both are recorded as graphs. Everything else goes one
operation after the other, each by what :mod:`tdmpc2_sb3.model.operations` chooses, or through
``torch.compile`` if that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch as th

from tdmpc2_sb3 import kernels
from tdmpc2_sb3.fast.cuda_graphs import Graphed, recorder_for
from tdmpc2_sb3.fast.doorman import unknown_to_gradients, unknown_to_search
from tdmpc2_sb3.fast.gradients import DirectGradients
from tdmpc2_sb3.fast.module_parts import Parts
from tdmpc2_sb3.fast.plans import DirectPlanning, plan
from tdmpc2_sb3.fast.torch_compile import Compiled
from tdmpc2_sb3.losses import LossConfig
from tdmpc2_sb3.model.encoders import Observation
from tdmpc2_sb3.model.operations import fixed_weights
from tdmpc2_sb3.model.torch_state import wrong_type
from tdmpc2_sb3.planner import Plan, PlannerConfig, PlanNoise, shift_plan

if TYPE_CHECKING:
    from tdmpc2_sb3.policies import TDMPC2Policy

Result = TypeVar("Result")


class Ways:
    """The ways of one policy, whose parts may be replaced at any time.

    :param policy: whose world model plans and learns
    :param compile: True compiles plans; False keeps them from being recorded, too
    """

    def __init__(self, policy: TDMPC2Policy, compile: bool | str):
        self._policy = policy
        self._compile = compile
        self._plan = Compiled(plan, compile)
        self._direct: DirectPlanning | None = None
        self._graphed: tuple[th.device, Graphed[Plan] | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles look up anew what is only kept to be fast."""
        return {**self.__dict__, "_direct": None, "_graphed": None}

    def by_kernels(self, *tensors: th.Tensor) -> bool:
        """Whether whole plans and steps may go by the CPU kernels, where the model is now."""
        return all(map(kernels.usable, (self._policy.world_model.bins, *tensors)))

    def declined(self, config: LossConfig, compile: bool | str) -> list[str]:
        """What keeps gradient steps and plans from the CPU kernels' faster ways, a line each.

        :param config: of the gradient steps
        :param compile: of the gradient steps, which True keeps from them without a word
        """
        if compile is True or not self.by_kernels():
            return []
        policy = self._policy
        ways = {
            "Gradient steps": unknown_to_gradients(policy.world_model, config),
            "Plans": unknown_to_search(policy.world_model, policy.planner),
        }
        return [
            f"{kind} go the plain way, which is slower: {', '.join(unknown)} is not known to the "
            "faster one."
            for kind, unknown in ways.items()
            if unknown
        ]

    # -- plans -----------------------------------------------------------------------------------

    @th.no_grad()
    @fixed_weights()  # from the encoder on: a latent is then the same alone and among others
    def plan(
        self,
        observation: Observation,
        previous_mean: th.Tensor,
        episode_start: th.Tensor,
        noise: PlanNoise,
        config: PlannerConfig,
        explore: bool,
    ) -> Plan:
        """See :func:`tdmpc2_sb3.planner.plan`.

        :param observation: of E environments
        :param previous_mean: the previous plans' means, [E, H, A]
        :param episode_start: where the previous plan is void, [E], bool
        :raises RuntimeError: naming a parameter of another type than float32
        """
        try:
            direct = self.direct_planning(config)
            if direct is not None:
                initial_mean = shift_plan(previous_mean, episode_start)
                return direct.plan(observation, initial_mean, noise, config, explore)
            by_torch = self._graphed_plans() or self._plan_by_torch
            return by_torch(observation, previous_mean, episode_start, noise, config, explore)
        except RuntimeError as error:
            wrong = wrong_type(self._policy)
            if wrong is None:
                raise
            raise RuntimeError(wrong) from error

    def direct_planning(self, config: PlannerConfig) -> DirectPlanning | None:
        """Plans by one captured call, if the kernels make such by these settings."""
        if self._compile is True or kernels.goes_by_torch() or not self.by_kernels():
            return None
        model = self._policy.world_model
        if self._direct is None or not self._direct.is_of(model):
            self._direct = DirectPlanning(model)
        return self._direct if self._direct.takes(config) else None

    def _graphed_plans(self) -> Graphed[Plan] | None:
        """Plans by CUDA graphs, if there are such where the policy is."""
        device = self._policy.device
        if self._graphed is None or self._graphed[0] != device:
            # Of the policy: another world model in place of this one is a part replaced.
            state = Parts(self._policy).tensors
            self._graphed = device, self.recorded(self._plan_by_torch, state, self._compile)
        return self._graphed[1]

    def _plan_by_torch(
        self,
        observation: Observation,
        previous_mean: th.Tensor,
        episode_start: th.Tensor,
        noise: PlanNoise,
        config: PlannerConfig,
        explore: bool,
    ) -> Plan:
        model = self._policy.world_model
        latent = model.encode(observation, noise.offsets)
        initial_mean = shift_plan(previous_mean, episode_start)
        return self._plan(model, latent, initial_mean, noise, config, explore)

    # -- gradient steps --------------------------------------------------------------------------

    def direct_gradients(self, config: LossConfig, compile: bool | str) -> DirectGradients | None:
        """Gradients by hand, of the parameters that are trained now, if these parts and settings
        are known; to be used where :meth:`by_kernels` agrees.

        :param config: coefficients of the losses
        :param compile: True compiles gradient steps instead
        """
        model = self._policy.world_model
        if compile is True or unknown_to_gradients(model, config):
            return None
        return DirectGradients(model, config)

    def recorded(
        self,
        function: Callable[..., Result],
        state: Callable[[], Sequence[th.Tensor]],
        compile: bool | str,
    ) -> Graphed[Result] | None:
        """The function as CUDA graphs, if there are such where the policy is.

        :param function: see :class:`Graphed`
        :param state: see :class:`Graphed`
        :param compile: False keeps it from being recorded
        """
        recorder = None if compile is False else recorder_for(self._policy.device)
        return None if recorder is None else Graphed(function, state, recorder)
