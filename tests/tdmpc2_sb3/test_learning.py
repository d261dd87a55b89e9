"""Learning as SB3's users do it: how much, how often, interrupted, observed and repeated."""

from __future__ import annotations

import csv
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from tdmpc2_sb3 import SequenceReplayBuffer
from tdmpc2_sb3.kernels.products import MIN_ROWS, usable_product
from tdmpc2_sb3.losses import TERMS


def weights(agent):
    return {name: value.clone() for name, value in agent.policy.state_dict().items()}


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not th.equal(one[name], other[name])]
    assert not different, different


class Recording(SequenceReplayBuffer):
    """Remembers the observations and actions it is given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.added = []

    def add(self, obs, next_obs, action, reward, done, infos):
        self.added.append((np.array(obs), np.array(action)))
        super().add(obs, next_obs, action, reward, done, infos)


class Count(BaseCallback):
    """Counts what happens; stops learning after ``stop_after`` calls."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.stop_after = stop_after
        self.starts = self.ends = 0

    def _on_rollout_start(self):
        self.starts += 1

    def _on_rollout_end(self):
        self.ends += 1

    def _on_step(self):
        assert self.locals["new_obs"] is not None
        return self.n_calls != self.stop_after


def vec_point_env(point_env, n_envs=1, **kwargs):
    return DummyVecEnv([lambda: Monitor(point_env(**kwargs)) for _ in range(n_envs)])


# -- how much ------------------------------------------------------------------------------------


def test_as_many_gradient_steps_as_agent_steps(make_agent):
    agent = make_agent(learning_starts=20)
    agent.learn(20)
    assert agent._n_updates == 20  # the burst for the random steps
    agent.learn(15, reset_num_timesteps=False)
    assert agent._n_updates == 35
    assert agent.num_timesteps == 35
    agent.learn(10)  # counters start anew; neither random steps nor burst are repeated
    assert agent.num_timesteps == 10
    assert agent._n_updates == 45
    assert agent.replay_buffer.num_steps == 45


@pytest.mark.parametrize(
    ("settings", "n_envs", "steps", "updates"),
    [
        ({"gradient_steps": -1}, 1, 40, 40),
        ({"gradient_steps": -1}, 4, 40, 40),
        ({"gradient_steps": 2}, 1, 30, 40),  # one for each random step, then two
        ({"gradient_steps": 1}, 4, 40, 10),
        ({"train_freq": 5}, 1, 40, 8),
        ({"train_freq": (5, "step"), "gradient_steps": 3}, 1, 40, 24),
        ({"train_freq": (2, "episode"), "gradient_steps": 4}, 1, 60, 12),
        ({"train_freq": (1, "episode"), "gradient_steps": -1}, 1, 40, 40),
        ({"initial_gradient_steps": 3}, 1, 30, 13),
        ({"initial_gradient_steps": 0}, 1, 30, 11),
        ({"gradient_steps": 0}, 1, 30, 0),
    ],
)
def test_update_ratio(make_agent, point_env, settings, n_envs, steps, updates):
    env = vec_point_env(point_env, n_envs, limit=10)
    agent = make_agent(env, learning_starts=20, **settings)
    agent.learn(steps)
    assert (agent.num_timesteps, agent._n_updates) == (steps, updates)


