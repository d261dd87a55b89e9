"""More of what SB3's own tests ask of SAC: wrappers, images, dictionaries, callbacks, logs."""

from __future__ import annotations

import csv
import time
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecCheckNan,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from tdmpc2_sb3 import TDMPC2

SMALL = {"batch_size": 4, "initial_gradient_steps": 1}


def vec_point_env(point_env, n_envs=1, **kwargs):
    return DummyVecEnv([lambda: Monitor(point_env(**kwargs)) for _ in range(n_envs)])


# -- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("train_freq", ["4", ("1", "episode"), "never", (1, "close"), 1.5])
def test_wrong_update_frequencies(make_agent, train_freq):
    with pytest.raises(ValueError, match=r"train_freq(` must be| is .*: it must be)"):
        make_agent(train_freq=train_freq)


@pytest.mark.parametrize(
    ("policy", "kind", "message"),
    [
        ("MlpPolicy", "dict", "use `MultiInputPolicy`"),
        ("CnnPolicy", "dict", "use `MultiInputPolicy`"),
        ("CnnPolicy", "vector", r"CnnPolicy is for images, .*Box\(-inf.*: use MlpPolicy\."),
        ("MultiInputPolicy", "vector", "MultiInputPolicy is for dictionaries, .*: use MlpPolicy"),
        ("MultiInputPolicy", "image", "MultiInputPolicy is for dictionaries, .*: use CnnPolicy"),
    ],
)
def test_the_wrong_policy_for_an_observation_names_the_right_one(
    make_agent, point_env, policy, kind, message
):
    with pytest.raises(ValueError, match=message):
        make_agent(point_env(kind=kind), policy)


def test_what_cannot_be_learnt_from(make_agent, point_env):
    env = point_env()
    env.observation_space = spaces.Dict({"a": spaces.Dict({"b": spaces.Box(-1, 1, (2,))})})
    with pytest.raises(NotImplementedError, match="Nested"):
        make_agent(env, "MultiInputPolicy")
    with pytest.raises(ValueError, match="HerReplayBuffer: TDMPC2 learns from sub-sequences"):
        make_agent(replay_buffer_class=HerReplayBuffer)


# -- wrappers ------------------------------------------------------------------------------------


def test_monitoring_and_checking_wrappers(make_agent, point_env):
    env = VecMonitor(VecCheckNan(DummyVecEnv([point_env] * 2), raise_exception=True))
    agent = make_agent(env).learn(40)
    assert [int(info["l"]) for info in agent.ep_info_buffer] == [10] * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # monitored already: not wrapped a second time
        mean, _ = evaluate_policy(agent, env, 2)
    assert np.isfinite(mean)


def test_one_entry_of_a_dictionary(make_agent, point_env):
    env = VecExtractDictObs(vec_point_env(point_env, 2, kind="dict"), "vector")
    agent = make_agent(env).learn(30)
    plain = make_agent(vec_point_env(point_env, 2)).learn(30)
    for one, other in zip(
        agent.policy.state_dict().values(), plain.policy.state_dict().values(), strict=True
    ):
        assert th.equal(one, other)


@pytest.mark.parametrize("kind", ["vector", "image", "dict"])
def test_stacked_frames(make_agent, point_env, kind):
    policy = {"vector": "MlpPolicy", "image": "CnnPolicy", "dict": "MultiInputPolicy"}[kind]
    order = {"image": "first", "dict": {"vector": None, "picture": "first", "more": None}}
    env = VecFrameStack(vec_point_env(point_env, 2, kind=kind), 3, order.get(kind))
    agent = make_agent(env, policy, **SMALL).learn(26)
    assert agent._n_updates > 1
    rows = {key: store.rows.shape[1:] for key, store in agent.replay_buffer.stored.storages.items()}
    frame = (3, 64, 64)  # one of three: stored once
    assert (
        rows
        == {
            "vector": {"": (9,)},
            "image": {"": frame},
            "dict": {"vector": (9,), "picture": frame, "more": (9,)},
        }[kind]
    )
    batch = agent.replay_buffer.sample(20).observations
    image = batch if kind == "image" else batch["picture"] if kind == "dict" else None
    if image is not None:
        assert image.shape[2:] == (9, 64, 64)
        # Frame t of one observation is frame t - 1 of the next (the clock stands in its corner).
        clock = image[..., [0, 3, 6], 0, 0].long()
        assert th.equal(clock[:-1, :, 1:], clock[1:, :, :-1])


