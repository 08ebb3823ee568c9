"""Losses of answers and texts are those that the model computes, in a batch as alone."""

import numpy as np
import pytest
import torch

from glassbox_utils.core.interventions import not_first
from glassbox_utils.core.losses import answer_losses, log_probabilities, perplexity_ratio
from glassbox_utils.core.statistics import bootstrap_ci
from glassbox_utils.core.text import chat, tokenize


def test_answer_losses_are_those_of_the_answer_alone(llama):
    asked, answers = ["w1 w2", "w3"], [" w5 w6 w7", " w8"]
    losses, counts = answer_losses(llama, asked, answers)
    for i in range(2):
        batch = tokenize(llama, chat(llama, asked[i]) + answers[i])
        n = len(answers[i].split())
        assert counts[i] == n
        with torch.no_grad():
            scores = llama.hf(**batch._asdict()).logits[0].log_softmax(-1)
        expected = -sum(float(scores[j - 1, batch.input_ids[0, j]]) for j in range(-n, 0))
        assert losses[i] == pytest.approx(expected, abs=1e-3)


def test_padded_rows_are_measured_like_unpadded_ones(model):
    """Rows of different lengths share a batch; GPT-2 counts positions, so its padding must not shift them."""
    asked = ["w1", "w2 w3 w4 w5", "w6 w7 w8 w9 w10 w11 w12"]
    answers = [" w13 w14", " w15", " w16 w17 w18"]
    together, counts = answer_losses(model, asked, answers, batch_size=3)
    alone, single = answer_losses(model, asked, answers, batch_size=1)
    assert counts.tolist() == single.tolist()
    np.testing.assert_allclose(together, alone, atol=1e-3, rtol=1e-4)
    batch = tokenize(model, asked)
    rows = torch.cat([log_probabilities(model, tokenize(model, text)) for text in asked])
    torch.testing.assert_close(log_probabilities(model, batch), rows, atol=1e-3, rtol=1e-3)
    if model.name == "gpt2":  # the same without positions is wrong: the test above can fail
        with torch.no_grad():
            shifted = model.hf(**batch._asdict()).logits[not_first(batch)].log_softmax(-1)
        assert not torch.allclose(shifted, rows, atol=1e-2)


def test_the_perplexity_ratio_is_that_of_the_two_perplexities():
    plain, changed = (np.array([10.0, 4.0]), np.array([5, 2])), (np.array([12.0, 6.0]), np.array([5, 2]))
    by_hand = np.exp(18 / 7) / np.exp(14 / 7)
    assert perplexity_ratio(*plain, *changed) == pytest.approx(by_hand)
    assert perplexity_ratio(*plain, *plain) == 1
    interval = bootstrap_ci((*plain, *changed), perplexity_ratio)
    assert interval.low < by_hand < interval.high and interval.n == 2
