"""Which agents of a study are measured together, by runs made by hand and a real one."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tdmpc2_sb3.study import runs, steadiness
from tdmpc2_sb3.study.plan import Plan, read_plan

WALKER = "DMC/walker-walk-v0"
CONTRASTS = {
    "ssm against mlp": {"ssm": 1, "mlp": -1},
    "all": {"ssm": 1, "mlp": 1, "long": -2},
}


@pytest.fixture
def plan(study) -> Plan:
    arms = dict.fromkeys(("mlp", "ssm", "long"))
    return study(arms=arms, seeds=[1, 2], steps=400, save_freq=100, contrasts=CONTRASTS)


def make_run(plan: Plan, arm: str, seed: int, returns: list[float], saved: list[int]) -> None:
    """A run of 10-step episodes with these returns and models kept after these steps."""
    (cell,) = [each for each in plan.cells if (each.arm.name, each.seed) == (arm, seed)]
    run = plan.folder / runs.log_folder(plan, cell) / "tdmpc2" / f"{cell.task.name}_1"
    run.mkdir(parents=True)
    rows = "".join(f"{value},10,{place}\n" for place, value in enumerate(returns, 1))
    (run / "0.monitor.csv").write_text('#{"t_start": 0.0, "env_id": "x"}\nr,l,t\n' + rows)
    for steps in saved:
        (run / f"rl_model_{steps}_steps.zip").touch()


def test_skill_is_the_mean_of_the_last_ten_episodes_before_the_model(plan):
    make_run(plan, "mlp", 1, [*range(20), *[100.0] * 5], [90, 100, 150, 250])
    kept = steadiness.kept_models(plan, plan.cells[0])
    # Nine episodes are too few; 0 to 9; 5 to 14; 15 to 19 and five times 100.
    skills = [pytest.approx(float("nan"), nan_ok=True), 4.5, 9.5, 58.5]
    assert [each.skill for each in kept] == skills
    assert [each.steps for each in kept] == [90, 100, 150, 250]
    assert steadiness.kept_models(plan, plan.cells[1]) == []


def test_pairs_are_the_closest_of_each_seed(plan):
    make_run(plan, "mlp", 1, [10.0] * 10 + [50.0] * 10 + [80.0] * 10, [100, 200, 300])
    make_run(plan, "ssm", 1, [20.0] * 10 + [52.0] * 10 + [70.0] * 10, [100, 200, 300])
    make_run(plan, "mlp", 2, [10.0] * 10, [100])
    make_run(plan, "ssm", 2, [90.0] * 10, [90, 100])
    arms = steadiness.two_arms(plan, "ssm against mlp")
    assert arms == ("ssm", "mlp")

    def found(least: float, within: float):
        pairs = steadiness.matched_pairs(plan, plan.tasks[0], arms, least, within)
        return [[(each.cell.name[:3], each.steps) for each in pair] for pair in pairs]

    assert found(0, 0.1) == [[("ssm", 200), ("mlp", 200)]]
    assert found(60, 0.2) == [[("ssm", 300), ("mlp", 300)]]
    assert found(60, 0.1) == []
    assert found(0, 1.0) == [[("ssm", 200), ("mlp", 200)], [("ssm", 100), ("mlp", 100)]]


def test_what_cannot_be_measured_is_one_sentence(plan):
    with pytest.raises(ValueError, match=r"'all' is no contrast of two .* 'ssm against mlp'\."):
        steadiness.two_arms(plan, "all")
    with pytest.raises(ValueError, match="no agent of a finished run on DMC/walker-walk-v0"):
        steadiness.groups(plan, plan.tasks[0], [], 0, 0.1)


def test_correlation_is_of_ranks_over_agents():
    values = {
        "a": {"latent_error_growth": 0.1, "plan_change": 1.0, "return": 9.0},
        "b": {"latent_error_growth": 0.2, "plan_change": 5.0, "return": 8.0},
        "c": {"latent_error_growth": 0.3, "plan_change": 2.0},
        "d": {"latent_error_growth": 0.4, "plan_change": 6.0},
    }
    # Ranks 1, 3, 2, 4 against 1, 2, 3, 4: 1 - 6 * (1 + 1) / (4 * 15).
    assert steadiness.correlations(values) == {"plan_change": pytest.approx(0.8)}


@pytest.mark.slow
def test_agents_of_a_real_study(tmp_path, tiny):
    arms = {"mlp": {"params": tiny}, "ssm": {"algo": "tdmpc2_ssm", "params": tiny}}
    content = {
        "arms": arms,
        "tasks": [WALKER],
        "seeds": [3],
        "steps": 300,
        "eval_freq": -1,
        "save_freq": 275,
        "device": "cpu",
        "contrasts": {"ssm against mlp": {"ssm": 1, "mlp": -1}},
    }
    file = tmp_path / "mini.yml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))

    def command(name: str, *options: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "tdmpc2_sb3.study", name, str(file), *options],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, timeout=600,
        ).stdout  # fmt: skip

    command("run", "--jobs", "1")
    printed = command(
        "steadiness", "--episodes", "2", "--max-steps", "30", "--match", "ssm against mlp",
        "--within", "1",
    )  # fmt: skip
    assert "DMC/walker-walk-v0, end: 2 agents" in printed
    folder = tmp_path / "mini" / "steadiness" / "DMC-walker-walk-v0"
    assert agents(folder / "end") == [("mlp", "300"), ("ssm", "300")]
    matched = agents(folder / "ssm_against_mlp")
    assert [arm for arm, _ in matched] == ["ssm", "mlp"]
    plan = read_plan(file)
    skills = {(k.cell.arm.name, str(k.steps)): k.skill for c in plan.cells
              for k in steadiness.kept_models(plan, c)}  # fmt: skip
    assert len(skills) == 4
    differences = [
        abs(skills["ssm", s] - skills["mlp", m]) / max(skills["ssm", s], skills["mlp", m])
        for s in ("275", "300") for m in ("275", "300")
    ]  # fmt: skip
    (_, of_ssm), (_, of_mlp) = matched
    found = abs(skills["ssm", of_ssm] - skills["mlp", of_mlp])
    assert found / max(skills["ssm", of_ssm], skills["mlp", of_mlp]) == min(differences)
    with (folder / "end" / "stability_episodes.csv").open() as rows:
        measured = {(row["arm"], row["metric"]) for row in csv.DictReader(rows)}
    assert {("ssm", "rank_correlation"), ("mlp", "latent_error_growth")} <= measured


def agents(folder: Path) -> list[tuple[str, str]]:
    with (folder / "agents.csv").open() as file:
        return [(row["arm"], row["steps"]) for row in csv.DictReader(file)]
