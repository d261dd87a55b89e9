"""Views and pictures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from dm_control import suite
from stable_baselines3.common.preprocessing import is_image_space

import dmc_gym_plugin
from dmc_gym_plugin import rendering
from dmc_gym_plugin.views import PixelView

needs_opengl = pytest.mark.skipif(
    rendering.choose_backend() == "disable", reason=f"no OpenGL: {rendering.REMEDY}"
)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter without a display and without this process's choice."""
    dropped = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID", "DISPLAY")
    dropped += ("WAYLAND_DISPLAY",)
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    kept["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**kept, **environment}
    )


def test_dict_view_has_dm_controls_values() -> None:
    env = gymnasium.make("DMC/finger-turn_easy-v0", observation="dict")
    observation, _ = env.reset(seed=2)
    expected = suite.load("finger", "turn_easy", task_kwargs={"random": 2}).reset().observation
    assert set(observation) == set(expected)
    for name, value in observation.items():
        assert value.dtype == np.float32
        assert value.ndim == 1
        np.testing.assert_array_equal(value, np.ravel(expected[name]).astype(np.float32))
    assert env.observation_space["dist_to_target"].shape == (1,)  # a 0-d value in dm_control
    assert env.observation_space.contains(observation)


def test_frames_are_stacked_oldest_first() -> None:
    pictures = iter(np.full((2, 2, 3), value, np.uint8) for value in range(1, 9))
    first = PixelView(lambda: next(pictures), 2, 2, frame_stack=3, channels="first")
    assert first.space.shape == (9, 2, 2)
    np.testing.assert_array_equal(first.first()[:, 0, 0], [1] * 9)
    np.testing.assert_array_equal(first.next()[:, 0, 0], [1] * 6 + [2] * 3)
    np.testing.assert_array_equal(first.next()[:, 0, 0], [1] * 3 + [2] * 3 + [3] * 3)
    np.testing.assert_array_equal(first.first()[:, 0, 0], [4] * 9)
    last = PixelView(lambda: next(pictures), 2, 2, frame_stack=2, channels="last")
    assert last.space.shape == (2, 2, 6)
    last.first()
    np.testing.assert_array_equal(last.next()[0, 0], [5] * 3 + [6] * 3)


@needs_opengl
def test_pixels_are_dm_controls_picture() -> None:
    env = gymnasium.make("DMC/cartpole-swingup-v0", observation="state+pixels", frame_stack=2)
    observation, _ = env.reset(seed=4)
    assert is_image_space(env.observation_space["pixels"], check_channels=False)
    theirs = suite.load("cartpole", "swingup", task_kwargs={"random": 4})
    theirs.reset()
    for _ in range(3):
        before = observation["pixels"]
        action = np.array([0.5], np.float32)
        theirs.step(action)
        observation = env.step(action)[0]
    picture = theirs.physics.render(64, 64, camera_id=0).transpose(2, 0, 1)
    np.testing.assert_array_equal(observation["pixels"][3:], picture)
    np.testing.assert_array_equal(observation["pixels"][:3], before[3:])
    assert observation["state"].shape == (5,)
    env.close()


@needs_opengl
def test_a_restored_stack_holds_the_old_frames() -> None:
    env = dmc_gym_plugin.DMControlEnv("cartpole", "swingup", observation="pixels")
    env.reset(seed=0)
    for _ in range(4):
        env.step(np.ones(1, np.float32))
    saved = env.get_state()
    expected = env.step(np.ones(1, np.float32))[0]
    fresh = dmc_gym_plugin.DMControlEnv("cartpole", "swingup", observation="pixels")
    fresh.set_state(saved)
    np.testing.assert_array_equal(fresh.step(np.ones(1, np.float32))[0], expected)
    env.close()
    fresh.close()


@pytest.mark.skipif(not rendering.egl_works(), reason="EGL is not installed")
def test_asking_for_egl_leaves_its_users_alone() -> None:
    code = (
        "import gymnasium, dmc_gym_plugin\n"
        "from dmc_gym_plugin import rendering\n"
        "for _ in range(2):\n"
        "    env = gymnasium.make('DMC/pendulum-swingup-v0', render_mode='rgb_array')\n"
        "    env.reset(seed=0); print(env.render().std() > 10, rendering.egl_works())\n"
    )
    done = run(code, MUJOCO_GL="egl")
    assert done.stdout.split() == ["True"] * 4, done.stderr


