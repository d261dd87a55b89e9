"""Seconds from typing the zoo's command to the end of the first gradient step.

    python benchmarks/first_update.py --output first_update.md

The random warm-up is left out: how long it takes is the environment's affair. "warm" finds the
kernels that an earlier run has built, "cold" an empty cache directory, and builds them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import command, describe


def child(arguments: list[str]) -> None:
    """The zoo's own main program, ended after its first gradient step."""
    from rl_zoo3.train import train as zoo_train

    from tdmpc2_sb3 import TDMPC2

    learn, train = TDMPC2.learn, TDMPC2.train
    began = 0.0

    def timed_learn(self: TDMPC2, *args: object, **kwargs: object) -> object:
        nonlocal began
        began = time.time()
        return learn(self, *args, **kwargs)  # type: ignore[arg-type]

    def timed_train(self: TDMPC2, *args: object, **kwargs: object) -> None:
        warm_up = time.time() - began
        train(self, *args, **kwargs)  # type: ignore[arg-type]
        print(json.dumps({"ended": time.time(), "warm_up": warm_up}), flush=True)
        os._exit(0)

    TDMPC2.learn, TDMPC2.train = timed_learn, timed_train  # type: ignore[assignment,method-assign]
    sys.argv = ["train.py", *arguments]
    zoo_train()


def measure(arguments: list[str], cache: Path) -> float:
    """Return the seconds of one run without its random warm-up."""
    with tempfile.TemporaryDirectory() as logs:
        start = time.time()
        done = subprocess.run(
            [sys.executable, __file__, "_child", *arguments, "-f", logs],
            env={**os.environ, "XDG_CACHE_HOME": str(cache)},
            check=True,
            capture_output=True,
            text=True,
        )
    times = json.loads(done.stdout.splitlines()[-1])
    return times["ended"] - start - times["warm_up"]


def main() -> None:
    if sys.argv[1:2] == ["_child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", default="DMC/cheetah-run-v0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="Markdown file to write besides printing")
    args = parser.parse_args()
    machine = describe("torch", "stable-baselines3", "rl_zoo3")
    arguments = ["--algo", "tdmpc2", "--env", args.env]
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for kind in seconds:  # the second run finds what the first has built
                seconds[kind].append(measure(arguments, Path(cache)))
    lines = [
        "# From the command to the first gradient step",
        "",
        f"Command: `{command()}`, which runs `python -m rl_zoo3.train {' '.join(arguments)}`",
        "",
        f"Machine: {machine}",
        "",
        "| cache of built kernels | median s | worst s |",
        "|---|---|---|",
        *(
            f"| {kind} | {statistics.median(values):.1f} | {max(values):.1f} |"
            for kind, values in seconds.items()
        ),
        "",
        f"Without the random warm-up; {args.rounds} runs each.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
