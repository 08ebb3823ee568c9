"""Features of an SAE whose features are known, because they were put there."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sae_lens.saes.sae import SAEMetadata
from small import small_model

from glassbox_utils.core import corpora
from glassbox_utils.core.corpora import Document
from glassbox_utils.core.devices import beside, result
from glassbox_utils.core.models import Site
from glassbox_utils.saes import dashboard, detection, features, labels
from glassbox_utils.saes.config import hook_of
from glassbox_utils.saes.features import FeatureError

SITE = Site("resid_pre", 0)


class TokenSae:
    """Feature i fires exactly on token i: the residual stream before layer 0 is the embedding."""

    def __init__(self, model, gain=1.0):
        self.table = torch.nn.functional.normalize(model.hf.get_input_embeddings().weight.detach(), dim=-1)
        self.W_dec = self.table
        metadata = SAEMetadata(hook_name=hook_of(SITE), median_norm=1e6)
        self.cfg = SimpleNamespace(metadata=metadata, d_sae=len(self.table), d_in=model.d_model)

    def encode(self, x):
        return ((torch.nn.functional.normalize(x, dim=-1) @ self.table.t()) - 0.999).relu() * 1000


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def sae(model):
    return TokenSae(model)


@pytest.fixture(scope="module")
def scanned(model, sae):
    documents = corpora.load_corpus("landmarks")[:150]
    return features.scan(model, sae, corpora.token_rows(model, documents, context=32), documents)


def common_token(scanned, rank=0):
    counts = torch.bincount(scanned.rows.tokens[:, 1:].flatten())
    counts[0] = 0
    return int(counts.argsort(descending=True)[rank])


def test_a_scan_knows_where_each_feature_fires(scanned):
    token = common_token(scanned)
    expected = scanned.rows.tokens == token
    expected[:, 0] = False
    assert torch.equal(features.dense(scanned, token) > 0, expected)
    assert float(scanned.density[token]) == pytest.approx(float(expected.sum() / scanned.usual.sum()))
    with pytest.raises(FeatureError, match=r"no feature 999999\. Allowed: 0 to"):
        features.dense(scanned, 999_999)


def test_examples_name_their_source(model, scanned):
    token = common_token(scanned)
    found = features.examples(model, scanned, token, n=5)
    assert 1 <= len(found) <= 5
    for example in found:
        assert example.tokens[example.peak] == model.tokenizer.decode([token])
        assert example.values[example.peak] > 0
        assert (example.source, example.licence) == ("landmarks", "Apache-2.0")
    silent = int((scanned.density == 0).nonzero()[0])
    with pytest.raises(FeatureError, match=f"Feature {silent} never fires"):
        features.examples(model, scanned, silent)


def test_labels_find_the_token_and_detect_it_elsewhere(model, scanned):
    token = common_token(scanned, rank=5)
    found = labels.label(model, scanned, token)
    assert found is not None and found.kind == "token"
    assert found.text == model.tokenizer.decode([token]).strip().lower()
    assert found.p_value < 0.01 and found.detection > 0.9
    assert labels.find_label([found], found.text) == [found]


def test_a_feature_without_pattern_gets_no_label(model, scanned):
    generator = torch.Generator().manual_seed(0)
    where = scanned.usual.flatten().nonzero()[:, 0]
    chosen = where[torch.randperm(len(where), generator=generator)[:200]].sort().values
    starts = torch.tensor([0, len(chosen)])
    noise = features.Scan(
        scanned.rows, scanned.documents, torch.zeros(200).long(), chosen, torch.ones(200), starts, scanned.usual
    )
    assert labels.label(model, noise, 0) is None


def test_search_finds_the_word_that_differs(model, sae):
    here = ["the bridge is red.", "a bridge over the river.", "the old bridge."]
    there = ["the tower is red.", "a tower over the river.", "the old tower."]
    hits = detection.search(model, sae, here, there, n=3)
    assert hits[0].auc == 1 and hits[0].mean_here > hits[0].mean_there == 0
    ids = set(model.tokenizer(" bridge", add_special_tokens=False)["input_ids"])
    assert hits[0].feature in ids


def test_detectors_are_fixed_before_they_are_tested(model, sae):
    positive = torch.tensor([[0.0, 3.0], [0.5, 2.0]])
    negative = torch.tensor([[0.4, 0.0], [0.0, 1.0]])
    feature, threshold, f1 = detection.choose_detector(positive, negative)
    assert (feature, threshold, f1) == (1, 1.5, 1.0)
    ids = model.tokenizer(" bridge", add_special_tokens=False)["input_ids"]
    result = detection.detect(model, sae, ids[-1], 0.1, ["the bridge.", "the tower."], ["a bridge.", "a dog."])
    assert (result.precision, result.recall) == (0.5, 0.5)
    assert result.false_alarms == ("a bridge.",) and result.missed == ("the tower.",)


def test_neighbours_and_logits(model, sae):
    token = 300
    near = features.neighbours(sae, token, 3)
    assert len(near) == 3 and token not in [f for f, _ in near]
    assert near[0][1] >= near[1][1] >= near[2][1]
    effect = features.logit_effect(model, sae, token, 5)
    direction = sae.W_dec[token] * model.hf.model.norm.weight
    logits = (model.hf.lm_head.weight @ direction).detach()
    assert effect.up[0][0] == model.tokenizer.decode([int(logits.argmax())])
    assert effect.down[0][1] == pytest.approx(float(logits.min() - logits.mean()), abs=1e-4)


def test_concentration_beats_its_control(model, scanned):
    names = labels.token_names(model, scanned)
    real = dict(labels.concentration(scanned, names))
    control = dict(labels.concentration(scanned, np.random.default_rng(0).permutation(names)))
    assert real.keys() == control.keys() and min(real.values()) == 1
    assert np.mean(list(control.values())) < 0.5


def test_pages_escape_what_they_show(model, sae, tmp_path):
    documents = [Document("<script>alert(1)</script> the bridge and the tower. " * 3, "s<b>", "l&l")] * 20
    scanned = features.scan(model, sae, corpora.token_rows(model, documents, context=32), documents)
    token = common_token(scanned)
    [path] = dashboard.write_dashboards(model, sae, scanned, [token], tmp_path)
    page = path.read_text()
    assert "<script>" not in page and "<b>" not in page and "Nearest decoder rows" in page


def test_neurons_are_scanned_like_features(model, scanned):
    neurons = features.scan_neurons(model, 1, scanned.rows, scanned.documents, scanned.usual)
    assert neurons.d_sae == 64
    seen = []
    handle = model.hf.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, a: seen.append(result(a[0])))
    with torch.no_grad():
        model.hf(beside(scanned.rows.tokens[:8], model.device))
    handle.remove()
    expected = (seen[0][..., 5].relu() * scanned.usual[:8]).detach()
    torch.testing.assert_close(features.dense(neurons, 5)[:8], expected, atol=1e-4, rtol=1e-3)


def test_unmix_names_the_features_behind_a_mixed_unit():
    rows = corpora.Rows(torch.zeros(1, 40, dtype=torch.long), torch.zeros(1, 40, dtype=torch.long))

    def scanned(active):  # feature -> positions
        features_ = torch.tensor([f for f, ps in active.items() for _ in ps])
        positions = torch.tensor([p for ps in active.values() for p in ps])
        starts = torch.zeros(4, dtype=torch.long)
        starts[1:] = torch.bincount(features_, minlength=3).cumsum(0)
        usual = torch.ones(1, 40, dtype=torch.bool)
        return features.Scan(rows, [], features_, positions, torch.ones(len(positions)), starts, usual)

    unit = scanned({0: list(range(10)), 1: [1, 2]})
    parts = scanned({0: list(range(6)), 1: [6, 7, 8, 9], 2: list(range(40))})
    found = dict(labels.unmix(unit, parts, top=10, rare=0.5))
    assert list(found) == [0]  # unit 1 is too rare
    assert [(g.feature, sorted(g.positions)) for g in found[0]] == [(0, list(range(6))), (1, [6, 7, 8, 9])]