def test_the_policy_prior_steps_at_every_policy_delayth_update(make_agent, point_env):
    agent = make_agent(point_env(limit=10), learning_starts=20, policy_delay=3)
    agent.learn(30)
    optimizers = agent.policy.model_optimizer, agent.policy.prior_optimizer
    steps = [int(next(iter(each.state.values()))["step"]) for each in optimizers]
    assert steps == [agent._n_updates, agent._n_updates // 3] == [30, 10]


def test_the_first_steps_are_uniform_over_the_action_space(make_agent, point_env):
    env = point_env(bounds=(-1.0, 3.0), limit=1000)
    agent = make_agent(env, learning_starts=400)
    agent.learn(400 - 1)
    assert agent._n_updates == 0
    actions = agent.replay_buffer.actions[:399]  # stored in [-1, 1]
    counts, _ = np.histogram(actions, bins=10, range=(-1, 1))
    assert counts.sum() == actions.size
    assert np.abs(counts / actions.size - 0.1).max() < 0.05
    expected = agent.action_space.__class__(-1.0, 3.0, (2,))
    expected.seed(0)
    np.testing.assert_allclose(actions[0], (expected.sample() + 1) / 2 - 1, atol=1e-6)


def test_environments_get_actions_within_their_bounds(make_agent, point_env):
    class Watched(point_env):
        seen = []

        def step(self, action):
            self.seen.append(np.array(action))
            return super().step(action)

    agent = make_agent(
        Watched(bounds=(-0.5, 4.0), limit=20), learning_starts=10, replay_buffer_class=Recording
    )
    agent.learn(40)
    seen = np.stack(Watched.seen)
    assert seen.min() >= -0.5
    assert seen.max() <= 4.0
    scaled = (seen + 0.5) / 4.5 * 2 - 1  # what the world model learns from
    stored = np.concatenate([action for _, action in agent.replay_buffer.added])
    np.testing.assert_allclose(stored, scaled, atol=1e-5)


def test_only_terminations_are_stored_as_such(make_agent, point_env):
    agent = make_agent(point_env(limit=8, edge=0.5), learning_starts=200, horizon=1)
    agent.learn(199)
    assert agent.episodic is True
    batch = agent.replay_buffer.sample(500)
    beyond = batch.observations[1, :, 0].abs() > 0.5
    truncated = (batch.observations[1, :, 2] == 1.0) & ~beyond  # the clock has run out
    assert th.equal(batch.terminations[0] == 1.0, beyond)
    assert beyond.any()
    assert truncated.any()


@pytest.mark.parametrize(
    ("name", "falls"),
    [  # the tasks' own rules, by their observations (Gymnasium's documentation of each)
        ("InvertedPendulum-v5", lambda o: o[:, 1].abs() > 0.2),
        ("Hopper-v5", lambda o: (o[:, 0] <= 0.7) | (o[:, 1].abs() >= 0.2)),
        ("Walker2d-v5", lambda o: (o[:, 0] <= 0.8) | (o[:, 0] >= 2.0) | (o[:, 1].abs() >= 1.0)),
    ],
)
def test_gymnasiums_bodies_terminate_where_they_fall_alone(make_agent, name, falls):
    env = gym.make(name, max_episode_steps=6 if name == "InvertedPendulum-v5" else 12)
    agent = make_agent(env, learning_starts=3000, horizon=1, buffer_size=3000)
    assert agent.episodic is True
    assert agent.gamma <= 0.99
    agent.learn(1500)
    batch = agent.replay_buffer.sample(3000)
    fallen = falls(batch.observations[1])
    assert th.equal(batch.terminations[0] == 1.0, fallen)
    assert fallen.any()
    rings = agent.replay_buffer.rings
    ends = np.flatnonzero(~rings.is_step(np.arange(1500)))  # last rows of episodes
    assert 0 < rings.terminated(ends - 1).sum() < len(ends)  # the others ran out of time


# -- repeated ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["MlpPolicy", "SSMPolicy"])
def test_two_seeded_runs_are_the_same_bit_for_bit(make_agent, point_env, policy):
    runs = []
    for seed in (5, 5, 6):
        env = vec_point_env(point_env, 2, limit=7, edge=0.6)
        agent = make_agent(env, policy, seed=seed, gradient_steps=-1)
        agent.learn(40)
        runs.append(weights(agent))
        th.randn(3), np.random.rand(3)  # noqa: NPY002  # whatever else draws numbers
    assert_same_weights(runs[0], runs[1])
    name = "world_model.encoder.state.net.0.weight"
    assert not th.equal(runs[0][name], runs[2][name])


def test_set_random_seed_starts_every_stream_anew(make_agent, point_env):
    runs = []
    for _ in range(2):
        agent = make_agent(vec_point_env(point_env), seed=None, learning_starts=4)
        with th.no_grad():
            for parameter in agent.policy.parameters():
                parameter.zero_()  # the weights were drawn before
        agent.set_random_seed(3)
        agent.learn(25)
        runs.append(weights(agent))
    assert_same_weights(*runs)


@pytest.mark.parametrize("deterministic", [True, False])
def test_evaluating_does_not_change_training(make_agent, point_env, deterministic):
    runs = []
    for evaluate in (False, True):
        agent = make_agent(vec_point_env(point_env, limit=7))
        callback = None
        if evaluate:
            callback = EvalCallback(
                vec_point_env(point_env, 3),
                eval_freq=9,
                n_eval_episodes=4,
                deterministic=deterministic,
                verbose=0,
            )
        agent.learn(40, callback)
        runs.append(weights(agent))
    assert callback.n_calls == 40
    assert callback.last_mean_reward != 0.0
    assert_same_weights(*runs)


def test_several_evaluation_environments_give_the_returns_of_one(make_agent, point_env):
    agent = make_agent()
    agent.learn(30)

    class SeededReset(point_env):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=4)

    one, many = (
        evaluate_policy(
            agent,
            DummyVecEnv([lambda: Monitor(SeededReset())] * n_envs),
            n_eval_episodes=4,
            return_episode_rewards=True,
        )[0]
        for n_envs in (1, 4)
    )
    np.testing.assert_allclose(one, many, atol=1e-4)
    assert np.ptp(one) < 1e-6  # the same start and a deterministic agent: the same return


