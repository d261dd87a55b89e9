"""One gradient step: world model, then policy prior, then running scale and target Q heads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch as th

from tdmpc2_sb3.fast.adam import Adam
from tdmpc2_sb3.fast.cuda_graphs import Graphed
from tdmpc2_sb3.fast.gradients import DirectGradients, StepGradients
from tdmpc2_sb3.fast.module_parts import Parts
from tdmpc2_sb3.fast.torch_compile import Compiled
from tdmpc2_sb3.kernels import Captured
from tdmpc2_sb3.losses import (
    TERMS,
    LossConfig,
    ModelLosses,
    PolicyLosses,
    PolicyNoise,
    UpdateNoise,
    alive_states,
    model_losses,
    policy_loss,
)
from tdmpc2_sb3.model.operations import fixed_weights, move_towards_
from tdmpc2_sb3.policies import TDMPC2Policy
from tdmpc2_sb3.replay.buffer import SequenceBatch

CLIPPING_EPSILON = 1e-6  # torch's and the reference's


class UpdateStep:
    """Applies gradient steps to a policy, as it is when this is made: another one is needed where
    a part is replaced, frozen or thawed later (see :meth:`is_of`).

    :param policy: whose networks, optimisers and running scale change
    :param config: coefficients of the losses
    :param model_weights: weights of the sub-sequence's steps in the model's losses, [T]
    :param policy_weights: the same in the policy's loss, [T + 1]
    :param tau: rate of the target Q heads and of the running scale
    :param max_grad_norm: gradients are clipped to this norm
    :param compile: whether losses and gradients are compiled; on CUDA the whole step is also
        recorded as a graph, unless this is False
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
        self._frozen = _frozen(policy)
        self._trained = _trained(policy.model_parameters)
        self._trained_prior = _trained(policy.prior_parameters)
        self.model_weights = model_weights.to(policy.device)
        self.policy_weights = policy_weights.to(policy.device)
        self.tau = tau
        self.max_grad_norm = max_grad_norm
        model = policy.world_model
        self._online: list[th.Tensor] = list(model.q_ensemble.parameters())
        self._target: list[th.Tensor] = list(model.target_q_ensemble.parameters())

        self._model_losses = Compiled(model_losses, compile, self._model_backward)
        self._policy_loss = Compiled(policy_loss, compile, self._policy_backward)
        self._move_targets = Captured(self._lerp_targets, [*self._target, *self._online])
        self._checked = _Checked(max_grad_norm, self._move_targets)
        self._direct = policy.ways.direct_gradients(config, compile)
        self._parts = Parts(policy)
        self._graphed = policy.ways.recorded(self._without_waiting, self._state, compile)
        if self._graphed is not None:
            num_groups = sum(len(each.param_groups) for each in self._optimizers)
            self._known_rates: list[float] = []
            self._rates = th.zeros(num_groups, device=policy.device, dtype=th.float32)

    def __call__(self, batch: SequenceBatch, noise: UpdateNoise) -> dict[str, th.Tensor]:
        """
        :param batch: sub-sequences
        :param noise: the step's random numbers; if it has some for the policy prior, that and the
            running scale take a step too
        :return: losses and norms by their names in the log
        :raises RuntimeError: if a loss or gradient is not finite; nothing has changed then
        """
        if self._graphed is not None:
            return self._by_graph(self._graphed, batch, noise)
        direct = self._direct if self.policy.ways.by_kernels(batch.rewards) else None
        return self._apply(batch, noise, direct, self._checked)

    def _apply(
        self,
        batch: SequenceBatch,
        noise: UpdateNoise,
        direct: DirectGradients | None,
        changes: _Changes,
    ) -> dict[str, th.Tensor]:
        """The step, by a graph or not.

        :param direct: takes the gradients by hand; None leaves them to autograd
        :param changes: makes the step's changes
        """
        policy = self.policy
        losses, gradients = self._model_gradients(batch, noise, direct)
        statistics = _model_statistics(losses, gradients.norm)
        changes.step(policy.model_optimizer, gradients, losses.total, losses.terms)
        if noise.policy is not None:
            prior, gradients = self._policy_gradients(losses.latents, batch, noise.policy, direct)
            statistics.update(_policy_statistics(prior, gradients.norm))
            changes.step(policy.prior_optimizer, gradients, prior.total, {})
            with th.no_grad():
                changes.write(policy.scale, prior.scale)
        with th.no_grad():
            changes.move_targets()
        return statistics

    def is_of(self, policy: TDMPC2Policy) -> bool:
        """Whether the policy is that of these steps, with the same parts trained."""
        return (
            policy is self.policy and self._parts.are_the_same() and _frozen(policy) == self._frozen
        )

    def _model_backward(self, losses: ModelLosses) -> None:
        if losses.total.requires_grad:
            losses.total.backward(inputs=self._trained)

    def _policy_backward(self, losses: PolicyLosses) -> None:
        if losses.total.requires_grad and self._trained_prior:
            losses.total.backward(inputs=self._trained_prior)

    def _model_gradients(
        self, batch: SequenceBatch, noise: UpdateNoise, direct: DirectGradients | None
    ) -> tuple[ModelLosses, StepGradients]:
        if direct is not None and self._trained:
            return direct.model_losses(batch, noise, self.model_weights)
        policy = self.policy
        with fixed_weights():
            losses = self._model_losses(
                policy.world_model, batch, noise, self.config, self.model_weights
            )
            return losses, _gradients_of(self._trained, losses.total)

    def _policy_gradients(
        self,
        latents: th.Tensor,
        batch: SequenceBatch,
        noise: PolicyNoise,
        direct: DirectGradients | None,
    ) -> tuple[PolicyLosses, StepGradients]:
        policy = self.policy
        settings = (self.policy_weights, self.tau, alive_states(batch))
        if direct is not None and self._trained_prior:
            return direct.policy_loss(latents, policy.scale, noise, *settings)
        with fixed_weights():
            losses = self._policy_loss(
                policy.world_model, latents, policy.scale, noise, self.config, *settings
            )
            return losses, _gradients_of(self._trained_prior, losses.total)

    def _lerp_targets(self) -> None:
        move_towards_(self._target, self._online, self.tau)

    # -- on CUDA -------------------------------------------------------------------------------

    def _by_graph(
        self, graphed: Graphed[dict[str, th.Tensor]], batch: SequenceBatch, noise: UpdateNoise
    ) -> dict[str, th.Tensor]:
        """The step by one launch and one transfer from the device."""
        groups = [group for each in self._optimizers for group in each.param_groups]
        rates = [group["lr"] for group in groups]
        if rates != self._known_rates:
            self._rates.copy_(th.tensor(rates, dtype=th.float32))
            self._known_rates = rates
        statistics = graphed(batch, noise)
        values = th.stack(list(statistics.values())).cpu()
        statistics = dict(zip(statistics, values, strict=True))
        logged = {name: f"train/{name}_loss" for name in TERMS}
        terms = {name: statistics[key] for name, key in logged.items() if key in statistics}
        _check_finite(statistics["train/loss"], statistics["train/grad_norm"], terms)
        if noise.policy is not None:
            _check_finite(statistics["train/policy_loss"], statistics["train/policy_grad_norm"], {})
        return statistics

    @property
    def _optimizers(self) -> tuple[Adam, Adam]:
        return self.policy.model_optimizer, self.policy.prior_optimizer

    def _state(self) -> list[th.Tensor]:
        """All that a step reads and writes besides its batch and noise."""
        moments = [
            each
            for optimizer in self._optimizers
            for of_one in optimizer.state.values()
            for each in of_one.values()
        ]
        return [*self._parts.tensors(), *moments]

    def _without_waiting(self, batch: SequenceBatch, noise: UpdateNoise) -> dict[str, th.Tensor]:
        """The step without a look at what came out: where a loss or gradient is not finite, it
        changes nothing from there on."""
        sizes = [len(each.param_groups) for each in self._optimizers]
        rates = dict(zip(self._optimizers, self._rates.split(sizes), strict=True))
        changes = _UnlessFailed(self.max_grad_norm, rates, self._target, self._online, self.tau)
        try:
            return self._apply(batch, noise, None, changes)
        finally:
            for optimizer in self._optimizers:
                optimizer.zero_grad()


