"""The files of a checkpoint: whole, readable and of the same moment, or why not."""

from __future__ import annotations

import hashlib
import json
import pathlib
import zipfile
from typing import Any

import numpy as np

from tdmpc2_sb3.saving.archive import read_archive
from tdmpc2_sb3.saving.attribute_checks import is_real
from tdmpc2_sb3.saving.callback_state import check_callback_state
from tdmpc2_sb3.saving.files import CorruptFileError, open_zip, parse_json, read_json
from tdmpc2_sb3.saving.json_codec import decode

MODEL_FILE = "model.zip"
BUFFER_FILE = "replay_buffer.zip"
RUN_FILE = "run.json"

#: What SB3 calls the steps made, and what outlives a new count of them.
_STEPS, _LIFETIME_STEPS = "num_timesteps", "_lifetime_steps"


def digest(path: pathlib.Path) -> str:
    """Tell a zip from any other by the checksums of its parts, which reading it compares."""
    with zipfile.ZipFile(path) as archive:
        parts = [[each.filename, each.file_size, each.CRC] for each in archive.infolist()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def digests(checkpoint: pathlib.Path) -> dict[str, str]:
    """The digest of each zip of a checkpoint."""
    return {name: digest(checkpoint / name) for name in (MODEL_FILE, BUFFER_FILE)}


def read_run(checkpoint: pathlib.Path) -> dict[str, Any]:
    """What a checkpoint tells of the run beside the model: steps, callbacks and log files.

    :raises FileNotFoundError: if there is none
    :raises CorruptFileError: if it is damaged
    """
    path = checkpoint / RUN_FILE
    try:
        run = decode(parse_json(path.read_bytes()))
        sizes, logger = run["files"]["monitor_sizes"], run["files"]["logger"]
        plain = (
            _is_count(run[_STEPS])
            and isinstance(run["callbacks"], list)
            and isinstance(run["normalizer"], dict)
            and all(map(_is_mean, run["normalizer"].values()))
            and all(_is_count(size) for size in sizes.values())
            and (logger is None or (isinstance(logger, str) and "\0" not in logger))
            and isinstance(run.get("digests", {}), dict)
        )
        for state in run["callbacks"]:
            check_callback_state(state)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CorruptFileError(f"'{path}' is damaged ({reason}): use another copy.") from error
    if not plain:
        raise CorruptFileError(f"'{path}' is damaged: use another copy.")
    return run


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_mean(value: Any) -> bool:
    """Whether a value is a running mean, of any shape."""
    if not isinstance(value, dict) or set(value) != {"mean", "var", "count"}:
        return False
    mean, var = value["mean"], value["var"]
    arrays = all(isinstance(each, np.ndarray) and each.dtype == np.float64 for each in (mean, var))
    return (
        arrays
        and mean.shape == var.shape
        and bool(np.isfinite(mean).all() and np.isfinite(var).all() and (var >= 0).all())
        and is_real(value["count"])
        and value["count"] > 0
    )


def check(checkpoint: pathlib.Path) -> None:
    """Refuse a checkpoint that cannot be resumed from, before anything is changed for it.

    :raises FileNotFoundError: if a file is missing
    :raises ValueError: if one is damaged, or of another moment than the others
    """
    run = read_run(checkpoint)
    data, _ = read_archive(checkpoint / MODEL_FILE, "cpu")
    with open_zip(checkpoint / BUFFER_FILE, "zip", "replay buffer") as archive:
        damaged = archive.testzip()
        if damaged is not None:
            raise CorruptFileError(f"The part '{damaged}' of the saved replay buffer is damaged.")
        collected = _collected_steps(archive)
    for name, expected in run.get("digests", {}).items():
        if name in (MODEL_FILE, BUFFER_FILE) and digest(checkpoint / name) != expected:
            raise CorruptFileError(
                f"'{checkpoint / name}' is not the file that was written with '{RUN_FILE}': "
                f"it holds {collected} steps and the run made {run[_STEPS]}."
                if name == BUFFER_FILE
                else f"'{checkpoint / name}' is not the file that was written with '{RUN_FILE}'."
            )
    made: Any = data.get(_LIFETIME_STEPS)
    if data.get(_STEPS) != run[_STEPS] or not _is_count(made) or collected > made:
        raise CorruptFileError(
            f"The files of '{checkpoint}' are of different moments or runs: the run made "
            f"{run[_STEPS]} steps, the model {data.get(_STEPS)} ({made} in its life), and "
            f"{collected} were put into the replay buffer."
        )


def _collected_steps(archive: zipfile.ZipFile) -> int:
    try:
        header = read_json(archive, "header.json")
        steps = header["num_added"] * header["kind"]["n_envs"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CorruptFileError(f"The saved replay buffer is damaged ({error!r}).") from error
    if not _is_count(steps):
        raise CorruptFileError(f"The saved replay buffer is damaged ({steps} steps).")
    return int(steps)
