"""Layers as ``kernels.c`` takes them.

What a call needs of a network's parameters, their addresses and the room for the weights laid out
for products, stays the same from one gradient step to the next: it is made once and kept for as
long as the parameters live. Only the weights are laid out anew, once they may have changed.

Shapes: Q networks of an ensemble, Q' of them evaluated.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch as th
from torch.utils.weak import WeakTensorKeyDictionary

from tdmpc2_sb3.kernels.interface import SIMPLEX, LayerArgument, Structure
from tdmpc2_sb3.kernels.library import call, check_array
from tdmpc2_sb3.kernels.norms import Activation, Norm
from tdmpc2_sb3.kernels.products import made_once, panels, period, usable_product

_VECTORS = ("bias", "gain", "shift")
LAY_OUT_PARALLEL_FROM = 2**15  # numbers; waking a second thread costs more than fewer would save


class Layer(NamedTuple):
    """A linear layer, with a layer norm behind it or without; or the same of Q networks.

    Shapes: weight [out, in], the others [out]; each with a leading axis [Q] for Q networks.
    """

    weight: th.Tensor
    bias: th.Tensor | None
    gain: th.Tensor | None = None
    shift: th.Tensor | None = None
    norm: Norm | None = None  # of a normed layer, which then has gain and shift
    simplices: int = 0  # of SIMPLEX numbers, that the input is known to begin with

    def of(self, members: int | th.Tensor) -> Layer:
        """The layer of one of the Q networks, or of several by their indices [Q']."""
        vectors = (self.bias, self.gain, self.shift)
        bias, gain, shift = (each if each is None else each[members] for each in vectors)
        return Layer(self.weight[members], bias, gain, shift, *self[4:])

    def detached(self) -> Layer:
        """The same layer, whose parameters' own gradients are not wanted."""
        vectors = (self.bias, self.gain, self.shift)
        bias, gain, shift = (each if each is None else each.detach() for each in vectors)
        return Layer(self.weight.detach(), bias, gain, shift, *self[4:])

    def count_simplices(self) -> int:
        """How many of SIMPLEX numbers its outputs consist of; 0 if of something else."""
        if self.norm is None or self.norm[:2] != (Activation.SIMNORM, SIMPLEX):
            return 0
        return self.weight.shape[-2] // SIMPLEX


class Dropped(NamedTuple):
    """Dropout (arXiv:1207.0580) between the first product of networks and its norm.

    Some numbers of the product are set to 0, the others divided by the share of those.
    """

    positions: th.Tensor  # of the zeros, int64, ascending; the last may lie behind all numbers
    keep: float  # the share of the others
    shape: tuple[int, ...]  # of the product, [B, out] or [Q', B, out]

    def mask(self) -> th.Tensor:
        """What the product is multiplied with."""
        size = math.prod(self.shape)
        device = self.positions.device
        mask = th.full((size + 1,), 1.0 / self.keep, device=device, dtype=th.float32)
        positions = self.positions.clamp(max=size)  # a spare element
        return mask.index_fill_(0, positions, 0.0)[:size].view(self.shape)

    def of(self, network: int) -> Dropped:
        """That of one of the networks, without positions behind all."""
        size = math.prod(self.shape[-2:])
        ends = th.tensor([network * size, (network + 1) * size])
        begin, end = th.searchsorted(self.positions, ends).tolist()
        return Dropped(self.positions[begin:end] - network * size, self.keep, self.shape[-2:])


class KeptLayers(list[Layer]):
    """Layers of parameters that stay the same objects, with what is asked of them more than once.

    Whether their numbers stand where they stood is asked once while weights are fixed.
    """

    def __init__(self, layers: Sequence[Layer]):
        super().__init__(layers)
        self.widest = widest(layers)
        self.parameters = _parameters(layers)
        self._looked_up: tuple[object, NetworkArguments] | None = None

    def __reduce__(self) -> tuple[type[KeptLayers], tuple[list[Layer]]]:
        return KeptLayers, (list(self),)  # a copy looks its own parameters up

    def look_up(self) -> NetworkArguments:
        """Their arguments."""
        now = period()
        looked_up = self._looked_up  # once: another thread may look them up meanwhile
        if now is None or looked_up is None or looked_up[0] is not now:
            known = None if looked_up is None else looked_up[1]
            if known is None or not known.stand_still(self):
                known = _find(self)
            looked_up = self._looked_up = now, _kept_for_period(known, self)
        return looked_up[1]


def widest(layers: Sequence[Layer]) -> int:
    """The largest size of a weight."""
    if isinstance(layers, KeptLayers):
        return layers.widest
    return max(size for layer in layers for size in layer.weight.shape[-2:])


def on_simplices(layers: Sequence[Layer], simplices: int) -> KeptLayers:
    """The same network, whose input is known to begin with that many simplices.

    An eighth of the products with those can be saved (``kernels.c``).
    """
    return KeptLayers([layers[0]._replace(simplices=simplices), *layers[1:]])


def layers_made_once(key: object, make: Callable[[], list[Layer]]) -> Sequence[Layer]:
    """The layers of a network, made once while weights are fixed.

    :param key: that tells the network from all others
    :param make: makes them
    """
    return make() if period() is None else made_once(key, lambda: KeptLayers(make()))


def usable_layers(rows: int, layers: Sequence[Layer]) -> bool:
    """Whether ``kernels.c`` is to take that many rows through the layers, rather than torch."""
    if not usable_product(rows, widest(layers)):
        return False
    if isinstance(layers, KeptLayers):
        return layers.look_up().usable
    return _usable(layers)


def _usable(layers: Sequence[Layer]) -> bool:
    """Whether they are float32 on a CPU, and the numbers of a row stand side by side."""
    return all(
        each is None or (each.dtype is th.float32 and each.is_cpu and each.stride(-1) == 1)
        for layer in layers
        for each in layer[:4]
    )


class NetworkArguments:
    """The layers of one network, or of Q, with room for their weights laid out.

    It points to the parameters without keeping them alive.
    """

    def __init__(self, layers: Sequence[Layer]):
        first = layers[0].weight
        self._shapes = _shapes(layers)
        self._places = _places(_parameters(layers))
        self._thread = _thread.itself
        self.usable = _usable(layers)
        if self.usable:
            for number, layer in enumerate(layers):
                _check(number, layer, first.shape[:-2])
        self.num_layers = len(layers)
        self.num_networks = len(first) if first.dim() == 3 else 1
        self.input_dim = first.shape[-1]
        sizes = [layer.weight.shape[-2:] for layer in layers]
        #: Whether each layer reads what the one before writes, as in a network.
        self.is_chain = all(one[0] == other[1] for one, other in itertools.pairwise(sizes))
        self.multiply_adds = sum(cols * depth for cols, depth in sizes)  # a row and network
        forward = [panels(depth, cols) for cols, depth in sizes]
        back = [panels(cols, depth) for cols, depth in sizes]
        self._sizes: dict[tuple[object, ...], int] = {}
        self._packed = first.new_empty(self.num_networks * (sum(forward) + sum(back)))
        self._all = (LayerArgument * (self.num_networks * self.num_layers))()
        self._chosen: dict[tuple[int, ...], ctypes.Array[Structure]] = {
            tuple(range(self.num_networks)): self._all
        }
        # While which weights were laid out last, and from which column on those of first layers
        self._forward_at: list[object | None] = [None] * self.num_networks
        self._back_at: list[tuple[object | None, int]] = [(None, 0)] * self.num_networks
        address = self._packed.data_ptr()
        for network in range(self.num_networks):
            for position, layer in enumerate(layers):
                packed, packed_back = address, address + 4 * forward[position]
                address = packed_back + 4 * back[position]
                cols, depth = sizes[position]
                norm = layer.norm or Norm(eps=0.0)
                self._all[network * self.num_layers + position] = LayerArgument(
                    weight=_address(layer.weight, network, 3),
                    packed=packed,
                    packed_back=packed_back,
                    bias=_address(layer.bias, network, 2),
                    gain=_address(layer.gain, network, 2),
                    shift=_address(layer.shift, network, 2),
                    weight_row=layer.weight.stride(-2),
                    depth=depth,
                    cols=cols,
                    activation=norm.activation,
                    simplex=norm.simnorm_dim,
                    simplices=layer.simplices,
                    eps=norm.eps,
                )

    def check_input(self, size: int) -> None:
        """
        :param size: numbers of a row of the input
        :raises RuntimeError: if the layers do not read that many, or not each other's outputs
        """
        if size != self.input_dim or not self.is_chain:
            raise RuntimeError(
                f"The input has {size} columns for networks that read {self.input_dim}, or their "
                "layers do not fit each other."
            )

    def workspace_size(self, keep: bool, rows: int) -> int:
        """Numbers that a network writes on its way, with ``keep`` for gradients too."""
        return self._size("workspace_size", keep, rows)

    def scratch_size(self, rows: int, threads: int) -> int:
        """Numbers that a network's gradients take on the way."""
        return self._size("scratch_size", rows, threads)

    def _size(self, name: str, *settings: int) -> int:
        key = (name, *settings)
        if key not in self._sizes:
            self._sizes[key] = call(name, self._all, self.num_layers, *settings)
        return self._sizes[key]

    def are_of(self, layers: Sequence[Layer]) -> bool:
        """Whether they are those of these layers, as long as nothing moves."""
        return self._shapes == _shapes(layers) and self._places == _places(_parameters(layers))

    def stand_still(self, layers: KeptLayers) -> bool:
        """Whether they still are those of layers that they were of, and this thread's own."""
        return self._thread is _thread.itself and self._places == _places(layers.parameters)

    def forward(self, members: tuple[int, ...]) -> ctypes.Array[Structure]:
        """Layers of the Q' networks, one network after the other, laid out to be evaluated."""
        lay_out((self, members))
        return self.of(members)

    def take_stale(self, members: tuple[int, ...]) -> tuple[int, ...]:
        """Which of the networks the caller has to lay out to be evaluated."""
        now = period()
        stale = _once(m for m in members if now is None or self._forward_at[m] is not now)
        for member in stale:
            self._forward_at[member] = now
        return stale

    def backward(self, members: tuple[int, ...], input_from: int | None) -> ctypes.Array[Structure]:
        """The same, laid out for gradients by their inputs.

        :param input_from: the input's column from which on its gradient is wanted, not amid
            simplices; None for none
        """
        now = period()
        mark = (now, self.input_dim if input_from is None else input_from)
        stale = _once(m for m in members if now is None or self._back_at[m] != mark)
        if stale:
            for member in stale:
                self._back_at[member] = mark
            chosen, threads = self.of(stale), _threads(len(stale) * self.multiply_adds)
            call("lay_out_back", chosen, self.num_layers, len(stale), mark[1], threads)
        return self.of(members)

    def of(self, members: tuple[int, ...]) -> ctypes.Array[Structure]:
        """Layers of the Q' networks as they stand."""
        if members not in self._chosen:
            layers = [
                self._all[member * self.num_layers + position]
                for member in members
                for position in range(self.num_layers)
            ]
            self._chosen[members] = (LayerArgument * len(layers))(*layers)
        return self._chosen[members]


def lay_out(*networks: tuple[NetworkArguments, tuple[int, ...]]) -> None:
    """Lays members of networks out to be evaluated, in one call, which wakes threads once."""
    layers: list[Structure] = []
    numbers = 0
    for network, members in networks:
        stale = network.take_stale(members)
        layers += network.of(stale)
        numbers += len(stale) * network.multiply_adds
    if layers:
        array = (LayerArgument * len(layers))(*layers)
        call("lay_out", array, len(layers), _threads(numbers))


def _check(number: int, layer: Layer, networks: Sequence[int]) -> None:
    """That a layer is one that the kernels read.

    :param number: of the layer, by which a message names it
    :param networks: [Q], or nothing if it is of one network
    :raises RuntimeError: naming what it is instead
    """
    cols, depth = layer.weight.shape[-2:]
    arrays = layer._asdict()
    for name, shape in (("weight", (cols, depth)), *((n, (cols,)) for n in _VECTORS)):
        if arrays[name] is not None:
            what = f"The {name} of layer {number}"
            check_array(what, arrays[name], (*networks, *shape))
    norm = layer.norm
    if norm is not None and (layer.gain is None or layer.shift is None or cols % norm[1]):
        raise RuntimeError(f"The norm of layer {number} lacks a gain or shift, or cuts a simplex.")
    if not 0 <= layer.simplices * SIMPLEX <= depth:
        raise RuntimeError(f"Layer {number} reads no {layer.simplices} simplices of {SIMPLEX}.")


def _threads(numbers: int) -> int:
    """Threads to lay out that many numbers."""
    return th.get_num_threads() if numbers >= LAY_OUT_PARALLEL_FROM else 1


def _once(members: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(members))


def _address(parameter: th.Tensor | None, network: int, dim_of_ensemble: int) -> int:
    """Where the parameter of one network stands, 0 if there is none."""
    if parameter is None:
        return 0
    skipped = network * parameter.stride(0) if parameter.dim() == dim_of_ensemble else 0
    return parameter.data_ptr() + skipped * parameter.element_size()


class _Thread(threading.local):
    """Arguments by the first weight and by its input's simplices; of each thread its own, lest two
    lay out in one place."""

    def __init__(self) -> None:
        self.itself = object()  # unlike its identity, which a later thread may have
        self.by_weight = WeakTensorKeyDictionary()


_thread = _Thread()


def arguments_of(layers: Sequence[Layer]) -> NetworkArguments:
    """The arguments of a network's layers, made unless they are there."""
    if isinstance(layers, KeptLayers):
        return layers.look_up()
    return _kept_for_period(_find(layers), layers)


def _kept_for_period(arguments: NetworkArguments, layers: Sequence[Layer]) -> NetworkArguments:
    """Nothing else may take a weight's address while it counts as laid out."""
    made_once((NetworkArguments, id(arguments)), lambda: (arguments, layers))
    return arguments


def _find(layers: Sequence[Layer]) -> NetworkArguments:
    first = layers[0]
    by_simplices: dict[int, NetworkArguments] = _thread.by_weight.setdefault(first.weight, {})
    known = by_simplices.get(first.simplices)
    if known is None or not known.are_of(layers):
        known = by_simplices[first.simplices] = NetworkArguments(layers)
    return known


def _parameters(layers: Sequence[Layer]) -> list[th.Tensor]:
    if isinstance(layers, KeptLayers):
        return layers.parameters
    return [each for layer in layers for each in layer[:4] if each is not None]


def _places(parameters: Sequence[th.Tensor]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Where the numbers of the parameters stand."""
    return list(map(th.Tensor.data_ptr, parameters)), list(map(th.Tensor.stride, parameters))


def _shapes(layers: Sequence[Layer]) -> list[object]:
    """All else that tells layers apart."""
    return [
        (each.norm, each.simplices, each.weight.shape, [one is None for one in each[:4]])
        for each in layers
    ]