class _Changes(Protocol):
    """How a step changes parameters, the running scale and the target Q heads."""

    def step(
        self,
        optimizer: Adam,
        gradients: StepGradients,
        loss: th.Tensor,
        terms: Mapping[str, th.Tensor],
    ) -> None:
        """Clips gradients and applies them; the parameters have none afterwards.

        :param optimizer: of the parameters
        :param gradients: that the parameters have
        :param loss: whose they are, []
        :param terms: that it consists of, by name
        """

    def write(self, tensor: th.Tensor, value: th.Tensor) -> None:
        """Gives a tensor another value."""

    def move_targets(self) -> None:
        """Moves the target Q heads towards the Q heads."""


class _Checked:
    """Changes after a look at what came out, for which the device is waited for.

    :param max_grad_norm: gradients are clipped to this norm
    :param move_targets: moves the target Q heads
    """

    def __init__(self, max_grad_norm: float, move_targets: Callable[[], None]):
        self._max_grad_norm = max_grad_norm
        self.move_targets = move_targets

    def step(
        self,
        optimizer: Adam,
        gradients: StepGradients,
        loss: th.Tensor,
        terms: Mapping[str, th.Tensor],
    ) -> None:
        # One transfer from the device; most gradients are short enough as they are.
        loss_value, length = th.stack([loss.detach(), gradients.norm]).tolist()
        try:
            _check_finite(loss_value, length, terms)
        except RuntimeError:
            optimizer.zero_grad()
            raise
        if length > self._max_grad_norm and gradients.arrays:
            shrunk = self._max_grad_norm / (length + CLIPPING_EPSILON)
            th._foreach_mul_(gradients.arrays, shrunk)
        optimizer.step()
        optimizer.zero_grad()

    def write(self, tensor: th.Tensor, value: th.Tensor) -> None:
        tensor.copy_(value)


