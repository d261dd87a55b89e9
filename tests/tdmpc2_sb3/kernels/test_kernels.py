"""The CPU kernels against torch's own operations in double precision, values and gradients."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import subprocess
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F

from tdmpc2_sb3 import kernels
from tdmpc2_sb3.kernels import Activation, Dropped, Layer, Norm, library
from tdmpc2_sb3.kernels.arguments import SIMPLEX, arguments_of, on_simplices
from tdmpc2_sb3.kernels.library import SWITCH
from tdmpc2_sb3.kernels.products import operation_counter
from tdmpc2_sb3.model.discrete_regression import make_bins, soft_cross_entropy, symexp, two_hot
from tdmpc2_sb3.model.dynamics.ssm import DT_MAX, DT_MIN, discretise, scan

EPS = 1e-5
MISH = Norm(Activation.MISH, eps=EPS)


@pytest.fixture(autouse=True)
def _kernels_are_built():
    if library() is None:
        pytest.skip("no C compiler here: plain torch is used, which the other tests cover")


def randn(*shape, seed=0, scale=1.0):
    return scale * th.randn(*shape, generator=th.Generator().manual_seed(seed))


def activate(h, activation, simnorm_dim):
    if activation is Activation.MISH:
        return F.mish(h)
    if activation is Activation.SIMNORM:
        return F.softmax(h.view(*h.shape[:-1], -1, simnorm_dim), -1).view(h.shape)
    return h


def compare(fast, plain, inputs, rtol=1e-5):
    """Outputs and gradients of both, relative to the largest entry of each."""
    exact = [x.double().detach().requires_grad_(x.requires_grad) for x in inputs]
    expected = plain(*exact)
    weights = randn(*expected.shape, seed=99)
    wanted = [x for x in exact if x.requires_grad]
    expected_grads = th.autograd.grad((expected * weights.double()).sum(), wanted)
    result = fast(*inputs)
    grads = th.autograd.grad((result * weights).sum(), [x for x in inputs if x.requires_grad])
    with th.no_grad():
        bare = fast(*inputs)
    assert result.shape == bare.shape == expected.shape
    results, expectations = (result, bare, *grads), (expected, expected, *expected_grads)
    for ours, theirs in zip(results, expectations, strict=True):
        difference = (ours.detach().double() - theirs.detach()).abs().max()
        assert float(difference) <= rtol * max(1.0, float(theirs.detach().abs().max()))


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize(
    ("rows", "cols", "simnorm_dim"),
    [(3, 8, 8), (5, 24, 4), (700, 256, 8), (4, 300, 4), (2, 520, 8)],  # Mish takes 256 at a time
)
def test_normed_linear(threads, activation, rows, cols, simnorm_dim):
    inputs = [
        randn(2, rows, 6, scale=3.0, seed=1),
        randn(cols, 6, seed=2),
        randn(cols, seed=3),
        randn(cols, seed=4),
        randn(cols, seed=5),
    ]

    def fast(x, weight, bias, gain, shift):
        norm = Norm(activation, simnorm_dim, EPS)
        return kernels.networks(x, None, [Layer(weight, bias, gain, shift, norm)])

    def plain(x, weight, bias, gain, shift):
        h = F.layer_norm(F.linear(x, weight, bias), (cols,), gain, shift, EPS)
        return activate(h, activation, simnorm_dim)

    compare(fast, plain, [x.requires_grad_(True) for x in inputs])


def make_dropped(*shape, seed, keep=0.84):
    """Dropout of a sixth, and what it multiplies with. Two positions behind all mean nothing."""
    kept = randn(*shape, seed=seed) > -1.0
    positions = th.cat([(~kept).view(-1).nonzero()[:, 0], th.tensor([kept.numel()] * 2)])
    return Dropped(positions, keep, shape), kept.double() / keep


def test_what_is_dropped_as_a_mask():
    dropped = Dropped(th.tensor([0, 3, 5, 6, 6]), 0.5, (2, 1, 3))
    assert dropped.mask().tolist() == [[[0.0, 2.0, 2.0]], [[0.0, 2.0, 0.0]]]
    assert dropped.of(1).positions.tolist() == [0, 2]
    assert dropped.of(1).mask().tolist() == [[0.0, 2.0, 0.0]]


@pytest.mark.parametrize("with_dropout", [False, True])
def test_normed_linear_of_an_ensemble(threads, with_dropout):
    members, rows, cols = 3, 90, 136
    x = randn(rows, 7, seed=1)
    dropped, mask = make_dropped(members, rows, cols, seed=6) if with_dropout else (None, None)
    inputs = [
        x,
        randn(members, cols, 7, seed=2),
        randn(members, cols, seed=3),
        randn(members, cols, seed=4),
        randn(members, cols, seed=5),
    ]

    def fast(x, weight, bias, gain, shift):
        layer = Layer(weight, bias, gain, shift, MISH)
        return kernels.networks(x, None, [layer], dropped, tuple(range(members)))

    def plain(x, weight, bias, gain, shift):
        y = x @ weight.transpose(1, 2) + bias.unsqueeze(1)
        y = y if mask is None else y * mask
        return F.mish(F.layer_norm(y, (cols,), eps=EPS) * gain.unsqueeze(1) + shift.unsqueeze(1))

    compare(fast, plain, [x.requires_grad_(True) for x in inputs])


@pytest.mark.parametrize("members", [(2, 0), (1, 1), (0, 1, 2)])
@pytest.mark.parametrize("normed", [True, False])
def test_some_members_of_an_ensemble(normed, members):
    """Their parameters alone get gradients; a member taken twice gets both."""
    index = list(members)
    inputs = [randn(30, 7), randn(3, 16, 7, seed=2), randn(3, 16, seed=3)]
    inputs += [randn(3, 16, seed=4), randn(3, 16, seed=5)] if normed else []

    def fast(x, weight, bias, *affine):
        layer = Layer(weight, bias, *affine, norm=MISH if normed else None)
        return kernels.networks(x, None, [layer], members=members)

    def plain(x, weight, bias, *affine):
        y = x @ weight[index].transpose(1, 2) + bias[index].unsqueeze(1)
        if not normed:
            return y
        gain, shift = (each[index].unsqueeze(1) for each in affine)
        return F.mish(F.layer_norm(y, (16,), eps=EPS) * gain + shift)

    compare(fast, plain, [x.requires_grad_(True) for x in inputs])


@pytest.mark.parametrize(("rows", "width"), [(1, 5), (40, 5), (520, 130)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(rows, width, with_bias):
    inputs = [randn(2, rows, 131), randn(width, 131, seed=1)]
    inputs += [randn(width, seed=2)] if with_bias else []

    def fast(x, weight, bias=None):
        return kernels.networks(x, None, [Layer(weight, bias)])

    compare(fast, F.linear, [x.requires_grad_(True) for x in inputs])


def products_are_ours() -> bool:
    return library().panel_width() > 0


@pytest.mark.parametrize("rows", [8, 9, 14, 15, 29, 57, 97, 230])  # few tiles of rows, and many
@pytest.mark.parametrize(("depth", "cols"), [(1, 1), (5, 31), (16, 32), (17, 33), (50, 70)])
@pytest.mark.parametrize("cut", ["neither", "left", "right"])
def test_products_of_any_shape(threads, rows, depth, cols, cut):
    """Of whole matrices, and of columns cut from wider ones."""
    x = randn(rows, depth + 7, seed=2)[:, 3 : 3 + depth] if cut == "left" else randn(rows, depth)
    weight = randn(cols, depth + 7, seed=1)[:, 3 : 3 + depth]
    weight = weight if cut == "right" else weight.contiguous()
    inputs = [each.requires_grad_(True) for each in (x, weight, randn(cols, seed=3))]
    compare(lambda x, *layer: kernels.networks(x, None, [Layer(*layer)]), F.linear, inputs)


def test_a_row_that_is_repeated_without_a_copy(threads):
    inputs = [randn(1, 40), randn(50, 40, seed=1), randn(50, seed=2)]
    inputs = [each.requires_grad_(True) for each in inputs]
    compare(
        lambda x, *layer: kernels.networks(x.expand(100, -1), None, [Layer(*layer)]),
        lambda x, *layer: F.linear(x.expand(100, -1), *layer),
        inputs,
    )


@pytest.mark.parametrize("rows", [20, 230])
def test_products_spread_no_further_than_a_row(rows):
    """An entry that is not finite, and rows beyond the last, leave other rows alone."""
    x, weight = randn(rows, 6), randn(40, 6, seed=1)
    x[3, 2] = float("inf")
    result = kernels.networks(x, None, [Layer(weight, None)])
    finite = result.isfinite().all(1)
    assert finite.tolist() == [row != 3 for row in range(rows)]


def test_a_row_is_the_same_alone_in_a_crowd_and_by_any_number_of_threads():
    if not products_are_ours():
        pytest.skip("torch's own products are used on this processor")
    layers = [Layer(randn(96, 40), randn(96), th.ones(96), th.zeros(96), MISH)]
    x = randn(700, 40, seed=4)
    before = th.get_num_threads()
    with th.no_grad():
        th.set_num_threads(1)
        alone = kernels.networks(x, None, layers)
        few = kernels.networks(x[:20], None, layers)
        crowd = kernels.networks(th.cat([x[100:], x]), None, layers)
        th.set_num_threads(2)
        two = kernels.networks(x, None, layers)
        th.set_num_threads(before)
    assert th.equal(alone[:20], few)
    assert th.equal(alone, crowd[600:])
    assert th.equal(alone, two)


def test_weights_are_laid_out_anew_once_they_may_have_changed():
    x, weight = randn(30, 12), randn(20, 12, seed=1)
    layers = [Layer(weight, None)]
    with kernels.fixed_weights():
        kernels.networks(x, None, layers)
        with kernels.fixed_weights():  # of what is fixed already
            kernels.networks(x, None, layers)
    weight.mul_(2.0)
    for held in (True, False):
        with kernels.fixed_weights() if held else contextlib.nullcontext():
            once = kernels.networks(x, None, layers)
            again = kernels.networks(x, None, layers)
        th.testing.assert_close(once, x @ weight.t(), rtol=1e-5, atol=1e-5)
        assert th.equal(once, again)


def test_a_parameter_may_be_put_elsewhere():
    """What was made for a network is not used for its weight's new place or layout."""
    x, weight = randn(30, 12), th.nn.Parameter(randn(20, 12, seed=1))
    layers = [Layer(weight, None)]
    with th.no_grad():
        kernels.networks(x, None, layers)
        for new in (randn(20, 12, seed=2), randn(20, 24, seed=3)[:, ::2], randn(24, 12, seed=4)):
            weight.data = new
            result = kernels.networks(x, None, layers)
            th.testing.assert_close(result, x @ new.t(), rtol=1e-5, atol=1e-5)


