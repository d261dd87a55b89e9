"""What the start-up hook costs a Python that has nothing to do with us: milliseconds a start.

    python benchmarks/startup_hook.py
    python benchmarks/startup_hook.py --output startup_hook.md

Two bare virtual environments, one with the hook, start `python -c pass` in turns; the figure is the
median difference of the pairs. At most 2 ms are allowed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import command, describe

STARTUP = Path(__file__).resolve().parents[1] / "startup"


def make_environments(folder: Path) -> tuple[Path, Path]:
    """Interpreters of two new environments: without the hook, with it."""
    for name in ("without", "with"):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / name], check=True)
    site_packages = next((folder / "with" / "lib").glob("python*/site-packages"))
    for file in STARTUP.iterdir():
        if file.is_file():
            shutil.copy(file, site_packages)
    return folder / "without" / "bin" / "python", folder / "with" / "bin" / "python"


def seconds(python: Path) -> float:
    start = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    about = describe()
    with tempfile.TemporaryDirectory() as folder:
        without, with_hook = make_environments(Path(folder))
        seconds(without), seconds(with_hook)
        pairs = [(seconds(without), seconds(with_hook)) for _ in range(args.pairs)]
    difference = statistics.median(after - before for before, after in pairs)
    plain = statistics.median(before for before, _ in pairs)
    text = (
        "# Cost of the start-up hook\n\n"
        f"A start of `python -c pass`: {1e3 * plain:.2f} ms; the hook adds "
        f"**{1e3 * difference:.2f} ms** (median of {args.pairs} pairs; at most 2 ms are allowed).\n"
        f"\nCommand: `{command()}`\n\nMachine: {about}.\n"
    )
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
