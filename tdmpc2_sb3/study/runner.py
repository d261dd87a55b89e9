"""Runs the cells of a grid, one process each, until all are finished or it is told to stop."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from optuna.exceptions import StorageInternalError

from tdmpc2_sb3.study import launch, results, runs, statistics, status
from tdmpc2_sb3.study.claims import Claim, Claims, LostClaimError, heartbeat_seconds
from tdmpc2_sb3.study.machine import Cores, available_cores
from tdmpc2_sb3.study.plan import Cell, Plan

POLL_SECONDS = 0.5
LOOK_SECONDS = 5.0  # between looks into the storage while nothing happens here
#: A run that is killed again and again without a new checkpoint in between is given up.
STARTS_WITHOUT_PROGRESS = 3
STORAGE_ERRORS = (StorageInternalError, OSError)


@dataclass
class Running:
    """A run at work.

    :param steps: of its newest checkpoint when it was started
    :param vain: starts from that checkpoint before this one
    :param told: signals that it was sent to end
    """

    claim: Claim
    process: subprocess.Popen[bytes]
    cores: Cores
    steps: int
    vain: int
    told: int = 0
    lost: bool = False

    @property
    def cell(self) -> Cell:
        """That it runs."""
        return self.claim.cell


class Runner:
    """Works on a study.

    :param plan: the study
    :param jobs: runs at a time, None for as many as the cores allow
    :param say: told a line about every start, finish and failure
    """

    def __init__(self, plan: Plan, jobs: int | None, say: Callable[[str], None]) -> None:
        self.plan = plan
        self.jobs = jobs or max(1, len(available_cores()) // plan.threads)
        self.claims = Claims(plan)
        self._say = say
        self._running: list[Running] = []
        self._done: set[str] = set()
        self._failed: set[str] = set()
        self._waiting: list[Claim] = []  # an earlier runner's process is still at work there
        self._owed: list[Callable[[], None]] = []  # what the storage has not been told yet
        self._signals = 0
        self._signed = 0.0
        self._looked = -LOOK_SECONDS
        self._waiting_said = False

    def work(self) -> int:
        """Run all cells that others do not, wait for those that others run; the exit status."""
        before = {
            number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            while self._round():
                time.sleep(POLL_SECONDS)
        finally:
            self._end_runs(1)
            for claim in self._waiting:
                self._owe(self.claims.release, claim)
            with contextlib.suppress(*STORAGE_ERRORS):  # then silence tells it
                self._pay()
            self.claims.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        return 1 if self._failed or self._signals else 0

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def _end_runs(self, signals: int) -> None:
        """At the first signal runs write a checkpoint and end; at the second they just end."""
        for run in self._running:
            if run.told < signals:
                run.process.send_signal(signal.SIGINT if run.told == 0 else signal.SIGTERM)
                run.told += 1

    def _round(self) -> bool:
        """Look after what runs and start what can be; False when there is nothing left to do."""
        ended = [run for run in self._running if run.process.poll() is not None]
        for run in ended:
            self._running.remove(run)
            self._ended(run)
        self._end_runs(self._signals)
        try:
            if time.monotonic() - self._signed > heartbeat_seconds():
                self._signed = time.monotonic()
                self._sign()
            if self._signals:
                return bool(self._running)
            if not ended and time.monotonic() - self._looked < LOOK_SECONDS:
                return True
            self._looked = time.monotonic()
            return self._look()
        except STORAGE_ERRORS as error:  # a database that is started anew, a full disk
            self._say(f"the storage does not answer, runs go on: {' '.join(str(error).split())}")
            return bool(self._running) or not self._signals

    def _owe(self, action: Callable[..., None], *arguments: Any) -> None:
        self._owed.append(lambda: action(*arguments))

    def _pay(self) -> None:
        """Tell the storage what it has not been told yet."""
        while self._owed:
            with contextlib.suppress(LostClaimError):  # the other worker goes on, or finds the CSV
                self._owed[0]()
            self._owed.pop(0)

    def _look(self) -> bool:
        """Read what others have done and fill the free places; False if nothing is left to do."""
        self._pay()
        status.fetch(self.plan, self.claims, self._done)
        for cell in self.plan.cells:
            if cell.name not in self._done:
                result = results.read_result(self.plan, cell)
                if result is not None and result.finished:
                    self._done.add(cell.name)
        left = [cell for cell in self.plan.cells if cell.name not in self._done | self._failed]
        waiting, self._waiting = self._waiting, []
        for claim in waiting:
            self._start(claim, 0)
        self._fill(left)
        return bool(self._running or self._waiting) or self._others_work(left)

    def _fill(self, left: list[Cell]) -> None:
        """Start runs in the free places."""
        busy = {run.cell.name for run in self._running}
        busy |= {claim.cell.name for claim in self._waiting}
        while len(self._running) + len(self._waiting) < self.jobs and not self._signals:
            free = [cell for cell in left if cell.name not in busy]
            claim = self.claims.take(free) if free else None
            if claim is None:
                return
            busy.add(claim.cell.name)
            self._start(claim, 0)

    def _others_work(self, left: list[Cell]) -> bool:
        """Whether other workers still run cells, one of which may become free."""
        left = [cell for cell in left if cell.name not in self._done | self._failed]
        states = self.claims.states() if left else {}
        elsewhere = [cell for cell in left if states[cell.name].state != "failed"]
        if elsewhere and not self._waiting_said:
            self._say(
                f"waiting for {len(elsewhere)} cells at which other processes are at work: "
                f"{'; '.join(cell.title for cell in elsewhere[:3])}"
            )
        self._waiting_said = bool(elsewhere)
        return bool(elsewhere)

    def _start(self, claim: Claim, vain: int) -> None:
        """Go on with a cell whatever state its log folder is in."""
        plan, cell = self.plan, claim.cell
        action, run = runs.what_next(plan, cell)
        if action == "record":
            assert run is not None
            self._record(claim, run)
            return
        if action == "wait":
            self._waiting.append(claim)
            return
        resumed = action == "resume" and run is not None
        arguments = (
            runs.resume_arguments(plan, run)
            if resumed and run is not None
            else runs.train_arguments(plan, cell)
        )
        try:
            runs.note_attempt(plan, cell, arguments)
        except ValueError as error:
            self._fail(claim, str(error))
            return
        steps = runs.checkpoint_steps(run) if resumed and run is not None else 0
        cores = Cores.take(plan.threads)
        process = launch.start(plan, cell, arguments, cores)
        self._running.append(Running(claim, process, cores, steps, vain))
        where = f", core {', '.join(map(str, cores.numbers))}" if cores.numbers else ""
        verb = f"resumed at step {steps}" if resumed else "started"
        self._say(f"{verb}: {cell.title} ({cell.steps} steps{where}); {self._estimate()}")

    def _sign(self) -> None:
        """Show the other workers that this one lives, and learn what they have taken over."""
        for run in [run for run in self._running if not run.lost]:
            try:
                self.claims.sign(run.claim, *runs.steps_done(self.plan, run.cell))
            except LostClaimError as error:
                self._say(f"stopped: {run.cell.title}: {error}")
                run.lost = True
                run.process.send_signal(signal.SIGINT)
        for claim in list(self._waiting):
            try:
                self.claims.sign(claim, 0, 0.0)
            except LostClaimError:
                self._waiting.remove(claim)

    def _ended(self, run: Running) -> None:
        """Record a run that has ended, start it again, or give it up."""
        run.cores.give_back()
        plan, cell, code = self.plan, run.cell, run.process.returncode
        if run.lost:
            return
        action, folder = runs.what_next(plan, cell)
        if action == "record":
            assert folder is not None
            self._record(run.claim, folder)
        elif self._signals:
            self._owe(self.claims.release, run.claim)
            steps = 0 if folder is None or action != "resume" else runs.checkpoint_steps(folder)
            self._say(f"stopped: {cell.title}, to go on at step {steps}")
        elif code > 0:
            self._fail(run.claim, f"exit status {code}: {launch.last_line(plan, cell)}")
        else:  # killed, or stopped by somebody's Ctrl-C
            steps = 0 if folder is None else runs.checkpoint_steps(folder)
            vain = run.vain + 1 if steps <= run.steps else 0
            if vain >= STARTS_WITHOUT_PROGRESS:
                self._fail(run.claim, f"ended {vain} times without a new checkpoint")
            else:
                self._start(run.claim, vain)

    def _record(self, claim: Claim, folder: Path) -> None:
        plan, cell = self.plan, claim.cell
        text = results.make_csv(plan, cell, folder, runs.attempts(plan, cell), finished=True)
        results.write_csv(plan, cell, text)
        self._done.add(cell.name)
        result = results.parse_csv(text, cell.name)
        last = statistics.last_returns(result)
        self._owe(self.claims.finish, claim, text, 0.0 if last is None else last)
        shown = "no episode" if last is None else f"last {statistics.LAST} episodes {last:.1f}"
        self._say(
            f"finished: {cell.title}, {shown}, {result.header['minutes']:.0f} min; "
            f"{self._estimate()}"
        )

    def _fail(self, claim: Claim, reason: str) -> None:
        self._failed.add(claim.cell.name)
        log = launch.log_path(self.plan, claim.cell).relative_to(self.plan.folder)
        self._owe(self.claims.release, claim, reason)
        self._say(f"failed: {claim.cell.title}: {reason} ({log})")

    def _estimate(self) -> str:
        try:
            survey = status.survey(self.plan, self.claims)
        except STORAGE_ERRORS:
            return f"{len(self._done)} of {len(self.plan.cells)} cells done here"
        left = sum(each.state in ("waiting", "running") for each in survey)
        return status.estimate(survey, max(1, min(self.jobs, left)))