def test_members_asked_for_in_turn_are_laid_out_each():
    """While weights are fixed and after they have changed, forwards and backwards."""
    x, weight = randn(30, 12).requires_grad_(True), randn(4, 20, 12, seed=1)
    for _ in range(2):
        with kernels.fixed_weights():
            for members in ((0, 1), (1, 2), (2, 0), (3, 3)):
                result = kernels.networks(x, None, [Layer(weight, None)], members=members)
                expected = x @ weight[list(members)].transpose(1, 2)
                th.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
                (grad,) = th.autograd.grad(result.sum(), x)
                (expected_grad,) = th.autograd.grad(expected.sum(), x)
                th.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)
        weight.neg_()


def test_a_network_is_not_kept_alive():
    if not products_are_ours():
        pytest.skip("torch's own products are used on this processor")
    layers = [Layer(th.nn.Parameter(randn(20, 12)), None)]
    with kernels.fixed_weights():
        kernels.networks(randn(30, 12), None, layers).sum().backward()
    assert arguments_of(layers) is arguments_of(layers)  # made once
    made = weakref.ref(arguments_of(layers))
    weight = weakref.ref(layers.pop().weight)
    gc.collect()
    assert weight() is None
    assert made() is None


def test_what_one_thread_holds_is_not_another_ones():
    """One plans while another one learns."""
    x, weight = randn(30, 12), randn(20, 12, seed=1)
    layers = [Layer(weight, None)]
    with kernels.fixed_weights(), ThreadPoolExecutor(1) as other:
        kernels.networks(x, None, layers)
        weight.mul_(2.0)
        result = other.submit(kernels.networks, x, None, layers).result()
    th.testing.assert_close(result, x @ weight.t(), rtol=1e-5, atol=1e-5)


