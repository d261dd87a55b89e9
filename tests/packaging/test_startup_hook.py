"""The start-up hook: what it brings, what it costs, and that nothing can break it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STARTUP = REPOSITORY / "startup"
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))


def run_python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter of this environment, away from the repository."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_plain_start_imports_nothing_of_ours(tmp_path):
    ours = "[name for name in sys.modules if 'tdmpc2' in name or 'dmc_gym' in name]"
    hook = "[getattr(f, '__name__', '') for f in sys.meta_path].count('TDMPC2SB3Startup')"
    done = run_python(f"import sys; print({ours}, {hook})", tmp_path)
    assert done.stdout.strip() == "[] 1"
    assert done.stderr == ""


def test_gymnasium_knows_our_ids_without_an_import(tmp_path):
    code = (
        "import gymnasium\n"
        "print(sum(name.startswith('DMC/') for name in gymnasium.registry) >= 51)\n"
        "print(type(gymnasium.__loader__).__name__, type(gymnasium.__spec__.loader).__name__)\n"
        "print(gymnasium.make('DMC/walker-walk-v0').observation_space.shape)\n"
    )
    done = run_python(code, tmp_path)
    # The true loader is back in place, so resources and pickles of gymnasium work as ever.
    assert done.stdout.split("\n")[:3] == ["True", "SourceFileLoader SourceFileLoader", "(24,)"]
    assert done.stderr == ""


def test_gymnasium_is_untouched_with_the_hook_off(tmp_path):
    code = "import gymnasium; print([n for n in gymnasium.registry if n.startswith('DMC/')])"
    assert run_python(code, tmp_path, TDMPC2_SB3_NO_HOOK="1").stdout.strip() == "[]"
    assert run_python(code, tmp_path, TDMPC2_SB3_NO_HOOK="0").stdout.strip() != "[]"


def test_importing_our_package_first_registers_once(tmp_path):
    code = "import dmc_gym_plugin, gymnasium\nprint('DMC/walker-walk-v0' in gymnasium.registry)\n"
    done = run_python(code, tmp_path)
    assert done.stdout.strip() == "True"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("broken", "source"),
    [
        ("tdmpc2_sb3_startup.py", "raise RuntimeError('broken')"),
        ("tdmpc2_sb3_startup.py", "find_spec = None"),
        ("dmc_gym_plugin.py", "raise RuntimeError('broken')"),
        ("dmc_gym_plugin.py", "def incomplete(:"),
    ],
)
@pytest.mark.parametrize("flags", ["", "error"])
def test_a_fault_of_ours_never_stops_an_import(tmp_path, broken, source, flags):
    (tmp_path / broken).write_text(source)
    code = "import gymnasium; print('CartPole-v1' in gymnasium.registry)"
    done = run_python(code, tmp_path, PYTHONPATH=str(tmp_path), PYTHONWARNINGS=flags)
    assert done.stdout.strip() == "True"
    assert done.returncode == 0
    if broken.startswith("dmc"):  # told in one sentence, not hidden
        assert "could not add itself to gymnasium" in done.stderr
        assert "TDMPC2_SB3_NO_HOOK=1" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_second_finder_of_the_same_kind_does_not_recurse(tmp_path):
    code = (
        "import sys\n"
        "class Asker:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        for finder in sys.meta_path:\n"
        "            if finder is not Asker:\n"
        "                spec = finder.find_spec(name, path)\n"
        "                if spec is not None:\n"
        "                    return spec\n"
        "sys.meta_path.insert(0, Asker)\n"
        "import gymnasium\n"
        "print('DMC/walker-walk-v0' in gymnasium.registry)\n"
    )
    assert run_python(code, tmp_path).stdout.strip() == "True"


def test_the_installed_hook_is_the_repositorys():
    for name in ("tdmpc2_sb3_startup.pth", "tdmpc2_sb3_startup.py"):
        installed = (SITE_PACKAGES / name).read_text()
        assert installed == (STARTUP / name).read_text(), f"{name} changed: install again"


def test_the_hook_is_one_line_without_costly_imports():
    lines = (STARTUP / "tdmpc2_sb3_startup.pth").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("import sys;")
    assert "importlib" not in lines[0]
    assert "typing" not in lines[0]
