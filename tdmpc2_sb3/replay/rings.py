"""Which row of a replay buffer holds what, and where sub-sequences start.

Every environment owns a ring of R rows. A step writes its action, reward and flags into the row of
its observation, and the observation that follows into the next row, so that each observation is
stored once::

    row          0    1    2    3        4    5    6
    observation  o_0  o_1  o_2  o_3      o_0' o_1' ...
    action       a_0  a_1  a_2  (final)  a_0' ...

An episode's last observation has a row of its own without an action. A sub-sequence is therefore
valid exactly if the T rows from its start on all hold actions: the final row of its episode, or the
newest row of the ring, ends it. On request a sub-sequence may also run past a termination; it then
stays at the final row. This module knows rows only, not what is stored in them.

Shape legend: T horizon, E environments, R rows per environment; row r of environment e is the flat
row ``e * R + r``.
"""

from __future__ import annotations

import numpy as np

# One byte of flags a row: four bits, then the steps since the episode's start (counted up to 15).
_STEP = 1  # the row holds an action: a step began here
_TERMINATED = 2  # that step ended the episode by a termination
_START = 4  # a sub-sequence of a finished episode starts here
_ZERO_PADDED = 8  # the episode's first stack of frames was filled up with zeros
_PLACE_SHIFT = 4
MAX_PLACE = 15

_SPARSE = 0.05  # share of rows that are starts, below which listing them beats drawing at random

STATE = ("head", "running", "running_steps", "cut", "used")


