"""What SB3's own tests ask of SAC, asked of TDMPC2: callbacks, spaces, vector environments."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from tdmpc2_sb3 import TDMPC2


def vec_point_env(point_env, n_envs=1, **kwargs):
    return DummyVecEnv([lambda: Monitor(point_env(**kwargs)) for _ in range(n_envs)])


def test_all_of_sb3s_callbacks_together(make_agent, point_env, tmp_path):
    agent = make_agent(vec_point_env(point_env, limit=5), tensorboard_log=str(tmp_path / "tb"))
    evaluation = EvalCallback(
        vec_point_env(point_env, limit=5),
        eval_freq=10,
        n_eval_episodes=2,
        best_model_save_path=str(tmp_path / "best"),
        log_path=str(tmp_path / "evaluations"),
        callback_on_new_best=StopTrainingOnRewardThreshold(1e6),
        callback_after_eval=StopTrainingOnNoModelImprovement(100),
        verbose=0,
    )
    counter = EveryNTimesteps(7, CheckpointCallback(1, str(tmp_path), name_prefix="c"))
    callbacks = CallbackList(
        [
            evaluation,
            counter,
            CheckpointCallback(20, str(tmp_path), save_replay_buffer=True, name_prefix="d"),
            LogEveryNTimesteps(10),
            StopTrainingOnMaxEpisodes(7),
        ]
    )
    agent.learn(60, callbacks, progress_bar=True)
    assert agent.num_timesteps == 35  # the seventh episode of five steps
    results = np.load(tmp_path / "evaluations" / "evaluations.npz")
    assert results["timesteps"].tolist() == [10, 20, 30]
    assert results["results"].shape == (3, 2)
    assert (tmp_path / "d_20_steps.zip").exists()
    assert (tmp_path / "d_replay_buffer_20_steps.pkl").exists()
    assert [len(list((tmp_path / "tb").rglob("events*")))] == [1]
    best = TDMPC2.load(tmp_path / "best" / "best_model.zip", device="cpu")
    assert best.predict(np.zeros(3, np.float32))[0].shape == (2,)


def test_evaluation_callback_and_evaluate_policy_agree(make_agent, point_env):
    agent = make_agent()
    agent.learn(30)

    def env():
        env = vec_point_env(point_env, 2)
        env.seed(17)
        return env

    callback = EvalCallback(env(), n_eval_episodes=4, eval_freq=1, verbose=0)
    callback.init_callback(agent)
    callback.on_step()
    mean, _ = evaluate_policy(agent, env(), n_eval_episodes=4)
    assert callback.last_mean_reward == pytest.approx(mean, abs=1e-6)


def test_evaluating_normalised_environments(make_agent, point_env):
    train = VecNormalize(vec_point_env(point_env))
    evaluation = VecNormalize(vec_point_env(point_env), training=False, norm_reward=False)
    agent = make_agent(train)
    agent.learn(30, EvalCallback(evaluation, eval_freq=15, verbose=0))
    assert evaluation.obs_rms.mean == pytest.approx(train.obs_rms.mean)


class Spaces(gym.Env):
    """Random observations of any space; checks that each action is in the action space."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        return self.observation_space.sample(), 1.0, False, self.steps == 6, {}


UNIT = spaces.Box(-1, 1, (2,), np.float32)


@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        (spaces.Box(-1, 1, (3,), np.float64), UNIT),
        (spaces.Box(0, 9, (3,), np.int64), UNIT),
        (spaces.Box(0, 255, (5,), np.uint8), UNIT),
        (spaces.Box(-1, 1, (), np.float32), UNIT),
        (spaces.Box(-1, 1, (2, 3, 2), np.float32), UNIT),
        (spaces.Box(-1, 1, (3,), np.float32), spaces.Box(-5, 10, (2,), np.float64)),
        (spaces.Box(-1, 1, (3,), np.float32), spaces.Box(0, 1e-3, (2, 2), np.float32)),
        (
            spaces.Box(-1, 1, (3,), np.float32),
            spaces.Box(np.array([-1, 0], np.float32), np.array([0, 1e6], np.float32)),
        ),
        (spaces.Dict({"a": spaces.Box(-1, 1, (3,)), "b": spaces.Box(-1, 1, (2, 2))}), UNIT),
    ],
    ids=["float64", "int64", "uint8", "0-d", "3-d", "float64 action", "2-d action", "unequal",
         "dict"],
)  # fmt: skip
def test_spaces(make_agent, observations, actions):
    kind = "MultiInputPolicy" if isinstance(observations, spaces.Dict) else "MlpPolicy"
    agent = make_agent(Spaces(observations, actions), kind, learning_starts=12,
                       initial_gradient_steps=1)  # fmt: skip
    agent.learn(18)
    action, _ = agent.predict(observations.sample())
    assert actions.contains(action)
    assert action.dtype == actions.dtype
    batch = agent.replay_buffer.sample(50).actions
    assert float(batch.abs().max()) <= 1.0 + 1e-6


@pytest.mark.parametrize(
    "vec_env", [DummyVecEnv, pytest.param(SubprocVecEnv, marks=pytest.mark.slow)]
)
def test_vector_environments(make_agent, vec_env):
    env = make_vec_env("Pendulum-v1", n_envs=2, vec_env_cls=vec_env, seed=3)
    agent = make_agent(env, learning_starts=404, initial_gradient_steps=1, gradient_steps=-1)
    agent.learn(408)
    assert agent.num_timesteps == 408
    assert agent._n_updates == 1 + 4
    actions, state = agent.predict(env.reset())
    assert actions.shape == (2, 1)
    assert state[0].shape == (2, 3, 1)
    assert (np.abs(actions) <= 2.0).all()
    env.close()


def test_action_noise(make_agent, point_env):
    agent = make_agent(vec_point_env(point_env, 2), initial_gradient_steps=0, gradient_steps=0)
    agent.action_noise = NormalActionNoise(np.full(2, 100.0), np.zeros(2))
    agent.learn(40)
    later = agent.replay_buffer.sample(100).actions
    assert (later == 1.0).any()  # the noise drives every action to the bound
    assert float(later.max()) == 1.0


def test_without_logging(make_agent, point_env):
    agent = make_agent(vec_point_env(point_env))
    agent.learn(30, log_interval=None)
    assert agent._n_updates == 30


def test_the_monitors_file_tells_the_training_return(make_agent, point_env, tmp_path):
    env = DummyVecEnv([lambda: Monitor(point_env(limit=5), str(tmp_path / "m"))])
    make_agent(env).learn(30)
    env.close()
    rows = (tmp_path / "m.monitor.csv").read_text().splitlines()[2:]
    assert len(rows) == 6
    assert all(row.split(",")[1] == "5" for row in rows)
