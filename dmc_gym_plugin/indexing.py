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


def _freeze(key: Any) -> Any:
    """Return a hashable twin of an indexing expression, or None if it has none.

    The types are compared exactly and lists are marked: ``1``, ``True`` and ``1.0`` are equal as
    dictionary keys, and so would be a list's twin and a tuple, but they do not index alike.
    """
    kind = type(key)
    if kind is list:
        return (list, *key) if key and type(key[0]) is str else None
    if kind is str or kind is int:
        return key
    if kind is slice:
        return (slice, key.start, key.stop, key.step)
    if kind is tuple and len(key) == 2:
        first, second = _freeze(key[0]), _freeze(key[1])
        if first is not None and second is not None:
            return (tuple, first, second)
    return None


def _is_exact(key: Any) -> bool:
    """Return whether every list in a key holds names alone, so that no other key has its twin."""
    if type(key) is tuple:
        return all(map(_is_exact, key))
    return type(key) is not list or all(type(item) is str for item in key)


def _settle(index: Any) -> Any:
    """Turn lists of a converted key into index arrays, which numpy would do at every call."""
    if isinstance(index, tuple):
        return tuple(_settle(part) for part in index)
    if isinstance(index, list | range):
        return np.asarray(index)
    return index


def _as_slice(array: Any) -> slice | None:
    """Return the slice that names the same places in the same order as an index array."""
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        return None
    steps = np.diff(array)
    step = int(steps[0]) if steps.size else 1
    if array[0] < 0 or step < 1 or (steps != step).any():
        return None
    return slice(int(array[0]), int(array[-1]) + 1, step)


def _without_array(index: Any) -> tuple[Any, bool]:
    """Replace the one index array of a pair by a slice where one names the same places.

    numpy takes several times longer to mix an index array with a slice or a number than to slice
    twice. The price: slices give a view where an index array gives a copy.

    :return: the index, and whether what it reads must be copied
    """
    arrays = [isinstance(part, np.ndarray) for part in index] if isinstance(index, tuple) else []
    if sum(arrays) == 1:  # two index arrays are paired, which slices are not
        where = arrays.index(True)
        replaced = _as_slice(index[where])
        if replaced is not None:
            return (*index[:where], replaced, *index[where + 1 :]), True
    return index, False


class CachedIndexer(FieldIndexer):
    """A ``FieldIndexer`` that remembers converted keys.

    :param indexer: the indexer to replace
    :param array: the array it indexes
    """

    __slots__ = ("_array", "_known", "_names")

    def __init__(self, indexer: FieldIndexer, array: np.ndarray) -> None:
        for name in FieldIndexer.__slots__:
            setattr(self, name, getattr(indexer, name))
        self._array = array  # without the weak reference's detour
        self._names: dict[Any, Any] = {}  # name, or pair of names -> index
        self._known: dict[Any, tuple[Any, bool]] = {}  # other keys' twins -> index, copied

    def _index(self, key: Any) -> tuple[Any, bool]:
        frozen = _freeze(key)
        if frozen is None:  # arrays and other rare keys: as dm_control does
            return self._convert_key(key), False
        entry = self._known.get(frozen)
        if entry is None:
            entry = _without_array(_settle(self._convert_key(key)))
            if _is_exact(key):
                self._known[frozen] = entry
        return entry

    def __getitem__(self, key: Any) -> Any:
        # The two commonest kinds of key are their own twins: a name, and a pair of names.
        kind = type(key)
        if kind is str or (
            kind is tuple and len(key) == 2 and type(key[0]) is str and type(key[1]) is str
        ):
            index = self._names.get(key)
            if index is None:
                index = self._names[key] = _settle(self._convert_key(key))
            return self._array[index]
        index, copied = self._index(key)
        return self._array[index].copy() if copied else self._array[index]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._array[self._index(key)[0]] = value


class CachedStruct:
    """The cached indexers of a ``mjModel`` or ``mjData``, by the names of its fields.

    dm_control makes a class for every instance, with the indexers as its attributes. A class refers
    to itself, so indexers that hold their arrays there would keep the whole simulator until
    Python's cyclic garbage collection runs.

    :param struct: dm_control's named indexers
    :param source: the ``mjModel`` or ``mjData`` that they index
    """

    def __init__(self, struct: Any, source: Any) -> None:
        for name, indexer in struct._asdict().items():
            setattr(self, name, CachedIndexer(indexer, getattr(source, name)))

    def _asdict(self) -> dict[str, CachedIndexer]:
        return dict(vars(self))


def cache_named_indexing(physics: Any) -> None:
    """Give one ``Physics`` instance cached indexers; other instances are not touched."""
    named = physics.named
    physics._named = named._replace(
        model=CachedStruct(named.model, physics.model),
        data=CachedStruct(named.data, physics.data),
    )
