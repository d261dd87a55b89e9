"""Imports go one way: a module imports from rows above its own, never from below.

kernels -> model -> losses, planner -> fast -> policies -> update -> algorithm -> zoo, programs

A new module belongs into one row here: where it stands tells a reader what it may know of.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ROWS = {
    "dmc_gym_plugin": [
        ("tools", ["rendering", "spaces", "state", "state_checks", "indexing", "sizes"]),
        ("task tables", ["tasks"]),
        ("rewards", ["fast_rewards", "extended"]),
        ("simulation", ["simulation", "composer_simulation"]),
        ("observations", ["camera", "views", "settings"]),
        ("environment", ["environment"]),
        ("registration", ["registration"]),
        ("package", [""]),
        ("programs", ["preview", "__main__"]),
    ],
    "tdmpc2_sb3": [
        ("kernels", ["kernels", "kernels.*"]),
        ("settings", ["settings"]),
        ("saving", ["saving", "saving.*"]),
        ("replay", ["replay", "replay.*"]),
        ("model", ["model", "model.*", "model.dynamics.*"]),
        (
            "the model's files",
            ["saving.official_checkpoint", "saving.parameter_checks", "saving.policy_file"],
        ),
        ("losses and planner", ["losses", "planner"]),
        ("fast", ["fast", "fast.*"]),
        ("policies", ["policies"]),
        ("update", ["update"]),
        ("callbacks", ["callbacks"]),
        ("the agent's file", ["saving.agent_file"]),
        ("algorithm", ["tdmpc2"]),
        ("package", [""]),
        ("zoo plug-in", ["zoo", "zoo.*"]),
        ("programs", ["stability", "stability.*", "study", "study.*"]),
    ],
}

#: What a row may import from outside its package besides the standard library.
OUTSIDE = {
    "dmc_gym_plugin": {
        "task tables": set(),
        "registration": {"gymnasium"},
        "environment": {"gymnasium", "numpy"},
    },
    "tdmpc2_sb3": {
        "kernels": {"torch"},
        "model": {"torch", "gymnasium", "stable_baselines3", "numpy"},
        "losses and planner": {"torch"},
        "fast": {"torch"},
    },
}


def modules(package: str) -> dict[str, Path]:
    """Every module of a package by its name within it; the package itself is ""."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = path
    return found


def imports(path: Path, for_types: bool = False) -> Iterator[str]:
    """Every imported module of a file, those in functions too.

    ``from package import name`` is given as ``package.name``.

    :param for_types: whether those for types alone count, which are not imported when it runs
    """

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                if for_types:
                    yield from walk(child)
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: write imports in full"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            yield from walk(child)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")))


def own(name: str, package: str, known: dict[str, Path]) -> str | None:
    """The module of the package that an import means; None if it means none."""
    if name.split(".")[0] != package:
        return None
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in known:
        parts = parts[:-1]  # names within a module
    return ".".join(parts)


def row_of(package: str, module: str) -> int:
    """A module's own name goes before its folder's."""
    family = module.rpartition(".")[0]
    for name in (module, f"{family}.*"):
        for number, (_, members) in enumerate(ROWS[package]):
            if name in members:
                return number
    pytest.fail(f"{package}.{module} stands in no row: put it into one of {__file__}.")


def edges(package: str, for_types: bool = False) -> set[tuple[str, str]]:
    """Which module of a package imports which."""
    known = modules(package)
    return {
        (module, target)
        for module, path in known.items()
        for name in imports(path, for_types)
        if (target := own(name, package, known)) is not None and target != module
    }


@pytest.mark.parametrize("package", ROWS)
def test_modules_import_from_their_own_row_or_rows_above(package):
    known = modules(package)
    assert len(known) > 10
    wrong = [
        f"{module} imports {target or package}"
        for module, target in sorted(edges(package))
        if row_of(package, target) > row_of(package, module)
    ]
    assert not wrong, wrong


#: Imports for types alone that would close a circle if they were made: module -> (its type's
#: module, why).
NAMED_BACK = {
    "saving.agent_file": ("tdmpc2", "the functions behind TDMPC2.save and load take the agent"),
    "replay.replay_file": ("replay.buffer", "the functions behind its file take the buffer"),
    "fast.ways": ("policies", "the ways are those of a policy, which holds them"),
}


@pytest.mark.parametrize("package", ROWS)
def test_no_circles(package):
    """Among all modules, and so within a row; an import in a function hides none."""
    graph: dict[str, set[str]] = {}
    back = {(module, target) for module, (target, _) in NAMED_BACK.items()}
    for module, target in edges(package, for_types=True) - back:
        graph.setdefault(module, set()).add(target)
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names a circle


def test_what_is_named_back_is_for_types_alone():
    at_work = edges("tdmpc2_sb3")
    for module, (target, _) in NAMED_BACK.items():
        assert (module, target) in edges("tdmpc2_sb3", for_types=True) - at_work


@pytest.mark.parametrize("package", ROWS)
def test_rows_name_what_there_is(package):
    known = modules(package)
    for _, members in ROWS[package]:
        for member in members:
            assert any(
                name == member or (member.endswith(".*") and name.startswith(member[:-1]))
                for name in known
            ), f"{package}.{member} is listed but does not exist"


@pytest.mark.parametrize(
    ("package", "row"), [(package, row) for package, rows in OUTSIDE.items() for row in rows]
)
def test_what_lower_rows_know_of_the_world(package, row):
    (members,) = [number for number, (name, _) in enumerate(ROWS[package]) if name == row]
    standard = {*sys.stdlib_module_names, package}
    for module, path in modules(package).items():
        if row_of(package, module) == members:
            outside = {name.split(".")[0] for name in imports(path)} - standard
            assert outside <= OUTSIDE[package][row], module


#: What modules of the model may take from the kernels: descriptions of what they compute.
DESCRIPTIONS = {
    *("Activation", "Dropped", "Layer", "Norm", "StateSpace", "StateSpaceLayer"),
    *("layers_made_once", "join", "predicted_simplices"),
}


@pytest.mark.parametrize("module", modules("tdmpc2_sb3"))
def test_who_knows_the_kernels(module):
    """The algorithm as the paper has it does not; a model asks by its operations alone."""
    prefix = "tdmpc2_sb3.kernels"
    found = {
        name.removeprefix(prefix).removeprefix(".")
        for name in imports(modules("tdmpc2_sb3")[module])
        if name == prefix or name.startswith(f"{prefix}.")
    }
    if module in ("losses", "planner", "policies", "tdmpc2"):
        assert not found
    elif module.startswith("model") and module != "model.operations":
        assert found <= DESCRIPTIONS


def test_environments_know_nothing_of_the_agent():
    for path in modules("dmc_gym_plugin").values():
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"tdmpc2_sb3", "torch", "stable_baselines3", "rl_zoo3"}, path
