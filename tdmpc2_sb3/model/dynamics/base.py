"""What every latent dynamics can do: three verbs, so planner and losses need not know its kind.

Shapes: ``...`` batch axes (they broadcast against each other), H horizon, A action, Z latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch as th
from torch import nn

from tdmpc2_sb3.kernels import Layer, StateSpace

DynamicsState: TypeAlias = tuple[th.Tensor, ...]


class LatentDynamics(nn.Module, ABC):
    """Predicts the next latent from the present one and an action: z' = d(z, a).

    The batch axes of the state broadcast against those of the actions. A planner that evaluates N
    action sequences from one latent passes the latent as [E, 1, Z] and the actions as
    [H, E, N, A]; whatever depends on z_0 alone is then computed once, not N times.

    :param latent_dim: Z, size of a latent
    :param action_dim: A, size of an action
    :param mlp_dim: width of the hidden layers; other kinds match the MLP's parameter count by it
    :param simnorm_dim: V, group size of the SimNorm at the output
    """

    SLOW_LR_SCALE = 0.3  # learning rate of the slow parameters relative to this module's others
    lr_scale = 1.0  # learning rate of this module relative to the model's other parts

    def __init__(self, latent_dim: int, action_dim: int, mlp_dim: int, simnorm_dim: int = 8):
        super().__init__()
        self.latent_dim = latent_dim
        self.action_dim = action_dim
        self.mlp_dim = mlp_dim
        self.simnorm_dim = simnorm_dim

    def slow_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that learn at a smaller rate, e.g. eigenvalues; none by default."""
        yield from ()

    @abstractmethod
    def initial_state(self, latent: th.Tensor) -> DynamicsState:
        """The state from which :meth:`step` and :meth:`rollout` start.

        :param latent: z_0, [..., Z]
        """

    @abstractmethod
    def step(self, state: DynamicsState, action: th.Tensor) -> tuple[th.Tensor, DynamicsState]:
        """One step, for actions that depend on the predicted latent.

        :param state: from :meth:`initial_state` or the previous step
        :param action: a, [..., A]
        :return: next latent z' [..., Z], next state
        """

    def rollout(self, state: DynamicsState, actions: th.Tensor) -> th.Tensor:
        """A whole horizon under known actions.

        :param state: from :meth:`initial_state`
        :param actions: a_0..a_{H-1}, [H, ..., A]
        :return: z_1..z_H, [H, ..., Z]
        """
        latents = []
        for action in actions:
            latent, state = self.step(state, action)  # z' = d(z, a)
            latents.append(latent)
        return th.stack(latents)  # [H, ..., Z]

    def as_kernel(self) -> Sequence[Layer] | StateSpace | None:
        """What the CPU kernels run a whole horizon of in one call; None if they cannot."""
        return None
