"""``predict``: the plan as its state, its random streams, and the shapes it takes and gives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import ConstantSchedule

from tdmpc2_sb3.fast.plans import plan
from tdmpc2_sb3.planner import sample_plan_noise, shift_plan
from tdmpc2_sb3.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SSMPolicy

SIZES = {
    "latent_dim": 16,
    "enc_dim": 12,
    "mlp_dim": 14,
    "num_q": 3,
    "num_samples": 32,
    "num_elites": 8,
    "num_pi_trajs": 4,
    "num_iterations": 3,
    "compile": False,
}
VECTOR = spaces.Box(-np.inf, np.inf, (5,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 64, 64), np.uint8)
ACTIONS = spaces.Box(np.array([-3, 0], np.float32), np.array([1, 8], np.float32))


@pytest.fixture
def make_policy(roughen):
    def make(kind=MlpPolicy, observations=VECTOR, actions=ACTIONS, **kwargs):
        th.manual_seed(0)
        policy = kind(observations, actions, ConstantSchedule(1e-3), **{**SIZES, **kwargs})
        roughen(policy.world_model)
        return policy

    return make


def observe(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(*shape, 5)).astype(np.float32)


def test_one_environment_and_many(make_policy):
    policy = make_policy()
    action, state = policy.predict(observe(), deterministic=True)
    assert action.shape == (2,)
    assert [part.shape for part in state] == [(1, 3, 2), (1,)]  # plan and its age
    actions, states = policy.predict(observe(4), deterministic=True)
    assert actions.shape == (4, 2)
    assert [part.shape for part in states] == [(4, 3, 2), (4,)]
    assert actions.dtype == np.float32


def test_actions_keep_within_any_finite_bounds(make_policy):
    policy = make_policy()
    actions, _ = policy.predict(observe(300))
    assert (actions >= ACTIONS.low).all()
    assert (actions <= ACTIONS.high).all()
    extremes = policy.unscale(th.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    np.testing.assert_array_equal(extremes, [ACTIONS.low, ACTIONS.high])
    scaled = th.tensor([[-1.0, 1.0], [0.0, 0.5]])
    np.testing.assert_allclose(policy.unscale(scaled), [[-3, 8], [-1, 6]], rtol=1e-6)


def test_actions_of_any_shape(make_policy):
    policy = make_policy(actions=spaces.Box(-2, 2, (2, 3), np.float32))
    assert policy.predict(observe())[0].shape == (2, 3)
    assert policy.predict(observe(4))[0].shape == (4, 2, 3)


def by_hand(policy, observation, previous_mean, age):
    """A deterministic plan of one environment, from the planner's own functions."""
    seeded = th.Generator().manual_seed(age)
    noise = sample_plan_noise(policy.world_model, policy.planner, 1, seeded)
    heads = policy.world_model.sample_heads(th.Generator().manual_seed(0), rows=3)
    latent = policy.world_model.encode(th.as_tensor(observation[None]), noise.offsets)
    mean = th.zeros(1, 3, 2) if age == 0 else th.as_tensor(previous_mean[None])
    mean = shift_plan(mean, th.tensor([age == 0]))
    noise = noise._replace(heads=heads)
    return plan(policy.world_model, latent, mean, noise, policy.planner, explore=False)


def test_the_state_is_the_plan_that_warm_starts_the_next_call(make_policy):
    policy = make_policy()
    state = None
    for age in range(3):
        o = observe(2, seed=age)
        previous = np.zeros((2, 3, 2), np.float32) if state is None else state[0]
        actions, state = policy.predict(o, state, deterministic=True)
        for env in range(2):
            expected = by_hand(policy, o[env], previous[env], age)
            np.testing.assert_allclose(state[0][env], expected.mean[0].numpy(), atol=1e-5)
            np.testing.assert_allclose(actions[env], policy.unscale(expected.action)[0], atol=1e-4)
        assert state[1].tolist() == [age + 1] * 2
    _, cold_state = policy.predict(o, deterministic=True)
    assert np.abs(cold_state[0] - state[0]).max() > 1e-3  # the warm start matters


def test_deterministic_noise_differs_from_step_to_step_and_repeats_from_episode_to_episode(
    make_policy,
):
    policy = make_policy()
    actions, states = [], []
    state = None
    for step in range(12):
        start = np.array([step % 6 == 0])
        _, state = policy.predict(observe(1), state, start, deterministic=True)
        states.append(state)
    assert [int(state[1][0]) for state in states] == [*range(1, 7)] * 2
    for first, second in zip(states[:6], states[6:], strict=True):
        np.testing.assert_array_equal(first[0], second[0])
    # One plan continued at six ages: six draws, so six actions.
    mean = states[0][0]
    for age in range(1, 7):
        actions.append(policy.predict(observe(1), (mean, np.array([age])), deterministic=True)[0])
    gaps = [np.abs(a - b).max() for a, b in itertools.combinations(actions, 2)]
    assert min(gaps) > 1e-3


