"""Replay buffers on disk: exact, without pickle, whole or not at all."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile

import cloudpickle
import numpy as np
import pytest
import torch as th
from batches import assert_equal_batches
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import run_script

from tdmpc2_sb3.replay.buffer import SequenceReplayBuffer
from tdmpc2_sb3.replay.rings import _START, _TERMINATED, _ZERO_PADDED
from tdmpc2_sb3.saving.files import CorruptFileError

OBS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Box(-1, 1, (2,), np.float32)


def make(size=80, n_envs=2, horizon=3, obs_space=OBS, actions=ACTIONS, seed=0, **kwargs):
    return SequenceReplayBuffer(
        size, obs_space, actions, device="cpu", n_envs=n_envs, horizon=horizon, seed=seed, **kwargs
    )


class Feeder:
    """Feeds random steps; two feeders made alike feed alike."""

    def __init__(self, n_envs=2, end_probability=0.1, seed=0) -> None:
        self.n_envs = n_envs
        self.end_probability = end_probability
        self.rng = np.random.default_rng(seed)
        self.obs = self.rng.normal(size=(n_envs, 3)).astype(np.float32)

    def feed(self, buffers, steps) -> None:
        for _ in range(steps):
            shape = (self.n_envs, 3)
            following = self.rng.normal(size=shape).astype(np.float32)
            done = self.rng.random(self.n_envs) < self.end_probability
            rest = self.rng.uniform(-1, 1, shape)
            infos = [{"TimeLimit.truncated": value > 0} for value in rest[:, 2]]
            for buffer in buffers:
                buffer.add(self.obs, following, rest[:, :2], rest[:, 2], done, infos)
            first = self.rng.normal(size=shape).astype(np.float32)
            self.obs = np.where(done[:, None], first, following)


def assert_equal_from_now_on(one, other, feeder) -> None:
    for _ in range(5):
        assert one.num_subsequences == other.num_subsequences
        assert (one.num_steps, one.pos, one.full) == (other.num_steps, other.pos, other.full)
        assert_equal_batches(one.sample(300), other.sample(300))
        feeder.feed([one, other], 17)


@pytest.mark.parametrize("steps", [4, 30, 39, 40, 150])
@pytest.mark.parametrize("end_probability", [0.2, 0.0])
@pytest.mark.parametrize("target", ["path", "bytes"])
def test_a_loaded_buffer_goes_on_exactly(tmp_path, steps, end_probability, target):
    one, other = make(), make(seed=9)
    feeder = Feeder(end_probability=end_probability)
    feeder.feed([one], steps)
    if one.num_subsequences:
        one.sample(10)
    Feeder(seed=5).feed([other], 23)  # is replaced
    file = tmp_path / "replay_buffer" if target == "path" else io.BytesIO()
    one.save(file)
    if target == "path":
        assert os.listdir(tmp_path) == ["replay_buffer.pkl"]
    else:
        file.seek(0)
    with pytest.MonkeyPatch.context() as patch:
        for module in (pickle, cloudpickle):
            patch.setattr(module, "load", None)
            patch.setattr(module, "loads", None)
        patch.setattr(pickle, "Unpickler", None)
        patch.setattr(th, "load", None)
        other.load(file)
    assert other.rings.running.tolist() == one.rings.running.tolist()
    for name, field in one.fields().items():
        assert field.tobytes() == other.fields()[name].tobytes()
    feeder.feed([one, other], 10)  # continues running episodes, without a boundary
    assert_equal_from_now_on(one, other, feeder)


def test_only_the_rows_in_use_are_written(tmp_path):
    buffer = make(size=100_000, n_envs=1)
    Feeder(n_envs=1).feed([buffer], 100)
    buffer.save(tmp_path / "b.pkl")
    assert (tmp_path / "b.pkl").stat().st_size < 8_000  # 120 rows of 25 bytes, headers
    with zipfile.ZipFile(tmp_path / "b.pkl") as archive:  # readable with NumPy alone
        rewards = np.load(io.BytesIO(archive.read("rewards.npy")), allow_pickle=False)
    used = int(buffer.rings.used[0])
    assert rewards.tolist() == buffer.rewards[:used].tolist()


def test_an_empty_buffer_allocates_nothing_when_loaded(tmp_path):
    make().save(tmp_path / "b")
    buffer = make(seed=3)
    buffer.load(tmp_path / "b")
    assert buffer.nbytes == 0
    assert buffer.size() == 0


@pytest.mark.parametrize("horizon", [1, 2, 6])
@pytest.mark.parametrize("past", [False, True])
def test_another_horizon_finds_its_own_sub_sequences(tmp_path, horizon, past):
    one = make(horizon=3)
    other, fresh = (make(horizon=horizon, past_terminations=past) for _ in range(2))
    Feeder().feed([one, fresh], 150)
    one.save(tmp_path / "b")
    other.load(tmp_path / "b")
    assert other.num_subsequences == fresh.num_subsequences
    other.seed(1)
    fresh.seed(1)
    assert_equal_batches(other.sample(300), fresh.sample(300))


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"size": 100}, "rows per environment = 40 and this one 50"),
        ({"size": 40, "n_envs": 1}, "n_envs = 2 and this one 1"),
        ({"obs_space": spaces.Box(-1, 1, (4,))}, "observations = .*3.* and this one .*4"),
        ({"actions": spaces.Box(-1, 1, (1,))}, "action_dim = 2 and this one 1"),
    ],
)
def test_a_buffer_of_another_kind_is_refused_and_untouched(tmp_path, kwargs, sentence):
    buffer = make()
    Feeder().feed([buffer], 20)
    buffer.save(tmp_path / "b")
    other = make(**kwargs)
    with pytest.raises(ValueError, match=sentence):
        other.load(tmp_path / "b")


def test_a_failed_load_leaves_an_empty_buffer_that_works(tmp_path):
    buffer = make()
    Feeder().feed([buffer], 60)
    buffer.save(tmp_path / "b.pkl")
    content = bytearray((tmp_path / "b.pkl").read_bytes())
    content[content.index(buffer.rewards[:40].tobytes()) + 5] ^= 1
    (tmp_path / "b.pkl").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"saved replay buffer '.*b\.pkl' is damaged"):
        buffer.load(tmp_path / "b.pkl")
    assert buffer.size() == 0
    Feeder().feed([buffer], 60)
    buffer.sample(4)


def test_truncated_everywhere(tmp_path):
    buffer = make()
    Feeder().feed([buffer], 60)
    buffer.save(tmp_path / "b.pkl")
    content = (tmp_path / "b.pkl").read_bytes()
    for length in [*range(0, len(content), max(len(content) // 100, 1)), len(content) - 1]:
        (tmp_path / "t.pkl").write_bytes(content[:length])
        with pytest.raises(CorruptFileError, match=r"'.*t\.pkl' is truncated"):
            make().load(tmp_path / "t.pkl")


@pytest.mark.parametrize("change", ["head", "random_state", "used", "version", "format"])
def test_damaged_headers(tmp_path, change):
    buffer = make()
    Feeder().feed([buffer], 60)
    buffer.save(tmp_path / "b.pkl")
    with zipfile.ZipFile(tmp_path / "b.pkl") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = json.loads(members["header.json"])
    header[change] = {
        "head": [1, 2, 3],
        "random_state": {},
        "used": [41, 0],
        "version": 99,
        "format": "other",
    }[change]
    members["header.json"] = json.dumps(header).encode()
    with zipfile.ZipFile(tmp_path / "b.pkl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"damaged header|of version") as caught:
        make().load(tmp_path / "b.pkl")
    assert "\n" not in str(caught.value)


def test_what_is_no_replay_buffer(tmp_path):
    with open(tmp_path / "sb3.pkl", "wb") as file:
        pickle.dump({"a": 1}, file)
    with pytest.raises(CorruptFileError, match="not a zip file"):
        make().load(tmp_path / "sb3.pkl")
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("data.json", "{}")
    with pytest.raises(ValueError, match="not a replay buffer saved by tdmpc2_sb3"):
        make().load(tmp_path / "model.zip")
    with pytest.raises(FileNotFoundError, match=r"absent' and '.*absent\.pkl'"):
        make().load(tmp_path / "absent")


KILLED = """
import sys
import numpy as np
from gymnasium import spaces
from killing import kill_at_random_moments
from tdmpc2_sb3.replay.buffer import SequenceReplayBuffer

