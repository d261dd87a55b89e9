"""Cores are kept from other runners, and a result names what made it."""

from __future__ import annotations

import os
import tempfile

import pytest

from tdmpc2_sb3.study import machine


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no cores to pin to here")
def test_no_two_runs_get_a_core(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(machine, "available_cores", lambda: [2, 5, 7])
    first, second = machine.Cores.take(1), machine.Cores.take(2)
    assert (first.numbers, second.numbers) == ([2], [5, 7])
    assert machine.Cores.take(1).numbers == []
    second.give_back()
    assert machine.Cores.take(3).numbers == []  # too few, and those two stay free
    assert machine.Cores.take(2).numbers == [5, 7]


def test_a_result_names_commit_versions_and_machine():
    described = machine.describe()
    assert set(described) == {"commit", "versions", "machine"}
    assert "torch " in described["versions"]
    assert "mujoco " in described["versions"]
    assert f"{os.cpu_count()} cores" in described["machine"]
