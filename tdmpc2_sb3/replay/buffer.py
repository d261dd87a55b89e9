"""Replay of sub-sequences: T + 1 observations, T actions, rewards and terminations of one episode.

:mod:`tdmpc2_sb3.replay.rings` knows which row holds what,
:mod:`tdmpc2_sb3.replay.stored_observations` how observations are kept,
:mod:`tdmpc2_sb3.replay.replay_file` how all of it is written to the disk.

Shape legend: B batch, T horizon, E environments, R rows per environment, A action.
"""

from __future__ import annotations

import os
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from tdmpc2_sb3.replay import replay_file
from tdmpc2_sb3.replay.entry_storage import EntryStorage
from tdmpc2_sb3.replay.normalization import NormalizationBelow
from tdmpc2_sb3.replay.rings import EpisodeRings
from tdmpc2_sb3.replay.stored_observations import ArrayOrDict, Arrays, StoredObservations
from tdmpc2_sb3.saving.files import PathOrFile
from tdmpc2_sb3.settings import whole_number

try:
    import psutil  # type: ignore[import-untyped]
except ImportError:  # SB3 has it as an extra only
    psutil = None  # type: ignore[assignment]

TensorOrDict = th.Tensor | dict[str, th.Tensor]

_BYTES_PER_REWARD_AND_FLAGS = 5


class SequenceBatch(NamedTuple):
    """Sub-sequences, time first.

    observations: [T+1, B, ...] or a dict of such; float32, images uint8
    actions: [T, B, A], scaled to [-1, 1] as the algorithm stores them
    rewards: [T, B]
    terminations: [T, B], 1 where the step terminated the episode (a truncated one has 0)
    valid: [T, B], 1 where there was a step, 0 past a termination: there the last observation is
        repeated, actions and rewards are 0; None if every step of every sub-sequence is one
    """

    observations: TensorOrDict
    actions: th.Tensor
    rewards: th.Tensor
    terminations: th.Tensor
    valid: th.Tensor | None = None


