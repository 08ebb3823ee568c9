"""The long run behind notebook 03: ``glassbox study saes`` compares the SAEs of a model and their hardest baseline.

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

from glassbox_utils.core import assets, corpora, prepared
from glassbox_utils.core.models import Model
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.statistics import bootstrap_ci
from glassbox_utils.core.studies import SEED, resumed, write_table
from glassbox_utils.saes import absorption, features, labels
from glassbox_utils.saes.config import SaeError, TrainConfig, hook_of, saes_folder
from glassbox_utils.saes.harvest import activations, harvest, measure_scaling, ordinary, shuffled_model
from glassbox_utils.saes.quality import held_out
from glassbox_utils.saes.store import load_sae, shipped
from glassbox_utils.saes.training import export, train

LETTER_ROWS, LETTER_WORDS = 64, 60
"""rows of text, and words that a letter must have in each half"""
STEPS, TOKENS = 300, 2 * 65_536
"""of a training, small since there are two: on the model and on its shuffled twin"""
FITTED_ROWS, SCANNED_ROWS = 16, 48


def budget(model: Model, hook: str, shuffle: bool) -> TrainConfig:
    """The small training, at the size of the prepared folder."""
    context, tokens = min(256, model.n_context), prepared.sized(TOKENS, 8192)
    d_sae = min(2048, 4 * model.d_model)
    return TrainConfig(
        name=f"{'shuffled' if shuffle else 'budget'}-{model.hash}",
        hook=hook,
        architecture="topk",
        d_sae=d_sae,
        samples=prepared.sized(STEPS, 60) * 2048,
        tokens=tokens,
        options={"k": min(32, max(1, d_sae // 16))},
        model=prepared.card().model,
        context=context,
        rows_per_shard=min(256, max(1, tokens // context)),
        lr=2e-3,
        decay=0.4,
        shuffle_weights=shuffle,
    )


def rows_of(model: Model, n: int) -> tuple[corpora.Rows, list[corpora.Document]]:
    """Packed rows of held-out Wikipedia leads, as long as the model reads, and their documents."""
    documents = corpora.load_corpus("wiki", "held")
    return corpora.token_rows(model, documents, n, min(256, model.n_context)), documents


def letters_of(model: Model, name: str, words: absorption.Words, minimum: int) -> list[dict[str, Any]]:
    """The first-letter test of one SAE."""
    return [asdict(report) for report in absorption.first_letter_test(load_sae(name, model), words, minimum=minimum)]


def trained_on(model: Model, hook: str, shuffle: bool) -> tuple[Any, Model]:
    """An SAE of the small budget, trained on the model or on its shuffled twin; and the model it was trained on."""
    config = budget(model, hook, shuffle)
    source = shuffled_model(model, SEED) if shuffle else model
    harvest(config.harvest, source)
    work = assets.cache_dir() / "training" / f"{config.name}-{config.tokens}-{config.samples}"
    train(config, work)
    export(config, work, work / "out", source)
    return load_sae(work / "out", source), source


def found_in(model: Model, hook: str, shuffle: bool) -> dict[str, Any]:
    """Reconstruction and one-token score of an SAE trained with the small budget."""
    sae, source = trained_on(model, hook, shuffle)
    site = features.site_of_sae(sae)
    tokens = held_out(model, budget(model, hook, shuffle), prepared.sized(FITTED_ROWS, 6))
    result: dict[str, Any] = {}
    for where, net in (("own", source), ("released", model)):
        x = activations(net, tokens, [site])[site].float()
        scaling = measure_scaling(x)
        kept = x[ordinary(x, scaling.median_norm)]
        with torch.no_grad():
            error = (sae(kept) - kept).square().sum() / (kept - kept.mean(0)).square().sum()
        result[f"explained_variance_{where}"] = round(1 - float(error), 4)
    scanned = features.scan(source, sae, *rows_of(model, prepared.sized(SCANNED_ROWS, 12)))
    names = labels.token_names(model, scanned)
    permuted = np.random.default_rng(SEED).permutation(names)
    for label, used in (("one_token", names), ("one_token_permuted", permuted)):
        scores = [score for _, score in labels.concentration(scanned, used, top=20)]
        result["n_features"], result[label] = len(scores), None
        if scores:
            mean = bootstrap_ci(scores, seed=SEED)
            result[label] = [round(v, 4) for v in (mean.value, mean.low, mean.high)]
    return result


def at_hook(hook: str) -> list[str]:
    """The SAEs that read where the main one does: those of the prepared folder, and the main one wherever it is."""
    named = {prepared.sae("main"), *shipped()}
    folders = {name: saes_folder() / name / "cfg.json" for name in named}
    settings = {n: json.loads(f.read_text(encoding="utf-8")) for n, f in folders.items() if f.exists()}
    read = {n: cfg.get("metadata", cfg).get("hook_name") for n, cfg in settings.items()}
    return sorted(n for n in named if n == prepared.sae("main") or read.get(n) == hook)


def study_saes() -> Path:
    """First letters in every SAE at the main one's place, and the shuffled-model baseline."""
    start, model = time.time(), load_subject()
    main = load_sae(prepared.sae("main"), model)
    site, hook = features.site_of_sae(main), hook_of(features.site_of_sae(main))
    n_rows, minimum = prepared.sized(LETTER_ROWS, 16), prepared.sized(LETTER_WORDS, 15)
    letters: dict[str, Any] = {}
    n_words, refused = 0, None
    try:
        words = absorption.letter_words(model, site, main.cfg.metadata.median_norm, rows_of(model, n_rows)[0], SEED)
        n_words = int((~words.train).sum())
        for name in at_hook(hook):
            card = saes_folder() / name / "card.json"
            known = json.loads(card.read_text(encoding="utf-8")) if card.exists() else model.hash
            key = ["letters", name, known, n_rows, minimum]
            letters[name] = resumed("saes", key, letters_of, model, name, words, minimum)
    except SaeError as reason:  # a tokenizer without words that begin with a letter
        refused = str(reason)
    shuffled = {}
    for which in ("released", "shuffled"):
        config = budget(model, hook, which == "shuffled")
        shuffled[which] = resumed("saes", ["found", asdict(config)], found_in, model, hook, which == "shuffled")
    sizes = {"letter_rows": n_rows, "letter_minimum": minimum, "no_letters": refused}
    seconds = time.time() - start
    return write_table("saes", model, seconds, n_words=n_words, **sizes, letters=letters, shuffled=shuffled)


STUDIES_OF_SAES = {"saes": study_saes}
