"""Layer norms and what follows them, as a differentiable function.

The plain counterparts are in :mod:`tdmpc2_sb3.model.layers`; tests compare them.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import torch as th

from tdmpc2_sb3.kernels.conditions import records_gradients, threads_for
from tdmpc2_sb3.kernels.interface import ACTIVATION_MISH, ACTIVATION_NONE, ACTIVATION_SIMNORM
from tdmpc2_sb3.kernels.library import call


class Activation(enum.IntEnum):
    """What follows a layer norm."""

    NONE = ACTIVATION_NONE
    MISH = ACTIVATION_MISH
    SIMNORM = ACTIVATION_SIMNORM


class Norm(NamedTuple):
    """Settings of a layer norm and what follows it."""

    activation: Activation = Activation.NONE
    simnorm_dim: int = 1  # group size of SimNorm
    eps: float = 1e-5  # torch's and the reference's


def norm_forward(
    x: th.Tensor,
    gain: th.Tensor,
    shift: th.Tensor,
    y: th.Tensor,
    statistics: th.Tensor | None,
    norm: Norm,
) -> None:
    """Writes y (which may be x) and the rows' mean and reciprocal deviation, [2, rows]."""
    cols = x.shape[-1]
    rows = x.numel() // cols
    if rows:
        call(
            "norm_forward",
            x,
            gain,
            shift,
            y,
            statistics,
            rows,
            cols,
            norm.eps,
            int(norm.activation),
            norm.simnorm_dim,
            threads_for(x.numel()),
        )


def norm_backward(
    grad: th.Tensor,
    x: th.Tensor,
    y: th.Tensor | None,
    gain: th.Tensor,
    shift: th.Tensor,
    statistics: th.Tensor,
    grad_parameters: th.Tensor,
    norm: Norm,
) -> th.Tensor:
    """Returns the gradient by x; writes those by gain, shift and a bias in front, [3, out]."""
    cols = x.shape[-1]
    rows = x.numel() // cols
    grad_x = th.empty_like(x)
    if not rows:
        grad_parameters.zero_()
        return grad_x
    threads = threads_for(x.numel())
    sums = x.new_empty(threads, 3, cols)
    call(
        "norm_backward",
        grad,
        x,
        y,
        gain,
        shift,
        statistics,
        grad_x,
        grad_parameters,
        sums,
        rows,
        cols,
        int(norm.activation),
        norm.simnorm_dim,
        threads,
    )
    return grad_x


class _LayerNorm(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor, gain: th.Tensor, shift: th.Tensor, norm: Norm) -> th.Tensor:
        y = th.empty_like(x)
        statistics = x.new_empty(2, x.numel() // x.shape[-1])
        norm_forward(x, gain, shift, y, statistics, norm)
        kept = y if norm.activation is Activation.SIMNORM else None
        ctx.save_for_backward(x, kept, gain, shift, statistics)
        ctx.norm = norm
        return y

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, y, gain, shift, statistics = ctx.saved_tensors
        parts = x.new_empty(3, x.shape[-1])
        grad = grads[0].contiguous()
        grad_x = norm_backward(grad, x, y, gain, shift, statistics, parts, ctx.norm)
        return grad_x, parts[0], parts[1], None


def layer_norm(x: th.Tensor, gain: th.Tensor, shift: th.Tensor, norm: Norm) -> th.Tensor:
    """activation(LayerNorm(x)) over the last axis.

    :param x: [..., D]
    :param gain: [D], like ``shift``
    :param norm: settings and what follows
    """
    x = x.contiguous()
    if records_gradients(x, gain, shift):
        return _LayerNorm.apply(x, gain, shift, norm)  # type: ignore[no-any-return]
    y = th.empty_like(x)
    norm_forward(x, gain, shift, y, None, norm)
    return y
