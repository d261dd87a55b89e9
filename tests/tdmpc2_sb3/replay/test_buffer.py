"""The replay buffer against an independent plain record of what was put in."""

from __future__ import annotations

import time
import warnings

import gymnasium
import numpy as np
import pytest
import torch as th
from batches import assert_equal_batches
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from tdmpc2_sb3.replay import buffer as sequence_buffer
from tdmpc2_sb3.replay.buffer import SequenceReplayBuffer

ACTIONS = spaces.Box(-1, 1, (2,), np.float32)
VECTORS = spaces.Box(-np.inf, np.inf, (3,), np.float32)


def make(size=1000, n_envs=1, horizon=3, obs_space=VECTORS, **kwargs) -> SequenceReplayBuffer:
    kwargs = {"device": "cpu", "seed": 0, **kwargs}
    return SequenceReplayBuffer(size, obs_space, ACTIONS, n_envs=n_envs, horizon=horizon, **kwargs)


class Record:
    """Feeds a buffer and keeps each environment's list of all rows ever written.

    Every observation is a unique number (its id) in all its coordinates; the reward of the step
    from id x is x / 2, its action (x, -x).
    """

    def __init__(self, buffer: SequenceReplayBuffer) -> None:
        self.buffer = buffer
        self.rows: list[list[dict]] = [[] for _ in range(buffer.n_envs)]
        self.current: list[int | None] = [None] * buffer.n_envs
        self.episode = [0] * buffer.n_envs
        self.finished: set[tuple[int, int]] = set()
        self.counter = 0

    def new_id(self) -> int:
        self.counter += 1
        return self.counter

    def step(self, ends: list[str | None]) -> None:
        """One step of every environment; ends: None, "terminated", "truncated"."""
        obs, next_obs = [], []
        for env, end in enumerate(ends):
            if self.current[env] is None:
                self.current[env] = self.new_id()
                self.rows[env].append(
                    {"id": self.current[env], "episode": self.episode[env], "step": False}
                )
            row = self.rows[env][-1]
            row.update(step=True, terminated=end == "terminated")
            obs.append(self.current[env])
            self.current[env] = self.new_id()
            next_obs.append(self.current[env])
            self.rows[env].append(
                {"id": self.current[env], "episode": self.episode[env], "step": False}
            )
            if end is not None:
                self.close(env)
        column = np.array(obs, dtype=np.float64)[:, None]
        self.buffer.add(
            column * np.ones(3),
            np.array(next_obs, dtype=np.float64)[:, None] * np.ones(3),
            column * [1, -1],
            column[:, 0] / 2,
            np.array([end is not None for end in ends]),
            [{"TimeLimit.truncated": end == "truncated"} for end in ends],
        )

    def close(self, env: int) -> None:
        self.finished.add((env, self.episode[env]))
        self.episode[env] += 1
        self.current[env] = None

    def windows(self, include_open: bool) -> set[tuple[int, ...]]:
        """Ids of every valid sub-sequence: T+1 rows of one episode among the newest R rows.

        With ``past_terminations`` also those that start at a step of an episode that terminated
        and stay at its last row.
        """
        found = set()
        length = self.buffer.horizon + 1
        for env, rows in enumerate(self.rows):
            kept = rows[-self.buffer.buffer_size :]
            for begin in range(len(kept) - length + 1):
                part = kept[begin : begin + length]
                same = len({row["episode"] for row in part}) == 1
                if same and (include_open or (env, part[0]["episode"]) in self.finished):
                    found.add(tuple(row["id"] for row in part))
            for begin, row in enumerate(kept):
                end = begin  # the final row of this row's episode
                while kept[end]["step"] and end + 1 < len(kept):
                    end += 1
                terminated = end > begin and kept[end - 1].get("terminated")
                if self.buffer.past_terminations and terminated and row["step"]:
                    ids = [each["id"] for each in kept[begin : end + 1]]
                    found.add(tuple((ids + ids[-1:] * length)[:length]))
        return found

    def stored_steps(self) -> int:
        return sum(row["step"] for rows in self.rows for row in rows[-self.buffer.buffer_size :])

    def terminated_ids(self) -> set[int]:
        return {row["id"] for rows in self.rows for row in rows if row.get("terminated")}


