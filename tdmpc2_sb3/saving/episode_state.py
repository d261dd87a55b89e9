"""The episodes in progress of a vectorised environment, to be saved and restored exactly.

An environment takes part by ``get_state()`` and ``set_state(state)`` (those of ``DMC/`` do), its
wrappers as :mod:`tdmpc2_sb3.saving.wrapper_state` knows them, and here the layers of SB3 around
them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    unwrap_vec_normalize,
)
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

from tdmpc2_sb3.saving import workers
from tdmpc2_sb3.saving.attribute_checks import is_real
from tdmpc2_sb3.saving.random_streams import checked_stream
from tdmpc2_sb3.saving.wrapper_state import ATTRIBUTE, Reachable, are_own

KNOWN_LAYERS = (
    *(DummyVecEnv, SubprocVecEnv, VecCheckNan, VecExtractDictObs, VecFrameStack, VecMonitor),
    *(VecNormalize, VecTransposeImage),
)

EpisodeStates = list[dict[str, Any]]


def obstacle(env: VecEnv, states: EpisodeStates | None = None) -> str | None:
    """What keeps episodes in progress from being restored exactly; None if nothing does.

    :param states: the episodes; None: any
    """
    for layer in _layers(env):
        if type(layer) not in KNOWN_LAYERS:
            return f"the layer {type(layer).__name__} may remember what cannot be saved"
    if sum(isinstance(layer, VecNormalize) for layer in _layers(env)) > 1:
        return "there are several VecNormalize, and the statistics of one alone are saved"
    found = _ask(env, "obstacle")
    if states is not None:
        found.append(None if _fit_layers(env, states) else "it was saved with other layers")
        for index, state in enumerate(states):
            found += _ask(env, "mismatch", state, indices=index)
    return next((each for each in found if each is not None), None)


def has_state(env: VecEnv) -> bool:
    """Whether the environments themselves, without wrappers and layers, can be restored."""
    return isinstance(env.unwrapped, DummyVecEnv | SubprocVecEnv) and all(_ask(env, "has_state"))


def can_capture(env: VecEnv) -> bool:
    """Whether every layer and environment can be restored exactly."""
    return obstacle(env) is None


def capture(env: VecEnv) -> EpisodeStates | None:
    """Each environment's episode in progress; None if it cannot be restored or has died.

    :return: nested dictionaries of numbers, strings and arrays
    """
    inner = workers.processes_of(env)
    if inner is not None and inner.closed:
        return None
    try:
        with workers.watched([env]):
            return _capture(env) if can_capture(env) else None
    except workers.WorkerDiedError as error:
        warnings.warn(f"{error} The episodes in progress are not saved.", stacklevel=4)
        return None
    except (EOFError, ConnectionError):  # a process that the same signal has ended
        return None


def _capture(env: VecEnv) -> EpisodeStates:
    states = _ask(env, "capture")
    for index, state in enumerate(states):
        state["layers"] = [
            {key: np.copy(values[index]) for key, values in _remembered(layer).items()}
            for layer in _layers(env)
        ]
    normalizer = unwrap_vec_normalize(env)
    if normalizer is not None:
        for state, value in zip(states, normalizer.returns, strict=True):
            state["normalizer_return"] = float(value)
    return states


def check_episodes(states: Any, n_envs: int) -> None:
    """Refuse episodes of a file that :func:`capture` cannot have returned.

    What environments, wrappers and layers saved is checked against them when they take it.

    :param states: one for each environment
    :param n_envs: environments of the saved run
    :raises ValueError: in one sentence
    """
    if not isinstance(states, list) or len(states) != n_envs:
        raise ValueError(f"The saved episodes are not those of {n_envs} environments: {_REMEDY}.")
    for state in states:
        if not isinstance(state, dict) or not set(_PARTS[:2]) <= set(state) <= set(_PARTS):
            raise ValueError(f"A saved episode has other parts than {_PARTS}: {_REMEDY}.")
        if not is_real(state.get("normalizer_return", 0.0)):
            raise ValueError(f"A saved episode's normalizer_return is no number: {_REMEDY}.")
        if state.get("random") is not None:
            try:
                checked_stream(state["random"])
            except ValueError as error:
                raise ValueError(
                    f"A saved episode's random stream is {error}: {_REMEDY}."
                ) from error


_REMEDY = "use another copy or an earlier checkpoint"
_PARTS = ("environment", "wrappers", "layers", "random", "numpy", "normalizer_return")


def restore(env: VecEnv, states: EpisodeStates) -> None:
    """Puts every environment back into the captured episode.

    :raises RuntimeError: if the states are damaged, or of other environments, wrappers or layers
    """
    if not isinstance(states, list) or len(states) != env.num_envs:
        raise RuntimeError(
            f"The saved run had {len(states)} environments, this one has {env.num_envs}: "
            "resume with the same number."
        )
    if not _fit_layers(env, states):
        raise RuntimeError(
            "The episode in progress cannot go on: it was saved with other layers around the "
            "environments; resume with the same."
        )
    # Wrappers refuse to step before a reset; only the innermost vector environment is reset, so
    # that running statistics above it see nothing of it.
    env.unwrapped.reset()
    for index, state in enumerate(states):
        for wrong in _ask(env, "restore", state, indices=index):
            if wrong is not None:
                raise RuntimeError(f"The episode in progress cannot go on: {wrong}")
        for layer, saved in zip(_layers(env), state.get("layers", ()), strict=False):
            for key, values in _remembered(layer).items():
                values[index] = saved[key]
    normalizer = unwrap_vec_normalize(env)
    if normalizer is not None and all("normalizer_return" in state for state in states):
        normalizer.returns = np.array([float(state["normalizer_return"]) for state in states])


def _fit_layers(env: VecEnv, states: EpisodeStates) -> bool:
    """Whether the arrays of the layers are there, in their shapes and types."""
    expected = [_remembered(layer) for layer in _layers(env)]
    for state in states:
        saved = state.get("layers")
        if saved is None and not any(expected):
            continue  # of a version that knew no layers with a state
        if not isinstance(saved, list) or len(saved) != len(expected):
            return False
        for own, there in zip(expected, saved, strict=True):
            if not isinstance(there, dict) or set(there) != set(own):
                return False
            for key, values in own.items():
                value = there[key]
                if not isinstance(value, np.ndarray) or value.dtype != values.dtype:
                    return False
                if value.shape != values.shape[1:]:
                    return False
    return True


def _layers(env: VecEnv) -> Iterator[VecEnv]:
    """From the outermost to the one that holds the environments."""
    layer: Any = env
    while True:
        yield layer
        if not hasattr(layer, "venv"):
            return
        layer = layer.venv


def _remembered(layer: VecEnv) -> dict[str, np.ndarray]:
    """The arrays that a layer keeps within episodes, [E, ...] each."""
    if isinstance(layer, VecMonitor):
        return {"returns": layer.episode_returns, "lengths": layer.episode_lengths}
    if isinstance(layer, VecFrameStack):
        return dict(_stacks(layer.stacked_obs))
    return {}


def _stacks(stacked: StackedObservations, key: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if not hasattr(stacked, "sub_stacked_observations"):
        yield key, stacked.stacked_obs
        return
    for name, part in stacked.sub_stacked_observations.items():
        yield from _stacks(part, f"{key}/{name}")


def _ask(env: VecEnv, method: str, *arguments: Any, indices: int | None = None) -> list[Any]:
    """What each environment's :class:`EpisodeOf` answers, in its own process."""
    which = range(env.num_envs) if indices is None else [indices]
    answers = []
    for index, reachable in zip(which, env.env_is_wrapped(Reachable, which), strict=True):  # type: ignore[arg-type]
        if reachable:
            answers += env.env_method(ATTRIBUTE, method, *arguments, indices=index)
        else:
            answers.append(_ask_bare(env, index, method, *arguments))
    return answers


def _ask_bare(env: VecEnv, index: int, method: str, *arguments: Any) -> Any:
    """The same of an environment in no wrapper at all."""
    if method == "capture":
        state = {"environment": env.env_method("get_state", indices=index)[0], "wrappers": []}
        generator = env.get_attr("_np_random", indices=index)[0]
        if isinstance(generator, np.random.Generator):
            state["random"] = generator.bit_generator.state
        return state
    if method == "restore":
        try:
            env.env_method("set_state", arguments[0]["environment"], indices=index)
            if arguments[0].get("random") is not None:
                generator = env.get_attr("np_random", indices=index)[0]
                generator.bit_generator.state = arguments[0]["random"]
                env.set_attr("_np_random", generator, indices=index)  # it may be a copy
        except (KeyError, TypeError, ValueError) as error:
            return str(error)
        return None
    has_state = are_own(env.env_method("__dir__", indices=index)[0])
    if method == "has_state":
        return has_state
    if method == "mismatch":
        wrappers = arguments[0].get("wrappers")
        return f"it was saved with the wrappers {wrappers}" if wrappers else None
    return None if has_state else "the environment has no get_state and set_state"
