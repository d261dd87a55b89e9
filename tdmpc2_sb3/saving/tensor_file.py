"""The tensors of a torch file, read with every length checked before anything is allocated.

A torch file is a zip of pickle opcodes, which say how tensors lie in storages, and of the storages'
bytes. torch's own reader believes the opcodes: a tensor may claim 10^9 numbers and have four bytes.
Here the opcodes are data. A small machine knows those that nested dictionaries and lists of tensors
and plain values need, calls nothing that the file names, and builds a tensor only inside its bytes.
"""

from __future__ import annotations

import io
import math
import pickletools
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch as th

from tdmpc2_sb3.saving.files import check_directory, read_member

#: The types of numbers that a file may hold.
DTYPES: dict[str, th.dtype] = {
    f"torch.{name}": getattr(th, name)
    for name in (
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
        *("uint8", "int8", "int16", "int32", "int64", "bool"),
    )
}
_STORAGES = {
    "HalfStorage": th.float16,
    "BFloat16Storage": th.bfloat16,
    "FloatStorage": th.float32,
    "DoubleStorage": th.float64,
    "ComplexFloatStorage": th.complex64,
    "ComplexDoubleStorage": th.complex128,
    "ByteStorage": th.uint8,
    "CharStorage": th.int8,
    "ShortStorage": th.int16,
    "IntStorage": th.int32,
    "LongStorage": th.int64,
    "BoolStorage": th.bool,
}
_MAX_NUMBERS = 1 << 40
_MAX_AXES = 16
_MAX_DEPTH = 32
_MAX_ITEMS = 1_000_000
_OPCODES_BYTES = 1 << 26
_MAX_OPCODES = 1 << 20  # a tensor takes some 30
_MAX_KEY = 1 << 53
_MARK = object()


class Allowance:
    """How many opcodes the parts of one file may have, all together: each takes time and memory,
    and compressed ones nearly no bytes.
    """

    def __init__(self) -> None:
        self._left = _MAX_OPCODES

    def take(self) -> None:
        """Count one more.

        :raises ValueError: there have been too many
        """
        self._left -= 1
        if self._left < 0:
            raise ValueError("too many opcodes")


class _Name(NamedTuple):
    """A global that the opcodes name."""

    name: str


class _Storage(NamedTuple):
    """The bytes of a storage."""

    content: bytearray
    dtype: th.dtype


def is_plain_tensor(value: th.Tensor) -> bool:
    """Say whether a tensor can be read again from a file."""
    return value.layout == th.strided and str(value.dtype) in DTYPES


def is_plain_key(key: Any) -> bool:
    """Say whether a dictionary in a torch file may have such a key.

    Numbers beyond can be chosen so that all have the same hash, which takes a dictionary's speed.
    """
    return type(key) is str or (type(key) is int and -_MAX_KEY <= key <= _MAX_KEY)


def check_shape(shape: Any) -> tuple[int, ...]:
    """Return a shape of a file as a tuple.

    :raises ValueError: it is no list of a few sizes, or the numbers are too many for any memory
    """
    sizes = tuple(shape)
    whole = all(type(size) is int and 0 <= size <= _MAX_NUMBERS for size in sizes)
    if not whole or len(sizes) > _MAX_AXES or math.prod(sizes) > _MAX_NUMBERS:
        raise ValueError(f"shape {str(sizes)[:80]}")
    return sizes


