"""The kernels as differentiable torch functions.

Every function here has a plain counterpart in :mod:`tdmpc2_sb3.layers`,
:mod:`tdmpc2_sb3.discrete_regression` or :mod:`tdmpc2_sb3.dynamics.ssm`; tests compare them.

Shapes: ``...`` any leading axes, B rows, Q members of an ensemble, K bins.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import torch as th

from tdmpc2_sb3.kernels.library import library
from tdmpc2_sb3.kernels.products import grad_input, linear_product

PARALLEL_FROM = 32768  # elements; waking a second thread costs more than fewer would save


class Activation(enum.IntEnum):
    """What follows a layer norm; the numbers are those of kernels.c."""

    NONE = 0
    MISH = 1
    SIMNORM = 2


class Norm(NamedTuple):
    """Settings of a layer norm and what follows it."""

    activation: Activation = Activation.NONE
    simnorm_dim: int = 1  # group size of SimNorm
    eps: float = 1e-5  # torch's and the reference's


def usable(x: th.Tensor) -> bool:
    """Whether the kernels can work on this tensor here and now."""
    return (
        x.dtype is th.float32
        and x.device.type == "cpu"
        and not th.compiler.is_compiling()
        and library() is not None
    )


def _run(name: str, *arguments: th.Tensor | float | None) -> None:
    """Calls a function of kernels.c; a tensor is handed over as the address of its numbers."""
    loaded = library()
    assert loaded is not None, "ask usable() first"
    getattr(loaded, name)(
        *(each.data_ptr() if isinstance(each, th.Tensor) else each for each in arguments)
    )


def _threads(num_elements: int) -> int:
    return th.get_num_threads() if num_elements >= PARALLEL_FROM else 1


def _records_gradients(*tensors: th.Tensor | None) -> bool:
    return th.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _norm_forward(
    x: th.Tensor,
    mask: th.Tensor | None,
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
        _run(
            "norm_forward",
            x,
            mask,
            gain,
            shift,
            y,
            statistics,
            rows,
            cols,
            norm.eps,
            int(norm.activation),
            norm.simnorm_dim,
            _threads(x.numel()),
        )


def _norm_backward(
    grad: th.Tensor,
    x: th.Tensor,
    mask: th.Tensor | None,
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
    threads = _threads(x.numel())
    sums = th.empty(threads, 3, cols)
    _run(
        "norm_backward",
        grad,
        x,
        mask,
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


def _rows_of(x: th.Tensor, member: int) -> th.Tensor:
    """A member's rows: x is [B, in], shared by all, or [Q, B, in]."""
    return x if x.dim() == 2 else x[member]


def _grad_x(grads: list[th.Tensor], weights: list[th.Tensor], shared: bool) -> th.Tensor:
    """Gradient by the input; summed over the members if they share it."""
    if not shared:
        out = grads[0].new_empty(len(grads), len(grads[0]), weights[0].shape[-1])
        for member, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            th.mm(grad, weight, out=out[member])
        return out
    total = grad_input(grads[0], weights[0])
    for grad, weight in zip(grads[1:], weights[1:], strict=True):
        total += grad_input(grad, weight)
    return total


def _grad_weight(
    grads: list[th.Tensor], x: th.Tensor, weight: th.Tensor, members: tuple[int, ...]
) -> th.Tensor:
    if weight.dim() == 2:
        return grads[0].t() @ x
    if members == _everyone(weight):
        out = th.empty_like(weight)
        for member in members:
            th.mm(grads[member].t(), _rows_of(x, member), out=out[member])
        return out
    out = th.zeros_like(weight)
    for position, member in enumerate(members):
        out[member].addmm_(grads[position].t(), _rows_of(x, position))
    return out


def _everyone(parameter: th.Tensor) -> tuple[int, ...]:
    return tuple(range(len(parameter)))


def _spread(values: th.Tensor, parameter: th.Tensor, members: tuple[int, ...]) -> th.Tensor:
    """Puts the members' rows of a gradient, [Q', out], where they belong in the whole's."""
    if parameter.dim() == 1:
        return values[0]
    if members == _everyone(parameter):
        return values.contiguous()
    return th.zeros_like(parameter).index_add_(0, th.tensor(members), values)


