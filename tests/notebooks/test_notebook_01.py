"""Notebook 01 as it is committed, and on a model that nobody has seen: a window, grouped queries, 600 tokens."""

import re
from pathlib import Path

import nbformat
import pytest
import tiny

from glassbox_utils.lab import notebooks

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "01_attention_heads.ipynb"


def test_it_is_short_explains_its_words_and_describes_its_pictures():
    cells = nbformat.read(NOTEBOOK, 4).cells
    code = [c for c in cells if c.cell_type == "code"]
    prose = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    assert sum(len(c.source.splitlines()) for c in code) <= 300 and NOTEBOOK.stat().st_size <= 800_000
    assert len(set(re.findall(r"glossary\.md#([\w-]+)", prose))) >= 20
    pictures = [o for c in code for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 6
    for o in pictures:
        assert len(o.metadata["image/png"]["alt"]) > 40, "a picture has no words"
    assert prose.count("**Predict before you run.**") >= 4
    assert not re.search(r"@@", prose)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_on_a_tiny_model_with_a_window(tmp_path):
    done, _, peak = notebooks.execute(NOTEBOOK, None, {"MODEL": str(tiny.save("gemma3", tmp_path))})
    printed = "".join(o.get("text", "") for c in done.cells if c.cell_type == "code" for o in c.outputs)
    assert "nothing was prepared for" in printed and "18 heads" in printed
    assert peak < 4
