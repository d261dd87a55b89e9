"""What stepping simulators in threads brings, beside Gymnasium's two vector environments.

    python benchmarks/vector_environments.py --num-envs 4
    python benchmarks/vector_environments.py --output vector_environments.md

MuJoCo releases Python's interpreter lock while it steps, so threads could use a second core without
the copies of processes. The prototype below steps one half of the environments in a second thread.
Times are wall-clock seconds; only an otherwise idle machine gives figures that mean anything.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium
import numpy as np

import dmc_gym_plugin  # noqa: F401 - registers the environments
from machine import command, describe

TASKS = ("cheetah-run", "walker-walk", "humanoid-run", "dog-run")


def threaded(env_id: str, num_envs: int) -> tuple[Callable[[], object], Callable[..., object]]:
    """Return reset and step of the prototype: two threads, each with half of the environments."""
    envs = [gymnasium.make(env_id) for _ in range(num_envs)]
    pool = ThreadPoolExecutor(1)
    halves = [range(0, num_envs, 2), range(1, num_envs, 2)]

    def part(indices: range, actions: np.ndarray) -> list[tuple]:
        return [envs[i].step(actions[i]) for i in indices]

    def step(actions: np.ndarray) -> tuple[np.ndarray, ...]:
        other = pool.submit(part, halves[1], actions)
        results = [*part(halves[0], actions), *other.result()]
        return tuple(np.stack([result[k] for result in results]) for k in range(4))

    return lambda: [env.reset(seed=0) for env in envs], step


def gymnasium_vector(mode: str, env_id: str, num_envs: int) -> tuple[Callable, Callable]:
    """Return reset and step of a Gymnasium vector environment."""
    env = gymnasium.make_vec(env_id, num_envs=num_envs, vectorization_mode=mode)
    return lambda: env.reset(seed=0), env.step


def measure(task: str, num_envs: int, rounds: int, block: int) -> dict[str, float]:
    """Return environment steps a second of every way, the best of the rounds."""
    env_id = f"DMC/{task}-v0"
    ways = {
        "sync": gymnasium_vector("sync", env_id, num_envs),
        "async": gymnasium_vector("async", env_id, num_envs),
        "threads": threaded(env_id, num_envs),
    }
    size = gymnasium.make(env_id).action_space.shape
    actions = np.random.RandomState(0).uniform(-1, 1, (block, num_envs, *size)).astype(np.float32)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (reset, step) in ways.items():
            reset()
            start = time.perf_counter()
            for action in actions:
                step(action)
            seconds[name].append(time.perf_counter() - start)
    return {name: block * num_envs / min(values) for name, values in seconds.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Vector environments in threads.")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--num-envs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block", type=int, default=100)
    parser.add_argument("--output", type=Path, help="a Markdown file to write")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    about = describe("mujoco", "dm_control", "gymnasium", "numpy")
    lines = ["| task | sync | async | threads | threads / best other |", "|---|---|---|---|---|"]
    for task in args.tasks:
        speed = measure(task, args.num_envs, args.rounds, args.block)
        ratio = speed["threads"] / max(speed["sync"], speed["async"])
        figures = " | ".join(f"{value:,.0f}" for value in speed.values())
        lines.append(f"| {task} | {figures} | {ratio:.2f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    text = (
        f"# {args.num_envs} environments at once\n\nEnvironment steps a second (wall-clock), best "
        f"of {args.rounds} blocks of {args.block} steps.\n\n" + "\n".join(lines) + "\n\n"
        f"Command: `{command()}`\n\n"
        f"Machine: {about}.\n"
    )
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