@pytest.mark.parametrize("kind", ["vector", "image"])
def test_environments_at_different_steps_act_as_each_alone(make_policy, kind):
    policy, obs = make_policy(), observe(5)
    if kind == "image":
        policy = make_policy(CnnPolicy, IMAGE, latent_dim=512)
        obs = np.random.default_rng(1).integers(0, 256, (5, 3, 64, 64), dtype=np.uint8)
    rng = np.random.default_rng(0)
    mean = rng.uniform(-0.5, 0.5, (5, 3, 2)).astype(np.float32)
    ages, start = np.array([3, 0, 70, 3, 9]), np.array([False, False, False, True, False])
    together, states = policy.predict(obs, (mean, ages), start, deterministic=True)
    assert states[1].tolist() == [4, 1, 71, 1, 10]
    for env in range(5):
        row = slice(env, env + 1)
        alone, state = policy.predict(
            obs[row], (mean[row], ages[row]), start[row], deterministic=True
        )
        np.testing.assert_allclose(together[row], alone, atol=1e-4)
        np.testing.assert_allclose(states[0][row], state[0], atol=1e-4)


def test_a_state_without_ages_is_a_plan_just_begun(make_policy):
    policy = make_policy()
    mean = np.full((2, 3, 2), 0.3, np.float32)
    short, _ = policy.predict(observe(2), (mean,), deterministic=True)
    full, _ = policy.predict(observe(2), (mean, np.zeros(2, int)), deterministic=True)
    np.testing.assert_array_equal(short, full)


def test_a_reset_row_is_a_cold_start_and_the_others_are_not(make_policy):
    policy = make_policy()
    _, state = policy.predict(observe(3), deterministic=True)
    start = np.array([False, True, False])
    o = observe(3, seed=1)
    _, mixed = policy.predict(o, state, episode_start=start, deterministic=True)
    _, warm = policy.predict(o, state, deterministic=True)
    _, cold = policy.predict(o, deterministic=True)
    np.testing.assert_allclose(mixed[0][[0, 2]], warm[0][[0, 2]], atol=1e-6)
    np.testing.assert_allclose(mixed[0][1], cold[0][1], atol=1e-6)
    assert np.abs(warm[0][1] - cold[0][1]).max() > 1e-3


def test_deterministic_predictions_repeat_themselves(make_policy):
    policy = make_policy()
    _, state = policy.predict(observe(2), deterministic=True)
    results = [policy.predict(observe(2), state, deterministic=True) for _ in range(3)]
    policy.predict(observe(2))  # whatever is drawn in between
    results.append(policy.predict(observe(2), state, deterministic=True))
    for action, next_state in results[1:]:
        np.testing.assert_array_equal(action, results[0][0])
        np.testing.assert_array_equal(next_state[0], results[0][1][0])
    noisy = [policy.predict(observe(2), state)[0] for _ in range(2)]
    assert np.abs(noisy[0] - noisy[1]).max() > 1e-3


@pytest.mark.parametrize("use_planner", [True, False])
def test_many_environments_act_as_each_alone(make_policy, use_planner):
    policy = make_policy()
    together, states = policy.predict(observe(4), deterministic=True, use_planner=use_planner)
    for env in range(4):
        alone, state = policy.predict(observe(4)[env], deterministic=True, use_planner=use_planner)
        np.testing.assert_allclose(together[env], alone, atol=1e-4)
        if use_planner:
            np.testing.assert_allclose(states[0][env], state[0][0], atol=1e-4)


def test_predicting_moves_no_stream_but_its_own(make_policy):
    policy = make_policy()
    th.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002  # the global stream is what is watched
    before = th.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    stream = policy.generator.get_state()
    policy.predict(observe(2), deterministic=True)
    policy.predict(observe(2), deterministic=True, use_planner=False)
    assert th.equal(policy.generator.get_state(), stream)  # deterministic: not even that
    policy.predict(observe(2))
    assert not th.equal(policy.generator.get_state(), stream)
    assert th.equal(th.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


def test_seeded_predictions_repeat(make_policy):
    policy = make_policy()
    drawn = []
    for _ in range(2):
        policy.seed_predictions(11)
        drawn.append([policy.predict(observe(2))[0] for _ in range(3)])
    np.testing.assert_array_equal(*drawn)


def test_without_the_planner_the_policy_prior_acts(make_policy, plain_model):
    policy = make_policy()
    state = (np.ones((4, 3, 2), np.float32),)
    actions, passed = policy.predict(observe(4), state, deterministic=True, use_planner=False)
    assert passed is state  # passed through
    plain = plain_model(policy.world_model.state_dict())
    mean, log_std = plain.policy_moments(plain.encode(th.as_tensor(observe(4))))
    expected = policy.unscale(th.tanh(mean).detach())
    np.testing.assert_allclose(actions, expected, atol=1e-5)
    noisy = np.stack([policy.predict(observe(4), use_planner=False)[0] for _ in range(400)])
    scaled = policy.scale_action(noisy).clip(-1 + 1e-6, 1 - 1e-6)
    inside = (mean.abs() < 1.0) & (log_std < -1.0)  # far from where tanh flattens
    assert inside.any()
    raw = np.arctanh(scaled)
    np.testing.assert_allclose(
        raw.std(0)[inside.numpy()], log_std.exp().detach().numpy()[inside.numpy()], rtol=0.15
    )


def test_calling_the_policy_is_a_cold_plan(make_policy):
    policy = make_policy()
    with th.no_grad():
        action = policy(th.as_tensor(observe(2)), deterministic=True)
    expected, _ = policy.predict(observe(2), deterministic=True)
    np.testing.assert_array_equal(policy.unscale(action), expected)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        (np.zeros(4, np.float32), r"observation.*shape.*\(4,\)|\(4,\)"),
        (np.zeros((2, 2, 5), np.float32), r"\(2, 2, 5\)"),
        ((np.zeros(5, np.float32), {}), "a tuple: pass the first item"),
    ],
)
def test_observations_of_the_wrong_shape(make_policy, observation, message):
    with pytest.raises(ValueError, match=message):
        make_policy().predict(observation)


