"""Whole numbers as actions: of [-1, 1], in which is planned, every value has an equal share."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces


def is_of_integers(space: spaces.Space) -> bool:
    """Whether actions are whole numbers."""
    return isinstance(space, spaces.Box) and space.dtype.kind in "iub"


def centres(action: np.ndarray, space: spaces.Space) -> np.ndarray:
    """The centres of the values' shares."""
    low, count = _shares(space)
    return (2.0 * (np.asarray(action, np.float64) - low) + 1.0) / count - 1.0


def values_at(scaled: np.ndarray, space: spaces.Space) -> np.ndarray:
    """The values in whose shares numbers in [-1, 1] lie."""
    low, count = _shares(space)
    share = np.floor(0.5 * (np.asarray(scaled, np.float64) + 1.0) * count)
    values = low + np.clip(share, 0.0, count - 1.0)
    assert isinstance(space, spaces.Box)
    # The ends of 64 bits are no doubles: what rounds to them or beyond is the end itself.
    within = values < space.high.astype(np.float64)
    return np.where(within, np.where(within, values, low).astype(space.dtype), space.high)


def _shares(space: spaces.Space) -> tuple[np.ndarray, np.ndarray]:
    """The least value of every action dimension, and how many there are."""
    assert isinstance(space, spaces.Box)
    low = space.low.astype(np.float64)
    return low, space.high.astype(np.float64) - low + 1.0
