"""Files that are read without executing anything from them, and runs that go on from them."""

from __future__ import annotations

from tdmpc2_sb3.saving.json_classes import register_class

__all__ = ["register_class"]
