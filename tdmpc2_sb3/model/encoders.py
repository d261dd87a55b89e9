"""From observations to latents: vectors, images and dictionaries of both.

What counts as which is told in :mod:`tdmpc2_sb3.replay.observation_entries`.

Shapes: ``...`` leading axes, O observation, C, h, w image, Z latent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch as th
from gymnasium import spaces
from torch import nn

from tdmpc2_sb3.kernels import Layer
from tdmpc2_sb3.model.layers import MLP, NormedLinear, SimNorm
from tdmpc2_sb3.replay.observation_entries import (
    check_entries,
    entries_of,
    input_size,
    is_image,
    vector_of,
)

Observation: TypeAlias = "th.Tensor | dict[str, th.Tensor]"

SHIFT_PAD = 3  # pixels by which an image is shifted at most
CONV_CHANNELS = 32
CONV_KERNEL_STRIDE = ((7, 2), (5, 2), (3, 2), (3, 1))


def random_shift(images: th.Tensor, offsets: th.Tensor, pad: int = SHIFT_PAD) -> th.Tensor:
    """Shifts every image by its own offset, replicating the border (DrQ, arXiv:2004.13649).

    :param images: [B, C, h, w], float
    :param offsets: top-left corner of the crop in the padded image, [B, 2], in 0..2 pad
    :param pad: pixels of padding at each border
    """
    height, width = images.shape[-2:]
    device = images.device
    # Replicate padding and cropping in one gather: indices are clamped to the image.
    rows = (offsets[:, :1] + th.arange(height, device=device) - pad).clamp(0, height - 1)  # [B, h]
    cols = (offsets[:, 1:] + th.arange(width, device=device) - pad).clamp(0, width - 1)  # [B, w]
    batch = th.arange(images.shape[0], device=device)[:, None, None]
    shifted = images.permute(0, 2, 3, 1)[batch, rows[:, :, None], cols[:, None, :]]  # [B, h, w, C]
    return shifted.permute(0, 3, 1, 2)


class StateEncoder(nn.Module):
    """Flattened vectors to a latent: normed Mish layers, SimNorm at the end.

    :param in_features: O
    :param enc_dim: width of the hidden layers
    :param latent_dim: Z
    :param num_layers: hidden layers + 1; at least one hidden layer is made
    :param simnorm_dim: V
    """

    def __init__(
        self, in_features: int, enc_dim: int, latent_dim: int, num_layers: int, simnorm_dim: int
    ):
        super().__init__()
        hidden = [enc_dim] * max(num_layers - 1, 1)
        self.net = MLP(in_features, hidden, latent_dim, SimNorm(simnorm_dim))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.net(self.cast(x))  # type: ignore[no-any-return]

    def cast(self, x: th.Tensor) -> th.Tensor:
        """Integers and double precision as what the weights are."""
        return x.to(self.net[0].bias.dtype)  # type: ignore[arg-type, union-attr]


class PixelEncoder(nn.Module):
    """Stacked frames to a latent: random shift, four convolutions, SimNorm.

    At 64x64 pixels the convolutions yield the paper's 512 features. Where that differs from Z
    (another image size, another latent), one normed linear layer is added: a deviation.

    :param shape: (C, h, w) of the stacked frames
    :param latent_dim: Z
    :param simnorm_dim: V
    :param normalize: whether values are in 0..255 and are to be moved to -0.5..0.5; if not, they
        are read as they are
    :raises ValueError: if the image is too small for the four convolutions
    """

    def __init__(
        self, shape: tuple[int, ...], latent_dim: int, simnorm_dim: int, normalize: bool = True
    ):
        super().__init__()
        self.normalize = normalize
        channels, *size = shape
        for kernel, stride in CONV_KERNEL_STRIDE:
            size = [(side - kernel) // stride + 1 for side in size]
        if min(size) < 1:
            raise ValueError(
                f"An image of {shape[1]}x{shape[2]} pixels is too small for the pixel encoder, "
                f"which reads the shape {tuple(shape)} as channels, height and width: use at least "
                "39x39, best 64x64."
            )
        layers: list[nn.Module] = []
        for kernel, stride in CONV_KERNEL_STRIDE:
            convolution = nn.Conv2d(channels, CONV_CHANNELS, kernel, stride, dtype=th.float32)
            layers += [convolution, nn.ReLU()]
            channels = CONV_CHANNELS
        layers[-1] = nn.Flatten()  # no ReLU before the normalisation
        num_features = CONV_CHANNELS * math.prod(size)
        if num_features == latent_dim:
            layers.append(SimNorm(simnorm_dim))
        else:
            layers.append(NormedLinear(num_features, latent_dim, SimNorm(simnorm_dim)))
        self.net = nn.Sequential(*layers)

    def forward(self, images: th.Tensor, offsets: th.Tensor | None = None) -> th.Tensor:
        """
        :param images: uint8 or float, [..., C, h, w]
        :param offsets: of :func:`random_shift`, [prod(...), 2]; centred if None
        """
        x = images.reshape(-1, *images.shape[-3:]).float()
        if offsets is not None:
            x = random_shift(x, offsets)
        latent = self.net(x / 255.0 - 0.5 if self.normalize else x)
        return latent.view(*images.shape[:-3], -1)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """The encoder that an observation space asks for.

    A dictionary's vectors are concatenated into one state encoder, each of its images has a pixel
    encoder of its own, and the latent is the mean of theirs, which is again a point of the
    simplices (the reference is single-modal: a deviation).

    :param observation_space: an entry of :mod:`tdmpc2_sb3.replay.observation_entries`, or a Dict
        of such
    :param enc_dim: width of the state encoder's hidden layers
    :param latent_dim: Z
    :param num_layers: layers of the state encoder
    :param simnorm_dim: V
    :param normalize_images: False: every Box of three axes is an image and is read as it is
    :raises ValueError: if the space or an entry of it is of another kind
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        enc_dim: int,
        latent_dim: int,
        num_layers: int,
        simnorm_dim: int,
        normalize_images: bool = True,
    ):
        super().__init__()
        check_entries(observation_space)
        self.is_dict = isinstance(observation_space, spaces.Dict)
        self.vector_keys: list[str] = []
        self.image_keys: list[str] = []
        num_inputs = 0
        pixels = nn.ModuleDict()
        entries = entries_of(observation_space)
        self._names = module_names(entries)
        for key, space in entries.items():
            if is_image(space, normalize_images):
                assert space.shape is not None
                self.image_keys.append(key)
                pixels[self._names[key]] = PixelEncoder(
                    space.shape, latent_dim, simnorm_dim, normalize_images
                )
            else:
                self.vector_keys.append(key)
                num_inputs += input_size(space)
        if self.vector_keys:
            self.state = StateEncoder(num_inputs, enc_dim, latent_dim, num_layers, simnorm_dim)
        self.pixels = pixels

    def forward(self, observation: Observation, offsets: th.Tensor | None = None) -> th.Tensor:
        """
        :param observation: [..., O], [..., C, h, w], or a dict of such
        :param offsets: of the images' random shift, [images, prod(...), 2]; centred if None
        :return: z, [..., Z]
        """
        latents = [self.state(self.vectors(observation))] if self.vector_keys else []
        for index, key in enumerate(self.image_keys):
            image = observation[key] if isinstance(observation, dict) else observation
            offset = None if offsets is None else offsets[index]
            latents.append(self.pixels[self._names[key]](image, offset))
        return latents[0] if len(latents) == 1 else th.stack(latents).mean(0)

    def vectors(self, observation: Observation) -> th.Tensor:
        """What the state encoder reads, [..., O].

        A vector may have any shape: what the batch axes are is known from its space alone, so the
        caller flattens it (see :meth:`WorldModel.encode`).
        """
        if isinstance(observation, th.Tensor):
            return observation
        vectors = [observation[key] for key in self.vector_keys]
        return vectors[0] if len(vectors) == 1 else th.cat(vectors, -1)

    def as_kernel(self) -> Sequence[Layer] | None:
        """What the CPU kernels encode :meth:`vectors` by; None if they cannot: images have no
        kernels, and a subclass may compute something else."""
        if type(self) is not Encoder or self.image_keys or type(self.state) is not StateEncoder:
            return None
        net = self.state.net
        return net.as_kernel() if type(net) is MLP else None

    def sample_offsets(self, num_rows: int, generator: th.Generator) -> th.Tensor | None:
        """Random shifts for ``num_rows`` observations, [images, rows, 2]; None without images."""
        if not self.image_keys:
            return None
        return th.randint(
            0,
            2 * SHIFT_PAD + 1,
            (len(self.image_keys), num_rows, 2),
            generator=generator,
            device=generator.device,
        )


