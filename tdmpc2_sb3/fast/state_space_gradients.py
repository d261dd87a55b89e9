"""The latents that state-space dynamics predict, with their gradients by hand.

See :mod:`tdmpc2_sb3.model.dynamics.ssm` for the layers, :mod:`tdmpc2_sb3.fast.gradients` for why.

Shapes: T steps, B rows, A action, Z latent, C features of z_0, D width, P modes, L layers.
"""

from __future__ import annotations

from typing import TypeGuard

import torch as th

from tdmpc2_sb3 import kernels
from tdmpc2_sb3.fast.network_gradients import DirectNetwork, GradientArrays, JoinedProducts, assign
from tdmpc2_sb3.kernels import Norm
from tdmpc2_sb3.model.dynamics import LatentDynamics
from tdmpc2_sb3.model.dynamics.ssm import ALPHA_MIN, SSMDynamics, SSMLayer, advance


class _Layer:
    """One selective layer in its residual block, over all steps; its parts for
    :func:`tdmpc2_sb3.model.dynamics.ssm.advance` keep what :meth:`backward` needs.

    :param layer: whose parameters get gradients
    """

    def __init__(self, layer: SSMLayer):
        self._layer = layer
        self._norm = Norm(eps=layer.norm.eps)
        self._modes = layer.modes
        self._products = JoinedProducts(
            [layer.drive.weight, layer.direct.weight, layer.select_in.weight]
        )
        self._select = DirectNetwork(layer.select_out.as_kernel())
        self._readout = DirectNetwork(layer.readout.as_kernel())
        self._mix = DirectNetwork(layer.mix.as_kernel())

    def evaluate(self, stream: th.Tensor, start: th.Tensor) -> th.Tensor:
        """
        :param stream: of the layer below, contiguous, [T, B, D]
        :param start: x_0, contiguous, [B, 2P]
        :return: the stream of this layer, [T, B, D]
        """
        return advance(self, stream, start)[0]

    def normed(self, stream: th.Tensor) -> th.Tensor:
        """See :class:`tdmpc2_sb3.model.dynamics.ssm.LayerParts`, as the following."""
        self._stream = stream
        self._statistics = stream.new_empty(2, stream.shape[:-1].numel())
        normed, norm = th.empty_like(stream), self._layer.norm
        kernels.norm_forward(stream, norm.weight, norm.bias, normed, self._statistics, self._norm)
        return normed

    def products(self, v: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        rank, modes, leading = self._layer.rank, self._modes, v.shape[:-1]
        products = self._products.evaluate(v.view(-1, v.shape[-1]))[0]
        drive = products[:, : 2 * modes].view(*leading, -1)
        self._direct = products[:, 2 * modes : -rank]
        selection = self._select.evaluate(products[:, -rank:])[0].view(*leading, -1)
        return drive, self._direct, selection

    def states(self, selection: th.Tensor | None, drive: th.Tensor, x: th.Tensor) -> th.Tensor:
        assert selection is not None
        layer = self._layer
        alpha = kernels.exponential(layer.nu, added=ALPHA_MIN)
        self._scanned = kernels.Scan(selection, drive, x, alpha, layer.omega, layer.beta)
        self._states = kernels.selective_scan(*self._scanned)
        return self._states

    def activated(self, states: th.Tensor, direct: th.Tensor) -> th.Tensor:
        self._read = self._readout.evaluate(states.view(-1, 2 * self._modes))[0]
        return kernels.gelu_sum(self._read, direct)

    def mixed(self, stream: th.Tensor, hidden: th.Tensor) -> th.Tensor:
        return kernels.add(stream, self._mix.evaluate(hidden)[0])

    def backward(self, grad_stream: th.Tensor) -> tuple[th.Tensor, GradientArrays]:
        """Gives the parameters their gradients.

        :param grad_stream: by this layer's stream, contiguous, [T B, D]; afterwards by that of the
            layer below
        :return: by x_0, [B, 2P]; those of the parameters
        """
        layer, modes = self._layer, self._modes
        rows, width = self._read.shape
        grad_hidden = kernels.zeros(grad_stream, rows, width)
        written = self._mix.backward(grad_stream.unsqueeze(0), grad_hidden)
        grad_read = kernels.gelu_sum_backward(grad_hidden, self._read, self._direct)
        grad_states = kernels.zeros(grad_stream, rows, 2 * modes)
        written += self._readout.backward(grad_read.unsqueeze(0), grad_states)
        grad_scan = kernels.selective_scan_backward(
            grad_states.view_as(self._states), self._scanned, self._states
        )
        grad_chosen = kernels.zeros(grad_stream, rows, layer.rank)
        grad_selection = grad_scan.selection.view(1, -1, modes)
        written += self._select.backward(grad_selection, grad_chosen)
        grad_products = kernels.join([grad_scan.drive.view_as(grad_states), grad_read, grad_chosen])
        grad_normed = kernels.zeros(grad_stream, *grad_stream.shape)
        written += self._products.backward(grad_products.unsqueeze(0), grad_normed)

        # Gain, shift and a bias in front.
        grad_affine = grad_stream.new_empty(3, grad_stream.shape[-1])
        gain, shift = layer.norm.weight, layer.norm.bias
        grad_input = kernels.norm_backward(
            grad_normed,
            self._stream.view_as(grad_normed),
            None,
            gain,
            shift,
            self._statistics,
            grad_affine,
            self._norm,
        )
        kernels.add(grad_stream, grad_input, grad_stream)
        grad_alpha, grad_omega, grad_beta = grad_scan.parameters
        grad_nu = kernels.exponential(layer.nu, grad_alpha)  # alpha is e^nu and a constant
        slow = [(layer.nu, grad_nu), (layer.omega, grad_omega), (layer.beta, grad_beta)]
        written += assign([*slow, (gain, grad_affine[0]), (shift, grad_affine[1])])
        return grad_scan.start, written


def with_inputs(
    latent: th.Tensor, predicted: th.Tensor, actions: th.Tensor
) -> tuple[th.Tensor, th.Tensor]:
    """Latents, and what they were predicted from.

    :param latent: z_0, [B, Z]
    :param predicted: z_1..z_T, [T, B, Z]
    :param actions: [T, B, A]
    :return: z_0..z_T, [1 + T, B, Z], and z_0..z_{T-1} beside the actions, [T B, Z + A]
    """
    latents = latent.new_empty(1 + len(predicted), *latent.shape)
    kernels.copy_(latent, latents[0])
    kernels.copy_(predicted, latents[1:])
    return latents, kernels.join([latents[:-1], actions]).view(
        -1, latent.shape[-1] + actions.shape[-1]
    )


class StateSpaceRollout:
    """Latents that selective state-space dynamics predict.

    :param dynamics: that predict
    :param simplices: of how many the latents are known to consist, see
        :func:`tdmpc2_sb3.kernels.on_simplices`
    """

    def __init__(self, dynamics: SSMDynamics, simplices: int):
        known = dynamics.as_kernel()
        assert known is not None, "ask takes first"
        self._sizes = dynamics.sizes
        self._features = DirectNetwork(kernels.on_simplices([known.features], simplices))
        self._context = DirectNetwork([known.context])
        self._starts = DirectNetwork([known.starts])
        self._action = DirectNetwork([known.action])
        self._out = DirectNetwork([known.out])
        self._layers = [_Layer(layer) for layer in dynamics.stack()]

    @staticmethod
    def takes(dynamics: LatentDynamics) -> TypeGuard[SSMDynamics]:
        """Whether every part is known here: a subclass may have changed any."""
        return (
            isinstance(dynamics, SSMDynamics)
            and dynamics.selective
            and dynamics.as_kernel() is not None
        )

    def evaluate(self, latent: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param latent: z_0, [B, Z]
        :param actions: [T, B, A]
        :return: z_0..z_T, [1 + T, B, Z], and z_0..z_{T-1} beside the actions, [T B, Z + A]
        """
        features = self._features.evaluate(latent)[0]
        context = self._context.evaluate(features)[0]
        starts = self._starts.evaluate(features)[0].chunk(len(self._layers), dim=-1)  # [B, 2P]
        moved = self._action.evaluate(actions.reshape(-1, actions.shape[-1]))[0]
        stream = kernels.add(moved, context).view(*actions.shape[:-1], -1)
        for layer, start in zip(self._layers, starts, strict=True):
            stream = layer.evaluate(stream, kernels.join([start]))
        predicted = self._out.evaluate(stream.view(-1, stream.shape[-1]))
        return with_inputs(latent, predicted.view(*actions.shape[:-1], -1), actions)

    def backward(self, grad_latents: th.Tensor) -> tuple[th.Tensor, GradientArrays]:
        """Gives the parameters their gradients.

        :param grad_latents: gradients by z_0..z_T as far as they do not come from later latents,
            [1 + T, B, Z]; written to
        :return: by z_0 in full, [B, Z]; those of the parameters
        """
        num_steps, num_rows = len(grad_latents) - 1, grad_latents.shape[1]
        grad_stream = kernels.zeros(grad_latents, num_steps * num_rows, self._sizes.width)
        written = self._out.backward(grad_latents[1:].view(1, len(grad_stream), -1), grad_stream)
        grad_starts: list[th.Tensor] = []
        for layer in reversed(self._layers):
            grad_start, of_layer = layer.backward(grad_stream)
            grad_starts.insert(0, grad_start)
            written += of_layer
        written += self._action.backward(grad_stream.unsqueeze(0))
        grad_context = kernels.zeros(grad_latents, 1, num_rows, self._sizes.width)
        for grad_step in grad_stream.view(num_steps, 1, num_rows, -1):
            kernels.add(grad_context, grad_step, grad_context)
        grad_features = kernels.zeros(grad_latents, num_rows, self._sizes.conditioning)
        written += self._context.backward(grad_context, grad_features)
        written += self._starts.backward(kernels.join(grad_starts).unsqueeze(0), grad_features)
        written += self._features.backward(grad_features.unsqueeze(0), grad_latents[0])
        return grad_latents[0], written
