"""What passing the plan on as the state is worth: returns with it, without it, by the prior alone.

    python benchmarks/cold_start.py logs/tdmpc2/DMC-walker-walk-v0_1/best_model.zip \\
        --env DMC/walker-walk-v0
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from tdmpc2_sb3 import TDMPC2


class Forgetful:
    """A model that plans every step from nothing, as without a state."""

    def __init__(self, model: TDMPC2):
        self.model = model

    def predict(self, observation: Any, state: Any = None, **kwargs: Any) -> Any:
        return self.model.predict(observation, None, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--env", default="DMC/walker-walk-v0")
    parser.add_argument("--action-repeat", type=int, default=2)
    parser.add_argument("--episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args()
    model = TDMPC2.load(args.model)
    for name, use_planner, agent in (
        ("plan passed on as state", True, model),
        ("every step a cold start", True, Forgetful(model)),
        ("policy prior alone", False, model),
    ):
        model.use_planner = use_planner
        env = make_vec_env(
            args.env,
            n_envs=args.episodes,
            seed=args.seed,
            env_kwargs={"action_repeat": args.action_repeat},
        )
        returns, _ = evaluate_policy(
            agent,  # type: ignore[arg-type]
            env,
            n_eval_episodes=args.episodes,
            return_episode_rewards=True,
        )
        error = np.std(returns) / np.sqrt(len(returns))
        print(
            f"{name}: {np.mean(returns):.0f} +- {error:.0f} ({args.episodes} episodes)", flush=True
        )


if __name__ == "__main__":
    main()
