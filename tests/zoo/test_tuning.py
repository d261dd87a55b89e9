"""Tuning as users run it: a journal file on one machine, PostgreSQL for several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
from postgres_server import PostgresServer, find_binaries

from tdmpc2_sb3.zoo import experiments, search_space

CHEETAH = "DMC/cheetah-run-v0"
#: A trial of 24 steps in episodes of 20: everything runs, nothing is learnt.
TRIAL = [
    "-optimize", "--algo", "tdmpc2", "--env", CHEETAH, "-n", "24", "--eval-episodes", "1",
    "--n-evaluations", "1", "--pruner", "none", "--sampler", "random", "--device", "cpu",
    "--no-optim-plots",
]  # fmt: skip
HEARTBEAT = 4  # seconds; a trial is dead after four times as many
PARAMS = [
    "-params",
    "env_kwargs:dict(action_repeat=50)",
    "learning_starts:20",
    "initial_gradient_steps:1",
]


def test_foreign_studies_get_no_heartbeat(monkeypatch):
    created = []
    monkeypatch.setattr(optuna, "create_study", lambda **kwargs: created.append(kwargs["storage"]))
    with experiments._studies_with_heartbeat("sqlite:///:memory:"):
        optuna.create_study(storage="sqlite:///other.db")
        optuna.create_study(storage="sqlite:///:memory:")
    optuna.create_study(storage="sqlite:///:memory:")
    assert created[0] == "sqlite:///other.db"
    assert created[1].heartbeat_interval == 30
    assert created[1].grace_period == 120
    assert created[2] == "sqlite:///:memory:"  # the zoo's own way is back in place


@pytest.mark.slow
def test_journal_study_and_its_trials(zoo, tmp_path):
    storage = ["--storage", "logs/tune.log", "--study-name", "cheetah"]
    done = zoo("train", *TRIAL, *storage, "--n-trials", "2", *PARAMS)
    assert "Number of finished trials:  2" in done.stdout
    assert len(list((tmp_path / "logs" / "tdmpc2").glob("report_*.csv"))) == 1
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "logs" / "tune.log"))
    study = optuna.load_study(study_name="cheetah", storage=optuna.storages.JournalStorage(backend))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
    # A trial's values, the first one's included, which the zoo alone takes for "none given".
    for number in (0, 1):
        expected = search_space.convert(study.trials[number].params)
        trained = zoo(
            "train", "--algo", "tdmpc2", "--env", CHEETAH, "-n", "20", "--eval-freq", "-1",
            "--device", "cpu", *storage, "--trial-id", str(number), *PARAMS,
        ).stdout  # fmt: skip
        for name in ("num_samples", "num_elites", "horizon", "batch_size"):
            assert f"('{name}', {expected[name]})" in trained


def start_worker(url: str, folder: Path, trials: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "rl_zoo3.train", *TRIAL, "--storage", url]
    command += ["--study-name", "shared", "--n-trials", str(trials), *PARAMS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TDMPC2_SB3_HEARTBEAT": str(HEARTBEAT)}
    with (folder / f"worker_{time.monotonic_ns()}.log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)


@pytest.mark.slow
def test_four_workers_on_postgresql_and_one_dies(tmp_path):
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: apt install postgresql")
    pytest.importorskip("psycopg")
    with PostgresServer(binaries) as server:
        study = optuna.create_study(storage=server.url, study_name="shared", direction="maximize")

        def states() -> Counter[str]:
            return Counter(trial.state.name for trial in study.trials)

        def are_sampled(number: int) -> bool:
            """Whether that many trials run and all have got their parameters."""
            running = [trial for trial in study.trials if trial.state.name == "RUNNING"]
            complete = [trial for trial in running if "horizon" in trial.params]
            return len(complete) == len(running) == number

        # The victim comes first and alone, so that the running trial is known to be its own.
        victim = start_worker(server.url, tmp_path, trials=9)
        wait_for(lambda: states()["RUNNING"] == 1, 300)
        workers = [start_worker(server.url, tmp_path, trials=2) for _ in range(3)]
        wait_for(lambda: are_sampled(4) or sum(states().values()) > 6, 600)
        finished = {t.number: t.value for t in study.trials if t.state.name == "COMPLETE"}
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        killed_at = time.monotonic()
        for worker in workers:
            assert worker.wait(timeout=900) == 0
        # Somebody starts another worker: it finds the dead trial, if no other has yet.
        time.sleep(max(0.0, killed_at + 5 * HEARTBEAT - time.monotonic()))
        assert start_worker(server.url, tmp_path, trials=2).wait(timeout=900) == 0

        trials = study.trials
        assert states()["RUNNING"] == 0
        assert states()["WAITING"] == 0
        assert [trial.number for trial in trials] == list(range(len(trials)))
        failed = [trial for trial in trials if trial.state.name == "FAIL"]
        assert len(failed) == 1
        retried = [t for t in trials if t.system_attrs.get("failed_trial") == failed[0].number]
        assert len(retried) == 1  # requeued once, not once for every worker
        assert retried[0].state.name == "COMPLETE"
        # Killed while it was still drawing parameters, its successor draws the others.
        assert failed[0].params.items() <= retried[0].params.items()
        complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
        assert len(complete) == len(trials) - 1
        # What had finished before is as it was.
        assert finished.items() <= {trial.number: trial.value for trial in complete}.items()
