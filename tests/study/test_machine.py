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


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no cores to pin to here")
def test_cores_are_not_looked_for_in_a_folder_of_somebody_else(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(machine, "available_cores", lambda: [2])
    mine, elsewhere = tmp_path / f"tdmpc2_sb3_cores_{os.getuid()}", tmp_path / "elsewhere"
    elsewhere.mkdir()
    mine.symlink_to(elsewhere)
    assert machine.Cores.take(1).numbers == []
    mine.unlink()
    mine.write_text("a file")
    assert machine.Cores.take(1).numbers == []
    mine.unlink()
    assert machine.Cores.take(1).numbers == [2]
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    (tmp_path / f"tdmpc2_sb3_cores_{os.getuid()}").mkdir()
    assert machine.Cores.take(1).numbers == []
    assert not list(elsewhere.iterdir())


def test_a_lock_changes_no_file(tmp_path):
    kept, link = tmp_path / "kept", tmp_path / "link"
    kept.write_text("precious")
    link.symlink_to(kept)
    with pytest.raises(OSError, match="link"):
        machine.try_lock(link)
    lock = machine.try_lock(kept)
    assert machine.try_lock(kept) is None
    lock.close()
    assert kept.read_text() == "precious"


def test_a_result_names_commit_versions_and_machine():
    described = machine.describe()
    assert set(described) == {"commit", "versions", "machine"}
    assert "torch " in described["versions"]
    assert "mujoco " in described["versions"]
    assert f"{os.cpu_count()} cores" in described["machine"]
