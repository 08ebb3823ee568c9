"""Heads for meaning, stereotypes and repetition: the scores on a small model with real words (and on any device)."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from glassbox_utils.attention import attribution, bias, heads, induction, prompts, semantic
from glassbox_utils.attention.ablation import head_means
from glassbox_utils.core.devices import result
from glassbox_utils.core.models import load_model
from glassbox_utils.core.text import tokenize


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A random GPT-2 with the embedded model's tokenizer."""
    return load_model(tiny.save_gpt2_shaped(tmp_path_factory.mktemp("words"), 128, 6.0))


def test_an_attention_gap_turns_round_with_the_roles(words):
    pairs = bias.swaps("report")[:4]
    gap = bias.attention_gap(words, pairs)
    turned = [replace(p, male=p.female, female=p.male) for p in pairs]
    assert gap.shape == (4, words.n_layers, words.n_heads) and gap.abs().max() > 1e-4
    assert torch.allclose(bias.attention_gap(words, turned), -gap, atol=1e-6)
    schemas = bias.winobias(1, "dev")[:6]
    assert bias.winobias_gap(words, schemas).isfinite().all()


def test_what_cases_share_is_known_in_the_order_of_the_cases(words):
    pairs = bias.swaps("fresh")[::7]
    jobs = bias.job_pairs(pairs)
    means = bias.by_occupations(torch.tensor([[float(len(p.male)), float(len(p.female))] for p in pairs]), pairs)
    assert means.tolist() == [[len(male), len(female)] for male, female in jobs] and len(set(jobs)) == len(jobs)
    choice = bias.pronoun_choice(words, "fresh", 36)
    job, template = bias.of_units(choice)
    texts = [t for t, male in zip(choice.texts, choice.is_male, strict=True) if male]
    content = heads.read_prompts("occupations")
    expected = [
        content["fresh_templates"][t].format(a=content["male"]["fresh"][j]) for j, t in zip(job, template, strict=True)
    ]
    assert texts == expected
    lists = semantic.word_lists(words, "report", 9)
    assert lists.category == semantic.categories(words, "report", 9)
    schemas = bias.winobias(1, "dev")
    kept = [s for *_, s in bias.until_pronoun(schemas)]
    assert 0 < len(kept) < len(schemas) and len(bias.winobias_gap(words, kept[:4])) == 4


def test_first_order_patching_is_near_the_exact_one_in_rank(words):
    pairs = bias.swaps("report")[:3]
    total, exact = bias.referent_patching(words, pairs, "exact")
    again, guess = bias.referent_patching(words, pairs, "gradient")
    assert torch.allclose(total, again, atol=1e-5) and exact.shape == guess.shape
    assert np.corrcoef(exact.flatten(), guess.flatten())[0, 1] > 0.5


def test_pronoun_measures_agree_with_each_other(words):
    choice = bias.pronoun_choice(words, "report")
    assert len(choice.texts) == len(choice.is_male) == choice.batch.input_ids.shape[0]
    gap, lost, direct = bias.pronoun_effects(words, "report", layers=[1])
    sets = bias.pronoun_gap(words, [[], [(1, 2)]], "report")
    assert np.allclose(sets[0], gap, atol=1e-4) and np.allclose(sets[0] - sets[1], lost[:, 1, 2], atol=1e-4)
    assert np.isfinite(direct[:, 1]).all() and bias.pronoun_effects_guessed(words, "report").shape == lost.shape


def test_a_preference_without_ablation_is_the_difference_of_two_losses(words):
    schemas = bias.winobias(2, "dev")[:3]
    reference = head_means(words, [tokenize(words, [s.pro for s in schemas])])
    rows = bias.winobias_preference(words, schemas, [[], [(0, 1)]], reference)
    turned = [replace(s, pro=s.anti, anti=s.pro) for s in schemas]
    assert rows.shape == (2, 3) and np.allclose(
        bias.winobias_preference(words, turned, [[]], reference)[0], -rows[0], atol=1e-4
    )


def test_word_lists_and_their_twins_differ_in_one_word(words):
    lists = semantic.word_lists(words, "report", 6)
    same, other = result(lists.same.input_ids), result(lists.control.input_ids)
    assert ((same != other).sum(1) == 1).all()
    scores = semantic.semantic_scores(words, lists)
    assert scores.shape == (6, words.n_layers, words.n_heads) and scores.isfinite().all()
    looked = heads.attend(words, lists.same, torch.full((6,), same.shape[1] - 1), lists.position[:, None])
    assert looked.shape == (6, words.n_layers, words.n_heads, 1) and ((looked >= 0) & (looked <= 1)).all()
    preference = semantic.category_preference(words, "report", [[], [(1, 1)]], n=4)
    assert preference.shape == (2, 4) and not torch.equal(
        torch.as_tensor(preference[0]), torch.as_tensor(preference[1])
    )


def test_natural_repeats_repeat_and_context_is_scored(words):
    ids = result(induction.natural_repeats(words, 3, 20).input_ids)
    assert torch.equal(ids[:, -20:], ids[:, -40:-20])
    scores, losses = induction.in_context_score(words, [[], [(0, 0)]], n=3, tokens=80)
    assert scores.shape == losses.shape == (2, 3)


def test_decisive_prompts_are_measured_where_they_say(words):
    chosen = prompts.measurable(words, prompts.decisive_prompts("agreement", "report", 6))
    batch = prompts.to_batch(words, chosen)
    assert len(batch.texts) == len(chosen) > 0
    for row, prompt in zip(range(len(chosen)), chosen, strict=True):
        token = result(batch.batch.input_ids)[row, batch.decisive[row]]
        assert words.tokenizer.decode([int(token)]).strip() in prompt.decisive
    metric = attribution.logit_difference(batch.answer, batch.foil)
    means = head_means(words, [batch.batch])
    fast = attribution.replace_each_head_at_the_end(words, batch.batch, means, metric, layers=[2])
    full = attribution.replace_each_head(words, batch.batch, means, metric, layers=[2], positions=-1)
    assert torch.allclose(fast.replaced[:, 2], full.replaced[:, 2], atol=1e-3)
