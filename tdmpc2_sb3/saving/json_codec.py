"""Python values as JSON and back, without pickle: a saved algorithm's settings and state.

Reading never runs code that a file brings along: an object is rebuilt only if its type stands in
the tables below, and a class is looked up only among those that
:mod:`tdmpc2_sb3.saving.json_classes` names.

A value that JSON lacks becomes ``{"__type__": <tag>, ...}``; arrays are written bit for bit.
"""

from __future__ import annotations

import base64
import math
import pathlib
import re
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from tdmpc2_sb3.saving import action_noise
from tdmpc2_sb3.saving.json_classes import (
    ENUMS,
    RECORDS,
    UnreadableError,
    UnsaveableError,
    class_of_name,
    import_listed,
    name_of_class,
    qualified_name,
)
from tdmpc2_sb3.saving.random_streams import checked_stream
from tdmpc2_sb3.saving.tensor_file import DTYPES, check_shape, is_plain_tensor, tensor_of

_TAG = "__type__"
_MAX_ALIKE = 100  # keys of the same hash

# Numbers of up to 32 bytes (a pair of long doubles), strings of up to 9999 characters.
_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f(2|4|8|12|16)|c(8|16|24|32)|[SU][1-9][0-9]{0,3})")


def encode(value: Any, name: str) -> Any:
    """Turn ``value`` into what ``json.dumps`` takes.

    :param value: any value
    :param name: how to call it in an error, such as ``policy_kwargs``
    :raises UnsaveableError: it or a part of it is of no type known here
    """
    try:
        return _encode(value, name)
    except RecursionError as error:
        raise UnsaveableError(
            f"Cannot save '{name}': it contains itself; take it out of the model."
        ) from error


def decode(value: Any) -> Any:
    """Rebuild what :func:`encode` returned, after a round trip through JSON.

    :raises UnreadableError: damaged, or it names a type or class that is unknown here
    """
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: decode(item) for key, item in value.items()}
    tag = value[_TAG]
    decoder = _DECODERS.get(tag) if isinstance(tag, str) else None
    if decoder is None:
        raise UnreadableError(
            f"The saved model holds a value of the unknown kind {str(tag)[:80]!r}: "
            "update tdmpc2_sb3 to read it."
        )
    try:
        return decoder(value)
    except UnreadableError:
        raise
    except Exception as error:  # whatever a constructor says of arguments that are none
        reason = " ".join(repr(error).split())[:200]
        raise UnreadableError(
            f"A saved value of kind {value[_TAG]!r} is damaged ({reason}): use another copy."
        ) from error


