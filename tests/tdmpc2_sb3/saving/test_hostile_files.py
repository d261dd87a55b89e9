"""Files from strangers: what is refused, in one sentence, before it is used or takes memory."""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import pathlib
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch as th

from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.policies import MlpPolicy
from tdmpc2_sb3.saving.archive import UnsaveableError, read_archive, write_archive
from tdmpc2_sb3.saving.files import CorruptFileError, parse_json
from tdmpc2_sb3.saving.json_codec import decode, encode
from tdmpc2_sb3.saving.random_streams import checked_stream
from tdmpc2_sb3.saving.tensor_file import read_tensors, tensor_of

FUZZING = str(pathlib.Path(__file__).parents[1] / "fuzzing.py")
SIZES = {
    "latent_dim": 16,
    "enc_dim": 16,
    "mlp_dim": 16,
    "num_q": 2,
    "num_bins": 11,
    "num_samples": 16,
    "num_elites": 4,
    "num_pi_trajs": 2,
    "num_iterations": 2,
    "batch_size": 8,
    "learning_starts": 20,
    "buffer_size": 300,
    "gamma": 0.9,
    "episodic": False,
    "device": "cpu",
    "seed": 0,
}


@pytest.fixture(scope="module")
def learned() -> TDMPC2:
    return TDMPC2("MlpPolicy", gymnasium.make("Pendulum-v1"), **SIZES).learn(25)


@pytest.fixture
def saved(learned: TDMPC2, tmp_path: pathlib.Path) -> pathlib.Path:
    learned.save(tmp_path / "m.zip")
    return tmp_path / "m.zip"


def rewrite(path: pathlib.Path, name: str, change: Callable[[bytes], bytes], **kwargs: Any) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {each: archive.read(each) for each in archive.namelist()}
    members[name] = change(members[name])
    with zipfile.ZipFile(path, "w", **kwargs) as archive:
        for each, content in members.items():
            archive.writestr(each, content)


def change_data(path: pathlib.Path, **changes: Any) -> None:
    def change(text: bytes) -> bytes:
        document = json.loads(text)
        document["data"].update(changes)
        return json.dumps(document).encode()

    rewrite(path, "data.json", change)


def change_tensors(path: pathlib.Path, name: str, change: Callable[[Any], None]) -> None:
    def rewritten(content: bytes) -> bytes:
        value = th.load(io.BytesIO(content), weights_only=True)
        change(value)
        stream = io.BytesIO()
        th.save(value, stream)
        return stream.getvalue()

    rewrite(path, f"{name}.pth", rewritten)


