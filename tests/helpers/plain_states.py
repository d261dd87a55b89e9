"""What a state of ``get_state()`` may hold."""

from __future__ import annotations

from typing import Any

import numpy as np


def assert_plain(value: Any) -> None:
    """Check that a state holds nothing that would need pickle."""
    if isinstance(value, dict):
        for key, part in value.items():
            assert isinstance(key, str)
            assert_plain(part)
    elif isinstance(value, list):
        for part in value:
            assert_plain(part)
    elif isinstance(value, np.ndarray):
        assert value.dtype.kind in "fiub"
    else:
        assert value is None or type(value) in (bool, int, float, str), type(value)
