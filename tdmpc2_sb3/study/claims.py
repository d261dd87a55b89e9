"""Who runs which cell: claims in Optuna's storage, so that any number of workers share a grid.

A claim is a running trial that names its cell. Trials are numbered in one order for everybody, so
a cell belongs to its lowest trial that has not failed, and whoever finds that a lower one exists
takes the claim back. A worker signs its claims from time to time; a claim whose signature stays
the same for long, or whose worker is known to be dead, is failed by whoever wants the cell.
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from tdmpc2_sb3.saving.attribute_checks import is_real, is_whole, short
from tdmpc2_sb3.saving.files import printable
from tdmpc2_sb3.study.machine import try_lock
from tdmpc2_sb3.study.plan import Cell, Plan
from tdmpc2_sb3.zoo import passwords
from tdmpc2_sb3.zoo.experiments import HEARTBEAT_SECONDS, MISSED_HEARTBEATS

LOCKS = ".workers"


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32}", value) is not None


def _is_progress(value: Any) -> bool:
    fits = isinstance(value, list) and len(value) == 2
    return fits and is_whole(value[0], 0, 2**53) and is_real(value[1])


#: What a worker's attributes of a trial may be. A worker's id names a file.
_ATTRIBUTES: dict[str, Callable[[Any], bool]] = {
    "cell": lambda value: isinstance(value, str),
    "token": _is_id,
    "worker": _is_id,
    "host": lambda value: isinstance(value, str) and value.isprintable(),
    "beat": lambda value: is_whole(value, 0, 2**63),
    "progress": _is_progress,
    "failure": lambda value: isinstance(value, str),
    "csv": lambda value: isinstance(value, str),
}
_DEFAULTS: dict[str, Any] = {"beat": 0, "progress": [0, 0.0], "failure": "", "csv": ""}


class Claim(NamedTuple):
    """A cell that is this worker's."""

    cell: Cell
    trial_id: int
    number: int


class CellState(NamedTuple):
    """What the storage knows of a cell.

    :param state: `waiting`, `running`, `finished` or `failed`
    :param host: that runs it or ran it, empty while nobody does
    :param steps: made so far
    :param minutes: taken so far
    :param failure: one sentence, empty without one
    """

    state: str
    host: str = ""
    steps: int = 0
    minutes: float = 0.0
    failure: str = ""


def heartbeat_seconds() -> int:
    """Seconds between signatures; TDMPC2_SB3_HEARTBEAT changes them."""
    return int(os.environ.get("TDMPC2_SB3_HEARTBEAT", HEARTBEAT_SECONDS))


def open_storage(address: str, folder: Path) -> Any:
    """Open a storage as the zoo names them: a file that ends in `.log`, or a database.

    :param address: a file relative to `folder`, or an address such as `postgresql+psycopg://...`
    :raises ValueError: if it is neither, or does not open
    """
    if "://" in address:
        return _open_database(address)
    if not address.endswith(".log"):
        raise ValueError(
            f"'storage' is '{address}': name a file that ends in .log, or a database such as "
            "postgresql+psycopg://user@host/name."
        )
    file = folder / address
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return optuna.storages.JournalStorage(JournalFileBackend(str(file)))
    except ValueError as error:
        raise ValueError(
            f"'{file}' is damaged: remove it while no worker runs; what is in the results stays."
        ) from error


def _open_database(address: str) -> Any:
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    for last in (False, False, False, False, True):
        try:
            return optuna.storages.RDBStorage(address)
        except Exception as error:  # SQLAlchemy's, the driver's, a missing driver
            if last or not isinstance(error, IntegrityError | ProgrammingError):
                reason = " ".join(str(error).split())
                masked = passwords.mask_address(address)
                reason = passwords.mask(reason.replace(address, masked))
                raise ValueError(f"The storage '{masked}' does not open: {reason}") from error
        # Workers that start together on an empty database create its tables at the same moment.
        time.sleep(random.uniform(0.5, 2.0))
    raise AssertionError


