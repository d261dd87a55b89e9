"""Monitor's clock and the rate of steps where somebody sets the clock back."""

from __future__ import annotations

import pickle
import time

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
