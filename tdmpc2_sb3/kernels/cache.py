"""Where built libraries are kept, and which of them may be loaded.

A library may do all that its user may. So it is loaded from a place to which nobody else can
write, and only if its bytes are the ones that were built: its name holds their hash. Otherwise a
file that was cut off would end the process, as soon as something of it is used.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "XDG_CACHE_HOME"  # names another place
FOLDER = "tdmpc2_sb3"
BUILD_PREFIX = "build-"  # of the folder in which one is under way


class CacheError(OSError):
    """Why libraries cannot be kept, in half a sentence."""


@contextlib.contextmanager
def told(folder: Path) -> Iterator[None]:
    """What fails within is told as a reason why nothing can be kept in the folder."""
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CacheError(f"{folder} cannot be written to ({reason})") from error


def cache_directory() -> Path:
    """The user's own folder for built libraries, made if it is not there.

    :raises CacheError: if there cannot be one, or others may write to it
    """
    folder = _base() / FOLDER
    with told(folder):
        for each in (*reversed(folder.parents), folder):
            if not each.exists():
                each.mkdir(mode=0o700, exist_ok=True)
        _check(folder)
    return folder


def _base() -> Path:
    chosen = os.environ.get(VARIABLE, "")
    if os.path.isabs(chosen):
        return Path(chosen)
    try:
        home = Path.home()
    except RuntimeError as error:
        raise CacheError(f"the user with id {os.getuid()} has no home directory") from error
    return home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"


def _check(folder: Path) -> None:
    """
    :raises CacheError: if others could put a library of theirs into the folder
    """
    status = folder.stat()
    if not _is_private(status):
        raise CacheError(f"others may write to {folder}")
    for parent in dict.fromkeys([*folder.parents, *folder.resolve().parents]):
        status = parent.stat()
        # Where the sticky bit is set, as in /tmp, nobody replaces what belongs to someone else.
        is_sticky = status.st_mode & stat.S_ISVTX and _is_trusted(status.st_uid)
        if not is_sticky and not _is_private(status):
            raise CacheError(f"others may write to {parent}")


def _is_private(status: os.stat_result) -> bool:
    """Whether only the user and root may write there."""
    if not _is_trusted(status.st_uid) or status.st_mode & stat.S_IWOTH:
        return False
    return not status.st_mode & stat.S_IWGRP or _is_own_group(status.st_gid)


def _is_trusted(user: int) -> bool:
    """Whether files of that user are the own ones or root's."""
    return user in (0, os.getuid(), _unknown_user())


def _unknown_user() -> int:
    """Whose files those of users seem to be that a container does not know, such as root outside;
    0 if somebody could be that user."""
    try:
        user = int(Path("/proc/sys/kernel/overflowuid").read_text("utf-8"))
        ranges = Path("/proc/self/uid_map").read_text("utf-8").splitlines()
    except (OSError, ValueError):  # not on Linux
        return 0
    known = [(int(first), int(count)) for first, _, count in map(str.split, ranges)]
    return 0 if any(first <= user < first + count for first, count in known) else user


def _is_own_group(number: int) -> bool:
    """Whether nobody but the user, or root, is in that group: many systems give every user one."""
    import grp  # not on Windows
    import pwd

    if number == 0:
        return True
    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    is_named_alike = number == user.pw_gid and group.gr_name == user.pw_name
    return is_named_alike and set(group.gr_mem) <= {user.pw_name}


def find(folder: Path, name: str) -> Path | None:
    """The library that :func:`keep` put there; what is damaged, or someone else's, is removed."""
    for path in sorted(folder.glob(f"{name}-*.so")):
        if _is_intact(path):
            return path
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def clear(folder: Path, seconds: float) -> None:
    """Remove what builds left in the cache that were killed.

    :param seconds: age from which on no build can still be at work there
    """
    for path in folder.glob(f"{BUILD_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime > seconds:
                shutil.rmtree(path)


def _is_intact(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not _is_private(status):
            return False
        try:
            return path.stem.endswith(f"-{_hash(file.read())}")
        except OSError:  # a disk's fault
            return False


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def keep(built: Path, folder: Path, name: str) -> Path:
    """Moves a library that was built on the folder's own disk there; returns where it is.

    Processes that start together never meet half a file, nor does one after a power cut.
    """
    with told(folder):
        with open(built, "rb+") as file:
            kept = folder / f"{name}-{_hash(file.read())}.so"
            os.fchmod(file.fileno(), 0o700)
            os.fsync(file.fileno())
        os.replace(built, kept)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # some file systems have no such call for folders
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)
    return kept
