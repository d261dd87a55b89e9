"""The entries of an observation space: what is stored of each, and what an encoder reads of it.

| space | stored | read |
|---|---|---|
| Box | its values | the same, flat |
| uint8 Box of (C, h, w) | the picture | the picture |
| Discrete | the number, [1] | one-hot, [n] |
| MultiDiscrete | the numbers | one-hot each, joined |
| MultiBinary | 0 and 1 | the same, flat |

One-hot as Stable-Baselines3's own policies read them. What goes to a device is float32, pictures
uint8: no device has to know double precision (Apple's does not).

Shapes: ``...`` leading axes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import (
    check_for_nested_spaces,
    is_image_space,
    maybe_transpose,
)

from tdmpc2_sb3.saving.attribute_checks import short

#: The name of the only entry of a space that is no Dict.
SINGLE = "observation"
_CHOICES = (spaces.Discrete, spaces.MultiDiscrete)
_KNOWN = (spaces.Box, spaces.MultiBinary, *_CHOICES)


def entries_of(space: spaces.Space) -> dict[str, spaces.Space]:
    """The entries of a Dict by name; any other space is one entry, :data:`SINGLE`."""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {SINGLE: space}


def check_entries(space: spaces.Space) -> None:
    """
    :raises ValueError: if an entry is of a kind that nobody reads, or holds no numbers
    :raises NotImplementedError: as SB3, if there are spaces within an entry
    """
    try:
        check_for_nested_spaces(space)
    except NotImplementedError as error:
        remedy = "flatten it, e.g. with gymnasium.wrappers.FlattenObservation."
        raise NotImplementedError(f"{str(error).rstrip('.')}: {remedy}") from error
    for key, entry in entries_of(space).items():
        if not isinstance(key, str):
            raise ValueError(
                f"Observation {key!r} is named by a {type(key).__name__}: name the observations "
                f"in the Dict by strings, such as {str(key)!r}."
            )
        if not isinstance(entry, _KNOWN):
            raise ValueError(
                f"Observation '{key}' is a {type(entry).__name__}: TDMPC2 reads Box, Discrete, "
                "MultiDiscrete and MultiBinary, alone or in one Dict; flatten it, e.g. with "
                "gymnasium.wrappers.FlattenObservation."
            )
        if math.prod(entry_shape(entry)) == 0:
            raise ValueError(
                f"Observation '{key}' has the shape {entry_shape(entry)}, without a number to "
                "learn from: leave it out, or observe a constant, such as zeros of shape (1,)."
            )


def is_image(space: spaces.Space, normalize_images: bool = True) -> bool:
    """Whether an entry has a pixel encoder.

    :param normalize_images: False: every Box of three axes is an image, scaled by its environment
    """
    return is_image_space(space, normalized_image=not normalize_images)


def entry_shape(space: spaces.Space) -> tuple[int, ...]:
    """Shape of a single value, in the buffer and on its way to the encoder."""
    if isinstance(space, spaces.Discrete):
        return (1,)
    assert space.shape is not None
    return space.shape


def entry_dtype(space: spaces.Space) -> np.dtype:
    """What a value's numbers are on their way to the encoder: float32, of pictures uint8."""
    picture = isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype == np.uint8
    return np.dtype(np.uint8) if picture else np.dtype(np.float32)


def input_size(space: spaces.Space) -> int:
    """Numbers that the state encoder reads of a value that is no image."""
    if isinstance(space, _CHOICES):
        return int(np.sum(_choices(space)[0]))
    return math.prod(entry_shape(space))


def vector_of(value: th.Tensor, space: spaces.Space) -> th.Tensor:
    """What the state encoder reads of values that are no images, [..., inputs].

    :param value: [..., *entry_shape]
    """
    shape = entry_shape(space)
    flat = value.reshape(*value.shape[: value.dim() - len(shape)], math.prod(shape))
    if not isinstance(space, _CHOICES):
        return flat
    counts, starts = _choices(space)
    hot = [
        value == th.arange(start, start + count, device=value.device)
        for value, count, start in zip(flat.split(1, -1), counts, starts, strict=True)
    ]
    return th.cat(hot, -1).float()


def check_choices(values: np.ndarray, key: str, space: spaces.Space) -> str | None:
    """What is wrong with the values of a Discrete or MultiDiscrete, None if nothing is.

    :param values: [..., *entry_shape]
    """
    if not isinstance(space, _CHOICES):
        return None
    counts, starts = _choices(space)
    offsets = values.reshape(-1, len(counts)) - starts
    if ((offsets >= 0) & (offsets < counts)).all():
        return None
    named = "The observation" if key == SINGLE else f"The observation {key!r}"
    return (
        f"{named} is {short(values.tolist(), 200)}, which {short(space, 200)} does not "
        "contain: check the environment."
    )


def _choices(space: spaces.Space) -> tuple[list[int], list[int]]:
    """How many values each number of a Discrete or MultiDiscrete has, and the least of them."""
    if isinstance(space, spaces.Discrete):
        return [int(space.n)], [int(space.start)]
    assert isinstance(space, spaces.MultiDiscrete)
    return np.ravel(space.nvec).tolist(), np.ravel(space.start).tolist()


def to_device(values: Any, key: str, space: spaces.Space, device: th.device) -> th.Tensor:
    """Values [..., *entry_shape] as the tensor that an encoder takes.

    :raises ValueError: if a value is none of the space's choices
    """
    wrong = check_choices(np.asarray(values), key, space)
    if wrong is not None:
        raise ValueError(wrong)
    return th.as_tensor(np.asarray(values, entry_dtype(space)), device=device)


def batched(
    observation: np.ndarray | dict[str, np.ndarray], space: spaces.Space, device: th.device
) -> tuple[Any, bool]:
    """Observations as the encoder takes them.

    :param observation: of one environment or of E
    :param space: of one observation
    :param device: where the encoder is
    :return: [E, ...] each, and whether there was an axis of environments
    :raises ValueError: if they are none of the space
    """
    entries = entries_of(space)
    is_dict = isinstance(space, spaces.Dict)
    if isinstance(observation, dict) != is_dict:
        raise ValueError(
            f"The observation is a {type(observation).__name__}, but the observation space is "
            f"{short(space, 200)}: pass what the environment returns."
        )
    given = observation
    if not isinstance(given, dict):
        given = dict.fromkeys(entries, given)
    if set(given) != set(entries):
        raise ValueError(
            f"The observation has the keys {sorted(given)}, but the observation space has "
            f"{sorted(entries)}: pass what the environment returns."
        )
    tensors, vectorized = {}, False
    for key, entry in entries.items():
        values = np.asarray(given[key])
        if is_image(entry):
            values = maybe_transpose(values, entry)
        vectorized = _has_environments(values, key, entry) or vectorized
        values = values.reshape(-1, *entry_shape(entry))
        tensors[key] = to_device(values, key, entry, device)
    return (tensors if is_dict else next(iter(tensors.values()))), vectorized


def _has_environments(values: np.ndarray, key: str, space: spaces.Space) -> bool:
    """Whether an entry's values have an axis of environments.

    :raises ValueError: if they have another shape than the space's, with or without it
    """
    shape = space.shape
    assert shape is not None
    if values.shape == shape:
        return False
    if values.ndim == len(shape) + 1 and values.shape[1:] == shape:
        return True
    batch = f"(n_env, {', '.join(map(str, shape))})" if shape else "(n_env,)"
    raise ValueError(
        f"Unexpected observation shape {values.shape} of '{key}', a {type(space).__name__}: pass "
        f"{shape}, or {batch} for several environments."
    )
