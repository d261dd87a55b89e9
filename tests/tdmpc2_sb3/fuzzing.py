"""Damages files of every kind that is read, and loads each in a process of its own.

``python tests/tdmpc2_sb3/fuzzing.py 10000`` goes through ten thousand cases; a case is fixed by the
seed, its number and the kind of file. What may happen to a damaged file is a ``ValueError`` of one
line at loading, such an error or a ``RuntimeError`` in learning, or an agent that predicts and
learns. A signal, another error, more than 20 s, memory beyond the limit, or a write, a process or a
connection outside the case's folder is a failure.

A further reader is a further entry of :data:`TARGETS`: what it saves, and what it does with a file.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import pathlib
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch as th
from gymnasium import spaces

import dmc_gym_plugin  # noqa: F401 - registers DMC/
from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.policies import MlpPolicy
from tdmpc2_sb3.replay.buffer import SequenceReplayBuffer

SECONDS = 20
MEMORY = 2 << 30  # bytes that a case may take besides what its process had
SIZES = {
    "latent_dim": 16,
    "enc_dim": 16,
    "mlp_dim": 16,
    "num_q": 2,
    "simnorm_dim": 4,
    "num_bins": 11,
    "num_samples": 16,
    "num_elites": 4,
    "num_pi_trajs": 2,
    "num_iterations": 2,
    "batch_size": 8,
    "learning_starts": 20,
    "buffer_size": 200,
    "seed": 0,
    "device": "cpu",
}
IDS = {"model": "DMC/finger-turn_hard-v0", "ssm": "DMC/point_mass-hard-v0"}


class Target(NamedTuple):
    """A kind of file: how one is made, and what is done with it after it was damaged."""

    make: Callable[[pathlib.Path], None]
    use: Callable[[pathlib.Path, dict[str, Any]], None]
    suffix: str


class Refused(Exception):
    """The file was refused at loading, as it should be."""


# -- the readers -------------------------------------------------------------------------------


def _train(env_id: str, policy: str) -> TDMPC2:
    return TDMPC2(policy, gymnasium.make(env_id), **SIZES).learn(31, log_interval=None)


def _make_model(kind: str) -> Callable[[pathlib.Path], None]:
    def make(path: pathlib.Path) -> None:
        model = _train(IDS[kind], "SSMPolicy" if kind == "ssm" else "MlpPolicy")
        model.save(path)
        model.save_replay_buffer(path.with_suffix(".buffer.pkl"))

    return make


def _use_model(kind: str) -> Callable[[pathlib.Path, dict[str, Any]], None]:
    def use(path: pathlib.Path, kept: dict[str, Any]) -> None:
        env = kept.get(kind) or gymnasium.make(IDS[kind])
        model = _load(lambda: TDMPC2.load(path, env=env, device="cpu"))
        _load(lambda: model.load_replay_buffer(kept["folder"] / f"{kind}.buffer.pkl"))
        model.predict(env.observation_space.sample(), deterministic=True)
        model.learn(2, reset_num_timesteps=False, log_interval=None)
        model.train(1, 8)

    return use


def _make_policy(path: pathlib.Path) -> None:
    _train(IDS["model"], "MlpPolicy").policy.save(path)


def _use_policy(path: pathlib.Path, kept: dict[str, Any]) -> None:
    policy = _load(lambda: MlpPolicy.load(path, device="cpu"))
    policy.predict(policy.observation_space.sample(), deterministic=True)


def _make_official(path: pathlib.Path) -> None:
    _train(IDS["model"], "MlpPolicy").save_official(path)


def _use_official(path: pathlib.Path, kept: dict[str, Any]) -> None:
    env = kept.get("model") or gymnasium.make(IDS["model"])
    left = ("latent_dim", "enc_dim", "mlp_dim", "num_q", "num_bins")
    settings = {name: value for name, value in SIZES.items() if name not in left}
    model = _load(lambda: TDMPC2.load_official(path, env, simnorm_dim=4, **_without(settings)))
    model.predict(env.observation_space.sample(), deterministic=True)
    model.learn(22, log_interval=None)


def _without(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "simnorm_dim"}


OBSERVATIONS = spaces.Dict(
    {
        "vector": spaces.Box(-np.inf, np.inf, (3,), np.float32),
        "image": spaces.Box(0, 255, (9, 8, 8), np.uint8),
    }
)


def _buffer() -> SequenceReplayBuffer:
    actions = spaces.Box(-1, 1, (2,), np.float32)
    return SequenceReplayBuffer(60, OBSERVATIONS, actions, "cpu", n_envs=2, seed=1)


def _feed(buffer: SequenceReplayBuffer, steps: int) -> None:
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(1, 255, (2, 3, 8, 8), dtype=np.uint8), 3, axis=1)
    obs = {"vector": np.zeros((2, 3), np.float32), "image": frames.reshape(2, 9, 8, 8)}
    obs["image"] = np.tile(rng.integers(1, 255, (2, 3, 8, 8), dtype=np.uint8), (1, 3, 1, 1))
    for _ in range(steps):
        new = rng.integers(1, 255, (2, 3, 8, 8), dtype=np.uint8)
        following = {
            "vector": rng.normal(size=(2, 3)).astype(np.float32),
            "image": np.concatenate([obs["image"][:, 3:], new], axis=1),
        }
        action, done = rng.uniform(-1, 1, (2, 2)), rng.random(2) < 0.1
        buffer.add(obs, following, action, np.ones(2), done, [{}, {}])
        first = np.tile(rng.integers(1, 255, (2, 3, 8, 8), dtype=np.uint8), (1, 3, 1, 1))
        obs = {
            "vector": np.where(done[:, None], 0, following["vector"]),
            "image": np.where(done[:, None, None, None], first, following["image"]),
        }


def _make_buffer(path: pathlib.Path) -> None:
    buffer = _buffer()
    _feed(buffer, 50)
    buffer.save(path)


def _use_buffer(path: pathlib.Path, kept: dict[str, Any]) -> None:
    buffer = _buffer()
    _load(lambda: buffer.load(path))
    if buffer.num_subsequences:
        batch = buffer.sample(40)
        assert all(bool(th.isfinite(each).all()) for each in (batch.actions, batch.rewards))
    _feed(buffer, 70)
    buffer.sample(40)


TARGETS = {
    "model": Target(_make_model("model"), _use_model("model"), ".zip"),
    "ssm": Target(_make_model("ssm"), _use_model("ssm"), ".zip"),
    "policy": Target(_make_policy, _use_policy, ".zip"),
    "buffer": Target(_make_buffer, _use_buffer, ".pkl"),
    "official": Target(_make_official, _use_official, ".pt"),
}


def _load(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ValueError as error:
        if "\n" in str(error):
            raise TypeError(f"more than a line: {error}") from error
        raise Refused(str(error)) from error


# -- damage ------------------------------------------------------------------------------------


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
        self.values = _values(outside)

    def __call__(self, content: bytes) -> bytes:
        if self.rng.random() < 0.12:
            return self._bytes(content)
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
            members[name] = self._json(members[name])
        elif name.endswith(".pth"):
            members[name] = self._torch(members[name])
        else:
            members[name] = self._npy(members[name])
        return _zipped(members)

    def _bytes(self, content: bytes) -> bytes:
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

    def _json(self, text: bytes) -> bytes:
        document = json.loads(text)
        for _ in range(int(self.rng.choice([1, 1, 1, 2, 4]))):
            places = list(_places(document))
            # Every level is as likely as any other: most places lie in long lists.
            depth = int(self.rng.choice(sorted({len(place) for place in places})))
            chosen = [place for place in places if len(place) == depth]
            place = chosen[int(self.rng.integers(len(chosen)))]
            part = document
            for step in place[:-1]:
                part = part[step]
            self._change(part, place[-1])
        if self.rng.random() < 0.02:
            return b"[" * 200_000
        return json.dumps(document).encode()

    def _change(self, part: Any, key: Any) -> None:
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
            part[key] = self.values[index]

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
        places = list(_places(value))
        place = places[int(self.rng.integers(len(places)))]
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


def _places(value: Any, way: tuple[Any, ...] = ()) -> Any:
    if isinstance(value, dict):
        steps = list(value.items())
    elif isinstance(value, (list, tuple)):
        steps = list(enumerate(value))[:50]
    else:
        return
    for key, part in steps:
        yield (*way, key)
        yield from _places(part, (*way, key))


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


# -- one case, in a process of its own ---------------------------------------------------------

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_ACTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")
_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.chmod")


def _watch(inside: pathlib.Path, report: Callable[[str], None]) -> None:
    """End the process at its first act outside ``inside``."""

    def is_inside(path: Any) -> bool:
        if isinstance(path, int):
            return True
        full = os.path.realpath(os.fsdecode(path))
        return full in (os.devnull, str(inside)) or full.startswith(f"{inside}{os.sep}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        flags = arguments[2] if event == "open" else 0
        writes = event in _CHANGES or bool(isinstance(flags, int) and flags & _WRITING)
        if event in _ACTS or (writes and not is_inside(arguments[0])):
            report(f"failed: {event} {arguments[:2]}")
            os._exit(1)

    sys.addaudithook(hook)


def _run_case(
    target: Target, path: pathlib.Path, inside: pathlib.Path, kept: dict[str, Any], pipe: int
) -> None:
    def report(text: str) -> None:
        os.write(pipe, text.encode()[:4000])

    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(silence, descriptor)
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    os.chdir(inside)
    os.environ["SB3_LOGDIR"] = str(inside)
    warnings.simplefilter("ignore")
    _watch(inside, report)
    try:
        target.use(path, kept)
        report("used")
    except Refused as refusal:
        report(f"refused: {refusal}")
    except (ValueError, RuntimeError) as error:
        one_line = "\n" not in str(error)
        report(f"{'stopped' if one_line else 'failed'}: {type(error).__name__}: {error}")
    except BaseException as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-3:]
        places = " < ".join(f"{each.name}:{each.lineno}" for each in reversed(where))
        report(f"failed: {type(error).__name__}: {error} [{places}]")
    os._exit(0)


class Fuzzer:
    """Makes files once, and runs damaged ones.

    :param folder: to work in
    :param names: keys of :data:`TARGETS`
    """

    def __init__(self, folder: pathlib.Path, names: list[str]) -> None:
        th.set_num_threads(1)
        self.folder = folder.resolve()
        self.names = names
        self.kept: dict[str, Any] = {"folder": self.folder}
        self.originals: dict[str, bytes] = {}
        for name in names:
            path = self.folder / f"{name}{TARGETS[name].suffix}"
            TARGETS[name].make(path)
            self.originals[name] = path.read_bytes()
            TARGETS[name].use(path, self.kept)  # builds the kernels, imports what is imported late

    def damaged(self, number: int, seed: int) -> tuple[str, bytes]:
        """The name of the target and the file of one case."""
        name = self.names[number % len(self.names)]
        rng = np.random.default_rng([seed, number])
        return name, Damage(rng, str(self.folder / "outside" / "evil"))(self.originals[name])

    def run(self, number: int, seed: int) -> str:
        """What became of one case: used, refused, stopped or failed, and the reason."""
        name, content = self.damaged(number, seed)
        target = TARGETS[name]
        inside = self.folder / "inside"
        shutil.rmtree(inside, ignore_errors=True)
        inside.mkdir()
        path = inside / f"case{target.suffix}"
        path.write_bytes(content)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                _run_case(target, path, inside, self.kept, writing)
            finally:
                os._exit(2)
        os.close(writing)
        begin = time.monotonic()
        with os.fdopen(reading, "rb") as pipe:
            text = pipe.read().decode(errors="replace")
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            ended = signal.Signals(os.WTERMSIG(status)).name
            seconds = time.monotonic() - begin
            return f"{name} failed: {ended} after {seconds:.0f} s ({text})"
        if os.path.lexists(self.folder / "outside"):
            return f"{name} failed: wrote outside its folder ({text})"
        return f"{name} {text or 'failed: said nothing'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    arguments = parser.parse_args()
    failures = []
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        fuzzer = Fuzzer(pathlib.Path(folder), arguments.targets)
        for number in range(arguments.first, arguments.first + arguments.cases):
            outcome = fuzzer.run(number, arguments.seed)
            name, kind = outcome.split(":")[0].split(" ")[:2]
            counts[f"{name} {kind}"] += 1
            if (number + 1) % 500 == 0:
                print(number + 1, json.dumps(dict(sorted(counts.items()))), flush=True)
            if kind == "failed":
                failures.append(f"case {number}: {outcome}")
                print(failures[-1], flush=True)
    print(json.dumps(dict(sorted(counts.items()))))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