def sampled_windows(buffer: SequenceReplayBuffer, number: int) -> list[tuple[int, ...]]:
    ids = buffer.sample(number).observations[..., 0].T.numpy().astype(int)
    return [tuple(row.tolist()) for row in ids]


def feed_random(
    record: Record, steps: int, rng: np.random.Generator, end_probability: float
) -> None:
    for _ in range(steps):
        ends = []
        for _env in range(record.buffer.n_envs):
            ends.append(
                rng.choice(["terminated", "truncated"]) if rng.random() < end_probability else None
            )
        record.step(ends)


@pytest.mark.parametrize(("n_envs", "horizon"), [(1, 1), (1, 3), (3, 2), (3, 5)])
@pytest.mark.parametrize("end_probability", [0.4, 0.1])
@pytest.mark.parametrize("past_terminations", [False, True])
def test_samples_exactly_the_valid_windows_through_wrap_arounds(
    n_envs, horizon, end_probability, past_terminations
):
    rng = np.random.default_rng(horizon)
    buffer = make(
        size=40 * n_envs, n_envs=n_envs, horizon=horizon, past_terminations=past_terminations
    )
    record = Record(buffer)
    for _ in range(25):  # 200 steps a ring of 40 rows: wraps about five times
        feed_random(record, 8, rng, end_probability)
        finished, everything = record.windows(False), record.windows(True)
        expected = finished if len(everything) - len(finished) <= len(finished) else everything
        assert buffer.num_subsequences == len(expected)
        assert buffer.num_steps == record.stored_steps()
        if expected:
            assert set(sampled_windows(buffer, 3000)) == expected


def test_batch_fields_belong_together():
    buffer = make(size=60, n_envs=2, horizon=3)
    record = Record(buffer)
    feed_random(record, 100, np.random.default_rng(0), 0.15)
    batch = buffer.sample(500)
    assert batch.observations.shape == (4, 500, 3)
    assert batch.actions.shape == (3, 500, 2)
    assert batch.rewards.shape == batch.terminations.shape == (3, 500)
    assert batch.valid is None
    assert {tensor.dtype for tensor in batch[:4]} == {th.float32}
    ids = batch.observations[:-1, :, 0]
    assert th.equal(batch.observations, batch.observations[..., :1].expand(-1, -1, 3))
    assert th.equal(batch.actions, th.stack([ids, -ids], -1))
    assert th.equal(batch.rewards, ids / 2)
    terminated = record.terminated_ids()
    expected = [[float(int(i) in terminated) for i in row] for row in ids]
    assert batch.terminations.tolist() == expected
    assert (
        0 < batch.terminations.sum() == batch.terminations[-1].sum()
    )  # only as a sub-sequence's last step


def test_past_a_termination_nothing_is_valid_and_all_is_zero():
    buffer = make(size=20, horizon=3, past_terminations=True)
    record = Record(buffer)
    for _ in range(6):  # wraps, so that final rows hold old actions
        for end in (None, None, None, None, "terminated"):
            record.step([end])
    record.step(["terminated"])  # an episode shorter than the horizon
    last = record.rows[0][-2]["id"]
    batch = buffer.sample(2000)
    ids = batch.observations[..., 0]
    (one,) = th.unique(ids[:, ids[0] == last], dim=1).T
    assert one.tolist() == [last, last + 1, last + 1, last + 1]
    ended = th.zeros(2000)
    for t in range(3):
        assert th.equal(batch.valid[t], 1 - ended)
        assert th.equal(batch.rewards[t], batch.valid[t] * ids[t] / 2)
        action = th.stack([ids[t], -ids[t]], -1)
        assert th.equal(batch.actions[t], batch.valid[t][:, None] * action)
        terminated = th.tensor([float(int(i) in record.terminated_ids()) for i in ids[t]])
        assert th.equal(batch.terminations[t], terminated)
        assert th.equal(ids[t + 1], ids[t] + batch.valid[t])
        ended = ended + terminated


