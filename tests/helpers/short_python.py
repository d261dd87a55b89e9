"""Stands in for `python` when a guide's commands are executed: the same programs, shorter runs.

Lengths become tiny, models small, and episodes of the DMC environments 20 steps long. Everything
else of the command line stays as the guide has it.
"""

from __future__ import annotations

import os
import sys

TINY = {
    "latent_dim": "16",
    "enc_dim": "32",
    "mlp_dim": "32",
    "num_samples": "16",
    "num_elites": "8",
    "num_pi_trajs": "2",
    "num_iterations": "1",
    "batch_size": "8",
    "learning_starts": "36",
    "initial_gradient_steps": "4",
}

#: PPO would fill a whole rollout before it looks at the number of steps.
SMALL = {"ppo": {"n_steps": "32", "batch_size": "32", "n_epochs": "1"}}


def replace(arguments: list[str], option: str, value: str) -> None:
    """Give `option` this value, whether it was there or not."""
    if option in arguments:
        arguments[arguments.index(option) + 1] = value
    else:
        arguments += [option, value]


def add_params(arguments: list[str], params: dict[str, str]) -> None:
    """Put values for `-params` in, before those of the guide, which win."""
    if "-params" not in arguments:
        arguments.append("-params")
    place = arguments.index("-params") + 1
    arguments[place:place] = [f"{name}:{value}" for name, value in params.items()]


def shorten(module: str, arguments: list[str]) -> list[str]:
    """Return a program's arguments with everything long made short."""
    arguments = list(arguments)
    algo = arguments[arguments.index("--algo") + 1] if "--algo" in arguments else ""
    env = arguments[arguments.index("--env") + 1] if "--env" in arguments else ""
    if module == "rl_zoo3.train":
        replace(arguments, "-n", "60")
        replace(arguments, "--eval-episodes", "2")  # all_plots cannot draw fewer
        if "-optimize" in arguments:
            replace(arguments, "--n-trials", "1")
            replace(arguments, "--n-evaluations", "1")
        else:
            replace(arguments, "--eval-freq", "30")
        params = dict(TINY) if algo.startswith("tdmpc2") else dict(SMALL.get(algo, {}))
        if env.startswith("DMC/"):
            params["env_kwargs"] = "dict(action_repeat=50)"
        if params:
            add_params(arguments, params)
    elif module in ("rl_zoo3.enjoy", "rl_zoo3.record_video", "rl_zoo3.push_to_hub"):
        replace(arguments, "-n", "20")
    elif module == "tdmpc2_sb3.zoo" and arguments[0] == "resume":
        replace(arguments, "-n", "120")
    elif module == "tdmpc2_sb3.study" and arguments[0] == "steadiness":
        arguments += ["--episodes", "2", "--max-steps", "20", "--within", "1"]
    elif module == "rl_zoo3.record_training":
        replace(arguments, "-n", "10")
    return arguments


if __name__ == "__main__":
    given = sys.argv[1:]
    if given[:1] == ["-m"]:
        given = [*given[:2], *shorten(given[1], given[2:])]
    os.execv(sys.executable, [sys.executable, *given])