def test_several_layers_are_one_after_the_other(threads):
    """Of one network, and of two of three; gradients included."""
    sizes = [(24, 7 + 3), (16, 24), (9, 16)]
    parameters = [
        randn(3, *shape, seed=position)
        for position, (out, inputs) in enumerate(sizes)
        for shape in ((out, inputs), (out,), (out,), (out,))
    ][:-2]
    z, a = randn(2, 50, 7, seed=20), randn(2, 50, 3, seed=21)
    dropped, mask = make_dropped(2, 100, 24, seed=22)
    inputs = [x.requires_grad_(True) for x in (z, a, *parameters)]

    def layers(parameters):
        norms = [MISH, MISH, None]
        return [Layer(*parameters[4 * i : 4 * i + 4], norm=norm) for i, norm in enumerate(norms)]

    def one_network(z, a, parameters, mask):
        y = th.cat([z, a], -1).view(100, 10)
        for position in range(3):
            weight, bias, *affine = parameters[4 * position : 4 * position + 4]
            y = F.linear(y, weight, bias)
            y = y * mask.to(y.dtype) if position == 0 else y
            y = F.mish(F.layer_norm(y, y.shape[-1:], *affine, EPS)) if affine else y
        return y.view(2, 50, -1)

    compare(
        lambda z, a, *p: kernels.networks(z, a, layers(p), dropped, members=(2, 0)),
        lambda z, a, *p: th.stack(
            [one_network(z, a, [x[m] for x in p], mask[i]) for i, m in enumerate((2, 0))]
        ),
        inputs,
    )
    single = [x if position < 2 else x[1].detach() for position, x in enumerate(inputs)]
    compare(
        lambda z, a, *p: kernels.networks(z, a, layers(p), dropped.of(0)),
        lambda z, a, *p: one_network(z, a, p, mask[0]),
        [x.detach().requires_grad_(True) for x in single],
    )


