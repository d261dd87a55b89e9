"""Builds ``kernels.c`` with the machine's C compiler, keeps the result and loads it.

Nothing here ever stops a run: without a compiler, or if anything fails, one warning says so and
the plain torch path goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch as th

SWITCH = "TDMPC2_SB3_KERNELS"  # 0 in the environment switches the kernels off
SOURCE = Path(__file__).with_name("kernels.c")
COMPILERS = ("cc", "gcc", "clang")
BUILD_SECONDS = 120
# The arithmetic may not be reordered but where the source says so; errno and traps are not used.
# The loops of products are so short that it costs some hundredths if they begin amid a cache line.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-falign-loops=64")

POINTER, INTEGER, REAL, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_double


class LayerArgument(ctypes.Structure):
    """``layer`` of kernels.c."""

    _fields_ = (
        *((name, POINTER) for name in ("weight", "packed", "packed_back")),
        *((name, POINTER) for name in ("bias", "gain", "shift")),
        *((name, INTEGER) for name in ("weight_row", "depth", "cols", "activation", "simplex")),
        ("simplices", INTEGER),
        ("eps", REAL),
    )


class NetworkArgument(ctypes.Structure):
    """``network`` of kernels.c."""

    _fields_ = (("layers", POINTER), ("count", INTEGER))


class StateSpaceLayerArgument(ctypes.Structure):
    """``state_space_layer`` of kernels.c."""

    _fields_ = (
        *((name, POINTER) for name in ("gain", "shift")),
        *((name, LayerArgument) for name in ("products", "selection", "readout", "mix")),
        *((name, POINTER) for name in ("alpha", "omega", "beta")),
        ("modes", INTEGER),
        ("eps", REAL),
    )


class DynamicsArgument(ctypes.Structure):
    """``dynamics`` of kernels.c."""

    _fields_ = (
        ("net", NetworkArgument),
        *((name, LayerArgument) for name in ("features", "context", "starts", "action", "out")),
        ("stack", POINTER),
        ("depth", INTEGER),
    )


class SearchArgument(ctypes.Structure):
    """``search`` of kernels.c."""

    _fields_ = (
        *((name, INTEGER) for name in ("iterations", "horizon", "envs", "samples", "prior")),
        *((name, INTEGER) for name in ("elites", "noise_envs", "latent_dim", "action_dim")),
        ("simplices", INTEGER),
        *((name, INTEGER) for name in ("widest", "memory")),
        *((name, INTEGER) for name in ("steps_work", "prior_work", "value_work")),
        ("dynamics", DynamicsArgument),
        *((name, NetworkArgument) for name in ("reward", "policy", "termination", "q")),
        *((name, POINTER) for name in ("bins", "start")),
        *((name, POINTER) for name in ("policy_noise", "sample_noise", "terminal_noise", "heads")),
        *((name, POINTER) for name in ("actions", "prior_latents")),
        *((name, POINTER) for name in ("rewards", "discounts", "values", "means", "stds")),
        *((name, POINTER) for name in ("elite_values", "weights", "first_actions", "positions")),
        *((name, POINTER) for name in ("valued", "scratch")),
        ("gamma", DOUBLE),
        *((name, REAL) for name in ("temperature", "min_std", "max_std")),
    )


SIGNATURES: dict[str, tuple[type, ...]] = {
    "lay_out": (POINTER, *(INTEGER,) * 2),
    "lay_out_back": (POINTER, *(INTEGER,) * 4),
    "workspace_size": (POINTER, *(INTEGER,) * 3),
    "scratch_size": (POINTER, *(INTEGER,) * 3),
    "networks_forward": (
        *(POINTER, INTEGER, INTEGER, POINTER, INTEGER),
        *(POINTER, INTEGER, REAL),
        *(POINTER, INTEGER, POINTER, INTEGER, INTEGER),
    ),
    "networks_backward": (
        *(POINTER, INTEGER, INTEGER, POINTER, INTEGER),
        *(POINTER, INTEGER, REAL),
        *(POINTER,) * 4,
        *(INTEGER,) * 3,
        *(POINTER, POINTER, INTEGER, INTEGER),
    ),
    "rollout_forward": (
        *(POINTER, INTEGER),
        *(POINTER,) * 4,
        *(INTEGER, POINTER, INTEGER, INTEGER, INTEGER),
    ),
    "rollout_backward": (*(POINTER, INTEGER), *(POINTER,) * 6, *(INTEGER,) * 3),
    "norm_forward": (*(POINTER,) * 5, *(INTEGER,) * 2, REAL, *(INTEGER,) * 3),
    "norm_backward": (*(POINTER,) * 9, *(INTEGER,) * 5),
    "two_hot_inverse_forward": (*(POINTER,) * 3, *(INTEGER,) * 3),
    "two_hot_inverse_backward": (*(POINTER,) * 4, *(INTEGER,) * 3),
    "two_hot_cross_entropy_forward": (*(POINTER,) * 4, *(INTEGER,) * 4),
    "two_hot_cross_entropy_backward": (*(POINTER,) * 5, *(INTEGER,) * 4),
    "two_hot_loss": (*(POINTER,) * 6, *(INTEGER,) * 3, REAL, INTEGER),
    "squared_loss": (*(POINTER,) * 5, *(INTEGER,) * 2, REAL, INTEGER),
    "termination_loss": (*(POINTER,) * 5, *(INTEGER,) * 2, REAL),
    "clear_array": (POINTER, INTEGER),
    "copy_rows": (POINTER, INTEGER, POINTER, *(INTEGER,) * 4),
    "add_rows": (*(POINTER,) * 3, *(INTEGER,) * 4),
    "exponential": (POINTER, POINTER, REAL, POINTER, INTEGER),
    "least_values": (POINTER, POINTER, INTEGER, INTEGER),
    "lambda_returns": (*(POINTER,) * 3, REAL, REAL, POINTER, INTEGER, INTEGER),
    "policy_objective": (*(POINTER,) * 5, REAL, REAL, *(POINTER,) * 4, *(INTEGER,) * 3),
    "policy_sample_forward": (*(POINTER,) * 7, *(INTEGER,) * 5),
    "policy_sample_backward": (*(POINTER,) * 6, *(INTEGER,) * 4),
    "total_norm": (*(POINTER,) * 3, *(INTEGER,) * 2),
    "lerp_arrays": (*(POINTER,) * 3, REAL, *(INTEGER,) * 2),
    "adam_step": (*(POINTER,) * 7, *(DOUBLE,) * 2, REAL, *(INTEGER,) * 2),
    "gelu_sum_forward": (*(POINTER,) * 3, *(INTEGER,) * 4),
    "gelu_sum_backward": (*(POINTER,) * 4, *(INTEGER,) * 4),
    "selective_scan_forward": (*(POINTER,) * 7, *(INTEGER,) * 5),
    "selective_scan_backward": (*(POINTER,) * 14, *(INTEGER,) * 5),
    "plan_search": (POINTER, INTEGER),
    "planning_scratch": (POINTER,),
    "choose_action": (*(POINTER,) * 15, *(INTEGER,) * 4),
    "panel_width": (),
}
SIZES = ("workspace_size", "scratch_size", "planning_scratch", "panel_width")  # what they return


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels; None if they are switched off or could not be built, said once."""
    if os.environ.get(SWITCH, "") == "0":
        return None
    try:
        loaded = build(cache_directory())
        keep_freed_memory()
        return loaded
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(
            f"The CPU kernels could not be built ({reason}); training goes on with torch's own, "
            "which take twice as long. Install a C compiler (Debian: apt install gcc; macOS: "
            f"xcode-select --install), or set {SWITCH}=0 to silence this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


class Call(NamedTuple):
    """A function and what it is called with."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


class _Thread(threading.local):
    """What holds in one thread."""

    written_down: list[Call] | None = None  # where calls are


_thread = _Thread()


@contextlib.contextmanager
def calls_written_down() -> Iterator[list[Call]]:
    """The calls of kernels.c within (in this thread), with addresses instead of tensors."""
    before = _thread.written_down
    calls = _thread.written_down = []
    try:
        yield calls
    finally:
        _thread.written_down = before


def call(name: str, *arguments: th.Tensor | ctypes.Array[Any] | float | None) -> Any:
    """Calls a function of kernels.c; a tensor is handed over as the address of its numbers."""
    loaded = library()
    assert loaded is not None, "ask whether there is a library first"
    function = getattr(loaded, name)
    values = [each.data_ptr() if isinstance(each, th.Tensor) else each for each in arguments]
    if _thread.written_down is not None and name not in SIZES:
        _thread.written_down.append(Call(function, tuple(values)))
    return function(*values)


def with_calls(action: Callable[[], None]) -> None:
    """Does something, and does it again whenever calls that are written down are made again."""
    if _thread.written_down is not None:
        _thread.written_down.append(Call(action))
    action()


def addresses(arrays: Sequence[th.Tensor]) -> ctypes.Array[Any]:
    """Where the arrays stand, as an array itself."""
    return (POINTER * len(arrays))(*[each.data_ptr() for each in arrays])


def keep_freed_memory() -> bool:
    """Lets glibc keep freed arrays of a step for the next one; returns whether it does.

    It otherwise hands them back to the system, and every step then pays a page fault for each
    4 KiB of its intermediate results, a tenth of an update. Whoever set MALLOC_* has decided.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or platform.libc_ver()[0] != "glibc":
        return False
    trim, mmap = (-1, 512 * 2**20), (-3, 32 * 2**20)  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    return bool(mallopt(*trim) and mallopt(*mmap))


def cache_directory() -> Path:
    """The user's own cache directory for the built library; a temporary one if that is not his.

    A library that others could replace must not be loaded, so ownership is checked.
    """
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "tdmpc2_sb3"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        private = status.st_uid == os.getuid() and not status.st_mode & 0o022
        if private and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="tdmpc2_sb3_"))


