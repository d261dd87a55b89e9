"""What SB3's users do with files: policies alone, parts of a model, other environments, noises."""

from __future__ import annotations

import copy
import gc
import tempfile
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from same_models import assert_same, no_unpickling
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import (
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
    VectorizedActionNoise,
)
from stable_baselines3.common.vec_env import DummyVecEnv

from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SSMPolicy
from tdmpc2_sb3.saving.archive import UnsaveableError


def vec_point_env(point_env, n_envs=1, **kwargs):
    return DummyVecEnv([lambda: Monitor(point_env(**kwargs)) for _ in range(n_envs)])


# -- a policy alone ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy_class", "kind", "kwargs"),
    [
        (MlpPolicy, "vector", {"episodic": True, "gamma": 0.9, "horizon": 2, "num_bins": 51}),
        (SSMPolicy, "vector", {"dynamics_kwargs": {"depth": 1, "selective": False}}),
        (CnnPolicy, "image", {"dropout": 0.2}),
        (MultiInputPolicy, "dict", {"num_iterations": 3, "min_std": 0.1}),
    ],
)
def test_a_policy_is_saved_and_loaded_without_its_algorithm(
    make_agent, point_env, roughen, tmp_path, policy_class, kind, kwargs
):
    policy = make_agent(point_env(kind=kind), policy_class, **kwargs).policy
    roughen(policy.world_model)
    policy.scale.fill_(3.0)
    policy.save(tmp_path / "policy.pkl")  # SB3's users give it that suffix
    with no_unpickling():
        loaded = policy_class.load(tmp_path / "policy.pkl", device="cpu")
    assert_same(policy.state_dict(), loaded.state_dict())
    assert loaded.planner == policy.planner
    assert loaded.world_model.architecture == policy.world_model.architecture
    assert loaded.model_optimizer.param_groups[1]["lr"] == pytest.approx(3e-4)
    observations = point_env(kind=kind).observation_space
    state = None
    for _ in range(3):
        observation = observations.sample()
        action, next_state = policy.predict(observation, state, deterministic=True)
        again, state = loaded.predict(observation, state, deterministic=True)
        assert action.tobytes() == again.tobytes()
        assert_same(next_state, state)


def test_a_policys_file_and_an_agents_are_told_apart(make_agent, tmp_path):
    agent = make_agent()
    agent.save(tmp_path / "agent")
    agent.policy.save(tmp_path / "policy.pkl")
    with pytest.raises(ValueError, match=r"holds a whole agent: load it by TDMPC2\.load"):
        MlpPolicy.load(tmp_path / "agent")
    with pytest.raises(ValueError, match=r"holds no whole agent: .*MlpPolicy\.load"):
        TDMPC2.load(tmp_path / "policy.pkl")


def test_a_compiled_policy_is_saved_as_it_was_before(make_agent, tmp_path):
    agent = make_agent()
    parameters = copy.deepcopy(agent.get_parameters())
    agent.policy = th.compile(agent.policy)
    agent.save(tmp_path / "m")
    assert_same(TDMPC2.load(tmp_path / "m", device="cpu").get_parameters(), parameters)


# -- parts of a model ----------------------------------------------------------------------------


def test_attributes_are_excluded_included_and_replaced(make_agent, point_env, tmp_path, capsys):
    agent = make_agent(verbose=2)
    agent.save(tmp_path / "m", exclude=["verbose"])
    for env in (None, point_env()):
        assert TDMPC2.load(tmp_path / "m", env=env).verbose == 0  # the constructor's default
    agent.save(tmp_path / "m", exclude=["verbose"], include=["verbose"])
    custom = {"learning_rate": 2e-5, "no_such_attribute": 1.0}
    loaded = TDMPC2.load(tmp_path / "m", custom_objects=custom, print_system_info=True)
    assert loaded.verbose == 2
    assert loaded.learning_rate == loaded.lr_schedule(1.0) == 2e-5
    assert not hasattr(loaded, "no_such_attribute")  # custom objects only replace
    assert "SAVED MODEL SYSTEM INFO" in capsys.readouterr().out


def test_parameters_are_checked_and_may_be_given_in_part(make_agent):
    agent = make_agent()
    parameters = copy.deepcopy(agent.get_parameters())
    for exact_match in (True, False):
        with pytest.raises(ValueError, match="nothing_such"):
            agent.set_parameters({**parameters, "nothing_such": {}}, exact_match)
    *names, last = parameters["policy"]
    partly = {"policy": {name: th.rand_like(parameters["policy"][name]) for name in names}}
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        agent.set_parameters({"policy": parameters["policy"]})
    with pytest.raises(RuntimeError, match="Missing key"):
        agent.set_parameters({**parameters, **partly})
    agent.set_parameters(partly, exact_match=False)
    found = agent.get_parameters()["policy"]
    assert_same({name: found[name] for name in names}, partly["policy"])
    assert th.equal(found[last], parameters["policy"][last])
    vector = agent.policy.parameters_to_vector()
    agent.policy.load_from_vector(2 * vector)
    np.testing.assert_array_equal(agent.policy.parameters_to_vector(), 2 * vector)


def test_a_buffer_is_loaded_where_there_is_none(make_agent, tmp_path):
    agent = make_agent().learn(25)
    agent.save_replay_buffer(tmp_path / "b")
    fields = {name: field.copy() for name, field in agent.replay_buffer.fields().items()}
    agent.replay_buffer = None
    agent.load_replay_buffer(tmp_path / "b")
    assert_same(agent.replay_buffer.fields(), fields)