path, times = sys.argv[1], int(sys.argv[2])
sizes = []

def make():
    box = spaces.Box(-1e9, 1e9, (50,), np.float32)
    return SequenceReplayBuffer(20_000, box, box, device="cpu", seed=0)

def add():
    row = np.full((1, 50), buffer.num_steps, dtype=np.float32)
    buffer.add(row, row, row, row[:, 0], [True], [{}])

def save():
    add()
    buffer.save(path)

def check():
    global buffer
    buffer = make()
    buffer.load(path)  # compares every checksum
    assert buffer.num_steps > (sizes[-1] if sizes else 2000)
    sizes.append(buffer.num_steps)

buffer = make()
for _ in range(2000):
    add()
kill_at_random_moments(save, check, times)
print(len(sizes))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_file_loads(tmp_path, times):
    assert int(run_script(KILLED, tmp_path / "b.pkl", times)) == times
    assert len(os.listdir(tmp_path)) <= 2


# -- any damage to the header, and to the rows ---------------------------------------------------


def _written(steps: int, end_probability: float, size: int) -> bytes:
    buffer = make(size=size)
    Feeder(end_probability=end_probability).feed([buffer], steps)
    file = io.BytesIO()
    buffer.save(file)
    return file.getvalue()


WRITTEN = [_written(*case) for case in ((0, 0.1, 80), (9, 0.2, 80), (60, 0.1, 80), (150, 0.0, 40))]
HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 45),
    st.sampled_from([10**9, 2**63, 10**30, -(2**40)]),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-2, 45), st.booleans()), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


