"""A run saved in mid-episode goes on exactly, under wrappers and layers that remember something."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers
from rl_zoo3 import wrappers as zoo
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.saving import episode_state
from tdmpc2_sb3.saving.json_codec import decode, encode
from tdmpc2_sb3.saving.wrapper_state import STATES, class_name
from tests.helpers.same_models import assert_same_models, no_unpickling

CARTPOLE = "DMC/cartpole-swingup-v0"


def cartpole(**kwargs) -> gym.Env:
    import dmc_gym_plugin  # noqa: F401  # worker processes have not imported it

    return gym.make(CARTPOLE, **{"max_episode_steps": 9, **kwargs})


def as_goal(observation):
    return {"observation": observation}


def negated(observation):
    return -observation


#: Wrappers by name. What the environment's own get_state covers lies within.
WRAPPERS = {
    "TimeFeatureWrapper": zoo.TimeFeatureWrapper,
    "HistoryWrapper": lambda env: zoo.HistoryWrapper(env, horizon=3),
    "HistoryWrapperObsDict": lambda env: zoo.HistoryWrapperObsDict(
        wrappers.TransformObservation(
            env, as_goal, gym.spaces.Dict({"observation": env.observation_space})
        )
    ),
    "DelayedRewardWrapper": lambda env: zoo.DelayedRewardWrapper(env, delay=4),
    "ActionNoiseWrapper": zoo.ActionNoiseWrapper,
    "ActionSmoothingWrapper": lambda env: zoo.ActionSmoothingWrapper(env, 0.7),
    "TruncatedOnSuccessWrapper": zoo.TruncatedOnSuccessWrapper,
    "FrameSkip": lambda env: zoo.FrameSkip(env, 2),
    "FrameStackObservation": lambda env: wrappers.FlattenObservation(
        wrappers.FrameStackObservation(env, 3)
    ),
    "FrameStackObservation, zeros": lambda env: wrappers.FlattenObservation(
        wrappers.FrameStackObservation(env, 3, padding_type="zero")
    ),
    "TimeAwareObservation": lambda env: wrappers.TimeAwareObservation(env, normalize_time=True),
    "DelayObservation": lambda env: wrappers.DelayObservation(env, 3),
    "StickyAction": lambda env: wrappers.StickyAction(env, 0.4),
    "StickyAction, long": lambda env: wrappers.StickyAction(env, 0.4, (2, 5)),
    "MaxAndSkipObservation": lambda env: wrappers.MaxAndSkipObservation(env, 2),
    "NormalizeReward": wrappers.NormalizeReward,
    "NormalizeObservation": wrappers.NormalizeObservation,
    "TimeLimit": lambda env: wrappers.TimeLimit(env, 6),
    "RecordEpisodeStatistics": wrappers.RecordEpisodeStatistics,
    "PassiveEnvChecker": wrappers.PassiveEnvChecker,
    "OrderEnforcing": wrappers.OrderEnforcing,
    "Monitor": Monitor,
    "two Monitors": lambda env: Monitor(wrappers.TimeLimit(Monitor(env), 5)),
    "two limits": lambda env: wrappers.TimeLimit(wrappers.TimeLimit(env, 7), 20),
    "statistics of Monitor": lambda env: wrappers.RecordEpisodeStatistics(
        Monitor(env), stats_key="statistics"
    ),
    "RescaleAction": lambda env: wrappers.RescaleAction(env, np.float32(-2), np.float32(2)),
    "ClipReward": lambda env: wrappers.ClipReward(env, 0.0, 0.3),
    "TransformObservation": lambda env: wrappers.TransformObservation(
        env, negated, env.observation_space
    ),
    "many": lambda env: Monitor(
        zoo.HistoryWrapper(
            wrappers.StickyAction(zoo.DelayedRewardWrapper(zoo.TimeFeatureWrapper(env)), 0.3), 2
        )
    ),
}
#: Layers of vectorised environments by name, two environments within.
LAYERS = {
    "VecNormalize": VecNormalize,
    "VecFrameStack": lambda env: VecFrameStack(env, 3),
    "VecMonitor": VecMonitor,
    "VecCheckNan": VecCheckNan,
    "frames over normalisation": lambda env: VecFrameStack(VecNormalize(env), 3),
    "normalisation over frames": lambda env: VecNormalize(VecFrameStack(env, 3)),
    "all": lambda env: VecMonitor(VecFrameStack(VecCheckNan(VecNormalize(VecMonitor(env))), 2)),
}


def observed_as_dict(make):
    return lambda: wrappers.TimeAwareObservation(make(), flatten=False)


LAYERS_OF_DICTIONARIES = {
    "frames of a dictionary": lambda env: VecFrameStack(env, 2),
    "one entry": lambda env: VecFrameStack(VecExtractDictObs(env, "obs"), 2),
}
SETTINGS = {
    "latent_dim": 16, "enc_dim": 16, "mlp_dim": 16, "num_enc_layers": 1, "num_q": 2,
    "num_samples": 16, "num_elites": 4, "num_pi_trajs": 2, "num_iterations": 1, "batch_size": 8,
    "learning_starts": 12, "buffer_size": 400, "initial_gradient_steps": 1, "compile": False,
    "device": "cpu", "seed": 1,
}  # fmt: skip


class Checkpoint(BaseCallback):
    """Saves model, buffer and normalisation at one step."""

    def __init__(self, folder, step: int):
        super().__init__()
        self.folder, self.step = folder, step

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            self.model.save(self.folder / "model")
            self.model.save_replay_buffer(self.folder / "buffer")
            normalizer = self.model.get_vec_normalize_env()
            if normalizer is not None:
                normalizer.save(str(self.folder / "normalizer"))
        return True


def agent_on(env, **kwargs) -> TDMPC2:
    is_dict = isinstance(env.observation_space, gym.spaces.Dict)
    return TDMPC2("MultiInputPolicy" if is_dict else "MlpPolicy", env, **{**SETTINGS, **kwargs})


def statistics_from(env, folder) -> None:
    """Give a new VecNormalize the saved statistics, as the zoo's checkpoints do."""
    layer = env
    while hasattr(layer, "venv") and not isinstance(layer, VecNormalize):
        layer = layer.venv
    if isinstance(layer, VecNormalize):
        saved = VecNormalize.load(str(folder / "normalizer"), layer.venv)
        layer.obs_rms, layer.ret_rms = saved.obs_rms, saved.ret_rms


