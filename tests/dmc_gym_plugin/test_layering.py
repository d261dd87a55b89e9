"""Data flows one way: a module imports only from modules above it."""

from __future__ import annotations

import ast
from pathlib import Path

import dmc_gym_plugin

#: From top to bottom. What stands on one line may not import from each other.
LAYERS = [
    ["tasks", "sizes", "rendering", "spaces", "indexing", "fast_rewards", "state_checks"],
    ["views", "camera", "state", "extended"],
    ["settings", "composer_simulation"],
    ["simulation"],
    ["environment"],
    ["registration"],
    ["__init__"],
    ["preview"],
    ["__main__"],
]

FOLDER = Path(dmc_gym_plugin.__file__).parent
PACKAGE = "dmc_gym_plugin"


def imported(module: str) -> set[str]:
    """Return the modules of the package that a module imports when it runs."""
    tree = ast.parse((FOLDER / f"{module}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # for the type checker alone
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            inner = (node.module or "").removeprefix(PACKAGE).removeprefix(".")
            found |= {inner} if inner else {alias.name for alias in node.names}
    return found


def test_modules_import_only_from_above() -> None:
    names = [name for layer in LAYERS for name in layer]
    assert sorted(names) == sorted(path.stem for path in FOLDER.glob("*.py"))
    above: set[str] = set()
    for layer in LAYERS:
        for module in layer:
            below = (imported(module) & set(names)) - above
            # The package's lazy attribute, which registration's entry point names as a string.
            assert below <= {"environment"} if module == "__init__" else not below, module
        above |= set(layer)
