"""`python -m tdmpc2_sb3.study COMMAND FILE.yml`: an experiment and its report.

run         trains every cell of the grid by the zoo's command and goes on where it was stopped
status      shows what is done and how long the rest takes
report      writes the table and the pictures from the CSV files in the results folder
steadiness  measures how steadily the agents plan that the runs left
collect     makes CSV files from log folders that the zoo's command wrote without this program
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from tdmpc2_sb3.study.plan import Plan, read_plan


def _say(line: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {line}", flush=True)


def run(plan: Plan, options: argparse.Namespace) -> int:
    """Train what is not trained yet."""
    from tdmpc2_sb3.study import results, runs
    from tdmpc2_sb3.study.runner import Runner

    runs.check_names(plan)
    results.read_results(plan)  # of other settings, or damaged: now rather than in the night
    return Runner(plan, options.jobs, _say).work()


def status(plan: Plan, options: argparse.Namespace) -> int:
    """Print a line a cell."""
    from tdmpc2_sb3.study import status
    from tdmpc2_sb3.study.claims import Claims

    claims = Claims(plan)
    try:
        status.fetch(plan, claims)
        print(status.table(plan, status.survey(plan, claims)))
    finally:
        claims.close()
    return 0


def report(plan: Plan, options: argparse.Namespace) -> int:
    """Write the report and print its table."""
    from tdmpc2_sb3.study import report

    print(report.write(plan))
    return 0


def steadiness(plan: Plan, options: argparse.Namespace) -> int:
    """Measure the agents that the runs left: at their ends, and at matched skill."""
    from tdmpc2_sb3.stability.recording import RecordingConfig
    from tdmpc2_sb3.study import steadiness

    config = RecordingConfig(episodes=options.episodes, max_steps=options.max_steps)
    tasks = [task for task in plan.tasks if options.task in (None, task.env)]
    if not tasks:
        raise ValueError(f"The study has no task '{options.task}'.")
    for task in tasks:
        groups = steadiness.groups(plan, task, options.match, options.least, options.within)
        for name, kept in groups.items():
            folder = plan.results_folder / "steadiness" / task.name / name
            print(f"{task.env}, {name}: {len(kept)} agents")
            print(steadiness.measure(task, kept, folder, config, _say))
            print(f"written to {folder}")
    return 0


def collect(plan: Plan, options: argparse.Namespace) -> int:
    """Write the CSVs of runs that were made by hand."""
    from tdmpc2_sb3.study.collect import collect

    for pair in options.logs:
        arm, separator, folder = pair.partition("=")
        if not separator:
            raise ValueError(f"'{pair}' is no ARM=FOLDER, such as squashed=logs/squashed.")
        for line in collect(plan, arm, Path(folder), options.commit):
            print(line)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m tdmpc2_sb3.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function in (run, status, report, steadiness, collect):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.add_argument("file", help="the study's YAML")
        command.set_defaults(function=function)
        if function is run:
            command.add_argument(
                "--jobs", type=int, help="runs at a time; by default the cores divided by 'threads'"
            )
        if function is steadiness:
            command.add_argument("--task", help="one task alone, such as DMC/walker-walk-v0")
            command.add_argument(
                "--match", action="append", default=[], metavar="CONTRAST",
                help="a contrast of two arms, of which pairs of equal skill are measured; repeat",
            )  # fmt: skip
            command.add_argument(
                "--least", type=float, default=0.0, help="skill that both of a pair must have"
            )
            command.add_argument(
                "--within", type=float, default=0.1, help="how far apart they may be (0.1)"
            )
            command.add_argument("--episodes", type=int, default=10, help="an agent (10)")
            command.add_argument("--max-steps", type=int, help="leave episodes earlier")
        if function is collect:
            command.add_argument("logs", nargs="+", metavar="ARM=FOLDER", help="log folders")
            command.add_argument("--commit", default="not recorded", help="that made the runs")
    options = parser.parse_args(arguments)
    if getattr(options, "jobs", None) is not None and options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}: it must be at least 1")
    try:
        return int(options.function(read_plan(options.file), options))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
