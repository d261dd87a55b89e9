"""The file format of saved models: a zip of JSON and tensors, loaded without running code from it.

| member | content |
|---|---|
| ``data.json`` | the algorithm's attributes, see :mod:`tdmpc2_sb3.saving.json_codec` |
| ``<name>.pth`` | state dict or variable ``<name>``, see :mod:`tdmpc2_sb3.saving.tensor_file` |
| ``system_info.txt``, ``_stable_baselines3_version`` | as Stable-Baselines3 writes them |

SB3's own files hold pickled objects, which can run any code when opened; they are not opened here.
"""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from typing import IO, Any

import stable_baselines3 as sb3
import torch as th
from stable_baselines3.common.utils import get_device, get_system_info

from tdmpc2_sb3.saving.files import (
    EXPANDED_BYTES,
    MAX_VALUES,
    CorruptFileError,
    PathOrFile,
    atomic_write,
    count_values,
    open_zip,
    printable,
    read_json,
    read_member,
    write_to,
)
from tdmpc2_sb3.saving.json_classes import (
    UnreadableError,
    UnsaveableError,
    qualified_name,
    register_class,
)
from tdmpc2_sb3.saving.json_codec import decode, encode
from tdmpc2_sb3.saving.tensor_file import Allowance, is_plain_key, is_plain_tensor, read_tensors

__all__ = [
    "CorruptFileError",
    "UnreadableError",
    "UnsaveableError",
    "atomic_write",
    "decode",
    "encode",
    "read_archive",
    "register_class",
    "write_archive",
]

_FORMAT = "tdmpc2_sb3 model"
_FORMAT_VERSION = 1
_DATA = "data.json"
_PICKLED_DATA = "data"  # the name in SB3's own files
_PLAIN_LEAVES = (th.Tensor, th.Size, th.dtype, th.device, bool, int, float, str, type(None))


