"""What an agent sees: the flat vector, a dictionary, pixels, or both.

Shapes: O length of the flat vector, H height, W width, F stacked frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from dmc_gym_plugin.spaces import Flattener

VIEWS = ("flat", "dict", "pixels", "state+pixels")


class FlatView:
    """All values as one float32 vector, [O]; the default.

    :param flattener: joins the values
    :param observe: returns dm_control's observation
    """

    def __init__(self, flattener: Flattener, observe: Callable[[], Any]) -> None:
        self._flattener = flattener
        self._observe = observe
        self.space: gymnasium.Space = flattener.space

    def first(self) -> Any:
        """Return the observation of a new episode."""
        return self.next()

    def next(self) -> Any:
        """Return the observation after a step."""
        return self._flattener.flat(self._observe())

    def get_state(self) -> dict[str, Any]:
        """Return what the view remembers of earlier steps: nothing."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore it."""


class DictView(FlatView):
    """Every value by its dm_control name, 1-D float32."""

    def __init__(self, flattener: Flattener, observe: Callable[[], Any]) -> None:
        super().__init__(flattener, observe)
        self.space = flattener.dict_space

    def next(self) -> Any:
        return self._flattener.dict(self._observe())


class PixelView:
    """The last F pictures, uint8: [3 F, H, W], or [H, W, 3 F] with ``channels="last"``.

    :param take_picture: returns [H, W, 3]
    :param height: H
    :param width: W
    :param frame_stack: F; a new episode repeats its first picture
    :param channels: ``first`` or ``last``
    """

    def __init__(
        self,
        take_picture: Callable[[], NDArray[np.uint8]],
        height: int,
        width: int,
        frame_stack: int,
        channels: str,
    ) -> None:
        self._take_picture = take_picture
        self._first = channels == "first"
        depth = 3 * frame_stack
        shape = (depth, height, width) if self._first else (height, width, depth)
        self.space: gymnasium.Space = gymnasium.spaces.Box(0, 255, shape, np.uint8)
        self._frame_stack = frame_stack
        self._frames: NDArray[np.uint8] | None = None  # oldest first, as the space has it

    def _picture(self) -> NDArray[np.uint8]:
        picture = self._take_picture()
        return picture.transpose(2, 0, 1) if self._first else picture

    def first(self) -> Any:
        """Return the observation of a new episode: the first picture F times."""
        axis = 0 if self._first else 2
        self._frames = np.concatenate([self._picture()] * self._frame_stack, axis=axis)
        return self._frames.copy()

    def next(self) -> Any:
        """Return the observation after a step: the oldest picture makes place for a new one."""
        if self._frames is None:
            return self.first()
        axis = 0 if self._first else 2
        older = self._frames[3:] if self._first else self._frames[..., 3:]
        self._frames = np.concatenate([older, self._picture()], axis=axis)
        return self._frames.copy()

    def get_state(self) -> dict[str, Any]:
        """Return the stacked pictures, which cannot be drawn again later."""
        return {"frames": None if self._frames is None else self._frames.copy()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore them; a state of another view starts the stack anew."""
        frames = state.get("frames")
        fits = frames is not None and np.shape(frames) == self.space.shape
        self._frames = np.array(frames, np.uint8) if fits else None


class StatePixelView:
    """A dictionary of ``state`` (the flat vector) and ``pixels``."""

    def __init__(self, state: FlatView, pixels: PixelView) -> None:
        self._state = state
        self._pixels = pixels
        self.space = gymnasium.spaces.Dict({"state": state.space, "pixels": pixels.space})

    def first(self) -> Any:
        """Return the observation of a new episode."""
        return {"state": self._state.first(), "pixels": self._pixels.first()}

    def next(self) -> Any:
        """Return the observation after a step."""
        return {"state": self._state.next(), "pixels": self._pixels.next()}

    def get_state(self) -> dict[str, Any]:
        """Return the stacked pictures."""
        return self._pixels.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._pixels.set_state(state)
