"""Means of what is logged, summed on the device and read only when the log is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch as th


class RunningMeans:
    """Averages named scalars between two dumps without waiting for the device at every step."""

    def __init__(self) -> None:
        self._sums: dict[str, th.Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, th.Tensor]) -> None:
        """
        :param values: scalars, or tensors whose mean is meant
        """
        for name, value in values.items():
            mean = value.detach().mean() if value.dim() else value.detach()
            self._sums[name] = self._sums[name] + mean if name in self._sums else mean
            self._counts[name] = self._counts.get(name, 0) + 1

    def pop(self) -> dict[str, float]:
        """The means since the last call; the sums start anew."""
        means = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums.clear()
        self._counts.clear()
        return means
