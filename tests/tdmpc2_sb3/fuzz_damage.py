"""Damage to a file: what strangers and disks do to zips, JSON, arrays and pickled tensors."""

from __future__ import annotations

import base64
import copy
import io
import json
import struct
import warnings
import zipfile
from typing import Any

import numpy as np
import torch as th


def _array(dtype: str, shape: list[int], content: bytes) -> dict[str, Any]:
    text = base64.b64encode(content).decode()
    kind = "tensor" if dtype.startswith("torch") else "ndarray"
    return {"__type__": kind, "dtype": dtype, "shape": shape, "base64": text}


def _values(outside: str) -> list[Any]:
    deep: Any = 0
    for _ in range(300):
        deep = [deep]
    return [
        *(None, True, False, -1, 0, 1, 2, 7, 255, 2**31, 2**32, 2**63, 10**12, 10**30, -(2**70)),
        *(0.5, -0.5, 1e308, 1e-320, float("nan"), float("inf"), "", "x", "auto", "cuda:99"),
        *(outside, "../../outside/evil", [], {}, [1], [None], [[]], {"a": 1}, deep),
        {"__type__": "float", "value": "nan"},
        {"__type__": "float", "value": "inf"},
        {"__type__": "nothing"},
        {"__type__": []},
        {"__type__": "tuple", "items": [1, 2, 3]},
        {"__type__": "class", "name": "torch.nn.Linear"},
        {"__type__": "class", "name": "tdmpc2_sb3.policies.CnnPolicy"},
        {"__type__": "class", "name": "os.system"},
        {"__type__": "torch device", "value": "cuda:1"},
        {"__type__": "path", "value": outside},
        {"__type__": "deque", "items": [1], "maxlen": -1},
        _array("torch.qint8", [4], b"abcd"),
        _array("torch.quint4x2", [4], b"ab"),
        _array("torch.float32", [10**9], b""),
        _array("torch.float32", [0], b""),
        _array("torch.float32", [1], b"\0\0\xc0\x7f"),
        _array("<f4", [2**40], b""),
        _array("<f8", [1], struct.pack("<d", float("nan"))),
        _array("<i8", [2], struct.pack("<2q", 10**15, -5)),
        _array("<f8", [3, 1], bytes(24)),
        _array("|O", [1], bytes(8)),
        _array("<U999999999", [0], b""),
    ]