class EpisodeRings:
    """Row bookkeeping of a replay buffer.

    :param rows_per_env: R
    :param n_envs: E
    :param horizon: steps T of a sub-sequence
    :param past_terminations: whether sub-sequences start at the last T - 1 steps before a
        termination too
    """

    def __init__(
        self, rows_per_env: int, n_envs: int, horizon: int, past_terminations: bool = False
    ) -> None:
        self.rows_per_env = rows_per_env
        self.n_envs = n_envs
        self.horizon = horizon
        self.past_terminations = past_terminations
        self.margin = 0  # rows before a start that its stack of frames needs
        self.columns = np.arange(n_envs) * rows_per_env  # flat row where each ring begins
        self.flags = np.zeros(0, dtype=np.uint8)
        self.head = np.zeros(n_envs, dtype=np.int64)  # row of the newest observation, or next free
        self.running = np.zeros(n_envs, dtype=bool)  # an episode is running
        self.running_steps = np.zeros(n_envs, dtype=np.int64)  # steps of it that are stored
        self.cut = np.zeros(n_envs, dtype=bool)  # the ring has overwritten its beginning
        self.used = np.zeros(n_envs, dtype=np.int64)  # rows ever written
        self.num_steps = 0  # steps stored now
        self.num_starts = 0  # rows flagged _START

    @property
    def num_rows(self) -> int:
        """Rows of all environments."""
        return self.n_envs * self.rows_per_env

    @property
    def full(self) -> bool:
        """Whether every ring has been written through."""
        return bool((self.used == self.rows_per_env).all())

    def allocate(self) -> None:
        """Take the memory: one byte a row."""
        self.flags = np.zeros(self.num_rows, dtype=np.uint8)

    # ---------------------------------------------------------------- writing

    def begin(self, envs: np.ndarray, zero_padded: np.ndarray) -> np.ndarray:
        """Start an episode in each of ``envs`` [n].

        :param envs: environments without a running episode
        :param zero_padded: [n], see :meth:`zero_padded`
        :return: flat rows [n] of the first observations
        """
        rows = self.columns[envs] + self.head[envs]
        self._release(envs, self.head[envs])
        self.flags[rows] = np.where(zero_padded, _ZERO_PADDED, 0)
        self.running[envs] = True
        self.running_steps[envs] = 0
        self.cut[envs] = False
        return rows

    def advance(self, terminated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take a step in every environment.

        :param terminated: where the step ended its episode by a termination [E]
        :return: flat rows of the step and of the observation that follows it, [E] each
        """
        rows = self.columns + self.head
        self.head = (self.head + 1) % self.rows_per_env
        next_rows = self.columns + self.head
        self._release(np.arange(self.n_envs), self.head)
        flags = self.flags[rows]
        place = np.minimum((flags >> _PLACE_SHIFT) + 1, MAX_PLACE)
        self.flags[next_rows] = (place << _PLACE_SHIFT) | (flags & _ZERO_PADDED)
        self.flags[rows] = flags | _STEP | np.where(terminated, _TERMINATED, 0).astype(np.uint8)
        self.num_steps += self.n_envs
        wrapped = self.head == 0
        self.used = np.where(wrapped, self.rows_per_env, np.maximum(self.used, self.head + 1))
        self.running_steps += 1
        # A ring that holds nothing but the running episode has just lost the episode's first step.
        cut = self.running_steps == self.rows_per_env
        self.running_steps -= cut
        self.cut |= cut
        return rows, next_rows

    def close(self, which: np.ndarray) -> None:
        """End the running episodes of ``which`` [E] and mark where their sub-sequences start."""
        if not which.any():
            return
        first, _ = self.running_starts()
        for env in np.flatnonzero(which & self.running):
            begin = int(first[env])
            end = begin + (int(self.head[env]) - begin) % self.rows_per_env
            rows = self._starts(int(env), begin, end)
            self.flags[rows] |= _START
            self.num_starts += len(rows)
            self.running[env] = False
            self.running_steps[env] = 0
            self.head[env] = (self.head[env] + 1) % self.rows_per_env

    def _starts(self, env: int, begin: int, end: int) -> np.ndarray:
        """Return the flat rows where sub-sequences start, of a finished episode's ring rows."""
        terminated = self.terminated(self._ring_rows(env, end - 1, end)).any()
        if not (self.past_terminations and terminated):
            end -= self.horizon - 1
        return self._ring_rows(env, begin, end)

    def _release(self, envs: np.ndarray, heads: np.ndarray) -> None:
        """Uncount what the rows about to be overwritten hold."""
        rows = self.columns[envs] + heads
        flags = self.flags[rows]
        self.num_steps -= int(np.count_nonzero(flags & _STEP))
        self._unmark(rows, flags & _START)
        for distance in range(1, self.margin + 1):  # stacks of frames that need the lost one
            later = self.columns[envs] + (heads + distance) % self.rows_per_env
            flags = self.flags[later]
            self._unmark(later, (flags & _START) * (flags >> _PLACE_SHIFT >= distance))

    def _unmark(self, rows: np.ndarray, which: np.ndarray) -> None:
        lost = rows[which != 0]
        if len(lost):
            self.flags[lost] &= 0xFF ^ _START
            self.num_starts -= len(lost)

    # ---------------------------------------------------------------- reading

    def place(self, rows: np.ndarray) -> np.ndarray:
        """Return the steps since the episode's start, counted up to 15, of flat rows [...]."""
        return self.flags.take(rows) >> _PLACE_SHIFT

    def zero_padded(self, rows: np.ndarray) -> np.ndarray:
        """Say of flat rows [...] whether zeros filled up the first stack of their episode."""
        return (self.flags.take(rows) & _ZERO_PADDED) != 0

    def is_step(self, rows: np.ndarray) -> np.ndarray:
        """Say of flat rows [...] whether a step began there."""
        return (self.flags.take(rows) & _STEP) != 0

    def terminated(self, rows: np.ndarray) -> np.ndarray:
        """Say of flat rows [...] whether their step ended the episode by a termination."""
        return (self.flags.take(rows) & _TERMINATED) != 0

    def newest_rows(self) -> np.ndarray:
        """Return the flat rows [E] of the last observations written."""
        return self.columns + (self.head - ~self.running) % self.rows_per_env

    def running_starts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return where the sub-sequences of the running episodes start: first ring row, number.

        They start in consecutive rows. Returns two arrays [E].
        """
        skipped = np.where(self.cut, self.margin, 0)
        first = (self.head - self.running_steps + skipped) % self.rows_per_env
        count = np.where(self.running, self.running_steps - skipped - self.horizon + 1, 0)
        return first, np.maximum(count, 0)

    def draw(self, number: int, num_running: int, rng: np.random.Generator) -> np.ndarray:
        """Draw sub-sequences with replacement, each as likely as any other.

        :param number: how many
        :param num_running: sub-sequences in running episodes: all of them, or 0 to leave them out
        :param rng: source of randomness
        :return: flat rows [T+1, number]; past a termination the episode's final row is repeated
        """
        if num_running == 0:
            starts = self._draw_finished(number, rng)
        else:
            tickets = rng.integers(self.num_starts + num_running, size=number)
            tickets = tickets[tickets >= self.num_starts] - self.num_starts
            first, count = self.running_starts()
            ends = np.cumsum(count)
            env = np.searchsorted(ends, tickets, side="right")
            offsets = tickets - (ends - count)[env]
            running = self.columns[env] + (first[env] + offsets) % self.rows_per_env
            starts = np.concatenate([self._draw_finished(number - len(tickets), rng), running])
        steps: np.ndarray = np.arange(self.horizon + 1)[:, None]
        ring_ends = (starts // self.rows_per_env + 1) * self.rows_per_env
        if self.past_terminations:
            steps = np.minimum(steps, self._steps_left(starts, ring_ends))
        rows = starts + steps
        rows -= self.rows_per_env * (rows >= ring_ends)
        return rows

    def _steps_left(self, starts: np.ndarray, ring_ends: np.ndarray) -> np.ndarray:
        """Count the steps from each of ``starts`` [n] to its episode's end, up to T."""
        left = np.zeros_like(starts)
        for _ in range(self.horizon):
            rows = starts + left
            rows -= self.rows_per_env * (rows >= ring_ends)
            left += self.is_step(rows)
        return left

    def _draw_finished(self, number: int, rng: np.random.Generator) -> np.ndarray:
        """Draw flagged rows [number] by rejection: no index of them takes up memory."""
        if number == 0:
            return np.zeros(0, dtype=np.int64)
        used = int(self.used.max())
        density = self.num_starts / (used * self.n_envs)
        if density < _SPARSE:
            starts = np.flatnonzero(self.flags & _START)
            return starts[rng.integers(len(starts), size=number)]
        found = np.zeros(0, dtype=np.int64)
        while len(found) < number:
            tries = int((number - len(found)) / density * 1.1) + 16
            rows = rng.integers(used * self.n_envs, size=tries)
            if used != self.rows_per_env:  # pass over what has never been written
                rows += rows // used * (self.rows_per_env - used)
            found = np.concatenate([found, rows[(self.flags.take(rows) & _START) != 0]])
        return found[:number]

    def longest_episode(self) -> int:
        """Return the number of steps of the longest episode stored."""
        runs = [run for env in range(self.n_envs) for run in self._runs(env)]
        return max((end - begin for begin, end in runs), default=0)

    # ---------------------------------------------------------------- loading

    def count_and_mark(self) -> None:
        """Count the steps and flag the starts afresh, after state and flags were read from a file.

        The horizon may differ from the one with which the file was written.
        """
        self.flags &= 0xFF ^ _START
        for env in range(self.n_envs):
            for begin, end in self._runs(env):
                if self.running[env] and end % self.rows_per_env == self.head[env]:
                    continue  # the running episode
                whole = self.place(self.columns[env] + begin % self.rows_per_env) == 0
                begin += 0 if whole else self.margin
                self.flags[self._starts(env, begin, end)] |= _START
        self.num_steps = int(np.count_nonzero(self.flags & _STEP))
        self.num_starts = int(np.count_nonzero(self.flags & _START))

    def _ring_rows(self, env: int, begin: int, end: int) -> np.ndarray:
        """Return the flat rows of ring rows begin to end (counted on past the ring's end)."""
        return self.columns[env] + np.arange(begin, end) % self.rows_per_env

    def _runs(self, env: int) -> list[tuple[int, int]]:
        """Return the rows (begin, end) of every episode's steps, oldest first.

        They are ring rows, counted on past the ring's end.
        """
        if self.used[env] < self.rows_per_env:
            oldest = 0
        else:
            oldest = int(self.head[env]) + int(self.running[env])
        ring = self.flags[self.columns[env] : self.columns[env] + self.rows_per_env]
        is_step = np.roll(ring & _STEP, -oldest).astype(np.int8)
        edges = np.diff(is_step, prepend=0, append=0)
        begins = np.flatnonzero(edges == 1) + oldest
        ends = np.flatnonzero(edges == -1) + oldest
        return list(zip(begins.tolist(), ends.tolist(), strict=True))
