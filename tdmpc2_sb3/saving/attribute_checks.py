"""Whether the saved attributes of an agent are of the kind and size that an agent can have.

Arguments have their ranges in :data:`tdmpc2_sb3.settings.SETTINGS`, whatever else an agent counts
by in the tables below; a file that asks for more is refused before memory is taken.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit

from tdmpc2_sb3.settings import MOST_STEPS, SETTINGS

_UPDATES = 10**9  # that one burst or one run makes due

#: Whole numbers that are no arguments, and the range of each.
WHOLE = {
    "num_timesteps": (0, MOST_STEPS),
    "_total_timesteps": (0, MOST_STEPS),
    "_num_timesteps_at_start": (0, MOST_STEPS),
    "_lifetime_steps": (0, MOST_STEPS),
    "_episode_num": (0, MOST_STEPS),
    "_n_updates": (0, MOST_STEPS),
    "_rollout_steps": (0, MOST_STEPS),
    "_rollout_episodes": (0, MOST_STEPS),
    "start_time": (0, 2**63 - 1),
    "n_envs": (1, 2**16),
    "sde_sample_freq": (-1, MOST_STEPS),
    "n_steps": (1, 1000),
    "_stats_window_size": (1, 10**9),
}
#: Those that may be None.
OPTIONAL = {"_pending_initial_updates": (0, MOST_STEPS)}
#: Numbers, none of them infinite.
REAL = ("_current_progress_remaining",)
FLAGS = ("use_sde", "use_sde_at_warmup", "optimize_memory_usage")
_MAX_PLAN_NUMBERS = 2**28  # that one plan draws
_MAX_BATCH_ROWS = 2**22
_UNITS = ("step", "episode", *map(str, TrainFrequencyUnit))
_REMEDY = "use another copy, or give a value of your own by custom_objects"


class Refused(ValueError):
    """An attribute that no agent can have."""

    def __init__(self, name: str, value: Any, needed: str) -> None:
        super().__init__(f"The saved {name} is {short(value)} where {needed} is needed: {_REMEDY}.")


def check_parts(
    path: Any, data: dict[str, Any], tensors: dict[str, Any], resumable: bool = True
) -> None:
    """Refuse a file that lacks what every agent needs, or has it of another kind.

    :param path: of the file
    :param data: attributes by name
    :param tensors: state dicts by name
    :param resumable: whether it holds the run too
    :raises ValueError: in one sentence
    """
    if resumable and "run_state" not in data:
        raise ValueError(
            f"{path!r} holds no whole agent: a policy saved alone is loaded by its own class, "
            "such as MlpPolicy.load(path)."
        )
    needed: dict[str, Any] = {
        "policy_class": type,
        "observation_space": spaces.Space,
        "action_space": spaces.Space,
        "n_envs": (int, float),
        "policy": dict,
    }
    if resumable:
        needed.update(run_state=dict, run_streams=dict)
    parts = {**data, **{name: tensors.get(name) for name in ("run_streams", "policy")}}
    for name, kind in needed.items():
        if not isinstance(parts.get(name), kind):
            raise ValueError(
                f"{path!r} lacks {name!r} or has it damaged: use another copy or an earlier "
                "checkpoint."
            )


def check_policy_arguments(path: Any, arguments: Any, weights: Any) -> None:
    """Refuse the arguments of a policy saved alone that no policy can have.

    :param path: of the file
    :param arguments: by name
    :param weights: its state dict
    :raises ValueError: in one sentence
    """
    kinds = {"observation_space": spaces.Space, "action_space": spaces.Space}
    good = isinstance(arguments, dict) and isinstance(weights, dict)
    if not good or not all(isinstance(arguments.get(n), kind) for n, kind in kinds.items()):
        raise ValueError(f"{path!r} lacks a policy's spaces or weights: use another copy.")
    given = {name: value for name, value in arguments.items() if value is not None}
    _check_numbers(given)
    schedule = given.pop("lr_schedule", 0.0)
    _check_settings({"policy_kwargs": {}, "learning_rate": schedule, **given})
    _check_sizes(given)


def check_attributes(data: dict[str, Any], fresh: Any) -> None:
    """Refuse saved attributes that no agent can have.

    :param data: attributes by name
    :param fresh: an agent that was made but not set up
    :raises ValueError: in one sentence
    """
    hidden = set(fresh._excluded_save_params())
    for name in data:
        shadows = name not in vars(fresh) and hasattr(type(fresh), name)
        if name in hidden or shadows or name.startswith("__"):
            raise Refused("name of an attribute", name, "one that agents have")
    _check_numbers(data)
    _check_settings(data)
    _check_sizes(data)
    _check_counters(data)
    _check_past(data)


def is_whole(value: Any, low: int, high: int) -> bool:
    """Say whether a value is a whole number (1e6 too, as YAML has it) within bounds."""
    number = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    number = number or (isinstance(value, float) and value.is_integer())
    return number and low <= int(value) <= high


def is_real(value: Any) -> bool:
    """Say whether a value is a finite number."""
    number = isinstance(value, (int, float, np.integer, np.floating))
    return number and not isinstance(value, bool) and abs(float(value)) < 1e300


def short(value: Any, most: int = 60) -> str:
    """A value in a line of at most so many characters, for an error."""
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _check_numbers(data: Mapping[str, Any]) -> None:
    for name, value in data.items():
        if name in SETTINGS:
            _check_argument(name, value)
            continue
        low, high = {**WHOLE, **OPTIONAL}.get(name, (0, 0))
        if name in WHOLE and not is_whole(value, low, high):
            raise Refused(name, value, f"a whole number from {low} to {high}")
        if name in OPTIONAL and value is not None and not is_whole(value, low, high):
            raise Refused(name, value, f"a whole number from {low} to {high}")
        if name in REAL and not is_real(value):
            raise Refused(name, value, "a finite number")
        if name in FLAGS and not isinstance(value, bool):
            raise Refused(name, value, "True or False")


def _check_argument(name: str, value: Any) -> None:
    check = SETTINGS[name].check
    if check is None:
        return
    try:
        kept = check.convert(name, value)
    except (ValueError, OverflowError) as error:  # 10**400 is no float
        raise Refused(name, value, check.needed) from error
    if isinstance(kept, (int, float)) and abs(kept) > check.most:
        raise Refused(name, value, check.needed)


def _check_settings(data: Mapping[str, Any]) -> None:
    for name in ("policy_kwargs", "replay_buffer_kwargs", "dynamics_kwargs"):
        value = data.get(name)
        if value is None and name != "policy_kwargs":
            continue
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise Refused(name, value, "a dictionary of arguments")
        for key, item in value.items():
            if isinstance(item, (int, np.integer)) and not is_whole(int(item), -(10**5), 10**5):
                raise Refused(f"{name}[{key!r}]", item, "a number up to 100,000")
    given = data.get("policy_kwargs") or {}
    _check_numbers({name: value for name, value in given.items() if value is not None})
    if given.get("dynamics_kwargs") is not None:
        _check_settings({"policy_kwargs": {}, "dynamics_kwargs": given["dynamics_kwargs"]})
    frequency = data.get("train_freq", 1)
    if isinstance(frequency, TrainFreq):
        frequency = tuple(frequency)
    counted, *unit = frequency if isinstance(frequency, (tuple, list)) else (frequency,)
    if not is_whole(counted, 1, 10**6) or not all(str(each) in _UNITS for each in unit):
        raise Refused("train_freq", frequency, "up to 1,000,000 steps or episodes")
    rate = data.get("learning_rate", 0.0)
    try:
        rates = [rate] if not callable(rate) else [float(rate(1.0)), float(rate(0.0))]
    except Exception as error:
        raise Refused("learning_rate", rate, "a number or a schedule of numbers") from error
    if not all(is_real(each) and each >= 0.0 for each in rates):
        raise Refused("learning_rate", rate, "a number or a schedule of numbers, not negative")
    if data.get("action_noise") is not None and not isinstance(data["action_noise"], ActionNoise):
        raise Refused("action_noise", data["action_noise"], "an action noise")


def _check_sizes(data: Mapping[str, Any]) -> None:
    """What a plan draws and what a batch holds, as products."""
    given = {**data, **(data.get("policy_kwargs") or {})}
    iterations = given.get("num_iterations")
    factors: list[Any] = [given.get("horizon", 1), given.get("num_samples", 1)]
    factors.append(8 if isinstance(iterations, str) or iterations is None else iterations)
    factors.append(math.prod(getattr(data.get("action_space"), "shape", None) or (1,)))
    if math.prod(int(factor) for factor in factors) > _MAX_PLAN_NUMBERS:
        raise Refused(
            "horizon, num_samples and num_iterations",
            factors[:3],
            f"a plan of up to {_MAX_PLAN_NUMBERS} numbers",
        )
    length = data.get("train_horizon") or data.get("horizon", 1)
    if data.get("batch_size", 1) * (length + 1) > _MAX_BATCH_ROWS:
        raise Refused("batch_size", data["batch_size"], f"a batch of up to {_MAX_BATCH_ROWS} rows")


def _check_counters(data: Mapping[str, Any]) -> None:
    """Gradient steps that are due are no more than the settings ever make due."""
    steps = data.get("gradient_steps", 1)
    due = steps if steps >= 0 else min(data.get("_lifetime_steps", 0), _UPDATES)
    pending = data.get("_pending_updates", 0)
    if not is_whole(pending, 0, due):
        raise Refused("_pending_updates", pending, f"a whole number from 0 to {due}")
    starts: Any = data.get("learning_starts", 0)
    burst: Any = data.get("initial_gradient_steps")
    if not is_whole(starts, 0, MOST_STEPS):  # a word is for an agent that is not set up
        raise Refused("learning_starts", starts, "a number of steps")
    initial = burst if is_whole(burst, 0, _UPDATES) else min(int(starts), _UPDATES)
    pending = data.get("_pending_initial_updates")
    if pending is not None and not is_whole(pending, 0, int(initial)):
        raise Refused("_pending_initial_updates", pending, f"a whole number from 0 to {initial}")


def _check_past(data: Mapping[str, Any]) -> None:
    """The newest observations and results."""
    n_envs = data.get("n_envs", 1)
    for name in ("_last_obs", "_last_original_obs"):
        if data.get(name) is not None:
            _check_observation(name, data[name], data["observation_space"], n_envs)
    starts = data.get("_last_episode_starts")
    if starts is not None and not _is_array(starts, "b", (n_envs,)):
        raise Refused("_last_episode_starts", starts, f"an array of {n_envs} truth values")
    for name in ("ep_info_buffer", "ep_success_buffer"):
        results = data.get(name)
        if results is not None and not isinstance(results, deque):
            raise Refused(name, results, "a deque of results")
    for result in data.get("ep_info_buffer") or ():
        numbers = [result.get(key) for key in "rl"] if isinstance(result, dict) else [None]
        if not all(is_real(number) for number in numbers):
            raise Refused("ep_info_buffer", result, "a deque of Monitor's results")
    for result in data.get("ep_success_buffer") or ():
        if not isinstance(result, (bool, np.bool_)) and not is_real(result):
            raise Refused("ep_success_buffer", result, "a deque of numbers")


def _check_observation(name: str, value: Any, space: spaces.Space, n_envs: int) -> None:
    if isinstance(space, spaces.Dict):
        if not isinstance(value, dict) or set(value) != set(space.spaces):
            raise Refused(name, value, f"a dictionary of {sorted(space.spaces)}")
        for key, part in space.spaces.items():
            _check_observation(f"{name}[{key!r}]", value[key], part, n_envs)
        return
    shape = (n_envs, *(space.shape or ()))
    # Those from before normalisation may have their axes in another order.
    numbers = math.prod(shape)
    moved = name.startswith("_last_original") and getattr(value, "size", None) == numbers
    if not _is_array(value, "biuf", value.shape if moved else shape):
        raise Refused(name, value, f"an array of finite numbers of the shape {shape}")


def _is_array(value: Any, kinds: str, shape: tuple[int, ...]) -> bool:
    fits = isinstance(value, np.ndarray) and value.dtype.kind in kinds and value.shape == shape
    return fits and (value.dtype.kind != "f" or bool(np.isfinite(value).all()))