def test_a_state_of_the_wrong_shape(make_policy):
    policy = make_policy()
    _, state = policy.predict(observe(2))
    message = r"shape \(2, 3, 2\), but \(3, 3, 2\) .* pass the state of the previous call, or None"
    with pytest.raises(ValueError, match=message):
        policy.predict(observe(3), state)
    mean = np.zeros((2, 3, 2), np.float32)
    for ages in (np.zeros(3, int), np.zeros(2), 1):
        with pytest.raises(ValueError, match=r"ages .* whole numbers of shape \(2,\) are needed"):
            policy.predict(observe(2), (mean, ages))


@pytest.mark.parametrize("kind", [MlpPolicy, SSMPolicy])
def test_dynamics_are_a_choice_of_the_policy(make_policy, kind):
    own = make_policy(kind)
    name = type(own.world_model.dynamics).__name__
    assert name == {MlpPolicy: "MLPDynamics", SSMPolicy: "SSMDynamics"}[kind]
    asked = make_policy(MlpPolicy, dynamics="ssm")
    assert type(asked.world_model.dynamics).__name__ == "SSMDynamics"


@pytest.mark.parametrize(
    ("given", "actions", "expected"), [("auto", 2, 6), ("auto", 19, 6), ("auto", 20, 8), (3, 30, 3)]
)
def test_iterations(make_policy, given, actions, expected):
    space = spaces.Box(-1, 1, (actions,), np.float32)
    assert make_policy(actions=space, num_iterations=given).planner.num_iterations == expected


def picture(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3, 64, 64), dtype=np.uint8)


def test_images_are_shifted_at_random_when_acting_too(make_policy):
    policy = make_policy(CnnPolicy, IMAGE)
    action, state = policy.predict(picture(), deterministic=True)
    again, _ = policy.predict(picture(), deterministic=True)
    np.testing.assert_array_equal(action, again)
    seen = []
    encode = policy.world_model.encode

    def watch(observation, offsets=None):
        seen.append(offsets)
        return encode(observation, offsets)

    policy.world_model.encode = watch
    for _ in range(20):
        policy.predict(picture(3))
    offsets = th.stack(seen)  # [20, images, E, 2]
    assert offsets.shape == (20, 1, 3, 2)
    assert set(offsets.unique().tolist()) == set(range(7))
    assert state[0].shape == (1, 3, 2)


def test_images_with_the_channels_last_are_turned(make_policy):
    policy = make_policy(CnnPolicy, IMAGE)
    chw = picture(2)
    hwc = chw.transpose(0, 2, 3, 1)
    expected, _ = policy.predict(chw, deterministic=True)
    np.testing.assert_array_equal(policy.predict(hwc, deterministic=True)[0], expected)


def test_dictionaries(make_policy):
    space = spaces.Dict({"picture": IMAGE, "vector": VECTOR})
    policy = make_policy(MultiInputPolicy, space)
    one = {"picture": picture(), "vector": observe()}
    action, _ = policy.predict(one, deterministic=True)
    assert action.shape == (2,)
    many = {"picture": np.stack([one["picture"]] * 3), "vector": np.stack([one["vector"]] * 3)}
    actions, states = policy.predict(many, deterministic=True)
    np.testing.assert_allclose(actions, np.stack([action] * 3), atol=1e-4)
    assert states[0].shape == (3, 3, 2)
    for key, other in (("picture", picture(seed=1)), ("vector", observe(seed=1))):
        changed, _ = policy.predict({**one, key: other}, deterministic=True)
        assert np.abs(changed - action).max() > 1e-6  # every entry is seen
