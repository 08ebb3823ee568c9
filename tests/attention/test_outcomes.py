"""Winogender, StereoSet and what a model says at a pronoun: read right, and moved by the heads that are ablated."""

import numpy as np
import pytest
import tiny

from glassbox_utils.attention import bias, outcomes
from glassbox_utils.attention.ablation import head_means
from glassbox_utils.core.models import ModelError, load_model, wrap_model
from glassbox_utils.core.text import tokenize


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A random GPT-2 with the embedded model's tokenizer."""
    return load_model(tiny.save_gpt2_shaped(tmp_path_factory.mktemp("words"), 128, 6.0))


@pytest.fixture(scope="module")
def reference(words):
    return head_means(words, [tokenize(words, ["The driver met the clerk.", "The guard saw the cook."])])


def test_winogender_is_cut_before_its_pronoun():
    schemas = outcomes.winogender()
    assert len({s.occupation for s in schemas}) == 60 and len(set(schemas)) == len(schemas) > 150
    assert 2 * sum("someone" in s.text.lower() for s in schemas) == len(schemas)
    for s in schemas:
        assert "$" not in s.text and s.occupation in s.text and s.text[0].isupper() and not s.text.endswith(" ")
        assert s.pronouns in outcomes.PRONOUNS.values() and 0 <= s.women <= 100
    share = {s.occupation: s.women for s in schemas}
    pairs = outcomes.counterparts(schemas)
    assert len(pairs) == 30 and len({job for pair in pairs for job in pair}) == 60
    assert all(share[a] < share[b] for a, b in pairs) and share[pairs[0][0]] == min(share.values())


def test_stereoset_items_come_in_two_versions():
    items = outcomes.stereoset()
    assert len(items) == 255 and len({i.target for i in items}) == 10
    assert all(i.stereotype != i.opposite for i in items)


def test_gaps_have_a_row_for_each_set_and_move(words, reference):
    schemas = [s for s in outcomes.winogender() if s.occupation in ("nurse", "plumber", "engineer", "dietitian")]
    sets = [[], [(1, 2), (3, 4)]]
    gap = outcomes.winogender_gap(words, sets, reference, schemas)
    assert gap.shape == (2, 2) and not np.allclose(gap[0], gap[1])
    again = outcomes.winogender_gap(words, [[]], reference, schemas[::-1])
    assert np.allclose(again[0], gap[0], atol=1e-4), "the order of the sentences does not matter"
    items = outcomes.stereoset()[:10]
    turned = [outcomes.Item(i.opposite, i.stereotype, i.target) for i in items]
    share = outcomes.stereoset_gap(words, [[]], reference, items)
    assert share.shape == (1, len({i.target for i in items})) and (abs(share) <= 0.5).all()
    assert np.allclose(outcomes.stereoset_gap(words, [[]], reference, turned), -share)


def test_what_is_said_holds_the_gap_and_more(words):
    sets = [[], [(1, 2)]]
    said = outcomes.pronouns_said(words, sets, "fresh", units=4)
    male = np.array(said.is_male)
    gap = bias.pronoun_gap(words, sets, "fresh", units=4)
    assert np.allclose(said.leaning[:, male] - said.leaning[:, ~male], gap, atol=1e-4)
    choice = bias.pronoun_choice(words, "fresh", 24)
    assert len(choice.texts) == 48 and len(set(choice.texts)) == 48 and choice.job[:2] == [0, 0]
    pairs = bias.by_job(np.arange(24.0), choice)
    assert pairs.shape == (12,) and pairs[0] == 0.5 and pairs[-1] == 22.5
    assert ((said.together > 0) & (said.together < 1)).all() and said.together.shape == (2, 8)
    assert outcomes.sentence_means(words, 4).n_tokens > 20 and outcomes.batch_size(words) == 32


def test_a_tokenizer_without_whole_words_is_refused_in_words():
    model = wrap_model(tiny.build("llama"), tiny.tokenizer(), "small words")
    with pytest.raises(ModelError, match=r"begins .* with the same token"):
        bias.told_apart(model, "he", "he")
