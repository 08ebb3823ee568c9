"""One layer or many at equal price: the study on a tiny model, and what its table says."""

import json

import numpy as np
import pytest
import tiny

from glassbox_utils.core import assets, models, prepared
from glassbox_utils.steering import fit_figures, layer_study, study


def row(vector, alpha, kl, effects, perplexity=1.0):
    return {"vector": vector, "alpha": alpha, "kl": kl, "perplexity": perplexity, "minus": [0.0, 0.0], "plus": effects}


def test_effects_are_read_at_the_same_price_between_strengths():
    one = [row("layer 9", 0.0, 0.0, [0.0, 0.0]), row("layer 9", 0.1, 0.2, [0.4, 0.8], 3.0)]
    many = [row(fit_figures.MANY, a, kl, [e, e]) for a, kl, e in ((0.0, 0.0, 0.0), (0.01, 0.1, 0.5), (0.02, 0.3, 0.7))]
    table = {"rows": many + one}
    effect, perplexity = fit_figures.at_price(table, "layer 9", 0.1)
    assert effect.tolist() == pytest.approx([0.2, 0.4]) and perplexity == pytest.approx(2.0)
    assert fit_figures.behind(table, "layer 9", 0.1).value == pytest.approx(0.2)
    shown = fit_figures.alone_table(table)
    assert list(shown.index) == [fit_figures.MANY, "layer 9"]
    assert shown.loc["layer 9", "effect at 0.10 nats"] == "0.30"
    assert shown.loc["layer 9", "effect at 0.30 nats"] == "not reached"


@pytest.mark.timeout(120)
def test_the_study_runs_on_a_tiny_model(tmp_path, monkeypatch):
    tiny.save("llama", tmp_path / "model")
    model = models.load_model(tmp_path / "model")
    prepared.write_card(prepared.Card(str(tmp_path / "model"), model.hash, "mine", size=0.05), tmp_path / "made")
    monkeypatch.setattr(assets, "cache_dir", lambda: tmp_path / "cache")
    with prepared.using(tmp_path / "made"):
        asked = study.selection_prompts()
        rows = json.loads(layer_study.study_alone().read_text())["rows"]
    assert rows[0]["vector"] == fit_figures.MANY and len({r["vector"] for r in rows}) > 1
    for found in rows:
        assert len(found["minus"]) == len(found["plus"]) == len(asked)
        assert found["alpha"] or (found["kl"] == 0 and np.array_equal(found["minus"], found["plus"]))
