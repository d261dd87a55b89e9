"""The recurrence of state-space dynamics and what is beside it, as differentiable functions.

The plain counterparts are in :mod:`tdmpc2_sb3.model.dynamics.ssm`; tests compare them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch as th

from tdmpc2_sb3.kernels.conditions import records_gradients, threads_for
from tdmpc2_sb3.kernels.elementwise import with_even_rows, zeros
from tdmpc2_sb3.kernels.library import call


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
    b, distance = with_even_rows(b)
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
            threads_for(a.numel()),
        )
    return grad_x


def _gelu_sum_forward(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    y = th.empty_like(a)
    b, distance = with_even_rows(b)
    if a.numel():
        call(
            "gelu_sum_forward",
            a,
            b,
            y,
            a.numel() // a.shape[-1],
            a.shape[-1],
            distance,
            threads_for(a.numel()),
        )
    return y


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
        grad_inputs = selective_scan_backward(grads[0], Scan(*inputs), states)
        return *grad_inputs[:3], *grad_inputs[3]


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
    drive, distance = with_even_rows(scan.drive)
    grad, modes = grad.contiguous(), len(scan.alpha)
    grad_selection, grad_start = th.empty_like(scan.selection), th.empty_like(scan.start)
    grad_drive = th.empty_like(states)
    parameters = zeros(states, 3, modes)
    threads = threads_for(scan.selection.numel())
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
    drive, distance = with_even_rows(scan.drive)
    selection = scan.selection
    states = selection.new_empty(*selection.shape[:-1], 2 * len(scan.alpha))
    if selection.numel():
        call(
            "selective_scan_forward",
            *scan._replace(drive=drive),
            states,
            *scan.sizes(),
            distance,
            threads_for(selection.numel()),
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