def _of(parameter: th.Tensor, members: tuple[int, ...], single: bool) -> list[th.Tensor]:
    return [parameter] if single else [parameter[member] for member in members]


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
        members: tuple[int, ...],
        norm: Norm,
    ) -> th.Tensor:
        x = z if a is None else th.cat([z, a], dim=-1)
        products, y, statistics = _normed_linear(
            x, weight, bias, gain, shift, mask, members, norm, keep=True
        )
        kept = y if norm.activation is Activation.SIMNORM else None
        ctx.save_for_backward(x, weight, kept, mask, gain, shift, statistics, *products)
        ctx.split, ctx.members, ctx.norm = z.shape[-1], members, norm
        return y

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, weight, y, mask, gain, shift, statistics, *products = ctx.saved_tensors
        members, single = ctx.members, weight.dim() == 2
        gains, shifts = _of(gain, members, single), _of(shift, members, single)
        weights = _of(weight, members, single)
        grad, count, cols = grads[0].contiguous(), len(members), weight.shape[-2]
        of_parameters = th.empty(count, 3, cols)
        by_product = [
            _norm_backward(
                grad if single else grad[i],
                products[i],
                mask if single or mask is None else mask[i],
                y if single or y is None else y[i],
                gains[i],
                shifts[i],
                statistics[i],
                of_parameters[i],
                ctx.norm,
            )
            for i in range(count)
        ]
        need_z, need_a, need_weight, need_bias = ctx.needs_input_grad[:4]
        split, shared, grad_z, grad_a = ctx.split, x.dim() == 2, None, None
        if need_z:
            both = _grad_x(by_product, weights, shared)
            grad_z, grad_a = both[..., :split], both[..., split:] if need_a else None
        elif need_a:  # the latent is given: only the few columns of the action count
            grad_a = _grad_x(by_product, [w[:, split:] for w in weights], shared)
        of_weight = _grad_weight(by_product, x, weight, members) if need_weight else None
        of_gain = of_shift = of_bias = None
        if need_bias:
            of_gain, of_shift, of_bias = (
                _spread(of_parameters[:, part], gain, members) for part in range(3)
            )
        return grad_z, grad_a, of_weight, of_bias, of_gain, of_shift, None, None, None


def _normed_linear(
    x: th.Tensor,
    weight: th.Tensor,
    bias: th.Tensor,
    gain: th.Tensor,
    shift: th.Tensor,
    mask: th.Tensor | None,
    members: tuple[int, ...],
    norm: Norm,
    keep: bool,
) -> tuple[list[th.Tensor], th.Tensor, th.Tensor | None]:
    """Products before the norm, result, and statistics [Q', 2, B] if they are kept."""
    single, count = weight.dim() == 2, len(members)
    weights, biases = _of(weight, members, single), _of(bias, members, single)
    gains, shifts = _of(gain, members, single), _of(shift, members, single)
    rows, cols = x.shape[-2], weight.shape[-2]
    statistics = x.new_empty(count, 2, rows) if keep else None
    y = None if single and not keep else x.new_empty(count, rows, cols)
    products = []
    for i in range(count):
        product = linear_product(_rows_of(x, i), weights[i], biases[i])
        if y is None:
            y = product.unsqueeze(0)
        _norm_forward(
            product,
            None if mask is None else mask if single else mask[i],
            gains[i],
            shifts[i],
            y[i],
            None if statistics is None else statistics[i],
            norm,
        )
        if keep:
            products.append(product)
    assert y is not None
    return products, y[0] if single else y, statistics


def normed_linear(
    z: th.Tensor,
    a: th.Tensor | None,
    weight: th.Tensor,
    bias: th.Tensor,
    gain: th.Tensor,
    shift: th.Tensor,
    norm: Norm,
    mask: th.Tensor | None = None,
    members: tuple[int, ...] | None = None,
) -> th.Tensor:
    """activation(LayerNorm(mask * linear(concat(z, a)))), of one layer or of an ensemble's.

    :param z: [..., Z]; [B, Z] (shared) or [Q', B, Z] with an ensemble's weight
    :param a: the same leading axes, [..., A], or None
    :param weight: [out, Z + A] or [Q, out, Z + A]
    :param bias: [out] or [Q, out], like ``gain`` and ``shift``
    :param norm: the layer norm's settings and what follows
    :param mask: dropout's multiplier, of the product's shape
    :param members: Q' members of the ensemble to evaluate; all if None
    :return: [..., out] or [Q', B, out]
    """
    single = weight.dim() == 2
    leading = z.shape[:-1]
    if single:
        members = (0,)
        z = z.reshape(-1, z.shape[-1])
        a = None if a is None else a.reshape(-1, a.shape[-1])
    elif members is None:
        members = _everyone(weight)
    if _records_gradients(z, a, weight, bias, gain, shift):
        y = _NormedLinear.apply(z, a, weight, bias, gain, shift, mask, members, norm)
    else:
        x = z if a is None else th.cat([z, a], dim=-1)
        y = _normed_linear(x, weight, bias, gain, shift, mask, members, norm, keep=False)[1]
    return y.view(*leading, y.shape[-1]) if single else y  # type: ignore[no-any-return]


