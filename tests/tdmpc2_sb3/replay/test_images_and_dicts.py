"""Stored images and dictionaries come out exactly as they went in."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch as th
from batches import assert_equal_batches
from gymnasium import spaces

from tdmpc2_sb3.replay.buffer import SequenceReplayBuffer
from tdmpc2_sb3.replay.entry_storage import FrameStorage

ACTIONS = spaces.Box(-1, 1, (1,), np.float32)
IMAGES = spaces.Box(0, 255, (9, 8, 8), np.uint8)


class Stacker:
    """Random frames, stacked as wrappers do it."""

    def __init__(self, rng, num_frames=3, channels=3, padding="repeat", height=8) -> None:
        self.rng = rng
        self.shape = (channels, height, 8)
        self.num_frames = num_frames
        self.padding = padding

    def frame(self) -> np.ndarray:
        return self.rng.integers(1, 256, self.shape, dtype=np.uint8)

    def reset(self) -> np.ndarray:
        first = self.frame()
        before = first if self.padding == "repeat" else np.zeros_like(first)
        self.frames = [before] * (self.num_frames - 1) + [first]
        return self.stack()

    def step(self) -> np.ndarray:
        self.frames = [*self.frames[1:], self.frame()]
        return self.stack()

    def stack(self) -> np.ndarray:
        return np.concatenate(self.frames)


def buffer_for(space, size=60, n_envs=1, horizon=2) -> SequenceReplayBuffer:
    return SequenceReplayBuffer(
        size * n_envs, space, ACTIONS, device="cpu", n_envs=n_envs, horizon=horizon, seed=0
    )


def feed(
    buffer, stackers, steps, end_probability, rng, change=None
) -> list[list[list[np.ndarray]]]:
    """Feeds the buffer and returns every environment's episodes as lists of whole observations."""
    episodes: list[list[list[np.ndarray]]] = [[] for _ in stackers]
    current = [None] * len(stackers)
    for step in range(steps):
        for env, stacker in enumerate(stackers):
            if current[env] is None:
                current[env] = stacker.reset()
                episodes[env].append([current[env]])
        obs = np.stack(current)
        following = [stacker.step() for stacker in stackers]
        if change is not None:
            following = change(step, following)
        done = rng.random(len(stackers)) < end_probability
        action = np.zeros((len(stackers), 1))
        reward = np.full(len(stackers), float(step))
        buffer.add(obs, np.stack(following), action, reward, done, [{}] * len(stackers))
        for env, ended in enumerate(done):
            episodes[env][-1].append(following[env])
            current[env] = None if ended else following[env]
    return episodes


def known_windows(episodes, length) -> set[bytes]:
    return {
        np.stack(episode[begin : begin + length]).tobytes()
        for env in episodes
        for episode in env
        for begin in range(len(episode) - length + 1)
    }


def sampled_windows(buffer, number) -> set[bytes]:
    observations = buffer.sample(number).observations
    assert observations.dtype == th.uint8
    return {window.numpy().tobytes() for window in observations.transpose(0, 1).contiguous()}


