"""`python -m tdmpc2_sb3.plot logs/ -o curves.png`: runs of the zoo beside the published curves.

One row an environment: return against frames, and against wall-clock time. Runs of one algorithm
are one line, the mean over them, with a band from the lowest to the highest. The published curves
of TD-MPC2 and SAC (means over three seeds) are dashed.

Evaluations come from `evaluations.npz`, which the zoo's evaluation callback writes, their times
from the training episodes in `*.monitor.csv`, the frames of a step from the saved configuration.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tdmpc2_sb3.saving.attribute_checks import is_whole, short
from tdmpc2_sb3.saving.files import open_zip, read_member
from tdmpc2_sb3.saving.log_files import MONITOR_FILES, read_monitor
from tdmpc2_sb3.zoo.yaml_files import read_yaml

PUBLISHED = Path(__file__).with_name("published_curves.csv")
PUBLISHED_LABELS = {  # points every 100,000 frames, straight lines between them
    "tdmpc2": "TD-MPC2, published (every 100k)",
    "sac": "SAC, published (every 100k)",
}
COLOURS = {"tdmpc2": "C0", "sac": "C1", "ppo": "C2", "tdmpc2_ssm": "C3"}
#: Our curves are drawn beside this much more of the published ones.
PUBLISHED_MARGIN = 1.25


class Run(NamedTuple):
    """One training run.

    :param algo: the zoo's name of the algorithm
    :param env_name: folder name of the environment, such as `DMC-walker-walk-v0`
    :param steps: agent steps at each evaluation, [E]
    :param returns: mean return of each evaluation, [E]
    :param minutes: wall-clock minutes since the run's start at each evaluation, [E]
    :param action_repeat: frames a step
    """

    algo: str
    env_name: str
    steps: np.ndarray
    returns: np.ndarray
    minutes: np.ndarray
    action_repeat: int


class Episodes(NamedTuple):
    """Training episodes of a run: steps of all of them so far, minutes since its start, [N]."""

    steps: np.ndarray
    minutes: np.ndarray
    returns: np.ndarray
    lengths: np.ndarray


class Curve(NamedTuple):
    """Several runs on one axis: mean, lowest and highest return at each place, [E]."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def read_action_repeat(folder: Path, env_name: str) -> int:
    """Return the frames of a step: from the configuration, else the command line, else 1."""
    for file in ("config.yml", "args.yml"):
        path = folder / env_name / file
        # Lenient: runs of any algorithm are drawn, whatever else their settings hold.
        env_kwargs = read_yaml(path, strict=False).get("env_kwargs") if path.is_file() else None
        if isinstance(env_kwargs, dict) and "action_repeat" in env_kwargs:
            repeat = env_kwargs["action_repeat"]
            if not is_whole(repeat, 1, 10**6):
                raise ValueError(f"'{path}' has the action_repeat {short(repeat)}: correct it.")
            return int(repeat)
    return 1


def read_episodes(folder: Path) -> Episodes:
    """Read the training episodes of a run, of all its environments, in the order they ended."""
    files = [read_monitor(path) for path in folder.glob(MONITOR_FILES)]
    ends = np.concatenate(
        [np.empty((0, 3)), *(episodes + [0.0, 0.0, start] for start, episodes in files)]
    )
    returns, lengths, times = ends[np.lexsort(ends.T)].T  # by time
    minutes = (times - min((start for start, _ in files), default=0.0)) / 60
    return Episodes(np.cumsum(lengths), minutes, returns, lengths)


