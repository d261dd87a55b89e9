"""Build hook: an installation from a checkout brings its own stand-in for labmaze.

dm_control's metadata asks for labmaze, which only its mazes use and which has no wheel from Python
3.13 on. `placeholders/labmaze` is an empty distribution of that name; `pip install .` and
`pip install -e .` ask for it by its address in the checkout, which no other machine has. So neither
an sdist, nor a wheel that is built from one, nor one of another tool than pip has this requirement:
what is handed on is free of addresses. `make dist` puts the placeholder's wheel beside it.
"""

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class LabmazePlaceholder(BuildHookInterface):
    """Adds the placeholder to the requirements of a wheel that pip builds in a checkout."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Extend the wheel's requirements.

        :param version: `standard` or `editable`; both get them
        :param build_data: hatchling's, whose `dependencies` join those of pyproject.toml
        """
        root = Path(self.root)
        is_sdist = (root / "PKG-INFO").exists()
        # pip sets the variable while it builds; hatchling too tells pip's builds by it.
        if is_sdist or "PIP_BUILD_TRACKER" not in os.environ:
            return
        address = (root / "placeholders" / "labmaze").as_uri()
        build_data["dependencies"].append(f"labmaze @ {address} ; python_version >= '3.13'")
