"""Building blocks of the world model: Mish, SimNorm, normed linear layers, MLPs and the Q ensemble.

On a CPU the elementwise part of these layers costs as much as their matrix products if it is left
to the stock kernels. There :mod:`tdmpc2_sb3.model.operations` has it done in one pass. Where that
cannot be it is written here from plain arithmetic with a single transcendental function, with
hand-written gradients in eager mode; a compiler sees the same plain arithmetic.

Shapes: ``...`` any leading axes, B rows, Q ensemble members, V simplex size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import nn

from tdmpc2_sb3.kernels import Activation, Dropped, Layer, Norm, layers_made_once
from tdmpc2_sb3.model import operations
from tdmpc2_sb3.model.operations import linear

INIT_STD = 0.02
INIT_CUT = 2.0
SIMNORM_CLAMP = 120.0  # 2^120 and sums of 64 of it stay finite; a layer norm's output is below
LOG2_E = math.log2(math.e)
# Elements worked on at once: the intermediate results of more would fall out of a core's cache.
CHUNK = 65536
CHUNK_FROM = 4 * CHUNK


def _chunks(*tensors: th.Tensor) -> Iterator[tuple[th.Tensor, ...]]:
    """Flat pieces of equally shaped contiguous tensors, small enough for a core's cache."""
    if tensors[0].numel() < CHUNK_FROM:
        yield tensors
        return
    yield from zip(*(tensor.view(-1).split(CHUNK) for tensor in tensors), strict=True)


def _mish_into(x: th.Tensor, y: th.Tensor) -> None:
    # With r = sigmoid(-x): tanh(softplus(x)) = (1 - r^2) / (1 + r^2) = 2 / (1 + r^2) - 1.
    th.neg(x, out=y)
    r = th.sigmoid(y)
    y.addcdiv_(x, r.mul_(r).add_(1.0), value=2.0)


def _mish_and_slope_into(x: th.Tensor, y: th.Tensor, slope: th.Tensor) -> None:
    """mish(x) = x t and its derivative t + 4 x r^2 (1 - r) / (1 + r^2)^2."""
    r = th.neg(x, out=slope).sigmoid_()
    r2 = r * r
    q = (r2 + 1.0).reciprocal_()
    t = th.mul(q, 2.0, out=y).sub_(1.0)
    r2.addcmul_(r2, r, value=-1.0).mul_(q).mul_(q).mul_(x)
    th.add(t, r2, alpha=4.0, out=slope)
    y.mul_(x)


class _Mish(th.autograd.Function):
    """Keeps the derivative instead of the input: the backward pass is one product."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        x = x.contiguous()
        y, slope = th.empty_like(x), th.empty_like(x)
        for pieces in _chunks(x, y, slope):
            _mish_and_slope_into(*pieces)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> th.Tensor:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope


def _use_plain_arithmetic(x: th.Tensor) -> bool:
    """Whether a compiler or double precision (gradient checks) should see the bare formula."""
    return th.compiler.is_compiling() or x.dtype != th.float32


def mish(x: th.Tensor) -> th.Tensor:
    """x tanh(softplus(x)) (Misra, arXiv:1908.08681), elementwise.

    On a CPU from one sigmoid, torch's cheapest transcendental function there; nothing overflows.
    """
    if x.device.type != "cpu":
        return F.mish(x)  # one fused kernel there
    if _use_plain_arithmetic(x):
        r2 = th.sigmoid(-x).square()
        return x * (1.0 - r2) / (1.0 + r2)
    if th.is_grad_enabled() and x.requires_grad:
        return _Mish.apply(x)  # type: ignore[no-any-return]
    x = x.contiguous()
    y = th.empty_like(x)
    for pieces in _chunks(x, y):
        _mish_into(*pieces)
    return y


class _SimNorm(th.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: th.Tensor, simnorm_dim: int) -> th.Tensor:
        y = _simnorm_forward(x, simnorm_dim)
        ctx.save_for_backward(y)
        ctx.simnorm_dim = simnorm_dim
        return y

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor, None]:
        (y,) = ctx.saved_tensors
        groups = y.view(*y.shape[:-1], -1, ctx.simnorm_dim)  # [..., Z/V, V]
        weighted = (grads[0] * y).view(groups.shape)
        # d softmax: y (g - sum(g y))
        grad = th.addcmul(weighted, groups, weighted.sum(-1, keepdim=True), value=-1.0)
        return grad.view_as(y), None


def _simnorm_forward(x: th.Tensor, simnorm_dim: int) -> th.Tensor:
    weights = th.exp2((x * LOG2_E).clamp_(-SIMNORM_CLAMP, SIMNORM_CLAMP))  # exp2 is cheaper
    groups = weights.view(*x.shape[:-1], -1, simnorm_dim)  # [..., Z/V, V]
    return groups.div(groups.sum(-1, keepdim=True)).view(x.shape)


def simnorm(x: th.Tensor, simnorm_dim: int) -> th.Tensor:
    """Softmax over consecutive groups of V entries: simplicial normalisation.

    :param x: [..., Z], Z a multiple of V
    :param simnorm_dim: V, entries a group
    :return: [..., Z]; every group is non-negative and sums to 1
    """
    if x.device.type != "cpu":
        return F.softmax(x.view(*x.shape[:-1], -1, simnorm_dim), dim=-1).view(x.shape)
    if th.is_grad_enabled() and x.requires_grad and not _use_plain_arithmetic(x):
        return _SimNorm.apply(x.contiguous(), simnorm_dim)  # type: ignore[no-any-return]
    return _simnorm_forward(x.contiguous(), simnorm_dim)


class SimNorm(nn.Module):
    """:func:`simnorm` as a module without parameters (TD-MPC2, section 3.1).

    :param simnorm_dim: V, entries a group
    """

    def __init__(self, simnorm_dim: int):
        super().__init__()
        self.simnorm_dim = simnorm_dim

    def forward(self, x: th.Tensor) -> th.Tensor:
        return simnorm(x, self.simnorm_dim)

    def extra_repr(self) -> str:
        return f"simnorm_dim={self.simnorm_dim}"


class Mish(nn.Module):
    """:func:`mish` as a module."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return mish(x)


