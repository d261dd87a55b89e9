"""Nothing of the machine is left in what is uploaded, and what is left is still right."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.zoo import scrubbing
from tdmpc2_sb3.zoo.scrubbing import Scrubber

HOME, USER, HOST = "/home/zelda smith", "zeldasmith", "node17.cluster.example"
SCRUBBER = Scrubber([HOME, USER, HOST, "bob"], ["DMC/walker-walk-v0", "orga"])


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"saved in {HOME}/logs/a_1, done", "saved in ***, done"),
        ("'/scratch/other/x.xml'", "'***'"),
        (r"C:\\Users\\who\\x and \\\\server\\share", "*** and ***"),
        ("~/logs ~who/logs", "*** ***"),
        (
            "postgresql://a:b@c/d https://u:p@h/x https://github.com/a/b",
            "*** *** https://github.com/a/b",
        ),
        (f"by {USER}2 on {HOST}", "by ***2 on ***"),
        ("bob's bobsleigh", "***'s bobsleigh"),
        ("value: 42.73 +/- 11.64", "value: 42.73 +/- 11.64"),
        (
            "DMC/walker-walk-v0 and/or 1 / 2 <br/></a> logs/",
            "DMC/walker-walk-v0 and/or 1 / 2 <br/></a> logs/",
        ),
    ],
)
def test_texts(text, left):
    assert SCRUBBER.text(text) == left


def test_yaml_keeps_its_tags_and_neutral_options():
    args = OrderedDict(
        algo="tdmpc2", storage="mysql://a@b/c", log_folder=f"{HOME}/logs", seed=3, trained_agent="",
        env_kwargs={"model": f"{HOME}/é/x.xml", "action_repeat": 2}, study_name="mine",
    )  # fmt: skip
    content = SCRUBBER.content(yaml.dump(args).encode(), "args.yml")
    read = yaml.load(content, Loader=yaml.UnsafeLoader)
    assert read == OrderedDict(
        algo="tdmpc2", storage=None, log_folder="logs", seed=3, trained_agent="",
        env_kwargs={"model": "***", "action_repeat": 2}, study_name=None,
    )  # fmt: skip
    plain = yaml.dump(OrderedDict(policy="MlpPolicy", n_envs=2)).encode()
    assert SCRUBBER.content(plain, "config.yml") is plain


@pytest.mark.parametrize("code", ["utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_binary_files_keep_their_length(code):
    content = b"\x80\xff" + f"in {HOME}/x by {USER}".encode(code)
    scrubbed = SCRUBBER.content(content, "x.bin")
    assert len(scrubbed) == len(content)
    assert not SCRUBBER.left(scrubbed)
    assert SCRUBBER.left(content)


def test_pickles_and_arrays_in_archives_in_archives():
    value = {"path": f"{HOME}/x", "weights": np.arange(5.0), "who": [USER, HOST]}
    inner, outer = io.BytesIO(), io.BytesIO()
    np.savez_compressed(inner, names=np.array([USER, HOST]), numbers=np.arange(7))
    with zipfile.ZipFile(outer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", pickle.dumps(value))
        archive.writestr("a.npz", inner.getvalue())
        archive.writestr(
            "b.json", json.dumps({":serialized:": base64.b64encode(pickle.dumps(value)).decode()})
        )
    scrubbed = SCRUBBER.content(outer.getvalue(), "x.zip")
    assert SCRUBBER.left(outer.getvalue())
    assert not SCRUBBER.left(scrubbed)
    with zipfile.ZipFile(io.BytesIO(scrubbed)) as archive:
        assert archive.testzip() is None
        read = pickle.loads(archive.read("data.pkl"))
        arrays = np.load(io.BytesIO(archive.read("a.npz")))
        serialized = base64.b64decode(json.loads(archive.read("b.json"))[":serialized:"])
    np.testing.assert_array_equal(read["weights"], np.arange(5.0))
    np.testing.assert_array_equal(arrays["numbers"], np.arange(7))
    assert read["path"] == "*" * len(HOME) + "/x"
    assert pickle.loads(serialized)["who"] == ["*" * len(USER), "*" * len(HOST)]


@pytest.mark.parametrize("number", [b"/9ZB", b"~a/A", b"{[}A"])
def test_numbers_that_read_like_words_stay(number):
    value = torch.frombuffer(bytearray(number), dtype=torch.float32)
    file = io.BytesIO()
    torch.save({"scale": value}, file)
    content = file.getvalue()
    assert SCRUBBER.content(content, "policy.pth") is content
    with zipfile.ZipFile(outer := io.BytesIO(), "w") as archive:
        archive.writestr("policy.pth", content)
        archive.writestr("data.json", json.dumps({"log": f"{HOME}/tb"}))
    with zipfile.ZipFile(io.BytesIO(SCRUBBER.content(outer.getvalue(), "model.zip"))) as archive:
        read = torch.load(io.BytesIO(archive.read("policy.pth")))
        assert json.loads(archive.read("data.json")) == {"log": "***"}
    assert read["scale"].numpy().tobytes() == number


def test_a_model_loads_with_its_weights_and_without_its_log(tmp_path: Path):
    model = TDMPC2(
        "MlpPolicy", "DMC/walker-walk-v0", latent_dim=16, enc_dim=16, mlp_dim=16, device="cpu",
        tensorboard_log=f"{HOME}/tb",
    )  # fmt: skip
    model.save(tmp_path / "model")
    scrubbing.scrub_folder(tmp_path, ["DMC/walker-walk-v0"])
    again = TDMPC2.load(tmp_path / "model", device="cpu")
    assert again.tensorboard_log is None
    for name, value in model.policy.state_dict().items():
        np.testing.assert_array_equal(again.policy.state_dict()[name], value)


def test_what_cannot_be_taken_out_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("USER", USER)
    (tmp_path / "x.txt").write_text("harmless")
    scrubbing.scrub_folder(tmp_path, [])
    monkeypatch.setattr(Scrubber, "content", lambda self, content, name: content)
    (tmp_path / "y.bin").write_bytes(b"\xff" + USER.encode())
    with pytest.raises(SystemExit, match=r"y.bin' still names"):
        scrubbing.scrub_folder(tmp_path, [])


def test_secret_arguments_of_environments_are_masked_wherever_they_stand(tmp_path: Path):
    secrets = {"api_key": "sk-4f:x/1", "inner": {"Password": "hunter two"}, "auth_token": 1234567}
    plain = {"action_repeat": 2, "use_token": True, "token": 12}
    arguments = {**secrets, **plain}
    (tmp_path / "args.yml").write_text(yaml.dump(OrderedDict(env_kwargs=arguments)))
    (tmp_path / "config.yml").write_text(yaml.dump(OrderedDict(env_kwargs=dict(secrets))))
    (tmp_path / "README.md").write_text(f"```python\n{arguments}\n```\n")
    (tmp_path / "command.txt").write_text("train --env-kwargs api_key:'\"sk-4f:x/1\"'")
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("0.monitor.csv", '#{"key": "hunter two"}')
    scrubbing.scrub_folder(tmp_path, [])
    read = yaml.load((tmp_path / "args.yml").read_text(), Loader=yaml.UnsafeLoader)
    hidden = {"api_key": "***", "inner": {"Password": "***"}, "auth_token": "***"}
    assert read["env_kwargs"] == {**hidden, **plain}
    assert (tmp_path / "README.md").read_text() == (
        "```python\n{'api_key': '***', 'inner': {'Password': '***'}, 'auth_token': ***, "
        "'action_repeat': 2, 'use_token': True, 'token': 12}\n```\n"
    )
    for path in tmp_path.iterdir():
        assert not any(each in path.read_bytes() for each in (b"sk-4f", b"hunter", b"1234567"))


def test_names_of_files_tell_nothing_of_the_machine(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("USER", USER)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / f"events.out.tfevents.17.{USER}.5").write_bytes(b"\0")
    with pytest.raises(
        SystemExit, match=rf"The name of '.*{USER}.5' tells of this machine.*rename"
    ):
        scrubbing.scrub_folder(tmp_path, [])