@pytest.mark.parametrize("end_probability", [0.3, 0.02])
def test_every_window_is_equally_likely(end_probability):
    buffer = make(size=60, n_envs=2, horizon=3, sample_open_episodes=True)
    record = Record(buffer)
    feed_random(record, 90, np.random.default_rng(3), end_probability)
    expected = sorted(record.windows(True))
    draws = 400 * len(expected)
    drawn = sampled_windows(buffer, draws)
    counts = np.array([drawn.count(window) for window in expected])
    assert counts.sum() == draws
    chi_square = ((counts - 400) ** 2 / 400).sum()
    freedom = len(expected) - 1
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)  # 5 standard deviations


def test_rare_starts_are_drawn_evenly_too():
    buffer = make(size=400, horizon=8)
    record = Record(buffer)
    for length in [2] * 100 + [10, 2, 9]:  # 5 starts in about 330 rows: below the rejection's limit
        for step in range(length):
            record.step(["truncated" if step == length - 1 else None])
    expected = sorted(record.windows(False))
    assert len(expected) == 5 == buffer.num_subsequences
    drawn = sampled_windows(buffer, 5000)
    counts = [drawn.count(window) for window in expected]
    assert sum(counts) == 5000
    assert min(counts) > 850
    assert max(counts) < 1150


def test_finished_episodes_only_unless_the_running_one_outweighs_them():
    buffer = make(horizon=2)
    record = Record(buffer)
    for step in range(10):
        record.step(["truncated" if step == 9 else None])
    assert buffer.num_subsequences == 9
    for _ in range(10):
        record.step([None])
    assert buffer.num_subsequences == 9  # the running episode holds 9 as well
    assert set(sampled_windows(buffer, 500)) == record.windows(False)
    record.step([None])
    assert buffer.num_subsequences == 9 + 10  # an endless task: its newest steps are learnt from
    assert set(sampled_windows(buffer, 1500)) == record.windows(True)


def test_endless_episode_eats_its_own_tail():
    buffer = make(size=30, horizon=3)
    record = Record(buffer)
    for _ in range(100):
        record.step([None])
    assert set(sampled_windows(buffer, 2000)) == record.windows(True)
    assert buffer.num_subsequences == 30 - 3
    assert buffer.close_episodes() == 1
    assert buffer.close_episodes() == 0
    record.close(0)
    assert set(sampled_windows(buffer, 2000)) == record.windows(False)


def test_reset_in_mid_episode_starts_another_one():
    buffer = make(size=100, n_envs=2, horizon=2)
    record = Record(buffer)
    for _ in range(5):
        record.step([None, None])
    record.close(0)  # environment 0 goes on elsewhere without a done
    for _ in range(5):
        record.step([None, None])
    assert buffer.sample_open_episodes is False
    assert buffer.num_subsequences == len(record.windows(True))
    assert set(sampled_windows(buffer, 2000)) == record.windows(True)
    assert buffer.sample(100).terminations.sum() == 0


def test_without_timeout_handling_a_truncation_counts_as_termination():
    for handle, expected in ((True, 0.0), (False, 1.0)):
        buffer = make(horizon=2, handle_timeout_termination=handle)
        record = Record(buffer)
        record.step([None])
        record.step(["truncated"])
        assert buffer.sample(1).terminations[:, 0].tolist() == [0.0, expected]


def test_no_window_names_horizon_and_longest_episode():
    buffer = make(horizon=5)
    with pytest.raises(RuntimeError, match=r"horizon 5 steps \(the longest episode stored has 0\)"):
        buffer.sample(4)
    record = Record(buffer)
    for length in (2, 4, 3):
        for step in range(length):
            record.step(["truncated" if step == length - 1 else None])
    with pytest.raises(RuntimeError, match=r"horizon 5 steps \(the longest episode stored has 4\)"):
        buffer.sample(4)


def test_seeded_sampling_and_its_state():
    first, second = make(seed=5), make(seed=5)
    other = make(seed=6)
    for buffer in (first, second, other):
        feed_random(Record(buffer), 300, np.random.default_rng(0), 0.05)
    np.random.seed(0)  # noqa: NPY002  # the global stream plays no part
    drawn = [sampled_windows(first, 20) for _ in range(3)]
    np.random.seed(1)  # noqa: NPY002
    assert [sampled_windows(second, 20) for _ in range(3)] == drawn
    assert [sampled_windows(other, 20) for _ in range(3)] != drawn
    first.seed(5)
    assert sampled_windows(first, 20) == drawn[0]


