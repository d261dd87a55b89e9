"""What Gymnasium's wrappers remember within an episode, taken out and put back.

A wrapper takes part if its class stands in :data:`STATES` with the attributes that its future
depends on; anything else may remember what nobody knows. A saved state is checked against the
wrapper that is to take it before anything is changed: files may come from anywhere.

The wrappers may live in another process, see :data:`ATTRIBUTE`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from tdmpc2_sb3.saving.functions import remembers_nothing
from tdmpc2_sb3.saving.random_streams import checked_stream

State = dict[str, Any]


class Kind(NamedTuple):
    """A kind of attribute."""

    fits: Callable[[Any, Any, gym.Wrapper], bool]  # the saved value, the present one, the wrapper
    take: Callable[[Any], Any] = lambda value: value
    put: Callable[[Any, str, Any], None] = setattr


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and bool(value >= 0)


def _is_numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf"


def _fits_space(value: Any, space: spaces.Space) -> bool:
    """Whether a value has the form of a space's; it may lie beyond its bounds."""
    if isinstance(space, spaces.Dict):
        return (
            isinstance(value, dict)
            and set(value) == set(space.spaces)
            and all(_fits_space(value[key], entry) for key, entry in space.spaces.items())
        )
    plain = _is_number(value) or _is_numeric(value)
    return plain and np.shape(value) == space.shape


def _fits_means(saved: Any, present: Any, wrapper: gym.Wrapper) -> bool:
    if not (isinstance(saved, dict) and set(saved) == {"mean", "var", "count"}):
        return False
    arrays = all(
        _is_numeric(saved[name]) and np.shape(saved[name]) == np.shape(getattr(present, name))
        for name in ("mean", "var")
    )
    return arrays and _is_number(saved["count"]) and 0 < saved["count"] < math.inf


def _refill(wrapper: Any, name: str, values: list[Any]) -> None:
    queue = getattr(wrapper, name)
    queue.clear()
    queue.extend(values)


def _is_queue(
    fits: Callable[[Any, gym.Wrapper], bool], limit: Callable[[Any, gym.Wrapper], float]
) -> Kind:
    def fits_all(saved: Any, present: Any, wrapper: gym.Wrapper) -> bool:
        return (
            isinstance(saved, list)
            and len(saved) <= limit(present, wrapper)
            and all(fits(value, wrapper) for value in saved)
        )

    return Kind(fits_all, list, _refill)


def _is_observation(value: Any, wrapper: gym.Wrapper) -> bool:
    return _fits_space(value, wrapper.env.observation_space)


COUNT = Kind(lambda saved, *_: _is_count(saved))
STEPS = Kind(lambda saved, *_: saved is None or _is_count(saved))  # None before the first reset
NUMBER = Kind(lambda saved, *_: _is_number(saved))
FLAG = Kind(lambda saved, *_: isinstance(saved, bool | np.bool_))
NUMBERS = Kind(
    lambda saved, *_: isinstance(saved, list) and all(map(_is_number, saved)),
    list,
    lambda wrapper, name, values: setattr(wrapper, name, list(values)),
)
RECENT = _is_queue(
    lambda value, _: _is_number(value),
    lambda queue, _: math.inf if queue.maxlen is None else queue.maxlen,
)
ARRAY = Kind(
    lambda saved, present, _: (
        isinstance(saved, np.ndarray)
        and saved.shape == present.shape
        and saved.dtype == present.dtype
    ),
    np.copy,
    lambda wrapper, name, value: setattr(wrapper, name, value.copy()),
)
ACTION = Kind(
    lambda saved, _, wrapper: saved is None or _fits_space(saved, wrapper.action_space),
    lambda value: value if value is None or np.isscalar(value) else np.copy(value),
)
MEANS = Kind(
    _fits_means,
    lambda value: {
        "mean": np.copy(value.mean),
        "var": np.copy(value.var),
        "count": float(value.count),
    },
    lambda wrapper, name, value: vars(getattr(wrapper, name)).update(value),
)
FRAMES = _is_queue(_is_observation, lambda _, wrapper: wrapper.stack_size)  # type: ignore[attr-defined]
DELAYED = _is_queue(_is_observation, lambda _, wrapper: wrapper.delay)  # type: ignore[attr-defined]

