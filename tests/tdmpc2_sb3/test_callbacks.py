"""Checkpoints: a killed run goes on as if it had not been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch as th
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from tdmpc2_sb3 import TDMPC2, callbacks
from tdmpc2_sb3.callbacks import (
    BUFFER_FILE,
    MODEL_FILE,
    Forecast,
    ResumableCheckpointCallback,
    latest_checkpoint,
    load_checkpoint,
    write_checkpoint,
)

TINY = {**tiny_model.TINY, "learning_starts": 40, "initial_gradient_steps": 5}


def make_env(n_envs: int = 1, kind: type[VecEnv] = DummyVecEnv) -> VecEnv:
    # reacher edits its model at each episode's start; 30 steps an episode leave one open at a stop
    return make_vec_env(
        "DMC/reacher-easy-v0",
        n_envs=n_envs,
        seed=3,
        vec_env_cls=kind,
        env_kwargs={"action_repeat": 2, "max_episode_steps": 30},
    )


def same_weights(first: TDMPC2, second: TDMPC2) -> bool:
    mine, theirs = first.policy.state_dict(), second.policy.state_dict()
    return all(th.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("n_envs", "kind", "extra"),
    [
        (1, DummyVecEnv, {}),
        (1, DummyVecEnv, {"train_freq": (1, "episode"), "gradient_steps": 3}),
        (3, DummyVecEnv, {"gradient_steps": -1, "train_freq": 4}),
        (2, SubprocVecEnv, {}),
    ],
)
def test_resuming_gives_the_weights_of_an_uninterrupted_run(
    tmp_path: Path, n_envs: int, kind: type[VecEnv], extra: dict[str, object]
) -> None:
    settings = {**TINY, **extra}
    whole = TDMPC2("MlpPolicy", make_env(n_envs, kind), **settings).learn(200)
    callback = ResumableCheckpointCallback(100, tmp_path)
    stopped = TDMPC2("MlpPolicy", make_env(n_envs, kind), **settings)
    stopped.learn(150, callback=callback)
    resumed, restore = load_checkpoint(TDMPC2, tmp_path, make_env(n_envs, kind))
    assert 100 <= resumed.num_timesteps < 104
    resumed.learn(200 - resumed.num_timesteps, callback=restore, reset_num_timesteps=False)

    assert resumed.num_timesteps == whole.num_timesteps
    assert resumed._n_updates == whole._n_updates > 0
    assert same_weights(whole, resumed)
    assert [each["r"] for each in resumed.ep_info_buffer] == [
        each["r"] for each in whole.ep_info_buffer
    ]
    for model in (whole, stopped, resumed):
        model.env.close()


def test_resuming_after_learn_returned_needs_no_callback(tmp_path: Path) -> None:
    whole = TDMPC2("MlpPolicy", make_env(), **TINY).learn(130)
    first = TDMPC2("MlpPolicy", make_env(), **TINY).learn(95)
    first.save(tmp_path / "model")
    first.save_replay_buffer(tmp_path / "buffer")
    second = TDMPC2.load(tmp_path / "model", env=make_env())
    second.load_replay_buffer(tmp_path / "buffer")
    second.learn(35, reset_num_timesteps=False)
    assert same_weights(whole, second)


def test_resuming_restores_normalisation(tmp_path: Path) -> None:
    def make() -> VecNormalize:
        return VecNormalize(make_env())

    whole = TDMPC2("MlpPolicy", make(), **TINY).learn(120)
    stopped = TDMPC2("MlpPolicy", make(), **TINY)
    stopped.learn(110, callback=ResumableCheckpointCallback(80, tmp_path))
    resumed, restore = load_checkpoint(TDMPC2, tmp_path, make())
    resumed.learn(40, callback=restore, reset_num_timesteps=False)
    assert same_weights(whole, resumed)
    np.testing.assert_array_equal(whole.env.obs_rms.mean, resumed.env.obs_rms.mean)
    np.testing.assert_array_equal(whole.env.returns, resumed.env.returns)


def test_resuming_keeps_the_schedule_of_evaluations_and_their_file(tmp_path: Path) -> None:
    def callbacks() -> list:
        return [
            EvalCallback(make_env(), eval_freq=40, n_eval_episodes=1, log_path=str(tmp_path)),
            ResumableCheckpointCallback(50, tmp_path),
        ]

    TDMPC2("MlpPolicy", make_env(), **TINY).learn(110, callback=callbacks())
    resumed, restore = load_checkpoint(TDMPC2, tmp_path, make_env())
    assert resumed.num_timesteps == 100
    resumed.learn(70, callback=[restore, *callbacks()], reset_num_timesteps=False)
    with np.load(tmp_path / "evaluations.npz") as evaluations:
        assert evaluations["timesteps"].tolist() == [40, 80, 120, 160]


def test_resumed_evaluations_are_those_of_an_uninterrupted_run(tmp_path: Path) -> None:
    def callbacks(folder: Path) -> list:
        evaluation = EvalCallback(
            make_env(), eval_freq=20, n_eval_episodes=2, log_path=str(folder), deterministic=False
        )
        # Written before the evaluation of the same step, which the resumed run makes up for.
        return [ResumableCheckpointCallback(40, folder), evaluation]

    TDMPC2("MlpPolicy", make_env(), **TINY).learn(85, callback=callbacks(tmp_path / "whole"))
    folder = tmp_path / "stopped"
    TDMPC2("MlpPolicy", make_env(), **TINY).learn(70, callback=callbacks(folder))
    (folder / "evaluations.npz").write_bytes(b"cut off by a kill")
    resumed, restore = load_checkpoint(TDMPC2, folder, make_env())
    assert resumed.num_timesteps == 40
    resumed.learn(45, callback=[restore, *callbacks(folder)], reset_num_timesteps=False)
    with (
        np.load(tmp_path / "whole" / "evaluations.npz") as whole,
        np.load(folder / "evaluations.npz") as evaluations,
    ):
        assert evaluations["timesteps"].tolist() == [20, 40, 60, 80]
        for name in whole.files:
            np.testing.assert_array_equal(whole[name], evaluations[name])


def test_a_checkpoint_at_the_last_step_resumes_to_the_last_update(tmp_path: Path) -> None:
    whole = TDMPC2("MlpPolicy", make_env(), **TINY).learn(
        60, callback=ResumableCheckpointCallback(60, tmp_path)
    )
    # Written before the gradient step that follows the last step.
    resumed, restore = load_checkpoint(TDMPC2, tmp_path, make_env())
    assert resumed._n_updates == whole._n_updates - 1
    resumed.learn(0, callback=restore, reset_num_timesteps=False)
    assert resumed.num_timesteps == 60
    assert same_weights(whole, resumed)


def test_only_the_newest_checkpoint_stays(tmp_path: Path) -> None:
    model = TDMPC2("MlpPolicy", make_env(), **TINY)
    model.learn(25, callback=ResumableCheckpointCallback(10, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_000000000020"]
    again = write_checkpoint(model, tmp_path)
    assert latest_checkpoint(tmp_path) == again
    twice = write_checkpoint(model, tmp_path)
    assert list(tmp_path.iterdir()) == [twice]
    assert (twice / MODEL_FILE).is_file()
    assert (twice / BUFFER_FILE).is_file()
    # A kill before the older one is removed: the newer counts, after ten of one step, too.
    names = [f"checkpoint_{name}" for name in ("000000000025.9", "000000000025.10", "7.3")]
    for name in names:
        (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / names[1]
    assert write_checkpoint(model, tmp_path).name == "checkpoint_000000000025.11"


def test_a_failed_checkpoint_leaves_the_one_before(tmp_path: Path, monkeypatch) -> None:
    model = TDMPC2("MlpPolicy", make_env(), **TINY).learn(10)
    before = write_checkpoint(model, tmp_path)
    model.learn(10, reset_num_timesteps=False)

    def fail(self: object, path: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TDMPC2, "save_replay_buffer", fail)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(model, tmp_path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [before]
    resumed, _ = load_checkpoint(TDMPC2, tmp_path, make_env())
    assert resumed.num_timesteps == 10


def test_a_model_saved_beside_the_checkpoints_is_not_taken_for_one(tmp_path: Path) -> None:
    model = TDMPC2("MlpPolicy", make_env(), **TINY).learn(10)
    write_checkpoint(model, tmp_path)
    model.learn(5, reset_num_timesteps=False).save(tmp_path / MODEL_FILE)
    assert load_checkpoint(TDMPC2, tmp_path, make_env())[0].num_timesteps == 10


def test_a_folder_without_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No checkpoint in"):
        load_checkpoint(TDMPC2, tmp_path, make_env())


KILLED_RUN = """
import sys
from test_callbacks import TINY, make_env
from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.callbacks import ResumableCheckpointCallback, latest_checkpoint, load_checkpoint
folder = sys.argv[1]
callbacks = [ResumableCheckpointCallback(5, folder)]
if latest_checkpoint(folder) is None:
    model = TDMPC2("MlpPolicy", make_env(), **TINY)
