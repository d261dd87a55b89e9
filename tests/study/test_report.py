"""The report of fixed CSV files, and CSV files made of log folders."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from tdmpc2_sb3.study import pictures, report, results
from tdmpc2_sb3.study.collect import collect

HOPPER, WALKER = "DMC/hopper-hop-v0", "DMC/walker-walk-v0"


def row(table: str, *beginning: str) -> list[str]:
    """The cells of the first line of a table that begins like this."""
    start = f"| {' | '.join(beginning)} |"
    line = next(line for line in table.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture
def plan(study, made_csv):
    """Two arms on two tasks; every training episode of a run but the first has the same return."""
    plan = study(
        arms={"old": None, "new": {"params": {"entropy": "squashed"}}},
        tasks={HOPPER: {"floor": 50, "steps": 50_000}, WALKER: None},
        seeds=[1, 2],
        steps=1000,
        at_frames=[1000],
        curve="training",
    )
    returns = {"old": (40.0, 60.0), "new": (90.0, 130.0)}
    for cell in plan.cells:
        value = returns[cell.arm.name][cell.seed - 1] * (1 if cell.task.env == HOPPER else 5)
        half, end = cell.steps // 2, cell.steps
        made_csv(plan, cell.name, [(half, 0.0), (end, value)], [(end, value), (end, value + 2)])
    return plan


def test_the_report_of_fixed_csvs(plan):
    report.write(plan)
    text = (plan.results_folder / report.FILE).read_text()
    old, new = row(text, HOPPER, "old"), row(text, HOPPER, "new")
    # Last episodes: means of (0, 40) and (0, 60); of two seeds any mean of two samples is likely.
    assert old[:7] == [
        HOPPER, "old", "100,000", "2", "25.0 [20.0, 30.0]", "51.0 [41.0, 61.0]",
        "0.025 [0.020, 0.030]",
    ]  # fmt: skip
    assert old[7:] == ["-", "50: 1 of 2, not reached", "3", "14", "0"]
    assert new[4:7] == ["55.0 [45.0, 65.0]", "111.0 [91.0, 131.0]", "0.055 [0.045, 0.065]"]
    assert new[8] == "50: 2 of 2, 50,000"
    # At 1,000 frames only the first episode of a walker run had ended.
    assert row(text, WALKER, "new")[7] == "0.0 [0.0, 0.0]"

    # Differences of 25 and 35: mean 30, Student's quantile 12.706 times 7.071 / sqrt(2).
    assert row(text, HOPPER, "new", "last 10 episodes")[3:] == [
        "30.0 [-33.5, 93.5]",
        "1: 25.0, 2: 35.0",
    ]
    assert row(text, HOPPER, "new", "area")[4] == "1: 0.025, 2: 0.035"

    # Over tasks: old 0.020, 0.030 and 0.100, 0.150; all of new's runs are better.
    over = row(text, "old", "2 x 2")
    assert over[2].startswith("0.065 [")  # of 0.030 and 0.100, the middle half
    assert over[3].startswith("0.075 [")
    assert row(text, "new", "2 x 2")[5] == "1.000 [1.000, 1.000]"
    for picture in ("curves.png", "aggregates.png", "profiles.png"):
        assert Image.open(plan.results_folder / picture).size[0] > 500


def test_other_studies_and_references_stand_beside_the_evaluations(study, made_csv, tmp_path):
    other = study(name="sac", arms={"sac": {"algo": "sac"}}, steps=4000)
    made_csv(other, other.cells[0].name, [(4000, 9.0)], [(2000, 5.0), (4000, 7.0)])
    (tmp_path / "mini.yml").rename(tmp_path / "sac.yml")
    references = {"given, SAC": [60, 73], "given, PPO": 184}
    plan = study(
        tasks={WALKER: {"references": references, "range": [0, 400]}},
        curve="training",
        beside=["sac.yml"],
    )
    made_csv(plan, plan.cells[0].name, [(50, 1.0), (100, 2.0)], [(50, 3.0), (100, 4.0)])
    report.write(plan)
    text = (plan.results_folder / report.FILE).read_text()
    assert "![Evaluations](evaluations.png)" in text
    assert Image.open(plan.results_folder / "evaluations.png").size[0] > 500

    axis = Figure().subplots()
    arms = [
        ("a", "-", list(results.read_results(plan).values())),
        ("sac", "--", list(results.read_results(other).values())),
    ]
    pictures._learning_curve(axis, plan.tasks[0], arms, "evaluation")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert drawn["a (1)"] == [[100, 3], [200, 4]]
    assert drawn["sac (1)"] == [[4000, 5], [8000, 7]]
    assert drawn["given, SAC"] == [[60, 73]]
    assert {y for _, y in drawn["given, PPO"]} == {184}
    assert axis.get_xlim() == (0, 250)  # 1.25 of the study's own 200 frames

    # Of episodes that are shorter than the suite's, nothing of others is beside.
    axis = Figure().subplots()
    pictures._learning_curve(axis, plan.tasks[0], arms[:1], "training")
    assert [line.get_label() for line in axis.lines] == ["a (1)"]


@pytest.mark.parametrize(
    "content",
    [
        {"tasks": {WALKER: {"references": {"x": [1, 2, 3]}}}},
        {"tasks": {WALKER: {"references": {"x": "184"}}}},
        {"tasks": {WALKER: {"references": 184}}},
        {"beside": "sac.yml"},
        {"beside": [3]},
    ],
)
def test_wrong_references_are_one_sentence(study, content):
    with pytest.raises(ValueError, match=r"(reference|beside).* must be"):
        study(**content)


def test_an_interaction_of_fixed_csvs(study, made_csv):
    arms = ("mlp3", "mlp10", "ssm3", "ssm10")
    weights = dict(zip(arms, (1, -1, -1, 1), strict=True))
    plan = study(
        arms=dict.fromkeys(arms),
        tasks=[HOPPER, WALKER],
        seeds=[1, 2],
        steps=1000,
        curve="training",
        contrasts={"dynamics x horizon": weights},
    )
    #: Returns of the two seeds on walker-walk; on hopper-hop all are equal.
    returns = {"mlp3": (500, 600), "mlp10": (400, 450), "ssm3": (450, 600), "ssm10": (480, 520)}
    for cell in plan.cells:
        value = float(returns[cell.arm.name][cell.seed - 1]) if cell.task.env == WALKER else 7.0
        made_csv(plan, cell.name, [(500, value), (1000, value)], [(1000, value), (1000, value)])
    report.write(plan)
    text = (plan.results_folder / report.FILE).read_text()
    assert "dynamics x horizon: +1 mlp3 -1 mlp10 -1 ssm3 +1 ssm10" in text
    # 500 - 400 - 450 + 480 = 130 and 600 - 450 - 600 + 520 = 70: mean 100, and Student's quantile
    # 12.706 times 42.43 / sqrt(2) is 381.2.
    assert row(text, "dynamics x horizon", WALKER, "last 10 episodes")[3:] == [
        "100.0 [-281.2, 481.2]",
        "1: 130.0, 2: 70.0",
    ]
    assert row(text, "dynamics x horizon", WALKER, "area")[4] == "1: 0.130, 2: 0.070"
    assert row(text, "dynamics x horizon", HOPPER, "last evaluation")[3] == "0.0 [0.0, 0.0]"
    # Half of (0.130, 0.070) and (0, 0).
    assert row(text, "dynamics x horizon", "all of them", "area")[3].startswith("0.050 [0.035")


def test_the_same_csvs_give_the_same_report(plan):
    report.write(plan)
    files = {path.name: path.read_bytes() for path in plan.results_folder.iterdir()}
    report.write(plan)
    assert {path.name: path.read_bytes() for path in plan.results_folder.iterdir()} == files


def test_missing_and_unfinished_runs_are_named(plan, made_csv):
    missing, unfinished = plan.cells[0], plan.cells[1]  # hopper-hop, seed 1
    results.csv_path(plan, missing).unlink()
    made_csv(plan, unfinished.name, [(25_000, 80.0)], finished=False)
    report.write(plan)
    text = (plan.results_folder / report.FILE).read_text()
    assert row(text, missing.title)[1] == "missing"
    (line,) = [line for line in text.splitlines() if line.startswith(f"| [{unfinished.title}]")]
    assert "25,000 of 50,000 steps" in line
    # The unfinished run counts where it reached, not at the end.
    assert row(text, HOPPER, "new")[3:5] == ["2, 1 finished", "65.0"]
    assert "| 1: " not in text.split("## Differences")[1].split(WALKER)[0]


def test_no_csv_yet(study):
    with pytest.raises(ValueError, match="There is no CSV in"):
        report.write(study())


def test_a_damaged_csv_is_one_sentence(plan):
    path = results.csv_path(plan, plan.cells[0])
    path.write_text(path.read_text()[:120])
    with pytest.raises(ValueError, match=f"'{path}' is damaged or no result of a study"):
        report.write(plan)


def test_lines_of_training_are_means_over_stretches():
    header = {"action_repeat": 2, "steps": 80, "finished": True}
    steps = np.arange(1, 81)
    none = (np.empty(0, dtype=int), np.empty(0))
    run = results.Result(header, (steps, np.where(steps % 2, 0.0, 10.0)), none)
    places, returns = pictures.lines([run], "training")
    assert len(places) == pictures.STRETCHES
    assert places[-1] == 160
    # The last stretch of 158 / 39 frames holds the episodes that end at frames 156 (10? no: > it).
    inside = [s for s in steps if 160 - 158 / 39 < 2 * s <= 160]
    assert returns[0, -1] == np.mean([0.0 if s % 2 else 10.0 for s in inside])


def write_log(folder: Path, params: str | None, steps: int = 100, seed: int = 1) -> Path:
    """A finished run of the zoo, as far as `collect` reads it."""
    import json
    import zipfile

    name = WALKER.replace("/", "-")
    run = folder / "tdmpc2" / f"{name}_1"
    (run / name).mkdir(parents=True)
    args = {
        "algo": "tdmpc2",
        "env": WALKER,
        "seed": seed,
        "n_timesteps": steps,
        "eval_episodes": 2,
        "eval_freq": 50,
        "conf_file": None,
        "hyperparams": {"entropy": params} if params else None,
    }
    (run / name / "args.yml").write_text(yaml.dump(OrderedDict(args)))
    (run / name / "config.yml").write_text(
        yaml.dump(OrderedDict(env_kwargs={"action_repeat": 2}, learning_rate=3e-4))
    )
    (run / name / "command.txt").write_text(
        f"/somewhere/bin/python -m rl_zoo3.train -params entropy:'{params}'"
    )
    (run / "0.monitor.csv").write_text(
        '#{"t_start": 10.0, "env_id": "x"}\nr,l,t\n1.5,40,60.0\n2.5,40,120.0\n'
    )
    np.savez(
        run / "evaluations.npz",
        timesteps=np.array([50, 100]),
        results=np.array([[3.0, 5.0], [7.0, 9.0]]),
        ep_lengths=np.array([[40, 40], [40, 40]]),
    )
    with zipfile.ZipFile(run / f"{name}.zip", "w") as archive:
        archive.writestr("data", json.dumps({"num_timesteps": 100}))
    return run


def test_log_folders_become_csvs(study, tmp_path):
    plan = study(arms={"a": {"params": {"entropy": "squashed"}}}, eval_episodes=2)
    write_log(tmp_path / "by_hand", "squashed")
    lines = list(collect(plan, "a", tmp_path / "by_hand", "abc1234"))
    assert lines == ["a, DMC/walker-walk-v0, seed 1: finished"]
    path = results.csv_path(plan, plan.cells[0])
    table = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    # 100 steps at 40 a minute are 2.5 minutes; frames are two a step.
    assert table == [
        "kind,steps,frames,minutes,return,length",
        "training,40,80,1.0,1.5,40",
        "evaluation,50,100,1.25,3.0,40",
        "evaluation,50,100,1.25,5.0,40",
        "training,80,160,2.0,2.5,40",
        "evaluation,100,200,2.5,7.0,40",
        "evaluation,100,200,2.5,9.0,40",
    ]
    header = results.read_result(plan, plan.cells[0]).header
    (attempt,) = header["attempts"]
    assert attempt["command"] == "python -m rl_zoo3.train -params entropy:'squashed'"
    assert attempt["commit"] == "abc1234"
    assert (header["minutes"], header["action_repeat"]) == (2.5, 2)
    assert header["hyperparameters"]["learning_rate"] == 0.0003
    assert list(collect(plan, "a", tmp_path / "by_hand", "")) == [
        "a, DMC/walker-walk-v0, seed 1: is there already"
    ]


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        ({"params": None}, r"was made with params = \{\}, arm 'a' has \{'entropy': 'squashed'\}"),
        ({"params": "squashed", "steps": 99}, "was made with steps = 99, arm 'a' has 100"),
        ({"params": "squashed", "seed": 7}, "with seed 7, which arm 'a' does not plan"),
    ],
)
def test_what_was_not_planned_is_not_collected(study, tmp_path, log, sentence):
    plan = study(arms={"a": {"params": {"entropy": "squashed"}}}, eval_episodes=2)
    write_log(tmp_path / "by_hand", **log)
    with pytest.raises(ValueError, match=sentence):
        list(collect(plan, "a", tmp_path / "by_hand", ""))
    assert not plan.results_folder.exists()


def test_collect_without_runs_or_arm(study, tmp_path):
    with pytest.raises(ValueError, match="There is no run of the zoo below"):
        list(collect(study(), "a", tmp_path, ""))
    with pytest.raises(ValueError, match="The study has no arm 'b': it has a"):
        list(collect(study(), "b", tmp_path, ""))


def test_the_command_line(plan):
    def study_command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tdmpc2_sb3.study", *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    done = study_command("status", str(plan.file))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^mini: 8 of 8 cells done", done.stdout, re.M)
    wrong = study_command("report", "nowhere.yml")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert wrong.stderr.startswith("There is no file 'nowhere.yml'")
