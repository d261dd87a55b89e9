"""The paper's dynamics: an MLP applied step after step."""

from __future__ import annotations

from collections.abc import Sequence

import torch as th

from tdmpc2_sb3.kernels import Layer
from tdmpc2_sb3.model import operations
from tdmpc2_sb3.model.dynamics.base import DynamicsState, LatentDynamics
from tdmpc2_sb3.model.layers import MLP, SimNorm


class MLPDynamics(LatentDynamics):
    """z' = SimNorm(LN(W h(z, a))) with two hidden normed Mish layers (TD-MPC2, section 3.1).

    Its state is the latent itself.

    :param latent_dim: Z, size of a latent
    :param action_dim: A, size of an action
    :param mlp_dim: width of the two hidden layers
    :param simnorm_dim: V, group size of the SimNorm at the output
    """

    def __init__(self, latent_dim: int, action_dim: int, mlp_dim: int, simnorm_dim: int = 8):
        super().__init__(latent_dim, action_dim, mlp_dim, simnorm_dim)
        self.net = MLP(
            latent_dim + action_dim, [mlp_dim, mlp_dim], latent_dim, SimNorm(simnorm_dim)
        )

    def initial_state(self, latent: th.Tensor) -> DynamicsState:
        return (latent,)

    def step(self, state: DynamicsState, action: th.Tensor) -> tuple[th.Tensor, DynamicsState]:
        latent = self.net.forward_pair(state[0], action)  # z' = d(z, a)
        return latent, (latent,)

    def rollout(self, state: DynamicsState, actions: th.Tensor) -> th.Tensor:
        """See :meth:`LatentDynamics.rollout`."""

        def plain() -> th.Tensor:
            return super(MLPDynamics, self).rollout(state, actions)

        return operations.rollout(plain, self.as_kernel, state[0], actions)

    def as_kernel(self) -> Sequence[Layer] | None:
        """See :meth:`LatentDynamics.as_kernel`; a subclass may compute something else."""
        is_known = type(self) is MLPDynamics and type(self.net) is MLP
        return self.net.as_kernel() if is_known else None
