"""Whole networks, layer after layer, as one differentiable function.

``kernels.c`` evaluates them in one call where it multiplies matrices itself
(:mod:`tdmpc2_sb3.kernels.products`); elsewhere torch multiplies and the norms are kernels. Either
way they are one node of the graph: a node a layer would cost as much as its kernels.

Shapes: ``...`` any leading axes, B rows, Q networks of an ensemble, Q' of them evaluated.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch as th

from tdmpc2_sb3.kernels.arguments import (
    Dropped,
    Layer,
    NetworkArguments,
    arguments_of,
    usable_layers,
)
from tdmpc2_sb3.kernels.conditions import records_gradients
from tdmpc2_sb3.kernels.library import addresses, call
from tdmpc2_sb3.kernels.norms import norm_backward, norm_forward
from tdmpc2_sb3.kernels.products import product_threads


class Gradients(NamedTuple):
    """Gradients by the parameters of one layer, each with an axis [Q'] in front if it is of Q."""

    weight: th.Tensor  # [out, in]
    bias: th.Tensor  # [out]
    gain: th.Tensor  # [out]
    shift: th.Tensor  # [out]


class GradientRoom:
    """Where ``kernels.c`` writes the gradients by the parameters of one network, or of Q'.

    :param layers: of one network, or of Q
    :param count: Q'
    :param of_one: whether the gradients have no axis [Q']
    """

    def __init__(self, layers: Sequence[Layer], count: int, of_one: bool):
        sizes = [layer.weight.shape[-2:] for layer in layers]
        lengths = [count * cols * (depth + 3) for cols, depth in sizes]
        self.whole = layers[0].weight.new_empty(sum(lengths))  # zeros where there is no norm
        self._arrays = self.whole.split(lengths)  # a layer each
        self.gradients: list[Gradients] = []
        for array, (cols, depth) in zip(self._arrays, sizes, strict=True):
            weights, gains, shifts, biases = array.split(
                [count * cols * depth, count * cols, count * cols, count * cols]
            )
            if of_one:
                vectors = [biases, gains, shifts]
                self.gradients.append(Gradients(weights.view(cols, depth), *vectors))
            else:
                vectors = [each.view(count, cols) for each in (biases, gains, shifts)]
                self.gradients.append(Gradients(weights.view(count, cols, depth), *vectors))

    def addresses(self) -> ctypes.Array[Any]:
        """Where the gradients of each layer stand."""
        return addresses(self._arrays)


def each_parameter(
    layers: Sequence[Layer], gradients: Sequence[Gradients]
) -> Iterator[tuple[th.Tensor | None, th.Tensor]]:
    """The parameters of all layers in turn, each with its gradient; None where there is none."""
    for layer, of_layer in zip(layers, gradients, strict=True):
        yield from zip(layer[:4], of_layer, strict=True)


class Evaluation:
    """The chosen networks on rows x: their outputs, and what the gradients need.

    :param x: [B, in]
    :param layers: of one network, or of Q
    :param dropped: dropout behind the first product, which has a norm; None for none
    :param members: the Q' networks of Q; None if the layers are of one
    """

    def __init__(
        self,
        x: th.Tensor,
        layers: Sequence[Layer],
        dropped: Dropped | None,
        members: tuple[int, ...] | None,
    ):
        self.x = x
        self.layers = layers
        self.dropped = dropped
        self.members = members
        self.count = 1 if members is None else len(members)
        self.rows = len(x)

    def forward(self, keep: bool) -> th.Tensor:
        """Outputs [Q', B, out].

        :param keep: whether :meth:`backward` follows
        """
        raise NotImplementedError

    def backward(
        self,
        grad: th.Tensor,
        columns: slice | None,
        needs_parameters: bool,
        room: GradientRoom | None = None,
        added_to: th.Tensor | None = None,
    ) -> tuple[th.Tensor | None, list[Gradients]]:
        """
        :param grad: by the outputs, [Q', B, out], contiguous
        :param columns: of the input, by which gradients are wanted; None for none. If the input is
            known to begin with simplices, gradients by those are right but for a number that all
            of a simplex have in common: SimNorm's own gradient does not depend on it.
        :param needs_parameters: whether gradients by the parameters are wanted
        :param room: where those may be written, made anew if None
        :param added_to: what the gradients by the input are added to, [B, columns], contiguous
        :return: by those columns of x, summed over the networks; by each layer's parameters
        """
        raise NotImplementedError


def _stacked(parts: Sequence[th.Tensor]) -> th.Tensor:
    """``th.stack`` that does not copy a single part."""
    return th.stack(tuple(parts)) if len(parts) > 1 else parts[0].unsqueeze(0)


class _Kept(NamedTuple):
    """What the gradients of one layer need."""

    x: th.Tensor  # input, [B, in]
    product: th.Tensor  # before the norm, [B, out]; the output where there is none
    statistics: th.Tensor | None  # of the norm, [2, B]
    y: th.Tensor  # output, [B, out]


class _ByTorch(Evaluation):
    """torch's products, and kernels for the norms."""

    kept: list[list[_Kept]]

    def _networks(self) -> list[tuple[Sequence[Layer], Dropped | None]]:
        """The layers of each network and what is dropped behind its first product."""
        networks: list[Sequence[Layer]] = [self.layers]
        if self.members is not None:
            networks = [[layer.of(member) for layer in self.layers] for member in self.members]
        dropped = self.dropped
        return [
            (network, None if dropped is None else dropped.of(i))
            for i, network in enumerate(networks)
        ]

    def forward(self, keep: bool) -> th.Tensor:
        self.kept = [self._forward_one(*network, keep) for network in self._networks()]
        return _stacked([layers[-1].y for layers in self.kept])

    def _forward_one(
        self, network: Sequence[Layer], dropped: Dropped | None, keep: bool
    ) -> list[_Kept]:
        x, kept = self.x, []
        for weight, bias, gain, shift, norm, _ in network:
            product = x @ weight.t() if bias is None else th.addmm(bias, x, weight.t())
            y, statistics = product, None
            if norm is not None:
                assert gain is not None
                assert shift is not None
                if dropped is not None:  # dividing the others is the same as another eps
                    product.view(-1)[dropped.positions] = 0.0
                    norm = norm._replace(eps=norm.eps * dropped.keep**2)
                if keep:
                    y, statistics = th.empty_like(product), product.new_empty(2, self.rows)
                norm_forward(product, gain, shift, y, statistics, norm)
            kept.append(_Kept(x, product, statistics, y))
            x, dropped = y, None  # the first layer's alone
        return kept

    def backward(
        self,
        grad: th.Tensor,
        columns: slice | None,
        needs_parameters: bool,
        room: GradientRoom | None = None,
        added_to: th.Tensor | None = None,
    ) -> tuple[th.Tensor | None, list[Gradients]]:
        results = [
            self._backward_one(grad[i], *network, self.kept[i], columns, needs_parameters)
            for i, network in enumerate(self._networks())
        ]
        parts = [part for part, _ in results if part is not None]
        grad_input = _stacked(parts).sum(0) if parts else None
        if added_to is not None and grad_input is not None:
            grad_input = added_to.add_(grad_input)
        of_layers = zip(*(gradients for _, gradients in results), strict=True)
        return grad_input, [
            same[0] if self.members is None else Gradients(*map(_stacked, zip(*same, strict=True)))
            for same in of_layers
        ]

    def _backward_one(
        self,
        grad: th.Tensor,
        network: Sequence[Layer],
        dropped: Dropped | None,
        kept: list[_Kept],
        columns: slice | None,
        needs_parameters: bool,
    ) -> tuple[th.Tensor | None, list[Gradients]]:
        gradients: list[Gradients] = []
        for position in reversed(range(len(network))):
            weight, _, gain, shift, norm, _ = network[position]
            x, product, statistics, y = kept[position]
            vectors = grad.new_zeros(3, len(weight))  # by gain, shift and bias
            if norm is not None:
                assert gain is not None
                assert shift is not None
                assert statistics is not None
                grad = norm_backward(grad, product, y, gain, shift, statistics, vectors, norm)
                if dropped is not None and position == 0:
                    grad.view(-1)[dropped.positions] = 0.0
                    vectors[2] = grad.sum(0)
            elif needs_parameters:
                vectors[2] = grad.sum(0)
            if needs_parameters:
                grad_gain, grad_shift, grad_bias = vectors
                gradients.append(Gradients(grad.t() @ x, grad_bias, grad_gain, grad_shift))
            if position:
                grad = grad @ weight
            elif columns is not None:
                return grad @ weight[:, columns], gradients[::-1]
        return None, gradients[::-1]


class _ByKernels(Evaluation):
    """One call of ``kernels.c`` each for outputs and gradients."""

    _workspaces: list[th.Tensor]
    _result: th.Tensor

    def __init__(self, arguments: NetworkArguments, *others: Any):
        super().__init__(*others)
        arguments.check_input(self.x.shape[-1])
        self._arguments = arguments
        self._chosen = self.members or (0,)
        self._threads = product_threads(self.rows * self.count * arguments.multiply_adds)

    def _dropout(self) -> tuple[th.Tensor | None, int, float]:
        if self.dropped is None:
            return None, 0, 1.0
        return self.dropped.positions, len(self.dropped.positions), self.dropped.keep

    def forward(self, keep: bool) -> th.Tensor:
        x, rows, num_layers = self.x, self.rows, self._arguments.num_layers
        layers = self._arguments.forward(self._chosen)
        # One a network: glibc returns to the system at once what is larger than 32 MiB, and that of
        # all networks of an ensemble may be.
        size = self._arguments.workspace_size(keep, rows)
        self._workspaces = [x.new_empty(size) for _ in range(self.count if keep else 1)]
        self._result = x.new_empty(self.count, rows, self.layers[-1].weight.shape[-2])
        call(
            "networks_forward",
            layers,
            num_layers,
            self.count,
            x,
            x.stride(0),
            *self._dropout(),
            addresses(self._workspaces),
            keep,
            self._result,
            rows,
            self._threads,
        )
        return self._result

    def backward(
        self,
        grad: th.Tensor,
        columns: slice | None,
        needs_parameters: bool,
        room: GradientRoom | None = None,
        added_to: th.Tensor | None = None,
    ) -> tuple[th.Tensor | None, list[Gradients]]:
        x, rows, num_layers = self.x, self.rows, self._arguments.num_layers
        begin, end, _ = (0, 0, 1) if columns is None else columns.indices(x.shape[1])
        layers = self._arguments.backward(self._chosen, None if columns is None else begin)
        size = self._arguments.scratch_size(rows, self._threads)
        scratches = [x.new_empty(size) for _ in range(self.count)]
        grad_input = added_to
        if grad_input is None and columns is not None:
            grad_input = x.new_empty(rows, end - begin)
        if needs_parameters and room is None:
            room = GradientRoom(self.layers, self.count, self.members is None)
        call(
            "networks_backward",
            layers,
            num_layers,
            self.count,
            x,
            x.stride(0),
            *self._dropout(),
            addresses(self._workspaces),
            self._result,
            grad,
            grad_input,
            begin,
            end - begin,
            added_to is not None,
            room.addresses() if room is not None and needs_parameters else None,
            addresses(scratches),
            rows,
            self._threads,
        )
        return grad_input, room.gradients if room is not None and needs_parameters else []


def evaluation(
    x: th.Tensor,
    layers: Sequence[Layer],
    dropped: Dropped | None = None,
    members: tuple[int, ...] | None = None,
) -> Evaluation:
    """Layers in turn on x, to be evaluated and differentiated by hand.

    :param x: [..., in]
    :param layers: of one network, or of Q where members are given
    :param dropped: see :func:`networks`
    :param members: see :func:`networks`
    """
    rows = x.reshape(-1, x.shape[-1])
    if not usable_layers(len(rows), layers):
        return _ByTorch(rows, layers, dropped, members)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return _ByKernels(arguments_of(layers), rows, layers, dropped, members)


def _joined(z: th.Tensor, a: th.Tensor | None) -> th.Tensor:
    return z if a is None else th.cat([z, a], dim=-1)


def _shaped(result: th.Tensor, z: th.Tensor, members: tuple[int, ...] | None) -> th.Tensor:
    leading = z.shape[:-1] if members is None else (len(members), *z.shape[:-1])
    return result.view(*leading, result.shape[-1])


_FIRST = 5  # parameter among the arguments of the node; four a layer


class _Networks(th.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: th.Tensor,
        a: th.Tensor | None,
        dropped: Dropped | None,
        members: tuple[int, ...] | None,
        layers: Sequence[Layer],
        *parameters: th.Tensor | None,  # of the layers, for autograd to see
    ) -> th.Tensor:
        evaluated = evaluation(_joined(z, a), layers, dropped, members)
        ctx.evaluation = evaluated
        ctx.shapes = z.shape, None if a is None else a.shape
        # Inputs are kept by the evaluation; here they are for the check that nobody changed them.
        positions = None if dropped is None else dropped.positions
        ctx.save_for_backward(z, a, positions, *parameters)
        return _shaped(evaluated.forward(keep=True), z, members)

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018
        evaluated: Evaluation = ctx.evaluation
        z_shape, a_shape = ctx.shapes
        layers, members = evaluated.layers, evaluated.members
        need_z, need_a, *_ = ctx.needs_input_grad
        needs_parameters = any(ctx.needs_input_grad[_FIRST:])
        begin, end = 0 if need_z else z_shape[-1], None if need_a else z_shape[-1]
        columns = slice(begin, end) if need_z or need_a else None
        grad = grads[0].reshape(evaluated.count, -1, grads[0].shape[-1]).contiguous()
        grad_input, gradients = evaluated.backward(grad, columns, needs_parameters)
        grad_z = grad_a = None
        if grad_input is not None:
            if need_z:
                grad_z = grad_input[:, : z_shape[-1]].reshape(z_shape)
            if need_a:
                grad_a = grad_input[:, -a_shape[-1] :].reshape(a_shape)
        grad_parameters: list[th.Tensor | None] = [None] * (len(ctx.needs_input_grad) - _FIRST)
        if needs_parameters:
            grad_parameters = [
                None if parameter is None else _of_all_networks(part, parameter, members)
                for parameter, part in each_parameter(layers, gradients)
            ]
        return grad_z, grad_a, None, None, None, *grad_parameters


def _of_all_networks(
    parts: th.Tensor, parameter: th.Tensor, members: tuple[int, ...] | None
) -> th.Tensor:
    """Gradients of the Q' networks, [Q', ...], as those of all Q; those of one as they are.

    A network that is asked for twice has its gradients added up; one that is not has zeros.
    """
    if members is None or members == tuple(range(len(parameter))):
        return parts
    return th.zeros_like(parameter).index_add_(0, th.tensor(members), parts)


def networks(
    z: th.Tensor,
    a: th.Tensor | None,
    layers: Sequence[Layer],
    dropped: Dropped | None = None,
    members: tuple[int, ...] | None = None,
    frozen: bool = False,
) -> th.Tensor:
    """Layers in turn on concat(z, a), of one network or of chosen ones of Q.

    :param z: [..., Z]
    :param a: the same leading axes, [..., A], or None
    :param layers: of one network, or of Q where members are given
    :param dropped: dropout between the first product, [B, out] or [Q', B, out] for B rows in
        ``...``, and its norm
    :param members: the Q' networks to evaluate; None if the layers are of one
    :param frozen: whether the parameters' own gradients are not wanted
    :return: [..., out] or [Q', ..., out]
    """
    if th.is_grad_enabled():
        own = [layer.detached() for layer in layers] if frozen else layers
        parameters = [each for layer in own for each in layer[:4]]
        if records_gradients(z, a, *parameters):
            return _Networks.apply(z, a, dropped, members, layers, *parameters)  # type: ignore[no-any-return]
    evaluated = evaluation(_joined(z, a), layers, dropped, members)
    return _shaped(evaluated.forward(keep=False), z, members)
