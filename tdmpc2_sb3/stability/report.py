"""The study on paper: CSV files, one picture, and a short table for the terminal."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tdmpc2_sb3.stability.study import Estimate, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What the terminal shows, in this order: measure, heading, is more better (None: neither).
HEADLINES: tuple[tuple[str, str, bool | None], ...] = (
    ("return", "return", True),
    ("latent_error_growth", "growth of open-loop error", False),
    ("plan_change", "plan-to-plan change", False),
    ("plan_change_floor", "  its noise floor", None),
    ("plan_change_kl", "plan-to-plan KL", False),
    ("plan_change_kl_floor", "  its noise floor", None),
    ("elite_spread", "elite spread", None),
    ("effective_samples", "effective samples", None),
    ("mean_change", "change in the last iteration", None),
    ("value_bias", "value bias", None),
    ("realisation_gap", "realisation gap", None),
    ("realisation_gap_abs", "realisation gap, absolute", False),
    ("rank_correlation", "rank correlation, values", True),
    ("rank_correlation_rewards", "rank correlation, rewards", True),
    ("action_jerk", "action jerk", None),
    ("latency_ms_median", "plan latency, median ms", False),
    ("latency_ms_p95", "plan latency, 95% ms", False),
)


def write(study: Study, folder: Path, title: str) -> None:
    """Tables and picture.

    :param folder: of the files
    :param title: of the picture
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_summary(study.estimates, folder / "stability.csv")
    write_episodes(study, folder / "stability_episodes.csv")
    draw(study, folder / "stability.png", title)


def write_summary(estimates: Sequence[Estimate], path: Path) -> None:
    """One line an arm, measure and k."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Estimate._fields)
        writer.writerows(["" if cell is None else cell for cell in row] for row in estimates)


def write_episodes(study: Study, path: Path) -> None:
    """One line an agent, episode, measure and k."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "agent", "episode", "metric", "k", "value"])
        for m in study.measurements:
            for i, value in enumerate(m.values):
                k = "" if m.first_k is None else m.first_k + i
                writer.writerow([m.arm, m.name, m.episode, m.metric, k, float(value)])


def format_table(estimates: Sequence[Estimate]) -> str:
    """Means and intervals of the single figures, one column an arm."""
    arms = _arms(estimates)
    cells = {(e.metric, e.arm): e for e in estimates if e.k is None}
    width = max(36, *(len(arm) + 2 for arm in arms))
    lines = [f"{'':30}" + "".join(f"{arm:>{width}}" for arm in arms)]
    for metric, heading, better in HEADLINES:
        if not any((metric, arm) in cells for arm in arms):
            continue
        mark = {True: " (high)", False: " (low)", None: ""}[better]
        line = f"{heading + mark:36}"[:36]
        for arm in arms:
            e = cells.get((metric, arm))
            text = "-" if e is None else f"{e.mean:.4g} [{e.low:.4g}, {e.high:.4g}]"
            line += f"{text:>{width}}"
        lines.append(line)
    lines[0] = " " * 6 + lines[0]
    return "\n".join(lines)


def draw(study: Study, path: Path, title: str) -> None:
    """The study as one picture: what prediction does with k, and what plans are worth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = _arms(study.estimates)
    cycle = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    colours = {arm: cycle[i % len(cycle)] for i, arm in enumerate(arms)}
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    curves = (
        ("latent_error", "open-loop latent error / variance", "k, steps ahead"),
        ("probe_error", "observation error (probe), standard deviations²", "k, steps ahead"),
        ("reward_error", "reward error |r̂ - r|", "k, steps ahead"),
    )
    for axis, (metric, label, k_label) in zip(axes[0], curves, strict=True):
        _draw_curve(axis, study, metric, label, k_label, colours)
    _draw_returns(axes[1, 0], study, colours)
    _draw_bars(
        axes[1, 1], study, colours, "plan-to-plan change (hatched: replanning with other noise)",
        (("plan_change", "plan_change_floor", "mean, squared"),
         ("plan_change_kl", "plan_change_kl_floor", "Gaussian KL")), log=True,
    )  # fmt: skip
    _draw_bars(
        axes[1, 2], study, colours, "rank correlation of planned and simulated return",
        (("rank_correlation", None, "with the last state's value"),
         ("rank_correlation_rewards", None, "rewards alone")),
    )  # fmt: skip
    figure.suptitle(f"{title}: means with 95% intervals over episodes and seeds")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _arms(estimates: Sequence[Estimate]) -> list[str]:
    return list(dict.fromkeys(e.arm for e in estimates))


def _draw_curve(
    axis: Axes, study: Study, metric: str, label: str, k_label: str, colours: dict[str, str]
) -> None:
    for arm, colour in colours.items():
        rows = [e for e in study.estimates if e.arm == arm and e.metric == metric]
        if rows:
            k = [e.k or 0 for e in rows]
            axis.plot(k, [e.mean for e in rows], color=colour, label=arm)
            low, high = [e.low for e in rows], [e.high for e in rows]
            axis.fill_between(k, low, high, color=colour, alpha=0.2)
    axis.set(title=label, xlabel=k_label)
    if axis.lines:
        axis.set_ylim(bottom=0)
        axis.legend()
    else:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)


def _draw_returns(axis: Axes, study: Study, colours: dict[str, str]) -> None:
    for arm, (planned, realised) in study.pairs.items():
        every = max(1, len(planned) // 800)
        axis.plot(
            realised[::every], planned[::every], ".", ms=3, alpha=0.4, color=colours[arm], label=arm
        )
    everything = np.concatenate([v for pair in study.pairs.values() for v in pair])
    bounds = [everything.min(), everything.max()]
    axis.plot(bounds, bounds, "k--", lw=1, label="planned = realised")
    axis.set(title="value of plans", xlabel="realised discounted return", ylabel="planned return")
    axis.legend(markerscale=4)


def _draw_bars(
    axis: Axes,
    study: Study,
    colours: dict[str, str],
    title: str,
    groups: Sequence[tuple[str, str | None, str]],
    log: bool = False,
) -> None:
    cells = {(e.metric, e.arm): e for e in study.estimates if e.k is None}
    width = 0.8 / len(colours)
    for g, (metric, floor, _) in enumerate(groups):
        for a, (arm, colour) in enumerate(colours.items()):
            x = g + (a - (len(colours) - 1) / 2) * width
            e = cells.get((metric, arm))
            if e is None:
                continue
            error = [[max(0.0, e.mean - e.low)], [max(0.0, e.high - e.mean)]]
            axis.bar(
                x, e.mean, 0.9 * width, yerr=error, color=colour, capsize=3,
                label=arm if g == 0 else None,
            )  # fmt: skip
            base = cells.get((floor, arm)) if floor else None
            if base is not None:
                axis.bar(x, base.mean, 0.9 * width, fill=False, hatch="///", edgecolor="k")
    axis.set_xticks(range(len(groups)), [name for *_, name in groups])
    axis.set_title(title, fontsize=10)
    if axis.patches:
        if log:
            axis.set_yscale("log")
        axis.legend()
    else:
        axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
