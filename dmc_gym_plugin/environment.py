"""The Gymnasium environment of one DeepMind Control task."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded

from dmc_gym_plugin import tasks
from dmc_gym_plugin.simulation import SuiteSimulation
from dmc_gym_plugin.spaces import ActionMap, Flattener


def _rebuild(kwargs: dict[str, Any], state: dict[str, Any]) -> DMControlEnv:
    env = DMControlEnv(**kwargs)
    env.set_state(state)
    return env


class DMControlEnv(gymnasium.Env):
    """A DeepMind Control task with Gymnasium's interface.

    Observations are flat float32 vectors in dm_control's order, actions lie in [-1, 1] and are
    stretched to the actuators' bounds. An episode is truncated at its time limit; only LQR
    terminates, when its state has converged. ``info`` holds ``physics_time`` (seconds),
    ``frame_rewards`` (the unrepeated rewards, [action_repeat], zero after an early end) and
    ``frames`` (control steps made).

    :param domain: dm_control's domain, such as ``walker``
    :param task: the task in it, such as ``walk``
    :param action_repeat: control steps an action is held for; their rewards are summed
    :param max_episode_steps: agent steps until truncation; None takes the task's own limit
        (1000 control steps, so 500 agent steps at action repeat 2), -1 none at all
    :param render_mode: None or ``rgb_array``
    :param task_kwargs: further keyword arguments of dm_control's task constructor
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(
        self,
        domain: str,
        task: str,
        action_repeat: int = 1,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        task_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self._kwargs = {
            "domain": domain,
            "task": task,
            "action_repeat": action_repeat,
            "max_episode_steps": max_episode_steps,
            "render_mode": render_mode,
            "task_kwargs": task_kwargs,
        }
        self.task_info = tasks.find(domain, task)
        if isinstance(action_repeat, bool) or int(action_repeat) != action_repeat:
            raise ValueError(f"action_repeat is {action_repeat!r}; give a whole number.")
        if action_repeat < 1:
            raise ValueError(f"action_repeat is {action_repeat}; it must be at least 1.")
        self.action_repeat = int(action_repeat)
        self.simulation = SuiteSimulation(domain, task, task_kwargs)
        self.render_mode = render_mode
        self._action_map = ActionMap(*self.simulation.action_bounds())
        self.action_space = self._action_map.space
        self.simulation.reset()
        self._flattener = Flattener(self.simulation.observation())
        self.observation_space = self._flattener.space
        fps = 1.0 / (self.simulation.control_timestep * self.action_repeat)
        self.metadata = {**type(self).metadata, "render_fps": round(fps)}
        self._steps = 0
        self._frames = 0
        self._running = False
        self._closed = False
        own = self.simulation.step_limit
        self._task_frames: int | None = self.task_info.control_steps if own is None else own
        self._max_frames: int | None = None
        if max_episode_steps is None:
            self._max_frames = self._task_frames
        else:
            self.max_episode_steps = None if max_episode_steps == -1 else max_episode_steps

    # -- properties ----------------------------------------------------------------------------

    @property
    def physics(self) -> Any:
        """dm_control's physics."""
        return self.simulation.physics

    @property
    def max_episode_steps(self) -> int | None:
        """Agent steps until truncation, None without a limit."""
        if self._max_frames is None:
            return None
        return -(-self._max_frames // self.action_repeat)

    @max_episode_steps.setter
    def max_episode_steps(self, steps: int | None) -> None:
        if steps is not None and (int(steps) != steps or steps < 1):
            raise ValueError(
                f"max_episode_steps is {steps!r}; give a whole number of agent steps of at least "
                "1, or None for no limit."
            )
        self._max_frames = None if steps is None else int(steps) * self.action_repeat

    @property
    def terminates(self) -> bool:
        """Whether an episode may end before its time limit: LQR's alone do, on convergence."""
        return self.task_info.domain == "lqr"

    @property
    def episode_step(self) -> int:
        """Agent steps made in the current episode."""
        return self._steps

    # -- Gymnasium's interface -----------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode.

        :param seed: the task's seed; the same seed gives dm_control's own episode
        :param options: none are known
        :return: the observation and ``{"physics_time": 0.0}``
        """
        self._check_open()
        super().reset(seed=seed)
        if seed is not None:
            self.simulation.seed(seed)
        self.simulation.reset()
        self._steps = 0
        self._frames = 0
        self._running = True
        return self._observe(), {"physics_time": self.simulation.time}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Hold an action for ``action_repeat`` control steps, or until the episode ends.

        :param action: [A] in [-1, 1]
        :return: observation, summed reward, terminated, truncated, info
        """
        if not self._running:
            self._refuse_step()
        control = self._action_map.to_control(action)
        simulation = self.simulation
        rewards = np.zeros(self.action_repeat)
        total = 0.0
        terminated = truncated = False
        frames = 0
        while True:
            reward, discount = simulation.step(control)
            rewards[frames] = reward
            total += reward
            frames += 1
            self._frames += 1
            if discount is not None:
                terminated, truncated = discount == 0.0, discount != 0.0
            if self._frames == self._max_frames:
                truncated = True
            if terminated or truncated:
                self._running = False
                break
            if frames == self.action_repeat:
                break
        self._steps += 1
        info = {
            "physics_time": simulation.time,
            "frame_rewards": rewards,
            "frames": frames,
        }
        return self._observe(), total, terminated, truncated, info

    def _observe(self) -> Any:
        return self._flattener.flat(self.simulation.observation())

    def render(self) -> Any:
        """Return the picture of the render mode."""
        if self.render_mode is None:
            gymnasium.logger.warn(
                "render() was called without a render_mode; make the environment with "
                'render_mode="rgb_array".'
            )
            return None
        self._check_open()
        camera = 2 if self.task_info.domain == "quadruped" else 0
        return self.simulation.physics.render(240, 320, camera_id=camera)

    def close(self) -> None:
        """Free the simulator; a closed environment cannot be used again."""
        if not self._closed:
            self._closed = True
            self._running = False
            self.simulation.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{self.task_info.id} is closed; make a new environment.")

    def _refuse_step(self) -> None:
        self._check_open()
        if self._steps == 0:
            raise ResetNeeded(f"{self.task_info.id} was stepped before reset(); call reset() first.")
        raise ResetNeeded(f"The episode of {self.task_info.id} is over; call reset() first.")

    # -- exact state ---------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the exact state: simulator, model edits, random state and counters.

        :return: nested dictionaries of numbers, strings, None and new arrays, nothing else
        """
        self._check_open()
        return {
            "id": self.task_info.id,
            "simulation": self.simulation.get_state(),
            "steps": self._steps,
            "frames": self._frames,
            "max_frames": self._max_frames,
            "running": self._running,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where :meth:`get_state` was called, in this or another instance.

        :raises ValueError: if the state belongs to another task
        """
        self._check_open()
        if state.get("id") != self.task_info.id:
            raise ValueError(
                f"The state is one of {state.get('id')!r}, this environment is {self.task_info.id}; "
                "use a state of the same task."
            )
        self.simulation.set_state(state["simulation"])
        self._steps = int(state["steps"])
        self._frames = int(state["frames"])
        self._max_frames = None if state["max_frames"] is None else int(state["max_frames"])
        self._running = bool(state["running"])

    def __reduce__(self) -> Any:
        outside = {"spec": self.spec, "_np_random": self._np_random, "_np_random_seed": self._np_random_seed}
        return _rebuild, (self._kwargs, self.get_state()), outside