class Damage:
    """One case's damage to a file.

    :param rng: decides
    :param outside: a path that no case may write to
    """

    def __init__(self, rng: np.random.Generator, outside: str) -> None:
        self.rng = rng
        self.outside = outside
        self.values = _values(outside)

    def __call__(self, content: bytes) -> bytes:
        if self.rng.random() < 0.12:
            return self.raw(content)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        if any(name.endswith("data.pkl") for name in members):
            return self._torch(content)
        if self.rng.random() < 0.12:
            return self._zip(members)
        names = [name for name in members if not name.startswith(("_", "system"))]
        texts = [name for name in names if name.endswith(".json")]
        name = str(self.rng.choice(texts if self.rng.random() < 0.6 else names))
        if name.endswith(".json"):
            members[name] = self.json(members[name])
        elif name.endswith(".pth"):
            members[name] = self._torch(members[name])
        else:
            members[name] = self._npy(members[name])
        return _zipped(members)

    def raw(self, content: bytes) -> bytes:
        changed = bytearray(content)
        kind = int(self.rng.integers(3))
        if kind == 0:
            return bytes(changed[: int(self.rng.integers(len(changed)))])
        for _ in range(int(self.rng.integers(1, 6))):
            # Half of them in the directory at the end, where the lengths are.
            begin = len(changed) - 600 if kind == 1 and len(changed) > 600 else 0
            changed[int(self.rng.integers(begin, len(changed)))] = int(self.rng.integers(256))
        return bytes(changed)

    def _zip(self, members: dict[str, bytes]) -> bytes:
        name = str(self.rng.choice(list(members)))
        kind = int(self.rng.integers(6))
        if kind == 0:
            del members[name]
        elif kind == 1:
            members[name] = bytes(int(self.rng.choice([0, 1, 1 << 20])))
        elif kind == 2:
            return _zipped(members, zipfile.ZIP_LZMA)
        elif kind == 3:
            return _zipped(members, twice=name)
        elif kind == 4:
            return _zipped({**members, name: bytes(70 << 20)}, zipfile.ZIP_DEFLATED)
        else:
            members["../../outside/evil"] = b"x"
            members["/outside"] = b"x"
        return _zipped(members)

    def json(self, text: bytes) -> bytes:
        document = json.loads(text)
        self.change(document)
        if self.rng.random() < 0.02:
            return b"[" * 200_000
        return json.dumps(document).encode()

    def change(self, document: Any) -> None:
        """Change one to four places of nested lists and dictionaries."""
        for _ in range(int(self.rng.choice([1, 1, 1, 2, 4]))):
            found = list(places(document))
            if not found:
                return
            # Every level is as likely as any other: most places lie in long lists.
            depth = int(self.rng.choice(sorted({len(place) for place in found})))
            chosen = [place for place in found if len(place) == depth]
            place = chosen[int(self.rng.integers(len(chosen)))]
            part = document
            for step in place[:-1]:
                part = part[step]
            self._change(part, place[-1])

    def _change(self, part: Any, key: Any) -> None:
        if isinstance(part, tuple):
            return
        value, kind = part[key], self.rng.random()
        if kind < 0.1:
            del part[key]
        elif kind < 0.3 and isinstance(value, int) and not isinstance(value, bool):
            part[key] = value + int(self.rng.choice([-1, 1, 1000, 2**33, -(2**33)]))
        elif kind < 0.3 and isinstance(value, str) and len(value) > 8:
            at = int(self.rng.integers(len(value)))
            part[key] = value[:at] + "/+A9zQ"[int(self.rng.integers(6))] + value[at + 1 :]
        elif kind < 0.4 and isinstance(value, list) and value:
            part[key] = value * int(self.rng.choice([2, 1000 // len(value) + 1]))
        elif kind < 0.45 and isinstance(part, dict):
            part[str(self.rng.choice(["predict", "__class__", "env", "x", "learn"]))] = value
        else:
            index = int(self.rng.integers(len(self.values)))
            part[key] = copy.deepcopy(self.values[index])  # it may be changed in its turn

    def _torch(self, content: bytes) -> bytes:
        if self.rng.random() < 0.4:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                members = {name: archive.read(name) for name in archive.namelist()}
            name = next(name for name in members if name.endswith("data.pkl"))
            if self.rng.random() < 0.2:
                name = str(self.rng.choice(list(members)))
            opcodes = bytearray(members[name] or b"x")
            for _ in range(int(self.rng.integers(1, 4))):
                opcodes[int(self.rng.integers(len(opcodes)))] = int(self.rng.integers(256))
            return _zipped({**members, name: bytes(opcodes)})
        value = th.load(io.BytesIO(content), weights_only=True)
        found = list(places(value))
        place = found[int(self.rng.integers(len(found)))]
        part = value
        for step in place[:-1]:
            part = part[step]
        if isinstance(part, tuple):
            return content[:-1]
        old = part[place[-1]]
        shape = tuple(old.shape) if isinstance(old, th.Tensor) else ()
        choices = [
            *(None, -1, 10**12, "x", [], {}, float("nan"), (0.5, 2.0), True),
            *(th.zeros(1), th.zeros(()), th.zeros(0), th.zeros(1).expand(10**9), th.ones(3, 3)),
            *(th.full(shape, float("nan")), th.full(shape, 1e30), th.full(shape, -1.0)),
            *(th.zeros(shape, dtype=th.int64), th.zeros(shape, dtype=th.float64)),
            *(th.zeros(shape, dtype=th.complex64), th.zeros((*shape, 2)), th.zeros(2).to_sparse()),
            *(th.zeros((2, *shape))[0], th.quantize_per_tensor(th.ones(4), 0.1, 0, th.qint8)),
            *(th.zeros(10**5), th.empty(shape, device="meta")),
        ]
        if self.rng.random() < 0.1 and isinstance(part, dict):
            part["x"] = part.pop(place[-1])
        else:
            part[place[-1]] = choices[int(self.rng.integers(len(choices)))]
        stream = io.BytesIO()
        th.save(value, stream)
        return stream.getvalue()

    def _npy(self, content: bytes) -> bytes:
        array = np.load(io.BytesIO(content))
        kind = int(self.rng.integers(7))
        if kind == 0 and array.ndim > 1:
            array = np.asfortranarray(array)
        elif kind == 1:
            array = array.astype(str(self.rng.choice(["<f8", "|u1", "<i4", ">f4"])))
        elif kind == 2:
            array = array[: int(self.rng.integers(len(array)))]
        elif kind == 3 and array.dtype.kind == "f":
            array.flat[int(self.rng.integers(array.size))] = self.rng.choice([np.nan, np.inf])
        elif kind == 4:
            return content + bytes(1000)
        elif kind == 5:
            return content[:10] + content[10:].replace(b"(", b"(9999999999, ", 1)
        else:
            raw = bytearray(content)
            for _ in range(int(self.rng.integers(1, 10))):
                raw[int(self.rng.integers(len(raw)))] = int(self.rng.integers(256))
            return bytes(raw)
        stream = io.BytesIO()
        np.save(stream, array)
        return stream.getvalue()


def places(value: Any, way: tuple[Any, ...] = ()) -> Any:
    if isinstance(value, dict):
        steps = list(value.items())
    elif isinstance(value, (list, tuple)):
        steps = list(enumerate(value))[:50]
    else:
        return
    for key, part in steps:
        yield (*way, key)
        yield from places(part, (*way, key))


def _zipped(
    members: dict[str, bytes], method: int = zipfile.ZIP_STORED, twice: str | None = None
) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(stream, "w", method) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
            if twice is not None:
                archive.writestr(twice, members[twice])
    return stream.getvalue()
