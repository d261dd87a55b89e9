"""Writes docs/results.md, and the README's table between its markers, from the CSV files beside it.

    python benchmarks/results/generate.py           # after a row was added or replaced
    python benchmarks/results/generate.py --check   # says whether the pages agree, writes nothing

tables.yml tells which files there are, in which order, with title and caveat. The last columns of
each file say where a row comes from: command, machine, commit; in a file of facts evidence, read.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import facts
import yaml

from tdmpc2_sb3.study.plot import published_return

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SOURCE = ("command", "machine", "commit")
PUBLISHED = "published TD-MPC2"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
WIDTH = 100
LOAD = re.compile(r", load average at the start ([\d.]+)")
SEED = re.compile(r"(--seeds?) \d+")

Row = dict[str, str]


def read_tables() -> list[dict[str, Any]]:
    """Returns what tables.yml says of each file, in its order."""
    tables: list[dict[str, Any]] = yaml.safe_load((HERE / "tables.yml").read_text())
    return tables


def source_of(table: dict[str, Any]) -> tuple[str, ...]:
    """Returns the columns that tell where a row comes from."""
    return facts.SOURCE if "facts" in table else SOURCE


def read_rows(table: dict[str, Any]) -> list[Row]:
    """Returns the rows of a file.

    :param table: what tables.yml says of it
    :raises ValueError: if a row does not tell where it comes from, or two columns have one name
    """
    name = table["file"]
    with (HERE / f"{name}.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if len(set(reader.fieldnames or ())) != len(reader.fieldnames or ()):
        raise ValueError(f"{name}.csv has two columns of one name: {reader.fieldnames}.")
    for row in rows:
        check(table, row)
    return rows


def check(table: dict[str, Any], row: Row) -> None:
    """Raises a ValueError if a row does not tell where it comes from.

    :param table: what tables.yml says of its file
    """
    missing = [column for column in source_of(table) if not row.get(column)]
    if missing == ["evidence"] and row["answer"] == facts.UNKNOWN:
        missing = []
    if missing or None in row:
        raise ValueError(
            f"{table['file']}.csv: {row} has no {missing or 'heads for all its values'}."
        )


def over_seeds(rows: Sequence[Row], by: Sequence[str], averaged: Sequence[str]) -> list[Row]:
    """Joins rows that differ by their seed alone: mean, and lowest and highest where they differ.

    :param rows: with a column `seed`
    :param by: columns that have to be equal
    :param averaged: columns of numbers
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in by), []).append(row)
    return [_joined(group, averaged) for group in groups.values()]


def _joined(rows: Sequence[Row], averaged: Sequence[str]) -> Row:
    joined = dict(rows[0])
    if len(rows) > 1:
        joined["seed"] = ", ".join(row["seed"] for row in rows)
        for column in averaged:
            values = [float(row[column]) for row in rows]
            places = 0 if max(values) >= 100 else 1
            mean, low, high = (
                f"{value:.{places}f}"
                for value in (sum(values) / len(values), min(values), max(values))
            )
            joined[column] = f"{mean} ({low} to {high})"
    return joined


