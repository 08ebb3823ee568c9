"""Notebook 04: short, every picture described, and what is drawn from a study says so."""

from pathlib import Path

import nbformat

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "04_feature_clamping.ipynb"
DRAWN = {"choice[": "clamp_choose", "report[": "clamp_report", "bill": "clamp_costs", "tools": "clamp_choose"}
DRAWN |= {"harder": "clamp_controls"}


def cells():
    return [c for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code"]


def test_it_is_short_and_every_picture_is_described():
    lines = [x for c in cells() for x in c.source.splitlines()]
    assert len(lines) <= 300 and max(map(len, lines)) <= 120 and not [x for x in lines if "noqa" in x or "fmt: " in x]
    for cell in cells():
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert output.metadata.get("image/png", {}).get("alt") or cell.metadata.get("alt"), cell.source[:60]


def test_every_cell_that_draws_a_study_says_that_it_needs_it():
    for cell in cells():
        for word, study in DRAWN.items():
            if word in cell.source:
                assert f"needs:studies/{study}" in cell.metadata.get("tags", []), cell.source[:80]
