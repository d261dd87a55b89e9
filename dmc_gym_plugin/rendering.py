"""Choice of an OpenGL backend before dm_control is imported."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any


def choose_backend() -> str | None:
    """Set ``MUJOCO_GL`` where the user did not and Linux has no display: EGL, then OSMesa.

    :return: the backend now in force, None where dm_control chooses by itself
    """
    if os.environ.get("MUJOCO_GL") or not sys.platform.startswith("linux"):
        return os.environ.get("MUJOCO_GL")
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return None
    for name, library in (("egl", "libEGL.so.1"), ("osmesa", "libOSMesa.so.8")):
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        os.environ["MUJOCO_GL"] = name
        return name
    return None


def upload_terrain(physics: Any) -> None:
    """Hand an edited height field to the OpenGL context, where there is one."""
