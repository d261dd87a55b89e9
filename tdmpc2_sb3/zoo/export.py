"""`python -m tdmpc2_sb3.zoo export RUN`: a run as a small folder to play, keep or share.

The layout is the zoo's (that of its rl-trained-agents); what only a run that goes on needs is left
out, and so is what names the machine.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from rl_zoo3.utils import ALGOS, get_latest_run_id

from tdmpc2_sb3.saving.log_files import MONITOR_FILES
from tdmpc2_sb3.zoo import scrubbing
from tdmpc2_sb3.zoo.register import install
from tdmpc2_sb3.zoo.resume import Run, find_run

#: Beside the model: what it returned, and what builds its environment.
KEPT = (MONITOR_FILES, "evaluations.npz")
KEPT_SETTINGS = ("args.yml", "config.yml", "vecnormalize.pkl")


def export(run: Run, output: Path, best: bool) -> Path:
    """Write the agent of a run to a folder of the zoo's layout.

    :param run: finished or not
    :param output: folder in which `algo/ENV_1` is made, or the next free number
    :param best: take the best model of the evaluations, not the last
    :return: the folder
    :raises ValueError: if there is no such model in the run
    :raises SystemExit: if something in it names this machine and cannot be taken out
    """
    model = run.folder / ("best_model.zip" if best else f"{run.name}.zip")
    if not model.is_file():
        found = [each.name for each in sorted(run.folder.glob("*.zip"))]
        raise ValueError(
            f"'{run.folder}' has no {model.name} (but {', '.join(found) or 'no model at all'}): "
            + ("leave --best out." if best else "let the run end, or pass --best.")
        )
    algo = str(run.args["algo"])
    folder = output / algo
    folder.mkdir(parents=True, exist_ok=True)
    # Whole or not at all.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export_") as temporary:
        written = Path(temporary) / "agent"
        (written / run.name).mkdir(parents=True)
        agent = ALGOS[algo].load(model, device="cpu")
        agent.save(written / f"{run.name}.zip", resumable=False)  # type: ignore[call-arg]
        for pattern in (*KEPT, *(f"{run.name}/{name}" for name in KEPT_SETTINGS)):
            for path in run.folder.glob(pattern):
                shutil.copyfile(path, written / path.relative_to(run.folder))
        scrubbing.scrub_folder(written, [algo, str(run.args["env"])], say=lambda _: None)
        number = get_latest_run_id(str(folder), run.name) + 1
        target = folder / f"{run.name}_{number}"
        written.rename(target)
    return target


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status.

    :param arguments: without the program's name; None for this process's
    """
    parser = argparse.ArgumentParser(
        "python -m tdmpc2_sb3.zoo export",
        description="Copy the agent of a run, without what only learning needs and without what "
        "names this machine, to a folder that enjoy plays: -f FOLDER.",
    )
    parser.add_argument("run", nargs="+", help="such as logs/tdmpc2/DMC-walker-walk-v0_1")
    parser.add_argument("-o", "--output", type=Path, default=Path("agents"), metavar="FOLDER")
    parser.add_argument("--best", action="store_true", help="the best evaluated model")
    options = parser.parse_args(arguments)
    install()
    for name in options.run:
        try:
            run = find_run(name)
            folder = export(run, options.output, options.best)
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)
            return 1
        size = sum(each.stat().st_size for each in folder.rglob("*") if each.is_file())
        print(f"{folder}: {size / 1e6:.1f} MB. Play it:")
        print(
            f"  python -m rl_zoo3.enjoy --algo {run.args['algo']} --env {run.args['env']} "
            f"-f {options.output}"
        )
    return 0
