"""What a file or a copy brings along is fitted to what the model is now."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise

import dmc_gym_plugin  # noqa: F401
from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.planner import fitted_plan
from tdmpc2_sb3.saving import agent_file

OBSERVATION = np.array([0.1, 0.2, 0.3], np.float32)


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_another_horizon_than_the_saved_plans(make_agent, tmp_path, horizon, capsys):
    """The episode in progress goes on, by a plan of the new length from the first step on."""
    agent = make_agent("DMC/pendulum-swingup-v0")
    agent.learn(25)
    saved = agent._plan_mean.clone()
    agent.save(tmp_path / "agent.zip")
    loaded = TDMPC2.load(tmp_path / "agent.zip", env=agent.env,
                         device="cpu", horizon=horizon, verbose=1)  # fmt: skip
    fitted = loaded._previous_plan(1)
    shared = min(horizon, 3)
    assert fitted.shape == (1, horizon, 1)
    assert th.equal(fitted[:, :shared], saved[:, :shared])
    assert f"1x3x1 (environments, horizon, action) and 1x{horizon}x1" in capsys.readouterr().out
    loaded.learn(12, reset_num_timesteps=False)
    assert loaded._plan_mean.shape == (1, horizon, 1)
    assert loaded.policy.planner.horizon == loaded.replay_buffer.horizon == horizon


def test_plans_of_other_environments_are_dropped():
    mean = th.arange(12.0).view(2, 3, 2)
    assert fitted_plan(mean, 1, 3, 2) is None
    assert fitted_plan(mean, 2, 3, 4) is None
    assert fitted_plan(mean[0], 2, 3, 2) is None
    assert fitted_plan(mean, 2, 2, 2).tolist() == mean[:, :2].tolist()
    longer = fitted_plan(mean, 2, 4, 2)
    assert th.equal(longer[:, :3], mean)
    assert not longer[:, 3:].any()


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_another_number_of_environments(make_agent, point_env, tmp_path, before, after):
    noise = NormalActionNoise(np.zeros(2), 0.1 * np.ones(2))
    agent = make_agent(make_vec_env(point_env, n_envs=before), action_noise=noise)
    agent.learn(36)
    agent.save(tmp_path / "agent.zip")
    env = make_vec_env(point_env, n_envs=after)
    loaded = TDMPC2.load(tmp_path / "agent.zip", env=env, device="cpu")
    loaded.learn(36, reset_num_timesteps=False)
    assert loaded._plan_mean.shape == (after, 3, 2)
    assert isinstance(loaded.action_noise, VectorizedActionNoise) == (after > 1)
    if after > 1:
        assert loaded.action_noise.n_envs == after


def test_random_streams_of_another_kind_of_device(make_agent, capsys):
    """That of CUDA's generators is of 16 bytes."""
    agent = make_agent(verbose=1)
    before = agent._training_generator.get_state()
    state = agent_file.run_state(agent)
    streams = {"training": th.zeros(16, dtype=th.uint8), "predictions": before}
    agent_file.restore_streams(agent, streams, state)
    assert th.equal(agent._training_generator.get_state(), before)
    assert "random stream of training was that of another kind" in capsys.readouterr().out


def round_trips():
    def by_torch(policy):
        file = io.BytesIO()
        th.save(policy, file)
        file.seek(0)
        return th.load(file, weights_only=False)

    return {"pickle": lambda p: pickle.loads(pickle.dumps(p)), "torch": by_torch,
            "copy": copy.deepcopy}  # fmt: skip


def act(policy):
    """A later step's deterministic action, and one that is drawn."""
    _, state = policy.predict(OBSERVATION, deterministic=True)
    action, _ = policy.predict(OBSERVATION, state, deterministic=True)
    return action, policy.predict(OBSERVATION)[0]


@pytest.mark.parametrize("compile", [False, "auto"])
@pytest.mark.parametrize("dynamics", ["mlp", "ssm"])
@pytest.mark.parametrize("way", round_trips())
def test_copies_of_a_policy_act_and_learn_alike(make_agent, way, dynamics, compile):
    agent = make_agent(dynamics=dynamics, compile=compile)
    agent.learn(24)
    agent.predict(OBSERVATION)  # so that there is something captured
    copied = round_trips()[way](agent.policy)
    before = {k: v.clone() for k, v in agent.policy.state_dict().items()}
    assert all(th.equal(v, before[k]) for k, v in copied.state_dict().items())
    for ours, theirs in zip(act(copied), act(agent.policy), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    twin = copy.deepcopy(agent)
    twin.policy = copied
    twin.train(3, 8)
    assert all(th.equal(v, before[k]) for k, v in agent.policy.state_dict().items())
    agent.train(3, 8)
    for (name, one), other in zip(
        agent.policy.named_parameters(), copied.parameters(), strict=True
    ):
        assert th.equal(one, other), name
        assert not th.equal(one, before[name]), name


@pytest.mark.slow
def test_a_policy_as_the_argument_of_other_processes(make_agent):
    agent = make_agent()
    expected = agent.policy.predict(OBSERVATION, deterministic=True)[0]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_predict, (agent.policy,))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_policy_as_the_argument_of_one_process(make_agent, method):
    """Its tensors go there through shared memory, which must outlive the pickling."""
    agent = make_agent()
    expected = agent.policy.predict(OBSERVATION, deterministic=True)[0]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_put_prediction, args=(agent.policy, queue))
    process.start()
    np.testing.assert_allclose(queue.get(timeout=60), expected, atol=1e-6)
    process.join(60)
    assert process.exitcode == 0


def _put_prediction(policy, queue):
    queue.put(_predict(policy))


def _predict(policy):
    return policy.predict(np.array([0.1, 0.2, 0.3], np.float32), deterministic=True)[0]
