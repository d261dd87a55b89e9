"""Training and tuning: what `rl_zoo3.exp_manager.ExperimentManager` does differently for our runs.

Each method below wraps the zoo's own and steps aside when the run is not ours.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
from stable_baselines3.common.vec_env import SubprocVecEnv

from tdmpc2_sb3.saving import interrupts, workers
from tdmpc2_sb3.zoo import checkpoints, passwords, trust
from tdmpc2_sb3.zoo.algorithms import (
    ALGORITHMS,
    concerns_us,
    config_path,
    hyperparams_folder,
)
from tdmpc2_sb3.zoo.command_line import read_command

#: The zoo's `--eval-freq` when the user gives none.
ZOO_EVAL_FREQ = 25_000

#: How far the seed of evaluation environments is from the run's. The zoo gives both the same, so
#: that evaluations would begin in the very states in which the first training episodes did.
EVALUATION_SEEDS = 10_000

#: Seconds between the signs of life of a trial in a database; TDMPC2_SB3_HEARTBEAT changes it.
HEARTBEAT_SECONDS = 30

#: A trial is failed after so many missed signs. A long one holds the GIL now and then.
MISSED_HEARTBEATS = 4


def extend(module: ModuleType) -> None:
    """Wrap the methods of `module.ExperimentManager`; the zoo has not read its arguments yet."""
    command = read_command()
    if concerns_us(command.algo, command.env_id):
        passwords.hide()
    manager = module.ExperimentManager  # type: ignore[attr-defined]
    for name, wrap in WRAPPERS.items():
        setattr(manager, name, wrap(getattr(manager, name)))


def _ours(manager: Any) -> bool:
    return concerns_us(manager.algo, manager.env_name.gym_id)


def _init(original: Callable[..., None]) -> Callable[..., None]:
    """Find our YAML, by algorithm or by the bare file name given, and the SSM's policy."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not _ours(self):
            return
        asked = signature.bind(self, *args, **kwargs).arguments.get("config")
        if not asked:
            path = config_path(self.algo, self.env_name.gym_id)
        else:
            path = hyperparams_folder() / asked
            if Path(asked).name != asked or Path(asked).exists() or not path.is_file():
                path = None  # a path of the user's own
        if path is not None:
            self.config = str(path)
        algorithm = ALGORITHMS.get(self.algo)
        if algorithm is not None and algorithm.policy is not None:
            self.custom_hyperparams = {
                "policy": algorithm.policy,
                **(self.custom_hyperparams or {}),
            }

    return __init__