@pytest.mark.parametrize("channel_last", [True, False])
def test_images_of_other_sizes_with_the_channels_first_or_last(make_agent, tmp_path, channel_last):
    env = FakeImageEnv(
        screen_height=40, screen_width=44, n_channels=1, discrete=False,
        channel_first=not channel_last,
    )  # fmt: skip
    agent = make_agent(env, "CnnPolicy", **SMALL).learn(24)
    assert isinstance(agent.env, VecTransposeImage) is channel_last
    observation, _ = env.reset()
    action, _ = agent.predict(observation, deterministic=True)
    assert env.action_space.contains(action)
    agent.save(tmp_path / "m")
    loaded = TDMPC2.load(tmp_path / "m", env=env)
    np.testing.assert_array_equal(loaded.predict(observation, deterministic=True)[0], action)
    loaded.learn(24)


@pytest.mark.parametrize("channel_last", [True, False])
def test_dictionaries_with_small_pictures_are_stacked_and_evaluated(make_agent, channel_last):
    def make():
        return SimpleMultiObsEnv(
            random_start=True, discrete_actions=False, channel_last=channel_last
        )

    order = {"vec": None, "img": "last" if channel_last else "first"}
    env = VecFrameStack(DummyVecEnv([make]), 3, channels_order=order)
    agent = make_agent(env, "MultiInputPolicy", buffer_size=64, **SMALL).learn(60)
    assert agent._n_updates == 1 + 40
    mean, _ = evaluate_policy(agent, agent.get_env(), 1, warn=False)
    assert np.isfinite(mean)


def test_normalising_some_entries_of_a_dictionary(make_agent, point_env):
    def normalized(training):
        env = vec_point_env(point_env, kind="dict", limit=5)
        return VecNormalize(env, training=training, norm_obs_keys=["vector"])

    train, other = normalized(True), normalized(False)
    agent = make_agent(train, "MultiInputPolicy", **SMALL)
    assert agent.get_vec_normalize_env() is train
    agent.set_env(other)
    assert agent.get_vec_normalize_env() is other
    agent.set_env(train)
    agent.learn(26, EvalCallback(other, eval_freq=13, n_eval_episodes=1, verbose=0))
    assert other.obs_rms["vector"].mean == pytest.approx(train.obs_rms["vector"].mean)
    agent.replay_buffer.seed(0)
    plain = agent.replay_buffer.sample(8).observations
    agent.replay_buffer.seed(0)
    scaled = agent.replay_buffer.sample(8, env=train).observations
    assert th.equal(plain["more"], scaled["more"])
    expected = train.normalize_obs({key: value.numpy() for key, value in plain.items()})
    np.testing.assert_allclose(scaled["vector"].numpy(), expected["vector"], atol=1e-6)


def test_evaluating_in_an_environment_wrapped_otherwise_is_refused(make_agent, point_env):
    agent = make_agent(VecNormalize(vec_point_env(point_env)))
    callback = EvalCallback(vec_point_env(point_env), eval_freq=10, verbose=0)
    with pytest.warns(UserWarning, match="not of the same type"), pytest.raises(
        AssertionError, match="synchronizing normalization"
    ):  # fmt: skip
        agent.learn(20, callback)


# -- equal ways to the same agent ----------------------------------------------------------------


def test_a_dictionary_of_one_vector_is_that_vector(make_agent, point_env):
    class Wrapped(gym.ObservationWrapper):
        def __init__(self, env):
            super().__init__(env)
            self.observation_space = spaces.Dict({"vector": env.observation_space})

        def observation(self, observation):
            return {"vector": observation}

    agents = [
        make_agent(DummyVecEnv([lambda: Monitor(Wrapped(point_env()))]), "MultiInputPolicy"),
        make_agent(vec_point_env(point_env)),
    ]
    observation = np.array([0.1, 0.01, 0.2], np.float32)
    for _ in range(2):  # before and after learning
        actions = [
            agent.predict(given, deterministic=True)[0]
            for agent, given in zip(agents, ({"vector": observation}, observation), strict=True)
        ]
        np.testing.assert_array_equal(*actions)
        for agent in agents:
            agent.learn(30)


