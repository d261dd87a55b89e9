"""Modules by the names that they had: imports, ``python -m`` and saved files go on using them.

A module that moves gets a row here, and whatever was written before still works.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence

PACKAGE = "tdmpc2_sb3"

#: Former name within the package -> present one. A package's modules move with it.
RENAMED = {
    "compare_dynamics": "stability.compare_dynamics",
    "discrete_regression": "model.discrete_regression",
    "dynamics": "model.dynamics",
    "encoders": "model.encoders",
    "environment_facts": "replay.environment_facts",
    "layers": "model.layers",
    "official_checkpoint": "saving.official_checkpoint",
    "pink_noise": "model.pink_noise",
    "plot": "study.plot",
    "sequence_buffer": "replay.buffer",
    "world_model": "model.world_model",
}


def present_name(name: str) -> str:
    """The name that a module bears now, in full.

    :param name: full name of a module, maybe a former one
    """
    package, _, inner = name.partition(".")
    if package != PACKAGE:
        return name
    former, _, rest = inner.partition(".")
    if former not in RENAMED:
        return name
    return ".".join(filter(None, (PACKAGE, RENAMED[former], rest)))


class _Renamed(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Gives the present module to whoever imports or runs it by a former name."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        present = present_name(fullname)
        if present == fullname:
            return None
        found = importlib.util.find_spec(present)
        if found is None:
            return None
        return importlib.machinery.ModuleSpec(
            fullname, self, origin=found.origin, loader_state=found
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return importlib.import_module(present_name(spec.name))

    def exec_module(self, module: types.ModuleType) -> None:
        # It ran under its present name; the import has just given it the former one's spec.
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state

    def get_source(self, fullname: str) -> str | None:
        return self._present_loader(fullname).get_source(present_name(fullname))

    def get_code(self, fullname: str) -> types.CodeType | None:
        return self._present_loader(fullname).get_code(present_name(fullname))

    @staticmethod
    def _present_loader(fullname: str) -> importlib.abc.InspectLoader:
        spec = importlib.util.find_spec(present_name(fullname))
        assert spec is not None
        assert isinstance(spec.loader, importlib.abc.InspectLoader)
        return spec.loader


def keep_former_names() -> None:
    """Lets modules be imported and run by their former names."""
    if not any(isinstance(finder, _Renamed) for finder in sys.meta_path):
        # First, or a renamed package's modules would be found in its folder and run a second time.
        sys.meta_path.insert(0, _Renamed())
