"""A run's log files, taken back to the moment of a checkpoint so that the resumed run appends.

What a killed run wrote after its newest checkpoint is written again when those steps are repeated:
without this, episodes would stand in the log twice.
"""

from __future__ import annotations

import os
import pathlib
import time
from typing import Any

from stable_baselines3.common.logger import Logger, configure
from stable_baselines3.common.vec_env import VecEnv

MONITOR_FILES = "*.monitor.csv"


def describe(folder: pathlib.Path, logger: Logger | None) -> dict[str, Any]:
    """Where the log files of a run end now.

    :param folder: of the run, with Monitor's files in it
    :param logger: of the run, None if it has not started
    :return: sizes in bytes, and the logger's folder relative to the run's; plain JSON
    """
    directory = None if logger is None else logger.get_dir()
    return {
        "monitor_sizes": {path.name: path.stat().st_size for path in folder.glob(MONITOR_FILES)},
        "logger": None if directory is None else os.path.relpath(directory, folder),
    }


def rewind(folder: pathlib.Path, description: dict[str, Any]) -> None:
    """Cut Monitor's files to what they were; files that came later are removed.

    :param folder: of the run
    :param description: from :func:`describe`
    """
    for path in folder.glob(MONITOR_FILES):
        size = description["monitor_sizes"].get(path.name)
        if size is None:
            path.unlink()
        elif path.stat().st_size > size:
            os.truncate(path, size)


def continue_clock(folder: pathlib.Path, env: VecEnv) -> None:
    """Let Monitor's column of seconds go on from the last episode: the pause does not count.

    :param folder: of the run
    :param env: with Monitor around each environment
    """
    seconds = max((_last_second(path) for path in folder.glob(MONITOR_FILES)), default=0.0)
    env.env_method("set_wrapper_attr", "t_start", time.time() - seconds)


def _last_second(path: pathlib.Path) -> float:
    rows = path.read_text().splitlines()[1:]  # after the header in JSON
    if len(rows) < 2:
        return 0.0
    return float(rows[-1].split(",")[rows[0].split(",").index("t")])


def reopen_logger(
    folder: pathlib.Path, description: dict[str, Any], steps: int, verbose: int
) -> Logger | None:
    """The logger that goes on in the run's TensorBoard folder, None if there was none.

    :param folder: of the run
    :param description: from :func:`describe`
    :param steps: of the checkpoint; TensorBoard drops what was logged after it
    :param verbose: whether it prints, too
    """
    if description["logger"] is None:
        return None
    directory = os.path.normpath(folder / description["logger"])
    from torch.utils.tensorboard import SummaryWriter

    SummaryWriter(directory, purge_step=steps + 1).close()
    return configure(directory, ["stdout", "tensorboard"] if verbose else ["tensorboard"])
