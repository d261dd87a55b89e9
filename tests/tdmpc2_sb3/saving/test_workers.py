"""Environment processes that die: training ends with a sentence that names them."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import tiny_model
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.callbacks import ResumableCheckpointCallback, latest_checkpoint
from tdmpc2_sb3.saving import workers
from tdmpc2_sb3.saving.workers import WorkerDiedError

TINY = {**tiny_model.TINY, "num_iterations": 1, "learning_starts": 12}


class Slow(gym.Env):
    """Takes a minute for a step or a reset while a file of that name is there."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, folder: Path, index: int):
        self.folder, self.index = folder, index
        self.steps = 0

    def _wait(self, what: str) -> None:
        if (self.folder / f"slow {what}").exists():
            (self.folder / f"{what} {self.index}").touch()
            time.sleep(60)

    def reset(self, *, seed=None, options=None):
        self._wait("reset")
        self.steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self._wait("step")
        if (self.folder / "exit").exists() and self.index == 0:
            os._exit(7)
        self.steps += 1
        return np.zeros(3, np.float32), 0.0, False, self.steps >= 5, {}


def make(folder: Path, start_method: str, n_envs: int = 3) -> SubprocVecEnv:
    factories = [lambda index=index: Slow(folder, index) for index in range(n_envs)]
    return SubprocVecEnv(factories, start_method)


def when(condition: Callable[[], bool], act: Callable[[], None]) -> None:
    """Act from another thread as soon as the condition holds."""

    def run() -> None:
        while not condition():
            time.sleep(0.02)
        act()

    threading.Thread(target=run, daemon=True).start()


def within(seconds: float, function: Callable[[], None]) -> WorkerDiedError:
    """The error of the function; fails the test if it hangs."""
    begin = time.monotonic()
    with pytest.raises(WorkerDiedError) as caught:
        function()
    assert time.monotonic() - begin < seconds
    return caught.value


METHODS = ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", ["step", "reset"])
def test_one_killed_in_a_step_or_a_reset(tmp_path: Path, method: str, what: str) -> None:
    env = make(tmp_path, method)
    model = TDMPC2("MlpPolicy", VecNormalize(env), **TINY)
    model.learn(30)
    (tmp_path / f"slow {what}").touch()
    victim = env.processes[1]
    when((tmp_path / f"{what} 1").exists, lambda: os.kill(victim.pid, signal.SIGKILL))
    error = within(20, lambda: model.learn(30))
    assert f"Environment process 1 of 3 (pid {victim.pid}) died by signal SIGKILL" in str(error)
    assert env.closed
    assert not any(process.is_alive() for process in env.processes)
    env.close()  # waits for nobody


@pytest.mark.parametrize("method", METHODS)
def test_one_killed_while_the_main_process_computes(tmp_path: Path, method: str) -> None:
    env = make(tmp_path, method)
    model = TDMPC2("MlpPolicy", env, **TINY, initial_gradient_steps=100_000)
    victim = env.processes[2]
    when(lambda: model._n_updates > 5, lambda: os.kill(victim.pid, signal.SIGTERM))
    error = within(20, lambda: model.learn(30))
    assert f"Environment process 2 of 3 (pid {victim.pid}) died by signal SIGTERM." in str(error)
    assert 5 < model._n_updates < 100_000


def test_one_that_ends_itself_is_named_with_its_exit_code(tmp_path: Path) -> None:
    env = make(tmp_path, "forkserver")
    model = TDMPC2("MlpPolicy", env, **TINY)
    (tmp_path / "exit").touch()
    error = within(20, lambda: model.learn(30))
    assert re.search(r"process 0 of 3 \(pid \d+\) ended with exit code 7;", str(error))


def test_one_of_the_evaluation(tmp_path: Path) -> None:
    evaluation = make(tmp_path / "evaluation", "fork", 2)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "slow step").touch()
    victim = evaluation.processes[1]
    reached = (tmp_path / "evaluation" / "step 1").exists
    when(reached, lambda: os.kill(victim.pid, signal.SIGKILL))
    model = TDMPC2("MlpPolicy", DummyVecEnv([lambda: Slow(tmp_path, 0)]), **TINY)
    callback = CallbackList([EvalCallback(evaluation, eval_freq=10)])
    error = within(20, lambda: model.learn(30, callback=callback))
    assert f"process 1 of 2 (pid {victim.pid})" in str(error)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells who is stopped")
