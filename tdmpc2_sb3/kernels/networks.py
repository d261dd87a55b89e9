"""Whole networks, layer after layer, as one differentiable function.

``kernels.c`` evaluates them in one call where it multiplies matrices itself
(:mod:`tdmpc2_sb3.kernels.products`); elsewhere torch multiplies and the norms are kernels. Either
way they are one node of the graph: a node a layer would cost as much as its kernels.

Shapes: ``...`` any leading axes, B rows, Q networks of an ensemble, Q' of them evaluated.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch as th

from tdmpc2_sb3.kernels.functions import (
    Norm,
    norm_backward,
    norm_forward,
    records_gradients,
)
from tdmpc2_sb3.kernels.library import LayerArgument, LayerGradientArgument, call
from tdmpc2_sb3.kernels.products import (
    held,
    is_holding,
    laid_out,
    multiplies,
    panels,
    product_threads,
)

ALIGNMENT = 16  # numbers: a cache line


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


class _Gradients(NamedTuple):
    """Gradients by the parameters of one layer of the Q' networks."""

    weight: th.Tensor  # [Q', out, in]
    vectors: th.Tensor  # by gain, shift and bias, [3, Q', out]


class _Evaluation:
    """The chosen networks on rows x: their outputs, and what the gradients need.

    :param x: [B, in]
    :param layers: of one network, or of Q
    :param mask: dropout's multiplier behind the first product, [B, out] or [Q', B, out]
    :param members: the Q' networks of Q; None if the layers are of one
    """

    def __init__(
        self,
        x: th.Tensor,
        layers: Sequence[Layer],
        mask: th.Tensor | None,
        members: tuple[int, ...] | None,
    ):
        self.x = x
        self.layers = layers
        self.mask = mask
        self.members = members
        self.count = 1 if members is None else len(members)
        self.rows = len(x)

    def mask_of(self, network: int) -> th.Tensor | None:
        """The mask of one network, [B, out]."""
        return self.mask if self.mask is None or self.members is None else self.mask[network]

    def forward(self, keep: bool) -> th.Tensor:
        """Outputs [Q', B, out].

        :param keep: whether :meth:`backward` follows
        """
        raise NotImplementedError

    def backward(
        self, grad: th.Tensor, input_from: int | None, needs_parameters: bool
    ) -> tuple[th.Tensor | None, list[_Gradients]]:
        """
        :param grad: by the outputs, [Q', B, out], contiguous
        :param input_from: the input's column from which on its gradient is wanted; None for none
        :param needs_parameters: whether gradients by the parameters are wanted
        :return: by those columns of x, summed over the networks; by each layer's parameters
        """
        raise NotImplementedError


def _stacked(parts: Sequence[th.Tensor], axis: int = 0) -> th.Tensor:
    """``th.stack`` that does not copy a single part."""
    return th.stack(tuple(parts), axis) if len(parts) > 1 else parts[0].unsqueeze(axis)


class _Kept(NamedTuple):
    """What the gradients of one layer need."""

    x: th.Tensor  # input, [B, in]
    product: th.Tensor  # before the norm, [B, out]; the output where there is none
    statistics: th.Tensor | None  # of the norm, [2, B]
    y: th.Tensor  # output, [B, out]