def init_linear(weight: th.Tensor, bias: th.Tensor) -> None:
    """Truncated normal weights of standard deviation 0.02, zero biases, in place."""
    nn.init.trunc_normal_(weight, std=INIT_STD, a=-INIT_CUT, b=INIT_CUT)
    nn.init.zeros_(bias)


class NormedLinear(nn.Module):
    """Linear -> LayerNorm -> activation.

    The state dict holds ``weight``, ``bias``, ``ln.weight`` and ``ln.bias``, as the authors'
    checkpoints do.

    :param in_features: size of the input
    :param out_features: size of the output
    :param activation: module applied last; Mish if None
    """

    def __init__(self, in_features: int, out_features: int, activation: nn.Module | None = None):
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(th.empty(out_features, in_features, dtype=th.float32))
        self.bias = nn.Parameter(th.empty(out_features, dtype=th.float32))
        self.ln = nn.LayerNorm(out_features, dtype=th.float32)
        self.activation = Mish() if activation is None else activation
        init_linear(self.weight, self.bias)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return operations.network(self._plain, self.as_kernel, x)

    def _plain(self, x: th.Tensor) -> th.Tensor:
        return self._finished(F.linear(x, self.weight, self.bias))

    def _finished(self, product: th.Tensor) -> th.Tensor:
        return self.activation(self.ln(product))  # type: ignore[no-any-return]

    def forward_pair(self, z: th.Tensor, a: th.Tensor) -> th.Tensor:
        """The layer on the concatenation of two inputs, the first with fewer rows (one latent,
        many actions), whose product is taken once.

        :param z: [..., Z]
        :param a: batch axes to which those of z broadcast, [..., A]
        :return: [..., out]
        """
        product = broadcast_linear(z, a, self.weight, self.bias)
        return operations.normed(self._finished, self._norm(), product, self.ln)

    def _norm(self) -> Norm | None:
        if type(self) is not NormedLinear or type(self.ln) is not nn.LayerNorm:
            return None
        if type(self.activation) is SimNorm:
            return Norm(Activation.SIMNORM, self.activation.simnorm_dim, self.ln.eps)
        return Norm(Activation.MISH, eps=self.ln.eps) if type(self.activation) is Mish else None

    def as_kernel(self) -> list[Layer] | None:
        """The layer as the CPU kernels take it; None if it may be another one: a subclass, or a
        part of another class."""
        norm = self._norm()
        if norm is None:
            return None
        return [Layer(self.weight, self.bias, self.ln.weight, self.ln.bias, norm)]