def tensor_of(
    content: bytearray,
    dtype: th.dtype,
    shape: Any,
    strides: Any = None,
    offset: int = 0,
) -> th.Tensor:
    """Return a tensor in ``content``, which it keeps.

    :param content: bytes
    :param dtype: of :data:`DTYPES`
    :param shape: of the tensor
    :param strides: in numbers; None: contiguous, and ``content`` holds nothing else
    :param offset: number with which the tensor begins
    :raises ValueError: the tensor would leave its bytes, or has bytes that are no numbers
    """
    shape = check_shape(shape)
    numbers, available = math.prod(shape), len(content) // dtype.itemsize
    if len(content) % dtype.itemsize or (strides is None and available != numbers):
        raise ValueError(f"{len(content)} bytes for the shape {shape} of {dtype}")
    if dtype == th.bool and content.translate(None, b"\0\1"):
        raise ValueError("truth values other than 0 and 1")
    if strides is None:
        strides = th.empty(shape, device="meta").stride()
    strides = check_shape(strides)
    if type(offset) is not int or offset < 0 or len(strides) != len(shape):
        raise ValueError(f"offset {offset} and strides {strides} for the shape {shape}")
    last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    if numbers and last >= available:
        raise ValueError(f"{available} numbers for the shape {shape}, strides {strides}")
    if not numbers:
        return th.empty(shape, dtype=dtype)
    return th.frombuffer(content, dtype=dtype).as_strided(shape, strides, offset)


