"""What a run's folder would have imported or evaluated when it is resumed.

Its `args.yml` and `config.yml` may name packages, wrappers and callbacks, and hold expressions that
the zoo evaluates. All that is not known to be harmless is asked for first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from tdmpc2_sb3.saving.files import printable
from tdmpc2_sb3.zoo import checkpoints
from tdmpc2_sb3.zoo.algorithms import ENV_PREFIX
from tdmpc2_sb3.zoo.run_options import CALLBACK, plain_keywords

#: The zoo's own switch for what it downloads.
TRUST_VARIABLE = "TRUST_REMOTE_CODE"

#: The option of `resume` that says the same.
OPTION = "--trust-code"

#: Entries of the configuration that name what is imported.
_IMPORTED = ("env_wrapper", "vec_env_wrapper")

#: Entries that the zoo evaluates when they are strings.
_EVALUATED = ("normalize", "monitor_kwargs")


def foreign_code(args: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Return what a run would import or evaluate, each as `where: what`.

    :param args: of its command line
    :param config: its hyperparameters
    """
    found = [f"gym_packages: {module}" for module in args.get("gym_packages") or ()]
    found += [f"{key}: {config[key]}" for key in _IMPORTED if config.get(key)]
    found += [
        f"callback: {entry}"
        for entry in checkpoints.specified(config.get("callback"))
        if not _is_harmless_callback(entry)
    ]
    if "." in str(config.get("policy", "")):
        found.append(f"policy: {config['policy']}")
    for key in _EVALUATED:
        if isinstance(config.get(key), str) and plain_keywords(config[key]) is None:
            found.append(f"{key}: {config[key]}")
    env_id = str(args.get("env"))
    if not env_id.startswith(ENV_PREFIX):
        # Words may name what others' environments open or import; those of ours are choices.
        found += [
            f"{key} of {env_id}: {values[key]}"
            for values in (args, config)
            for key in ("env_kwargs", "eval_env_kwargs", "train_env_kwargs")
            if _has_words(values.get(key))
        ]
    return [*map(printable, found)]


def _is_harmless_callback(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return bool(entry == checkpoints.CALLBACK_NAME)
    arguments = entry.get(checkpoints.CALLBACK_NAME) or {}
    return (
        list(entry) == [checkpoints.CALLBACK_NAME]
        and isinstance(arguments, dict)
        and set(arguments) <= set(CALLBACK)
    )


def _has_words(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_words, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_words, value))
    return not (value is None or isinstance(value, bool | int | float))


def is_trusted() -> bool:
    """Whether the zoo's variable says that all is trusted."""
    return os.environ.get(TRUST_VARIABLE, "").strip().lower() in ("1", "true", "yes", "on")
