"""The kernels as differentiable torch functions.

Every function here has a plain counterpart in :mod:`tdmpc2_sb3.model.layers`,
:mod:`tdmpc2_sb3.model.discrete_regression`, :mod:`tdmpc2_sb3.model.dynamics.ssm` or
:mod:`tdmpc2_sb3.losses`; tests compare them.

Shapes: ``...`` any leading axes, B rows, Q members of an ensemble, K bins.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch as th

from tdmpc2_sb3.kernels.interface import ACTIVATION_MISH, ACTIVATION_NONE, ACTIVATION_SIMNORM
from tdmpc2_sb3.kernels.library import call, library

PARALLEL_FROM = 32768  # elements; waking a second thread costs more than fewer would save
_COST_OF_SQUASHING = 32  # elements' worth: two tanh, an exponential and a logarithm


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


def usable(x: th.Tensor) -> bool:
    """Whether the kernels can work on this tensor here and now."""
    return (
        x.dtype is th.float32
        and x.is_cpu
        and not th.compiler.is_compiling()
        and library() is not None
    )


def _threads(num_elements: int) -> int:
    return th.get_num_threads() if num_elements >= PARALLEL_FROM else 1


def records_gradients(*tensors: th.Tensor | None) -> bool:
    return th.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


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
            _threads(x.numel()),
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
    threads = _threads(x.numel())
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
            _threads(logits.numel()),
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
            _threads(logits.numel()),
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
        _threads(logits.numel()),
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
        _threads(x.numel()),
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
    by_logits = th.empty_like(logits)
    arrays = logits, terminations, valid, loss, by_logits
    call("termination_loss", *arrays, logits.numel(), terminations.numel(), scale)
    return by_logits


def zeros(like: th.Tensor, *shape: int) -> th.Tensor:
    """An array of zeros."""
    x = like.new_empty(shape)
    clear_(x)
    return x


def clear_(x: th.Tensor) -> None:
    """``x.zero_()`` of a contiguous x."""
    call("clear_array", x, x.numel())


def copy_(x: th.Tensor, to: th.Tensor) -> None:
    """``to.copy_(x)`` of arrays of one shape, of which each may be a cut of columns."""
    x_row, to_row, cols = _even_rows(x), _even_rows(to), x.shape[-1]
    assert x_row, "rows lie at uneven distances"
    assert to_row, "rows lie at uneven distances"
    call("copy_rows", x, x_row, to, to_row, x.numel() // cols, cols, _threads(x.numel()))


def join(parts: Sequence[th.Tensor], dim: int = -1) -> th.Tensor:
    """``th.cat(parts, dim)`` of parts that may be cuts of columns.

    :param dim: the last axis, or the first one of contiguous parts
    """
    if not usable(parts[0]):
        return th.cat(list(parts), dim)
    sizes = [part.shape[dim] for part in parts]
    shape = list(parts[0].shape)
    shape[dim] = sum(sizes)
    joined = parts[0].new_empty(shape)
    for part, place in zip(parts, joined.split(sizes, dim), strict=True):
        copy_(part, place)
    return joined


def add(a: th.Tensor, b: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
    """a + b of contiguous arrays.

    :param a: [..., D]
    :param b: whose axes are the last ones of a
    :param y: where the sum is written, which may be a; made anew if None
    """
    if y is None:
        y = th.empty_like(a)
    cols = a.shape[-1]
    sizes = a.numel() // cols, b.numel() // cols, cols
    call("add_rows", a, b, y, *sizes, _threads(a.numel()))
    return y


def exponential(x: th.Tensor, factors: th.Tensor | None = None, added: float = 0.0) -> th.Tensor:
    """factors e^x + added of contiguous arrays of one shape; without factors these are 1."""
    y = th.empty_like(x)
    call("exponential", x, factors, added, y, x.numel())
    return y


def least(values: th.Tensor) -> th.Tensor:
    """``values.amin(0)`` of contiguous values, [Q', ...] to [...]."""
    out = values.new_empty(values.shape[1:])
    call("least_values", values, out, len(values), out.numel())
    return out


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


class PolicyObjective(NamedTuple):
    """The policy prior's loss, what is logged about it, and its gradients."""

    total: th.Tensor  # []
    entropy: th.Tensor  # mean of -log pi, []
    scaled_entropy: th.Tensor  # mean, []
    scale: th.Tensor  # S after its update, []
    by_values: th.Tensor  # [Q', B]
    by_entropy: th.Tensor  # by the scaled entropies, [B]


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
    by_values, by_entropy = th.empty_like(values), th.empty_like(weights)
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
        by_values,
        by_entropy,
        out,
        values.new_empty(starts),
        *values.shape,
        starts,
    )
    total, entropy, scaled_entropy, new_scale = out
    return PolicyObjective(total, entropy, scaled_entropy, new_scale, by_values, by_entropy)


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
            _threads(_COST_OF_SQUASHING * noise.numel()),
        )

    def backward(self, by_actions: th.Tensor, by_entropy: th.Tensor) -> th.Tensor:
        """Gradients by the moments, [B, 2 A].

        :param by_actions: contiguous, [B, A]
        :param by_entropy: by the scaled entropy, contiguous, [B]
        """
        rows, action_dim = self._sizes
        by_moments = by_actions.new_empty(rows, 2 * action_dim)
        call(
            "policy_sample_backward",
            self._noise,
            self.log_prob,
            self._kept,
            by_actions,
            by_entropy,
            by_moments,
            rows,
            action_dim,
            self._squashed,
            _threads(by_actions.numel()),
        )
        return by_moments


