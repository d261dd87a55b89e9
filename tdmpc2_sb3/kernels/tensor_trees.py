"""Tensors within tuples and dictionaries: their places apart from their numbers."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch as th


def without_tensors(value: object, tensors: list[th.Tensor]) -> Hashable:
    """The value with its tensors' sizes and types in their place.

    :param value: a tensor, something hashable, or a tuple or dictionary of such
    :param tensors: to which they are added
    """
    if isinstance(value, th.Tensor):
        tensors.append(value)
        return value.shape, value.dtype
    if isinstance(value, tuple):
        return type(value), tuple([without_tensors(each, tensors) for each in value])
    if isinstance(value, dict):
        parts = [(key, without_tensors(each, tensors)) for key, each in value.items()]
        return dict, tuple(parts)
    return value  # type: ignore[return-value]


def with_tensors(value: Any, tensors: Iterator[th.Tensor]) -> Any:
    """The value with the next tensors in the place of its own."""
    if isinstance(value, th.Tensor):
        return next(tensors)
    if isinstance(value, tuple):
        parts = [with_tensors(each, tensors) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, dict):
        return {key: with_tensors(each, tensors) for key, each in value.items()}
    return value