def read_tensors(content: bytes, device: th.device, allowance: Allowance | None = None) -> Any:
    """Read what ``torch.save`` wrote: nested dictionaries and lists of tensors and plain values.

    :param content: the file
    :param device: where the tensors go
    :param allowance: that it shares with other parts of a file
    :raises ValueError: it is damaged or holds anything else
    :raises zipfile.BadZipFile: it is no zip, or a checksum does not agree
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        check_directory(archive, len(content))
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("compressed parts")
        found = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError("no data.pkl")
        folder = found[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist():
            order = read_member(archive, f"{folder}byteorder", 16).decode("ascii")
            if order != sys.byteorder:
                raise ValueError(f"byte order {order}")
        opcodes = read_member(archive, found[0], _OPCODES_BYTES)
        value = _Machine(archive, folder, len(content), device).run(
            opcodes, allowance or Allowance()
        )
    _check_extent(value, _MAX_DEPTH, [_MAX_ITEMS])
    return value


def _check_extent(value: Any, depth: int, left: list[int]) -> None:
    """Refuse what contains itself, what is nested too deep, and machinery in place of values."""
    left[0] -= 1
    if depth < 0 or left[0] < 0:
        raise ValueError("nested too deep, or too many values")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_extent(key, depth - 1, left)
            _check_extent(item, depth - 1, left)
    elif type(value) in (list, tuple):
        for item in value:
            _check_extent(item, depth - 1, left)
    elif isinstance(value, (_Name, _Storage)) or value is _MARK:
        raise ValueError("a name in place of a value")


def _versions(state: Any) -> OrderedDict[str, dict[str, int]]:
    """Return the versions of its modules that a state dict carries along."""
    versions = state["_metadata"]
    for name, of_one in versions.items():
        plain = isinstance(of_one, dict) and all(type(each) is int for each in of_one.values())
        if type(name) is not str or not plain:
            raise ValueError("a state dict with more than its modules' versions")
    return OrderedDict(versions)


def _named(argument: str) -> Any:
    name = argument.replace(" ", ".")
    return DTYPES.get(name, _Name(name))


class _Machine:
    """Runs the opcodes of one file.

    :param archive: the torch file
    :param folder: in which its members lie
    :param size: bytes of the file
    :param device: where tensors go
    """

    def __init__(self, archive: zipfile.ZipFile, folder: str, size: int, device: th.device) -> None:
        self._archive, self._folder, self._device = archive, folder, device
        self._storages: dict[str, _Storage] = {}
        self._left = 2 * size  # bytes for tensors: a storage may be named many times
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        pop = self._pop
        self._plain: dict[str, Callable[[Any], Any]] = {
            "NONE": lambda _: None,
            "NEWTRUE": lambda _: True,
            "NEWFALSE": lambda _: False,
            **dict.fromkeys(
                ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
                lambda argument: argument,
            ),
            "SHORT_BINUNICODE": lambda argument: argument,
            "EMPTY_DICT": lambda _: {},
            "EMPTY_LIST": lambda _: [],
            "EMPTY_TUPLE": lambda _: (),
            "MARK": lambda _: _MARK,
            "TUPLE": lambda _: tuple(self._to_mark()),
            "TUPLE1": lambda _: (pop(),),
            "TUPLE2": lambda _: tuple(reversed([pop(), pop()])),
            "TUPLE3": lambda _: tuple(reversed([pop(), pop(), pop()])),
            "GLOBAL": _named,
            "BINPERSID": lambda _: self._storage(pop()),
            "BINGET": lambda argument: self._memo[argument],
            "LONG_BINGET": lambda argument: self._memo[argument],
            "REDUCE": lambda _: self._build(*reversed([pop(), pop()])),
        }

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("a mark in place of a value")
        return value

    def _to_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def run(self, opcodes: bytes, allowance: Allowance) -> Any:
        argument: Any
        for opcode, argument, _ in pickletools.genops(opcodes):
            allowance.take()
            name = opcode.name
            if name in self._plain:
                self._stack.append(self._plain[name](argument))
            elif name in ("BINPUT", "LONG_BINPUT"):
                self._memo[argument] = self._stack[-1]
            elif name in ("APPEND", "APPENDS"):
                items = [self._pop()] if name == "APPEND" else self._to_mark()
                self._top(list).extend(items)
            elif name in ("SETITEM", "SETITEMS"):
                pair = name == "SETITEM"
                items = list(reversed([self._pop(), self._pop()])) if pair else self._to_mark()
                if not all(map(is_plain_key, items[::2])):
                    raise ValueError("a key that is neither a word nor a small number")
                self._top(dict).update(zip(items[::2], items[1::2], strict=True))
            elif name == "BUILD":
                state = self._pop()
                self._top(OrderedDict)._metadata = _versions(state)
            elif name == "STOP":
                return self._pop()
            elif name != "PROTO":
                raise ValueError(f"the opcode {name}")
        raise ValueError("no end")

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise ValueError(f"no {kind.__name__}")
        return self._stack[-1]

    def _storage(self, given: Any) -> _Storage:
        kind, storage_type, key, _, numbers = given
        dtype = _STORAGES[storage_type.name.removeprefix("torch.")]
        if kind != "storage" or type(numbers) is not int or type(key) is not str:
            raise ValueError("no storage")
        if key not in self._storages:
            name = f"{self._folder}data/{key}"
            size = self._archive.getinfo(name).file_size
            if size != numbers * dtype.itemsize:
                raise ValueError(f"a storage of {size} bytes for {numbers} numbers")
            self._storages[key] = _Storage(bytearray(read_member(self._archive, name, size)), dtype)
        if self._storages[key].dtype != dtype:
            raise ValueError("a storage of two types")
        return self._storages[key]

    def _build(self, called: Any, arguments: Any) -> Any:
        """Return what the call of a name makes, for the names that are known."""
        name = called.name
        if name == "torch._utils._rebuild_tensor_v2":
            storage, offset, size, stride = arguments[:4]
            if type(storage) is not _Storage:
                raise ValueError("a tensor without storage")
            tensor = tensor_of(storage.content, storage.dtype, size, stride, offset)
            self._left -= tensor.numel() * tensor.itemsize
            if self._left < 0:
                raise ValueError("more tensors than its bytes can hold")
            return tensor.to(self._device, copy=True)
        if name == "torch._utils._rebuild_parameter":
            return th.nn.Parameter(arguments[0], requires_grad=bool(arguments[1]))
        if name == "torch._utils._rebuild_meta_tensor_no_storage":
            dtype, size = arguments[0], check_shape(arguments[1])
            return th.empty(size, dtype=dtype, device="meta")
        if name == "collections.OrderedDict" and arguments == ():
            return OrderedDict()
        if name == "torch.Size":
            return th.Size(check_shape(*arguments))
        if name == "torch.device":
            return th.device(*arguments)
        raise ValueError(f"a call of {name}")
