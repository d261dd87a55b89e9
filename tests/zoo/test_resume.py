"""`python -m tdmpc2_sb3.zoo resume`: stopped and killed runs end as if nothing had happened."""

from __future__ import annotations

import argparse
import csv
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch as th
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecNormalize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.callbacks import (
    ResumableCheckpointCallback,
    latest_checkpoint,
    load_checkpoint,
    write_checkpoint,
)
from tdmpc2_sb3.saving import log_files
from tdmpc2_sb3.saving.checkpoint_files import read_run
from tdmpc2_sb3.zoo import checkpoints, resume, run_options, trust

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "resume.md"
WALKER = "DMC/walker-walk-v0"
NAME = "DMC-walker-walk-v0"
RUN = f"logs/tdmpc2/{NAME}_1"
RESUME = f"python -m tdmpc2_sb3.zoo resume {RUN}"  # as in the guide
SHORT = "env_kwargs:dict(action_repeat=20)"  # episodes of 50 steps
FREQUENT = f"callback:[{{'{checkpoints.CALLBACK_NAME}': dict(save_freq=25)}}]"


@pytest.fixture(autouse=True)
def _hanging_up_is_heeded():
    """Processes inherit that it is ignored where the tests were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def start(folder: Path, arguments: list[str], **options) -> subprocess.Popen[str]:
    """Start a Python program as a user does in a terminal: Ctrl-C means what it usually means."""
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


def train_command(tiny: list[str], *options: str, params: tuple[str, ...] = ()) -> list[str]:
    return [
        "rl_zoo3.train", "--algo", "tdmpc2", "--env", WALKER, "--seed", "3", "--device", "cpu",
        "--eval-episodes", "1", *options, "-params", *tiny, SHORT, FREQUENT, "gradient_steps:1",
        *params,
    ]  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, output
    return output


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Return when a checkpoint of this step or a later one lies in the run's folder."""
    while process.poll() is None:
        newest = latest_checkpoint(run)
        if newest is not None and int(newest.name.split("_")[1].split(".")[0]) >= step:
            return
        time.sleep(0.05)
    pytest.fail(f"ended before step {step}: {process.communicate()[0]}")


def assert_same_model(first: Path, second: Path, name: str = NAME) -> None:
    models = [TDMPC2.load(run / name, device="cpu") for run in (first, second)]
    assert models[0].num_timesteps == models[1].num_timesteps
    assert models[0]._n_updates == models[1]._n_updates > 0
    weights = [model.policy.state_dict() for model in models]
    assert all(th.equal(weights[0][name], weights[1][name]) for name in weights[0])


def episodes(run: Path, environment: int = 0) -> list[tuple[str, str]]:
    """Return and length of every episode in Monitor's file, whose clock never goes back."""
    lines = (run / f"{environment}.monitor.csv").read_text().splitlines()
    rows = list(csv.DictReader(lines[1:]))
    seconds = [float(row["t"]) for row in rows]
    assert seconds == sorted(seconds)
    return [(row["r"], row["l"]) for row in rows]


