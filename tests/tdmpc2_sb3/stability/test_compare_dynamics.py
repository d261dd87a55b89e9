"""The cost table against counts worked out by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import gymnasium as gym
import pytest
import torch as th

from tdmpc2_sb3.stability.compare_dynamics import compare, count_multiply_adds, main

LATENT, ACTION, MLP_DIM, SAMPLES = 16, 1, 24, 20
SETTINGS = {
    "latent_dim": LATENT, "mlp_dim": MLP_DIM, "enc_dim": 8, "num_q": 2, "num_samples": SAMPLES,
    "num_elites": 4, "num_pi_trajs": 2, "num_iterations": 2, "device": "cpu",
}  # fmt: skip


def test_multiply_adds_of_a_matrix_product() -> None:
    assert count_multiply_adds(lambda: th.ones(3, 5) @ th.ones(5, 7)) == 3 * 5 * 7


def test_rollout_counts_and_parameters() -> None:
    rows = {
        (row.dynamics, row.horizon): row
        for row in compare(gym.make("Pendulum-v1"), horizons=(1, 4), repeats=2, **SETTINGS)
    }
    assert set(rows) == {("mlp", 1), ("ssm", 1), ("mlp", 4), ("ssm", 4)}
    # z_0's part of the first layer once, then everything for every sample and step.
    hidden_and_out = MLP_DIM * MLP_DIM + MLP_DIM * LATENT
    first = LATENT * MLP_DIM + SAMPLES * (ACTION * MLP_DIM + hidden_and_out)
    later = SAMPLES * ((LATENT + ACTION) * MLP_DIM + hidden_and_out)
    assert rows["mlp", 1].rollout_multiply_adds == first
    assert rows["mlp", 4].rollout_multiply_adds == first + 3 * later
    for row in rows.values():
        assert row.parameters == pytest.approx(rows["mlp", 1].parameters, rel=0.02)
        assert row.plan_multiply_adds > 2 * row.rollout_multiply_adds * 18 / SAMPLES  # 2 iterations
        assert row.rollout_ms > 0
        assert 0 < row.plan_ms <= row.plan_p95_ms


def test_command_line_prints_and_writes_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "costs.csv"
    main(
        ["--env", "Pendulum-v1", "--horizons", "2", "--model-size", "1", "--repeats", "1"]
        + ["--device", "cpu", "-o", str(path)]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-2:]] == [["mlp", "2"], ["ssm", "2"]]
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["dynamics"] for row in rows] == ["mlp", "ssm"]
    assert int(rows[0]["parameters"]) == 248_832  # (129 -> 384 -> 384 -> 128), biases and norms


def test_an_unknown_dynamics_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--env", "Pendulum-v1", "--dynamics", "mlp", "rnn"])
    assert "'rnn' is not registered" in capsys.readouterr().err
