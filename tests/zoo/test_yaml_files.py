"""The zoo's files are read as they were written, and nothing in them is run."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch as th
import yaml

from tdmpc2_sb3.zoo.yaml_files import read_yaml

WRITTEN = OrderedDict(
    [
        ("train_freq", (1, "episode")),
        ("env_kwargs", {"action_repeat": 2}),
        ("nested", OrderedDict(a=[1, (2.5, None)])),
        ("learning_rate", "lin_3e-4"),
    ]
)


@pytest.mark.parametrize("strict", [True, False])
def test_what_the_zoo_writes_is_read_as_its_own_loader_does(tmp_path, strict):
    path = tmp_path / "config.yml"
    path.write_text(yaml.dump(WRITTEN))
    found = read_yaml(path, strict)
    assert found == yaml.load(path.read_text(), Loader=yaml.UnsafeLoader) == dict(WRITTEN)
    assert type(found["train_freq"]) is tuple
    assert type(found["nested"]) is OrderedDict


@pytest.mark.parametrize(
    "tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"]
)
def test_nothing_is_run(tmp_path, tag):
    witness = tmp_path / "witness"
    path = tmp_path / "config.yml"
    value = f"['{witness}']" if tag.startswith("object") else "''"
    path.write_text(f"algo: sac\npolicy: !!python/{tag} {value}\n")
    with pytest.raises(ValueError, match=r"config\.yml' .*Python objects.*python/") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)
    found = read_yaml(path, strict=False)
    assert found == {"algo": "sac", "policy": [str(witness)] if "object" in tag else ""}
    assert not witness.exists()


def test_objects_of_other_runs_do_not_keep_the_rest_from_being_read(tmp_path):
    path = tmp_path / "config.yml"
    settings = OrderedDict(
        policy_kwargs={"activation_fn": th.nn.ReLU, "x": complex(1, 2)}, n_timesteps=5
    )
    path.write_text(yaml.dump(settings))
    assert "!!python/name:torch.nn" in path.read_text()
    assert read_yaml(path, strict=False)["n_timesteps"] == 5


@pytest.mark.parametrize("text", ["", "[1, 2", "just text", "- a list", "a: b: c"])
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_no_mapping_is_one_sentence(tmp_path, text, strict):
    path = tmp_path / "args.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"args\.yml' is damaged") as caught:
        read_yaml(path, strict)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "absent.yml", strict)
