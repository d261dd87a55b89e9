"""Compare how steadily trained agents plan.

    python -m tdmpc2_sb3.stability --model A.zip --model B.zip --env DMC/walker-walk-v0

Models of the same dynamics and horizon count as seeds of one arm; ``--label`` groups them
otherwise. Writes ``stability.csv`` (means and 95% intervals), ``stability_episodes.csv`` (every
figure) and ``stability.png`` to the output folder, and prints a table.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym

from tdmpc2_sb3.stability.metrics import MAX_LAG
from tdmpc2_sb3.stability.recording import RecordingConfig
from tdmpc2_sb3.stability.report import format_table, write
from tdmpc2_sb3.stability.study import Subject, default_label, run_study
from tdmpc2_sb3.tdmpc2 import TDMPC2
from tdmpc2_sb3.zoo.algorithms import zoo_env_kwargs


def parse_env_kwargs(items: Sequence[str]) -> dict[str, Any]:
    """``key:value`` items as the zoo writes them.

    :raises ValueError: if an item has no colon or its value is no Python literal
    """
    settings = {}
    for item in items:
        key, colon, value = item.partition(":")
        try:
            if not colon:
                raise ValueError
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(
                f"--env-kwargs item {item!r} is not key:value with a Python literal as its value, "
                "such as action_repeat:2 or observation:'pixels'."
            ) from None
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tdmpc2_sb3.stability", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--model", action="append", required=True, help="a saved agent; repeat")
    parser.add_argument(
        "--label", action="append", default=[], help="arm of each --model, in the same order"
    )
    parser.add_argument("--env", required=True, help="environment id that the agents learned on")
    parser.add_argument(
        "--env-kwargs", nargs="+", default=None, metavar="KEY:VALUE",
        help="settings of the environment; default: those of our YAML (action_repeat:2 on DMC/)",
    )  # fmt: skip
    parser.add_argument("--episodes", type=int, default=10, help="held-out episodes an agent")
    parser.add_argument("--seed", type=int, default=10_000, help="of the first episode")
    parser.add_argument("--max-steps", type=int, default=None, help="leave episodes earlier")
    parser.add_argument("--lag", type=int, default=MAX_LAG, help="steps of open-loop predictions")
    parser.add_argument("--probe-every", type=int, default=25, help="steps between two probes")
    parser.add_argument("--candidates", type=int, default=64, help="plans simulated at a probe")
    parser.add_argument("--device", default="auto")
    parser.add_argument("-o", "--output", type=Path, default=Path("stability"), help="folder")
    return parser


def load_subjects(paths: Sequence[str], labels: Sequence[str], device: str) -> list[Subject]:
    """The saved agents, named by their files.

    :raises ValueError: if labels and models differ in number
    """
    if labels and len(labels) != len(paths):
        raise ValueError(
            f"{len(labels)} --label for {len(paths)} --model: give one for each, or none."
        )
    subjects = []
    for i, path in enumerate(paths):
        agent = TDMPC2.load(path, device=device)
        label = labels[i] if labels else default_label(agent)
        subjects.append(Subject(label, f"{i + 1}:{Path(path).stem}", agent))
    return subjects


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; writes the report and prints the table."""
    parser = _parser()
    options = parser.parse_args(arguments)
    import dmc_gym_plugin  # noqa: F401  registers DMC/ ids, also without the start-up hook

    def progress(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    try:
        given = options.env_kwargs
        env_kwargs = zoo_env_kwargs(options.env) if given is None else parse_env_kwargs(given)
        config = RecordingConfig(
            options.episodes, options.seed, options.max_steps, options.probe_every,
            options.candidates,
        )  # fmt: skip
        if options.lag < 1:
            raise ValueError(f"--lag is {options.lag}: it must be at least 1.")
        env = gym.make(options.env, **env_kwargs)
        subjects = load_subjects(options.model, options.label, options.device)
        progress(f"{options.env} with {env_kwargs or 'no settings'}, {options.episodes} episodes")
        study = run_study(subjects, env, config, options.lag, progress)
    except (ValueError, RuntimeError, OSError, gym.error.Error) as error:
        parser.error(str(error))
    write(study, options.output, options.env)
    print(format_table(study.estimates))
    print(f"Written to {options.output}/: stability.csv, stability_episodes.csv, stability.png")


if __name__ == "__main__":
    main()