def format_table(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Returns the lines of a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += [
        "| " + " | ".join(_readable(row[column]) for column in columns) + " |" for row in rows
    ]
    return lines


def _readable(value: str) -> str:
    return f"{int(value):,}" if re.fullmatch(r"\d{4,}", value) else value


def format_sources(rows: Sequence[Row], key: Sequence[str]) -> list[str]:
    """Returns commands and machine of each kind of row, said once.

    :param rows: of one file
    :param key: columns that tell the rows apart, named where there are several machines
    """
    sources: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        sources.setdefault((LOAD.sub("", row["machine"]), row["commit"]), []).append(row)
    lines: list[str] = []
    for names, ((machine, commit), members) in zip(
        _names(list(sources.values()), key), sources.items(), strict=True
    ):
        if len(sources) > 1:
            lines += [*_wrapped("; ".join(names) + ":"), ""]
        commands = dict.fromkeys(
            line for row in members for line in _one_for_all_seeds(row, rows).split("\n")
        )
        lines += ["```text", *(line for text in commands for line in _wrapped_command(text)), "```"]
        loads = sorted({float(load) for row in members for load in LOAD.findall(row["machine"])})
        load = f", load average at the start {_range(loads)}" if loads else ""
        lines += ["", *_wrapped(f"Machine: commit {commit}, {machine}{load}."), ""]
    return lines


def _names(groups: Sequence[Sequence[Row]], key: Sequence[str]) -> list[list[str]]:
    """Returns what tells groups of rows apart, by as few columns of the key as do."""
    names: list[list[str]] = []
    for count in range(1, len(key) + 1):
        names = [
            list(dict.fromkeys(" ".join(row[column] for column in key[:count]) for row in group))
            for group in groups
        ]
        if len({name for group in names for name in group}) == sum(map(len, names)):
            break
    return names


def _one_for_all_seeds(row: Row, rows: Sequence[Row]) -> str:
    same = [
        other for other in rows if SEED.sub("", other["command"]) == SEED.sub("", row["command"])
    ]
    seeds = list(dict.fromkeys(other["seed"] for other in same if "seed" in other))
    return SEED.sub(rf"\1 {'|'.join(seeds)}", row["command"]) if len(seeds) > 1 else row["command"]


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _wrapped_command(command: str) -> list[str]:
    """Breaks a command before options and settings, with the shell's sign that it goes on."""
    lines = [""]
    for part in re.split(r" (?=--|-params|taskset |\"?[a-z_]+:)", command):
        if lines[-1] and len(lines[-1]) + len(part) > WIDTH - 3:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return lines


def shown_rows(table: dict[str, Any], rows: Sequence[Row]) -> list[Row]:
    """Returns a file's rows as the pages show them."""
    if "facts" in table:
        return facts.pivoted(rows)
    averaged = table.get("averaged over seeds")
    if averaged is None:
        return list(rows)
    by = [column for column in rows[0] if column not in ("seed", *averaged, *SOURCE)]
    shown = over_seeds(rows, by, averaged)
    if table.get("published"):
        shown = [{**row, PUBLISHED: published(row["task"], int(row["frames"]))} for row in shown]
    return shown


def published(task: str, frames: int) -> str:
    """Returns the published TD-MPC2's mean return after some frames of a suite task, or a dash.

    Its points lie every 100,000 frames; between them it is interpolated.
    """
    value = published_return(f"DMC-{task}-v0", "tdmpc2", frames)
    return "-" if value is None else f"{value:.0f}"


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Returns the columns that a table shows: all but those of the source."""
    return [column for column in rows[0] if column not in SOURCE]


def results_page() -> str:
    """Returns docs/results.md."""
    lines = [
        "# Results",
        "",
        "The newest figure to each question, with its command, its machine and one caveat, and the",
        "[features](#features) beside other packages. This page is made from the files in",
        "`benchmarks/results`, whose README tells how to add a row.",
        "",
    ]
    section = None
    for table in read_tables():
        rows = read_rows(table)
        if table["section"] != section:
            section = table["section"]
            lines += [f"## {section}", ""]
        lines += [f"### {table['title']}", ""]
        shown = shown_rows(table, rows)
        lines += [*format_table(shown, columns_of(shown)), ""]
        lines += [*_wrapped(table["caveat"].strip()), ""]
        if "facts" in table:
            lines += [*_wrapped(facts.states_read(rows)), ""]
            lines += [*format_table(facts.shown_by(rows), ["feature", "shown by"]), ""]
        else:
            lines += format_sources(rows, table["key"])
    return "\n".join(lines).rstrip() + "\n"


def readme_table() -> str:
    """Returns what stands between the README's markers."""
    (table,) = [table for table in read_tables() if "readme" in table]
    shown = shown_rows(table, read_rows(table))
    lines = [*format_table(shown, table["readme"]), "", *_wrapped(table["caveat"].strip())]
    lines += ["", "Commands, machines and all other figures: [results](docs/results.md)."]
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """Returns the README with the present table between its markers.

    :raises ValueError: if a marker is missing
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the markers {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{readme_table()}\n{END}{after}"


def pages() -> dict[Path, str]:
    """Returns what each generated file has to hold."""
    readme = REPOSITORY / "README.md"
    return {
        REPOSITORY / "docs" / "results.md": results_page(),
        readme: with_table(readme.read_text()),
    }


def write() -> None:
    """Writes the pages that differ from their files, and says which."""
    for path, text in pages().items():
        if path.read_text() != text:
            path.write_text(text)
            print(f"{path.relative_to(REPOSITORY)} written")


def main() -> int:
    parser = argparse.ArgumentParser(description="docs/results.md and the README's table")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, end with 1 if they differ"
    )
    if not parser.parse_args().check:
        write()
        return 0
    differing = [path for path, text in pages().items() if path.read_text() != text]
    for path in differing:
        print(f"{path.relative_to(REPOSITORY)} differs: run python benchmarks/results/generate.py")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