def test_files_are_closed_and_streams_are_not(make_agent, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file left open is a ResourceWarning
        agent = make_agent().learn(25)
        agent.save(tmp_path / "m")
        agent.policy.save(tmp_path / "p")
        agent.save_replay_buffer(tmp_path / "b")
        for path in (tmp_path, str(tmp_path) + "/"):
            TDMPC2.load(f"{path}/m")
            MlpPolicy.load(f"{path}/p")
            agent.load_replay_buffer(f"{path}/b")
        for save, load in (
            (agent.save, TDMPC2.load),
            (agent.policy.save, MlpPolicy.load),
            (agent.save_replay_buffer, agent.load_replay_buffer),
        ):
            with tempfile.TemporaryFile() as file:
                save(file)
                file.seek(0)
                load(file)
                assert not file.closed
        del agent
        gc.collect()


def test_a_space_of_ones_own_is_learnt_in_and_refused_at_saving(make_agent, point_env, tmp_path):
    class OwnBox(spaces.Box):
        pass

    env = point_env()
    env.observation_space = OwnBox(-9, 9, (3,), np.float32)
    env.action_space = OwnBox(-1, 1, (2,), np.float32)
    agent = make_agent(env).learn(25)
    assert env.action_space.contains(agent.predict(env.observation_space.sample())[0])
    with pytest.raises(UnsaveableError, match=r"'observation_space': .*OwnBox .*give the "
                       r"environment a plain gymnasium\.spaces\.Box in its place"):  # fmt: skip
        agent.save(tmp_path / "m")


# -- other environments --------------------------------------------------------------------------


def test_environments_are_set_kept_and_reset(make_agent, point_env, tmp_path):
    agent = make_agent(vec_point_env(point_env), learning_starts=10, train_freq=4).learn(26)
    agent.set_env(vec_point_env(point_env))
    assert agent._last_obs is None  # SB3's default: the new environment is reset
    agent.learn(12)
    assert agent.num_timesteps == 12
    env = agent.get_env()
    agent.set_env(env, force_reset=False)
    assert agent._last_obs is not None
    agent.learn(12, reset_num_timesteps=False)
    assert agent.num_timesteps == 24
    agent.save(tmp_path / "m")
    # An environment still in the state of the saved model goes on; any other is reset.
    resets = len(env.envs[0].unwrapped.resets)
    going_on = TDMPC2.load(tmp_path / "m", env=env, force_reset=False)
    np.testing.assert_array_equal(going_on._last_obs, agent._last_obs)
    going_on.learn(4, reset_num_timesteps=False)
    assert going_on.num_timesteps == 28
    assert len(env.envs[0].unwrapped.resets) == resets
    begun = TDMPC2.load(tmp_path / "m", env=vec_point_env(point_env))
    assert begun._last_obs is None
    more = TDMPC2.load(tmp_path / "m", env=vec_point_env(point_env, 2), force_reset=False)
    assert more._last_obs is None
    more.learn(16, reset_num_timesteps=False)
    assert more.num_timesteps == 40


@pytest.mark.parametrize("train_freq", [4, (4, "step"), (1, "episode")])
def test_the_update_frequency_survives_and_may_be_given_anew(make_agent, tmp_path, train_freq):
    agent = make_agent(train_freq=train_freq).learn(40)
    agent.save(tmp_path / "m")
    for kwargs in ({}, {"train_freq": train_freq}):
        loaded = TDMPC2.load(tmp_path / "m", env=agent.get_env(), **kwargs)
        assert loaded.train_freq == agent.train_freq
        updates = loaded._n_updates
        loaded.learn(40)
        assert loaded._n_updates > updates


# -- action noise --------------------------------------------------------------------------------


def noises(n_actions):
    zero, some = np.zeros(n_actions), np.full(n_actions, 0.3)
    return {
        "normal": NormalActionNoise(zero, some),
        "correlated": OrnsteinUhlenbeckActionNoise(zero, some, theta=0.1, dt=0.05),
        "started": OrnsteinUhlenbeckActionNoise(zero, some, initial_noise=some),
        "vectorized": VectorizedActionNoise(OrnsteinUhlenbeckActionNoise(zero, some), 2),
    }


@pytest.mark.parametrize("kind", ["normal", "correlated", "started", "vectorized"])
def test_action_noise_is_saved_in_the_state_it_is_in(make_agent, point_env, tmp_path, kind):
    n_envs = 2 if kind == "vectorized" else 1
    noise = noises(2)[kind]
    agent = make_agent(vec_point_env(point_env, n_envs), action_noise=noise).learn(24)
    agent.save(tmp_path / "m")
    with no_unpickling():
        loaded = TDMPC2.load(tmp_path / "m")
    assert type(loaded.action_noise) is type(noise)
    np.random.seed(3)  # noqa: NPY002  # SB3's noises draw from the global stream
    expected = [noise() for _ in range(4)]
    np.random.seed(3)  # noqa: NPY002
    np.testing.assert_array_equal([loaded.action_noise() for _ in range(4)], expected)
    assert loaded.action_noise().dtype == np.float32
    loaded.action_noise.reset()


def test_the_noise_is_added_to_the_plan(make_agent, point_env):
    env = vec_point_env(point_env, 2, bounds=(-3.0, 1.0))
    loud = NormalActionNoise(np.full(2, 100.0), np.zeros(2))
    agent = make_agent(env, action_noise=loud, learning_starts=20, gradient_steps=0)
    agent.learn(40)
    assert isinstance(agent.action_noise, VectorizedActionNoise)
    assert float(agent.replay_buffer.sample(200).actions.max()) == 1.0
    later, _ = agent._sample_action(0, agent.action_noise, 2)
    np.testing.assert_array_equal(later, np.ones((2, 2)))  # the bound of this space


def test_gym_make_and_ids(make_agent):
    for env in ("Pendulum-v1", gym.make("Pendulum-v1")):
        assert make_agent(env).get_env().num_envs == 1
