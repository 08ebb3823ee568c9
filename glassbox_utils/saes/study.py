"""The long run behind notebook 03: ``glassbox study saes`` compares the shipped SAEs and their hardest baseline.

What each SAE reconstructs stands in its card (``glassbox train-sae`` measures it). Here: whether concepts are split or
absorbed, and what an SAE finds in a model that has learnt nothing.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassbox_utils.core import assets, corpora
from glassbox_utils.core.models import Model, load_model
from glassbox_utils.core.statistics import bootstrap_ci
from glassbox_utils.core.studies import SEED, resumed, write_table
from glassbox_utils.saes import absorption, features, labels
from glassbox_utils.saes.config import SAES, TrainConfig, read_config, site_of
from glassbox_utils.saes.harvest import activations, harvest, measure_scaling, ordinary, shuffled_model
from glassbox_utils.saes.quality import held_out
from glassbox_utils.saes.store import load_sae, shipped
from glassbox_utils.saes.training import export, train

LETTER_ROWS = 64
BUDGET = TrainConfig(
    name="budget",
    hook="blocks.14.hook_resid_post",
    architecture="topk",
    d_sae=2048,
    samples=300 * 2048,
    tokens=2 * 65_536,
    options={"k": 32},
    lr=2e-3,
    decay=0.4,
)
"""small, since it is trained twice: on the model and on its shuffled twin"""


def letters_of(name: str, words: absorption.Words) -> list[dict[str, Any]]:
    """The first-letter test of one shipped SAE."""
    return [asdict(report) for report in absorption.first_letter_test(load_sae(name), words)]


def trained_on(model: Model, shuffle: bool) -> tuple[Any, Model]:
    """An SAE of the small budget, trained on the model or on its shuffled twin; and the model it was trained on."""
    config = TrainConfig(**{**asdict(BUDGET), "name": "shuffled" if shuffle else "budget", "shuffle_weights": shuffle})
    source = shuffled_model(model, SEED) if shuffle else model
    harvest(config.harvest, source)
    work = assets.cache_dir() / "training" / config.name
    train(config, work)
    export(config, work, work / "out", source)
    return load_sae(work / "out", source), source


def found_in(model: Model, shuffle: bool) -> dict[str, Any]:
    """Reconstruction and one-token score of an SAE trained with the small budget."""
    sae, source = trained_on(model, shuffle)
    site = features.site_of_sae(sae)
    config = TrainConfig(**asdict(BUDGET))
    tokens = held_out(model, config, 16)
    result: dict[str, Any] = {}
    for where, net in (("own", source), ("released", model)):
        x = activations(net, tokens, [site])[site].float()
        scaling = measure_scaling(x)
        kept = x[ordinary(x, scaling.median_norm)]
        with torch.no_grad():
            error = (sae(kept) - kept).square().sum() / (kept - kept.mean(0)).square().sum()
        result[f"explained_variance_{where}"] = round(1 - float(error), 4)
    documents = corpora.load_corpus("wiki", "held")
    scanned = features.scan(source, sae, corpora.token_rows(model, documents, 48), documents)
    names = labels.token_names(model, scanned)
    permuted = np.random.default_rng(SEED).permutation(names)
    for label, used in (("one_token", names), ("one_token_permuted", permuted)):
        scores = [score for _, score in labels.concentration(scanned, used, top=20)]
        mean = bootstrap_ci(scores, seed=SEED)
        result[label] = [round(v, 4) for v in (mean.value, mean.low, mean.high)]
        result["n_features"] = len(scores)
    return result


def study_saes() -> Path:
    """First letters in every shipped SAE at mid depth, and the shuffled-model baseline."""
    start, model = time.time(), load_model()
    names = [n for n in shipped() if read_config(SAES / n).hook == BUDGET.hook]
    site = site_of(BUDGET.hook)
    median = load_sae(names[0], model).cfg.metadata.median_norm
    rows = corpora.token_rows(model, corpora.load_corpus("wiki", "held"), LETTER_ROWS)
    words = absorption.letter_words(model, site, median, rows, SEED)
    letters = {}
    for name in names:
        card = json.loads((SAES / name / "card.json").read_text(encoding="utf-8"))
        letters[name] = resumed("saes", ["letters", name, card, LETTER_ROWS], letters_of, name, words)
    key = [asdict(BUDGET), model.hash]
    shuffled = {
        which: resumed("saes", ["found", which, *key], found_in, model, which == "shuffled")
        for which in ("released", "shuffled")
    }
    n_words = int((~words.train).sum())
    return write_table("saes", model, time.time() - start, n_words=n_words, letters=letters, shuffled=shuffled)


STUDIES_OF_SAES = {"saes": study_saes}
