"""The page of the project's own study: it agrees with its files, and says what they say."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tdmpc2_sb3.study.report import Report
from tdmpc2_sb3.study.results import read_results

STUDIES = Path(__file__).resolve().parents[2] / "studies"
WALKER, CHEETAH, HOPPER = (
    f"DMC/{name}-v0" for name in ("walker-walk", "cheetah-run", "hopper-hop")
)
ARMS = ("mlp_h3", "ssm_h3", "mlp_h10", "ssm_h10")
CONTRASTS = {
    "dynamics by horizon, 10 against 3": dict(zip(ARMS, (1, -1, -1, 1), strict=True)),
    "ssm against mlp at 3": {"ssm_h3": 1, "mlp_h3": -1},
    "ssm against mlp at 10": {"ssm_h10": 1, "mlp_h10": -1},
}


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDIES))
    import page

    return page


@pytest.fixture
def report(study, made_csv) -> Report:
    """Returns of 400 are 1; all episodes of a run are alike. Seed 3 lacks a run on cheetah-run."""
    plan = study(
        arms=dict.fromkeys(ARMS),
        tasks={task: {"range": [0, 400]} for task in (WALKER, CHEETAH, HOPPER)},
        seeds=[1, 2, 3],
        steps=1000,
        curve="training",
        contrasts=CONTRASTS,
    )
    returns = {  # of seeds 1, 2 and 3
        WALKER: {"mlp_h3": (200, 240, 9), "ssm_h3": (120, 200, 9), "mlp_h10": (160, 160, 9),
                 "ssm_h10": (200, 120, 9)},
        CHEETAH: {"mlp_h3": (40, 40, 9), "ssm_h3": (40, 40, 9), "mlp_h10": (40, 40, 9),
                  "ssm_h10": (80, 40, None)},
        HOPPER: dict.fromkeys(ARMS, (7, 8, 9)),
    }  # fmt: skip
    for cell in plan.cells:
        value = returns[cell.task.env][cell.arm.name][cell.seed - 1]
        if value is not None:
            made_csv(plan, cell.name, [(500, value), (1000, value)], [(1000, value)])
    return Report(plan, read_results(plan))


def test_the_page_agrees_with_the_files(page: ModuleType):
    assert page.PAGE.read_text() == page.page(), "run python studies/page.py"


def test_the_primary_endpoint_is_the_mean_of_two_tasks_by_seed(page: ModuleType, report: Report):
    # walker-walk: (200 - 120 - 160 + 200) / 400 = 0.3 and (240 - 200 - 160 + 120) / 400 = 0;
    # cheetah-run: (40 - 40 - 40 + 80) / 400 = 0.1 and 0. Seed 3 is left out: a run is missing.
    found = page.over_primary_tasks(report, page.INTERACTIONS[10])
    assert found == {1: pytest.approx(0.2), 2: pytest.approx(0.0)}
    # Mean 0.1; Student's quantile 12.706 times 0.14142 / sqrt(2) is 1.271.
    assert page.shown(found) == (
        "+0.100 [-1.171, +1.371]", "no difference found", "1: +0.200, 2: +0.000"
    )  # fmt: skip
    # SSM - MLP at 3: walker-walk -0.2 and -0.1, cheetah-run 0, 0 and (seed 3) 0 on both.
    assert page.over_primary_tasks(report, "ssm against mlp at 3") == {
        1: pytest.approx(-0.1), 2: pytest.approx(-0.05), 3: 0
    }  # fmt: skip


def test_the_answer_is_what_the_figures_say(page: ModuleType, report: Report):
    said = page.answer(report)
    assert said.startswith("**With 2 seeds on walker-walk and cheetah-run, lengthening the horizon")
    assert "by +0.100 [-1.171, +1.371] more with SSM than with MLP dynamics" in said
    assert "(no difference found)" in said
    assert page.answer(None).startswith("**There is no answer yet**")


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({1: 0.5}, "one seed: no interval"),
        ({1: 0.5, 2: 0.51, 3: 0.52}, "larger"),
        ({1: -0.5, 2: -0.51, 3: -0.52}, "smaller"),
        ({1: 0.5, 2: -0.51, 3: 0.2}, "no difference found"),
    ],
)
def test_verdicts(page: ModuleType, values: dict[int, float], word: str):
    assert page.shown(values)[1] == word


def test_planned_runs_that_are_missing_are_named(page: ModuleType, report: Report):
    lines = page.planned([report.plan], {report.plan.name: report}).splitlines()
    assert lines[2] == "| `studies/mini.yml` | 36 | 35 | ssm_h10, DMC/cheetah-run-v0, seed 3 |"
