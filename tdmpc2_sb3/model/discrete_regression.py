"""Scalars as categorical distributions over fixed bins: symlog, two-hot, cross-entropy.

Rewards and values are regressed as classifications over K bins that are evenly spaced in symlog
space (DreamerV3, arXiv:2301.04104, eq. 9-10; TD-MPC2, arXiv:2310.16828, appendix).

Shapes: ``...`` any leading axes, K bins.
"""

from __future__ import annotations

import torch as th
import torch.nn.functional as F

from tdmpc2_sb3.model.operations import has_kernel


def symlog(x: th.Tensor) -> th.Tensor:
    """sign(x) ln(1 + |x|), elementwise."""
    return th.sign(x) * th.log1p(th.abs(x))


def symexp(x: th.Tensor) -> th.Tensor:
    """sign(x) (e^|x| - 1), the inverse of :func:`symlog`, elementwise."""
    return th.sign(x) * th.expm1(th.abs(x))


def make_bins(num_bins: int, vmin: float = -10.0, vmax: float = 10.0) -> th.Tensor:
    """Centres of the bins in symlog space, [K], float32.

    :param num_bins: K, at least 2
    :param vmin: centre of the first bin
    :param vmax: centre of the last bin
    :raises ValueError: if K is below 2 or the range is empty
    """
    if num_bins < 2:
        raise ValueError(f"num_bins is {num_bins}: two-hot needs at least 2 bins.")
    if not vmin < vmax:
        raise ValueError(f"The bins' range [{vmin}, {vmax}] is empty: vmin must be below vmax.")
    return th.linspace(vmin, vmax, num_bins, dtype=th.float32)


def two_hot(x: th.Tensor, bins: th.Tensor) -> th.Tensor:
    """Spreads symlog(x), clipped to the range, over its two neighbouring bins.

    :param x: scalars, [...]
    :param bins: evenly spaced bin centres in symlog space, [K]
    :return: weights that sum to 1, [..., K]
    """
    return _hats(_position(x, bins), bins)


def _hats(position: th.Tensor, like: th.Tensor) -> th.Tensor:
    """A hat function of width one bin around every centre, [..., K]: the same weights as
    gather-and-scatter, without an index.

    :param like: of K numbers along its last axis, of the result's type
    """
    steps = th.arange(like.shape[-1], dtype=like.dtype, device=like.device)
    return (1.0 - (position.unsqueeze(-1) - steps).abs()).clamp_min(0.0)


def _position(x: th.Tensor, bins: th.Tensor) -> th.Tensor:
    """symlog(x) clipped to the bins' range, in bins from the first one, in [0, K - 1]."""
    last = bins.shape[0] - 1
    return ((symlog(x) - bins[0]) * (last / (bins[-1] - bins[0]))).clamp(0.0, last)


@has_kernel("two_hot_inverse")
def two_hot_inverse(logits: th.Tensor, bins: th.Tensor) -> th.Tensor:
    """The scalar that a categorical prediction stands for: symexp of the expected bin.

    :param logits: unnormalised log-probabilities, [..., K]
    :param bins: bin centres in symlog space, [K]
    :return: scalars, [...]
    """
    return symexp(F.softmax(logits, dim=-1) @ bins)


def soft_cross_entropy(logits: th.Tensor, target: th.Tensor) -> th.Tensor:
    """-sum_k target_k log softmax(logits)_k.

    :param logits: [..., K]
    :param target: weights, e.g. of :func:`two_hot`, [..., K]
    :return: [...]
    """
    return -(target * F.log_softmax(logits, dim=-1)).sum(-1)


def two_hot_cross_entropy(logits: th.Tensor, x: th.Tensor, bins: th.Tensor) -> th.Tensor:
    """:func:`soft_cross_entropy` with the :func:`two_hot` weights of scalars as the target.

    :param logits: [..., K]
    :param x: scalars without gradients, whose axes are the last ones of ``...``
    :param bins: evenly spaced bin centres in symlog space, [K]
    :return: [...]
    """
    return _cross_entropy_at(logits, _position(x, bins))


@has_kernel("two_hot_cross_entropy")
def _cross_entropy_at(logits: th.Tensor, position: th.Tensor) -> th.Tensor:
    return soft_cross_entropy(logits, _hats(position, logits))
