"""Two-hot targets, their inverse and the cross-entropy, by hand."""

from __future__ import annotations

import math

import pytest
import torch as th

from tdmpc2_sb3.model.discrete_regression import (
    make_bins,
    soft_cross_entropy,
    symexp,
    symlog,
    two_hot,
    two_hot_inverse,
)

BINS = make_bins(101)  # -10, -9.8, ..., 10


def test_symlog_and_symexp_by_hand():
    e = math.e
    x = th.tensor([0.0, e - 1.0, -(e**2 - 1.0), e**9 - 1.0])
    expected = th.tensor([0.0, 1.0, -2.0, 9.0])
    th.testing.assert_close(symlog(x), expected)
    th.testing.assert_close(symexp(expected), x)


def test_bins():
    assert BINS.dtype == th.float32
    th.testing.assert_close(BINS, th.tensor([(k - 50) / 5 for k in range(101)]))


def test_two_hot_by_hand():
    # Positions in symlog space: exactly a bin, a quarter of the way to the next, out of range.
    positions = th.tensor([0.0, 0.05, -0.15, 9.9, 10.0])
    x = th.cat([symexp(positions), th.tensor([1e9, -1e9])])
    expected = th.zeros(7, 101)
    expected[0, 50] = 1.0
    expected[1, 50], expected[1, 51] = 0.75, 0.25
    expected[2, 49], expected[2, 50] = 0.75, 0.25
    expected[3, 99], expected[3, 100] = 0.5, 0.5
    expected[4, 100] = expected[5, 100] = 1.0
    expected[6, 0] = 1.0
    th.testing.assert_close(two_hot(x, BINS), expected, atol=2e-5, rtol=0)


def test_two_hot_of_a_few_bins_by_hand():
    bins = make_bins(3, -2.0, 2.0)  # -2, 0, 2
    x = symexp(th.tensor([[1.0], [-0.5]]))
    expected = th.tensor([[[0.0, 0.5, 0.5]], [[0.25, 0.75, 0.0]]])
    th.testing.assert_close(two_hot(x, bins), expected, atol=1e-6, rtol=0)


def test_two_hot_is_a_distribution_on_neighbours_with_the_right_mean():
    x = th.randn(1000, generator=th.Generator().manual_seed(0)) * 50
    weights = two_hot(x, BINS)
    assert (weights >= 0).all()
    assert ((weights > 0).sum(-1) <= 2).all()
    first = (weights > 0).float().argmax(-1)
    rest = weights.clone()
    rest[th.arange(1000), first] = 0
    rest[th.arange(1000), (first + 1).clamp(max=100)] = 0
    assert rest.abs().max() == 0  # the two are neighbours
    th.testing.assert_close(weights.sum(-1), th.ones(1000), atol=1e-5, rtol=0)
    th.testing.assert_close(weights @ BINS, symlog(x), atol=1e-4, rtol=0)


def test_inverse_undoes_two_hot():
    x = th.tensor([-2000.0, -3.3, -0.01, 0.0, 0.5, 1.0, 123.0, 20000.0])
    logits = two_hot(x, BINS).clamp_min(1e-12).log()
    th.testing.assert_close(two_hot_inverse(logits, BINS), x, rtol=1e-4, atol=1e-5)


def test_inverse_by_hand():
    th.testing.assert_close(two_hot_inverse(th.zeros(2, 101), BINS), th.zeros(2), atol=1e-6, rtol=0)
    logits = th.full((101,), -1e4)
    logits[60] = 3.0  # all weight on 2.0
    assert float(two_hot_inverse(logits, BINS)) == pytest.approx(math.e**2 - 1.0, rel=1e-6)
    logits[70] = 3.0 + math.log(3.0)  # a quarter on 2.0, three on 4.0: 3.5
    assert float(two_hot_inverse(logits, BINS)) == pytest.approx(math.e**3.5 - 1.0, rel=1e-5)


def test_cross_entropy_and_its_gradient_by_hand():
    target = two_hot(symexp(th.tensor([0.05])), BINS)
    uniform = th.zeros(1, 101, requires_grad=True)
    loss = soft_cross_entropy(uniform, target)
    assert loss.item() == pytest.approx(math.log(101), rel=1e-6)
    loss.sum().backward()
    th.testing.assert_close(uniform.grad, th.full((1, 101), 1 / 101) - target, atol=1e-6, rtol=0)

    logits = th.zeros(1, 101)
    logits[0, 50], logits[0, 51] = 2.0, 1.0
    normaliser = math.log(99 + math.e**2 + math.e)
    expected = -(0.75 * (2.0 - normaliser) + 0.25 * (1.0 - normaliser))
    assert float(soft_cross_entropy(logits, target)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1,), "num_bins is 1.*at least 2"), ((5, 2.0, 2.0), r"\[2.0, 2.0\] is empty")],
)
def test_bad_bins(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_bins(*arguments)
