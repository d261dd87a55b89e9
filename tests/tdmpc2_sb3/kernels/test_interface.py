"""Python and C have one interface: ``interface.h``."""

from __future__ import annotations

import ast
import ctypes
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch as th

from tdmpc2_sb3 import losses, planner
from tdmpc2_sb3.kernels import library
from tdmpc2_sb3.kernels.interface import HEADER, INTERFACE, InterfaceError, Structure, read
from tdmpc2_sb3.kernels.library import build, call
from tdmpc2_sb3.model import world_model
from tdmpc2_sb3.model.dynamics import ssm

# The package's name "library" is the function.
BUILDER = sys.modules["tdmpc2_sb3.kernels.library"]
FOLDER = HEADER.parent

SMALL = """\
#pragma once
#include <stdint.h>
/* a comment
   of two lines */
enum { NOTHING = 0, SOMETHING = 3 };
#define COUNT 8 /* of what is counted */
#define LEAST (-1.5f)
#define SMALL 1e-3f
typedef struct {
    const float *a, *b; /* two */
    int64_t n;
    float x;
} inner;
typedef struct {
    inner first, second;
    const inner *more;
    double y;
} outer;
void work(const float *x, int64_t x_row, const int64_t *n, float *const *y, const outer *of,
          double z);
int64_t size(void);
"""


def header(folder: Path, text: str) -> Path:
    path = folder / "interface.h"
    path.write_text(text, "utf-8")
    return path


def places(structure: type[Structure]) -> dict[str, tuple[int, int]]:
    fields = {name: getattr(structure, name) for name, _ in structure._fields_}
    return {name: (field.offset, field.size) for name, field in fields.items()}


def test_a_header_is_read(tmp_path):
    found = read(header(tmp_path, SMALL))
    assert found.constants == {
        "NOTHING": 0,
        "SOMETHING": 3,
        "COUNT": 8,
        "LEAST": -1.5,
        "SMALL": 0.001,
    }
    inner, outer = found.structures["inner"], found.structures["outer"]
    assert places(inner) == {"a": (0, 8), "b": (8, 8), "n": (16, 8), "x": (24, 4)}
    assert ctypes.sizeof(inner) == 32
    assert places(outer) == {"first": (0, 32), "second": (32, 32), "more": (64, 8), "y": (72, 8)}
    parameters, result = found.functions["work"]
    assert result is None
    assert [tuple(each) for each in parameters] == [
        ("x", ctypes.c_void_p, th.float32, True),
        ("x_row", ctypes.c_int64, None, False),
        ("n", ctypes.c_void_p, th.int64, False),
        ("y", ctypes.c_void_p, None, False),
        ("of", ctypes.c_void_p, None, False),
        ("z", ctypes.c_double, None, False),
    ]
    assert found.functions["size"] == ((), ctypes.c_int64)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("int count;", "'int count;'"),
        ("#define TWICE (2 * COUNT)", "'#define TWICE"),
        ("typedef struct { int n; } wrong;", "'int n'"),
        ("typedef struct { int64_t n[2]; } wrong;", "'int64_t n[2]'"),
        ("typedef struct { int64_t n } wrong;", "'int64_t n'"),
        ("void wrong(unknown *x);", "'unknown *x'"),
        ("void wrong(int64_t);", "'int64_t'"),
        ("float wrong(void);", "'float wrong(void);'"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, line, text):
    with pytest.raises(InterfaceError, match=r"^Line 22 of interface\.h: ") as caught:
        read(header(tmp_path, f"{SMALL}{line}\n"))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A copy of the kernels' sources, from which they are built."""
    folder = Path(shutil.copytree(FOLDER, tmp_path / "sources"))
    monkeypatch.setattr(BUILDER, "FOLDER", folder)
    monkeypatch.setattr(BUILDER, "FLAGS", ("-std=gnu11", "-O0", "-fPIC"))
    return folder


def change(sources: Path, old: str, new: str) -> None:
    text = (sources / "interface.h").read_text("utf-8")
    assert text.count(old) == 1, old
    (sources / "interface.h").write_text(text.replace(old, new), "utf-8")