def write_archive(path: PathOrFile, data: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Save a model; a process killed at any moment leaves the old file or the new one.

    :param path: path (``.zip`` is added if it has no suffix) or open binary file
    :param data: the algorithm's attributes by name
    :param tensors: state dicts, or nested dictionaries and lists of tensors and plain values, by
        name
    :raises UnsaveableError: something in ``data`` or ``tensors`` cannot be written without pickle;
        nothing was written
    :raises OSError: the disk is full or the folder not writable; the old file is unchanged
    """
    encoded = {name: encode(value, name) for name, value in data.items()}
    document = {
        "format": _FORMAT,
        "version": _FORMAT_VERSION,
        "tensors": list(tensors),
        "data": encoded,
    }
    text = json.dumps(document, indent=1, allow_nan=False).encode()
    # What would expand to more than a file may is written as it is.
    small = len(text) <= EXPANDED_BYTES and count_values(text) <= MAX_VALUES
    how = zipfile.ZIP_DEFLATED if small else zipfile.ZIP_STORED
    for name, value in tensors.items():
        _check_tensors(value, name)

    def writer(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_DATA, text, compress_type=how)
            for name, value in tensors.items():
                with archive.open(f"{name}.pth", "w", force_zip64=True) as member:
                    th.save(value, member)
            archive.writestr("_stable_baselines3_version", sb3.__version__)
            archive.writestr("system_info.txt", get_system_info(print_info=False)[1])

    write_to(path, writer, "zip")


def read_archive(
    path: PathOrFile,
    device: th.device | str = "auto",
    custom_objects: dict[str, Any] | None = None,
    load_data: bool = True,
    print_system_info: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a saved model.

    :param path: path (with or without ``.zip``) or open binary file
    :param device: where the tensors go
    :param custom_objects: values that replace the saved ones of these names, which are then not
        even rebuilt
    :param load_data: if False only the tensors are read
    :param print_system_info: print the system on which the model was saved
    :return: the attributes by name, and the tensors by name
    :raises FileNotFoundError: there is no such file
    :raises ValueError: the file is truncated, damaged, no model, or a model saved by pickling
    """
    if custom_objects is not None and not isinstance(custom_objects, dict):
        raise ValueError(f"custom_objects must be a dictionary or None and is {custom_objects!r}.")
    where = get_device(device)
    with open_zip(path, "zip", "model") as archive:
        names = archive.namelist()
        document = _read_document(archive, names)
        if print_system_info and "system_info.txt" in names:
            print("== SAVED MODEL SYSTEM INFO ==")
            lines = read_member(archive, "system_info.txt").decode(errors="replace").splitlines()
            print("\n".join(map(printable, lines)))
        opcodes = Allowance()
        tensors = {
            name: _load_tensors(archive, name, where, opcodes) for name in document["tensors"]
        }
    data: dict[str, Any] = {}
    if load_data:
        replaced = custom_objects or {}
        data = {
            name: replaced[name] if name in replaced else decode(value)
            for name, value in document["data"].items()
        }
    return data, tensors


def _read_document(archive: zipfile.ZipFile, names: list[str]) -> dict[str, Any]:
    if _DATA not in names:
        if _PICKLED_DATA in names:
            raise ValueError(
                f"The model {_name_of(archive)}was saved by pickling (Stable-Baselines3's own "
                "way), which can run any code when loaded, and is not opened: load it with the "
                "algorithm that wrote it."
            )
        # A file cut off just behind a member with tensors, itself a zip, is mistaken for that zip.
        raise CorruptFileError(
            f"The zip file {_name_of(archive)}is no model saved by TDMPC2, or a truncated one: "
            "check the path, or use another copy or an earlier checkpoint."
        )
    try:
        document = read_json(archive, _DATA)
        kind, version = document["format"], document["version"]
        parts = document["tensors"]
        if not isinstance(document["data"], dict) or not isinstance(parts, list):
            raise TypeError("not what write_archive wrote")
        if not all(isinstance(part, str) for part in parts) or len(set(parts)) < len(parts):
            raise TypeError("parts that are no names, or named twice")
    except CorruptFileError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"The saved model {_name_of(archive)}has a damaged {_DATA}: "
            "use another copy or an earlier checkpoint."
        ) from error
    if kind != _FORMAT or version != _FORMAT_VERSION:
        raise ValueError(
            f"The file {_name_of(archive)}holds '{kind}' of version {version} and this package "
            f"reads '{_FORMAT}' of version {_FORMAT_VERSION}: update tdmpc2_sb3 or save the model "
            "again."
        )
    return document


def _name_of(archive: zipfile.ZipFile) -> str:
    return f"'{archive.filename}' " if archive.filename else ""


def _load_tensors(
    archive: zipfile.ZipFile, name: str, device: th.device, opcodes: Allowance
) -> Any:
    try:
        content = read_member(archive, f"{name}.pth")  # compares the checksum
    except KeyError as error:
        raise CorruptFileError(
            f"The saved model {_name_of(archive)}lacks its part '{name}': use another copy."
        ) from error
    try:
        return read_tensors(content, device, opcodes)
    except Exception as error:  # whatever wrong opcodes lead to
        raise CorruptFileError(
            f"The part '{name[:80]}' of the saved model is damaged or holds more than tensors: "
            "use another copy or an earlier checkpoint."
        ) from error


def _check_tensors(value: Any, name: str) -> None:
    """Refuse now what :func:`read_tensors` would refuse at loading."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if not is_plain_key(key):
                raise UnsaveableError(
                    f"Cannot save '{name}': its key {key!r} is neither a word nor a whole number "
                    "up to 2**53; use one of these."
                )
            _check_tensors(item, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_tensors(item, f"{name}[{index}]")
    elif isinstance(value, th.Tensor) and not is_plain_tensor(value):
        raise UnsaveableError(
            f"Cannot save '{name}': a tensor of {value.dtype} ({value.layout}) cannot be read "
            "again; convert it to floats or integers."
        )
    elif not (type(value) in _PLAIN_LEAVES or isinstance(value, th.nn.Parameter)):
        raise UnsaveableError(
            f"Cannot save '{name}': a value of type {qualified_name(type(value))} is neither a "
            "tensor nor a plain value; convert it."
        )