class _Linear(th.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: th.Tensor,
        weight: th.Tensor,
        bias: th.Tensor | None,
        members: tuple[int, ...],
    ) -> th.Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.members = members
        return _linear(x, weight, bias, members)

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        members, single = ctx.members, weight.dim() == 2
        grad = grads[0].contiguous()
        by_member = [grad] if single else list(grad.unbind(0))
        grad_x = of_weight = of_bias = None
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if need_x:
            weights = _of(weight, members, single)
            grad_x = _grad_x(by_member, weights, x.dim() == 2)
        if need_weight:
            of_weight = _grad_weight(by_member, x, weight, members)
        if need_bias:
            of_bias = _spread(th.stack([g.sum(0) for g in by_member]), bias, members)
        return grad_x, of_weight, of_bias, None


def _linear(
    x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None, members: tuple[int, ...]
) -> th.Tensor:
    if weight.dim() == 2:
        return linear_product(x, weight, bias)
    parts = [
        linear_product(_rows_of(x, i), weight[member], None if bias is None else bias[member])
        for i, member in enumerate(members)
    ]
    return th.stack(parts)


def linear(
    x: th.Tensor,
    weight: th.Tensor,
    bias: th.Tensor | None,
    members: tuple[int, ...] | None = None,
) -> th.Tensor:
    """x W^T + b, of one layer or of an ensemble's; see :func:`normed_linear` for the shapes."""
    single, leading = weight.dim() == 2, x.shape[:-1]
    if single:
        members = (0,)
        x = x.reshape(-1, x.shape[-1])
    elif members is None:
        members = _everyone(weight)
    if _records_gradients(x, weight, bias):
        y = _Linear.apply(x, weight, bias, members)
    else:
        y = _linear(x, weight, bias, members)
    return y.view(*leading, y.shape[-1]) if single else y  # type: ignore[no-any-return]


