"""Checkpoints from which a run resumes exactly, whenever it was killed; how long a run takes."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecNormalize
from tqdm import tqdm

from tdmpc2_sb3.saving import checkpoint_files, interrupts, log_files
from tdmpc2_sb3.saving.attribute_checks import short
from tdmpc2_sb3.saving.callback_state import RestoreCallbacks, callback_states, walk_callbacks
from tdmpc2_sb3.saving.checkpoint_files import BUFFER_FILE, MODEL_FILE, RUN_FILE, read_run
from tdmpc2_sb3.saving.files import CorruptFileError, atomic_write, sync_folder
from tdmpc2_sb3.saving.json_codec import encode
from tdmpc2_sb3.saving.workers import WorkerDiedError

Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)

CHECKPOINT_PREFIX = "checkpoint_"
_NAME = re.compile(rf"{CHECKPOINT_PREFIX}\d{{1,18}}(\.\d{{1,9}})?", re.ASCII)


class ResumableCheckpointCallback(BaseCallback):
    """Writes model, replay buffer and the callbacks' counters together, every so many steps.

    Each checkpoint is a folder that appears under its name when it is complete, and only then is
    the one before removed: at any moment a killed process leaves one from which
    :func:`load_checkpoint` goes on exactly. TD-MPC2 writes a last one when Ctrl-C, SIGTERM or
    SIGHUP ends its training, see :func:`last_checkpoint`.

    :param save_freq: agent steps between checkpoints
    :param folder: where they go; None takes the folder of the run's EvalCallback or log, as in the
        zoo's runs
    :param verbose: 0 silent, 1 says when one was written
    :raises ValueError: if ``save_freq`` is below 1
    """

    def __init__(
        self,
        save_freq: int = 10_000,
        folder: str | os.PathLike[str] | None = None,
        verbose: int = 0,
    ):
        super().__init__(verbose)
        if save_freq < 1:
            raise ValueError(f"save_freq is {save_freq}: it must be at least 1 step.")
        self.save_freq = save_freq
        self.folder = None if folder is None else pathlib.Path(folder)
        self._last_steps = 0
        #: How to go on from the last checkpoint, for people; None tells of load_checkpoint.
        self.advice: str | None = None
        #: Whether the end of training by a signal was written.
        self.wrote_last = False

    def _on_training_start(self) -> None:
        self._last_steps = self.num_timesteps
        self.wrote_last = False
        if self.folder is None:
            self.folder = self._find_folder()

    def _find_folder(self) -> pathlib.Path:
        for callback in walk_callbacks(self.locals["callback"]):
            if isinstance(callback, EvalCallback) and callback.best_model_save_path is not None:
                return pathlib.Path(callback.best_model_save_path)
        directory = self.logger.get_dir()
        if directory is not None:
            return pathlib.Path(directory)
        raise ValueError(
            "ResumableCheckpointCallback does not know where to write: pass folder=..., or use it "
            "beside an EvalCallback or with a logger that has a folder."
        )

    def _on_step(self) -> bool:
        # num_timesteps grows by the number of environments, so a multiple may be stepped over.
        if self.num_timesteps // self.save_freq > self._last_steps // self.save_freq:
            self.write()
        self._last_steps = self.num_timesteps
        return True

    def write(self) -> pathlib.Path | None:
        """Writes a checkpoint now, such as after Ctrl-C.

        :return: the checkpoint's folder; None if training has not started
        """
        if self.folder is None or "callback" not in getattr(self, "locals", {}):
            return None
        path = write_checkpoint(self.model, self.folder, self.locals["callback"])
        if self.verbose >= 1:
            print(f"Checkpoint written: {path}")
        return path

    def describe_last(self) -> str:
        """One sentence: which checkpoint is the last, and how to go on from it."""
        newest = None if self.folder is None else latest_checkpoint(self.folder)
        if newest is None:
            return f"No checkpoint was written yet: the first is due after {self.save_freq} steps."
        advice = self.advice or f"tdmpc2_sb3.callbacks.load_checkpoint(..., '{self.folder}', env)"
        return f"The last checkpoint is '{newest}'. To go on: {advice}"


@contextlib.contextmanager
def last_checkpoint(callback: BaseCallback) -> Iterator[None]:
    """Write a last checkpoint when a signal ends the block, or tell of the one there is.

    Only a training with a :class:`ResumableCheckpointCallback` is ended so by SIGTERM and SIGHUP.

    :param callback: of the training that is the block
    :raises KeyboardInterrupt: at Ctrl-C; at SIGTERM and SIGHUP :class:`interrupts.Ended`
    :raises WorkerDiedError: if a process of an environment has died
    """
    ours = [
        each for each in walk_callbacks(callback) if isinstance(each, ResumableCheckpointCallback)
    ]
    with interrupts.ending_signals() if ours else contextlib.nullcontext():
        try:
            yield
        except KeyboardInterrupt:
            for each in ours:
                try:
                    each.wrote_last = each.write() is not None
                except OSError as error:  # a full disk is no reason to lose what else is saved
                    print(error, file=sys.stderr)
            raise
        except WorkerDiedError as error:
            raise WorkerDiedError(" ".join([str(error), *(e.describe_last() for e in ours)])) from (
                error.__cause__
            )


def write_checkpoint(
    model: BaseAlgorithm, folder: pathlib.Path, callback: BaseCallback | None = None
) -> pathlib.Path:
    """Writes a complete checkpoint, then removes older ones.

    :param model: saved with its replay buffer and, if there is one, VecNormalize's statistics
    :param folder: of the run
    :param callback: whose counters are kept
    :return: the checkpoint's folder
    :raises OSError: if the disk is full; the previous checkpoint stays
    """
    final = folder / f"{CHECKPOINT_PREFIX}{model.num_timesteps:012d}"
    newest = latest_checkpoint(folder)
    if newest is not None and _order(newest)[0] == model.num_timesteps:
        # The same step again, under a later name: never a moment without a complete checkpoint.
        final = final.with_name(f"{final.name}.{_order(newest)[1] + 1}")
    partial = folder / f".{final.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model.save(partial / MODEL_FILE)
        model.save_replay_buffer(partial / BUFFER_FILE)  # type: ignore[attr-defined]
        run = {
            "num_timesteps": model.num_timesteps,
            "callbacks": [] if callback is None else callback_states(callback, model),
            "files": log_files.describe(folder, getattr(model, "_logger", None)),
            "normalizer": _normalizer_statistics(model.get_vec_normalize_env()),
            "digests": checkpoint_files.digests(partial),
        }
        text = json.dumps(encode(run, "run")).encode()

        def writer(file: IO[bytes]) -> None:
            file.write(text)

        atomic_write(partial / RUN_FILE, writer)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.replace(partial, final)
    sync_folder(folder)
    for old in folder.glob(f"{CHECKPOINT_PREFIX}*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob(f".{CHECKPOINT_PREFIX}*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    return final


def _running_means(normalizer: VecNormalize) -> dict[str, RunningMeanStd]:
    """Every running mean of observations (of each key, if there are several) and of returns."""
    observations = getattr(normalizer, "obs_rms", {})  # absent if they are not normalised
    if not isinstance(observations, dict):
        return {"returns": normalizer.ret_rms, "observations": observations}
    keys = {f"observations/{key}": value for key, value in observations.items()}
    return {"returns": normalizer.ret_rms, **keys}


def _normalizer_statistics(normalizer: VecNormalize | None) -> dict[str, Any]:
    if normalizer is None:
        return {}
    return {
        name: {"mean": np.asarray(each.mean), "var": np.asarray(each.var), "count": each.count}
        for name, each in _running_means(normalizer).items()
    }


def _restore_means(
    means: dict[str, RunningMeanStd], saved: dict[str, Any], checkpoint: pathlib.Path
) -> None:
    own = {name: np.shape(mean.mean) for name, mean in means.items()}
    there = {name: np.shape(statistics["mean"]) for name, statistics in saved.items()}
    if own != there:
        raise CorruptFileError(
            f"'{checkpoint}' holds VecNormalize's statistics of the shapes {short(there)}, and "
            f"this run has {short(own)}: use another copy, or normalize as the run did."
        )
    for name, mean in means.items():
        vars(mean).update(saved[name])


def _checkpoints(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
    """The complete checkpoints of a run's folder, the newest first."""
    found = pathlib.Path(folder).glob(f"{CHECKPOINT_PREFIX}*")
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_order, reverse=True)


