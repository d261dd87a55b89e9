"""The stability measures against hand-worked numbers, step-by-step loops and the real simulator."""

from __future__ import annotations

import csv
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th

import dmc_gym_plugin  # noqa: F401
from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.stability import metrics, simulation
from tdmpc2_sb3.stability.__main__ import main, parse_env_kwargs
from tdmpc2_sb3.stability.agent import PlanningAgent
from tdmpc2_sb3.stability.recording import Episode, Probe, RecordingConfig, record_episodes
from tdmpc2_sb3.stability.study import Measurement, bootstrap_interval, default_label, estimate
from tdmpc2_sb3.zoo.algorithms import zoo_env_kwargs

ENV_ID = "DMC/pendulum-swingup-v0"
SIZES = {
    "latent_dim": 16, "mlp_dim": 24, "enc_dim": 16, "num_q": 2, "num_samples": 12, "num_elites": 4,
    "num_pi_trajs": 2, "num_iterations": 2, "compile": False, "device": "cpu",
}  # fmt: skip


def make_env() -> gym.Env:
    return gym.make(ENV_ID, action_repeat=2)


def make_agent(policy: str, seed: int = 0, horizon: int = 3) -> TDMPC2:
    agent = TDMPC2(policy, make_env(), seed=seed, horizon=horizon, **SIZES)
    with th.no_grad():  # heads that start at zero would make every value zero
        for parameter in agent.policy.world_model.parameters():
            parameter.add_(0.1 * th.randn_like(parameter))
    return agent


@pytest.fixture(scope="module")
def agent() -> TDMPC2:
    return make_agent("SSMPolicy")


@pytest.fixture(scope="module")
def episode(agent: TDMPC2) -> Episode:
    config = RecordingConfig(episodes=1, seed=3, max_steps=30, probe_every=10, candidates=4)
    (recorded,) = record_episodes(agent, make_env(), config)
    return recorded


# -- arithmetic --------------------------------------------------------------------------------


def test_spearman_equals_scipy_s_with_ties() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, 40).astype(float), rng.normal(size=40)
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert metrics.spearman(np.array([1.0, 2, 3]), np.array([10.0, 100, 1000])) == 1.0
    assert np.isnan(metrics.spearman(np.ones(5), np.arange(5.0)))


def test_kl_equals_torch_s() -> None:
    rng = np.random.default_rng(0)
    mean, other_mean = rng.normal(size=(2, 7))
    std, other_std = rng.uniform(0.1, 2, size=(2, 7))
    normal = th.distributions.Normal
    expected = th.distributions.kl_divergence(
        normal(th.tensor(mean), th.tensor(std)), normal(th.tensor(other_mean), th.tensor(other_std))
    )
    np.testing.assert_allclose(
        metrics.gaussian_kl(mean, std, other_mean, other_std), expected.numpy(), rtol=1e-12
    )


def test_jerk_of_a_cubic() -> None:
    t = np.arange(10.0)
    # The third difference of t^3 is 6 and of t^2 is 0: (36 + 0) / 2 dimensions.
    assert metrics.action_jerk(np.stack([t**3, t**2], axis=1)) == pytest.approx(18.0)
    assert np.isnan(metrics.action_jerk(np.zeros((3, 2))))


def test_realised_returns() -> None:
    returns = metrics.realised_returns([1.0, 2.0, 3.0], gamma=0.5, tail=8.0)
    np.testing.assert_allclose(returns, [1 + 1 + 0.75 + 1, 2 + 1.5 + 2, 3 + 4])


def test_growth_rate_of_an_exponential() -> None:
    assert metrics.growth_rate(0.01 * np.exp(0.3 * np.arange(1, 21))) == pytest.approx(0.3)


def test_linear_probe_finds_a_linear_map() -> None:
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(500, 5))
    observations = latents @ rng.normal(size=(5, 3)) + [1.0, 20.0, -3.0]
    probe = metrics.fit_probe(latents, observations, ridge=1e-9)
    assert probe.error(latents, observations).max() < 1e-10
    # Reading every entry one standard deviation too high is an error of 1.
    assert probe.error(latents, observations - probe.scale) == pytest.approx(np.ones(500))


def test_plan_changes_of_known_plans() -> None:
    """A plan kept exactly changes by nothing; one that moves by 0.5 changes by 0.25."""
    made = Episode()
    base = np.arange(8.0).reshape(4, 2) / 10
    for t in range(4):
        made.plan_means.append(np.roll(base, -t, axis=0) + 0.5 * t)
        made.plan_stds.append(np.full((4, 2), 0.5))
    made.probes.append(Probe(1, (made.plan_means[1] + 0.1, made.plan_stds[1]), None))
    result = metrics.plan_changes(made)
    assert result["plan_change"] == pytest.approx(0.25)
    assert result["plan_change_kl"] == pytest.approx(0.5 * 0.25 / 0.25)
    assert result["plan_change_floor"] == pytest.approx(0.01)
    assert result["plan_change_kl_floor"] == pytest.approx(0.5 * 0.01 / 0.25)


