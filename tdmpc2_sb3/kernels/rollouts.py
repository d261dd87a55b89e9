"""A network applied step after step to its own output, as one differentiable function.

Gradients by its parameters are taken over the rows of all steps at once, and no thread waits for
another one between two steps.

Shapes: B rows, H steps, Z latent, A action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch as th

from tdmpc2_sb3.kernels.arguments import Layer, NetworkArguments, arguments_of, can_be_read, widest
from tdmpc2_sb3.kernels.functions import records_gradients
from tdmpc2_sb3.kernels.library import call
from tdmpc2_sb3.kernels.networks import addresses, cut_gradients, room_for_gradients
from tdmpc2_sb3.kernels.products import multiplies, product_threads


def rolls_out(z: th.Tensor, actions: th.Tensor, layers: Sequence[Layer]) -> bool:
    """Whether :func:`rollout` takes them."""
    return (
        z.shape[:-1] == actions.shape[1:-1]
        and not records_gradients(actions)
        and multiplies(z.numel() // z.shape[-1], widest(layers))
        and can_be_read(layers)
    )


class _Steps:
    """Latents under the actions, and what the gradients need."""

    def __init__(self, z: th.Tensor, actions: th.Tensor, layers: Sequence[Layer]):
        self.start, self.actions, self.layers = z.contiguous(), actions.contiguous(), layers
        self.arguments: NetworkArguments = arguments_of(layers)
        self.steps, self.rows = len(actions), z.numel() // z.shape[-1]
        work = self.steps * self.rows * self.arguments.multiply_adds
        self.threads = product_threads(work)

    def forward(self, keep: bool) -> th.Tensor:
        """z_1..z_H, [H, ..., Z].

        :param keep: whether :meth:`backward` follows
        """
        start, num_layers = self.start, self.arguments.num_layers
        layers = self.arguments.forward((0,))
        rows = self.steps * self.rows
        self.inputs = start.new_empty(rows, self.layers[0].weight.shape[1])
        self.workspace = start.new_empty(call("workspace_size", layers, num_layers, keep, rows))
        self.latents = start.new_empty(self.steps, *start.shape)
        call(
            "rollout_forward",
            layers,
            num_layers,
            start,
            self.actions,
            self.inputs,
            self.workspace,
            keep,
            self.latents,
            self.steps,
            self.rows,
            self.threads,
        )
        return self.latents

    def backward(self, grad: th.Tensor) -> tuple[th.Tensor, list[th.Tensor]]:
        """
        :param grad: by z_1..z_H, [H, ..., Z]
        :return: by z_0, [..., Z]; by the layers' parameters as kernels.c writes them
        """
        num_layers, rows = self.arguments.num_layers, self.steps * self.rows
        layers = self.arguments.backward((0,), 0)
        by_latents = grad.new_empty(self.steps + 1, *self.start.shape)
        by_latents[0] = 0.0
        by_latents[1:] = grad
        by_parameters = room_for_gradients(self.layers, 1)
        size = call("scratch_size", layers, num_layers, rows, self.threads)
        call(
            "rollout_backward",
            layers,
            num_layers,
            self.inputs,
            self.workspace,
            self.latents,
            by_latents,
            addresses(by_parameters),
            grad.new_empty(size),
            self.steps,
            self.rows,
            self.threads,
        )
        return by_latents[0], by_parameters


class _Rollout(th.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: th.Tensor,
        actions: th.Tensor,
        layers: Sequence[Layer],
        *parameters: th.Tensor | None,  # of the layers, for autograd to see
    ) -> th.Tensor:
        ctx.steps = _Steps(z, actions, layers)
        # For the check that nobody changed them.
        ctx.save_for_backward(z, actions, *parameters)
        return ctx.steps.forward(keep=True)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018
        steps: _Steps = ctx.steps
        by_start, arrays = steps.backward(grads[0])
        by_parameters = [
            None if parameter is None else part
            for layer, (weight, gain, shift, bias) in zip(
                steps.layers, cut_gradients(arrays, steps.layers, 1, of_one=True), strict=True
            )
            for parameter, part in zip(layer[:4], (weight, bias, gain, shift), strict=True)
        ]
        return by_start, None, None, *by_parameters


def rollout(z: th.Tensor, actions: th.Tensor, layers: Sequence[Layer]) -> th.Tensor:
    """z_{h+1} = network(concat(z_h, a_h)) for inputs that :func:`rolls_out` agrees to.

    :param z: z_0, [..., Z]
    :param actions: a_0..a_{H-1}, [H, ..., A]
    :param layers: of the network
    :return: z_1..z_H, [H, ..., Z]
    """
    parameters = [each for layer in layers for each in layer[:4]]
    if records_gradients(z, *parameters):
        return _Rollout.apply(z, actions, layers, *parameters)  # type: ignore[no-any-return]
    return _Steps(z, actions, layers).forward(keep=False)
