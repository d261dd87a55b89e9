"""Where a replay buffer keeps one entry of the observations: a flat array of rows.

Which row holds what is told by :mod:`tdmpc2_sb3.replay.rings`, and all entries together are
:mod:`tdmpc2_sb3.replay.stored_observations`. Stacked image frames, of which every one but the
newest stands in the previous row already, are stored as single frames.

Shapes: R rows per environment, E environments (row ``e * R + r`` belongs to environment e), k
stacked frames of c channels each, ``...`` any index shape.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from gymnasium import spaces

from tdmpc2_sb3.replay.observation_entries import entry_dtype, entry_shape

MAX_FRAMES = 16  # the buffer has 4 bits a row for the place in the episode
_FRAME_CHANNELS = (3, 1, 4, 2)  # RGB, grey, RGBA or RGB with depth, two-channel frames


class EntryStorage:
    """Rows of whole observations.

    :param space: the entry's space; floats are kept as float32
    :param num_rows: rows in all (E x R)
    """

    num_frames = 1

    def __init__(self, space: spaces.Space, num_rows: int) -> None:
        self.obs_shape = entry_shape(space)
        self.dtype = storage_dtype(space)
        self.output_dtype = entry_dtype(space)
        self.num_rows = num_rows
        self.rows = np.zeros((0, *self.row_shape), dtype=self.dtype)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of what one row holds."""
        return self.obs_shape

    @property
    def nbytes(self) -> int:
        """Memory of all rows, allocated or not."""
        return self.num_rows * int(np.prod(self.row_shape)) * self.dtype.itemsize

    def allocate(self) -> None:
        """Reserve all rows (the system commits the memory as rows are first written)."""
        self.rows = np.zeros((self.num_rows, *self.row_shape), dtype=self.dtype)

    def write(self, rows: np.ndarray, obs: np.ndarray) -> None:
        """Store ``obs`` [n, ...] in ``rows`` [n]."""
        self.rows[rows] = obs

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Return what is in flat ``rows`` [...], shaped [..., *row_shape]."""
        return self.rows.take(rows, axis=0).astype(self.output_dtype, copy=False)


class FrameStorage(EntryStorage):
    """Rows of single frames out of which stacked images are put together again.

    :param space: the stacked images' space
    :param num_rows: rows in all (E x R)
    :param frame_channels: channels c of one frame
    """

    def __init__(self, space: spaces.Space, num_rows: int, frame_channels: int) -> None:
        self.frame_channels = frame_channels
        super().__init__(space, num_rows)
        self.num_frames = self.obs_shape[0] // frame_channels

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one frame."""
        return (self.frame_channels, *self.obs_shape[1:])

    def write(self, rows: np.ndarray, obs: np.ndarray) -> None:
        """Store the newest frame of each stack in ``obs`` [n, k * c, height, width]."""
        super().write(rows, obs[:, -self.frame_channels :])

    def gather_stacks(
        self, rows: np.ndarray, rows_per_env: int, place: np.ndarray, zero_padded: np.ndarray
    ) -> np.ndarray:
        """Return the stacks whose newest frames are in flat ``rows`` [...].

        :param rows: flat rows
        :param rows_per_env: R
        :param place: steps since the episode's start [...], counted at least up to k - 1
        :param zero_padded: whether frames before the episode's start are zeros [...], not repeats
            of its first frame
        :return: [..., k * c, height, width]
        """
        ages = np.arange(self.num_frames - 1, -1, -1)  # of the frames in a stack, oldest first
        back = np.minimum(ages, place[..., None])  # [..., k]
        column = (rows // rows_per_env * rows_per_env)[..., None]
        frame_rows = rows[..., None] - back
        frame_rows += rows_per_env * (frame_rows < column)
        frames = self.gather(frame_rows)  # [..., k, c, height, width]
        missing = zero_padded[..., None] & (ages > place[..., None])
        if missing.any():
            frames[missing] = 0
        return frames.reshape(*rows.shape, *self.obs_shape)

    def is_zero_padded(self, obs: np.ndarray) -> np.ndarray:
        """Say of each stack in ``obs`` [n, ...] whether zeros precede its newest frame."""
        return np.logical_not(np.any(obs[:, : -self.frame_channels], axis=(1, 2, 3)))

    def is_first_stack(self, obs: np.ndarray, zero_padded: np.ndarray) -> np.ndarray:
        """Say of each stack in ``obs`` [n, ...] whether it can start an episode.

        :param obs: stacks
        :param zero_padded: whether zeros, not repeats, are to fill it up [n]
        """
        frames = obs.reshape(len(obs), self.num_frames, *self.row_shape)
        newest = np.where(zero_padded[:, None, None, None, None], 0, frames[:, -1:])
        return (frames[:, :-1] == newest).all(axis=(1, 2, 3, 4))

    def is_next_stack(self, obs: np.ndarray, next_obs: np.ndarray) -> np.ndarray:
        """Say of each pair whether ``next_obs`` is ``obs`` moved on by one frame. Returns [n]."""
        old, new = obs[:, self.frame_channels :], next_obs[:, : -self.frame_channels]
        return (old == new).all(axis=(1, 2, 3))


def storage_dtype(space: spaces.Space) -> np.dtype:
    """Return the dtype of stored observations: integers and booleans as they are, else float32."""
    dtype = np.dtype(space.dtype) if space.dtype is not None else np.dtype(np.float32)
    return dtype if dtype.kind in "iub" else np.dtype(np.float32)


def choose_storage(
    space: spaces.Space, num_rows: int, obs: np.ndarray, next_obs: np.ndarray
) -> EntryStorage:
    """Return single-frame storage if the first observations prove to be stacked frames.

    :param space: the entry's space
    :param num_rows: rows in all
    :param obs: first observations [E, ...]
    :param next_obs: the ones that followed [E, ...]
    """
    for storage in frame_storages(space, num_rows):
        starts = storage.is_first_stack(obs, storage.is_zero_padded(obs))
        if starts.all() and storage.is_next_stack(obs, next_obs).all():
            return storage
    return EntryStorage(space, num_rows)


def likely_storage(space: spaces.Space, num_rows: int) -> EntryStorage:
    """Return the storage that images with the channels of several pictures take if they are stacked
    frames, and that of whole observations for all others."""
    if looks_stacked(space):
        return next(frame_storages(space, num_rows), EntryStorage(space, num_rows))
    return EntryStorage(space, num_rows)


def looks_stacked(space: spaces.Space) -> bool:
    """Say whether images of ``space`` have more channels than one picture has."""
    return entry_dtype(space) == np.uint8 and entry_shape(space)[0] > 4


def frame_storages(space: spaces.Space, num_rows: int) -> Iterator[FrameStorage]:
    """Yield every way of keeping the images of ``space`` as single frames, the likeliest first."""
    if entry_dtype(space) != np.uint8 or space.shape is None:
        return
    for channels in _FRAME_CHANNELS:
        if space.shape[0] % channels == 0 and 1 < space.shape[0] // channels <= MAX_FRAMES:
            yield FrameStorage(space, num_rows, channels)
