"""What is shown of the burst of gradient steps: a bar in a terminal, a line a tenth in a file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios

import pytest

PROGRAM = """
from tdmpc2_sb3 import TDMPC2
model = TDMPC2(
    "MlpPolicy", "Pendulum-v1", latent_dim=16, enc_dim=16, mlp_dim=16, num_samples=16,
    num_elites=4, num_pi_trajs=2, num_iterations=1, batch_size=4, learning_starts=205,
    initial_gradient_steps=40, gradient_steps=1, verbose=1, seed=1,
)
model.learn(206)
"""


def test_a_file_gets_ten_lines(make_agent, capfd):
    agent = make_agent(learning_starts=20, initial_gradient_steps=40, verbose=1)
    agent.learn(21)
    shown = capfd.readouterr()
    lines = re.findall(r"^Initial updates: (\d+) of 40 after \d\d:\d\d$", shown.out, re.M)
    assert lines == ["4", "8", "12", "16", "20", "24", "28", "32", "36", "40"]
    assert "Initial updates" not in shown.err
    assert "\r" not in shown.out + shown.err


@pytest.mark.parametrize(("steps", "expected"), [(3, ["1", "2", "3"]), (25, None)])
def test_few_updates_are_few_lines(make_agent, capfd, steps, expected):
    agent = make_agent(learning_starts=20, initial_gradient_steps=steps, verbose=1)
    agent.learn(21)
    lines = re.findall(r"^Initial updates: (\d+) of", capfd.readouterr().out, re.M)
    # The first numbers at or above each tenth of 25: 2.5, 5, 7.5, ...
    assert lines == (expected or ["3", "5", "8", "10", "13", "15", "18", "20", "23", "25"])


def test_silence_is_kept(make_agent, capfd):
    make_agent(learning_starts=20, initial_gradient_steps=10, verbose=0).learn(21)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_terminal_gets_a_bar():
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        timeout=300,
        check=True,
    )
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
        while chunk := os.read(ours, 4096):
            drawn += chunk
    os.close(ours)
    assert "Initial updates: 100%" in drawn.decode()
    assert "40/40" in drawn.decode()
    assert "Initial updates" not in done.stdout
