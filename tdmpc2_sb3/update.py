"""One gradient step: world model, then policy prior, then running scale and target Q heads."""

from __future__ import annotations

import math

import torch as th

from tdmpc2_sb3.compilation import compiled
from tdmpc2_sb3.direct_gradients import DirectGradients, Taken, has_direct_gradients
from tdmpc2_sb3.kernels import Captured, lerp_, readable, usable, weights_held
from tdmpc2_sb3.losses import (
    LossConfig,
    ModelLosses,
    PolicyLosses,
    PolicyNoise,
    UpdateNoise,
    alive_states,
    model_losses,
    policy_loss,
)
from tdmpc2_sb3.policies import TDMPC2Policy
from tdmpc2_sb3.sequence_buffer import SequenceBatch

CLIPPING_EPSILON = 1e-6  # torch's and the reference's


class UpdateStep:
    """Applies gradient steps to a policy.

    :param policy: whose networks, optimisers and running scale change
    :param config: coefficients of the losses
    :param model_weights: weights of the sub-sequence's steps in the model's losses, [T]
    :param policy_weights: the same in the policy's loss, [T + 1]
    :param tau: rate of the target Q heads and of the running scale
    :param max_grad_norm: gradients are clipped to this norm
    :param compile: whether losses and gradients are compiled
    """

    def __init__(
        self,
        policy: TDMPC2Policy,
        config: LossConfig,
        model_weights: th.Tensor,
        policy_weights: th.Tensor,
        tau: float,
        max_grad_norm: float,
        compile: bool | str = False,
    ):
        self.policy = policy
        self.config = config
        self.model_weights = model_weights.to(policy.device)
        self.policy_weights = policy_weights.to(policy.device)
        self.tau = tau
        self.max_grad_norm = max_grad_norm
        model = policy.world_model
        self._online: list[th.Tensor] = list(model.q_ensemble.parameters())
        self._target: list[th.Tensor] = list(model.target_q_ensemble.parameters())

        def model_backward(losses: ModelLosses) -> None:
            losses.total.backward(inputs=policy.model_parameters)

        def policy_backward(losses: PolicyLosses) -> None:
            losses.total.backward(inputs=policy.prior_parameters)

        self._model_losses = compiled(model_losses, compile, model_backward)
        self._policy_loss = compiled(policy_loss, compile, policy_backward)
        self._move_targets = Captured(self._lerp_targets, [*self._target, *self._online])
        self._direct: DirectGradients | None = None
        if compile is not True and has_direct_gradients(model):
            self._direct = DirectGradients(model, config)

    def __call__(self, batch: SequenceBatch, noise: UpdateNoise) -> dict[str, th.Tensor]:
        """
        :param batch: sub-sequences
        :param noise: the step's random numbers; if it has some for the policy prior, that and the
            running scale take a step too
        :return: losses and norms by their names in the log
        :raises RuntimeError: if a loss or gradient is not finite; nothing has changed then
        """
        policy, model = self.policy, self.policy.world_model
        direct = self._direct if usable(batch.rewards) and usable(model.bins) else None
        if direct is not None:
            losses, taken = direct.model_losses(batch, noise, self.model_weights)
        else:
            with weights_held():
                losses = self._model_losses(model, batch, noise, self.config, self.model_weights)
                taken = _taken(policy.model_parameters)
        self._step(policy.model_optimizer, taken, losses.total)
        statistics = self._model_statistics(losses, taken.norm)
        if noise.policy is not None:
            statistics.update(self._policy_step(losses.latents, batch, noise.policy, direct))
        with th.no_grad():
            self._move_targets()
        return statistics

    def _lerp_targets(self) -> None:
        if readable(self._target) and readable(self._online):
            lerp_(self._target, self._online, self.tau)
        else:
            th._foreach_lerp_(self._target, self._online, self.tau)

    def _policy_step(
        self,
        latents: th.Tensor,
        batch: SequenceBatch,
        noise: PolicyNoise,
        direct: DirectGradients | None,
    ) -> dict[str, th.Tensor]:
        policy, model = self.policy, self.policy.world_model
        alive = alive_states(batch)
        settings = (self.policy_weights, self.tau, alive)
        if direct is not None:
            prior, taken = direct.policy_loss(latents, policy.scale, noise, *settings)
        else:
            with weights_held():
                prior = self._policy_loss(
                    model, latents, policy.scale, noise, self.config, *settings
                )
                taken = _taken(policy.prior_parameters)
        self._step(policy.prior_optimizer, taken, prior.total)
        with th.no_grad():
            policy.scale.copy_(prior.scale)
        return {
            "train/policy_loss": prior.total,
            "train/policy_entropy": prior.entropy,
            "train/policy_scaled_entropy": prior.scaled_entropy,
            "train/policy_grad_norm": taken.norm.clone(),
            "train/q_scale": prior.scale,
        }

    def _step(self, optimizer: th.optim.Optimizer, taken: Taken, loss: th.Tensor) -> None:
        # One transfer from the device; most gradients are short enough as they are.
        loss_value, length = th.stack([loss.detach(), taken.norm]).tolist()
        if not math.isfinite(loss_value + length):
            optimizer.zero_grad()
            raise RuntimeError(
                f"loss {loss_value}, gradient norm {length}: not finite. Lower the learning "
                "rate, or check the environment's rewards and observations for huge values."
            )
        if length > self.max_grad_norm:
            th._foreach_mul_(taken.arrays, self.max_grad_norm / (length + CLIPPING_EPSILON))
        optimizer.step()
        optimizer.zero_grad()

    def _model_statistics(self, losses: ModelLosses, grad_norm: th.Tensor) -> dict[str, th.Tensor]:
        statistics = {
            "train/loss": losses.total,
            "train/consistency_loss": losses.consistency,
            "train/reward_loss": losses.reward,
            "train/value_loss": losses.value,
            "train/grad_norm": grad_norm.clone(),
        }
        if self.policy.world_model.episodic:
            statistics["train/termination_loss"] = losses.termination
        return statistics


def _taken(parameters: list[th.nn.Parameter]) -> Taken:
    return Taken.of([each.grad for each in parameters if each.grad is not None])
