"""Notebook 05 on another architecture: it runs on a GPT-2-shaped folder, and names what was not measured there."""

from pathlib import Path

import pytest
from tiny import save_gpt2_shaped

from glassbox_utils.lab import notebooks

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "05_steering_vectors.ipynb"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_on_a_gpt2_shaped_model(tmp_path):
    save_gpt2_shaped(tmp_path, 512, sharpen=6)
    done, _, peak = notebooks.execute(NOTEBOOK, None, {"MODEL": str(tmp_path)})
    printed = "".join(o.get("text", "") for c in done.cells if c.cell_type == "code" for o in c.outputs)
    assert "of 6" in printed and "were measured on SmolLM2-135M-Instruct" in printed
    assert "unsteered rows unchanged: True" in printed
    assert peak < 4
