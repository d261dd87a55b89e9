"""VecNormalize beneath other layers: what the buffer holds, and what is sampled from it."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

SPACES = {
    "vector": spaces.Box(-9.0, 9.0, (2,), np.float64),
    "matrix": spaces.Box(-9.0, 9.0, (2, 3), np.float32),
    "picture": spaces.Box(0, 255, (40, 40, 1), np.uint8),
    "number": spaces.Discrete(4),
}


class Counter(gym.Env):
    """Observations made of the step's number, zero at first; episodes of 5 steps, or 7."""

    terminates = False

    def __init__(self, kind, limit=5):
        self.kind, self.limit = kind, limit
        self.observation_space = SPACES.get(kind) or spaces.Dict(
            {key: SPACES[key] for key in kind.split("+")}
        )
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def _observe(self):
        step = float(self.steps)
        every = {
            "vector": np.array([step, -0.25 * step]),
            "matrix": np.arange(6, dtype=np.float32).reshape(2, 3) * step,
            "picture": np.full((40, 40, 1), 10 * self.steps, np.uint8),
            "number": self.steps % 4,
        }
        if self.kind in every:
            return every[self.kind]
        return {key: every[key] for key in self.kind.split("+")}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        return self._observe(), self.steps / 10, False, self.steps == self.limit, {}


def counters(kind: str) -> VecEnv:
    return DummyVecEnv([lambda: Counter(kind), lambda: Counter(kind, 7)])


class Unnormalized(VecEnvWrapper):
    """In VecNormalize's place: nothing."""

    def __init__(self, venv, **kwargs):
        super().__init__(venv)

    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        return self.venv.step_wait()


NO_REWARD = {"norm_reward": False}
#: Layers around VecNormalize, by what they are good for.
STACKS = {
    "frames above": ("vector", lambda n, e: VecFrameStack(n(e), 4)),
    "frames above, first": ("matrix", lambda n, e: VecFrameStack(n(e), 3, "first")),
    "frames above, last": ("matrix", lambda n, e: VecFrameStack(n(e), 3, "last")),
    "frames below": ("vector", lambda n, e: n(VecFrameStack(e, 4))),
    "nothing": ("vector", lambda n, e: n(e)),
    "monitor above": ("vector", lambda n, e: VecMonitor(VecFrameStack(n(e), 2))),
    "one entry": (
        "vector+matrix",
        lambda n, e: VecExtractDictObs(VecFrameStack(n(e), 2), "matrix"),
    ),
    "frames of one entry": (
        "vector+matrix",
        lambda n, e: VecFrameStack(VecExtractDictObs(n(e), "matrix"), 2),
    ),
    "frames of a dictionary": (
        "vector+picture",
        lambda n, e: VecTransposeImage(VecFrameStack(n(e, norm_obs_keys=["vector"]), 2)),
    ),
    "dictionary": ("vector+number", lambda n, e: n(e, norm_obs_keys=["vector"])),
    "images above": ("picture", lambda n, e: VecTransposeImage(n(e, norm_obs=False))),
    "frames of images": (
        "picture",
        lambda n, e: VecTransposeImage(VecFrameStack(n(e, norm_obs=False), 3)),
    ),
}


def agent_on(make_agent, env, **kwargs):
    space = env.observation_space
    policy = "MlpPolicy"
    if isinstance(space, spaces.Dict):
        policy = "MultiInputPolicy"
    elif space.dtype == np.uint8:
        policy = "CnnPolicy"
    return make_agent(env, policy, batch_size=4, initial_gradient_steps=1, **kwargs)


def parts(observations):
    return observations if isinstance(observations, dict) else {"": observations}


@pytest.mark.parametrize("name", STACKS)
def test_the_buffer_holds_what_the_agent_would_see_without_normalisation(make_agent, name):
    kind, build = STACKS[name]

    def buffer(normalize):
        agent = agent_on(make_agent, build(normalize, counters(kind)), learning_starts=40)
        return agent.learn(40).replay_buffer

    ours, expected = buffer(VecNormalize), buffer(Unnormalized)
    rows = np.array([row for env in (0, 1) for row in env * ours.buffer_size + np.arange(23)])
    assert np.array_equal(ours.rings.flags, expected.rings.flags)
    theirs = parts(expected.stored.gather(rows))
    for key, values in parts(ours.stored.gather(rows)).items():
        # Of an episode's last observation SB3 keeps the normalised one, clipped and rounded.
        last = ~ours.rings.is_step(rows) & (ours.rings.place(rows) > 0)
        np.testing.assert_array_equal(values[~last], theirs[key][~last])
        np.testing.assert_allclose(values[last], theirs[key][last], rtol=2e-3, atol=1e-4)


