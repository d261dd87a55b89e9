"""get_state() and set_state(): bit-exact continuation, in a fresh instance too, on every task."""

from __future__ import annotations

import copy
import pickle
import warnings
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
        *(
            (f"simulation/random/{part}", np.zeros((3, 1)), rf"\('its {word} is array\(\[\[0\.\], ")
            for part, word in (
                ("gauss", "gauss"),
                ("has_gauss", "has_gauss"),
                ("state/pos", "position"),
            )
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


def model_fields(env: Any) -> dict[str, np.ndarray]:
    """Every array of the model."""
    model = env.physics.model.ptr
    names = [name for name in dir(model) if not name.startswith("_")]
    values = {name: getattr(model, name) for name in names}
    return {k: v.copy() for k, v in values.items() if isinstance(v, np.ndarray) and v.size}


def test_of_the_model_only_what_tasks_edit_is_taken() -> None:
    env = dmc_gym_plugin.DMControlEnv("quadruped", "escape")
    env.reset(seed=0)
    saved = env.get_state()
    fields = model_fields(env)
    assert {"jnt_dofadr", "body_parentid", "actuator_trnid", "body_mass"} <= set(fields)
    refused = 0
    for name, value in fields.items():
        if name in exact.EDITED_FIELDS:
            assert value.dtype.kind == "f"
            continue
        with pytest.raises(ValueError, match=rf"model holds the unknown \['{name}'\]"):
            env.set_state(change(saved, f"simulation/model/{name}", value))
        refused += 1
    assert refused > 200
    for name, after in model_fields(env).items():
        np.testing.assert_array_equal(after, fields[name], name)
    env.set_state(saved)


@pytest.mark.parametrize(("domain", "task"), TASKS)
def test_every_field_that_a_task_edits_is_known(domain: str, task: str) -> None:
    env = dmc_gym_plugin.DMControlEnv(domain, task)
    compiled = model_fields(env)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(2):
            env.reset(seed=seed)
            env.step(env.action_space.sample())
            env.get_state()
    for name, value in model_fields(env).items():
        if not np.array_equal(value, compiled[name]):
            assert name in exact.EDITED_FIELDS


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model/body_pos", np.full((17, 3), np.nan), "body_pos holds numbers that are not finite"),
        ("model/geom_size", "like:int64", "geom_size is of int64 and no array of float64"),
        ("data/integration", "like:nan", "integration holds numbers that are not finite"),
        ("data/integration", "like:1e12", r"holds 1e\+12, beyond which \(1e\+10\) MuJoCo"),
        ("data/sensordata", "like:int64", "sensordata is of int64 and no array of float64"),
        ("data/qacc", "like:inf", "qacc holds numbers that are not finite"),
        ("task/_n_boxes", 10**9, "_n_boxes = 1000000000, but this one has 2; use a state"),
        ("task/_visualize_reward", "yes", "_visualize_reward = 'yes', but this one has False"),
        ("task/_fully_observable", np.ones(4), "_fully_observable = array"),
        ("random/state/pos", 10**6, "random state is .*its position is 1000000"),
        ("random/state/pos", -1, "random state is .*its position is -1"),
        ("random/state/key", np.zeros(624, np.uint32), "random state is .*its key is no table"),
        ("random/gauss", np.nan, "random state is .*its gauss is nan"),
    ],
)
def test_numbers_that_no_simulation_has_are_refused(path: str, value: Any, message: str) -> None:
    env = dmc_gym_plugin.DMControlEnv("stacker", "stack_2")
    env.reset(seed=0)
    env.step(np.ones(env.action_space.shape, np.float32))
    saved = env.get_state()
    fields = copy_fields(env)
    if isinstance(value, str) and value.startswith("like:"):
        kind = value.removeprefix("like:")
        place, name = path.split("/")
        mine = saved["simulation"][place].get(name, model_fields(env).get(name))
        value = np.full(mine.shape, 1) if kind == "int64" else np.full(mine.shape, float(kind))
    if path == "model/body_pos":
        value = np.full_like(saved["simulation"]["model"]["body_pos"], np.nan)
    with pytest.raises(ValueError, match=message) as caught:
        env.set_state(change(saved, f"simulation/{path}", value))
    assert "\n" not in str(caught.value)
    assert_same_fields(env, fields)


def test_a_tendons_indices_stay_while_its_gains_may_change() -> None:
    env = dmc_gym_plugin.DMControlEnv("point_mass", "hard")
    env.reset(seed=0)
    saved = env.get_state()
    gains = saved["simulation"]["model"]["wrap_prm"]
    env.set_state(change(saved, "simulation/model/wrap_prm", gains * 0.5))
    np.testing.assert_array_equal(env.physics.model.wrap_prm, gains * 0.5)
    # A wrapping sphere's parameter is the number of a site, as a float.
    edits = exact.ModelEdits(env.physics.model.ptr)
    edits._compiled["wrap_type"] = np.full(len(gains), 4, np.int32)
    with pytest.raises(ValueError, match="wrap_prm differs beyond the coefficients of joints"):
        edits.check({"wrap_prm": gains})


def test_an_edit_that_no_task_makes_is_said() -> None:
    env = dmc_gym_plugin.DMControlEnv("walker", "walk")
    env.reset(seed=0)
    env.physics.model.body_mass[1] *= 2
    with pytest.warns(UserWarning, match="body_mass differ from the compiled ones"):
        saved = env.get_state()
    assert "body_mass" not in saved["simulation"]["model"]
