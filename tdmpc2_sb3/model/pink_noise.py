"""Exploration noise that is correlated in time.

White noise changes its mind every step, and what it does to a body averages out; pink noise also
pushes one way for a while, by which some bodies get further ("Pink noise is all you need", Eberhard
et al., ICLR 2023).

Shapes: E environments, A action, K processes.
"""

from __future__ import annotations

import math

import torch as th

NUM_OCTAVES = 8


class PinkNoise:
    """Standard normal numbers whose power falls about as 1/f over the periods of 2 to some hundreds
    of steps.

    They are scaled sums of K independent processes of the same variance: white noise, and for
    k = 1..K-1 first-order autoregressive ones that forget with a time constant of 2^k steps. Each
    adds its power below its own corner frequency, one an octave.

    :param num_envs: E
    :param action_dim: A
    :param generator: drawn from, here and in :meth:`draw`
    """

    def __init__(self, num_envs: int, action_dim: int, generator: th.Generator):
        self._generator = generator
        constants = 2.0 ** th.arange(NUM_OCTAVES, dtype=th.float32, device=generator.device)
        keep = th.exp(-1.0 / constants).view(-1, 1, 1)
        keep[0] = 0.0
        self._keep, self._renew = keep, (1.0 - keep.square()).sqrt()
        #: Processes as of the last draw, all of unit variance, [K, E, A].
        self.state = self._normal((NUM_OCTAVES, num_envs, action_dim))

    def _normal(self, shape: tuple[int, ...]) -> th.Tensor:
        device = self._generator.device
        return th.randn(shape, generator=self._generator, device=device, dtype=th.float32)

    def draw(self) -> th.Tensor:
        """The next step's numbers, [E, A]."""
        new = self._normal(tuple(self.state.shape))
        self.state = self._keep * self.state + self._renew * new
        return self.state.sum(0) / math.sqrt(NUM_OCTAVES)


def uniform(noise: th.Tensor) -> th.Tensor:
    """Standard normal numbers as uniform ones in [-1, 1], in the same order."""
    return th.erf(noise / math.sqrt(2.0))