class SequenceReplayBuffer(ReplayBuffer):
    """A replay buffer that stores every observation once and samples sub-sequences within episodes.

    Sub-sequences start uniformly at every row of a finished episode from which T steps follow. The
    running episodes are left out, as in the reference implementation, unless they hold more
    sub-sequences than all finished ones together (endless tasks would learn nothing otherwise) or
    ``sample_open_episodes`` is set. In the reference an episode shorter than T steps is never
    sampled, and an episode's last step only as the last of a sub-sequence, so that it is drawn T
    times less often than the steps in its middle. Where that step is a termination it is the one
    that matters most; ``past_terminations`` lets sub-sequences start at it too and go on, marked
    as not valid, past it.

    Memory is taken at the first stored step (:meth:`check_size` asks before): R rows for each
    environment, of the observation plus 4 bytes an action dimension plus 5 (walker-walk: 125 bytes
    a step). Floats are kept as float32.
    Stacked image frames are kept as single frames and put together again when sampled; images that
    turn out not to be stacks moving on by one frame a step are kept whole, which is said once.

    :param buffer_size: rows in all; each environment has ``buffer_size // n_envs``, and an episode
        of L steps takes L + 1
    :param observation_space: a Box (vectors or uint8 images), another space that SB3 knows, or a
        Dict of them
    :param action_space: Box action space
    :param device: where the sampled batches go
    :param n_envs: number of environments
    :param optimize_memory_usage: accepted for SB3's sake; observations are always stored once
    :param handle_timeout_termination: tell truncations from terminations by
        ``info["TimeLimit.truncated"]``; if False every ``done`` counts as a termination
    :param horizon: number T of steps in a sub-sequence
    :param seed: seed of the sampling
    :param sample_open_episodes: sample from running episodes too
    :param past_terminations: let sub-sequences start at every step of an episode that terminated
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        horizon: int = 3,
        seed: int | None = None,
        sample_open_episodes: bool = False,
        past_terminations: bool = False,
    ) -> None:
        buffer_size = whole_number("buffer_size", buffer_size, 1)
        n_envs = whole_number("n_envs", n_envs, 1)
        horizon = whole_number("horizon", horizon, 1)
        # ReplayBuffer's own __init__ would allocate its arrays
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs)
        self.buffer_size = max(buffer_size // n_envs, 1)  # rows per environment, as SB3 counts
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self.horizon = horizon
        self.sample_open_episodes = sample_open_episodes
        self.past_terminations = past_terminations
        self.rng = np.random.default_rng(seed)
        self._warned_of = 0  # bytes
        self.reset()

    # ----------------------------------------------------------------- memory

    def check_size(self, error: type[Exception] = ValueError) -> None:
        """Look at the size before any step is stored.

        Warns if the memory that the buffer will take is not free.

        :param error: what is raised if the buffer is too small for a sub-sequence, or the system
            will not give its memory at all
        """
        if self.stored.storages:
            return
        self._check_rows(self.horizon + 1, error)
        storages = self.stored.likely_storages()
        try:
            # Not touched, so that it costs nothing; and given back at once.
            reserved = [np.empty(size, dtype=np.uint8) for size in self._sizes(storages)]
            del reserved
        except MemoryError as refused:
            raise error(self._too_large(storages)) from refused
        self._warn_of_size(storages)

    def _sizes(self, storages: dict[str, EntryStorage]) -> list[int]:
        """Bytes of the arrays of all rows."""
        of_row = 4 * self.action_dim + _BYTES_PER_REWARD_AND_FLAGS
        return [self.rings.num_rows * of_row, *(each.nbytes for each in storages.values())]

    def _too_large(self, storages: dict[str, EntryStorage]) -> str:
        available = _available_memory()
        free = "" if available is None else f" and {available / 1e9:.2f} GB are free"
        return (
            f"The replay buffer of {self.rings.num_rows} steps takes "
            f"{sum(self._sizes(storages)) / 1e9:.2f} GB{free}: lower buffer_size."
        )

    def _warn_of_size(self, storages: dict[str, EntryStorage]) -> None:
        needed, available = sum(self._sizes(storages)), _available_memory()
        if available is None or needed <= max(available, self._warned_of):
            return
        self._warned_of = needed
        warnings.warn(
            f"The full replay buffer will take {needed / 1e9:.2f} GB and {available / 1e9:.2f} GB "
            f"are free: lower buffer_size ({self.rings.num_rows} steps) if this machine runs out "
            "of memory.",
            stacklevel=3,
        )

    # ------------------------------------------------------------------ state

    def reset(self) -> None:
        """Forget everything stored and give the memory back."""
        super().reset()
        self.rings = EpisodeRings(
            self.buffer_size, self.n_envs, self.horizon, self.past_terminations
        )
        self.stored = StoredObservations(self.observation_space, self.rings)
        self.num_added = 0  # calls of add

    def seed(self, seed: int | None) -> None:
        """Start the random stream of the sampling anew."""
        self.rng = np.random.default_rng(seed)

    @property
    def num_steps(self) -> int:
        """Number of stored steps of all environments together."""
        return self.rings.num_steps

    @property
    def num_subsequences(self) -> int:
        """Number of sub-sequences from which :meth:`sample` draws now."""
        return self.rings.num_starts + self._num_running_starts()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays (0 before the first step)."""
        return sum(field.nbytes for field in self.fields().values())

    def size(self) -> int:
        """Number of stored steps per environment (rounded down), as SB3 counts."""
        return self.num_steps // self.n_envs

    def fields(self) -> dict[str, np.ndarray]:
        """Return every stored array [E * R, ...] by its name."""
        if not self.stored.storages:
            return {}
        fields = {"actions": self.actions, "rewards": self.rewards, "flags": self.rings.flags}
        for index, storage in enumerate(self.stored.storages.values()):
            fields[f"observations_{index}"] = storage.rows
        return fields

    # ---------------------------------------------------------------- storing

    def add(  # type: ignore[override]
        self,
        obs: ArrayOrDict,
        next_obs: ArrayOrDict,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Store one step of every environment.

        An ``obs`` other than the ``next_obs`` of the step before means that the environment was
        reset in between: the episode before is closed as truncated.

        :param obs: observations before the step [E, ...]
        :param next_obs: observations after it [E, ...], where an episode ended its true last one
        :param action: scaled actions [E, A]
        :param reward: rewards [E]
        :param done: where the episode ended [E]
        :param infos: ``info["TimeLimit.truncated"]`` tells a truncation from a termination
        :raises RuntimeError: an observation, action or reward is not finite or none of its space's
            choices (nothing is stored then), or the buffer is too small for a sub-sequence
        """
        obs_, next_obs_ = self.stored.as_arrays(obs), self.stored.as_arrays(next_obs)
        with np.errstate(over="ignore", invalid="ignore"):
            action = np.asarray(action, dtype=np.float32).reshape(self.n_envs, self.action_dim)
            reward = np.asarray(reward, dtype=np.float32).reshape(self.n_envs)
        self._check_finite(obs_, next_obs_, action, reward)
        self.stored.check_choices(obs_)
        self.stored.check_choices(next_obs_)
        if not self.stored.storages:
            self._allocate(obs_, next_obs_)
        done = np.asarray(done, dtype=bool).reshape(self.n_envs)
        terminated = done
        if self.handle_timeout_termination:
            truncated = [bool(info.get("TimeLimit.truncated", False)) for info in infos]
            terminated = done & ~np.array(truncated)

        self.rings.close(self.rings.running & ~self.stored.continues(obs_))
        self.stored.begin_episodes(obs_, next_obs_)
        rows, next_rows = self.rings.advance(terminated)
        self.stored.write_next(next_rows, next_obs_)
        self.actions[rows] = action
        self.rewards[rows] = reward
        self.rings.close(done)
        self.num_added += 1
        self._update_position()

    def extend(self, *args: Any, **kwargs: Any) -> None:
        """Store several steps: the arguments of :meth:`add`, each with a leading axis of steps."""
        obs, next_obs, *others = args
        for index, rest in enumerate(zip(*others, strict=True)):
            self.add(_at(obs, index), _at(next_obs, index), *rest, **kwargs)

    def set_horizon(self, horizon: int) -> None:
        """Sample sub-sequences of another number of steps from now on.

        :param horizon: T
        """
        self.horizon = self.rings.horizon = horizon
        if self.stored.storages:
            self.rings.count_and_mark()

    def close_episodes(self) -> int:
        """End every running episode as truncated, so that the next step starts a new one.

        :return: how many were running
        """
        running = self.rings.running.copy()
        self.rings.close(running)
        self._update_position()
        return int(running.sum())

    def _update_position(self) -> None:
        self.pos = int(self.rings.head[0])
        self.full = self.rings.full

    def _check_finite(
        self, obs: Arrays, next_obs: Arrays, action: np.ndarray, reward: np.ndarray
    ) -> None:
        for kind, fields in (
            ("observation", obs),
            ("observation", next_obs),
            ("action", {"": action}),
            ("reward", {"": reward}),
        ):
            for key, values in fields.items():
                if values.dtype.kind == "f" and not np.isfinite(values).all():
                    self._refuse(f"{kind} {key!r}" if key else kind, values)

    def _refuse(self, name: str, values: np.ndarray) -> None:
        finite = np.isfinite(values).reshape(self.n_envs, -1)
        env = int(np.flatnonzero(~finite.all(axis=1))[0])
        value = values.reshape(self.n_envs, -1)[env][~finite[env]][0]
        step = (self.num_added + 1) * self.n_envs
        raise RuntimeError(
            f"The {name} of environment {env} at the buffer's step {step} is not finite in float32 "
            f"({value}) and was not stored: check the environment (SB3's VecCheckNan finds where "
            "it arises)."
        )

    def _allocate(self, obs: Arrays, next_obs: Arrays) -> None:
        """Take the memory, now that the first step shows how images can be stored."""
        storages = self.stored.choose(obs, next_obs)
        num_frames = max(storage.num_frames for storage in storages.values())
        self._check_rows(self.horizon + num_frames, RuntimeError)
        self.allocate(storages)

    def _check_rows(self, needed: int, error: type[Exception]) -> None:
        if self.buffer_size < needed:
            raise error(
                f"A replay buffer of {self.buffer_size} rows per environment cannot hold a "
                f"sub-sequence of {self.horizon} steps: set buffer_size to at least "
                f"{needed * self.n_envs}."
            )

    def allocate(self, storages: dict[str, EntryStorage]) -> None:
        """Take the memory for all rows.

        :param storages: where the observations go, by entry
        """
        self._warn_of_size(storages)
        num_rows = self.rings.num_rows
        try:
            self.rings.allocate()
            self.actions = np.zeros((num_rows, self.action_dim), dtype=np.float32)
            self.rewards = np.zeros(num_rows, dtype=np.float32)
            self.stored.allocate(storages)
        except MemoryError as error:
            raise RuntimeError(self._too_large(storages)) from error

    # --------------------------------------------------------------- sampling

    def sample(  # type: ignore[override]
        self, batch_size: int, env: VecNormalize | NormalizationBelow | None = None
    ) -> SequenceBatch:
        """Draw sub-sequences with replacement, each as likely as any other.

        :param batch_size: number B of sub-sequences
        :param env: normalises observations and rewards; a VecNormalize alone those of its own shape
        :raises RuntimeError: no stored episode has T steps
        """
        running = self._num_running_starts()
        if self.rings.num_starts + running == 0:
            longest = self.rings.longest_episode() if self.stored.storages else 0
            raise RuntimeError(
                f"The replay buffer holds no sub-sequence of horizon {self.horizon} steps (the "
                f"longest episode stored has {longest}): collect more steps before training or "
                "lower the horizon."
            )
        rows = self.rings.draw(batch_size, running, self.rng)  # [T+1, B]
        observations = self.stored.gather(rows)
        if isinstance(env, NormalizationBelow):
            observations = env.normalize(observations, self.rings.place(rows))
        elif env is not None:
            observations = env.normalize_obs(observations)
        rows = rows[:-1]
        actions = self.actions.take(rows, axis=0)
        rewards = self.rewards.take(rows)
        if env is not None:
            rewards = env.normalize_reward(rewards)
        valid = None
        if self.past_terminations:
            is_step = self.rings.is_step(rows).astype(np.float32)
            actions *= is_step[..., None]  # a final row holds whatever was there before
            rewards *= is_step
            valid = self._to_device(is_step)
        return SequenceBatch(
            self._observations_to_torch(observations),
            self._to_device(actions),
            self._to_device(rewards),
            self._to_device(self.rings.terminated(rows).astype(np.float32)),
            valid,
        )

    def _num_running_starts(self) -> int:
        """Count the sub-sequences of running episodes, 0 where they are left out."""
        running = int(self.rings.running_starts()[1].sum())
        # Endless tasks: a running episode counts once it outweighs whatever has been finished.
        return running if self.sample_open_episodes or running > self.rings.num_starts else 0

    def _observations_to_torch(self, observations: ArrayOrDict) -> TensorOrDict:
        if isinstance(observations, dict):
            return {key: self._to_device(value) for key, value in observations.items()}
        return self._to_device(observations)

    def _to_device(self, array: np.ndarray) -> th.Tensor:
        """The arrays are fresh from the gathering: a tensor on the CPU may share their memory."""
        return th.from_numpy(array).to(self.device)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> Any:
        raise NotImplementedError("SequenceReplayBuffer samples sub-sequences: call sample().")

    # ---------------------------------------------------------------- on disk

    def save(self, path: PathOrFile) -> None:
        """Write the content, the running episodes and the random state, without pickle.

        A process killed in the middle leaves the file that was there.

        :param path: path (``.pkl``, SB3's name for buffers, is added if it has no suffix) or open
            binary file
        :raises OSError: the disk is full; the old file is unchanged
        """
        replay_file.save(self, path)

    def load(self, path: PathOrFile) -> None:
        """Take over the content of a saved buffer of the same shape; its horizon may differ.

        :param path: path (with or without ``.pkl``) or open binary file
        :raises FileNotFoundError: there is no such file
        :raises ValueError: the file is damaged, or belongs to a buffer of another size, ``n_envs``
            or spaces; this buffer is empty then
        """
        replay_file.load(self, path)
        self._update_position()
        self.stored.recall_newest()


def _available_memory() -> int | None:
    """Bytes that are free; None where nothing tells."""
    if psutil is not None:
        return int(psutil.virtual_memory().available)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # macOS, Windows
        return None


def _at(obs: ArrayOrDict, index: int) -> ArrayOrDict:
    """Return one step of observations with a leading axis of steps."""
    if isinstance(obs, dict):
        return {key: value[index] for key, value in obs.items()}
    return obs[index]