def refused(path: pathlib.Path, sentence: str, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        TDMPC2.load(path, device="cpu", **kwargs)
    assert "\n" not in str(caught.value)


def tensor(dtype: str, shape: list[int], content: bytes) -> dict[str, Any]:
    text = base64.b64encode(content).decode()
    return {"__type__": "tensor", "dtype": dtype, "shape": shape, "base64": text}


# -- tensors and arrays ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["qint8", "quint8", "qint32", "quint4x2", "quint2x4", "bits8"])
def test_types_without_plain_numbers_are_refused(saved: pathlib.Path, dtype: str) -> None:
    change_data(saved, note=tensor(f"torch.{dtype}", [4], b"abcd"))
    refused(saved, f"kind 'tensor' is damaged .*dtype torch.{dtype}")


@pytest.mark.parametrize(
    ("shape", "content"),
    [([10**9], b""), ([3], b"1234"), ([-1], b""), ([1.0], b"1234"), ([2**31, 2**31], b"")],
)
def test_a_shape_without_its_bytes_is_refused(shape: list[Any], content: bytes) -> None:
    for value in (
        tensor("torch.float32", shape, content),
        {**tensor("<f4", shape, content), "__type__": "ndarray"},
    ):
        with pytest.raises(ValueError, match="is damaged"):
            decode(value)


def test_a_tensor_stays_within_its_storage() -> None:
    content = bytearray(np.arange(6, dtype=np.float32).tobytes())
    assert tensor_of(content, th.float32, (2, 2), (3, 1), 1).tolist() == [[1, 2], [4, 5]]
    for shape, strides, offset in (((2, 2), (3, 1), 2), ((7,), (1,), 0), ((2,), (-1,), 1)):
        with pytest.raises(ValueError, match=r"."):
            tensor_of(content, th.float32, shape, strides, offset)


def test_torch_files_are_read_as_torch_reads_them() -> None:
    layer = th.nn.Linear(3, 2)
    layer.register_buffer("count", th.tensor(4))
    optimizer = th.optim.Adam(layer.parameters(), amsgrad=True)
    layer(th.ones(3)).sum().backward()
    optimizer.step()
    square = th.arange(6.0).reshape(2, 3)
    value = {
        "layer": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "views": [square.T, square[:, 1:], square[1]],
        "kinds": [th.tensor([True, False]), th.ones(2, dtype=th.bfloat16), th.tensor(1 + 2j)],
        "plain": (None, True, 3, -(2**40), 0.25, "word", th.Size([1, 2]), th.float64),
    }
    stream = io.BytesIO()
    th.save(value, stream)
    mine = read_tensors(stream.getvalue(), th.device("cpu"))
    stream.seek(0)
    theirs = th.load(stream, weights_only=True)

    def assert_same(a: Any, b: Any) -> None:
        assert type(a) is type(b)
        if isinstance(a, dict):
            assert list(a) == list(b)
            for key in a:
                assert_same(a[key], b[key])
        elif type(a) in (list, tuple):
            assert len(a) == len(b)
            for pair in zip(a, b, strict=True):
                assert_same(*pair)
        elif isinstance(a, th.Tensor):
            assert a.dtype == b.dtype
            assert th.equal(a, b)
        else:
            assert a == b

    assert_same(mine, theirs)
    assert mine["layer"]._metadata == theirs["layer"]._metadata


def test_a_storage_that_says_more_numbers_than_it_has_is_refused() -> None:
    stream = io.BytesIO()
    th.save(th.zeros(200), stream)
    with zipfile.ZipFile(stream) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(each for each in members if each.endswith("data.pkl"))
    assert members[name].count(b"K\xc8") == 2  # of the storage, of the shape
    members[name] = members[name].replace(b"K\xc8", b"M\xff\xff")
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w") as archive:
        for each, content in members.items():
            archive.writestr(each, content)
    with pytest.raises(ValueError, match="a storage of 800 bytes for 65535 numbers"):
        read_tensors(changed.getvalue(), th.device("cpu"))


# -- parameters, optimisers, streams -----------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "value", "sentence"),
    [
        ("exp_avg", th.zeros(1), r"exp_avg has the shape \(1,\) and this agent's is \(16, 3\)"),
        ("exp_avg_sq", th.zeros(0), r"exp_avg_sq has the shape \(0,\)"),
        ("exp_avg_sq", th.full((16, 3), -1.0), "exp_avg_sq holds -1, which is below 0"),
        ("exp_avg", th.full((16, 3), th.nan), "exp_avg holds numbers that are not finite"),
        ("exp_avg", th.zeros(16, 3, dtype=th.float64), "exp_avg is of torch.float64"),
        ("exp_avg", 3, "exp_avg is 3 and no plain tensor"),
        ("step", th.zeros(0), r"step has the shape \(0,\)"),
        ("step", th.tensor(-1.0), "step holds -1"),
        ("more", th.zeros(1), "has the unknown entry 'more'"),
    ],
)
def test_moments_of_another_shape_are_refused(
    saved: pathlib.Path, learned: TDMPC2, entry: str, value: Any, sentence: str
) -> None:
    assert tuple(learned.policy.model_parameters[0].shape) == (16, 3)
    change_tensors(
        saved, "policy.model_optimizer", lambda state: state["state"][0].update({entry: value})
    )
    refused(saved, sentence)
    other = TDMPC2("MlpPolicy", gymnasium.make("Pendulum-v1"), **SIZES)
    with pytest.raises(ValueError, match=sentence):
        other.set_parameters(str(saved), device="cpu")
    given = copy.deepcopy(learned.get_parameters())
    given["policy.model_optimizer"]["state"][0][entry] = value
    with pytest.raises(ValueError, match=sentence):
        other.set_parameters(given, device="cpu")


