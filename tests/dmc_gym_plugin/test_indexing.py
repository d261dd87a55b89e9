"""Cached named indexing reads and writes what dm_control's own indexers do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dm_control import suite

from dmc_gym_plugin.indexing import CachedIndexer, cache_named_indexing

#: Field -> keys: names, pairs, lists (regular, irregular, backwards, single), slices, numbers, and
#: a free joint's name, which stands for six or seven numbers.
KEYS: dict[str, list[Any]] = {
    "xpos": ["torso", ("torso", "z"), ["torso", "head"], ["left_foot", "torso", "right_hand"], 3],
    "xmat": [
        (slice(1, None), ["xx", "xz"]),
        (slice(1, None), ["xx", "xy", "zz"]),
        (["torso", "head"], ["xx", "zz"]),
        ("torso", ["zx", "xx"]),
        (["torso", "head", "pelvis"], "zz"),
        (slice(None, 5, 2), "zz"),
        (2, ["zz"]),
        slice(3),
    ],
    "qpos": [
        "root",
        "right_knee",
        ["right_knee", "left_knee"],
        ["root", "right_knee"],
        slice(7, 9),
    ],
    "sensordata": ["torso_subtreelinvel", ["torso_subtreelinvel"], slice(None), 0],
}
PAIRS = [(field, number) for field, keys in KEYS.items() for number in range(len(keys))]


@pytest.fixture(scope="module")
def indexers() -> dict[str, tuple[Any, CachedIndexer]]:
    """Return dm_control's indexer and the cached one of some fields of a humanoid."""
    physics = suite.load("humanoid", "walk", task_kwargs={"random": 0}).physics
    physics.step(3)
    theirs = {field: getattr(physics.named.data, field) for field in KEYS}
    cache_named_indexing(physics)
    return {field: (theirs[field], getattr(physics.named.data, field)) for field in KEYS}


@pytest.mark.parametrize(("field", "number"), PAIRS)
def test_reading_and_writing(indexers: Any, field: str, number: int) -> None:
    key = KEYS[field][number]
    theirs, ours = indexers[field]
    assert isinstance(ours, CachedIndexer)
    array = ours._array
    for _ in range(2):  # the second time from the cache
        expected, got = theirs[key], ours[key]
        assert type(got) is type(expected)
        np.testing.assert_array_equal(got, expected)
        assert np.shares_memory(got, array) == np.shares_memory(expected, array)
    kept = array.copy()
    values = np.arange(np.size(expected), dtype=float).reshape(np.shape(expected)) + 100
    theirs[key] = values
    written = array.copy()
    array[:] = kept
    ours[key] = values
    np.testing.assert_array_equal(array, written)
    array[:] = kept


def test_keys_that_are_equal_but_index_otherwise(indexers: Any) -> None:
    theirs, ours = indexers["qpos"]
    for key in (1, True, 0, False, [0, 1], [False, True] + [False] * 26, np.array([1, 0])):
        np.testing.assert_array_equal(ours[key], theirs[key])
    for key in ("torso ", ("root", "root"), ["root", 1]):
        with pytest.raises((KeyError, IndexError)):
            theirs[key]
        with pytest.raises((KeyError, IndexError)):
            ours[key]
