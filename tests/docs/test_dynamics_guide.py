"""The program and the commands of docs/dynamics.md."""

from __future__ import annotations

import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.model.dynamics import DYNAMICS
from tdmpc2_sb3.stability import __main__ as stability
from tdmpc2_sb3.stability import compare_dynamics

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "dynamics.md").read_text()


def test_a_dynamics_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    *_, program = re.findall(r"^```python\n(.*?)^```", GUIDE, re.S | re.M)
    names: dict[str, object] = {"__name__": "guide"}
    try:
        exec(program, names)  # as the reader would run it
        model = names["model"]
        assert isinstance(model, TDMPC2)
        dynamics = model.policy.world_model.dynamics
        assert type(dynamics) is names["GRUDynamics"]
        assert model.num_timesteps == 220

        # Broadcast over samples and batched over steps, as the planner and the losses use it.
        latent, actions = th.rand(2, 1, 64), 2 * th.rand(4, 2, 7, 1) - 1
        with th.no_grad():
            latents = dynamics.rollout(dynamics.initial_state(latent), actions)
            alone = dynamics.rollout(dynamics.initial_state(latent[1, 0]), actions[:, 1, 3])
        assert latents.shape == (4, 2, 7, 64)
        th.testing.assert_close(latents[:, 1, 3], alone, rtol=0, atol=1e-5)

        loaded = TDMPC2.load(tmp_path / "gru_pendulum")
        observation = gym.make("Pendulum-v1").reset(seed=0)[0]
        action, _ = model.predict(observation, deterministic=True)
        np.testing.assert_array_equal(action, loaded.predict(observation, deterministic=True)[0])
    finally:
        DYNAMICS.pop("gru", None)


def test_its_commands_are_understood() -> None:
    modules = {"compare_dynamics": compare_dynamics, "stability": stability}
    commands = re.findall(r"^python -m tdmpc2_sb3\.(\w+) (.*)$", GUIDE, re.M)
    assert sorted(name for name, _ in commands) == sorted(modules)
    for name, arguments in commands:
        options = modules[name]._parser().parse_args(arguments.split())
        assert options.env == "DMC/walker-walk-v0"


def test_the_options_it_names_exist() -> None:
    for option in ("depth", "selective", "modes", "width", "conditioning", "autoregressive"):
        assert f"`{option}`" in GUIDE
    options = {"depth": 1, "selective": False, "modes": 3, "autoregressive": True}
    dynamics = DYNAMICS["ssm"](16, 1, 32, **options)
    assert (dynamics.depth, dynamics.sizes.modes) == (1, 3)