def build(folder: Path) -> ctypes.CDLL:
    """Loads the library from ``folder``, building it if it is not there.

    :param folder: where libraries are kept; one a source, compiler and processor
    :raises RuntimeError: if there is no compiler or every way to build fails
    :raises OSError: if the folder cannot be written
    """
    compiler = find_compiler()
    failure = "no attempt"
    for options, runtime in attempts():
        path = folder / f"kernels-{fingerprint(compiler, (*options, *runtime))}.so"
        try:
            if not path.exists():
                _compile(compiler, options, runtime, path)
            return _load(path)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            failure = str(error)
    raise RuntimeError(failure)


def find_compiler() -> str:
    """Path of the C compiler: ``$CC``, else the first of the usual names.

    :raises RuntimeError: if there is none
    """
    for name in (os.environ.get("CC", ""), *COMPILERS):
        path = shutil.which(name) if name else None
        if path is not None:
            return path
    raise RuntimeError(f"no C compiler: none of {', '.join(COMPILERS)} is on the PATH")


def attempts() -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(Compiler options, libraries to link) from the fastest to the most portable.

    OpenMP comes from the very runtime that torch brings: a second one in the process would start
    threads of its own, which then compete with torch's.
    """
    folder = Path(th.__file__).parent
    found: list[Path] = []
    for pattern in ("lib/libgomp*", "lib/libomp*", "../torch.libs/libgomp*"):
        found.extend(sorted(folder.glob(pattern)))
    parallel = ("-Xpreprocessor", "-fopenmp") if sys.platform == "darwin" else ("-fopenmp",)
    is_arm = platform.machine().lower() in ("arm64", "aarch64")
    native = "-mcpu=native" if is_arm else "-march=native"
    result: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    for runtime in found[:1]:
        result.append(((native, *parallel), (str(runtime.resolve()),)))
    result.append(((native, "-fopenmp-simd"), ()))
    result.append((("-fopenmp-simd",), ()))
    return result


def fingerprint(compiler: str, options: tuple[str, ...]) -> str:
    """A name for what would be built: it changes with source, compiler, options and processor."""
    parts = [SOURCE.read_text(), compiler, *FLAGS, *options, platform.platform(), th.__version__]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    parts.append(version.stdout)
    processor = Path("/proc/cpuinfo")
    if processor.exists():
        fields = ("model name", "flags", "Features", "CPU part")
        lines = processor.read_text().splitlines()
        parts.extend(sorted({line for line in lines if line.startswith(fields)}))
    return hashlib.sha256("\0".join([*parts, platform.processor()]).encode()).hexdigest()[:20]


def _compile(compiler: str, options: tuple[str, ...], runtime: tuple[str, ...], path: Path) -> None:
    # Built under another name and moved, so that processes that start together never meet half a
    # file. Linked apart, so that the compiler does not add an OpenMP runtime of its own.
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        objects, library = f"{work}/kernels.o", f"{work}/kernels.so"
        _run([compiler, *FLAGS, *options, "-c", str(SOURCE), "-o", objects])
        _run([compiler, "-shared", objects, *runtime, "-lm", "-o", library])
        os.replace(library, path)


def _run(command: list[str]) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"{Path(command[0]).name}: {lines[0]}")


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))  # resolves every symbol, so a missing runtime shows here
    for name, arguments in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = list(arguments)
        function.restype = INTEGER if name in SIZES else None
    return loaded
