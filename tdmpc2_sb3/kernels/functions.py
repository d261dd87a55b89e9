"""The kernels as differentiable torch functions.

Every function here has a plain counterpart in :mod:`tdmpc2_sb3.layers`,
:mod:`tdmpc2_sb3.discrete_regression` or :mod:`tdmpc2_sb3.dynamics.ssm`; tests compare them.

Shapes: ``...`` any leading axes, B rows, Q members of an ensemble, K bins.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Any

import torch as th

from tdmpc2_sb3.kernels.library import library

PARALLEL_FROM = 32768  # elements; waking a second thread costs more than fewer would save


class Activation(enum.IntEnum):
    """What follows a layer norm; the numbers are those of kernels.c."""

    NONE = 0
    MISH = 1
    SIMNORM = 2


def usable(x: th.Tensor) -> bool:
    """Whether the kernels can work on this tensor here and now."""
    return (
        x.dtype is th.float32
        and x.device.type == "cpu"
        and not th.compiler.is_compiling()
        and library() is not None
    )


def _library() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None, "ask usable() first"
    return loaded


def _threads(num_elements: int) -> int:
    return th.get_num_threads() if num_elements >= PARALLEL_FROM else 1


def _pointer(x: th.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _records_gradients(*tensors: th.Tensor | None) -> bool:
    return th.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _norm_forward(
    x: th.Tensor,
    mask: th.Tensor | None,
    gain: th.Tensor,
    shift: th.Tensor,
    y: th.Tensor,
    statistics: tuple[th.Tensor, th.Tensor] | None,
    eps: float,
    activation: Activation,
    simnorm_dim: int,
) -> None:
    cols = x.shape[-1]
    rows, groups = x.numel() // cols, gain.numel() // cols
    mean, rstd = statistics if statistics is not None else (None, None)
    if rows:
        _library().norm_forward(
            x.data_ptr(),
            _pointer(mask),
            gain.data_ptr(),
            shift.data_ptr(),
            y.data_ptr(),
            _pointer(mean),
            _pointer(rstd),
            rows,
            cols,
            rows // groups,
            eps,
            int(activation),
            simnorm_dim,
            _threads(x.numel()),
        )


def _norm_backward(ctx: Any, grad: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    """Gradients by the layer norm's input, gain, shift, and by a bias in front."""
    x, y, mask, gain, shift, mean, rstd = ctx.norm_tensors
    grad = grad.contiguous()
    cols = x.shape[-1]
    rows, groups = x.numel() // cols, gain.numel() // cols
    grad_x = th.empty_like(x)
    grads = th.zeros(3, *gain.shape)
    if not rows:
        return grad_x, grads[0], grads[1], grads[2]
    threads = _threads(x.numel())
    sums = th.empty(threads * grads.numel())
    _library().norm_backward(
        grad.data_ptr(),
        x.data_ptr(),
        _pointer(mask),
        _pointer(y),
        gain.data_ptr(),
        shift.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
        grad_x.data_ptr(),
        grads[0].data_ptr(),
        grads[1].data_ptr(),
        grads[2].data_ptr(),
        sums.data_ptr(),
        rows,
        cols,
        rows // groups,
        int(ctx.activation),
        ctx.simnorm_dim,
        threads,
    )
    return grad_x, grads[0], grads[1], grads[2]


