"""Manipulation and locomotion tasks."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from plain_states import assert_plain
from stable_baselines3.common.env_checker import check_env as check_env_sb3

import dmc_gym_plugin
from dmc_gym_plugin import rendering, tasks

#: Tasks whose scenes are drawn outside the task's random state.
FORAGING_AND_TOUCH = [name for name in tasks.LOCOMOTION if name.endswith(("forage", "two_touch"))]
FEATURES = [name for name in tasks.MANIPULATION if name.endswith("_features")]
needs_opengl = pytest.mark.skipif(
    rendering.choose_backend() == "disable", reason=f"no OpenGL: {rendering.REMEDY}"
)


def compare_with_dm_control(name: str, steps: int) -> None:
    """Play one episode beside dm_control's own environment."""
    from dm_control import manipulation

    theirs = manipulation.load(name, seed=2)
    env = gymnasium.make(f"DMC/manipulation-{name}-v0")
    spec = theirs.action_spec()
    first, (observation, _) = theirs.reset(), env.reset(seed=2)
    random = np.random.RandomState(0)
    for step in range(steps):
        flat = np.concatenate([np.ravel(value) for value in first.observation.values()])
        np.testing.assert_array_equal(observation, flat.astype(np.float32), f"step {step}")
        action = random.uniform(-1, 1, spec.shape).astype(np.float32)
        wide = action.astype(np.float64)
        control = spec.minimum * ((1 - wide) / 2) + spec.maximum * ((1 + wide) / 2)
        control = np.where((spec.minimum == -1) & (spec.maximum == 1), wide, control)
        first = theirs.step(control)
        observation, reward, terminated, truncated, _ = env.step(action)
        assert reward == first.reward
        assert (terminated, truncated) == (False, first.last())
    if steps == 250:
        assert truncated
    env.close()


def play(env: Any, seed: int, steps: int) -> list[Any]:
    random = np.random.RandomState(seed)
    seen = []
    for _ in range(steps):
        action = random.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        seen.append((observation.tobytes(), reward, terminated, truncated))
        if terminated or truncated:
            seen.append(env.reset()[0].tobytes())
    return [*seen, env.reset()[0].tobytes()]


def check_state(domain: str, name: str) -> None:
    """Restore a second episode's middle in a fresh instance, and go on into the third."""
    env = dmc_gym_plugin.DMControlEnv(domain, name)
    env.reset(seed=1)
    play(env, seed=0, steps=2)
    play(env, seed=1, steps=0)
    play_on = np.full(env.action_space.shape, 0.2, np.float32)
    for _ in range(4):
        env.step(play_on)
    saved = env.get_state()
    assert_plain(saved)
    expected = play(env, seed=2, steps=4)
    fresh = dmc_gym_plugin.DMControlEnv(domain, name)
    fresh.set_state(saved)
    assert play(fresh, seed=2, steps=4) == expected


def test_table_is_the_installed_manipulation() -> None:
    from dm_control import manipulation

    assert set(tasks.MANIPULATION) == set(manipulation.ALL)


