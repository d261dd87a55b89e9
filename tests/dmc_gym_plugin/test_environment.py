"""Behaviour of the environment: seeding, endings, information, vectorisation, bad input."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial

import gymnasium
import numpy as np
import pytest
from dm_control import suite
from dm_control.suite import lqr_solver
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

import dmc_gym_plugin
from dmc_gym_plugin import rendering, tasks
from dmc_gym_plugin.views import VIEWS

needs_opengl = pytest.mark.skipif(
    rendering.choose_backend() == "disable", reason=f"no OpenGL: {rendering.REMEDY}"
)
ALL_IDS = [info.id for info in tasks.TASKS.values() if info.group in ("suite", "extended")]


def check(env_id: str, view: str, pictures: bool) -> None:
    """Run both checkers; only their remarks about infinite bounds may come."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env = gymnasium.make(env_id, observation=view)
        check_env(env.unwrapped, skip_render_check=not pictures)
        env.close()
        env = gymnasium.make(env_id, observation=view)
        check_env_sb3(env)
        env.close()
    messages = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert [text for text in messages if "infinity. This is probably" not in text] == []


@needs_opengl
@pytest.mark.parametrize("view", VIEWS)
def test_checkers(view: str) -> None:
    check("DMC/cartpole-balance-v0", view, pictures=view == "flat")


@pytest.mark.slow
@needs_opengl
@pytest.mark.parametrize("env_id", ALL_IDS)
def test_checkers_on_every_task(env_id: str) -> None:
    for view in VIEWS:
        check(env_id, view, pictures=False)


def test_seeds_reproduce_episodes() -> None:
    env = gymnasium.make("DMC/ball_in_cup-catch-v0")
    first = env.reset(seed=3)[0]
    following = env.reset()[0]
    assert not np.array_equal(first, following)
    np.testing.assert_array_equal(env.reset(seed=3)[0], first)
    np.testing.assert_array_equal(env.reset()[0], following)
    assert not np.array_equal(env.reset(seed=4)[0], first)
    # The episodes that dm_control itself gives for this seed, the second one included.
    theirs = suite.load("ball_in_cup", "catch", task_kwargs={"random": 3})
    for expected in (first, following):
        values = theirs.reset().observation.values()
        np.testing.assert_array_equal(np.concatenate(list(values)).astype(np.float32), expected)


def test_the_limit_truncates_and_stops_a_repeat() -> None:
    env = dmc_gym_plugin.DMControlEnv("pendulum", "swingup", action_repeat=16)
    assert env.max_episode_steps == 63  # 1000 = 62 * 16 + 8
    env.reset(seed=0)
    for step in range(1, 64):
        _, _, terminated, truncated, info = env.step(np.zeros(1, np.float32))
        assert (terminated, truncated) == (False, step == 63)
        assert info["frames"] == (8 if step == 63 else 16)
    assert info["physics_time"] == pytest.approx(20.0)
    with pytest.raises(gymnasium.error.ResetNeeded, match="over"):
        env.step(np.zeros(1, np.float32))


def test_a_limit_lowered_within_an_episode_ends_it() -> None:
    env = dmc_gym_plugin.DMControlEnv("pendulum", "swingup")
    env.reset(seed=0)
    for _ in range(5):
        assert not env.step(np.zeros(1, np.float32))[3]
    env.max_episode_steps = 3
    assert env.step(np.zeros(1, np.float32))[3]


def test_lqr_terminates_when_it_has_converged() -> None:
    env = gymnasium.make("DMC/lqr-lqr_2_1-v0", max_episode_steps=-1)
    env.reset(seed=0)
    base = env.unwrapped
    _, gain, _ = lqr_solver.solve(base.simulation.env)  # the optimal controller u = K x
    steps = 0
    terminated = truncated = False
    largest = 0.0
    while not terminated:
        state = np.concatenate([base.physics.position(), base.physics.velocity()])
        control = gain @ state
        largest = max(largest, float(np.abs(control).max()))
        _, reward, terminated, truncated, _ = env.step((control / 10).astype(np.float32))
        steps += 1
        assert not truncated
        assert steps < 20_000
    assert steps > 1000  # beyond the registered limit, which -1 took away
    assert largest < 10  # the bound that stands for dm_control's 1e10
    assert reward == pytest.approx(1.0)
    assert base.terminates
    assert not walker().unwrapped.terminates


