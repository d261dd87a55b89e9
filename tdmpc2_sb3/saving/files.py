"""Files that are written whole or not at all, and arrays stored without pickle.

Everything this package saves goes through :func:`atomic_write`; replay buffers store their arrays
with
:class:`ArrayWriter` and :class:`ArrayReader` (a zip of ``.npy`` members, readable with NumPy
    alone).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pathlib
import secrets
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import numpy as np

PathOrFile = str | pathlib.Path | io.BufferedIOBase

_TEMPORARY_SUFFIX = ".saving"
_ENCRYPTED = 0x1  # bit of a zip member's flags
# What the compressed members of a file may expand to, all together: so many bytes, and so many
# times those of the file.
EXPANDED_BYTES, _EXPANDED_RATIO = 1 << 26, 16
#: Values in a JSON that expands to more than it has of compressed bytes: each takes some 100 bytes.
MAX_VALUES = 1 << 20
_MAX_DEPTH = 200  # of nested JSON
_CHUNK_BYTES = 1 << 24  # large arrays pass in pieces, so that saving needs no second copy in memory


class CorruptFileError(ValueError):
    """The file exists but is not a complete file of the expected kind."""


def writing_path(path: str | os.PathLike[str], suffix: str | None) -> pathlib.Path:
    """Return where SB3 would write ``path``: with ``suffix`` if it has none.

    Where a folder has that name, ``_2`` is added. Missing parent folders are created.

    :param path: the path asked for
    :param suffix: suffix (without the dot) to add where the name has none
    """
    target = pathlib.Path(path)
    if target.suffix == "" and suffix:
        target = target.with_name(f"{target.name}.{suffix}")
    if target.is_dir():
        warnings.warn(f"Path '{target}' is a folder. Will save instead to {target}_2", stacklevel=3)
        target = target.with_name(f"{target.name}_2")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def reading_path(path: str | os.PathLike[str], suffix: str | None) -> pathlib.Path:
    """Return the existing file meant by ``path``, trying ``path.suffix`` second as SB3 does.

    :raises FileNotFoundError: neither exists; the sentence names both
    """
    target = pathlib.Path(path)
    if target.is_file():
        return target
    candidate = target.with_name(f"{target.name}.{suffix}") if suffix and target.name else target
    if candidate.is_file():
        return candidate
    tried = f"'{target}'" if candidate == target else f"'{target}' and '{candidate}'"
    raise FileNotFoundError(f"No saved file at {tried}: check the path.")


def atomic_write(
    path: str | os.PathLike[str], writer: Callable[[IO[bytes]], None], suffix: str | None = None
) -> pathlib.Path:
    """Write a file so that at every moment ``path`` is the whole old file or the whole new one.

    The content goes to a temporary file in the same folder (renaming is atomic only within a file
    system), is flushed to the disk, and then takes the place of the old file in one step. Whatever
    ``writer`` raises, the old file stays and the temporary one is removed; one left by a killed
    process is removed by the next save.

    :param path: where to write
    :param writer: called with the open binary file
    :param suffix: suffix (without the dot) to add where the name has none
    :return: the path written
    :raises OSError: the disk is full or the folder cannot be written; the sentence says that the
        old file stayed
    """
    target = writing_path(path, suffix)
    target = pathlib.Path(
        os.path.realpath(target)
    )  # a link keeps pointing at the file that is replaced
    _remove_leftovers(target)
    temporary = target.with_name(
        f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}"
    )
    try:
        with open(temporary, "xb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):  # the new file keeps the old one's permissions
            os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or str(error)
        stays = "the file that was there is unchanged" if target.exists() else "no file was written"
        message = (
            f"Could not save '{target}' ({reason}); {stays}: free space or choose another folder."
        )
        raise OSError(error.errno, message) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    sync_folder(target.parent)
    return target


def _remove_leftovers(target: pathlib.Path) -> None:
    """Remove temporary files that killed processes left beside ``target``."""
    prefix = f".{target.name}."
    with contextlib.suppress(OSError):
        for entry in os.scandir(target.parent):
            if not (entry.name.startswith(prefix) and entry.name.endswith(_TEMPORARY_SUFFIX)):
                continue
            owner = entry.name[len(prefix) :].split("-")[0]
            if owner.isdigit() and not _is_running(int(owner)):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _is_running(pid: int) -> bool:
    """Say whether a process of that number runs; when in doubt, yes."""
    if os.name != "posix":
        return True  # os.kill would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sync_folder(folder: pathlib.Path) -> None:
    """Make the renaming itself survive a power cut, where the system allows it."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_to(path: PathOrFile, writer: Callable[[IO[bytes]], None], suffix: str) -> None:
    """Write to a path atomically, or straight into an open binary file such as ``io.BytesIO``.

    :param path: path or open binary file
    :param writer: called with the open binary file
    :param suffix: suffix (without the dot) to add where a path has none
    """
    if isinstance(path, (str, os.PathLike)):
        atomic_write(path, writer, suffix)
        return
    check_stream(path, "write")
    writer(path)  # type: ignore[arg-type]


