"""What the package asks for, and that the tested versions satisfy it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
PINS = [
    Requirement(line)
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def requirements() -> list[Requirement]:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


def pins_for(python: str) -> dict[str, Version]:
    environment = {"python_version": python}
    chosen = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(environment)]
    names = [canonicalize_name(pin.name) for pin in chosen]
    assert len(names) == len(set(names)), "a package is pinned twice"
    return {
        name: Version(str(pin.specifier).removeprefix("=="))
        for name, pin in zip(names, chosen, strict=True)
    }


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_requirement_is_pinned_to_a_version_it_allows(python):
    pins = pins_for(python)
    asked = [
        requirement
        for requirement in requirements()
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python})
    ]
    assert len(asked) >= 25
    for requirement in asked:
        name = canonicalize_name(requirement.name)
        assert pins[name] in requirement.specifier, requirement


def test_all_pins_are_exact():
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in PINS)


def test_mujoco_is_capped():
    (mujoco,) = [item for item in requirements() if item.name == "mujoco"]
    assert Version("3.17.0") in mujoco.specifier
    assert Version("4.0.0") not in mujoco.specifier


def test_the_older_hub_integration_is_not_asked_for():
    # It installs the same module as the one that the zoo needs, and breaks the zoo.
    assert "huggingface-sb3" not in {canonicalize_name(item.name) for item in requirements()}
    assert "huggingface-sb3" not in pins_for("3.11")


def test_the_placeholder_for_labmaze_says_what_it_is():
    placeholder = tomllib.loads(
        (REPOSITORY / "placeholders" / "labmaze" / "pyproject.toml").read_text()
    )["project"]
    assert placeholder["name"] == "labmaze"
    assert Version(placeholder["version"]).local == "placeholder"
    assert placeholder["requires-python"] == ">=3.13"  # elsewhere it would hide the true one


def test_the_suite_runs_without_labmaze(tmp_path):
    code = (
        "import sys\n"
        "sys.modules['labmaze'] = None  # as if it were not installed\n"
        "import gymnasium\n"
        "env = gymnasium.make('DMC/cheetah-run-v0')\n"
        "env.reset(seed=0)\n"
        "print(env.step(env.action_space.sample())[0].shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(17,)"
