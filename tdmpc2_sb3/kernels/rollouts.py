"""A network applied step after step to its own output, as one differentiable function.

Gradients by its parameters are taken over the rows of all steps at once, and no thread waits for
another one between two steps.

Shapes: B rows, H steps, Z latent, A action.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch as th

from tdmpc2_sb3.kernels.arguments import (
    Layer,
    NetworkArguments,
    arguments_of,
    usable_layers,
)
from tdmpc2_sb3.kernels.conditions import records_gradients
from tdmpc2_sb3.kernels.library import call, check_array
from tdmpc2_sb3.kernels.networks import GradientRoom, each_parameter
from tdmpc2_sb3.kernels.products import product_threads


def usable_rollout(z: th.Tensor, actions: th.Tensor, layers: Sequence[Layer]) -> bool:
    """Whether :func:`rollout` takes them."""
    return (
        z.shape[:-1] == actions.shape[1:-1]
        and not records_gradients(actions)
        and usable_layers(z.numel() // z.shape[-1], layers)
    )


class Rollout:
    """z_{h+1} = network(concat(z_h, a_h)), and what the gradients need.

    For inputs that :func:`usable_rollout` agrees to, see :func:`rollout`.
    """

    def __init__(self, z: th.Tensor, actions: th.Tensor, layers: Sequence[Layer]):
        self.start, self.actions, self.layers = z.contiguous(), actions.contiguous(), layers
        self.arguments: NetworkArguments = arguments_of(layers)
        self.arguments.check_input(z.shape[-1] + actions.shape[-1])
        check_array("The latent", z, (*z.shape[:-1], layers[-1].weight.shape[-2]))
        check_array("The actions", actions, (len(actions), *z.shape[:-1], actions.shape[-1]))
        self.steps, self.rows = len(actions), z.numel() // z.shape[-1]
        work = self.steps * self.rows * self.arguments.multiply_adds
        self.threads = product_threads(work)

    def forward(self, keep: bool, latents: th.Tensor | None = None) -> th.Tensor:
        """z_1..z_H, [H, ..., Z].

        :param keep: whether :meth:`backward` follows
        :param latents: where they are written, contiguous; made anew if None
        """
        # Inputs are the rows (z_h, a_h), [H B, Z + A].
        start, num_layers = self.start, self.arguments.num_layers
        layers = self.arguments.forward((0,))
        rows = self.steps * self.rows
        self.inputs = start.new_empty(rows, self.layers[0].weight.shape[1])
        self.workspace = start.new_empty(self.arguments.workspace_size(keep, rows))
        if latents is None:
            latents = start.new_empty(self.steps, *start.shape)
        self.latents = latents
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

    def backward(self, grad_latents: th.Tensor, room: GradientRoom) -> None:
        """
        :param grad_latents: gradients by z_0..z_H as far as they do not come from later latents,
            [1 + H, ..., Z]; afterwards in full
        :param room: where those by the parameters are written
        """
        num_layers, rows = self.arguments.num_layers, self.steps * self.rows
        layers = self.arguments.backward((0,), 0)
        size = self.arguments.scratch_size(rows, self.threads)
        call(
            "rollout_backward",
            layers,
            num_layers,
            self.inputs,
            self.workspace,
            self.latents,
            grad_latents,
            room.addresses(),
            grad_latents.new_empty(size),
            self.steps,
            self.rows,
            self.threads,
        )


class _Rollout(th.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: th.Tensor,
        actions: th.Tensor,
        layers: Sequence[Layer],
        *parameters: th.Tensor | None,  # of the layers, for autograd to see
    ) -> th.Tensor:
        ctx.rollout = Rollout(z, actions, layers)
        # For the check that nobody changed them.
        ctx.save_for_backward(z, actions, *parameters)
        return ctx.rollout.forward(keep=True)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor) -> tuple[th.Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018
        steps: Rollout = ctx.rollout
        grad_latents = grads[0].new_empty(steps.steps + 1, *steps.start.shape)
        grad_latents[0] = 0.0
        grad_latents[1:] = grads[0]
        room = GradientRoom(steps.layers, 1, of_one=True)
        steps.backward(grad_latents, room)
        grad_parameters = [
            None if parameter is None else part
            for parameter, part in each_parameter(steps.layers, room.gradients)
        ]
        return grad_latents[0], None, None, *grad_parameters


def rollout(z: th.Tensor, actions: th.Tensor, layers: Sequence[Layer]) -> th.Tensor:
    """z_{h+1} = network(concat(z_h, a_h)) for inputs that :func:`usable_rollout` agrees to.

    :param z: z_0, [..., Z]
    :param actions: a_0..a_{H-1}, [H, ..., A]
    :param layers: of the network
    :return: z_1..z_H, [H, ..., Z]
    """
    parameters = [each for layer in layers for each in layer[:4]]
    if records_gradients(z, *parameters):
        return _Rollout.apply(z, actions, layers, *parameters)  # type: ignore[no-any-return]
    return Rollout(z, actions, layers).forward(keep=False)
