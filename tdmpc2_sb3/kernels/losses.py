"""Categorical regression over bins, and losses with their gradients at once.

The plain counterparts are in :mod:`tdmpc2_sb3.model.discrete_regression` and
:mod:`tdmpc2_sb3.losses`; tests compare them.

Shapes: ``...`` any leading axes, B rows, K bins.
"""

from __future__ import annotations

from typing import Any

import torch as th

from tdmpc2_sb3.kernels.conditions import records_gradients, threads_for
from tdmpc2_sb3.kernels.library import call


class _TwoHotInverse(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: th.Tensor, bins: th.Tensor) -> th.Tensor:
        ctx.save_for_backward(logits, bins)
        return _two_hot_inverse_forward(logits, bins)

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor, None]:
        return two_hot_inverse_backward(grads[0], *ctx.saved_tensors), None


def two_hot_inverse_backward(grad: th.Tensor, logits: th.Tensor, bins: th.Tensor) -> th.Tensor:
    """Gradients of :func:`two_hot_inverse` by its logits.

    :param grad: by its result, [...]
    :param logits: contiguous, [..., K]
    :param bins: [K]
    """
    grad, grad_logits = grad.contiguous(), th.empty_like(logits)
    if grad.numel():
        call(
            "two_hot_inverse_backward",
            grad,
            logits,
            bins,
            grad_logits,
            grad.numel(),
            logits.shape[-1],
            threads_for(logits.numel()),
        )
    return grad_logits


def _two_hot_inverse_forward(logits: th.Tensor, bins: th.Tensor) -> th.Tensor:
    out = logits.new_empty(logits.shape[:-1])
    if out.numel():
        call(
            "two_hot_inverse_forward",
            logits,
            bins,
            out,
            out.numel(),
            logits.shape[-1],
            threads_for(logits.numel()),
        )
    return out


def two_hot_inverse(logits: th.Tensor, bins: th.Tensor) -> th.Tensor:
    """symexp of the expected bin under softmax(logits): [..., K] to [...]."""
    logits = logits.contiguous()
    if records_gradients(logits):
        return _TwoHotInverse.apply(logits, bins)  # type: ignore[no-any-return]
    return _two_hot_inverse_forward(logits, bins)


class _TwoHotCrossEntropy(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: th.Tensor, position: th.Tensor) -> th.Tensor:
        out = logits.new_empty(logits.shape[:-1])
        log_sum = th.empty_like(out)
        if out.numel():
            call(
                "two_hot_cross_entropy_forward",
                logits,
                position,
                out,
                log_sum,
                out.numel(),
                position.numel(),
                logits.shape[-1],
                threads_for(logits.numel()),
            )
        ctx.save_for_backward(logits, position, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor, None]:
        logits, position, log_sum = ctx.saved_tensors
        grad, grad_logits = grads[0].contiguous(), th.empty_like(logits)
        if grad.numel():
            call(
                "two_hot_cross_entropy_backward",
                grad,
                logits,
                position,
                log_sum,
                grad_logits,
                grad.numel(),
                position.numel(),
                logits.shape[-1],
                threads_for(logits.numel()),
            )
        return grad_logits, None


def two_hot_cross_entropy(logits: th.Tensor, position: th.Tensor) -> th.Tensor:
    """Cross-entropy with the two-hot distribution around ``position``.

    :param logits: [..., K]
    :param position: in bins from the first one, in [0, K - 1]; its axes are the last of ``...``
    :return: [...]
    """
    return _TwoHotCrossEntropy.apply(  # type: ignore[no-any-return]
        logits.contiguous(), position.contiguous()
    )


def two_hot_loss(
    logits: th.Tensor,
    x: th.Tensor,
    weights: th.Tensor,
    bins: th.Tensor,
    scale: float,
    loss: th.Tensor,
) -> th.Tensor:
    """Gradients by the logits of a weighted sum of their cross-entropies with two-hot scalars.

    :param logits: contiguous, [..., K]
    :param x: scalars, whose axes are the last ones of ``...``
    :param weights: of the scalars, contiguous
    :param bins: evenly spaced bin centres in symlog space, [K]
    :param scale: of the gradients
    :param loss: where the sum is written, []
    :return: [..., K]
    """
    grad_logits = th.empty_like(logits)
    num_bins = logits.shape[-1]
    call(
        "two_hot_loss",
        logits,
        x.contiguous(),
        weights,
        bins,
        loss,
        grad_logits,
        logits.numel() // num_bins,
        x.numel(),
        num_bins,
        scale,
        threads_for(logits.numel()),
    )
    return grad_logits


def squared_loss(
    x: th.Tensor,
    target: th.Tensor,
    weights: th.Tensor,
    scale: float,
    loss: th.Tensor,
    grad: th.Tensor,
) -> None:
    """Writes a weighted sum of rows' mean squared distances, and its gradients by x.

    :param x: contiguous, [..., D]
    :param target: contiguous, [..., D]
    :param weights: contiguous, [...]
    :param scale: of the gradients
    :param loss: the sum, []
    :param grad: contiguous, [..., D]
    """
    call(
        "squared_loss",
        x,
        target,
        weights,
        loss,
        grad,
        weights.numel(),
        x.shape[-1],
        scale,
        threads_for(x.numel()),
    )


def termination_loss(
    logits: th.Tensor,
    terminations: th.Tensor,
    valid: th.Tensor | None,
    scale: float,
    loss: th.Tensor,
) -> th.Tensor:
    """Gradients by the logits of their mean binary cross-entropy, times a scale.

    :param logits: contiguous, [...]
    :param terminations: targets that repeat, contiguous, [T, B]
    :param valid: what each counts, 1 or 0, contiguous, [T, B]; None if all do
    :param scale: of the gradients
    :param loss: where the mean is written, []
    :return: [...]
    """
    grad_logits = th.empty_like(logits)
    arrays = logits, terminations, valid, loss, grad_logits
    call("termination_loss", *arrays, logits.numel(), terminations.numel(), scale)
    return grad_logits


def lambda_returns(
    values: th.Tensor,
    rewards: th.Tensor,
    terminations: th.Tensor,
    gamma: float,
    td_lambda: float,
) -> th.Tensor:
    """Targets of the Q heads, [T, B]; see :func:`tdmpc2_sb3.losses.lambda_returns`.

    :param values: of the next states, [T, B]; of the last alone, [1, B], if lambda is 1
    :param rewards: [T, B]
    :param terminations: [T, B]
    """
    targets = values.new_empty(rewards.shape)
    arrays = [each.contiguous() for each in (values, rewards, terminations)]
    call("lambda_returns", *arrays, gamma, td_lambda, targets, *rewards.shape)
    return targets