def flatten_vectors(
    observation: Observation, space: spaces.Space, normalize_images: bool = True
) -> Observation:
    """Gives every entry but the images a single axis of what the state encoder reads.

    :param observation: entries [..., *shape]
    :param space: the space it comes from
    :param normalize_images: as of :class:`Encoder`
    """
    if isinstance(space, spaces.Dict):
        assert isinstance(observation, dict)
        return {
            key: _flatten_entry(value, space.spaces[key], normalize_images)
            for key, value in observation.items()
        }
    assert isinstance(observation, th.Tensor)
    return _flatten_entry(observation, space, normalize_images)


def _flatten_entry(value: th.Tensor, space: spaces.Space, normalize_images: bool) -> th.Tensor:
    return value if is_image(space, normalize_images) else vector_of(value, space)


def module_names(keys: Iterable[str]) -> dict[str, str]:
    """Under which name a module of modules keeps what belongs to each key.

    The key itself, but for those that torch refuses: names with dots, of a module's own attributes,
    and none at all.
    """
    taken, names = set(keys), {}
    for index, key in enumerate(keys):
        name = key
        if not key or "." in key or hasattr(nn.ModuleDict(), key):
            name = f"entry_{index}"
            while name in taken:
                name += "_"
            taken.add(name)
        names[key] = name
    return names


__all__ = [
    "Encoder",
    "Observation",
    "PixelEncoder",
    "StateEncoder",
    "flatten_vectors",
    "module_names",
    "random_shift",
]
