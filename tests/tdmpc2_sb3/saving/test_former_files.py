"""Files saved at commit c0d7d4d, under the names that modules had then, load and resume exactly.

Each agent made 50 steps on DMC/cartpole-swingup-v0 with action repeat 2 before it was saved; the
expectations are what that commit itself found in the files and came to a step later.
"""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch as th

from tdmpc2_sb3 import TDMPC2

FOLDER = Path(__file__).with_name("former_files")
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


def total(values: th.Tensor) -> float:
    return float(values.double().sum())


@pytest.mark.parametrize("name", EXPECTED)
def test_a_former_agent_goes_on_where_it_was(name):
    expected = EXPECTED[name]
    env = gymnasium.make("DMC/cartpole-swingup-v0", action_repeat=2)
    agent = TDMPC2.load(FOLDER / f"{name}.zip", env=env, device="cpu")
    agent.load_replay_buffer(FOLDER / f"{name}_buffer.zip")

    assert agent.entropy == "gaussian"  # there was no other

    batch = agent.replay_buffer.sample(8)
    for field, value in expected["batch"].items():
        assert total(getattr(batch, field)) == pytest.approx(value, abs=1e-5), field
    norms = {
        key: float(value.double().norm())
        for key, value in agent.policy.world_model.state_dict().items()
    }
    assert norms == pytest.approx(expected["parameters"], rel=1e-6)
    states = agent.policy.model_optimizer.state.values()
    assert sum(total(each["exp_avg_sq"]) for each in states) == pytest.approx(expected["moments"])
    assert total(agent._training_generator.get_state()) == expected["training_stream"]
    assert agent._plan_mean.flatten().tolist() == pytest.approx(expected["plan"])
    observation = th.linspace(-1.0, 1.0, 5).unsqueeze(0)
    action = agent.policy.prior_action(observation, 1, None, True)
    np.testing.assert_allclose(action, expected["prior_action"], atol=1e-6)

    agent.learn(1, reset_num_timesteps=False)
    assert (agent.num_timesteps, agent._n_updates) == (expected["steps"], expected["updates"])
    # By rounding a plan may choose another action, which a step's force hardly tells.
    np.testing.assert_allclose(agent._last_obs[0], expected["next_observation"], atol=0.1)
