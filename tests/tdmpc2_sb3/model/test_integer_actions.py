"""Actions that are whole numbers: every value has an equal share of [-1, 1], both ways."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from tdmpc2_sb3.policies import MlpPolicy

VECTOR = spaces.Box(-1.0, 1.0, (2,), np.float32)


def policy_for(space: spaces.Box) -> MlpPolicy:
    sizes = {"latent_dim": 16, "enc_dim": 8, "mlp_dim": 16, "num_enc_layers": 1}
    return MlpPolicy(VECTOR, space, lambda _: 1e-3, **sizes)


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (-3, 3, np.int64),
        (0, 1, np.int32),
        (0, 255, np.uint8),
        (-128, 127, np.int8),
        (5, 5, np.int64),
        (0, 1, np.bool_),
    ],
)
def test_equal_shares(low, high, dtype):
    space = spaces.Box(low, high, (1,), dtype)
    policy = policy_for(space)
    count = int(high) - int(low) + 1
    scaled = th.linspace(-1.0, 1.0, 840 * count + 1)[:-1] + 1.0 / (840 * count)  # midpoints
    actions = policy.unscale(scaled[:, None])
    assert actions.dtype == dtype
    values, times = np.unique(actions.astype(np.int64), return_counts=True)
    assert values.tolist() == list(range(int(low), int(high) + 1))
    assert times.tolist() == [840] * count
    # The ends, and what rounding may put beyond them.
    ends = policy.unscale(th.tensor([[-1.0], [1.0], [-1.001], [1.001]]))
    assert ends[:, 0].astype(int).tolist() == [low, high, low, high]
    # Back: each value's centre.
    every = np.arange(int(low), int(high) + 1).astype(dtype)[:, None]
    centres = policy.scale_action(every)
    expected = -1.0 + (2.0 * np.arange(count)[:, None] + 1.0) / count
    np.testing.assert_allclose(centres, expected, atol=1e-12)
    np.testing.assert_array_equal(policy.unscale(th.from_numpy(centres).float()), every)


def test_by_hand():
    policy = policy_for(spaces.Box(np.array([-1, 0]), np.array([1, 3]), dtype=np.int64))
    actions = policy.unscale(th.tensor([[-0.34, -0.51], [-0.32, -0.49], [0.34, 0.49]]))
    assert actions.tolist() == [[-1, 0], [0, 1], [1, 2]]
    np.testing.assert_allclose(policy.scale_action(np.array([[0, 3]])), [[0.0, 0.75]])


def test_real_numbers_stay_as_they_were():
    policy = policy_for(spaces.Box(-2.0, 6.0, (1,), np.float32))
    np.testing.assert_allclose(policy.unscale(th.tensor([[0.25]])), [[3.0]])
    np.testing.assert_allclose(policy.scale_action(np.array([[3.0]])), [[0.25]])


class Recorder(gym.Env):
    """Keeps the actions that reach it."""

    terminates = False

    def __init__(self):
        self.observation_space = VECTOR
        self.action_space = spaces.Box(-3, 3, (2,), np.int64)
        self.actions = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.actions.append(action.copy())
        self.steps += 1
        observation = np.full(2, self.steps / 100, np.float32)
        return observation, float(action[0]), False, self.steps == 20, {}


@pytest.mark.parametrize("noise", ["white", "pink"])
def test_the_buffer_holds_what_was_meant_by_what_was_done(make_agent, noise):
    env = Recorder()
    agent = make_agent(env, learning_starts=2100, exploration_noise=noise, buffer_size=4000)
    agent.learn(2100)
    stored = agent.replay_buffer.actions.reshape(-1, 2)
    steps = agent.replay_buffer.rings.is_step(np.arange(len(stored)))
    meant = stored[steps]
    done = np.array(env.actions)
    np.testing.assert_array_equal(agent.policy.unscale(th.from_numpy(meant)), done)
    _, times = np.unique(done, return_counts=True)
    # 4200 draws among 7 values: 600 each, give or take 6 standard deviations of 23 (white); pink
    # noise repeats itself, which spreads the counts.
    assert np.abs(times - 600).max() < (140 if noise == "white" else 300)
    assert len(np.unique(meant)) > 4000  # not the shares' centres alone: plans lie anywhere


def test_random_actions_go_on_after_loading(make_agent, tmp_path):
    whole, stopped = Recorder(), Recorder()
    make_agent(whole, learning_starts=60).learn(60)
    agent = make_agent(stopped, learning_starts=60).learn(20)
    agent.save(tmp_path / "a")
    rest = Recorder()
    type(agent).load(tmp_path / "a", rest, device="cpu").learn(40, reset_num_timesteps=False)
    np.testing.assert_array_equal(whole.actions, stopped.actions + rest.actions)


def test_plans_and_predictions(make_agent):
    env = Recorder()
    agent = make_agent(env, learning_starts=20).learn(40)
    action, _ = agent.predict(np.zeros(2, np.float32))
    assert env.action_space.contains(action)
    assert {tuple(each) for each in env.actions[20:]} != {tuple(env.actions[20])}


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.int32, np.uint32])
@pytest.mark.parametrize("from_zero", [False, True])
def test_the_ends_of_what_a_type_holds(dtype, from_zero):
    low, high = 0 if from_zero else int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    policy = policy_for(spaces.Box(low, high, (1,), dtype))
    actions = policy.unscale(th.tensor([[-1.0], [0.0], [1.0], [1.001], [-1.001]]))
    assert actions.dtype == dtype
    middle = (low + high + 1) // 2
    assert [int(each) for each in actions[:, 0]] == [low, middle, high, high, low]
