"""Builds ``kernels.c`` with the machine's C compiler, keeps the result and loads it.

No machine stops a run here: without a compiler, or if anything fails, one warning says so and the
plain torch path goes on. Only sources that contradict each other are an error
(:class:`tdmpc2_sb3.kernels.interface.InterfaceError`).
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

from tdmpc2_sb3.kernels.cache import (
    BUILD_PREFIX,
    VARIABLE,
    CacheError,
    cache_directory,
    clear,
    find,
    keep,
    told,
)
from tdmpc2_sb3.kernels.interface import (
    HEADER,
    INTERFACE,
    Interface,
    InterfaceError,
    layout_checks,
    read,
)

SWITCH = "TDMPC2_SB3_KERNELS"  # 0 in the environment switches the kernels off
FOLDER = Path(__file__).parent  # of the sources; kernels.c includes all others
COMPILERS = ("cc", "gcc", "clang")
BUILD_SECONDS = 600
# The arithmetic may not be reordered but where the source says so; errno and traps are not used.
# The loops of products are so short that it costs some hundredths if they begin amid a cache line.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-falign-loops=64")

# What a compiler says if the sources do not fit interface.h, or Python does not.
MISMATCHES = (
    "conflicting types for",
    "static assertion failed",
    "static_assert failed",
    "no member named",
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels; None if they are switched off or could not be built, said once.

    :raises InterfaceError: if the sources contradict each other
    """
    if os.environ.get(SWITCH, "") == "0":
        return None
    try:
        loaded = _load_kept_or_new()
        keep_freed_memory()
        return loaded
    except InterfaceError:
        raise
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, subprocess.TimeoutExpired):
            reason = f"the compiler took longer than {BUILD_SECONDS} s"
        remedy = (
            f"Set {VARIABLE} to a folder that you can write to and from which programs may run"
            if isinstance(error, OSError)
            else "Start again when the machine has less to do"
            if isinstance(error, subprocess.TimeoutExpired)
            else "Install a C compiler (Debian: apt install gcc; macOS: xcode-select --install)"
        )
        warnings.warn(
            f"The CPU kernels could not be built ({reason}); training goes on with torch's own, "
            f"which take twice as long. {remedy}, or set {SWITCH}=0 to silence this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _load_kept_or_new() -> ctypes.CDLL:
    try:
        return build(cache_directory())
    except CacheError as error:
        # A file that is loaded may be removed.
        with tempfile.TemporaryDirectory(prefix="tdmpc2_sb3_") as folder:
            loaded = build(Path(folder))
        warnings.warn(
            f"The CPU kernels were built for this process alone, and every other one will take "
            f"the time again: {error}. Set {VARIABLE} to a folder to which you alone can write.",
            RuntimeWarning,
            stacklevel=3,
        )
        return loaded


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


def check_array(
    what: str, x: th.Tensor, shape: Sequence[int] | None = None, dtype: th.dtype = th.float32
) -> None:
    """That an array is what ``kernels.c`` reads, or would be if it were contiguous.

    :param what: its name
    :param shape: that it must have; None for any
    :raises RuntimeError: naming what it is instead
    """
    if x.dtype is not dtype or not x.is_cpu:
        raise RuntimeError(f"{what} is {x.dtype} on {x.device}: the kernels read {dtype} on a CPU.")
    if shape is not None and x.shape != tuple(shape):
        raise RuntimeError(f"{what} has shape {tuple(x.shape)}, but {tuple(shape)} is needed.")


def check_strides(what: str, x: th.Tensor, rows_apart: bool = False) -> None:
    """That it is contiguous, or that at least the numbers of a row stand side by side.

    :raises RuntimeError: if they do not
    """
    if x.is_contiguous() or (rows_apart and (x.stride(-1) == 1 or x.shape[-1] == 1)):
        return
    raise RuntimeError(f"{what} has strides {x.stride()}: its numbers must stand side by side.")


def _checked_address(name: str, position: int, x: th.Tensor) -> int:
    """Where the numbers of an array begin that a function takes."""
    if x.dtype is not th.float32 or not x.is_cpu or not x.is_contiguous():
        what = f"Array {position} of {name}"
        parameter = INTERFACE.functions[name].parameters[position]
        check_array(what, x, None, parameter.dtype or th.float32)
        check_strides(what, x, parameter.rows_apart)
    return x.data_ptr()


def call(name: str, *arguments: th.Tensor | ctypes.Array[Any] | float | None) -> Any:
    """Calls a function of kernels.c; a tensor is handed over as the address of its numbers.

    :raises InterfaceError: if the function takes another number of arguments
    """
    loaded = library()
    assert loaded is not None, "ask whether there is a library first"
    function, declared = getattr(loaded, name), INTERFACE.functions[name]
    if len(arguments) != len(declared.parameters):
        raise InterfaceError(
            f"{name} of {HEADER.name} takes {len(declared.parameters)} arguments, and is called "
            f"with {len(arguments)}"
        )
    values = [
        _checked_address(name, position, each) if isinstance(each, th.Tensor) else each
        for position, each in enumerate(arguments)
    ]
    if _thread.written_down is not None and declared.result is None:
        _thread.written_down.append(Call(function, tuple(values)))
    return function(*values)


def with_calls(action: Callable[[], None]) -> None:
    """Does something, and does it again whenever calls that are written down are made again."""
    if _thread.written_down is not None:
        _thread.written_down.append(Call(action))
    action()


def addresses(arrays: Sequence[th.Tensor]) -> ctypes.Array[Any]:
    """Where the arrays, contiguous and of float32, stand, as an array itself."""
    for each in arrays:
        if each.dtype is not th.float32 or not each.is_cpu or not each.is_contiguous():
            check_array("An array", each)
            check_strides("An array", each)
    return (ctypes.c_void_p * len(arrays))(*[each.data_ptr() for each in arrays])


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


def build(folder: Path) -> ctypes.CDLL:
    """Loads the library from ``folder``, building it if it is not there.

    :param folder: where libraries are kept; one a source, compiler and processor
    :raises RuntimeError: if there is no compiler or every way to build fails
    :raises CacheError: if it has to be built and the folder cannot be written to
    :raises TimeoutExpired: if the compiler takes too long
    :raises OSError: if what was built cannot be loaded
    :raises InterfaceError: if the sources contradict each other
    """
    compiler, interface = find_compiler(), read(FOLDER / HEADER.name)
    failure: Exception = RuntimeError("no attempt")
    for options, runtime in attempts():
        name = f"kernels-{fingerprint(compiler, (*options, *runtime))}"
        try:
            path = find(folder, name) or _compile(
                compiler, options, runtime, folder, name, interface
            )
            return _load(path, interface)
        except (CacheError, InterfaceError, subprocess.TimeoutExpired):
            raise
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            failure = error
    raise failure


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
    """A name for what would be built: it changes with sources, compiler, options and processor."""
    parts = [
        *(path.read_text("utf-8") for path in sorted(FOLDER.glob("*.[ch]"))),
        layout_checks(read(FOLDER / HEADER.name)),
        compiler,
        *FLAGS,
        *options,
        platform.platform(),
        th.__version__,
    ]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False)
    parts.append(version.stdout.decode(errors="replace"))
    processor = Path("/proc/cpuinfo")
    if processor.exists():
        fields = ("model name", "flags", "Features", "CPU part")
        lines = processor.read_text("utf-8", "replace").splitlines()
        parts.extend(sorted({line for line in lines if line.startswith(fields)}))
    return hashlib.sha256("\0".join([*parts, platform.processor()]).encode()).hexdigest()[:20]