def _encode(value: Any, name: str) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_TAG: "float", "value": repr(value)}
    if type(value) is list:
        return [_encode(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if type(value) is dict and _TAG not in value and all(type(key) is str for key in value):
        return {key: _encode(item, f"{name}[{key!r}]") for key, item in value.items()}
    encoder = _ENCODERS.get(type(value))
    if encoder is not None:
        return encoder(value, name)
    full_name = qualified_name(type(value))
    if full_name in RECORDS:
        fields = {
            field: _encode(getattr(value, field), f"{name}.{field}") for field in RECORDS[full_name]
        }
        return {_TAG: "record", "name": full_name, "fields": fields}
    if full_name in ENUMS:
        return {_TAG: "enum", "name": full_name, "value": value.value}
    if isinstance(value, type):
        return _encode_class(value, name)
    if isinstance(value, np.generic):
        return {_TAG: "numpy scalar", "array": _encode_array(np.asarray(value), name)}
    if isinstance(value, pathlib.PurePath):
        return {_TAG: "path", "value": str(value)}
    raise UnsaveableError(
        f"Cannot save '{name}': {_describe(value)} cannot be written without pickle; "
        f"{_remedy(value)}."
    )


def _describe(value: Any) -> str:
    kind = qualified_name(type(value))
    if callable(value) and hasattr(value, "__qualname__"):
        return f"the {kind.removeprefix('builtins.')} '{value.__qualname__}'"
    return f"a value of type {kind}"


def _remedy(value: Any) -> str:
    for kind in type(value).__mro__[1:]:
        if kind.__name__ in _SPACES and isinstance(value, spaces.Space):
            return f"give the environment a plain gymnasium.spaces.{kind.__name__} in its place"
    if callable(value) and not isinstance(value, th.nn.Module):
        return (
            "use a number or a schedule of stable_baselines3.common.utils (ConstantSchedule, "
            "LinearSchedule), or leave it out by save(exclude=[...])"
        )
    return (
        "use plain values (numbers, strings, lists, dictionaries, arrays) "
        "or leave it out by save(exclude=[...])"
    )


def _encode_items(tag: str) -> Callable[[Any, str], dict[str, Any]]:
    def encoder(value: Any, name: str) -> dict[str, Any]:
        return {
            _TAG: tag,
            "items": [_encode(item, f"{name}[{index}]") for index, item in enumerate(value)],
        }

    return encoder


def _encode_set(value: Any, name: str) -> dict[str, Any]:
    return {
        _TAG: type(value).__name__,
        "items": [_encode(item, f"{name} item") for item in sorted(value, key=repr)],
    }


def _encode_mapping(value: dict[Any, Any], name: str) -> dict[str, Any]:
    items = [
        [_encode(key, f"{name} key"), _encode(item, f"{name}[{key!r}]")]
        for key, item in value.items()
    ]
    return {_TAG: "dict" if type(value) is dict else "OrderedDict", "items": items}


def _encode_deque(value: deque[Any], name: str) -> dict[str, Any]:
    return {**_encode_items("deque")(value, name), "maxlen": value.maxlen}


def _encode_array(value: np.ndarray, name: str) -> dict[str, Any]:
    if value.dtype.kind not in "biufcSU":
        raise UnsaveableError(
            f"Cannot save '{name}': an array of dtype {value.dtype} cannot be written without "
            "pickle; convert it to numbers or leave it out by save(exclude=[...])."
        )
    content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode("ascii")
    return {
        _TAG: "ndarray",
        "dtype": value.dtype.str,
        "shape": list(value.shape),
        "base64": content,
    }


def _decode_array(value: dict[str, Any]) -> np.ndarray:
    dtype = array_dtype(value["dtype"])
    shape = check_shape(value["shape"])
    content = base64.b64decode(value["base64"], validate=True)
    if len(content) != dtype.itemsize * math.prod(shape):
        raise ValueError(f"{len(content)} bytes for the shape {shape} of {dtype}")
    if dtype.kind == "b" and content.translate(None, b"\0\1"):
        raise ValueError("truth values other than 0 and 1")
    array = np.zeros(shape, dtype)
    if content:
        array[...] = np.frombuffer(content, dtype).reshape(shape)
    return array


def array_dtype(name: Any) -> np.dtype:
    """Return the dtype of an array in a file.

    :raises ValueError: it is no dtype of plain numbers, truth values or short strings
    """
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise ValueError(f"dtype {str(name)[:40]}")
    return np.dtype(name)


def _encode_tensor(value: th.Tensor, name: str) -> dict[str, Any]:
    if not is_plain_tensor(value):
        raise UnsaveableError(
            f"Cannot save '{name}': a tensor of {value.dtype} ({value.layout}) has no plain bytes; "
            "convert it to floats or integers."
        )
    plain = value.detach().cpu().contiguous()
    raw = plain.reshape(-1).view(th.uint8) if plain.numel() else th.zeros(0, dtype=th.uint8)
    return {
        _TAG: "tensor",
        "dtype": str(value.dtype),
        "shape": list(value.shape),
        "base64": base64.b64encode(raw.numpy().tobytes()).decode("ascii"),
    }


def _decode_tensor(value: dict[str, Any]) -> th.Tensor:
    content = bytearray(base64.b64decode(value["base64"], validate=True))
    return tensor_of(content, _torch_dtype(value["dtype"]), value["shape"])


def _torch_dtype(name: Any) -> th.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"dtype {str(name)[:40]}")
    return DTYPES[name]


def _encode_generator(value: np.random.Generator, name: str) -> dict[str, Any]:
    return {_TAG: "numpy generator", "state": _encode(value.bit_generator.state, name)}


def _hashed(items: list[Any]) -> list[Any]:
    """Return keys, or items of a set, that are not so many of one hash that they never end.

    Whole numbers can be chosen so; those that come about have a hash to themselves, or nearly.
    """
    most = max(Counter(map(hash, items)).values(), default=0)
    if most > _MAX_ALIKE:
        raise ValueError(f"{most} keys of the same hash")
    return items


def _decode_dict(value: dict[str, Any]) -> dict[Any, Any]:
    keys = _hashed([decode(key) for key, _ in value["items"]])
    return dict(zip(keys, (decode(item) for _, item in value["items"]), strict=True))


def _decode_generator(value: dict[str, Any]) -> np.random.Generator:
    return np.random.Generator(_decode_bit_generator(decode(value["state"])))


def _decode_bit_generator(state: dict[str, Any]) -> np.random.BitGenerator:
    checked_stream(state)
    bit_generator = getattr(np.random, state["bit_generator"])()
    bit_generator.state = state
    return bit_generator


def _encode_random_state(value: np.random.RandomState, name: str) -> dict[str, Any]:
    return {_TAG: "numpy random state", "state": _encode(value.get_state(legacy=False), name)}


def _decode_random_state(value: dict[str, Any]) -> np.random.RandomState:
    state = decode(value["state"])
    random_state = np.random.RandomState(_decode_bit_generator({**state}))
    random_state.set_state(state)
    return random_state


def _encode_class(cls: type, name: str) -> dict[str, Any]:
    saved_name = name_of_class(cls)
    if saved_name is None:
        raise UnsaveableError(
            f"Cannot save '{name}': the class {qualified_name(cls)} is not known to saved models; "
            f"call tdmpc2_sb3.saving.register_class({cls.__name__}) in the programs that save and "
            "load it."
        )
    return {_TAG: "class", "name": saved_name}


def _decode_record(value: dict[str, Any]) -> Any:
    record = import_listed(value["name"], tuple(RECORDS))
    fields = decode(value["fields"])
    if set(fields) != set(RECORDS[value["name"]]):
        raise ValueError(f"fields {sorted(fields)}")
    if any(isinstance(field, type) for field in fields.values()):
        raise ValueError("a class in place of a number or a schedule")
    return record(**fields)


def _encode_noise(value: Any, name: str) -> dict[str, Any]:
    attributes = _encode(action_noise.to_plain(value), name)
    return {_TAG: "action noise", "kind": type(value).__name__, "attributes": attributes}


def _encode_space(value: spaces.Space, name: str) -> dict[str, Any]:
    """Spaces keep their random stream: the warm-up's random actions come from it."""
    fields: dict[str, Any]
    if isinstance(value, spaces.Box):
        bounds = (value.low, value.high, value.bounded_below, value.bounded_above)
        fields = dict(zip(("low", "high", "bounded_below", "bounded_above"), bounds, strict=True))
    elif isinstance(value, spaces.Discrete):
        fields = {"n": int(value.n), "start": int(value.start), "dtype": value.dtype.str}
    elif isinstance(value, spaces.MultiDiscrete):
        fields = {"nvec": value.nvec, "start": value.start, "dtype": value.dtype.str}
    elif isinstance(value, spaces.MultiBinary):
        fields = {
            "n": list(value.shape)
            if isinstance(value.n, (tuple, list, np.ndarray))
            else int(value.n)
        }
    elif isinstance(value, spaces.Dict):
        fields = {"keys": list(value.spaces), "spaces": list(value.spaces.values())}
    else:
        assert isinstance(value, spaces.Tuple)
        fields = {"spaces": list(value.spaces)}
    return {
        _TAG: "space",
        "kind": type(value).__name__,
        "fields": _encode(fields, name),
        "random": _encode(value._np_random, name),
    }


def _decode_space(value: dict[str, Any]) -> spaces.Space:
    fields = decode(value["fields"])
    space = _SPACES[value["kind"]](fields)
    random: Any = decode(value["random"])
    if random is not None and not isinstance(random, np.random.Generator):
        raise ValueError(f"a random stream that is {type(random).__name__}")
    space._np_random = random  # type: ignore[assignment]
    return space


def _make_box(fields: dict[str, Any]) -> spaces.Box:
    low, high = fields["low"], fields["high"]
    for name in ("bounded_below", "bounded_above"):
        if fields[name].dtype != np.bool_ or fields[name].shape != low.shape:
            raise ValueError(f"{name} of {fields[name].dtype} and shape {fields[name].shape}")
    box = spaces.Box(low, high, shape=low.shape, dtype=low.dtype)
    # Bounds of integers are finite numbers also where the space has none.
    if high.dtype != low.dtype or low.dtype.kind not in "biuf" or not (low <= high).all():
        raise ValueError(f"bounds of {low.dtype} and {high.dtype}")
    box.low, box.high = low, high
    box.bounded_below, box.bounded_above = fields["bounded_below"], fields["bounded_above"]
    return box


def _make_dict(fields: dict[str, Any]) -> spaces.Dict:
    entries = dict(zip(fields["keys"], fields["spaces"], strict=True))
    space = spaces.Dict(entries)
    space.spaces = entries  # Dict sorts the keys of a plain dictionary
    return space


_SPACES: dict[str, Callable[[dict[str, Any]], spaces.Space]] = {
    "Box": _make_box,
    "Discrete": lambda fields: spaces.Discrete(fields["n"], start=fields["start"]),
    "MultiDiscrete": lambda fields: spaces.MultiDiscrete(
        fields["nvec"], dtype=fields["dtype"], start=fields["start"]
    ),
    "MultiBinary": lambda fields: spaces.MultiBinary(fields["n"]),
    "Dict": _make_dict,
    "Tuple": lambda fields: spaces.Tuple(fields["spaces"]),
}

_ENCODERS: dict[type, Callable[[Any, str], dict[str, Any]]] = {
    tuple: _encode_items("tuple"),
    set: _encode_set,
    frozenset: _encode_set,
    dict: _encode_mapping,
    OrderedDict: _encode_mapping,
    deque: _encode_deque,
    bytes: lambda value, name: {_TAG: "bytes", "base64": base64.b64encode(value).decode("ascii")},
    np.ndarray: _encode_array,
    np.random.Generator: _encode_generator,
    np.random.RandomState: _encode_random_state,
    th.Tensor: _encode_tensor,
    th.Size: _encode_items("torch size"),
    th.dtype: lambda value, name: {_TAG: "torch dtype", "value": str(value)},
    th.device: lambda value, name: {_TAG: "torch device", "value": str(value)},
    **dict.fromkeys(action_noise.NOISES.values(), _encode_noise),
    spaces.Box: _encode_space,
    spaces.Discrete: _encode_space,
    spaces.MultiDiscrete: _encode_space,
    spaces.MultiBinary: _encode_space,
    spaces.Dict: _encode_space,
    spaces.Tuple: _encode_space,
}

_DECODERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "float": lambda value: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[value["value"]],
    "tuple": lambda value: tuple(decode(value["items"])),
    "set": lambda value: set(_hashed(decode(value["items"]))),
    "frozenset": lambda value: frozenset(_hashed(decode(value["items"]))),
    "dict": _decode_dict,
    "OrderedDict": lambda value: OrderedDict(_decode_dict(value)),
    "deque": lambda value: deque(decode(value["items"]), maxlen=value["maxlen"]),
    "bytes": lambda value: base64.b64decode(value["base64"], validate=True),
    "ndarray": _decode_array,
    "numpy scalar": lambda value: decode(value["array"])[()],
    "numpy generator": _decode_generator,
    "numpy random state": _decode_random_state,
    "tensor": _decode_tensor,
    "torch size": lambda value: th.Size(decode(value["items"])),
    "torch dtype": lambda value: _torch_dtype(value["value"]),
    "torch device": lambda value: th.device(value["value"]),
    "action noise": lambda value: action_noise.from_plain(
        value["kind"], decode(value["attributes"])
    ),
    "space": _decode_space,
    "record": _decode_record,
    "enum": lambda value: import_listed(value["name"], ENUMS)(value["value"]),
    "class": lambda value: class_of_name(value["name"]),
    "path": lambda value: pathlib.Path(value["value"]),
}
