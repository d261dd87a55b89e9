"""The algorithm's arguments: defaults, what they reach, and one sentence for each wrong one."""

from __future__ import annotations

import inspect
import re
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TransformReward
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env

from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.model.dynamics import MLPDynamics


def test_defaults_are_the_papers():
    parameters = inspect.signature(TDMPC2).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    expected = {
        "learning_rate": 3e-4,
        "buffer_size": 1_000_000,
        "learning_starts": "auto",
        "batch_size": 256,
        "tau": 0.01,
        "gamma": "auto",
        "train_freq": 1,
        "gradient_steps": 1,
        "horizon": 3,
        "train_horizon": None,
        "model_size": 5,
        "num_samples": 512,
        "num_elites": 64,
        "num_pi_trajs": 24,
        "num_iterations": "auto",
        "temperature": 0.5,
        "min_std": 0.05,
        "max_std": 2.0,
        "consistency_coef": 20.0,
        "reward_coef": 0.1,
        "value_coef": 0.1,
        "termination_coef": 1.0,
        "entropy_coef": 1e-4,
        "entropy": "squashed",
        "rho": "auto",
        "td_lambda": 0.0,
        "policy_delay": 1,
        "enc_lr_scale": 0.3,
        "max_grad_norm": 20.0,
        "episodic": "auto",
        "use_planner": True,
    }
    assert {name: defaults[name] for name in expected} == expected


def test_every_argument_is_documented():
    documented = set(re.findall(r":param (\w+):", TDMPC2.__doc__))
    arguments = set(inspect.signature(TDMPC2.__init__).parameters) - {"self"}
    assert documented == arguments


def test_the_default_model_is_the_papers_5m():
    agent = TDMPC2("MlpPolicy", "Pendulum-v1", buffer_size=1000, device="cpu")
    arch = agent.policy.world_model.architecture
    assert arch == (512, 256, 512, 2, 5, 8, 101, -10.0, 10.0, 0.01)
    assert agent.policy.planner == (3, 512, 64, 24, 6, 0.5, 0.05, 2.0, 0.975)
    update = agent._update_step
    assert update.config == (0.975, 20.0, 0.1, 0.1, 1.0, 1e-4, "squashed", False, 0.0)
    th.testing.assert_close(update.model_weights, th.tensor([1.0, 0.5, 0.25]) / 3)
    th.testing.assert_close(update.policy_weights, th.tensor([1.0, 0.5, 0.25, 0.125]) / 4)
    assert (update.tau, update.max_grad_norm) == (0.01, 20.0)


def test_arguments_reach_what_they_set(make_agent):
    agent = make_agent(
        horizon=4,
        train_horizon=2,
        num_samples=20,
        num_elites=5,
        num_pi_trajs=3,
        num_iterations=2,
        temperature=0.7,
        min_std=0.1,
        max_std=1.5,
        gamma=0.9,
        simnorm_dim=4,
        num_bins=51,
        dropout=0.2,
        consistency_coef=10.0,
        reward_coef=0.2,
        value_coef=0.3,
        termination_coef=0.4,
        entropy_coef=1e-3,
        entropy="gaussian",
        tau=0.05,
        max_grad_norm=5.0,
        rho=0.8,
        td_lambda=0.6,
    )
    assert agent.policy.planner == (4, 20, 5, 3, 2, 0.7, 0.1, 1.5, 0.9)
    arch = agent.policy.world_model.architecture
    assert (arch.simnorm_dim, arch.num_bins, arch.dropout) == (4, 51, 0.2)
    update = agent._update_step
    assert update.config == (0.9, 10.0, 0.2, 0.3, 0.4, 1e-3, "gaussian", False, 0.6)
    th.testing.assert_close(update.model_weights, th.tensor([1.0, 0.8]) / 2)
    assert (update.tau, update.max_grad_norm) == (0.05, 5.0)
    assert agent.replay_buffer.horizon == agent.sequence_length == 2
    _, state = agent.predict(np.zeros(3, np.float32))
    assert state[0].shape == (1, 4, 2)
    agent.learn(25)


