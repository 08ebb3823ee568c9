"""Files of SAEs: what belongs to another model is refused, what is shipped opens with plain sae_lens."""

import json

import pytest
import torch
from shards import train_config
from small import small_model

from glassbox_utils.core import corpora
from glassbox_utils.core.devices import result
from glassbox_utils.saes.config import SAES, SaeError, read_config, site_of
from glassbox_utils.saes.harvest import activations, ordinary
from glassbox_utils.saes.quality import evaluate_again
from glassbox_utils.saes.store import load_sae, shipped
from glassbox_utils.saes.training import export, train


@pytest.fixture(scope="module")
def model(small):
    return small


def test_an_sae_of_another_model_is_refused(model, shards, tmp_path):
    config = train_config(shards, samples=64 * 2)
    train(config, tmp_path)
    export(config, tmp_path, tmp_path / "out", model)
    with pytest.raises(SaeError, match=f"hash {model.hash}"):
        load_sae(tmp_path / "out", small_model(seed=1))
    for function in (load_sae, evaluate_again):
        with pytest.raises(SaeError, match="no SAE 'nothing'"):
            function("nothing")


@pytest.mark.parametrize("name", shipped())
def test_shipped_saes_open_with_plain_sae_lens(name, smol):
    from sae_lens import SAE

    folder = SAES / name
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 25e6
    plain, card = SAE.load_from_disk(folder), json.loads((folder / "card.json").read_text())
    assert plain.cfg.d_sae == card["d_sae"] and plain.W_dec.dtype == torch.float16
    assert plain.cfg.metadata.model_hash == smol.hash == card["model_hash"]
    config = read_config(folder)
    assert config.samples // config.batch == card["steps"]
    # What the card says holds on fresh passes: a few held-out rows, by sae_lens's own forward.
    tokens = corpora.token_rows(smol, corpora.load_corpus("wiki", "held"), 6, config.context).tokens
    x = result(activations(smol, tokens, [site_of(config.hook)])[site_of(config.hook)])
    usual = ordinary(x, plain.cfg.metadata.median_norm)
    rebuilt = load_sae(name, smol)(x)[usual]
    ev = 1 - (rebuilt - x[usual]).square().sum() / (x[usual] - x[usual].mean(0)).square().sum()
    assert float(ev) == pytest.approx(card["wiki_held_out"]["explained_variance"], abs=0.03)
