"""Units whose meanings are known, because they were made: one, several, none."""

import numpy as np
import pytest
import torch
from shards import HOOK, SITE, train_config

from glassbox_utils.core import corpora
from glassbox_utils.core.devices import result
from glassbox_utils.saes import meaning
from glassbox_utils.saes.config import SaeError
from glassbox_utils.saes.harvest import read_shard, shard_path
from glassbox_utils.saes.store import load_sae
from glassbox_utils.saes.training import export, train


@pytest.fixture(scope="module")
def model(small):
    return small


@pytest.fixture(scope="module")
def texts(model):
    rows = corpora.token_rows(model, corpora.load_corpus("landmarks"), 200, 64)
    usual = torch.ones_like(rows.tokens, dtype=torch.bool)
    usual[:, 0] = False
    return meaning.texts_of(model, rows, usual)


def frequent(texts, least=120, most=600):
    """Words that stand in many places, but not everywhere."""
    counts = np.bincount(texts.words[texts.words >= 0], minlength=len(texts.names))
    return [i for i in np.argsort(-counts) if least <= counts[i] <= most]


def firing_at(texts, words, seed=0):
    """A unit that is active wherever one of these words stands, with strengths that say nothing."""
    values = np.random.default_rng(seed).uniform(1, 2, texts.words.size)
    return np.where(np.isin(texts.words.ravel(), words) & texts.usual.ravel(), values, 0)


def scored(texts, *units):
    values = torch.from_numpy(np.stack(units, -1)).float()
    return meaning.meanings(texts, values, (values > 0).numpy())


def test_one_meaning_scores_above_several_and_several_above_none(texts):
    words = frequent(texts)
    draw = np.random.default_rng(0)
    none = np.where(draw.random(texts.words.size) < 0.02, draw.uniform(1, 2, texts.words.size), 0) * texts.usual.ravel()
    one, several, nothing = scored(texts, firing_at(texts, words[:1]), firing_at(texts, words[3:30:2]), none)
    assert one.words > 0.95 and one.one_word > 0.95 and one.words_top > 0.95 and one.sense > 0.85
    assert one.words > several.words + 0.05 and one.sense > several.sense + 0.05
    assert abs(nothing.words - 0.5) < 0.15 and abs(nothing.sense - 0.5) < 0.15
    assert one.intruder > 0.8 > 0.65 > max(several.intruder, nothing.intruder), "chance is one in five"
    assert abs(one.other - 0.5) < 0.2, "another unit's words tell nothing of this one"


def test_a_unit_that_waits_for_the_word_before_is_found_by_context_and_not_by_its_own_word(texts):
    word = frequent(texts)[0]
    before = np.zeros(texts.words.shape, bool)
    before[:, 1:] = texts.words[:, :-1] == word
    values = np.where(before.ravel() & texts.usual.ravel(), 1.0 + np.random.default_rng(1).random(before.size), 0)
    after, other = scored(texts, values, firing_at(texts, frequent(texts)[5:6]))
    assert after.words > 0.9 > after.one_word + 0.1
    assert other.words > 0.9


def test_controls_are_silent_and_as_frequent(texts):
    word = frequent(texts)[0]
    active = texts.words.ravel() == word
    like = np.flatnonzero(active & texts.test)[:10]
    found = meaning.controls(texts, active, like, texts.test, 60, np.random.default_rng(0))
    assert not active[found].any() and texts.test[found].all() and len(found) > 30
    assert np.abs(texts.frequency[found] - texts.frequency[like[0]]).max() <= 1


def test_halves_share_no_document_and_windows_stay_inside_one(texts):
    owners = texts.owners.ravel()
    assert not set(owners[texts.fit]) & set(owners[texts.test])
    places = np.flatnonzero(texts.test)[:200]
    around = meaning.window(texts, places)
    assert (around[:, meaning.BEFORE] == texts.words.ravel()[places]).all()
    for place, row in zip(places, around, strict=True):
        line, at = divmod(place, texts.words.shape[1])
        for offset, word in enumerate(row, start=at - meaning.BEFORE):
            inside = 0 <= offset < texts.words.shape[1] and texts.owners[line, offset] == texts.owners[line, at]
            assert word == (texts.words[line, offset] if inside else -1)
    chosen = meaning.one_a_document(texts, places, 50)
    assert len(set(owners[chosen])) == len(chosen)


def test_a_description_lists_the_words_that_recur(texts):
    word = frequent(texts)[0]
    places = meaning.strongest(texts, firing_at(texts, [word]), texts.fit, 20)
    shown = meaning.describe(texts, places).shown(texts)
    assert ("here", texts.names[word]) in [(slot, name) for slot, name, _ in shown]
    assert all(weight > 0 for *_, weight in shown)


def test_dense_units_are_active_as_often_as_they_should_be(texts):
    values = torch.randn(texts.words.size, 3, generator=torch.Generator().manual_seed(0))
    density = torch.tensor([0.01, 0.05, 0.2])
    active = meaning.active_like(values, density, texts.fit)
    assert np.allclose(active[texts.test].mean(0), density.numpy(), rtol=0.25)


def test_shapes_that_do_not_fit_are_refused(texts):
    with pytest.raises(SaeError, match="one row for each"):
        meaning.meanings(texts, torch.zeros(5, 2), np.zeros((5, 2), bool))


def test_all_kinds_of_units_are_measured_in_the_space_of_the_sae(model, shards, tmp_path):
    config = train_config(shards)
    train(config, tmp_path)
    export(config, tmp_path, tmp_path / "out", model)
    sae = load_sae(tmp_path / "out", model)
    x = read_shard(shard_path(shards, 0), HOOK).x[:, 1:].flatten(0, 1).float()
    rows = corpora.token_rows(model, corpora.load_corpus("landmarks", "held"), 24, 64)
    encoders = meaning.opponents(x, 6, 8, 64) | {"sae": meaning.of_sae(sae, range(6))}
    seen = meaning.see(model, SITE, rows, sae.cfg.metadata.median_norm)
    values = {name: meaning.values_of(seen, encode) for name, encode in encoders.items()}
    assert {v.shape for v in values.values()} == {(24 * 64, 6)} and not any((v < 0).any() for v in values.values())
    assert not any(v[~seen.usual.flatten()].any() for v in values.values())
    densities = dict.fromkeys(("coordinates", "pca", "random"), torch.full((6,), 0.05))
    found = meaning.compared(meaning.texts_of(model, rows, seen.usual), seen, encoders, densities)
    assert set(found) == {"coordinates", "pca", "random", "random_sae", "sae"}
    for kind in ("coordinates", "pca", "random"):
        assert len(found[kind]) >= 4 and all(0.02 < unit["density"] < 0.09 for unit in found[kind])
    assert all(0 <= unit[score] <= 1 for units in found.values() for unit in units for score in meaning.SCORES)
    assert result(sae.W_dec).shape[1] == x.shape[1]
