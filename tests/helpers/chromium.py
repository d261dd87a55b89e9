"""Debian's Chromium without a display: a page's picture, and what went wrong while it was drawn."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def find_chromium() -> str | None:
    """Returns the program's path; None where it is not installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def screenshot(program: str, address: str, picture: Path, size: tuple[int, int]) -> list[str]:
    """Draws a page and returns the errors that it wrote to its console.

    :param program: from :func:`find_chromium`
    :param address: of the page
    :param picture: PNG to write
    :param size: width and height of the window in pixels
    """
    profile = picture.with_suffix(".profile")
    done = subprocess.run(
        [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-sync"),
            *("--disable-component-update", "--hide-scrollbars", "--virtual-time-budget=5000"),
            *("--enable-logging=stderr", f"--user-data-dir={profile}"),
            *(f"--window-size={size[0]},{size[1]}", f"--screenshot={picture}", address),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert picture.is_file(), done.stderr[-2000:]
    shutil.rmtree(profile, ignore_errors=True)
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]
