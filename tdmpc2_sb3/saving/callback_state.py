"""What the callbacks of a run remember, written into a checkpoint and put back from it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EventCallback,
)
from stable_baselines3.common.vec_env import VecEnv

from tdmpc2_sb3.saving import episode_state
from tdmpc2_sb3.saving.attribute_checks import is_whole, short

# What callbacks remember that a run's course or its files depend on.
CALLBACK_COUNTERS = ("n_calls", "best_mean_reward", "last_mean_reward", "last_time_trigger")
# What EvalCallback remembers of the evaluations made so far.
EVALUATION_LISTS = ("timesteps", "results", "length", "successes")
# Callbacks that ask for nothing but the model: a step that they missed is made up for.
SELF_CONTAINED = (EvalCallback, CheckpointCallback)


def walk_callbacks(callback: BaseCallback) -> Iterator[BaseCallback]:
    """The callback and all that it contains, depth first."""
    yield callback
    children: list[BaseCallback | None] = []
    if isinstance(callback, CallbackList):
        children = list(callback.callbacks)
    elif isinstance(callback, EventCallback):
        children = [callback.callback, getattr(callback, "callback_on_new_best", None)]
    for child in children:
        if child is not None:
            yield from walk_callbacks(child)


def environments_of(callback: BaseCallback) -> list[VecEnv]:
    """The environments of the callbacks, such as an EvalCallback's."""
    found = [getattr(each, "eval_env", None) for each in walk_callbacks(callback)]
    return [env for env in found if isinstance(env, VecEnv)]


def callback_states(callback: BaseCallback, model: BaseAlgorithm) -> list[dict[str, Any]]:
    """Class, counters and evaluations of every callback, in order.

    A callback that the present step has not reached, or that Ctrl-C stopped in its evaluation,
    is marked as due.
    """
    top_level = [callback]
    if isinstance(callback, CallbackList):
        top_level += callback.callbacks
    states = []
    for each in walk_callbacks(callback):
        state: dict[str, Any] = {"class": type(each).__name__}
        for name in CALLBACK_COUNTERS:
            if hasattr(each, name):
                kind = float if "reward" in name else int
                state[name] = kind(getattr(each, name))
        reached = each.num_timesteps == model.num_timesteps
        broken_off = isinstance(each, EvalCallback) and reached and _lacks_evaluation(each)
        state["due"] = each in top_level and (broken_off or not reached)
        if broken_off:
            state["n_calls"] -= 1
        if isinstance(each, EvalCallback):
            state["evaluations"] = _evaluations(each)
            # Before its first evaluation the environment is new, and so it is in the resumed run.
            if each.evaluations_timesteps and not broken_off:
                state["environments"] = episode_state.capture(each.eval_env)
        states.append(state)
    return states


def _lacks_evaluation(callback: EvalCallback) -> bool:
    return (
        callback.log_path is not None
        and callback.eval_freq > 0
        and callback.n_calls > 0
        and callback.n_calls % callback.eval_freq == 0
        and callback.evaluations_timesteps[-1:] != [callback.num_timesteps]
    )


def _evaluations(callback: EvalCallback) -> dict[str, list[Any]]:
    lists = {name: getattr(callback, f"evaluations_{name}") for name in EVALUATION_LISTS}
    return {name: np.asarray(rows).tolist() for name, rows in lists.items()}


def check_callback_state(state: Any) -> None:
    """Refuse what :func:`callback_states` cannot have returned for a callback.

    :raises ValueError: naming the part
    """
    kinds: dict[str, Callable[[Any], bool]] = {
        "class": lambda value: isinstance(value, str),
        "due": lambda value: isinstance(value, bool),
        **dict.fromkeys(("n_calls", "last_time_trigger"), lambda value: is_whole(value, 0, 2**53)),
        **dict.fromkeys(("best_mean_reward", "last_mean_reward"), lambda v: isinstance(v, float)),
        "evaluations": _are_evaluations,
        "environments": lambda value: value is None or isinstance(value, list),
    }
    if not isinstance(state, dict) or not {"class", "due"} <= set(state) <= set(kinds):
        raise ValueError(f"the callback {short(state)}")
    for name, value in state.items():
        if not kinds[name](value):
            raise ValueError(f"{short(value)} as {name} of the callback {short(state['class'])}")
    if state.get("environments") is not None:
        episode_state.check_episodes(state["environments"], len(state["environments"]))


def _are_evaluations(value: Any) -> bool:
    """Whether a value holds as many lists of results as there are steps, of numbers only."""
    if not isinstance(value, dict) or set(value) != set(EVALUATION_LISTS):
        return False
    if not all(isinstance(rows, list) for rows in value.values()):
        return False
    steps, tables = value["timesteps"], [value[name] for name in EVALUATION_LISTS[1:]]
    rows = [row for table in tables for row in table]
    return (
        all(is_whole(step, 0, 2**53) for step in steps)
        and all(len(table) == len(steps) for table in tables if table is not tables[-1])
        and len(tables[-1]) in (0, len(steps))  # successes
        and all(isinstance(row, list) and all(map(_is_number, row)) for row in rows)
        and all(len({len(row) for row in table}) <= 1 for table in tables)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and abs(value) < 2**1000


class RestoreCallbacks(BaseCallback):
    """Puts the callbacks' counters, and the evaluations made so far, back when training starts.

    :param states: from :func:`callback_states`
    """

    def __init__(self, states: list[dict[str, Any]]):
        super().__init__()
        self._states = states
        self._go_on = True

    def _on_training_start(self) -> None:
        waiting = list(self._states)
        due = []
        for callback in walk_callbacks(self.locals["callback"]):
            name = type(callback).__name__
            match = next((state for state in waiting if state["class"] == name), None)
            if match is None:
                continue
            waiting.remove(match)
            for key in CALLBACK_COUNTERS:
                if key in match:
                    setattr(callback, key, match[key])
            if isinstance(callback, EvalCallback):
                self._restore_evaluations(callback, match)
            if match["due"]:
                due.append(callback)
        for callback in due:
            if isinstance(callback, SELF_CONTAINED):
                self._go_on = callback.on_step() and self._go_on
            else:
                callback.n_calls += 1

    def _restore_evaluations(self, callback: EvalCallback, state: dict[str, Any]) -> None:
        for name, rows in state["evaluations"].items():
            setattr(callback, f"evaluations_{name}", rows)
        environments = state.get("environments")
        if environments is not None:
            same_number = len(environments) == callback.eval_env.num_envs
            if same_number and episode_state.obstacle(callback.eval_env, environments) is None:
                episode_state.restore(callback.eval_env, environments)
        if callback.log_path is None:
            return
        # EvalCallback writes its file anew at each evaluation, and a kill may have cut it off.
        if not callback.evaluations_timesteps:
            pathlib.Path(f"{callback.log_path}.npz").unlink(missing_ok=True)
            return
        arrays = {
            "timesteps": callback.evaluations_timesteps,
            "results": callback.evaluations_results,
            "ep_lengths": callback.evaluations_length,
        }
        if callback.evaluations_successes:
            arrays["successes"] = callback.evaluations_successes
        np.savez(callback.log_path, **arrays)  # type: ignore[arg-type]

    def _on_step(self) -> bool:
        return self._go_on
