"""The options of an environment, checked once, each error one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
from typing import Any

from dmc_gym_plugin.rendering import is_headless
from dmc_gym_plugin.views import VIEWS

RENDER_MODES = ("rgb_array", "depth_array", "human", "multi_camera")
CHANNELS = ("first", "last")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything :class:`~dmc_gym_plugin.environment.DMControlEnv` takes beside the task.

    Its parameters are described there. ``camera_id`` is checked against the model later.

    :raises ValueError: for a value that cannot be meant
    """

    observation: str
    action_repeat: int
    max_episode_steps: int | None
    render_mode: str | None
    height: int
    width: int
    camera_id: int | str | None
    frame_stack: int
    channels: str
    render_height: int
    render_width: int
    task_kwargs: dict[str, Any] | None

    def __post_init__(self) -> None:
        check_choice("observation", self.observation, VIEWS)
        check_choice("channels", self.channels, CHANNELS)
        if self.render_mode is not None:
            check_choice("render_mode", self.render_mode, RENDER_MODES)
        for name in (
            "action_repeat",
            "height",
            "width",
            "frame_stack",
            "render_height",
            "render_width",
        ):
            check_count(name, getattr(self, name))
        if self.max_episode_steps is not None and self.max_episode_steps != -1:
            check_count("max_episode_steps", self.max_episode_steps)
        if self.render_mode == "human" and is_headless():
            raise ValueError(
                "render_mode='human' opens a window, but neither DISPLAY nor WAYLAND_DISPLAY is "
                "set; use render_mode='rgb_array'."
            )


def check_count(name: str, value: Any) -> None:
    """Refuse everything but whole numbers of at least 1."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < 1:
        raise ValueError(f"{name} is {value!r}; give a whole number of at least 1.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse everything but the given choices."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}; choose one of {listed}.")


def refuse_unknown(names: list[str], known: list[str]) -> None:
    """Refuse unknown keyword arguments, naming the nearest known one.

    :raises TypeError: if there is any
    """
    if names:
        nearest = difflib.get_close_matches(names[0], known, n=1, cutoff=0.0)[0]
        raise TypeError(
            f"The environment does not know the keyword {names[0]!r}; did you mean {nearest!r}?"
        )


def usable_render_modes() -> list[str]:
    """Return the render modes of this machine: ``human`` needs a display."""
    return [mode for mode in RENDER_MODES if mode != "human" or not is_headless()]