def both_ways(folder, make_env, at: int, total: int = 40) -> None:
    """Straight through, and saved and loaded in mid-episode: the same."""
    straight = agent_on(make_env())
    straight.learn(total, callback=Checkpoint(folder, at))
    np.random.seed(99)  # noqa: NPY002  # the global stream is elsewhere in another process
    env = make_env()
    statistics_from(env, folder)
    with no_unpickling(), warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = TDMPC2.load(folder / "model", env=env, device="cpu")
        resumed.load_replay_buffer(folder / "buffer")
        resumed.learn(total - at, reset_num_timesteps=False)
    assert straight._n_updates > 4
    assert straight.replay_buffer.rings.num_steps == total  # no episode was cut
    assert_same_models(straight, resumed)


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers(tmp_path, name):
    both_ways(tmp_path, lambda: DummyVecEnv([lambda: WRAPPERS[name](cartpole())]), at=22)


@pytest.mark.parametrize("name", LAYERS)
def test_layers(tmp_path, name):
    makers = [cartpole, lambda: cartpole(max_episode_steps=10)]
    both_ways(tmp_path, lambda: LAYERS[name](DummyVecEnv(makers)), at=26)


@pytest.mark.parametrize("name", LAYERS_OF_DICTIONARIES)
def test_layers_of_dictionaries(tmp_path, name):
    makers = [observed_as_dict(cartpole)] * 2
    both_ways(tmp_path, lambda: LAYERS_OF_DICTIONARIES[name](DummyVecEnv(makers)), at=26)


def made_in_a_worker():
    return WRAPPERS["many"](cartpole())


@pytest.mark.slow
def test_wrappers_in_other_processes(tmp_path):
    made = []

    def make_env():
        made.append(VecFrameStack(SubprocVecEnv([made_in_a_worker, cartpole_in_history]), 2))
        return made[-1]

    try:
        both_ways(tmp_path, make_env, at=26)
    finally:
        for env in made:
            env.close()


def cartpole_in_history():
    return zoo.HistoryWrapper(zoo.TimeFeatureWrapper(cartpole(max_episode_steps=11)), 2)


class Secretive(gym.Wrapper):
    """Remembers something, and nobody knows."""

    def __init__(self, env):
        super().__init__(env)
        self.steps = 0

    def step(self, action):
        self.steps += 1
        return self.env.step(action)


class Forwarding(Secretive):
    """Finds in the environment within what it has not, so also get_state and set_state."""

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.env, name)


class Drifting(gym.Env):
    """Draws a number from its own stream with every step."""

    observation_space = gym.spaces.Box(-20.0, 20.0, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.set_state({"steps": 0, "place": 0.0})
        return self._observation(), {}

    def step(self, action):
        self.steps += 1
        self.place += float(action[0]) + float(self.np_random.uniform())
        return self._observation(), self.place, False, self.steps == 9, {}

    def _observation(self):
        return np.array([self.place, self.steps], np.float32)

    def get_state(self):
        return {"steps": self.steps, "place": self.place}

    def set_state(self, state):
        self.steps, self.place = state["steps"], state["place"]


class Holding(gym.Env):
    """Holds another environment, to which it forwards, and counts by itself."""

    def __init__(self):
        self.held = Drifting()
        self.observation_space, self.action_space = (
            Drifting.observation_space,
            Drifting.action_space,
        )
        self.calls = 0

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.held, name)

    def reset(self, *, seed=None, options=None):
        return self.held.reset(seed=seed)

    def step(self, action):
        self.calls += 1
        return self.held.step(action)


