"""Monitor's clock and the rate of steps where somebody sets the clock back."""

from __future__ import annotations

import json
import pickle
import time

import numpy as np
import pytest

from tdmpc2_sb3.saving.checkpoint_files import RUN_FILE, read_run
from tdmpc2_sb3.saving.files import CorruptFileError
from tdmpc2_sb3.saving.json_codec import encode
from tdmpc2_sb3.saving.log_files import SteadyStart, _last_second


def test_seconds_go_on_when_the_clock_is_set_back(monkeypatch):
    start = SteadyStart.before(5.0)
    again = pickle.loads(pickle.dumps(start))  # into an environment's process
    monkeypatch.setattr(time, "time", lambda: 0.0)
    for each in (start, again):
        assert 5.0 <= time.time() - each < 65.0
    assert SteadyStart.before(-3.0).started <= time.monotonic()


def test_the_largest_second_is_gone_on_from(tmp_path):
    path = tmp_path / "0.monitor.csv"
    path.write_text('#{"t_start": 1.0}\nr,l,t\n1.0,5,3.5\n1.0,5,9.25\n1.0,5,-40.0\n')
    assert _last_second(path) == 9.25
    path.write_text('#{"t_start": 1.0}\nr,l,t\n')
    assert _last_second(path) == 0.0


@pytest.mark.parametrize("rows", ["r,l\n1.0,5\n", "r,l,t\n1.0,5\n", "r,l,t\n1.0,5,nan\n", "t\nx\n"])
def test_a_damaged_file_of_monitor_is_named(tmp_path, rows):
    path = tmp_path / "0.monitor.csv"
    path.write_text(f'#{{"t_start": 1.0}}\n{rows}')
    with pytest.raises(CorruptFileError, match=r"0.monitor.csv' is damaged, or no file of"):
        _last_second(path)


def test_states_that_no_callback_has_are_damage(tmp_path):
    mean = {"mean": np.zeros(3), "var": np.ones(3), "count": 4.5}
    table = {"timesteps": [5], "results": [[1.0, 2.0]], "length": [[3, 4]], "successes": []}
    state = {"class": "EvalCallback", "due": False, "n_calls": 5, "best_mean_reward": -np.inf}
    state["evaluations"] = table
    run = {
        "num_timesteps": 5,
        "callbacks": [state],
        "files": {"monitor_sizes": {"0.monitor.csv": 7}, "logger": None},
        "normalizer": {"returns": mean},
    }

    def write(**changes):
        (tmp_path / RUN_FILE).write_text(json.dumps(encode({**run, **changes}, "run")))
        return read_run(tmp_path)

    assert write()["callbacks"] == [state]
    for key, value in (
        ("class", 3), ("due", 1), ("n_calls", -1), ("n_calls", "5"), ("best_mean_reward", "x"),
        ("learn", 3), ("evaluations", {"__init__": []}), ("evaluations", {**table, "results": [3]}),
        ("evaluations", {**table, "length": []}), ("environments", [{"x": 1}]), ("environments", 3),
        ("evaluations", {**table, "results": [["x", 2.0]]}),
    ):  # fmt: skip
        with pytest.raises(CorruptFileError, match="is damaged"):
            write(callbacks=[{**state, key: value}])
    for changed in (
        {"mean": np.zeros(2)}, {"var": -np.ones(3)}, {"mean": np.full(3, np.nan)}, {"count": 0.0},
        {"count": "x"}, {"update": 3}, {"mean": np.zeros(3, np.float32)},
    ):  # fmt: skip
        with pytest.raises(CorruptFileError, match="is damaged"):
            write(normalizer={"returns": {**mean, **changed}})
    for files in ({"monitor_sizes": {"x": -1}, "logger": None}, {"monitor_sizes": {}, "logger": 3}):
        with pytest.raises(CorruptFileError, match="is damaged"):
            write(files=files)


@pytest.mark.parametrize("files", [np.zeros(2), [1], 5, None])
def test_a_run_file_whose_parts_are_of_another_kind_is_damaged(tmp_path, files):
    (tmp_path / RUN_FILE).write_text(json.dumps(encode({"files": files}, "run")))
    with pytest.raises(CorruptFileError, match=r"is damaged .*: use another copy") as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)
