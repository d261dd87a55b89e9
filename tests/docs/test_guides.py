"""Every command of every guide is executed, in the guide's order, in a folder of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from postgres_server import PostgresServer, find_binaries
from short_python import TINY, shorten

from tdmpc2_sb3 import TDMPC2

REPOSITORY = Path(__file__).resolve().parents[2]
GUIDES = ["train", "tune", "share", "resume", "compare", "experiments"]


def commands(guide: str) -> str:
    """Return all shell commands of a guide as one script."""
    text = (REPOSITORY / "docs" / f"{guide}.md").read_text()
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M))


def run_guide(guide: str, folder: Path, script: str = "", **environment: str) -> str:
    """Execute a guide and return what it printed; `python` is a shortening stand-in.

    `script` stands for the guide's own commands.
    """
    tools = folder / "tools"
    tools.mkdir()
    helper = REPOSITORY / "tests" / "helpers" / "short_python.py"
    (tools / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{helper}" "$@"\n')
    (tools / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script or commands(guide)],
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            **environment,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_every_guide_is_in_the_readme_and_here():
    readme = (REPOSITORY / "README.md").read_text()
    for guide in GUIDES:
        assert f"(docs/{guide}.md)" in readme
        assert commands(guide)


def test_options_in_the_guides_are_kept_when_shortened():
    given = "--algo tdmpc2 --env DMC/walker-walk-v0 -n 15000 -P -params horizon:5 batch_size:256"
    short = shorten("rl_zoo3.train", given.split())
    assert short[short.index("-n") + 1] == "60"
    assert "-P" in short
    # The zoo takes the last of equal names.
    assert short.index("batch_size:8") < short.index("batch_size:256")
    assert "horizon:5" in short
    assert "env_kwargs:dict(action_repeat=50)" in short


@pytest.mark.slow
def test_the_readmes_python_program(tmp_path):
    readme = (REPOSITORY / "README.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M)
    short = program.replace("action_repeat=2", "action_repeat=50").replace("15_000", "25")
    assert short != program
    done = subprocess.run(
        [sys.executable, "-c", f"{short}\nprint('steps', model.num_timesteps, truncated)"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout.endswith("steps 25 True\n"), done.stderr
    assert (tmp_path / "walker.zip").is_file()


@pytest.mark.slow
def test_the_start_pages_python_program(tmp_path):
    page = (REPOSITORY / "docs" / "index.md").read_text()
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    short = program.replace("action_repeat=2", "action_repeat=50").replace("15_000", "25")
    assert short != program
    subprocess.run(
        [sys.executable, "-c", short],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=600,
        check=True,
    )
    assert TDMPC2.load(tmp_path / "walker").num_timesteps == 25


@pytest.mark.slow
def test_train(tmp_path):
    printed = run_guide("train", tmp_path)
    runs = {path.name for path in (tmp_path / "logs" / "tdmpc2").iterdir()}
    walkers = {f"DMC-walker-walk-v0_{n}" for n in (1, 2, 3, 4)}
    hoppers = {f"DMC-hopper-hop-v0_{n}" for n in (1, 2)}
    assert runs == {"Pendulum-v1_1", *hoppers, *walkers}
    assert (tmp_path / "logs" / "tdmpc2_ssm" / "DMC-walker-walk-v0_1").is_dir()
    assert printed.count("Episode Length 20") == 2
    videos = tmp_path / "logs" / "tdmpc2" / "DMC-walker-walk-v0_4" / "videos"
    assert (videos / "training.mp4").is_file()


@pytest.mark.slow
def test_tune(tmp_path):
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed: apt install postgresql")
    with PostgresServer(binaries) as server:
        printed = run_guide("tune", tmp_path, STORAGE=server.url)
    assert printed.count("Number of finished trials:  1") == 2
    assert re.search(r"^0 [-\d.]+ \{.*'num_elites': \d+", printed, re.M)


@pytest.mark.slow
def test_share(tmp_path):
    with HubServer() as server:
        printed = run_guide(
            "share",
            tmp_path,
            HF_ENDPOINT=server.url,
            HF_HOME=str(tmp_path / "hf_home"),
            HF_TOKEN="hf_loopback",
            HF_HUB_DISABLE_XET="1",
        )
        files = server.repositories["ORG/tdmpc2-DMC-walker-walk-v0"].files
    assert {"README.md", "replay.mp4", "tdmpc2-DMC-walker-walk-v0.zip"} <= set(files)
    assert printed.count("Episode Length 20") == 2  # of the exported and of the fetched agent


@pytest.mark.slow
def test_resume(tmp_path):
    printed = run_guide("resume", tmp_path)
    assert "DMC-walker-walk-v0_1' at step 60 of 120" in printed
    assert printed.count("Loading replay buffer") == 1
    run = tmp_path / "logs" / "tdmpc2" / "DMC-walker-walk-v0_1"
    assert TDMPC2.load(run / "DMC-walker-walk-v0").num_timesteps == 120


@pytest.mark.slow
def test_experiments(tmp_path):
    tiny = ", ".join(f"{name}: {value}" for name, value in TINY.items())
    tiny += ", env_kwargs: {action_repeat: 50}"
    script = commands("experiments")
    for given, short in (
        ("{horizon: 3}", f"{{horizon: 3, {tiny}}}"),
        ("{horizon: 5}", f"{{horizon: 5, {tiny}}}"),
        ("steps: 15000 ", "steps: 240 "),  # twelve episodes: skill is the mean of ten
        ("eval_freq: 1500", "eval_freq: 30"),
        ("save_freq: 2500", "save_freq: 40"),
        # What the stand-in makes of the run by hand.
        ("{algo: tdmpc2}", f"{{params: {{{tiny}}}}}"),
        ("steps: 20000", "steps: 60"),
        ("eval_freq: 5000", "eval_freq: 30\neval_episodes: 2"),
    ):
        assert script.count(given) == 1
        script = script.replace(given, short)
    printed = run_guide("experiments", tmp_path, script)
    assert printed.count(" finished: ") == 4
    assert "horizons: 4 of 4 cells done" in printed
    assert "shipped, DMC/cheetah-run-v0, seed 1: finished" in printed
    assert len(list((tmp_path / "horizons").glob("*.csv"))) == 4
    text = (tmp_path / "horizons" / "README.md").read_text()
    assert text.count("| DMC/walker-walk-v0 | horizon5 |") == 4  # main table, three differences
    assert (tmp_path / "by_hand" / "curves.png").is_file()
    steadiness = tmp_path / "horizons" / "steadiness" / "DMC-walker-walk-v0"
    agents = {
        folder.name: (folder / "agents.csv").read_text().count("horizon5,")
        for folder in steadiness.iterdir()
    }
    assert agents == {"end": 2, "horizon_5_against_3": 2}  # of each seed one


@pytest.mark.slow
def test_compare(tmp_path):
    run_guide("compare", tmp_path)
    for file, size in (("curves.png", 1000), ("results.pkl", 500), ("results.svg", 1000)):
        assert (tmp_path / file).stat().st_size > size
    for run in ("ppo/DMC-walker-walk-v0_1", "sac/DMC-cheetah-run-v0_1"):
        assert (tmp_path / "reference" / run / "evaluations.npz").is_file()