@pytest.mark.parametrize(
    ("episodic", "reference", "past"),
    [(False, False, False), (True, False, True), (True, True, False)],
)
def test_terminations_are_learnt_from_where_there_are_any(make_agent, episodic, reference, past):
    agent = make_agent(episodic=episodic, reference_terminations=reference)
    assert agent.replay_buffer.rings.past_terminations is past
    assert agent._update_step.config.encoded_terminations is past


@pytest.mark.parametrize(("episodic", "rho"), [(False, 0.5), (True, 0.7)])
def test_automatic_rho(make_agent, episodic, rho):
    update = make_agent(episodic=episodic)._update_step
    th.testing.assert_close(update.model_weights, th.tensor([1.0, rho, rho**2]) / 3)


def test_policy_kwargs_go_before_arguments(make_agent):
    agent = make_agent(policy_kwargs={"latent_dim": 24, "dynamics": "ssm", "horizon": 2})
    assert agent.policy.world_model.architecture.latent_dim == 24
    assert agent.policy.planner.horizon == 2
    assert type(agent.policy.world_model.dynamics) is not MLPDynamics
    agent.learn(25)


def test_policies_by_name_and_by_class(make_agent, point_env):
    from tdmpc2_sb3 import SSMPolicy

    assert type(make_agent(policy=SSMPolicy).policy) is SSMPolicy
    assert type(make_agent(policy="SSMPolicy").policy) is SSMPolicy
    own = type("Own", (SSMPolicy,), {})
    assert type(make_agent(policy=own).policy) is own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"horizon": 0}, "horizon is 0: it must be at least 1"),
        ({"horizon": 1.5}, "horizon is 1.5: it must be a whole number"),
        ({"train_horizon": 0}, "train_horizon is 0: it must be at least 1"),
        ({"num_elites": 40}, "num_elites is 40 but there are only 32 samples: lower num_elites"),
        ({"num_pi_trajs": 32}, "num_pi_trajs is 32: it must be at least 0 and below num_samples"),
        ({"num_iterations": 0}, "num_iterations is 0"),
        ({"num_iterations": "many"}, "num_iterations is 'many': give a whole number or 'auto'"),
        ({"min_std": 3.0}, "min_std is 3.0 and max_std 2.0"),
        ({"temperature": -1.0}, "temperature is -1.0: it must be positive"),
        ({"gamma": 1.5}, r"gamma is 1.5: it must lie in \[0, 1\]"),
        ({"gamma": "much"}, "gamma is 'much'"),
        ({"tau": -0.1}, r"tau is -0.1: it must lie in \[0, 1\]"),
        ({"rho": 2.0}, r"rho is 2.0: it must lie in \[0, 1\]"),
        ({"policy_delay": 0}, "policy_delay is 0: it must be at least 1"),
        ({"td_lambda": 1.1}, r"td_lambda is 1.1: it must lie in \[0, 1\]"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm is 0.0: it must lie in"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"buffer_size": 0}, "buffer_size is 0: it must be at least 1"),
        ({"learning_starts": -1}, "learning_starts is -1: give a number of steps or 'auto'"),
        ({"learning_starts": "soon"}, "learning_starts is 'soon'"),
        (
            {"exploration_noise": "brown"},
            "exploration_noise is 'brown': use one of white, pink",
        ),
        ({"episodic": "maybe"}, "episodic is 'maybe': use True, False or 'auto'"),
        ({"compile": "maybe"}, "compile is 'maybe': use True, False or 'auto'"),
        ({"train_freq": 0}, "train_freq is 0: it must be at least 1"),
        ({"train_freq": (0, "episode")}, "train_freq is 0: it must be at least 1"),
        ({"gradient_steps": -2}, "gradient_steps is -2: .* -1"),
        ({"initial_gradient_steps": "all"}, "initial_gradient_steps is 'all'"),
        ({"initial_gradient_steps": -1}, "initial_gradient_steps is -1"),
        ({"latent_dim": 20}, "latent_dim is 20: it must be a multiple of simnorm_dim, 8"),
        ({"model_size": 4}, r"model_size is 4: choose one of \[1, 5, 19, 48, 317\]"),
        ({"dynamics": "gru"}, "dynamics is 'gru': no such latent dynamics, use one of"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"policy": "LstmPolicy"}, "LstmPolicy"),
        (
            {"replay_buffer_class": ReplayBuffer},
            "replay_buffer_class is ReplayBuffer: .* use SequenceReplayBuffer",
        ),
    ],
)
def test_one_sentence_for_a_wrong_argument(make_agent, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_agent(**arguments)
    assert "\n" not in str(caught.value)


def test_no_environment():
    with pytest.raises(ValueError, match="env is None: pass an environment or its id"):
        TDMPC2("MlpPolicy", None)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Discrete(4), r"Discrete\(4\): TDMPC2 plans continuous actions"),
        (spaces.MultiBinary(2), r"MultiBinary\(2\)"),
        (spaces.Box(-np.inf, np.inf, (2,)), "infinite bounds"),
    ],
)
def test_other_action_spaces(make_agent, point_env, space, message):
    env = point_env()
    env.action_space = space
    with pytest.raises(ValueError, match=message):
        make_agent(env)