def _product(x: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """x W^T + b: [B, in] with [out, in], or [B, in] or [Q, B, in] with [Q, out, in]."""
    if weight.dim() == 2:
        return th.addmm(bias, x, weight.t())
    if x.dim() == 2:
        x = x.expand(weight.shape[0], *x.shape)
    return th.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def _grad_input(grad: th.Tensor, weight: th.Tensor, shared: bool) -> th.Tensor:
    """Gradient of :func:`_product` by x; summed over the members if x is shared by them."""
    if weight.dim() == 2:
        return grad @ weight
    if not shared:
        return th.bmm(grad, weight)
    total = grad[0] @ weight[0]
    for q in range(1, weight.shape[0]):
        total.addmm_(grad[q], weight[q])
    return total


def _grad_weight(grad: th.Tensor, x: th.Tensor) -> th.Tensor:
    """Gradient of :func:`_product` by W."""
    if grad.dim() == 2:
        return grad.t() @ x
    if x.dim() == 2:
        x = x.expand(grad.shape[0], *x.shape)
    return th.bmm(grad.transpose(1, 2), x)


class _NormedLinear(th.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: th.Tensor,
        a: th.Tensor | None,
        weight: th.Tensor,
        bias: th.Tensor,
        gain: th.Tensor,
        shift: th.Tensor,
        mask: th.Tensor | None,
        eps: float,
        activation: Activation,
        simnorm_dim: int,
    ) -> th.Tensor:
        x = z if a is None else th.cat([z, a], dim=-1)
        product = _product(x, weight, bias)
        y = th.empty_like(product)
        mean = product.new_empty(product.shape[:-1])
        rstd = th.empty_like(mean)
        _norm_forward(product, mask, gain, shift, y, (mean, rstd), eps, activation, simnorm_dim)
        kept = y if activation is Activation.SIMNORM else None
        ctx.save_for_backward(x, weight, product, kept, mask, gain, shift, mean, rstd)
        ctx.split = z.shape[-1]
        ctx.activation, ctx.simnorm_dim = activation, simnorm_dim
        return y

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, weight, *ctx.norm_tensors = ctx.saved_tensors
        grad, grad_gain, grad_shift, grad_bias = _norm_backward(ctx, grads[0])
        need_z, need_a, need_weight = ctx.needs_input_grad[:3]
        split, shared = ctx.split, x.dim() == 2
        grad_z = grad_a = None
        if need_z and need_a:
            both = _grad_input(grad, weight, shared)
            grad_z, grad_a = both[..., :split], both[..., split:]
        elif need_z:
            grad_z = _grad_input(grad, weight[..., :split], shared)
        elif need_a:  # the latent is given: only the few columns of the action count
            grad_a = _grad_input(grad, weight[..., split:], shared)
        grad_weight = _grad_weight(grad, x) if need_weight else None
        return (
            grad_z, grad_a, grad_weight, grad_bias, grad_gain, grad_shift, None, None, None, None
        )  # fmt: skip


def normed_linear(
    z: th.Tensor,
    a: th.Tensor | None,
    weight: th.Tensor,
    bias: th.Tensor,
    gain: th.Tensor,
    shift: th.Tensor,
    eps: float,
    activation: Activation,
    simnorm_dim: int = 1,
    mask: th.Tensor | None = None,
) -> th.Tensor:
    """activation(LayerNorm(mask * linear(concat(z, a)))), of one layer or of an ensemble's.

    :param z: [..., Z]; [B, Z] or [Q, B, Z] with an ensemble's weight
    :param a: the same leading axes, [..., A], or None
    :param weight: [out, Z + A] or [Q, out, Z + A]
    :param bias: [out] or [Q, out], like ``gain`` and ``shift``
    :param eps: of the layer norm
    :param activation: what follows
    :param simnorm_dim: group size of SimNorm
    :param mask: dropout's multiplier, of the product's shape
    :return: [..., out] or [Q, B, out]
    """
    single = weight.dim() == 2
    leading = z.shape[:-1]
    if single:
        z = z.reshape(-1, z.shape[-1])
        a = None if a is None else a.reshape(-1, a.shape[-1])
    if _records_gradients(z, a, weight, bias, gain, shift):
        y = _NormedLinear.apply(z, a, weight, bias, gain, shift, mask, eps, activation, simnorm_dim)
    else:
        y = _product(z if a is None else th.cat([z, a], dim=-1), weight, bias)
        _norm_forward(y, mask, gain, shift, y, None, eps, activation, simnorm_dim)
    return y.view(*leading, y.shape[-1]) if single else y  # type: ignore[no-any-return]


class _LayerNorm(th.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: th.Tensor,
        gain: th.Tensor,
        shift: th.Tensor,
        eps: float,
        activation: Activation,
        simnorm_dim: int,
    ) -> th.Tensor:
        y = th.empty_like(x)
        mean = x.new_empty(x.shape[:-1])
        rstd = th.empty_like(mean)
        _norm_forward(x, None, gain, shift, y, (mean, rstd), eps, activation, simnorm_dim)
        kept = y if activation is Activation.SIMNORM else None
        ctx.save_for_backward(x, kept, None, gain, shift, mean, rstd)
        ctx.activation, ctx.simnorm_dim = activation, simnorm_dim
        return y

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        ctx.norm_tensors = ctx.saved_tensors
        grad, grad_gain, grad_shift, _ = _norm_backward(ctx, grads[0])
        return grad, grad_gain, grad_shift, None, None, None


def layer_norm(
    x: th.Tensor,
    gain: th.Tensor,
    shift: th.Tensor,
    eps: float,
    activation: Activation = Activation.NONE,
    simnorm_dim: int = 1,
) -> th.Tensor:
    """activation(LayerNorm(x)) over the last axis.

    :param x: [..., D]
    :param gain: [D], like ``shift``
    """
    x = x.contiguous()
    if _records_gradients(x, gain, shift):
        return _LayerNorm.apply(  # type: ignore[no-any-return]
            x, gain, shift, eps, activation, simnorm_dim
        )
    y = th.empty_like(x)
    _norm_forward(x, None, gain, shift, y, None, eps, activation, simnorm_dim)
    return y


class _TwoHotInverse(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: th.Tensor, bins: th.Tensor) -> th.Tensor:
        ctx.save_for_backward(logits, bins)
        return _two_hot_inverse_forward(logits, bins)

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor, None]:
        logits, bins = ctx.saved_tensors
        grad, grad_logits = grads[0].contiguous(), th.empty_like(logits)
        if grad.numel():
            _library().two_hot_inverse_backward(
                grad.data_ptr(),
                logits.data_ptr(),
                bins.data_ptr(),
                grad_logits.data_ptr(),
                grad.numel(),
                logits.shape[-1],
                _threads(logits.numel()),
            )
        return grad_logits, None


