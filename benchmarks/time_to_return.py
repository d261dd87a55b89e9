"""How long the zoo's command takes to reach a return, by the clock and by frames.

    python benchmarks/time_to_return.py run --env DMC/walker-walk-v0 --target 900 --steps 20000 \\
        --seeds 1 2 3 --threads 2
    python benchmarks/time_to_return.py report

``run`` trains by the unmodified zoo with the default YAML, in a process of its own for each seed,
and writes one CSV a run into ``benchmarks/time_to_return/``: every evaluation (10 episodes with
fresh seeds) with the seconds since the command was started, and those of them spent evaluating.
A run ends with the first evaluation that reaches ``--target``, if one is given.
``report`` writes the table and the pictures from all CSV files there, beside the published curves.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from machine import describe
from tdmpc2_sb3.study.plot import read_published

RESULTS = Path(__file__).parent / "time_to_return"
FIELDS = ("agent_steps", "frames", "seconds", "evaluation_seconds", "mean_return", "std_return")
EVAL_EPISODES = 10
START_VARIABLE = "TIME_TO_RETURN_START"
CSV_VARIABLE = "TIME_TO_RETURN_CSV"
TARGET_VARIABLE = "TIME_TO_RETURN_TARGET"


def train(arguments: list[str]) -> None:
    """In the child process: the zoo's own main program with a clock in its EvalCallback."""
    import rl_zoo3.exp_manager
    from rl_zoo3.train import train as zoo_train
    from stable_baselines3.common.callbacks import EvalCallback

    start = float(os.environ[START_VARIABLE])
    path = Path(os.environ[CSV_VARIABLE])
    target = float(os.environ[TARGET_VARIABLE])

    class TimedEvalCallback(EvalCallback):
        evaluating = 0.0

        def _on_step(self) -> bool:
            before, count = time.time(), len(self.evaluations_timesteps)
            go_on = super()._on_step()
            if len(self.evaluations_timesteps) > count:
                self.evaluating += time.time() - before
                self._write()
                go_on = go_on and self.last_mean_reward < target
            return go_on

        def _write(self) -> None:
            returns = [float(each) for each in self.evaluations_results[-1]]
            repeat = self.training_env.get_attr("action_repeat")[0]
            row = (
                self.num_timesteps,
                self.num_timesteps * repeat,
                round(time.time() - start, 1),
                round(self.evaluating, 1),
                round(statistics.mean(returns), 2),
                round(statistics.pstdev(returns), 2),
            )
            with path.open("a", newline="") as file:
                csv.writer(file).writerow(row)

    rl_zoo3.exp_manager.EvalCallback = TimedEvalCallback
    sys.argv = ["train.py", *arguments]
    zoo_train()


def run(args: argparse.Namespace) -> None:
    RESULTS.mkdir(exist_ok=True)
    for seed in args.seeds:
        name = f"{args.algo}_{args.env.replace('/', '-')}_seed{seed}"
        path = RESULTS / f"{name}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(FIELDS)
        arguments = ["--algo", args.algo, "--env", args.env, "-n", str(args.steps)]
        arguments += ["--seed", str(seed), "--eval-freq", str(args.eval_freq)]
        arguments += ["--eval-episodes", str(EVAL_EPISODES), "--n-eval-envs", str(EVAL_EPISODES)]
        arguments += ["--num-threads", str(args.threads), "-f", args.logs]
        environment = {
            **os.environ,
            START_VARIABLE: str(time.time()),
            CSV_VARIABLE: str(path),
            TARGET_VARIABLE: str(args.target),
            "OMP_NUM_THREADS": str(args.threads),
        }
        machine = describe(
            "torch", "stable-baselines3", "rl_zoo3", "dm_control", "mujoco", threads=args.threads
        )
        path.with_suffix(".txt").write_text(  # before the run, which may be stopped
            f"python -m rl_zoo3.train {' '.join(arguments[:-2])}\n{machine}\n"
        )
        print(f"python -m rl_zoo3.train {' '.join(arguments)}", flush=True)
        subprocess.run(
            [sys.executable, __file__, "_train", *arguments], env=environment, check=True
        )


