"""dm_env specs as Gymnasium spaces, and the flattening of observations.

Shapes: A = number of actuators, O = length of the flat observation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

#: dm_control writes "no limit" as +-1e10 (LQR). Mapping [-1, 1] onto that would make every action
#: enormous. The optimal LQR controller stays within +-5.4 over 20 drawn models; 10 leaves room.
UNBOUNDED = 1e10
UNBOUNDED_REPLACEMENT = 10.0


class ActionMap:
    """Maps actions in [-1, 1] onto an actuator's bounds.

    :param minimum: lower bounds of the actuators, [A]
    :param maximum: upper bounds of the actuators, [A]
    """

    def __init__(self, minimum: NDArray[np.float64], maximum: NDArray[np.float64]) -> None:
        minimum = np.asarray(minimum, dtype=np.float64)
        maximum = np.asarray(maximum, dtype=np.float64)
        self.low = np.where(minimum <= -UNBOUNDED, -UNBOUNDED_REPLACEMENT, minimum)
        self.high = np.where(maximum >= UNBOUNDED, UNBOUNDED_REPLACEMENT, maximum)
        self.size = self.low.size
        self._shape = (self.size,)
        self._same = (self.low == -1.0) & (self.high == 1.0)
        self.identity = bool(self._same.all())
        self.space = gymnasium.spaces.Box(-1.0, 1.0, (self.size,), np.float32)

    def to_control(self, action: Any) -> NDArray[np.float64]:
        """Return the actuator controls of an action: clipped to [-1, 1], then stretched.

        :param action: [A], finite; values outside [-1, 1] count as the nearest bound
        :return: [A]; -1 and 1 give the bounds exactly
        :raises ValueError: if the shape is wrong, or it holds something else than numbers
        :raises RuntimeError: if a value is not finite (a fault of the caller's model, which
            hyperparameter search must not mistake for a bad setting)
        """
        try:
            action = np.array(action, dtype=np.float64)  # a copy: the caller keeps his own
        except (TypeError, ValueError) as error:
            raise ValueError(f"The action is {action!r}; give {self.size} numbers.") from error
        if action.shape != self._shape:
            raise ValueError(
                f"The action has shape {action.shape}, but this task takes {self._shape}."
            )
        # A few numbers: Python's own functions take half of numpy's time for them.
        values = action.tolist()
        if not math.isfinite(sum(values)):  # finds NaN and infinity in any place
            raise RuntimeError(
                f"The action {action} is not finite; look for a diverged model or policy."
            )
        if max(values) > 1.0 or min(values) < -1.0:
            np.clip(action, -1.0, 1.0, out=action)
        if self.identity:
            return action
        stretched = self.low * ((1.0 - action) / 2.0) + self.high * ((1.0 + action) / 2.0)
        return np.where(self._same, action, stretched)

    def to_action(self, control: Any) -> NDArray[np.float32]:
        """Return the action whose controls are ``control``; the inverse of :meth:`to_control`."""
        control = np.asarray(control, dtype=np.float64)
        action = (2.0 * control - self.low - self.high) / (self.high - self.low)
        return np.where(self._same, control, action).astype(np.float32)


def is_image(value: Any) -> bool:
    """Return whether an observed value is a camera picture (only composer tasks have some)."""
    return getattr(value, "dtype", None) == np.uint8 and np.ndim(value) >= 3


class Flattener:
    """Turns an observation dictionary into one float32 vector, or into a dictionary of vectors.

    Pictures among the values have no place in the vector; the dictionary keeps them as uint8.

    :param example: an observation of the task: name -> number or array
    :param channels: where a picture's colours go: ``first`` or ``last``
    """

    def __init__(self, example: Mapping[str, Any], channels: str = "first") -> None:
        self.slices: dict[str, slice] = {}
        self.images = [name for name, value in example.items() if is_image(value)]
        self._channels_first = channels == "first"
        start = 0
        for name, value in example.items():
            if name not in self.images:
                stop = start + int(np.size(value))
                self.slices[name] = slice(start, stop)
                start = stop
        self.size = start
        # Where all values are vectors, one call joins and casts them.
        self._vectors = all(np.ndim(value) == 1 for value in example.values())
        box = gymnasium.spaces.Box
        self.space = box(-np.inf, np.inf, (start,), np.float32)
        spaces: dict[str, gymnasium.Space] = {}
        for name, value in self.dict(example).items():
            image = name in self.images
            low, high = (0, 255) if image else (-np.inf, np.inf)
            spaces[name] = box(low, high, value.shape, np.uint8 if image else np.float32)
        self.dict_space = gymnasium.spaces.Dict(spaces)

    def flat(self, observation: Mapping[str, Any]) -> NDArray[np.float32]:
        """Return the values in dm_control's order as one new vector, [O]."""
        out = np.empty(self.size, np.float32)
        if self._vectors:
            return np.concatenate(list(observation.values()), out=out, casting="same_kind")
        for name, where in self.slices.items():
            value = observation[name]
            # Writing into the slice casts like astype(float32); only 2-D values need ravel.
            out[where] = value.ravel() if getattr(value, "ndim", 0) > 1 else value
        return out

    def dict(self, observation: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Return the values by name: new 1-D float32 vectors, and pictures as uint8."""
        found: dict[str, NDArray[Any]] = {}
        for name, value in observation.items():
            if name in self.images:
                picture = value.reshape(value.shape[-3:])  # without composer's buffer axis
                found[name] = picture.transpose(2, 0, 1) if self._channels_first else picture
                found[name] = found[name].copy()
            else:
                found[name] = np.array(value, dtype=np.float32).reshape(-1)
        return found
