"""Whether rows of a replay buffer that came from a file are such as steps leave behind.

Sampling goes by the rings' counters and flags without looking twice: a counter out of range reads
rows that were never written, a run of steps without its final row reads those of another episode.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tdmpc2_sb3.replay.rings import (
    _PLACE_SHIFT,
    _STEP,
    _TERMINATED,
    _ZERO_PADDED,
    MAX_PLACE,
    STATE,
    EpisodeRings,
)

_TRUTHS = ("running", "cut")


def restore_counters(rings: EpisodeRings, header: dict[str, Any], num_added: int) -> None:
    """Take over the counters of all rings.

    :param rings: without any row
    :param header: one list a counter, with a number for each environment
    :param num_added: steps that every environment has made
    :raises ValueError: naming the counter and the value
    """
    for name in STATE:
        values = header[name]
        kind = bool if name in _TRUTHS else int
        if (
            not isinstance(values, list)
            or len(values) != rings.n_envs
            or not all(type(value) is kind and 0 <= value <= rings.rows_per_env for value in values)
        ):
            raise ValueError(f"{name} = {str(values)[:80]}")
        getattr(rings, name)[:] = values
    _check_counters(rings, num_added)


def _check_counters(rings: EpisodeRings, num_added: int) -> None:
    rows, used, head, running = rings.rows_per_env, rings.used, rings.head, rings.running
    steps, full = rings.running_steps, used == rows
    # Rows are written one after the other: until the ring has been written through, the newest is
    # the last one in use, and between two episodes the next free row comes behind it.
    newest = np.where(running, used - 1, used)
    for name, fits in (
        # A step writes two rows, of all rings at once or of none.
        ("used", (used >= 2) if num_added else (used == 0)),
        ("used", used <= 2 * num_added),
        ("head", np.where(full, head < rows, head == newest)),
        ("running", ~running | (used >= 2)),
        ("running_steps", np.where(running, (steps >= 1) & (steps < used), steps == 0)),
        ("running_steps", steps <= num_added),
        ("cut", ~rings.cut | full),
    ):
        if not fits.all():
            env = int(np.flatnonzero(~fits)[0])
            raise ValueError(f"{name} = {getattr(rings, name)[env]} of environment {env}")


def check_flags(rings: EpisodeRings) -> None:
    """Refuse flags that no sequence of steps leaves behind.

    :param rings: with the counters and flags of a file
    :raises ValueError: naming what is impossible and where
    """
    for env in range(rings.n_envs):
        _check_ring(rings, env)


def _check_ring(rings: EpisodeRings, env: int) -> None:
    """A ring holds, from its oldest row on, runs of steps, each followed by its final row.

    The oldest run may lack its beginning where the ring has been written through; the newest is the
    running episode, if there is one.
    """
    used, rows = int(rings.used[env]), rings.rows_per_env
    if not used:
        return
    oldest = int(rings.head[env]) + int(rings.running[env]) if used == rows else 0
    column = rings.columns[env]
    flags = np.roll(rings.flags[column : column + rows], -oldest)[:used]
    is_step, terminated = (flags & _STEP) != 0, (flags & _TERMINATED) != 0
    place, padded = flags >> _PLACE_SHIFT, flags & _ZERO_PADDED
    # Of each row but the oldest: whether the row before led to it.
    led = is_step[:-1]
    next_place = np.minimum(place[:-1] + 1, MAX_PLACE)
    impossible = {
        "a termination without a step": terminated & ~is_step,
        "a row without an episode": ~led & ~is_step[1:],
        "a step behind a termination": terminated[:-1] & is_step[1:],
        "a wrong place in its episode": place[1:] != np.where(led, next_place, 0),
        "frames filled up otherwise than before": led & (padded[1:] != padded[:-1]),
    }
    for problem, where in impossible.items():
        if where.any():
            row = (oldest + int(np.flatnonzero(where)[0]) + len(flags) - len(where)) % rows
            raise ValueError(f"{problem} in row {row} of environment {env}")
    if used < rows and place[0] != 0:
        raise ValueError(f"no episode that begins in row 0 of environment {env}")
    run = used - 1 - (int(np.flatnonzero(~is_step[:-1]).max(initial=-1)) + 1)
    running_steps = int(rings.running_steps[env])
    if is_step[-1] or (rings.running[env] and (run != running_steps or terminated[-2])):
        raise ValueError(
            f"running_steps = {running_steps} where {run} steps end in the newest row of "
            f"environment {env}"
        )
    lost_beginning = bool(run == used - 1 and place[0] != 0)
    if bool(rings.cut[env]) != lost_beginning:
        raise ValueError(f"cut = {not lost_beginning} of environment {env}")
