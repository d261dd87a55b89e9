"""The chooser: kernels for float32, plain torch for the rest and for parts of other classes."""

from __future__ import annotations

import math

import pytest
import torch as th
from torch import nn

from tdmpc2_sb3 import kernels
from tdmpc2_sb3.model.dynamics.ssm import SSMLayer
from tdmpc2_sb3.model.layers import MLP, Linear, Mish, NormedLinear, QEnsemble
from tdmpc2_sb3.model.operations import exponential, has_kernel, move_towards_, total_norm

TYPES = [th.float32, th.float64]


@pytest.mark.parametrize("dtype", TYPES)
def test_by_hand(dtype):
    arrays = [th.tensor([3.0, 0.0], dtype=dtype), th.tensor([[4.0]], dtype=dtype)]
    assert total_norm(arrays).item() == 5.0
    move_towards_(arrays, [th.tensor([7.0, 2.0], dtype=dtype), th.zeros(1, 1, dtype=dtype)], 0.25)
    assert [each.tolist() for each in arrays] == [[4.0, 0.5], [[3.0]]]
    logarithm = nn.Parameter(th.tensor([math.log(2.0)], dtype=dtype))
    found = exponential(logarithm, added=1.0)
    assert found.item() == pytest.approx(3.0, rel=1e-6)
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", TYPES)
def test_a_kernel_is_taken_where_it_may_be(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "gelu_sum", lambda a, b: "kernel")
    monkeypatch.setattr(kernels, "usable", lambda x: x.dtype is th.float32)

    @has_kernel("gelu_sum")
    def plain(a, b):
        """Told."""
        return "plain"

    x = th.zeros(2, dtype=dtype)
    assert plain(x, x) == plain(x, b=x) == ("kernel" if dtype is th.float32 else "plain")
    assert (plain.__name__, plain.__doc__) == ("plain", "Told.")


def test_a_norm_of_another_class_is_computed():
    class Doubling(nn.LayerNorm):
        def forward(self, x):
            return 2.0 * super().forward(x)

    layer, stream = SSMLayer(8, 4, selective=True), th.randn(3, 8)
    expected = 2.0 * layer.normed(stream)
    layer.norm.__class__ = Doubling
    th.testing.assert_close(layer.normed(stream), expected)


def test_layers_that_the_kernels_do_not_know():
    class Other(NormedLinear):
        pass

    class OtherMLP(MLP):
        pass

    class OtherEnsemble(QEnsemble):
        pass

    assert [len(each.as_kernel()) for each in (MLP(3, [4, 4], 2), QEnsemble(2, 3, 4, 5, 0.0))] == [
        3,
        3,
    ]
    assert len(NormedLinear(3, 4).as_kernel()) == len(Linear(3, 4).as_kernel()) == 1
    assert Other(3, 4).as_kernel() is None
    assert NormedLinear(3, 4, nn.ReLU()).as_kernel() is None
    assert OtherMLP(3, [4], 2).as_kernel() is None
    assert OtherEnsemble(2, 3, 4, 5, 0.0).as_kernel() is None
    network = MLP(3, [4], 2)
    network[0].activation = nn.Sequential(Mish())
    assert network.as_kernel() is None
