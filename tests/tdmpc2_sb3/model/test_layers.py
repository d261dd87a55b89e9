"""Building blocks against torch's own kernels and plain loops, values and gradients."""

from __future__ import annotations

import pytest
import torch as th
import torch.nn.functional as F
from torch import nn

from tdmpc2_sb3.model.layers import (
    MLP,
    EnsembleLayer,
    NormedLinear,
    QEnsemble,
    SimNorm,
    broadcast_linear,
    mish,
    simnorm,
)


def randn(*shape, seed=0, dtype=th.float32):
    return th.randn(*shape, generator=th.Generator().manual_seed(seed), dtype=dtype)


def gradient(function, x, weights):
    x = x.clone().requires_grad_(True)
    (function(x) * weights).sum().backward()
    return x.grad


WIDE = th.cat([th.linspace(-30, 30, 2001), th.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4])])


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_mish_is_torchs(dtype):
    x = WIDE.to(dtype)
    expected = F.mish(x.double())
    slope = gradient(F.mish, x.double(), th.ones_like(x).double())
    # A few roundings of numbers as large as x.
    allowed = 3 * th.finfo(dtype).eps * (1.0 + x.abs())
    with_gradient = mish(x.clone().requires_grad_(True)).detach()
    for value, truth in (
        (mish(x), expected),
        (with_gradient, expected),
        (gradient(mish, x, th.ones_like(x)), slope),
    ):
        assert value.dtype == dtype
        assert ((value - truth).abs() <= allowed).all()


def test_mish_of_a_tensor_large_enough_to_be_worked_on_in_pieces():
    x = 3 * randn(700, 450)
    weights = randn(700, 450, seed=1)
    th.testing.assert_close(mish(x), F.mish(x), rtol=1e-5, atol=2e-6)
    slope = gradient(F.mish, x, weights)
    th.testing.assert_close(gradient(mish, x, weights), slope, rtol=1e-5, atol=5e-6)
    th.testing.assert_close(mish(x.T), F.mish(x.T), rtol=1e-5, atol=2e-6)


def test_mish_does_not_change_its_input():
    x = WIDE.clone()
    with th.no_grad():
        mish(x)
    mish(x.requires_grad_(True)).sum().backward()
    assert th.equal(x.detach(), WIDE)


@pytest.mark.parametrize("simnorm_dim", [2, 8])
def test_simnorm_is_a_softmax_of_each_group(simnorm_dim):
    x = 5 * randn(3, 4, 16)
    weights = randn(3, 4, 16, seed=1)

    def plain(x):
        return th.cat([F.softmax(group, -1) for group in x.split(simnorm_dim, -1)], -1)

    y = simnorm(x, simnorm_dim)
    th.testing.assert_close(y, plain(x), rtol=1e-5, atol=1e-7)
    assert (y >= 0).all()
    sums = y.view(3, 4, -1, simnorm_dim).sum(-1)
    th.testing.assert_close(sums, th.ones_like(sums))
    th.testing.assert_close(
        gradient(lambda x: simnorm(x, simnorm_dim), x, weights),
        gradient(plain, x, weights),
        rtol=1e-5,
        atol=1e-6,
    )


def test_simnorm_by_hand():
    x = th.log(th.tensor([1.0, 3.0, 2.0, 2.0]))
    th.testing.assert_close(SimNorm(2)(x), th.tensor([0.25, 0.75, 0.5, 0.5]))


def test_simnorm_of_a_transposed_tensor_and_of_large_entries():
    x = randn(16, 5).T
    with th.no_grad():
        th.testing.assert_close(simnorm(x, 8), simnorm(x.clone(), 8))
    large = th.tensor([[80.0, -80.0, 0.0, 70.0, 0.0, 0.0, 0.0, 0.0]])
    th.testing.assert_close(simnorm(large, 8), F.softmax(large, -1))


def test_gradients_in_double_precision():
    x = randn(3, 16, dtype=th.float64).requires_grad_(True)
    assert th.autograd.gradcheck(mish, x)
    assert th.autograd.gradcheck(lambda x: simnorm(x, 8), x)


def test_normed_linear_is_linear_then_norm_then_mish(roughen):
    layer = NormedLinear(5, 8)
    roughen(layer)
    assert set(layer.state_dict()) == {"weight", "bias", "ln.weight", "ln.bias"}
    x = randn(7, 5)
    plain = F.mish(
        F.layer_norm(F.linear(x, layer.weight, layer.bias), (8,), layer.ln.weight, layer.ln.bias)
    )
    th.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-6)


