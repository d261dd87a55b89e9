"""The wheel: what is in it, and that it works where it is installed, away from the repository."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
YAML_FILES = sorted(path.name for path in (REPOSITORY / "hyperparams").glob("*.yml"))

pytestmark = pytest.mark.slow


def build(project: Path, folder: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder)]
    subprocess.run([*command, *options, str(project)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(REPOSITORY, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def installed(wheel: Path, tmp_path: Path) -> Path:
    """Return the Python of a new environment with the wheel in it.

    The packages it needs are those of this environment, put on its path; their `.pth` files, and so
    the development installation, are not.
    """
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site_packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (site_packages / "zz_shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", str(wheel)],
        check=True,
    )
    return python


def run(python: Path, cwd: Path, *arguments: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, *arguments],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"tdmpc2_sb3_startup.pth", "tdmpc2_sb3_startup.py"} <= names
    assert {f"tdmpc2_sb3/hyperparams/{file}" for file in YAML_FILES} <= names
    assert {"tdmpc2_sb3/__init__.py", "tdmpc2_sb3/study/published_curves.csv"} <= names
    assert "dmc_gym_plugin/__init__.py" in names
    sources = {path.name for path in (REPOSITORY / "tdmpc2_sb3" / "kernels").glob("*.[ch]")}
    assert {"kernels.c", "interface.h"} <= sources
    assert {f"tdmpc2_sb3/kernels/{source}" for source in sources} <= names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "dmc_gym_plugin",
        "tdmpc2_sb3",
        "tdmpc2_sb3_startup.pth",
        "tdmpc2_sb3_startup.py",
    }


def required(wheel: Path) -> list[Requirement]:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    return [Requirement(line) for line in metadata.get_all("Requires-Dist")]


def test_a_checkout_brings_its_placeholder_for_labmaze(wheel):
    (labmaze,) = [item for item in required(wheel) if item.name == "labmaze"]
    assert labmaze.url == (REPOSITORY / "placeholders" / "labmaze").as_uri()
    needed = {p: labmaze.marker.evaluate({"python_version": p}) for p in ("3.12", "3.13", "3.14")}
    assert needed == {"3.12": False, "3.13": True, "3.14": True}


def test_what_is_handed_on_names_no_folder_of_this_machine(wheel, tmp_path):
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(REPOSITORY)]
    subprocess.run(command, check=True, capture_output=True)
    (clean,) = tmp_path.glob("*.whl")
    assert [str(item) for item in required(clean)] == [
        str(item) for item in required(wheel) if item.name != "labmaze"
    ]
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2]: member for member in archive.getmembers()}
        assert {"hatch_build.py", "placeholders/labmaze/pyproject.toml"} <= set(names)
        texts = [archive.extractfile(names["PKG-INFO"]).read()]
    texts += [zipfile.ZipFile(clean).read(name) for name in zipfile.ZipFile(clean).namelist()]
    assert not any(str(REPOSITORY).encode() in text for text in texts)


def test_the_zoo_works_from_the_installed_wheel(installed, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = run(installed, elsewhere, "-c", "import tdmpc2_sb3; print(tdmpc2_sb3.__file__)")
    assert where.startswith(str(tmp_path / "venv"))
    trained = run(
        installed, elsewhere, "-m", "rl_zoo3.train", "--algo", "tdmpc2", "--env",
        "DMC/cheetah-run-v0", "-n", "50", "--eval-freq", "-1", "--device", "cpu", "-params",
        "latent_dim:16", "enc_dim:32", "mlp_dim:32", "num_samples:16", "num_elites:4",
        "num_pi_trajs:2", "num_iterations:1", "batch_size:8", "learning_starts:40",
    )  # fmt: skip
    assert f"{tmp_path / 'venv'}" in trained.partition("Loading hyperparameters from: ")[2]
    played = run(
        installed, elsewhere, "-m", "rl_zoo3.enjoy", "--algo", "tdmpc2", "--env",
        "DMC/cheetah-run-v0", "-f", "logs", "--no-render", "-n", "500",
    )  # fmt: skip
    assert "Episode Length 500" in played


def test_uninstalling_leaves_nothing(installed, tmp_path):
    run(installed, tmp_path, "-m", "pip", "uninstall", "--quiet", "--yes", "tdmpc2-sb3")
    left = run(
        installed,
        tmp_path,
        "-c",
        "import gymnasium; print([n for n in gymnasium.registry if n.startswith('DMC/')])",
    )
    assert left.strip() == "[]"
    assert not list((tmp_path / "venv").rglob("tdmpc2_sb3*"))


def test_the_placeholder_is_empty_and_satisfies_dm_control(tmp_path):
    wheel = build(REPOSITORY / "placeholders" / "labmaze", tmp_path, "--ignore-requires-python")
    assert wheel.name.startswith("labmaze-1.0.6+placeholder-py3-none-any")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"labmaze-1.0.6+placeholder.dist-info"}
