"""`python -m tdmpc2_sb3.zoo resume RUN`: go on with a run that was stopped or killed.

The zoo's own ExperimentManager rebuilds the run from its `args.yml` and `config.yml`; what differs
is below: the model comes from the newest checkpoint, and the folder and its logs are continued.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import gymnasium
import torch as th
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import ALGOS
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecNormalize

from tdmpc2_sb3.callbacks import CHECKPOINT_PREFIX, load_checkpoint, sound_checkpoint
from tdmpc2_sb3.saving import log_files
from tdmpc2_sb3.saving.archive import read_archive
from tdmpc2_sb3.saving.attribute_checks import short
from tdmpc2_sb3.saving.checkpoint_files import read_run
from tdmpc2_sb3.zoo import checkpoints, run_options, trust
from tdmpc2_sb3.zoo.algorithms import ALGORITHMS
from tdmpc2_sb3.zoo.experiments import advise
from tdmpc2_sb3.zoo.register import install
from tdmpc2_sb3.zoo.yaml_files import read_yaml

#: Characters of a command line that is printed.
MAX_COMMAND = 10_000


class Run(NamedTuple):
    """A run's folder, as the zoo's train wrote it.

    :param folder: absolute path
    :param args: the command line's options
    :param config: the hyperparameters from which it is made again
    """

    folder: Path
    args: dict[str, Any]
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """The environment's name in file names."""
        return str(self.args["env"]).replace("/", "-")

    @property
    def total_steps(self) -> int:
        """Steps that the run was to make."""
        asked = int(self.args["n_timesteps"])
        return asked if asked > 0 else int(self.config.get("n_timesteps", 0))

    def finished_steps(self) -> int:
        """Steps of the final model, 0 if there is none."""
        path = self.folder / f"{self.name}.zip"
        return read_archive(path, "cpu")[0]["num_timesteps"] if path.is_file() else 0


def find_run(folder: str | Path) -> Run:
    """Read a run's options and hyperparameters.

    :param folder: such as `logs/tdmpc2/DMC-walker-walk-v0_1`
    :raises ValueError: if it is no run of ours
    """
    path = Path(folder).resolve()
    found = sorted(path.glob("*/args.yml"))
    if len(found) != 1:
        state = "holds no args.yml" if path.is_dir() else "does not exist"
        raise ValueError(
            f"'{folder}' {state}: name the folder of a run, "
            "such as logs/tdmpc2/DMC-walker-walk-v0_1."
        )
    log_files.check_confined(path)
    args = read_yaml(found[0])
    missing = [key for key in run_options.NAMING_OPTIONS if key not in args]
    if missing:
        raise ValueError(f"'{found[0]}' lacks {', '.join(missing)}: it is no file of the zoo's.")
    run_options.check(args, run_options.NAMING_OPTIONS, f"'{found[0]}'")
    if args["algo"] not in ALGORITHMS:
        raise ValueError(
            f"'{folder}' is a run of {args['algo']}: only {' and '.join(ALGORITHMS)} can be "
            "resumed; continue others with the zoo's --trained-agent."
        )
    known = {**run_options.OPTIONS, **run_options.OTHER_OPTIONS}
    run_options.check(args, known, f"'{found[0]}'")
    config = found[0].with_name("config.yml")
    run = Run(path, args, run_options.hyperparameters(read_yaml(config), f"'{config}'"))
    if run.total_steps < 1:
        raise ValueError(f"'{config}' lacks n_timesteps: use another copy, or give -n.")
    return run


class _Continued:
    """A model whose `learn` makes the steps that are left of a total, as the zoo calls it."""

    def __init__(self, model: Any):
        self._model = model
        self.env = model.env

    def learn(self, total_timesteps: int, **kwargs: Any) -> None:
        left = max(0, total_timesteps - self._model.num_timesteps)
        self._model.learn(left, reset_num_timesteps=False, **kwargs)


