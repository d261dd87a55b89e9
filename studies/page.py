"""Writes docs/study.md and its pictures from the CSV files of the studies beside it.

    python studies/page.py           # after a run has finished
    python studies/page.py --check   # says whether the page agrees with the files, writes nothing

What is registered, and what every figure means, stands in README.md; the reports of the single
studies, with all figures and every run's command, in the folders of their CSV files.
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from tdmpc2_sb3.study import statistics
from tdmpc2_sb3.study.plan import Plan, read_plan
from tdmpc2_sb3.study.report import Report, table, write
from tdmpc2_sb3.study.results import read_results
from tdmpc2_sb3.study.statistics import Estimate

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
PAGE = REPOSITORY / "docs" / "study.md"
IMAGES = REPOSITORY / "docs" / "images"
#: In the order of README.md.
STUDIES = (
    "learning_rate", "learning_rate_repeat", "dynamics", "variants_tuning", "variants", "crossed",
    "baselines", "reference_baselines",
)  # fmt: skip
#: The tasks over whose mean the primary endpoint is estimated.
PRIMARY = ("DMC/walker-walk-v0", "DMC/cheetah-run-v0")
INTERACTIONS = {
    10: "dynamics by horizon, 10 against 3",
    5: "dynamics by horizon, 5 against 3",
}
EFFECTS = (
    "ssm against mlp at 3", "ssm against mlp at 5", "ssm against mlp at 10",
    "horizon 10 against 3, mlp", "horizon 10 against 3, ssm",
)  # fmt: skip
COLUMNS = ("task", "arm", "seeds", "area", "last evaluation", "above the floor", "minutes")
WIDTH = 100


def read_plans() -> list[Plan]:
    """Returns the studies that are written down."""
    return [read_plan(path) for name in STUDIES if (path := HERE / f"{name}.yml").is_file()]


def read_reports(plans: Sequence[Plan]) -> dict[str, Report]:
    """Returns the report of every study of which a run is there, by its name."""
    found = {plan.name: Report(plan, read_results(plan)) for plan in plans}
    return {name: report for name, report in found.items() if report.results}


def over_primary_tasks(report: Report, contrast: str) -> dict[int, float]:
    """Returns the mean over walker-walk and cheetah-run of a contrast's area, by seed."""
    by_task = [
        report.sums(task, contrast).get("area", {})
        for task in report.plan.tasks
        if task.env in PRIMARY
    ]
    seeds = set.intersection(*map(set, by_task)) if len(by_task) == len(PRIMARY) else set()
    return {seed: sum(each[seed] for each in by_task) / len(PRIMARY) for seed in sorted(seeds)}


def verdict(estimate: Estimate) -> str:
    """Returns what an interval says of a difference."""
    if math.isnan(estimate.low):
        return "one seed: no interval"
    if estimate.low <= 0 <= estimate.high:
        return "no difference found"
    return "larger" if estimate.mean > 0 else "smaller"


def shown(values: dict[int, float]) -> tuple[str, str, str]:
    """Returns mean with interval, the verdict, and the values by seed."""
    estimate = statistics.t_interval(list(values.values()))
    interval = "" if math.isnan(estimate.low) else f" [{estimate.low:+.3f}, {estimate.high:+.3f}]"
    # Adding 0 makes a rounded -0 a 0.
    by_seed = ", ".join(f"{seed}: {round(value, 3) + 0:+.3f}" for seed, value in values.items())
    return f"{estimate.mean:+.3f}{interval}", verdict(estimate), by_seed


def answer(report: Report | None) -> str:
    """Returns the paragraph that can be quoted."""
    values = over_primary_tasks(report, INTERACTIONS[10]) if report else {}
    if report is None or not values:
        return (
            "**There is no answer yet**: no seed has all four runs of the comparison on both "
            "tasks. What is planned, and what there is of it, follows."
        )
    found, said, _ = shown(values)
    effects = []
    for horizon in (3, 10):
        mean, word, _ = shown(over_primary_tasks(report, f"ssm against mlp at {horizon}"))
        effects.append(f"{mean} at a horizon of {horizon} ({word})")
    seeds = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
    return (
        f"**With {seeds} on walker-walk and cheetah-run, lengthening the horizon from 3 to 10 "
        f"changed the area under the learning curve by {found} more with SSM than with MLP "
        f"dynamics ({said}).** SSM minus MLP is {' and '.join(effects)}. Areas are shares of the "
        "highest possible return, brackets Student's 95% intervals over seeds; both kinds have as "
        "many parameters."
    )


def planned(plans: Sequence[Plan], reports: dict[str, Report]) -> str:
    """Returns the table of what was planned, and what there is of it."""
    rows = []
    for plan in plans:
        results = reports[plan.name].results if plan.name in reports else {}
        done = sum(result.finished for result in results.values())
        missing = [cell.title for cell in plan.cells if cell.name not in results]
        said = "" if not missing else missing[0] if len(missing) == 1 else f"{len(missing)} runs"
        rows.append([f"`studies/{plan.name}.yml`", str(len(plan.cells)), str(done), said])
    return table(["study", "runs planned", "finished", "not run yet"], rows)


def dynamics(report: Report) -> str:
    """Returns the main grid: primary endpoint, simple effects, returns, curves."""
    rows = []
    for name in (*INTERACTIONS.values(), *EFFECTS):
        values = over_primary_tasks(report, name)
        if values:
            rows.append([name, "both", *shown(values)])
        for task in report.plan.tasks:
            own = report.sums(task, name).get("area")
            if own:
                rows.append([name, task.env, *shown(own)])
    parts = ["## Dynamics by horizon"]
    if rows:
        parts += [
            "Areas under the curve of training returns; *both*: walker-walk and cheetah-run.",
            table(["contrast", "task", "area", "which is", "by seed"], rows),
        ]
    parts += [
        report.main_table(COLUMNS),
        "Minutes are of runs with other work beside them.",
        "![Training returns](images/study-dynamics-curves.png)",
        "![Evaluations beside PPO and SAC](images/study-dynamics-evaluations.png)",
    ]
    return "\n\n".join(parts)


