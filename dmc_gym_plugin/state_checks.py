"""Refuses what is no state of ``get_state()``, before anything of it is restored.

Apart from ``state.py``, because that imports MuJoCo, which :mod:`dmc_gym_plugin.rendering` has to
do first.
"""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Collection, Mapping
from typing import Any


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


def check_state(state: Any, env_id: str) -> None:
    """Refuse what ``DMControlEnv.get_state()`` cannot have returned, before anything is restored.

    The simulation checks its own part.

    :param env_id: Gymnasium id of the environment that is to take the state
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
    for name in ("steps", "frames", "max_frames", "running"):
        value = state[name]
        unlimited = name == "max_frames" and value is None
        if not unlimited and not (isinstance(value, numbers.Integral) and int(value) >= 0):
            raise ValueError(
                f"The state's {name} is {reprlib.repr(value)}; give what get_state() returned."
            )