def test_a_plan_is_the_same_alone_and_among_others(make_agent):
    """Bit for bit where the kernels multiply: a rounding could make another sample an elite."""
    agent = make_agent()
    agent.learn(30)
    shape = (4, *agent.observation_space.shape)
    observations = np.random.default_rng(0).uniform(-1.0, 1.0, shape).astype(np.float32)
    starts = np.ones(4, dtype=bool)
    together, _ = agent.predict(observations, None, starts, deterministic=True)
    alone = [
        agent.predict(observations[i : i + 1], None, starts[:1], deterministic=True)[0][0]
        for i in range(4)
    ]
    tolerance = 0.0 if usable_product(MIN_ROWS, 16) else 1e-4
    np.testing.assert_allclose(alone, together, rtol=0.0, atol=tolerance)


def test_evaluation_threads_the_plan(make_agent, point_env):
    agent = make_agent()
    agent.learn(30)
    env = point_env()
    (expected,), _ = evaluate_policy(
        agent, Monitor(point_env()), n_eval_episodes=1, return_episode_rewards=True
    )
    # The same by hand: SB3's Monitor resets without a seed, so take its environment's start.
    starts = []

    class Recorder(point_env):
        def reset(self, *, seed=None, options=None):
            result = super().reset(seed=seed, options=options)
            starts.append(self.position)
            return result

    returns, _ = evaluate_policy(
        agent, Monitor(Recorder()), n_eval_episodes=1, return_episode_rewards=True
    )
    env.reset()
    env.position = starts[0]
    observation, state, total, start = env._observe(), None, 0.0, np.ones(1, dtype=bool)
    for _ in range(10):
        action, state = agent.predict(observation[None], state, start, deterministic=True)
        observation, reward, _, _, _ = env.step(action[0])
        total += reward
        start = np.zeros(1, dtype=bool)
    assert returns[0] == pytest.approx(total, abs=1e-5)
    assert np.isfinite(expected)


# -- interrupted and continued -------------------------------------------------------------------


