"""The pages agree with the files in benchmarks/results, and a new row finds its place."""

from __future__ import annotations

import csv
import datetime
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
SOURCE = {"command": "python x.py", "machine": "2026-11-30, a chip", "commit": "1234567"}


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RESULTS))
    import generate

    return generate


@pytest.fixture
def copy(generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files and pages, on which the programs work for the test's time."""
    for name in ("README.md", "docs/results.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    shutil.copytree(RESULTS, tmp_path / "results")
    monkeypatch.setattr(generate, "HERE", tmp_path / "results")
    monkeypatch.setattr(generate, "REPOSITORY", tmp_path)
    return tmp_path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def first(row: dict[str, str]) -> list[str]:
    """The first of a fact's evidence, by which the page shows it; none where nothing is known."""
    return row["evidence"].split()[:1]


def test_pages_agree_with_the_files(generate: ModuleType):
    for path, text in generate.pages().items():
        assert path.read_text() == text, "run python benchmarks/results/generate.py"


def test_every_file_is_shown_with_its_source(generate: ModuleType):
    tables = generate.read_tables()
    assert sorted(f"{table['file']}.csv" for table in tables) == sorted(
        path.name for path in RESULTS.glob("*.csv")
    )
    page = (REPOSITORY / "docs" / "results.md").read_text()
    parts = re.split(r"^### ", page, flags=re.M)[1:]
    assert [part.splitlines()[0] for part in parts] == [table["title"] for table in tables]
    for part, table in zip(parts, tables, strict=True):
        rows = rows_of(RESULTS / f"{table['file']}.csv")
        keys = [tuple(row[column] for column in table["key"]) for row in rows]
        assert len(set(keys)) == len(keys), f"{table['file']}.csv answers a question twice"
        if "facts" in table:
            assert all(place.removeprefix("docs/") in part for row in rows for place in first(row))
            continue
        assert part.count("\nMachine: commit ") == len(
            {
                (row["commit"], re.sub(r", load average at the start [\d.]+", "", row["machine"]))
                for row in rows
            }
        )
        for row in rows:
            assert row["command"].split()[-1] in part


@pytest.mark.parametrize("name", ["features", "environment_features"])
def test_every_fact_has_evidence_that_is_there(name: str):
    rows = rows_of(RESULTS / f"{name}.csv")
    packages = list(dict.fromkeys(row["package"] for row in rows))
    features = list(dict.fromkeys(row["feature"] for row in rows))
    assert [(row["feature"], row["package"]) for row in rows] == [
        (feature, package) for feature in features for package in packages
    ]
    for row in rows:
        assert datetime.date.fromisoformat(row["read"]) >= datetime.date(2026, 11, 30)
        assert bool(row["evidence"]) == (row["answer"] != "?"), row
        for place in row["evidence"].split():
            if place.startswith("https://"):
                # What was read stays what it was: no file of a branch that moves on.
                moving = re.search(
                    r"github\.com/[^/]+/[^/]+/(blob|tree)/(?![0-9a-f]{40}(/|$))", place
                )
                assert not moving, place
            else:
                assert_ours_is_there(place)
        ours = [place for place in row["evidence"].split() if not place.startswith("https://")]
        assert row["package"] != "this package" or row["answer"] == "?" or ours, row


def assert_ours_is_there(place: str) -> None:
    path, test = (*place.split("::"), "")[:2]
    path, _, anchor = path.partition("#")
    assert (REPOSITORY / path).exists(), place
    assert path.startswith("docs/") or not anchor, place
    if test:
        text = (REPOSITORY / path).read_text()
        assert re.search(rf"^ *def {re.escape(test)}\(", text, re.M), place
    if anchor:
        heads = re.findall(r"^#+ (.*)$", (REPOSITORY / path).read_text(), re.M)
        places = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
        assert anchor in places, place


def test_facts_become_a_table_whose_cells_lead_to_their_evidence(generate: ModuleType):
    import facts

    read = f"https://github.com/a/b/blob/{'0123456789' * 4}/c.py#L1"
    rows = [
        {"feature": "x", "package": "ours", "answer": "yes", "evidence": "tests/t.py docs/g.md#h"},
        {"feature": "x", "package": "b", "answer": "no", "evidence": f"{read} https://d.org"},
        {"feature": "y", "package": "ours", "answer": "few words", "evidence": "LICENSE"},
        {"feature": "y", "package": "b", "answer": "?", "evidence": ""},
    ]
    for row, day in zip(
        rows, ("2026-12-02", "2026-11-30", "2026-12-01", "2026-11-30"), strict=True
    ):
        row["read"] = day
    columns = ["feature", "ours", "b"]
    assert generate.format_table(facts.pivoted(rows), columns) == [
        "| feature | ours | b |",
        "|---|---|---|",
        f"| x | [yes](g.md#h) | [no]({read}) |",
        "| y | few words | ? |",
    ]
    assert facts.states_read(rows) == "Read on 2026-11-30 to 2026-12-02: a/b at 0123456."
    assert facts.shown_by(rows) == [
        {"feature": "x", "shown by": "`tests/t.py`"},
        {"feature": "y", "shown by": "`LICENSE`"},
    ]


def test_seeds_are_averaged(generate: ModuleType):
    rows = [
        {"task": "a", "seed": "1", "steps": "10", "return": "90.5", **SOURCE},
        {"task": "a", "seed": "2", "steps": "10", "return": "110.5", **SOURCE},
        {"task": "a", "seed": "3", "steps": "20", "return": "7.25", **SOURCE},
    ]
    first, second = generate.over_seeds(rows, ["task", "steps"], ["return"])
    # (90.5 + 110.5) / 2 = 100.5, which is even rounded to even.
    assert (first["seed"], first["return"]) == ("1, 2", "100 (90 to 110)")
    assert (second["seed"], second["return"]) == ("3", "7.25")


def test_published_returns_are_interpolated(generate: ModuleType):
    # walker-walk: 28.0 at 0 and 961.9 at 100,000 frames; hopper-hop: 13.6 at 100,000.
    assert generate.published("walker-walk", 30_000) == "308"
    assert generate.published("hopper-hop", 100_000) == "14"
    assert generate.published("hopper-hop", 10**9) == "-"
    assert generate.published("lqr-lqr_2_1", 100_000) == "-"


def test_machines_are_said_once_and_commands_wrapped(generate: ModuleType):
    command = "python x.py --seed {} " + " ".join(f"--option-{n} {n}" for n in range(8))
    rows = [
        {"task": "a", "seed": seed, **SOURCE, "command": command.format(seed), "machine": machine}
        for seed, machine in (
            ("1", "a chip, load average at the start 2.0"),
            ("2", "a chip, load average at the start 0.5"),
        )
    ]
    assert generate.format_sources(rows, ["task", "seed"]) == [
        "```text",
        "python x.py --seed 1|2 --option-0 0 --option-1 1 --option-2 2 --option-3 3"
        " --option-4 4 \\",
        "    --option-5 5 --option-6 6 --option-7 7",
        "```",
        "",
        "Machine: commit 1234567, a chip, load average at the start 0.5 to 2.",
        "",
    ]


def test_a_rerun_replaces_its_row(copy: Path):
    import add

    path = copy / "results" / "learning.csv"
    before = rows_of(path)
    kinds = [(row["task"], row["algorithm"]) for row in before]
    old = next(row for row, kind in zip(before, kinds, strict=True) if kinds.count(kind) == 1)
    values = {**old, "return": "123.4", "commit": "abcdef0"}
    add.main(["learning", *(f"{name}={value}" for name, value in values.items())])
    after = rows_of(path)
    assert [row for row in after if row != values] == [row for row in before if row != old]
    assert after.index(values) == before.index(old)
    for page in ("README.md", "docs/results.md"):
        assert "123.4 |" in (copy / page).read_text()
    assert "Machine: commit abcdef0," in (copy / "docs" / "results.md").read_text()

    add.main(["learning", *(f"{n}={v}" for n, v in {**values, "seed": "77"}.items())])
    assert len(rows_of(path)) == len(before) + 1
    both = f"| {old['task']} | {old['algorithm']} | {old['seed']}, 77 |"
    assert both in (copy / "README.md").read_text()


def test_a_row_that_lacks_a_column_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]):
    import add

    with pytest.raises(SystemExit):
        add.main(["cold_start", "acting by=chance", "returned=3"])
    assert "missing are ['command', 'return'], unknown ['returned']" in capsys.readouterr().err
    assert (copy / "results" / "cold_start.csv").read_text() == (
        RESULTS / "cold_start.csv"
    ).read_text()


