"""The kernels as differentiable torch functions.

Every function here has a plain counterpart in :mod:`tdmpc2_sb3.layers`,
:mod:`tdmpc2_sb3.discrete_regression` or :mod:`tdmpc2_sb3.dynamics.ssm`; tests compare them.

Shapes: ``...`` any leading axes, B rows, Q members of an ensemble, K bins.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch as th

from tdmpc2_sb3.kernels.library import call, library
from tdmpc2_sb3.kernels.products import laid_out, product, product_threads

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
        call(
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
    call(
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


class Layer(NamedTuple):
    """A linear layer, with a layer norm behind it or without; or the same of Q networks.

    Shapes: weight [out, in], the others [out]; each with a leading axis [Q] for Q networks.
    """

    weight: th.Tensor
    bias: th.Tensor | None
    gain: th.Tensor | None = None
    shift: th.Tensor | None = None
    norm: Norm | None = None  # of a normed layer, which then has gain and shift

    def of(self, members: int | th.Tensor) -> Layer:
        """The layer of one of the Q networks, or of several by their indices [Q']."""
        vectors = (self.bias, self.gain, self.shift)
        bias, gain, shift = (each if each is None else each[members] for each in vectors)
        return Layer(self.weight[members], bias, gain, shift, self.norm)


class _Kept(NamedTuple):
    """What the gradients of one layer need."""

    x: th.Tensor  # input, [B, in]
    product: th.Tensor | None  # before the norm, [B, out]
    statistics: th.Tensor | None  # of the norm, [2, B]
    y: th.Tensor | None  # output, where it is a SimNorm, [B, out]


class _Gradients(NamedTuple):
    """Gradients by the parameters of one layer of one network."""

    weight: th.Tensor
    vectors: th.Tensor | None  # by gain, shift and bias, [3, out]; a linear layer's bias, [1, out]


def _forward(
    x: th.Tensor,
    layers: Sequence[Layer],
    mask: th.Tensor | None,
    out: th.Tensor | None,
    keep: bool,
) -> tuple[th.Tensor, list[_Kept]]:
    """Layers of one network in turn, [B, in] to [B, out]; the last one writes into ``out``."""
    rows, kept = len(x), []
    last = len(layers) - 1
    for position, (weight, bias, gain, shift, norm) in enumerate(layers):
        cols, depth = weight.shape
        into = out if position == last else None
        if norm is None:
            y = product(x, weight.t(), bias, out=into)
            if keep:
                kept.append(_Kept(x, None, None, None))
            x = y
            continue
        assert gain is not None
        assert shift is not None
        y = x.new_empty(rows, cols) if into is None else into
        before_norm = x.new_empty(rows, cols) if keep else y
        statistics = x.new_empty(2, rows) if keep else None
        packed = laid_out(weight.t(), rows, is_weight=True) if rows else None
        if packed is None:
            product(x, weight.t(), bias, out=before_norm)
            _norm_forward(before_norm, mask, gain, shift, y, statistics, norm)
        else:
            call(
                "normed_product",
                x,
                *x.stride(),
                packed,
                bias,
                mask,
                gain,
                shift,
                before_norm,
                y,
                statistics,
                rows,
                depth,
                cols,
                norm.eps,
                norm.activation,
                norm.simnorm_dim,
                product_threads(rows, depth, cols),
            )
        if keep:
            is_simnorm = norm.activation is Activation.SIMNORM
            kept.append(_Kept(x, before_norm, statistics, y if is_simnorm else None))
        x, mask = y, None  # the first layer's alone
    return x, kept


def _backward(
    grad: th.Tensor,
    layers: Sequence[Layer],
    kept: Sequence[_Kept],
    mask: th.Tensor | None,
    input_from: int | None,
    needs_parameters: bool,
    weights_into: Sequence[th.Tensor],
) -> tuple[th.Tensor | None, list[_Gradients]]:
    """Gradients of :func:`_forward`.

    :param grad: by the output, [B, out], contiguous
    :param layers: as in the forward pass
    :param kept: of the forward pass
    :param mask: as in the forward pass
    :param input_from: the input's column from which on its gradient is wanted; None for none
    :param needs_parameters: whether gradients by the parameters are wanted
    :param weights_into: where those by the weights are to be written; empty for new places
    :return: by the input's columns from ``input_from`` on; by the layers' parameters
    """
    gradients: list[_Gradients] = []
    for position in reversed(range(len(layers))):
        (weight, bias, gain, shift, norm), (x, before_norm, statistics, y) = (
            layers[position],
            kept[position],
        )
        vectors = None
        if norm is not None:
            assert before_norm is not None
            assert statistics is not None
            assert gain is not None
            assert shift is not None
            vectors = grad.new_empty(3, len(weight))
            grad = _norm_backward(
                grad,
                before_norm,
                mask if position == 0 else None,
                y,
                gain,
                shift,
                statistics,
                vectors,
                norm,
            )
        elif needs_parameters and bias is not None:
            vectors = grad.sum(0, keepdim=True)
        if needs_parameters:
            into = weights_into[position] if weights_into else None
            by_weight = product(grad.t(), x, out=into, is_weight=False)
            gradients.append(_Gradients(by_weight, vectors))
        if position:
            grad = product(grad, weight)
        elif input_from is not None:
            return product(grad, weight[:, input_from:]), gradients[::-1]
    return None, gradients[::-1]


_FIRST_PARAMETER = 5  # among the arguments of the node; four a layer


class _Networks(th.autograd.Function):
    """Layers in turn as one node of the graph: a node a layer would cost as much as its kernels."""

    @staticmethod
    def forward(
        ctx: Any,
        z: th.Tensor,
        a: th.Tensor | None,
        mask: th.Tensor | None,
        members: tuple[int, ...] | None,
        norms: tuple[Norm | None, ...],
        *parameters: th.Tensor | None,
    ) -> th.Tensor:
        y, kept = _evaluate(z, a, _layers_of(parameters, norms), mask, members, keep=True)
        ctx.members, ctx.norms = members, norms
        ctx.shapes = z.shape, None if a is None else a.shape
        ctx.save_for_backward(mask, *parameters, *itertools.chain.from_iterable(kept))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        members, norms, (z_shape, a_shape) = ctx.members, ctx.norms, ctx.shapes
        mask, *saved = ctx.saved_tensors
        depth = len(norms)
        layers = _layers_of(saved[: 4 * depth], norms)
        kept = [_Kept(*saved[i : i + 4]) for i in range(4 * depth, len(saved), 4)]
        networks = _networks_of(layers, members)
        need_z, need_a, *_ = ctx.needs_input_grad
        needs_parameters = any(ctx.needs_input_grad[_FIRST_PARAMETER:])
        input_from = 0 if need_z else z_shape[-1] if need_a else None
        grad = grads[0].reshape(len(networks), -1, grads[0].shape[-1]).contiguous()
        # Where all Q networks have a part, their gradients by weights go straight into one tensor.
        everyone = members == tuple(range(len(layers[0].weight)))
        whole = (
            [th.empty_like(layer.weight) for layer in layers]
            if everyone and needs_parameters
            else []
        )
        by_network: list[list[_Gradients]] = []
        by_input: th.Tensor | None = None
        for i, network in enumerate(networks):
            part, gradients = _backward(
                grad[i],
                network,
                kept[i * depth : (i + 1) * depth],
                _mask_of(mask, members, i),
                input_from,
                needs_parameters,
                [weight[i] for weight in whole],
            )
            by_network.append(gradients)
            by_input = part if by_input is None or part is None else by_input.add_(part)
        grad_z = grad_a = None
        if by_input is not None:
            if need_z:
                grad_z = by_input[:, : z_shape[-1]].reshape(z_shape)
            if need_a:
                grad_a = by_input[:, -a_shape[-1] :].reshape(a_shape)
        by_parameters: Sequence[th.Tensor | None] = [None] * (4 * depth)
        if needs_parameters:
            by_parameters = _by_parameters(layers, members, by_network, whole)
        return grad_z, grad_a, None, None, None, *by_parameters


def _layers_of(parameters: Sequence[Any], norms: Sequence[Norm | None]) -> list[Layer]:
    four = [parameters[4 * i : 4 * i + 4] for i in range(len(norms))]
    return [
        Layer(weight, bias, gain, shift, norm)
        for (weight, bias, gain, shift), norm in zip(four, norms, strict=True)
    ]


def _networks_of(
    layers: Sequence[Layer], members: tuple[int, ...] | None
) -> Sequence[Sequence[Layer]]:
    if members is None:
        return [layers]
    return [[layer.of(member) for layer in layers] for member in members]


def _mask_of(mask: th.Tensor | None, members: tuple[int, ...] | None, i: int) -> th.Tensor | None:
    return mask if mask is None or members is None else mask[i]


def _by_parameters(
    layers: Sequence[Layer],
    members: tuple[int, ...] | None,
    by_network: Sequence[Sequence[_Gradients]],
    whole: Sequence[th.Tensor],
) -> list[th.Tensor | None]:
    """Gradients by weight, bias, gain and shift of each layer, None where it has none."""

    def merged(parts: Sequence[th.Tensor], layer: Layer) -> th.Tensor:
        if members is None:
            return parts[0]
        stacked = th.stack(tuple(parts))
        if whole:
            return stacked
        # A member that is asked for twice has its gradients added up; one that is not has zeros.
        total = stacked.new_zeros(len(layer.weight), *stacked.shape[1:])
        return total.index_add_(0, th.tensor(members), stacked)

    result: list[th.Tensor | None] = []
    for position, layer in enumerate(layers):
        gradients = [network[position] for network in by_network]
        weight = whole[position] if whole else merged([each.weight for each in gradients], layer)
        names = ("gain", "shift", "bias") if layer.norm is not None else ("bias",)
        vectors: dict[str, th.Tensor] = {}
        if gradients[0].vectors is not None:
            rows = zip(
                *(each.vectors for each in gradients if each.vectors is not None), strict=True
            )
            vectors = {name: merged(row, layer) for name, row in zip(names, rows, strict=True)}
        result += [weight, vectors.get("bias"), vectors.get("gain"), vectors.get("shift")]
    return result


def _evaluate(
    z: th.Tensor,
    a: th.Tensor | None,
    layers: Sequence[Layer],
    mask: th.Tensor | None,
    members: tuple[int, ...] | None,
    keep: bool,
) -> tuple[th.Tensor, list[_Kept]]:
    """:func:`networks`, and what the gradients need, network after network."""
    x = z if a is None else th.cat([z, a], dim=-1)
    rows = x.reshape(-1, x.shape[-1])
    cols = layers[-1].weight.shape[-2]
    if members is None:
        y, kept = _forward(rows, layers, mask, None, keep)
        return y.view(*x.shape[:-1], cols), kept
    y, kept = x.new_empty(len(members), len(rows), cols), []
    for i, network in enumerate(_networks_of(layers, members)):
        kept += _forward(rows, network, _mask_of(mask, members, i), y[i], keep)[1]
    return y.view(len(members), *x.shape[:-1], cols), kept


def networks(
    z: th.Tensor,
    a: th.Tensor | None,
    layers: Sequence[Layer],
    mask: th.Tensor | None = None,
    members: tuple[int, ...] | None = None,
) -> th.Tensor:
    """Layers in turn on concat(z, a), of one network or of chosen ones of Q.

    :param z: [..., Z]
    :param a: the same leading axes, [..., A], or None
    :param layers: of one network, or of Q where members are given
    :param mask: dropout's multiplier between the first product and its norm, [B, out] or
        [Q', B, out] for B rows in ``...``
    :param members: the Q' networks to evaluate; None if the layers are of one
    :return: [..., out] or [Q', ..., out]
    """
    parameters = [each for layer in layers for each in layer[:4]]
    if _records_gradients(z, a, *parameters):
        norms = tuple(layer.norm for layer in layers)
        return _Networks.apply(z, a, mask, members, norms, *parameters)  # type: ignore[no-any-return]
    return _evaluate(z, a, layers, mask, members, keep=False)[0]


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
            call(
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
        call(
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
            call(
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
            call(
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
        call(
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
            call(
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
        call(
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
