"""What the zoo's runs do so that they can be resumed; `resume.py` then resumes them.

The YAML names :class:`tdmpc2_sb3.callbacks.ResumableCheckpointCallback`. Here it learns the run's
folder, stays out of tuning, and writes a last checkpoint when the run ends or a
signal stops it.
"""

from __future__ import annotations

import multiprocessing.forkserver
import shlex
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from tdmpc2_sb3.callbacks import ResumableCheckpointCallback
from tdmpc2_sb3.saving import interrupts

CALLBACK_NAME = f"{ResumableCheckpointCallback.__module__}.{ResumableCheckpointCallback.__name__}"

#: Locked while a process works in the run's folder; the lock goes with the process.
LOCK_FILE = ".running"


def is_checkpoint_entry(entry: Any) -> bool:
    """Whether an entry of the YAML's `callback` names ours: a name, or a name with arguments."""
    return CALLBACK_NAME in entry if isinstance(entry, dict) else entry == CALLBACK_NAME


def specified(callback: Any) -> list[Any]:
    """The entries of the YAML's `callback`: the zoo takes one or a list."""
    if callback is None:
        return []
    return callback if isinstance(callback, list) else [callback]


def without_checkpoints(callback: Any) -> list[Any]:
    """The YAML's callbacks for a trial: it is not resumed, and trials share one folder."""
    return [entry for entry in specified(callback) if not is_checkpoint_entry(entry)]


def adopt(callbacks: list[Any], folder: str) -> list[Any]:
    """Tell the checkpoint callbacks the run's folder and put them last.

    A checkpoint then holds what the others did in the same step; and the zoo closes the first
    callback's progress bar, whatever that callback is.

    :param callbacks: of the run
    :param folder: of the run
    :return: the same callbacks in their new order
    """
    ours = [each for each in callbacks if isinstance(each, ResumableCheckpointCallback)]
    for each in ours:
        if each.folder is None:
            each.folder = Path(folder)
    return [each for each in callbacks if each not in ours] + ours


def resume_command(folder: str | Path, arguments: Iterable[str] = ()) -> str:
    """The command that goes on with a run.

    :param folder: of the run
    :param arguments: that it needs besides
    """
    return shlex.join(["python", "-m", "tdmpc2_sb3.zoo", "resume", str(folder), *arguments])


def advise(callbacks: list[Any], folder: str, command: str) -> None:
    """Let the run's checkpoint callbacks know the command that resumes it.

    :param callbacks: of the run
    :param folder: of the run; who writes elsewhere is not resumed by it
    :param command: from :func:`resume_command`
    """
    for each in callbacks:
        if isinstance(each, ResumableCheckpointCallback) and each.folder == Path(folder):
            each.advice = command


def write_last(callbacks: list[Any], model: Any, total_steps: int) -> None:
    """Write a checkpoint of the ended run, and say how to go on if it was stopped early.

    :param callbacks: of the run
    :param model: as it is now
    :param total_steps: that the run was to make
    """
    ours = [each for each in callbacks if isinstance(each, ResumableCheckpointCallback)]
    written = [each for each in ours if each.wrote_last or each.write() is not None]
    if model.num_timesteps >= total_steps or not written:
        return
    print(f"Stopped after {model.num_timesteps} of {total_steps} steps. To go on:")
    for each in written:
        print(f"  {each.advice or each.describe_last()}")
    if interrupts.broken_off():
        print("The last step was broken off: the resumed run starts with new episodes.")


def tell_last(callbacks: list[Any]) -> None:
    """Say how to go on with a run that ends before all is saved.

    :param callbacks: of the run
    """
    print("Stopped while the model was saved; the file that was there is unchanged.")
    for each in callbacks:
        if isinstance(each, ResumableCheckpointCallback):
            print(each.describe_last())


def spare_workers() -> None:
    """Let environment processes that are started from now on ignore the signals that stop a run.

    A terminal and a cluster send them to the whole group of processes; without its environments the
    model could not save the episodes in progress. They end with the main process.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return
    if threading.current_thread() is not threading.main_thread():
        return
    # They are copies of the server, which this process starts once: all inherit what it ignores.
    before = {
        each: signal.signal(each, signal.SIG_IGN)
        for each in (signal.SIGINT, *interrupts.ENDING_SIGNALS)
    }
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def lock(folder: str | Path) -> IO[str] | None:
    """Claim a run's folder until the returned file is closed or the process ends.

    :param folder: of the run
    :return: None where the file system has no locks
    :raises RuntimeError: if a process works in it
    """
    file = open(Path(folder) / LOCK_FILE, "a")  # noqa: SIM115  (it stays open)
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise RuntimeError(
            f"A process is still at work in '{folder}': wait for it, or stop it first (runs that "
            "start at the same moment need --uuid)."
        ) from error
    except (ImportError, OSError):
        file.close()
        return None
    return file