def read_clock(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return agent steps, and minutes since the start, at the end of each training episode."""
    episodes = read_episodes(folder)
    return np.append(0, episodes.steps), np.append(0.0, episodes.minutes)


def minutes_at(folder: Path, steps: np.ndarray) -> np.ndarray:
    """Return the minutes since a run's start at these steps (ascending), [E]."""
    clock_steps, clock_minutes = read_clock(folder)
    # The last of them may come after the last finished episode: at the mean speed until there.
    if len(clock_steps) > 1 and len(steps) and steps[-1] > clock_steps[-1]:
        clock_minutes = np.append(clock_minutes, clock_minutes[-1] * steps[-1] / clock_steps[-1])
        clock_steps = np.append(clock_steps, steps[-1])
    return np.interp(steps, clock_steps, clock_minutes)


def read_evaluations(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read EvalCallback's `evaluations.npz`.

    :param path: of the file
    :return: steps [E], and returns and lengths of the episodes [E, N] of each evaluation
    :raises ValueError: if it is damaged
    """
    try:
        with open_zip(path, "npz", "file of evaluations") as archive:
            steps, returns, lengths = (
                np.load(io.BytesIO(read_member(archive, f"{key}.npy")), allow_pickle=False)
                for key in ("timesteps", "results", "ep_lengths")
            )
    except (KeyError, TypeError, ValueError, MemoryError) as error:
        raise ValueError(f"'{path}' is damaged ({short(error)}): use another copy.") from error
    numbers = all(each.dtype.kind in "iuf" for each in (steps, returns, lengths))
    if not numbers or steps.ndim != 1 or returns.shape != lengths.shape or returns.ndim != 2:
        raise ValueError(f"'{path}' is no file of EvalCallback's: use another copy.")
    if len(steps) != len(returns):
        raise ValueError(f"'{path}' has {len(returns)} evaluations at {len(steps)} moments.")
    return steps, returns, lengths


def read_run(folder: Path) -> Run | None:
    """Read a run's folder, such as `logs/tdmpc2/DMC-walker-walk-v0_1`; None if never evaluated."""
    evaluations = folder / "evaluations.npz"
    if not evaluations.is_file():
        return None
    env_name = folder.name.rpartition("_")[0]
    steps, results, _ = read_evaluations(evaluations)
    returns = results.mean(axis=1)
    minutes = minutes_at(folder, steps)
    repeat = read_action_repeat(folder, env_name)
    return Run(folder.parent.name, env_name, steps, returns, minutes, repeat)


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read every run below the given log folders, in the order of their paths."""
    found = {path.parent for folder in folders for path in folder.rglob("evaluations.npz")}
    runs = [read_run(folder) for folder in sorted(found)]
    return [run for run in runs if run is not None]


def merge(xs: Sequence[np.ndarray], ys: Sequence[np.ndarray]) -> Curve:
    """Merge several lines into mean and band, over the range that all of them cover.

    Lines are interpolated at the places of the densest one: seeds that evaluate at the same steps
    are averaged as they are.
    """
    low, high = max(x[0] for x in xs), min(x[-1] for x in xs)
    densest = max(xs, key=len)
    grid = densest[(densest >= low) & (densest <= high)]
    if len(grid) == 0:
        grid = np.array([high])
    lines = np.stack([np.interp(grid, x, y) for x, y in zip(xs, ys, strict=True)])
    return Curve(grid, lines.mean(axis=0), lines.min(axis=0), lines.max(axis=0))


def read_published(env_name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return algorithm -> (frames, mean return) as published, for `DMC-<domain>-<task>-v0`."""
    task = env_name.removeprefix("DMC-").removesuffix("-v0")
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with PUBLISHED.open() as file:
        for row in csv.DictReader(file):
            if row["task"] == task:
                curves[row["algo"]].append((float(row["frames"]), float(row["mean_return"])))
    return {
        algo: (np.array([x for x, _ in points]), np.array([y for _, y in points]))
        for algo, points in curves.items()
    }


def published_return(env_name: str, algo: str, frames: int) -> float | None:
    """Return the published mean return after some frames, straight lines between the points.

    None where nothing was published, or not that far.
    """
    curve = read_published(env_name).get(algo)
    if curve is None or frames > curve[0][-1]:
        return None
    return float(np.interp(frames, *curve))


def draw(runs: Sequence[Run], published: bool = True) -> Any:
    """Draw the runs and return the matplotlib figure.

    :param runs: what to draw, at least one
    :param published: add the published curves
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    env_names = sorted({run.env_name for run in runs})
    figure = Figure(figsize=(11, 3.8 * len(env_names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(env_names), 2, squeeze=False, sharey="row")
    for (by_frames, by_time), env_name in zip(axes, env_names, strict=True):
        here = [run for run in runs if run.env_name == env_name]
        _draw_runs(by_frames, here, [run.steps * run.action_repeat for run in here])
        if published:
            draw_published(by_frames, env_name)
        _draw_runs(by_time, here, [run.minutes for run in here])
        by_frames.set(title=env_name, xlabel="frames", ylabel="evaluation return")
        by_time.set(title=env_name, xlabel="wall-clock time [min]")
        for axis in (by_frames, by_time):
            axis.grid(alpha=0.3)
            axis.set_xlim(left=0)
            axis.spines[["top", "right"]].set_visible(False)
        by_frames.xaxis.set_major_formatter(lambda value, _: thousands(value))
        by_frames.legend(fontsize="small")
    return figure


def thousands(value: float) -> str:
    """Write a number of frames short, such as 50k."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _draw_runs(axis: Any, runs: Sequence[Run], places: Sequence[np.ndarray]) -> None:
    for algo in sorted({run.algo for run in runs}):
        chosen = [index for index, run in enumerate(runs) if run.algo == algo]
        curve = merge([places[i] for i in chosen], [runs[i].returns for i in chosen])
        count = len(chosen)
        label = f"{algo} ({count} run{'s' if count > 1 else ''})"
        (line,) = axis.plot(
            curve.x, curve.mean, label=label, color=COLOURS.get(algo), marker=".", linewidth=2
        )
        if count > 1:
            axis.fill_between(
                curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.2, linewidth=0
            )


def draw_published(axis: Any, env_name: str, colours: Mapping[str, str] = COLOURS) -> None:
    """Add the published curves to an axis in frames, a little further than what is there."""
    limit = axis.get_xlim()[1] * PUBLISHED_MARGIN
    for algo, (frames, returns) in read_published(env_name).items():
        shown = frames <= limit
        # One point past the limit, cut by the axis: the line must not end before it.
        shown[min(int(shown.sum()), len(shown) - 1)] = True
        axis.plot(
            frames[shown],
            returns[shown],
            "--",
            color=colours.get(algo),
            label=PUBLISHED_LABELS[algo],
            linewidth=1.2,
            alpha=0.8,
        )
    axis.set_xlim(right=limit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what the command line asks for and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tdmpc2_sb3.plot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", nargs="+", type=Path, help="log folders of the zoo")
    parser.add_argument("-o", "--output", type=Path, default=Path("curves.png"))
    parser.add_argument("-e", "--env", nargs="+", help="environments: ids, or parts of them")
    parser.add_argument("-a", "--algo", nargs="+", help="algorithms, by the zoo's names")
    parser.add_argument("--no-published", action="store_true", help="leave published curves out")
    options = parser.parse_args(arguments)

    for folder in options.folders:
        if not folder.is_dir():
            parser.error(f"{folder} is no folder; give the zoo's log folder, such as logs/")
    try:
        runs = read_runs(options.folders)
    except ValueError as error:  # a configuration that is no YAML
        parser.error(str(error))
    if options.env:
        parts = [part.replace("/", "-") for part in options.env]
        runs = [run for run in runs if any(part in run.env_name for part in parts)]
    if options.algo:
        runs = [run for run in runs if run.algo in options.algo]
    if not runs:
        parser.error(
            "no run with evaluations found there; the zoo writes evaluations.npz every --eval-freq"
            " steps of training"
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, published=not options.no_published).savefig(options.output, dpi=120)
    for run in runs:
        print(
            f"{run.algo:12} {run.env_name:28} {run.steps[-1] * run.action_repeat:>10} frames "
            f"{run.minutes[-1]:8.1f} min   last return {run.returns[-1]:7.1f}   "
            f"best {run.returns.max():7.1f}"
        )
    print(f"drawn to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
