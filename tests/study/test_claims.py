"""Workers on one storage: a cell is nobody's or one worker's, and a dead worker's is free."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from postgres_server import PostgresServer, find_binaries

from tdmpc2_sb3.study import claims
from tdmpc2_sb3.study.claims import Claims, LostClaimError

#: A worker that claims the first free cell, says which, and goes on signing until it is killed.
WORKER = """
import sys, time
from tdmpc2_sb3.study.claims import Claims
from tdmpc2_sb3.study.plan import read_plan

plan = read_plan(sys.argv[1])
mine = Claims(plan)
claim = mine.take(plan.cells)
print(claim.cell.name, flush=True)
while True:
    mine.sign(claim, 5, 0.5)
    time.sleep(0.2)
"""

#: A worker that claims every cell it gets, as fast as it can.
GREEDY = """
import sys
from tdmpc2_sb3.study.claims import Claims
from tdmpc2_sb3.study.plan import read_plan

plan = read_plan(sys.argv[1])
mine = Claims(plan)
print("ready", flush=True)
sys.stdin.readline()
for _ in plan.cells:
    claim = mine.take(plan.cells)
    if claim is not None:
        print(claim.cell.name, flush=True)
sys.stdin.readline()
"""


def start(program: str, plan) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, str(plan.file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_cell_is_claimed_once_and_given_back(study):
    plan = study(seeds=[1, 2])
    first, second = Claims(plan), Claims(plan)
    one, two = first.take(plan.cells), second.take(plan.cells)
    assert (one.cell.seed, two.cell.seed) == (1, 2)
    assert first.take(plan.cells) is second.take(plan.cells) is None
    first.release(one)
    assert second.take(plan.cells).cell.seed == 1


def test_a_finished_cell_stays_finished_and_its_csv_is_everybodys(study):
    plan = study(seeds=[1, 2])
    first, second = Claims(plan), Claims(plan)
    claim = first.take(plan.cells)
    first.sign(claim, 60, 1.5)
    assert second.states()[claim.cell.name][2:4] == (60, 1.5)
    first.finish(claim, "text of the CSV", 12.5)
    assert second.csv_texts() == {claim.cell.name: "text of the CSV"}
    assert second.take(plan.cells).cell.seed == 2
    assert [state.state for state in first.states().values()] == ["finished", "running"]


def test_a_failed_cell_is_tried_again_by_the_next_command_alone(study):
    plan = study()
    first = Claims(plan)
    first.release(first.take(plan.cells), "it broke")
    assert first.take(plan.cells) is None
    state = first.states()[plan.cells[0].name]
    assert (state.state, state.failure) == ("failed", "it broke")
    assert Claims(plan).take(plan.cells) is not None


@pytest.mark.slow
def test_a_killed_workers_cell_is_free_at_once_on_the_same_machine(study):
    plan = study(seeds=[1, 2])
    worker = start(WORKER, plan)
    assert worker.stdout.readline().strip() == plan.cells[0].name
    mine = Claims(plan)
    assert mine.take(plan.cells[:1]) is None
    worker.kill()
    worker.wait()
    assert mine.states()[plan.cells[0].name].state == "waiting"
    assert mine.take(plan.cells).cell.seed == 1


def elsewhere(monkeypatch, plan) -> Claims:
    """A worker on another machine, as far as names tell."""
    with monkeypatch.context() as patched:
        patched.setattr(claims.platform, "node", lambda: "another machine")
        worker = Claims(plan)
        worker.claim = worker.take(plan.cells)
    return worker


@pytest.mark.slow
def test_on_another_machine_silence_tells(study, monkeypatch):
    monkeypatch.setenv("TDMPC2_SB3_HEARTBEAT", "1")
    plan = study()
    other, mine = elsewhere(monkeypatch, plan), Claims(plan)
    end = time.monotonic() + 6  # longer than the four missed signs
    while time.monotonic() < end:
        other.sign(other.claim, 1, 0.1)
        assert mine.take(plan.cells) is None
        time.sleep(0.3)
    other.close()
    end = time.monotonic() + 60
    while (claim := mine.take(plan.cells)) is None:
        assert time.monotonic() < end
        time.sleep(0.3)
    # It was asleep only: it learns that the cell is another's, and does not finish it.
    with pytest.raises(LostClaimError):
        other.sign(other.claim, 2, 0.2)
    with pytest.raises(LostClaimError):
        other.finish(other.claim, "text", 1.0)
    other.release(other.claim)
    mine.finish(claim, "mine", 1.0)
    assert mine.csv_texts() == {claim.cell.name: "mine"}


def claim_in_parallel(plan) -> list[str]:
    """What four workers claim that start at once."""
    workers = [start(GREEDY, plan) for _ in range(4)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    names = []
    # A worker lives, and keeps its claims, until all have claimed what they could.
    end = time.monotonic() + 120
    mine = Claims(plan)
    while any(state.state == "waiting" for state in mine.states().values()):
        assert time.monotonic() < end
        time.sleep(0.2)
    for worker in workers:
        printed, _ = worker.communicate("stop\n", timeout=120)
        names += printed.split()
    return sorted(names)


@pytest.mark.slow
def test_no_cell_is_claimed_twice_in_a_journal_file(study):
    plan = study(seeds=list(range(12)))
    assert claim_in_parallel(plan) == sorted(cell.name for cell in plan.cells)


@pytest.mark.slow
def test_no_cell_is_claimed_twice_in_postgresql_and_a_dead_workers_is_taken(study):
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: apt install postgresql")
    pytest.importorskip("psycopg")
    with PostgresServer(binaries) as server:
        plan = study(seeds=list(range(12)), storage=server.url)
        assert claim_in_parallel(plan) == sorted(cell.name for cell in plan.cells)
        # All four are gone: one worker gets everything, and the CSV comes back whole.
        mine = Claims(plan)
        text = "# ä\n" + "row\n" * 50_000
        for _ in plan.cells:
            mine.finish(mine.take(plan.cells), text, 1.0)
        assert Claims(plan).csv_texts() == {cell.name: text for cell in plan.cells}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("worker", "../../precious"),
        ("worker", 3),
        ("host", "a\x1b[2Jb"),
        ("progress", ["x", 1.0]),
        ("progress", [1, float("nan")]),
        ("beat", -1),
        ("failure", 5),
        ("csv", [1]),
        ("token", None),
    ],
)
def test_what_no_worker_writes_is_refused(study, key, value):
    plan = study()
    precious = plan.folder / "precious"
    precious.write_text("precious")
    mine = Claims(plan)
    good = {"cell": plan.cells[0].key, "token": 32 * "a", "worker": 32 * "b"}
    attributes = {**good, "host": claims.platform.node(), key: value}
    mine._study.add_trial(
        claims.optuna.trial.create_trial(state=claims.TrialState.RUNNING, user_attrs=attributes)
    )
    with pytest.raises(ValueError, match=f"Trial 0 in the storage has the {key} .*no worker writ"):
        mine.states()
    with pytest.raises(ValueError, match="name another storage in the study"):
        mine.take(plan.cells)
    assert precious.read_text() == "precious"
    mine.close()


def test_a_failure_is_one_line(study):
    plan = study()
    mine = Claims(plan)
    mine.release(mine.take(plan.cells), "it \x1b[2J broke\n")
    assert mine.states()[plan.cells[0].name].failure == r"'it \x1b[2J broke\n'"
    mine.close()


def test_a_storage_that_does_not_open_names_no_password(study):
    with pytest.raises(ValueError, match="does not open") as caught:
        Claims(study(storage="postgresql+psycopg://me:se:c/r@t@localhost:1/x?sslpassword=hidden"))
    assert "r@t" not in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert "postgresql+psycopg://me:***@localhost:1/x?sslpassword=***" in str(caught.value)


def test_a_storage_that_is_none(study):
    with pytest.raises(ValueError, match=r"name a file that ends in \.log, or a database"):
        Claims(study(storage="cells.txt"))
    with pytest.raises(ValueError, match="does not open"):
        Claims(study(storage="nonsense://host/name"))