class _ByTorch(_Evaluation):
    """torch's products, and kernels for the norms."""

    kept: list[list[_Kept]]

    def _networks(self) -> list[Sequence[Layer]]:
        """The layers of each network."""
        if self.members is None:
            return [self.layers]
        return [[layer.of(member) for layer in self.layers] for member in self.members]

    def forward(self, keep: bool) -> th.Tensor:
        self.kept = [
            self._forward_one(network, self.mask_of(i), keep)
            for i, network in enumerate(self._networks())
        ]
        return _stacked([layers[-1].y for layers in self.kept])

    def _forward_one(
        self, network: Sequence[Layer], mask: th.Tensor | None, keep: bool
    ) -> list[_Kept]:
        x, kept = self.x, []
        for weight, bias, gain, shift, norm in network:
            product = x @ weight.t() if bias is None else th.addmm(bias, x, weight.t())
            y, statistics = product, None
            if norm is not None:
                assert gain is not None
                assert shift is not None
                if keep:
                    y, statistics = th.empty_like(product), product.new_empty(2, self.rows)
                norm_forward(product, mask, gain, shift, y, statistics, norm)
            kept.append(_Kept(x, product, statistics, y))
            x, mask = y, None  # the first layer's alone
        return kept

    def backward(
        self, grad: th.Tensor, input_from: int | None, needs_parameters: bool
    ) -> tuple[th.Tensor | None, list[_Gradients]]:
        results = [
            self._backward_one(grad[i], network, i, input_from, needs_parameters)
            for i, network in enumerate(self._networks())
        ]
        parts = [part for part, _ in results if part is not None]
        by_input = _stacked(parts).sum(0) if parts else None
        by_layer = zip(*(gradients for _, gradients in results), strict=True)
        return by_input, [
            _Gradients(_stacked([weight for weight, _ in same]), _stacked([v for _, v in same], 1))
            for same in by_layer
        ]

    def _backward_one(
        self,
        grad: th.Tensor,
        network: Sequence[Layer],
        index: int,
        input_from: int | None,
        needs_parameters: bool,
    ) -> tuple[th.Tensor | None, list[_Gradients]]:
        gradients: list[_Gradients] = []
        for position in reversed(range(len(network))):
            weight, _, gain, shift, norm = network[position]
            x, product, statistics, y = self.kept[index][position]
            vectors = grad.new_zeros(3, len(weight))
            if norm is not None:
                assert gain is not None
                assert shift is not None
                assert statistics is not None
                mask = self.mask_of(index) if position == 0 else None
                grad = norm_backward(grad, product, mask, y, gain, shift, statistics, vectors, norm)
            elif needs_parameters:
                vectors[2] = grad.sum(0)
            if needs_parameters:
                gradients.append(_Gradients(grad.t() @ x, vectors))
            if position:
                grad = grad @ weight
            elif input_from is not None:
                return grad @ weight[:, input_from:], gradients[::-1]
        return None, gradients[::-1]