class Subclass(zoo.TimeFeatureWrapper):
    """Of a known class, but may remember more."""


def counting():
    counts = []

    def count(observation):
        counts.append(1)
        return observation

    return count


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (Secretive, "the wrapper Secretive may remember"),
        (Subclass, "the wrapper Subclass may remember"),
        (
            lambda env: wrappers.TransformObservation(env, counting(), env.observation_space),
            "the wrapper TransformObservation may remember",
        ),
        (lambda env: Monitor(Secretive(env)), "the wrapper Secretive may remember"),
        (Forwarding, "the wrapper Forwarding may remember"),
    ],
)
@pytest.mark.parametrize("verbose", [0, 1])
def test_what_is_unknown_ends_the_episode_as_truncated(tmp_path, capsys, make, named, verbose):
    def make_env():
        return DummyVecEnv([lambda: make(cartpole())])

    agent = agent_on(make_env(), verbose=verbose)
    agent.learn(22, callback=Checkpoint(tmp_path, 22))
    with pytest.warns(UserWarning, match=f"ends as truncated: {named} what cannot be saved"):
        resumed = TDMPC2.load(tmp_path / "model", env=make_env(), device="cpu")
    resumed.load_replay_buffer(tmp_path / "buffer")
    capsys.readouterr()
    resumed.learn(9, reset_num_timesteps=False)
    said = capsys.readouterr().out
    assert ("1 open episode(s) closed as truncated (the wrapper" in said) == (verbose == 1)
    rings = resumed.replay_buffer.rings
    # 9 + 9 + 4 steps, then a whole episode.
    assert [end - begin for begin, end in rings._runs(0)] == [9, 9, 4, 9]
    assert not rings.terminated(np.arange(40)).any()


@pytest.mark.parametrize("wrapper", [lambda env: env, Monitor])
def test_what_leads_to_a_state_within_has_none_of_its_own(wrapper):
    env = DummyVecEnv([lambda: wrapper(Holding())])
    env.reset()
    assert "has no get_state and set_state" in episode_state.obstacle(env)
    assert episode_state.capture(env) is None


@pytest.mark.parametrize("vec_env", [DummyVecEnv, SubprocVecEnv])
@pytest.mark.parametrize("wrapper", [lambda env: env, Monitor])
def test_an_environments_own_random_stream_goes_on(vec_env, wrapper):
    """In wrappers and in none, in this process and in others."""
    envs = [vec_env([lambda: wrapper(Drifting())]) for _ in range(2)]
    for seed, env in enumerate(envs):
        env.seed(seed)
        env.reset()
    action = np.full((1, 1), 0.5, np.float32)
    for _ in range(4):
        envs[0].step(action)
    episode_state.restore(envs[1], decode(encode(episode_state.capture(envs[0]), "state")))
    for _ in range(12):  # into the next episode
        straight, resumed = (env.step(action)[:3] for env in envs)
        for one, other in zip(straight, resumed, strict=True):
            np.testing.assert_array_equal(one, other)
    for env in envs:
        env.close()


def test_several_normalisations_are_not_restored():
    """The file beside a checkpoint holds the statistics of one."""
    env = VecNormalize(VecFrameStack(VecNormalize(DummyVecEnv([cartpole])), 2))
    assert "several VecNormalize" in episode_state.obstacle(env)
    assert episode_state.obstacle(env.venv) is None


def test_a_wrapper_with_a_state_of_its_own_may_say_so(tmp_path):
    """get_state and set_state of a wrapper cover whatever lies within."""

    class Counting(Secretive):
        def get_state(self):
            return {"steps": self.steps, "inner": self.env.unwrapped.get_state()}

        def set_state(self, state):
            self.steps = state["steps"]
            self.env.unwrapped.set_state(state["inner"])

        def step(self, action):
            observation, reward, *others = super().step(action)
            return observation, reward + self.steps, *others

    both_ways(tmp_path, lambda: DummyVecEnv([lambda: Monitor(Counting(cartpole()))]), at=22)


def test_other_wrappers_than_the_runs_end_the_episode(tmp_path):
    agent = agent_on(DummyVecEnv([cartpole]))
    agent.learn(22, callback=Checkpoint(tmp_path, 22))
    other = DummyVecEnv([lambda: Monitor(cartpole())])
    with pytest.warns(UserWarning, match=r"ends as truncated: it was saved with the wrappers \["):
        TDMPC2.load(tmp_path / "model", env=other, device="cpu")


