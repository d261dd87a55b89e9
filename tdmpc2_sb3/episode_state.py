"""The episodes in progress of a vectorised environment, to be saved and restored exactly.

An environment takes part by ``get_state()`` and ``set_state(state)`` (those of ``DMC/`` do). What
the usual wrappers remember of the episode (time limit, Monitor) is carried along.
"""

from __future__ import annotations

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
    """Each environment's episode in progress; None if it cannot be restored or has died.

    :return: nested dictionaries of numbers, strings and arrays
    """
    try:
        return _capture(env) if can_capture(env) else None
    except (EOFError, ConnectionError):  # a process that the same signal has ended
        return None


def _capture(env: VecEnv) -> EpisodeStates:
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