@pytest.mark.parametrize(("rows", "latent_dim", "width"), [(9, 8, 24), (70, 40, 30), (128, 64, 96)])
@pytest.mark.parametrize("with_norm", [True, False])
def test_a_rollout_is_its_steps(threads, rows, latent_dim, width, with_norm):
    """Gradients by every latent included."""
    if not products_are_ours():
        pytest.skip("torch's own products are used on this processor")
    sizes = [(width, latent_dim + 3), (latent_dim, width)]
    parameters = [
        randn(*shape, seed=position)
        for position, (out, inputs) in enumerate(sizes)
        for shape in ((out, inputs), (out,), (out,), (out,))
    ][: None if with_norm else -2]
    z, actions = randn(2, rows, latent_dim, seed=8), randn(4, 2, rows, 3, seed=9)
    norms = [MISH, Norm(Activation.SIMNORM, 4, EPS) if with_norm else None]
    wanted = [each.requires_grad_(True) for each in (z, *parameters)]

    def fast(z, *parameters):
        layers = [Layer(*parameters[4 * i : 4 * i + 4], norm=norm) for i, norm in enumerate(norms)]
        assert kernels.usable_rollout(z, actions, layers)
        return kernels.rollout(z, actions, layers)

    def plain(z, weight, bias, gain, shift, weight_2, bias_2, *affine):
        latents = []
        for action in actions.double():
            h = F.linear(th.cat([z, action], -1), weight, bias)
            h = F.mish(F.layer_norm(h, (width,), gain, shift, EPS))
            z = F.linear(h, weight_2, bias_2)
            if with_norm:
                z = activate(F.layer_norm(z, (latent_dim,), *affine, EPS), Activation.SIMNORM, 4)
            latents.append(z)
        return th.stack(latents)

    compare(fast, plain, wanted)


def as_simplices(x):
    return activate(x, Activation.SIMNORM, SIMPLEX)


