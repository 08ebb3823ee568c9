"""Notebook 02 on another architecture: every cell runs on a GPT-2-shaped folder, measured on the spot."""

from pathlib import Path

import pytest
from tiny import save_gpt2_shaped

from glassbox_utils.lab import notebooks

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "02_induction_and_bias_heads.ipynb"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_runs_on_a_gpt2_shaped_model(tmp_path):
    save_gpt2_shaped(tmp_path, 256)
    done, _, peak = notebooks.execute(NOTEBOOK, None, {"MODEL": str(tmp_path)})
    printed = "".join(o.get("text", "") for c in done.cells if c.cell_type == "code" for o in c.outputs)
    assert "6 layers x 8 heads" in printed and "no stored study" in printed
    assert printed.count("measured again") == 7
    assert peak < 4
