"""One dm_control task as a simulation: load, reset, advance one control step, observe.

:class:`SuiteSimulation` does what ``dm_control.rl.control.Environment`` does, to the last bit, but
without building a ``TimeStep`` and an observation for every control step, and with MuJoCo called
directly. dm_control's own classes keep the physics, the rewards and the observations.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import inspect
import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmc_gym_plugin import rendering
from dmc_gym_plugin.tasks import TaskInfo

if TYPE_CHECKING:
    from dmc_gym_plugin.composer_simulation import ComposerSimulation


def check_mujoco(version: str | None = None) -> None:
    """Refuse a MuJoCo that the installed dm_control cannot work with.

    :param version: MuJoCo's version; None reads the installed one
    :raises ImportError: for MuJoCo 4 and later
    """
    version = importlib.metadata.version("mujoco") if version is None else version
    if int(version.split(".")[0]) >= 4:
        raise ImportError(
            f"mujoco {version} is installed, but dm_control works only with mujoco 3; "
            "run `pip install 'mujoco<4'`."
        )


check_mujoco()
rendering.import_dm_control()

import mujoco  # noqa: E402 - after the version check, and without a choice of OpenGL
from dm_control import suite  # noqa: E402
from dm_control.mujoco import Physics  # noqa: E402
from dm_control.rl.control import PhysicsError  # noqa: E402
from dm_control.rl.control import Task as ControlTask  # noqa: E402
from dm_control.suite.base import Task  # noqa: E402

from dmc_gym_plugin import extended  # noqa: E402
from dmc_gym_plugin import state as exact  # noqa: E402
from dmc_gym_plugin.fast_rewards import use_fast_rewards  # noqa: E402
from dmc_gym_plugin.indexing import cache_named_indexing  # noqa: E402
from dmc_gym_plugin.state_checks import check_keys  # noqa: E402


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """Silence MuJoCo's remarks on old attributes in dm_control's models: no user can help it."""
    logger = logging.getLogger("absl")

    def keep(record: logging.LogRecord) -> bool:
        return "is deprecated and will be removed" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


class SuiteSimulation:
    """A task on dm_control's ``Physics`` and ``Task`` classes.

    :param domain: the domain, such as ``walker``
    :param task: the task, such as ``walk``
    :param task_kwargs: keyword arguments of dm_control's task constructor
    """

    def __init__(self, domain: str, task: str, task_kwargs: dict[str, Any] | None = None) -> None:
        self._domain = domain
        self._task_name = task
        self._task_kwargs = dict(task_kwargs or {})
        self._check_names()
        # LQR draws its model while it is built, so a seed needs a new model.
        self._rebuild_on_seed = domain == "lqr"
        self._build(self._task_kwargs.pop("random", None))

    def _check_names(self) -> None:
        """Refuse keyword arguments that the task's constructor does not take."""
        if (self._domain, self._task_name) in extended.BUILDERS:
            taken = list(inspect.signature(extended.load).parameters)[2:]
        else:
            constructor = getattr(suite, self._domain).SUITE[self._task_name]
            taken = list(inspect.signature(constructor).parameters)
        for name in self._task_kwargs:
            if name not in taken:
                raise ValueError(
                    f"task_kwargs holds {name!r}, which {self._domain}-{self._task_name} does not "
                    f"take; choose of {', '.join(taken)}."
                )

    def _load(self, task_kwargs: dict[str, Any]) -> Any:
        name = (self._domain, self._task_name)
        with _without_deprecations():
            if name in extended.BUILDERS:
                return extended.load(*name, **task_kwargs)
            return suite.load(*name, task_kwargs=task_kwargs)

    def _build(self, random: Any) -> None:
        self.env = self._load({**self._task_kwargs, "random": random})
        self.physics = self.env.physics
        self.task = self.env.task
        self.n_sub_steps: int = self.env._n_sub_steps
        self.control_timestep: float = self.env.control_timestep()
        limit = self.env._step_limit
        self.step_limit: int | None = None if math.isinf(limit) else math.ceil(limit)
        self._model = self.physics.model.ptr
        self._data = self.physics.data.ptr
        self._control = self._data.ctrl
        self._rk4 = self._model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
        self._plain_step = type(self.physics).step is Physics.step and self.physics.legacy_step
        self._warnings = self.physics.data.warning.number
        # Hooks that a task does not override are known, so calling them can be spared.
        kind = type(self.task)
        self._plain_control = (
            kind.before_step is Task.before_step
            and type(self.physics).set_control is Physics.set_control
        )
        self._plain_after = kind.after_step is Task.after_step
        self.terminates: bool = kind.get_termination is not ControlTask.get_termination
        self._edits = exact.ModelEdits(self._model)
        cache_named_indexing(self.physics)
        use_fast_rewards(self.task)

    @property
    def random(self) -> np.random.RandomState:
        """The task's random generator."""
        return self.task._random

    @property
    def time(self) -> float:
        """Seconds of simulated time since the episode began."""
        return self._data.time

    def action_bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the actuators' bounds, as dm_control states them."""
        spec = self.env.action_spec()
        shape = spec.shape
        return np.broadcast_to(spec.minimum, shape), np.broadcast_to(spec.maximum, shape)

    def seed(self, seed: int) -> None:
        """Give the task the random generator that dm_control builds from a seed."""
        random = exact.random_state_from_seed(seed)
        if self._rebuild_on_seed:
            self.close()
            self._build(random)
        else:
            self.task._random = random

    def reset(self) -> None:
        """Start an episode."""
        physics = self.physics
        undrawn = not physics._contexts
        if undrawn:
            physics._contexts = rendering.NO_CONTEXTS
        try:
            with physics.reset_context():
                self.task.initialize_episode(physics)
        finally:
            if undrawn:
                physics._contexts = None

    def step(self, control: NDArray[np.float64]) -> tuple[float, float | None]:
        """Advance one control step.

        :param control: actuator controls, [A]
        :return: the reward, and the discount of a task that ends here or None
        :raises PhysicsError: if the simulation diverged
        """
        task, physics = self.task, self.physics
        if self._plain_control:
            self._control[:] = control
        else:
            task.before_step(control, physics)
        if self._plain_step:
            self._advance()
        else:
            physics.step(self.n_sub_steps)
        if not self._plain_after or task._visualize_reward:
            task.after_step(physics)
        discount = task.get_termination(physics) if self.terminates else None
        return float(task.get_reward(physics)), discount

    def _advance(self) -> None:
        """Do what ``Physics.step`` does: mj_step1 last, so that observations are up to date."""
        model, data, count = self._model, self._data, self.n_sub_steps
        before = self._warnings.tobytes()
        if self._rk4:
            mujoco.mj_step(model, data, count)
        else:
            mujoco.mj_step2(model, data)
            if count > 1:
                mujoco.mj_step(model, data, count - 1)
        mujoco.mj_step1(model, data)
        if self._warnings.tobytes() != before:
            self._raise_divergence(np.frombuffer(before, self._warnings.dtype))

    def _raise_divergence(self, before: NDArray[Any]) -> None:
        names = list(mujoco.mjtWarning.__members__)
        raised = [names[i] for i in np.flatnonzero(self._warnings > before)]
        raise PhysicsError(
            f"The physics of {self._domain}-{self._task_name} diverged at time "
            f"{self.physics.time():g} s (MuJoCo's warnings: {', '.join(raised)}); reset the "
            "environment to go on."
        )

    def observation(self) -> dict[str, Any]:
        """Return the task's observation, as dm_control computes it."""
        return self.task.get_observation(self.physics)

    def get_state(self) -> dict[str, Any]:
        """Return everything the simulation's future depends on."""
        return {
            "data": exact.copy_data(self._model, self._data),
            "model": self._edits.copy(self._model),
            "task": exact.copy_attributes(self.task),
            "random": exact.copy_random_state(self.random),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where :meth:`get_state` was called.

        :raises ValueError: if the state is none of this task's; the simulation is untouched then
        """
        check_keys("The state's simulation", state, ("data", "model", "task", "random"))
        exact.check_data(self._model, self._data, state["data"])
        self._edits.check(state["model"])
        exact.check_attributes(self.task, state["task"])
        exact.restore_random_state(self.random, state["random"])
        self._edits.restore(self._model, state["model"])
        exact.restore_data(self._model, self._data, state["data"])
        exact.restore_attributes(self.task, state["task"])
        rendering.upload_terrain(self.physics)

    def close(self) -> None:
        """Free the OpenGL contexts and the simulator."""
        self.env.close()
        self.physics.free()
        del self.physics._named  # its cached indexers hold the arrays, whoever holds the physics


def load(
    info: TaskInfo, task_kwargs: dict[str, Any] | None = None, images: bool = False
) -> SuiteSimulation | ComposerSimulation:
    """Return the simulation of a task of the table.

    :param info: the row of the table
    :param task_kwargs: keyword arguments of the suite's task constructor
    :param images: whether a composer task's own camera observations are wanted
    """
    if info.group in ("suite", "extended"):
        return SuiteSimulation(info.domain, info.task, task_kwargs)
    if task_kwargs:
        raise ValueError(
            f"{info.id} takes no task_kwargs, but got {sorted(task_kwargs)}; only suite tasks do."
        )
    # Here, because composer is slow to import and most users never need it.
    from dmc_gym_plugin.composer_simulation import ComposerSimulation

    return ComposerSimulation(info, images)
