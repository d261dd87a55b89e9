"""Which way plans and gradient steps go; what each way computes is tested with it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch as th

from tdmpc2_sb3 import kernels
from tdmpc2_sb3.kernels.products import MIN_ROWS, operation_counter, usable_product
from tdmpc2_sb3.losses import LossConfig


@pytest.fixture(autouse=True)
def _kernels_multiply():
    if not usable_product(MIN_ROWS, 16):
        pytest.skip("no products by kernels here: everything goes the plain way")


@pytest.mark.parametrize("compile", [True, False, "auto"])
def test_the_kernels_go_before_graphs_and_after_a_compiler(make_agent, compile):
    policy = make_agent().policy
    policy.set_compile(compile)
    ways, config = policy.ways, LossConfig()
    directly = compile is not True
    assert (ways.direct_planning(policy.planner) is not None) == directly
    assert (ways.direct_gradients(config, compile) is not None) == directly
    assert ways.recorded(len, list, compile) is None  # not on a CPU


def test_where_the_kernels_may_not_work(make_agent, monkeypatch):
    policy = make_agent().policy
    ways = policy.ways
    assert ways.by_kernels(th.zeros(2))
    assert not ways.by_kernels(th.zeros(2, dtype=th.float64))
    with operation_counter():  # whose operations are to be seen
        assert ways.direct_planning(policy.planner) is None
    policy.double()
    policy.world_model.bins = policy.world_model.bins.double()
    assert not ways.by_kernels()
    assert ways.direct_planning(policy.planner) is None
    assert ways.declined(LossConfig(), "auto") == []  # no faster way is there to be missed


def test_what_is_declined_is_said(make_agent):
    policy = make_agent().policy
    ways, head = policy.ways, policy.world_model.reward_net
    assert ways.declined(LossConfig(), "auto") == []
    head.__class__ = type("Own", (type(head),), {})
    lines = ways.declined(LossConfig(), "auto")
    assert [line.split(" go ")[0] for line in lines] == ["Gradient steps", "Plans"]
    assert all("reward_net is not known" in line for line in lines)
    assert ways.declined(LossConfig(), True) == []
    assert ways.direct_planning(policy.planner) is None
    assert ways.direct_gradients(LossConfig(), "auto") is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_plans_with_its_own_model(make_agent, copied):
    policy = make_agent().policy
    observation = policy.observation_space.sample()
    before = policy.predict(observation, deterministic=True)[0]
    other = copied(policy)
    assert other.ways._policy is other
    assert (other.predict(observation, deterministic=True)[0] == before).all()
    with th.no_grad():
        for parameter in other.world_model.policy_net.parameters():
            parameter.add_(1.0)
        for parameter in other.world_model.q_ensemble.parameters():
            parameter.add_(th.randn(parameter.shape))
    assert (other.predict(observation, deterministic=True)[0] != before).any()
    assert (policy.predict(observation, deterministic=True)[0] == before).all()


def test_the_library_is_asked_at_every_plan(make_agent, monkeypatch):
    """So that a model that goes to another device goes another way there."""
    policy = make_agent().policy
    assert policy.ways.direct_planning(policy.planner) is not None
    monkeypatch.setattr(kernels, "usable", lambda x: False)
    assert policy.ways.direct_planning(policy.planner) is None