@pytest.mark.parametrize(
    ("simplices", "action_dim", "wanted"),
    [(1, 0, "z"), (20, 0, "z"), (2, 3, "z"), (2, 3, "a"), (2, 3, "z and a"), (9, 6, "z and a")],
)
@pytest.mark.parametrize(("rows", "width"), [(8, 24), (61, 37), (260, 130)])
def test_networks_on_simplices(threads, rows, width, simplices, action_dim, wanted):
    """Of one network, and of two of three. Gradients by latents go on through SimNorm."""
    raw, a = randn(rows, simplices * SIMPLEX, seed=1), randn(rows, action_dim, seed=2)
    weight, bias = randn(3, width, simplices * SIMPLEX + action_dim, seed=3), randn(3, width)
    gain, shift = randn(3, width, seed=4), randn(3, width, seed=5)
    last, last_bias = randn(3, 21, width, seed=6), randn(3, 21, seed=7)
    dropped, mask = make_dropped(2, rows, width, seed=8)
    parameters = (weight, bias, gain, shift, last, last_bias)
    for each in (*parameters, *[raw] * ("z" in wanted), *[a] * ("a" in wanted.split())):
        each.requires_grad_(True)

    def fast(raw, a, dropped, members, *parameters):
        layers = [Layer(*parameters[:4], norm=MISH), Layer(*parameters[4:])]
        layers = on_simplices(layers, simplices)
        return kernels.networks(as_simplices(raw), a, layers, dropped, members)

    def plain(raw, a, mask, weight, bias, gain, shift, last, last_bias):
        y = F.linear(th.cat([as_simplices(raw), a], -1), weight, bias) * mask.to(raw.dtype)
        y = F.mish(F.layer_norm(y, (width,), gain, shift, EPS))
        return F.linear(y, last, last_bias)

    compare(
        lambda raw, a, *p: fast(raw, a, dropped, (2, 0), *p),
        lambda raw, a, *p: th.stack(
            [plain(raw, a, mask[i], *(x[m] for x in p)) for i, m in enumerate((2, 0))]
        ),
        (raw, a, *parameters),
    )
    compare(
        lambda raw, a, *p: fast(raw, a, dropped.of(1), None, *p),
        lambda raw, a, *p: plain(raw, a, mask[1], *p),
        (raw, a, *(each[1].detach().requires_grad_(True) for each in parameters)),
    )


@pytest.mark.parametrize(("rows", "simplices"), [(9, 1), (70, 5), (128, 16)])
def test_a_rollout_on_simplices_is_its_steps(threads, rows, simplices):
    if not products_are_ours():
        pytest.skip("torch's own products are used on this processor")
    latent_dim, width = simplices * SIMPLEX, 40
    sizes = [(width, latent_dim + 3), (latent_dim, width)]
    parameters = [
        randn(*shape, seed=position)
        for position, (out, inputs) in enumerate(sizes)
        for shape in ((out, inputs), (out,), (out,), (out,))
    ]
    raw, actions = randn(rows, latent_dim, seed=8), randn(3, rows, 3, seed=9)
    norms = [MISH, Norm(Activation.SIMNORM, SIMPLEX, EPS)]

    def rollout(raw, parameters, known):
        layers = [Layer(*parameters[4 * i : 4 * i + 4], norm=norm) for i, norm in enumerate(norms)]
        assert layers[-1].count_simplices() == simplices
        latents = kernels.rollout(as_simplices(raw), actions, on_simplices(layers, known))
        return latents.log()  # which tells numbers apart that nearly vanish

    def plain(raw, weight, bias, gain, shift, weight_2, bias_2, *affine):
        z, latents = as_simplices(raw), []
        for action in actions.double():
            h = F.linear(th.cat([z, action], -1), weight, bias)
            h = F.mish(F.layer_norm(h, (width,), gain, shift, EPS))
            z = as_simplices(F.layer_norm(F.linear(h, weight_2, bias_2), (latent_dim,), *affine))
            latents.append(z)
        return th.stack(latents).log()

    wanted = [each.requires_grad_(True) for each in (raw, *parameters)]
    compare(lambda raw, *p: rollout(raw, p, simplices), plain, wanted)
    compare(lambda raw, *p: rollout(raw, p, 0), plain, wanted)  # laid out beside it


def test_what_consists_of_simplices():
    weight, bias = randn(24, 5), randn(24)
    ours = Norm(Activation.SIMNORM, SIMPLEX, EPS)
    assert Layer(weight, bias, bias, bias, ours).count_simplices() == 3
    for norm in (None, MISH, Norm(Activation.SIMNORM, 4, EPS)):
        assert Layer(weight, bias, bias, bias, norm).count_simplices() == 0


