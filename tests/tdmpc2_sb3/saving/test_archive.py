"""Saved models: JSON and tensors in a zip, nothing pickled, nothing lost."""

from __future__ import annotations

import io
import json
import os
import zipfile

import numpy as np
import pytest
import stable_baselines3
import torch as th
from gymnasium import spaces
from same_models import no_unpickling
from stable_baselines3 import SAC
from stable_baselines3.common.utils import FloatSchedule

from tdmpc2_sb3.saving.archive import (
    CorruptFileError,
    UnsaveableError,
    read_archive,
    write_archive,
)


def example():
    network = th.nn.Sequential(th.nn.Linear(3, 2), th.nn.Mish())
    optimizer = th.optim.Adam(network.parameters(), lr=3e-4, fused=True)
    network(th.ones(1, 3)).sum().backward()
    optimizer.step()
    data = {
        "observation_space": spaces.Box(-np.inf, np.inf, (3,), np.float32),
        "lr_schedule": FloatSchedule(3e-4),
        "_last_obs": np.array([[1.5, np.nan, -np.inf]], dtype=np.float32),
        "seed": None,
    }
    tensors = {
        "policy": network.state_dict(),
        "policy.optimizer": optimizer.state_dict(),
        "scale": {"value": th.tensor(2.5), "state": th.get_rng_state()},
    }
    return data, tensors