def test_a_callback_may_stop_in_mid_rollout_and_learning_goes_on(make_agent, point_env):
    def agent():
        return make_agent(vec_point_env(point_env, limit=7), train_freq=6, learning_starts=12)

    stopped = agent()
    first = Count(stop_after=15)  # three steps into the third rollout
    stopped.learn(36, first)
    assert (first.n_calls, first.starts, first.ends) == (15, 3, 2)
    assert stopped.num_timesteps == 15
    assert stopped.replay_buffer.num_steps == 15  # the step that stopped is stored
    second = Count()
    stopped.learn(36 - 15, second, reset_num_timesteps=False)
    whole = agent()
    whole.learn(36)
    assert stopped.num_timesteps == whole.num_timesteps == 36
    assert stopped._n_updates == whole._n_updates
    assert_same_weights(weights(stopped), weights(whole))


def test_learning_in_two_parts_is_learning_in_one(make_agent, point_env):
    runs = []
    for parts in ((45,), (25, 20)):
        agent = make_agent(vec_point_env(point_env, limit=7))
        for number, part in enumerate(parts):
            agent.learn(part, reset_num_timesteps=number == 0)
        runs.append(weights(agent))
    assert_same_weights(*runs)


def test_callbacks_see_what_sb3s_see(make_agent, point_env):
    seen = []

    class Watch(BaseCallback):
        def _on_step(self):
            seen.append(set(self.locals))
            assert self.locals["dones"].shape == self.locals["rewards"].shape == (2,)
            assert self.num_timesteps == 2 * self.n_calls
            assert len(self.locals["infos"]) == 2
            return True

    agent = make_agent(vec_point_env(point_env, 2), learning_starts=10)
    agent.learn(20, CallbackList([Watch(), Count()]))
    assert len(seen) == 10
    assert {"actions", "rewards", "dones", "infos", "new_obs", "replay_buffer"} <= seen[0]


def test_set_env(make_agent, point_env):
    agent = make_agent(learning_starts=12)
    agent.learn(25)
    env = vec_point_env(point_env, limit=4)
    agent.set_env(env)
    agent.learn(12, reset_num_timesteps=False)
    assert agent.num_timesteps == 37
    assert agent._n_updates == 37
    assert agent.ep_info_buffer[-1]["l"] == 4
    with pytest.raises(ValueError, match=r"[Oo]bservation spaces do not match"):
        agent.set_env(vec_point_env(point_env, kind="matrix"))
    with pytest.raises((ValueError, AssertionError), match="number of environments"):
        agent.set_env(vec_point_env(point_env, 3))


# -- settings of SB3 -----------------------------------------------------------------------------


def test_learning_rate_schedules(make_agent):
    agent = make_agent(learning_rate=LinearSchedule(1e-3, 0.0, 1.0), enc_lr_scale=0.3)
    assert agent.policy.model_optimizer.param_groups[1]["lr"] == pytest.approx(1e-3)
    agent.learn(40)
    progress = agent._current_progress_remaining
    assert progress == pytest.approx(0.0)
    rates = [group["lr"] for group in agent.policy.model_optimizer.param_groups]
    assert rates == pytest.approx([0.0, 0.0])
    halfway = make_agent(learning_rate=lambda remaining: 1e-3 * remaining)
    halfway.learn(40, Count(stop_after=30))
    # The last update before the stop was made after step 29.
    rate = 1e-3 * (1 - 29 / 40)
    groups = halfway.policy.model_optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.3 * rate, rate])
    assert halfway.policy.prior_optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_parameters_can_be_taken_out_and_put_in(make_agent):
    trained, other = make_agent(), make_agent(seed=9)
    trained.learn(30)
    parameters = trained.get_parameters()
    assert set(parameters) == {"policy", "policy.model_optimizer", "policy.prior_optimizer"}
    other.set_parameters(parameters)
    assert_same_weights(weights(trained), weights(other))
    observation = np.array([0.1, 0.01, 0.2], np.float32)
    np.testing.assert_array_equal(
        trained.predict(observation, deterministic=True)[0],
        other.predict(observation, deterministic=True)[0],
    )
    steps = [
        next(iter(agent.policy.model_optimizer.state.values()))["step"]
        for agent in (trained, other)
    ]
    assert steps[0] == steps[1] == 30
    with pytest.raises(ValueError, match="Names of parameters do not match"):
        other.set_parameters({"policy": parameters["policy"]})


