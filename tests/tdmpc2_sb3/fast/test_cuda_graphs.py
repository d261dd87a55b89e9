"""CUDA graphs, as far as a machine without a GPU can tell.

A graph makes the same launches again, with the addresses that they were made with. :class:`Replay`
does so with torch's operations on a CPU: whatever Python decided, drew or read while a function was
recorded stays as it was. And tensors of torch's ``meta`` device take the same way through the code
as CUDA's, and refuse to be mixed with a CPU's or to tell their numbers.
"""

from __future__ import annotations

import copy
import sys
import warnings

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdmpc2_sb3.fast import cuda_graphs, ways
from tdmpc2_sb3.fast.adam import Adam
from tdmpc2_sb3.fast.cuda_graphs import Graphed
from tdmpc2_sb3.kernels import Dropped
from tdmpc2_sb3.kernels.tensor_trees import with_tensors, without_tensors
from tdmpc2_sb3.losses import (
    LossConfig,
    PolicyNoise,
    UpdateNoise,
    alive_states,
    model_losses,
    policy_loss,
    sample_update_noise,
    step_weights,
)
from tdmpc2_sb3.model.world_model import Architecture, WorldModel
from tdmpc2_sb3.planner import PlannerConfig, PlanNoise, plan, shift_plan
from tdmpc2_sb3.replay.buffer import SequenceBatch


