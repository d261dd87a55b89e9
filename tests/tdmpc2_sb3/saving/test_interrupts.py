"""Ctrl-C: it waits for the end of a step, and what is saved then resumes exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_model
import torch as th
from stable_baselines3.common.callbacks import CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.callbacks import ResumableCheckpointCallback, load_checkpoint
from tdmpc2_sb3.saving import interrupts

TINY = {**tiny_model.TINY, "learning_starts": 20}


@pytest.fixture(autouse=True)
def _hanging_up_is_heeded() -> Iterator[None]:
    """Processes inherit that it is ignored where the tests were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def usual_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def test_the_block_is_finished_first():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():  # noqa: PT012
        press_ctrl_c()
        done.append("rest of the block")
    assert done == ["rest of the block"]
    assert not interrupts.broken_off()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_pressed_twice_it_is_broken_off():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():  # noqa: PT012
        press_ctrl_c()
        done.append("first")
        press_ctrl_c()
        done.append("second")
    assert done == ["first"]
    assert interrupts.broken_off()
    with interrupts.deferred():  # the next block starts afresh
        pass
    assert not interrupts.broken_off()


def test_a_long_block_is_broken_off(monkeypatch):
    monkeypatch.setattr(interrupts, "GRACE_SECONDS", 0.1)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupts.deferred():  # noqa: PT012
        press_ctrl_c()
        while time.monotonic() < started + 30:
            time.sleep(0.01)
    assert time.monotonic() < started + 20
    assert interrupts.broken_off()


def test_an_error_in_the_block_is_not_hidden():
    with pytest.raises(RuntimeError, match="of the block"), interrupts.deferred():  # noqa: PT012
        press_ctrl_c()
        raise RuntimeError("of the block")


def test_a_handler_of_the_programs_own_stays():
    seen = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    with interrupts.deferred():
        press_ctrl_c()
        assert seen == [signal.SIGINT]


def test_other_threads_are_left_alone():
    failures = []

    def run() -> None:
        try:
            with interrupts.deferred():
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == []


def make_env() -> VecEnv:
    kwargs = {"action_repeat": 2, "max_episode_steps": 15}
    return make_vec_env("DMC/reacher-easy-v0", 1, seed=3, env_kwargs=kwargs)


def make_callbacks(folder: Path) -> CallbackList:
    return CallbackList(
        [
            ResumableCheckpointCallback(10_000, folder),
            EvalCallback(make_env(), eval_freq=10, n_eval_episodes=1, log_path=str(folder)),
        ]
    )


