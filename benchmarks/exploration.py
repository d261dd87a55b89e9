"""How far random actions get by white and by pink noise, without any learning.

    python benchmarks/exploration.py
    python benchmarks/exploration.py --tasks hopper-hop --episodes 100

Both kinds of actions are uniform in the task's own range at every step, as a TD-MPC2 agent's are
before learning starts; pink ones are correlated over steps (``exploration_noise="pink"``). Each
episode of one kind starts in the same state as that of the other. The error is the standard
deviation of the mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import torch as th

import dmc_gym_plugin  # noqa: F401  # registers the environments
from machine import command, describe
from tdmpc2_sb3.model.pink_noise import PinkNoise, uniform

TASKS = (
    "hopper-hop",
    "hopper-stand",
    "cheetah-run",
    "walker-walk",
    "walker-run",
    "acrobot-swingup",
    "cartpole-swingup",
    "finger-spin",
    "fish-swim",
    "humanoid-stand",
    "quadruped-walk",
    "reacher-hard",
)


def returns(task: str, episodes: int, pink: bool) -> np.ndarray:
    """Of that many episodes at action repeat 2, each with noise of its own seed."""
    env = gymnasium.make(f"DMC/{task}-v0", action_repeat=2)
    space = env.action_space
    assert isinstance(space, gymnasium.spaces.Box)
    totals = np.zeros(episodes)
    for episode in range(episodes):
        generator = th.Generator().manual_seed(episode)
        draw: Callable[[], th.Tensor] = PinkNoise(1, space.shape[0], generator).draw
        if not pink:
            draw = lambda: th.randn(1, space.shape[0], generator=generator)  # noqa: B023, E731
        env.reset(seed=episode)
        over = False
        while not over:
            shares = (uniform(draw())[0].numpy() + 1.0) / 2.0
            action = (space.low + shares * (space.high - space.low)).astype(np.float32)
            _, reward, terminated, truncated, _ = env.step(action)
            totals[episode] += float(reward)
            over = terminated or truncated
    env.close()
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--output", type=Path, help="file to write; standard output without")
    args = parser.parse_args()
    about = describe("torch", "gymnasium", "dm-control", "mujoco", threads=1)
    lines = [
        "# Random actions by white and by pink noise",
        "",
        f"Return of an episode: mean, its error, and the best of {args.episodes}.",
        "",
        "| task | white | best | pink | best |",
        "|---|---|---|---|---|",
    ]
    for task in args.tasks:
        cells = []
        for pink in (False, True):
            totals = returns(task, args.episodes, pink)
            error = totals.std(ddof=1) / np.sqrt(len(totals))
            cells.append(f"{totals.mean():.2f} ± {error:.2f} | {totals.max():.2f}")
        lines.append(f"| {task} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    lines += ["", f"Command: `{command()}`", "", f"Machine: {about}."]
    text = "\n".join(lines) + "\n"
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
