"""Every study of the heads on a model that nobody has seen, at the smallest size: a table, or a refusal in words."""

import csv
import math

import numpy as np
import pytest
import tiny
import torch

from glassbox_utils.attention import attribution, heads, heads_figures, outcomes_study, study
from glassbox_utils.attention.ablation import head_means
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


SMALL = study.Size(
    rows=3, select_rows=2, ablation_rows=2, texts=2, text_tokens=60, path_rows=2, lists=8, preferences=8, swaps=24,
    referents=3, units=4, receivers=2, draws=2, schemas=6, winobias=4, stereoset=12,
)  # fmt: skip
"""no statistics here"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_study_of_the_heads_runs_on_a_gpt2_shaped_model(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "LEAST", SMALL)
    model = load_model(tiny.save_gpt2_shaped(tmp_path, 256, 6.0))
    with prepared.using(prepare(model, tmp_path, monkeypatch)):
        for name, work in outcomes_study.STUDIES_OF_HEADS.items():
            assert work().exists(), name
        table = read_table("heads_induction")
        maps = table["maps"]
        assert np.shape(maps["induction"]["mean"]) == (LAYERS, HEADS) and maps["group_size"] == [1] * LAYERS
        assert table["provenance"]["model_hash"] == model.hash and table["provenance"]["size"] == 0.01
        assert maps["size"]["rows"] == SMALL.rows < study.FULL.rows
        assert len(table["curve"]["random"]) == len(table["curve"]["matched"]) == SMALL.draws
        bias, after = read_table("heads_bias"), read_table("heads_outcomes")
        crossed = read_table("heads_crossed")
        parts = crossed["looks"]["report"]
        assert np.shape(parts["parts"]) == (len(parts["men"]) + len(parts["women"]), LAYERS, HEADS)
        assert np.shape(crossed["winobias 2"]["values"]) == (3, len(crossed["winobias 2"]["other"]))
        assert len(bias["acts"]["gap"]) == 2 * SMALL.units and len(after["outcomes"]["report"][0]) == 4
        maps = [bias["looks"]["report"], bias["looks"]["winobias_test"], bias["acts"]["ablation"]]
        maps += [bias["refers"]["report"]["effect"], read_table("heads_semantic")["report"]]
        for found in maps:  # every map of cases that share something says how much of it there is
            assert all(2 <= k <= found["n"] for k in found["clusters"]) and np.shape(found["q"]) == (LAYERS, HEADS)
        found = {name: {tuple(h) for h in members} for name, members in after["sets"].items()}
        chosen = set().union(*(members for name, members in found.items() if not name.startswith("random")))
        drawn = {name: members for name, members in found.items() if name.startswith("random")}
        assert {len(s) for name, s in found.items() if name != "none"} == {outcomes_study.K} and len(drawn) == 4
        assert not any(members & chosen for members in drawn.values()), "a control holds what it excludes"
        for name in outcomes_study.UNITS:
            values = after["outcomes"][name]
            values = np.array(values["values"] if isinstance(values, dict) else values)
            assert len(values) == len(found) and np.isfinite(values).all(), name
        with open(tmp_path / "heads" / "heads.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == LAYERS * HEADS and all(math.isfinite(float(v)) for row in rows for v in row.values())
        assert study.stored("heads_bias", model) == bias
        for figure in (heads_figures.outcomes(after), heads_figures.leaning(after)):
            assert figure.get_suptitle()
        assert "nats a repeated token" in heads_figures.ablations(table["curve"]).get_suptitle()
        assert len(heads_figures.senders(table["paths"]).axes) == len(table["paths"]["reports"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_that_cannot_be_measured_so_is_refused_in_words(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "LEAST", SMALL)
    model = load_model(tiny.save("gemma3", tmp_path))  # three layers, a window of 16, 600 tokens: no word is whole
    with prepared.using(prepare(model, tmp_path, monkeypatch)):
        for name, work in outcomes_study.STUDIES_OF_HEADS.items():
            try:
                assert work().exists(), name
            except GlassboxError as reason:
                assert len(str(reason)) > 40 and "\n\n" not in str(reason), name
        assert table_path("heads_induction").exists()
        assert study.attempt(study.semantic_content, model) is None
    assert "Not measured on this model" in capsys.readouterr().out


def test_key_heads_are_named_by_their_query_heads(monkeypatch):
    monkeypatch.setattr(heads, "group_size", lambda model, layer: 3)
    found = study.key_heads(None, [(18, 6), (17, 3), (17, 5), (18, 7)])
    assert found == [(18, 2, [(18, 6), (18, 7)]), (17, 1, [(17, 3), (17, 5)])]


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
    means = head_means(model, [batch])
    for work in (attribution.replace_each_head, attribution.replace_each_head_at_the_end):
        few = work(model, batch, means, metric)
        every = work(model, batch, means, lambda logits: metric(logits))
        assert torch.allclose(few.base, every.base, atol=1e-4), work.__name__
        assert torch.allclose(few.replaced, every.replaced, atol=1e-4), work.__name__
    with pytest.raises(RuntimeError), attribution.few_logits(model, metric):
        raise RuntimeError
    with torch.no_grad():
        assert attribution.last_logits(model, batch).shape == (3, len(model.tokenizer))
