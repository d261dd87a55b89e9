"""The line about machine, versions and load that every result of these benchmarks carries.

    from machine import describe, command

    describe("torch", "numpy", threads=2)

A GPU is named where torch is among the packages and sees one.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from datetime import date
from pathlib import Path


def processor() -> str:
    """Return the processor's name as the system writes it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(*packages: str) -> str:
    """Return ``name version`` of installed distributions, with commas between them."""
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def graphics() -> str | None:
    """Return the name of the GPU that torch sees, None without one; imports torch."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def describe(*packages: str, threads: int | None = None) -> str:
    """Return date, processor, cores, system, Python, versions and the load average now.

    Call it before the measurement: afterwards the load is the measurement's own.

    :param packages: distributions whose versions matter to the result
    :param threads: threads that the measured program uses, where it was told a number
    """
    used = "" if threads is None else f" ({threads} used)"
    gpu = graphics() if "torch" in packages else None
    parts = [
        str(date.today()),
        processor(),
        f"{os.cpu_count()} cores{used}",
        *([gpu] if gpu else []),
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}",
        *([versions(*packages)] if packages else []),
        f"load average at the start {os.getloadavg()[0]:.1f}",
    ]
    return ", ".join(parts)


def command() -> str:
    """Return the command line that started this program, without any machine's paths."""
    script = Path(sys.argv[0])
    return " ".join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])