def test_importing_leaves_triton_alone():
    """Its library crashes a process that has loaded a software renderer's before."""
    program = "import sys, tdmpc2_sb3, dmc_gym_plugin, tdmpc2_sb3.zoo; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"triton", "torch.utils.flop_counter", "torch._dynamo"} & {*done.stdout.split()}


def test_operations_are_counted_whichever_library_multiplies():
    x, weight = randn(520, 131).requires_grad_(True), randn(260, 131).requires_grad_(True)
    with operation_counter() as counter:
        kernels.networks(x, None, [Layer(weight, None)]).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 520 * 131 * 260


@pytest.mark.parametrize("wanted", ["z", "a", "z and a"])
def test_gradients_of_a_pair(wanted):
    """Whichever of latent and action needs a gradient gets it, frozen weights get none."""
    z, a = randn(2, 20, 5, seed=1), randn(2, 20, 3, seed=2)
    weight, bias, gain, shift = randn(16, 8, seed=3), randn(16), randn(16, seed=4), randn(16)
    z.requires_grad_("z" in wanted)
    a.requires_grad_("a" in wanted.split())

    def fast(z, a):
        return kernels.networks(z, a, [Layer(weight, bias, gain, shift, MISH)])

    def plain(z, a):
        y = F.linear(th.cat([z, a], -1), weight.double(), bias.double())
        return F.mish(F.layer_norm(y, (16,), gain.double(), shift.double(), EPS))

    compare(fast, plain, [z, a])


@pytest.mark.parametrize("activation", list(Activation))
def test_layer_norm(threads, activation):
    inputs = [randn(4, 300, 72, scale=4.0), randn(72, seed=1), randn(72, seed=2)]

    def fast(x, gain, shift):
        return kernels.layer_norm(x, gain, shift, Norm(activation, 8))

    def plain(x, gain, shift):
        return activate(F.layer_norm(x, (72,), gain, shift, EPS), activation, 8)

    compare(fast, plain, [x.requires_grad_(True) for x in inputs])


@pytest.mark.parametrize("num_bins", [2, 11, 101])
def test_two_hot_inverse(threads, num_bins):
    bins = make_bins(num_bins)
    logits = randn(2, 400, num_bins, scale=2.0).requires_grad_(True)
    compare(
        lambda x: kernels.two_hot_inverse(x, bins),
        lambda x: symexp(F.softmax(x, -1) @ bins.double()),
        [logits],
    )


@pytest.mark.parametrize("num_bins", [2, 11, 101])
def test_two_hot_cross_entropy(threads, num_bins):
    bins = make_bins(num_bins, -1.0, 1.0)
    logits = randn(3, 4, 100, num_bins, scale=5.0).requires_grad_(True)
    x = randn(4, 100, seed=1)
    x[0, :4] = th.tensor([-50.0, 50.0, 0.0, np.e - 1])  # beyond both ends, and on bins
    position = (th.sign(x) * th.log1p(x.abs()) + 1.0).clamp(0.0, 2.0) * (num_bins - 1) / 2.0
    compare(
        lambda y: kernels.two_hot_cross_entropy(y, position),
        lambda y: soft_cross_entropy(y, two_hot(x.double(), bins.double())),
        [logits],
    )


def test_gelu_of_a_sum_with_a_cut_of_columns(threads):
    a, wide = randn(3, 150, 96), randn(3, 150, 200, scale=3.0, seed=1)

    def plain(a, wide):
        return F.gelu(a + wide[..., 40:136], approximate="tanh")

    def fast(a, wide):
        return kernels.gelu_sum(a, wide[..., 40:136])

    compare(fast, plain, [a.requires_grad_(True), wide.requires_grad_(True)])
    odd = randn(150, 3, 96, seed=2).transpose(0, 1)  # its rows are not evenly far apart
    th.testing.assert_close(
        kernels.gelu_sum(a, odd), F.gelu(a + odd, approximate="tanh"), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["usual step sizes", "beyond their bounds"])