@pytest.mark.parametrize("field", ["obs", "next_obs", "action", "reward"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])  # the last is finite in float64 only
def test_what_is_not_finite_is_named_and_stays_out(field, value):
    buffer = make(n_envs=2)
    record = Record(buffer)
    for _ in range(7):
        record.step([None, None])
    step = {
        "obs": np.ones((2, 3)),
        "next_obs": np.ones((2, 3)),
        "action": np.zeros((2, 2)),
        "reward": np.zeros(2),
    }
    step[field][1] = value
    name = "observation" if "obs" in field else field
    before = buffer.num_steps, buffer.actions.copy()
    with pytest.raises(RuntimeError, match=f"The {name} of environment 1 at the buffer's step 16 "):
        buffer.add(*step.values(), np.zeros(2, dtype=bool), [{}, {}])
    assert buffer.num_steps == before[0] == 14
    assert (buffer.actions == before[1]).all()
    record.step([None, None])  # nothing has been disturbed
    record.step(["truncated", "truncated"])
    assert set(sampled_windows(buffer, 1000)) == record.windows(False)


def test_normalisation_is_the_vec_env_s():
    env = VecNormalize(DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")]))
    buffer = SequenceReplayBuffer(
        500, env.observation_space, env.action_space, device="cpu", horizon=3, seed=0
    )
    env.reset()
    obs = env.get_original_obs()
    for _ in range(300):
        _, _, done, infos = env.step(np.array([env.action_space.sample()]))
        next_obs = env.get_original_obs()
        last = infos[0].get("terminal_observation")
        stored = next_obs if last is None else env.unnormalize_obs(last)[None]
        buffer.add(obs, stored, np.zeros((1, 1)), env.get_original_reward(), done, infos)
        obs = next_obs
    buffer.seed(1)
    raw = buffer.sample(50)
    buffer.seed(1)
    batch = buffer.sample(50, env=env)
    mean, std = env.obs_rms.mean, np.sqrt(env.obs_rms.var + env.epsilon)
    expected = np.clip((raw.observations.numpy() - mean) / std, -10, 10)
    np.testing.assert_allclose(batch.observations.numpy(), expected, rtol=1e-5, atol=1e-5)
    scale = np.sqrt(env.ret_rms.var + env.epsilon)
    expected = np.clip(raw.rewards.numpy() / scale, -10, 10)
    np.testing.assert_allclose(batch.rewards.numpy(), expected, rtol=1e-5)
    assert {tensor.dtype for tensor in batch[:4]} == {th.float32}


def test_a_million_walker_walk_steps_take_at_most_130_mb():
    obs_space = spaces.Box(-np.inf, np.inf, (24,), np.float64)
    buffer = SequenceReplayBuffer(
        1_000_000, obs_space, spaces.Box(-1, 1, (6,), np.float64), device="cpu", n_envs=4
    )
    assert buffer.nbytes == 0  # nothing is taken before the first step
    zeros = np.zeros((4, 24))
    buffer.add(zeros, zeros, np.zeros((4, 6)), np.zeros(4), np.zeros(4, dtype=bool), [{}] * 4)
    assert buffer.nbytes == 125_000_000
    arrays = [value for owner in (buffer, buffer.rings) for value in vars(owner).values()]
    arrays += [storage.rows for storage in buffer.stored.storages.values()]
    total = sum(value.nbytes for value in arrays if isinstance(value, np.ndarray))
    assert total <= 130_000_000
    buffer.reset()
    assert buffer.nbytes == 0


def test_a_buffer_too_small_says_so_when_used_not_when_made():
    buffer = make(size=1)  # the zoo loads models with buffer_size=1
    with pytest.raises(RuntimeError, match=r"1 rows per environment .* 3 steps: .* at least 4"):
        Record(buffer).step([None])
    with pytest.raises(ValueError, match=r"1 rows per environment .* 3 steps: .* at least 4"):
        buffer.check_size()  # as models do that are made to learn
    with pytest.raises(ValueError, match="horizon is 0"):
        make(horizon=0)


def test_sizes_as_sb3_reads_them():
    buffer = make(size=21, n_envs=2)
    assert (buffer.buffer_size, buffer.size(), buffer.pos, buffer.full) == (10, 0, 0, False)
    record = Record(buffer)
    for steps in range(1, 10):
        record.step([None, None])
        assert (buffer.size(), buffer.pos, buffer.full) == (steps, steps, steps == 9)
    record.step([None, None])
    assert (buffer.size(), buffer.pos, buffer.full) == (9, 0, True)
    buffer.reset()
    assert (buffer.size(), buffer.pos, buffer.full, buffer.num_steps) == (0, 0, False, 0)


def test_extend_equals_add():
    rng = np.random.default_rng(0)
    steps = [
        rng.normal(size=(20, 2, 3)),
        rng.normal(size=(20, 2, 3)),
        rng.uniform(-1, 1, size=(20, 2, 2)),
        rng.normal(size=(20, 2)),
        rng.random((20, 2)) < 0.1,
    ]
    infos = [[{}, {"TimeLimit.truncated": True}]] * 20
    for step in range(19):  # one trajectory, except where it ends
        steps[0][step + 1] = np.where(steps[4][step][:, None], steps[0][step + 1], steps[1][step])
    one, other = make(n_envs=2), make(n_envs=2)
    one.extend(*steps, infos)
    for index in range(20):
        other.add(*(field[index] for field in steps), infos[index])
    assert_equal_batches(one.sample(100), other.sample(100))


@pytest.mark.slow
def test_a_walker_walk_batch_takes_under_a_millisecond():
    obs_space = spaces.Box(-np.inf, np.inf, (24,), np.float32)
    buffer = SequenceReplayBuffer(
        1_000_000, obs_space, spaces.Box(-1, 1, (6,)), device="cpu", n_envs=1, seed=0
    )
    obs = np.zeros((1, 24), dtype=np.float32)
    for step in range(50_000):
        obs[0, 0] = step
        ended = np.array([step % 500 == 499])
        buffer.add(obs, obs + [1], np.zeros((1, 6)), np.zeros(1), ended, [{}])
        obs = obs + [1]
    times = []
    for _ in range(200):
        begin = time.perf_counter()
        buffer.sample(256)
        times.append(time.perf_counter() - begin)
    assert np.median(times) < 1e-3


def test_memory_that_is_not_free_is_warned_of_at_once(monkeypatch):
    monkeypatch.setattr(sequence_buffer, "_available_memory", lambda: 2_000_000)
    buffer = make(size=200_000)
    needed = buffer.rings.num_rows * (4 * (int(np.prod(VECTORS.shape)) + 2) + 5)
    with pytest.warns(UserWarning, match=f"take {needed / 1e9:.2f} GB and 0.00 GB are free: lower"):
        buffer.check_size()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer.check_size()  # said once
        Record(buffer).step([None])
        make(size=1000).check_size()
    assert buffer.nbytes == needed


def test_memory_that_no_system_gives(make_agent, point_env, tmp_path):
    message = r"The replay buffer of \d+ steps takes [\d.]+ GB.*: lower buffer_size\."
    images = spaces.Box(0, 255, (3, 64, 64), np.uint8)
    huge = 10**13
    with pytest.raises(ValueError, match=message):
        make(size=huge, obs_space=images).check_size()
    with pytest.raises(ValueError, match=message):
        make_agent(point_env(kind="image"), "CnnPolicy", buffer_size=huge)
    with pytest.raises(RuntimeError, match=message):
        make(size=huge, obs_space=images).add(
            np.zeros((1, 3, 64, 64)), np.zeros((1, 3, 64, 64)), np.zeros((1, 2)), [0.0], [False],
            [{}],
        )  # fmt: skip
    agent = make_agent(point_env(kind="image"), "CnnPolicy")
    agent.save(tmp_path / "agent.zip")
    loaded = type(agent).load(
        tmp_path / "agent.zip", env=agent.env, device="cpu", buffer_size=huge
    )  # predictions need no buffer
    loaded.predict(np.zeros((3, 64, 64), np.uint8))
    with pytest.raises(RuntimeError, match=message):
        loaded.learn(10)


def test_stacked_frames_are_counted_once():
    stacks = spaces.Box(0, 255, (12, 64, 64), np.uint8)
    sizes = make(size=100, obs_space=stacks)
    assert sum(sizes._sizes(sizes.stored.likely_storages())) == 100 * (3 * 64 * 64 + 4 * 2 + 5)
