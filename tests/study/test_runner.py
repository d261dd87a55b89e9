"""The program as a user starts it: killed at any moment it ends as if nothing had happened."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tdmpc2_sb3.study import results, runs
from tdmpc2_sb3.study.claims import Claims
from tdmpc2_sb3.study.machine import Cores
from tdmpc2_sb3.study.plan import read_plan
from tdmpc2_sb3.study.runner import Runner, Running

STUDY = {
    "name": "mini",
    "tasks": ["DMC/walker-walk-v0"],
    "seeds": [3],
    "steps": 250,
    "eval_freq": 50,
    "eval_episodes": 1,
    "device": "cpu",
}


def write_study(folder: Path, tiny: dict, **more) -> Path:
    """A study of two cells, one of TD-MPC2 and one of its SSM variant."""
    folder.mkdir()
    arms = {"mlp": {"params": tiny}, "ssm": {"algo": "tdmpc2_ssm", "params": tiny}}
    file = folder / "mini.yml"
    file.write_text(yaml.safe_dump({**STUDY, "arms": arms, **more}))
    return file


def start(file: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tdmpc2_sb3.study", "run", str(file), *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == status, printed
    return printed


def children(process: subprocess.Popen[str]) -> list[int]:
    done = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)],
        capture_output=True,
        text=True,
        check=False,
    )
    return [int(word) for word in done.stdout.split()]


def wait_for_step(file: Path, number: int, step: int, process: subprocess.Popen[str]) -> None:
    """Return when a cell has written a checkpoint of this step or a later one."""
    plan = read_plan(file)
    while process.poll() is None:
        run = runs.newest_run(plan, plan.cells[number])
        if run is not None and runs.checkpoint_steps(run) >= step:
            return
        time.sleep(0.05)
    pytest.fail(f"ended before step {step}: {process.communicate()[0]}")


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + 60
    for pid in pids:
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < end, f"{pid} is still there"
            time.sleep(0.05)


def rows(file: Path) -> dict[str, list[tuple[str, ...]]]:
    """The rows of every CSV, without the clock's column."""
    found = {}
    for path in sorted((file.parent / "mini").glob("*.csv")):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        table = list(csv.reader(lines))
        assert table[0] == list(results.COLUMNS)
        found[path.stem] = [(*row[:3], *row[4:]) for row in table[1:]]
    return found


linux = pytest.mark.skipif(sys.platform != "linux", reason="runs outlive a killed runner there")