def test_lqr_draws_its_model_from_the_seed() -> None:
    env = gymnasium.make("DMC/lqr-lqr_6_2-v0")
    assert env.unwrapped.max_episode_steps == 1000
    env.reset(seed=1)
    one = env.unwrapped.physics.model.jnt_stiffness.copy()
    env.reset()
    np.testing.assert_array_equal(env.unwrapped.physics.model.jnt_stiffness, one)
    env.reset(seed=2)
    assert not np.array_equal(env.unwrapped.physics.model.jnt_stiffness, one)
    env.reset(seed=1)
    np.testing.assert_array_equal(env.unwrapped.physics.model.jnt_stiffness, one)


def test_info_and_physics() -> None:
    env = gymnasium.make("DMC/cheetah-run-v0", action_repeat=4)
    _, info = env.reset(seed=0)
    assert info == {"physics_time": 0.0}
    _, reward, _, _, info = env.step(env.action_space.sample())
    assert info["physics_time"] == pytest.approx(0.04)
    assert info["frames"] == 4
    assert info["frame_rewards"].shape == (4,)
    assert sum(info["frame_rewards"]) == pytest.approx(reward)
    assert env.unwrapped.physics.speed() == env.unwrapped.physics.named.data.sensordata[0]


def test_task_kwargs_reach_dm_control() -> None:
    env = gymnasium.make("DMC/walker-walk-v0", task_kwargs={"time_limit": 5}, action_repeat=2)
    assert env.unwrapped.max_episode_steps == 100  # 5 s of 0.025 s steps, two at a time
    env = gymnasium.make("DMC/pendulum-spin-v0", task_kwargs={"time_limit": 3})  # an extended task
    assert env.unwrapped.max_episode_steps == 150
    env = gymnasium.make("DMC/cartpole-three_poles-v0", task_kwargs={"num_poles": 2})  # its own
    assert env.observation_space.shape == (8,)
    with pytest.raises(ValueError, match=r"takes no task_kwargs, but got \['time_limit'\]"):
        gymnasium.make("DMC/manipulation-reach_site_features-v0", task_kwargs={"time_limit": 5})


def test_reward_colours_can_be_switched_on() -> None:
    env = gymnasium.make("DMC/cartpole-balance-v0")
    env.reset(seed=0)
    before = env.unwrapped.physics.named.model.mat_rgba["self"].copy()
    env.unwrapped.task.visualize_reward = True
    env.step(np.zeros(1, np.float32))
    assert not np.array_equal(env.unwrapped.physics.named.model.mat_rgba["self"], before)


@pytest.mark.parametrize("kind", [DummyVecEnv, SubprocVecEnv])
def test_sb3_vector_environments(kind: type) -> None:
    env = make_vec_env(
        "DMC/walker-walk-v0", 2, seed=1, vec_env_cls=kind, env_kwargs={"action_repeat": 2}
    )
    assert env.get_attr("max_episode_steps") == [500, 500]
    assert env.get_attr("action_repeat") == [2, 2]
    observations = env.reset()
    alone = gymnasium.make("DMC/walker-walk-v0", action_repeat=2)
    for index in range(2):  # SB3 seeds them with 1 and 2
        np.testing.assert_array_equal(observations[index], alone.reset(seed=1 + index)[0])
    observations, rewards, _, _ = env.step(np.zeros((2, 6), np.float32))
    expected = alone.step(np.zeros(6, np.float32))
    np.testing.assert_array_equal(observations[1], expected[0])
    assert np.float32(rewards[1]) == np.float32(expected[1])
    states = env.env_method("get_state")
    env.step(np.ones((2, 6), np.float32))
    for index, saved in enumerate(states):
        env.env_method("set_state", saved, indices=index)
    assert env.get_attr("episode_step") == [1, 1]
    env.close()


def test_sb3_reports_the_limit_as_truncation() -> None:
    env = make_vec_env("DMC/pendulum-swingup-v0", 1, env_kwargs={"action_repeat": 250})
    env.reset()
    for _ in range(4):
        _, _, dones, infos = env.step(np.zeros((1, 1), np.float32))
    assert dones[0]
    assert infos[0]["TimeLimit.truncated"]
    assert infos[0]["episode"]["l"] == 4


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_gymnasium_vector_environments(mode: str) -> None:
    env = gymnasium.make_vec("DMC/hopper-hop-v0", num_envs=2, vectorization_mode=mode)
    observations, _ = env.reset(seed=9)
    alone = gymnasium.make("DMC/hopper-hop-v0")
    np.testing.assert_array_equal(observations[1], alone.reset(seed=10)[0])
    observations, rewards, _, _, _ = env.step(np.ones((2, 4), np.float32))
    expected = alone.step(np.ones(4, np.float32))
    np.testing.assert_array_equal(observations[1], expected[0])
    assert rewards[1] == expected[1]
    env.close()