def _read_hyperparameters(original: Callable[..., Any]) -> Callable[..., Any]:
    """Serve `--trial-id 0`, which the zoo takes for none, and the YAML's own `eval_freq`."""

    @functools.wraps(original)
    def read_hyperparameters(self: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if not _ours(self):
            return original(self)
        if self.storage and self.study_name and self.trial_id == 0:
            trial = self.load_trial(self.storage, self.study_name, 0)
            self.custom_hyperparams = {**trial, **(self.custom_hyperparams or {})}
        hyperparams, saved = original(self)
        eval_freq = hyperparams.pop("eval_freq", None)
        if eval_freq is not None and self.eval_freq == ZOO_EVAL_FREQ and not _eval_freq_given():
            self.eval_freq = int(eval_freq)
        if eval_freq is not None:
            saved["eval_freq"] = self.eval_freq  # resuming reads it from the saved configuration
        return hyperparams, saved

    return read_hyperparameters


def _eval_freq_given() -> bool:
    # argparse also accepts the option's unambiguous beginnings.
    return any(argument.startswith("--eval-f") for argument in sys.argv[1:])


def _preprocess_hyperparams(original: Callable[..., Any]) -> Callable[..., Any]:
    """Give the evaluation environment the YAML's `env_kwargs`, which the zoo keeps from it, and the
    training environment alone its `train_env_kwargs`.

    And keep the YAML's checkpoint callback from trials.
    """

    @functools.wraps(original)
    def _preprocess_hyperparams(self: Any, hyperparams: dict[str, Any]) -> Any:
        ours = _ours(self)
        given = _train_env_kwargs(hyperparams) if ours else {}
        result = original(self, hyperparams)
        self.train_env_kwargs = _within_task(self.env_name.gym_id, self.env_kwargs, given)
        if ours:
            # --eval-env-kwargs adds to the training environment's and wins over them: an agent
            # trained at action repeat 2 must not be evaluated at 1 because a camera was chosen.
            self.eval_env_kwargs = {**self.env_kwargs, **(self._eval_env_kwargs_args or {})}
        if self.optimize_hyperparameters:
            self.specified_callbacks = checkpoints.without_checkpoints(self.specified_callbacks)
        return result

    return _preprocess_hyperparams


def _train_env_kwargs(hyperparams: dict[str, Any]) -> dict[str, Any]:
    """Takes them out of the hyperparameters."""
    found = hyperparams.pop("train_env_kwargs", None) or {}
    if not isinstance(found, dict):
        raise SystemExit(
            f"train_env_kwargs is {found!r}: it must be a dictionary, such as "
            "{max_episode_steps: 100} in YAML or dict(max_episode_steps=100) behind -params."
        )
    if found:
        print(f"train_env_kwargs={found}")
    return found


def _within_task(
    env_id: str, env_kwargs: dict[str, Any], train_env_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The `train_env_kwargs`, without a limit of episodes that are longer than the task's."""
    steps = train_env_kwargs.get("max_episode_steps")
    if not isinstance(steps, int):
        return train_env_kwargs
    spec = gymnasium.registry.get(env_id)
    whole = None if spec is None else spec.max_episode_steps
    repeat = {**env_kwargs, **train_env_kwargs}.get("action_repeat", 1)
    if whole is not None and steps * repeat > whole:
        print(
            f"Training has the task's whole episodes: {steps} steps (train_env_kwargs) at an "
            f"action repeat of {repeat} are more than its {whole}."
        )
        return {k: v for k, v in train_env_kwargs.items() if k != "max_episode_steps"}
    print(
        f"Training episodes have at most {steps} steps, and rollout/ep_rew_mean is of those; "
        "eval/mean_reward is of the task's whole episodes."
    )
    return train_env_kwargs


def _create_callbacks(original: Callable[..., None]) -> Callable[..., None]:
    """Let the checkpoint callback know the run's folder."""

    @functools.wraps(original)
    def create_callbacks(self: Any) -> None:
        original(self)
        self.callbacks = checkpoints.adopt(self.callbacks, self.save_path)

    return create_callbacks


def _create_envs(original: Callable[..., Any]) -> Callable[..., Any]:
    """Evaluate in other episodes than those of training, train with the `train_env_kwargs`, and let
    signals reach the main process alone: it still needs the environments to save them."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def create_envs(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _ours(self):
            return make(self, *args, **kwargs)
        seed, env_kwargs = self.seed, self.env_kwargs
        if signature.bind(self, *args, **kwargs).arguments.get("eval_env"):
            self.seed = seed + EVALUATION_SEEDS
        else:
            self.env_kwargs = {**env_kwargs, **self.train_env_kwargs}
        try:
            return make(self, *args, **kwargs)
        finally:
            self.seed, self.env_kwargs = seed, env_kwargs

    def make(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.algo not in ALGORITHMS or not issubclass(self.vec_env_class, SubprocVecEnv):
            return original(self, *args, **kwargs)
        checkpoints.spare_workers()
        env = original(self, *args, **kwargs)
        workers.kill_at_exit(env)
        return env

    return create_envs


def _learn(original: Callable[..., None]) -> Callable[..., None]:
    """Keep the environment open until the model is saved.

    The zoo closes it first, and the episode in progress, which the saved model continues when
    training is resumed, would be lost.
    """

    @functools.wraps(original)
    def learn(self: Any, model: Any) -> None:
        if self.algo not in ALGORITHMS:
            original(self, model)
            return
        env = model.env
        _innermost(env).close = lambda: None
        try:
            self._run_lock = checkpoints.lock(self.save_path)
            with interrupts.ending_signals():
                original(self, model)
        except workers.WorkerDiedError as error:
            _close(env)
            raise SystemExit(f"{error}") from error
        except BaseException:
            _close(env)
            raise

    return learn


def _save_trained_model(original: Callable[..., None]) -> Callable[..., None]:
    """Write a last checkpoint beside the model, from which a stopped run goes on.

    What SIGTERM or SIGHUP stopped then ends with the exit code that a shell gives to the signal.
    """

    @functools.wraps(original)
    def save_trained_model(self: Any, model: Any) -> None:
        if self.algo not in ALGORITHMS:
            original(self, model)
            return
        signum = interrupts.ended_by()
        try:
            interrupts.drop_closed_output()
            original(self, model)
            checkpoints.write_last(self.callbacks, model, self.n_timesteps)
        except KeyboardInterrupt as stop:  # pressed again, while this was written
            checkpoints.tell_last(self.callbacks)
            raise SystemExit(128 + getattr(stop, "signum", signal.SIGINT)) from None
        finally:
            _close(model.env)
            if self.__dict__.get("_run_lock") is not None:
                self._run_lock.close()
        if signum is not None:
            raise SystemExit(128 + signum)

    return save_trained_model


def _innermost(env: Any) -> Any:
    """The environments below all wrappers: VecNormalize pickles what is set on itself."""
    while hasattr(env, "venv"):
        env = env.venv
    return env


def _close(env: Any) -> None:
    _innermost(env).__dict__.pop("close", None)  # uncovers the class's own
    if getattr(_innermost(env), "waiting", False):
        workers.kill(env)  # in a step that was broken off: some have answered, and will not again
    with contextlib.suppress(EOFError, BrokenPipeError):  # workers that Ctrl-C has ended
        env.close()


def _save_config(original: Callable[..., None]) -> Callable[..., None]:
    """Write no password, and let the checkpoint callback know the command that resumes the run."""

    @functools.wraps(original)
    def _save_config(self: Any, saved_hyperparams: dict[str, Any]) -> None:
        original(self, saved_hyperparams)
        command = Path(self.params_path) / "command.txt"
        if _ours(self) and command.is_file():
            command.write_text(passwords.mask(command.read_text()))
        if self.algo in ALGORITHMS:
            advise(self, vars(self.args), saved_hyperparams)

    return _save_config


def advise(manager: Any, args: dict[str, Any], config: dict[str, Any]) -> None:
    """Let a run's checkpoint callbacks know the command that resumes it.

    :param manager: the zoo's, with the run's callbacks and folder
    :param args: options of the run's command line
    :param config: its hyperparameters
    """
    arguments = [trust.OPTION] if trust.foreign_code(args, config) else []
    command = checkpoints.resume_command(manager.save_path, arguments)
    checkpoints.advise(manager.callbacks, manager.save_path, command)


def _optimization(original: Callable[..., None]) -> Callable[..., None]:
    """Open a database study with a heartbeat: the zoo hands Optuna a plain URL, without one."""

    @functools.wraps(original)
    def hyperparameters_optimization(self: Any) -> None:
        if not _ours(self) or not self.storage or "://" not in self.storage:
            original(self)
            return
        with _studies_with_heartbeat(self.storage):
            original(self)

    return hyperparameters_optimization


def heartbeat_storage(url: str) -> Any:
    """Return an Optuna database storage that fails and requeues the trials of dead workers.

    A worker signs every 30 s. A trial without a sign for 120 s is failed by whichever worker starts
    its next trial, and queued again with the same parameters, three times at most.

    :param url: SQLAlchemy's address of the database, such as `postgresql+psycopg://...`
    """
    import optuna

    interval = int(os.environ.get("TDMPC2_SB3_HEARTBEAT", HEARTBEAT_SECONDS))
    return optuna.storages.RDBStorage(
        url,
        heartbeat_interval=interval,
        grace_period=MISSED_HEARTBEATS * interval,
        heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(
            max_retry=3
        ),
    )


@contextlib.contextmanager
def _studies_with_heartbeat(url: str) -> Iterator[None]:
    import optuna

    create_study = optuna.create_study

    @functools.wraps(create_study)
    def create(**kwargs: Any) -> Any:
        if kwargs.get("storage") == url:
            kwargs["storage"] = heartbeat_storage(url)
        return create_study(**kwargs)

    optuna.create_study = create
    try:
        yield
    finally:
        optuna.create_study = create_study


WRAPPERS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "__init__": _init,
    "read_hyperparameters": _read_hyperparameters,
    "_preprocess_hyperparams": _preprocess_hyperparams,
    "create_callbacks": _create_callbacks,
    "create_envs": _create_envs,
    "_save_config": _save_config,
    "learn": _learn,
    "save_trained_model": _save_trained_model,
    "hyperparameters_optimization": _optimization,
}