def test_a_fact_is_replaced_and_was_read_today(copy: Path):
    import add

    cell = {"feature": "Trained agents to download", "package": "this package"}
    values = {**cell, "answer": "seven", "evidence": "docs/share.md"}
    path = copy / "results" / "features.csv"
    before = rows_of(path)
    add.main(["features", *(f"{name}={value}" for name, value in values.items())])
    after = rows_of(path)
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert changed == [{**values, "read": datetime.date.today().isoformat()}]
    assert (
        "| Trained agents to download | [seven](share.md) |"
        in (copy / "docs" / "results.md").read_text()
    )


@pytest.mark.parametrize(
    ("name", "values", "lacking"),
    [
        ("features", ["feature=x", "package=y", "answer=yes", "evidence="], "['evidence']"),
        ("cold_start", ["acting by=chance", "return=3", "command="], "['command']"),
    ],
)
def test_a_row_without_its_source_is_not_written(
    copy: Path, capsys: pytest.CaptureFixture[str], name: str, values: list[str], lacking: str
):
    import add

    with pytest.raises(SystemExit):
        add.main([name, *values])
    assert f"has no {lacking}." in capsys.readouterr().err
    assert (copy / "results" / f"{name}.csv").read_text() == (RESULTS / f"{name}.csv").read_text()


