"""Pink noise: its distribution against its definition, and how an agent explores by it."""

from __future__ import annotations

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from tdmpc2_sb3.model.pink_noise import NUM_OCTAVES, PinkNoise, uniform


def generator(seed=0):
    return th.Generator().manual_seed(seed)


def series(num_envs, num_steps):
    """[steps, E] of one action dimension."""
    noise = PinkNoise(num_envs, 1, generator())
    return th.stack([noise.draw()[:, 0] for _ in range(num_steps)])


def test_numbers_are_standard_normal_and_correlated_as_defined():
    drawn = series(4000, 40).double()
    for step in (0, 39):  # from the first step on
        assert drawn[step].mean().item() == pytest.approx(0.0, abs=0.06)
        assert drawn[step].std().item() == pytest.approx(1.0, abs=0.05)
        fourth = (drawn[step] ** 4).mean().item()
        assert fourth == pytest.approx(3.0, abs=0.5)
    for lag in (1, 5, 30):
        expected = sum(np.exp(-lag / 2.0**k) for k in range(1, NUM_OCTAVES)) / NUM_OCTAVES
        found = (drawn[:-lag] * drawn[lag:]).mean().item()
        assert found == pytest.approx(expected, abs=0.02)


def test_power_falls_with_frequency():
    """By -1 on logarithmic axes, between periods of 4 and 256 steps."""
    drawn = series(400, 1024).numpy()
    power = (np.abs(np.fft.rfft(drawn, axis=0)) ** 2).mean(1)
    frequency = np.fft.rfftfreq(1024)
    some = (frequency >= 1 / 256) & (frequency <= 1 / 4)
    # Octaves count the same, though they hold more and more frequencies
    weights = 1.0 / np.sqrt(frequency[some])
    slope, _ = np.polyfit(np.log(frequency[some]), np.log(power[some]), 1, w=weights)
    assert slope == pytest.approx(-1.0, abs=0.15)


def test_uniform_numbers():
    assert uniform(th.tensor([0.0, 0.6744898])).tolist() == pytest.approx([0.0, 0.5])
    drawn = uniform(th.randn(20000, generator=generator()))
    counts = np.histogram(drawn.numpy(), bins=10, range=(-1, 1))[0]
    assert (np.abs(counts - 2000) < 5 * np.sqrt(1800)).all()


class Recorder(gym.Wrapper):
    """Keeps the actions that reach the environment."""

    def __init__(self, env):
        super().__init__(env)
        self.actions = []

    def step(self, action):
        self.actions.append(np.array(action))
        return super().step(action)


def test_random_actions_are_correlated_and_in_the_tasks_own_range(make_agent):
    env = Recorder(gym.make("Pendulum-v1"))  # torques in [-2, 2]
    make_agent(env, exploration_noise="pink", learning_starts=2000, seed=1).learn(1500)
    actions = np.concatenate(env.actions)
    assert -2 <= actions.min() < -1.8
    assert 1.8 < actions.max() <= 2
    assert np.corrcoef(actions[:-1], actions[1:])[0, 1] > 0.4
    white = Recorder(gym.make("Pendulum-v1"))
    make_agent(white, learning_starts=2000, seed=1).learn(1500)
    actions = np.concatenate(white.actions)
    assert abs(np.corrcoef(actions[:-1], actions[1:])[0, 1]) < 0.1


@pytest.mark.parametrize("use_planner", [True, False])
def test_the_noise_replaces_that_of_the_acting_agent(make_agent, use_planner):
    agent = make_agent(exploration_noise="pink", learning_starts=0, seed=2, use_planner=use_planner)
    agent._setup_learn(1)
    observation = agent.policy.obs_to_tensor(agent._last_obs)[0]
    noise = copy.deepcopy(agent._pink_noise)
    noise._generator = th.Generator()
    noise._generator.set_state(agent._training_generator.get_state())
    expected = noise.draw()
    _, scaled = agent._sample_action(0)
    if use_planner:
        plan = agent.policy.plan(
            observation,
            agent.policy.zero_plan(1),
            th.ones(1, dtype=th.bool),
            noise._generator,
            explore=False,
        )
        wanted = (plan.action + plan.std[:, 0] * expected).clamp(-1, 1)
    else:
        model = agent.policy.world_model
        wanted = model.policy_action(model.encode(observation), expected)
    np.testing.assert_allclose(scaled, wanted.detach().numpy(), atol=1e-6)


def test_predictions_do_not_take_from_it(make_agent):
    agent = make_agent(exploration_noise="pink")
    before = agent._pink_noise.state.clone()
    agent.predict(np.zeros(3, np.float32))
    assert th.equal(before, agent._pink_noise.state)
    assert make_agent()._pink_noise is None
