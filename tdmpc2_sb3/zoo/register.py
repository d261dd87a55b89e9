"""What is added to the zoo: one table, applied to each of its modules as it is imported.

The zoo keeps its algorithms, their tuning ranges and their YAML files in three places that are
filled at import. `extend` adds ours to whichever module it is given; the start-up hook calls it for
each, `install` for all of them at once. Everything here keeps to our algorithms and to `DMC/` ids:
any other algorithm on any other id runs the zoo's own code untouched.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from tdmpc2_sb3.zoo.algorithms import ALGORITHMS

_MARK = "_extended_by_tdmpc2_sb3"


def extend(module: ModuleType) -> None:
    """Add our part to one module of the zoo; modules we do not know, or have done, stay.

    :param module: `rl_zoo3.utils`, `rl_zoo3.hyperparams_opt` or `rl_zoo3.exp_manager`, loaded
    """
    extension = EXTENSIONS.get(module.__name__)
    if extension is None or getattr(module, _MARK, False):
        return
    extension(module)
    setattr(module, _MARK, True)


def install() -> None:
    """Import the zoo and add our part to it, hook or no hook."""
    import dmc_gym_plugin  # noqa: F401  (registers the ids)

    for name in EXTENSIONS:
        extend(importlib.import_module(name))


def _extend_utils(module: ModuleType) -> None:
    from tdmpc2_sb3 import TDMPC2
    from tdmpc2_sb3.zoo import hub, playback

    for name in ALGORITHMS:
        module.ALGOS[name] = TDMPC2  # type: ignore[attr-defined]
    playback.extend(module)
    hub.extend()


def _extend_tuning(module: ModuleType) -> None:
    from tdmpc2_sb3.zoo import search_space

    for name in ALGORITHMS:
        module.HYPERPARAMS_SAMPLER[name] = search_space.sampler(name)  # type: ignore[attr-defined]
        module.HYPERPARAMS_CONVERTER[name] = search_space.convert  # type: ignore[attr-defined]


def _extend_experiments(module: ModuleType) -> None:
    from tdmpc2_sb3.zoo import experiments

    experiments.extend(module)


EXTENSIONS: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3.utils": _extend_utils,
    "rl_zoo3.hyperparams_opt": _extend_tuning,
    "rl_zoo3.exp_manager": _extend_experiments,
}
