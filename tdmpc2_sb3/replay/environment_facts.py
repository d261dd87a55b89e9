"""What the algorithm asks of a live vectorised environment: its time limit, whether it terminates.

Works through any stack of wrappers, in this process or in others. The settings that are "auto"
follow from it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from tdmpc2_sb3.saving.attribute_checks import short
from tdmpc2_sb3.settings import whole_number

GAMMA_MIN = 0.95
GAMMA_MAX = 0.995
GAMMA_MAX_EPISODIC = 0.99
GAMMA_UNKNOWN = 0.99  # without a time limit
EPISODES_PER_DISCOUNT = 5.0
WARM_UP_EPISODES = 5
WARM_UP_MIN = 1000

# Gymnasium's and dm_control's tasks whose episodes end by the time limit alone.
NEVER_TERMINATE = ("Pendulum", "HalfCheetah", "Swimmer", "Reacher", "Pusher", "dm_control/")


class EnvironmentFacts(NamedTuple):
    """Facts of a vectorised environment."""

    episode_steps: int | None  # time limit in agent steps, None without one
    terminates: bool  # whether an episode may end before the limit
    reason: str  # how the latter was told


def read_facts(env: VecEnv) -> EnvironmentFacts:
    """Reads the time limit and the kind of ending from the live environments.

    :raises ValueError: if a time limit is no number of steps
    """
    specs = _get(env, "spec")
    limits = [_limit(spec) for spec in specs]
    # The environment's own, and that of a TimeLimit put on by hand, which no spec tells.
    for name in ("max_episode_steps", "_max_episode_steps"):
        limits += _get(env, name)
    known = [_steps(limit) for limit in limits if _is_limit(limit)]
    terminates, reason = _terminates(env, specs)
    return EnvironmentFacts(min(known) if known else None, terminates, reason)


def automatic_gamma(episode_steps: int | None, episodic: bool) -> float:
    """clip((T/5 - 1) / (T/5), 0.95, 0.995) for episodes of T agent steps; at most 0.99 if episodic.

    :param episode_steps: T; None gives 0.99
    :param episodic: whether the task terminates
    """
    gamma = GAMMA_UNKNOWN
    if episode_steps is not None:
        share = episode_steps / EPISODES_PER_DISCOUNT
        gamma = min(max((share - 1.0) / share, GAMMA_MIN), GAMMA_MAX)
    return min(gamma, GAMMA_MAX_EPISODIC) if episodic else gamma


def automatic_learning_starts(episode_steps: int | None) -> int:
    """max(1000, 5 T) agent steps; 1000 without a time limit."""
    return max(WARM_UP_MIN, WARM_UP_EPISODES * (episode_steps or 0))


def automatic_settings(
    names: Sequence[str], facts: EnvironmentFacts, episodic: Any
) -> dict[str, Any]:
    """Values of the settings that are "auto".

    :param names: of these settings, some of gamma, learning_starts and episodic
    :param facts: of the environment
    :param episodic: as it is given
    """
    if "episodic" in names:
        episodic = facts.terminates
    values = {
        "episodic": episodic,
        "gamma": automatic_gamma(facts.episode_steps, bool(episodic)),
        "learning_starts": automatic_learning_starts(facts.episode_steps),
    }
    return {name: value for name, value in values.items() if name in names}


def describe_automatic(values: dict[str, Any], facts: EnvironmentFacts) -> str:
    """What :func:`automatic_settings` were found, and from what."""
    limit = "no time limit" if facts.episode_steps is None else f"{facts.episode_steps} steps"
    listed = ", ".join(
        f"{name} = {value if isinstance(value, bool) else format(value, 'g')}"
        for name, value in values.items()
    )
    lines = [f"Automatic settings for episodes of {limit}: {listed}"]
    if "episodic" in values:
        kind = "may terminate" if facts.terminates else "never terminates"
        lines.append(f"The task {kind}: {facts.reason}. Pass episodic=True or False to overrule.")
    return "\n".join(lines)


def check_action_space(space: spaces.Space) -> None:
    """
    :raises ValueError: if the space is no Box, or one whose bounds are not finite and apart
    """
    shown = short(space, 200)
    if not isinstance(space, spaces.Box):
        raise ValueError(
            f"The action space is {shown}: TDMPC2 plans continuous actions, use an environment "
            "with a Box action space (DQN or PPO handle discrete ones)."
        )
    if not space.is_bounded():
        raise ValueError(
            f"The action space {shown} has infinite bounds: TDMPC2 plans within finite ones; "
            "wrap the environment in gymnasium.wrappers.TransformAction(env, lambda action: "
            "action, spaces.Box(low, high))."
        )
    if 0 in space.shape:
        raise ValueError(
            f"The action space {shown} has no dimension: there is nothing to plan, use an "
            "environment with at least one action."
        )
    low, high = (np.asarray(each, dtype=np.float64).ravel() for each in (space.low, space.high))
    widest = np.finfo(np.float32).max
    for index in np.flatnonzero(~((low < high) & (high - low <= widest))):
        kind = "leave no choice" if low[index] >= high[index] else "lie too far apart for float32"
        remedy = "leaves it out" if low[index] >= high[index] else "has narrower ones"
        raise ValueError(
            f"The bounds of dimension {index} of the action space, {low[index]:g} and "
            f"{high[index]:g}, {kind}: wrap the environment in "
            "gymnasium.wrappers.TransformAction, with an action space that "
            f"{remedy}."
        )


def _get(env: VecEnv, name: str) -> list[Any]:
    # Asked for an attribute that is not there, SubprocVecEnv's processes would end.
    return list(env.get_attr(name)) if env.has_attr(name) else []


def _limit(spec: Any) -> int | None:
    return getattr(spec, "max_episode_steps", None)


def _is_limit(limit: Any) -> bool:
    """Whether it is meant to limit something; infinity and None do not."""
    return limit is not None and not (isinstance(limit, numbers.Real) and limit == math.inf)


def _steps(limit: Any) -> int:
    name = "max_episode_steps of the environment"
    try:
        single = hasattr(limit, "item") and np.size(limit) == 1  # of NumPy
        return whole_number(name, limit.item() if single else limit, 1)
    except ValueError as error:
        raise ValueError(
            f"{error} Give gymnasium.make or the environment the steps of an episode, or None."
        ) from error


def _terminates(env: VecEnv, specs: list[Any]) -> tuple[bool, str]:
    said = _get(env, "terminates")
    if said:
        return any(said), "the environment says so"
    ids = {str(getattr(spec, "id", None)) for spec in specs}
    if ids and all(name.startswith(NEVER_TERMINATE) for name in ids):
        return False, f"{', '.join(sorted(ids))} is known to end by its time limit alone"
    return True, "nothing says that its episodes end by the time limit alone"
