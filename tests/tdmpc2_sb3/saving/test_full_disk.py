"""Saving to a file system that is truly full: one sentence, and the old files stay and load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SIZE = "3m"
# A mount of one's own: nobody else sees it, no privilege is needed, and it ends with the process.
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
MOUNT = f'mount -t tmpfs -o size={SIZE} none "$0" && exec "$@"'

PROGRAM = """
import errno, json, os, pathlib, sys
from test_callbacks import TINY, make_env
from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.callbacks import load_checkpoint, write_checkpoint

folder = pathlib.Path(sys.argv[1])
model = TDMPC2("MlpPolicy", make_env(), **TINY).learn(30)
saves = {
    "model.zip": model.save,
    "buffer.pkl": model.save_replay_buffer,
    "official.pt": model.save_official,
}
for name, save in saves.items():
    save(folder / name)
write_checkpoint(model, folder)
old = {name: (folder / name).read_bytes() for name in saves}
before = sorted(path.relative_to(folder) for path in folder.rglob("*"))

filler = folder / "filler"
with open(filler, "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
    # None left at all, or half of a file: a save fails at its first byte, or in the middle.
    room = int(sys.argv[2])
    os.truncate(filler, max(0, os.path.getsize(filler) - room))
before = sorted([*before, pathlib.Path("filler")])

model.learn(5, reset_num_timesteps=False)
said = {}
attempts = {name: (save, folder / name) for name, save in saves.items()}
if not room:
    attempts.update({f"new_{name}": (save, folder / f"new_{name}") for name, save in saves.items()})
    attempts["checkpoint"] = (lambda path: write_checkpoint(model, path), folder)
for name, (save, path) in attempts.items():
    size = len(old[name]) if name in old else 1
    if room >= size:
        continue
    try:
        save(path)
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
        said[name] = str(error)
assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before, "leftovers"
assert {name: (folder / name).read_bytes() for name in saves} == old
loaded = TDMPC2.load(folder / "model.zip")
assert loaded.num_timesteps == 30
loaded.load_replay_buffer(folder / "buffer.pkl")
assert loaded.replay_buffer.num_steps == 30
resumed, _ = load_checkpoint(TDMPC2, folder, make_env())
assert resumed.num_timesteps == 30

os.unlink(filler)  # with space again, the same calls save
for name, save in saves.items():
    save(folder / name)
assert TDMPC2.load(folder / "model.zip").num_timesteps == 35
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def small_disk() -> list[str]:
    """Begin of a command that runs with a small file system at the folder named next."""
    if shutil.which("unshare") is None:
        pytest.skip("needs Linux: only there may a test mount a small file system of its own")
    probe = subprocess.run([*NAMESPACE, MOUNT, "/mnt", "true"], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"this machine lets no test mount a small file system: {probe.stderr.strip()}")
    return [*NAMESPACE, MOUNT]


def run(small_disk: list[str], folder: Path, room: int) -> dict[str, str]:
    folder.mkdir()
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])  # test_callbacks
    done = subprocess.run(
        [*small_disk, str(folder), sys.executable, "-c", PROGRAM, str(folder), str(room)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []  # it was not the real disk
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_a_full_disk_is_one_sentence_and_the_old_files_stay(small_disk, tmp_path):
    said = run(small_disk, tmp_path / "disk", 0)
    assert sorted(said) == [
        "buffer.pkl",
        "checkpoint",
        "model.zip",
        "new_buffer.pkl",
        "new_model.zip",
        "new_official.pt",
        "official.pt",
    ]
    for name, sentence in said.items():
        assert "(No space left on device)" in sentence, sentence
        assert "\n" not in sentence
        if name != "checkpoint":
            path = tmp_path / "disk" / name
            stays = "no file was written" if "new" in name else "that was there is unchanged"
            assert f"Could not save '{path}'" in sentence
            assert f"{stays}: free space or choose another folder." in sentence


def test_a_disk_that_fills_up_in_the_middle_of_a_file(small_disk, tmp_path):
    said = run(small_disk, tmp_path / "disk", 32 * 1024)
    assert "model.zip" in said
    assert "unchanged: free space" in said["model.zip"]