def test_observations_and_rewards_are_normalised(make_agent, point_env):
    env = VecNormalize(vec_point_env(point_env, limit=7), gamma=0.97)
    agent = make_agent(env, learning_starts=15)
    agent.learn(45)
    buffer = agent.replay_buffer
    buffer.seed(1)
    plain = buffer.sample(6)
    clock = plain.observations[..., 2] * 7
    np.testing.assert_allclose(clock, clock.round(), atol=1e-5)  # stored as they are ...
    buffer.seed(1)
    normalised = buffer.sample(6, env=env)
    expected = env.normalize_obs(plain.observations.numpy())  # ... and normalised when sampled
    np.testing.assert_allclose(normalised.observations.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(
        normalised.rewards.numpy(), env.normalize_reward(plain.rewards.numpy()), atol=1e-5
    )
    assert (plain.observations - normalised.observations).abs().max() > 0.1
    mean, _ = evaluate_policy(agent, env, n_eval_episodes=2, warn=False)
    assert np.isfinite(mean)


def test_statistics_window(make_agent, point_env):
    agent = make_agent(vec_point_env(point_env, limit=4), stats_window_size=3, learning_starts=60)
    agent.learn(40)
    assert agent._episode_num == 10
    assert len(agent.ep_info_buffer) == 3


def test_use_planner_can_be_switched_at_any_time(make_agent):
    agent = make_agent()
    agent.learn(30)
    observation = np.array([0.1, 0.01, 0.2], np.float32)
    planned, state = agent.predict(observation, deterministic=True)
    assert state is not None
    agent.use_planner = False
    acted, none = agent.predict(observation, deterministic=True)
    assert none is None
    mean = agent.policy.world_model.policy_action(
        agent.policy.world_model.encode(th.as_tensor(observation)[None]), None
    )
    np.testing.assert_allclose(acted, mean[0].detach().numpy(), atol=1e-6)
    assert np.abs(acted - planned).max() > 1e-4
    agent.learn(10, reset_num_timesteps=False)
    assert agent._plan_mean is None  # no stale plan to start from
    agent.use_planner = True
    agent.learn(10, reset_num_timesteps=False)
    assert agent._n_updates == 50


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("image", "CnnPolicy"), ("dict", "MultiInputPolicy"), ("matrix", "MlpPolicy")],
)
def test_every_kind_of_observation(make_agent, point_env, kind, policy):
    agent = make_agent(
        vec_point_env(point_env, 2, kind=kind, edge=0.7),
        policy,
        batch_size=4,
        learning_starts=12,
        initial_gradient_steps=2,
    )
    before = weights(agent)
    agent.learn(20)
    assert agent._n_updates == 6
    after = weights(agent)
    still = [name for name in before if th.equal(before[name], after[name]) and name != "scale"]
    assert not still, still  # every network of every part has learnt
    assert all(value.isfinite().all() for value in after.values())
    batch = agent.replay_buffer.sample(3)
    if kind == "image":
        assert batch.observations.dtype == th.uint8
        assert batch.observations.shape == (4, 3, 3, 64, 64)


# -- what is logged ------------------------------------------------------------------------------

TRAIN = {
    "train/loss",
    "train/consistency_loss",
    "train/reward_loss",
    "train/value_loss",
    "train/grad_norm",
    "train/policy_loss",
    "train/policy_entropy",
    "train/policy_scaled_entropy",
    "train/policy_grad_norm",
    "train/q_scale",
    "train/learning_rate",
    "train/n_updates",
}
PLANNER = {
    "planner/value",
    "planner/elite_value_std",
    "planner/effective_samples",
    "planner/std",
    "planner/last_mean_change",
    "planner/plan_change",
}
ROLLOUT = {
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    "time/episodes",
    "time/fps",
    "time/time_elapsed",
    "time/total_timesteps",
}