def _two_hot_inverse_forward(logits: th.Tensor, bins: th.Tensor) -> th.Tensor:
    out = logits.new_empty(logits.shape[:-1])
    if out.numel():
        _library().two_hot_inverse_forward(
            logits.data_ptr(),
            bins.data_ptr(),
            out.data_ptr(),
            out.numel(),
            logits.shape[-1],
            _threads(logits.numel()),
        )
    return out


def two_hot_inverse(logits: th.Tensor, bins: th.Tensor) -> th.Tensor:
    """symexp of the expected bin under softmax(logits): [..., K] to [...]."""
    logits = logits.contiguous()
    if _records_gradients(logits):
        return _TwoHotInverse.apply(logits, bins)  # type: ignore[no-any-return]
    return _two_hot_inverse_forward(logits, bins)


class _TwoHotCrossEntropy(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: th.Tensor, position: th.Tensor) -> th.Tensor:
        out = logits.new_empty(logits.shape[:-1])
        log_sum = th.empty_like(out)
        if out.numel():
            _library().two_hot_cross_entropy_forward(
                logits.data_ptr(),
                position.data_ptr(),
                out.data_ptr(),
                log_sum.data_ptr(),
                out.numel(),
                position.numel(),
                logits.shape[-1],
                _threads(logits.numel()),
            )
        ctx.save_for_backward(logits, position, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor, None]:
        logits, position, log_sum = ctx.saved_tensors
        grad, grad_logits = grads[0].contiguous(), th.empty_like(logits)
        if grad.numel():
            _library().two_hot_cross_entropy_backward(
                grad.data_ptr(),
                logits.data_ptr(),
                position.data_ptr(),
                log_sum.data_ptr(),
                grad_logits.data_ptr(),
                grad.numel(),
                position.numel(),
                logits.shape[-1],
                _threads(logits.numel()),
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


class _GeluSum(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: th.Tensor, b: th.Tensor, distance: int) -> th.Tensor:
        ctx.save_for_backward(a, b)
        ctx.distance = distance
        return _gelu_sum_forward(a, b, distance)

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor, th.Tensor, None]:
        a, b = ctx.saved_tensors
        grad, grad_x = grads[0].contiguous(), th.empty_like(a)
        if grad.numel():
            _library().gelu_sum_backward(
                grad.data_ptr(),
                a.data_ptr(),
                b.data_ptr(),
                grad_x.data_ptr(),
                a.numel() // a.shape[-1],
                a.shape[-1],
                ctx.distance,
                _threads(a.numel()),
            )
        return grad_x, grad_x, None


def _gelu_sum_forward(a: th.Tensor, b: th.Tensor, distance: int) -> th.Tensor:
    y = th.empty_like(a)
    if a.numel():
        _library().gelu_sum_forward(
            a.data_ptr(),
            b.data_ptr(),
            y.data_ptr(),
            a.numel() // a.shape[-1],
            a.shape[-1],
            distance,
            _threads(a.numel()),
        )
    return y


def _row_distance(x: th.Tensor) -> int | None:
    """Elements from a row to the next where that is the same everywhere, as in a cut of columns."""
    if x.stride(-1) != 1:
        return None
    for axis in range(x.dim() - 2, 0, -1):
        if x.stride(axis - 1) != x.stride(axis) * x.shape[axis]:
            return None
    return x.stride(-2) if x.dim() > 1 else x.shape[-1]


def gelu_sum(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    """GELU(a + b) in its tanh approximation.

    :param a: [..., D]
    :param b: [..., D], which may be a cut of columns
    """
    a = a.contiguous()
    distance = _row_distance(b)
    if distance is None:
        b = b.contiguous()
        distance = b.shape[-1]
    if _records_gradients(a, b):
        return _GeluSum.apply(a, b, distance)  # type: ignore[no-any-return]
    return _gelu_sum_forward(a, b, distance)
