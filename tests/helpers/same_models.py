"""Comparing agents bit for bit, and loading them with unpickling made to fail."""

from __future__ import annotations

import contextlib
import pickle

import cloudpickle
import numpy as np
import pytest
import torch as th

from tdmpc2_sb3 import TDMPC2


@contextlib.contextmanager
def no_unpickling():
    """Within it, everything that would execute pickled code fails."""

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    plain_load = th.load

    def load(*args, **kwargs):
        assert kwargs.get("weights_only") is True
        return plain_load(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(th, "load", load)
        for module in (pickle, cloudpickle):
            patch.setattr(module, "load", refuse)
            patch.setattr(module, "loads", refuse)
        patch.setattr(pickle, "Unpickler", refuse)
        yield


def assert_same(a, b, name="parameters") -> None:
    """Equal bit for bit, through dictionaries and lists."""
    if isinstance(a, dict):
        assert list(a) == list(b), name
        for key in a:
            assert_same(a[key], b[key], f"{name}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), name
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{name}[{index}]")
    elif isinstance(a, th.Tensor):
        assert th.equal(a, b), name
    elif isinstance(a, np.ndarray):
        assert a.tobytes() == b.tobytes(), name
    else:
        assert a == b, name


def assert_same_models(one: TDMPC2, other: TDMPC2) -> None:
    assert_same(one.get_parameters(), other.get_parameters())
    assert_same(one.replay_buffer.fields(), other.replay_buffer.fields(), "buffer")
    for name in ("num_timesteps", "_n_updates", "_episode_num", "_lifetime_steps"):
        assert getattr(one, name) == getattr(other, name), name
    results = [[(info["r"], info["l"]) for info in model.ep_info_buffer] for model in (one, other)]
    assert results[0] == results[1]
