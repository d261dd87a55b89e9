"""The notebook is executed as it stands, with a short run in the place of ten minutes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebooks" / "quickstart.ipynb"
SHORT = """
STEPS = 60
OPTIONS = (
    "--eval-freq 30 --eval-episodes 1 -params latent_dim:16 enc_dim:32 mlp_dim:32 num_samples:16 "
    "num_elites:8 num_pi_trajs:2 batch_size:8 learning_starts:36 initial_gradient_steps:4"
)
"""


def test_no_output_is_kept():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(not cell["outputs"] for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nbclient = pytest.importorskip("nbclient", reason='needs pip install ".[docs]"')
    nbformat = pytest.importorskip("nbformat", reason='needs pip install ".[docs]"')
    pytest.importorskip("ipykernel", reason='needs pip install ".[docs]"')
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[2])]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    place = next(
        number
        for number, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", [])
    )
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(SHORT))
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()

    run = tmp_path / "logs" / "tdmpc2" / "DMC-walker-walk-v0_1"
    assert (run / "DMC-walker-walk-v0.zip").is_file()
    texts = ["".join(o.get("text", "") for o in c.get("outputs", [])) for c in notebook.cells]
    assert "Eval num_timesteps=60" in "".join(texts)
    assert texts[-2].startswith("return ")
    assert 0 < float(texts[-2].split()[1]) < 200  # an agent of 60 steps falls
    kinds = {
        kind
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        for kind in output.get("data", {})
    }
    assert {"image/png", "text/html"} <= kinds
    assert "data:video/mp4;base64" in json.dumps(notebook)