def _with_header(content: bytes, change) -> io.BytesIO:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["header.json"] = json.dumps(change(json.loads(members["header.json"]))).encode()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, each in members.items():
            archive.writestr(name, each)
    file.seek(0)
    return file


def _refusal(buffer, file):
    """Why a buffer refuses a file; None if it does not."""
    try:
        buffer.load(file)
    except ValueError as error:
        return str(error)
    return None


def _leaves(value, way=()):
    yield way
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _leaves(value[key], (*way, key))


@settings(deadline=None, max_examples=400, derandomize=True)
@given(data=st.data(), content=st.sampled_from(WRITTEN))
def test_any_damage_to_the_header_is_refused_or_changes_nothing(data, content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        header = json.loads(archive.read("header.json"))
    way = data.draw(st.sampled_from([way for way in _leaves(header) if way]))
    value = data.draw(HOSTILE)

    def change(header):
        part = header
        for step in way[:-1]:
            part = part[step]
        part[way[-1]] = value
        return header

    size = 40 * 2 if header["kind"]["rows per environment"] == 40 else 20 * 2
    buffer, original = make(size=size), make(size=size)
    original.load(io.BytesIO(content))
    sentence = _refusal(buffer, _with_header(content, change))
    if sentence is not None:
        assert "\n" not in sentence
        assert buffer.nbytes == 0
        return
    free = "random_state" in way or way == ("num_added",)
    for name in ("head", "running", "running_steps", "cut", "used"):
        assert getattr(buffer.rings, name).tolist() == getattr(original.rings, name).tolist()
    assert buffer.rings.margin == original.rings.margin
    assert buffer.num_added == original.num_added or free
    for name, field in original.fields().items():
        assert field.tobytes() == buffer.fields()[name].tobytes()
    if original.num_subsequences and not free:
        assert_equal_batches(buffer.sample(50), original.sample(50))


@settings(deadline=None, max_examples=200, derandomize=True)
@given(data=st.data(), content=st.sampled_from(WRITTEN[1:]))
def test_flags_that_no_steps_leave_behind_are_refused(data, content):
    """Whatever loads is a sequence of episodes: every sub-sequence holds written rows only."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
        header = json.loads(members["header.json"])
    flags = bytearray(members["flags.npy"])
    used = sum(header["used"])
    row = len(flags) - used + data.draw(st.integers(0, used - 1))
    old = flags[row]
    flags[row] = data.draw(st.integers(0, 255))
    members["flags.npy"] = bytes(flags)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, each in members.items():
            archive.writestr(name, each)
    file.seek(0)
    buffer = make(size=2 * header["kind"]["rows per environment"])
    sentence = _refusal(buffer, file)
    if sentence is not None:
        assert "header or rows" in sentence
        return
    # A termination in place of a truncation, or starts, which are found afresh, are none of these.
    changed = old ^ flags[row]
    assert changed & ~(_TERMINATED | _START | _ZERO_PADDED) == 0 or old >> 4 == 15 or row == 0


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["actions", "rewards", "observations_0"])
def test_numbers_that_are_not_finite_are_refused(name, number):
    with zipfile.ZipFile(io.BytesIO(WRITTEN[2])) as archive:
        members = {each: archive.read(each) for each in archive.namelist()}
    array = np.load(io.BytesIO(members[f"{name}.npy"]))
    array.flat[3] = number
    for fortran, sentence in ((False, "not finite"), (True, "its columns come first")):
        if fortran and array.ndim < 2:
            continue
        stream = io.BytesIO()
        np.save(stream, np.asfortranarray(array) if fortran else array)
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for each, content in {**members, f"{name}.npy": stream.getvalue()}.items():
                archive.writestr(each, content)
        file.seek(0)
        with pytest.raises(CorruptFileError, match=sentence):
            make().load(file)


@pytest.mark.parametrize("header", [b"{'descr': (", b"{" * 900, b"\0", b"{'shape': [1, }"])
def test_headers_of_arrays_that_python_cannot_read(header):
    with zipfile.ZipFile(io.BytesIO(WRITTEN[2])) as archive:
        members = {each: archive.read(each) for each in archive.namelist()}
    begin = members["rewards.npy"][:8]
    members["rewards.npy"] = begin + len(header).to_bytes(2, "little") + header
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for each, content in members.items():
            archive.writestr(each, content)
    file.seek(0)
    with pytest.raises(CorruptFileError, match="'rewards' of the saved file is damaged") as caught:
        make().load(file)
    assert "\n" not in str(caught.value)