class Replay(TorchDispatchMode):
    """Operations with the tensors that they read and wrote."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.before = []  # what was written to in place, as it was

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert th.Tag.nondeterministic_seeded not in func.tags, f"{func} draws random numbers"
        assert func is not th.ops.aten._local_scalar_dense.default, "waits for the device"
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(each, each.clone()) for each in tree_leaves(value)]
        for argument in func._schema.arguments:
            if argument.name in kwargs and argument.alias_info is not None:
                self.before += [(each, each.clone()) for each in tree_leaves(kwargs[argument.name])]
        result = func(*args, **kwargs)
        if not func.is_view:
            self.operations.append((func, args, kwargs, result))
        return result

    def undo(self):
        with th.no_grad():
            for tensor, was in reversed(self.before):
                tensor.copy_(was)
        self.before.clear()

    def __call__(self):
        with th.no_grad():
            for func, args, kwargs, result in self.operations:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, th.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class CPURecorder:
    """Stands in for :class:`tdmpc2_sb3.fast.cuda_graphs.Recorder`."""

    def __init__(self, device=None):
        self.warm_ups = 0
        self.graphs = []

    def warm_up(self, function):
        self.warm_ups += 1
        return function()

    def record(self, function):
        replay = Replay()
        with replay:
            result = function()
        replay.undo()
        self.graphs.append(replay)
        return replay, result


@pytest.fixture
def by_torch(monkeypatch):
    """Nothing goes by the CPU kernels, of which a graph knows nothing."""
    for name, module in list(sys.modules.items()):
        if name.startswith("tdmpc2_sb3.") and callable(getattr(module, "library", None)):
            monkeypatch.setattr(module, "library", lambda: None)


@pytest.fixture
def recorders(monkeypatch, by_torch):
    """Makes agents built from now on take a CPU for a device with CUDA graphs."""
    made = []

    def make(device):
        made.append(CPURecorder())
        return made[-1]

    def start():
        monkeypatch.setattr(ways, "recorder_for", make)
        return made

    return start


class Counter:
    """Adds what it is given to a total, in place."""

    def __init__(self):
        self.total = th.zeros(3)
        self.calls = 0
        self.recorder = CPURecorder()
        self.graphed = Graphed(self.add, lambda: [self.total], self.recorder)

    def add(self, given, factor):
        self.calls += 1
        self.total.add_(given["x"] * factor)
        return {"total": self.total, "next": (self.total + 1.0, None)}


def test_each_call_counts_once_and_replays_read_new_numbers():
    counter, total = Counter(), th.zeros(3)
    results = []
    for _ in range(6):
        x = th.randn(3)
        total = total + 2.0 * x
        results.append((counter.graphed({"x": x}, 2.0), total.clone()))
        assert th.equal(counter.total, total)
    for result, expected in results:  # no replay wrote to the results of those before it
        assert th.equal(result["next"][0], expected + 1.0)
        assert result["next"][1] is None
    assert (counter.calls, counter.graphed.replays, counter.recorder.warm_ups) == (2, 5, 1)


def test_a_graph_is_for_sizes_and_values():
    counter = Counter()
    for x, factor in ((th.ones(3), 1.0), (th.ones(1), 1.0), (th.ones(3), 3.0)) * 3:
        before = counter.total.clone()
        counter.graphed({"x": x}, factor)
        assert th.equal(counter.total, before + factor)
    assert len(counter.recorder.graphs) == 3


def test_inputs_that_lie_apart_or_are_one_number():
    counter = Counter()
    for x in (th.ones(1).expand(3), th.arange(6.0)[::2], th.arange(3.0)):
        before = counter.total.clone()
        counter.graphed({"x": x}, 1.0)
        assert th.equal(counter.total, before + x)


def test_state_that_moved_is_recorded_anew():
    counter = Counter()
    for _ in range(3):
        counter.graphed({"x": th.ones(3)}, 1.0)
    counter.total = th.full((3,), 10.0)
    for _ in range(3):
        counter.graphed({"x": th.ones(3)}, 1.0)
    assert th.equal(counter.total, th.full((3,), 13.0))
    assert len(counter.recorder.graphs) == 2


def test_many_sizes_are_forgotten(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    counter = Counter()
    for factor in (1.0, 2.0, 3.0, 1.0) * 3:
        before = counter.total.clone()
        counter.graphed({"x": th.ones(3)}, factor)
        assert th.equal(counter.total, before + factor)
    assert len(counter.graphed._graphs.by_key) <= 2


def test_what_cannot_be_recorded_goes_on_with_one_warning(monkeypatch):
    counter = Counter()

    def refuse(function):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(counter.recorder, "record", refuse)
    counter.graphed({"x": th.ones(3)}, 1.0)
    with pytest.warns(RuntimeWarning, match="RuntimeError: operation not permitted.*compile=False"):
        counter.graphed({"x": th.ones(3)}, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counter.graphed({"x": th.ones(3)}, 1.0)
    assert th.equal(counter.total, th.full((3,), 3.0))


def test_copies_record_for_themselves():
    counter = Counter()
    for _ in range(2):
        counter.graphed({"x": th.ones(3)}, 1.0)
    other = copy.deepcopy(counter)
    for _ in range(3):
        other.graphed({"x": th.ones(3)}, 1.0)
    assert th.equal(counter.total, th.full((3,), 2.0))
    assert th.equal(other.total, th.full((3,), 5.0))


def test_a_cpu_has_no_recorder():
    assert cuda_graphs.recorder_for(th.device("cpu")) is None


# -- plans -----------------------------------------------------------------------------------------

KINDS = {
    "vector": {},
    "image": {"policy": "CnnPolicy"},
    "dict": {"policy": "MultiInputPolicy"},
    "ssm": {"policy": "SSMPolicy"},
    "terminations": {"episodic": True},
    "no policy trajectories": {"num_pi_trajs": 0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_plans_are_the_plans(kind, point_env, make_agent, recorders, roughen):
    """For one environment and two, with and without exploration, and after a moved weight."""
    env_kind = kind if kind in ("image", "dict") else "vector"
    settings = {**KINDS[kind], "compile": "auto"}
    plain = make_agent(point_env(kind=env_kind), **settings)
    made = recorders()
    graphed = make_agent(point_env(kind=env_kind), **settings)
    for agent in (plain, graphed):
        roughen(agent.policy.world_model)
    space = plain.observation_space
    space.seed(0)
    states = {True: (None, None), False: (None, None)}
    for step in range(8):
        if step == 6:
            for agent in (plain, graphed):
                roughen(agent.policy.world_model.reward_net)
        for deterministic in (True, False):
            observations = [_clip(space.sample()) for _ in range(2)]
            start = np.array([step == 4, step % 3 == 0])
            batch = _stack(observations)
            results = [
                agent.predict(batch, state, start, deterministic)
                for agent, state in zip((plain, graphed), states[deterministic], strict=True)
            ]
            assert np.array_equal(results[0][0], results[1][0])
            assert np.array_equal(results[0][1][0], results[1][1][0])
            states[deterministic] = (results[0][1], results[1][1])
            alone = [
                agent.predict(observations[0], None, None, True)[0] for agent in (plain, graphed)
            ]
            assert np.array_equal(*alone)
    assert sum(len(each.graphs) for each in made) >= 3


def _clip(observation):
    if isinstance(observation, dict):
        return {key: _clip(value) for key, value in observation.items()}
    return observation if observation.dtype == np.uint8 else np.clip(observation, -2.0, 2.0)


def _stack(observations):
    if isinstance(observations[0], dict):
        return {key: np.stack([each[key] for each in observations]) for key in observations[0]}
    return np.stack(observations)


def test_plans_are_those_of_another_world_model_in_its_place(make_agent, recorders, roughen):
    recorders()
    agent, other = make_agent(compile="auto"), make_agent(compile="auto")
    roughen(other.policy.world_model)
    observation = np.zeros(3, np.float32)
    before = [agent.predict(observation, deterministic=True)[0] for _ in range(3)]
    expected = other.predict(observation, deterministic=True)[0]
    assert not np.array_equal(before[-1], expected)
    agent.policy.world_model = other.policy.world_model
    for _ in range(3):
        assert np.array_equal(agent.predict(observation, deterministic=True)[0], expected)


def test_compile_false_records_nothing(make_agent, recorders):
    made = recorders()
    agent = make_agent(compile=False)
    agent.learn(40)
    agent.predict(np.zeros(3, np.float32))
    assert not made


# -- gradient steps --------------------------------------------------------------------------------


def weights(agent):
    return [each.detach().clone() for each in [*agent.policy.parameters(), agent.policy.scale]]


SETTINGS = {
    "plain": {},
    "delayed policy": {"policy_delay": 2, "td_lambda": 1.0},
    "terminations": {"episodic": True, "edge": 0.3},
    "ssm": {"policy": "SSMPolicy"},
    "dict": {"policy": "MultiInputPolicy", "kind": "dict"},
    "clipped, falling rate": {"max_grad_norm": 0.1, "learning_rate": lambda left: 1e-3 * left},
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def make_learner(request, point_env, make_agent):
    """A function that builds the same agent again."""
    settings = dict(request.param)
    env = {name: settings.pop(name) for name in ("edge", "kind") if name in settings}
    return lambda: make_agent(point_env(**env), compile="auto", **settings)


def test_gradient_steps_by_graphs_are_the_steps(make_learner, recorders):
    """In double precision, on the same batches and random numbers."""
    plain = make_learner()
    if isinstance(plain.observation_space, spaces.Dict):
        pytest.skip("images are made float32; the run below has some")
    plain.learn(40)
    recorders()
    graphed = make_learner()
    graphed._setup_learn(40)
    graphed.policy.double()
    plain.policy.double()
    for name in ("model_optimizer", "prior_optimizer"):
        for each in (graphed, plain):  # in double precision from here on
            state = copy.deepcopy(getattr(plain.policy, name).state_dict())
            getattr(each.policy, name).load_state_dict(state)
    graphed.policy.load_state_dict(plain.policy.state_dict())
    for each in (plain, graphed):
        each._update_step = each._make_update_step()
    assert graphed._update_step._graphed is not None
    for turn in range(8):
        rate = 1e-3 / (1 + turn // 3)
        batch = plain.replay_buffer.sample(8)
        horizon, prior_learns = plain.sequence_length, turn % plain.policy_delay == 0
        noise = sample_update_noise(
            plain.policy.world_model, horizon, 8, plain._training_generator, prior_learns
        )
        batch, noise = in_double(batch), in_double(noise)
        results = []
        for each in (plain, graphed):
            each.policy.set_learning_rate(rate)
            results.append(each._update_step(batch, noise))
        assert results[0].keys() == results[1].keys()
        for name, value in results[0].items():
            assert results[1][name].item() == pytest.approx(value.item(), rel=1e-7, abs=1e-9), name
        for one, other in zip(weights(plain), weights(graphed), strict=True):
            th.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
    assert graphed._update_step._graphed.replays >= 4


def in_double(value):
    tensors = []
    without_tensors(value, tensors)
    cast = [each.double() if each.dtype == th.float32 else each for each in tensors]
    return with_tensors(value, iter(cast))


def test_a_run_by_graphs_learns_what_others_learn(make_learner, recorders):
    """Roundings part the runs in time; what is logged of 41 steps is about the same."""
    plain = make_learner()
    plain.learn(60)
    recorders()
    graphed = make_learner()
    graphed.learn(60)
    assert graphed._n_updates == plain._n_updates > 20
    assert graphed._update_step._graphed.replays > 20
    theirs, ours = plain._means.pop(), graphed._means.pop()
    assert theirs.keys() == ours.keys()
    for name in ("consistency_loss", "reward_loss", "value_loss", "policy_loss", "q_scale"):
        mean = theirs[f"train/{name}"]
        assert ours[f"train/{name}"] == pytest.approx(mean, rel=0.03, abs=1e-3), name


def test_loaded_weights_and_moments_are_what_is_learnt_from(
    point_env, make_agent, recorders, tmp_path
):
    recorders()
    agent = make_agent(compile="auto")
    agent.learn(40)
    agent.save(tmp_path / "agent.zip")
    saved = weights(agent)
    agent.train(4, 8)
    other = make_agent(compile="auto")
    other.learn(30)
    other.set_parameters(tmp_path / "agent.zip")
    for one, loaded in zip(saved, weights(other), strict=True):
        assert th.equal(one, loaded)
    other.replay_buffer = agent.replay_buffer
    replays = other._update_step._graphed.replays
    other.train(4, 8)
    assert other._update_step._graphed.replays != replays + 4  # recorded anew
    assert all(not th.equal(a, b) for a, b in zip(saved[:5], weights(other)[:5], strict=True))


@pytest.mark.parametrize("bad", ["reward", "noise"])
def test_what_is_not_finite_changes_nothing(bad, make_agent, recorders):
    """A loss or gradient of the world model's, or of the policy prior's alone."""
    recorders()
    agent = make_agent(compile="auto")
    agent.learn(40)
    policy, step = agent.policy, agent._update_step

    def everything():
        optimizers = (policy.model_optimizer, policy.prior_optimizer)
        moments = [
            each for one in optimizers for state in one.state.values() for each in state.values()
        ]
        return [each.detach().clone() for each in [*policy.parameters(), policy.scale, *moments]]

    given = []
    original = step._graphed
    step._graphed = lambda *arguments: given.append(arguments) or original(*arguments)
    agent.train(1, 8)
    step._graphed = original
    batch, noise = given[0]
    number_of_prior = len(list(policy.prior_parameters))
    before = everything()
    if bad == "reward":
        wrong = batch._replace(rewards=batch.rewards * float("nan")), noise
    else:
        action = noise.policy.action * float("inf")
        wrong = batch, noise._replace(policy=noise.policy._replace(action=action))
    with pytest.raises(RuntimeError, match="not finite"):
        step(*wrong)
    after = everything()
    changed = [not th.equal(one, other) for one, other in zip(before, after, strict=True)]
    if bad == "reward":
        assert not any(changed)
    else:
        names = [name for name, _ in policy.named_parameters()]
        moved = {name for name, flag in zip(names, changed, strict=False) if flag}
        assert moved
        assert not any(
            name.startswith(("world_model.policy_net", "world_model.target")) for name in moved
        )
        assert sum("policy_net" in name for name in names) == number_of_prior
        assert not changed[len(names)]  # the scale
    step(batch, noise)
    assert all(each.isfinite().all() for each in everything())


def test_steps_unless_are_torchs():
    th.manual_seed(0)
    parameters = [
        th.nn.Parameter(th.randn(4, 3)),
        th.nn.Parameter(th.randn(5)),
        th.nn.Parameter(th.randn(2)),
    ]
    exact = [th.nn.Parameter(each.detach().double()) for each in parameters]
    optimizer = Adam([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=1.0, eps=1e-5)
    reference = th.optim.Adam([{"params": exact[:1]}, {"params": exact[1:]}], lr=1.0, eps=1e-5)
    for step in range(5):
        rates = th.tensor([0.1, 0.01]) / (step + 1)
        for one, other in zip(parameters[:2], exact, strict=False):  # the last one has no gradient
            one.grad = th.randn(one.shape)
            other.grad = one.grad.double()
        failed = step in (0, 3)
        optimizer.step_unless(th.tensor(float(failed)), rates.unbind())
        if not failed:
            for group, rate in zip(reference.param_groups, rates.tolist(), strict=True):
                group["lr"] = rate
            reference.step()
        for one, other in zip(parameters, exact, strict=True):
            th.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]


# -- another device than the CPU -------------------------------------------------------------------

SPACES = {
    "vector": spaces.Box(-1.0, 1.0, (5,)),
    "image": spaces.Box(0, 255, (3, 64, 64), np.uint8),
    "dict": spaces.Dict(
        {"v": spaces.Box(-1.0, 1.0, (5,)), "p": spaces.Box(0, 255, (3, 64, 64), np.uint8)}
    ),
}


def _observations(space, *leading):
    if isinstance(space, spaces.Dict):
        return {key: _observations(value, *leading) for key, value in space.items()}
    dtype = th.uint8 if space.dtype == np.uint8 else th.float32
    return th.zeros(*leading, *space.shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("dynamics", ["mlp", "ssm"])
@pytest.mark.parametrize("episodic", [False, True], ids=["endless", "episodic"])
@pytest.mark.parametrize("space", SPACES)
def test_plans_and_gradient_steps_ask_no_device_for_numbers(space, episodic, dynamics):
    architecture = Architecture(16, 32, 32, 2, 3)
    model = WorldModel(SPACES[space], 2, architecture, dynamics, None, episodic).to("meta")
    images = 0 if space == "vector" else 1

    def normal(*shape):
        return th.zeros(shape, device="meta")

    def offsets(rows):
        return th.zeros(images, rows, 2, dtype=th.int64, device="meta") if images else None

    def dropped(*shape):
        return Dropped(th.zeros(9, dtype=th.int64, device="meta"), 0.99, shape)

    heads = th.zeros(2, 2, dtype=th.int64, device="meta")
    config = PlannerConfig(3, 32, 8, 4, 2)
    noise = PlanNoise(
        normal(3, 2, 4, 2),
        normal(2, 3, 2, 28, 2),
        normal(2, 2, 32, 2),
        heads,
        normal(2, 8),
        normal(2, 2),
        offsets(2),
    )
    with th.no_grad():
        latent = model.encode(_observations(SPACES[space], 2), noise.offsets)
    start = shift_plan(normal(2, 3, 2), th.zeros(2, dtype=th.bool, device="meta"))
    result = plan(model, latent, start, noise, config, True)
    assert all(each.is_meta for each in result)
    assert result.action.shape == (2, 2)

    valid = normal(3, 4) if episodic else None
    batch = SequenceBatch(
        _observations(SPACES[space], 4, 4), normal(3, 4, 2), normal(3, 4), normal(3, 4), valid
    )
    policy_noise = PolicyNoise(normal(4, 4, 2), heads[0], dropped(2, 16, 32))
    update_noise = UpdateNoise(
        normal(3, 4, 2), heads[0], dropped(3, 12, 32), policy_noise, offsets(4), offsets(12)
    )
    config = LossConfig(encoded_terminations=episodic, td_lambda=0.5)
    weights = step_weights(3, 3, 0.5, True).to("meta")
    losses = model_losses(model, batch, update_noise, config, weights)
    losses.total.backward()
    learnt = [
        *model.encoder.parameters(),
        *model.dynamics.parameters(),
        *model.q_ensemble.parameters(),
    ]
    assert all(each.grad.is_meta for each in learnt)
    prior = policy_loss(
        model,
        losses.latents,
        normal(),
        policy_noise,
        config,
        step_weights(4, 3, 0.5, True).to("meta"),
        0.01,
        alive_states(batch),
    )
    prior.total.backward()
    assert all(each.grad.is_meta for each in model.policy_net.parameters())


@pytest.mark.parametrize("episodic", [False, True], ids=["endless", "episodic"])
def test_compilers_see_the_losses_as_one_graph(episodic, by_torch):
    th._dynamo.reset()
    model = WorldModel(SPACES["vector"], 2, Architecture(16, 32, 32, 2, 3), "mlp", None, episodic)
    generator = th.Generator().manual_seed(0)
    observations = th.randn(4, 6, 5, generator=generator)
    actions, rewards = (th.randn(3, 6, n, generator=generator) for n in (2, 1))
    ended = th.zeros(3, 6)
    batch = SequenceBatch(observations, actions, rewards.squeeze(-1), ended, None)
    noise = sample_update_noise(model, 3, 6, generator)
    given = (model, batch, noise, LossConfig(), step_weights(3, 3, 0.5, True))
    plain = model_losses(*given)
    compiled = th.compile(model_losses, backend="eager", fullgraph=True)(*given)
    assert compiled.terms.keys() == plain.terms.keys()
    assert ("termination" in compiled.terms) is episodic
    th.testing.assert_close(compiled.total, plain.total)


@pytest.mark.parametrize("part", ["encoder", "policy_net", ""])
def test_frozen_parameters_stay_by_graphs(part, make_agent, recorders):
    """And a setting that is changed is heeded: its constants are recorded."""
    recorders()
    agent = make_agent(compile="auto")
    agent.learn(24)
    model = agent.policy.world_model
    frozen = list((getattr(model, part) if part else model).parameters())
    for each in frozen:
        each.requires_grad_(False)
    trained = [each for each in agent.policy.parameters() if each.requires_grad]
    before = [each.detach().clone() for each in (*frozen, *trained)]
    agent.tau = 0.0
    agent.train(5, 8)
    assert agent._update_step._graphed.replays > 2
    after = [*frozen, *trained]
    same = [th.equal(one, other) for one, other in zip(before, after, strict=True)]
    targets = [any(each is one for one in model.target_q_ensemble.parameters()) for each in after]
    for index, (is_same, is_target) in enumerate(zip(same, targets, strict=True)):
        assert is_same == (index < len(frozen) or is_target)
