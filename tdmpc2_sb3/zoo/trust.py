"""What a run's folder would have imported or evaluated when it is resumed.

Its `args.yml` and `config.yml` may name packages, wrappers and callbacks, and hold expressions that
the zoo evaluates. All that is not known to be harmless is asked for first.
"""

from __future__ import annotations

import ast
import os
from typing import Any

from tdmpc2_sb3.zoo import checkpoints

#: The zoo's own switch for what it downloads.
TRUST_VARIABLE = "TRUST_REMOTE_CODE"

#: The option of `resume` that says the same.
OPTION = "--trust-code"

#: Entries of the configuration that name what is imported.
_IMPORTED = ("env_wrapper", "vec_env_wrapper")

#: Entries that the zoo evaluates when they are strings.
_EVALUATED = ("normalize", "monitor_kwargs")

#: Arguments of our checkpoint callback that lead to no other folder.
_HARMLESS_ARGUMENTS = {"save_freq", "verbose"}


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
        if isinstance(config.get(key), str) and not _is_plain(config[key]):
            found.append(f"{key}: {config[key]}")
    return found


def _is_harmless_callback(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return bool(entry == checkpoints.CALLBACK_NAME)
    arguments = entry.get(checkpoints.CALLBACK_NAME) or {}
    return (
        list(entry) == [checkpoints.CALLBACK_NAME]
        and isinstance(arguments, dict)
        and set(arguments) <= _HARMLESS_ARGUMENTS
    )


def _is_plain(expression: str) -> bool:
    """Whether an expression is a constant, or `dict(...)` of constants."""
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
            if tree.func.id != "dict" or tree.args:
                return False
            for keyword in tree.keywords:
                ast.literal_eval(keyword.value)
        else:
            ast.literal_eval(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def is_trusted() -> bool:
    """Whether the zoo's variable says that all is trusted."""
    return os.environ.get(TRUST_VARIABLE, "").strip().lower() in ("1", "true", "yes", "on")
