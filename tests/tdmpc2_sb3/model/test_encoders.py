"""Encoders against plain layers, and the random shift against padding and cropping."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from gymnasium import spaces

from tdmpc2_sb3.model.encoders import (
    Encoder,
    PixelEncoder,
    StateEncoder,
    flatten_vectors,
    random_shift,
)


def generator(seed=0):
    return th.Generator().manual_seed(seed)


def vector_space(*shape):
    return spaces.Box(-np.inf, np.inf, shape, np.float32)


IMAGE_SPACE = spaces.Box(0, 255, (9, 64, 64), np.uint8)


def groups_softmax(x):
    return th.cat([F.softmax(group, -1) for group in x.split(8, -1)], -1)


def test_random_shift_is_replicate_padding_and_a_crop():
    images = th.randint(0, 256, (6, 2, 10, 12), generator=generator()).float()
    offsets = th.tensor([[0, 0], [6, 6], [3, 3], [0, 6], [5, 1], [2, 4]])
    padded = F.pad(images, (3, 3, 3, 3), mode="replicate")
    shifted = random_shift(images, offsets)
    for i, (top, left) in enumerate(offsets.tolist()):
        assert th.equal(shifted[i], padded[i, :, top : top + 10, left : left + 12])
    assert th.equal(shifted[2], images[2])  # the middle offset shifts nothing


@pytest.mark.parametrize(("num_layers", "widths"), [(1, [7]), (2, [7]), (3, [7, 7]), (5, [7] * 4)])
def test_state_encoder(num_layers, widths, roughen):
    encoder = StateEncoder(5, 7, 16, num_layers, 8)
    roughen(encoder)
    layers = list(encoder.net)
    assert [layer.weight.shape[0] for layer in layers] == [*widths, 16]
    o = th.randn(3, 4, 5, generator=generator())
    x = o
    for layer in layers:
        x = F.layer_norm(
            F.linear(x, layer.weight, layer.bias), x.shape[:0] + layer.bias.shape,
            layer.ln.weight, layer.ln.bias,
        )  # fmt: skip
        x = groups_softmax(x) if layer is layers[-1] else F.mish(x)
    th.testing.assert_close(encoder(o), x, rtol=1e-5, atol=1e-6)


def plain_pixels(encoder, images, offsets):
    padded = F.pad(images.float(), (3, 3, 3, 3), mode="replicate")
    crops = [
        padded[i, :, top : top + 64, left : left + 64]
        for i, (top, left) in enumerate(offsets.tolist())
    ]
    x = th.stack(crops) / 255.0 - 0.5
    convolutions = [layer for layer in encoder.net if isinstance(layer, th.nn.Conv2d)]
    assert [(c.kernel_size[0], c.stride[0], c.out_channels) for c in convolutions] == [
        (7, 2, 32),
        (5, 2, 32),
        (3, 2, 32),
        (3, 1, 32),
    ]
    for i, layer in enumerate(convolutions):
        x = F.conv2d(x, layer.weight, layer.bias, layer.stride)
        x = F.relu(x) if i < 3 else x
    return x.flatten(1)


def test_pixel_encoder_of_the_paper():
    encoder = PixelEncoder((9, 64, 64), 512, 8)
    images = th.randint(0, 256, (2, 3, 9, 64, 64), generator=generator(), dtype=th.uint8)
    offsets = th.randint(0, 7, (6, 2), generator=generator())
    features = plain_pixels(encoder, images.view(6, 9, 64, 64), offsets)
    assert features.shape == (6, 512)
    latents = encoder(images, offsets)
    assert latents.shape == (2, 3, 512)
    th.testing.assert_close(latents.view(6, 512), groups_softmax(features), rtol=1e-5, atol=1e-6)
    centred = encoder(images, th.full((6, 2), 3))
    th.testing.assert_close(encoder(images), centred)
    assert (latents - centred).abs().max() > 1e-4  # the shift is felt


def test_pixel_encoder_of_another_latent_size_has_one_layer_more():
    encoder = PixelEncoder((3, 64, 64), 32, 8)
    images = th.randint(0, 256, (4, 3, 64, 64), generator=generator(), dtype=th.uint8)
    features = plain_pixels(encoder, images, th.full((4, 2), 3))
    layer = encoder.net[-1]
    x = F.layer_norm(F.linear(features, layer.weight, layer.bias), (32,))
    th.testing.assert_close(encoder(images), groups_softmax(x), rtol=1e-4, atol=1e-6)


def test_a_dictionary_is_the_mean_of_vectors_together_and_each_image():
    space = spaces.Dict({"b": vector_space(2, 2), "a": vector_space(3), "i": IMAGE_SPACE})
    th.manual_seed(0)
    encoder = Encoder(space, 7, 32, 2, 8)
    observation = {
        "a": th.randn(5, 3, generator=generator(1)),
        "b": th.randn(5, 2, 2, generator=generator(2)),
        "i": th.randint(0, 256, (5, 9, 64, 64), generator=generator(3), dtype=th.uint8),
    }
    z = encoder(flatten_vectors(observation, space))
    # Gymnasium orders a dictionary space's keys; the vectors follow that order.
    flat = {"a": observation["a"], "b": observation["b"].view(5, 4)}
    vectors = th.cat([flat[key] for key in space.spaces if key != "i"], -1)
    expected = (encoder.state(vectors) + encoder.pixels["i"](observation["i"])) / 2
    th.testing.assert_close(z, expected)
    assert (z >= 0).all()
    th.testing.assert_close(z.view(5, 4, 8).sum(-1), th.ones(5, 4))  # points of the simplices


def test_vectors_of_any_shape_are_flattened_behind_the_batch_axes():
    x = th.arange(24.0).view(2, 2, 3, 2)
    flat = flatten_vectors(x, vector_space(3, 2))
    assert th.equal(flat, x.view(2, 2, 6))
    single = flatten_vectors(th.tensor([1.0, 2.0]), vector_space())  # 0-d observations
    assert single.shape == (2, 1)


def test_integers_and_double_precision_become_what_the_weights_are():
    encoder = StateEncoder(2, 7, 16, 2, 8)
    expected = encoder(th.tensor([[1.0, 2.0]]))
    for dtype in (th.int64, th.uint8, th.float64):
        assert th.equal(encoder(th.tensor([[1, 2]], dtype=dtype)), expected)


def test_offsets_are_uniform_over_seven_places_in_both_directions():
    encoder = Encoder(spaces.Dict({"i": IMAGE_SPACE, "j": IMAGE_SPACE}), 7, 32, 2, 8)
    offsets = encoder.sample_offsets(7000, generator())
    assert offsets.shape == (2, 7000, 2)
    shares = th.bincount(offsets.flatten(), minlength=7) / offsets.numel()
    th.testing.assert_close(shares, th.full((7,), 1 / 7), atol=0.01, rtol=0)
    assert Encoder(vector_space(3), 7, 16, 2, 8).sample_offsets(5, generator()) is None


def test_bad_spaces():
    with pytest.raises(ValueError, match=r"Observation 'd' is a Text: .* flatten it"):
        Encoder(spaces.Dict({"d": spaces.Text(3)}), 7, 16, 2, 8)
    with pytest.raises(ValueError, match=r"38x38 pixels is too small .* at least 39x39"):
        Encoder(spaces.Box(0, 255, (3, 38, 38), np.uint8), 7, 16, 2, 8)
    Encoder(spaces.Box(0, 255, (3, 39, 39), np.uint8), 7, 16, 2, 8)
