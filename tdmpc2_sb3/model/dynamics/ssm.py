"""Structured state-space (SSM) dynamics: a whole horizon as one batched evaluation.

A stack of diagonal state-space layers whose initial state comes from z_0 and whose inputs are the
actions. It is linear in its state, so nothing but the elementwise recurrence runs step after step:
every matrix product takes the rows of all steps at once, and all terms in z_0 are computed once for
all the action sequences that start there.

With features c = Mish(LN(W_c z_0)), per step k and layer l (LN: LayerNorm):

    u_k^0   = W_a a_k + W_u c
    v_k     = LN(u_k^{l-1})
    dt_k    = clamp(softplus(beta + W_2 W_1 v_k), DT_MIN, DT_MAX)   # W_2 W_1: selective only
    x_0     = P_l c
    x_{k+1} = Abar_k x_k + G_k (B v_k)                              # exact zero-order hold
    u_k^l   = u_k^{l-1} + W GELU(C x_{k+1} + V v_k)                 # D -> 2D -> D
    z_{k+1} = SimNorm(LN(W_o u_k^L))

The layer follows S5 (arXiv:2208.04933), the input-dependent step size Mamba (arXiv:2312.00752).

Shapes: ``...`` batch axes, H horizon, A action, Z latent, D width, P complex modes, C conditioning.
A complex number is kept as two real ones, [..., 2P] = (real parts, imaginary parts), because
compilers and Apple's backend handle complex tensors poorly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol, cast

import torch as th
from torch import nn
from torch.nn import functional as F

from tdmpc2_sb3.kernels import Layer, Norm, StateSpace, StateSpaceLayer, join
from tdmpc2_sb3.model import operations
from tdmpc2_sb3.model.dynamics.base import DynamicsState, LatentDynamics
from tdmpc2_sb3.model.dynamics.parameter_matching import (
    HIDDEN_FACTOR,
    SELECTIVE_RANK,
    SSMSizes,
    match_sizes,
)
from tdmpc2_sb3.model.layers import FastLinear, Mish, NormedLinear, SimNorm
from tdmpc2_sb3.model.operations import DT_MAX, DT_MIN, has_kernel, linear

ALPHA_MIN = 1e-3  # smallest decay rate, per agent step
RING_INNER, RING_OUTER = 0.7, 0.99  # |Abar| at the start
MAX_LR_SCALE = 100.0


class Discretisation(NamedTuple):
    """Abar = exp(dt lambda) and G = (Abar - 1) / lambda by real and imaginary parts, [..., P]."""

    decay_real: th.Tensor
    decay_imag: th.Tensor
    gain_real: th.Tensor
    gain_imag: th.Tensor


def discretise(alpha: th.Tensor, omega: th.Tensor, dt: th.Tensor) -> Discretisation:
    """Exact zero-order hold of x' = lambda x + b for lambda = -alpha + i omega over a time dt.

    expm1 and the half angle keep G accurate for small dt, where exp(dt lambda) - 1 cancels.

    :param alpha: decay rates > 0, [P]
    :param omega: angular frequencies, [P]
    :param dt: step sizes > 0, [..., P]
    """
    shrink = th.expm1(-dt * alpha)  # e - 1
    scale = shrink + 1
    half = 0.5 * dt * omega
    sin_half = th.sin(half)
    sin = 2 * sin_half * th.cos(half)
    versine = 2 * sin_half * sin_half  # 1 - cos(dt omega)
    cos = 1 - versine
    top_real = shrink * cos - versine  # Abar - 1
    top_imag = scale * sin
    norm = 1 / (alpha * alpha + omega * omega)
    rate, frequency = alpha * norm, omega * norm
    return Discretisation(
        scale * cos,
        top_imag,
        frequency * top_imag - rate * top_real,
        -rate * top_imag - frequency * top_real,
    )


@has_kernel("gelu_sum")
def gelu_sum(a: th.Tensor, b: th.Tensor) -> th.Tensor:
    """GELU(a + b) in its tanh approximation: one kernel, or one exponential where compiled."""
    x = a + b
    if th.compiler.is_compiling():
        return x * th.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x))
    return F.gelu(x, approximate="tanh")


class LayerParts(Protocol):
    """What :func:`advance` asks of a layer; H steps at once."""

    def normed(self, stream: th.Tensor) -> th.Tensor:
        """v = LN(u), [H, ..., D]."""

    def products(self, v: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """B v [H, ..., 2P], V v [H, ..., 2D], and W_2 W_1 v, [H, ..., P] if selective."""

    def states(self, selection: th.Tensor | None, drive: th.Tensor, x: th.Tensor) -> th.Tensor:
        """x_1..x_H, [H, ..., 2P]."""

    def activated(self, states: th.Tensor, direct: th.Tensor) -> th.Tensor:
        """GELU(C x + V v), [H, ..., 2D]."""

    def mixed(self, stream: th.Tensor, hidden: th.Tensor) -> th.Tensor:
        """u + W h, [H, ..., D]."""


def advance(layer: LayerParts, stream: th.Tensor, x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """A layer over a horizon, whether autograd or :mod:`tdmpc2_sb3.fast.state_space_gradients`
    takes the gradients of its parts.

    :param stream: u_0..u_{H-1} of the layer below, [H, ..., D]
    :param x: x_0, [..., 2P]
    :return: the stream of this layer, [H, ..., D]; x_1..x_H, [H, ..., 2P]
    """
    drive, direct, selection = layer.products(layer.normed(stream))
    states = layer.states(selection, drive, x)
    return layer.mixed(stream, layer.activated(states, direct)), states


class SSMLayer(nn.Module):
    """One diagonal state-space layer in a residual block.

    :param width: D
    :param modes: P
    :param selective: let the step size depend on the input
    """

    def __init__(self, width: int, modes: int, selective: bool):
        super().__init__()
        self.modes = modes
        self.rank = SELECTIVE_RANK if selective else 0
        self.norm = nn.LayerNorm(width, dtype=th.float32)
        self.drive = FastLinear(width, 2 * modes, bias=False)  # B
        hidden = HIDDEN_FACTOR * width
        self.readout = FastLinear(2 * modes, hidden, bias=False)  # C
        self.direct = FastLinear(width, hidden, bias=False)  # V
        self.mix = FastLinear(hidden, width, bias=False)  # W
        self.nu = nn.Parameter(th.empty(modes, dtype=th.float32))
        self.omega = nn.Parameter(th.empty(modes, dtype=th.float32))
        self.beta = nn.Parameter(th.empty(modes, dtype=th.float32))
        if selective:
            self.select_in = FastLinear(width, SELECTIVE_RANK, bias=False)  # W_1
            self.select_out = FastLinear(SELECTIVE_RANK, modes, bias=False)  # W_2
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Eigenvalues on a ring, |Abar| uniform by area, dt = 1 agent step; the rest by fan-in.

        The usual S4D and HiPPO rates forget and react over hundreds of steps: at a horizon of 3
        the state would hardly feel an action, and the planner would start almost blind.
        """
        self.norm.reset_parameters()
        for product in (self.drive, self.readout, self.direct, self.mix):
            scaled_normal_(product)
        with th.no_grad():
            squared = th.empty_like(self.nu).uniform_(RING_INNER**2, RING_OUTER**2)
            self.nu.copy_(th.log(-0.5 * th.log(squared) - ALPHA_MIN))
            self.omega.uniform_(0.0, math.pi / 2)
            self.beta.fill_(math.log(math.expm1(1.0)))  # softplus(beta) = 1
            if self.rank:
                scaled_normal_(self.select_in)
                self.select_out.weight.zero_()

    def step(self, stream: th.Tensor, x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """One step.

        :param stream: u^{l-1}, [..., D]
        :param x: state, [..., 2P]
        :return: u^l [..., D], next state [..., 2P]
        """
        out, states = advance(self, stream.unsqueeze(0), x)
        return out.squeeze(0), states[0]

    def rollout(self, stream: th.Tensor, x: th.Tensor) -> th.Tensor:
        """A whole horizon.

        :param stream: u_0..u_{H-1} of the layer below, [H, ..., D]
        :param x: initial state, [..., 2P]
        :return: the same of this layer, [H, ..., D]
        """
        return advance(self, stream, x)[0]

    def normed(self, stream: th.Tensor) -> th.Tensor:
        """See :class:`LayerParts`."""
        norm = Norm(eps=self.norm.eps) if type(self.norm) is nn.LayerNorm else None
        return operations.normed(self.norm, norm, stream, self.norm)

    def products(self, v: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """See :class:`LayerParts`."""
        weights = self._joined_weights()
        sizes = [len(weight) for weight in weights]
        drive, direct, *selection = linear(v, th.cat(weights)).split(sizes, dim=-1)
        return drive, direct, self.select_out(selection[0]) if self.rank else None

    def _joined_weights(self) -> list[th.Tensor]:
        """B, V and, if selective, W_1: all are multiplied with v."""
        weights: list[th.Tensor] = [self.drive.weight, self.direct.weight]
        return [*weights, self.select_in.weight] if self.rank else weights

    def as_kernel(self) -> StateSpaceLayer:
        """The layer as the CPU kernels take it."""
        return StateSpaceLayer(
            self.norm.weight,
            self.norm.bias,
            self.norm.eps,
            products=Layer(join(self._joined_weights(), dim=0), None),
            selection=self.select_out.as_kernel()[0] if self.rank else None,
            readout=self.readout.as_kernel()[0],
            mix=self.mix.as_kernel()[0],
            alpha=operations.exponential(self.nu, ALPHA_MIN),
            omega=self.omega,
            beta=self.beta,
        )

    def states(self, selection: th.Tensor | None, drive: th.Tensor, x: th.Tensor) -> th.Tensor:
        """See :class:`LayerParts`."""
        alpha, omega, beta = self._alpha(), self.omega, self.beta
        if selection is None:
            return scan(discretise(alpha, omega, step_sizes(beta)), drive, x)
        return selective_scan(selection, drive, x, alpha, omega, beta)

    def activated(self, states: th.Tensor, direct: th.Tensor) -> th.Tensor:
        """See :class:`LayerParts`."""
        return gelu_sum(self.readout(states), direct)

    def mixed(self, stream: th.Tensor, hidden: th.Tensor) -> th.Tensor:
        """See :class:`LayerParts`."""
        return stream + self.mix(hidden)  # type: ignore[no-any-return]

    def step_sizes(self, selection: th.Tensor | None) -> th.Tensor:
        """dt for W_2 W_1 v, [..., P], or of a time-invariant layer, [P]."""
        return step_sizes(self.beta if selection is None else self.beta + selection)

    def _alpha(self) -> th.Tensor:
        return ALPHA_MIN + self.nu.exp()

    def discretise(self, dt: th.Tensor) -> Discretisation:
        """Abar and G of this layer's modes for step sizes dt, [..., P]."""
        return discretise(self._alpha(), self.omega, dt)


def step_sizes(raw: th.Tensor) -> th.Tensor:
    """dt of beta + W_2 W_1 v, elementwise."""
    return F.softplus(raw).clamp(DT_MIN, DT_MAX)


@has_kernel("selective_scan")
def selective_scan(
    selection: th.Tensor,
    drive: th.Tensor,
    x: th.Tensor,
    alpha: th.Tensor,
    omega: th.Tensor,
    beta: th.Tensor,
) -> th.Tensor:
    """:func:`scan` with step sizes that depend on the input.

    :param selection: W_2 W_1 v, [H, ..., P]
    :param drive: see :func:`scan`
    :param x: see :func:`scan`
    :param alpha: decay rates > 0, [P]
    :param omega: angular frequencies, [P]
    :param beta: step sizes without input, before softplus, [P]
    """
    return scan(discretise(alpha, omega, step_sizes(beta + selection)), drive, x)


def scan(system: Discretisation, drive: th.Tensor, x: th.Tensor) -> th.Tensor:
    """The recurrence x_{k+1} = Abar_k x_k + G_k b_k.

    A plain loop: at the horizons of a planner it costs less than the sums of a parallel scan.

    :param system: parts of [P], or of [H, ..., P] where the step size depends on the input
    :param drive: b_0..b_{H-1}, [H, ..., 2P]
    :param x: x_0, [..., 2P]
    :return: x_1..x_H, [H, ..., 2P]
    """
    real, imag = x.chunk(2, dim=-1)
    drive_real, drive_imag = drive.chunk(2, dim=-1)
    varying = system.decay_real.dim() > 1
    states = []
    for k in range(drive.shape[0]):
        a_real, a_imag, g_real, g_imag = (part[k] if varying else part for part in system)
        b_real, b_imag = drive_real[k], drive_imag[k]
        real, imag = (
            a_real * real - a_imag * imag + g_real * b_real - g_imag * b_imag,
            a_real * imag + a_imag * real + g_real * b_imag + g_imag * b_real,
        )
        states.append(th.cat([real, imag], dim=-1))
    return th.stack(states)


class SSMDynamics(LatentDynamics):
    """Structured state-space dynamics with as many parameters as the MLP's.

    ``depth=1, selective=False`` is a Koopman operator: one linear time-invariant system that
    advances a lifted latent under lifted actions.

    :param depth: L, layers
    :param selective: let the step sizes depend on the input (Mamba); otherwise time-invariant (S5)
    :param modes: P, complex modes a layer; None: a quarter of the width
    :param width: D, of the residual stream; None: found by parameter matching
    :param conditioning: C, features of z_0; None: found by parameter matching
    :param autoregressive: feed each predicted latent back in the place of z_0 (an ablation: it
        gives up the batched horizon)
    :param lr_scale: learning rate of the dynamics relative to the model's other parts
    """

    def __init__(
        self,
        latent_dim: int,
        action_dim: int,
        mlp_dim: int,
        simnorm_dim: int = 8,
        *,
        depth: int = 2,
        selective: bool = True,
        modes: int | None = None,
        width: int | None = None,
        conditioning: int | None = None,
        autoregressive: bool = False,
        lr_scale: float = 1.0,
    ):
        super().__init__(latent_dim, action_dim, mlp_dim, simnorm_dim)
        _check_at_least_one(depth=depth, modes=modes, width=width, conditioning=conditioning)
        if not isinstance(lr_scale, int | float) or not 0 < lr_scale <= MAX_LR_SCALE:
            raise ValueError(
                f"lr_scale={lr_scale!r}: the SSM dynamics need a number above 0, at most "
                f"{MAX_LR_SCALE:g}."
            )
        self.depth = depth
        self.selective = selective
        self.autoregressive = autoregressive
        self.lr_scale = float(lr_scale)
        self.sizes = self._choose_sizes(width, modes, conditioning)
        d, p, c = self.sizes.width, self.sizes.modes, self.sizes.conditioning
        self.features = NormedLinear(latent_dim, c)  # W_c
        self.features_in = FastLinear(c, d)  # W_u
        self.action_in = FastLinear(action_dim, d, bias=False)  # W_a
        self.starts = FastLinear(c, 2 * p * depth, bias=False)  # P_1..P_L
        self.layers = nn.ModuleList(SSMLayer(d, p, selective) for _ in range(depth))
        self.out = NormedLinear(d, latent_dim, SimNorm(simnorm_dim))  # W_o
        self.reset_parameters()

    def _choose_sizes(
        self, width: int | None, modes: int | None, conditioning: int | None
    ) -> SSMSizes:
        if (width is None) != (conditioning is None):
            raise ValueError(
                f"width={width} and conditioning={conditioning}: give both, "
                "or neither to match the MLP's parameter count."
            )
        if width is not None and conditioning is not None:
            return SSMSizes(width, modes or -(-width // 4), conditioning)
        sizes = self.latent_dim, self.action_dim, self.mlp_dim
        return match_sizes(*sizes, self.depth, self.selective, modes)

    def reset_parameters(self) -> None:
        """Draw all parameters anew; a model's global initialiser must leave this module to it."""
        for product in (
            self.features, self.features_in, self.action_in, self.starts, self.out
        ):  # fmt: skip
            scaled_normal_(product)
        self.features.ln.reset_parameters()
        self.out.ln.reset_parameters()
        for layer in self.stack():
            layer.reset_parameters()

    def slow_parameters(self) -> Iterator[nn.Parameter]:
        """nu, omega and beta: they take no weight decay and a smaller learning rate.

        They are exponents and frequencies: a small change of them alters every step of a horizon.
        """
        for layer in self.stack():
            yield from (layer.nu, layer.omega, layer.beta)

    def stack(self) -> list[SSMLayer]:
        return cast(list[SSMLayer], list(self.layers))

    def initial_state(self, latent: th.Tensor) -> DynamicsState:
        """See :meth:`LatentDynamics.initial_state`.

        :return: W_u c [..., D], then x_0 of each layer, [..., 2P]
        """
        features = self.features(latent)
        starts = self.starts(features).chunk(self.depth, dim=-1)
        return (self.features_in(features), *starts)

    def step(self, state: DynamicsState, action: th.Tensor) -> tuple[th.Tensor, DynamicsState]:
        """See :meth:`LatentDynamics.step`."""
        context, *starts = state
        stream = self.action_in(action) + context  # u^0
        next_states = []
        for layer, x in zip(self.stack(), starts, strict=True):
            stream, next_x = layer.step(stream, x)
            next_states.append(next_x)
        latent = self.out(stream)  # z'
        if self.autoregressive:
            context = self.features_in(self.features(latent))
        return latent, (context, *next_states)

    def rollout(self, state: DynamicsState, actions: th.Tensor) -> th.Tensor:
        """See :meth:`LatentDynamics.rollout`."""
        if self.autoregressive:
            return super().rollout(state, actions)
        context, *starts = state
        stream = self.action_in(actions) + context  # [H, ..., D]
        for layer, x in zip(self.stack(), starts, strict=True):
            stream = layer.rollout(stream, x)
        return self.out(stream)  # [H, ..., Z]

    def as_kernel(self) -> StateSpace | None:
        """See :meth:`LatentDynamics.as_kernel`; a subclass or part may compute something else."""
        features, out = self.features.as_kernel(), self.out.as_kernel()
        is_known = all(type(each) in _KNOWN_PARTS for each in self.modules())
        if self.autoregressive or not is_known or features is None or out is None:
            return None
        return StateSpace(
            features=features[0],
            context=self.features_in.as_kernel()[0],
            starts=self.starts.as_kernel()[0],
            action=self.action_in.as_kernel()[0],
            out=out[0],
            stack=[layer.as_kernel() for layer in self.stack()],
        )


_KNOWN_PARTS = (
    *(SSMDynamics, SSMLayer, NormedLinear, FastLinear, Mish, SimNorm),
    *(nn.LayerNorm, nn.ModuleList),
)


def scaled_normal_(layer: nn.Linear | NormedLinear) -> None:
    """Truncated normal of variance 1 / fan-in, zero bias.

    Actions meet the features of z_0 in one sum: at a common small deviation a handful of actions
    would drown in hundreds of features.
    """
    nn.init.trunc_normal_(layer.weight, std=1 / math.sqrt(layer.in_features), a=-2.0, b=2.0)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _check_at_least_one(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(
                f"{name}={size!r}: the SSM dynamics need a whole number of at least 1 for it."
            )