def read_run(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def report(args: argparse.Namespace) -> None:
    runs: dict[str, list[tuple[str, list[dict[str, float]]]]] = defaultdict(list)
    for path in sorted(RESULTS.glob("*_seed*.csv")):
        algo, env, seed = _parts(path)
        runs[env].append((f"{algo} seed {seed}", read_run(path)))
    targets = dict(pair.split("=") for pair in args.targets)
    lines = [
        "| task | run | return | agent steps | frames | minutes | minutes without evaluations |",
        "|---|---|---|---|---|---|---|",
    ]
    for env, members in runs.items():
        target = float(targets.get(env, "inf"))
        for label, rows in members:
            lines.append(_row(env, label, rows, target))
        picture(env, members)
    text = "\n".join(lines) + "\n"
    (RESULTS / "README.md").write_text(
        "# Time to return\n\nThe first evaluation (10 episodes) whose mean reaches the figure; the "
        "command, machine and\nversions of each run are in the text file beside its CSV. What is "
        "to be read in it: [notes.md](notes.md).\n\n"
        + text
        + "".join(f"\n![{env}]({env}.png)\n" for env in runs)
    )
    print(text)


def _parts(path: Path) -> tuple[str, str, str]:
    head, seed = path.stem.rsplit("_seed", 1)
    algo, env = head.split("_DMC-", 1)
    return algo, f"DMC-{env}", seed


def _row(env: str, label: str, rows: list[dict[str, float]], target: float) -> str:
    best = max(rows, key=lambda row: row["mean_return"], default=None)
    hit = next((row for row in rows if row["mean_return"] >= target), None)
    if hit is None:
        reached = "no evaluation" if best is None else f"best {best['mean_return']:.0f}"
        row, note = best, f"{target:g} not reached, {reached}"
    else:
        row, note = hit, f"{target:g} reached: {hit['mean_return']:.0f}"
    if row is None:
        return f"| {env} | {label} | {note} | | | | |"
    pure = (row["seconds"] - row["evaluation_seconds"]) / 60
    return (
        f"| {env} | {label} | {note} | {row['agent_steps']:.0f} | {row['frames']:.0f} | "
        f"{row['seconds'] / 60:.1f} | {pure:.1f} |"
    )


def picture(env: str, members: list[tuple[str, list[dict[str, float]]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_frames, by_clock) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    last_frame = 0.0
    for label, rows in members:
        if not rows:
            continue
        returns = [row["mean_return"] for row in rows]
        by_frames.plot([row["frames"] for row in rows], returns, marker="o", label=label)
        by_clock.plot([row["seconds"] / 60 for row in rows], returns, marker="o", label=label)
        last_frame = max(last_frame, rows[-1]["frames"])
    for algo, (frames, returns) in read_published(env).items():
        by_frames.plot(frames, returns, "--", label=f"{algo} (published, every 100k)")
    by_frames.set_xlim(0, 1.1 * last_frame)
    by_frames.set(xlabel="frames (two an agent step)", ylabel="return", title=env)
    by_clock.set(xlabel="minutes since the command was typed")
    by_frames.legend(fontsize=8)
    for axis in (by_frames, by_clock):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{env}.png", dpi=120)
    plt.close(figure)


def main() -> None:
    if sys.argv[1:2] == ["_train"]:
        train(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("--algo", default="tdmpc2")
    running.add_argument("--env", default="DMC/walker-walk-v0")
    running.add_argument("--steps", type=int, default=20_000, help="agent steps")
    running.add_argument("--target", type=float, default=float("inf"), help="return to stop at")
    running.add_argument("--seeds", type=int, nargs="+", default=[1])
    running.add_argument("--threads", type=int, default=2)
    running.add_argument("--eval-freq", type=int, default=2500)
    running.add_argument("--logs", default="logs")
    running.set_defaults(function=run)
    reporting = commands.add_parser("report")
    reporting.add_argument(
        "--targets",
        nargs="*",
        default=["DMC-walker-walk-v0=900", "DMC-cheetah-run-v0=500", "DMC-hopper-hop-v0=150"],
    )
    reporting.set_defaults(function=report)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