@contextlib.contextmanager
def open_zip(path: PathOrFile, suffix: str, what: str) -> Iterator[zipfile.ZipFile]:
    """Open a saved zip for reading; every kind of damage becomes one sentence.

    :param path: path (with or without ``suffix``) or open binary file
    :param suffix: the suffix to try when the path as given does not exist
    :param what: what the file should be, for the sentence: ``"model"``, ``"replay buffer"``
    :raises FileNotFoundError: there is no such file
    :raises CorruptFileError: the file is empty, truncated, damaged or no zip
    """
    if isinstance(path, (str, os.PathLike)):
        path = reading_path(path, suffix)
        name = f"'{path}'"
    else:
        check_stream(path, "read")
        name = "the given file object"
    remedy = "use another copy or an earlier checkpoint"
    try:
        with zipfile.ZipFile(path) as archive:  # type: ignore[arg-type]
            assert archive.fp is not None
            check_directory(archive, archive.fp.seek(0, os.SEEK_END))
            yield archive
    except zipfile.BadZipFile as error:
        reason = "damaged" if "CRC" in str(error) else "truncated or not a zip file"
        raise CorruptFileError(f"The saved {what} {name} is {reason}: {remedy}.") from error
    except (EOFError, zlib.error, NotImplementedError, struct.error) as error:
        raise CorruptFileError(
            f"The saved {what} {name} is damaged ({error}): {remedy}."
        ) from error


