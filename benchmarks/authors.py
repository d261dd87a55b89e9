"""The authors' agent from a checkout of their repository, on any device and uncompiled or not.

    from authors import build

    agent = build(Path("PATH/TO/tdmpc2"), observation_shape=(24,), action_dim=6, model_size=5)

Not a line of theirs is here: their modules are imported as they are, but for the device that is
written into them. They need what the checkout asks for, above all tensordict.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch as th
import yaml


def build(
    checkout: Path,
    observation_shape: tuple[int, ...],
    action_dim: int,
    episode_steps: int = 500,
    model_size: int = 5,
    device: str = "cpu",
    **settings: Any,
) -> Any:
    """Their ``TDMPC2`` for one task, by the defaults of their own file.

    :param checkout: of their repository
    :param observation_shape: of a vector, or (C, 64, 64) of images
    :param action_dim: A
    :param episode_steps: agent steps an episode, from which they derive the discount
    :param model_size: million parameters
    :param device: in place of theirs
    :param settings: on top of their file, by their names
    """
    root = checkout / "tdmpc2"
    _import_with_device(root, device)
    sizes = module("common").MODEL_SIZE[model_size]
    defaults = yaml.safe_load((root / "config.yaml").read_text())
    config = {key: value for key, value in defaults.items() if value != "???"}
    kind = "rgb" if len(observation_shape) == 3 else "state"
    config.update(
        obs=kind,
        obs_shape={kind: observation_shape},
        action_dim=action_dim,
        episode_length=episode_steps,
        episode_lengths=[episode_steps],
        multitask=False,
        task_dim=0,
        compile=False,
        bin_size=(config["vmax"] - config["vmin"]) / (config["num_bins"] - 1),
        **sizes,
    )
    config.setdefault("episodic", False)
    config.update(settings)
    module("common.layers").enc.__defaults__[0].clear()  # or it keeps an earlier agent's encoders
    agent = module("tdmpc2").TDMPC2(SimpleNamespace(**numbers(config)))
    if th.device(device).type != "cuda":
        for optimizer in (agent.optim, agent.pi_optim):
            for group in optimizer.param_groups:
                group["capturable"] = False  # exists for CUDA graphs alone
    return agent


def module(name: str) -> ModuleType:
    """One of their modules, once an agent has been built."""
    return importlib.import_module(name)


def numbers(config: dict[str, Any]) -> dict[str, Any]:
    """The same settings with texts like 3e-4, which YAML 1.1 reads as such, as numbers."""
    result = dict(config)
    for key, value in config.items():
        if isinstance(value, str):
            try:
                result[key] = float(value)
            except ValueError:
                continue
    return result


def _import_with_device(root: Path, device: str) -> None:
    """Makes the checkout importable with its hard-coded CUDA device replaced by this one."""

    class Loader(importlib.machinery.SourceFileLoader):
        def get_data(self, path: str) -> bytes:
            data = super().get_data(path)
            return data.replace(b"cuda:0", device.encode()) if path.endswith(".py") else data

        def path_stats(self, path: str) -> Any:
            raise OSError  # neither reads nor writes compiled files

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
            base = root.joinpath(*name.split("."))
            for file in (base / "__init__.py", base.with_suffix(".py")):
                if file.is_file():
                    folder = [str(base)] if file.name == "__init__.py" else None
                    return importlib.util.spec_from_file_location(
                        name,
                        file,
                        loader=Loader(name, str(file)),
                        submodule_search_locations=folder,
                    )
            return None

    if not any(type(finder).__name__ == "Finder" for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
