"""Every study of the heads on a model that nobody has seen, at the smallest size: a table, or a refusal in words."""

import csv
import math

import numpy as np
import pytest
import tiny
import torch

from glassbox_utils.attention import attribution, study
from glassbox_utils.core import prepared, studies
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import load_model, wrap_model
from glassbox_utils.core.studies import read_table, table_path
from glassbox_utils.core.text import padded

LAYERS, HEADS = 6, 8


def prepare(model, folder, monkeypatch):
    """A prepared folder without anything in it but its card; no part is taken from an earlier run."""
    monkeypatch.setattr(studies.assets, "cache_dir", lambda: folder / "cache")
    prepared.write_card(prepared.Card(str(folder), model.hash, size=0.01), folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_study_of_the_heads_runs_on_a_gpt2_shaped_model(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "LEAST", study.Size(3, 2, 2, 2, 60, 2, 8, 8, 24, 3, 4, 1, 1, 6, 4))  # no statistics here
    model = load_model(tiny.save_gpt2_shaped(tmp_path, 256, 6.0))
    with prepared.using(prepare(model, tmp_path, monkeypatch)):
        for name, work in study.STUDIES_OF_HEADS.items():
            assert work().exists(), name
        maps = read_table("heads_induction")
        assert np.shape(maps["maps"]["induction"]["mean"]) == (LAYERS, HEADS)
        assert maps["provenance"]["model_hash"] == model.hash and maps["provenance"]["size"] == 0.01
        assert maps["maps"]["size"]["rows"] == study.LEAST.rows < study.FULL.rows
        bias, after = read_table("heads_bias"), read_table("heads_winobias")
        assert len(bias["acts"]["gap"]) == len(after["pronoun_gap"][0]) == study.LEAST.units
        assert {len(s) for name, s in after["sets"].items() if name != "none"} == {study.K}
        with open(tmp_path / "heads" / "heads.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == LAYERS * HEADS and all(math.isfinite(float(v)) for row in rows for v in row.values())
        assert study.stored("heads_bias", model) == bias


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_that_cannot_be_measured_so_is_refused_in_words(tmp_path, capsys, monkeypatch):
    model = load_model(tiny.save("gemma3", tmp_path))  # three layers, a window of 16, 600 tokens: no word is whole
    with prepared.using(prepare(model, tmp_path, monkeypatch)):
        for name, work in study.STUDIES_OF_HEADS.items():
            try:
                assert work().exists(), name
            except GlassboxError as reason:
                assert len(str(reason)) > 40 and "\n\n" not in str(reason), name
        assert table_path("heads_induction").exists()
        assert study.attempt("semantic", model) is None
    assert "not measured on" in capsys.readouterr().out


def test_sizes_shrink_with_the_prepared_folder(tmp_path):
    assert study.size_here() == study.FULL
    prepared.write_card(prepared.Card("a model", "0" * 16, size=0.5), tmp_path)
    with prepared.using(tmp_path):
        half = study.size_here()
    assert half.rows == 50 and half.units == 18 and half.receivers == 3
    assert half.text_tokens == study.FULL.text_tokens, "as long as they were: only fewer"


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_few_logits_are_those_of_all(kind):
    """The metric of an answer needs two columns of the unembedding: the effects are the same, and it is whole again."""
    model = wrap_model(tiny.build(kind), tiny.tokenizer(), kind)
    batch = padded(model, torch.randint(5, 300, (3, 9)).tolist())
    metric = attribution.logit_difference(torch.tensor([7, 8, 7]), torch.tensor([9, 7, 11]))
    means = study.head_means(model, [batch])
    for work in (attribution.replace_each_head, attribution.replace_each_head_at_the_end):
        few = work(model, batch, means, metric)
        every = work(model, batch, means, lambda logits: metric(logits))
        assert torch.allclose(few.base, every.base, atol=1e-4), work.__name__
        assert torch.allclose(few.replaced, every.replaced, atol=1e-4), work.__name__
    with pytest.raises(RuntimeError), attribution.few_logits(model, metric):
        raise RuntimeError
    with torch.no_grad():
        assert attribution.last_logits(model, batch).shape == (3, len(model.tokenizer))
