"""Steps a second of the DMC environments beside raw MuJoCo, dm_control and Shimmy.

    python benchmarks/environment_speed.py
    python benchmarks/environment_speed.py --tasks walker-walk dog-run --rounds 20
    python benchmarks/environment_speed.py --output environment_speed.md

The contenders take turns in short blocks with the same actions, so that a busy machine slows all of
them alike; the figures are the medians over the blocks, the ratio is the median of the ratios
within a round. Times are CPU seconds of the one thread that steps.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np

import dmc_gym_plugin  # registers the environments
from machine import command, describe

TASKS = (
    "walker-walk",
    "cheetah-run",
    "hopper-hop",
    "humanoid-run",
    "reacher-easy",
    "quadruped-run",
)
EPISODE = 1000

#: A contender: (reset, step(action)).
Contender = tuple[Callable[[], object], Callable[[np.ndarray], object]]


def raw_mujoco(domain: str, task: str) -> Contender:
    """Bare ``mj_step`` of the same physics and the same number of sub-steps, nothing else."""
    import mujoco

    env = dmc_gym_plugin.DMControlEnv(domain, task)
    model, data = env.physics.model.ptr, env.physics.data.ptr
    count = env.simulation.n_sub_steps

    def step(action: np.ndarray) -> None:
        data.ctrl[:] = action
        mujoco.mj_step(model, data, count)

    return lambda: env.reset(seed=0), step


def dm_control(domain: str, task: str) -> Contender:
    """dm_control's environment, as ``suite.load`` gives it."""
    from dm_control import suite

    env = suite.load(domain, task, task_kwargs={"random": 0})
    return env.reset, env.step


def shimmy(domain: str, task: str) -> Contender:
    """Shimmy's environment, flattened, as ``gymnasium.make`` gives it."""
    import shimmy as package

    gymnasium.register_envs(package)
    env = gymnasium.make(f"dm_control/{domain}-{task}-v0")
    flat = gymnasium.wrappers.FlattenObservation(env)
    return lambda: flat.reset(seed=0), flat.step


def ours(domain: str, task: str) -> Contender:
    """This package's environment, as ``gymnasium.make`` gives it."""
    env = gymnasium.make(f"DMC/{domain}-{task}-v0")
    return lambda: env.reset(seed=0), env.step


CONTENDERS = {"mj_step": raw_mujoco, "dm_control": dm_control, "Shimmy": shimmy, "DMC": ours}


def measure(domain: str, task: str, rounds: int, block: int) -> dict[str, np.ndarray]:
    """Return the seconds a step of every contender, one figure a round, [rounds]."""
    made = {name: make(domain, task) for name, make in CONTENDERS.items()}
    size = dmc_gym_plugin.DMControlEnv(domain, task).action_space.shape
    actions = np.random.RandomState(0).uniform(-1, 1, (EPISODE, *size)).astype(np.float32)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    # Blocks start early in an episode: Shimmy and dm_control would otherwise reset inside a block.
    for _ in range(rounds + 1):
        for name, (reset, step) in made.items():
            reset()
            for action in actions[:5]:
                step(action)
            start = time.thread_time()
            for action in actions[5 : 5 + block]:
                step(action)
            seconds[name].append((time.thread_time() - start) / block)
    return {name: np.array(values[1:]) for name, values in seconds.items()}  # without the warm-up


def report(tasks: list[str], rounds: int, block: int) -> str:
    """Return the table as Markdown."""
    lines = [
        "| task | " + " | ".join(CONTENDERS) + " | DMC / Shimmy | DMC / dm_control |",
        "|---" * (len(CONTENDERS) + 3) + "|",
    ]
    for name in tasks:
        domain, task = name.split("-", 1)
        seconds = measure(domain, task, rounds, block)
        speed = [f"{1 / np.median(values):,.0f}" for values in seconds.values()]
        ratios = [np.median(seconds[other] / seconds["DMC"]) for other in ("Shimmy", "dm_control")]
        lines.append(
            f"| {name} | "
            + " | ".join(speed)
            + " | "
            + " | ".join(f"{ratio:.2f}" for ratio in ratios)
            + " |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Steps a second beside dm_control and Shimmy.")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="such as walker-walk")
    parser.add_argument("--rounds", type=int, default=40, help="blocks of every contender")
    parser.add_argument("--block", type=int, default=250, help="steps of a block, at most 990")
    parser.add_argument("--output", type=Path, help="a Markdown file to write")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    about = describe("mujoco", "dm_control", "shimmy", "gymnasium", "numpy", threads=1)
    table = report(args.tasks, args.rounds, min(args.block, EPISODE - 10))
    text = (
        "# Speed of the environments\n\n"
        f"Agent steps a second at action repeat 1; median of {args.rounds} interleaved blocks of "
        f"{args.block} steps, CPU time of one thread.\n\n{table}\n\n"
        f"Command: `{command()}`\n\nMachine: {about}.\n"
    )
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