def broadcast_linear(z: th.Tensor, a: th.Tensor, weight: th.Tensor, bias: th.Tensor) -> th.Tensor:
    """``linear(concat(z, a))`` where z has fewer rows than a: its product is taken once.

    :param z: [..., Z]
    :param a: [..., A], batch axes to which those of z broadcast
    :param weight: [out, Z + A]
    :param bias: [out]
    """
    split = z.shape[-1]
    from_latent = F.linear(z, weight[:, :split], bias)
    if from_latent.numel() == from_latent.shape[-1]:  # a single latent is one more bias
        return F.linear(a, weight[:, split:], from_latent.view(-1))
    return F.linear(a, weight[:, split:]) + from_latent


class FastLinear(nn.Linear):
    """``nn.Linear`` by :func:`linear`, in float32 whatever torch's default is."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias, dtype=th.float32)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return linear(x, self.weight, self.bias)

    def as_kernel(self) -> list[Layer]:
        """The layer as the CPU kernels take it."""
        return [Layer(self.weight, self.bias)]


class Linear(FastLinear):
    """``nn.Linear`` with the paper's initialisation."""

    def reset_parameters(self) -> None:
        init_linear(self.weight, self.bias)


class MLP(nn.Sequential):
    """Normed Mish layers followed by a plain linear layer, or a normed one if activated.

    :param in_features: size of the input
    :param hidden: widths of the normed Mish layers, at least one
    :param out_features: size of the output
    :param last_activation: if given, the last layer is normed and activated by it
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        last_activation: nn.Module | None = None,
    ):
        widths = [in_features, *hidden]
        layers: list[nn.Module] = [
            NormedLinear(width_in, width_out) for width_in, width_out in itertools.pairwise(widths)
        ]
        if last_activation is None:
            layers.append(Linear(widths[-1], out_features))
        else:
            layers.append(NormedLinear(widths[-1], out_features, last_activation))
        super().__init__(*layers)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """[..., in] to [..., out]."""
        return operations.network(super().forward, self._layers, x)

    def forward_pair(self, z: th.Tensor, a: th.Tensor) -> th.Tensor:
        """The network on the concatenation of two inputs whose batch axes may broadcast.

        :param z: [..., Z]
        :param a: [..., A]
        """
        if z.shape[:-1] == a.shape[:-1]:
            return operations.network(super().forward, self._layers, z, a)
        first = self[0].forward_pair(z, a)  # type: ignore[operator]
        return operations.network(self._after_first, self._layers_after_first, first)

    def _after_first(self, x: th.Tensor) -> th.Tensor:
        for layer in itertools.islice(self, 1, None):
            x = layer(x)
        return x

    def as_kernel(self) -> Sequence[Layer] | None:
        """The layers as the CPU kernels take them; None if they may be others: a subclass, or
        layers of another class."""
        return self._layers() if type(self) is MLP else None

    def _layers(self, start: int = 0) -> Sequence[Layer] | None:
        """From that one on."""
        if not all(
            type(each) is Linear or (type(each) is NormedLinear and each._norm() is not None)
            for each in self
        ):
            return None

        def make() -> list[Layer]:
            found = (each.as_kernel() for each in itertools.islice(self, start, None))  # type: ignore[operator]
            return [layer for (layer,) in found]

        return layers_made_once((self, start), make)

    def _layers_after_first(self) -> Sequence[Layer] | None:
        return self._layers(1)


class EnsembleLayer(nn.Module):
    """The same layer of every member: weights stacked along a leading axis.

    :param num_members: Q
    :param in_features: size of the input
    :param out_features: size of the output
    :param normed: whether LayerNorm and Mish follow
    """

    def __init__(self, num_members: int, in_features: int, out_features: int, normed: bool):
        super().__init__()
        weight_shape = num_members, out_features, in_features
        self.weight = nn.Parameter(th.empty(weight_shape, dtype=th.float32))
        self.bias = nn.Parameter(th.empty(num_members, out_features, dtype=th.float32))
        self.ln: nn.ParameterDict | None = None
        if normed:
            self.ln = nn.ParameterDict(
                {
                    "weight": nn.Parameter(th.ones_like(self.bias)),
                    "bias": nn.Parameter(th.zeros_like(self.bias)),
                }
            )
        init_linear(self.weight, self.bias)

    def forward(
        self,
        x: th.Tensor,
        members: th.Tensor | None = None,
        dropped: Dropped | None = None,
        frozen: bool = False,
    ) -> th.Tensor:
        """Outputs of the chosen members.

        :param x: [B, in], shared by the members, or [Q', B, in]
        :param members: indices of the Q' members to evaluate; all if None
        :param dropped: dropout between the product, [Q', B, out], and LayerNorm
        :param frozen: whether the parameters' own gradients are not wanted
        :return: [Q', B, out]
        """
        layer = self.as_kernel()
        layer = layer if members is None else layer.of(members)
        weight, bias, gain, shift, *_ = layer.detached() if frozen else layer
        assert bias is not None
        if x.dim() == 2:
            x = x.expand(weight.shape[0], *x.shape)
        y = th.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))  # [Q', B, out]
        if dropped is not None:
            y = y * dropped.mask()
        if gain is None or shift is None:
            return y
        y = F.layer_norm(y, y.shape[-1:], eps=Norm().eps)
        return mish(th.addcmul(shift.unsqueeze(1), y, gain.unsqueeze(1)))

    def as_kernel(self) -> Layer:
        """The layer of all members as the CPU kernels take it."""
        if self.ln is None:
            return Layer(self.weight, self.bias)
        gain, shift = self.ln["weight"], self.ln["bias"]
        return Layer(self.weight, self.bias, gain, shift, Norm(Activation.MISH))


class QEnsemble(nn.Module):
    """Q heads with stacked weights, so that any subset is a few batched products.

    :param num_q: Q, number of heads
    :param in_features: Z + A
    :param hidden_dim: width of the two hidden layers
    :param num_bins: K, size of the output
    :param dropout: rate on the first layer, applied through what :meth:`forward` is given
    """

    def __init__(
        self, num_q: int, in_features: int, hidden_dim: int, num_bins: int, dropout: float
    ):
        super().__init__()
        self.num_q = num_q
        self.hidden_dim = hidden_dim
        self.dropout = dropout
        self.layers = nn.ModuleList(
            [
                EnsembleLayer(num_q, in_features, hidden_dim, normed=True),
                EnsembleLayer(num_q, hidden_dim, hidden_dim, normed=True),
                EnsembleLayer(num_q, hidden_dim, num_bins, normed=False),
            ]
        )
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]

    def forward(
        self,
        z: th.Tensor,
        a: th.Tensor,
        members: th.Tensor | None = None,
        dropped: Dropped | None = None,
        frozen: bool = False,
    ) -> th.Tensor:
        """Logits of the chosen heads.

        :param z: [..., Z]
        :param a: [..., A], the same leading axes
        :param members: indices of the heads to evaluate, [Q']; all if None
        :param dropped: from :meth:`sample_dropout`; None in evaluation
        :param frozen: whether only the gradients by z and a are wanted
        :return: [Q', ..., K]
        """

        def plain(x: th.Tensor) -> th.Tensor:
            first, second, last = self.layers
            y = first(x.reshape(-1, x.shape[-1]), members, dropped, frozen)
            y = second(y, members, frozen=frozen)
            y = last(y, members, frozen=frozen)  # [Q', B, K]
            return y.view(y.shape[0], *x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]

        chosen = range(self.num_q) if members is None else members
        return operations.ensemble(plain, self._layers, z, a, chosen, dropped, frozen)

    def as_kernel(self) -> Sequence[Layer] | None:
        """The layers of all heads as the CPU kernels take them; None if they may be others: a
        subclass, or layers of another class."""
        return self._layers() if type(self) is QEnsemble else None

    def _layers(self) -> Sequence[Layer] | None:
        if not all(type(each) is EnsembleLayer for each in self.layers):
            return None

        def make() -> list[Layer]:
            return [layer.as_kernel() for layer in self.layers]  # type: ignore[operator]

        return layers_made_once(self, make)

    def sample_dropout(
        self, num_members: int, num_rows: int, generator: th.Generator
    ) -> Dropped | None:
        """Dropout of the first layer, [Q', B, hidden]; None at rate 0."""
        if self.dropout == 0.0:
            return None
        shape = (num_members, num_rows, self.hidden_dim)
        # Drops are rare, so the steps from one to the next are drawn, not every element. Ten
        # deviations more of them than expected never run out.
        expected = math.prod(shape) * self.dropout
        count = int(expected + 10.0 * math.sqrt(expected) + 10.0)
        # Geometric by its inverse distribution: a third of the time of torch's geometric_.
        device = generator.device
        uniform = th.rand(count, generator=generator, device=device, dtype=th.float32)  # [0, 1)
        logarithm = uniform.neg_().add_(1.0).log_()
        steps = logarithm.mul_(1.0 / math.log1p(-self.dropout)).add_(1.0).long()
        return Dropped(steps.cumsum(0).sub_(1), 1.0 - self.dropout, shape)
