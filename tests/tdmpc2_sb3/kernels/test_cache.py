"""Where built kernels are kept, and that nothing damaged or anybody else's is loaded."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tdmpc2_sb3.kernels import cache, library
from tdmpc2_sb3.kernels.cache import VARIABLE, CacheError, cache_directory
from tdmpc2_sb3.kernels.library import build

KEPT_BY_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to others")
BUILDER = sys.modules["tdmpc2_sb3.kernels.library"]
FLAGS = ("-std=gnu11", "-O0", "-fPIC")  # a second instead of ten
PROGRAM = f"""
import sys, warnings; warnings.simplefilter("always")
import torch as th
from tdmpc2_sb3.kernels import add, library
sys.modules["tdmpc2_sb3.kernels.library"].FLAGS = {FLAGS}
assert library() is not None
assert add(th.ones(2, 3), th.ones(3)).tolist() == [[2.0] * 3] * 2
"""


@pytest.fixture(autouse=True)
def _builds_are_quick(monkeypatch):
    if library() is None:
        pytest.skip("no C compiler here")
    monkeypatch.setattr(BUILDER, "FLAGS", FLAGS)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The cache, with a library in it."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    found = cache_directory()
    build(found)
    # A copy, for tests to damage: this process goes on with the file that it has loaded.
    copied = shutil.copy(kept(found), tmp_path)
    os.replace(copied, kept(found))
    return found


def run(program=PROGRAM, environment=None, **settings):
    """A process that uses the kernels."""
    return subprocess.run(
        [sys.executable, "-c", program],
        env=dict(os.environ) if environment is None else environment,
        capture_output=True,
        text=True,
        check=False,
        **settings,
    )


def kept(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def contents(folder: Path) -> dict[str, int]:
    return {each.name: each.stat().st_mtime_ns for each in folder.iterdir()}


def test_a_kept_library_is_loaded_as_it_is(folder):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(kept(folder).stat().st_mode) == 0o700
    before = contents(folder)
    build(folder)
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(folder) == before


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_garbage(path: Path) -> None:
    path.write_bytes(b"\x7fELF" + bytes(range(256)) * 100)


def change_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def open_to_others(path: Path) -> None:
    path.chmod(0o722)


def link_elsewhere(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere.so")
    path.symlink_to(path.parent.parent / "elsewhere.so")


def give_away(path: Path) -> None:
    os.chown(path, 12345, -1)


DAMAGES = [cut_off, empty, replace_by_garbage, change_a_bit, open_to_others, link_elsewhere]


@pytest.mark.parametrize("damage", [*DAMAGES, pytest.param(give_away, marks=KEPT_BY_ROOT)])
def test_what_does_not_fit_is_built_again(folder, damage):
    before = library()
    damage(kept(folder))
    assert build(folder).panel_width() == before.panel_width()
    path = kept(folder)
    assert cache._is_intact(path)
    assert path.lstat().st_uid == os.getuid()
    modified = contents(folder)
    build(folder)
    assert contents(folder) == modified


def test_a_library_that_was_cut_off_ends_no_process(folder):
    cut_off(kept(folder))
    done = run()
    assert (done.returncode, done.stderr) == (0, "")


def test_the_sources_compiler_and_flags_tell_libraries_apart(folder, monkeypatch, tmp_path):
    compiler = BUILDER.find_compiler()
    names = {BUILDER.fingerprint(compiler, ("-O3",)), BUILDER.fingerprint(compiler, ("-O2",))}
    sources = [path.name for path in BUILDER.FOLDER.glob("*.[ch]")]
    assert "interface.h" in sources
    names.add(BUILDER.fingerprint(sys.executable, ("-O3",)))
    for source in sources:
        other = Path(shutil.copytree(BUILDER.FOLDER, tmp_path / source))
        with open(other / source, "a", encoding="utf-8") as file:
            file.write("\n")
        with monkeypatch.context() as patch:
            patch.setattr(BUILDER, "FOLDER", other)
            names.add(BUILDER.fingerprint(compiler, ("-O3",)))
    with monkeypatch.context() as patch:
        patch.setattr(BUILDER, "FLAGS", (*BUILDER.FLAGS, "-g"))
        names.add(BUILDER.fingerprint(compiler, ("-O3",)))
    assert len(names) == 4 + len(sources)


@pytest.mark.parametrize("mode", [0o777, 0o702])
def test_nothing_is_kept_where_others_may_write(folder, mode):
    folder.chmod(mode)
    with pytest.raises(CacheError, match=f"others may write to {folder}$"):
        cache_directory()


@pytest.mark.parametrize("mode", [0o777, 0o703])
def test_nothing_is_kept_below_what_others_may_write(tmp_path, monkeypatch, mode):
    parent = tmp_path / "one" / "two"
    parent.mkdir(parents=True)
    monkeypatch.setenv(VARIABLE, str(parent))
    (tmp_path / "one").chmod(mode)
    with pytest.raises(CacheError, match=f"others may write to {tmp_path / 'one'}$"):
        cache_directory()
    (tmp_path / "one").chmod(mode | stat.S_ISVTX)  # as /tmp is
    assert cache_directory() == parent / "tdmpc2_sb3"
    (tmp_path / "link").symlink_to(tmp_path / "one")
    (tmp_path / "one").chmod(mode)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "link" / "two"))
    with pytest.raises(CacheError, match="others may write"):
        cache_directory()


@KEPT_BY_ROOT
@pytest.mark.parametrize("place", ["folder", "parent"])
def test_nothing_is_kept_in_somebody_elses_folder(tmp_path, monkeypatch, place):
    parent = tmp_path / "one"
    (parent / "tdmpc2_sb3").mkdir(mode=0o700, parents=True)
    monkeypatch.setenv(VARIABLE, str(parent))
    assert cache_directory()
    os.chown(parent if place == "parent" else parent / "tdmpc2_sb3", 12345, -1)
    with pytest.raises(CacheError, match="others may write"):
        cache_directory()


def test_folders_are_made_for_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "one" / "two"))
    before = os.umask(0)
    try:
        build(cache_directory())
    finally:
        os.umask(before)
    for each in ("one", "one/two", "one/two/tdmpc2_sb3"):
        assert stat.S_IMODE((tmp_path / each).stat().st_mode) == 0o700
    assert stat.S_IMODE(kept(cache_directory()).stat().st_mode) == 0o700


def assert_built_for_one_process(done, reason, temporary):
    assert done.returncode == 0, done.stderr
    assert "built for this process alone" in done.stderr
    assert reason in done.stderr
    assert f"Set {VARIABLE}" in done.stderr
    assert "compiler" not in done.stderr
    assert list(temporary.iterdir()) == []


@pytest.fixture
def temporary(tmp_path) -> Path:
    """A folder for temporary files."""
    made = tmp_path / "temporary"
    made.mkdir()
    made.chmod(0o1777)
    return made


def test_a_cache_that_cannot_be_written_to(tmp_path, temporary):
    (tmp_path / "file").write_text("no folder")
    chosen = {VARIABLE: str(tmp_path / "file"), "TMPDIR": str(temporary)}
    done = run(environment={**os.environ, **chosen})
    assert_built_for_one_process(done, f"{tmp_path}/file", temporary)


@KEPT_BY_ROOT
def test_a_user_without_a_home_or_a_right_to_write(temporary, tmp_path):
    """As in a container that is run as a user it does not know."""
    for each in (sys.executable, __file__):
        parents = Path(os.path.realpath(each)).parents
        if not all(parent.stat().st_mode & stat.S_IXOTH for parent in parents):
            pytest.skip(f"other users cannot reach {each}")
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", VARIABLE)}
    environment["TMPDIR"] = str(temporary)
    tmp_path.parent.chmod(0o711)
    done = run(environment=environment, user=12345, group=12345)
    assert_built_for_one_process(done, "the user with id 12345 has no home directory", temporary)


def test_no_home(monkeypatch, tmp_path):
    """What the standard library says of a user without one."""

    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(CacheError, match=rf"id {os.getuid()} has no home directory"):
        cache_directory()
    monkeypatch.setenv(VARIABLE, "relative/folder")  # the convention says to ignore such
    with pytest.raises(CacheError, match="has no home directory"):
        cache_directory()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert cache_directory() == tmp_path / "tdmpc2_sb3"


def test_a_full_disk(tmp_path, temporary):
    """Said by the compiler, which is not what has to be installed."""
    compiler = tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        '*cache*) echo "fatal error: error writing: No space left on device" >&2; exit 1;;\n'
        'esac\nexec "$REAL" "$@"\n'
    )
    compiler.chmod(0o755)
    chosen = {
        "CC": str(compiler),
        "REAL": BUILDER.find_compiler(),
        VARIABLE: str(tmp_path / "cache"),
        "TMPDIR": str(temporary),
    }
    done = run(environment={**os.environ, **chosen})
    assert_built_for_one_process(done, "No space left on device", temporary)


def test_a_kept_library_serves_where_nothing_can_be_written(folder, monkeypatch):
    """A cache that was filled when an image was made, say."""

    def fail(*_args, **_kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(BUILDER.tempfile, "TemporaryDirectory", fail)
    build(cache_directory())
    kept(folder).unlink()
    with pytest.raises(CacheError, match="Read-only file system"):
        build(cache_directory())


def test_what_killed_builds_left_is_removed(tmp_path):
    for name, age in (("build-old", 2000), ("build-new", 10), ("other", 2000)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "kernels.o").touch()
        os.utime(folder, (time.time() - age,) * 2)
    cache.clear(tmp_path, 1200)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build-new", "other"]


def test_a_compiler_that_does_not_end_is_named_and_not_started_again(tmp_path):
    compiler = tmp_path / "slow-cc"
    compiler.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && exit\n'
        f"echo started >> {tmp_path}/starts\n"
        "exec sleep 60\n"
    )
    compiler.chmod(0o755)
    program = (
        "import importlib\n"
        "module = importlib.import_module('tdmpc2_sb3.kernels.library')\n"
        "module.BUILD_SECONDS = 1\n"
        "print(module.library())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "CC": str(compiler)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "None\n"
    assert "could not be built (the compiler took longer than 1 s)" in done.stderr
    assert "Start again when the machine has less to do, or set" in done.stderr
    assert (tmp_path / "starts").read_text() == "started\n"
