"""What the start-up hook costs a Python that has nothing to do with us: milliseconds a start.

    python benchmarks/startup_hook.py

Two bare virtual environments, one with the hook, start `python -c pass` in turns; the figure is the
median difference of the pairs. At most 2 ms are allowed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        without, with_hook = make_environments(Path(folder))
        seconds(without), seconds(with_hook)
        pairs = [(seconds(without), seconds(with_hook)) for _ in range(args.pairs)]
    difference = statistics.median(after - before for before, after in pairs)
    plain = statistics.median(before for before, _ in pairs)
    print(f"a start: {1e3 * plain:.2f} ms; the hook adds {1e3 * difference:.2f} ms")
    print(
        f"median of {args.pairs} pairs, {date.today()}, Python {platform.python_version()}, ",
        end="",
    )
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
