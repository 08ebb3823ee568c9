"""Metrics at their ends, baselines that must lose, and sae_lens's own evaluation to the same numbers."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from shards import HOOK, SITE

from glassbox_utils.core import corpora
from glassbox_utils.core.devices import beside
from glassbox_utils.core.text import tokenize
from glassbox_utils.saes import detection
from glassbox_utils.saes.config import saes_folder, site_of
from glassbox_utils.saes.harvest import activations, measure_scaling, ordinary, read_shard, shard_path
from glassbox_utils.saes.quality import baselines, evaluate_sae, write_readme
from glassbox_utils.saes.store import shipped


@pytest.fixture(scope="module")
def model(small):
    return small


class Exact:
    """Loses nothing."""

    def encode(self, x):
        return x

    def decode(self, code):
        return code


class Nothing(Exact):
    """Explains nothing: the mean, whatever comes in."""

    def __init__(self, mean):
        self.mean = mean

    def decode(self, code):
        return beside(self.mean, code).expand_as(code)


def test_metrics_at_their_ends(model, shards):
    scaling = measure_scaling(read_shard(shard_path(shards, 0), HOOK).x)
    tokens = corpora.token_rows(model, corpora.load_corpus("landmarks", "held"), 8, 32).tokens
    measure = (tokens, SITE, scaling.median_norm, scaling.mean, 8)
    best = evaluate_sae(model, Exact(), *measure)
    assert best.explained_variance == pytest.approx(1) and best.recovered_mean == pytest.approx(1, abs=1e-4)
    assert best.recovered_all == pytest.approx(1, abs=1e-4)
    assert best.kl == pytest.approx(0, abs=1e-5) and best.l0 == model.d_model
    worst = evaluate_sae(model, Nothing(scaling.mean), *measure)
    assert worst.explained_variance == pytest.approx(0, abs=1e-4)
    assert worst.recovered_mean == pytest.approx(0, abs=1e-4)
    assert worst.ce_mean == pytest.approx(best.ce_mean) and worst.relative_norm == pytest.approx(0, abs=1e-4)


def test_pca_beats_random_directions(model, shards):
    x = read_shard(shard_path(shards, 0), HOOK).x
    scaling = measure_scaling(x)
    sample = x[ordinary(x, scaling.median_norm)].float()
    both = baselines(sample, 8, 64)
    errors = {name: (code.decode(code.encode(sample)) - sample).square().sum() for name, code in both.items()}
    assert errors["pca"] < errors["random"] < (sample - sample.mean(0)).square().sum()


@pytest.mark.parametrize("name", ["topk-2048-l14", "own-8192-l14"])
def test_sae_lens_evaluates_a_shipped_sae_to_our_numbers(smol, name):
    """Its own evaluation knows no outliers, so on rows whose only one is the first token both must say the same."""
    from sae_lens import SAE
    from sae_lens.evals import get_recons_loss, get_sparsity_and_variance_metrics
    from sae_lens.training.activation_scaler import ActivationScaler

    plain = SAE.load_from_disk(saes_folder() / name, dtype="float32")
    hook, median = plain.cfg.metadata.hook_name, plain.cfg.metadata.median_norm
    site = site_of(hook)
    documents = corpora.load_corpus("wiki", "held", 60)
    ids = [tokenize(smol, d.text).input_ids[0] for d in documents]
    rows = torch.stack([i[:96] for i in ids if len(i) >= 96])
    x = activations(smol, rows, [site])[site]
    tokens = rows[ordinary(x, median)[:, 1:].all(1)][:8]
    assert len(tokens) == 8
    x = activations(smol, tokens, [site])[site]
    ours = evaluate_sae(smol, plain, tokens, site, median, x[:, 1:].flatten(0, 1).mean(0), ce_rows=8)

    first = [int(tokens[0, 0])]
    scaler = ActivationScaler()
    theirs = get_recons_loss(
        plain, smol.bridge, scaler, tokens, compute_kl=True, compute_ce_loss=True, ignore_tokens=first
    )
    assert float(theirs["ce_loss_without_sae"].mean()) == pytest.approx(ours.ce, abs=1e-3)
    assert float(theirs["ce_loss_with_sae"].mean()) == pytest.approx(ours.ce_spliced, abs=2e-3)
    assert float(theirs["kl_div_with_sae"][:, :-1].mean()) == pytest.approx(ours.kl, abs=2e-3)
    store = SimpleNamespace(get_batch_tokens=lambda _: tokens)
    wanted = {f"compute_{what}": True for what in ("l2_norms", "sparsity_metrics", "variance_metrics")}
    found, _ = get_sparsity_and_variance_metrics(
        plain, smol.bridge, store, scaler, 1, compute_featurewise_density_statistics=False, eval_batch_size_prompts=8,
        model_kwargs={}, ignore_tokens=first, **wanted,
    )  # fmt: skip
    assert found["l0"] == pytest.approx(ours.l0)
    assert found["explained_variance"] == pytest.approx(ours.explained_variance, abs=1e-3)


@pytest.mark.parametrize("name", shipped())
def test_a_readme_is_what_the_card_says(name, tmp_path):
    for part in ("card.json", "config.yaml"):
        shutil.copy(saes_folder() / name / part, tmp_path)
    write_readme(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text == (saes_folder() / name / "README.md").read_text()
    assert "with reconstructions at all positions" in text and "Left out in training" in text
    assert "**Planted:**" in text and "on 7 of 7 (1.00 [0.59, 1.00])" in text


def test_an_older_card_gets_what_follows_from_its_numbers(tmp_path):
    for part in ("card.json", "config.yaml"):
        shutil.copy(saes_folder() / "topk-2048-l14" / part, tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    assert "recovered_all" not in card["metrics"]["sae"] and "not_trained_on" not in card
    del card["golden_gate"]
    (tmp_path / "card.json").write_text(json.dumps(card))
    write_readme(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| the same with reconstructions at all positions | 0.698 | 0.390 | -0.248 |" in text
    assert "Left out in training: first token; residual norm above 3.0" in text and "Planted" not in text


def test_a_sentence_of_two_sources_counts_once():
    beginning = "The Golden Gate Bridge is a suspension bridge spanning the Golden Gate, the strait"
    found = [SimpleNamespace(text=text) for text in (beginning + " in California.", "Another.", beginning + ".")]
    assert detection._once(found) == [beginning + " in California.", "Another."]
