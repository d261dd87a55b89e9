"""Common set-up: a headless OpenGL backend is chosen before any test imports dm_control."""

from __future__ import annotations

import logging

from dmc_gym_plugin import rendering

rendering.choose_backend()
logging.getLogger("absl").setLevel(logging.ERROR)  # dm_control's models use deprecated attributes
