"""Comparing what replay buffers sample."""

from __future__ import annotations

import torch as th

from tdmpc2_sb3.replay.buffer import SequenceBatch


def assert_equal_batches(one: SequenceBatch, other: SequenceBatch) -> None:
    """Check that two batches are the same in every field, bit for bit."""
    for first, second in zip(one, other, strict=True):
        assert first is second is None or th.equal(first, second)
