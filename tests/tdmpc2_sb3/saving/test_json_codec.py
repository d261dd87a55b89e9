"""Values through JSON and back, without pickle."""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from rl_zoo3.utils import SimpleLinearSchedule
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule

from tdmpc2_sb3.replay.buffer import SequenceReplayBuffer
from tdmpc2_sb3.saving.json_classes import (
    UnreadableError,
    UnsaveableError,
    qualified_name,
    register_class,
)
from tdmpc2_sb3.saving.json_codec import decode, encode


def through_json(value, name="value"):
    return decode(json.loads(json.dumps(encode(value, name), allow_nan=False)))


def same(a, b) -> bool:
    """Equal in type and content, NaN included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, th.Tensor):
        return a.dtype == b.dtype and th.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple | deque):
        ends = getattr(a, "maxlen", None) == getattr(b, "maxlen", None)
        return ends and len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**70),
        0.1 + 0.2,
        5e-324,
        math.inf,
        -math.inf,
        math.nan,
        "text with \u00e9 and \0",
        b"\x00\xff",
        [1, [2.5, None]],
        (1, ("a", [])),
        {1, 2},
        frozenset({"x"}),
        {"a": {"b": (1,)}},
        {1: "int key", (0, 1): "tuple key"},
        {"__type__": "ndarray", "base64": "not one"},
        OrderedDict([("b", 1), ("a", 2)]),
        deque([{"r": 1.0, "l": 5}, {"r": np.float32(2), "l": 3}], maxlen=100),
        deque([1]),
        np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::-1],
        np.array([np.nan, np.inf, -0.0, 1e-45], dtype=np.float32),
        np.zeros((0, 3)),
        np.array(3.5),
        np.array([True, False]),
        np.array(["a", "bc"]),
        np.array([1, 2], dtype=">i4"),
        np.float64(0.1),
        np.float32(0.1),
        np.int64(7),
        np.bool_(True),
        th.arange(4.0).reshape(2, 2),
        th.tensor([1.5, -2], dtype=th.bfloat16),
        th.tensor(3),
        th.zeros(0, 2),
        th.float32,
        th.device("cuda", 1),
        th.Size([2, 3]),
        pathlib.Path("a") / "b",
        TrainFreq(4, TrainFrequencyUnit.EPISODE),
        TrainFrequencyUnit.STEP,
        th.nn.Mish,
        th.optim.AdamW,
        SequenceReplayBuffer,
    ],
    ids=repr,
)
def test_round_trip(value):
    assert same(through_json(value), value)


def test_array_contents_are_independent_and_writable():
    array = through_json(np.zeros(3))
    array[0] = 1
    assert array.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("schedule", "at_half"),
    [
        (ConstantSchedule(3e-4), 3e-4),
        (FloatSchedule(1e-3), 1e-3),
        (FloatSchedule(LinearSchedule(1.0, 0.0, 1.0)), 0.5),
        (LinearSchedule(2.0, 1.0, 0.25), 1.0),
        (SimpleLinearSchedule("0.01"), 0.005),
        (FloatSchedule(SimpleLinearSchedule(0.1)), 0.05),
    ],
    ids=repr,
)
def test_schedules(schedule, at_half):
    restored = through_json(schedule, "learning_rate")
    assert type(restored) is type(schedule)
    assert repr(restored) == repr(schedule)
    assert restored(0.5) == schedule(0.5) == pytest.approx(at_half)


BOX_WITH_ODD_BOUNDS = spaces.Box(
    np.array([-np.inf, -0.1, 1e-45], dtype=np.float32),
    np.array([np.inf, 1 / 3, 1.0], dtype=np.float32),
)


@pytest.mark.parametrize(
    "space",
    [
        BOX_WITH_ODD_BOUNDS,
        spaces.Box(0, 255, (9, 8, 8), np.uint8),
        spaces.Box(-np.inf, np.inf, (2,), np.int32),
        spaces.Box(-1, 1, (), np.float64),
        spaces.Discrete(5, start=-2),
        spaces.MultiBinary(4),
        spaces.MultiBinary([2, 3]),
        spaces.MultiDiscrete([3, 4], start=[1, 0]),
        spaces.Dict({"z": spaces.Discrete(2), "a": BOX_WITH_ODD_BOUNDS}),
        spaces.Dict({"nested": spaces.Dict({"x": spaces.Box(0, 1, (1,))})}),
        spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2,))]),
    ],
    ids=repr,
)
def test_spaces_and_their_random_streams(space):
    space.seed(3)
    space.sample()
    restored = through_json(space, "observation_space")
    assert restored == space
    assert space == restored
    assert type(restored) is type(space)
    if isinstance(space, spaces.Box):
        assert restored.low.tobytes() == space.low.tobytes()
        assert restored.high.tobytes() == space.high.tobytes()
        assert (restored.bounded_below == space.bounded_below).all()
        assert (restored.bounded_above == space.bounded_above).all()
    if isinstance(space, spaces.Dict):
        assert list(restored.spaces) == list(space.spaces)
    assert [repr(restored.sample()) for _ in range(5)] == [repr(space.sample()) for _ in range(5)]


@pytest.mark.parametrize("kind", ["PCG64", "MT19937", "Philox", "SFC64", "PCG64DXSM"])
def test_numpy_generators_go_on_where_they_were(kind):
    generator = np.random.Generator(getattr(np.random, kind)(5))
    generator.standard_normal(7)
    restored = through_json(generator)
    assert restored.integers(2**40, size=20).tolist() == generator.integers(2**40, size=20).tolist()


def test_numpy_random_state_goes_on_where_it_was():
    state = np.random.RandomState(5)
    state.randn(7)  # leaves a second Gaussian in store
    restored = through_json(state)
    assert restored.randn(20).tolist() == state.randn(20).tolist()


class Custom:
    pass


class CustomPolicy(th.nn.Module):
    pass


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (Custom(), r"'policy_kwargs\['x'\]': a value of type .*Custom cannot"),
        (lambda progress: 1e-3, "the function '.*lambda.*' cannot.*ConstantSchedule"),
        (functools.partial(max, 1), "partial"),
        (np.array([Custom()], dtype=object), "array of dtype object"),
        (Custom, r"class .*Custom is not known .*register_class\(Custom\)"),
        (CustomPolicy, "register_class"),
        (th.nn.Linear(1, 1), "Linear"),
        ([1, {"a": Custom()}], r"\['x'\]\[1\]\['a'\]"),
    ],
    ids=("object", "lambda", "partial", "array", "class", "policy", "module", "nested"),
)
def test_what_needs_pickle_is_refused_by_name(value, what):
    with pytest.raises(UnsaveableError, match=what) as caught:
        encode({"x": value}, "policy_kwargs")
    assert "policy_kwargs" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_that_contains_itself_is_refused():
    value: list = []
    value.append(value)
    with pytest.raises(UnsaveableError, match="'loop': it contains itself"):
        encode(value, "loop")


def test_registered_classes_are_saved_by_name():
    @register_class
    class Mine:
        pass

    encoded = json.loads(json.dumps(encode(Mine, "policy_class")))
    assert encoded == {"__type__": "class", "name": qualified_name(Mine)}
    assert decode(encoded) is Mine


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "torch.nn.modules.os",
        "tdmpc2_sb3.zoo.__main__.main",
        "tdmpc2_sb3.replay.buffer.np",
        "unknown.Class",
        "NoModule",
    ],
)
def test_files_cannot_name_other_classes(name):
    with pytest.raises(UnreadableError, match="register_class"):
        decode({"__type__": "class", "name": name})


@pytest.mark.parametrize(
    "damaged",
    [
        {"__type__": "no such kind"},
        {"__type__": "ndarray", "dtype": "<f4", "shape": [3], "base64": "AAAA"},
        {"__type__": "ndarray", "dtype": "|O", "shape": [1], "base64": "AAAAAAAAAAA="},
        {"__type__": "tensor", "dtype": "torch.save", "shape": [1], "base64": "AAAA"},
        {"__type__": "record", "name": "subprocess.Popen", "fields": {"args": "true"}},
        {"__type__": "record", "name": qualified_name(ConstantSchedule), "fields": {"x": 1}},
        {"__type__": "enum", "name": "http.HTTPStatus", "value": 200},
        {"__type__": "space", "kind": "Box"},
        {"__type__": "numpy generator", "state": {"bit_generator": "seterr"}},
        {"__type__": "float", "value": "1"},
        {"__type__": "action noise", "kind": "Popen", "attributes": {}},
        {"__type__": "action noise", "kind": "NormalActionNoise", "attributes": {"_mu": 0}},
    ],
    ids=str,
)
def test_damaged_values_get_one_sentence(damaged):
    with pytest.raises(UnreadableError, match="saved"):
        decode({"a": [damaged]})
