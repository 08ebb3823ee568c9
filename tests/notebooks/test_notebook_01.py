"""Notebook 01 on a model that nobody has seen: a window, grouped queries, a tokenizer of 600 tokens."""

from pathlib import Path

import pytest
import tiny

from glassbox_utils.lab import notebooks

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "01_attention_heads.ipynb"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_on_a_tiny_model_with_a_window(tmp_path):
    done, _, peak = notebooks.execute(NOTEBOOK, None, {"MODEL": str(tiny.save("gemma3", tmp_path))})
    printed = "".join(o.get("text", "") for c in done.cells if c.cell_type == "code" for o in c.outputs)
    assert "nothing was prepared for" in printed and "18 heads" in printed
    assert peak < 4
