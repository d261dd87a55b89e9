"""Kills a saving process at random moments, in a script that a test runs."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable


def kill_at_random_moments(save: Callable[[], None], check: Callable[[], None], times: int) -> None:
    """Calls ``save`` over and over in forked processes, kills them, and calls ``check`` after each.

    The child tells of every finished save. After the first one it is killed at a random moment of
    the second to fourth, however busy the machine is.
    """
    generator = random.Random(0)
    begin = time.perf_counter()
    save()
    duration = time.perf_counter() - begin
    for _ in range(times):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            while True:
                save()
                os.write(writer, b".")
        try:
            if not select.select([reader], [], [], 60)[0]:
                sys.exit("the forked process finished no save within a minute")
            time.sleep(generator.uniform(0, 3 * duration))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
            os.close(writer)
        check()


def run_script(text: str, *arguments: object) -> str:
    """Runs a script in a process of its own, which imports what this one can.

    :param arguments: of its command line
    :return: what it printed
    """
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