_GYM = "gymnasium.wrappers."
_HISTORY = {"obs_history": ARRAY, "action_history": ARRAY}
_MONITOR = {
    "rewards": NUMBERS,
    "needs_reset": FLAG,
    "episode_returns": NUMBERS,
    "episode_lengths": NUMBERS,
    "total_steps": COUNT,
}
#: Of every known class the attributes that its future depends on.
STATES: dict[str, dict[str, Kind]] = {
    f"{_GYM}common.TimeLimit": {"_elapsed_steps": STEPS},
    f"{_GYM}common.Autoreset": {"autoreset": FLAG},
    f"{_GYM}common.RecordEpisodeStatistics": {
        "episode_count": COUNT,
        "episode_returns": NUMBER,
        "episode_lengths": COUNT,
        "time_queue": RECENT,
        "return_queue": RECENT,
        "length_queue": RECENT,
    },
    f"{_GYM}stateful_action.StickyAction": {
        "last_action": ACTION,
        "is_sticky_actions": FLAG,
        "num_repeats": COUNT,
        "repeats_taken": COUNT,
    },
    f"{_GYM}stateful_observation.DelayObservation": {"observation_queue": DELAYED},
    f"{_GYM}stateful_observation.FrameStackObservation": {"obs_queue": FRAMES},
    f"{_GYM}stateful_observation.MaxAndSkipObservation": {"_obs_buffer": ARRAY},
    f"{_GYM}stateful_observation.NormalizeObservation": {"obs_rms": MEANS},
    f"{_GYM}stateful_observation.TimeAwareObservation": {"timesteps": COUNT},
    f"{_GYM}stateful_reward.NormalizeReward": {"return_rms": MEANS, "discounted_reward": ARRAY},
    "stable_baselines3.common.monitor.Monitor": _MONITOR,
    "stable_baselines3.common.atari_wrappers.MaxAndSkipEnv": {"_obs_buffer": ARRAY},
    "sb3_contrib.common.wrappers.time_feature.TimeFeatureWrapper": {"_current_step": COUNT},
    "rl_zoo3.wrappers.ActionNoiseWrapper": {},
    "rl_zoo3.wrappers.ActionSmoothingWrapper": {"smoothed_action": ACTION},
    "rl_zoo3.wrappers.DelayedRewardWrapper": {
        "current_step": COUNT,
        "accumulated_reward": NUMBER,
    },
    "rl_zoo3.wrappers.HistoryWrapper": _HISTORY,
    "rl_zoo3.wrappers.HistoryWrapperObsDict": _HISTORY,
    "rl_zoo3.wrappers.TruncatedOnSuccessWrapper": {"current_successes": COUNT},
}
_STATELESS = (
    *("common.OrderEnforcing", "common.PassiveEnvChecker"),  # they only look
    *("rendering.HumanRendering", "rendering.RenderCollection", "stateful_action.RepeatAction"),
    *("transform_action.ClipAction", "transform_action.RescaleAction"),
    *(
        f"transform_observation.{name}Observation"
        for name in (
            *("AddRender", "Discretize", "Dtype", "Filter", "Flatten", "Grayscale"),
            *("Rescale", "Reshape", "Resize"),
        )
    ),
    "transform_reward.ClipReward",
)
STATES.update({_GYM + name: {} for name in _STATELESS})
STATES.update(
    {
        name: {}
        for name in (
            "stable_baselines3.common.atari_wrappers.ClipRewardEnv",
            "stable_baselines3.common.atari_wrappers.WarpFrame",
            "rl_zoo3.wrappers.FrameSkip",
            "rl_zoo3.wrappers.MaskVelocityWrapper",
            "rl_zoo3.wrappers.YAMLCompatResizeObservation",
        )
    }
)
#: Wrappers that draw from numpy's global stream.
_GLOBAL_STREAM = ("rl_zoo3.wrappers.ActionNoiseWrapper",)
#: Wrappers around a function of the user's, and where they keep it.
_FUNCTIONS = {
    f"{_GYM}transform_action.TransformAction": "func",
    f"{_GYM}transform_observation.TransformObservation": "func",
    f"{_GYM}transform_reward.TransformReward": "func",
}


#: The zoo puts a subclass with the same attributes in TimeLimit's place, everywhere.
_THE_SAME = {"rl_zoo3.gym_patches.PatchedTimeLimit": f"{_GYM}common.TimeLimit"}


def class_name(thing: object) -> str:
    """``module.Class`` of an object."""
    name = f"{type(thing).__module__}.{type(thing).__qualname__}"
    return _THE_SAME.get(name, name)


