"""The observations in a replay buffer's rows: every entry of the observation space together.

Shape legend: E environments, R rows per environment, ``...`` an observation's own shape.
"""

from __future__ import annotations

import warnings

import numpy as np
from gymnasium import spaces

from tdmpc2_sb3.replay.entry_storage import (
    EntryStorage,
    FrameStorage,
    choose_storage,
    likely_storage,
    looks_stacked,
    storage_dtype,
)
from tdmpc2_sb3.replay.observation_entries import SINGLE, check_choices, entry_shape
from tdmpc2_sb3.replay.rings import EpisodeRings

ArrayOrDict = np.ndarray | dict[str, np.ndarray]
Arrays = dict[str, np.ndarray]

_SINGLE = ""  # the name of the only entry of a space that is no Dict
_ROWS_AT_ONCE = 256  # rows of images converted in one go


class StoredObservations:
    """Storages of all entries, in the rows that an :class:`EpisodeRings` assigns.

    :param space: observation space
    :param rings: row bookkeeping; begins its episodes, whose first observations are written here
    """

    def __init__(self, space: spaces.Space, rings: EpisodeRings) -> None:
        self.is_dict = isinstance(space, spaces.Dict)
        self.entries: dict[str, spaces.Space] = {_SINGLE: space}
        if isinstance(space, spaces.Dict):
            self.entries = dict(space.spaces)
        self.rings = rings
        self.storages: dict[str, EntryStorage] = {}  # empty: nothing is allocated
        self.newest: Arrays = {}  # each environment's last observation [E, ...]
        self._shapes = {key: entry_shape(space) for key, space in self.entries.items()}
        self._said_unstacked = False

    def as_arrays(self, obs: ArrayOrDict) -> Arrays:
        """Return fresh arrays [E, ...] in the storages' dtypes, by entry."""
        given = obs if isinstance(obs, dict) else {_SINGLE: obs}
        with np.errstate(over="ignore", invalid="ignore"):
            return {
                key: np.array(given[key], storage_dtype(space)).reshape(
                    self.rings.n_envs, *self._shapes[key]
                )
                for key, space in self.entries.items()
            }

    def likely_storages(self) -> dict[str, EntryStorage]:
        """Return storages that may turn out to suit, before anything was observed."""
        return {
            key: likely_storage(space, self.rings.num_rows) for key, space in self.entries.items()
        }

    def check_choices(self, obs: Arrays) -> None:
        """
        :raises RuntimeError: if a Discrete or MultiDiscrete entry is none of its space's values
        """
        for key, space in self.entries.items():
            wrong = check_choices(obs[key], key or SINGLE, space)
            if wrong is not None:
                raise RuntimeError(wrong)

    def choose(self, obs: Arrays, next_obs: Arrays) -> dict[str, EntryStorage]:
        """Return storages that suit the first observations and the ones that followed."""
        storages = {
            key: choose_storage(space, self.rings.num_rows, obs[key], next_obs[key])
            for key, space in self.entries.items()
        }
        for key, storage in storages.items():
            if looks_stacked(self.entries[key]) and storage.num_frames == 1:
                self._say_unstacked(key)
        return storages

    def allocate(self, storages: dict[str, EntryStorage]) -> None:
        """Take the memory of ``storages`` and use them from now on."""
        for storage in storages.values():
            storage.allocate()
        self.storages = storages
        self.rings.margin = max(storage.num_frames for storage in storages.values()) - 1

    def continues(self, obs: Arrays) -> np.ndarray:
        """Say where ``obs`` is the newest observation stored. Returns [E]."""
        same = np.ones(self.rings.n_envs, dtype=bool)
        for key, newest in self.newest.items():
            same &= (newest == obs[key]).reshape(self.rings.n_envs, -1).all(axis=1)
        return same

    def begin_episodes(self, obs: Arrays, next_obs: Arrays) -> None:
        """Begin an episode with ``obs`` in every environment where none is running.

        Stacked images of all environments are checked on this occasion: those that cannot be put
        together again from single frames are stored whole from now on.
        """
        envs = np.flatnonzero(~self.rings.running)
        first = {key: values[envs] for key, values in obs.items()}
        padded = np.zeros(len(envs), dtype=bool)
        stacked = [(k, s) for k, s in self.storages.items() if isinstance(s, FrameStorage)]
        for key, storage in stacked:
            padded |= storage.is_zero_padded(first[key])
        for key, storage in stacked:
            starts = storage.is_first_stack(first[key], padded)
            if not (starts.all() and storage.is_next_stack(obs[key], next_obs[key]).all()):
                self._store_whole_stacks(key, storage)
        if len(envs):
            rows = self.rings.begin(envs, padded)
            for key, any_storage in self.storages.items():
                any_storage.write(rows, first[key])

    def write_next(self, rows: np.ndarray, next_obs: Arrays) -> None:
        """Store the observations that follow a step: ``next_obs`` [E, ...] in flat ``rows`` [E]."""
        for key, storage in self.storages.items():
            storage.write(rows, next_obs[key])
        self.newest = next_obs

    def gather(self, rows: np.ndarray) -> ArrayOrDict:
        """Return the observations in flat ``rows``: an array, or a dict of arrays, [*rows, ...]."""
        gathered = {key: self._gather(storage, rows) for key, storage in self.storages.items()}
        return gathered if self.is_dict else gathered[_SINGLE]

    def recall_newest(self) -> None:
        """Read the newest observations from their rows, after the rows came from a file."""
        rows = self.rings.newest_rows()
        self.newest = {
            key: self._gather(storage, rows).astype(storage.dtype, copy=False)
            for key, storage in self.storages.items()
        }

    def _gather(self, storage: EntryStorage, rows: np.ndarray) -> np.ndarray:
        if not isinstance(storage, FrameStorage):
            return storage.gather(rows)
        rings = self.rings
        return storage.gather_stacks(
            rows, rings.rows_per_env, rings.place(rows), rings.zero_padded(rows)
        )

    def _store_whole_stacks(self, key: str, storage: FrameStorage) -> None:
        """Replace single frames by whole stacks. The rings' margin stays: it covers lost frames."""
        self._say_unstacked(key)
        whole = EntryStorage(self.entries[key], storage.num_rows)
        whole.allocate()
        for column, used in zip(self.rings.columns, self.rings.used.tolist(), strict=True):
            for begin in range(0, used, _ROWS_AT_ONCE):
                rows = column + np.arange(begin, min(begin + _ROWS_AT_ONCE, used))
                whole.write(rows, self._gather(storage, rows))
        self.storages[key] = whole

    def _say_unstacked(self, key: str) -> None:
        if not self._said_unstacked:
            self._said_unstacked = True
            warnings.warn(
                f"The images{f' {key!r}' if key else ''} are not stacks that move on by one frame "
                "a step: they are stored whole, which takes as many times more memory as frames "
                "are stacked.",
                stacklevel=4,
            )
