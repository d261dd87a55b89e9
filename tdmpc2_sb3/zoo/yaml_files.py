"""Reading the zoo's `config.yml` and `args.yml` without running anything that stands in them.

The zoo writes Python tags into both and reads them with an unsafe loader, which can run code.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import yaml

_MAX_BYTES, _MAX_VALUES = 1 << 20, 100_000
_PYTHON = "tag:yaml.org,2002:python/"


class _Loader(yaml.SafeLoader):
    """Plain values, and the two kinds of Python object that the zoo's files are made of."""


class _LenientLoader(_Loader):
    """Other Python objects become the plain values they would be made from."""


def _ordered_dict(loader: yaml.SafeLoader, node: yaml.Node) -> OrderedDict[str, Any]:
    return OrderedDict(*_items(loader, node))


def _tuple(loader: yaml.SafeLoader, node: yaml.Node) -> tuple[Any, ...]:
    return tuple(_items(loader, node))


def _items(loader: yaml.SafeLoader, node: yaml.Node) -> list[Any]:
    return loader.construct_sequence(node, deep=True)  # type: ignore[arg-type]  # it checks


def _plain(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    assert isinstance(node, yaml.ScalarNode)
    return loader.construct_scalar(node)


_Loader.add_constructor(f"{_PYTHON}object/apply:collections.OrderedDict", _ordered_dict)
_Loader.add_constructor(f"{_PYTHON}tuple", _tuple)
_LenientLoader.add_multi_constructor(_PYTHON, _plain)


def read_yaml(path: Path, strict: bool = True) -> dict[str, Any]:
    """Read a file of the zoo without building any object that could run code.

    :param path: of the file
    :param strict: whether Python objects other than dictionaries and tuples are refused; otherwise
        they are read as the plain values they would be made from
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it holds such objects, or is no mapping in YAML
    """
    loader = _Loader if strict else _LenientLoader
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        value = yaml.load(path.read_text("utf-8"), Loader=loader)  # a safe loader
        check_size(value)
        return dict(value)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(
            f"'{path}' is damaged or holds Python objects, which are not read as they can run "
            f"code ({what}): replace them by plain values."
        ) from error


def check_size(value: Any) -> None:
    """Refuse what is small in a file, by names for its parts, and without end when it is used.

    :raises ValueError: if it holds too many values
    """
    waiting = [value]
    for _ in range(_MAX_VALUES):
        if not waiting:
            return
        each = waiting.pop()
        if isinstance(each, dict):
            waiting += [*each, *each.values()]
        elif isinstance(each, list | tuple | set):
            waiting += each
    raise ValueError(f"more than {_MAX_VALUES} values")