class _UnlessFailed:
    """Changes of one step without a wait: none any more once a loss or gradient is not finite.

    :param max_grad_norm: gradients are clipped to this norm
    :param rates: learning rates of each optimiser's groups
    :param target: parameters of the target Q heads
    :param online: those of the Q heads
    :param tau: rate at which the former move towards the latter
    """

    def __init__(
        self,
        max_grad_norm: float,
        rates: Mapping[Adam, th.Tensor],
        target: list[th.Tensor],
        online: list[th.Tensor],
        tau: float,
    ):
        self._max_grad_norm = max_grad_norm
        self._rates = rates
        self._target, self._online, self._tau = target, online, tau
        self._failed: th.Tensor | None = None  # [], bool

    def step(
        self,
        optimizer: Adam,
        gradients: StepGradients,
        loss: th.Tensor,
        terms: Mapping[str, th.Tensor],
    ) -> None:
        failed = (loss.isfinite() & gradients.norm.isfinite()).logical_not()
        self._failed = failed if self._failed is None else self._failed.logical_or(failed)
        shrunk = self._max_grad_norm / (gradients.norm + CLIPPING_EPSILON)
        if gradients.arrays:
            too_long = gradients.norm > self._max_grad_norm
            factor = th.where(too_long, shrunk, th.ones_like(shrunk))
            th._foreach_mul_(gradients.arrays, factor)
        optimizer.step_unless(self._failed.float(), self._rates[optimizer].unbind())
        optimizer.zero_grad()

    def write(self, tensor: th.Tensor, value: th.Tensor) -> None:
        assert self._failed is not None
        tensor.copy_(th.where(self._failed, tensor, value))

    def move_targets(self) -> None:
        assert self._failed is not None
        rate = self._failed.logical_not() * self._tau
        moves = th._foreach_sub(self._online, self._target)
        th._foreach_mul_(moves, rate)
        th._foreach_add_(self._target, moves)


def _model_statistics(losses: ModelLosses, grad_norm: th.Tensor) -> dict[str, th.Tensor]:
    return {
        "train/loss": losses.total.detach(),
        **{f"train/{name}_loss": value for name, value in losses.terms.items()},
        "train/grad_norm": grad_norm.clone(),
    }


def _policy_statistics(losses: PolicyLosses, grad_norm: th.Tensor) -> dict[str, th.Tensor]:
    return {
        "train/policy_loss": losses.total.detach(),
        "train/policy_entropy": losses.entropy,
        "train/policy_scaled_entropy": losses.scaled_entropy,
        "train/policy_grad_norm": grad_norm.clone(),
        "train/q_scale": losses.scale,
    }


def _check_finite(
    loss: float | th.Tensor, gradient_norm: float | th.Tensor, terms: Mapping[str, th.Tensor]
) -> None:
    """
    :param terms: that the loss consists of, by name
    :raises RuntimeError: if the loss or the norm is not finite
    """
    loss, gradient_norm = float(loss), float(gradient_norm)
    if math.isfinite(loss + gradient_norm):
        return
    numbers = {f"the {name} loss": float(value) for name, value in terms.items()}
    found = [f"{name} {value}" for name, value in numbers.items() if not math.isfinite(value)]
    of_which = f" ({', '.join(found)})" if found else ""
    raise RuntimeError(
        f"loss {loss}, gradient norm {gradient_norm}{of_which}: not finite. Lower the learning "
        "rate, or check the environment's rewards and observations for huge values."
    )


def _gradients_of(parameters: list[th.nn.Parameter], loss: th.Tensor) -> StepGradients:
    arrays = [each.grad for each in parameters if each.grad is not None]
    return StepGradients.of(arrays, loss.detach())


def _frozen(policy: TDMPC2Policy) -> list[bool]:
    """Of each parameter that an optimiser has, whether it is to stay as it is."""
    parameters = itertools.chain(policy.model_parameters, policy.prior_parameters)
    return [not each.requires_grad for each in parameters]


def _trained(parameters: list[th.nn.Parameter]) -> list[th.nn.Parameter]:
    """Those that are not frozen; the others lose gradients that they were left with."""
    for each in parameters:
        if not each.requires_grad:
            each.grad = None
    return [each for each in parameters if each.requires_grad]


class RunningMeans:
    """Averages named scalars between two dumps without waiting for the device at every step."""

    def __init__(self) -> None:
        self._sums: dict[str, th.Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, th.Tensor]) -> None:
        """
        :param values: scalars, or tensors whose mean is meant
        """
        for name, value in values.items():
            mean = value.detach().mean() if value.dim() else value.detach()
            self._sums[name] = self._sums[name] + mean if name in self._sums else mean
            self._counts[name] = self._counts.get(name, 0) + 1

    def pop(self) -> dict[str, float]:
        """The means since the last call; the sums start anew."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means