def logged(folder: Path, tag: str) -> list[tuple[int, float]]:
    (directory,) = folder.glob("tb/*/*")  # one folder: the resumed run goes on in it
    events = EventAccumulator(str(directory)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_an_uninterrupted_one(tmp_path, tiny):
    assert f"{RESUME}\n" in GUIDE.read_text()
    whole, killed, elsewhere = (tmp_path / name for name in ("whole", "killed", "elsewhere"))
    for folder in (whole, killed, elsewhere):
        folder.mkdir()
    command = train_command(tiny, "-n", "300", "--eval-freq", "50", "-tb", "tb")
    finish(start(whole, command))

    chance = random.Random()
    resume_command = ["tdmpc2_sb3.zoo", "resume", str(killed / RUN)]
    moments = []
    for folder, arguments, step in (
        (killed, command, chance.randrange(25, 126)),
        (elsewhere, resume_command, chance.randrange(150, 226)),
    ):
        process = start(folder, arguments)
        wait_for_step(killed / RUN, step, process)
        delay = chance.uniform(0.0, 0.3)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        moments.append((step, delay))
    print("killed after", moments)
    output = finish(start(elsewhere, resume_command))
    assert re.search(r"Resuming '.*' at step \d+ of 300", output)

    assert_same_model(whole / RUN, killed / RUN)
    assert_same_model(whole / RUN, killed / RUN, "best_model")
    assert len(episodes(whole / RUN)) == 6
    assert episodes(whole / RUN) == episodes(killed / RUN)
    with (
        np.load(whole / RUN / "evaluations.npz") as first,
        np.load(killed / RUN / "evaluations.npz") as second,
    ):
        assert first["timesteps"].tolist() == [50, 100, 150, 200, 250, 300]
        for name in first.files:
            np.testing.assert_array_equal(first[name], second[name])
    assert logged(whole, "eval/mean_reward") == logged(killed, "eval/mean_reward")
    assert "is finished: 300 of 300" in finish(start(elsewhere, resume_command))


@pytest.mark.slow
def test_ctrl_c_in_the_burst_of_first_updates(tmp_path, tiny):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    command = train_command(
        tiny, "-n", "60", "--eval-freq", "-1", params=("initial_gradient_steps:1500",)
    )
    finish(start(whole, command))
    process = start(stopped, command)
    assert process.stdout is not None
    while "Learning starts with 1500 gradient steps" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    pressed = time.monotonic()
    output = finish(process)
    assert time.monotonic() - pressed < 30  # most of it on a busy machine
    assert f"Saving to {RUN}" in output
    model = TDMPC2.load(stopped / RUN / NAME, device="cpu")
    assert model.num_timesteps == 40
    assert 0 < model._n_updates < 1500
    assert model._n_updates + model._pending_initial_updates == 1500

    # The command that it names, in the folder that it was started in.
    advised = re.search(r"^  python -m (tdmpc2_sb3\.zoo resume .*)$", output, re.M)
    assert advised is not None
    output = finish(start(stopped, shlex.split(advised.group(1))))
    remaining = model._pending_initial_updates
    assert f"Learning starts with {remaining} gradient steps" in output
    assert_same_model(whole / RUN, stopped / RUN)


@pytest.mark.slow
def test_a_run_killed_under_wrappers_with_a_state_goes_on_exactly(tmp_path, tiny):
    names = ["TimeFeatureWrapper", {"HistoryWrapper": {"horizon": 2}}, "DelayedRewardWrapper"]
    wrappers = [
        f"rl_zoo3.wrappers.{each}"
        if isinstance(each, str)
        else {f"rl_zoo3.wrappers.{name}": kwargs for name, kwargs in each.items()}
        for each in names
    ]
    command = train_command(
        tiny, "-n", "200", "--eval-freq", "-1",
        params=(f"env_wrapper:{wrappers}", "frame_stack:2", "normalize:True"),
    )  # fmt: skip
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    for folder in (whole, killed):
        folder.mkdir()
    finish(start(whole, command))
    process = start(killed, command)
    wait_for_step(killed / RUN, 75, process)  # episodes have 50 steps
    process.send_signal(signal.SIGKILL)
    process.wait()
    output = finish(start(killed, ["tdmpc2_sb3.zoo", "resume", RUN, "--trust-code"]))
    assert "closed as truncated" not in output
    assert_same_model(whole / RUN, killed / RUN)
    assert episodes(whole / RUN) == episodes(killed / RUN)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_environment_processes_too(tmp_path, tiny):
    command = train_command(
        tiny, "-n", "300", "--eval-freq", "-1", "--vec-env", "subproc",
        params=("n_envs:2", "gradient_steps:-1"),
    )  # fmt: skip
    process = start(tmp_path, command, start_new_session=True)
    wait_for_step(tmp_path / RUN, 75, process)
    os.killpg(process.pid, signal.SIGINT)
    output = finish(process)
    stopped_at = int(re.search(r"Stopped after (\d+) of 300 steps", output).group(1))
    assert 75 <= stopped_at < 300
    resumed = finish(start(tmp_path, ["tdmpc2_sb3.zoo", "resume", RUN]))
    assert f"at step {stopped_at} of 300" in resumed
    assert "closed as truncated" not in resumed
    # Also the episodes that Ctrl-C interrupted have their full length.
    for environment in (0, 1):
        assert [length for _, length in episodes(tmp_path / RUN, environment)] == ["50"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_ending_signals_to_all_processes_write_a_last_checkpoint(tmp_path, tiny, signum):
    command = train_command(
        tiny, "-n", "3000", "--eval-freq", "-1", "--vec-env", "subproc",
        params=("n_envs:2", "gradient_steps:-1", "callback:[{'" + checkpoints.CALLBACK_NAME + "':"
                " dict(save_freq=50)}]"),
    )  # fmt: skip
    process = start(tmp_path, command, start_new_session=True)
    wait_for_step(tmp_path / RUN, 50, process)
    os.killpg(process.pid, signum)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, output
    stopped_at = int(re.search(r"Stopped after (\d+) of 3000 steps", output).group(1))
    assert latest_checkpoint(tmp_path / RUN).name.startswith(f"checkpoint_{stopped_at:012d}")
    resumed = finish(
        start(tmp_path, ["tdmpc2_sb3.zoo", "resume", RUN, "-n", str(stopped_at + 120)])
    )
    assert f"at step {stopped_at} of {stopped_at + 120}" in resumed
    assert "closed as truncated" not in resumed
    lengths = {length for index in (0, 1) for _, length in episodes(tmp_path / RUN, index)}
    assert lengths == {"50"}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_ends_the_run_with_the_way_to_go_on(tmp_path, tiny, victim):
    command = train_command(
        tiny, "-n", "3000", "--eval-freq", "-1", "--vec-env", "subproc",
        params=("n_envs:2", "gradient_steps:-1"),
    )  # fmt: skip
    process = start(tmp_path, command)
    wait_for_step(tmp_path / RUN, 75, process)
    os.kill(worker_pids(process.pid)[victim], signal.SIGKILL)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1, output
    (sentence,) = re.findall(r"^Environment process .*$", output, re.M)
    assert f"Environment process {victim} of 2" in sentence
    assert "died by signal SIGKILL" in sentence
    newest = latest_checkpoint(tmp_path / RUN).name
    assert f"{RUN}/{newest}'. To go on: {RESUME}" in sentence
    assert "Traceback" not in output
    resumed = start(tmp_path, ["tdmpc2_sb3.zoo", "resume", RUN, "-n", "150"])
    finish(resumed)


def worker_pids(main: int) -> list[int]:
    """The environments' processes: children of the server, in the order of their start."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = stat.read_text().rpartition(")")[2].split()
        found.append((int(stat.parent.name), int(fields[1])))
    children = {pid for pid, parent in found if parent == main}
    return sorted(pid for pid, parent in found if parent in children)


def experiment(folder: Path, **options) -> ExperimentManager:
    options.setdefault("hyperparams", None)
    made = ExperimentManager(
        argparse.Namespace(env=WALKER, algo="tdmpc2"),
        "tdmpc2",
        WALKER,
        str(folder),
        verbose=0,
        **options,
    )
    hyperparams, saved = made.read_hyperparameters()
    _, _, made.callbacks, _ = made._preprocess_hyperparams(hyperparams)
    made.create_log_folder()
    made.create_callbacks()
    made._save_config(saved)
    return made


def test_the_yaml_names_the_callback_which_learns_its_folder(tmp_path):
    made = experiment(tmp_path, eval_freq=-1, show_progress=True)
    assert [type(each).__name__ for each in made.callbacks] == [
        "ProgressBarCallback",
        "ResumableCheckpointCallback",
    ]
    assert made.callbacks[1].save_freq == 5000
    assert made.callbacks[1].folder == Path(made.save_path)
    none = experiment(tmp_path, eval_freq=-1, hyperparams={"callback": None})
    assert none.callbacks == []


def press_ctrl_c(*args, **kwargs) -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_while_the_model_is_saved_tells_how_to_go_on(tmp_path, capsys):
    made = experiment(tmp_path, eval_freq=-1)
    model = small_model()
    model.learn(10, callback=made.callbacks)
    made.callbacks[0].write()
    model.save = press_ctrl_c
    with pytest.raises(SystemExit) as ended:
        made.save_trained_model(model)
    assert ended.value.code == 130
    run = Path(made.save_path)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "Stopped while the model was saved; the file that was there is unchanged.",
        f"The last checkpoint is '{run / 'checkpoint_000000000010'}'. To go on: "
        f"{checkpoints.resume_command(run)}",
    ]


def test_ctrl_c_before_a_resumed_run_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(resume, "find_checkpoint", press_ctrl_c)
    run = checkpointed_run(tmp_path)
    assert resume.main([str(run)]) == 130
    said = "Stopped before the first step: the same command goes on.\n"
    assert capsys.readouterr().err == said


class Other(BaseCallback):
    def _on_step(self) -> bool:
        return True


def test_trials_write_no_checkpoints(tmp_path):
    made = experiment(tmp_path, optimize_hyperparameters=True, n_evaluations=1)
    assert made.specified_callbacks == []
    other = f"{Other.__module__}.{Other.__name__}"
    for given, kept in (
        ([{checkpoints.CALLBACK_NAME: {"save_freq": 10}}, other], [other]),
        (checkpoints.CALLBACK_NAME, []),
        ([other], [other]),
        (None, []),
    ):
        assert checkpoints.without_checkpoints(given) == kept


def test_the_saved_configuration_is_read_as_it_was_written(tmp_path, monkeypatch):
    made = experiment(tmp_path, hyperparams={"train_freq": (1, "episode")}, eval_freq=25_000)
    folder = Path(made.params_path)
    config = resume.read_yaml(folder / "config.yml")
    with (folder / "config.yml").open() as file:
        assert config == yaml.load(file, Loader=yaml.UnsafeLoader)
    assert config["train_freq"] == (1, "episode")
    assert config["callback"] == [{checkpoints.CALLBACK_NAME: {"save_freq": 5000}}]
    assert config["eval_freq"] == made.eval_freq != 25_000  # the YAML's
    assert resume.read_yaml(folder / "args.yml") == {"algo": "tdmpc2", "env": WALKER}
    monkeypatch.setattr("sys.argv", ["train", "--eval-freq", "25000"])
    asked = experiment(tmp_path, eval_freq=25_000)
    config = resume.read_yaml(Path(asked.params_path) / "config.yml")
    assert config["eval_freq"] == 25_000


def write_run(folder: Path, **args) -> Path:
    """Write what the zoo leaves of a run that was killed at its start."""
    run = folder / "logs" / "tdmpc2" / f"{NAME}_1"
    (run / NAME).mkdir(parents=True)
    given = {"algo": "tdmpc2", "env": WALKER, "n_timesteps": -1, "seed": 7, **args}
    config = {"n_timesteps": 100, "callback": [{checkpoints.CALLBACK_NAME: {"save_freq": 50}}]}
    (run / NAME / "args.yml").write_text(yaml.dump(OrderedDict(given)))
    (run / NAME / "config.yml").write_text(yaml.dump(OrderedDict(config)))
    (run / NAME / "command.txt").write_text("python -m rl_zoo3.train --algo tdmpc2")
    return run


def refusal(capsys, folder: Path) -> str:
    assert resume.main([str(folder)]) == 1
    return capsys.readouterr().err


def test_a_run_without_checkpoint_says_how_to_start_again(tmp_path, capsys):
    run = write_run(tmp_path)
    message = refusal(capsys, run)
    assert "has no checkpoint: the first is written after 50 steps. Start again with:" in message
    assert message.endswith("python -m rl_zoo3.train --algo tdmpc2 --seed 7\n")


@pytest.mark.parametrize(
    "content", [b"python \x1b[2Jx", b"a\nb", b"a\rb", "a\u202eb".encode(), 20_000 * b"a"]
)
def test_a_command_of_a_stranger_is_not_printed_as_it_is(tmp_path, capsys, content):
    run = write_run(tmp_path)
    (run / NAME / "command.txt").write_bytes(content)
    assert refusal(capsys, run).endswith(
        "Start again with:\n"
        "  the same command (command.txt holds more than one line of text) --seed 7\n"
    )
    (run / NAME / "command.txt").write_bytes(b"python \xff\n")
    assert refusal(capsys, run).endswith("Start again with:\n  python \ufffd --seed 7\n")


def test_what_is_no_run_is_named(tmp_path, capsys):
    assert "does not exist: name the folder of a run" in refusal(capsys, tmp_path / "nowhere")
    assert "holds no args.yml" in refusal(capsys, tmp_path)
    foreign = write_run(tmp_path, algo="sac")
    assert "is a run of sac: only tdmpc2 and tdmpc2_ssm" in refusal(capsys, foreign)


def test_a_run_at_work_is_left_alone(tmp_path, capsys):
    run = write_run(tmp_path)
    held = checkpoints.lock(run)
    assert held is not None
    assert "still at work" in refusal(capsys, run)
    held.close()
    assert "has no checkpoint" in refusal(capsys, run)


def checkpointed_run(folder: Path, config: dict | None = None, **args) -> Path:
    """A run of two checkpoints, as if the older one had not been removed yet."""
    run = write_run(folder, **args)
    if config is not None:
        (run / NAME / "config.yml").write_text(yaml.dump({"n_timesteps": 100, **config}))
    model = small_model().learn(10)
    older = write_checkpoint(model, run)
    kept = folder / "kept"
    older.rename(kept)
    model.learn(10, reset_num_timesteps=False)
    write_checkpoint(model, run)
    kept.rename(older)
    return run


def small_model(seed: int = 0) -> TDMPC2:
    env = gymnasium.make(WALKER, action_repeat=20)
    sizes = {"latent_dim": 16, "enc_dim": 16, "mlp_dim": 16}
    return TDMPC2("MlpPolicy", env, **sizes, device="cpu", seed=seed)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400 * [0xA5])  # more than a zip's unread fields
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.zip", "replay_buffer.zip", "run.json"])
@pytest.mark.parametrize(
    "damage", [truncate, flip, Path.unlink, lambda path: path.write_text("{}")]
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, name, damage):
    run = checkpointed_run(tmp_path)
    newest = latest_checkpoint(run)
    assert resume.find_checkpoint(resume.find_run(run)) == newest
    if name == "run.json" and damage is flip:
        damage = truncate  # text may well stay valid
    damage(newest / name)
    found = resume.find_checkpoint(resume.find_run(run))
    assert found.name == "checkpoint_000000000010"
    assert f"The checkpoint '{newest}' is left out: " in capsys.readouterr().err
    loaded, _ = load_checkpoint(TDMPC2, run, gymnasium.make(WALKER, action_repeat=20))
    assert loaded.num_timesteps == 10
    damage(found / name)
    assert "can be resumed from" in refusal(capsys, run)


@pytest.mark.parametrize("steps", [5, 20, 30])
def test_a_buffer_of_another_run_is_refused(tmp_path, capsys, steps):
    run = checkpointed_run(tmp_path)
    newest = latest_checkpoint(run)
    shutil.rmtree(run / "checkpoint_000000000010")
    small_model(seed=1).learn(steps).save_replay_buffer(newest / "replay_buffer.zip")
    message = refusal(capsys, run)
    assert "No checkpoint in" in message
    assert f"it holds {steps} steps and the run made 20." in message


def test_a_checkpoint_without_digests_is_compared_by_steps(tmp_path, capsys):
    run = checkpointed_run(tmp_path)
    newest = latest_checkpoint(run)
    content = json.loads((newest / "run.json").read_text())
    del content["digests"]
    (newest / "run.json").write_text(json.dumps(content))
    assert resume.find_checkpoint(resume.find_run(run)) == newest
    small_model(seed=1).learn(30).save_replay_buffer(newest / "replay_buffer.zip")
    assert resume.find_checkpoint(resume.find_run(run)).name == "checkpoint_000000000010"
    assert "30 were put into the replay buffer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "config", "named"),
    [
        ({"gym_packages": ["foreign_package"]}, {}, "gym_packages: foreign_package"),
        ({}, {"env_wrapper": "foreign_package.Wrapper"}, "env_wrapper: foreign_package.Wrapper"),
        ({}, {"vec_env_wrapper": [{"foreign_package.W": {"x": 1}}]}, "vec_env_wrapper: "),
        ({}, {"callback": "foreign_package.C"}, "callback: foreign_package.C"),
        ({}, {"callback": [{checkpoints.CALLBACK_NAME: {"folder": "/x"}}]}, "callback: "),
        ({}, {"policy": "foreign_package.P"}, "policy: foreign_package.P"),
        ({}, {"normalize": "__import__('foreign_package')"}, "normalize: __import__"),
        ({}, {"monitor_kwargs": "dict(x=open('x'))"}, "monitor_kwargs: dict(x=open('x'))"),
    ],
)
def test_code_of_others_is_asked_for(tmp_path, capsys, monkeypatch, args, config, named):
    witness = tmp_path / "witness"
    (tmp_path / "foreign_package.py").write_text(f"open({str(witness)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)
    run = checkpointed_run(tmp_path, config, **args)
    message = refusal(capsys, run)
    assert f"has code of others run when it is resumed:\n  {named}" in message
    assert "add --trust-code (or set TRUST_REMOTE_CODE=True)" in message
    assert not witness.exists()
    if args:
        with pytest.raises(ValueError, match=r"args\.yml lacks"):  # after the packages
            resume.import_packages(resume.find_run(run), trusted=True)
        assert witness.exists()


def test_what_is_harmless_is_not_asked_for():
    callback = [{checkpoints.CALLBACK_NAME: {"save_freq": 5}}]
    for config in (
        {"policy": "MlpPolicy", "callback": callback, "normalize": True},
        {"normalize": "dict(norm_obs=True, clip_obs=5.0)", "callback": checkpoints.CALLBACK_NAME},
        {"normalize": "{'norm_obs': True}", "monitor_kwargs": {"info_keywords": ["a"]}},
    ):
        assert trust.foreign_code({"gym_packages": []}, config) == []
    assert checkpoints.resume_command("a b", [trust.OPTION]) == (
        "python -m tdmpc2_sb3.zoo resume 'a b' --trust-code"
    )


@pytest.mark.parametrize(
    "name", ["0.monitor.csv", ".running", f"{NAME}/vecnormalize.pkl", "checkpoint_7/model.zip"]
)
def test_links_out_of_the_folder_are_refused(tmp_path, capsys, name):
    run = write_run(tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(victim)
    assert f"'{run / name}' is a link out of the run's folder" in refusal(capsys, run)
    assert victim.read_text() == "precious"
    (run / name).unlink()
    (run / name).symlink_to(run / NAME / "args.yml")  # within it
    assert "has no checkpoint" in refusal(capsys, run) or "checkpoint_7" in name


def test_files_that_hard_links_share_are_not_written(tmp_path):
    run = checkpointed_run(tmp_path)
    described = read_run(latest_checkpoint(run))["files"]
    elsewhere = {}
    for name in ("0.monitor.csv", "evaluations.npz", f"{NAME}/vecnormalize.pkl"):
        (run / name).unlink(missing_ok=True)
        elsewhere[name] = tmp_path / name.replace("/", "-")
        elsewhere[name].write_text("precious")
        os.link(elsewhere[name], run / name)
    model = latest_checkpoint(run) / "model.zip"  # only ever removed: not worth a copy
    os.link(model, tmp_path / "model.zip")
    log_files.unshare(run, "checkpoint_*")
    assert model.stat().st_nlink == 2
    for name, other in elsewhere.items():
        assert (run / name).stat().st_nlink == other.stat().st_nlink == 1
        assert (run / name).read_text() == "precious"
    log_files.rewind(run, {**described, "monitor_sizes": {"0.monitor.csv": 3}})
    assert (run / "0.monitor.csv").read_text() == "pre"
    assert elsewhere["0.monitor.csv"].read_text() == "precious"
    assert not list(run.rglob(".*.copy"))


def test_statistics_in_the_working_directory_are_not_unpickled(tmp_path, monkeypatch):
    (tmp_path / NAME).mkdir()
    witness = tmp_path / "witness"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(witness),)

    (tmp_path / NAME / "vecnormalize.pkl").write_bytes(pickle.dumps(Evil()))
    monkeypatch.chdir(tmp_path)
    options = dict.fromkeys(run_options.OPTIONS)
    options |= {"algo": "tdmpc2", "env": WALKER, "n_timesteps": 5, "seed": 0, "eval_freq": -1}
    options |= {"device": "cpu", "vec_env": "dummy", "verbose": 0, "save_freq": -1}
    run = resume.Run(tmp_path, options, {"n_timesteps": 5, "normalize": True})
    made = resume.ResumedExperiment(run, tmp_path, None)
    made._preprocess_hyperparams(made.read_hyperparameters()[0])
    for evaluating in (False, True):
        env = made.create_envs(1, eval_env=evaluating, no_log=True)
        assert isinstance(env, VecNormalize)
        assert (env.training, env.norm_reward) == (not evaluating, not evaluating)
    assert not witness.exists()


@pytest.mark.parametrize(
    "name", ["checkpoint_9x", "checkpoint_9.1.2", f"checkpoint_{'9' * 5000}"[:200], "checkpoint_"]
)
def test_other_folders_are_no_checkpoints(tmp_path, name):
    run = checkpointed_run(tmp_path)
    newest = latest_checkpoint(run)
    shutil.copytree(newest, run / name)
    assert latest_checkpoint(run) == newest == resume.find_checkpoint(resume.find_run(run))


@pytest.mark.parametrize(
    ("file", "name", "value", "needed"),
    [
        ("args", "env", ["a"], "a word"),
        ("args", "seed", -1, "a whole number from 0 to 4294967295"),
        ("args", "eval_episodes", 0, "a whole number from 1 to"),
        ("args", "vec_env", "fork", "dummy or subproc"),
        ("args", "num_threads", 10**12, "a whole number from -1 to 4096"),
        ("args", "gym_packages", "this", "a list of words"),
        ("args", "env_kwargs", {1: 2}, "a dictionary of keyword arguments or nothing"),
        ("config", "n_timesteps", float("nan"), "a whole number from 1 to"),
        ("config", "n_envs", "2", "a whole number from 1 to 65536"),
        ("config", "env_kwargs", "dict()", "a dictionary of keyword arguments"),
        ("config", "normalize", 3, "true or false"),
        ("config", "normalize", {"clip_obs": "x"}, "a number"),
        ("config", "normalize", "dict(norm_obs='x')", "true or false"),
        ("config", "monitor_kwargs", {"info_keywords": [1]}, "a list of words"),
        ("config", "callback", [3], "a name, or a list of names and their arguments"),
        ("config", "callback", {"a.B": 1, "c.D": 2}, "a name, or a list of names"),
        ("config", "callback", [{checkpoints.CALLBACK_NAME: {"save_freq": 0}}], "a whole number"),
        ("config", "env_wrapper", {"a.B": 3}, "a name, or a list of names and their arguments"),
    ],
)
def test_options_that_no_run_has_are_named(tmp_path, capsys, file, name, value, needed):
    run = write_run(tmp_path)
    path = run / NAME / f"{file}.yml"
    path.write_text(yaml.dump({**resume.read_yaml(path), name: value}))
    message = refusal(capsys, run)
    assert f"and should be {needed}" in message
    assert "Traceback" not in message
    assert message.count("\n") == 1


def test_unknown_keywords_of_normalize_are_named(tmp_path, capsys):
    run = write_run(tmp_path)
    path = run / NAME / "config.yml"
    path.write_text(yaml.dump({**resume.read_yaml(path), "normalize": {"venv": 1}}))
    assert "has an argument 'venv', which is none of training, norm_obs," in refusal(capsys, run)


def test_words_for_other_environments_are_asked_for():
    for env_id, kwargs, asked in (
        ("HalfCheetah-v5", {"xml_file": "x.xml"}, ["env_kwargs of HalfCheetah-v5: "]),
        ("HalfCheetah-v5", {"frame_skip": 5, "reset": [0.1, True, None]}, []),
        (WALKER, {"observation": "pixels"}, []),
    ):
        found = trust.foreign_code({"env": env_id}, {"env_kwargs": kwargs})
        assert [each[: len(start)] for each, start in zip(found, asked, strict=True)] == asked
    (shown,) = trust.foreign_code({"env": WALKER}, {"policy": "a.B\n\x1b[2Jharmless"})
    assert shown == repr("policy: a.B\n\x1b[2Jharmless")  # nothing moves the cursor


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x]\n" + "".join(f"{c}: &{c} [{', '.join(10 * [f'*{p}'])}]\n"
                               for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
        "a: &a [*a]",
        "a: " + 5000 * "[",
        "a: !!python/tuple 5",
        "!!python/object/apply:collections.OrderedDict 5",
        "x: " + "y" * 2_000_000,
    ],
)  # fmt: skip
def test_yaml_that_grows_or_is_odd_is_damaged(tmp_path, text):
    path = tmp_path / "args.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match="is damaged or holds Python objects") as caught:
        resume.read_yaml(path)
    assert len(str(caught.value)) < 500


def test_missing_options_are_named(tmp_path, capsys):
    run = checkpointed_run(tmp_path)
    assert "args.yml lacks eval_freq, eval_episodes, " in refusal(capsys, run)
    unknown = write_run(tmp_path / "unknown", env="Nowhere-v0")
    with pytest.raises(ValueError, match="environment 'Nowhere-v0' is not installed here"):
        resume.import_packages(resume.find_run(unknown), trusted=False)


def test_what_is_no_file_is_refused(tmp_path, capsys):
    run = write_run(tmp_path)
    os.mkfifo(run / ".running")
    assert "is neither a file nor a folder" in refusal(capsys, run)


def test_the_log_goes_on_where_the_runs_options_lead(tmp_path):
    run = checkpointed_run(tmp_path, tensorboard_log="tb")
    found, newest = resume.find_run(run), latest_checkpoint(run)

    def says(path: str) -> None:
        content = json.loads((newest / "run.json").read_text())
        content["files"]["logger"] = path
        (newest / "run.json").write_text(json.dumps(content))

    own = tmp_path / "tb" / NAME / "TDMPC2_1"
    says(os.path.relpath(own, run))
    with pytest.raises(ValueError, match="name its folder by --tensorboard-log"):
        resume.find_log(found, newest, None)  # nothing is there
    own.mkdir(parents=True)
    (own / "events.out.tfevents.1.host").touch()
    assert resume.find_log(found, newest, None) == own
    says("tb/x")
    assert resume.find_log(found, newest, None) == run / "tb" / "x"
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    (elsewhere / "events.out.tfevents.1.host").touch()
    for path in (os.path.relpath(elsewhere, run), str(elsewhere)):
        says(path)
        with pytest.raises(ValueError, match="outside the run's folder"):
            resume.find_log(found, newest, None)
        assert resume.find_log(found, newest, "") is None
        assert resume.find_log(found, newest, str(elsewhere)) == elsewhere
        without = found._replace(args={**found.args, "tensorboard_log": ""})
        assert resume.find_log(without, newest, None) is None


@pytest.mark.parametrize("steps", ["0", "-5", "1.5", "x"])
def test_total_steps_are_positive(tmp_path, capsys, steps):
    with pytest.raises(SystemExit) as caught:
        resume.main([str(write_run(tmp_path)), "-n", steps])
    assert caught.value.code == 2
    assert f"{steps} is no number of steps: give at least 1." in capsys.readouterr().err


def test_python_objects_in_the_files_are_not_built(tmp_path, capsys):
    run = write_run(tmp_path)
    witness = tmp_path / "witness"
    config = run / NAME / "config.yml"
    config.write_text(f"policy: !!python/object/apply:os.mkdir ['{witness}']")
    message = refusal(capsys, run)
    assert "Python objects" in message
    assert "os.mkdir" in message
    assert not witness.exists()


def test_two_checkpoint_callbacks_keep_their_own_folders(tmp_path):
    mine = ResumableCheckpointCallback(10, tmp_path / "mine")
    callbacks = [mine, Other(), ResumableCheckpointCallback(10)]
    ordered = checkpoints.adopt(callbacks, str(tmp_path))
    assert type(ordered[0]) is Other
    assert [each.folder for each in ordered[1:]] == [tmp_path / "mine", tmp_path]
