"""A run's log files, taken back to the moment of a checkpoint so that the resumed run appends.

What a killed run wrote after its newest checkpoint is written again when those steps are repeated:
without this, episodes would stand in the log twice.
"""

from __future__ import annotations

import csv
import os
import pathlib
import shutil
import stat
import time
from typing import Any

import numpy as np
from stable_baselines3.common.logger import Logger, TensorBoardOutputFormat, configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from tdmpc2_sb3.saving.attribute_checks import is_real, short
from tdmpc2_sb3.saving.files import CorruptFileError, parse_json

MONITOR_FILES = "*.monitor.csv"

#: Names that runs give to files only.
_FILE_SUFFIXES = (".csv", ".json", ".npz", ".pkl", ".txt", ".yml", ".zip")


def describe(folder: pathlib.Path, logger: Logger | None) -> dict[str, Any]:
    """Where the log files of a run end now.

    :param folder: of the run, with Monitor's files in it
    :param logger: of the run, None if it has not started
    :return: sizes in bytes, and the logger's folder relative to the run's; plain JSON
    """
    formats = [] if logger is None else logger.output_formats
    directory = None
    if any(isinstance(each, TensorBoardOutputFormat) for each in formats):  # else a temporary one
        directory = logger.get_dir()  # type: ignore[union-attr]
    return {
        "monitor_sizes": {path.name: path.stat().st_size for path in folder.glob(MONITOR_FILES)},
        "logger": None if directory is None else os.path.relpath(directory, folder),
    }


def check_confined(folder: pathlib.Path) -> None:
    """Refuse a run's folder in which writing a file would write, or wait, somewhere else.

    :param folder: of the run, an absolute path without links
    :raises ValueError: naming a link that leads out of the folder, or what is no file
    """
    for root, folders, files in os.walk(folder):
        for path in (pathlib.Path(root, name) for name in [*folders, *files]):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                if not pathlib.Path(os.path.realpath(path)).is_relative_to(folder):
                    raise ValueError(
                        f"'{path}' is a link out of the run's folder, to '{os.readlink(path)}': "
                        "put a copy of the file in its place."
                    )
                if not path.exists():
                    raise ValueError(f"'{path}' is a link to nothing: remove it.")
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise ValueError(f"'{path}' is neither a file nor a folder: remove it.")
            if path.suffix in _FILE_SUFFIXES and path.is_dir():
                raise ValueError(f"'{path}' is a folder where a file should be: remove it.")


def unshare(folder: pathlib.Path, whole: str) -> None:
    """Put copies in place of hard links, so that writing into them changes no file elsewhere.

    :param folder: of the run
    :param whole: pattern of the folders in it that are only ever removed whole
    """
    kept = set(folder.glob(whole))
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if pathlib.Path(root, name) not in kept]
        for path in (pathlib.Path(root, name) for name in files):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                copy = path.with_name(f".{path.name}.{os.getpid()}.copy")
                try:
                    shutil.copy2(path, copy)
                    os.replace(copy, path)
                finally:
                    copy.unlink(missing_ok=True)


def find_log(
    folder: pathlib.Path, description: dict[str, Any], known: pathlib.PurePath | None
) -> pathlib.Path | None:
    """The TensorBoard folder in which a run goes on, None if it has none by file or options.

    It lies in the run's folder, or it is one that TensorBoard's files are in already and that the
    run's options lead to: a run's file alone leads nowhere else.

    :param folder: of the run
    :param description: from :func:`describe`
    :param known: how the path of the folder above it ends by the run's options, None if they name
        no log
    :raises ValueError: if it is neither
    """
    if description["logger"] is None:
        return None
    path = pathlib.Path(os.path.normpath(folder / description["logger"]))
    if pathlib.Path(os.path.realpath(path)).is_relative_to(folder):
        return path
    if known is None:
        return None
    if not path.is_symlink() and any(path.glob("events.out.tfevents.*")):
        parts = [part for part in known.parts if part != ".."]
        if list(path.parent.parts[-len(parts) :]) == parts:
            return path
    raise ValueError(
        f"The run's TensorBoard log is said to be in '{path}', outside the run's folder, where no "
        "log of this run is: name its folder by --tensorboard-log FOLDER, or an empty one to go "
        "without."
    )


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
    env.env_method("set_wrapper_attr", "t_start", SteadyStart.before(seconds))


def _last_second(path: pathlib.Path) -> float:
    """The largest, not the newest: the clock may have been set back."""
    return float(read_monitor(path)[1][:, 2].max(initial=0.0))


def read_monitor(path: pathlib.Path) -> tuple[float, np.ndarray]:
    """Read a file of Monitor's.

    :param path: of the file
    :return: when it was begun, in seconds of the wall's clock; and return, length and seconds since
        then of each episode, [N, 3]
    :raises CorruptFileError: if it is damaged
    """
    try:
        header, *lines = path.read_text("utf-8").splitlines()
        start = parse_json(header.removeprefix("#"))["t_start"]
        rows = [(float(row["r"]), int(row["l"]), float(row["t"])) for row in csv.DictReader(lines)]
        episodes = np.array(rows, dtype=float).reshape(-1, 3)
        if not (is_real(start) and np.isfinite(episodes[:, 1:]).all()):
            raise ValueError("times that are no numbers")
    except (KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
        raise CorruptFileError(
            f"'{path}' is damaged, or no file of Monitor's ({short(error)}): remove it, or use "
            "another copy."
        ) from error
    return float(start), episodes


class SteadyStart(float):
    """A moment of the wall's clock from which seconds are counted that never go back.

    Monitor subtracts its start from the time of day, which somebody may set back. From this start
    the difference is what a stop-watch shows.

    :ivar started: the same moment on the system's steady clock
    """

    started: float

    @classmethod
    def before(cls, seconds: float) -> SteadyStart:
        """The moment so many seconds ago."""
        seconds = max(seconds, 0.0)
        start = cls(time.time() - seconds)
        start.started = time.monotonic() - seconds
        return start

    def __rsub__(self, now: float) -> float:
        return time.monotonic() - self.started


def steady_clock(env: VecEnv | None) -> None:
    """Let Monitor's seconds go on from where they are by a clock that nobody sets back.

    :param env: whose Monitors are changed; other wrappers stay as they are
    """
    inner: Any = env
    while hasattr(inner, "venv"):
        inner = inner.venv
    if not isinstance(inner, (DummyVecEnv, SubprocVecEnv)):
        return
    for index, monitored in enumerate(inner.env_is_wrapped(Monitor)):
        start = inner.get_attr("t_start", index)[0] if monitored else None
        if isinstance(start, float) and not isinstance(start, SteadyStart):
            steady = SteadyStart.before(time.time() - start)
            inner.env_method("set_wrapper_attr", "t_start", steady, indices=index)


def reopen_logger(folder: pathlib.Path, steps: int, verbose: int) -> Logger:
    """The logger that goes on in a run's TensorBoard folder.

    :param folder: from :func:`find_log`
    :param steps: of the checkpoint; TensorBoard drops what was logged after it
    :param verbose: whether it prints, too
    """
    directory = str(folder)
    from torch.utils.tensorboard import SummaryWriter

    SummaryWriter(directory, purge_step=steps + 1).close()
    return configure(directory, ["stdout", "tensorboard"] if verbose else ["tensorboard"])
