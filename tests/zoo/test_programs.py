"""The zoo's programs as a new user runs them, each checked by what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import yaml
from imageio_ffmpeg import count_frames_and_secs
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.saving.archive import read_archive
from tdmpc2_sb3.study.plot import read_run

CHEETAH = "DMC/cheetah-run-v0"
NAME = "DMC-cheetah-run-v0"
#: Episodes of 20 steps: a program is done in seconds.
SHORT = "env_kwargs:dict(action_repeat=50)"

pytestmark = pytest.mark.slow


def train(zoo, tiny, *arguments: str, algo: str = "tdmpc2", env: str = CHEETAH, params=()):
    short = [SHORT] if env.startswith("DMC/") else []
    if algo == "ppo":  # it would fill a whole rollout before it looks at the number of steps
        short += ["n_steps:32", "batch_size:32", "n_epochs:1"]
    extra = [*tiny, *short] if algo.startswith("tdmpc2") else short
    return zoo(
        "train", "--algo", algo, "--env", env, "--device", "cpu", *arguments,
        *(["-params", *extra, *params] if extra or params else []),
    )  # fmt: skip


def episode_rewards(text: str) -> list[str]:
    return re.findall(r"Episode Reward: (\S+)", text)


def test_train_and_everything_that_plays_it_back(zoo, tiny, tmp_path):
    trained = train(
        zoo, tiny, "-P", "-n", "120", "--eval-freq", "60", "--eval-episodes", "2", "--seed", "0",
        "--save-freq", "50", "--save-replay-buffer", "--tensorboard-log", "tb",
        "--n-eval-envs", "1", "--num-threads", "1",
    )  # fmt: skip
    assert "eval_env_kwargs={'action_repeat': 50}" in trained.stdout
    run = tmp_path / "logs" / "tdmpc2" / f"{NAME}_1"
    checkpoints = {file.name for file in run.glob("rl_model_*.zip")}
    assert checkpoints == {"rl_model_50_steps.zip", "rl_model_100_steps.zip"}
    assert (run / "replay_buffer.pkl").is_file()
    assert (run / "best_model.zip").is_file()
    with np.load(run / "evaluations.npz") as data:
        np.testing.assert_array_equal(data["timesteps"], [60, 120])
        assert (data["ep_lengths"] == 20).all()  # 1000 frames at 50 a step: as in training
        first = data["results"][0][0]
        best_is_first = data["results"][0].mean() >= data["results"][1].mean()
    assert read_run(run).action_repeat == 50
    assert TDMPC2.load(run / NAME).num_timesteps == 120
    assert list((tmp_path / "tb" / NAME / "TDMPC2_1").glob("events.out.tfevents.*"))

    # enjoy: the checkpoint of the first evaluation returns what it did there.
    common = ["--algo", "tdmpc2", "--env", CHEETAH, "-f", "logs", "--no-render"]
    if best_is_first:
        best = zoo("enjoy", *common, "--load-best", "-n", "20", "--seed", "10000").stdout
        assert episode_rewards(best) == [f"{first:.2f}"]
    played = zoo("enjoy", *common, "-n", "40", "--load-last-checkpoint").stdout
    assert "rl_model_100_steps.zip" in played
    assert played.count("Episode Length 20") == 2

    # record_video, headless, with `--no-render` as record_training calls it and without.
    zoo("record_video", *common, "-n", "20", "--load-best")
    (video,) = (run / "videos").glob("*.mp4")
    assert count_frames_and_secs(str(video))[0] == pytest.approx(20, abs=1)

    # record_training: every checkpoint, the last and the best model in one video.
    zoo("record_training", *common[:-1], "-n", "20")
    combined = run / "videos" / "training.mp4"
    assert count_frames_and_secs(str(combined))[0] >= 60


def test_the_same_checkpoint_returns_the_same_everywhere(zoo, tiny, tmp_path):
    train(
        zoo, tiny, "-n", "60", "--eval-freq", "60", "--eval-episodes", "1", "--seed", "3",
    )  # fmt: skip
    run = tmp_path / "logs" / "tdmpc2" / f"{NAME}_1"
    with np.load(run / "evaluations.npz") as data:
        evaluated = float(data["results"][0][0])
    common = ["--algo", "tdmpc2", "--env", CHEETAH, "-f", "logs", "--load-best", "--seed", "10003"]
    played = zoo("enjoy", *common, "--no-render", "-n", "20").stdout
    assert episode_rewards(played) == [f"{evaluated:.2f}"]
    # record_video prints no return: the same program, its recorder made to add up the rewards.
    (tmp_path / "listen.py").write_text(
        "import runpy, sys\n"
        "from stable_baselines3.common.vec_env import VecVideoRecorder\n"
        "total, step = [0.0], VecVideoRecorder.step_wait\n"
        "def step_wait(self):\n"
        "    result = step(self)\n"
        "    total[0] += float(result[1][0])\n"
        "    return result\n"
        "VecVideoRecorder.step_wait = step_wait\n"
        "sys.argv[0] = 'rl_zoo3.record_video'\n"
        "runpy.run_module('rl_zoo3.record_video', run_name='__main__', alter_sys=True)\n"
        "print('total', total[0])\n"
    )
    recorded = zoo(
        "", *common, "-n", "20", module="listen", environment={"PYTHONPATH": str(tmp_path)}
    ).stdout
    assert float(recorded.split()[-1]) == pytest.approx(evaluated, abs=1e-3)


def test_an_exported_agent_is_small_names_no_machine_and_plays_the_same(zoo, tiny, tmp_path):
    train(zoo, tiny, "-n", "60", "--eval-freq", "60", "--eval-episodes", "1", "--seed", "3")
    run = tmp_path / "logs" / "tdmpc2" / f"{NAME}_1"
    with np.load(run / "evaluations.npz") as data:
        evaluated = float(data["results"][0][0])
    missing = zoo("export", "export", str(run / NAME), module="tdmpc2_sb3.zoo", check=False)
    assert missing.returncode == 1
    assert "name the folder of a run" in missing.stderr
    for number in (1, 2):  # never over one that is there
        said = zoo("export", "export", str(run), "--best", module="tdmpc2_sb3.zoo").stdout
        agent = tmp_path / "agents" / "tdmpc2" / f"{NAME}_{number}"
        assert said.startswith(f"agents/tdmpc2/{NAME}_{number}: 0.")
    files = {str(path.relative_to(agent)) for path in agent.rglob("*") if path.is_file()}
    settings = {f"{NAME}/args.yml", f"{NAME}/config.yml"}
    assert files == {f"{NAME}.zip", "0.monitor.csv", "evaluations.npz", *settings}
    assert not list(agent.parent.glob(".export*"))
    for path in agent.rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes()
    whole = (run / "best_model.zip").stat().st_size
    assert (agent / f"{NAME}.zip").stat().st_size < 0.6 * whole
    command = re.search(r"python -m (rl_zoo3.enjoy .*)", said).group(1).split()
    played = zoo("enjoy", *command[1:], "--no-render", "-n", "20", "--seed", "10003").stdout
    assert episode_rewards(played) == [f"{evaluated:.2f}"]


def test_training_alone_has_its_train_env_kwargs(zoo, tiny, tmp_path):
    trained = train(
        zoo, tiny, "-n", "60", "--eval-freq", "60", "--eval-episodes", "1",
        params=("train_env_kwargs:dict(max_episode_steps=7)",),
    ).stdout  # fmt: skip
    assert "train_env_kwargs={'max_episode_steps': 7}" in trained
    assert "Training episodes have at most 7 steps, and rollout/ep_rew_mean is of those" in trained
    assert "Automatic settings for episodes of 7 steps" in trained
    run = tmp_path / "logs" / "tdmpc2" / f"{NAME}_1"
    with np.load(run / "evaluations.npz") as data:
        assert data["ep_lengths"].tolist() == [[20]]  # 1000 frames at 50 a step: the whole task
    zoo("resume", "resume", str(run), "-n", "80", module="tdmpc2_sb3.zoo")
    rows = (run / "0.monitor.csv").read_text().splitlines()[2:]
    assert [row.split(",")[1] for row in rows] == ["7"] * 11
    common = ["--algo", "tdmpc2", "--env", CHEETAH, "-f", "logs", "--no-render"]
    assert "Episode Length 20" in zoo("enjoy", *common, "-n", "20").stdout
    wrong = zoo(
        "train", "--algo", "tdmpc2", "--env", CHEETAH, "-n", "60", "-params", "train_env_kwargs:7",
        check=False,
    )  # fmt: skip
    assert "train_env_kwargs is 7: it must be a dictionary" in wrong.stderr


def test_workers_in_processes_and_several_evaluation_environments(zoo, tiny, tmp_path):
    train(
        zoo, tiny, "-n", "80", "--eval-freq", "40", "--eval-episodes", "2", "--n-eval-envs", "2",
        "--vec-env", "subproc", "--uuid", algo="tdmpc2_ssm", params=("n_envs:2",),
    )  # fmt: skip
    (run,) = (tmp_path / "logs" / "tdmpc2_ssm").iterdir()
    assert re.fullmatch(NAME + r"_1_[0-9a-f-]{36}", run.name)
    with np.load(run / "evaluations.npz") as data:
        np.testing.assert_array_equal(data["timesteps"], [40, 80])
        assert (data["ep_lengths"] == 20).all()
    model = TDMPC2.load(run / NAME)
    assert model.n_envs == 2
    assert type(model.policy).__name__ == "SSMPolicy"


def test_continuing_with_and_without_the_buffer(zoo, tiny, tmp_path):
    train(zoo, tiny, "-n", "80", "--eval-freq", "-1", "--save-replay-buffer")
    first = tmp_path / "logs" / "tdmpc2" / f"{NAME}_1"
    agent = str(first / f"{NAME}.zip")
    updates = TDMPC2.load(agent)._n_updates
    with_buffer = train(zoo, tiny, "-n", "30", "--eval-freq", "-1", "-i", agent)
    assert "Loading replay buffer" in with_buffer.stdout
    # One update a step: neither the random warm-up nor the burst of first updates comes again.
    second = TDMPC2.load(tmp_path / "logs" / "tdmpc2" / f"{NAME}_2" / NAME)
    assert second._n_updates - updates == 30 * second.gradient_steps
    assert second._lifetime_steps == 80 + 30
    (first / "replay_buffer.pkl").unlink()
    without = train(zoo, tiny, "-n", "30", "--eval-freq", "-1", "-i", agent)
    assert "Loading replay buffer" not in without.stdout
    assert "Learning starts with" not in with_buffer.stdout + without.stdout
    data, tensors = read_archive(tmp_path / "logs" / "tdmpc2" / f"{NAME}_3" / NAME, "cpu")
    assert data["_lifetime_steps"] == 80 + 30
    assert "plan_mean" in tensors["run_streams"]  # it acted by planning, not at random
    # And learnt nothing from fewer steps than the 40 of learning_starts.
    assert data["_n_updates"] == updates


def test_any_box_environment(zoo, tiny, tmp_path):
    train(
        zoo, tiny, "-n", "60", "--eval-freq", "60", "--eval-episodes", "1", env="Pendulum-v1"
    )  # fmt: skip
    run = tmp_path / "logs" / "tdmpc2" / "Pendulum-v1_1"
    with np.load(run / "evaluations.npz") as data:
        assert (data["ep_lengths"] == 200).all()
    config = yaml.unsafe_load((run / "Pendulum-v1" / "config.yml").read_text())
    assert "env_kwargs" not in config


@pytest.mark.parametrize("algo", ["sac", "ppo"])
def test_baselines_find_our_yaml_on_our_ids(zoo, tiny, tmp_path, algo):
    trained = train(
        zoo, tiny, "-n", "100", "--eval-freq", "100", "--eval-episodes", "1", algo=algo
    ).stdout
    assert re.search(rf"Loading hyperparameters from: .*hyperparams/{algo}\.yml", trained)
    assert "rl_zoo3" not in re.search(r"Loading hyperparameters from: (.*)", trained).group(1)
    run = tmp_path / "logs" / algo / f"{NAME}_1"
    assert read_run(run).action_repeat == 50
    played = zoo(
        "enjoy", "--algo", algo, "--env", CHEETAH, "-f", "logs", "--no-render", "-n", "20"
    ).stdout
    assert "Episode Length 20" in played


def test_sac_on_pendulum_is_the_same_with_and_without_us(zoo, tmp_path):
    outputs, returns = [], []
    for off in ("0", "1"):
        folder = f"logs_{off}"
        done = zoo(
            "train", "--algo", "sac", "--env", "Pendulum-v1", "-n", "300", "--eval-freq", "150",
            "--eval-episodes", "1", "--seed", "1", "-f", folder, "--device", "cpu",
            environment={"TDMPC2_SB3_NO_HOOK": off},
        )  # fmt: skip
        outputs.append(re.sub(r"logs_\d|\|\s+(fps|time_elapsed).*", "", done.stdout))
        with np.load(tmp_path / folder / "sac" / "Pendulum-v1_1" / "evaluations.npz") as data:
            returns.append(data["results"])
    assert outputs[0] == outputs[1]
    np.testing.assert_array_equal(*returns)


def test_the_way_without_the_hook(zoo, tiny, tmp_path):
    off = {"TDMPC2_SB3_NO_HOOK": "1"}
    refused = zoo("train", "--algo", "tdmpc2", check=False, environment=off)
    assert "invalid choice: 'tdmpc2'" in refused.stderr
    common = ["--algo", "tdmpc2", "--env", CHEETAH, "-f", "logs"]
    zoo(
        "", "train", *common, "-n", "60", "--eval-freq", "-1", "--save-freq", "50", "--device",
        "cpu", "-params", *tiny, SHORT, module="tdmpc2_sb3.zoo", environment=off,
    )  # fmt: skip
    played = zoo(
        "", "enjoy", *common, "--no-render", "-n", "20", module="tdmpc2_sb3.zoo", environment=off
    )
    assert "Episode Length 20" in played.stdout
    zoo("", "record_training", *common, "-n", "10", module="tdmpc2_sb3.zoo", environment=off)
    assert (tmp_path / "logs" / "tdmpc2" / f"{NAME}_1" / "videos" / "training.mp4").is_file()
    unknown = zoo("", "trian", module="tdmpc2_sb3.zoo", check=False)
    assert unknown.returncode == 2
    assert "unknown program 'trian'; one of: train, enjoy" in unknown.stderr


def test_plots(zoo, tiny, tmp_path):
    for seed in ("1", "2"):
        train(
            zoo, tiny, "-n", "60", "--eval-freq", "30", "--eval-episodes", "2", "--seed", seed
        )  # fmt: skip
    shown = {"MPLBACKEND": "Agg"}
    zoo(
        "", "-a", "tdmpc2", "-e", NAME, "-f", "logs", "-w", "1",
        module="rl_zoo3.plots.plot_train", environment=shown,
    )  # fmt: skip
    table = zoo(
        "", "-a", "tdmpc2", "-e", "DMC-cheetah-run", "-f", "logs", "-o", "results", "--no-display",
        "--print-n-trials", module="rl_zoo3.plots.all_plots", environment=shown,
    ).stdout  # fmt: skip
    assert "DMC-cheetah-run-TDMPC2-logs: 2" in table
    zoo(
        "", "-i", "results", "-o", "results.svg", "--skip-timesteps",
        module="rl_zoo3.plots.plot_from_file", environment=shown,
    )  # fmt: skip
    assert (tmp_path / "results.svg").read_text().startswith("<?xml")
    drawn = zoo("", "logs", "-o", "curves.png", module="tdmpc2_sb3.plot").stdout
    assert drawn.count("3000 frames") == 2
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_unknown_task_names_the_nearest(zoo):
    done = zoo("train", "--algo", "tdmpc2", "--env", "DMC/walker-wlak-v0", check=False)
    assert done.stderr.rstrip().endswith(
        "DMC/walker-wlak-v0 not found in gym registry, you maybe meant DMC/walker-walk-v0?"
    )


def test_tracking_absent_is_told_and_offline_works(zoo, tiny, tmp_path):
    try:
        import wandb  # noqa: F401
    except ImportError:
        absent = zoo("train", "--algo", "tdmpc2", "--env", CHEETAH, "--track", check=False)
        assert "pip install wandb" in absent.stderr
        return
    zoo(
        "train", "--algo", "tdmpc2", "--env", CHEETAH, "-n", "50", "--eval-freq", "-1", "--track",
        "-params", *tiny, SHORT, environment={"WANDB_MODE": "offline"},
    )  # fmt: skip
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_ctrl_c_saves_the_model(tmp_path, tiny):
    command = [sys.executable, "-m", "rl_zoo3.train", "--algo", "tdmpc2", "--env", CHEETAH]
    command += ["-n", "100000", "--eval-freq", "-1", "--device", "cpu", "-params", *tiny, SHORT]
    run = tmp_path / "logs" / "tdmpc2" / f"{NAME}_1"
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True,
        # As in a terminal: shells start background jobs, CI's too, with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    monitor = run / "0.monitor.csv"
    end = time.monotonic() + 240
    while not (monitor.is_file() and len(monitor.read_text().splitlines()) > 6):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Saving to logs/tdmpc2" in output
    assert TDMPC2.load(run / NAME).num_timesteps > 80


def test_paper_settings_by_name(zoo, tmp_path):
    # Only the start: 36 warm-up steps of random actions and no update.
    zoo(
        "train", "--algo", "tdmpc2", "--env", CHEETAH, "--conf-file", "tdmpc2_paper.yml", "-n",
        "30", "--eval-freq", "-1", "--device", "cpu", "-params", "learning_starts:36",
        "compile:False", "env_kwargs:dict(action_repeat=2)",
    )  # fmt: skip
    model = TDMPC2.load(tmp_path / "logs" / "tdmpc2" / f"{NAME}_1" / NAME)
    assert (model.num_samples, model.num_elites, model.num_pi_trajs) == (512, 64, 24)
    assert model.batch_size == 256
    assert model.num_timesteps == 30


def test_hyperparams_folder_is_told(zoo):
    folder = Path(zoo("", "hyperparams", module="tdmpc2_sb3.zoo").stdout.strip())
    assert (folder / "tdmpc2.yml").is_file()


def test_normalised_observations(zoo, tiny, tmp_path):
    """The zoo saves VecNormalize with every best model, while training, and plays back by it."""
    trained = train(
        zoo, tiny, "-n", "120", "--eval-freq", "60", "--eval-episodes", "2", "--seed", "0",
        "--n-eval-envs", "1", params=("normalize:'dict(norm_obs=True, norm_reward=False)'",),
    )  # fmt: skip
    assert "Normalization activated" in trained.stdout
    run = tmp_path / "logs" / "tdmpc2" / f"{NAME}_1"
    file = run / NAME / "vecnormalize.pkl"
    statistics = VecNormalize.load(str(file), DummyVecEnv([lambda: gym.make(CHEETAH)]))
    assert statistics.obs_rms.count > 120
    assert "close" not in vars(statistics)
    common = ["--algo", "tdmpc2", "--env", CHEETAH, "-f", "logs", "--no-render", "--seed", "10000"]
    played = zoo("enjoy", *common, "-n", "20").stdout
    assert "Loading running average" in played
    assert len(episode_rewards(played)) == 1
