"""Networks whose gradients are taken by hand and by the CPU kernels.

Shapes: B rows, Q networks of an ensemble, Z latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch as th

from tdmpc2_sb3 import kernels
from tdmpc2_sb3.kernels import Layer

GradientArrays: TypeAlias = list[th.Tensor]  # of gradients, each number in one array
Pairs: TypeAlias = list[tuple[th.Tensor, th.Tensor]]  # parameters with their gradients


class DirectNetwork:
    """A network, or Q, whose parameters' gradients are written to the same place each time.

    :param layers: of one network or of Q
    :param num_networks: Q; None if they are of one
    """

    def __init__(self, layers: Sequence[Layer], num_networks: int | None = None):
        self.layers = kernels.KeptLayers(layers)
        self._members = None if num_networks is None else tuple(range(num_networks))
        self._room = kernels.GradientRoom(layers, num_networks or 1, num_networks is None)
        self._own = self._parameter_gradients(self._room.gradients)
        # Where a parameter is missing, or is not trained, the room holds a gradient that is
        # nobody's.
        self._is_whole = all(layer.bias is not None for layer in layers) and are_trained(self._own)
        self._evaluation: kernels.Evaluation | None = None  # until its gradients are taken

    def evaluate(self, x: th.Tensor, dropped: kernels.Dropped | None = None) -> th.Tensor:
        """Outputs of rows x, [Q, B, out], with Q = 1 for one network."""
        self._evaluation = kernels.evaluation(x, self.layers, dropped, self._members)
        return self._evaluation.forward(keep=True)

    def backward(self, grad: th.Tensor, grad_latents: th.Tensor | None = None) -> GradientArrays:
        """Gives the parameters their gradients.

        :param grad: by the outputs, contiguous, [Q, B, out]
        :param grad_latents: what the gradients by the latent part of x are added to, [B, Z]
        """
        evaluation, self._evaluation = self._evaluation, None
        assert evaluation is not None, "evaluate first"
        columns = None if grad_latents is None else slice(0, grad_latents.shape[-1])
        _, gradients = evaluation.backward(grad, columns, True, self._room, grad_latents)
        if gradients is not self._room.gradients:
            return assign(self._parameter_gradients(gradients))
        written = assign(self._own)
        return [self._room.whole] if self._is_whole else written

    def _parameter_gradients(self, gradients: Sequence[kernels.Gradients]) -> Pairs:
        return parameter_gradients(self.layers, gradients)


class JoinedProducts(DirectNetwork):
    """Several weights that are multiplied with the same rows: their products side by side.

    :param weights: [out, in] each
    """

    def __init__(self, weights: Sequence[th.Tensor]):
        self._weights = weights
        self._sizes = [len(weight) for weight in weights]
        self._joined = th.cat([weight.detach() for weight in weights])
        super().__init__([Layer(self._joined, None)])

    def evaluate(self, x: th.Tensor, dropped: kernels.Dropped | None = None) -> th.Tensor:
        """See :meth:`DirectNetwork.evaluate`."""
        for weight, part in zip(self._weights, self._joined.split(self._sizes), strict=True):
            kernels.copy_(weight, part)
        return super().evaluate(x, dropped)

    def _parameter_gradients(self, gradients: Sequence[kernels.Gradients]) -> Pairs:
        return list(zip(self._weights, gradients[0].weight.split(self._sizes), strict=True))


def parameter_gradients(layers: Sequence[Layer], gradients: Sequence[kernels.Gradients]) -> Pairs:
    """The parameters of all layers in turn, each with its gradient."""
    return [
        (parameter, gradient)
        for parameter, gradient in kernels.each_parameter(layers, gradients)
        if parameter is not None
    ]


def are_trained(gradients: Pairs) -> bool:
    """Whether every parameter is to have its gradient."""
    return all(parameter.requires_grad for parameter, _ in gradients)


def assign(gradients: Pairs) -> GradientArrays:
    """Gives each parameter that is trained its gradient; those gradients."""
    gradients = [each for each in gradients if each[0].requires_grad]

    def give() -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient

    kernels.with_calls(give)
    return [gradient for _, gradient in gradients]
