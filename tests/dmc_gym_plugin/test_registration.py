"""Registration: cheap, complete, and with the time limit inside the environment."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium
import pytest
from dm_control import suite
from gymnasium.envs.registration import EnvSpec

import dmc_gym_plugin
from dmc_gym_plugin import registration, tasks


def test_importing_registers_without_importing_mujoco() -> None:
    code = (
        "import sys, dmc_gym_plugin, gymnasium;"
        "assert 'DMC/walker-walk-v0' in gymnasium.registry;"
        "print([m for m in ('mujoco', 'dm_control', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_table_is_the_installed_suite() -> None:
    ours = {(info.domain, info.task) for info in tasks.TASKS.values() if info.group == "suite"}
    assert ours == set(suite.ALL_TASKS)
    assert len(ours) == 51


def test_every_id_is_registered() -> None:
    assert tasks.env_id("ball_in_cup", "catch") == "DMC/ball_in_cup-catch-v0"
    for domain, task in suite.ALL_TASKS:
        assert gymnasium.spec(f"DMC/{domain}-{task}-v0").max_episode_steps == 1000


@pytest.mark.parametrize(("labmaze", "count"), [(True, 96), (False, 87)])
def test_locomotion_is_registered_only_with_labmaze(
    monkeypatch: pytest.MonkeyPatch, labmaze: bool, count: int
) -> None:
    registered: list[tasks.TaskInfo] = []
    monkeypatch.setattr(registration, "has_labmaze", lambda: labmaze)
    monkeypatch.setattr(registration, "register_task", registered.append)
    registration.register_all()
    assert len(registered) == count  # 51 suite, 11 extended, 25 manipulation and 9 locomotion tasks
    assert any(info.group == "locomotion" for info in registered) == labmaze


@pytest.mark.parametrize(
    ("kwargs", "limit"),
    [
        ({}, 1000),
        ({"action_repeat": 2}, 500),
        ({"action_repeat": 3}, 334),
        ({"max_episode_steps": 7}, 7),
        ({"action_repeat": 2, "max_episode_steps": 1000}, 1000),
        ({"max_episode_steps": -1}, None),
    ],
)
def test_limit_counts_agent_steps(kwargs: dict, limit: int | None) -> None:
    env = gymnasium.make("DMC/cartpole-balance-v0", **kwargs)
    again = gymnasium.make(env.spec)
    for made in (env, again):
        assert made.get_wrapper_attr("max_episode_steps") == limit
        assert made.spec.max_episode_steps == limit
        if limit is None:
            continue
        made.reset(seed=0)
        for step in range(1, limit + 1):
            _, _, terminated, truncated, info = made.step(made.action_space.sample())
            assert not terminated
            assert truncated == (step == limit)
    if kwargs == {"action_repeat": 3}:  # 1000 = 333 * 3 + 1: the last repeat stops at the limit
        assert info["frames"] == 1


def limit_of(spec: str | EnvSpec, **kwargs: Any) -> int | None:
    env = gymnasium.make(spec, **kwargs)
    limit = env.get_wrapper_attr("max_episode_steps")
    assert env.spec.max_episode_steps == limit
    return limit


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(
    ("first", "second", "limit"),
    [
        (None, {"action_repeat": 4}, 250),
        (None, {"action_repeat": 4, "max_episode_steps": 600}, 600),
        (None, {"max_episode_steps": -1}, None),
        ({"action_repeat": 2}, {}, 500),
        ({"action_repeat": 2}, {"action_repeat": 4}, 250),
        ({"action_repeat": 2, "max_episode_steps": 1000}, {}, 1000),
        ({"max_episode_steps": 300}, {"action_repeat": 4}, 300),
        ({"max_episode_steps": -1}, {"action_repeat": 4}, None),
    ],
)
def test_limit_of_a_spec_made_again(
    first: dict | None, second: dict, limit: int | None, as_json: bool
) -> None:
    name = "DMC/cartpole-balance-v0"
    spec = gymnasium.spec(name) if first is None else gymnasium.make(name, **first).spec
    for _ in range(2):  # also of the spec of what was made from a spec
        if as_json:
            spec = EnvSpec.from_json(spec.to_json())
        assert limit_of(spec, **second) == limit
        spec = gymnasium.make(spec, **second).spec


def test_limit_of_vector_environments() -> None:
    for mode in ("sync", "async"):
        envs = gymnasium.make_vec(
            "DMC/cartpole-balance-v0", 2, vectorization_mode=mode, action_repeat=4
        )
        assert envs.get_attr("max_episode_steps") == (250, 250)
        envs.close()


@pytest.mark.parametrize("name", ["DMC/walker-wlak-v0", "DMC/wlaker-walk-v0"])
def test_unknown_id_names_the_nearest(name: str) -> None:
    with pytest.raises(gymnasium.error.NameNotFound, match="walker-walk"):
        gymnasium.make(name)


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"walker-wlak; did you mean walker-walk\?"):
        dmc_gym_plugin.DMControlEnv("walker", "wlak")