def test_pairs_broadcast_like_a_concatenation(roughen):
    weight, bias = randn(6, 8), randn(6, seed=1)
    z, a = randn(3, 1, 5, seed=2), randn(3, 10, 3, seed=3)
    joined = th.cat([z.expand(3, 10, 5), a], -1)
    expected = F.linear(joined, weight, bias)
    th.testing.assert_close(broadcast_linear(z, a, weight, bias), expected, rtol=1e-5, atol=1e-5)
    th.testing.assert_close(
        broadcast_linear(z[:1], a[:1], weight, bias), expected[:1], rtol=1e-5, atol=1e-5
    )
    net = MLP(8, [12, 12], 16, SimNorm(8))
    roughen(net)
    th.testing.assert_close(net.forward_pair(z, a), net(joined), rtol=1e-5, atol=1e-6)


def test_an_activation_without_a_kernel_is_applied_all_the_same(roughen):
    net = MLP(8, [12], 16, nn.ReLU())
    roughen(net)
    z, a = randn(10, 5), randn(10, 3, seed=1)
    joined = th.cat([z, a], -1)
    hidden, last = net
    expected = F.relu(last.ln(F.linear(hidden(joined), last.weight, last.bias)))
    assert (expected == 0).any()
    th.testing.assert_close(net(joined), expected, rtol=1e-5, atol=1e-6)
    th.testing.assert_close(net.forward_pair(z, a), expected, rtol=1e-5, atol=1e-6)


def test_freezing_one_parameter_leaves_the_others_their_gradients(roughen):
    net = MLP(8, [12, 12], 5)
    roughen(net)
    x = randn(10, 8)
    net(x).square().sum().backward()
    expected = {name: each.grad.clone() for name, each in net.named_parameters()}
    net.zero_grad()
    net[0].weight.requires_grad_(False)
    net(x).square().sum().backward()
    assert net[0].weight.grad is None
    for name, each in net.named_parameters():
        if name != "0.weight":
            assert th.equal(each.grad, expected[name])


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("members", [None, [2, 0]])
def test_q_ensemble_is_a_loop_over_its_members(roughen, dropping, members):
    ensemble = QEnsemble(4, 7, 10, 5, dropout=0.3)
    roughen(ensemble)
    z, a = randn(2, 3, 4), randn(2, 3, 3, seed=1)
    chosen = list(range(4)) if members is None else members
    dropped = None
    if dropping:
        dropped = ensemble.sample_dropout(len(chosen), 6, th.Generator().manual_seed(0))
    index = None if members is None else th.tensor(members)
    logits = ensemble(z, a, index, dropped)
    assert logits.shape == (len(chosen), 2, 3, 5)
    first, second, last = ensemble.layers
    for row, member in enumerate(chosen):
        x = th.cat([z, a], -1).view(6, 7)
        for number, layer in enumerate((first, second)):
            x = F.linear(x, layer.weight[member], layer.bias[member])
            if number == 0 and dropped is not None:
                x = x * dropped.mask()[row]
            x = F.layer_norm(x, (10,), layer.ln["weight"][member], layer.ln["bias"][member])
            x = F.mish(x)
        x = F.linear(x, last.weight[member], last.bias[member])
        th.testing.assert_close(logits[row].reshape(6, 5), x, rtol=1e-5, atol=1e-5)


def test_dropout_multiplies_by_zero_or_the_inverse_of_the_kept_share():
    ensemble = QEnsemble(2, 3, 100, 5, dropout=0.25)
    mask = ensemble.sample_dropout(2, 500, th.Generator().manual_seed(0)).mask()
    th.testing.assert_close(mask.unique(), th.tensor([0.0, 1 / 0.75]))
    assert float((mask == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert QEnsemble(2, 3, 4, 5, 0.0).sample_dropout(2, 3, th.Generator()) is None


def test_initial_weights():
    th.manual_seed(0)
    net = MLP(300, [400, 400], 10)
    layer = EnsembleLayer(3, 300, 400, normed=True)
    for weight in (net[0].weight, net[1].weight, net[2].weight, layer.weight):
        weight = weight.detach()
        assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
        assert float(weight.mean()) == pytest.approx(0.0, abs=1e-3)
        assert weight.abs().max() < 0.12
    assert not any(bias.abs().max() for bias in (net[0].bias, net[2].bias, layer.bias))
    assert th.equal(layer.ln["weight"], th.ones(3, 400))
    ensemble = QEnsemble(2, 4, 8, 5, 0.0)
    assert not ensemble(randn(3, 2), randn(3, 2)).abs().max()  # the last layer starts at zero
    assert isinstance(net[2], nn.Linear)
