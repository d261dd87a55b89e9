"""The policy prior's draws and its loss, differentiated by hand.

The plain counterparts are in :mod:`tdmpc2_sb3.model.world_model` and :mod:`tdmpc2_sb3.losses`;
tests compare them.

Shapes: B rows, A action, Z latent, Q' members of an ensemble.
"""

from __future__ import annotations

from typing import NamedTuple

import torch as th

from tdmpc2_sb3.kernels.conditions import threads_for
from tdmpc2_sb3.kernels.library import call

_COST_OF_SQUASHING = 32  # elements' worth: two tanh, an exponential and a logarithm


class PolicyDraw:
    """A draw of the policy prior, differentiated by hand; see :meth:`WorldModel.policy` and
    :func:`tdmpc2_sb3.losses.scaled_entropy`.

    :param moments: outputs of the policy network, contiguous, [B, 2 A]
    :param noise: standard normal, [B, A]
    :param latents: that the actions are drawn at, [B, Z]
    :param squashed: whether the entropy is the "squashed" one, else the "gaussian" one
    """

    def __init__(
        self, moments: th.Tensor, noise: th.Tensor, latents: th.Tensor, squashed: bool = False
    ):
        self._noise = noise = noise.contiguous()
        self._squashed = squashed
        self._sizes = rows, action_dim = noise.shape
        latent_dim = latents.shape[-1]
        self.pairs = noise.new_empty(rows, latent_dim + action_dim)  # latents and actions
        self._kept = noise.new_empty(3, rows, action_dim)
        self.log_prob, self.scaled_entropy = noise.new_empty(2, rows)  # [B] each
        call(
            "policy_sample_forward",
            moments,
            noise,
            latents.contiguous(),
            self.pairs,
            self.log_prob,
            self.scaled_entropy,
            self._kept,
            rows,
            latent_dim,
            action_dim,
            squashed,
            threads_for(_COST_OF_SQUASHING * noise.numel()),
        )

    def backward(self, grad_actions: th.Tensor, grad_entropy: th.Tensor) -> th.Tensor:
        """Gradients by the moments, [B, 2 A].

        :param grad_actions: contiguous, [B, A]
        :param grad_entropy: by the scaled entropy, contiguous, [B]
        """
        rows, action_dim = self._sizes
        grad_moments = grad_actions.new_empty(rows, 2 * action_dim)
        call(
            "policy_sample_backward",
            self._noise,
            self.log_prob,
            self._kept,
            grad_actions,
            grad_entropy,
            grad_moments,
            rows,
            action_dim,
            self._squashed,
            threads_for(grad_actions.numel()),
        )
        return grad_moments


class PolicyObjective(NamedTuple):
    """The policy prior's loss, what is logged about it, and its gradients."""

    total: th.Tensor  # []
    entropy: th.Tensor  # mean of -log pi, []
    scaled_entropy: th.Tensor  # mean, []
    scale: th.Tensor  # S after its update, []
    grad_values: th.Tensor  # [Q', B]
    grad_entropy: th.Tensor  # by the scaled entropies, [B]


def policy_objective(
    values: th.Tensor,
    draw: PolicyDraw,
    weights: th.Tensor,
    scale: th.Tensor,
    tau: float,
    entropy_coef: float,
    starts: int,
) -> PolicyObjective:
    """See :func:`tdmpc2_sb3.losses.policy_loss`.

    :param values: of Q' heads, contiguous, [Q', B]
    :param draw: of the actions that are valued
    :param weights: of the rows, contiguous, [B]
    :param scale: S before its update, []
    :param tau: rate at which S moves
    :param entropy_coef: coefficient of the scaled entropy
    :param starts: how many of the first rows S is moved by
    """
    grad_values, grad_entropy = th.empty_like(values), th.empty_like(weights)
    out = values.new_empty(4)
    call(
        "policy_objective",
        values,
        draw.log_prob,
        draw.scaled_entropy,
        weights,
        scale,
        tau,
        entropy_coef,
        grad_values,
        grad_entropy,
        out,
        values.new_empty(starts),
        *values.shape,
        starts,
    )
    total, entropy, scaled_entropy, new_scale = out
    return PolicyObjective(total, entropy, scaled_entropy, new_scale, grad_values, grad_entropy)