@needs_opengl
def test_render_modes() -> None:
    sizes = {"render_height": 48, "render_width": 80}
    pictures = {}
    for mode in ("rgb_array", "depth_array", "multi_camera"):
        env = gymnasium.make("DMC/quadruped-walk-v0", render_mode=mode, **sizes)
        env.reset(seed=0)
        pictures[mode] = env.render()
        if mode == "rgb_array":
            expected = env.unwrapped.physics.render(48, 80, camera_id=2)
            np.testing.assert_array_equal(env.render(), expected)  # the literature's camera
        env.close()
    assert pictures["rgb_array"].shape == (48, 80, 3)
    assert pictures["rgb_array"].dtype == np.uint8
    assert pictures["depth_array"].shape == (48, 80)
    assert pictures["depth_array"].dtype == np.float32
    assert 0 < pictures["depth_array"].min() < 20  # metres
    tiles = pictures["multi_camera"]  # four cameras, two by two
    assert tiles.shape == (96, 160, 3)
    np.testing.assert_array_equal(tiles[48:, :80], pictures["rgb_array"])  # camera 2


@needs_opengl
def test_pictures_may_exceed_the_models_buffer() -> None:
    env = gymnasium.make(
        "DMC/pendulum-swingup-v0", render_mode="rgb_array", render_height=490, render_width=650
    )
    env.reset(seed=0)
    assert env.render().shape == (490, 650, 3)
    env.close()


def test_rendering_does_not_change_the_simulation() -> None:
    def returns(render: bool) -> list[float]:
        env = gymnasium.make("DMC/walker-walk-v0", render_mode="rgb_array")
        env.reset(seed=0)
        rewards = []
        for _ in range(5):
            rewards.append(env.step(np.full(6, 0.3, np.float32))[1])
            if render:
                env.render()
        env.close()
        return rewards

    if rendering.choose_backend() == "disable":
        pytest.skip(f"no OpenGL: {rendering.REMEDY}")
    assert returns(True) == returns(False)