@pytest.mark.parametrize("padding", ["repeat", "zeros"])
@pytest.mark.parametrize(("num_frames", "channels"), [(3, 3), (4, 1), (5, 3), (3, 1)])
@pytest.mark.parametrize("end_probability", [0.1, 0.0])
def test_stacks_are_exact_through_wrap_arounds(padding, num_frames, channels, end_probability):
    rng = np.random.default_rng(0)
    space = spaces.Box(0, 255, (num_frames * channels, 8, 8), np.uint8)
    buffer = buffer_for(space, size=30, n_envs=2)
    stackers = [Stacker(rng, num_frames, channels, padding) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        episodes = feed(buffer, stackers, 100, end_probability, rng)
    storage = buffer.stored.storages[""]
    assert isinstance(storage, FrameStorage)
    assert storage.rows.shape == (60, channels, 8, 8)
    assert buffer.nbytes == 60 * (channels * 64 + 4 + 4 + 1)
    drawn = sampled_windows(buffer, 2000)
    assert drawn <= known_windows(episodes, 3)
    # All that the rings can rebuild: of the episode that has lost its first row, only what lies
    # behind k - 1 rows; at most 2 (k - 1) windows are given up for that.
    assert buffer.num_subsequences == len(drawn)
    if end_probability == 0:
        assert len(drawn) == 2 * (30 - 2 - (num_frames - 1))


def test_saved_and_loaded_stacks_are_the_same(tmp_path):
    rng = np.random.default_rng(0)
    buffer = buffer_for(IMAGES, size=30, n_envs=2)
    feed(buffer, [Stacker(rng) for _ in range(2)], 80, 0.1, rng)
    buffer.save(tmp_path / "b")
    other = buffer_for(IMAGES, size=30, n_envs=2)
    other.load(tmp_path / "b")
    assert other.num_subsequences == buffer.num_subsequences
    assert_equal_batches(buffer.sample(200), other.sample(200))


@pytest.mark.parametrize("break_at", [0, 1, 25, 90])
def test_what_does_not_move_on_by_one_frame_is_stored_whole(break_at, tmp_path):
    rng = np.random.default_rng(1)
    buffer = buffer_for(IMAGES, size=40)
    stacker = Stacker(rng)

    def change(step, following):
        if step == break_at:  # a wrapper that turns the picture over, say
            stacker.frames = stacker.frames[::-1]
            return [stacker.stack()]
        return following

    with pytest.warns(UserWarning, match="not stacks that move on") as caught:
        episodes = feed(buffer, [stacker], 120, 0.1, rng, change)
    assert len(caught) == 1
    assert not isinstance(buffer.stored.storages[""], FrameStorage)
    drawn = sampled_windows(buffer, 2000)
    assert drawn <= known_windows(episodes, 3)
    assert len(drawn) == buffer.num_subsequences
    buffer.save(tmp_path / "b")
    other = buffer_for(IMAGES, size=40)
    other.load(tmp_path / "b")
    assert sampled_windows(other, 2000) <= known_windows(episodes, 3)


def test_conversion_in_a_full_ring_never_yields_a_broken_stack(tmp_path):
    rng = np.random.default_rng(2)
    buffer = buffer_for(IMAGES, size=20)
    stacker = Stacker(rng)
    episodes = feed(buffer, [stacker], 50, 0.0, rng)  # one episode that has lost its beginning
    stacker.frames = stacker.frames[::-1]
    broken = stacker.stack()
    with pytest.warns(UserWarning, match="stored whole"):
        buffer.add(
            episodes[0][0][-1][None], broken[None], np.zeros((1, 1)), np.zeros(1), [False], [{}]
        )
    episodes[0][0].append(broken)
    assert sampled_windows(buffer, 500) <= known_windows(episodes, 3)
    buffer.close_episodes()
    buffer.save(tmp_path / "b")
    other = buffer_for(IMAGES, size=20)
    other.load(tmp_path / "b")
    assert sampled_windows(other, 500) <= known_windows(episodes, 3)
    assert other.num_subsequences == buffer.num_subsequences


def test_a_single_picture_is_stored_whole_in_silence():
    rng = np.random.default_rng(0)
    space = spaces.Box(0, 255, (3, 8, 8), np.uint8)
    buffer = buffer_for(space)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        episodes = feed(buffer, [Stacker(rng, num_frames=1)], 50, 0.1, rng)
    assert buffer.stored.storages[""].num_frames == 1
    assert sampled_windows(buffer, 500) <= known_windows(episodes, 3)


def test_dictionary_of_vectors_and_images():
    rng = np.random.default_rng(0)
    space = spaces.Dict(
        {
            "position": spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "camera": IMAGES,
            "gear": spaces.Discrete(5),
            "switches": spaces.MultiBinary(3),
        }
    )
    buffer = buffer_for(space, size=25, n_envs=2, horizon=3)
    stackers = [Stacker(rng), Stacker(rng)]
    pictures: dict[int, bytes] = {}
    counter = iter(range(1, 10_000))

    def observation(camera):
        number = next(counter)
        pictures[number] = camera.tobytes()
        return {
            "position": np.array([number, -number], dtype=np.float64),
            "camera": camera,
            "gear": number % 5,
            "switches": np.array([number >> bit & 1 for bit in range(3)], dtype=np.int8),
        }

    def batch(observations):
        return {key: np.stack([obs[key] for obs in observations]) for key in space.spaces}

    current = [observation(stacker.reset()) for stacker in stackers]
    for step in range(60):
        following = [observation(stacker.step()) for stacker in stackers]
        done = rng.random(2) < 0.1
        rewards = np.array([obs["position"][0] for obs in current])
        assert step < 1000
        buffer.add(batch(current), batch(following), np.zeros((2, 1)), rewards, done, [{}, {}])
        current = [
            observation(stacker.reset()) if ended else obs
            for ended, obs, stacker in zip(done, following, stackers, strict=True)
        ]
    sampled = buffer.sample(300)
    observations = sampled.observations
    assert {key: value.dtype for key, value in observations.items()} == {
        "position": th.float32,
        "camera": th.uint8,
        "gear": th.float32,
        "switches": th.float32,
    }
    numbers = observations["position"][..., 0].long()  # [T+1, B]
    assert numbers.shape == (4, 300)
    assert th.equal(observations["position"][..., 1].long(), -numbers)
    assert th.equal(observations["gear"].squeeze(-1).long(), numbers % 5)
    assert th.equal(observations["switches"][..., 1].long(), numbers >> 1 & 1)
    assert th.equal(sampled.rewards.long(), numbers[:-1])
    for place in np.ndindex(4, 300):
        assert observations["camera"][place].numpy().tobytes() == pictures[int(numbers[place])]


def test_pixel_memory_is_a_third_of_the_stacks():
    rng = np.random.default_rng(0)
    space = spaces.Box(0, 255, (9, 64, 64), np.uint8)
    buffer = buffer_for(space, size=1000)
    stacker = Stacker(rng, height=64)
    stacker.shape = (3, 64, 64)
    feed(buffer, [stacker], 5, 0.0, rng)
    assert buffer.nbytes == 1000 * (3 * 64 * 64 + 4 + 4 + 1)
