"""Which of the zoo's programs is running, and for which run, as far as the command line tells."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from tdmpc2_sb3.zoo.algorithms import concerns_us


class Command(NamedTuple):
    """What the command line says.

    :param program: such as `train`, empty when it is none of the zoo's
    :param algo: the value of `--algo`, empty when not given
    :param env_id: the value of `--env`, empty when not given
    """

    program: str
    algo: str
    env_id: str

    @property
    def is_ours(self) -> bool:
        """Whether it concerns our algorithms or our environments."""
        return bool(self.program) and concerns_us(self.algo, self.env_id)


def read_command(argv: list[str] | None = None) -> Command:
    """Read `python -m rl_zoo3.<program> ...` or `python -m tdmpc2_sb3.zoo <program> ...`.

    :param argv: the interpreter's own arguments; None for this process's
    """
    argv = list(sys.orig_argv if argv is None else argv)
    program = ""
    for position, argument in enumerate(argv[:-1]):
        if argument == "-m":
            module = argv[position + 1]
            if module.startswith("rl_zoo3."):
                program = module.removeprefix("rl_zoo3.")
            elif module == "tdmpc2_sb3.zoo" and position + 2 < len(argv):
                program = argv[position + 2]
            break
    return Command(program, _value(argv, "--algo"), _value(argv, "--env"))


def _value(argv: list[str], option: str) -> str:
    for position, argument in enumerate(argv):
        if argument == option and position + 1 < len(argv):
            return argv[position + 1]
        if argument.startswith(option + "="):
            return argument.removeprefix(option + "=")
    return ""


def provide_tools() -> None:
    """Put this interpreter (as `python`) and an `ffmpeg` on the PATH of child processes.

    record_training starts `python` by name, and it and push_to_hub start `ffmpeg`: in an
    environment that was not activated, or on a machine without ffmpeg, they would find another
    Python or silently make no video. imageio-ffmpeg, a dependency of moviepy, brings a binary.
    """
    import imageio_ffmpeg

    folder = Path(tempfile.mkdtemp(prefix="tdmpc2_sb3_tools_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # A script, not a link: a linked interpreter would not find its virtual environment.
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    if shutil.which("ffmpeg") is None:
        (folder / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    os.environ["PATH"] = os.pathsep.join([str(folder), os.environ.get("PATH", os.defpath)])