def test_environments_are_left_as_they_were():
    env = DummyVecEnv([lambda: WRAPPERS["many"](cartpole())])
    env.reset()
    before = [set(vars(layer)) for layer in chain(env.envs[0])]
    episode_state.restore(env, decode(encode(episode_state.capture(env), "state")))
    assert [set(vars(layer)) for layer in chain(env.envs[0])] == before


def chain(env):
    while isinstance(env, gym.Wrapper):
        yield env
        env = env.env


def test_every_name_in_the_table_is_a_class():
    import importlib

    for name, kinds in STATES.items():
        module, _, found = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), found), gym.Wrapper), name
        assert all(isinstance(attribute, str) for attribute in kinds)


# -- states from files that may come from anywhere ------------------------------------------------


def saved_under(name: str):
    env = DummyVecEnv([lambda: WRAPPERS[name](cartpole())])
    env.reset()
    for _ in range(4):
        env.step([env.action_space.sample()])
    return env, episode_state.capture(env)


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        ("TimeLimit", "_elapsed_steps", -1),
        ("TimeLimit", "_elapsed_steps", "7"),
        ("TimeLimit", "_elapsed_steps", True),
        ("DelayedRewardWrapper", "accumulated_reward", [1.0]),
        ("HistoryWrapper", "obs_history", np.zeros(3)),
        ("HistoryWrapper", "obs_history", np.zeros(15, np.float32).astype("U3")),
        ("NormalizeReward", "return_rms", {"mean": 0.0, "var": 1.0}),
        ("NormalizeReward", "return_rms", {"mean": np.zeros(2), "var": np.ones(2), "count": 1.0}),
        ("NormalizeObservation", "obs_rms", {"mean": 0, "var": 0, "count": 1, "update": print}),
        ("Monitor", "rewards", [0.0, "x"]),
        ("Monitor", "needs_reset", 1),
        ("StickyAction", "last_action", np.zeros(2, np.float32)),
        ("DelayObservation", "observation_queue", [np.zeros(5, np.float32)] * 4),
        ("DelayObservation", "observation_queue", [np.zeros(4, np.float32)]),
        ("RecordEpisodeStatistics", "time_queue", [0.0] * 101),
    ],
)
def test_values_that_do_not_fit_are_refused(name, attribute, value):
    env, states = saved_under(name)
    states[0]["wrappers"][0]["state"][attribute] = value
    message = f"cannot go on: The saved .*'s {attribute} does not fit"
    with pytest.raises(RuntimeError, match=message):
        episode_state.restore(env, states)


@pytest.mark.parametrize("missing", ["wrappers", "environment", "layers"])
def test_parts_that_are_missing(missing):
    env, states = saved_under("TimeLimit")
    env = VecFrameStack(env, 2)
    states = episode_state.capture(env)
    del states[0][missing]
    with pytest.raises(RuntimeError, match="cannot go on"):
        episode_state.restore(env, states)


def test_other_attributes_are_refused():
    env, states = saved_under("TimeLimit")
    own = states[0]["wrappers"][0]["state"]
    own["step"] = 1
    with pytest.raises(RuntimeError, match=r"has \['_elapsed_steps', 'step'\], but"):
        episode_state.restore(env, states)
    assert callable(env.envs[0].step)


def test_a_damaged_random_stream():
    env, states = saved_under("ActionNoiseWrapper")
    states[0]["numpy"]["state"]["pos"] = 10**6
    with pytest.raises(RuntimeError, match="a random state of MT19937 with numbers out of range"):
        episode_state.restore(env, states)


def test_states_of_earlier_versions():
    """They knew TimeLimit's and Monitor's attributes, in one table."""
    env = DummyVecEnv([lambda: Monitor(wrappers.TimeLimit(cartpole(), 8))])
    env.reset()
    for _ in range(4):
        env.step([env.action_space.sample()])
    (state,) = episode_state.capture(env)
    table = {}
    for each in state["wrappers"]:
        table.update(each["state"])
    rewards = table["rewards"]
    table["step"] = "hostile"
    old = [{"environment": state["environment"], "wrappers": table}]
    again = DummyVecEnv([lambda: Monitor(wrappers.TimeLimit(cartpole(), 8))])
    assert episode_state.obstacle(again, old) is None
    episode_state.restore(again, old)
    assert again.envs[0].env._elapsed_steps == 4
    assert again.envs[0].rewards == rewards
    assert callable(again.envs[0].step)
    other = DummyVecEnv([lambda: zoo.TimeFeatureWrapper(cartpole())])
    assert "without what TimeFeatureWrapper" in episode_state.obstacle(other, old)


def test_names_of_classes():
    assert class_name(Monitor(cartpole())) == "stable_baselines3.common.monitor.Monitor"
