"""The kernels on sizes that fit no register, panel, block or simplex, against plain torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import odd_sizes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_sizes import CASES, Sizes

from tdmpc2_sb3.kernels.library import find_compiler
from tdmpc2_sb3.kernels.products import MIN_ROWS, usable_product


@pytest.fixture(autouse=True)
def _kernels_multiply():
    if not usable_product(MIN_ROWS, 16):
        pytest.skip("no products by kernels here: torch multiplies, which the other tests cover")


@st.composite
def any_sizes(draw: st.DrawFn) -> Sizes:
    """Sizes of everything, the least ones included."""

    def number(least: int, most: int) -> int:
        return draw(st.integers(least, most))

    samples = number(1, 40)
    return Sizes(
        observation=number(1, 700),
        action=number(1, 400),
        simplices=number(1, 20),
        simnorm_dim=draw(st.sampled_from([8, 8, 8, 1, 3, 4])),
        enc_dim=number(4, 70),
        mlp_dim=number(4, 70),
        num_enc_layers=number(1, 4),
        num_q=number(1, 5),
        num_bins=number(2, 40),
        dynamics=draw(st.sampled_from(["mlp", "ssm"])),
        depth=number(1, 3),
        selective=draw(st.booleans()),
        width=number(4, 70),
        modes=number(1, 20),
        conditioning=number(4, 70),
        episodic=draw(st.booleans()),
        rows=number(1, 40),
        horizon=number(1, 12),
        envs=number(1, 3),
        samples=samples,
        prior=number(0, samples - 1),
        elites=number(1, samples),
        iterations=number(1, 2),
    )


# The same sizes in every run: by rounding, single precision may take another elite than double
# precision does, which with sizes drawn anew would one day look like a fault.
_bounded = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@_bounded
@given(any_sizes())
def test_plans_of_any_sizes(sizes):
    odd_sizes.compare_plans(sizes)


@_bounded
@given(any_sizes())
def test_gradients_of_any_sizes(sizes):
    odd_sizes.compare_updates(sizes)


@pytest.mark.parametrize("sizes", CASES, ids=range(len(CASES)))
def test_uncommon_sizes(sizes, threads):
    assert odd_sizes.compare_plans(sizes)
    odd_sizes.compare_updates(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["-mno-avx512f"]], ids=["native", "without AVX-512"])
def test_no_access_beyond_an_array(tmp_path, flags):
    """By a build that stops at the first access beyond an array, and at undefined behaviour."""
    compiler = find_compiler()
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    if sys.platform != "linux" or not all(map(os.path.isabs, runtimes)):
        pytest.skip("no shared runtimes of the sanitizers here")
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", str(Path(odd_sizes.__file__))),
            *("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *flags),
        ],
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
            "XDG_CACHE_HOME": str(tmp_path),
            "OMP_NUM_THREADS": "2",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    shutil.rmtree(tmp_path, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[:2] == [str(len(CASES)), "cases,"]