def latest_checkpoint(folder: str | os.PathLike[str]) -> pathlib.Path | None:
    """The newest complete checkpoint of a run's folder, None if there is none."""
    return next(iter(_checkpoints(folder)), None)


def _order(checkpoint: pathlib.Path) -> tuple[int, int]:
    """Steps, and how many checkpoints of the same step came before."""
    steps, _, again = checkpoint.name.removeprefix(CHECKPOINT_PREFIX).partition(".")
    return int(steps), int(again or 0)


def sound_checkpoint(folder: str | os.PathLike[str]) -> pathlib.Path | None:
    """The newest checkpoint that can be resumed from, None if there is none at all.

    Says so where that is not the newest one.

    :raises CorruptFileError: if there are checkpoints and none of them can
    """
    fault: Exception | None = None
    for path in _checkpoints(folder):
        try:
            checkpoint_files.check(path)
        except (ValueError, OSError) as error:
            print(f"The checkpoint '{path}' is left out: {error}", file=sys.stderr)
            fault = error
        else:
            return path
    if fault is not None:
        raise CorruptFileError(
            f"No checkpoint in '{folder}' can be resumed from: use another copy of the folder, or "
            "start the run again."
        ) from fault
    return None


def load_checkpoint(
    algorithm: type[Algorithm],
    folder: str | os.PathLike[str],
    env: GymEnv,
    **kwargs: Any,
) -> tuple[Algorithm, RestoreCallbacks]:
    """The run as its newest checkpoint left it, or the one before if that is damaged.

    Go on by ``model.learn(steps, callback=[restore, ...], reset_num_timesteps=False)`` with the
    steps that are left and the run's own callbacks.

    :param algorithm: the algorithm's class, such as ``TDMPC2``
    :param folder: of the run, or of one checkpoint in it
    :param env: made as for the run
    :param kwargs: further arguments of ``algorithm.load``
    :return: the model with its replay buffer, and a callback that restores the other callbacks
    :raises FileNotFoundError: if the folder holds no checkpoint
    :raises ValueError: if none can be resumed from: damaged, or files of different runs
    """
    path = pathlib.Path(folder)
    if (path / RUN_FILE).is_file():  # a run's own folder may well hold a model.zip
        checkpoint_files.check(path)
    else:
        newest = sound_checkpoint(path)
        if newest is None:
            raise FileNotFoundError(
                f"No checkpoint in '{path}': pass the folder of a run that used "
                "ResumableCheckpointCallback."
            )
        path = newest
    model = algorithm.load(path / MODEL_FILE, env=env, **kwargs)
    model.load_replay_buffer(path / BUFFER_FILE)  # type: ignore[attr-defined]
    run = read_run(path)
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None:
        _restore_means(_running_means(normalizer), run["normalizer"], path)
    return model, RestoreCallbacks(run["callbacks"])


class Forecast:
    """Says once, when its speed is known, how long a run will take.

    The first random steps are a hundred times as fast as those that plan and learn, so what
    progress bars and logs tell early is far off.

    :param total_steps: agent steps at which the run ends
    :param say: is given the line
    """

    MIN_STEPS, MIN_SECONDS = 50, 3.0

    def __init__(self, total_steps: int, say: Callable[[str], None]):
        self.total_steps = total_steps
        self.say = say
        self._begin: tuple[int, float] | None = None
        self._said = False

    def after(self, steps: int) -> None:
        """Call it after every step that planned and learnt.

        :param steps: agent steps of the run so far
        """
        if self._said:
            return
        now = time.monotonic()
        if self._begin is None:
            self._begin = steps, now
            return
        first, begin = self._begin
        made, seconds = steps - first, now - begin
        if made < self.MIN_STEPS or seconds < self.MIN_SECONDS:
            return
        self._said = True
        rate, left = made / seconds, self.total_steps - steps
        if left / rate < 60:
            return
        self.say(
            f"{rate:.3g} steps a second on this machine: the {left} steps left take about "
            f"{tqdm.format_interval(left / rate)}, evaluations apart."
        )
