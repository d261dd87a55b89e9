"""enjoy, record_video and push_to_hub: the environment as it was trained in.

The zoo's `create_test_env` gets the command line's `env_kwargs`; those of the YAML, which hold the
action repeat, reach it from enjoy only. They lie in the run's saved configuration, so they are
taken from there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tdmpc2_sb3.zoo.algorithms import concerns_us


class _Run(NamedTuple):
    algo: str
    env_id: str


#: Log folder -> the run in it, as far as asked for in this process.
_runs: dict[str, _Run] = {}


def extend(module: ModuleType) -> None:
    """Wrap `get_model_path` and `create_test_env` of `rl_zoo3.utils`."""
    zoo: Any = module
    zoo.get_model_path = _get_model_path(zoo.get_model_path)
    zoo.create_test_env = _create_test_env(zoo.create_test_env)


def run_in_hand() -> _Run | None:
    """Return the run whose model was looked up last, None before the first."""
    return next(reversed(_runs.values()), None)


def _get_model_path(original: Callable[..., Any]) -> Callable[..., Any]:
    """Remember which run lies in a log folder: `create_test_env` is not told the algorithm."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def get_model_path(*args: Any, **kwargs: Any) -> tuple[str, str, str]:
        result = original(*args, **kwargs)
        asked = signature.bind(*args, **kwargs).arguments
        env_id = getattr(asked["env_name"], "gym_id", str(asked["env_name"]))
        _runs.pop(result[2], None)  # so that the newest is the last
        _runs[result[2]] = _Run(asked["algo"], env_id)
        return result

    return get_model_path


def _create_test_env(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def create_test_env(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        asked = call.arguments
        stats_path = asked.get("stats_path")
        run = None if stats_path is None else _runs.get(str(Path(stats_path).parent))
        algo = "" if run is None else run.algo
        saved = (asked.get("hyperparams") or {}).get("env_kwargs")
        if saved and concerns_us(algo, asked["env_id"]):
            env_kwargs = asked.get("env_kwargs")
            if env_kwargs is None:
                env_kwargs = {}
            for key, value in saved.items():
                # In place: push_to_hub writes this dictionary into env_kwargs.yml and the card.
                env_kwargs.setdefault(key, value)
            asked["env_kwargs"] = env_kwargs
        return original(*call.args, **call.kwargs)

    return create_test_env