def test_selective_scan(threads, steps, spread):
    """Against discretise and scan, the plain path, in double precision."""
    modes, rows = 37, 60
    wide = randn(steps, rows, 2 * modes + 9)
    inputs = [
        randn(steps, rows, modes, scale=spread, seed=1),
        wide,
        randn(1, 2 * modes, seed=2),  # one start for all rows
        randn(modes, seed=3).exp() * 0.3 + 1e-3,
        randn(modes, seed=4, scale=4.0),
        randn(modes, seed=5),
    ]

    def fast(selection, wide, *rest):
        return kernels.selective_scan(selection, wide[..., 9:], *rest)

    def plain(selection, wide, start, alpha, omega, beta):
        dt = F.softplus(beta + selection).clamp(DT_MIN, DT_MAX)
        return scan(discretise(alpha, omega, dt), wide[..., 9:], start)

    compare(fast, plain, [x.detach().requires_grad_(True) for x in inputs])


@pytest.mark.parametrize("activation", list(Activation))
def test_extreme_and_broken_values(activation):
    """Huge inputs stay finite; NaN and infinity come out as NaN, for the caller to notice."""
    gain, shift = th.full((16,), 60.0), th.zeros(16)
    huge = randn(4, 16, scale=1e6)
    y = kernels.layer_norm(huge, gain, shift, Norm(activation, 8))
    expected = activate(
        F.layer_norm(huge.double(), (16,), gain.double(), shift.double(), EPS), activation, 8
    )
    th.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    for value in (float("nan"), float("inf")):
        broken = randn(4, 16)
        broken[1, 3] = value
        y = kernels.layer_norm(broken, gain, shift, Norm(activation, 8))
        assert y[1].isnan().all()
        assert y[[0, 2, 3]].isfinite().all()
    bins = make_bins(11)
    logits = randn(2, 11)
    logits[1, 4] = float("nan")
    assert kernels.two_hot_inverse(logits, bins).isnan().tolist() == [False, True]
    lost = kernels.two_hot_cross_entropy(randn(2, 11), th.tensor([3.0, float("nan")]))
    assert lost.isnan().tolist() == [False, True]


def test_empty_inputs():
    gain = th.ones(8)
    assert kernels.layer_norm(th.empty(0, 8), gain, gain, Norm()).shape == (0, 8)
    assert kernels.two_hot_inverse(th.empty(3, 0, 11), make_bins(11)).shape == (3, 0)
    assert kernels.gelu_sum(th.empty(0, 8), th.empty(0, 8)).shape == (0, 8)


def test_not_used_in_double_precision():
    assert kernels.usable(th.zeros(2))
    assert not kernels.usable(th.zeros(2, dtype=th.float64))


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"PATH": "/nowhere", "CC": ""}, "no C compiler"),
        ({"CC": "false"}, "false: no message"),
        ({SWITCH: "0", "CC": "false"}, None),
    ],
    ids=["no compiler", "broken compiler", "switched off"],
)
def test_without_kernels_everything_goes_on_with_one_warning(tmp_path, variables, text):
    program = (
        "import warnings; warnings.simplefilter('always')\n"
        "import torch as th\n"
        "from tdmpc2_sb3.model.layers import NormedLinear\n"
        "layer = NormedLinear(4, 8)\n"
        "layer(th.ones(2, 4)).sum().backward()\n"
        "layer(th.ones(2, 4))\n"
        "print(layer.weight.grad.shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "torch.Size([8, 4])"
    assert done.stderr.count("kernels could not be built") == (text is not None)
    if text is not None:
        assert text in done.stderr
        assert "Install a C compiler" in done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators differ")
@pytest.mark.parametrize("variable", [None, "MALLOC_ARENA_MAX"])
def test_freed_arrays_are_kept(variable):
    """Allocating the same 16 MiB again and again costs no page faults, unless the user decided."""
    program = (
        "import resource, torch as th\n"
        "from tdmpc2_sb3.kernels.library import keep_freed_memory\n"
        "print(keep_freed_memory())\n"
        "def steps(count):\n"
        "    for _ in range(count):\n"
        "        first, second = th.ones(2**21), th.ones(2**21)\n"
        "        del first, second\n"
        "steps(10)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "steps(10)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    if variable is not None:
        environment[variable] = "2"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    is_set, faults = done.stdout.split()
    assert is_set == str(variable is None)
    if variable is None:
        assert int(faults) < 100  # of 4 KiB; 40,960 if every array were fetched anew


def test_no_warning_where_they_are_built():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library.cache_clear()
        assert library() is not None