class Recording(VecEnvWrapper):
    """Notes what the agent sees."""

    def __init__(self, venv):
        super().__init__(venv)
        self.seen = []

    def reset(self):
        observation = self.venv.reset()
        self.seen.append({key: value.copy() for key, value in parts(observation).items()})
        return observation

    def step_wait(self):
        observation, *others = self.venv.step_wait()
        self.seen.append({key: value.copy() for key, value in parts(observation).items()})
        return observation, *others


@pytest.mark.parametrize("name", STACKS)
def test_samples_are_what_the_agent_sees(make_agent, name):
    """With statistics that stay as they are: also the zeros before an episode's first frame."""
    kind, build = STACKS[name]
    trained = build(VecNormalize, counters(kind))
    agent_on(make_agent, trained, learning_starts=60).learn(60)
    layer = trained
    while not isinstance(layer, VecNormalize):
        layer = layer.venv
    layer.training = False
    env = Recording(trained)
    agent = agent_on(make_agent, env, learning_starts=40)
    agent.learn(40)
    buffer, below = agent.replay_buffer, agent._normalization
    seen = {key: np.stack([each[key] for each in env.seen]) for key in env.seen[0]}
    # Environment 0: episodes of 5 steps take 6 rows, of which the last was never seen.
    steps = np.array([episode * 5 + step for episode in range(4) for step in range(5)])
    rows = steps + steps // 5
    gathered = buffer.stored.gather(rows)
    for key, values in parts(below.normalize(gathered, buffer.rings.place(rows))).items():
        np.testing.assert_allclose(values, seen[key][steps, 0].reshape(values.shape), atol=1e-5)
    batch = buffer.sample(64, below)
    for key, values in parts(batch.observations).items():
        flat = seen[key].reshape(2 * len(env.seen), -1).astype(np.float32)
        each = values.flatten(0, 1).flatten(1).float()
        nearest = th.stack([(th.from_numpy(flat) - row).abs().amax(-1).min() for row in each])
        # Last observations were not seen by anybody; all others were.
        assert (nearest < 1e-5).float().mean() > 0.85
    agent.train(2, 4)


def test_a_real_zero_is_no_missing_frame(make_agent):
    """The first observation is zero: normalised it is not, neither alone nor as an older frame."""
    env = VecFrameStack(VecNormalize(counters("vector")), 3)
    agent = agent_on(make_agent, env, learning_starts=40).learn(40)
    buffer, statistics = agent.replay_buffer, env.venv.obs_rms
    rows = np.array([0, 1, 2])
    values = agent._normalization.normalize(buffer.stored.gather(rows), buffer.rings.place(rows))
    deviation = np.sqrt(statistics.var + 1e-8)
    zero = -statistics.mean / deviation
    one = (np.array([1.0, -0.25]) - statistics.mean) / deviation
    two = (np.array([2.0, -0.5]) - statistics.mean) / deviation
    nothing = np.zeros(2)
    expected = [[*nothing, *nothing, *zero], [*nothing, *zero, *one], [*zero, *one, *two]]
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


class Twice(VecEnvWrapper):
    """Changes observations in its own way."""

    def reset(self):
        return 2 * self.venv.reset()

    def step_wait(self):
        observation, *others = self.venv.step_wait()
        return 2 * observation, *others


def test_unknown_layers_above_are_refused(make_agent):
    env = counters("vector")
    with pytest.raises(RuntimeError, match=r"above VecNormalize \(Twice\) .* the outermost"):
        agent_on(make_agent, Twice(VecNormalize(env, clip_obs=0.3, epsilon=4.0))).learn(30)
    agent_on(make_agent, VecNormalize(Twice(env))).learn(30)
    with pytest.raises(ValueError, match="Two VecFrameStack lie above VecNormalize"):
        agent_on(make_agent, VecFrameStack(VecFrameStack(VecNormalize(env), 2), 2))