def test_an_answer_without_evidence_is_refused(copy: Path, generate: ModuleType):
    path = copy / "results" / "features.csv"
    rows = rows_of(path)
    for answer, refused in (("?", False), ("yes", True)):
        rows[0] = {**rows[0], "answer": answer, "evidence": ""}
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        table = next(each for each in generate.read_tables() if each["file"] == "features")
        if refused:
            with pytest.raises(ValueError, match=r"features\.csv: .* has no \['evidence'\]"):
                generate.read_rows(table)
        else:
            assert generate.read_rows(table) == rows


@pytest.mark.slow
def test_a_run_of_the_zoo_becomes_a_row(copy: Path):
    import add

    options = "--algo ppo --env Pendulum-v1 --seed 5 -n 128 --eval-freq 64 --eval-episodes 1"
    params = "-params n_envs:1 n_steps:64 batch_size:64 n_epochs:1"
    subprocess.run(
        [sys.executable, "-m", "rl_zoo3.train", *options.split(), *params.split()],
        cwd=copy,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
        timeout=300,
    )
    run = copy / "logs" / "ppo" / "Pendulum-v1_1"
    add.main(["learning", "--run", str(run), "machine=a chip", "commit=abcdef0"])
    row = rows_of(copy / "results" / "learning.csv")[-1]
    with np.load(run / "evaluations.npz") as data:
        assert row["return"] == f"{data['results'][-1].mean():.1f}"
        assert row["agent steps"] == row["frames"] == str(data["timesteps"][-1])
    assert (row["task"], row["algorithm"], row["seed"]) == ("Pendulum-v1", "ppo", "5")
    assert row["command"] == f"python -m rl_zoo3.train {options} {params}"


def test_the_history_is_linked_from_nowhere_else():
    for path in REPOSITORY.rglob("*.md"):
        inside = {part for part in path.relative_to(REPOSITORY).parts if part.startswith(".")}
        if not inside and "history" not in path.parts and "site-packages" not in path.parts:
            assert "history/" not in path.read_text(), path
    index = (REPOSITORY / "benchmarks" / "history" / "README.md").read_text()
    for path in (REPOSITORY / "benchmarks" / "history").rglob("*.md"):
        name = str(path.relative_to(REPOSITORY / "benchmarks" / "history"))
        assert name in ("README.md", "time_to_return/README.md") or f"({name})" in index
