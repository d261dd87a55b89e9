"""Reading the zoo's `config.yml` and `args.yml` without running anything that stands in them.

The zoo writes Python tags into both and reads them with an unsafe loader, which can run code.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import yaml

_PYTHON = "tag:yaml.org,2002:python/"


class _Loader(yaml.SafeLoader):
    """Plain values, and the two kinds of Python object that the zoo's files are made of."""


class _LenientLoader(_Loader):
    """Other Python objects become the plain values they would be made from."""


def _ordered_dict(loader: yaml.SafeLoader, node: yaml.Node) -> OrderedDict[str, Any]:
    assert isinstance(node, yaml.SequenceNode)
    return OrderedDict(*loader.construct_sequence(node, deep=True))


def _tuple(loader: yaml.SafeLoader, node: yaml.Node) -> tuple[Any, ...]:
    assert isinstance(node, yaml.SequenceNode)
    return tuple(loader.construct_sequence(node, deep=True))


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
        return dict(yaml.load(path.read_text(), Loader=loader))  # a safe loader
    except (yaml.YAMLError, TypeError, ValueError) as error:
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(
            f"'{path}' is damaged or holds Python objects, which are not read as they can run "
            f"code ({what}): replace them by plain values."
        ) from error