@pytest.mark.parametrize(
    ("group", "sentence"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.9, 1.5)}, r"betas is \(0.9, 1.5\)"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"params": [0, 0]}, "is of other parameters"),
        ({"capturable": True}, "capturable is True"),
    ],
)
def test_settings_of_an_optimiser_are_checked(
    saved: pathlib.Path, group: dict[str, Any], sentence: str
) -> None:
    change_tensors(
        saved, "policy.prior_optimizer", lambda state: state["param_groups"][0].update(group)
    )
    refused(saved, sentence)


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay", "lr_scale"])
@pytest.mark.parametrize("missing", [True, False])
def test_settings_of_an_optimiser_are_all_there(
    saved: pathlib.Path, learned: TDMPC2, key: str, missing: bool
) -> None:
    def damage(state: dict[str, Any]) -> None:
        group = state["param_groups"][0]
        group.pop(key) if missing else group.update({key: None})

    change_tensors(saved, "policy.model_optimizer", damage)
    refused(saved, f"The saved policy.model_optimizer lacks its {key}: ")
    given = copy.deepcopy(learned.get_parameters())
    damage(given["policy.model_optimizer"])
    with pytest.raises(ValueError, match=f"lacks its {key}"):
        learned.set_parameters(given, device="cpu")


def test_flags_that_former_versions_of_torch_lacked_may_be_missing(saved: pathlib.Path) -> None:
    change_tensors(
        saved,
        "policy.prior_optimizer",
        lambda state: state["param_groups"][0].pop("fused"),
    )
    group = TDMPC2.load(saved, device="cpu").policy.prior_optimizer.param_groups[0]
    assert group["fused"] is None
    assert group["eps"] == 1e-5


@pytest.mark.parametrize(
    ("part", "entry", "value", "sentence"),
    [
        ("policy", "scale", th.tensor(0.5), "'scale' holds 0.5, which is below 1"),
        ("policy", "scale", th.tensor(th.inf), "'scale' holds numbers that are not finite"),
        ("policy", "world_model.policy_net.0.weight", th.zeros(1), r"has the shape \(1,\)"),
        ("run_streams", "training", th.zeros(3, dtype=th.uint8), r"'training' has the shape \(3,"),
        ("run_streams", "training", th.zeros(5056, dtype=th.uint8), "'training' is damaged"),
        ("run_streams", "plan_mean", th.zeros(1, 3, 7), r"plan_mean has the shape \(1, 3, 7\)"),
        ("run_streams", "plan_mean", th.full((1, 3, 1), th.nan), "plan_mean holds numbers that"),
        ("run_streams", "evil", th.zeros(1), "has the unknown entry 'evil'"),
    ],
)
def test_weights_and_streams_are_checked(
    saved: pathlib.Path, part: str, entry: str, value: th.Tensor, sentence: str
) -> None:
    change_tensors(saved, part, lambda state: state.update({entry: value}))
    refused(saved, sentence)


def test_sizes_that_the_weights_do_not_have_take_no_memory(
    saved: pathlib.Path, learned: TDMPC2, tmp_path: pathlib.Path
) -> None:
    change_data(saved, latent_dim=80_000, mlp_dim=80_000)  # 25 GB a layer
    refused(saved, r"has the shape .* and this agent's is .*80000")
    learned.policy.save(tmp_path / "p.zip")
    change_data(
        tmp_path / "p.zip",
        policy_arguments={
            **json.loads(zipfile.ZipFile(tmp_path / "p.zip").read("data.json"))["data"][
                "policy_arguments"
            ],
            "mlp_dim": 80_000,
        },
    )
    with pytest.raises(ValueError, match=r"and this agent's is .*80000"):
        MlpPolicy.load(tmp_path / "p.zip")


