"""Damages files and folders of every kind that is read, and loads each in its own process.

``python tests/tdmpc2_sb3/fuzzing.py 10000`` goes through ten thousand cases; a case is fixed by the
seed, its number and the kind of file. What may happen to a damaged file is a ``ValueError`` of one
line at loading, such an error or a ``RuntimeError`` in learning, or an agent that predicts and
learns. A signal, another error, more than 20 s, memory beyond the limit, or a write, a process or a
connection outside the case's folder is a failure.

A further reader is a further entry of :data:`TARGETS`: what it saves, and what it does with a file.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import fuzz_run_folder
import gymnasium
import numpy as np
import torch as th
from fuzz_damage import Damage
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
#: What stands in a file outside a damaged folder, to which links in it may lead.
VICTIM = '#{"t_start": 1.0}\nr,l,t\n1.0,10,3.5\n' + 40 * "1.0,10,9.5\n"
IDS = {"model": "DMC/finger-turn_hard-v0", "ssm": "DMC/point_mass-hard-v0"}


class Target(NamedTuple):
    """A kind of file or folder.

    :ivar make: makes one
    :ivar use: does with it, after it was damaged, what a user does
    :ivar suffix: of the file's name
    :ivar damage: of a folder, in place; None for files
    """

    make: Callable[[pathlib.Path], None]
    use: Callable[[pathlib.Path, dict[str, Any]], None]
    suffix: str
    damage: Callable[[pathlib.Path, Damage, pathlib.Path], None] | None = None


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


def _use_folder(
    use: Callable[[pathlib.Path], str | None],
) -> Callable[[pathlib.Path, dict[str, Any]], None]:
    """A folder's programs return what they refuse it for."""

    def refused(path: pathlib.Path, kept: dict[str, Any]) -> None:
        reason = use(path)
        if reason is not None:
            raise Refused(reason)

    return refused


TARGETS = {
    "model": Target(_make_model("model"), _use_model("model"), ".zip"),
    "ssm": Target(_make_model("ssm"), _use_model("ssm"), ".zip"),
    "policy": Target(_make_policy, _use_policy, ".zip"),
    "buffer": Target(_make_buffer, _use_buffer, ".pkl"),
    "official": Target(_make_official, _use_official, ".pt"),
    "run": Target(
        fuzz_run_folder.make, _use_folder(fuzz_run_folder.use), "", fuzz_run_folder.damage
    ),
}


def _load(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ValueError as error:
        if "\n" in str(error):
            raise TypeError(f"more than a line: {error}") from error
        raise Refused(str(error)) from error


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
        self.victim = self.folder / "victim"
        self.victim.write_text(VICTIM)
        self.kept: dict[str, Any] = {"folder": self.folder}
        for name in names:
            path = self._original(name)
            TARGETS[name].make(path)
            copy = path.with_name(f"used-{path.name}")
            _copy(path, copy)
            TARGETS[name].use(copy, self.kept)  # builds the kernels, imports what is imported late

    def _original(self, name: str) -> pathlib.Path:
        return self.folder / f"{name}{TARGETS[name].suffix}"

    def lay_out(self, number: int, seed: int, inside: pathlib.Path) -> tuple[str, pathlib.Path]:
        """The name of the target of one case, and the damaged file or folder that is made."""
        name = self.names[number % len(self.names)]
        target, original = TARGETS[name], self._original(name)
        shutil.rmtree(inside, ignore_errors=True)
        inside.mkdir()
        path = inside / f"case{target.suffix}"
        damage = Damage(
            np.random.default_rng([seed, number]), str(self.folder / "outside" / "evil")
        )
        if target.damage is None:
            path.write_bytes(damage(original.read_bytes()))
        else:
            shutil.copytree(original, path)
            self.victim.write_text(VICTIM)
            target.damage(path, damage, self.victim)
        return name, path

    def run(self, number: int, seed: int) -> str:
        """What became of one case: used, refused, stopped or failed, and the reason."""
        inside = self.folder / "inside"
        try:
            name, path = self.lay_out(number, seed, inside)
        except Exception as error:  # ours, not the package's: the other cases go on
            return f"damage failed: {error!r}"
        target = TARGETS[name]
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
        if os.path.lexists(self.folder / "outside") or self.victim.read_text() != VICTIM:
            return f"{name} failed: wrote outside its folder ({text})"
        return f"{name} {text or 'failed: said nothing'}"


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


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
            if (number + 1) % 100 == 0:
                print(number + 1, json.dumps(dict(sorted(counts.items()))), flush=True)
            if kind == "failed":
                failures.append(f"case {number}: {outcome}")
                print(failures[-1], flush=True)
    print(json.dumps(dict(sorted(counts.items()))))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
