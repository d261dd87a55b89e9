"""The YAML's environment settings, read from the live environment wherever the zoo makes one."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml
from huggingface_sb3 import EnvironmentName
from rl_zoo3 import utils
from rl_zoo3.exp_manager import ExperimentManager

WALKER = "DMC/walker-walk-v0"


def repeats(vec_env, training: bool = False) -> list[int]:
    """Return the action repeat of each environment, and close them.

    :param training: whether episodes are as short as our YAML has them in training
    """
    values = [env.unwrapped.action_repeat for env in vec_env.envs]
    # Agent steps until truncation follow from it: the setting is live, not merely stored.
    for env, value in zip(vec_env.envs, values, strict=True):
        steps = 1000 // value
        assert env.unwrapped.max_episode_steps == (min(steps, 200) if training else steps)
    vec_env.close()
    return values


def prepared(algo: str, folder: Path, env_id: str = WALKER, **options) -> ExperimentManager:
    options.setdefault("hyperparams", None)
    experiment = ExperimentManager(
        argparse.Namespace(), algo, env_id, str(folder), verbose=0, **options
    )
    hyperparams, _ = experiment.read_hyperparameters()
    experiment._preprocess_hyperparams(hyperparams)
    experiment.create_log_folder()
    return experiment


@pytest.mark.parametrize("algo", ["tdmpc2", "tdmpc2_ssm", "sac"])
def test_training_evaluation_and_tuning(tmp_path, algo):
    experiment = prepared(algo, tmp_path)
    short = algo != "sac"
    assert repeats(experiment.create_envs(1), short) == [2]  # training
    assert repeats(experiment.create_envs(2, eval_env=True)) == [2, 2]  # EvalCallback and trials
    assert repeats(experiment.create_envs(1, no_log=True), short) == [2]  # a trial's training


def test_the_command_lines_settings_reach_evaluation_too(tmp_path, capsys):
    by_params = prepared("tdmpc2", tmp_path, hyperparams={"env_kwargs": {"action_repeat": 4}})
    assert repeats(by_params.create_envs(1), True) == [4]
    assert repeats(by_params.create_envs(1, eval_env=True)) == [4]
    whole = prepared("tdmpc2", tmp_path, hyperparams={"env_kwargs": {"action_repeat": 10}})
    assert "200 steps (train_env_kwargs) at an action repeat of 10" in capsys.readouterr().out
    assert repeats(whole.create_envs(1), True) == [10]
    by_option = prepared("tdmpc2", tmp_path, env_kwargs={"action_repeat": 5})
    assert repeats(by_option.create_envs(1), True) == [5]
    assert repeats(by_option.create_envs(1, eval_env=True)) == [5]


def test_settings_for_evaluation_add_to_the_training_ones(tmp_path):
    camera = prepared("tdmpc2", tmp_path, eval_env_kwargs={"camera_id": 1})
    assert camera.eval_env_kwargs == {"action_repeat": 2, "camera_id": 1}
    assert repeats(camera.create_envs(1, eval_env=True)) == [2]
    other = prepared("tdmpc2", tmp_path, eval_env_kwargs={"action_repeat": 1})
    assert repeats(other.create_envs(1, eval_env=True)) == [1]
    assert repeats(other.create_envs(1), True) == [2]


def test_a_foreign_run_is_evaluated_as_the_zoo_does(tmp_path):
    foreign = prepared(
        "sac", tmp_path, "Pendulum-v1", hyperparams={"env_kwargs": {"g": 5.0}}, n_timesteps=10
    )
    assert foreign.env_kwargs == {"g": 5.0}
    assert foreign.eval_env_kwargs == {}  # the zoo's own behaviour, left alone


def write_run(folder: Path, algo: str, env_id: str, config: dict) -> Path:
    """Write the folder of a finished run as far as the zoo's programs read it."""
    name = EnvironmentName(env_id)
    run = folder / algo / f"{name}_1"
    (run / name).mkdir(parents=True)
    (run / f"{name}.zip").touch()
    (run / name / "config.yml").write_text(yaml.dump(config))
    (run / name / "args.yml").write_text(yaml.dump({"env_kwargs": None}))
    return run


def played_back(folder: Path, algo: str, env_id: str, env_kwargs: dict):
    """Make the environment with the calls of record_video and push_to_hub."""
    name = EnvironmentName(env_id)
    _, _, log_path = utils.get_model_path(0, str(folder), algo, name)
    hyperparams, stats_path = utils.get_saved_hyperparams(str(Path(log_path) / name))
    return utils.create_test_env(
        name.gym_id,
        n_envs=1,
        stats_path=stats_path,
        seed=0,
        should_render=False,
        hyperparams=hyperparams,
        env_kwargs=env_kwargs,
    )


def test_recording_and_pushing(tmp_path):
    config = {"policy": "MlpPolicy", "env_kwargs": {"action_repeat": 2}}
    write_run(tmp_path, "tdmpc2", WALKER, config)
    env_kwargs: dict = {}
    assert repeats(played_back(tmp_path, "tdmpc2", WALKER, env_kwargs)) == [2]
    assert env_kwargs == {"action_repeat": 2}  # push_to_hub writes this dictionary to the Hub
    # The command line wins.
    assert repeats(played_back(tmp_path, "tdmpc2", WALKER, {"action_repeat": 4})) == [4]


def test_recording_ours_on_a_foreign_environment(tmp_path):
    config = {"policy": "MlpPolicy", "env_kwargs": {"g": 5.0}}
    for algo, gravity in (("tdmpc2", 5.0), ("sac", 10.0)):  # SAC: as the zoo does without us
        write_run(tmp_path, algo, "Pendulum-v1", config)
        env = played_back(tmp_path, algo, "Pendulum-v1", {})
        assert env.envs[0].unwrapped.g == gravity
        env.close()
