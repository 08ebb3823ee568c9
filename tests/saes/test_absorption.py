"""The first-letter test on a code whose features are known because they are built in."""

import pytest
import torch
from small import small_model

from glassbox_utils.core import corpora
from glassbox_utils.core.models import Site
from glassbox_utils.saes import absorption
from glassbox_utils.saes.harvest import shuffled_model

WORDS, EACH = 40, 10
"""kinds of word for each of the letters a to d, and how often each occurs"""


class Code:
    """Dimension l says "letter l". a: one feature. b: two. c: silent on a third of the kinds, which have their own
    feature that carries the letter. d: none at all."""

    def __init__(self):
        self.W_dec = torch.zeros(5, 26)
        self.W_dec[0, 0] = self.W_dec[1, 1] = self.W_dec[2, 1] = self.W_dec[3, 2] = self.W_dec[4, 2] = 1.0

    def encode(self, x):
        letter, kind = x[:, :4].argmax(-1), x[:, 25].round().long()
        on = [letter == 0, (letter == 1) & (kind % 2 == 0), (letter == 1) & (kind % 2 == 1)]
        on += [(letter == 2) & (kind % 3 > 0), (letter == 2) & (kind % 3 == 0)]
        return torch.stack(on, 1).float() * x[:, :4].max(-1, keepdim=True).values


@pytest.fixture(scope="module")
def words():
    letters = torch.arange(4).repeat_interleave(WORDS * EACH)
    kinds = torch.arange(WORDS).repeat_interleave(EACH).repeat(4)
    x = torch.randn(len(letters), 26, generator=torch.Generator().manual_seed(0)) * 0.05
    x[torch.arange(len(letters)), letters] += 4
    x[:, 25] = kinds.float()
    train = (kinds // 3) % 2 == 0
    permuted = (kinds * 7 + letters * 3) % 4
    return absorption.Words(x, letters, permuted, train, absorption.fit_probe(x[train], letters[train]))


def test_whole_split_and_absorbed_letters_are_told_apart(words):
    a, b, c, d = absorption.first_letter_test(Code(), words, n_features=2)
    assert [r.letter for r in (a, b, c, d)] == list("abcd")
    assert min(r.probe_f1 for r in (a, b, c, d)) > 0.95
    assert a.f1[0] == 1 and a.n_split == 1 and a.absorbed == 0 and a.control_f1 < 0.6
    assert b.n_split == 2 and b.f1[0] < 0.8 and b.f1[1] == 1
    assert d.f1[-1] < 0.6


def test_a_silent_feature_with_a_stand_in_is_absorption(words, monkeypatch):
    # One feature only may be chosen, so that the stand-in for a third of the kinds is not among the chosen ones.
    c = absorption.first_letter_test(Code(), words, n_features=1)[2]
    silent = float(((words.x[:, 25].round() % 3 == 0) & (words.letters == 2) & ~words.train).sum()) / c.n
    assert c.absorbed == pytest.approx(silent, abs=0.02)


def test_letters_are_those_of_words_only():
    model = small_model()
    rows = corpora.token_rows(model, corpora.load_corpus("landmarks", "held"), 8, 32)
    letters = absorption.first_letters(model, rows.tokens)
    texts = [[model.tokenizer.decode([i]) for i in row] for row in rows.tokens.tolist()]
    for row, found in zip(texts, letters.tolist(), strict=True):
        for text, letter in zip(row, found, strict=True):
            begins = len(text) > 2 and text[0] == " " and text[1].isascii() and text[1].isalpha()
            assert (letter >= 0) == begins
            if begins:
                assert text[1].lower() == "abcdefghijklmnopqrstuvwxyz"[letter]
    words = absorption.letter_words(model, Site("resid_post", 1), 1e9, rows)
    assert len(words.x) == int((letters[:, 1:] >= 0).sum())


def test_a_shuffled_model_keeps_its_weights_but_not_their_places():
    model = small_model()
    other = shuffled_model(model, seed=0)
    assert other.hash != model.hash == small_model().hash
    for (name, a), (_, b) in zip(model.hf.named_parameters(), other.hf.named_parameters(), strict=True):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values), name
        assert a.ndim < 2 or not torch.equal(a, b)
    assert shuffled_model(model, seed=0).hash == other.hash
