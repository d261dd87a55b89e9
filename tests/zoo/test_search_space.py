"""What can be drawn is valid, and the stored values of a trial give back its hyperparameters."""

from __future__ import annotations

import inspect

import optuna
import pytest

from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.zoo import search_space
from tdmpc2_sb3.zoo.algorithms import ALGORITHMS

optuna.logging.set_verbosity(optuna.logging.ERROR)
ARGUMENTS = inspect.signature(TDMPC2.__init__).parameters


def draws(algo: str, count: int, n_envs: int = 1):
    """Return trials and the hyperparameters that were sampled for them."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    sample = search_space.sampler(algo)
    for _ in range(count):
        trial = study.ask()
        hyperparams = sample(trial, 6, n_envs, {})
        yield trial, hyperparams


@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_every_draw_is_valid(algo):
    for trial, hyperparams in draws(algo, 300):
        assert hyperparams.keys() <= ARGUMENTS.keys()
        assert "policy_kwargs" not in hyperparams  # the zoo would erase the YAML's
        samples, trajectories = hyperparams["num_samples"], hyperparams["num_pi_trajs"]
        assert 8 <= hyperparams["num_elites"] <= samples
        assert 1 <= trajectories < samples
        assert hyperparams["latent_dim"] % 8 == 0  # the size of SimNorm's groups
        assert 0.9 < hyperparams["gamma"] < 1.0
        assert 1 <= hyperparams["horizon"] <= 10
        assert 64 <= hyperparams["batch_size"] <= 512
        low, high = search_space.HORIZONS[algo]
        assert low <= hyperparams["horizon"] <= high
        # What Optuna stores, put through the converter as --trial-id does, is the same.
        assert search_space.convert(trial.params) == hyperparams


def test_conversion_by_hand():
    drawn = {
        "num_samples_pow": 7,
        "elite_fraction": 0.25,
        "pi_fraction": 0.125,
        "one_minus_gamma": 0.01,
        "batch_size_pow": 8,
        "mlp_dim": 512,
        "ssm_depth": 3,
        "ssm_selective": False,
        "tau": 0.005,
    }
    assert search_space.convert(drawn) == {
        "num_samples": 128,
        "num_elites": 32,
        "num_pi_trajs": 16,
        "gamma": 0.99,
        "batch_size": 256,
        "mlp_dim": 512,
        "enc_dim": 256,
        "dynamics_kwargs": {"depth": 3, "selective": False},
        "tau": 0.005,
    }


def test_small_fractions_keep_a_minimum():
    drawn = {"num_samples_pow": 6, "elite_fraction": 1 / 16, "pi_fraction": 1 / 64}
    converted = search_space.convert(drawn)
    assert converted == {"num_samples": 64, "num_elites": 8, "num_pi_trajs": 1}


def test_true_values_are_shown_in_the_study():
    trial, hyperparams = next(draws("tdmpc2", 1))
    assert trial.user_attrs["num_samples"] == hyperparams["num_samples"]
    assert trial.user_attrs["gamma"] == hyperparams["gamma"]


def test_several_environments_keep_the_yamls_update_ratio():
    _, hyperparams = next(draws("tdmpc2", 1, n_envs=4))
    assert "gradient_steps" not in hyperparams


@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_drawn_values_build_an_agent(algo):
    import gymnasium

    policy = ALGORITHMS[algo].policy or "MlpPolicy"
    for _, hyperparams in draws(algo, 3):
        env = gymnasium.make("Pendulum-v1")
        model = TDMPC2(policy, env, device="cpu", compile=False, **hyperparams)
        assert model.num_elites == hyperparams["num_elites"]
        assert model.policy.world_model is not None
