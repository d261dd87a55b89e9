"""Adam, norms and averages of many arrays against torch's own in double precision."""

from __future__ import annotations

import copy

import pytest
import torch as th

from tdmpc2_sb3.fast.adam import Adam
from tdmpc2_sb3.kernels import lerp_, library, total_norm, usable_arrays

SHAPES = [(), (1,), (7,), (5, 3), (0, 4), (33, 17), (700, 513)]


@pytest.fixture(autouse=True)
def _kernels_are_built():
    if library() is None:
        pytest.skip("no C compiler here: torch's own are used")


def draw(seed, scale=1.0):
    generator = th.Generator().manual_seed(seed)
    return [scale * th.randn(shape, generator=generator) for shape in SHAPES]


def make_groups(parameters):
    """Two rates."""
    return [
        {"params": parameters[:4], "lr": 1e-2},
        {"params": parameters[4:], "lr": 3e-4},
    ]


def assert_close(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        th.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-8, 1e-3])
def test_steps(threads, eps, monkeypatch):
    """Gradients of all sizes, one of them missing, and rates that change."""
    parameters = [th.nn.Parameter(each) for each in draw(0)]
    exact = [th.nn.Parameter(each.detach().double()) for each in parameters]
    optimizer = Adam(make_groups(parameters), betas=(0.8, 0.95), eps=eps, fused=True)
    reference = th.optim.Adam(make_groups(exact), betas=(0.8, 0.95), eps=eps, fused=True)
    by_torch = []
    original = th.optim.Adam.step
    monkeypatch.setattr(
        th.optim.Adam, "step", lambda self, *args: by_torch.append(self) or original(self, *args)
    )
    for step in range(6):
        for one, other, gradient in zip(
            parameters, exact, draw(step + 1, 10.0**-step), strict=True
        ):
            one.grad, other.grad = gradient, gradient.double()
        parameters[2].grad = exact[2].grad = None
        for each in (optimizer, reference):
            each.param_groups[0]["lr"] = 1e-2 / (step + 1)
            each.step()
    assert by_torch.count(optimizer) == 1, "the first step makes the state"
    assert_close(parameters, exact)
    ours, theirs = optimizer.state_dict(), reference.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in theirs["state"].items():
        assert float(ours["state"][key]["step"]) == float(state["step"]) == 6.0
        assert_close(
            [ours["state"][key][name] for name in ("exp_avg", "exp_avg_sq")],
            [state[name] for name in ("exp_avg", "exp_avg_sq")],
        )


def test_goes_on_from_torchs_state_and_the_other_way_round():
    parameters = [th.nn.Parameter(each) for each in draw(0)]
    others = [th.nn.Parameter(each.detach().clone()) for each in parameters]
    optimizers = Adam(parameters, fused=True), th.optim.Adam(others, fused=True)
    for step in range(6):
        for one, other, gradient in zip(parameters, others, draw(step + 1), strict=True):
            one.grad, other.grad = gradient, gradient.clone()
        for each in optimizers:
            each.step()
        if step % 2:
            first, second = (copy.deepcopy(each.state_dict()) for each in optimizers)
            optimizers[0].load_state_dict(second)
            optimizers[1].load_state_dict(first)
    assert_close(parameters, others)


@pytest.mark.parametrize(
    "settings", [{"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}], ids=str
)
def test_other_settings_are_torchs(settings):
    parameters = [th.nn.Parameter(each) for each in draw(0)]
    others = [th.nn.Parameter(each.detach().clone()) for each in parameters]
    optimizers = Adam(parameters, **settings), th.optim.Adam(others, **settings)
    for step in range(3):
        for one, other, gradient in zip(parameters, others, draw(step + 1), strict=True):
            one.grad, other.grad = gradient, gradient.clone()
        for each in optimizers:
            each.step()
    for one, other in zip(parameters, others, strict=True):
        assert th.equal(one, other)


def test_norm(threads):
    arrays = [1e4 * each for each in draw(0)]
    expected = th.cat([each.flatten() for each in arrays]).double().norm()
    assert float(total_norm(arrays)) == pytest.approx(float(expected), rel=1e-6)
    arrays[3][1, 1] = float("nan")
    assert th.isnan(total_norm(arrays))
    arrays[3][1, 1] = float("inf")
    assert th.isinf(total_norm(arrays))


def test_lerp(threads):
    arrays, targets = draw(0), draw(1)
    expected = [th.lerp(one, other, 0.3) for one, other in zip(arrays, targets, strict=True)]
    lerp_(arrays, targets, 0.3)
    assert_close(arrays, expected)


def test_what_is_readable():
    array = th.zeros(3, 4)
    assert usable_arrays([array, array[1:]])
    assert not usable_arrays([array, array.t()])
    assert not usable_arrays([array, array.double()])
    assert not usable_arrays([])