class Claims:
    """The claims on a study's cells.

    :param plan: of the study
    """

    def __init__(self, plan: Plan) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.plan = plan
        self._study = optuna.create_study(
            storage=open_storage(plan.storage, plan.folder),
            study_name=f"experiments: {plan.name}",  # the same name may be a study of tuning
            direction="maximize",
            load_if_exists=True,
        )
        self._worker = uuid.uuid4().hex
        self._locks = plan.folder / plan.logs / LOCKS
        self._locks.mkdir(parents=True, exist_ok=True)
        self._lock = try_lock(self._locks / self._worker)
        self._first = len(self._trials())  # failures from before this worker are tried again
        self._beats: dict[int, tuple[int, float]] = {}  # trial number -> beat, since when seen

    def _trials(self) -> list[FrozenTrial]:
        """Those that name a cell.

        :raises ValueError: if one holds what no worker writes; the storage is not this user's alone
        """
        trials = self._study.get_trials(deepcopy=False)
        found = [trial for trial in trials if "cell" in trial.user_attrs]
        for trial in found:
            for key, fits in _ATTRIBUTES.items():
                value = trial.user_attrs.get(key, _DEFAULTS.get(key))
                if not fits(value):
                    raise ValueError(
                        f"Trial {trial.number} in the storage has the {key} {short(value)}, which "
                        "no worker writes: name another storage in the study."
                    )
        return found

    def _holders(self) -> dict[str, FrozenTrial]:
        """The trial to which each cell belongs, by the cell's key."""
        holders: dict[str, FrozenTrial] = {}
        for trial in sorted(self._trials(), key=lambda each: each.number):
            if trial.state is not TrialState.FAIL:
                holders.setdefault(trial.user_attrs["cell"], trial)
        return holders

    def _failures(self) -> dict[str, FrozenTrial]:
        """The last trial of each cell, by its key, whose run failed by itself."""
        return {
            trial.user_attrs["cell"]: trial
            for trial in self._trials()
            if trial.state is TrialState.FAIL and trial.user_attrs.get("failure")
        }

    def _is_dead(self, trial: FrozenTrial) -> bool:
        """Whether the worker of a running trial is gone."""
        attributes = trial.user_attrs
        lock = self._locks / attributes["worker"]
        if attributes["host"] == platform.node() and lock.exists():
            held = try_lock(lock)
            if held is not None:
                held.close()
                return True
        beat = attributes.get("beat", 0)
        seen, since = self._beats.setdefault(trial.number, (beat, time.monotonic()))
        if seen != beat:
            self._beats[trial.number] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > MISSED_HEARTBEATS * heartbeat_seconds()

    def take(self, cells: Collection[Cell]) -> Claim | None:
        """Claim the first of these cells that nobody has.

        Claims of dead workers are failed on the way.
        """
        holders, failures = self._holders(), self._failures()
        for cell in cells:
            holder = holders.get(cell.key)
            if holder is not None and holder.state is TrialState.RUNNING and self._is_dead(holder):
                self._fail(holder.number)
                holder = None
            failure = failures.get(cell.key)
            if holder is None and (failure is None or failure.number < self._first):
                claim = self._claim(cell)
                if claim is not None:
                    return claim
        return None

    def _claim(self, cell: Cell) -> Claim | None:
        token = uuid.uuid4().hex
        attributes = {
            "cell": cell.key,
            "token": token,
            "worker": self._worker,
            "host": platform.node(),
            "beat": 0,
        }
        self._study.add_trial(
            optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attributes)
        )
        (mine,) = [each for each in self._trials() if each.user_attrs["token"] == token]
        if self._holders()[cell.key].number != mine.number:
            self._fail(mine.number)
            return None
        return Claim(cell, mine._trial_id, mine.number)

    def _fail(self, number: int) -> None:
        # Another worker may have failed it, or its own finished it, in this moment.
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    @contextlib.contextmanager
    def _owned(self) -> Iterator[None]:
        try:
            yield
        except optuna.exceptions.UpdateFinishedTrialError as error:
            raise LostClaimError("another worker has taken it over") from error

    def sign(self, claim: Claim, steps: int, minutes: float) -> None:
        """Show that a claim's run goes on.

        :raises LostClaimError: if another worker has taken the cell over
        """
        with self._owned():
            trial = Trial(self._study, claim.trial_id)
            trial.set_user_attr("progress", [steps, minutes])
            trial.set_user_attr("beat", time.time_ns())

    def finish(self, claim: Claim, text: str, value: float) -> None:
        """Put a finished cell's CSV into the storage, for the other machines.

        :param value: the return that Optuna's own tools show
        :raises LostClaimError: if another worker has taken the cell over
        """
        with self._owned():
            Trial(self._study, claim.trial_id).set_user_attr("csv", text)
            try:
                self._study.tell(claim.number, value)
            except ValueError as error:  # failed by another worker since the line above
                raise LostClaimError("another worker has taken it over") from error

    def release(self, claim: Claim, failure: str = "") -> None:
        """Give a claim back.

        :param failure: why the cell failed by itself, in one sentence; empty if it was stopped
        """
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            if failure:
                Trial(self._study, claim.trial_id).set_user_attr("failure", failure)
        self._fail(claim.number)

    def states(self) -> dict[str, CellState]:
        """What the storage knows of every cell, by the cell's name."""
        holders, failures = self._holders(), self._failures()
        return {cell.name: self._state(cell, holders, failures) for cell in self.plan.cells}

    def _state(
        self, cell: Cell, holders: dict[str, FrozenTrial], failures: dict[str, FrozenTrial]
    ) -> CellState:
        holder, failure = holders.get(cell.key), failures.get(cell.key)
        if holder is not None:
            steps, minutes = holder.user_attrs.get("progress", [0, 0.0])
            finished = holder.state is TrialState.COMPLETE
            if finished or not self._is_dead(holder):
                state = "finished" if finished else "running"
                return CellState(state, holder.user_attrs["host"], steps, minutes)
        if failure is not None:
            host = failure.user_attrs["host"]
            return CellState("failed", host, failure=printable(failure.user_attrs["failure"]))
        return CellState("waiting")

    def csv_texts(self) -> dict[str, str]:
        """The CSV of every cell that was finished anywhere, by the cell's name."""
        holders = self._holders()
        return {
            cell.name: holders[cell.key].user_attrs.get("csv", "")
            for cell in self.plan.cells
            if cell.key in holders and holders[cell.key].state is TrialState.COMPLETE
        }

    def close(self) -> None:
        """Let the others know that this worker is gone."""
        if self._lock is not None:
            self._lock.close()
            with contextlib.suppress(OSError):
                (self._locks / self._worker).unlink()


class LostClaimError(Exception):
    """Another worker has taken this worker's cell over."""