def test_composer_leaves_the_warning_filters_alone() -> None:
    code = (
        "import gymnasium, dmc_gym_plugin, mujoco, dm_control.mujoco, warnings\n"
        "before = list(warnings.filters)\n"
        "gymnasium.make('DMC/manipulation-reach_site_features-v0').reset()\n"
        "new = [entry for entry in warnings.filters if entry not in before]\n"
        "print([entry for entry in new if issubclass(DeprecationWarning, entry[2])])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reach_site_equals_dm_control() -> None:
    compare_with_dm_control("reach_site_features", 250)


def test_reach_site_state() -> None:
    check_state("manipulation", "reach_site_features")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (
            "controls",
            np.zeros((2, 3)),
            r"controls have shape \(2, 3\), but this task takes \[steps, 9",
        ),
        (
            "order",
            [1, 0],
            r"order is \[1, 0\], but this task has 0 kinds of targets; use a state of",
        ),
        ("start", {"task": 1}, r"^The state's start lacks \['numpy'\]; give what get_state"),
        ("random", 5, r"^The state's random is 5; give what get_state"),
        ("task", 2, r"^The state's task is 2; give what get_state"),
        ("wings", 2, r"^The state's simulation holds the unknown \['wings'\]; give"),
    ],
)
def test_a_damaged_state_is_refused(part: str, value: Any, message: str) -> None:
    env = dmc_gym_plugin.DMControlEnv("manipulation", "reach_site_features")
    env.reset(seed=1)
    saved = env.get_state()
    with pytest.raises(ValueError, match=message):
        env.set_state({**saved, "simulation": {**saved["simulation"], part: value}})
    env.set_state(saved)
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURES)
def test_equals_dm_control(name: str) -> None:
    compare_with_dm_control(name, 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", tasks.MANIPULATION)
def test_state(name: str) -> None:
    check_state("manipulation", name)


@pytest.mark.slow
@pytest.mark.skipif(not tasks.has_labmaze(), reason="labmaze is not installed")
def test_a_fall_terminates_and_the_environment_says_that_it_may() -> None:
    env = dmc_gym_plugin.DMControlEnv("locomotion", "cmu_humanoid_run_walls")
    assert env.terminates
    env.reset(seed=0)
    terminated = False
    for _ in range(60):  # without a controller it falls in half a second
        _, _, terminated, truncated, _ = env.step(np.zeros(56, np.float32))
        assert not truncated
        if terminated:
            break
    assert terminated
    env.close()
    assert not dmc_gym_plugin.DMControlEnv("manipulation", "reach_site_features").terminates


@needs_opengl
def test_vision_task_shows_its_own_camera() -> None:
    env = gymnasium.make("DMC/manipulation-reach_site_vision-v0", observation="dict")
    observation, _ = env.reset(seed=0)
    assert env.observation_space["front_close"].shape == (3, 84, 84)
    assert observation["front_close"].dtype == np.uint8
    assert env.observation_space.contains(observation)
    picture = env.unwrapped.physics.render(84, 84, camera_id="front_close")
    np.testing.assert_array_equal(observation["front_close"], picture.transpose(2, 0, 1))
    env.close()
    # The flat view has no place for pictures, and makes none.
    flat = gymnasium.make("DMC/manipulation-reach_site_vision-v0")
    assert flat.observation_space.shape == (42,)
    flat.close()


def check(env_id: str, view: str) -> None:
    """Run both checkers; only their remarks about infinite bounds may come."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = gymnasium.make(env_id, observation=view)
        check_env(env.unwrapped, skip_render_check=True)
        env.close()
        env = gymnasium.make(env_id, observation=view)
        check_env_sb3(env)
        env.close()
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert [text for text in messages if "infinity. This is probably" not in text] == []


@pytest.mark.parametrize("view", ["flat", "dict"])
def test_checkers(view: str) -> None:
    check("DMC/manipulation-reach_site_features-v0", view)


@pytest.mark.slow
@pytest.mark.parametrize("name", tasks.MANIPULATION)
def test_checkers_on_every_task(name: str) -> None:
    check(f"DMC/manipulation-{name}-v0", "flat")
    if name in FEATURES or rendering.choose_backend() != "disable":
        check(f"DMC/manipulation-{name}-v0", "dict")


# A software renderer takes seconds for the pictures of a task: three scenes stand for the others.
@needs_opengl
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["lift_large_box_features", "place_cradle_features", "reach_duplo_vision"]
)
@pytest.mark.parametrize("view", ["pixels", "state+pixels"])
def test_checkers_on_pixels(name: str, view: str) -> None:
    check(f"DMC/manipulation-{name}-v0", view)


def test_locomotion_needs_labmaze(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "has_labmaze", lambda: False)
    with pytest.raises(ValueError, match="needs labmaze, which is not installed"):
        dmc_gym_plugin.DMControlEnv("locomotion", "cmu_humanoid_go_to_target")


@pytest.mark.slow
@pytest.mark.skipif(not tasks.has_labmaze(), reason="labmaze is not installed")
@pytest.mark.parametrize("name", tasks.LOCOMOTION)
def test_checkers_on_locomotion(name: str) -> None:
    check(f"DMC/locomotion-{name}-v0", "flat")
    if rendering.choose_backend() != "disable":  # their dictionaries hold the walker's view
        check(f"DMC/locomotion-{name}-v0", "dict")


@pytest.mark.slow
@pytest.mark.skipif(not tasks.has_labmaze(), reason="labmaze is not installed")
@pytest.mark.parametrize("name", tasks.LOCOMOTION)
def test_locomotion(name: str) -> None:
    env = gymnasium.make(f"DMC/locomotion-{name}-v0")
    assert env.unwrapped.max_episode_steps == tasks.LOCOMOTION[name]
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert env.step(env.action_space.sample())[0].shape == observation.shape
    check_state("locomotion", name)
    env.close()


@contextlib.contextmanager
def numpy_seed(seed: int) -> Iterator[None]:
    """Seed numpy's global stream for a while."""
    outside = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(outside)  # noqa: NPY002


def scene(env: dmc_gym_plugin.DMControlEnv) -> dict[str, np.ndarray]:
    """Return copies of every array of the model (walls, targets, textures ...), and the pose."""
    model = env.physics.model.ptr
    values = {name: getattr(model, name) for name in dir(model) if not name.startswith("_")}
    found = {name: value.copy() for name, value in values.items() if isinstance(value, np.ndarray)}
    return {**found, "qpos": env.physics.data.qpos.copy()}


@pytest.mark.slow
@pytest.mark.skipif(not tasks.has_labmaze(), reason="labmaze is not installed")
@pytest.mark.parametrize("name", FORAGING_AND_TOUCH)
def test_a_seed_fixes_scenes_and_a_state_restores_them(name: str) -> None:
    env = dmc_gym_plugin.DMControlEnv("locomotion", name)
    outside = np.random.get_state()[1].copy()  # noqa: NPY002
    env.reset(seed=3)
    first = scene(env)
    env.reset()
    second = scene(env)
    env.step(np.zeros(env.action_space.shape, np.float32))
    saved = env.get_state()
    stepped = scene(env)
    env.reset()
    third = scene(env)
    np.testing.assert_array_equal(np.random.get_state()[1], outside)  # noqa: NPY002
    for one, other in ((first, second), (second, third), (first, third)):
        assert not all(
            one[part].shape == other[part].shape and (one[part] == other[part]).all()
            for part in ("body_pos", "geom_pos", "qpos")
        )
    env.close()
    fresh = dmc_gym_plugin.DMControlEnv("locomotion", name)
    fresh.reset(seed=8)
    fresh.set_state(saved)
    np.testing.assert_equal(scene(fresh), stepped)
    fresh.reset()
    np.testing.assert_equal(scene(fresh), third)
    fresh.reset(seed=3)
    np.testing.assert_equal(scene(fresh), first)
    fresh.close()


@pytest.mark.slow
@pytest.mark.skipif(not tasks.has_labmaze(), reason="labmaze is not installed")
@pytest.mark.parametrize("name", ["cmu_humanoid_heterogeneous_forage", "rodent_two_touch"])
def test_a_seed_is_dm_controls_and_numpys(name: str) -> None:
    from dm_control.locomotion.examples import basic_cmu_2019, basic_rodent_2020

    builders = {**vars(basic_cmu_2019), **vars(basic_rodent_2020)}
    theirs = builders[name](random_state=4)
    theirs.task._walker.observables.egocentric_camera.enabled = False
    env = dmc_gym_plugin.DMControlEnv("locomotion", name)
    observation, _ = env.reset(seed=4)
    still = np.zeros(env.action_space.shape)
    with numpy_seed(4):
        expected = theirs.reset()
        for step in range(3):
            flat = np.concatenate([np.ravel(value) for value in expected.observation.values()])
            np.testing.assert_array_equal(observation, flat.astype(np.float32))
            np.testing.assert_array_equal(env.physics.data.xpos, theirs.physics.data.xpos)
            np.testing.assert_array_equal(env.physics.model.geom_pos, theirs.physics.model.geom_pos)
            for task in (env.task, theirs.task):
                task._must_randomize_targets = step == 1  # as after two touches
            observation, reward, *_ = env.step(still)
            expected = theirs.step(still)
            assert reward == expected.reward
    env.close()


@pytest.mark.slow
@pytest.mark.skipif(not tasks.has_labmaze(), reason="labmaze is not installed")
def test_a_seeded_maze_is_drawn_as_labmaze_draws_it() -> None:
    from dm_control.locomotion.examples import basic_cmu_2019

    from dmc_gym_plugin.composer_simulation import SeededMaze

    with numpy_seed(5):
        theirs = basic_cmu_2019.cmu_humanoid_maze_forage().task.root_entity.maze
    ours = SeededMaze(theirs)
    with numpy_seed(5):
        ours.regenerate()
    for layer in ("entity_layer", "variations_layer"):
        assert str(getattr(ours, layer)) == str(getattr(theirs, layer))
        assert str(getattr(ours, layer)).count("\n") == 11
    before = str(ours.entity_layer)
    ours.regenerate()
    assert str(ours.entity_layer) != before


@pytest.mark.slow
@pytest.mark.skipif(not tasks.has_labmaze(), reason="labmaze is not installed")
def test_a_new_target_within_the_episode_is_in_the_state() -> None:
    envs = [dmc_gym_plugin.DMControlEnv("locomotion", "rodent_two_touch") for _ in range(2)]
    still = np.zeros(envs[0].action_space.shape)
    envs[0].reset(seed=6)
    envs[0].step(still)
    envs[1].set_state(envs[0].get_state())
    targets = []
    for env in envs:
        before = env.task._target_positions.copy()
        env.task._must_randomize_targets = True  # as after two touches
        env.step(still)
        targets.append(env.task._target_positions.copy())
        assert not np.array_equal(targets[-1], before)
    np.testing.assert_array_equal(targets[0], targets[1])
