"""Refuses what is no state of ``get_state()``, before anything of it is restored.

Apart from ``state.py``, because that imports MuJoCo, which :mod:`dmc_gym_plugin.rendering` has to
do first.
"""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

_REMEDY = "give what get_state() returned"


def check_keys(
    what: str,
    part: Any,
    required: Collection[str],
    optional: Collection[str] | None = (),
) -> None:
    """Refuse a part of a state that is no dictionary, or has keys missing or unknown.

    :param what: its name in the message
    :param optional: further keys that may be there; None: any
    :raises ValueError: one sentence with the remedy
    """
    if not isinstance(part, Mapping):
        raise ValueError(f"{what} is {reprlib.repr(part)}; give what get_state() returned.")
    missing = [name for name in required if name not in part]
    if missing:
        raise ValueError(f"{what} lacks {missing}; give what get_state() returned.")
    if optional is None:
        return
    unknown = [name for name in part if name not in required and name not in optional]
    if unknown:
        raise ValueError(f"{what} holds the unknown {unknown}; give what get_state() returned.")


def check_numbers(what: str, value: Any, dtype: Any) -> None:
    """Refuse what is no array of a dtype, or holds numbers that are not finite.

    :raises ValueError: one sentence with the remedy
    """
    if not isinstance(value, np.ndarray) or value.dtype != dtype:
        kind = getattr(value, "dtype", type(value).__name__)
        raise ValueError(f"{what} is of {kind} and no array of {np.dtype(dtype)}; {_REMEDY}.")
    if not np.isfinite(value).all():
        raise ValueError(f"{what} holds numbers that are not finite; {_REMEDY}.")


def check_state(state: Any, env_id: str, max_frames: int | None) -> None:
    """Refuse what ``DMControlEnv.get_state()`` cannot have returned, before anything is restored.

    The simulation checks its own part.

    :param env_id: Gymnasium id of the environment that is to take the state
    :param max_frames: control steps of its episodes, None without a limit
    :raises ValueError: one sentence with the remedy
    """
    parts = ("id", "simulation", "view", "steps", "frames", "max_frames", "running")
    check_keys("The state", state, parts)
    if state["id"] != env_id:
        raise ValueError(
            f"The state is of {state['id']!r}, but this environment is {env_id}; use a state of "
            "the same task."
        )
    check_keys("The state's view", state["view"], (), ("frames",))
    frames = state["view"].get("frames")
    if frames is not None:
        check_numbers("The state's view's frames", frames, np.uint8)
    for name in ("steps", "frames", "max_frames", "running"):
        value = state[name]
        unlimited = name == "max_frames" and value is None
        if not unlimited and not (isinstance(value, numbers.Integral) and 0 <= int(value) < 2**53):
            raise ValueError(
                f"The state's {name} is {reprlib.repr(value)}; give what get_state() returned."
            )
    controls = state["simulation"].get("controls") if isinstance(state["simulation"], dict) else ()
    steps = len(controls) if isinstance(controls, np.ndarray) and controls.ndim else 0
    if max_frames is not None and steps > max_frames:
        raise ValueError(
            f"The state is {steps} control steps into its episode, but this environment's end "
            f"after {max_frames}; make it with max_episode_steps=-1 to go on from there."
        )
