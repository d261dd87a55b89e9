"""The Gymnasium environment of one DeepMind Control task."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded

from dmc_gym_plugin import tasks
from dmc_gym_plugin.camera import Photographer, default_camera
from dmc_gym_plugin.settings import (
    RENDER_MODES,
    Settings,
    check_count,
    refuse_unknown,
    usable_render_modes,
)
from dmc_gym_plugin.simulation import load
from dmc_gym_plugin.spaces import ActionMap, Flattener
from dmc_gym_plugin.state_checks import check_state
from dmc_gym_plugin.views import DictView, FlatView, PixelView, StatePixelView


class DMControlEnv(gymnasium.Env):
    """A DeepMind Control task with Gymnasium's interface.

    Actions lie in [-1, 1] and are stretched to the actuators' bounds; beyond them they count as the
    nearest bound, and what is not finite is refused. An episode is truncated at its time limit;
    only LQR terminates, when its state has converged, and some locomotion tasks, when the body has
    fallen. ``info`` holds ``physics_time`` (seconds), ``frame_rewards`` (the unrepeated rewards,
    [action_repeat], zero after an early end) and ``frames`` (control steps made).

    :param domain: dm_control's domain, such as ``walker``
    :param task: the task in it, such as ``walk``
    :param observation: ``flat`` (a float32 vector in dm_control's order), ``dict`` (its values by
        name, a vision task's own pictures among them), ``pixels`` or ``state+pixels`` (a
        dictionary of the vector and the pixels)
    :param action_repeat: control steps an action is held for; their rewards are summed
    :param max_episode_steps: agent steps until truncation; None takes the task's own limit
        (1000 control steps, so 500 agent steps at action repeat 2), -1 none at all
    :param render_mode: None, ``rgb_array``, ``depth_array`` (metres), ``multi_camera`` (all cameras
        as tiles) or ``human`` (a window)
    :param height: of the pixel observation
    :param width: of the pixel observation
    :param camera_id: number or name of the camera, -1 the free one; None takes the literature's
        (2 for quadruped, else 0)
    :param frame_stack: pictures in a pixel observation
    :param channels: of the pixel observation: ``first``, [3 F, H, W], or ``last``, [H, W, 3 F]
    :param render_height: of the pictures that ``render()`` returns
    :param render_width: of the pictures that ``render()`` returns
    :param task_kwargs: further keyword arguments of dm_control's task constructor
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 50}

    def __init__(
        self,
        domain: str,
        task: str,
        *,
        observation: str = "flat",
        action_repeat: int = 1,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        height: int = 64,
        width: int = 64,
        camera_id: int | str | None = None,
        frame_stack: int = 3,
        channels: str = "first",
        render_height: int = 240,
        render_width: int = 320,
        task_kwargs: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        known = [field.name for field in dataclasses.fields(Settings)]
        refuse_unknown(list(unknown), known)
        given = locals()
        self.settings = Settings(**{name: given[name] for name in known})
        self.task_info = tasks.find(domain, task)
        self._closed = False
        self.simulation = load(self.task_info, task_kwargs, images=observation == "dict")
        self._terminates = self.simulation.terminates
        self.action_repeat = int(action_repeat)
        self.render_mode = render_mode
        fps = 1.0 / (self.simulation.control_timestep * self.action_repeat)
        self.metadata = {"render_modes": usable_render_modes(), "render_fps": max(1, round(fps))}
        self._photographer: Photographer | None = None
        self._camera = self._photos().camera_id(
            default_camera(domain) if camera_id is None else camera_id
        )
        self._action_map = ActionMap(*self.simulation.action_bounds())
        self.action_space = self._action_map.space
        self.simulation.reset()
        self._view = self._make_view()
        self.observation_space = self._view.space
        self._steps = 0
        self._frames = 0
        self._running = False
        own_limit = self.simulation.step_limit
        self._max_frames: int | None = own_limit or self.task_info.control_steps
        if max_episode_steps is not None:
            self.max_episode_steps = None if max_episode_steps == -1 else max_episode_steps

    def _make_view(self) -> Any:
        settings = self.settings
        observe = self.simulation.observation
        flattener = Flattener(observe(), settings.channels)
        if settings.observation == "flat":
            return FlatView(flattener, observe)
        if settings.observation == "dict":
            return DictView(flattener, observe)
        pixels = PixelView(
            lambda: self._photos().picture(settings.height, settings.width, self._camera),
            settings.height,
            settings.width,
            settings.frame_stack,
            settings.channels,
        )
        if settings.observation == "pixels":
            return pixels
        return StatePixelView(FlatView(flattener, observe), pixels)

    # -- properties ----------------------------------------------------------------------------

    @property
    def terminates(self) -> bool:
        """Whether an episode may end before its time limit: in LQR and some locomotion tasks."""
        return self._terminates

    @property
    def physics(self) -> Any:
        """dm_control's physics."""
        self._check_open()
        return self.simulation.physics

    @property
    def task(self) -> Any:
        """dm_control's task."""
        self._check_open()
        return self.simulation.task

    @property
    def max_episode_steps(self) -> int | None:
        """Agent steps until truncation, None without a limit; may be set at any time."""
        if self._max_frames is None:
            return None
        return -(-self._max_frames // self.action_repeat)

    @max_episode_steps.setter
    def max_episode_steps(self, steps: int | None) -> None:
        if steps is not None:
            check_count("max_episode_steps", steps)
        self._max_frames = None if steps is None else int(steps) * self.action_repeat

    @property
    def episode_step(self) -> int:
        """Agent steps made in the current episode."""
        return self._steps

    # -- Gymnasium's interface -----------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode.

        :param seed: the task's seed: the episodes are those of dm_control with ``random=seed``
        :param options: Gymnasium's; there are none here
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
        if self.render_mode == "human":
            self.render()
        return self._view.first(), {"physics_time": self.simulation.time}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Hold an action for ``action_repeat`` control steps, or until the episode ends.

        :param action: [A] in [-1, 1]
        :return: observation, summed reward, terminated, truncated, info
        """
        if not self._running:
            self._refuse_step()
        control = self._action_map.to_control(action)
        advance = self.simulation.step
        max_frames = math.inf if self._max_frames is None else self._max_frames
        rewards = np.zeros(self.action_repeat)
        total = 0.0
        terminated = truncated = False
        frames = 0
        while not (terminated or truncated) and frames < self.action_repeat:
            reward, discount = advance(control)
            rewards[frames] = reward
            total += reward
            frames += 1
            if discount is not None:
                terminated, truncated = discount == 0.0, discount != 0.0
            if self._frames + frames >= max_frames:  # beyond it if the limit was lowered since
                truncated = True
        self._frames += frames
        self._steps += 1
        self._running = not (terminated or truncated)
        info = {
            "physics_time": self.simulation.time,
            "frame_rewards": rewards,
            "frames": frames,
        }
        if self.render_mode == "human":
            self.render()
        return self._view.next(), total, terminated, truncated, info

    def render(self) -> Any:
        """Return the picture of the render mode; ``human`` draws its window and returns None.

        :raises RenderingError: where OpenGL does not work; the message says what to install
        """
        self._check_open()
        mode = self.render_mode
        if mode is None:
            gymnasium.logger.warn(
                "render() was called without a render_mode; make the environment with "
                'render_mode="rgb_array".'
            )
            return None
        photos = self._photos()
        height, width = self.settings.render_height, self.settings.render_width
        if mode == "human":
            return photos.show(height, width, self._camera)
        if mode == "multi_camera":
            return photos.all_cameras(height, width)
        return photos.picture(height, width, self._camera, depth=mode == "depth_array")

    def close(self) -> None:
        """Free the simulator; a closed environment cannot be used again."""
        if not self._closed:
            self._closed = True
            self._running = False
            if self._photographer is not None:
                self._photographer.close()
            self.simulation.close()
            # A pixel view refers back to the environment: without this the simulator's memory would
            # wait for Python's cyclic garbage collection, however many environments are made.
            del self._photographer, self._view, self.simulation

    def _photos(self) -> Photographer:
        """Return the photographer of the present physics, which some resets replace."""
        if self._photographer is None or self._photographer.physics is not self.physics:
            if self._photographer is not None:
                self._photographer.close()
            self._photographer = Photographer(self.physics)
        return self._photographer

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{self.task_info.id} is closed; make a new environment.")

    def _refuse_step(self) -> None:
        self._check_open()
        if self._steps == 0:
            raise ResetNeeded(f"{self.task_info.id} was stepped before reset(); reset it first.")
        raise ResetNeeded(f"The episode of {self.task_info.id} is over; call reset() first.")

    # -- exact state ---------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """Return the exact state: simulator, model edits, random state, counters, stacked frames.

        :return: nested dictionaries and lists of numbers, strings, None and new arrays, nothing
            else
        """
        self._check_open()
        return {
            "id": self.task_info.id,
            "simulation": self.simulation.get_state(),
            "view": self._view.get_state(),
            "steps": self._steps,
            "frames": self._frames,
            "max_frames": self._max_frames,
            "running": self._running,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where :meth:`get_state` was called, in this or another instance.

        :raises ValueError: for a state of another task, and for what is no state at all
        """
        self._check_open()
        check_state(state, self.task_info.id, self._max_frames)
        # A state that the simulation refuses half-way leaves no episode to go on with.
        self._running = False
        self.simulation.set_state(state["simulation"])
        self._view.set_state(state["view"])
        self._steps = int(state["steps"])
        self._frames = int(state["frames"])
        self._max_frames = None if state["max_frames"] is None else int(state["max_frames"])
        self._running = bool(state["running"])

    def __reduce__(self) -> Any:
        """Copy and pickle by the constructor's arguments and the exact state."""
        kwargs = {field: getattr(self.settings, field) for field in self.settings.__annotations__}
        kwargs.update(domain=self.task_info.domain, task=self.task_info.task)
        outside = {name: vars(self).get(name) for name in ("_np_random", "_np_random_seed", "spec")}
        return _rebuild, (kwargs, None if self._closed else self.get_state()), outside


def _rebuild(kwargs: dict[str, Any], state: dict[str, Any] | None) -> DMControlEnv:
    env = DMControlEnv(**kwargs)
    if state is None:
        env.close()
    else:
        env.set_state(state)
    return env