@pytest.mark.skipif(library() is None, reason="no kernels here")
@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("void clear_array(float *x, int64_t count)", "void clear_array(float *x)", "clear_array"),
        ("float *y, int64_t count);", "float *y, double count);", "exponential"),
        ("int64_t modes;\n    float eps;", "int64_t bins;\n    float eps;", "modes"),
        ("int64_t panel_width(void);", "int64_t panel_width(void);\nvoid more(void);", "more"),
        ("#define SIMPLEX 8", "#define SIMPLEX (4 + 4)", "SIMPLEX"),
    ],
    ids=["fewer parameters", "another type", "another field", "another function", "not a number"],
)
def test_a_header_that_the_sources_contradict_is_an_error(sources, tmp_path, old, new, text):
    change(sources, old, new)
    with pytest.raises(InterfaceError, match=r"interface\.h") as caught:
        build(tmp_path)
    assert text in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert str(caught.value).endswith("or install tdmpc2_sb3 anew.")


@pytest.mark.skipif(library() is None, reason="no kernels here")
def test_structures_that_python_lays_out_otherwise_are_an_error(sources, tmp_path, monkeypatch):
    """As if the parser mistook a type: C and Python then read a field at different places."""
    change(sources, "    float eps;\n} layer;", "    double eps;\n} layer;")
    wrong = read(sources / "interface.h")
    shutil.copy(HEADER, sources / "interface.h")
    monkeypatch.setattr(BUILDER, "read", lambda path: wrong)
    with pytest.raises(InterfaceError, match="eps of layer is laid out otherwise in Python"):
        build(tmp_path)


@pytest.mark.skipif(library() is None, reason="no kernels here")
def test_a_header_with_more_in_it_is_built(sources, tmp_path):
    change(sources, "    float eps;\n} layer;", "    float eps, spare;\n} layer;")
    assert build(tmp_path).panel_width() >= 0


@pytest.mark.skipif(library() is None, reason="no kernels here")
@pytest.mark.parametrize("more", [(), (3, 1)], ids=["too few", "too many"])
def test_the_number_of_arguments_is_checked(more):
    text = rf"clear_array of interface\.h takes 2 arguments, and is called with {1 + len(more)}\."
    with pytest.raises(InterfaceError, match=text):
        call("clear_array", th.zeros(3), *more)


def test_structures_are_made_of_all_fields_or_none():
    network = INTERFACE.structures["network"]
    assert network().count == 0
    assert network(layers=None, count=2).count == 2
    for fields in ({"count": 2}, {"layers": None, "count": 2, "more": 1}):
        with pytest.raises(InterfaceError, match=r"(layers|more) is on one side only"):
            network(**fields)
    with pytest.raises(AttributeError):
        network().more = 1


def test_every_function_is_called_and_no_other():
    called = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("call", "self._size"):
                if isinstance(node.args[0], ast.Constant):
                    called.add(node.args[0].value)
                else:
                    assert ast.unparse(node.args[0]) == "name", ast.unparse(node)
    assert called | {"panel_width"} == set(INTERFACE.functions)


def test_definitions_name_their_parameters_as_the_header_does():
    defined = {}
    for path in sorted(FOLDER.glob("*.h")):
        text = path.read_text("utf-8")
        for name, parameters in re.findall(r"^\w+ (\w+)\(([^()]*)\) \{", text, re.MULTILINE):
            defined[name] = re.findall(r"(\w+)(?:,|$)", " ".join(parameters.split()))
    assert set(defined) == set(INTERFACE.functions)
    for name, (parameters, _) in INTERFACE.functions.items():
        assert defined[name] == ([each.name for each in parameters] or ["void"]), name


def test_the_model_has_the_constants_of_the_header():
    assert (world_model.LOG_STD_MIN, world_model.LOG_STD_MAX) == (-10.0, 2.0)
    assert (world_model.SQUASH_EPSILON, losses.ENTROPY_EPSILON) == (1e-6, 1e-8)
    assert (ssm.DT_MIN, ssm.DT_MAX) == (1e-3, 5.0)
    assert planner.TERMINATION_THRESHOLD == 0.5
    assert INTERFACE.constants == {
        "LOG_STD_MIN": -10,
        "LOG_STD_MAX": 2,
        "SQUASH_EPSILON": 1e-6,
        "ENTROPY_EPSILON": 1e-8,
        "DT_MIN": 1e-3,
        "DT_MAX": 5,
        "TERMINATION_LOGIT": 0,
        "SIMPLEX": 8,
        "SCALE_LOW": 0.05,
        "SCALE_HIGH": 0.95,
        "ACTIVATION_NONE": 0,
        "ACTIVATION_MISH": 1,
        "ACTIVATION_SIMNORM": 2,
    }
