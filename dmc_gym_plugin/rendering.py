"""Choice of a headless OpenGL backend, before dm_control is imported.

dm_control takes the first backend that it can *import*, and GLFW always imports, so on a Linux
machine without a display its choice fails at the first picture. Here EGL and OSMesa are tried in
that order for what they can *do*. ``MUJOCO_GL`` set by the user always wins; machines with a
display, and macOS, keep dm_control's choice.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VARIABLE = "MUJOCO_GL"

REMEDY = (
    "install EGL (Debian, Ubuntu: `apt-get install libegl1 libgl1-mesa-dri`) or OSMesa "
    "(`apt-get install libosmesa6`)"
)

_EGL_PLATFORM_DEVICE = 0x313F
_OSMESA_LIBRARIES = ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so")


class RenderingError(RuntimeError):
    """No picture can be made on this machine; the message says what to install."""


def is_headless() -> bool:
    """Return whether this is Linux without a display."""
    has_display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return sys.platform.startswith("linux") and not has_display


def choose_backend() -> str | None:
    """Set ``MUJOCO_GL`` for a headless machine: EGL, then OSMesa, then none.

    :return: the value of ``MUJOCO_GL`` now, None where dm_control chooses by itself
    """
    load_triton_first()
    if os.environ.get(VARIABLE) or not is_headless():
        return os.environ.get(VARIABLE)
    if egl_works():
        os.environ[VARIABLE] = "egl"
    elif osmesa_loads():
        os.environ[VARIABLE] = "osmesa"
    else:
        os.environ[VARIABLE] = "disable"
    return os.environ[VARIABLE]


def import_dm_control() -> None:
    """Choose a backend and import dm_control with it.

    :raises RenderingError: where ``MUJOCO_GL``, set by the user, names a backend that is not there
    """
    choose_backend()
    try:
        importlib.import_module("dm_control.mujoco")
    except Exception as error:  # PyOpenGL fails in many ways where its library is missing
        if os.environ.get(VARIABLE):
            raise explain(error) from error
        raise
    keep_render_threads()


def keep_render_threads() -> None:
    """Keep the threads in which dm_control uses OSMesa (EGL and GLFW have none).

    Where an environment is dropped in a cycle without ``close()``, its thread would be collected
    with it, and its OpenGL context wait for the thread for ever. dm_control uses threads again, so
    there stay as few as there were contexts at once.
    """
    from dm_control._render.executor import render_executor

    pool = getattr(render_executor, "_THREAD_POOL_EXECUTOR_POOL", None)  # private: it may go away
    if pool is None or "acquire" in vars(pool):
        return
    acquire, kept = pool.acquire, set()

    def acquire_and_keep() -> Any:
        executor = acquire()
        kept.add(executor)
        return executor

    pool.acquire = acquire_and_keep


def load_triton_first() -> None:
    """Import triton, where it is installed, before Mesa's software renderer can be loaded.

    Both bring an LLVM, and a process that loads triton's (as torch's CUDA build for Linux does with
    its first optimiser) after Mesa's crashes: seen with triton 3.7.1 and Mesa's libLLVM 15. The
    other way round both work. Where somebody has loaded Mesa's already, it is too late.
    """
    if not sys.platform.startswith("linux") or importlib.util.find_spec("triton") is None:
        return
    if "libLLVM" not in Path("/proc/self/maps").read_text(errors="replace"):
        with contextlib.suppress(Exception):  # one that cannot be imported cannot crash either
            importlib.import_module("triton")


def egl_works() -> bool:
    """Return whether EGL has a device that starts (a driver, or Mesa's software renderer).

    The library alone is not enough: without a driver (``libgl1-mesa-dri``) it loads and then fails.
    """
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    pointer = ctypes.c_void_p
    egl.eglGetProcAddress.restype = pointer
    egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]
    egl.eglInitialize.argtypes = [pointer, pointer, pointer]
    query_at = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_at = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query_at or not display_at:
        return False
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, pointer, pointer)(query_at)
    get_display = ctypes.CFUNCTYPE(pointer, ctypes.c_uint, pointer, pointer)(display_at)
    devices = (pointer * 16)()
    count = ctypes.c_int(0)
    if not query(len(devices), devices, ctypes.addressof(count)):
        return False
    for device in devices[: count.value]:
        display = get_display(_EGL_PLATFORM_DEVICE, device, None)
        # Left initialised: the display is one for the whole process, and terminating it would take
        # it from whoever uses EGL already.
        if display and egl.eglInitialize(display, None, None):
            return True
    return False


def osmesa_loads() -> bool:
    """Return whether the OSMesa library is there."""
    for name in _OSMESA_LIBRARIES:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def correct_early_import() -> None:
    """Repair dm_control's choice where the user imported it before this package.

    On a headless machine it has settled on GLFW by then, which cannot work there, so its renderer
    is replaced by the one that does.
    """
    from dm_control import _render

    if _render.BACKEND != "glfw" or not is_headless():
        return
    backend = choose_backend()
    if backend == "egl":
        _render.Renderer = _render._import_egl()
    elif backend == "osmesa":
        _render.Renderer = _render._import_osmesa()
    else:
        return
    _render.BACKEND = backend


def explain(error: BaseException) -> RenderingError:
    """Return an error that says what to install, from whatever the backend raised."""
    backend = os.environ.get(VARIABLE)
    if backend in ("disable", "disabled", "off", "false", "0"):
        cause = f"{VARIABLE} is {backend!r} (set by you, or as neither EGL nor OSMesa works)"
    else:
        cause = f"the OpenGL backend {backend or 'of the display'} failed ({error})"
    return RenderingError(f"Cannot render: {cause}; {REMEDY}, or set {VARIABLE}.")


def _call_nothing() -> Any:
    return contextlib.nullcontext(SimpleNamespace(call=lambda *args, **kwargs: None))


#: Stands in for dm_control's OpenGL contexts while an episode starts. ``quadruped-escape`` uploads
#: its terrain to the graphics card at each start, for which dm_control makes a context even where
#: nothing is ever drawn. A context made later reads the terrain from the model, so nothing is lost
#: by passing the upload over, and the task runs without OpenGL.
NO_CONTEXTS = SimpleNamespace(
    gl=SimpleNamespace(make_current=_call_nothing), mujoco=SimpleNamespace(ptr=None)
)


def upload_terrain(physics: Any) -> None:
    """Hand an edited height field to the OpenGL context, where there is one already."""
    if not physics._contexts or not physics.model.nhfield:
        return
    import mujoco

    with physics.contexts.gl.make_current() as context:
        for index in range(physics.model.nhfield):
            context.call(
                mujoco.mjr_uploadHField, physics.model.ptr, physics.contexts.mujoco.ptr, index
            )