def test_states_of_random_generators() -> None:
    for name in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"):
        state = getattr(np.random, name)(3).state
        assert checked_stream(state) is state
    twister, pcg = np.random.MT19937(3).state, np.random.PCG64(3).state
    philox = np.random.Philox(3).state
    for bad in (
        {**pcg, "state": {**pcg["state"], "inc": 0}},
        {**pcg, "state": {**pcg["state"], "inc": 4}},
        {**pcg, "state": {**pcg["state"], "state": 2**128}},
        {**pcg, "has_uint32": 2},
        {**pcg, "uinteger": -1},
        {**twister, "state": {**twister["state"], "pos": 625}},
        {**twister, "state": {**twister["state"], "pos": -1}},
        {**twister, "state": {**twister["state"], "key": np.zeros(624, np.uint32)}},
        {**twister, "state": {**twister["state"], "key": np.ones(3, np.uint32)}},
        {**philox, "buffer_pos": 9},
        {"bit_generator": "other"},
        None,
    ):
        with pytest.raises(ValueError, match=r"random state of"):
            checked_stream(bad)


# -- attributes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("_pending_updates", value) for value in (10**12, -1, 2, 0.5, "x", None)),
        *(("_pending_initial_updates", value) for value in (10**12, -1, 21)),
        *(("num_timesteps", value) for value in (-1, 10**30, "many", None, True)),
        *(("n_envs", value) for value in (0, 10**9)),
        *(("batch_size", value) for value in (0, 10**9)),
        ("horizon", 10**6),
        ("num_samples", 10**8),
        ("temperature", {"__type__": "float", "value": "nan"}),
        ("gradient_steps", 10**9),
        ("train_freq", {"__type__": "tuple", "items": [10**12, "step"]}),
        ("_last_obs", tensor("torch.float32", [1, 3], bytes(12))),
        ("_last_episode_starts", [True]),
        ("ep_info_buffer", [1]),
        ("policy_kwargs", None),
        ("learning_rate", -1.0),
        *(("seed", value) for value in (-5, 2**32)),
        ("train_horizon", 1001),
        ("num_q", 1001),
        ("num_enc_layers", 101),
        ("num_bins", 10**5 + 1),
        ("num_iterations", 10**4 + 1),
        ("gamma", 1.5),
        *(("value_coef", value) for value in (1e301, 10**400)),
        ("verbose", 10**7),
        ("use_planner", 1),
    ],
)
def test_attributes_out_of_range_are_named(saved: pathlib.Path, name: str, value: Any) -> None:
    change_data(saved, **{name: value})
    refused(saved, rf"The saved {name} is .* is needed: use another copy")


@pytest.mark.parametrize(
    "name", ["predict", "learn", "__class__", "env", "replay_buffer", "_logger"]
)
def test_methods_are_not_replaced(saved: pathlib.Path, name: str) -> None:
    change_data(saved, **{name: 1})
    refused(saved, "one that agents have is needed")


def test_attributes_of_the_user_are_kept(learned: TDMPC2, tmp_path: pathlib.Path) -> None:
    learned.my_note = {"a": (1, 2.5)}
    try:
        learned.save(tmp_path / "m")
    finally:
        del learned.my_note
    assert TDMPC2.load(tmp_path / "m", device="cpu").my_note == {"a": (1, 2.5)}


def test_a_value_of_the_caller_stands_in_for_a_damaged_one(saved: pathlib.Path) -> None:
    change_data(saved, batch_size=10**9)
    model = TDMPC2.load(saved, device="cpu", custom_objects={"batch_size": 32})
    assert model.batch_size == 32


def test_the_folder_of_the_log_is_the_callers(learned: TDMPC2, tmp_path: pathlib.Path) -> None:
    learned.tensorboard_log = str(tmp_path / "there")
    try:
        learned.save(tmp_path / "m")
    finally:
        learned.tensorboard_log = None
    env = gymnasium.make("Pendulum-v1")
    with pytest.warns(UserWarning, match=r"tensorboard_log='.*there'.*pass tensorboard_log to loa"):
        model = TDMPC2.load(tmp_path / "m", env=env, device="cpu")
    assert model.tensorboard_log is None
    model.learn(1)
    assert not (tmp_path / "there").exists()
    assert TDMPC2.load(tmp_path / "m", device="cpu").tensorboard_log is None  # no word without env
    chosen = TDMPC2.load(tmp_path / "m", env=env, tensorboard_log="here", device="cpu")
    assert chosen.tensorboard_log == "here"


# -- zip and JSON ------------------------------------------------------------------------------


