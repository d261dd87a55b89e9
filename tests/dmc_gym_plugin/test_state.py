"""get_state() and set_state(): bit-exact continuation, in a fresh instance too, on every task."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import gymnasium
import numpy as np
import pytest
from dm_control import suite
from plain_states import assert_plain

import dmc_gym_plugin
from dmc_gym_plugin import state as exact
from dmc_gym_plugin import tasks

SLOW_DOMAINS = ("dog",)  # their models take seconds to compile
EXTENDED = [(domain, task) for domain, names in tasks.EXTENDED.items() for task in names]
TASKS = [
    pytest.param(*pair, marks=pytest.mark.slow if pair[0] in SLOW_DOMAINS else ())
    for pair in [*suite.ALL_TASKS, *EXTENDED]
]

#: Parts of mjData outside the state: workspace, statistics and the constraint solver's arrays,
#: which the next step writes before it reads them.
UNTRACKED = {"solver_niter", "solver_nnz", "qH", "qHDiagInv"}


def arrays(struct: Any) -> dict[str, np.ndarray]:
    """Return every array of a MuJoCo struct."""
    names = (name for name in dir(struct) if not name.startswith("_"))
    values = ((name, getattr(struct, name)) for name in names)
    return {name: value for name, value in values if isinstance(value, np.ndarray)}


def play(env: gymnasium.Env, seed: int, steps: int) -> list[Any]:
    """Take random actions; reset where an episode ends. Return all that came out."""
    random = np.random.RandomState(seed)
    seen = []
    for _ in range(steps):
        action = random.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        seen.append((observation.tobytes(), reward, terminated, truncated, info["physics_time"]))
        if terminated or truncated:
            seen.append(env.reset()[0].tobytes())
    return seen


def copy_fields(env: Any) -> dict[str, np.ndarray]:
    """Return copies of every array of the model and of the tracked ones of the data."""
    found = {f"model.{k}": v.copy() for k, v in arrays(env.physics.model.ptr).items()}
    for name, value in arrays(env.physics.data.ptr).items():
        if name not in UNTRACKED and not name.startswith(("efc_", "iefc_", "iacc", "ifrc_")):
            found[f"data.{name}"] = value.copy()
    return found


def assert_same_fields(env: Any, expected: dict[str, np.ndarray]) -> None:
    """Check the arrays of a simulator against copies of another's."""
    actual = copy_fields(env)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(value, actual[name], name)


@pytest.mark.parametrize(("domain", "task"), TASKS)
def test_a_fresh_instance_continues_exactly(domain: str, task: str) -> None:
    # The limit makes the episode end and the next one start from the restored random state.
    env = gymnasium.make(f"DMC/{domain}-{task}-v0", max_episode_steps=40)
    env.reset(seed=5)
    play(env, seed=1, steps=25)
    saved = env.unwrapped.get_state()
    assert_plain(saved)
    fields = copy_fields(env.unwrapped)
    kept = copy.deepcopy(saved)
    expected = play(env, seed=2, steps=30)

    fresh = dmc_gym_plugin.DMControlEnv(domain, task)
    fresh.set_state(saved)
    assert fresh.episode_step == 25
    assert_same_fields(fresh, fields)
    assert play(fresh, seed=2, steps=30) == expected

    # Backwards in the same instance, with the state untouched by what came after it.
    env.unwrapped.set_state(kept)
    assert play(env, seed=2, steps=30) == expected


def test_the_state_after_reset_is_exact() -> None:
    env = dmc_gym_plugin.DMControlEnv("walker", "walk", action_repeat=2)
    env.reset(seed=0)
    saved = env.get_state()
    expected = play(env, seed=0, steps=5)
    fresh = dmc_gym_plugin.DMControlEnv("walker", "walk", action_repeat=2)
    fresh.set_state(saved)
    assert play(fresh, seed=0, steps=5) == expected


def test_a_never_reset_environment_stays_so() -> None:
    env = dmc_gym_plugin.DMControlEnv("cartpole", "balance")
    fresh = dmc_gym_plugin.DMControlEnv("cartpole", "balance")
    fresh.reset()
    fresh.set_state(env.get_state())
    with pytest.raises(gymnasium.error.ResetNeeded, match="before reset"):
        fresh.step(fresh.action_space.sample())


def test_edits_of_an_earlier_episode_are_undone() -> None:
    env = dmc_gym_plugin.DMControlEnv("point_mass", "hard")  # random gains every episode
    compiled = env.physics.model.wrap_prm.copy()
    env.reset(seed=0)
    saved = env.get_state()
    first = env.physics.model.wrap_prm.copy()
    env.reset()
    assert not np.array_equal(env.physics.model.wrap_prm, first)
    env.set_state(saved)
    np.testing.assert_array_equal(env.physics.model.wrap_prm, first)
    assert not np.array_equal(first, compiled)


