"""``python -m dmc_gym_plugin``: the list and the pictures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from PIL import Image

import dmc_gym_plugin
from dmc_gym_plugin import preview, rendering, tasks
from dmc_gym_plugin.__main__ import main
from dmc_gym_plugin.sizes import SIZES

needs_opengl = pytest.mark.skipif(
    rendering.choose_backend() == "disable", reason=f"no OpenGL: {rendering.REMEDY}"
)
QUICK = ("acrobot", "cartpole", "cheetah", "hopper", "lqr", "pendulum", "reacher", "walker")
HEAVY = ("dog", "manipulation", "locomotion")


def check_sizes(info: tasks.TaskInfo) -> None:
    env = dmc_gym_plugin.DMControlEnv(info.domain, info.task)
    observation, action, seconds = SIZES[f"{info.domain}-{info.task}"]
    flat = gymnasium.spaces.Box(-np.inf, np.inf, (observation,), np.float32)
    assert env.observation_space == flat
    assert env.action_space.shape == (action,)
    assert env.simulation.control_timestep == pytest.approx(seconds)
    assert env.max_episode_steps == info.control_steps
    env.close()


def test_every_task_has_its_sizes() -> None:
    assert list(SIZES) == [f"{info.domain}-{info.task}" for info in tasks.TASKS.values()]
    assert SIZES["walker-walk"] == (24, 6, 0.025)


@pytest.mark.parametrize("domain", QUICK)
def test_sizes_are_the_live_ones(domain: str) -> None:
    for info in tasks.TASKS.values():
        if info.domain == domain:
            check_sizes(info)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SIZES if name.split("-")[0] not in QUICK])
def test_sizes_are_the_live_ones_for_the_rest(name: str) -> None:
    info = tasks.find(*name.split("-", 1))
    check_sizes(info)


def test_list_needs_no_mujoco() -> None:
    code = (
        "import sys; from dmc_gym_plugin.__main__ import main; main(['list', 'suite']);"
        "print('mujoco' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "False"
    assert sum(line.startswith("DMC/") for line in lines) == 51
    walker = next(line for line in lines if line.startswith("DMC/walker-walk-v0"))
    assert walker.split()[1:] == ["24", "6", "0.025", "1000"]


def test_sizes_without_a_row_are_read_from_the_simulator(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(SIZES, "walker-walk_backwards")
    main(["list", "extended"])
    (line,) = re.findall(r"^DMC/walker-walk_backwards-v0 (.*)$", capsys.readouterr().out, re.M)
    assert line.split() == ["24", "6", "0.025", "1000"]


def test_unknown_names_end_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="walker-walk"):
        main(["preview", "DMC/walker-wlak-v0", "-o", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit, match=r"ends in '\.txt'; give one of"):
        main(["preview", "DMC/walker-walk-v0", "-o", str(tmp_path / "x.txt")])
    with pytest.raises(SystemExit, match="no group 'suit'"):
        main(["list", "suit"])
    with pytest.raises(SystemExit, match="CartPole-v1 is none of the DMC/ tasks"):
        main(["preview", "CartPole-v1", "-o", str(tmp_path / "x.png")])
    for option in ("--steps", "--tiles", "--columns", "--height", "--width"):
        with pytest.raises(SystemExit, match=f"{option} is 0; give a whole number"):
            main(["preview", "DMC/walker-walk-v0", "-o", str(tmp_path / "x.png"), option, "0"])
    assert not list(tmp_path.iterdir())


def test_sheet_places_its_tiles() -> None:
    tiles = [(str(value), np.full((10, 30, 3), value, np.uint8)) for value in (10, 90, 170)]
    sheet = np.asarray(preview.contact_sheet(tiles, columns=2))
    assert sheet.shape == (6 + 2 * (10 + 20 + 6), 6 + 2 * (30 + 6), 3)
    for value, top, left in ((10, 6, 6), (90, 6, 42), (170, 42, 6)):
        assert (sheet[top : top + 10, left : left + 30] == value).all()


@needs_opengl
def test_preview_writes_a_sheet_of_the_episode(tmp_path: Path) -> None:
    output = tmp_path / "sheets" / "pendulum.png"
    arguments = ["--steps", "6", "--tiles", "3", "--columns", "3", "--height", "48", "--width"]
    main(["preview", "DMC/pendulum-swingup-v0", "-o", str(output), *arguments, "64"])
    sheet = np.asarray(Image.open(output))
    assert sheet.shape == (6 + 48 + 20 + 6, 6 + 3 * (64 + 6), 3)
    tiles = [sheet[6:54, left : left + 64] for left in (6, 76, 146)]
    assert all(tile.std() > 10 for tile in tiles)  # something is to be seen
    assert not np.array_equal(tiles[0], tiles[2])  # and it moves


@needs_opengl
@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_preview_writes_a_film(tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"walker{suffix}"
    size = ["--height", "48", "--width", "64"]
    main(["preview", "DMC/walker-walk-v0", "-o", str(output), "--steps", "9", *size])
    if suffix == ".gif":
        assert Image.open(output).n_frames == 10
        return
    import imageio_ffmpeg

    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(output))
    assert frames == 10
    assert seconds == pytest.approx(10 / 40, abs=0.03)  # real time: 40 control steps a second


@needs_opengl
@pytest.mark.slow
def test_preview_of_several_tasks(tmp_path: Path) -> None:
    output = tmp_path / "two.png"
    ids = ["DMC/cartpole-swingup-v0", "DMC/reacher-easy-v0"]
    main(["preview", *ids, "-o", str(output), "--height", "48", "--width", "64", "--steps", "2"])
    assert Image.open(output).size == (6 + 2 * 70, 6 + 48 + 20 + 6)


@pytest.mark.skipif(os.name != "posix", reason="pipes as on Unix")
def test_a_reader_that_has_enough_gets_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "dmc_gym_plugin", "list"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