def test_members_of_other_kinds_are_refused(saved: pathlib.Path) -> None:
    content = saved.read_bytes()
    rewrite(saved, "data.json", lambda text: text, compression=zipfile.ZIP_LZMA)
    refused(saved, "'data.json' of the saved file is compressed by method 14")
    saved.write_bytes(content)
    rewrite(saved, "data.json", lambda text: b"0" * (90 << 20), compression=zipfile.ZIP_DEFLATED)
    refused(saved, "'data.json' of the saved file expands to 94371840 bytes, the file beyond 6")
    saved.write_bytes(content)
    with zipfile.ZipFile(saved, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("policy.pth", b"")
    refused(saved, "'policy.pth' of the saved file is there twice")
    encrypted = bytearray(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        encrypted[archive.start_dir + 8] |= 1
    saved.write_bytes(encrypted)
    refused(saved, "'data.json' of the saved file is encrypted")


@pytest.mark.parametrize(("record", "place"), [(b"PK\1\2", 42), (b"PK\5\6", 16)])
@pytest.mark.parametrize("more", [1_000_000, 3_000_000_000])
def test_parts_that_begin_outside_the_file(
    saved: pathlib.Path, record: bytes, place: int, more: int
) -> None:
    content = bytearray(saved.read_bytes())
    at = content.rindex(record) + place
    number = int.from_bytes(content[at : at + 4], "little")
    content[at : at + 4] = (number + more).to_bytes(4, "little")
    saved.write_bytes(content)
    refused(saved, r"claims to begin at byte -?\d+ of a file of \d+|no zip file|truncated")


def test_spaces_of_several_lines_are_named_in_one(saved: pathlib.Path) -> None:
    fields = {"nvec": [10**9] * 40, "start": [0] * 40, "dtype": "<i8"}
    space = {"__type__": "space", "kind": "MultiDiscrete", "fields": fields, "random": None}
    change_data(saved, action_space=space)
    refused(saved, r"The action space is MultiDiscrete\(\[1000000000 100.*\.\.\.: TDMPC2 plans")


def test_other_spaces_are_one_sentence(saved: pathlib.Path) -> None:
    low = np.array([-1.0, -1.0, -7.5], np.float32)[:, None].repeat(9, 1)
    env = gymnasium.wrappers.TransformObservation(
        gymnasium.make("Pendulum-v1"), lambda it: it, gymnasium.spaces.Box(low, np.inf)
    )
    refused(saved, r"Observation spaces do not match: Box\(\[.* != Box\(\[", env=env)


def test_a_files_system_is_printed_without_control_characters(
    saved: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(saved, "system_info.txt", lambda text: b"- OS: x\n\x1b[2J\x1b]0;title\x07\n")
    TDMPC2.load(saved, device="cpu", print_system_info=True)
    printed = capsys.readouterr().out
    assert "\n- OS: x\n'\\x1b[2J\\x1b]0;title\\x07'\n" in printed
    assert "\x1b" not in printed


def test_parts_listed_twice_or_missing(saved: pathlib.Path) -> None:
    content = saved.read_bytes()
    for parts in (["policy"] * 5000, ["policy", "absent"], [1], "policy"):

        def change(text: bytes, parts: Any = parts) -> bytes:
            return json.dumps({**json.loads(text), "tensors": parts}).encode()

        saved.write_bytes(content)
        rewrite(saved, "data.json", change)
        refused(saved, "damaged data.json|lacks its part 'absent'|lacks 'run_streams'")


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 300 + "]" * 300, "NaN", "1e999", "1" * 5000])
def test_json_beyond_what_is_saved(saved: pathlib.Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)
    rewrite(saved, "data.json", lambda _: text.encode())
    refused(saved, "damaged data.json")


def with_values(item: str, count: int) -> Callable[[bytes], bytes]:
    values = ",".join([item] * count)
    return lambda text: text.replace(b'"data": {', f'"data": {{"x": [{values}],'.encode(), 1)


@pytest.mark.parametrize("item", ["{}", "[]", "0"])
def test_values_that_compress_to_nothing_are_not_built(saved: pathlib.Path, item: str) -> None:
    change = with_values(item, 3 << 20)
    rewrite(saved, "data.json", change, compression=zipfile.ZIP_DEFLATED)
    assert saved.stat().st_size < 1 << 18
    tracemalloc.start()
    try:
        refused(saved, "damaged data.json")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20  # the text is some 10 MB
    finally:
        tracemalloc.stop()


def test_values_written_as_they_are_may_be_many(saved: pathlib.Path) -> None:
    rewrite(saved, "data.json", with_values("0", 3 << 20))
    assert TDMPC2.load(saved, device="cpu").x == [0] * (3 << 20)


@pytest.mark.parametrize("note", [np.zeros(60 << 20, np.uint8), [0] * (3 << 20)])
def test_what_is_saved_can_be_loaded(tmp_path: pathlib.Path, note: Any) -> None:
    """Also where it compresses to next to nothing."""
    write_archive(tmp_path / "a", {"note": note}, {})
    np.testing.assert_array_equal(read_archive(tmp_path / "a")[0]["note"], note)


def test_parts_expand_together_to_no_more_than_one_may(saved: pathlib.Path) -> None:
    with zipfile.ZipFile(saved, "a", zipfile.ZIP_DEFLATED) as archive:
        for index in range(3):
            archive.writestr(f"{index}", bytes(30 << 20))
    refused(saved, "'2' of the saved file expands to 31457280 bytes, the file beyond")


@pytest.mark.parametrize("opcode", [b"]", b"}", b"N"])
def test_opcodes_of_all_parts_are_counted(saved: pathlib.Path, opcode: bytes) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + opcode * (600_000) + b".")
    assert read_tensors(stream.getvalue(), th.device("cpu")) in ([], {}, None)
    with zipfile.ZipFile(saved) as archive:
        document = json.loads(archive.read("data.json"))
    text = json.dumps({**document, "tensors": ["first", "second"]}).encode()
    rewrite(saved, "data.json", lambda _: text)
    with zipfile.ZipFile(saved, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("first.pth", stream.getvalue())
        archive.writestr("second.pth", stream.getvalue())
    refused(saved, "The part 'second' of the saved model is damaged")


ALIKE = [index * (2**61 - 1) for index in range(1000)]  # all of hash 0


@pytest.mark.parametrize(
    "value",
    [
        {"__type__": "dict", "items": [[key, 0] for key in ALIKE]},
        {"__type__": "OrderedDict", "items": [[key, {}] for key in ALIKE]},
        {"__type__": "set", "items": ALIKE},
        {"__type__": "frozenset", "items": [{"__type__": "tuple", "items": []}] * 1000},
    ],
)
def test_keys_of_the_same_hash_are_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="1000 keys of the same hash"):
        decode(value)


