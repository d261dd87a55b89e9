"""dm_control's composer tasks (manipulation, locomotion) as simulations.

A composer task compiles a new model at every episode and keeps state in many small objects, so
nothing can be spared here as in :class:`~dmc_gym_plugin.simulation.SuiteSimulation`: every control
step is dm_control's own. The exact state is the random state at the episode's start and the
controls since; restoring it replays them.

Some locomotion tasks draw random numbers from elsewhere too: from numpy's global stream (textures
of mazes, all of ``rodent_two_touch``) and from labmaze's own generator (layouts of mazes). Here the
first is a stream of the simulation, and the second is seeded from it for every maze, so a seed
fixes these episodes and a state holds them.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

with warnings.catch_warnings():  # composer shows the whole process every DeprecationWarning
    from dm_control import composer
    from dm_control.composer.observation import observable

from dmc_gym_plugin import rendering
from dmc_gym_plugin import state as exact
from dmc_gym_plugin.state_checks import check_keys, check_numbers
from dmc_gym_plugin.tasks import TaskInfo

#: Locomotion tasks and the dm_control module that builds them.
LOCOMOTION_MODULES = {
    "cmu_humanoid": "dm_control.locomotion.examples.basic_cmu_2019",
    "rodent": "dm_control.locomotion.examples.basic_rodent_2020",
}

_CAMERAS = (observable.MJCFCamera, observable.MujocoCamera)


def _manipulation(task: str, images: bool) -> composer.Environment:
    from dm_control import manipulation
    from dm_control.manipulation.shared import registry

    made = registry.get_constructor(task)()
    if not images:
        _disable_cameras(made)
    return composer.Environment(made, time_limit=manipulation._TIME_LIMIT)


def _locomotion(task: str, images: bool) -> composer.Environment:
    from dm_control.locomotion.arenas import mazes  # here, because it needs labmaze

    builder = next(name for prefix, name in LOCOMOTION_MODULES.items() if task.startswith(prefix))
    make = getattr(importlib.import_module(builder), task)
    try:
        env = make()
    except RuntimeError as error:  # dm_control films while it builds them
        raise rendering.explain(error) from error
    if not images:
        _disable_cameras(env.task)
    arena = env.task.root_entity
    if isinstance(arena, mazes.RandomMazeWithTargets):
        arena._maze = SeededMaze(arena.maze)
    if hasattr(env.task, "_target_positions"):  # a list, left from one episode to the next's model
        env.task._target_positions = np.array(env.task._target_positions)
    return env


def _disable_cameras(task: Any) -> None:
    """Spare the pictures that nobody looks at: one costs more than the physics."""
    for item in task.observables.values():
        if isinstance(item, _CAMERAS):
            item.enabled = False


def count_steps(limit: float, timestep: float, n_sub_steps: int) -> int | None:
    """Return after how many control steps composer's ``physics.time() >= limit`` comes true.

    The clock is a sum of rounded time steps, so the sum decides and not the quotient.
    """
    if math.isinf(limit):
        return None
    steps, clock = 0, 0.0
    while clock < limit:
        for _ in range(n_sub_steps):
            clock += timestep
        steps += 1
    return steps


class SeededMaze:
    """A random maze of labmaze whose every layout follows from numpy's global stream.

    labmaze's generator shows its random state to nobody, so a layout could not be made again. Here
    each comes from a new generator, whose seed labmaze draws from numpy's global stream.

    :param maze: labmaze's ``RandomMaze``: its size, rooms and numbers of objects are kept
    """

    #: The options that a maze tells; dm_control's tasks leave the others at labmaze's defaults.
    OPTIONS = (
        "height",
        "width",
        "max_rooms",
        "room_min_size",
        "room_max_size",
        "max_variations",
        "spawns_per_room",
        "spawn_token",
        "objects_per_room",
        "object_token",
    )

    def __init__(self, maze: Any) -> None:
        self._options = {name: getattr(maze, name) for name in self.OPTIONS}
        self._maze = maze

    def regenerate(self) -> None:
        """Draw a new layout."""
        self._maze = type(self._maze)(**self._options)

    def __getattr__(self, name: str) -> Any:
        """Return what dm_control asks of the maze: its layers and sizes."""
        return getattr(self._maze, name)


class ComposerSimulation:
    """A composer task; the interface is that of ``SuiteSimulation``.

    :param info: the task
    :param images: whether the task's own camera observations are wanted
    """

    def __init__(self, info: TaskInfo, images: bool) -> None:
        build = _manipulation if info.domain == "manipulation" else _locomotion
        self.env = build(info.task, images)
        self.task = self.env.task
        self.n_sub_steps: int = self.env._n_sub_steps
        self.control_timestep: float = self.env.control_timestep()
        self.step_limit = count_steps(
            self.env._time_limit, self.physics.timestep(), self.n_sub_steps
        )
        self.env._time_limit = math.inf  # the environment counts the steps itself
        ends = type(self.task).should_terminate_episode
        self.terminates: bool = ends is not composer.Task.should_terminate_episode
        # Some tasks shuffle a list of theirs anew from its last order; a seed has to start from the
        # first one, and a replay from the one before its episode.
        self._built = exact.copy_attributes(self.task)
        self._before = self._built
        self._target_kinds = list(getattr(self.task, "_target_builders", ()))
        self._order_before = self._order()
        self._numpy = np.random.RandomState()  # stands for numpy's global stream
        self._start: dict[str, Any] | None = None
        self._controls: list[NDArray[np.float64]] = []
        self._observation: Any = None

    @property
    def physics(self) -> Any:
        """dm_control's physics; every episode has a new one."""
        return self.env._physics

    @property
    def random(self) -> np.random.RandomState:
        """The task's random generator."""
        return self.env._random_state

    @property
    def time(self) -> float:
        """Seconds of simulated time since the episode began."""
        return self.env._physics.time()

    def action_bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the actuators' bounds, as dm_control states them."""
        spec = self.env.action_spec()
        shape = spec.shape
        return np.broadcast_to(spec.minimum, shape), np.broadcast_to(spec.maximum, shape)

    def seed(self, seed: int) -> None:
        """Give the task the random generator that dm_control builds from a seed.

        What stands for numpy's global stream starts as after ``np.random.seed(seed)``.
        """
        self.env._random_state = exact.random_state_from_seed(seed)
        self._numpy = exact.random_state_from_seed(seed)
        exact.restore_attributes(self.task, self._built)
        self._set_order(range(len(self._target_kinds)))

    def _order(self) -> list[int]:
        """Return how a foraging task has shuffled its kinds of targets; they are functions."""
        kinds = getattr(self.task, "_target_builders", ())
        return [self._target_kinds.index(kind) for kind in kinds]

    def _set_order(self, order: Iterable[int]) -> None:
        if self._target_kinds:
            self.task._target_builders[:] = [self._target_kinds[index] for index in order]

    @contextlib.contextmanager
    def _numpy_in_place(self) -> Iterator[None]:
        """Let numpy's global stream be this simulation's for a while."""
        outside = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self._numpy.get_state())  # noqa: NPY002
        try:
            yield
        finally:
            self._numpy.set_state(np.random.get_state())  # noqa: NPY002
            np.random.set_state(outside)  # noqa: NPY002

    def reset(self) -> None:
        """Start an episode."""
        self._before = exact.copy_attributes(self.task)
        self._order_before = self._order()
        self._start = self._random_states()
        self._controls = []
        with self._numpy_in_place():
            self._observation = self.env.reset().observation

    def step(self, control: NDArray[np.float64]) -> tuple[float, float | None]:
        """Advance one control step.

        :return: the reward, and the discount of a task that ends here or None
        """
        self._controls.append(control.copy())
        # Within an episode numpy's stream is drawn from only where two_touch places a new target;
        # putting it in place costs a quarter of a small task's step.
        draws = getattr(self.task, "_must_randomize_targets", False)
        with self._numpy_in_place() if draws else contextlib.nullcontext():
            step = self.env.step(control)
        self._observation = step.observation
        return float(step.reward), float(step.discount) if step.last() else None

    def observation(self) -> Any:
        """Return the observation of the last step."""
        return self._observation

    def get_state(self) -> dict[str, Any]:
        """Return the random states at the episode's start and the controls since, [steps, A]."""
        size = self.env.action_spec().shape[0]
        start = {"start": self._start, "task": self._before, "order": self._order_before}
        return {
            **copy.deepcopy(start),
            "controls": np.array(self._controls).reshape(-1, size),
            "random": self._random_states(),
        }

    def _check_state(self, state: Any) -> None:
        """Refuse what :meth:`get_state` cannot have returned."""
        names = ("start", "task", "order", "controls", "random")
        check_keys("The state's simulation", state, names)
        exact.check_attributes(self.task, state["task"], exact.LATE_ATTRIBUTES)
        kinds, size = len(self._target_kinds), self.env.action_spec().shape[0]
        order, controls = state["order"], np.shape(state["controls"])
        if not isinstance(order, list) or sorted(order) != list(range(kinds)):
            raise ValueError(
                f"The state's order is {order!r}, but this task has {kinds} kinds of targets; use "
                "a state of the same task."
            )
        if len(controls) != 2 or controls[1] != size:
            raise ValueError(
                f"The state's controls have shape {controls}, but this task takes [steps, {size}]; "
                "use a state of the same task."
            )
        if controls[0]:
            check_numbers("The state's controls", state["controls"], np.float64)

    def _random_states(self) -> dict[str, Any]:
        return {
            "task": exact.copy_random_state(self.random),
            "numpy": exact.copy_random_state(self._numpy),
        }

    def _set_random_states(self, name: str, state: dict[str, Any]) -> None:
        states = state[name]
        check_keys(f"The state's {name}", states, ("task", "numpy"))
        exact.restore_random_state(self.random, states["task"])
        exact.restore_random_state(self._numpy, states["numpy"])

    def set_state(self, state: dict[str, Any]) -> None:
        """Replay the episode up to where :meth:`get_state` was called.

        :raises ValueError: if the state is none of this task's; nothing is replayed then
        """
        self._check_state(state)
        self._set_random_states("random", state)  # refused here, before the replay, if at all
        if state["start"] is not None:
            self._set_random_states("start", state)
            exact.restore_attributes(self.task, state["task"])
            self._set_order(state["order"])
            self.reset()
            for control in np.asarray(state["controls"], np.float64):
                self.step(control)
        self._set_random_states("random", state)

    def close(self) -> None:
        """Free the OpenGL contexts and the simulator."""
        self.env.close()
