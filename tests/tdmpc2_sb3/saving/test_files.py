"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import pathlib
import subprocess
import sys

import pytest

from tdmpc2_sb3.saving.files import CorruptFileError, atomic_write, open_zip, write_to


def test_writes_with_suffix_and_missing_folders(tmp_path):
    written = atomic_write(tmp_path / "a" / "b" / "model", lambda file: file.write(b"new"), "zip")
    assert written == (tmp_path / "a" / "b" / "model.zip").resolve()
    assert written.read_bytes() == b"new"
    assert atomic_write(tmp_path / "x.pkl", lambda file: file.write(b""), "zip").name == "x.pkl"
    assert sorted(os.listdir(tmp_path)) == ["a", "x.pkl"]


def test_a_folder_of_that_name_is_left_alone(tmp_path):
    (tmp_path / "model.zip").mkdir()
    with pytest.warns(UserWarning, match="is a folder"):
        written = atomic_write(tmp_path / "model.zip", lambda file: file.write(b"x"), "zip")
    assert written.name == "model.zip_2"


def test_a_failing_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(b"old")

    def writer(file):
        file.write(b"half")
        raise KeyError("oops")

    with pytest.raises(KeyError, match="oops"):
        atomic_write(path, writer)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.zip"]


def test_permissions_and_links_survive(tmp_path):
    path = tmp_path / "real"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(path)
    atomic_write(link, lambda file: file.write(b"new"))
    assert link.is_symlink()
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o640


FULL_DISK = """
import resource, signal, sys
from tdmpc2_sb3.saving.files import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the kernel refuses to write more
for path in sys.argv[1:]:
    try:
        atomic_write(path, lambda file: file.write(bytes(200_000)))
    except OSError as error:
        print(error.errno, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
def test_a_write_that_the_system_refuses_is_one_sentence(tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    old, new = run_python(FULL_DISK, tmp_path / "old", tmp_path / "new").splitlines()
    for name, output in (("old", old), ("new", new)):
        sentence = f"{errno.EFBIG} [Errno {errno.EFBIG}] Could not save '{tmp_path / name}'"
        assert output.startswith(f"{sentence} (File too large); ")
    assert "the file that was there is unchanged: free space" in old
    assert "no file was written: free space" in new
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_sentence_for_a_full_disk(tmp_path):
    def writer(file):
        with open("/dev/full", "wb", buffering=0) as full:  # the kernel answers ENOSPC
            full.write(b"x")

    (tmp_path / "m").write_bytes(b"old")
    with pytest.raises(OSError, match=r"No space left on device.*is unchanged: free space"):
        atomic_write(tmp_path / "m", writer)
    assert (tmp_path / "m").read_bytes() == b"old"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        atomic_write(tmp_path / "file" / "model.zip", lambda file: file.write(b"x"))


KILLED = """
import os, sys
from tdmpc2_sb3.saving.files import atomic_write
from killing import kill_at_random_moments

path, times = sys.argv[1], int(sys.argv[2])
SIZE = 2_600_000
seen, leftovers = [0], []

def save():
    number = (seen[-1] + 1) % 200
    seen.append(number)
    def writer(file):
        for _ in range(200):  # the round's number, in small pieces
            file.write(bytes([number]) * (SIZE // 200))
    atomic_write(path, writer)

def check():
    with open(path, "rb") as file:
        content = file.read()
    assert len(content) == SIZE and content == content[:1] * SIZE, "a broken file"
    seen.append(content[0])
    files = os.listdir(os.path.dirname(path))
    assert len(files) <= 2, files  # the next save removes what a killed one left
    leftovers.append(len(files) == 2)

kill_at_random_moments(save, check, times)
print(sum(leftovers))
"""


def run_python(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("times", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_file_is_whole(tmp_path, times):
    path = tmp_path / "model.zip"
    path.write_bytes(bytes(2_600_000))
    assert int(run_python(KILLED, path, times)) > times / 10  # hit half way
    atomic_write(path, lambda file: file.write(b"end"))
    assert os.listdir(tmp_path) == ["model.zip"]
    assert path.read_bytes() == b"end"


def test_reading_names_what_is_missing(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match=r"m' and '.*m\.zip'"),
        open_zip(tmp_path / "m", "zip", "model"),
    ):
        pass


def test_streams_are_checked(tmp_path):
    with pytest.raises(TypeError, match="got StringIO"):
        write_to(io.StringIO(), lambda file: None, "zip")
    closed = io.BytesIO()
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        write_to(closed, lambda file: None, "zip")
    (tmp_path / "f").write_bytes(b"")
    with (
        open(tmp_path / "f", "rb") as file,
        pytest.raises(ValueError, match="cannot write: open it with mode 'wb'"),
    ):
        write_to(file, lambda file: None, "zip")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04" + bytes(100)])
def test_no_zip_is_one_sentence(tmp_path, content):
    (tmp_path / "m.zip").write_bytes(content)
    with (
        pytest.raises(CorruptFileError, match=r"saved model '.*m\.zip' is truncated or not a zip"),
        open_zip(tmp_path / "m", "zip", "model"),
    ):
        pass