def test_a_policy_is_evaluated_like_its_agent(make_agent, point_env):
    agent = make_agent().learn(30)
    returns = []
    for predictor in (agent, agent.policy):
        env = vec_point_env(point_env, 2)
        env.seed(5)
        result, _ = evaluate_policy(predictor, env, 4, return_episode_rewards=True)
        returns.append(result)
    assert returns[0] == returns[1]


def test_dropout_is_for_learning_alone(make_agent):
    agent = make_agent(dropout=0.5).learn(30)
    observation = np.array([0.1, 0.01, 0.2], np.float32)
    actions = []
    for training in (True, False, True):
        agent.policy.set_training_mode(training)
        actions.append(agent.predict(observation, deterministic=True)[0])
    np.testing.assert_array_equal(actions[0], actions[1])
    np.testing.assert_array_equal(actions[0], actions[2])


# -- callbacks and logs --------------------------------------------------------------------------


@pytest.mark.parametrize("no", [False, np.bool_(False), th.tensor(False)], ids=repr)
def test_any_false_value_stops_learning(make_agent, no):
    class Stop(BaseCallback):
        def _on_step(self):
            return no

    callback = Stop()
    agent = make_agent(learning_starts=1).learn(10, callback)
    assert callback.n_calls == agent.num_timesteps == 1


def test_functions_and_lists_are_callbacks_too(make_agent, point_env, tmp_path):
    seen = []
    agent = make_agent(VecNormalize(vec_point_env(point_env)))
    agent.learn(12, lambda local, _: seen.append(local["self"].num_timesteps) or True)
    assert seen == list(range(1, 13))
    checkpoint = CheckpointCallback(
        10, str(tmp_path), save_replay_buffer=True, save_vecnormalize=True
    )
    agent.learn(12, [checkpoint], progress_bar=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rl_model_10_steps.zip",
        "rl_model_replay_buffer_10_steps.pkl",
        "rl_model_vecnormalize_10_steps.pkl",
    ]


class Succeeding(gym.Wrapper):
    """Tells of success at an episode's end, as goal-reaching environments do."""

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            info["is_success"] = bool(self.env.unwrapped.position > 0)
        return observation, reward, terminated, truncated, info


@pytest.mark.parametrize("episodic", [False, True])
def test_the_table_of_log_keys_is_the_log(make_agent, point_env, tmp_path, episodic):
    def env():
        return DummyVecEnv([lambda: Monitor(Succeeding(point_env(limit=6)))])

    agent = make_agent(env(), episodic=episodic)
    agent.set_logger(configure(str(tmp_path), ["csv", "tensorboard"]))
    agent.learn(60, EvalCallback(env(), eval_freq=20, log_path=str(tmp_path), verbose=0))
    with open(tmp_path / "progress.csv") as file:
        logged = set(csv.DictReader(file).fieldnames or ())
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    _, _, table = text.partition("# What is logged")
    table, _, _ = table.partition("\n## ")
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    documented = {key.strip(" `") for cell in cells for key in cell.split(",")}
    only_episodic = {"train/termination_loss"}
    assert logged == documented - (set() if episodic else only_episodic)


def test_evaluations_are_logged_at_their_own_step(make_agent, point_env, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    agent = make_agent(vec_point_env(point_env), tensorboard_log=str(tmp_path))
    agent.learn(60, EvalCallback(vec_point_env(point_env), eval_freq=17, verbose=0))
    events = accumulator.EventAccumulator(str(tmp_path / "TDMPC2_1"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/mean_reward")] == [17, 34, 51]
    names = set(events.Tags()["scalars"])
    assert {"planner/value", "train/q_scale", "rollout/ep_rew_mean", "time/fps"} <= names


def test_speed_is_that_of_this_call(make_agent, point_env, tmp_path):
    agent = make_agent(vec_point_env(point_env))
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.learn(20, log_interval=None)
    agent.learn(10, log_interval=None, reset_num_timesteps=False)
    agent._started = time.monotonic_ns() - 2_000_000_000  # as if those ten had taken two seconds
    agent.dump_logs()
    with open(tmp_path / "progress.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["time/fps"]) == pytest.approx(5, abs=1)
    assert float(row["time/total_timesteps"]) == 30
