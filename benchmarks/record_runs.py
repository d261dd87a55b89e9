"""Keeps the evaluations of the zoo's runs as small CSV files, one a run, and prints a table.

    python benchmarks/record_runs.py logs/ -o runs
    python benchmarks/record_runs.py runs/*_Hopper-v5_seed1.csv --picture hopper.png

A file is named ``<algorithm>_<environment>_seed<seed>.csv`` and holds agent steps, frames, minutes
since the start (evaluations included), and mean and standard deviation of the return. With
``--picture`` such files are drawn, as ``python -m tdmpc2_sb3.plot`` draws the logs themselves.
"""

from __future__ import annotations

import argparse
import csv
import re
from pathlib import Path

import numpy as np

from tdmpc2_sb3.study.plot import Run, draw, read_run
from tdmpc2_sb3.zoo.yaml_files import read_yaml

FIELDS = ("agent_steps", "frames", "minutes", "mean_return", "std_return", "episodes")


def record(folder: Path, output: Path) -> str | None:
    """Writes a run's CSV and returns its line of the table; None if it was never evaluated."""
    run = read_run(folder)
    if run is None:
        return None
    with np.load(folder / "evaluations.npz") as data:
        deviations, episodes = data["results"].std(axis=1), data["results"].shape[1]
    seed = read_yaml(folder / run.env_name / "args.yml", strict=False).get("seed", "")
    path = output / f"{run.algo}_{run.env_name}_seed{seed}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        for steps, minutes, mean, deviation in zip(
            run.steps, run.minutes, run.returns, deviations, strict=True
        ):
            row = (int(steps), int(steps) * run.action_repeat, round(float(minutes), 2))
            writer.writerow((*row, round(float(mean), 2), round(float(deviation), 2), episodes))
    best = int(np.argmax(run.returns))
    return (
        f"| {run.algo} | {run.env_name} | {seed} | {int(run.steps[-1]):,} | {run.minutes[-1]:.0f} "
        f"| {run.returns[best]:.1f} at {int(run.steps[best]):,} | {run.returns[-1]:.1f} |"
    )


def read_record(path: Path) -> Run:
    """Reads a file of :func:`record` back."""
    match = re.fullmatch(r"(.+?)_(DMC-.+|[^_]+)_seed\d+", path.stem)
    if match is None:
        raise SystemExit(f"{path}: not named <algorithm>_<environment>_seed<seed>.csv.")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    steps, frames, minutes, returns = (
        np.array([float(row[field]) for row in rows]) for field in FIELDS[:4]
    )
    return Run(*match.groups(), steps, returns, minutes, round(frames[-1] / steps[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", type=Path, nargs="+", help="log folders of the zoo, or CSV files")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("-o", "--output", type=Path, help="folder of the CSV files")
    what.add_argument("--picture", type=Path, help="of the CSV files that are named")
    args = parser.parse_args()
    if args.picture is not None:
        draw([read_record(path) for path in args.logs]).savefig(args.picture, dpi=120)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    print("| algorithm | task | seed | agent steps | minutes | best return | last return |")
    print("|---|---|---|---|---|---|---|")
    folders = {path.parent for logs in args.logs for path in logs.rglob("evaluations.npz")}
    for folder in sorted(folders):
        line = record(folder, args.output)
        if line is not None:
            print(line)


if __name__ == "__main__":
    main()
