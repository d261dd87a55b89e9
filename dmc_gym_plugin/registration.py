"""Registers every task with Gymnasium, by string entry points: MuJoCo is imported on first use.

The time limit of an episode lives inside :class:`~dmc_gym_plugin.environment.DMControlEnv`, where
``get_state()`` covers it, and not in a ``TimeLimit`` wrapper around it. ``gymnasium.make`` knows
only the wrapper; :func:`adopt_time_limit`, the last step of ``make`` for our ids, therefore takes
the wrapper off again and hands its number to the environment.
"""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium.envs.registration import WrapperSpec

from dmc_gym_plugin.tasks import NAMESPACE, TASKS, TaskInfo, has_labmaze

ENTRY_POINT = "dmc_gym_plugin.environment:DMControlEnv"


class TaskSteps(int):
    """A task's own episode length in control steps, told apart from a user's ``max_episode_steps``.

    ``gymnasium.make(id, action_repeat=2)`` applies the registered 1000 (control) steps, which are
    500 agent steps; ``gymnasium.make(id, action_repeat=2, max_episode_steps=1000)`` asks for 1000
    agent steps. Both reach the environment as the integer 1000: the type keeps them apart. JSON
    keeps the number alone, in two places of a spec, see :func:`adopt_time_limit`.
    """


def _adopting(task_steps: TaskSteps | None) -> tuple[WrapperSpec]:
    """The wrappers of a spec whose ``max_episode_steps``, if not a user's, are ``task_steps``."""
    return (
        WrapperSpec(
            name="adopt_time_limit",
            entry_point="dmc_gym_plugin.registration:adopt_time_limit",
            kwargs={"task_steps": task_steps},
        ),
    )


def adopt_time_limit(env: gymnasium.Env, task_steps: int | None = None) -> gymnasium.Env:
    """Move the limit of an outermost ``TimeLimit`` wrapper into the environment below it.

    :param env: what ``gymnasium.make`` built: a DMC environment, perhaps in wrappers
    :param task_steps: the spec's ``max_episode_steps`` if they are the task's own, else None. Of a
        spec that went through JSON this is a plain number like the limit itself: if they are
        equal, the limit is the task's own
    :return: the same environment without the ``TimeLimit`` wrapper
    """
    limit: int | None = None
    if isinstance(env, gymnasium.wrappers.TimeLimit):
        limit = env._max_episode_steps
        env = env.env
    base: Any = env.unwrapped
    from_json = task_steps is not None and not isinstance(task_steps, TaskSteps)
    is_own = isinstance(limit, TaskSteps) or (from_json and limit == task_steps)
    if not is_own:  # a user's own number, or none at all
        base.max_episode_steps = limit
    if base.spec is not None:
        steps = base.max_episode_steps
        # `gymnasium.make(env.spec)` must give the same environment again.
        base.spec.max_episode_steps = TaskSteps(steps) if is_own else steps
        base.spec.additional_wrappers = _adopting(TaskSteps(steps) if is_own else None)
    return env


def register_task(info: TaskInfo) -> None:
    """Register one task, unless its id is taken already."""
    if info.id in gymnasium.registry:
        return
    steps = TaskSteps(info.control_steps)
    gymnasium.register(
        id=info.id,
        entry_point=ENTRY_POINT,
        kwargs={"domain": info.domain, "task": info.task},
        max_episode_steps=steps,
        # The environment refuses a step before reset() itself, and the tests run the checker.
        order_enforce=False,
        disable_env_checker=True,
        additional_wrappers=_adopting(steps),
    )


def register_all() -> list[str]:
    """Register every task of the table that can run here.

    :return: all registered ids of the namespace
    """
    locomotion = has_labmaze()
    for info in TASKS.values():
        if info.group != "locomotion" or locomotion:
            register_task(info)
    return [name for name in gymnasium.registry if name.startswith(NAMESPACE + "/")]
