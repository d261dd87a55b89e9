"""Adds a row to one of the results, or replaces the row of the same question, and writes the pages.

    python benchmarks/results/add.py learning --run logs/tdmpc2/DMC-walker-walk-v0_1
    python benchmarks/results/add.py peers peer="JAX port" model=5M what=plan "ours, ms"=412 ...

With --run task, algorithm, seed, steps, minutes and return are read from a run of the zoo: its last
evaluation, whatever came before. What is named by hand wins. machine and commit are those of this
machine and this working tree where they are not given; a fact was read today.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import re
import subprocess
import sys
from pathlib import Path

import generate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import describe
from tdmpc2_sb3.study.plot import read_run
from tdmpc2_sb3.zoo.yaml_files import read_yaml

PACKAGES = ("torch", "stable-baselines3", "rl_zoo3", "dm_control", "mujoco")


def row_of_run(folder: Path) -> generate.Row:
    """Returns a row of learning.csv, but for machine and commit.

    :param folder: of a run of the zoo, such as `logs/tdmpc2/DMC-walker-walk-v0_1`
    :raises SystemExit: if it was never evaluated
    """
    run = read_run(folder)
    if run is None:
        raise SystemExit(f"{folder} has no evaluations.npz: let it be evaluated at least once.")
    settings = folder / run.env_name
    command = (settings / "command.txt").read_text().strip()
    steps = int(run.steps[-1])
    return {
        "task": run.env_name.removeprefix("DMC-").removesuffix("-v0"),
        "algorithm": run.algo,
        "seed": str(read_yaml(settings / "args.yml", strict=False).get("seed", "")),
        "agent steps": str(steps),
        "frames": str(steps * run.action_repeat),
        "minutes with evaluations": f"{run.minutes[-1]:.1f}",
        "return": f"{run.returns[-1]:.1f}",
        "command": re.sub(r"^.*? -m ", "python -m ", command),  # no interpreter's path
    }


def replace(rows: list[generate.Row], row: generate.Row, key: list[str]) -> bool:
    """Puts a row in the place of the one with the same key, else at the end.

    :param rows: changed in place
    :param key: columns that say which question a row answers
    :return: whether there was one
    """
    for number, other in enumerate(rows):
        if all(other[column] == row[column] for column in key):
            rows[number] = row
            return True
    rows.append(row)
    return False


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = {table["file"]: table for table in generate.read_tables()}
    parser.add_argument("table", choices=tables, help="file of benchmarks/results, without .csv")
    parser.add_argument("values", nargs="*", metavar="COLUMN=VALUE")
    parser.add_argument("--run", type=Path, help="folder of a run of the zoo, for learning")
    args = parser.parse_intermixed_args(arguments)
    for value in args.values:
        if "=" not in value:
            parser.error(f"{value!r} is no COLUMN=VALUE")
    table = tables[args.table]
    source = generate.source_of(table)
    rows = generate.read_rows(table)
    columns = list(rows[0])
    row = {} if args.run is None else row_of_run(args.run)
    row.update(value.split("=", 1) for value in args.values)
    if "read" in source:
        row.setdefault("read", datetime.date.today().isoformat())
    if "machine" in source and "machine" not in row:
        row["machine"] = describe(*PACKAGES)
    if "commit" in source and "commit" not in row:
        head = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=7", "HEAD"]
        row["commit"] = subprocess.check_output(head, text=True).strip()
    if set(row) != set(columns):
        parser.error(
            f"{args.table} has the columns {', '.join(columns)}: "
            f"missing are {sorted(set(columns) - set(row))}, "
            f"unknown {sorted(set(row) - set(columns))}"
        )
    try:
        generate.check(table, row)
    except ValueError as error:
        parser.error(str(error))
    replaced = replace(rows, row, table["key"])
    with (generate.HERE / f"{args.table}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    question = {name: value for name, value in row.items() if name not in source}
    print("replaced" if replaced else "added", question)
    generate.write()


if __name__ == "__main__":
    main()