class EpisodeOf:
    """The episode in progress of one environment and its wrappers.

    The innermost layer asked is the first that has ``get_state`` and ``set_state`` of its own.

    :param env: the outermost wrapper, or an environment without one
    """

    def __init__(self, env: gym.Env):
        self.wrappers: list[gym.Wrapper] = []
        while isinstance(env, gym.Wrapper) and not _has_state(env):
            self.wrappers.append(env)
            env = env.env
        self.environment: Any = env

    def has_state(self) -> bool:
        """Whether the environment itself can be restored."""
        return _has_state(self.environment)

    def obstacle(self) -> str | None:
        """What may remember more than can be saved, None if there is nothing."""
        if not _has_state(self.environment):
            return f"{type(self.environment).__name__} has no get_state and set_state"
        for wrapper in self.wrappers:
            name = class_name(wrapper)
            function = _FUNCTIONS.get(name)
            known = name in STATES
            if function is not None:
                known = remembers_nothing(getattr(wrapper, function, None))
            if not known:
                return f"the wrapper {type(wrapper).__name__} may remember what cannot be saved"
        return None

    def capture(self) -> State:
        """Nested dictionaries and lists of numbers, strings, None and new arrays."""
        state = {
            "environment": self.environment.get_state(),
            "wrappers": [
                {
                    "class": class_name(wrapper),
                    "state": {
                        name: kind.take(getattr(wrapper, name))
                        for name, kind in self._kinds(wrapper).items()
                    },
                }
                for wrapper in self.wrappers
            ],
        }
        generator = getattr(self.environment.unwrapped, "_np_random", None)
        if isinstance(generator, np.random.Generator):
            state["random"] = generator.bit_generator.state
        if self._draws_globally():
            state["numpy"] = np.random.get_state(legacy=False)  # noqa: NPY002
        return state

    def restore(self, state: State) -> str | None:
        """Goes on where :meth:`capture` was called, in this or another instance.

        :return: what is wrong with the state, None if it was taken
        """
        try:
            values = self._checked(state)
            self.environment.set_state(state["environment"])
            if state.get("random") is not None:
                self.environment.unwrapped.np_random.bit_generator.state = state["random"]
            if self._draws_globally():
                np.random.set_state(checked_stream(state["numpy"], "MT19937"))  # noqa: NPY002
        except ValueError as error:
            return str(error)
        except (AttributeError, LookupError, OverflowError, TypeError) as error:
            return f"it is damaged ({error!r}): use another copy or an earlier checkpoint."
        for wrapper, own in zip(self.wrappers, values, strict=True):
            for name, kind in self._kinds(wrapper).items():
                if name in own:
                    kind.put(wrapper, name, own[name])
        return None

    def mismatch(self, state: State) -> str | None:
        """In what a state was saved through other wrappers than these, None if it was not."""
        try:
            saved = state["wrappers"]
            if not isinstance(saved, dict):
                theirs = [each["class"] for each in saved]
                ours = [class_name(wrapper) for wrapper in self.wrappers]
                return None if theirs == ours else f"it was saved with the wrappers {theirs}"
            for wrapper in self.wrappers:  # of a version that knew TimeLimit and Monitor alone
                kinds = self._kinds(wrapper)
                if kinds and not any(name in saved for name in kinds):
                    return f"it was saved without what {type(wrapper).__name__} remembers"
        except (KeyError, TypeError) as error:
            return f"it is damaged ({error!r})"
        return None

    def _checked(self, state: State) -> list[State]:
        """Each wrapper's attributes in a state.

        :raises ValueError: if they are not those of these wrappers
        """
        wrong = self.mismatch(state)
        if wrong is not None:
            raise ValueError(f"{wrong}: resume with the same wrappers.")
        saved = state["wrappers"]
        values = []
        for index, wrapper in enumerate(self.wrappers):
            kinds = self._kinds(wrapper)
            if isinstance(saved, dict):
                own = {name: saved[name] for name in kinds if name in saved}
            else:
                own = saved[index]["state"]
                if set(own) != set(kinds):
                    raise ValueError(
                        f"The saved {type(wrapper).__name__} has {sorted(own)}, but "
                        f"{sorted(kinds)} are needed: use another copy or an earlier checkpoint."
                    )
            self._check_values(wrapper, own)
            values.append(own)
        return values

    def _check_values(self, wrapper: gym.Wrapper, values: State) -> None:
        for name, kind in self._kinds(wrapper).items():
            if name in values and not kind.fits(values[name], getattr(wrapper, name), wrapper):
                raise ValueError(
                    f"The saved {type(wrapper).__name__}'s {name} does not fit this one: use "
                    "another copy or an earlier checkpoint."
                )

    def _kinds(self, wrapper: gym.Wrapper) -> dict[str, Kind]:
        return STATES.get(class_name(wrapper), {})

    def _draws_globally(self) -> bool:
        return any(class_name(wrapper) in _GLOBAL_STREAM for wrapper in self.wrappers)


def are_own(names: Iterable[str]) -> bool:
    """Whether an environment or wrapper can be restored by itself.

    :param names: what ``dir()`` lists of it: methods of something within it, to which a
        ``__getattr__`` leads, are not among them and cover only that
    """
    return {"get_state", "set_state"} <= set(names)


def _has_state(env: Any) -> bool:
    return are_own(dir(env))


#: Where the outermost wrapper gets its :class:`EpisodeOf` for the next call.
ATTRIBUTE = "tdmpc2_sb3_episode"


class _Installer(type):
    """Asked whether a wrapper is an instance, gives it a way to be asked for its episode.

    ``VecEnv.env_is_wrapped`` is the only one of SB3's calls that reaches a wrapper itself where it
    lives in another process.
    """

    def __instancecheck__(cls, wrapper: Any) -> bool:
        setattr(wrapper, ATTRIBUTE, Request(wrapper))
        return True


class Reachable(metaclass=_Installer):
    """For ``env_is_wrapped``."""


class Request:
    """Answers once: a method of :class:`EpisodeOf` by its name."""

    def __init__(self, env: gym.Env):
        self._env = env

    def __call__(self, method: str, *arguments: Any) -> Any:
        delattr(self._env, ATTRIBUTE)
        return getattr(EpisodeOf(self._env), method)(*arguments)