class ResumedExperiment(ExperimentManager):
    """The zoo's experiment, continued in its folder from a checkpoint.

    :param run: to continue
    :param checkpoint: to start from
    :param log: TensorBoard's folder, None for none
    :param device: in place of the run's own, None to keep that
    """

    def __init__(self, run: Run, checkpoint: Path, log: Path | None, device: str | None = None):
        args = run.args
        super().__init__(
            argparse.Namespace(algo=args["algo"], env=args["env"]),
            args["algo"],
            args["env"],
            str(run.folder.parent.parent),
            n_timesteps=run.total_steps,
            # The YAML's, unless the command line had one: `experiments.py` wrote what it took.
            eval_freq=run.config.get("eval_freq", args["eval_freq"]),
            n_eval_episodes=args["eval_episodes"],
            save_freq=args["save_freq"],
            env_kwargs=args["env_kwargs"],
            eval_env_kwargs=args["eval_env_kwargs"],
            seed=args["seed"],
            log_interval=args["log_interval"],
            save_replay_buffer=args["save_replay_buffer"],
            verbose=args["verbose"],
            vec_env_type=args["vec_env"],
            n_eval_envs=args["n_eval_envs"],
            device=args["device"] if device is None else device,
            show_progress=args["progress"],
        )
        self.run = run
        self.checkpoint = checkpoint
        self.log = log
        self.continue_training = True
        self.save_path = str(run.folder)
        self.params_path = str(run.folder / run.name)

    @staticmethod
    def is_robotics_env(env_id: str) -> bool:
        """False, so that the zoo leaves Monitor's arguments to `create_envs` below."""
        return False

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        config = {key: value for key, value in self.run.config.items() if key != "eval_freq"}
        return {**config, "n_timesteps": self.run.total_steps}, self.run.config

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> Any:
        env_id = self.env_name.gym_id
        kwargs = dict(self.monitor_kwargs)
        if ExperimentManager.is_robotics_env(env_id) or "parking-v0" in env_id:
            kwargs.setdefault("info_keywords", ("is_success",))
        logged = any(self.run.folder.glob(log_files.MONITOR_FILES))
        self.monitor_kwargs = {**kwargs, "override_existing": not logged}
        try:
            return super().create_envs(n_envs, eval_env, no_log)
        except ValueError:
            raise
        except Exception as error:  # whatever environments and wrappers say to odd arguments
            raise ValueError(
                f"The environment '{env_id}' cannot be made with the run's env_kwargs and wrappers "
                f"({short(error)})."
            ) from error

    def _maybe_normalize(self, env: Any, eval_env: bool) -> Any:
        """The zoo's, but that it would unpickle what the working directory has for statistics."""
        if not self.normalize:
            return env
        evaluating = {"norm_reward": False, "training": False} if eval_env else {}
        return VecNormalize(env, **{**self.normalize_kwargs, **evaluating})

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: Any) -> Any:
        described = read_run(self.checkpoint)
        log_files.continue_clock(self.run.folder, env)
        model, restore = load_checkpoint(
            ALGOS[self.algo],
            self.checkpoint,
            env,
            device=self.device,
            verbose=self.verbose,
            tensorboard_log=None,
        )
        if self.log is not None:
            steps = described["num_timesteps"]
            model.set_logger(log_files.reopen_logger(self.log, steps, self.verbose))
        # Behind the progress bar, which the zoo expects first.
        self.callbacks.insert(1 if self.show_progress else 0, restore)
        return model

    def _save_config(self, saved_hyperparams: dict[str, Any]) -> None:
        """Keeps the run's own files."""
        advise(self, self.run.args, self.run.config)
        print(f"Log path: {self.save_path}")

    def learn(self, model: Any) -> None:
        super().learn(_Continued(model))  # type: ignore[arg-type]


def _read_command(file: Path) -> str:
    """The command in a run's folder, if it is one line that may be printed."""
    if not file.is_file():
        return "the same command"
    with file.open("rb") as opened:
        command = opened.read(MAX_COMMAND + 1).decode(errors="replace").strip()
    if len(command) > MAX_COMMAND or not command.isprintable():
        return "the same command (command.txt holds more than one line of text)"
    return command


def _explain_missing_checkpoint(run: Run) -> str:
    entries = checkpoints.specified(run.config.get("callback"))
    ours = next((entry for entry in entries if checkpoints.is_checkpoint_entry(entry)), None)
    command = _read_command(run.folder / run.name / "command.txt")
    if "--seed" not in command:
        command += f" --seed {run.args['seed']}"
    if ours is None:
        reason = f"its hyperparameters name no {checkpoints.CALLBACK_NAME}"
    else:
        freq = ours[checkpoints.CALLBACK_NAME].get("save_freq") if isinstance(ours, dict) else None
        reason = f"the first is written after {freq or 10_000} steps"
    return f"'{run.folder}' has no checkpoint: {reason}. Start again with:\n  {command}"


def find_checkpoint(run: Run) -> Path:
    """Return the newest sound checkpoint of a run in which no process is at work.

    :raises FileNotFoundError: if it has written none
    :raises ValueError: if all are damaged
    :raises RuntimeError: if a process is still at work in it
    """
    held = checkpoints.lock(run.folder)
    if held is not None:
        held.close()
    checkpoint = sound_checkpoint(run.folder)
    if checkpoint is None:
        raise FileNotFoundError(_explain_missing_checkpoint(run))
    return checkpoint