class _Workspace:
    """Arrays cut from one allocation; their addresses stay valid for as long as it lives.

    Each network has its own: glibc returns to the system at once what is larger than 32 MiB, and
    all networks of an ensemble may be.
    """

    def __init__(self) -> None:
        self._size = 0
        self._memory: th.Tensor | None = None

    def reserve(self, size: int) -> int:
        """The offset of an array of that many numbers, which begins with a cache line."""
        offset = self._size
        self._size += -(-size // ALIGNMENT) * ALIGNMENT
        return offset

    def allocate(self, like: th.Tensor) -> int:
        """The address of all that was reserved."""
        self._memory = like.new_empty(self._size)
        return self._memory.data_ptr()


def _matrix(weight: th.Tensor, member: int) -> th.Tensor:
    """The weight of one network, [out, in]."""
    return weight if weight.dim() == 2 else weight[member]


def _address(vector: th.Tensor | None, member: int) -> int:
    """Where a vector of one network stands, 0 if there is none."""
    if vector is None:
        return 0
    skipped = member * vector.stride(0) if vector.dim() > 1 else 0
    return vector.data_ptr() + skipped * vector.element_size()


def _largest_size(layers: Sequence[Layer]) -> int:
    if isinstance(layers, _HeldLayers):
        return layers.largest_size
    return max(size for layer in layers for size in layer.weight.shape[-2:])


class _ParameterArguments(NamedTuple):
    """The part of a call that stays the same for as long as the weights do."""

    of_layer: list[tuple[tuple[int, ...], tuple[float, ...]]]  # network after network
    packed: list[th.Tensor]  # what is pointed to


class _HeldLayers(list[Layer]):
    """Layers whose weights are held, with their arguments by the networks asked for."""

    def __init__(self, layers: Sequence[Layer]):
        super().__init__(layers)
        self.largest_size = _largest_size(layers)
        self.arguments: dict[tuple[int, ...] | None, _ParameterArguments] = {}


def held_layers(key: object, make: Callable[[], list[Layer]]) -> Sequence[Layer]:
    """The layers of a network, made once while weights are held.

    :param key: that tells the network from all others
    :param make: makes them
    """
    return held(key, lambda: _HeldLayers(make())) if is_holding() else make()


def _parameter_arguments(
    layers: Sequence[Layer], members: tuple[int, ...] | None
) -> _ParameterArguments:
    if isinstance(layers, _HeldLayers) and members in layers.arguments:
        return layers.arguments[members]
    result = _ParameterArguments([], [])
    for member in (0,) if members is None else members:
        for weight, bias, gain, shift, norm in layers:
            matrix = _matrix(weight, member)
            result.packed.append(laid_out(matrix.t()))
            pointers = (
                result.packed[-1].data_ptr(),
                *(_address(vector, member) for vector in (bias, gain, shift)),
            )
            activation, simplex, eps = (0, 1, 0.0) if norm is None else norm
            cols, depth = matrix.shape
            result.of_layer.append((pointers, (depth, cols, activation, simplex, eps)))
    if isinstance(layers, _HeldLayers):
        layers.arguments[members] = result
    return result


def layer_arguments(
    layers: Sequence[Layer], members: tuple[int, ...] | None
) -> tuple[ctypes.Array[LayerArgument], object]:
    """Layers as kernels.c takes them where it keeps nothing for gradients, and what they point to.

    :param layers: of one network, or of Q
    :param members: the Q' networks of Q; None if the layers are of one
    """
    parameters = _parameter_arguments(layers, members)
    nowhere = (0,) * 4  # mask, product, statistics, output
    arguments = [(*pointers, *nowhere, *settings) for pointers, settings in parameters.of_layer]
    return (LayerArgument * len(arguments))(*arguments), parameters  # type: ignore[misc]


class _ByKernels(_Evaluation):
    """One call of ``kernels.c`` each for outputs and gradients."""

    _arguments: ctypes.Array[LayerArgument]
    _alive: list[Any]  # what the arguments point to

    def _members(self) -> tuple[int, ...]:
        return (0,) if self.members is None else self.members

    def _threads(self) -> int:
        sizes = sum(each.weight.shape[-1] * each.weight.shape[-2] for each in self.layers)
        return product_threads(self.rows * sizes * self.count)

    def forward(self, keep: bool) -> th.Tensor:
        x, rows, last = self.x, self.rows, len(self.layers) - 1
        result = x.new_empty(self.count, rows, self.layers[-1].weight.shape[-2])
        workspaces = [_Workspace() for _ in range(self.count if keep else 1)]
        offsets: list[tuple[int, int, int]] = []  # of product, statistics and output
        for workspace in workspaces:
            for position, layer in enumerate(self.layers):
                size = rows * layer.weight.shape[-2]
                kept = keep and layer.norm is not None
                offsets.append(
                    (
                        workspace.reserve(size if kept else 0),
                        workspace.reserve(2 * rows if kept else 0),
                        workspace.reserve(size if position < last else 0),
                    )
                )
        bases = [workspace.allocate(x) for workspace in workspaces]
        parameters = _parameter_arguments(self.layers, self.members)
        self._alive = [workspaces, result, parameters]
        arguments: list[tuple[float, ...]] = []
        for i, (pointers, settings) in enumerate(parameters.of_layer):
            network, position = divmod(i, last + 1)
            mask = None if position else self.mask_of(network)
            place = i if keep else position
            base = bases[place // (last + 1)]
            product, statistics, output = offsets[place]
            end = base + 4 * output
            if position == last:
                end = result.data_ptr() + 4 * network * rows * result.shape[-1]
            kept = keep and self.layers[position].norm is not None
            arguments.append(
                (
                    *pointers,
                    0 if mask is None else mask.data_ptr(),
                    base + 4 * product if kept else end,
                    base + 4 * statistics if kept else 0,
                    end,
                    *settings,
                )
            )
        self._arguments = (LayerArgument * len(arguments))(*arguments)  # type: ignore[misc]
        call(
            "networks_forward",
            self._arguments,
            last + 1,
            self.count,
            x,
            x.stride(0),
            rows,
            self._threads(),
        )
        return result

    def backward(
        self, grad: th.Tensor, input_from: int | None, needs_parameters: bool
    ) -> tuple[th.Tensor | None, list[_Gradients]]:
        rows, threads, last = self.rows, self._threads(), len(self.layers) - 1
        sizes = [each.weight.shape[-2:] for each in self.layers]
        gradients = [
            _Gradients(grad.new_empty(self.count, *size), grad.new_empty(3, self.count, size[0]))
            for size in (sizes if needs_parameters else [])
        ]
        by_input = None
        if input_from is not None:
            by_input = grad.new_empty(rows, sizes[0][1] - input_from)
        workspaces = [_Workspace() for _ in range(self.count)]
        offsets: list[tuple[int, int, int]] = []  # of by_product, sums and packed_input
        for network, workspace in enumerate(workspaces):
            for position, (cols, depth) in enumerate(sizes):
                packs = needs_parameters and (position or not network)  # x is the same for all
                offsets.append(
                    (
                        workspace.reserve(rows * cols),
                        workspace.reserve(threads * 3 * cols),
                        workspace.reserve(panels(rows, depth) if packs else 0),
                    )
                )
        bases = [workspace.allocate(grad) for workspace in workspaces]
        packed_x = bases[0] + 4 * offsets[0][2]
        alive: list[th.Tensor] = []
        arguments: list[tuple[int, ...]] = []
        for network, member in enumerate(self._members()):
            for position, layer in enumerate(self.layers):
                weight = _matrix(layer.weight, member)
                packed = 0
                if position or input_from is not None:
                    alive.append(laid_out(weight if position else weight[:, input_from:]))
                    packed = alive[-1].data_ptr()
                by_product, sums, packed_input = (
                    bases[network] + 4 * each for each in offsets[network * (last + 1) + position]
                )
                if not needs_parameters:
                    arguments.append((packed, by_product, sums, 0, 0, 0, 0))
                    continue
                cols, depth = sizes[position]
                by_weight, by_vectors = gradients[position]
                arguments.append(
                    (
                        packed,
                        by_product,
                        sums,
                        by_weight.data_ptr() + 4 * network * cols * depth,
                        packed_input if position else packed_x,
                        by_vectors.data_ptr() + 4 * network * cols,
                        self.count * cols,
                    )
                )
        call(
            "networks_backward",
            self._arguments,
            (LayerGradientArgument * len(arguments))(*arguments),  # type: ignore[misc]
            last + 1,
            self.count,
            self.x,
            self.x.stride(0),
            grad,
            by_input,
            0 if by_input is None else by_input.shape[1],
            rows,
            threads,
        )
        return by_input, gradients


def _evaluation(
    z: th.Tensor,
    a: th.Tensor | None,
    layers: Sequence[Layer],
    mask: th.Tensor | None,
    members: tuple[int, ...] | None,
) -> _Evaluation:
    x = z if a is None else th.cat([z, a], dim=-1)
    rows = x.reshape(-1, x.shape[-1])
    if not multiplies(len(rows), _largest_size(layers)):
        return _ByTorch(rows, layers, mask, members)
    return _ByKernels(rows if rows.stride(-1) == 1 else rows.contiguous(), layers, mask, members)


def _shaped(result: th.Tensor, z: th.Tensor, members: tuple[int, ...] | None) -> th.Tensor:
    leading = z.shape[:-1] if members is None else (len(members), *z.shape[:-1])
    return result.view(*leading, result.shape[-1])


_FIRST_PARAMETER = 5  # among the arguments of the node; four a layer


class _Networks(th.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: th.Tensor,
        a: th.Tensor | None,
        mask: th.Tensor | None,
        members: tuple[int, ...] | None,
        layers: Sequence[Layer],
        *parameters: th.Tensor | None,  # of the layers, for autograd to see
    ) -> th.Tensor:
        evaluation = _evaluation(z, a, layers, mask, members)
        ctx.evaluation = evaluation
        ctx.shapes = z.shape, None if a is None else a.shape
        # Inputs are kept by the evaluation; here they are for the check that nobody changed them.
        ctx.save_for_backward(z, a, mask, *parameters)
        return _shaped(evaluation.forward(keep=True), z, members)

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018
        evaluation: _Evaluation = ctx.evaluation
        z_shape, a_shape = ctx.shapes
        layers, members = evaluation.layers, evaluation.members
        need_z, need_a, *_ = ctx.needs_input_grad
        needs_parameters = any(ctx.needs_input_grad[_FIRST_PARAMETER:])
        input_from = 0 if need_z else z_shape[-1] if need_a else None
        grad = grads[0].reshape(evaluation.count, -1, grads[0].shape[-1]).contiguous()
        by_input, gradients = evaluation.backward(grad, input_from, needs_parameters)
        grad_z = grad_a = None
        if by_input is not None:
            if need_z:
                grad_z = by_input[:, : z_shape[-1]].reshape(z_shape)
            if need_a:
                grad_a = by_input[:, -a_shape[-1] :].reshape(a_shape)
        by_parameters: list[th.Tensor | None] = []
        for position, layer in enumerate(layers):
            if not needs_parameters:
                by_parameters += [None] * 4
                continue
            weight, (gain, shift, bias) = gradients[position]
            wanted = (
                (layer.weight, weight),
                (layer.bias, bias),
                (layer.gain, gain),
                (layer.shift, shift),
            )
            by_parameters += [
                None if parameter is None else _by_network(each, parameter, members)
                for parameter, each in wanted
            ]
        return grad_z, grad_a, None, None, None, *by_parameters


def _by_network(
    parts: th.Tensor, parameter: th.Tensor, members: tuple[int, ...] | None
) -> th.Tensor:
    """Gradients of the Q' networks, [Q', ...], as those of all Q.

    A network that is asked for twice has its gradients added up; one that is not has zeros.
    """
    if members is None:
        return parts[0]
    if members == tuple(range(len(parameter))):
        return parts
    return th.zeros_like(parameter).index_add_(0, th.tensor(members), parts)


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
    if th.is_grad_enabled():
        parameters = [each for layer in layers for each in layer[:4]]
        if records_gradients(z, a, *parameters):
            return _Networks.apply(z, a, mask, members, layers, *parameters)  # type: ignore[no-any-return]
    return _shaped(_evaluation(z, a, layers, mask, members).forward(keep=False), z, members)