def test_a_state_of_another_task_is_refused() -> None:
    walker = dmc_gym_plugin.DMControlEnv("walker", "walk")
    runner = dmc_gym_plugin.DMControlEnv("walker", "run")
    with pytest.raises(ValueError, match=r"walker-walk-v0.*this environment is DMC/walker-run-v0"):
        runner.set_state(walker.get_state())


def change(state: dict[str, Any], path: str, value: Any = None) -> dict[str, Any]:
    """Return a copy of a state with one part (``a/b/c``) replaced, or taken out with None."""
    changed = copy.deepcopy(state)
    *way, last = path.split("/")
    part = changed
    for name in way:
        part = part[name]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("view", None, r"^The state lacks \['view'\]; give what get_state\(\) returned\.$"),
        ("extra", 1, r"^The state holds the unknown \['extra'\]; give"),
        ("simulation", [1], r"^The state's simulation is \[1\]; give"),
        ("simulation/task", None, r"^The state's simulation lacks \['task'\]; give"),
        ("simulation/data/qacc", None, r"^The state's data lacks \['qacc'\]; give"),
        ("simulation/data/qacc", np.zeros(5), "qacc has 5 numbers, but this task has 9; use a st"),
        ("simulation/data/integration", np.zeros(3), "integration has 3 numbers, but this task"),
        ("simulation/model/wings", np.zeros(3), r"^The state's model holds the unknown \['wings"),
        ("simulation/model/geom_pos", np.zeros(3), r"geom_pos has shape \(3,\), but this task has"),
        ("simulation/task/_move_speed", None, r"^The state's task lacks \['_move_speed'\]; give"),
        ("simulation/task/x", 1, r"^The state's task holds the unknown \['x'\]; give"),
        (
            "simulation/random",
            7,
            r"^The state's random state is 7, which numpy refuses \(.*\); give",
        ),
        ("view", 5, r"^The state's view is 5; give"),
        ("steps", "many", r"^The state's steps is 'many'; give"),
        ("max_frames", -1, r"^The state's max_frames is -1; give"),
    ],
)
def test_a_damaged_state_is_refused_and_leaves_the_simulation(
    path: str, value: Any, message: str
) -> None:
    env = dmc_gym_plugin.DMControlEnv("walker", "walk")
    env.reset(seed=0)
    saved = env.get_state()
    env.step(np.ones(6, np.float32))
    fields = copy_fields(env)
    with pytest.raises(ValueError, match=message) as caught:
        env.set_state(change(saved, path, value))
    assert "\n" not in str(caught.value)
    assert_same_fields(env, fields)
    env.set_state(saved)
    assert env.episode_step == 0


@pytest.mark.parametrize("nothing", [None, 3, "state", [1, 2], np.zeros(2)])
def test_what_is_no_state_is_refused(nothing: Any) -> None:
    env = dmc_gym_plugin.DMControlEnv("pendulum", "swingup")
    with pytest.raises(ValueError, match=r"^The state is .*; give what get_state\(\) returned\.$"):
        env.set_state(nothing)
    with pytest.raises(
        ValueError, match=r"^The state lacks \['id', 'simulation', 'view', 'steps', "
    ):
        env.set_state({})


def test_a_state_of_another_model_of_the_task_is_refused() -> None:
    three = gymnasium.make("DMC/cartpole-three_poles-v0").unwrapped
    two = gymnasium.make("DMC/cartpole-three_poles-v0", task_kwargs={"num_poles": 2}).unwrapped
    with pytest.raises(ValueError, match=r"has \d+ numbers, but this task has \d+; use a state of"):
        two.set_state(three.get_state())


def test_deepcopy_and_pickle_continue_exactly() -> None:
    env = gymnasium.make("DMC/finger-turn_hard-v0", action_repeat=2, max_episode_steps=30)
    env.reset(seed=8)
    play(env, seed=0, steps=12)
    copies = [copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
    expected = play(env, seed=1, steps=40)
    for other in copies:
        assert other.spec == env.spec
        assert other.get_wrapper_attr("max_episode_steps") == 30
        assert play(other, seed=1, steps=40) == expected


def test_random_state_round_trip_and_long_seeds() -> None:
    random = np.random.RandomState(4)
    random.randn(3)  # leaves a stored Gaussian behind
    other = np.random.RandomState()
    other.set_state(exact.copy_random_state(random))
    np.testing.assert_array_equal(other.randn(5), random.randn(5))
    # dm_control's own generator for seeds that it can take, a fixed one for longer seeds.
    assert exact.random_state_from_seed(7).randint(1 << 30) == np.random.RandomState(7).randint(
        1 << 30
    )
    long = [exact.random_state_from_seed(2**32 + k).randint(1 << 30) for k in (0, 0, 1)]
    assert long[0] == long[1] != long[2]