def test_intervals() -> None:
    rng = np.random.default_rng(0)
    agents = [rng.normal(5.0, 1.0, size=(200, 1)) for _ in range(3)]
    mean, low, high = bootstrap_interval(agents)
    pooled = np.concatenate(agents)
    assert mean[0] == pytest.approx(pooled.mean())
    # Agents alike: about +-1.96 standard errors of 600 values, a little more for the agents.
    assert 0.06 < (high - low)[0] / 2 < 0.16
    apart = [np.full((5, 1), 1.0), np.full((5, 1), 3.0)]
    assert [bound[0] for bound in bootstrap_interval(apart)] == [2.0, 1.0, 3.0]


def test_estimates_leave_out_what_is_not_finite() -> None:
    rows = [
        Measurement("a", "1", i, "m", np.array([value]), None)
        for i, value in enumerate([1.0, np.nan, 3.0])
    ]
    (row,) = estimate(rows)
    assert (row.arm, row.metric, row.k, row.mean, row.agents, row.episodes) == (
        "a", "m", None, 2.0, 1, 2,
    )  # fmt: skip


# -- the real model and simulator --------------------------------------------------------------


def test_open_loop_prediction_equals_single_steps(agent: TDMPC2, episode: Episode) -> None:
    planner = PlanningAgent(agent, 0)
    rollouts = metrics.open_loop(planner, episode, max_lag=6)
    assert rollouts.predicted.shape == (6, 25, 16)
    model, start = planner.model, 7
    with th.no_grad():
        z = planner.encode(np.stack(episode.observations))[start]
        state = model.dynamics.initial_state(z)
        errors, rewards = [], []
        for k in range(6):
            action = th.tensor(episode.actions[start + k])
            rewards.append(abs(model.reward(z, action).item() - episode.rewards[start + k]))
            z, state = model.dynamics.step(state, action)
            np.testing.assert_allclose(rollouts.predicted[k, start], z.numpy(), atol=1e-5)
            errors.append(np.square(z.numpy() - rollouts.latents[start + k + 1]).sum())
    one = metrics.Rollouts(
        rollouts.latents[start:], rollouts.predicted[:, start : start + 1], rollouts.reward_error
    )
    np.testing.assert_allclose(metrics.latent_error(one, 2.0), np.array(errors) / 2, rtol=1e-3)
    assert rollouts.reward_error.shape == (6,)
    assert min(rewards) >= 0


def test_predicted_returns_equal_single_steps(agent: TDMPC2, episode: Episode) -> None:
    planner = PlanningAgent(agent, 0)
    model, gamma = planner.model, planner.policy.planner.gamma
    latent = planner.encode(episode.observations[4])
    sequences = 2 * th.rand(5, 3, 1) - 1
    rewards, values = simulation.predicted_returns(planner, latent, sequences)
    with th.no_grad():
        for row, sequence in enumerate(sequences):
            z, state, total = latent[0], model.dynamics.initial_state(latent[0]), 0.0
            for k, action in enumerate(sequence):
                total += gamma**k * model.reward(z, action).item()
                z, state = model.dynamics.step(state, action)
            assert rewards[row] == pytest.approx(total, abs=1e-4)
            tail = model.q_values(z, model.policy_action(z, None)).mean().item()
            assert values[row] == pytest.approx(total + gamma**3 * tail, abs=1e-4)


def test_plans_are_executed_in_the_simulator_which_is_left_as_it_was(agent: TDMPC2) -> None:
    env, planner = make_env(), PlanningAgent(agent, 0)
    gamma = planner.policy.planner.gamma
    env.reset(seed=11)
    for _ in range(5):
        env.step(np.array([0.7], dtype=np.float32))
    sequences = 2 * th.rand(4, 3, 1) - 1
    rewards, last, alive = simulation.simulate(planner, env, sequences)
    after = env.step(np.array([-0.2], dtype=np.float32))
    for row, sequence in enumerate(sequences):
        other = make_env()
        other.reset(seed=11)
        for _ in range(5):
            other.step(np.array([0.7], dtype=np.float32))
        total = 0.0
        for k, action in enumerate(sequence.numpy()):
            observation, reward, *_ = other.step(action)
            total += gamma**k * float(reward)
        assert rewards[row] == pytest.approx(total, abs=1e-12)
        np.testing.assert_array_equal(last[row], observation)
    assert alive.all()
    untouched = make_env()
    untouched.reset(seed=11)
    for _ in range(5):
        untouched.step(np.array([0.7], dtype=np.float32))
    expected = untouched.step(np.array([-0.2], dtype=np.float32))
    np.testing.assert_array_equal(after[0], expected[0])
    assert after[1] == expected[1]


