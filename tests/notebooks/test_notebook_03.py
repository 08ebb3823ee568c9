"""Notebook 03 as it is committed, and on a model for which nothing was prepared."""

import re
from pathlib import Path

import nbformat
import pytest
import tiny

from glassbox_utils.lab import notebooks
from glassbox_utils.lab.exercises import features

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "03_sae_training.ipynb"


def test_it_is_short_explains_its_words_and_describes_its_pictures():
    cells = nbformat.read(NOTEBOOK, 4).cells
    code = [c for c in cells if c.cell_type == "code"]
    prose = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    lines = [line for c in code for line in c.source.splitlines()]
    assert len(lines) <= 300 and max(map(len, lines)) <= 120, "as the formatter lays them out, with blank lines"
    assert NOTEBOOK.stat().st_size <= 1_000_000
    assert len(set(re.findall(r"glossary\.md#([\w-]+)", prose))) >= 20
    assert "polysemantic" in prose and "monosemantic" in prose and "planted" in prose
    pictures = [o for c in code for o in c.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 5
    for o in pictures:
        assert len(o.metadata["image/png"]["alt"]) > 40, "a picture has no words"
    assert prose.count("**Predict before you run.**") >= 4


def test_loss_comes_first_and_what_was_not_run_is_said():
    prose = "\n".join(c.source for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "markdown")
    assert prose.index("what a reconstruction costs the model") < prose.index("One feature, one neuron")
    assert "sae-architectures" in prose and "It has not been run" in prose


def test_the_folded_solutions_are_those_that_are_executed():
    prose = "\n".join(c.source for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "markdown")
    solutions = re.findall(r"<summary>Solution</summary>\s*```python\n(.*?)```", prose, re.S)
    assert len(solutions) == 6
    for source in solutions:
        import torch

        space = {"torch": torch}
        exec(source, space)
        (name,) = re.findall(r"^def (\w+)", source, re.M)
        assert getattr(features, f"check_{name}")(space[name]) == "right"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_on_a_tiny_model_for_which_nothing_was_prepared(tmp_path):
    done, _, peak = notebooks.execute(NOTEBOOK, None, {"MODEL": str(tiny.save("gemma3", tmp_path))})
    printed = "".join(o.get("text", "") for c in done.cells if c.cell_type == "code" for o in c.outputs)
    assert "nothing was prepared for" in printed and "loss and gradients agree: [True, True, True, True]" in printed
    assert peak < 4