def assert_same_tensors(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same_tensors(a[key], b[key])
    elif isinstance(a, th.Tensor):
        assert a.dtype == b.dtype
        assert th.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("kind", ["path", "string", "suffix", "file", "bytes"])
def test_round_trip_without_unpickling(tmp_path, kind):
    data, tensors = example()
    target = {
        "path": tmp_path / "model",
        "string": str(tmp_path / "model"),
        "suffix": tmp_path / "model.zip",
        "file": tmp_path / "model.zip",
        "bytes": io.BytesIO(),
    }[kind]
    if kind == "file":
        with open(target, "wb") as file:
            write_archive(file, data, tensors)
    else:
        write_archive(target, data, tensors)
    if kind == "bytes":
        target.seek(0)
    else:
        assert os.listdir(tmp_path) == ["model.zip"]
    with no_unpickling():
        read_data, read_tensors = read_archive(target, "cpu")
    assert list(read_data) == list(data)
    assert read_data["observation_space"] == data["observation_space"]
    assert read_data["lr_schedule"](1.0) == 3e-4
    assert read_data["_last_obs"].tobytes() == data["_last_obs"].tobytes()
    assert read_data["seed"] is None
    assert_same_tensors(read_tensors, tensors)


def test_members_and_versions(tmp_path, capsys):
    write_archive(tmp_path / "m", *example())
    with zipfile.ZipFile(tmp_path / "m.zip") as archive:
        assert set(archive.namelist()) == {
            "data.json",
            "policy.pth",
            "policy.optimizer.pth",
            "scale.pth",
            "_stable_baselines3_version",
            "system_info.txt",
        }
        version = archive.read("_stable_baselines3_version").decode()
        assert version == stable_baselines3.__version__
        info = archive.read("system_info.txt").decode()
    read_archive(tmp_path / "m", print_system_info=True)
    assert info in capsys.readouterr().out
    assert f"PyTorch: {th.__version__}" in info


def test_custom_objects_replace_and_spare_what_is_saved(tmp_path):
    data, tensors = example()
    write_archive(tmp_path / "m", data, tensors)
    rewrite_json(
        tmp_path / "m.zip", lambda doc: doc["data"].update(lr_schedule={"__type__": "future"})
    )
    with pytest.raises(ValueError, match="unknown kind 'future'"):
        read_archive(tmp_path / "m")
    read, _ = read_archive(tmp_path / "m", custom_objects={"lr_schedule": 0.0, "absent": 1})
    assert read["lr_schedule"] == 0.0
    assert "absent" not in read
    assert read_archive(tmp_path / "m", load_data=False)[0] == {}
    with pytest.raises(ValueError, match="custom_objects must be"):
        read_archive(tmp_path / "m", custom_objects=[1])


def rewrite(path, member, change):
    """Replaces a member of a zip by ``change(content)``; None leaves it out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[member] = change(members[member])
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)


def rewrite_json(path, change):
    def changed(content):
        document = json.loads(content)
        change(document)
        return json.dumps(document)

    rewrite(path, "data.json", changed)


@pytest.mark.parametrize("where", ["data", "tensors"])
def test_what_cannot_be_saved_leaves_the_old_file(tmp_path, where):
    data, tensors = example()
    write_archive(tmp_path / "m", data, tensors)
    before = (tmp_path / "m.zip").read_bytes()
    if where == "data":
        data["learning_rate"] = lambda progress: 1e-3
    else:
        tensors["policy"]["extra"] = np.ones(2)
    with pytest.raises(UnsaveableError, match=r"'learning_rate'|'policy"):
        write_archive(tmp_path / "m", data, tensors)
    assert (tmp_path / "m.zip").read_bytes() == before
    assert os.listdir(tmp_path) == ["m.zip"]


def test_truncated_everywhere(tmp_path):
    write_archive(tmp_path / "m", *example())
    content = (tmp_path / "m.zip").read_bytes()
    places = [*range(0, len(content), max(len(content) // 100, 1)), len(content) - 1]
    for length in places:
        (tmp_path / "t.zip").write_bytes(content[:length])
        with pytest.raises(CorruptFileError, match=r"'.*t\.zip' is .*truncated") as caught:
            read_archive(tmp_path / "t.zip")
        assert "\n" not in str(caught.value)


def test_flipped_bits_never_pass_unnoticed(tmp_path):
    data, tensors = example()
    write_archive(tmp_path / "m", data, tensors)
    original = read_archive(tmp_path / "m")
    content = bytearray((tmp_path / "m.zip").read_bytes())
    rng = np.random.default_rng(0)
    noticed = 0
    for place in rng.integers(len(content), size=300):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "d.zip").write_bytes(damaged)
        error = None
        try:
            read_data, read_tensors = read_archive(tmp_path / "d.zip", "cpu")
        except ValueError as caught:
            error = caught
        if error is not None:
            noticed += 1
            assert "\n" not in str(error)
            continue
        # Not all of a zip's bytes carry content (dates, attributes): then nothing has changed.
        assert read_data["_last_obs"].tobytes() == original[0]["_last_obs"].tobytes()
        for name, value in read_tensors.items():
            assert_same_tensors(value, original[1][name])
    assert noticed > 200


def test_a_pickled_model_is_refused_without_opening_it(tmp_path):
    SAC("MlpPolicy", "Pendulum-v1", buffer_size=10, device="cpu").save(tmp_path / "sac")
    with (
        no_unpickling(),
        pytest.raises(ValueError, match=r"sac\.zip' was saved by pickling .* can run any code"),
    ):
        read_archive(tmp_path / "sac")


def test_tensors_that_hide_code_are_refused(tmp_path):
    data, tensors = example()
    write_archive(tmp_path / "m", data, {**tensors, "evil": {}})

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "run"),))

    stream = io.BytesIO()
    th.save({"weight": Evil()}, stream)
    rewrite(tmp_path / "m.zip", "evil.pth", lambda content: stream.getvalue())
    with pytest.raises(CorruptFileError, match=r"'evil'.*holds more than tensors"):
        read_archive(tmp_path / "m")
    assert not (tmp_path / "run").exists()


def test_a_missing_part_is_named(tmp_path):
    write_archive(tmp_path / "m", *example())
    rewrite(tmp_path / "m.zip", "policy.optimizer.pth", lambda content: None)
    with pytest.raises(CorruptFileError, match=r"m\.zip' lacks its part 'policy\.optimizer'"):
        read_archive(tmp_path / "m")


def test_other_zips_and_versions(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="is no model saved by TDMPC2"):
        read_archive(tmp_path / "z")
    write_archive(tmp_path / "m", *example())
    rewrite_json(tmp_path / "m.zip", lambda document: document.update(version=99))
    with pytest.raises(ValueError, match=r"of version 99 .*update tdmpc2_sb3"):
        read_archive(tmp_path / "m")
    rewrite_json(tmp_path / "m.zip", lambda document: document.pop("data"))
    with pytest.raises(CorruptFileError, match=r"damaged data\.json"):
        read_archive(tmp_path / "m")
