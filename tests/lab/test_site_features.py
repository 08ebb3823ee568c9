"""Pages about features, of an SAE whose features are known: feature i fires on token i and on nothing else."""

import html
from types import SimpleNamespace

import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from small import small_model

from glassbox_utils.core import corpora
from glassbox_utils.core.models import Site
from glassbox_utils.lab import site_features
from glassbox_utils.saes.config import hook_of

SITE = Site("resid_pre", 0)
CARD = {
    "architecture": "topk", "d_sae": 8, "hook": "blocks.0.hook_resid_pre", "command": "train it", "seed": 0,
    "metrics": {"sae": {"l0": 2.0, "explained_variance": 0.5, "explained_variance_all": 0.4}},
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture()
def found(model, monkeypatch):
    table = torch.nn.functional.normalize(model.hf.get_input_embeddings().weight.detach(), dim=-1)
    metadata = SAEMetadata(hook_name=hook_of(SITE), median_norm=1e6)
    sae = SimpleNamespace(
        W_dec=table,
        cfg=SimpleNamespace(metadata=metadata, d_sae=len(table), d_in=model.d_model),
        encode=lambda x: ((torch.nn.functional.normalize(x, dim=-1) @ table.t()) - 0.999).relu() * 1000,
    )
    documents = corpora.load_corpus("landmarks")[:150]
    monkeypatch.setattr(site_features, "load_sae", lambda name, model: sae)
    monkeypatch.setattr(site_features.corpora, "load_corpus", lambda name, split: documents)
    monkeypatch.setattr(site_features, "DRAWN", 2)
    monkeypatch.setattr(site_features, "OFTEN", 12)
    return site_features.described(model, "toy", 5, 60)


def test_some_are_drawn_without_looking_and_the_rest_are_the_best_of_the_sample(found):
    assert len(found["drawn"]) == 2 and 1 <= len(found["best"]) <= 3 and found["sample"] <= found["alive"]
    scores = [one["label"]["detection"] for one in found["best"]]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0.9
    assert not {one["feature"] for one in found["best"]} & {one["feature"] for one in found["drawn"]}


def test_a_page_says_what_was_chosen_and_shows_the_token_that_fires(model, found):
    page = site_features.page("toy", CARD, found)
    assert "## Drawn without looking" in page and "Most are less clear" in page and "0.5 is chance" in page
    for one in found["best"]:
        token = model.tokenizer.decode([one["feature"]]).strip()
        assert f"### Feature {one['feature']}" in page and html.escape(token) in page
        assert f"score {one['label']['detection']:.2f}" in page
    assert "The Golden Gate Bridge" not in page  # this card names no such feature
    assert "rgba(" not in page and "--shade:" in page


@pytest.mark.parametrize("fires", [True, False])
def test_the_bridge_has_a_section_of_sentences_that_name_it(model, found, fires):
    """``found`` sets the SAE: feature i fires on token i; one that is silent on the sentences still has its section."""
    text = " ".join(document.text for document in corpora.load_corpus("landmarks", "train"))
    read = set(model.tokenizer(text).input_ids)
    feature = model.tokenizer(" Bridge").input_ids[-1] if fires else max(set(range(len(model.tokenizer))) - read)
    one = site_features.bridge(model, "toy", feature)
    assert one["sentences"] > 0 and bool(one["texts"]) is fires and bool(one["density"]) is fires
    page = site_features.page("toy", CARD, found | {"bridge": one})
    part = page.split("## The Golden Gate Bridge")[1].split("\n## ")[0]
    assert f"### Feature {feature}" in part and "of their tokens" in part and "Label" not in part
