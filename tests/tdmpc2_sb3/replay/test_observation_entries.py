"""Every kind of observation that SB3's policies take, alone and in dictionaries."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.vec_env import DummyVecEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tdmpc2_sb3 import TDMPC2, kernels
from tdmpc2_sb3.model.encoders import Encoder, flatten_vectors, module_names
from tdmpc2_sb3.policies import MlpPolicy, MultiInputPolicy
from tdmpc2_sb3.replay.observation_entries import entry_shape, input_size, vector_of

IMAGE = spaces.Box(0, 255, (3, 64, 64), np.uint8)
VECTOR = spaces.Box(-1.0, 1.0, (2,), np.float32)
SPACES = {
    "discrete": spaces.Discrete(5),
    "started discrete": spaces.Discrete(3, start=-1),
    "multi-discrete": spaces.MultiDiscrete([4, 3]),
    "multi-binary": spaces.MultiBinary(8),
    "matrix of bits": spaces.MultiBinary((3, 2)),
    "double": spaces.Box(-1.0, 1.0, (3,), np.float64),
    "half": spaces.Box(-1.0, 1.0, (3,), np.float16),
    "number": spaces.Box(-1.0, 1.0, (), np.float64),
    "bytes": spaces.Box(0, 255, (4,), np.uint8),
    "words": spaces.Box(0, 60000, (2, 2), np.uint16),
    "image": IMAGE,
}
SPACES["dict"] = spaces.Dict(dict(SPACES))


class RandomEnv(gym.Env):
    """Episodes of seven random observations of a space."""

    terminates = False

    def __init__(self, space: spaces.Space):
        self.observation_space = space
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), float(action[0]), False, self.steps == 7, {}


def policy_for(space: spaces.Space) -> str:
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if space is IMAGE else "MlpPolicy"


@pytest.mark.parametrize("name", SPACES)
def test_learning_predicting_and_saving(make_agent, tmp_path, name):
    space = SPACES[name]
    env = DummyVecEnv([lambda: RandomEnv(space)] * 2)
    agent = make_agent(env, policy_for(space), batch_size=4, initial_gradient_steps=1)
    agent.learn(28)
    assert agent._n_updates > 2
    agent.save(tmp_path / "a")
    agent.save_replay_buffer(tmp_path / "b")
    again = TDMPC2.load(tmp_path / "a", env, device="cpu")
    again.load_replay_buffer(tmp_path / "b")
    observation = space.sample()
    action, _ = agent.predict(observation, deterministic=True)
    assert action.shape == (2,)
    np.testing.assert_array_equal(again.predict(observation, deterministic=True)[0], action)
    many = env.reset()
    actions, _ = agent.predict(many, deterministic=True)
    second = {key: many[key][1] for key in many} if isinstance(many, dict) else many[1]
    np.testing.assert_allclose(agent.predict(second, deterministic=True)[0], actions[1], atol=1e-5)
    evaluate_policy(agent, env, n_eval_episodes=2)
    for model in (agent, again):  # the buffers go on alike
        model.replay_buffer.seed(1)
    ours, theirs = agent.replay_buffer.sample(3), again.replay_buffer.sample(3)
    if isinstance(space, spaces.Dict):
        assert all(th.equal(ours.observations[k], theirs.observations[k]) for k in space.spaces)
    else:
        assert th.equal(ours.observations, theirs.observations)


@pytest.mark.parametrize("name", ["discrete", "multi-discrete", "multi-binary", "matrix of bits"])
def test_numbers_are_those_of_sb3s_policies(name):
    space = SPACES[name]
    space.seed(3)
    values = np.stack([space.sample() for _ in range(6)])
    theirs = preprocess_obs(th.as_tensor(values), space).reshape(6, -1)
    ours = vector_of(th.as_tensor(values).reshape(6, *entry_shape(space)), space)
    assert th.equal(ours.float(), theirs)
    assert input_size(space) == theirs.shape[1]
    sequences = th.as_tensor(values).reshape(2, 3, *entry_shape(space))
    assert th.equal(vector_of(sequences, space), ours.reshape(2, 3, -1))


def test_one_hot_by_hand():
    start = vector_of(th.tensor([[-1], [1]]), SPACES["started discrete"])
    assert start.tolist() == [[1, 0, 0], [0, 0, 1]]
    joined = vector_of(th.tensor([[3, 0]]), SPACES["multi-discrete"])
    assert joined.tolist() == [[0, 0, 0, 1, 1, 0, 0]]
    matrix = spaces.MultiDiscrete(np.array([[2, 2], [3, 1]]))
    assert vector_of(th.tensor([[[1, 0], [2, 0]]]), matrix).tolist() == [[0, 1, 1, 0, 0, 0, 1, 1]]


def test_a_dictionary_with_choices_is_the_vector_with_them_written_out(make_agent):
    """The same weights act and learn alike on both."""
    parts = spaces.Dict({"a": spaces.Discrete(3), "b": VECTOR})
    whole = spaces.Box(-1.0, 1.0, (5,), np.float32)
    arguments = {"latent_dim": 16, "enc_dim": 8, "mlp_dim": 16, "num_samples": 16, "num_elites": 4}
    arguments.update(num_pi_trajs=2, num_iterations=2, num_enc_layers=1)
    action = spaces.Box(-1.0, 1.0, (2,), np.float32)
    one = MultiInputPolicy(parts, action, lambda _: 1e-3, **arguments)
    other = MlpPolicy(whole, action, lambda _: 1e-3, **arguments)
    other.load_state_dict(one.state_dict())
    vector = np.array([0.25, -0.5], np.float32)
    given = one.predict({"a": 1, "b": vector}, deterministic=True)[0]
    written = np.concatenate([[0, 1, 0], vector]).astype(np.float32)
    np.testing.assert_array_equal(given, other.predict(written, deterministic=True)[0])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("discrete", 5, r"The observation is \[\[5\]\], which Discrete\(5\) does not contain"),
        ("multi-discrete", np.array([3, 3]), r"MultiDiscrete\(\[4 3\]\) does not contain"),
        ("discrete", np.zeros((2, 2)), r"shape \(2, 2\) of 'observation', a Discrete: pass \(\)"),
        ("double", np.zeros(4), r"pass \(3,\), or \(n_env, 3\)"),
        ("double", {"x": np.zeros(3)}, "The observation is a dict, but the observation space is"),
    ],
)
def test_other_observations_are_refused(make_agent, name, value, message):
    with pytest.raises(ValueError, match=message):
        make_agent(RandomEnv(SPACES[name])).predict(value)


def test_a_dictionary_without_a_key(make_agent):
    agent = make_agent(RandomEnv(spaces.Dict({"a": VECTOR, "b": VECTOR})), "MultiInputPolicy")
    with pytest.raises(ValueError, match=r"has the keys \['a'\], but .* has \['a', 'b'\]"):
        agent.predict({"a": np.zeros(2, np.float32)})


@pytest.mark.parametrize("learning_starts", [0, 20])
def test_a_wrong_choice_ends_learning(make_agent, learning_starts):
    class Wrong(RandomEnv):
        def reset(self, **kwargs):
            super().reset(**kwargs)
            return 5, {}

    agent = make_agent(Wrong(SPACES["discrete"]), learning_starts=learning_starts)
    with pytest.raises(RuntimeError, match=r"\[\[5\]\], which Discrete\(5\) does not contain"):
        agent.learn(5)


# -- dictionaries' keys ---------------------------------------------------------------------------

KEYS = ["observation.image", "values", "type", "training", "", "keys", "plain", "entry_0"]


@pytest.mark.parametrize("image", [True, False])
def test_keys_of_any_name(make_agent, tmp_path, image):
    entry = spaces.Box(0, 255, (1, 40, 40), np.uint8) if image else VECTOR
    space = spaces.Dict(dict.fromkeys(KEYS[: 5 if image else None], entry))
    agent = make_agent(
        RandomEnv(space), "MultiInputPolicy", batch_size=2, initial_gradient_steps=1
    ).learn(22)
    assert agent._n_updates > 1
    agent.save(tmp_path / "a")
    agent.save_replay_buffer(tmp_path / "b")
    again = TDMPC2.load(tmp_path / "a", agent.env, device="cpu")
    again.load_replay_buffer(tmp_path / "b")
    batch = again.replay_buffer.sample(2)
    assert set(batch.observations) == set(space.spaces)
    observation = space.sample()
    expected, _ = agent.predict(observation, deterministic=True)
    np.testing.assert_array_equal(again.predict(observation, deterministic=True)[0], expected)


def test_the_only_key_may_be_empty(make_agent):
    agent = make_agent(RandomEnv(spaces.Dict({"": VECTOR})), "MultiInputPolicy").learn(22)
    assert list(agent.replay_buffer.sample(2).observations) == [""]


def test_module_names():
    assert module_names(["pixels", "image_0"]) == {"pixels": "pixels", "image_0": "image_0"}
    keys = ["a.b", "entry_0", "", "type"]
    assert module_names(keys) == {
        "a.b": "entry_0_", "entry_0": "entry_0", "": "entry_2", "type": "entry_3",
    }  # fmt: skip


# -- goals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"discrete_obs_space": True}, {"image_obs_space": True}])
def test_goal_environments(make_agent, kind):
    env = BitFlippingEnv(n_bits=4, continuous=True, max_steps=4, **kind)
    if "image_obs_space" in kind:
        env = gym.wrappers.TransformObservation(
            env,
            lambda values: {key: np.resize(value, (1, 40, 40)) for key, value in values.items()},
            spaces.Dict({key: spaces.Box(0, 255, (1, 40, 40), np.uint8)
                         for key in env.observation_space.spaces}),
        )  # fmt: skip
    agent = make_agent(env, "MultiInputPolicy", batch_size=4, initial_gradient_steps=1).learn(24)
    assert agent._n_updates > 2
    evaluate_policy(agent, agent.env, n_eval_episodes=2)


def test_her_is_refused(make_agent):
    env = BitFlippingEnv(n_bits=4, continuous=True)
    with pytest.raises(ValueError, match=r"HerReplayBuffer: .*without hindsight relabelling"):
        make_agent(env, "MultiInputPolicy", replay_buffer_class=HerReplayBuffer)


# -- policy_kwargs --------------------------------------------------------------------------------


def test_images_that_the_environment_normalises(make_agent, tmp_path):
    space = spaces.Box(-1.0, 1.0, (3, 64, 64), np.float32)
    agent = make_agent(
        RandomEnv(space),
        "CnnPolicy",
        policy_kwargs={"normalize_images": False},
        batch_size=2,
        initial_gradient_steps=1,
    ).learn(22)
    encoder = agent.policy.world_model.encoder
    assert encoder.image_keys == ["observation"]
    image = th.rand(2, 3, 64, 64) * 2 - 1
    convolved = encoder.pixels["observation"].net(image)  # as it is
    assert th.equal(agent.policy.world_model.encode(image), convolved)
    agent.save(tmp_path / "a")
    agent.policy.save(tmp_path / "p")
    observation = space.sample()
    expected, _ = agent.predict(observation, deterministic=True)
    for again in (TDMPC2.load(tmp_path / "a", device="cpu"),
                  type(agent.policy).load(tmp_path / "p", "cpu")):  # fmt: skip
        np.testing.assert_array_equal(again.predict(observation, deterministic=True)[0], expected)
    with pytest.raises(ValueError, match="its images are normalised by the environment"):
        agent.save_official(tmp_path / "c.pt")
    with pytest.raises(ValueError, match="CnnPolicy is for images"):
        make_agent(RandomEnv(space), "CnnPolicy")


def test_images_in_bytes_are_read_as_they_are_on_request():
    encoder = Encoder(IMAGE, 8, 16, 1, 8, normalize_images=False)
    image = th.randint(0, 255, (1, 3, 64, 64), dtype=th.uint8)
    flat = flatten_vectors(image, IMAGE, normalize_images=False)
    assert th.equal(encoder(flat), encoder.pixels["observation"].net(image.float()))


@pytest.mark.parametrize(
    ("name", "value"),
    [("optimizer_class", th.optim.SGD), ("optimizer_kwargs", {"eps": 1e-5}), ("net_arch", [32])],
)
def test_arguments_of_sb3s_other_policies(make_agent, name, value):
    with pytest.raises(ValueError, match=f"policy_kwargs hold '{name}', which .* lacks: .*set "):
        make_agent(policy_kwargs={name: value})


@pytest.mark.parametrize("key", [0, ("camera", 1)])
def test_names_of_observations_are_strings(make_agent, key):
    env = RandomEnv(spaces.Dict({key: spaces.Box(-1.0, 1.0, (2,))}))
    with pytest.raises(ValueError, match=r"Observation .* is named by a .*: name .* by strings"):
        make_agent(env, "MultiInputPolicy")


EMPTY = spaces.Box(-1.0, 1.0, (0,))
WITHIN = spaces.Dict({"inner": spaces.Box(-1.0, 1.0, (2,))})


@pytest.mark.parametrize(
    ("space", "kind", "message"),
    [
        (EMPTY, ValueError, r"'observation' has the shape \(0,\), .*: leave it out"),
        (spaces.Dict({"a": EMPTY, "b": WITHIN["inner"]}), ValueError, "'a' has the shape"),
        (spaces.Dict({"outer": WITHIN}), NotImplementedError, "Nested .*FlattenObservation"),
        (spaces.Tuple([WITHIN["inner"]]), ValueError, "is a Tuple: .*FlattenObservation"),
    ],
)
def test_spaces_that_nobody_reads(make_agent, space, kind, message):
    with pytest.raises(kind, match=message):
        make_agent(RandomEnv(space), policy_for(space))


def test_a_picture_with_its_channels_last_is_told_how_it_is_read(make_agent):
    """Scaled pictures, unlike bytes, are not turned by SB3."""
    space = spaces.Box(0.0, 1.0, (40, 40, 3))
    with pytest.raises(ValueError, match=r"\(40, 40, 3\) as channels, height and width"):
        make_agent(RandomEnv(space), "CnnPolicy", policy_kwargs={"normalize_images": False})


# -- devices without double precision -------------------------------------------------------------


class NoDoubles(TorchFunctionMode):
    """A device that refuses double precision, as Apple's does: here every tensor is on it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, th.Tensor) and each.dtype in (th.float64, th.complex128):
                raise TypeError(f"{func} put a double onto a device that has none")
        return result


