"""The one chooser per operation: the CPU kernels where these may compute it, else plain torch.

The plain formulas stand where a reader looks for them, in layers, discrete_regression, the
dynamics, losses and the gradient step, and call this module or are marked by :func:`has_kernel`.
It alone asks whether :mod:`tdmpc2_sb3.kernels` may: they know float32 on a CPU, and no compiler
may be looking. Which layers they know is said by the parts' ``as_kernel``, None for any others.

Shapes: ``...`` leading axes, Z latent, A action, H horizon.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeAlias

import torch as th
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import get_total_norm

from tdmpc2_sb3 import kernels
from tdmpc2_sb3.kernels import Dropped, Layer, Norm, fixed_weights
from tdmpc2_sb3.kernels.interface import (  # one place has the numbers for Python and C
    DT_MAX,
    DT_MIN,
    ENTROPY_EPSILON,
    LOG_STD_MAX,
    LOG_STD_MIN,
    SCALE_HIGH,
    SCALE_LOW,
    SQUASH_EPSILON,
    TERMINATION_LOGIT,
)

__all__ = [
    "DT_MAX",
    "DT_MIN",
    "ENTROPY_EPSILON",
    "LOG_STD_MAX",
    "LOG_STD_MIN",
    "SCALE_HIGH",
    "SCALE_LOW",
    "SQUASH_EPSILON",
    "TERMINATION_LOGIT",
    "Dropped",
    "fixed_weights",
]

Arguments = ParamSpec("Arguments")
Formula: TypeAlias = Callable[Arguments, th.Tensor]
#: Gives layers as the kernels take them; None if they do not know them.
Layers: TypeAlias = Callable[[], Sequence[Layer] | None]


def has_kernel(name: str) -> Callable[[Formula[Arguments]], Formula[Arguments]]:
    """Of a plain formula, what computes it by the kernel of that name, which takes the same
    arguments, wherever the kernels take the first one."""
    kernel: Formula[Any] = getattr(kernels, name)

    def choose(plain: Formula[Arguments]) -> Formula[Arguments]:
        @functools.wraps(plain)
        def chosen(*args: Arguments.args, **kwargs: Arguments.kwargs) -> th.Tensor:
            if kernels.usable(args[0]):  # type: ignore[arg-type]
                return kernel(*args, **kwargs)
            return plain(*args, **kwargs)

        return chosen

    return choose


def network(
    plain: Callable[[th.Tensor], th.Tensor],
    layers: Layers,
    z: th.Tensor,
    a: th.Tensor | None = None,
) -> th.Tensor:
    """Layers in turn on concat(z, a), [..., out].

    :param plain: computes them by torch
    :param layers: the same
    :param z: [..., Z]
    :param a: the same leading axes, [..., A]; None if z is all
    """
    known = layers() if kernels.usable(z) else None
    if known is None:
        return plain(z if a is None else th.cat([z, a], dim=-1))
    return kernels.networks(z, a, known)


def ensemble(
    plain: Callable[[th.Tensor], th.Tensor],
    layers: Layers,
    z: th.Tensor,
    a: th.Tensor,
    members: th.Tensor | range,
    dropped: Dropped | None,
    frozen: bool,
) -> th.Tensor:
    """:func:`network` for chosen ones of several networks, [Q', ..., out].

    :param members: the Q' networks to evaluate
    :param dropped: dropout between the first product and its norm
    :param frozen: whether the parameters' own gradients are not wanted
    """
    known = layers() if kernels.usable(z) else None
    if known is None:
        return plain(th.cat([z, a], dim=-1))
    chosen = members if isinstance(members, range) else members.tolist()
    return kernels.networks(z, a, known, dropped, tuple(chosen), frozen)


def linear(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None = None) -> th.Tensor:
    """``F.linear`` by the CPU's faster products."""
    if kernels.usable(x):
        return kernels.networks(x, None, [Layer(weight, bias)])
    return F.linear(x, weight, bias)


def normed(
    plain: Callable[[th.Tensor], th.Tensor], norm: Norm | None, x: th.Tensor, ln: nn.LayerNorm
) -> th.Tensor:
    """A layer norm and what follows it, [..., out].

    :param plain: computes both by torch
    :param norm: what they are, as the kernels take it; None if they do not know it
    :param x: [..., out]
    :param ln: whose gain and shift are meant
    """
    if norm is None or not kernels.usable(x):
        return plain(x)
    return kernels.layer_norm(x, ln.weight, ln.bias, norm)


def rollout(
    plain: Callable[[], th.Tensor], layers: Layers, z: th.Tensor, actions: th.Tensor
) -> th.Tensor:
    """z_{h+1} = network(concat(z_h, a_h)): z_1..z_H, [H, ..., Z].

    :param plain: computes them step after step
    :param layers: of the network
    :param z: z_0, [..., Z]
    :param actions: a_0..a_{H-1}, [H, ..., A]
    """
    known = layers() if kernels.usable(z) else None
    if known is None or not kernels.usable_rollout(z, actions, known):
        return plain()
    return kernels.rollout(z, actions, known)


def exponential(x: th.Tensor, added: float) -> th.Tensor:
    """e^x + added without gradients; a plan that is replayed computes it anew."""
    if kernels.usable(x):
        return kernels.exponential(x, added=added)
    return x.detach().exp() + added


def move_towards_(arrays: list[th.Tensor], others: list[th.Tensor], rate: float) -> None:
    """Moves each array by that share of the way to the other one, in place."""
    if kernels.usable_arrays(arrays) and kernels.usable_arrays(others):
        kernels.lerp_(arrays, others, rate)
    else:
        th._foreach_lerp_(arrays, others, rate)


def total_norm(arrays: Sequence[th.Tensor]) -> th.Tensor:
    """Euclidean norm of all numbers of the arrays, of which there is at least one, []."""
    if kernels.usable_arrays(arrays):
        return kernels.total_norm(arrays)
    return get_total_norm(arrays)


__all__ = [
    "Dropped",
    "Layer",
    "Layers",
    "Norm",
    "ensemble",
    "exponential",
    "fixed_weights",
    "has_kernel",
    "linear",
    "move_towards_",
    "network",
    "normed",
    "rollout",
    "total_norm",
]
