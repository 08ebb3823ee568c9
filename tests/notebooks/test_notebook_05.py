"""Notebook 05 on another architecture, with nothing prepared: it runs, and shows no table of another model."""

from pathlib import Path

import nbformat
import pytest
from tiny import save_gpt2_shaped

from glassbox_utils.lab import notebooks

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "05_steering_vectors.ipynb"
DRAWN = ("tables[", "report.", "costs", "many[", "report_study.setting_of")


def test_it_is_short():
    lines = [x for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code" for x in c.source.splitlines()]
    assert len(lines) <= 300 and max(map(len, lines)) <= 120 and not [x for x in lines if "noqa" in x or "fmt: " in x]


def test_every_cell_that_draws_a_study_says_that_it_needs_it():
    """What is drawn from a table is skipped on a model that has none: the runner goes by the tags."""
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        if cell.cell_type == "code" and any(word in cell.source for word in DRAWN):
            needs = [tag for tag in cell.metadata.get("tags", []) if tag.startswith("needs:studies/steering_")]
            assert needs or "in tables" in cell.source or "<= set(tables)" in cell.source, cell.source[:80]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_runs_on_a_gpt2_shaped_model(tmp_path):
    save_gpt2_shaped(tmp_path, 512, sharpen=6)
    done, _, peak = notebooks.execute(NOTEBOOK, None, {"MODEL": str(tmp_path)})
    code = [c for c in done.cells if c.cell_type == "code"]
    printed = "".join(o.get("text", "") for c in code for o in c.outputs)
    assert ", 6 layers: steering after layers" in printed and "Nothing was trained for this model" in printed
    assert "unsteered rows unchanged: True" in printed
    assert "multiple choice" not in printed  # section 7's table is another model's
    assert peak < 4
