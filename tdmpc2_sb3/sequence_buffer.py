"""Replay of sub-sequences: T + 1 observations, T actions, rewards and terminations of one episode.

Every environment owns a ring of R rows. A step writes its action, reward and flags into the row of its
observation, and the observation that follows into the next row; so each observation is stored once::

    row          0    1    2    3        4    5    6
    observation  o_0  o_1  o_2  o_3      o_0' o_1' ...
    action       a_0  a_1  a_2  (final)  a_0' ...

An episode's last observation has a row of its own without an action. A sub-sequence is therefore valid exactly if
the T rows from its start on all hold actions: the final row of the episode, or the newest row of the ring, ends it.

Shape legend: B batch, T horizon, E environments, R rows per environment, A action.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from typing import IO, Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from tdmpc2_sb3.file_io import (
    ArrayReader,
    ArrayWriter,
    CorruptFileError,
    PathOrFile,
    open_zip,
    write_to,
)
from tdmpc2_sb3.observation_storage import (
    FrameStorage,
    ObservationStorage,
    choose_storage,
    looks_stacked,
    storage_dtype,
)

try:
    import psutil
except ImportError:  # SB3 has it as an extra only
    psutil = None  # type: ignore[assignment]

TensorOrDict = th.Tensor | dict[str, th.Tensor]
ArrayOrDict = np.ndarray | dict[str, np.ndarray]

# One byte of flags a row: four bits, then the steps since the episode's start (counted up to 15).
_STEP = 1  # the row holds an action: a step began here
_TERMINATED = 2  # that step ended the episode by a termination
_START = 4  # a sub-sequence of a finished episode starts here
_ZERO_PADDED = 8  # the episode's first stack of frames was filled up with zeros
_PLACE_SHIFT = 4
_MAX_PLACE = 15

_FORMAT = "tdmpc2_sb3 sequence buffer"
_FORMAT_VERSION = 1
_SINGLE = ""  # the name of the only entry of a space that is no Dict


class SequenceBatch(NamedTuple):
    """Sub-sequences, time first.

    observations: [T+1, B, ...] or a dict of such; float32, images uint8
    actions: [T, B, A], scaled to [-1, 1] as the algorithm stores them
    rewards: [T, B]
    terminations: [T, B], 1 where the step terminated the episode (a truncated one has 0)
    """

    observations: TensorOrDict
    actions: th.Tensor
    rewards: th.Tensor
    terminations: th.Tensor


class SequenceReplayBuffer(ReplayBuffer):
    """A replay buffer that stores every observation once and samples sub-sequences within episodes.

    Sub-sequences start uniformly at every row of a finished episode from which T steps follow. The running episodes
    are left out, as in the reference implementation, unless they hold more sub-sequences than all finished ones
    together (endless tasks would learn nothing otherwise) or ``sample_open_episodes`` is set. As in the reference, an
    episode shorter than T steps is never sampled and a final step only as the last of a sub-sequence: in tasks that
    end within a few steps choose a short horizon.

    Memory is taken at the first stored step: R rows of ``obs + 4 * actions + 5`` bytes for each environment
    (walker-walk: 125 bytes a step). ``load`` replaces the whole content. Files hold arrays and JSON, nothing pickled.

    :param buffer_size: rows in all; each environment has ``buffer_size // n_envs``. An episode of L steps takes L + 1
    :param observation_space: a Box (vectors or uint8 images), another space that SB3 knows, or a Dict of them
    :param action_space: Box action space
    :param device: where the sampled batches go
    :param n_envs: number of environments
    :param optimize_memory_usage: accepted for SB3's sake; observations are always stored once
    :param handle_timeout_termination: tell truncations from terminations by ``info["TimeLimit.truncated"]``;
        if False every ``done`` counts as a termination
    :param horizon: number T of steps in a sub-sequence
    :param seed: seed of the sampling
    :param sample_open_episodes: sample from running episodes too
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
    ) -> None:
        if horizon < 1:
            raise ValueError(f"horizon={horizon} is not a number of steps: choose 1 or more.")
        # ReplayBuffer's own __init__ would allocate its arrays
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs)
        self.buffer_size = max(buffer_size // n_envs, 1)  # rows per environment, as SB3 counts
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self.horizon = horizon
        self.sample_open_episodes = sample_open_episodes
        self._rng = np.random.default_rng(seed)
        self._spaces: dict[str, spaces.Space] = (
            dict(observation_space.spaces)
            if isinstance(observation_space, spaces.Dict)
            else {_SINGLE: observation_space}
        )
        self._columns = (
            np.arange(n_envs) * self.buffer_size
        )  # flat row where each environment's ring begins
        self._said_unstacked = False
        self.reset()

    # ------------------------------------------------------------------ state

    def reset(self) -> None:
        """Forget everything stored and give the memory back."""
        super().reset()
        self._storages: dict[str, ObservationStorage] | None = None
        self._newest: dict[
            str, np.ndarray
        ] = {}  # the last observation of each environment [E, ...]
        self._head = np.zeros(
            self.n_envs, dtype=np.int64
        )  # row of that observation, or the next free row
        self._open = np.zeros(self.n_envs, dtype=bool)  # an episode is running
        self._open_steps = np.zeros(self.n_envs, dtype=np.int64)  # steps of it that are stored
        self._open_cut = np.zeros(self.n_envs, dtype=bool)  # the ring has eaten its beginning
        self._used = np.zeros(self.n_envs, dtype=np.int64)  # rows ever written
        self._margin = 0  # rows before a start that its stack of frames needs
        self._num_steps = 0  # steps stored now
        self._num_starts = 0  # rows flagged _START
        self._num_added = 0  # calls of add

    def seed(self, seed: int | None) -> None:
        """Start the random stream of the sampling anew."""
        self._rng = np.random.default_rng(seed)

    @property
    def num_steps(self) -> int:
        """Number of stored steps of all environments together."""
        return self._num_steps

    @property
    def num_subsequences(self) -> int:
        """Number of sub-sequences from which :meth:`sample` draws now."""
        return sum(self._countings()[:2])

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays (0 before the first step)."""
        if self._storages is None:
            return 0
        fields = (self.actions, self.rewards, self._flags)
        return sum(storage.nbytes for storage in self._storages.values()) + sum(
            field.nbytes for field in fields
        )

    def size(self) -> int:
        """Number of stored steps per environment (rounded down), as SB3 counts."""
        return self._num_steps // self.n_envs

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

        An ``obs`` other than the ``next_obs`` of the step before means that the environment was reset in between: the
        episode before is closed as truncated.

        :param obs: observations before the step [E, ...]
        :param next_obs: observations after it [E, ...], where an episode ended its true last one
        :param action: scaled actions [E, A]
        :param reward: rewards [E]
        :param done: where the episode ended [E]
        :param infos: ``info["TimeLimit.truncated"]`` tells a truncation from a termination
        :raises RuntimeError: an observation, action or reward is not finite, or the buffer is too small
        """
        obs_, next_obs_ = self._as_arrays(obs), self._as_arrays(next_obs)
        with np.errstate(over="ignore", invalid="ignore"):
            action = np.asarray(action, dtype=np.float32).reshape(self.n_envs, self.action_dim)
            reward = np.asarray(reward, dtype=np.float32).reshape(self.n_envs)
        self._check_finite(obs_, next_obs_, action, reward)
        if self._storages is None:
            self._allocate(obs_, next_obs_)
        done = np.asarray(done, dtype=bool).reshape(self.n_envs)
        terminated = done.copy()
        if self.handle_timeout_termination:
            terminated &= ~np.array(
                [bool(info.get("TimeLimit.truncated", False)) for info in infos]
            )

        self._close(self._open & ~self._continues(obs_))
        starting = np.flatnonzero(~self._open)
        self._check_stacks(obs_, next_obs_, starting)
        if len(starting):
            self._begin(starting, obs_)
        self._append(next_obs_, action, reward, terminated)
        self._newest = next_obs_
        self._close(done)
        self._num_added += 1
        self.pos = int(self._head[0]) % self.buffer_size
        self.full = bool((self._used == self.buffer_size).all())

    def extend(self, *args: Any, **kwargs: Any) -> None:
        """Store several steps: the arguments of :meth:`add`, each with a leading axis of steps."""
        obs, next_obs, *others = args
        for index, rest in enumerate(zip(*others, strict=True)):
            pair = [
                {key: value[index] for key, value in item.items()}
                if isinstance(item, dict)
                else item[index]
                for item in (obs, next_obs)
            ]
            self.add(*pair, *rest, **kwargs)

    def close_episodes(self) -> int:
        """End every running episode as truncated, so that the next step starts a new one.

        :return: how many were running
        """
        running = int(self._open.sum())
        self._close(self._open.copy())
        return running

    def _as_arrays(self, obs: ArrayOrDict) -> dict[str, np.ndarray]:
        """Return fresh arrays [E, ...] in the storage's dtypes, by entry."""
        entries = obs if isinstance(obs, dict) else {_SINGLE: obs}
        shapes = self.obs_shape if isinstance(self.obs_shape, dict) else {_SINGLE: self.obs_shape}
        with np.errstate(over="ignore", invalid="ignore"):
            return {
                key: np.array(entries[key], dtype=storage_dtype(space)).reshape(
                    self.n_envs, *shapes[key]
                )
                for key, space in self._spaces.items()
            }

    def _check_finite(
        self,
        obs: dict[str, np.ndarray],
        next_obs: dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
    ) -> None:
        fields = [("action", action), ("reward", reward)]
        for key in obs:
            fields += [
                (f"observation {key!r}" if key else "observation", entries[key])
                for entries in (obs, next_obs)
            ]
        for name, values in fields:
            if values.dtype.kind != "f" or np.isfinite(values).all():
                continue
            env = int(np.flatnonzero(~np.isfinite(values).reshape(self.n_envs, -1).all(axis=1))[0])
            value = values[env][~np.isfinite(values[env])].flat[0]
            raise RuntimeError(
                f"The {name} of environment {env} at step {(self._num_added + 1) * self.n_envs} is not finite in "
                f"float32 ({value}): it was not stored; check the environment (SB3's VecCheckNan finds where it arises)."
            )

    def _allocate(self, obs: dict[str, np.ndarray], next_obs: dict[str, np.ndarray]) -> None:
        """Take the memory, now that the first step shows how images can be stored."""
        num_rows = self.n_envs * self.buffer_size
        storages = {
            key: choose_storage(space, num_rows, obs[key], next_obs[key])
            for key, space in self._spaces.items()
        }
        needed = self.horizon + max(storage.num_frames for storage in storages.values())
        if self.buffer_size < needed:
            raise RuntimeError(
                f"A replay buffer of {self.buffer_size} rows per environment cannot hold a sub-sequence of "
                f"{self.horizon} steps: set buffer_size to at least {needed * self.n_envs}."
            )
        for key, storage in storages.items():
            if looks_stacked(self._spaces[key]) and not isinstance(storage, FrameStorage):
                self._say_unstacked(key)
        self._allocate_as(storages)

    def _allocate_as(self, storages: dict[str, ObservationStorage]) -> None:
        num_rows = self.n_envs * self.buffer_size
        needed = sum(storage.nbytes for storage in storages.values()) + num_rows * (
            4 * self.action_dim + 5
        )
        available = psutil.virtual_memory().available if psutil is not None else needed
        if needed > available:
            warnings.warn(
                f"The full replay buffer will take {needed / 1e9:.2f} GB and {available / 1e9:.2f} GB are free: "
                f"lower buffer_size ({num_rows} steps) if this machine runs out of memory.",
                stacklevel=2,
            )
        for storage in storages.values():
            storage.allocate()
        self._storages = storages
        self._margin = max(storage.num_frames for storage in storages.values()) - 1
        self.actions = np.zeros((num_rows, self.action_dim), dtype=np.float32)
        self.rewards = np.zeros(num_rows, dtype=np.float32)
        self._flags = np.zeros(num_rows, dtype=np.uint8)

    def _continues(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """Say where ``obs`` is the newest observation stored. Returns [E]."""
        same = np.ones(self.n_envs, dtype=bool)
        for key, newest in self._newest.items():
            same &= (newest == obs[key]).reshape(self.n_envs, -1).all(axis=1)
        return same

    def _begin(self, envs: np.ndarray, obs: dict[str, np.ndarray]) -> None:
        """Write the first observations of new episodes."""
        assert self._storages is not None
        rows = self._columns[envs] + self._head[envs]
        self._release(envs, self._head[envs])
        self._flags[rows] = 0
        for key, storage in self._storages.items():
            storage.write(rows, obs[key][envs])
            if isinstance(storage, FrameStorage):
                self._flags[rows] |= _ZERO_PADDED * storage.is_first_stack(obs[key][envs])[
                    1
                ].astype(np.uint8)
        self._open[envs] = True
        self._open_steps[envs] = 0
        self._open_cut[envs] = False

    def _append(
        self,
        next_obs: dict[str, np.ndarray],
        action: np.ndarray,
        reward: np.ndarray,
        terminated: np.ndarray,
    ) -> None:
        """Write a step of every environment: into the head's row, its result into the row after it."""
        assert self._storages is not None
        rows = self._columns + self._head
        heads = (self._head + 1) % self.buffer_size
        next_rows = self._columns + heads
        self._release(np.arange(self.n_envs), heads)
        for key, storage in self._storages.items():
            storage.write(next_rows, next_obs[key])
        self.actions[rows] = action
        self.rewards[rows] = reward
        flags = self._flags[rows]
        place = np.minimum((flags >> _PLACE_SHIFT) + 1, _MAX_PLACE).astype(np.uint8)
        self._flags[next_rows] = (place << _PLACE_SHIFT) | (flags & _ZERO_PADDED)
        self._flags[rows] = flags | _STEP | _TERMINATED * terminated.astype(np.uint8)
        self._num_steps += self.n_envs
        self._head = heads
        self._used = np.minimum(np.maximum(self._used, heads + 1), self.buffer_size)
        self._used[heads == 0] = self.buffer_size
        self._open_steps += 1
        cut = (
            self._open_steps == self.buffer_size
        )  # the ring holds nothing but this episode: its first step is lost
        self._open_steps[cut] -= 1
        self._open_cut |= cut

    def _release(self, envs: np.ndarray, heads: np.ndarray) -> None:
        """Uncount what the rows about to be overwritten hold."""
        rows = self._columns[envs] + heads
        flags = self._flags[rows]
        self._num_steps -= int(np.count_nonzero(flags & _STEP))
        self._unmark(rows[(flags & _START) != 0])
        for distance in range(1, self._margin + 1):  # stacks that need the lost frame
            later = self._columns[envs] + (heads + distance) % self.buffer_size
            flags = self._flags[later]
            self._unmark(later[((flags & _START) != 0) & (flags >> _PLACE_SHIFT >= distance)])

    def _unmark(self, rows: np.ndarray) -> None:
        self._flags[rows] &= 0xFF ^ _START
        self._num_starts -= len(rows)

    def _close(self, which: np.ndarray) -> None:
        """End the episodes of the environments ``which`` [E] and mark where their sub-sequences start."""
        for env in np.flatnonzero(which):
            first, count = self._open_starts()
            rows = self._columns[env] + (first[env] + np.arange(count[env])) % self.buffer_size
            self._flags[rows] |= _START
            self._num_starts += len(rows)
            self._open[env] = False
            self._open_steps[env] = 0
            self._head[env] = (self._head[env] + 1) % self.buffer_size

    def _open_starts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the first row in its ring, and the number, of the sub-sequences in each running episode [E]."""
        skipped = np.where(self._open_cut, self._margin, 0)
        first = (self._head - self._open_steps + skipped) % self.buffer_size
        count = np.where(self._open, self._open_steps - skipped - self.horizon + 1, 0)
        return first, np.maximum(count, 0)

    # -------------------------------------------------------- frames of images

    def _check_stacks(
        self, obs: dict[str, np.ndarray], next_obs: dict[str, np.ndarray], starting: np.ndarray
    ) -> None:
        """Make sure that stacks can be put together from single frames; else store whole ones from now on."""
        assert self._storages is not None
        for key, storage in self._storages.items():
            if not isinstance(storage, FrameStorage):
                continue
            first = storage.is_first_stack(obs[key][starting])[0].all()
            if first and storage.is_next_stack(obs[key], next_obs[key]).all():
                continue
            self._say_unstacked(key)
            self._storages[key] = self._whole_stacks(storage, self._spaces[key])

    def _whole_stacks(self, storage: FrameStorage, space: spaces.Space) -> ObservationStorage:
        """Copy single frames into a storage of whole stacks. The margin stays: it covers stacks already lost."""
        whole = ObservationStorage(space, storage.num_rows)
        whole.allocate()
        for env, used in enumerate(self._used.tolist()):
            for begin in range(0, used, 256):
                rows = self._columns[env] + np.arange(begin, min(begin + 256, used))
                whole.write(rows, self._gather(storage, rows))
        return whole

    def _say_unstacked(self, key: str) -> None:
        if not self._said_unstacked:
            self._said_unstacked = True
            name = f"images {key!r}" if key else "images"
            warnings.warn(
                f"The {name} are not stacks that move on by one frame a step: they are stored whole, "
                "which takes as many times more memory as frames are stacked.",
                stacklevel=4,
            )

    def _gather(self, storage: ObservationStorage, rows: np.ndarray) -> np.ndarray:
        flags = self._flags.take(rows)
        return storage.gather(
            rows, self.buffer_size, flags >> _PLACE_SHIFT, (flags & _ZERO_PADDED) != 0
        )

    # --------------------------------------------------------------- sampling

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> SequenceBatch:  # type: ignore[override]
        """Draw sub-sequences with replacement, each start as likely as any other.

        :param batch_size: number B of sub-sequences
        :param env: normalises observations and rewards
        :raises RuntimeError: no stored episode has T steps
        """
        rows = self._subsequence_rows(self._draw_starts(batch_size))  # [T+1, B]
        assert self._storages is not None
        observations = {key: self._gather(storage, rows) for key, storage in self._storages.items()}
        rows = rows[:-1]
        return SequenceBatch(
            self._observations_to_torch(observations, env),
            self._to_device(self.actions.take(rows, axis=0)),
            self._to_device(self._normalize_reward(self.rewards.take(rows), env)),
            self._to_device(((self._flags.take(rows) & _TERMINATED) != 0).astype(np.float32)),
        )

    def _countings(self) -> tuple[int, int, np.ndarray, np.ndarray]:
        """Return the sub-sequences to draw from in finished and in running episodes, and where the latter start."""
        first, count = self._open_starts()
        num_open = int(count.sum())
        # Endless tasks: the running episode counts once it outweighs whatever has been finished.
        if not self.sample_open_episodes and num_open <= self._num_starts:
            num_open = 0
        return self._num_starts, num_open, first, count

    def _draw_starts(self, batch_size: int) -> np.ndarray:
        """Return flat rows [B]: uniform over the starts in finished and, if they count, running episodes."""
        finished, running, first, count = self._countings()
        if finished + running == 0:
            raise RuntimeError(
                f"The replay buffer holds no sub-sequence of horizon {self.horizon} steps (the longest episode stored "
                f"has {self._longest_episode()}): collect more steps before training or lower the horizon."
            )
        tickets = self._rng.integers(finished + running, size=batch_size)
        tickets = tickets[tickets >= finished] - finished  # of running episodes
        ends = np.cumsum(count)
        env = np.searchsorted(ends, tickets, side="right")
        offset = tickets - (ends - count)[env]
        running_rows = self._columns[env] + (first[env] + offset) % self.buffer_size
        return np.concatenate([self._draw_finished(batch_size - len(tickets)), running_rows])

    def _draw_finished(self, number: int) -> np.ndarray:
        """Draw flagged rows, uniformly, by rejection: no index of them is kept in memory."""
        used = int(self._used.max())
        density = self._num_starts / max(used * self.n_envs, 1)
        if density < 0.05:
            starts = np.flatnonzero(self._flags & _START) if number else np.zeros(0, dtype=np.int64)
            return starts[self._rng.integers(max(len(starts), 1), size=number)]
        found = np.zeros(0, dtype=np.int64)
        while len(found) < number:
            tries = int((number - len(found)) / density * 1.1) + 16
            rows = self._rng.integers(used * self.n_envs, size=tries)
            if used != self.buffer_size:
                rows += rows // used * (self.buffer_size - used)
            found = np.concatenate([found, rows[(self._flags.take(rows) & _START) != 0]])
        return found[:number]

    def _subsequence_rows(self, starts: np.ndarray) -> np.ndarray:
        """Return the flat rows [T+1, B] of the sub-sequences that begin in ``starts`` [B]."""
        ends = (starts // self.buffer_size + 1) * self.buffer_size
        rows = starts + np.arange(self.horizon + 1)[:, None]
        rows -= self.buffer_size * (rows >= ends)
        return rows

    def _longest_episode(self) -> int:
        """Number of steps of the longest episode that is stored."""
        longest = 0
        for env in range(self.n_envs if self._storages is not None else 0):
            for begin, end in self._runs(env):
                longest = max(longest, end - begin)
        return longest

    def _observations_to_torch(
        self, observations: dict[str, np.ndarray], env: VecNormalize | None
    ) -> TensorOrDict:
        if isinstance(self.observation_space, spaces.Dict):
            normalized = self._normalize_obs(observations, env)
            assert isinstance(normalized, dict)
            return {key: self._to_device(value) for key, value in normalized.items()}
        normalized = self._normalize_obs(observations[_SINGLE], env)
        assert isinstance(normalized, np.ndarray)
        return self._to_device(normalized)

    def _to_device(self, array: np.ndarray) -> th.Tensor:
        """The arrays are fresh from the gathering, so the CPU's tensor may share their memory."""
        return th.from_numpy(array).to(self.device)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> Any:
        raise NotImplementedError("SequenceReplayBuffer samples sub-sequences: call sample().")

    # --------------------------------------------------------------- on disk

    def save(self, path: PathOrFile) -> None:
        """Write the content, the running episodes and the random state; a killed process leaves the old file.

        :param path: path (``.pkl``, SB3's name for buffers, is added if it has no suffix) or open binary file
        :raises OSError: the disk is full; the old file is unchanged
        """
        write_to(path, self._write, "pkl")

    def load(self, path: PathOrFile) -> None:
        """Take over the content of a saved buffer of the same shape; another horizon is no matter.

        :param path: path (with or without ``.pkl``) or open binary file
        :raises FileNotFoundError: there is no such file
        :raises ValueError: the file is damaged, or belongs to a buffer of another size, ``n_envs`` or spaces
        """
        with open_zip(path, "pkl", "replay buffer") as archive:
            self._read(archive)

    def _shape(self) -> dict[str, Any]:
        """What must be equal in a saved buffer and the one it is loaded into."""
        entries = {
            key: [storage_dtype(space).str, *(space.shape or ())]
            for key, space in self._spaces.items()
        }
        return {
            "rows per environment": self.buffer_size,
            "n_envs": self.n_envs,
            "observations": entries,
            "action_dim": self.action_dim,
        }

    def _header(self) -> dict[str, Any]:
        state = {name: getattr(self, name).tolist() for name in _STATE_ARRAYS}
        storages = self._storages or {}
        return {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            "shape": self._shape(),
            "frame_channels": {
                k: s.frame_channels for k, s in storages.items() if isinstance(s, FrameStorage)
            },
            "margin": self._margin,
            "said_unstacked": self._said_unstacked,
            "allocated": self._storages is not None,
            "num_added": self._num_added,
            "random_state": self._rng.bit_generator.state,
            **state,
        }

    def _fields(self) -> dict[str, np.ndarray]:
        """Every stored array by its name in the file."""
        assert self._storages is not None
        fields = {"actions": self.actions, "rewards": self.rewards, "flags": self._flags}
        for index, storage in enumerate(self._storages.values()):
            assert storage.rows is not None
            fields[f"observations_{index}"] = storage.rows
        return fields

    def _used_parts(self, field: np.ndarray) -> list[np.ndarray]:
        return [
            field[begin : begin + used]
            for begin, used in zip(self._columns, self._used, strict=True)
        ]

    def _write(self, file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("header.json", json.dumps(self._header(), indent=1))
            if self._storages is None:
                return
            writer = ArrayWriter(archive)
            for name, field in self._fields().items():
                shape = (int(self._used.sum()), *field.shape[1:])
                writer.write(name, self._used_parts(field), field.dtype, shape)

    def _read(self, archive: zipfile.ZipFile) -> None:
        header = self._read_header(archive)
        self.reset()
        try:
            for name in _STATE_ARRAYS:
                getattr(self, name)[:] = header[name]
            self._num_added = int(header["num_added"])
            self._said_unstacked = bool(header["said_unstacked"])
            self._rng.bit_generator.state = header["random_state"]
            if header["allocated"]:
                self._read_arrays(
                    ArrayReader(archive), header["frame_channels"], int(header["margin"])
                )
        except CorruptFileError:
            self.reset()
            raise
        except (KeyError, TypeError, ValueError, IndexError) as error:
            self.reset()
            raise CorruptFileError(
                f"The saved replay buffer has a damaged header ({error!r}): use another copy."
            ) from error
        self.pos = int(self._head[0]) % self.buffer_size
        self.full = bool((self._used == self.buffer_size).all())

    def _read_header(self, archive: zipfile.ZipFile) -> dict[str, Any]:
        try:
            header = json.loads(archive.read("header.json"))
            kind, version, shape = header["format"], header["version"], header["shape"]
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(
                "The file is not a replay buffer saved by tdmpc2_sb3: check the path."
            ) from error
        if kind != _FORMAT or version != _FORMAT_VERSION:
            raise CorruptFileError(
                f"The file holds '{kind}' of version {version} and this package reads '{_FORMAT}' of version "
                f"{_FORMAT_VERSION}: update tdmpc2_sb3 or save the buffer again."
            )
        own = json.loads(json.dumps(self._shape()))
        for name, value in own.items():
            if shape.get(name) != value:
                raise ValueError(
                    f"The saved replay buffer has {name} = {shape.get(name)} and this one {value}: "
                    "load it with the buffer_size, n_envs and spaces it was saved with."
                )
        return header

    def _read_arrays(
        self, reader: ArrayReader, frame_channels: dict[str, int], margin: int
    ) -> None:
        num_rows = self.n_envs * self.buffer_size
        self._allocate_as(
            {
                key: FrameStorage(space, num_rows, frame_channels[key])
                if key in frame_channels
                else ObservationStorage(space, num_rows)
                for key, space in self._spaces.items()
            }
        )
        self._margin = margin
        for name, field in self._fields().items():
            shape = (int(self._used.sum()), *field.shape[1:])
            reader.read_into(name, self._used_parts(field), field.dtype, shape)
        self._num_steps = int(np.count_nonzero(self._flags & _STEP))
        self._mark_starts()
        newest = self._columns + (self._head - ~self._open) % self.buffer_size
        assert self._storages is not None
        self._newest = {
            key: self._gather(storage, newest).astype(storage.dtype, copy=False)
            for key, storage in self._storages.items()
        }

    def _mark_starts(self) -> None:
        """Flag the starts in finished episodes afresh: the file may come from a run with another horizon."""
        self._flags &= 0xFF ^ _START
        for env in range(self.n_envs):
            for begin, end in self._runs(env):
                if self._open[env] and end % self.buffer_size == self._head[env]:
                    continue  # the running episode
                place = (
                    int(self._flags[self._columns[env] + begin % self.buffer_size]) >> _PLACE_SHIFT
                )
                begin += self._margin if place else 0  # its first frames are lost
                rows = (
                    self._columns[env] + np.arange(begin, end - self.horizon + 1) % self.buffer_size
                )
                self._flags[rows] |= _START
        self._num_starts = int(np.count_nonzero(self._flags & _START))

    def _runs(self, env: int) -> list[tuple[int, int]]:
        """Return (begin, end) of every stretch of steps of one episode, in rows counted on past the ring's end."""
        oldest = int(self._head[env]) + int(self._open[env])
        if self._used[env] < self.buffer_size:
            oldest = 0
        column = self._flags[self._columns[env] : self._columns[env] + self.buffer_size]
        is_step = np.roll(column & _STEP, -oldest).astype(np.int8)
        edges = np.diff(is_step, prepend=0, append=0)
        begins, ends = np.flatnonzero(edges == 1) + oldest, np.flatnonzero(edges == -1) + oldest
        return list(zip(begins.tolist(), ends.tolist(), strict=True))


_STATE_ARRAYS = ("_head", "_open", "_open_steps", "_open_cut", "_used")
