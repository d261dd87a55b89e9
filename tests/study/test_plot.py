"""Reading and merging runs for the plot, with numbers worked out by hand."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tdmpc2_sb3.study import plot


def write_run(folder: Path, steps, returns, episodes, config=None, args=None) -> Path:
    """Write a run as the zoo does: two evaluation episodes, one monitor file per environment."""
    env_name = folder.name.rpartition("_")[0]
    (folder / env_name).mkdir(parents=True)
    results = np.array([[value - 1, value + 1] for value in returns], dtype=float)
    sizes = np.full(np.shape(results), 10)  # as EvalCallback writes them
    arrays = {"timesteps": np.array(steps), "results": results, "ep_lengths": sizes}
    np.savez(folder / "evaluations.npz", **arrays)
    for index, (start, rows) in enumerate(episodes):
        lines = [f'#{{"t_start": {start}, "env_id": "DMC/walker-walk-v0"}}', "r,l,t"]
        lines += [f"1.0,{length},{time}" for length, time in rows]
        (folder / f"{index}.monitor.csv").write_text("\n".join(lines) + "\n")
    for name, content in (("config.yml", config), ("args.yml", args)):
        if content is not None:
            (folder / env_name / name).write_text(yaml.dump(OrderedDict(content)))
    return folder


def test_a_run_is_read_with_its_clock_and_frames(tmp_path):
    folder = write_run(
        tmp_path / "tdmpc2" / "DMC-walker-walk-v0_1",
        steps=[500, 750, 1200],
        returns=[10, 20, 30],
        episodes=[(100.0, [(500, 60.0), (500, 120.0)])],
        config={"env_kwargs": {"action_repeat": 2}, "policy": "MlpPolicy"},
        args={"env_kwargs": None},
    )
    run = plot.read_run(folder)
    assert (run.algo, run.env_name, run.action_repeat) == ("tdmpc2", "DMC-walker-walk-v0", 2)
    np.testing.assert_array_equal(run.returns, [10, 20, 30])
    # 500 steps after 1 min, 750 halfway to 2 min; 1200, past the last episode, at 500 a minute.
    np.testing.assert_allclose(run.minutes, [1.0, 1.5, 2.4])


def test_the_clock_of_several_environments_adds_their_steps(tmp_path):
    folder = write_run(
        tmp_path / "ppo" / "DMC-walker-walk-v0_1",
        steps=[200],
        returns=[1],
        episodes=[(10.0, [(100, 60.0)]), (16.0, [(100, 54.0), (100, 114.0)])],
    )
    steps, minutes = plot.read_clock(folder)
    np.testing.assert_array_equal(steps, [0, 100, 200, 300])
    np.testing.assert_allclose(minutes, [0.0, 1.0, 1.0, 2.0])


def test_action_repeat_from_the_command_line_and_by_default(tmp_path):
    folder = tmp_path / "DMC-walker-walk-v0_1"
    (folder / "DMC-walker-walk-v0").mkdir(parents=True)
    assert plot.read_action_repeat(folder, "DMC-walker-walk-v0") == 1
    args = OrderedDict(env_kwargs={"action_repeat": 4}, algo="sac")
    (folder / "DMC-walker-walk-v0" / "args.yml").write_text(yaml.dump(args))
    assert plot.read_action_repeat(folder, "DMC-walker-walk-v0") == 4


def test_reading_a_configuration_runs_no_code(tmp_path):
    folder = tmp_path / "DMC-walker-walk-v0_1"
    (folder / "DMC-walker-walk-v0").mkdir(parents=True)
    trap = tmp_path / "executed"
    (folder / "DMC-walker-walk-v0" / "config.yml").write_text(
        f"env_kwargs: !!python/object/apply:os.system ['touch {trap}']\n"
    )
    assert plot.read_action_repeat(folder, "DMC-walker-walk-v0") == 1
    assert not trap.exists()


def test_merging_seeds():
    curve = plot.merge(
        [np.array([0.0, 10, 20]), np.array([0.0, 20, 40])],
        [np.array([0.0, 10, 20]), np.array([2.0, 4, 6])],
    )
    np.testing.assert_array_equal(curve.x, [0, 10, 20])  # what both cover
    np.testing.assert_allclose(curve.mean, [1.0, 6.5, 12.0])
    np.testing.assert_allclose(curve.low, [0, 3, 4])
    np.testing.assert_allclose(curve.high, [2, 10, 20])


def test_published_curves_are_those_of_the_literature():
    curves = plot.read_published("DMC-walker-walk-v0")
    assert set(curves) == {"tdmpc2", "sac"}
    frames, returns = curves["tdmpc2"]
    assert list(frames[:3]) == [0, 100_000, 200_000]
    assert returns[1] == pytest.approx(962, abs=1)
    assert plot.read_published("DMC-lqr-lqr_2_1-v0") == {}


def test_the_picture(tmp_path, capsys):
    for seed, offset in ((1, 0), (2, 40)):
        write_run(
            tmp_path / "logs" / "tdmpc2" / f"DMC-walker-walk-v0_{seed}",
            steps=[5000, 10000, 15000],
            returns=[100 + offset, 400 + offset, 800 + offset],
            episodes=[(0.0, [(5000, 300.0), (5000, 600.0), (5000, 900.0)])],
            config={"env_kwargs": {"action_repeat": 2}},
        )
    output = tmp_path / "new" / "curves.png"
    assert plot.main([str(tmp_path / "logs"), "-o", str(output), "-e", "DMC/walker-walk-v0"]) == 0
    assert "30000 frames     15.0 min   last return   800.0" in capsys.readouterr().out
    picture = np.asarray(Image.open(output).convert("RGB"))
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50  # lines, bands and text
    figure = plot.draw(plot.read_runs([tmp_path / "logs"]))
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    published = {f"{algo}, published (every 100k)" for algo in ("SAC", "TD-MPC2")}
    assert set(labels) == {"tdmpc2 (2 runs)", *published}
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [10_000, 20_000, 30_000])
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [120, 420, 820])


def test_bad_input_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "nowhere")])
    assert "nowhere is no folder; give the zoo's log folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path)])
    assert "no run with evaluations found" in capsys.readouterr().err
