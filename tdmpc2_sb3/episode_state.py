"""The episodes in progress of a vectorised environment, to be saved and restored exactly.

An environment takes part by ``get_state()`` and ``set_state(state)`` (those of ``DMC/`` do). What
the usual wrappers remember of the episode (time limit, Monitor) is carried along.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any

import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnv,
    VecNormalize,
    VecTransposeImage,
    unwrap_vec_normalize,
)

# What wrappers remember within an episode: TimeLimit, and Monitor.
WRAPPER_ATTRIBUTES = ("_elapsed_steps", "rewards", "needs_reset")
MONITOR_TOTALS = ("episode_returns", "episode_lengths", "total_steps")
KNOWN_LAYERS = (DummyVecEnv, SubprocVecEnv, VecNormalize, VecTransposeImage)

EpisodeStates = list[dict[str, Any]]


def can_capture(env: VecEnv) -> bool:
    """Whether every layer and environment can be restored exactly."""
    layer: Any = env
    while True:
        if type(layer) not in KNOWN_LAYERS:
            return False
        if not hasattr(layer, "venv"):
            break
        layer = layer.venv
    return bool(env.has_attr("get_state") and env.has_attr("set_state"))


def capture(env: VecEnv) -> EpisodeStates | None:
    """Each environment's episode in progress; None if it cannot be restored.

    :return: nested dictionaries of numbers, strings and arrays
    """
    if not can_capture(env):
        return None
    states = [{"environment": state, "wrappers": {}} for state in env.env_method("get_state")]
    names: tuple[str, ...] = WRAPPER_ATTRIBUTES
    if all(env.env_is_wrapped(Monitor)):
        names = (*names, *MONITOR_TOTALS)
    for name in names:
        if env.has_attr(name):
            for state, value in zip(states, env.get_attr(name), strict=True):
                state["wrappers"][name] = list(value) if isinstance(value, list) else value
    normalizer = unwrap_vec_normalize(env)
    if normalizer is not None:
        for state, value in zip(states, normalizer.returns, strict=True):
            state["normalizer_return"] = float(value)
    return states


def check_episodes(states: Any, n_envs: int) -> None:
    """Refuse episodes of a file that :func:`capture` cannot have returned.

    What the environments themselves saved is checked by their ``set_state``.

    :param states: one for each environment
    :param n_envs: environments of the saved run
    :raises ValueError: in one sentence
    """
    if not isinstance(states, list) or len(states) != n_envs:
        raise ValueError(f"The saved episodes are not those of {n_envs} environments: {_REMEDY}.")
    for state in states:
        known = ("environment", "wrappers", "normalizer_return")
        whole = isinstance(state, dict) and set(known[:2]) <= set(state) <= set(known)
        if not whole or not isinstance(state["wrappers"], dict):
            raise ValueError(f"A saved episode has other parts than {known}: {_REMEDY}.")
        if not _is_number(state.get("normalizer_return", 0.0)):
            raise ValueError(f"A saved episode's normalizer_return is no number: {_REMEDY}.")
        for name, value in state["wrappers"].items():
            if name not in _REMEMBERED or not _REMEMBERED[name](value):
                text = reprlib.repr(value)
                raise ValueError(
                    f"A saved episode's wrappers have {name!r} = {text}, which none has: {_REMEDY}."
                )


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float, np.integer, np.floating))
    return number and not isinstance(value, bool) and abs(value) < 1e300


def _is_count(value: Any) -> bool:
    return _is_number(value) and not isinstance(value, (float, np.floating)) and 0 <= value < 2**53


def _all(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, list) and all(fits(value) for value in values)


_REMEDY = "use another copy or an earlier checkpoint"
_REMEMBERED: dict[str, Callable[[Any], bool]] = {
    "_elapsed_steps": lambda value: value is None or _is_count(value),
    "rewards": _all(_is_number),
    "needs_reset": lambda value: isinstance(value, (bool, np.bool_)),
    "episode_returns": _all(_is_number),
    "episode_lengths": _all(_is_count),
    "total_steps": _is_count,
}


def restore(env: VecEnv, states: EpisodeStates) -> None:
    """Puts every environment back into the captured episode.

    :raises ValueError: if the number of environments or their tasks differ
    """
    if len(states) != env.num_envs:
        raise ValueError(
            f"The saved run had {len(states)} environments, this one has {env.num_envs}: "
            "resume with the same number."
        )
    # Wrappers refuse to step before a reset; only the innermost vector environment is reset, so
    # that running statistics above it see nothing of it.
    env.unwrapped.reset()
    for index, state in enumerate(states):
        env.env_method("set_state", state["environment"], indices=index)
        for name, value in state["wrappers"].items():
            env.env_method("set_wrapper_attr", name, value, indices=index)
    normalizer = unwrap_vec_normalize(env)
    if normalizer is not None and all("normalizer_return" in state for state in states):
        normalizer.returns = np.array([state["normalizer_return"] for state in states])