def test_other_observation_spaces(make_agent, point_env):
    env = point_env()
    env.observation_space = spaces.Dict({"x": spaces.Text(3)})
    with pytest.raises(ValueError, match=r"Observation 'x' is a Text: .* flatten it"):
        make_agent(env, "MultiInputPolicy")


def test_an_observation_of_the_wrong_shape(make_agent):
    with pytest.raises(ValueError, match=r"\(4,\)"):
        make_agent().predict(np.zeros(4, np.float32))


def test_counting_episodes_takes_one_environment(make_agent, point_env):
    env = make_vec_env(point_env, n_envs=2)
    with pytest.raises(ValueError, match=r"counts episodes but there are 2 environments: count"):
        make_agent(env, train_freq=(1, "episode"))


def test_replay_buffer_arguments(make_agent):
    buffer = make_agent(replay_buffer_kwargs={"sample_open_episodes": True}).replay_buffer
    assert buffer.sample_open_episodes
    assert make_agent(replay_buffer_kwargs={"horizon": 5}).replay_buffer.horizon == 5


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ([-1.0, 0.5], [1.0, 0.5], "dimension 1 of the action space, 0.5 and 0.5, leave no choice"),
        ([-3e38, -1.0], [3e38, 1.0], r"dimension 0 .* -3e\+38 and 3e\+38, lie too far apart"),
    ],
)
def test_bounds_that_cannot_be_planned_in(make_agent, point_env, low, high, message):
    env = point_env()
    env.action_space = spaces.Box(np.array(low, np.float32), np.array(high, np.float32))
    with pytest.raises(ValueError, match=message):
        make_agent(env)


def test_a_device_that_is_absent(make_agent, tmp_path):
    absent = "cuda:99" if torch_has_cuda() else "mps" if not torch_has_mps() else "xpu"
    agent = make_agent()
    agent.save(tmp_path / "agent.zip")
    agent.policy.save(tmp_path / "policy.zip")
    message = f"device is '{absent}', which cannot be used here"
    with pytest.raises(ValueError, match=message):
        make_agent(device=absent)
    with pytest.raises(ValueError, match=message):
        TDMPC2.load(tmp_path / "agent.zip", device=absent)
    with pytest.raises(ValueError, match=message):
        type(agent.policy).load(tmp_path / "policy.zip", device=absent)