def test_actions_are_clipped_and_nan_is_refused() -> None:
    first = gymnasium.make("DMC/reacher-easy-v0")
    second = gymnasium.make("DMC/reacher-easy-v0")
    first.reset(seed=0)
    second.reset(seed=0)
    beyond = first.step(np.array([3.0, -1.5]))
    at = second.step(np.array([1.0, -1.0], np.float32))
    np.testing.assert_array_equal(beyond[0], at[0])
    for bad in (np.array([np.nan, 0.0]), np.array([np.inf, 0.0])):
        with pytest.raises(RuntimeError, match="not finite"):
            first.step(bad)
    with pytest.raises(ValueError, match=r"shape \(3,\).*\(2,\)"):
        first.step(np.zeros(3))
    for nothing in ("left", {"x": 1}, [[1.0], [1.0, 2.0]]):
        with pytest.raises(ValueError, match=r"^The action is .*; give 2 numbers\.$"):
            first.step(nothing)


def walker(**kwargs: object) -> gymnasium.Env:
    return gymnasium.make("DMC/walker-walk-v0", **kwargs)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (partial(walker, observation="pixel"), ValueError, "observation is 'pixel'; choose"),
        (partial(walker, observaton="flat"), ValueError, r"'observaton'; did you mean 'obs\w+'\?$"),
        (partial(walker, foo=2), ValueError, "'foo'; choose of observation, action_repeat, max"),
        (partial(walker, frame_skip=2), ValueError, "'frame_skip'; did you mean 'action_repeat'"),
        (partial(walker, camera_id="front"), ValueError, r"no camera 'front'.*'side', 'back'"),
        (partial(walker, camera_id=2), ValueError, r"no camera 2.*0 to 1"),
        (partial(walker, camera_id=0.5), ValueError, r"no camera 0\.5"),
        (partial(walker, camera_id=[0]), ValueError, r"no camera \[0\]"),
        (partial(walker, render_mode="rgb"), ValueError, "render_mode is 'rgb'; choose one of"),
        (partial(walker, height=-3), ValueError, "height is -3; give a whole number"),
        (partial(walker, task_kwargs="x"), ValueError, "task_kwargs is 'x'; give a dictionary"),
        (partial(walker, task_kwargs={"x": 1}), ValueError, "holds 'x', which walker-walk does"),
        (
            partial(walker, task_kwargs={"time_limit": 0}),
            ValueError,
            "time_limit is 0; give seconds above 0",
        ),
        (partial(walker, action_repeat=0), ValueError, "action_repeat is 0; give a whole number"),
        (partial(walker, action_repeat=1.5), ValueError, "action_repeat is 1.5"),
        (partial(walker, frame_stack=0), ValueError, "frame_stack is 0"),
        (partial(walker, channels="middle"), ValueError, "channels is 'middle'"),
        (partial(walker, max_episode_steps=0), ValueError, "positive|max_episode_steps is 0"),
    ],
)
def test_bad_settings(make: Callable, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_stepping_too_early_and_too_late() -> None:
    env = walker()
    with pytest.raises(gymnasium.error.ResetNeeded, match="stepped before reset"):
        env.step(np.zeros(6, np.float32))
    env.reset()
    env.close()
    env.close()  # twice is harmless
    base = env.unwrapped
    for use in (
        partial(env.step, np.zeros(6, np.float32)),
        env.reset,
        env.render,
        base.get_state,
        partial(base.set_state, {}),
        partial(getattr, base, "physics"),
        partial(getattr, base, "task"),
        copy.deepcopy(env).reset,  # the copy of a closed environment is closed
    ):
        with pytest.raises(RuntimeError, match="walker-walk-v0 is closed; make a new environment"):
            use()
    assert (base.terminates, base.max_episode_steps) == (False, 1000)  # known still


def test_making_an_environment_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="absl"):
        suite.load("cheetah", "run")
        assert "deprecated" in caplog.text  # dm_control's own model warns
        caplog.clear()
        gymnasium.make("DMC/cheetah-run-v0").reset()
    assert caplog.text == ""


def test_mujoco_4_is_refused() -> None:
    from dmc_gym_plugin.simulation import check_mujoco

    check_mujoco("3.17.0")
    with pytest.raises(ImportError, match=r"mujoco 4\.0\.0 is installed.*pip install 'mujoco<4'"):
        check_mujoco("4.0.0")
