"""What the zoo learns of us, and that it is the same zoo for everybody else."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import pytest
import rl_zoo3
import rl_zoo3.exp_manager
import rl_zoo3.hyperparams_opt
import rl_zoo3.utils
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise

from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.zoo import algorithms, register
from tdmpc2_sb3.zoo.command_line import read_command

ZOO_ALGORITHMS = [
    "a2c", "ddpg", "dqn", "ppo", "sac", "td3", "ars", "crossq", "qrdqn", "tqc", "trpo", "ppo_lstm",
]  # fmt: skip


def manager(
    algo: str, env_id: str, folder: Path, **options
) -> rl_zoo3.exp_manager.ExperimentManager:
    return rl_zoo3.exp_manager.ExperimentManager(
        argparse.Namespace(), algo, env_id, str(folder), verbose=0, **options
    )


def test_algorithms_are_added_after_the_zoos_own():
    assert list(rl_zoo3.ALGOS) == [*ZOO_ALGORITHMS, "tdmpc2", "tdmpc2_ssm"]
    assert rl_zoo3.ALGOS["tdmpc2"] is TDMPC2
    assert rl_zoo3.ALGOS["tdmpc2_ssm"] is TDMPC2


def test_every_algorithm_has_a_sampler_a_converter_and_a_yaml_file():
    # The zoo's three tables drift apart when they are filled in different places.
    for name in algorithms.ALGORITHMS:
        assert name in rl_zoo3.ALGOS
        assert name in rl_zoo3.hyperparams_opt.HYPERPARAMS_SAMPLER
        assert name in rl_zoo3.hyperparams_opt.HYPERPARAMS_CONVERTER
        assert algorithms.config_path(name, "Pendulum-v1").is_file()
    # exp_manager must see the very same tables.
    assert rl_zoo3.exp_manager.ALGOS is rl_zoo3.ALGOS
    assert "tdmpc2" in rl_zoo3.exp_manager.HYPERPARAMS_SAMPLER


def test_extending_again_wraps_nothing_twice():
    before = rl_zoo3.exp_manager.ExperimentManager.read_hyperparameters
    register.install()
    assert rl_zoo3.exp_manager.ExperimentManager.read_hyperparameters is before


@pytest.mark.parametrize(
    ("algo", "env_id", "file"),
    [
        ("tdmpc2", "DMC/walker-walk-v0", "tdmpc2.yml"),
        ("tdmpc2", "Pendulum-v1", "tdmpc2.yml"),
        ("tdmpc2_ssm", "Pendulum-v1", "tdmpc2.yml"),
        ("sac", "DMC/walker-walk-v0", "sac.yml"),
        ("ppo", "DMC/walker-walk-v0", "ppo.yml"),
    ],
)
def test_our_yaml_is_found(tmp_path, algo, env_id, file):
    assert manager(algo, env_id, tmp_path).config == str(algorithms.hyperparams_folder() / file)


@pytest.mark.parametrize(
    ("algo", "env_id"),
    [("sac", "Pendulum-v1"), ("ppo", "CartPole-v1"), ("tqc", "DMC/walker-walk-v0")],
)
def test_the_zoos_yaml_serves_all_others(tmp_path, algo, env_id):
    zoo = Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algo}.yml"
    assert manager(algo, env_id, tmp_path).config == str(zoo)


def test_a_conf_file_of_the_users_own_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = algorithms.hyperparams_folder() / "tdmpc2_paper.yml"
    # By its bare name from any folder, unless a file of that name lies here.
    named = manager("tdmpc2", "Pendulum-v1", tmp_path, config="tdmpc2_paper.yml")
    assert named.config == str(ours)
    (tmp_path / "tdmpc2_paper.yml").write_text("default: {policy: MlpPolicy, n_timesteps: 7}")
    named = manager("tdmpc2", "Pendulum-v1", tmp_path, config="tdmpc2_paper.yml")
    assert named.config == "tdmpc2_paper.yml"
    assert named.read_hyperparameters()[0] == {"policy": "MlpPolicy", "n_timesteps": 7}
    # Never for other algorithms on other ids.
    foreign = manager("sac", "Pendulum-v1", tmp_path, config="sac_reference.yml")
    assert foreign.config == "sac_reference.yml"


def test_ssm_takes_its_policy_unless_told_otherwise(tmp_path):
    plain, saved = manager("tdmpc2_ssm", "DMC/walker-walk-v0", tmp_path).read_hyperparameters()
    mlp, _ = manager("tdmpc2", "DMC/walker-walk-v0", tmp_path).read_hyperparameters()
    assert plain == {**mlp, "policy": "SSMPolicy"}
    assert saved["policy"] == "SSMPolicy"
    told = manager(
        "tdmpc2_ssm", "DMC/walker-walk-v0", tmp_path, hyperparams={"policy": "CnnPolicy"}
    )
    assert told.read_hyperparameters()[0]["policy"] == "CnnPolicy"


@pytest.mark.parametrize(
    ("kind", "noise"),
    [("normal", NormalActionNoise), ("ornstein-uhlenbeck", OrnsteinUhlenbeckActionNoise)],
)
def test_the_zoos_action_noise_reaches_the_agent(tmp_path, kind, noise):
    small = {"latent_dim": 16, "enc_dim": 16, "mlp_dim": 16, "num_samples": 40, "num_q": 2}
    asked = {"noise_type": kind, "noise_std": 0.25, **small}
    experiment = manager("tdmpc2", "Pendulum-v1", tmp_path, hyperparams=asked, seed=1)
    model, _ = experiment.setup_experiment()
    assert type(model.action_noise) is noise
    assert model.action_noise._sigma.tolist() == [0.25]
    model.save(tmp_path / "m")
    assert type(TDMPC2.load(tmp_path / "m").action_noise) is noise


@pytest.mark.parametrize(
    ("algo", "env_id", "argv", "asked", "expected"),
    [
        ("tdmpc2", "DMC/walker-walk-v0", [], 25_000, 2_500),  # the YAML's
        ("tdmpc2", "DMC/walker-walk-v0", ["--eval-freq", "25000"], 25_000, 25_000),
        ("tdmpc2", "DMC/walker-walk-v0", ["--eval-freq=400"], 400, 400),
        ("tdmpc2", "DMC/walker-walk-v0", ["--eval-f", "-1"], -1, -1),
        ("sac", "Pendulum-v1", [], 25_000, 25_000),
    ],
)
def test_evaluation_frequency(tmp_path, monkeypatch, algo, env_id, argv, asked, expected):
    monkeypatch.setattr("sys.argv", ["train", *argv])
    experiment = manager(algo, env_id, tmp_path, eval_freq=asked)
    hyperparams, _ = experiment.read_hyperparameters()
    assert experiment.eval_freq == expected
    assert "eval_freq" not in hyperparams


def test_wrapped_methods_keep_their_signatures():
    original = list(inspect.signature(rl_zoo3.utils.create_test_env).parameters)
    assert original[:4] == ["env_id", "n_envs", "stats_path", "seed"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["python", "-m", "rl_zoo3.push_to_hub", "--algo", "tdmpc2", "--env", "Pendulum-v1"],
            ("push_to_hub", "tdmpc2", "Pendulum-v1", True),
        ),
        (
            ["python", "-m", "tdmpc2_sb3.zoo", "train", "--algo=sac", "--env=DMC/walker-walk-v0"],
            ("train", "sac", "DMC/walker-walk-v0", True),
        ),
        (
            ["python", "-m", "rl_zoo3.train", "--algo", "sac", "--env", "Pendulum-v1"],
            ("train", "sac", "Pendulum-v1", False),
        ),
        (["python", "program.py", "--algo", "tdmpc2"], ("", "tdmpc2", "", False)),
        (["python"], ("", "", "", False)),
    ],
)
def test_reading_the_command_line(argv, expected):
    command = read_command(argv)
    assert (*command, command.is_ours) == expected