def find_log(run: Run, checkpoint: Path, asked: str | None) -> Path | None:
    """Return the TensorBoard folder in which a run goes on, None for none.

    :param run: from :func:`find_run`
    :param checkpoint: from :func:`find_checkpoint`
    :param asked: in place of the run's own; empty for none
    :raises ValueError: if the run's own lies where the run's options do not lead
    """
    if asked is not None:
        return Path(asked).absolute() if asked else None
    given = run.args.get("tensorboard_log")
    known = PurePath(os.path.normpath(str(given)), run.name) if given else None
    return log_files.find_log(run.folder, read_run(checkpoint)["files"], known)


def import_packages(run: Run, trusted: bool) -> None:
    """Import the packages that a run's command line named, if all that it would run is trusted.

    :param run: from :func:`find_run`
    :param trusted: whether the caller has said so
    :raises ValueError: naming what would run, or an environment that is not known
    """
    found = trust.foreign_code(run.args, run.config)
    if found and not trusted:
        listed = "".join(f"\n  {each}" for each in found)
        raise ValueError(
            f"'{run.folder}' has code of others run when it is resumed:{listed}\n"
            f"If you trust all of it, add {trust.OPTION} (or set {trust.TRUST_VARIABLE}=True)."
        )
    for module in run.args.get("gym_packages") or ():
        importlib.import_module(module)
    if run.args["env"] not in gymnasium.registry:
        raise ValueError(f"The run's environment '{run.args['env']}' is not installed here.")
    missing = [name for name in run_options.OPTIONS if name not in run.args]
    if missing:
        raise ValueError(f"The run's args.yml lacks {', '.join(missing)}: use another copy.")


def rebuild(
    run: Run, checkpoint: Path, log: Path | None, device: str | None = None
) -> tuple[ResumedExperiment, Any]:
    """Make a run's experiment and its model again, in its folder.

    :param run: from :func:`find_run`
    :param checkpoint: from :func:`find_checkpoint`
    :param log: from :func:`find_log`
    :param device: in place of the run's own
    :raises ValueError: if that cannot be done with what is in the folder
    """
    described = read_run(checkpoint)
    print(f"Resuming '{run.folder}' at step {described['num_timesteps']} of {run.total_steps}")
    if run.args.get("track"):
        print("Weights & Biases is not continued; the TensorBoard log is.")
    set_random_seed(run.args["seed"])
    if run.args["num_threads"] > 0:
        th.set_num_threads(run.args["num_threads"])
    log_files.unshare(run.folder, f"{CHECKPOINT_PREFIX}*")
    log_files.rewind(run.folder, described["files"])
    experiment = ResumedExperiment(run, checkpoint, log, device)
    setup = experiment.setup_experiment()
    assert setup is not None
    return experiment, setup[0]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number of steps: give at least 1.")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status.

    :param arguments: without the program's name; None for this process's
    """
    parser = argparse.ArgumentParser(
        "python -m tdmpc2_sb3.zoo resume",
        description="Go on with a run that was stopped or killed, from its newest checkpoint.",
    )
    parser.add_argument("run", help="its folder, such as logs/tdmpc2/DMC-walker-walk-v0_1")
    parser.add_argument("-n", "--n-timesteps", type=_positive, help="total steps, to prolong it")
    parser.add_argument("--device", help="in place of the run's own")
    parser.add_argument(
        "--tensorboard-log", metavar="FOLDER", help="in place of the run's own; '' for none"
    )
    parser.add_argument(
        trust.OPTION,
        action="store_true",
        default=trust.is_trusted(),
        help="import the packages, wrappers and callbacks that the run names",
    )
    options = parser.parse_args(arguments)
    install()
    try:
        run = find_run(options.run)
        if options.n_timesteps is not None:
            run = run._replace(args={**run.args, "n_timesteps": options.n_timesteps})
        if run.finished_steps() >= run.total_steps:
            print(
                f"'{options.run}' is finished: {run.finished_steps()} of {run.total_steps} steps. "
                "Prolong it with -n."
            )
            return 0
        checkpoint = find_checkpoint(run)
        log = find_log(run, checkpoint, options.tensorboard_log)
        import_packages(run, options.trust_code)
        experiment, model = rebuild(run, checkpoint, log, options.device)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped before the first step: the same command goes on.", file=sys.stderr)
        return 128 + signal.SIGINT
    experiment.learn(model)
    experiment.save_trained_model(model)
    return 0
