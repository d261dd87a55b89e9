"""The YAML files: an entry for every task, and no key that nothing reads."""

from __future__ import annotations

import inspect

import pytest
import yaml
from stable_baselines3 import PPO, SAC

from dmc_gym_plugin.tasks import SUITE, TASKS, env_id
from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.zoo.algorithms import hyperparams_folder

FILES = ["tdmpc2", "tdmpc2_paper", "sac", "ppo", "sac_reference", "ppo_reference"]
CLASSES = {"tdmpc2": TDMPC2, "sac": SAC, "ppo": PPO}
#: Read by the zoo, or by our part of it (`eval_freq`), and not handed to the algorithm.
ZOO_KEYS = {
    *("n_timesteps", "env_kwargs", "n_envs", "normalize", "callback", "policy"),
    *("eval_freq", "train_env_kwargs"),  # our plug-in's
}
SUITE_IDS = [env_id(domain, task) for domain, tasks in SUITE.items() for task in tasks]


def read(name: str) -> dict:
    return yaml.safe_load((hyperparams_folder() / f"{name}.yml").read_text())


@pytest.mark.parametrize("name", ["tdmpc2", "tdmpc2_paper", "sac", "ppo"])
def test_every_task_has_an_entry_at_the_same_action_repeat(name):
    entries = read(name)
    assert len(SUITE_IDS) == 51
    extended = [info.id for info in TASKS.values() if info.group == "extended"]
    assert set(SUITE_IDS) | set(extended) == {key for key in entries if key.startswith("DMC/")}
    for task in [*SUITE_IDS, *extended]:
        # Equal steps are equal frames for all algorithms.
        assert entries[task]["env_kwargs"] == {"action_repeat": 2}
        assert entries[task]["n_timesteps"] >= 25_000
    assert "env_kwargs" not in entries["default"]  # it serves any environment


@pytest.mark.parametrize("name", FILES)
def test_every_key_names_something(name):
    arguments = inspect.signature(CLASSES[name.partition("_")[0]].__init__).parameters
    for env, entry in read(name).items():
        unknown = entry.keys() - ZOO_KEYS - arguments.keys()
        assert not unknown, (env, unknown)
        assert entry["policy"] == "MlpPolicy"


def test_tdmpc2_is_sized_for_consumer_hardware():
    entry = read("tdmpc2")["DMC/walker-walk-v0"]
    assert (entry["latent_dim"], entry["enc_dim"], entry["mlp_dim"], entry["num_q"]) == (
        128, 256, 256, 2,
    )  # fmt: skip
    assert entry["num_elites"] + entry["num_pi_trajs"] <= entry["num_samples"]
    # Often enough to see a curve: at least eight evaluations of every run.
    for entry in read("tdmpc2").values():
        assert entry["n_timesteps"] / entry["eval_freq"] >= 8


def test_the_papers_settings_are_the_constructors_defaults():
    defaults = inspect.signature(TDMPC2.__init__).parameters
    entry = read("tdmpc2_paper")["default"]
    for key in entry.keys() - ZOO_KEYS:
        assert defaults[key].default == entry[key], key


def test_the_reference_settings_by_name():
    ppo = read("ppo_reference")["DMC/walker-walk-v0"]
    assert ppo == {
        "policy": "MlpPolicy",
        "n_timesteps": 300_000,
        "learning_rate": 3e-4,
        "n_steps": 2048,
        "batch_size": 64,
        "n_epochs": 10,
    }
    sac = read("sac_reference")["DMC/cheetah-run-v0"]
    assert sac == {
        "policy": "MlpPolicy",
        "n_timesteps": 500_000,
        "learning_rate": 3e-4,
        "buffer_size": 500_000,
        "batch_size": 256,
    }


def test_numbers_are_numbers():
    # YAML reads 3e-4 without a point as a string, which the zoo takes for a schedule.
    for name in FILES:
        for entry in read(name).values():
            assert isinstance(entry["learning_rate"], float)
            assert isinstance(entry["n_timesteps"], int)
