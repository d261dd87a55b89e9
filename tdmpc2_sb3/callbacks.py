"""Checkpoints from which a run resumes exactly, whenever it was killed."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    EventCallback,
)
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecNormalize

Algorithm = TypeVar("Algorithm", bound=BaseAlgorithm)

CHECKPOINT_PREFIX = "checkpoint_"
MODEL_FILE = "model.zip"
BUFFER_FILE = "replay_buffer.zip"
NORMALIZER_FILE = "vecnormalize.pkl"
CALLBACKS_FILE = "callbacks.json"
# What callbacks remember that a run's course or its files depend on.
CALLBACK_COUNTERS = ("n_calls", "best_mean_reward", "last_mean_reward", "last_time_trigger")


class ResumableCheckpointCallback(BaseCallback):
    """Writes model, replay buffer and the callbacks' counters together, every so many steps.

    Each checkpoint is a folder that appears under its name when it is complete, and only then is
    the one before removed: at any moment a killed process leaves one from which
    :func:`load_checkpoint` goes on exactly.

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

    def _on_training_start(self) -> None:
        self._last_steps = self.num_timesteps
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
            assert self.folder is not None
            path = write_checkpoint(self.model, self.folder, self.locals.get("callback"))
            if self.verbose >= 1:
                print(f"Checkpoint written: {path}")
        self._last_steps = self.num_timesteps
        return True


def walk_callbacks(callback: BaseCallback) -> Iterator[BaseCallback]:
    """The callback and all that it contains, depth first."""
    yield callback
    children: list[BaseCallback | None] = []
    if isinstance(callback, CallbackList):
        children = list(callback.callbacks)
    elif isinstance(callback, EventCallback):
        children = [callback.callback, getattr(callback, "callback_on_new_best", None)]
    for child in children:
        if child is not None:
            yield from walk_callbacks(child)


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
    if final.exists():  # the same step again: never a moment without a complete checkpoint
        final = final.with_name(f"{final.name}.1")
        shutil.rmtree(final, ignore_errors=True)
    partial = folder / f".{final.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model.save(partial / MODEL_FILE)
        model.save_replay_buffer(partial / BUFFER_FILE)  # type: ignore[attr-defined]
        normalizer = model.get_vec_normalize_env()
        if normalizer is not None:
            normalizer.save(str(partial / NORMALIZER_FILE))
        counters = [] if callback is None else callback_counters(callback)
        (partial / CALLBACKS_FILE).write_text(json.dumps(counters))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    os.replace(partial, final)
    for old in folder.glob(f"{CHECKPOINT_PREFIX}*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    for leftover in folder.glob(f".{CHECKPOINT_PREFIX}*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    return final


def latest_checkpoint(folder: str | os.PathLike[str]) -> pathlib.Path | None:
    """The newest complete checkpoint of a run's folder, None if there is none."""
    return max(pathlib.Path(folder).glob(f"{CHECKPOINT_PREFIX}*"), default=None)


def callback_counters(callback: BaseCallback) -> list[dict[str, Any]]:
    """Class and counters of every callback, in order."""
    return [
        {
            "class": type(each).__name__,
            **{
                name: float(getattr(each, name)) if "reward" in name else int(getattr(each, name))
                for name in CALLBACK_COUNTERS
                if hasattr(each, name)
            },
        }
        for each in walk_callbacks(callback)
    ]


class RestoreCallbacks(BaseCallback):
    """Puts the callbacks' counters, and the evaluations made so far, back when training starts.

    :param checkpoint: folder of a checkpoint
    """

    def __init__(self, checkpoint: str | os.PathLike[str]):
        super().__init__()
        text = (pathlib.Path(checkpoint) / CALLBACKS_FILE).read_text()
        self._counters: list[dict[str, Any]] = json.loads(text)

    def _on_training_start(self) -> None:
        waiting = list(self._counters)
        for callback in walk_callbacks(self.locals["callback"]):
            name = type(callback).__name__
            match = next((counters for counters in waiting if counters["class"] == name), None)
            if match is None:
                continue
            waiting.remove(match)
            for key, value in match.items():
                if key != "class":
                    setattr(callback, key, value)
            if isinstance(callback, EvalCallback):
                self._reload_evaluations(callback)

    def _reload_evaluations(self, callback: EvalCallback) -> None:
        """EvalCallback writes its file anew at each evaluation; what it held must not be lost."""
        path = pathlib.Path(f"{callback.log_path}.npz") if callback.log_path else None
        if path is None or not path.is_file():
            return
        with np.load(path) as saved:
            keep = saved["timesteps"] <= self.model.num_timesteps
            callback.evaluations_timesteps = saved["timesteps"][keep].tolist()
            callback.evaluations_results = [list(row) for row in saved["results"][keep]]
            callback.evaluations_length = [list(row) for row in saved["ep_lengths"][keep]]
            if "successes" in saved:
                callback.evaluations_successes = [list(row) for row in saved["successes"][keep]]

    def _on_step(self) -> bool:
        return True


def load_checkpoint(
    algorithm: type[Algorithm],
    folder: str | os.PathLike[str],
    env: GymEnv,
    **kwargs: Any,
) -> tuple[Algorithm, RestoreCallbacks]:
    """The run as its newest checkpoint left it.

    Go on by ``model.learn(steps, callback=[restore, ...], reset_num_timesteps=False)`` with the
    steps that are left and the run's own callbacks.

    :param algorithm: the algorithm's class, such as ``TDMPC2``
    :param folder: of the run, or of one checkpoint in it
    :param env: made as for the run
    :param kwargs: further arguments of ``algorithm.load``
    :return: the model with its replay buffer, and a callback that restores the other callbacks
    :raises FileNotFoundError: if the folder holds no checkpoint
    """
    path = pathlib.Path(folder)
    if not (path / MODEL_FILE).is_file():
        newest = latest_checkpoint(path)
        if newest is None:
            raise FileNotFoundError(
                f"No checkpoint in '{path}': pass the folder of a run that used "
                "ResumableCheckpointCallback."
            )
        path = newest
    model = algorithm.load(path / MODEL_FILE, env=env, **kwargs)
    model.load_replay_buffer(path / BUFFER_FILE)  # type: ignore[attr-defined]
    normalizer = model.get_vec_normalize_env()
    if normalizer is not None and (path / NORMALIZER_FILE).is_file():
        saved = VecNormalize.load(str(path / NORMALIZER_FILE), normalizer.venv)
        normalizer.obs_rms, normalizer.ret_rms = saved.obs_rms, saved.ret_rms
    return model, RestoreCallbacks(path)