class NoDoublesInside(TorchDispatchMode):
    """The same below autograd, where gradients are made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, th.Tensor) and result.dtype in (th.float64, th.complex128):
            raise TypeError(f"{func} put a double onto a device that has none")
        return result


def test_the_simulated_device_refuses():
    with NoDoubles(), pytest.raises(TypeError, match="put a double"):
        th.as_tensor(np.zeros(3))
    with NoDoubles(), NoDoublesInside(), pytest.raises(TypeError, match="put a double"):
        th.zeros(3).to(th.float64)


@pytest.mark.parametrize("name", ["double", "number", "half", "dict", "discrete"])
@pytest.mark.parametrize("noise", ["white", "pink"])
def test_devices_without_doubles(make_agent, monkeypatch, name, noise):
    added = NormalActionNoise(np.zeros(2), np.ones(2), dtype=np.float64)
    monkeypatch.setattr(kernels, "usable", lambda *tensors: False)
    space = SPACES[name]
    env = RandomEnv(space)
    env.action_space = spaces.Box(-2.0, 2.0, (2,), np.float64)
    with NoDoubles(), NoDoublesInside():
        agent = make_agent(
            env,
            policy_for(space),
            exploration_noise=noise,
            action_noise=added,
            batch_size=2,
            initial_gradient_steps=1,
        ).learn(23)
        observation = space.sample()
        for deterministic in (True, False):
            action, state = agent.predict(observation, deterministic=deterministic)
            agent.predict(observation, state, deterministic=deterministic)
        agent.use_planner = False
        agent.predict(observation)
    assert action.dtype == np.float64
    assert agent._n_updates > 2