@pytest.mark.parametrize("number", [signal.SIGCONT, signal.SIGKILL])
def test_one_that_is_stopped_is_named_and_may_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(workers, "STOPPED_SECONDS", 0.5)
    told: list[str] = []
    stderr = SimpleNamespace(write=told.append, flush=lambda: None)
    env = make(tmp_path, "fork")
    victim = env.processes[1].pid
    model = TDMPC2("MlpPolicy", env, **TINY)
    model.learn(15)
    monkeypatch.setattr("sys.stderr", stderr)
    os.kill(victim, signal.SIGSTOP)
    when(lambda: bool(told), lambda: os.kill(victim, number))
    if number == signal.SIGCONT:
        model.learn(15)
        assert model.num_timesteps == 15
        env.close()
    else:
        error = within(20, lambda: model.learn(15))
        assert f"Environment process 1 of 3 (pid {victim}) died by signal SIGKILL" in str(error)
    line = "".join(told).splitlines()
    assert line == [
        f"Environment process 1 of 3 (pid {victim}) is stopped, and the run waits for it: "
        f"kill -CONT {victim} lets it go on, kill -KILL {victim} ends the run."
    ]


@pytest.mark.parametrize("method", METHODS)
def test_all_killed_at_once(tmp_path: Path, method: str) -> None:
    env = make(tmp_path, method)
    model = TDMPC2("MlpPolicy", env, **TINY)
    (tmp_path / "slow step").touch()

    def kill_all() -> None:
        for process in env.processes:
            os.kill(process.pid, signal.SIGKILL)

    when((tmp_path / "step 2").exists, kill_all)
    error = within(20, lambda: model.learn(30))
    assert re.search(r"Environment process \d of 3 \(pid \d+\) died by signal SIGKILL", str(error))
    assert env.closed


def test_one_that_is_dead_before_its_environment_is_used(tmp_path: Path) -> None:
    env = make(tmp_path, "fork")
    kill(env, 1)
    error = within(20, lambda: TDMPC2("MlpPolicy", env, **TINY))
    assert "Environment process 1 of 3" in str(error)

    saved, env = make(tmp_path, "fork"), make(tmp_path, "fork")
    model = TDMPC2("MlpPolicy", saved, **TINY)
    model.learn(30)
    kill(saved, 2)
    with pytest.warns(UserWarning, match=r"process 2 of 3 .* episodes in progress are not saved"):
        model.save(tmp_path / "model")
    kill(env, 0)
    error = within(20, lambda: TDMPC2.load(tmp_path / "model", env=env))
    assert "Environment process 0 of 3" in str(error)

    going_on = TDMPC2.load(tmp_path / "model", env=make(tmp_path, "fork"))
    assert going_on.num_timesteps == 30
    same = [model.policy.state_dict(), going_on.policy.state_dict()]
    assert all((same[0][name] == same[1][name]).all() for name in same[0])
    for learner in (model, going_on):
        learner.env.close()
        with pytest.raises(RuntimeError, match=r"SubprocVecEnv is closed, .* model.set_env"):
            learner.learn(30)


def kill(env: SubprocVecEnv, number: int) -> None:
    os.kill(env.processes[number].pid, signal.SIGKILL)
    env.processes[number].join(10)


class Kill(BaseCallback):
    def __init__(self, pid: int):
        super().__init__()
        self.pid = pid

    def _on_step(self) -> bool:
        if self.num_timesteps == 21:
            os.kill(self.pid, signal.SIGKILL)
        return True


def test_the_last_checkpoint_is_named(tmp_path: Path) -> None:
    env = make(tmp_path, "fork")
    callbacks = [ResumableCheckpointCallback(9, tmp_path / "run"), Kill(env.processes[0].pid)]
    model = TDMPC2("MlpPolicy", env, **TINY)
    error = within(20, lambda: model.learn(60, callback=callbacks))
    newest = latest_checkpoint(tmp_path / "run")
    assert newest.name == "checkpoint_000000000018"
    assert f"The last checkpoint is '{newest}'. To go on: tdmpc2_sb3.callbacks" in str(error)


class CloseEvaluation(BaseCallback):
    def __init__(self, env: SubprocVecEnv):
        super().__init__()
        self.eval_env = env

    def _on_step(self) -> bool:
        if self.num_timesteps == 15:
            self.eval_env.close()
        return True


def test_closing_is_no_death(tmp_path: Path) -> None:
    callback = CloseEvaluation(make(tmp_path, "fork"))
    model = TDMPC2("MlpPolicy", make(tmp_path, "fork"), **TINY)
    model.learn(60, callback=callback)
    assert model.num_timesteps == 60
    model.env.close()
    model.predict(np.zeros((3, 3), np.float32))  # nobody is watched after learn()


def test_environments_thrown_away_end_their_processes(tmp_path: Path) -> None:
    env = make(tmp_path, "forkserver", 2)
    watch = workers.Watch([env])
    processes = env.processes
    del env
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    watch.close()