def cost() -> str:
    """Returns what an agent step of both kinds takes, from benchmarks/results."""
    with (REPOSITORY / "benchmarks" / "results" / "zoo_step.csv").open(newline="") as file:
        steps = {
            (row["horizon"], row["what"].split(",")[0], row["dynamics"]): float(
                row["one thread, ms"]
            )
            for row in csv.DictReader(file)
        }
    rows = []
    for horizon in ("3", "5", "10"):
        row = [horizon]
        for what in ("plan", "agent step"):
            mlp, ssm = (steps[horizon, what, kind] for kind in ("mlp", "ssm"))
            row += [f"{mlp:.1f}", f"{ssm:.1f}", f"{ssm / mlp:.2f}"]
        rows.append(row)
    kinds = ("MLP, ms", "SSM, ms", "SSM / MLP")
    head = ["horizon", *(f"{what}, {kind}" for what in ("plan", "step") for kind in kinds)]
    return "\n\n".join(
        [
            "## What it costs",
            "One thread, with the settings of the study; a step is one plan and two updates "
            "([results](results.md#a-step-with-the-zoos-settings) have command and machine). At "
            "this model size equal steps are about equal minutes.",
            table(head, rows),
        ]
    )


def other(report: Report, title: str, text: str) -> str:
    """Returns the section of a study beside the main grid."""
    rows = report.contrast_rows(("area",))
    parts = [f"## {title}", text, report.main_table(COLUMNS)]
    if rows:
        parts.append(table(["contrast", "task", "figure", "sum", "by seed"], rows))
    return "\n\n".join(parts)


OTHERS = {
    "crossed": (
        "Trained at one horizon, planned at another",
        "Training and planning horizon apart: what is it that a longer horizon changes?",
    ),
    "variants_tuning": (
        "Variants of the SSM, tried",
        "Horizon 10, one seed that is used nowhere else; the rule is the registration's.",
    ),
    "variants": (
        "Variants of the SSM, run",
        "Those that were better on the seed for trying, on the seeds of the main grid.",
    ),
    "baselines": ("PPO and SAC, our settings", "Two frames a step, whole training episodes."),
    "reference_baselines": (
        "PPO and SAC, reference settings",
        "One frame a step. Given with them: PPO 184 at best, SAC 73 at 60,000 steps; both are "
        "marked in the picture of evaluations above.",
    ),
    "learning_rate": (
        "Learning rates",
        "Before everything else, for both kinds alike; the registration tells what was decided.",
    ),
    "learning_rate_repeat": ("Learning rates of the SSM, again", "A second seed."),
}

THREATS = """\
## What speaks against it

- Three to five seeds on two or three tasks: an interval that holds 0 is no proof of equality.
- The shipped settings were chosen with MLP dynamics; of the SSM only the learning rate was chosen
  for itself, by whole training episodes, which walker-walk and cheetah-run no longer have.
- Parameters are matched, not operations: half of the SSM's act on z_0 alone.
- One implementation, state observations, small models, short runs: nothing is said of pixels, of
  the larger models of the paper or of returns after millions of frames.
"""

REPEAT = """\
## Do it again

```bash
python -m tdmpc2_sb3.study run studies/dynamics.yml      # days on two cores; stops and goes on
python -m tdmpc2_sb3.study report studies/dynamics.yml   # every figure and command of a study
python studies/page.py                                   # this page from all CSV files
```

Several machines share a study through PostgreSQL, as in
[experiments](experiments.md#many-machines).
"""


def page() -> str:
    """Returns docs/study.md."""
    plans = read_plans()
    reports = read_reports(plans)
    parts = [
        "# The study",
        "Do state-space dynamics make TD-MPC2 plan more steadily and learn from fewer samples than "
        "an MLP with as many parameters, and does the answer depend on the horizon?",
        answer(reports.get("dynamics")),
        "Arms, seeds, endpoints and rules were committed before the runs (`studies/README.md`). "
        "This page is made from the CSV files of all runs by `python studies/page.py`.",
        planned(plans, reports),
    ]
    if "dynamics" in reports:
        parts.append(dynamics(reports["dynamics"]))
    parts += [other(reports[name], *texts) for name, texts in OTHERS.items() if name in reports]
    parts += [cost(), THREATS.rstrip(), REPEAT]
    return "\n\n".join(_wrapped(part) for part in parts)


def _wrapped(part: str) -> str:
    """Breaks paragraphs; tables, lists, code and what has line breaks of its own stay."""
    paragraphs = part.split("\n\n")
    return "\n\n".join(
        each
        if "\n" in each or each.startswith(("|", "#", "!", "-"))
        else textwrap.fill(each, WIDTH, break_long_words=False, break_on_hyphens=False)
        for each in paragraphs
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="docs/study.md from the CSV files of the studies")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, end with 1 if it differs"
    )
    if parser.parse_args().check:
        agrees = PAGE.is_file() and PAGE.read_text() == page()
        if not agrees:
            print("docs/study.md differs: run python studies/page.py")
        return int(not agrees)
    for report in read_reports(read_plans()).values():
        write(report.plan)
    for name in ("curves", "evaluations"):
        picture = HERE / "dynamics" / f"{name}.png"
        if picture.is_file():
            shutil.copy(picture, IMAGES / f"study-dynamics-{name}.png")
    PAGE.write_text(page())
    print("docs/study.md written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