@pytest.mark.parametrize("episodic", [False, True])
def test_what_is_logged(make_agent, point_env, tmp_path, episodic):
    agent = make_agent(vec_point_env(point_env, limit=6), episodic=episodic)
    agent.set_logger(configure(str(tmp_path), ["csv"]))
    agent.learn(48, log_interval=2)
    with open(tmp_path / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[-1]) >= TRAIN | PLANNER | ROLLOUT
    assert ("train/termination_loss" in rows[-1]) is episodic
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert "`train/<term>_loss`" in documented  # what the function of a further term says
    further = {f"train/{name}_loss" for name in [*TERMS][4:] if TERMS[name].__doc__}
    logged = rows[-1].keys() - further
    assert [name for name in logged if f"`{name}`" not in documented] == []
    last = {name: float(value) for name, value in rows[-1].items()}
    assert last["time/total_timesteps"] == 48
    assert last["time/episodes"] == 8
    assert last["train/n_updates"] == 48 - 1  # written before that step's update
    assert last["rollout/ep_len_mean"] == 6
    assert 0.05 <= last["planner/std"] <= 2.0
    assert 1.0 <= last["planner/effective_samples"] <= 8.0
    assert last["train/learning_rate"] == pytest.approx(3e-4)
    assert last["train/q_scale"] >= 1.0


# -- faults --------------------------------------------------------------------------------------


class Breaking(gym.Wrapper):
    """Returns something that is not finite at a certain step."""

    def __init__(self, env, at, what, value):
        super().__init__(env)
        self.count, self.at, self.what, self.value = 0, at, what, value

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.count += 1
        if self.count == self.at:
            if self.what == "reward":
                reward = self.value
            else:
                observation = np.full_like(observation, self.value)
        return observation, reward, terminated, truncated, info


@pytest.mark.parametrize("what", ["reward", "observation"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_and_poisons_nothing(make_agent, point_env, what, value):
    agent = make_agent(DummyVecEnv([lambda: Breaking(point_env(), 27, what, value)]))
    with pytest.raises(RuntimeError, match=rf"Step 27: The {what} of environment 0 .* not finite"):
        agent.learn(60)
    assert agent.replay_buffer.num_steps == 26
    assert all(v.isfinite().all() for v in agent.policy.state_dict().values())


def test_a_loss_that_is_not_finite_names_the_gradient_step(make_agent):
    agent = make_agent()
    agent.learn(25)
    with th.no_grad():
        agent.policy.world_model.reward_net[0].weight[0, 0] = float("nan")
    before = weights(agent)
    with pytest.raises(RuntimeError, match=r"Gradient step 26: loss nan, .* not finite"):
        agent.train(gradient_steps=1, batch_size=8)
    after = weights(agent)
    assert [n for n in before if not th.equal(before[n].nan_to_num(), after[n].nan_to_num())] == []


def test_episodes_shorter_than_the_horizon_are_named(make_agent, point_env):
    agent = make_agent(point_env(limit=2), horizon=3, learning_starts=12)
    with pytest.raises(RuntimeError, match=r"no sub-sequence of horizon 3 steps .* has 2\)"):
        agent.learn(40)


# -- does it learn? ------------------------------------------------------------------------------


def mean_return(agent, env, episodes=5, deterministic=True):
    return evaluate_policy(agent, env, episodes, deterministic, warn=False)[0]


def test_it_learns_to_stand_at_a_point(make_agent, point_env):
    # Standing at 0.5 earns 1 a step; from around 0 the best return is about 18.8 of 20 steps.
    settings = {"limit": 20}
    agent = make_agent(
        vec_point_env(point_env, **settings),
        learning_starts=150,
        learning_rate=1e-3,
        batch_size=32,
        num_samples=64,
        gamma=0.95,
        seed=1,
    )
    env = vec_point_env(point_env, **settings)
    env.seed(100)
    # Deterministic, an untrained agent would repeat one sequence of random actions, lucky or not.
    untrained = mean_return(agent, env, deterministic=False)  # 7 to 12 with three seeds
    agent.learn(350)
    assert untrained < 13 < 15 < mean_return(agent, env)  # 16 to 19 with three seeds
