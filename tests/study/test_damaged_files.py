"""Files of runs and studies that are damaged, or are others': one sentence, bounded memory."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tdmpc2_sb3.study import plot, results, runs

NAME = "DMC-x-v0"
EVALUATIONS = {
    "timesteps": np.array([5, 10]),
    "results": np.array([[1.0, 2.0], [3.0, 5.0]]),
    "ep_lengths": np.full((2, 2), 5),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "tdmpc2" / f"{NAME}_1"
    (folder / NAME).mkdir(parents=True)
    (folder / "0.monitor.csv").write_text('#{"t_start": 60.0}\nr,l,t\n1.5,10,60.0\nnan,7,180.0\n')
    (folder / "1.monitor.csv").write_text('#{"t_start": 0.0}\nr,l,t\n2.5,9,180.0\n')
    np.savez(folder / "evaluations.npz", **EVALUATIONS)
    (folder / NAME / "config.yml").write_text("env_kwargs: {action_repeat: 2}")
    return folder


def test_sound_files(run):
    episodes = plot.read_episodes(run)
    np.testing.assert_array_equal(episodes.returns, [1.5, 2.5, np.nan])
    assert episodes.steps.tolist() == [10, 19, 26]
    assert episodes.minutes.tolist() == [2.0, 3.0, 4.0]
    found = plot.read_run(run)
    assert (found.steps.tolist(), found.returns.tolist()) == ([5, 10], [1.5, 4.0])
    assert plot.read_action_repeat(run, NAME) == 2


@pytest.mark.parametrize(
    "text",
    [
        *("", "#x\nr,l,t\n", "#[]\n", "#{}\n", "#" + 100_000 * "[", '#{"t_start": NaN}\n'),
        *(f'#{{"t_start": 1.0}}\n{rows}' for rows in ("r,l\n1,2", "r,l,t\n1,nan,2")),
        *(f'#{{"t_start": 1.0}}\nr,l,t\n{row}' for row in ("1", f"1,{400 * '9'},2", "1,2,inf")),
    ],
)
def test_files_of_monitor(run, text):
    (run / "0.monitor.csv").write_text(text)
    with pytest.raises(
        ValueError, match=r"0.monitor.csv' is damaged, or no file of Monitor"
    ) as caught:
        plot.read_episodes(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"timesteps": np.array([None, {}], object)},
        {"timesteps": np.array(["a", "b"])},
        {"timesteps": np.array([5])},
        {"results": np.float64(3.0)},
        {"ep_lengths": np.ones((2, 3))},
        {"results": None},
    ],
)
def test_evaluations(run, changes):
    kept = {key: value for key, value in {**EVALUATIONS, **changes}.items() if value is not None}
    np.savez(run / "evaluations.npz", **kept)
    with pytest.raises(ValueError, match=r"evaluations.npz' (is damaged|is no file|has 2 evalu)"):
        plot.read_run(run)


@pytest.mark.parametrize("content", [b"", b"PKxx", b"\x80\x04abc"])
def test_evaluations_of_other_bytes(run, content):
    (run / "evaluations.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"evaluations.npz' is damaged"):
        plot.read_run(run)


@pytest.mark.parametrize("repeat", ["x", "[1]", ".inf", "0"])
def test_action_repeats(run, repeat):
    (run / NAME / "config.yml").write_text(f"env_kwargs: {{action_repeat: {repeat}}}")
    with pytest.raises(ValueError, match=r"has the action_repeat .*: correct it"):
        plot.read_action_repeat(run, NAME)


@pytest.mark.parametrize(
    "content", [200_000 * b"[", b'{"a": "' + bytes(200 << 20) + b'"}', b"[]", b'{"data": 3}']
)
def test_saved_steps_of_a_damaged_model(run, content):
    with zipfile.ZipFile(run / f"{NAME}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.json", content)
    tracemalloc.start()
    try:
        assert runs.saved_steps(run, NAME) == 0
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


CSV = """# arm: a
# task: b
# seed: 0
# steps: {steps}
# action_repeat: {repeat}
# finished: true
kind,steps,frames,minutes,return,length
training,{at},1,1,{value},3
"""


def test_results():
    good = {"steps": 5, "repeat": 2, "at": 5, "value": 1.5}
    result = results.parse_csv(CSV.format(**good), "f")
    assert (result.frames, result.training[1].tolist()) == (10, [1.5])
    for change in (
        {"steps": "x"},
        {"repeat": "[1]"},
        {"repeat": 0},
        {"at": 30 * "9"},
        {"value": "x"},
    ):
        with pytest.raises(ValueError, match="'f' is damaged or no result of a study"):
            results.parse_csv(CSV.format(**{**good, **change}), "f")
    for text in (
        "",
        "# - 1\nkind\n",
        f"# {5000 * '['}",
        "# a: &a [*a]",
        "# arm: !!python/name:os.system",
    ):
        with pytest.raises(ValueError, match="'f' is damaged or no result of a study"):
            results.parse_csv(text, "f")