def test_without_opengl_everything_but_pictures_works() -> None:
    code = (
        "import gymnasium, dmc_gym_plugin\n"
        "env = gymnasium.make('DMC/quadruped-escape-v0', render_mode='rgb_array')\n"
        "env.reset(seed=0); print(env.step(env.action_space.sample())[0].shape)\n"
        "try: env.render()\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = run(code, MUJOCO_GL="disable")
    assert done.stdout.startswith("(101,)\nRenderingError Cannot render: MUJOCO_GL is 'disable'"), (
        done
    )
    assert "apt-get install libegl1 libgl1-mesa-dri" in done.stdout
    assert "libosmesa6" in done.stdout


DRAW = (
    "import gymnasium, os\n"
    "env = gymnasium.make('DMC/walker-walk-v0', render_mode='rgb_array')\n"
    "print(env.reset(seed=0)[0][0], env.step(env.action_space.sample())[4]['frames'])\n"
    "for _ in range(2):\n"
    "    try: print(env.render().std() > 20, os.environ['MUJOCO_GL'])\n"
    "    except Exception as error: print(type(error).__name__, error)\n"
    "os.environ.pop('MUJOCO_EGL_DEVICE_ID', None); os.environ.pop('PYOPENGL_PLATFORM', None)\n"
    "if os.environ.get('MUJOCO_GL') == 'vulkan': del os.environ['MUJOCO_GL']\n"
    "print(env.render().std() > 20)\n"
)


@pytest.mark.skipif(not rendering.egl_works(), reason="EGL is not installed")
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PYOPENGL_PLATFORM": "glx"}, "PYOPENGL_PLATFORM is 'glx'"),
        ({"PYOPENGL_PLATFORM": "egl"}, None),
        ({"MUJOCO_EGL_DEVICE_ID": ""}, None),
        ({"MUJOCO_EGL_DEVICE_ID": "99"}, "MUJOCO_EGL_DEVICE_ID is '99': unset it or name a"),
        ({"MUJOCO_EGL_DEVICE_ID": "first"}, "MUJOCO_EGL_DEVICE_ID is 'first': unset it or name a"),
        ({"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "99"}, "MUJOCO_EGL_DEVICE_ID is '99'"),
        ({"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "glx"}, "PYOPENGL_PLATFORM is 'glx': unset it"),
        ({"MUJOCO_GL": "vulkan"}, "MUJOCO_GL is 'vulkan', which dm_control does not know"),
    ],
)
def test_rendering_variables_matter_to_pictures_alone(
    variables: dict[str, str], said: str | None
) -> None:
    """An environment runs whatever they say; where a picture then fails, its error names the
    variable, and once that is put right the next picture is made."""
    if not rendering.is_headless():
        pytest.skip("needs a machine without a display")
    done = run(DRAW, **variables)
    first, *pictures, last = done.stdout.splitlines()
    expected = suite.load("walker", "walk", task_kwargs={"random": 0}).reset().observation
    assert first.split() == [str(np.float32(expected["orientations"][0])), "1"]
    if said is None:
        assert pictures == ["True egl"] * 2
    else:
        assert len(pictures) == 2
        assert all(line.startswith("RenderingError Cannot render: ") for line in pictures), done
        assert all(said in line for line in pictures), pictures
    assert last == "True", done.stderr


@pytest.mark.skipif(not rendering.egl_works(), reason="EGL is not installed")
def test_dm_controls_own_environments_render_beside_ours() -> None:
    code = (
        "import gymnasium; gymnasium.make('DMC/walker-walk-v0')\n"
        "from dm_control import suite; print(suite.load('walker', 'walk').physics.render().std())"
    )
    if not rendering.is_headless():
        pytest.skip("needs a machine without a display")
    done = run(code)
    assert float(done.stdout) > 20, done.stderr


def test_human_needs_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    if not rendering.is_headless():
        pytest.skip("macOS and Windows have a display")
    with pytest.raises(ValueError, match="neither DISPLAY nor WAYLAND_DISPLAY"):
        gymnasium.make("DMC/walker-walk-v0", render_mode="human")


@pytest.mark.parametrize(
    ("platform", "display", "mujoco_gl", "works", "chosen"),
    [
        ("linux", "", "", ("egl", "osmesa"), "egl"),
        ("linux", "", "", ("osmesa",), "osmesa"),
        ("linux", "", "", (), "disable"),
        ("linux", "", "glfw", ("egl", "osmesa"), "glfw"),  # the user's own wins
        ("linux", ":0", "", ("egl", "osmesa"), None),  # dm_control's choice stays
        ("darwin", "", "", ("egl", "osmesa"), None),
    ],
)
def test_choice_of_backend(
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    display: str,
    mujoco_gl: str,
    works: tuple[str, ...],
    chosen: str | None,
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.setenv("WAYLAND_DISPLAY", "")
    monkeypatch.setenv("MUJOCO_GL", mujoco_gl)
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    monkeypatch.setattr(rendering, "egl_works", lambda: "egl" in works)
    monkeypatch.setattr(rendering, "osmesa_loads", lambda: "osmesa" in works)
    assert (rendering.choose_backend() or None) == chosen
    assert (os.environ["MUJOCO_GL"] or None) == chosen


@pytest.mark.parametrize(
    ("pyopengl", "works", "chosen"),
    [
        ("osmesa", ("egl", "osmesa"), "osmesa"),
        ("osmesa", ("egl",), None),
        ("egl", ("egl", "osmesa"), "egl"),
        ("egl", ("osmesa",), None),
        ("glx", ("egl", "osmesa"), None),
        ("", ("osmesa",), "osmesa"),
    ],
)
def test_pyopengls_variable_wins(
    monkeypatch: pytest.MonkeyPatch, pyopengl: str, works: tuple[str, ...], chosen: str | None
) -> None:
    monkeypatch.setattr(rendering, "is_headless", lambda: True)
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setenv("PYOPENGL_PLATFORM", pyopengl)
    monkeypatch.setattr(rendering, "egl_works", lambda: "egl" in works)
    monkeypatch.setattr(rendering, "osmesa_loads", lambda: "osmesa" in works)
    if chosen is not None:
        assert rendering.choose_backend() == chosen
        return
    with pytest.raises(rendering.RenderingError, match=f"PYOPENGL_PLATFORM is '{pyopengl}'"):
        rendering.choose_backend()
    assert os.environ["MUJOCO_GL"] == ""  # the next picture chooses again


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="triton's crash is Linux's")
def test_triton_is_loaded_before_a_software_renderer(tmp_path: Path) -> None:
    """A stand-in for triton says whether Mesa's LLVM was there first, and then breaks."""
    mapped = "'LLVM' in open('/proc/self/maps').read()"
    (tmp_path / "triton.py").write_text(f"print('triton', {mapped})\nraise OSError\n")
    program = (
        "import gymnasium, dmc_gym_plugin; gymnasium.make('DMC/walker-walk-v0'); print('made')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "MUJOCO_GL": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["triton", "False", "made"]


RENDER = (
    "import gymnasium, os{early}\n"
    "import dmc_gym_plugin\n"
    "env = gymnasium.make('DMC/walker-walk-v0', render_mode='rgb_array')\n"
    "env.reset(seed=0); drawn = env.render().std() > 20; print(os.environ['MUJOCO_GL'], drawn)\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["", "egl", "osmesa"])
def test_headless_backends_render_and_end_quietly(backend: str) -> None:
    works = {"": True, "egl": rendering.egl_works(), "osmesa": rendering.osmesa_loads()}
    if not works[backend]:
        pytest.skip(f"{backend} is not installed")
    done = run(RENDER.format(early=""), **({"MUJOCO_GL": backend} if backend else {}))
    chosen = backend or ("egl" if rendering.egl_works() else "osmesa")
    assert done.stdout.split() == [chosen, "True"], done.stderr
    assert "Traceback" not in done.stderr  # OSMesa's context is freed in time


@pytest.mark.slow
@pytest.mark.skipif(not rendering.osmesa_loads(), reason="OSMesa is not installed")
def test_osmesa_takes_the_place_of_an_egl_without_driver() -> None:
    if not rendering.is_headless():
        pytest.skip("needs a machine without a display")
    # libEGL finds no vendor's driver: it loads, and has no device.
    done = run(RENDER.format(early=""), __EGL_VENDOR_LIBRARY_DIRS="/nonexistent")
    assert done.stdout.split() == ["osmesa", "True"], done.stderr


DROP = (
    "import faulthandler; faulthandler.dump_traceback_later(60, exit=True)\n"
    "import gc, gymnasium, dmc_gym_plugin\n"
    "for draw in (False, True):\n"
    "    env = gymnasium.make('DMC/walker-walk-v0', observation='pixels')\n"
    "    if draw: env.unwrapped.physics.render(64, 64)\n"
    "    env.reset(seed=0)\n"
    "    env.itself = env\n"
    "    del env; gc.collect()\n"
    "print('done')\n"
)


@pytest.mark.slow
@pytest.mark.skipif(not rendering.osmesa_loads(), reason="OSMesa is not installed")
def test_an_environment_dropped_in_a_cycle_is_collected() -> None:
    done = run(DROP, MUJOCO_GL="osmesa")
    assert done.stdout.split() == ["done"], done.stderr


@pytest.mark.slow
@needs_opengl
def test_dm_control_imported_first_is_corrected() -> None:
    if not rendering.is_headless():
        pytest.skip("needs a machine without a display")
    done = run(RENDER.format(early="; from dm_control import suite"))
    assert done.stdout.split()[1:] == ["True"], done.stderr


HUMAN = (
    "import gymnasium, dmc_gym_plugin, glfw\n"
    "env = gymnasium.make('DMC/cartpole-swingup-v0', render_mode='human')\n"
    "env.reset(seed=0); env.step(env.action_space.sample())\n"
    "window = env.unwrapped._photographer._window.viewer.window\n"
    "print(glfw.get_window_attrib(window, glfw.VISIBLE), *glfw.get_window_size(window))\n"
    "env.close()\n"
)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("Xvfb") is None, reason="Xvfb is not installed")
def test_human_opens_a_window() -> None:
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "800x600x24"],
        pass_fds=[write],
        stderr=subprocess.DEVNULL,
    )
    try:
        number = os.read(read, 16).decode().strip()
        done = run(HUMAN, DISPLAY=f":{number}")
        assert done.stdout.split() == ["1", "320", "240"], done.stderr
    finally:
        server.terminate()
        server.wait()
        os.close(read)
        os.close(write)