def _compile(
    compiler: str,
    options: tuple[str, ...],
    runtime: tuple[str, ...],
    folder: Path,
    name: str,
    interface: Interface,
) -> Path:
    # Linked apart, so that the compiler does not add an OpenMP runtime of its own.
    with told(folder):
        clear(folder, 2 * BUILD_SECONDS)
        work = tempfile.TemporaryDirectory(prefix=BUILD_PREFIX, dir=folder)
    with work:
        objects, library = f"{work.name}/kernels.o", f"{work.name}/kernels.so"
        checks = Path(work.name) / "checks.h"
        with told(folder):
            checks.write_text(layout_checks(interface), "utf-8")
        source = ["-I", str(FOLDER), "-include", str(checks), "-c", str(FOLDER / "kernels.c")]
        _run([compiler, *FLAGS, *options, *source, "-o", objects], work.name)
        _run([compiler, "-shared", objects, *runtime, "-lm", "-o", library], work.name)
        return keep(Path(library), folder, name)


def _run(command: list[str], folder: str) -> None:
    """
    :param folder: for the compiler's own files
    """
    done = subprocess.run(
        command,
        env={**os.environ, "TMPDIR": folder, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=BUILD_SECONDS,
        check=False,
    )
    if done.returncode:
        for reason in ("No space left on device", "Disk quota exceeded"):
            if reason in done.stderr:
                raise CacheError(f"{Path(folder).parent} cannot be written to ({reason})")
        lines = done.stderr.strip().splitlines() or ["no message"]
        for line in lines:
            if any(each in line for each in MISMATCHES):
                reason = line.rpartition("error: ")[2]
                raise InterfaceError(f"The kernels contradict {HEADER.name}: {reason}")
        raise RuntimeError(f"{Path(command[0]).name}: {lines[0]}")


def _load(path: Path, interface: Interface) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))  # resolves every symbol, so a missing runtime shows here
    for name, (parameters, result) in interface.functions.items():
        if not hasattr(loaded, name):
            raise InterfaceError(f"The kernels lack {name}, which {HEADER.name} declares")
        function = getattr(loaded, name)
        function.argtypes = [parameter.type for parameter in parameters]
        function.restype = result
    return loaded
