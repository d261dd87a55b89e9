"""Pictures of a simulation: one camera, all cameras, depth, and a window.

Shapes: H height, W width, in pixels.
"""

from __future__ import annotations

import math
import numbers
import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmc_gym_plugin import rendering

#: The cameras that the literature films with; camera 0 elsewhere. The dog's is camera 0 in all its
#: tasks but ``fetch``, which has others before it.
DEFAULT_CAMERAS: dict[str, int | str] = {
    "dog": "y-axis",
    "locomotion": "walker/side",
    "quadruped": 2,
}

_open_photographers: weakref.WeakSet[Photographer] = weakref.WeakSet()


def default_camera(domain: str) -> int | str:
    """Return the camera that the literature uses for a domain."""
    return DEFAULT_CAMERAS.get(domain, 0)


class Photographer:
    """Makes pictures of one physics, and keeps its cameras ready between them.

    :param physics: dm_control's physics
    """

    def __init__(self, physics: Any) -> None:
        self.physics = physics
        self._cameras: dict[tuple[int, int, int], Any] = {}
        self._window: Any = None

    def camera_id(self, camera: int | str) -> int:
        """Return the number of a camera given by number or name; -1 is the free camera.

        :raises ValueError: for a camera that the model does not have
        """
        model = self.physics.model
        names = [model.id2name(index, "camera") or str(index) for index in range(model.ncam)]
        if isinstance(camera, str):
            if camera in names:
                return names.index(camera)
        elif (
            isinstance(camera, numbers.Integral)
            and not isinstance(camera, bool)
            and -1 <= camera < model.ncam
        ):
            return int(camera)
        raise ValueError(
            f"The model has no camera {camera!r}; its cameras are {names} (0 to {model.ncam - 1}), "
            "and -1 is the free camera."
        )

    def picture(
        self, height: int, width: int, camera: int | str, depth: bool = False
    ) -> NDArray[Any]:
        """Return what a camera sees.

        :return: [H, W, 3] uint8, or with ``depth`` [H, W] float32 metres
        :raises RenderingError: where OpenGL does not work; the message says what to install
        """
        key = (height, width, self.camera_id(camera))
        if key not in self._cameras:
            self._open(height, width)
            from dm_control.mujoco.engine import Camera

            self._cameras[key] = Camera(self.physics, height=height, width=width, camera_id=key[2])
        # The camera returns its own buffer, mirrored: a copy keeps it from being overwritten.
        return self._cameras[key].render(depth=depth).copy()

    def _open(self, height: int, width: int) -> None:
        """Make the OpenGL context, large enough for the picture."""
        vis = self.physics.model.vis.global_
        large_enough = height <= vis.offheight and width <= vis.offwidth
        if not large_enough:
            vis.offheight, vis.offwidth = max(height, vis.offheight), max(width, vis.offwidth)
            self.close_contexts()
        if self.physics._contexts:
            return
        try:
            _ = self.physics.contexts
        except Exception as error:  # each backend has exceptions of its own
            raise rendering.explain(error) from error
        _open_photographers.add(self)
        _free_before_threads_end()

    def all_cameras(self, height: int, width: int) -> NDArray[np.uint8]:
        """Return the pictures of all cameras as tiles of one, row by row."""
        count = self.physics.model.ncam
        columns = math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        tiles = np.zeros((rows * height, columns * width, 3), np.uint8)
        for index in range(count):
            row, column = divmod(index, columns)
            top, left = row * height, column * width
            tiles[top : top + height, left : left + width] = self.picture(height, width, index)
        return tiles

    def show(self, height: int, width: int, camera: int | str) -> None:
        """Draw the simulation in a window, where there is a display."""
        if self._window is None:
            from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

            self._window = MujocoRenderer(
                self.physics.model.ptr,
                self.physics.data.ptr,
                width=width,
                height=height,
                camera_id=self.camera_id(camera),
            )
        self._window.render("human")

    def close_contexts(self) -> None:
        """Free the cameras and the OpenGL context; the next picture makes new ones."""
        self._cameras.clear()
        if self.physics._contexts:
            with self.physics._contexts_lock:
                self.physics._free_rendering_contexts()

    def close(self) -> None:
        """Free everything."""
        self.close_contexts()
        _open_photographers.discard(self)
        if self._window is not None:
            self._window.close()
            self._window = None


def _close_all() -> None:
    for photographer in list(_open_photographers):
        photographer.close()


_registered = False


def _free_before_threads_end() -> None:
    """Free OSMesa's contexts while its rendering thread still runs.

    dm_control frees them from ``atexit``, which comes after Python has stopped its thread pools,
    and then prints a page of errors.
    """
    global _registered
    register = getattr(threading, "_register_atexit", None)  # private, so its absence is harmless
    if _registered or register is None:
        return
    _registered = True
    register(_close_all)