else:
    model, restore = load_checkpoint(TDMPC2, folder, make_env())
    callbacks.append(restore)
print("ready", flush=True)
model.learn(1500 - model.num_timesteps, callback=callbacks, reset_num_timesteps=False)
model.save(folder + "/final")
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = TDMPC2("MlpPolicy", make_env(), **TINY).learn(1500)
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    chance = random.Random(0)
    kills = 0
    while not (tmp_path / "final.zip").exists():
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED_RUN, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if kills < 6:
            time.sleep(chance.uniform(0.2, 1.0))
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3
    assert same_weights(whole, TDMPC2.load(tmp_path / "final"))


def test_a_forecast_is_made_of_the_steps_that_learn(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    said = []
    forecast = Forecast(10_000, said.append)
    for step in range(2_500, 2_600):  # 16 steps a second
        forecast.after(step)
        now[0] += 0.0625
    # Fifty steps, more than 3 s, are over at 2,550: 7,450 are left, at 16 a second 465.6 s.
    line = "16 steps a second on this machine: the 7450 steps left take about 07:45"
    assert said == [f"{line}, evaluations apart."]
    short = Forecast(2_700, said.append)  # 9 s are left: nothing to wait for
    for step in range(2_500, 2_600):
        short.after(step)
        now[0] += 0.0625
    assert len(said) == 1


def test_learning_tells_that_it_begins_at_random(make_agent, capsys):
    agent = make_agent(verbose=1, learning_starts=20)
    agent.learn(40)
    assert "The first 20 steps act at random." in capsys.readouterr().out
    agent.learn(5, reset_num_timesteps=False)
    assert "at random" not in capsys.readouterr().out