class _GeluSum(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: th.Tensor, b: th.Tensor) -> th.Tensor:
        ctx.save_for_backward(a, b)
        return _gelu_sum_forward(a, b)

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        grad_x = gelu_sum_backward(grads[0], *ctx.saved_tensors)
        return grad_x, grad_x


def gelu_sum_backward(grad: th.Tensor, a: th.Tensor, b: th.Tensor) -> th.Tensor:
    """Gradients of :func:`gelu_sum` by a, and by b.

    :param grad: by its result, [..., D]
    :param a: contiguous, [..., D]
    :param b: [..., D]
    """
    grad, grad_x = grad.contiguous(), th.empty_like(a)
    b, distance = _with_even_rows(b)
    if grad.numel():
        call(
            "gelu_sum_backward",
            grad,
            a,
            b,
            grad_x,
            a.numel() // a.shape[-1],
            a.shape[-1],
            distance,
            _threads(a.numel()),
        )
    return grad_x


def _gelu_sum_forward(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    y = th.empty_like(a)
    b, distance = _with_even_rows(b)
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


def _even_rows(x: th.Tensor) -> int:
    """The elements from each row to the next; 0 if that differs, or numbers do not stand side by
    side in a row."""
    if x.stride(-1) != 1:
        return 0
    axes = [axis for axis in range(x.dim() - 1) if x.shape[axis] > 1]
    even = all(
        x.stride(outer) == x.stride(inner) * x.shape[inner]
        for outer, inner in itertools.pairwise(axes)
    )
    if not axes:
        return x.shape[-1]
    return x.stride(axes[-1]) if even else 0


def _with_even_rows(x: th.Tensor) -> tuple[th.Tensor, int]:
    """x, or a copy if need be, and the elements from each row to the next.

    A cut of columns needs no copy.
    """
    distance = _even_rows(x)
    return (x, distance) if distance else (x.contiguous(), x.shape[-1])


def gelu_sum(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    """GELU(a + b) in its tanh approximation.

    :param a: [..., D]
    :param b: [..., D], which may be a cut of columns
    """
    a = a.contiguous()
    if records_gradients(a, b):
        return _GeluSum.apply(a, b)  # type: ignore[no-any-return]
    return _gelu_sum_forward(a, b)


class Scan(NamedTuple):
    """What :func:`selective_scan` reads; contiguous but for the drive."""

    selection: th.Tensor  # [H, ..., P]
    drive: th.Tensor  # [H, ..., 2P]
    start: th.Tensor  # [..., 2P]
    alpha: th.Tensor  # [P]
    omega: th.Tensor  # [P]
    beta: th.Tensor  # [P]

    def sizes(self) -> tuple[int, int, int]:
        """H, rows of a step, P."""
        steps, modes = len(self.selection), len(self.alpha)
        return steps, self.selection.numel() // steps // modes, modes


class _SelectiveScan(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: th.Tensor) -> th.Tensor:
        states = _selective_scan_forward(Scan(*inputs))
        ctx.save_for_backward(*inputs, states)
        return states

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        *inputs, states = ctx.saved_tensors
        by_inputs = selective_scan_backward(grads[0], Scan(*inputs), states)
        return *by_inputs[:3], *by_inputs[3]


class ScanGradients(NamedTuple):
    """Gradients of :func:`selective_scan` by its inputs."""

    selection: th.Tensor  # [H, ..., P]
    drive: th.Tensor  # [H, ..., 2P]
    start: th.Tensor  # [..., 2P]
    parameters: th.Tensor  # alpha, omega and beta, [3, P]


def selective_scan_backward(grad: th.Tensor, scan: Scan, states: th.Tensor) -> ScanGradients:
    """
    :param grad: by the states, [H, ..., 2P]
    :param scan: what :func:`selective_scan` read
    :param states: its result
    """
    drive, distance = _with_even_rows(scan.drive)
    grad, modes = grad.contiguous(), len(scan.alpha)
    grad_selection, grad_start = th.empty_like(scan.selection), th.empty_like(scan.start)
    grad_drive = th.empty_like(states)
    parameters = zeros(states, 3, modes)
    threads = _threads(scan.selection.numel())
    carry, sums = grad.new_empty(threads, 2, modes), grad.new_empty(threads, 3, modes)
    if scan.selection.numel():
        call(
            "selective_scan_backward",
            grad,
            *scan._replace(drive=drive),
            states,
            grad_selection,
            grad_drive,
            grad_start,
            parameters,
            carry,
            sums,
            *scan.sizes(),
            distance,
            threads,
        )
    return ScanGradients(grad_selection, grad_drive, grad_start, parameters)


def _selective_scan_forward(scan: Scan) -> th.Tensor:
    drive, distance = _with_even_rows(scan.drive)
    selection = scan.selection
    states = selection.new_empty(*selection.shape[:-1], 2 * len(scan.alpha))
    if selection.numel():
        call(
            "selective_scan_forward",
            *scan._replace(drive=drive),
            states,
            *scan.sizes(),
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
    scan = Scan(selection, drive, start, alpha, omega, beta)
    if records_gradients(*scan):
        return _SelectiveScan.apply(*scan)  # type: ignore[no-any-return]
    return _selective_scan_forward(scan)