class _LayerNorm(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor, gain: th.Tensor, shift: th.Tensor, norm: Norm) -> th.Tensor:
        y = th.empty_like(x)
        statistics = x.new_empty(2, x.numel() // x.shape[-1])
        _norm_forward(x, None, gain, shift, y, statistics, norm)
        kept = y if norm.activation is Activation.SIMNORM else None
        ctx.save_for_backward(x, kept, gain, shift, statistics)
        ctx.norm = norm
        return y

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        x, y, gain, shift, statistics = ctx.saved_tensors
        parts = th.empty(3, x.shape[-1])
        grad = grads[0].contiguous()
        grad_x = _norm_backward(grad, x, None, y, gain, shift, statistics, parts, ctx.norm)
        return grad_x, parts[0], parts[1], None


def layer_norm(x: th.Tensor, gain: th.Tensor, shift: th.Tensor, norm: Norm) -> th.Tensor:
    """activation(LayerNorm(x)) over the last axis.

    :param x: [..., D]
    :param gain: [D], like ``shift``
    :param norm: settings and what follows
    """
    x = x.contiguous()
    if _records_gradients(x, gain, shift):
        return _LayerNorm.apply(x, gain, shift, norm)  # type: ignore[no-any-return]
    y = th.empty_like(x)
    _norm_forward(x, None, gain, shift, y, None, norm)
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
            _run(
                "two_hot_inverse_backward",
                grad,
                logits,
                bins,
                grad_logits,
                grad.numel(),
                logits.shape[-1],
                _threads(logits.numel()),
            )
        return grad_logits, None


def _two_hot_inverse_forward(logits: th.Tensor, bins: th.Tensor) -> th.Tensor:
    out = logits.new_empty(logits.shape[:-1])
    if out.numel():
        _run(
            "two_hot_inverse_forward",
            logits,
            bins,
            out,
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
            _run(
                "two_hot_cross_entropy_forward",
                logits,
                position,
                out,
                log_sum,
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
            _run(
                "two_hot_cross_entropy_backward",
                grad,
                logits,
                position,
                log_sum,
                grad_logits,
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
            _run(
                "gelu_sum_backward",
                grad,
                a,
                b,
                grad_x,
                a.numel() // a.shape[-1],
                a.shape[-1],
                ctx.distance,
                _threads(a.numel()),
            )
        return grad_x, grad_x, None


def _gelu_sum_forward(a: th.Tensor, b: th.Tensor, distance: int) -> th.Tensor:
    y = th.empty_like(a)
    if a.numel():
        _run(
            "gelu_sum_forward",
            a,
            b,
            y,
            a.numel() // a.shape[-1],
            a.shape[-1],
            distance,
            _threads(a.numel()),
        )
    return y


def _with_even_rows(x: th.Tensor) -> tuple[th.Tensor, int]:
    """x, or a copy if need be, and the elements from each row to the next.

    A cut of columns needs no copy.
    """
    even = x.stride(-1) == 1 and all(
        x.stride(axis - 1) == x.stride(axis) * x.shape[axis] for axis in range(1, x.dim() - 1)
    )
    if even and x.dim() > 1:
        return x, x.stride(-2)
    return x.contiguous(), x.shape[-1]


def gelu_sum(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    """GELU(a + b) in its tanh approximation.

    :param a: [..., D]
    :param b: [..., D], which may be a cut of columns
    """
    a = a.contiguous()
    b, distance = _with_even_rows(b)
    if _records_gradients(a, b):
        return _GeluSum.apply(a, b, distance)  # type: ignore[no-any-return]
    return _gelu_sum_forward(a, b, distance)


class _SelectiveScan(th.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        selection: th.Tensor,
        drive: th.Tensor,
        start: th.Tensor,
        alpha: th.Tensor,
        omega: th.Tensor,
        beta: th.Tensor,
        distance: int,
    ) -> th.Tensor:
        states = _selective_scan_forward(selection, drive, start, alpha, omega, beta, distance)
        ctx.save_for_backward(selection, drive, start, alpha, omega, beta, states)
        ctx.distance = distance
        return states

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        selection, drive, start, alpha, omega, beta, states = ctx.saved_tensors
        grad, steps, modes = grads[0].contiguous(), len(selection), len(alpha)
        grad_selection, grad_start = th.empty_like(selection), th.empty_like(start)
        grad_drive = th.empty_like(states)
        parameters = th.zeros(3, modes)
        threads = _threads(selection.numel())
        carry, sums = th.empty(threads, 2, modes), th.empty(threads, 3, modes)
        if selection.numel():
            _run(
                "selective_scan_backward",
                grad,
                selection,
                drive,
                start,
                alpha,
                omega,
                beta,
                states,
                grad_selection,
                grad_drive,
                grad_start,
                parameters,
                carry,
                sums,
                steps,
                selection.numel() // steps // modes,
                modes,
                ctx.distance,
                threads,
            )
        return grad_selection, grad_drive, grad_start, *parameters, None


def _selective_scan_forward(
    selection: th.Tensor,
    drive: th.Tensor,
    start: th.Tensor,
    alpha: th.Tensor,
    omega: th.Tensor,
    beta: th.Tensor,
    distance: int,
) -> th.Tensor:
    steps, modes = len(selection), len(alpha)
    states = selection.new_empty(*selection.shape[:-1], 2 * modes)
    if selection.numel():
        _run(
            "selective_scan_forward",
            selection,
            drive,
            start,
            alpha,
            omega,
            beta,
            states,
            steps,
            selection.numel() // steps // modes,
            modes,
            distance,
            _threads(selection.numel()),
        )
    return states


def selective_scan(
    selection: th.Tensor,
    drive: th.Tensor,
    start: th.Tensor,
    alpha: th.Tensor,
    omega: th.Tensor,
    beta: th.Tensor,
) -> th.Tensor:
    """x_{k+1} = Abar_k x_k + G_k b_k with step sizes clamp(softplus(beta + selection_k)).

    :param selection: [H, ..., P]
    :param drive: b by real and imaginary parts, [H, ..., 2P], which may be a cut of columns
    :param start: x_0, whose axes broadcast to those of a step, [..., 2P]
    :param alpha: decay rates > 0, [P]
    :param omega: angular frequencies, [P]
    :param beta: [P]
    :return: x_1..x_H, [H, ..., 2P]
    """
    selection = selection.contiguous()
    start = start.expand(drive.shape[1:]).contiguous()
    drive, distance = _with_even_rows(drive)
    if _records_gradients(selection, drive, start, alpha, omega, beta):
        return _SelectiveScan.apply(  # type: ignore[no-any-return]
            selection, drive, start, alpha, omega, beta, distance
        )
    return _selective_scan_forward(selection, drive, start, alpha, omega, beta, distance)