def test_recording_warm_starts_and_plays_what_was_planned(agent: TDMPC2, episode: Episode) -> None:
    assert len(episode) == 30
    assert len(episode.observations) == 31
    assert [probe.step for probe in episode.probes] == [9, 19, 29]
    assert all(len(p.candidates.planned_rewards) == 5 for p in episode.probes if p.candidates)
    # The same actions in a fresh simulator give the recorded rewards.
    env = make_env()
    env.reset(seed=3)
    for action, reward in zip(episode.actions, episode.rewards, strict=True):
        assert env.step(agent.policy.unscale_action(action))[1] == pytest.approx(reward)
    # The first step is planned as the policy itself plans, from a cold start and the same seed.
    policy = agent.policy
    observation, _ = policy.obs_to_tensor(episode.observations[0])
    cold, void = policy.zero_plan(1), th.ones(1, dtype=th.bool)
    first = policy.plan(observation, cold, void, th.Generator().manual_seed(3), explore=False)
    np.testing.assert_array_equal(first.mean[0].numpy(), episode.plan_means[0])


def test_without_get_state_the_gap_is_left_out() -> None:
    agent = TDMPC2("MlpPolicy", gym.make("Pendulum-v1"), seed=0, **SIZES)
    config = RecordingConfig(episodes=1, max_steps=4, probe_every=2, candidates=2)
    (recorded,) = record_episodes(agent, gym.make("Pendulum-v1"), config)
    assert [probe.candidates for probe in recorded.probes] == [None, None]
    assert metrics.realisation_gap(recorded) == {}


def test_labels_and_settings() -> None:
    assert default_label(make_agent("SSMPolicy", horizon=5)) == "ssm, H = 5"
    assert zoo_env_kwargs("DMC/walker-walk-v0") == {"action_repeat": 2}
    assert zoo_env_kwargs("Nowhere-v0") == {}
    assert parse_env_kwargs(["action_repeat:4", "observation:'dict'"]) == {
        "action_repeat": 4, "observation": "dict",
    }  # fmt: skip


# -- the command -------------------------------------------------------------------------------


def test_command_writes_tables_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--env", ENV_ID, "--episodes", "2", "--max-steps", "24", "--lag", "5"]
    arguments += ["--probe-every", "12", "--candidates", "3", "--device", "cpu"]
    for policy, seed in (("MlpPolicy", 0), ("MlpPolicy", 1), ("SSMPolicy", 0)):
        path = tmp_path / f"{policy}{seed}.zip"
        make_agent(policy, seed).save(path)
        arguments += ["--model", str(path)]
    main([*arguments, "-o", str(tmp_path / "out")])
    table = capsys.readouterr().out
    assert "mlp, H = 3" in table
    assert "realisation gap" in table
    with (tmp_path / "out" / "stability.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows} == {"mlp, H = 3", "ssm, H = 3"}
    latent = [row for row in rows if row["metric"] == "latent_error"]
    assert [int(row["k"]) for row in latent] == 2 * [1, 2, 3, 4, 5]
    # Predictions of every agent on the episodes of all three; its own episodes for the rest.
    assert {(row["arm"], row["agents"], row["episodes"]) for row in latent} == {
        ("mlp, H = 3", "2", "12"), ("ssm, H = 3", "1", "6"),
    }  # fmt: skip
    by_metric = {row["metric"]: row for row in rows if row["arm"] == "mlp, H = 3"}
    assert by_metric["plan_change"]["episodes"] == "4"
    assert set(by_metric) >= {
        "reward_error", "probe_error", "latent_error_growth", "plan_change_floor",
        "plan_change_kl", "plan_change_kl_floor", "elite_spread", "effective_samples",
        "mean_change", "value_bias", "realisation_gap", "rank_correlation", "action_jerk",
        "latency_ms_median", "latency_ms_p95",
    }  # fmt: skip
    for row in rows:
        assert float(row["low"]) <= float(row["mean"]) + 1e-9
        assert float(row["mean"]) <= float(row["high"]) + 1e-9
    assert (tmp_path / "out" / "stability.png").read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "out" / "stability_episodes.csv").open() as file:
        single = [row for row in csv.DictReader(file) if row["metric"] == "plan_change"]
    ours = [float(row["value"]) for row in single if row["arm"] == "mlp, H = 3"]
    assert float(by_metric["plan_change"]["mean"]) == pytest.approx(np.mean(ours))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--env-kwargs", "action_repeat=2"], "is not key:value"),
        (["--episodes", "0"], "episodes is 0"),
        (["--lag", "0"], "--lag is 0"),
        (["--label", "a", "--label", "b"], "2 --label for 1 --model"),
        (["--model", "nowhere.zip"], "nowhere.zip"),
    ],
)
def test_bad_arguments_get_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    path = tmp_path / "agent.zip"
    make_agent("MlpPolicy").save(path)
    with pytest.raises(SystemExit):
        main(["--env", ENV_ID, "--model", str(path), "--device", "cpu", *extra])
    assert message in capsys.readouterr().err
