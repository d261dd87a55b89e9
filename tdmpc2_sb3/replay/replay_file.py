"""The file of a replay buffer: a zip of a JSON header and plain arrays, nothing pickled.

Only the rows in use are written, environment by environment; see :class:`file_io.ArrayWriter`.
"""

from __future__ import annotations

import json
import zipfile
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from tdmpc2_sb3.replay import rings as episode_rings
from tdmpc2_sb3.replay.entry_storage import (
    EntryStorage,
    FrameStorage,
    frame_storages,
    storage_dtype,
)
from tdmpc2_sb3.replay.ring_checks import check_flags, restore_counters
from tdmpc2_sb3.saving.files import (
    ArrayReader,
    ArrayWriter,
    CorruptFileError,
    PathOrFile,
    open_zip,
    read_json,
    write_to,
)
from tdmpc2_sb3.saving.random_streams import checked_stream

if TYPE_CHECKING:
    from tdmpc2_sb3.replay.buffer import SequenceReplayBuffer

_FORMAT = "tdmpc2_sb3 replay buffer"
_FORMAT_VERSION = 1
_HEADER = "header.json"
_MAX_ADDED = 2**53
_SUFFIX = "pkl"  # SB3's name for saved buffers, by which the zoo looks for them


def save(buffer: SequenceReplayBuffer, path: PathOrFile) -> None:
    """Write the buffer, see :meth:`SequenceReplayBuffer.save`."""

    def writer(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_HEADER, json.dumps(_header(buffer), indent=1))
            arrays = ArrayWriter(archive)
            for name, field in buffer.fields().items():
                arrays.write(name, _used_parts(buffer, field), field.dtype, _shape(buffer, field))

    write_to(path, writer, _SUFFIX)


def load(buffer: SequenceReplayBuffer, path: PathOrFile) -> None:
    """Fill the buffer, see :meth:`SequenceReplayBuffer.load`."""
    with open_zip(path, _SUFFIX, "replay buffer") as archive:
        header = _read_header(buffer, archive)
        buffer.reset()
        try:
            _restore(buffer, header, ArrayReader(archive))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            buffer.reset()
            if isinstance(error, CorruptFileError):
                raise
            reason = error if isinstance(error, ValueError) else repr(error)
            raise CorruptFileError(
                f"The saved replay buffer has a damaged header or rows ({reason}): use another "
                "copy."
            ) from error
        except BaseException:
            buffer.reset()
            raise


def _kind(buffer: SequenceReplayBuffer) -> dict[str, Any]:
    """What must be equal in a saved buffer and the one it is loaded into."""
    observations = {
        key: [storage_dtype(space).str, *(space.shape or ())]
        for key, space in buffer.stored.entries.items()
    }
    return {
        "rows per environment": buffer.buffer_size,
        "n_envs": buffer.n_envs,
        "observations": observations,
        "action_dim": buffer.action_dim,
    }


def _header(buffer: SequenceReplayBuffer) -> dict[str, Any]:
    frame_channels = {
        key: storage.frame_channels
        for key, storage in buffer.stored.storages.items()
        if isinstance(storage, FrameStorage)
    }
    return {
        "format": _FORMAT,
        "version": _FORMAT_VERSION,
        "kind": _kind(buffer),
        "allocated": bool(buffer.stored.storages),
        "frame_channels": frame_channels,
        "margin": buffer.rings.margin,
        "num_added": buffer.num_added,
        "random_state": buffer.rng.bit_generator.state,
        **{name: getattr(buffer.rings, name).tolist() for name in episode_rings.STATE},
    }


def _read_header(buffer: SequenceReplayBuffer, archive: zipfile.ZipFile) -> dict[str, Any]:
    try:
        header = read_json(archive, _HEADER)
        name, version, kind = header["format"], header["version"], dict(header["kind"])
    except CorruptFileError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            "The file is not a replay buffer saved by tdmpc2_sb3: check the path."
        ) from error
    if name != _FORMAT or version != _FORMAT_VERSION:
        raise ValueError(
            f"The file holds '{name}' of version {version} and this package reads '{_FORMAT}' of "
            f"version {_FORMAT_VERSION}: update tdmpc2_sb3 or save the buffer again."
        )
    for key, value in _kind(buffer).items():
        if kind.get(key) != value:
            raise ValueError(
                f"The saved replay buffer has {key} = {kind.get(key)} and this one {value}: load "
                "it with the buffer_size, n_envs and spaces it was saved with."
            )
    return header


def _restore(buffer: SequenceReplayBuffer, header: dict[str, Any], arrays: ArrayReader) -> None:
    rings = buffer.rings
    num_added, allocated = header["num_added"], header["allocated"]
    if type(num_added) is not int or not 0 <= num_added < _MAX_ADDED:
        raise ValueError(f"num_added = {num_added}")
    if allocated is not (num_added > 0):
        raise ValueError(f"allocated = {allocated} after {num_added} steps")
    restore_counters(rings, header, num_added)
    stream = checked_stream(header["random_state"], type(buffer.rng.bit_generator).__name__)
    if allocated:
        buffer.allocate(_storages(buffer, header["frame_channels"]))
        _restore_margin(buffer, header["margin"])
        for name, field in buffer.fields().items():
            parts = _used_parts(buffer, field)
            arrays.read_into(name, parts, field.dtype, _shape(buffer, field))
            for part in parts:
                _check_values(name, part)
        check_flags(rings)
        rings.count_and_mark()
        stored, added = rings.num_steps, num_added * buffer.n_envs
        if stored > added or (stored < added and (rings.used < buffer.buffer_size).all()):
            raise ValueError(f"num_added = {num_added} with {stored} steps stored")
    buffer.num_added = num_added
    buffer.rng.bit_generator.state = stream


def _storages(
    buffer: SequenceReplayBuffer, frame_channels: dict[str, int]
) -> dict[str, EntryStorage]:
    """Where the observations go, for the entries whose stacks are kept as frames and the others."""
    num_rows = buffer.rings.num_rows
    storages = {key: EntryStorage(space, num_rows) for key, space in buffer.stored.entries.items()}
    for key, channels in frame_channels.items():
        frames = frame_storages(buffer.stored.entries[key], num_rows)
        storages[key] = {each.frame_channels: each for each in frames}[channels]
    return storages


def _restore_margin(buffer: SequenceReplayBuffer, margin: int) -> None:
    """At least what the storages need; more where stacks turned out to be none."""
    most = buffer.rings.margin
    for key, storage in buffer.stored.storages.items():
        if not isinstance(storage, FrameStorage):
            frames = frame_storages(buffer.stored.entries[key], 0)
            most = max([most, *(each.num_frames - 1 for each in frames)])
    if type(margin) is not int or not buffer.rings.margin <= margin <= most:
        raise ValueError(f"margin = {margin}")
    buffer.rings.margin = margin


def _check_values(name: str, part: np.ndarray) -> None:
    if part.dtype.kind == "f" and not np.isfinite(part).all():
        raise ValueError(f"numbers of '{name}' that are not finite")
    if part.dtype.kind == "b" and (part.view(np.uint8) > 1).any():
        raise ValueError(f"truth values of '{name}' other than 0 and 1")


def _used_parts(buffer: SequenceReplayBuffer, field: np.ndarray) -> list[np.ndarray]:
    rings = buffer.rings
    return [
        field[begin : begin + used] for begin, used in zip(rings.columns, rings.used, strict=True)
    ]


def _shape(buffer: SequenceReplayBuffer, field: np.ndarray) -> tuple[int, ...]:
    return (int(buffer.rings.used.sum()), *field.shape[1:])
