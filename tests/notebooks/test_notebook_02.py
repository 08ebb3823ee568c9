"""Notebook 02 on other models, with nothing prepared: what is live runs, what needs a study is skipped in words."""

from pathlib import Path

import nbformat
import pytest
import tiny

from glassbox_utils.lab import notebooks

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "02_induction_and_bias_heads.ipynb"


def printed(folder):
    """All that a run on the model of a folder prints, and its peak memory in GiB."""
    done, _, peak = notebooks.execute(NOTEBOOK, None, {"MODEL": str(folder)})
    return "".join(o.get("text", "") for c in done.cells if c.cell_type == "code" for o in c.outputs), peak


def test_it_is_short_and_every_picture_is_described():
    code = [c for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code"]
    assert sum(len(c.source.splitlines()) for c in code) <= 300
    for cell in code:
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert output.metadata.get("image/png", {}).get("alt") or cell.metadata.get("alt"), cell.source[:60]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_on_a_gpt2_shaped_model(tmp_path):
    said, peak = printed(tiny.save_gpt2_shaped(tmp_path, 256))
    assert "6 layers x 8 heads" in said and "by hand and by the library: the same, for 48 heads" in said
    assert "two layers, this seed: formed True" in said and "one layer, this seed: formed False" in said
    assert "pairs of fresh jobs" in said and "without random heads: 6 sets" in said
    for study in ("induction", "semantic", "bias", "outcomes"):
        assert f"studies/heads_{study} was not prepared for" in said
    assert "measured again" not in said and peak < 4


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_model_without_whole_words_is_asked_what_it_can_be(tmp_path):
    """Three layers, a window of 16, a tokenizer of 600 tokens that begins he and she alike, or does not."""
    said, _ = printed(tiny.save("gemma3", tmp_path))
    assert "3 layers x 6 heads" in said and "by hand and by the library: the same, for 18 heads" in said
    assert "formed True" in said
