"""Memory and speed of the replay buffer: storing, sampling, saving, loading.

    python benchmarks/replay_buffer.py
    python benchmarks/replay_buffer.py --output replay_buffer.md

Fills 1,000,000 steps of walker-walk's sizes (24 observations, 6 actions, episodes of 500 steps) and
assembles batches of 256 sub-sequences of 3 steps (256 x 4 observations). Times are medians and
quartiles of single calls on the clock, that of storing is processor time; memory is what the
process gains while the buffer fills.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gymnasium import spaces

from machine import command, describe
from tdmpc2_sb3.replay.buffer import SequenceReplayBuffer

STEPS = 1_000_000
EPISODE = 500
BATCH = 256


def resident_bytes() -> int:
    """Memory that the process holds now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def quartiles(function: Callable[[], object], calls: int) -> str:
    """Median and quartiles of the milliseconds of a call."""
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - begin))
    low, median, high = np.percentile(times, [25, 50, 75])
    return f"{median:.3f} ms ({low:.3f} to {high:.3f}), {calls} calls"


def make_buffer() -> SequenceReplayBuffer:
    observation_space = spaces.Box(-np.inf, np.inf, (24,), np.float32)
    action_space = spaces.Box(-1, 1, (6,), np.float32)
    return SequenceReplayBuffer(
        STEPS, observation_space, action_space, device="cpu", horizon=3, seed=0
    )


def fill(buffer: SequenceReplayBuffer) -> float:
    """Store the steps; microseconds of processor time a step."""
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((EPISODE + 1, 1, 24), dtype=np.float32)
    action, reward = np.zeros((1, 6), dtype=np.float32), np.zeros(1)
    begin = time.process_time()
    for step in range(STEPS):
        place = step % EPISODE
        done = np.array([place == EPISODE - 1])
        info = {"TimeLimit.truncated": bool(done[0])}
        buffer.add(observations[place], observations[place + 1], action, reward, done, [info])
    return 1e6 * (time.process_time() - begin) / STEPS


def measure() -> list[tuple[str, str]]:
    """All figures as (what, value)."""
    buffer = make_buffer()
    before = resident_bytes()
    microseconds = fill(buffer)
    gained = resident_bytes() - before
    rows = [
        ("steps stored / sub-sequences", f"{buffer.num_steps} / {buffer.num_subsequences}"),
        ("arrays", f"{buffer.nbytes / 1e6:.1f} MB"),
        ("memory gained by the process", f"{gained / 1e6:.1f} MB"),
        ("storing a step", f"{microseconds:.0f} us"),
        ("a batch of 256 x 4", quartiles(lambda: buffer.sample(BATCH), 2000)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "replay_buffer.pkl"
        rows.append(("saving", quartiles(lambda: buffer.save(path), 5)))
        other = make_buffer()
        rows.append(("loading", quartiles(lambda: other.load(path), 5)))
        rows.append(("file", f"{path.stat().st_size / 1e6:.1f} MB"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    about = describe("numpy", "torch", "stable-baselines3")
    lines = [
        "# Replay buffer",
        "",
        f"Command: `{command()}`",
        "",
        f"Machine: {about}.",
        "",
        "| | walker-walk, 1,000,000 steps |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in measure()),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
