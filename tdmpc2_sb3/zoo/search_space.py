"""Optuna's search space: what is tuned, over which ranges, and what the drawn values mean.

Optuna stores *drawn* values (powers, fractions); the algorithm takes *hyperparameters*. `convert`
turns one into the other, for a running trial as for `--trial-id` and the best trial of a finished
study. Every combination that can be drawn is valid: elites and policy trajectories are fractions
of the samples, batch and sample counts are powers of two, the latent fits SimNorm's groups.

All hyperparameters are top-level arguments of the algorithm. The zoo lays drawn values over those
of the YAML by a shallow update: a drawn `policy_kwargs` would erase the YAML's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

#: Fewer elites than this, and their weighted mean and spread are noise.
MIN_ELITES = 8

#: Horizons tried. The SSM's rollout is batched over the horizon, so long ones are affordable.
HORIZONS = {"tdmpc2": (2, 5), "tdmpc2_ssm": (3, 10)}

Sampler = Callable[["optuna.Trial", int, int, dict[str, Any]], dict[str, Any]]


def sampler(algo: str) -> Sampler:
    """Return the zoo's sampling function of an algorithm.

    :param algo: `tdmpc2` or `tdmpc2_ssm`
    :return: a function of the trial, the number of actions, the number of environments and the
        zoo's extra arguments, which returns hyperparameters
    """

    def sample(
        trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]
    ) -> dict[str, Any]:
        drawn = {**_draw_learning(trial, n_envs), **_draw_model(trial), **_draw_planner(trial)}
        low, high = HORIZONS[algo]
        drawn["horizon"] = trial.suggest_int("horizon", low, high)
        if algo == "tdmpc2_ssm":
            drawn["ssm_depth"] = trial.suggest_int("ssm_depth", 1, 3)
            drawn["ssm_selective"] = trial.suggest_categorical("ssm_selective", [True, False])
        hyperparams = convert(drawn)
        for name in hyperparams.keys() - drawn.keys():  # show what the drawn values stand for
            trial.set_user_attr(name, hyperparams[name])
        return hyperparams

    return sample


def _draw_learning(trial: optuna.Trial, n_envs: int) -> dict[str, Any]:
    drawn: dict[str, Any] = {
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3, log=True),
        "enc_lr_scale": trial.suggest_float("enc_lr_scale", 0.1, 1.0, log=True),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 6, 9),
        "tau": trial.suggest_float("tau", 0.003, 0.03, log=True),
        "td_lambda": trial.suggest_categorical("td_lambda", [0.0, 0.5, 1.0]),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.003, 0.05, log=True),
        "consistency_coef": trial.suggest_float("consistency_coef", 2.0, 40.0, log=True),
        "entropy_coef": trial.suggest_float("entropy_coef", 1e-5, 1e-2, log=True),
    }
    if n_envs == 1:  # several environments: the YAML's gradient_steps sets the update ratio
        drawn["gradient_steps"] = trial.suggest_int("gradient_steps", 1, 2)
    return drawn


def _draw_model(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "latent_dim": trial.suggest_categorical("latent_dim", [64, 128, 256]),
        "mlp_dim": trial.suggest_categorical("mlp_dim", [128, 256, 512]),
        "num_q": trial.suggest_categorical("num_q", [2, 3, 5]),
        "dropout": trial.suggest_categorical("dropout", [0.0, 0.01, 0.05]),
    }


def _draw_planner(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "num_iterations": trial.suggest_int("num_iterations", 2, 8),
        "num_samples_pow": trial.suggest_int("num_samples_pow", 6, 9),
        "elite_fraction": trial.suggest_float("elite_fraction", 1 / 16, 1 / 2, log=True),
        "pi_fraction": trial.suggest_float("pi_fraction", 1 / 64, 1 / 4, log=True),
        "temperature": trial.suggest_float("temperature", 0.1, 2.0, log=True),
        "min_std": trial.suggest_float("min_std", 0.02, 0.2, log=True),
        "max_std": trial.suggest_float("max_std", 1.0, 3.0),
    }


def convert(drawn: dict[str, Any]) -> dict[str, Any]:
    """Turn the drawn values of a trial into hyperparameters.

    :param drawn: a trial's `params`, complete or in part
    :return: arguments of the algorithm, all top-level
    """
    hyperparams = dict(drawn)
    for name in ("batch_size", "num_samples"):
        if f"{name}_pow" in hyperparams:
            hyperparams[name] = 2 ** hyperparams.pop(f"{name}_pow")
    if "one_minus_gamma" in hyperparams:
        hyperparams["gamma"] = 1.0 - hyperparams.pop("one_minus_gamma")
    if "elite_fraction" in hyperparams:
        elites = round(hyperparams.pop("elite_fraction") * hyperparams["num_samples"])
        hyperparams["num_elites"] = max(MIN_ELITES, elites)
    if "pi_fraction" in hyperparams:
        trajectories = round(hyperparams.pop("pi_fraction") * hyperparams["num_samples"])
        hyperparams["num_pi_trajs"] = max(1, trajectories)
    if "mlp_dim" in hyperparams:
        hyperparams["enc_dim"] = min(256, hyperparams["mlp_dim"])
    if "ssm_depth" in hyperparams:
        hyperparams["dynamics_kwargs"] = {
            "depth": hyperparams.pop("ssm_depth"),
            "selective": hyperparams.pop("ssm_selective"),
        }
    return hyperparams
