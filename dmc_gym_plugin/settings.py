"""The options of an environment, checked once, each error one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Mapping
from typing import Any

from dmc_gym_plugin.rendering import is_headless
from dmc_gym_plugin.views import VIEWS

RENDER_MODES = ("rgb_array", "depth_array", "human", "multi_camera")
CHANNELS = ("first", "last")

#: Other packages' words for what has another name here.
SYNONYMS = {"frame_skip": "action_repeat", "from_pixels": "observation", "obs_type": "observation"}


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
        if self.task_kwargs is not None:
            check_task_kwargs(self.task_kwargs)
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


def check_task_kwargs(kwargs: Any) -> None:
    """Refuse what is no dictionary, and limits that no episode meets.

    The names in it are checked where the task is built, which knows its constructor.
    """
    if not isinstance(kwargs, Mapping):
        raise ValueError(
            f"task_kwargs is {kwargs!r}; give a dictionary, such as {{'time_limit': 10}}."
        )
    limit = kwargs.get("time_limit", 1)
    number = isinstance(limit, numbers.Real) and not isinstance(limit, bool)
    if not number or not 0 < limit < math.inf:
        raise ValueError(
            f"time_limit is {limit!r}; give seconds above 0, or no time_limit and "
            "max_episode_steps=-1 for none."
        )


def refuse_unknown(names: list[str], known: list[str]) -> None:
    """Refuse unknown keyword arguments, naming the one that is probably meant.

    :raises ValueError: if there is any; a TypeError would have ``gymnasium.make`` append its own
        words to the sentence
    """
    if names:
        name = names[0]
        near = [SYNONYMS[name]] if name in SYNONYMS else difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"choose of {', '.join(known)}."
        raise ValueError(f"The environment does not know the keyword {name!r}; {remedy}")


def usable_render_modes() -> list[str]:
    """Return the render modes of this machine: ``human`` needs a display."""
    return [mode for mode in RENDER_MODES if mode != "human" or not is_headless()]