def check_directory(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse a zip whose members are not of the kinds written here, or claim more than it holds.

    :param archive: open for reading
    :param size: bytes of the file
    :raises CorruptFileError: the sentence names the member
    """
    members = archive.infolist()
    names: set[str] = set()
    taken = expanded = 0
    may_expand = EXPANDED_BYTES + _EXPANDED_RATIO * size
    for member in members:
        taken += member.compress_size
        expanded += 0 if member.compress_type == zipfile.ZIP_STORED else member.file_size
        problem = ""
        if member.filename in names:
            problem = "is there twice"
        elif member.flag_bits & _ENCRYPTED:
            problem = "is encrypted"
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            problem = f"is compressed by method {member.compress_type}"
        elif member.compress_type == zipfile.ZIP_STORED and member.file_size > size:
            problem = f"claims {member.file_size} bytes of a file of {size}"
        elif not 0 <= member.header_offset <= size - member.compress_size:
            problem = f"claims to begin at byte {member.header_offset} of a file of {size}"
        elif taken > size:
            problem = f"claims bytes of other members, beyond the file's {size}"
        elif expanded > may_expand:
            problem = f"expands to {member.file_size} bytes, the file beyond {may_expand}"
        if problem:
            raise CorruptFileError(
                f"The part {member.filename[:80]!r} of the saved file {problem}: use another copy."
            )
        names.add(member.filename)


def read_member(archive: zipfile.ZipFile, name: str, limit: int | None = None) -> bytes:
    """Read a member of a checked zip, whose checksum is compared.

    :param archive: open for reading
    :param name: of the member
    :param limit: bytes that it may have; None: what :func:`check_directory` found right
    :raises CorruptFileError: it is larger
    :raises KeyError: there is no such member
    """
    member = archive.getinfo(name)
    limit = member.file_size if limit is None else limit
    if member.file_size <= limit:
        with archive.open(member) as file:
            content = file.read(limit + 1)
        if len(content) == member.file_size:
            return content
    raise CorruptFileError(
        f"The part {name[:80]!r} of the saved file claims {member.file_size} bytes and may have "
        f"{limit}, or is truncated: use another copy."
    )


def read_json(archive: zipfile.ZipFile, name: str) -> Any:
    """Return what a JSON member of a checked zip holds.

    :param archive: open for reading
    :param name: of the member
    :raises CorruptFileError: see :func:`read_member`
    :raises KeyError: there is no such member
    :raises ValueError: see :func:`parse_json`
    """
    content = read_member(archive, name)
    return parse_json(content, MAX_VALUES + archive.getinfo(name).compress_size)


def count_values(text: bytes) -> int:
    """Return how many values a JSON text holds at most; commas in its words count as well."""
    return sum(map(text.count, (b",", b"[", b"{"))) + 1


def parse_json(text: bytes | str, most: int | None = None) -> Any:
    """Return what a JSON text of a file holds.

    :param text: of a file, or of a part of one
    :param most: values that it may hold; None for any number, where it was not compressed
    :raises ValueError: it is no JSON, is nested too deep, or holds numbers beyond what is saved
    """
    if most is not None and count_values(text.encode() if isinstance(text, str) else text) > most:
        raise ValueError(f"more than {most} values")
    try:
        value = json.loads(text, parse_float=_parse_float, parse_constant=_parse_float)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for each in level
            if isinstance(each, (dict, list))
            for item in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return value
    raise ValueError("nested too deep")


def _parse_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]}")
    return value


def printable(line: str) -> str:
    """A line of somebody else's, its control characters told and not sent to the terminal."""
    return line if line.isprintable() else repr(line)


def check_stream(file: Any, mode: str) -> None:
    """Refuse what is neither a path nor an open binary file that can be read (or written).

    :raises TypeError: not a path and not a binary file
    :raises ValueError: closed, or opened the other way
    """
    if not isinstance(file, (io.BufferedIOBase, io.RawIOBase)):
        raise TypeError(
            f"Expected a path or an open binary file and got {type(file).__name__}: {file!r}."
        )
    if file.closed:
        raise ValueError(f"The file object {file!r} is closed: open it first.")
    if not (file.writable() if mode == "write" else file.readable()):
        raise ValueError(f"The file object {file!r} cannot {mode}: open it with mode '{mode[0]}b'.")


class ArrayWriter:
    """Write arrays as ``.npy`` members of an open zip, in pieces and without pickle.

    :param archive: the zip to write into
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def write(
        self, name: str, parts: Iterable[np.ndarray], dtype: np.dtype, shape: tuple[int, ...]
    ) -> None:
        """Write the concatenation of ``parts`` along their first axis as one array.

        :param name: name of the member without ``.npy``
        :param parts: C-contiguous arrays of ``dtype``
        :param dtype: dtype of the whole; no objects
        :param shape: shape of the whole
        """
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": shape,
        }
        with self._archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for part in parts:
                content = memoryview(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
                for begin in range(0, len(content), _CHUNK_BYTES):
                    member.write(content[begin : begin + _CHUNK_BYTES])


class ArrayReader:
    """Read what :class:`ArrayWriter` wrote, straight into existing arrays.

    :param archive: the zip to read from
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def read_into(
        self, name: str, parts: Iterable[np.ndarray], dtype: np.dtype, shape: tuple[int, ...]
    ) -> None:
        """Fill ``parts`` (C-contiguous views) one after the other with the array ``name``.

        :raises CorruptFileError: the member is missing, of another dtype or shape, or too short
        """
        try:
            member = self._archive.open(f"{name}.npy")
        except KeyError as error:
            raise CorruptFileError(
                f"The saved file lacks its part '{name}': use another copy."
            ) from error
        with member:
            try:
                version = np.lib.format.read_magic(member)
                if version != (1, 0):
                    raise ValueError(f"array format {version}")
                found_shape, fortran, found_dtype = np.lib.format.read_array_header_1_0(member)
                if fortran:
                    raise ValueError("its columns come first")
            except (zipfile.BadZipFile, zlib.error, EOFError):
                raise  # open_zip's sentence names the file
            except Exception as error:  # whatever the tokenizer and the parser say
                raise CorruptFileError(
                    f"The part '{name}' of the saved file is damaged ({error}): use another copy."
                ) from error
            if found_shape != shape or found_dtype != dtype:
                raise CorruptFileError(
                    f"The part '{name}' of the saved file is {found_dtype}{found_shape} and "
                    f"should be {dtype}{shape}: use another copy."
                )
            for part in parts:
                _read_exactly(member, memoryview(part.reshape(-1).view(np.uint8)), name)
            if member.read(1):  # at the end the checksum has been compared
                raise CorruptFileError(
                    f"The part '{name}' of the saved file is too long: use another copy."
                )


def _read_exactly(member: IO[bytes], target: memoryview, name: str) -> None:
    """Fill ``target`` from ``member``."""
    position = 0
    while position < len(target):
        count = member.readinto(target[position : position + _CHUNK_BYTES])  # type: ignore[attr-defined]
        if not count:
            raise CorruptFileError(
                f"The part '{name}' of the saved file is truncated: use another copy."
            )
        position += count