@pytest.mark.skipif(th.cuda.is_available(), reason="this machine has the device")
def test_cuda_where_there_is_none_is_the_cpu_with_a_word(make_agent, tmp_path):
    agent = make_agent()
    agent.save(tmp_path / "agent.zip")
    agent.policy.save(tmp_path / "policy.zip")
    for load in (TDMPC2.load, type(agent.policy).load):
        path = tmp_path / ("agent.zip" if load == TDMPC2.load else "policy.zip")
        with pytest.warns(UserWarning, match="device is 'cuda', but torch finds no such device"):
            assert load(path, device="cuda").device == th.device("cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load(path, device="auto")
    with pytest.warns(UserWarning, match="device is 'cuda:1'.*the CPU is used"):
        assert make_agent(device="cuda:1").device == th.device("cpu")
    with pytest.warns(UserWarning, match="device is 'cuda'"):
        agent.set_parameters(agent.get_parameters(), device="cuda")


def torch_has_cuda():
    return th.cuda.is_available()


def torch_has_mps():
    return th.backends.mps.is_available()


@pytest.mark.parametrize(("scale", "warns"), [(1.0, False), (20_000.0, False), (30_000.0, True)])
def test_rewards_beyond_the_bins_are_warned_of_once(make_agent, point_env, scale, warns):
    env = TransformReward(point_env(), lambda reward: scale)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_agent(env).learn(30)
    said = [str(each.message) for each in caught if "reward" in str(each.message)]
    assert len(said) == warns
    if warns:
        assert "A reward of 30000 lies outside [-22025, 22025]" in said[0]


@pytest.mark.parametrize(
    ("steps", "settings", "n_envs", "warns"),
    [
        (19, {}, 1, True),
        (20, {}, 1, False),
        (18, {"train_freq": 5}, 1, False),  # the rollout is finished, at step 20
        (14, {"train_freq": 5}, 1, True),
        (17, {}, 4, False),
        (16, {}, 4, True),
    ],
)
def test_no_learning_is_warned_of(make_agent, point_env, steps, settings, n_envs, warns):
    agent = make_agent(make_vec_env(point_env, n_envs=n_envs), **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agent.learn(steps)
    said = [str(each.message) for each in caught if "no gradient step" in str(each.message)]
    assert len(said) == warns
    assert (agent._n_updates == 0) == warns
    if warns:
        assert "20 random steps (learning_starts) come first" in said[0]
        agent.learn(20 - agent.num_timesteps, reset_num_timesteps=False)
        assert agent._n_updates > 0


def no_learning(agent, steps, **kwargs):
    """What a call of learn() says of it, and its gradient steps."""
    before = agent._n_updates
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agent.learn(steps, **kwargs)
    said = [str(each.message) for each in caught if "no gradient step" in str(each.message)]
    return said, agent._n_updates - before


def test_no_learning_without_the_former_buffer_is_warned_of(make_agent, tmp_path):
    agent = make_agent()
    agent.learn(30)
    agent.save(tmp_path / "agent.zip")
    agent.save_replay_buffer(tmp_path / "buffer.npz")
    alone = TDMPC2.load(tmp_path / "agent.zip", env=agent.env, device="cpu")
    said, updates = no_learning(alone, 12)
    assert updates == 0
    assert len(said) == 1
    assert "holds 0 steps at its start and 12 at its end, but 20 are learnt from" in said[0]
    assert "load_replay_buffer()" in said[0]
    assert no_learning(alone, 12, reset_num_timesteps=False) == ([], 5)  # steps 20 to 24
    whole = TDMPC2.load(tmp_path / "agent.zip", env=agent.env, device="cpu")
    whole.load_replay_buffer(tmp_path / "buffer.npz")
    assert no_learning(whole, 12) == ([], 12)


@pytest.mark.parametrize(("steps", "warns"), [(8, True), (9, False)])
def test_less_than_a_sub_sequence_is_warned_of(make_agent, steps, warns):
    agent = make_agent(learning_starts=0, horizon=8)
    said, updates = no_learning(agent, steps)
    assert (len(said), updates == 0) == (warns, warns)
    assert not warns or "8 at its end, but 9 are learnt from" in said[0]