def press_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with Ctrl-C pressed at the start of its n-th call."""
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            press_ctrl_c()
        return function(*args, **kwargs)

    return wrapped


def interrupt_environment_step(model: TDMPC2, callbacks: CallbackList) -> None:
    environment = model.env.unwrapped.envs[0].unwrapped
    environment.step = press_at(30, environment.step)  # where an evaluation is due


def interrupt_update(model: TDMPC2, callbacks: CallbackList) -> None:
    model._update_step = press_at(45, model._update_step)


def interrupt_burst(model: TDMPC2, callbacks: CallbackList) -> None:
    model._update_step = press_at(7, model._update_step)


def interrupt_evaluation(model: TDMPC2, callbacks: CallbackList) -> None:
    evaluation = callbacks.callbacks[1]
    environment = evaluation.eval_env.unwrapped.envs[0].unwrapped
    environment.step = press_at(40, environment.step)  # in the third evaluation, of step 30


@pytest.mark.parametrize(
    ("interrupt", "settings", "steps", "updates"),
    [
        (interrupt_environment_step, {}, 30, 29),
        (interrupt_update, {}, 45, 45),
        (interrupt_update, {"train_freq": 10, "gradient_steps": 10}, 50, 45),
        (interrupt_burst, {}, 20, 7),
        (interrupt_evaluation, {}, 30, 29),
    ],
)
def test_resuming_after_ctrl_c_is_exact(
    tmp_path: Path, interrupt: Callable[..., None], settings: dict, steps: int, updates: int
) -> None:
    settings = {**TINY, **settings}
    whole = TDMPC2("MlpPolicy", make_env(), **settings).learn(60)
    stopped = TDMPC2("MlpPolicy", make_env(), **settings)
    callbacks = make_callbacks(tmp_path)
    interrupt(stopped, callbacks)
    with pytest.raises(KeyboardInterrupt):
        stopped.learn(60, callback=callbacks)
    assert (stopped.num_timesteps, stopped._n_updates) == (steps, updates)
    assert callbacks.callbacks[0].write() is not None

    resumed, restore = load_checkpoint(TDMPC2, tmp_path, make_env())
    again = make_callbacks(tmp_path)
    resumed.learn(60 - steps, callback=[restore, again], reset_num_timesteps=False)
    assert resumed._n_updates == whole._n_updates
    weights = whole.policy.state_dict()
    assert all(
        th.equal(value, weights[name]) for name, value in resumed.policy.state_dict().items()
    )
    with np.load(tmp_path / "evaluations.npz") as evaluations:
        assert evaluations["timesteps"].tolist() == [10, 20, 30, 40, 50, 60]


def test_a_step_broken_off_lets_the_environment_start_anew(tmp_path: Path) -> None:
    model = TDMPC2("MlpPolicy", make_env(), **TINY)
    environment = model.env.unwrapped.envs[0].unwrapped
    environment.step = press_at(31, press_at(31, environment.step))
    with pytest.raises(KeyboardInterrupt):
        model.learn(60)
    assert interrupts.broken_off()
    assert model.num_timesteps == 30
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    again = TDMPC2.load(tmp_path / "model", env=make_env(), verbose=1)
    again.load_replay_buffer(tmp_path / "buffer")
    assert again._last_obs is None
    again.learn(15, reset_num_timesteps=False)
    assert again.num_timesteps == 45
    assert [row["l"] for row in again.ep_info_buffer] == [15, 15, 15]


@pytest.fixture
def usual_ends():
    numbers = interrupts.ENDING_SIGNALS
    before = {each: signal.signal(each, signal.SIG_DFL) for each in numbers}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("signum", interrupts.ENDING_SIGNALS)
def test_ending_signals_wait_for_the_block_and_mean_exit_codes(usual_ends, signum):
    done = []
    with pytest.raises(SystemExit) as caught, interrupts.ending_signals():  # noqa: PT012
        with interrupts.deferred():
            signal.raise_signal(signum)
            done.append("rest of the block")
        done.append("next")
    assert done == ["rest of the block"]
    assert caught.value.code == 128 + signum
    assert isinstance(caught.value, KeyboardInterrupt)
    assert interrupts.ended_by() == signum
    assert signal.getsignal(signum) is signal.SIG_DFL
    with interrupts.ending_signals():
        pass
    assert interrupts.ended_by() is None


def test_ending_signals_break_a_long_block_off(usual_ends, monkeypatch):
    monkeypatch.setattr(interrupts, "GRACE_SECONDS", 0.1)
    started = time.monotonic()
    with (  # noqa: PT012
        pytest.raises(interrupts.Ended),
        interrupts.ending_signals(),
        interrupts.deferred(),
    ):
        signal.raise_signal(signal.SIGTERM)
        while time.monotonic() < started + 30:
            time.sleep(0.01)
    assert time.monotonic() < started + 20
    assert interrupts.broken_off()


@pytest.mark.parametrize("own", [signal.SIG_IGN, lambda *_: None])
def test_other_handlers_of_ending_signals_stay(own):
    before = signal.signal(signal.SIGTERM, own)
    with interrupts.ending_signals(), interrupts.deferred():
        assert signal.getsignal(signal.SIGTERM) is own
        signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


def test_ending_signals_in_another_thread_install_nothing(usual_ends):
    seen = []

    def run() -> None:
        with interrupts.ending_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


ENDED_RUN = """
import os, signal, sys, threading, time
from pathlib import Path
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv
from test_interrupts import TINY, make_env
from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.callbacks import ResumableCheckpointCallback
folder, kind = sys.argv[1:3]
callback = ResumableCheckpointCallback(10_000, folder)
model = TDMPC2("MlpPolicy", make_env(), **TINY)
if kind == "stubborn":  # the last checkpoint takes a minute
    TDMPC2.save_replay_buffer = lambda self, path: (print("saving", flush=True), time.sleep(60))
def tell():
    while model.num_timesteps < 30:
        time.sleep(0.01)
    print("ready", flush=True)
threading.Thread(target=tell, daemon=True).start()
model.learn(1_000_000, callback=None if kind == "without" else callback)
"""


def start_run(folder: Path, kind: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", ENDED_RUN, str(folder), kind],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("signum", interrupts.ENDING_SIGNALS)
def test_a_process_that_is_ended_writes_a_last_checkpoint(tmp_path: Path, signum: int) -> None:
    process = start_run(tmp_path, "usual")
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert errors == ""
    resumed, _ = load_checkpoint(TDMPC2, tmp_path, make_env())
    assert resumed.num_timesteps >= 30
    assert resumed._saved_episodes is not None


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    process = start_run(tmp_path, "stubborn")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "saving\n"
    time.sleep(2 * interrupts.SAME_SIGNAL_SECONDS)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM


def test_without_checkpoints_the_signals_keep_their_meaning(tmp_path: Path) -> None:
    process = start_run(tmp_path, "without")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM
