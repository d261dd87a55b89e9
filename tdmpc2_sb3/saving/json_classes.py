"""Which classes a saved file may name: those of the tables below and those registered.

A file holds names only. Looking one up imports nothing but modules of these tables.
"""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

import torch as th

from tdmpc2_sb3.saving.renamed import present_name

# Objects rebuilt by calling their class with the attributes named here. Named by strings: the zoo
# is not imported unless a file needs it.
RECORDS: dict[str, tuple[str, ...]] = {
    "stable_baselines3.common.utils.ConstantSchedule": ("val",),
    "stable_baselines3.common.utils.FloatSchedule": ("value_schedule",),
    "stable_baselines3.common.utils.LinearSchedule": ("start", "end", "end_fraction"),
    "rl_zoo3.utils.SimpleLinearSchedule": ("initial_value",),
    "tdmpc2_sb3.saving.schedules.TableSchedule": ("values",),
    "stable_baselines3.common.type_aliases.TrainFreq": ("frequency", "unit"),
}
ENUMS = ("stable_baselines3.common.type_aliases.TrainFrequencyUnit",)
# Classes of these modules may be named in a file.
_CLASS_MODULES = (
    "tdmpc2_sb3.policies",
    "tdmpc2_sb3.replay.buffer",
    "tdmpc2_sb3.model.encoders",
    "tdmpc2_sb3.model.dynamics.mlp",
    "tdmpc2_sb3.model.dynamics.ssm",
    "stable_baselines3.common.torch_layers",
    "stable_baselines3.common.buffers",
)
_TORCH_NAMESPACES = {"torch.nn": th.nn, "torch.optim": th.optim}
_REGISTERED: dict[str, type] = {}


_ClassT = TypeVar("_ClassT", bound=type)


class UnsaveableError(TypeError):
    """A value cannot be written without pickle."""


class UnreadableError(ValueError):
    """A saved value cannot be rebuilt here."""


def register_class(cls: _ClassT) -> _ClassT:
    """Allow a class of your own, such as a policy, to be named in saved models.

    Only its name is saved: the program that loads the model has to register the class as well.
    Usable as a decorator.

    :param cls: a class
    """
    _REGISTERED[qualified_name(cls)] = cls
    return cls


def qualified_name(cls: type) -> str:
    """Return ``module.Class``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def name_of_class(cls: type) -> str | None:
    """Return the name by which a file may name ``cls``, None if it may not."""
    full_name = qualified_name(cls)
    if full_name in _REGISTERED or cls.__module__ in _CLASS_MODULES:
        return full_name
    for namespace, module in _TORCH_NAMESPACES.items():
        if getattr(module, cls.__name__, None) is cls:
            return f"{namespace}.{cls.__name__}"
    return None


def class_of_name(full_name: str) -> type:
    """Return the class that a file names.

    :raises UnreadableError: no file may name it, or it does not exist here
    """
    module_name, _, class_name = full_name.rpartition(".")
    module_name = present_name(module_name)
    found: Any = _REGISTERED.get(full_name)
    if found is None and module_name in _TORCH_NAMESPACES:
        found = getattr(_TORCH_NAMESPACES[module_name], class_name, None)
    elif found is None and module_name in _CLASS_MODULES:
        found = getattr(importlib.import_module(module_name), class_name, None)
    if not isinstance(found, type):
        raise UnreadableError(
            f"The saved model names the class {full_name}, which is not known here: import its "
            f"module and call tdmpc2_sb3.saving.register_class({class_name}) before loading."
        )
    return found


def import_listed(full_name: str, table: tuple[str, ...]) -> Any:
    """Return what ``full_name`` names.

    :param full_name: ``module.attribute``
    :param table: the names that are allowed
    :raises ValueError: it is not among them
    """
    if full_name not in table:
        raise ValueError(full_name)
    module_name, _, attribute = full_name.rpartition(".")
    return getattr(importlib.import_module(module_name), attribute)
