"""Closing an environment gives its simulator back at once, without Python's cyclic gc."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest

from dmc_gym_plugin import rendering

needs_opengl = pytest.mark.skipif(
    rendering.choose_backend() == "disable", reason=f"no OpenGL: {rendering.REMEDY}"
)


@contextlib.contextmanager
def without_cyclic_gc() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def watch(env: gymnasium.Env) -> list[weakref.ref]:
    """Return weak references to the model, the data and all of their arrays.

    MuJoCo's memory belongs to each of the arrays, and outlives the two objects with any of them.
    """
    physics = env.unwrapped.physics
    watched: list[Any] = []
    for struct in (physics.model.ptr, physics.data.ptr):
        values = [getattr(struct, name) for name in dir(struct) if not name.startswith("_")]
        watched += [struct, *(value for value in values if isinstance(value, np.ndarray))]
    assert len(watched) > 500
    return [weakref.ref(item) for item in watched]


def count_alive(references: list[weakref.ref]) -> int:
    # dm_control keeps the model that it compiled last: let that be another one.
    gymnasium.make("DMC/pendulum-swingup-v0").close()
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize(
    ("env_id", "options"),
    [
        ("DMC/walker-walk-v0", {}),
        ("DMC/reacher-three_easy-v0", {"observation": "dict"}),
        ("DMC/manipulation-reach_site_features-v0", {}),
        pytest.param(
            "DMC/cartpole-balance-v0",
            {"observation": "state+pixels", "render_mode": "rgb_array"},
            marks=needs_opengl,
        ),
    ],
)
def test_closing_frees_the_simulator(env_id: str, options: dict[str, Any]) -> None:
    with without_cyclic_gc():
        env = gymnasium.make(env_id, **options)
        env.reset(seed=0)
        env.step(env.action_space.sample())
        if env.render_mode is not None:
            env.render()
        watched = watch(env)
        env.reset()
        watched += watch(env)
        assert count_alive(watched) > 500  # what is watched is the simulator in use
        env.close()
        assert count_alive(watched) == 0


def test_a_dropped_environment_needs_no_closing() -> None:
    with without_cyclic_gc():
        env = gymnasium.make("DMC/walker-walk-v0")
        env.reset(seed=0)
        watched = watch(env)
        del env
        assert count_alive(watched) == 0


def test_lqr_frees_the_model_that_a_seed_replaces() -> None:
    with without_cyclic_gc():
        env = gymnasium.make("DMC/lqr-lqr_2_1-v0")
        watched = watch(env)
        env.reset(seed=1)
        assert count_alive(watched) == 0
        assert count_alive(watch(env)) > 500
        env.close()
