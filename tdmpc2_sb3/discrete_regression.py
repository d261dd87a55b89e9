"""Scalars as categorical distributions over fixed bins: symlog, two-hot, cross-entropy.

Rewards and values are regressed as classifications over K bins that are evenly spaced in symlog
space (DreamerV3, arXiv:2301.04104, eq. 9-10; TD-MPC2, arXiv:2310.16828, appendix).

Shapes: ``...`` any leading axes, K bins.
"""

from __future__ import annotations

import torch as th
import torch.nn.functional as F


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
    # A hat function of width one bin around every centre: the same weights as gather-and-scatter,
    # without an index.
    width = (bins[-1] - bins[0]) / (bins.shape[0] - 1)
    position = symlog(x).clamp(bins[0], bins[-1]).unsqueeze(-1)  # [..., 1]
    return (1.0 - (position - bins).abs() / width).clamp_min(0.0)  # [..., K]


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