def test_other_keys_are_kept() -> None:
    value = {-1: "a", -2: "b", 2.5: "c", **dict.fromkeys(range(5000)), (1, 2): {3, 4}}
    assert decode(json.loads(json.dumps(encode(value, "value")))) == value


def test_keys_of_torch_files_are_words_and_small_numbers(tmp_path: pathlib.Path) -> None:
    for key, fits in ((2**53, True), (-3, True), (2**53 + 1, False), (1.5, False), ((1,), False)):
        stream = io.BytesIO()
        th.save({"a": {key: th.ones(1)}}, stream)
        if fits:
            assert list(read_tensors(stream.getvalue(), th.device("cpu"))["a"]) == [key]
            write_archive(tmp_path / "a", {}, {"part": {key: 1}})
        else:
            with pytest.raises(ValueError, match="a key that is neither a word nor a small number"):
                read_tensors(stream.getvalue(), th.device("cpu"))
            with pytest.raises(UnsaveableError, match=r"its key .* is neither a word nor a whole"):
                write_archive(tmp_path / "a", {}, {"part": {key: 1}})


def test_damage_is_named_as_such() -> None:
    with pytest.raises(CorruptFileError):
        read_archive(io.BytesIO(b"PK"))


# -- any damage --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_damaged_files_do_no_harm() -> None:
    result = subprocess.run(
        [sys.executable, FUZZING, "360", "--seed", "7"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    counts = json.loads(result.stdout.splitlines()[-1])
    # The damage is worth something: much is refused, and some gets as far as learning.
    for name in ("model", "ssm", "policy", "buffer", "official", "run"):
        assert counts[f"{name} refused"] > 20
    assert counts["model used"] > 0
    assert counts["run used"] > 20