@linux
@pytest.mark.slow
def test_runner_and_run_killed_end_as_an_undisturbed_study(tmp_path, tiny):
    whole, killed = (
        write_study(tmp_path / name, tiny, save_freq=100) for name in ("whole", "killed")
    )
    printed = finish(start(whole, "--jobs", "1"))
    assert printed.count("finished: ") == 2
    assert "2 of 2 cells done\n" in printed

    runner = start(killed, "--jobs", "1")
    wait_for_step(killed, 0, 50, runner)
    orphans = children(runner)
    runner.kill()
    runner.communicate()
    wait_until_gone(orphans)  # the run has written a checkpoint and ended

    runner = start(killed, "--jobs", "1")
    wait_for_step(killed, 0, 150, runner)
    (run,) = children(runner)
    os.kill(run, signal.SIGKILL)  # the runner starts it again by itself
    wait_for_step(killed, 1, 25, runner)
    (run,) = children(runner)
    runner.kill()
    os.kill(run, signal.SIGKILL)  # both at once, as when the power goes
    runner.communicate()
    wait_until_gone([run])

    printed = finish(start(killed, "--jobs", "1"))
    assert printed.count("finished: ") == 1
    assert "resumed at step" in printed
    expected = rows(whole)
    assert rows(killed) == expected
    mlp = expected["mlp_DMC-walker-walk-v0_seed3"]
    assert [row[1] for row in mlp if row[0] == "training"] == [str(25 * n) for n in range(1, 11)]
    assert [row[1:3] for row in mlp if row[0] == "evaluation"] == [
        (str(50 * n), str(2000 * n)) for n in range(1, 6)
    ]
    plan = read_plan(killed)
    for cell in plan.cells:
        kept = runs.newest_run(plan, cell).glob("rl_model_*_steps.zip")
        assert sorted(path.name.split("_")[2] for path in kept) == ["100", "200"]
    header = results.read_result(plan, plan.cells[0]).header
    assert len(header["attempts"]) == 3
    assert header["attempts"][0]["command"].startswith("python -m rl_zoo3.train --algo tdmpc2 ")
    assert header["attempts"][1]["command"] == (
        "python -m tdmpc2_sb3.zoo resume logs/mini/mlp/seed3/tdmpc2/DMC-walker-walk-v0_1 "
        "--trust-code"
    )
    assert header["hyperparameters"]["latent_dim"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_writes_checkpoints_and_goes_on(tmp_path, tiny, number):
    file = write_study(tmp_path / "stopped", tiny, steps=2000)
    runner = start(file, "--jobs", "1")
    wait_for_step(file, 0, 25, runner)
    runner.send_signal(number)
    printed = finish(runner, 1)
    plan = read_plan(file)
    run = runs.newest_run(plan, plan.cells[0])
    steps = runs.checkpoint_steps(run)
    assert f"stopped: mlp, DMC/walker-walk-v0, seed 3, to go on at step {steps}" in printed
    assert runs.saved_steps(run, plan.tasks[0].name) == steps
    assert runs.what_next(plan, plan.cells[0]).action == "resume"


@pytest.mark.slow
def test_two_workers_share_a_study_and_the_living_one_takes_over(tmp_path, tiny):
    file = write_study(tmp_path / "shared", tiny, seeds=[3, 4])
    first = start(file, "--jobs", "1")
    wait_for_step(file, 0, 50, first)
    second = start(file, "--jobs", "1")
    wait_for_step(file, 1, 25, second)
    orphans = children(first)
    first.kill()
    first.communicate()
    for pid in orphans:
        os.kill(pid, signal.SIGKILL)
    finish(second)
    assert len(rows(file)) == 4
    # One start each, and one more for the cell at which the killed worker was.
    plan = read_plan(file)
    starts = [len(runs.attempts(plan, cell)) for cell in plan.cells]
    assert sorted(starts) == [1, 1, 1, 2]


@pytest.mark.slow
def test_a_run_that_fails_by_itself_is_named_and_the_others_go_on(tmp_path, tiny):
    file = write_study(tmp_path / "failing", tiny)
    content = yaml.safe_load(file.read_text())
    content["arms"] = {
        "wrong": {"params": {**tiny, "horizon": 0}},
        "ppo": {
            "algo": "ppo",
            "params": {"n_envs": 1, "n_steps": 50, "env_kwargs": {"action_repeat": 40}},
        },
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    printed = finish(start(file, "--jobs", "1"), 1)
    assert "failed: wrong, DMC/walker-walk-v0, seed 3: exit status 1: ValueError: " in printed
    assert "horizon" in printed
    assert "finished: ppo, DMC/walker-walk-v0, seed 3" in printed
    assert [row[1] for row in rows(file)["ppo_DMC-walker-walk-v0_seed3"] if row[0] == "training"]
    status = subprocess.run(
        [sys.executable, "-m", "tdmpc2_sb3.study", "status", str(file)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert [line.split()[0] for line in status.splitlines()] == ["failed", "finished", "mini:"]
    assert "1 of 2 cells done" in status


def test_a_changed_study_does_not_take_old_results(study, made_csv):
    plan = study(steps=100)
    made_csv(plan, plan.cells[0].name, [(50, 1.0)])
    assert results.read_result(plan, plan.cells[0]).finished
    changed = study(steps=200)
    with pytest.raises(ValueError, match=r"was made with steps = 100, the study has 200"):
        results.read_result(changed, changed.cells[0])
    done = subprocess.run(
        [sys.executable, "-m", "tdmpc2_sb3.study", "run", str(changed.file)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"'{results.csv_path(plan, plan.cells[0])}' was made with")


def test_results_of_other_machines_arrive_through_the_storage(tmp_path, tiny):
    storage = str(tmp_path / "meeting.log")
    here, there = (
        read_plan(write_study(tmp_path / name, tiny, storage=storage)) for name in ("here", "there")
    )
    other = Claims(there)
    texts = {}
    for cell in there.cells:
        header = {**cell.settings, "arm": cell.arm.name, "task": cell.task.env}
        header |= {"action_repeat": 40, "finished": True, "minutes": 1.0}
        texts[cell.name] = f"# {json.dumps(header)}\n{','.join(results.COLUMNS)}\n"
        other.finish(other.take([cell]), texts[cell.name], 0.0)
    said: list[str] = []
    assert Runner(here, 1, said.append).work() == 0
    assert not said
    for cell in here.cells:
        assert results.csv_path(here, cell).read_text() == texts[cell.name]


@pytest.mark.slow
def test_a_run_whose_environment_takes_words_goes_on(tmp_path, tiny):
    """What `resume` asks a stranger's user about, the study's own command has named."""
    params = {**tiny, "env_kwargs": {"render_mode": "rgb_array"}}
    file = write_study(
        tmp_path / "words",
        tiny,
        tasks=["Pendulum-v1"],
        steps=120,
        arms={"a": {"params": params}},
    )
    runner = start(file)
    wait_for_step(file, 0, 50, runner)
    (run,) = children(runner)
    os.kill(run, signal.SIGKILL)
    assert "resumed at step" in finish(runner)


@pytest.mark.parametrize(
    "text", ["", "# {}\n", "# &a [*a]\n", "x" * (results.MAX_BYTES + 1), "# a: !!python/none\n"]
)
def test_a_result_of_a_storage_is_checked_before_it_is_written(tmp_path, tiny, text):
    plan = read_plan(write_study(tmp_path / "here", tiny))
    other = Claims(plan)
    other.finish(other.take(plan.cells), text, 0.0)
    name = plan.cells[0].name
    with pytest.raises(ValueError, match=f"'{name} in the storage' is damaged or no result"):
        Runner(plan, 1, print).work()
    assert not results.csv_path(plan, plan.cells[0]).exists()
    other.close()


def test_a_run_that_was_taken_over_is_stopped_and_left(tmp_path, tiny):
    plan = read_plan(write_study(tmp_path / "lost", tiny))
    said: list[str] = []
    runner = Runner(plan, 1, said.append)
    claim = runner.claims.take(plan.cells)
    runner.claims._fail(claim.number)  # as another worker does after 120 silent seconds
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"],
        # As the runner starts its own: background jobs of a shell would ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    runner._running.append(Running(claim, process, Cores([], []), 0, 0))
    runner._sign()
    assert process.wait(60) != 0
    assert said == [f"stopped: {claim.cell.title}: another worker has taken it over"]
    runner._ended(runner._running.pop())
    assert not runner._owed
    assert not results.csv_path(plan, claim.cell).exists()
    runner.claims.close()
