"""Choice of an OpenGL backend, when the first picture is asked for and not before.

dm_control chooses as it is imported: it takes the first backend that it can *import*, and GLFW
always imports, so on a Linux machine without a display its choice fails at the first picture; a
backend or device that the user's variables name and that is not there fails at once, also where
nothing is ever drawn. Here dm_control is imported without a choice. The first picture tries EGL and
OSMesa in that order for what they can *do*. ``MUJOCO_GL``, ``PYOPENGL_PLATFORM`` and
``MUJOCO_EGL_DEVICE_ID`` set by the user always win; machines with a display, and macOS, keep
dm_control's choice.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VARIABLE = "MUJOCO_GL"
PLATFORM_VARIABLE = "PYOPENGL_PLATFORM"
DEVICE_VARIABLE = "MUJOCO_EGL_DEVICE_ID"

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

    Of these ``PYOPENGL_PLATFORM``, where the user has set it, leaves one.

    :return: the value of ``MUJOCO_GL`` now, None where dm_control chooses by itself
    :raises RenderingError: if that one does not work
    """
    load_triton_first()
    if os.environ.get(VARIABLE) or not is_headless():
        return os.environ.get(VARIABLE)
    platform = os.environ.get(PLATFORM_VARIABLE) or None
    if platform in (None, "egl") and egl_works():
        os.environ[VARIABLE] = "egl"
    elif platform in (None, "osmesa") and osmesa_loads():
        os.environ[VARIABLE] = "osmesa"
    elif platform is None:
        os.environ[VARIABLE] = "disable"
    else:
        raise RenderingError(
            f"Cannot render: {PLATFORM_VARIABLE} is {platform!r}, which does not work on this "
            "machine without a display; unset it, or set it to egl or osmesa and install that."
        )
    return os.environ[VARIABLE]


def import_dm_control() -> None:
    """Import dm_control so that its backend is chosen when a picture needs one."""
    load_triton_first()
    platform = os.environ.get(PLATFORM_VARIABLE)
    try:
        # With the user's variables: mujoco's own renderer is not ours to switch off.
        importlib.import_module("mujoco")
    except Exception:  # the variables name what is not there, so mujoco draws nothing either way
        _set_variable(PLATFORM_VARIABLE, platform)  # which it has set on the way
        with _variables(**{VARIABLE: "disable"}):
            importlib.import_module("mujoco")
    if os.environ.get(VARIABLE) or is_headless():
        with _variables(**{VARIABLE: "disable"}):
            render: Any = importlib.import_module("dm_control._render")
        # One that was imported before this package has settled on GLFW, without a display in vain.
        settled = render.BACKEND != "off" and bool(os.environ.get(VARIABLE))
        if render.BACKEND in ("off", "glfw") and not settled:
            render.BACKEND = os.environ.get(VARIABLE) or "off"
            render.Renderer = _choose_and_render
    importlib.import_module("dm_control.mujoco")
    keep_render_threads()


def _choose_and_render(*args: Any, **kwargs: Any) -> Any:
    """Stands in for dm_control's class of OpenGL contexts until the first one is made."""
    render: Any = importlib.import_module("dm_control._render")
    backend = choose_backend() or "glfw"
    known = render._ALL_RENDERERS + render._NO_RENDERER
    found = next(((names[0], load) for names, load in known if backend in names), None)
    if found is None:
        names = sorted(name for group, _ in known for name in group if name)
        raise RenderingError(
            f"Cannot render: {VARIABLE} is {backend!r}, which dm_control does not know; use one of "
            f"{', '.join(names)}."
        )
    empty = {DEVICE_VARIABLE: None} if not os.environ.get(DEVICE_VARIABLE) else {}
    platform = os.environ.get(PLATFORM_VARIABLE)
    try:
        with _variables(**empty):
            renderer = found[1]()
    except Exception as error:  # PyOpenGL fails in many ways where its library is missing
        # dm_control has set it on the way; once the cause is gone, the next picture tries again.
        _set_variable(PLATFORM_VARIABLE, platform)
        raise explain(error) from error
    render.BACKEND, render.Renderer = found[0], renderer
    render.USING_GPU = found[0] in ("egl", "glfw")
    return renderer(*args, **kwargs)


@contextlib.contextmanager
def _variables(**values: str | None) -> Iterator[None]:
    """Set environment variables for a while; None removes one."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        _set_variable(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            _set_variable(name, value)


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


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


def explain(error: BaseException) -> RenderingError:
    """Return an error that says what to do, from whatever the backend raised."""
    if isinstance(error, RenderingError):
        return error
    backend = os.environ.get(VARIABLE)
    if backend in ("disable", "disabled", "off", "false", "0"):
        cause = f"{VARIABLE} is {backend!r} (set by you, or as neither EGL nor OSMesa works)"
        return RenderingError(f"Cannot render: {cause}; {REMEDY}, or set {VARIABLE}.")
    cause = f"the OpenGL backend {backend or 'of the display'} failed ({error})"
    device, platform = os.environ.get(DEVICE_VARIABLE), os.environ.get(PLATFORM_VARIABLE)
    if backend == "egl" and device:
        remedy = f"{DEVICE_VARIABLE} is {device!r}: unset it or name a device that is there"
    elif platform and backend in ("egl", "osmesa") and platform != backend:
        remedy = f"{PLATFORM_VARIABLE} is {platform!r}: unset it or set it to {backend}"
    else:
        remedy = f"{REMEDY}, or set {VARIABLE}"
    return RenderingError(f"Cannot render: {cause}; {remedy}.")


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
