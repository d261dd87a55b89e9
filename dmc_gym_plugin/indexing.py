"""Faster named indexing: dm_control's own indexers, with every converted key remembered.

``physics.named.data.xmat["torso", "zz"]`` looks the names up anew at each call, which costs more
than the array access itself (about 10 microseconds a call, several calls a step). The names of a
compiled model never change, so the numeric index of a key is computed once and kept. The array
operation is the same, so the results are the same to the last bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from dm_control.mujoco.index import FieldIndexer

_STRINGS = {str}


def _freeze(key: Any) -> Any:
    """Return a hashable twin of an indexing expression, or None if it has none.

    The types are compared exactly and lists are marked: ``1``, ``True`` and ``1.0`` are equal as
    dictionary keys, and so would be a list's twin and a tuple, but they do not index alike.
    """
    kind = type(key)
    if kind is str or kind is int:
        return key
    if kind is list:
        if set(map(type, key)) == _STRINGS:
            return (list, *key)
    elif kind is slice:
        return (slice, key.start, key.stop, key.step)
    elif kind is tuple and len(key) == 2:
        first, second = _freeze(key[0]), _freeze(key[1])
        if first is not None and second is not None:
            return (tuple, first, second)
    return None


def _settle(index: Any) -> Any:
    """Turn lists of a converted key into index arrays, which numpy would do at every call."""
    if isinstance(index, tuple):
        return tuple(_settle(part) for part in index)
    if isinstance(index, list | range):
        return np.asarray(index)
    return index


class CachedIndexer(FieldIndexer):
    """A ``FieldIndexer`` that remembers converted keys.

    :param indexer: the indexer to replace
    :param array: the array it indexes
    """

    __slots__ = ("_array", "_known")

    def __init__(self, indexer: FieldIndexer, array: np.ndarray) -> None:
        for name in FieldIndexer.__slots__:
            setattr(self, name, getattr(indexer, name))
        self._array = array  # without the weak reference's detour
        self._known: dict[Any, Any] = {}

    def _index(self, key: Any) -> Any:
        frozen = _freeze(key)
        if frozen is None:  # arrays and other rare keys: as dm_control does
            return self._convert_key(key)
        index = self._known.get(frozen)
        if index is None:
            index = self._known[frozen] = _settle(self._convert_key(key))
        return index

    def __getitem__(self, key: Any) -> Any:
        # The two commonest kinds of key are their own twins: a name, and a pair of names.
        kind = type(key)
        if kind is str or (
            kind is tuple and len(key) == 2 and type(key[0]) is str and type(key[1]) is str
        ):
            index = self._known.get(key)
            if index is None:
                index = self._known[key] = _settle(self._convert_key(key))
            return self._array[index]
        return self._array[self._index(key)]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._array[self._index(key)] = value


def cache_named_indexing(physics: Any) -> None:
    """Give one ``Physics`` instance cached indexers; other instances are not touched."""
    for struct, source in (
        (physics.named.data, physics.data),
        (physics.named.model, physics.model),
    ):
        for name, indexer in struct._asdict().items():
            # dm_control makes one class per instance, so its attributes belong to this one alone.
            setattr(type(struct), name, CachedIndexer(indexer, getattr(source, name)))
