"""Losses of answers and texts are those that the model computes, in a batch as alone."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from glassbox_utils.core.interventions import not_first
from glassbox_utils.core.losses import answer_losses, log_probabilities, perplexity_ratio, text_divergences
from glassbox_utils.core.models import ModelError
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


def test_a_divergence_is_the_sum_by_hand_and_grows_where_perplexity_falls(llama):
    def shifted(by):
        @contextmanager
        def on():
            hook = llama.hf.register_forward_hook(
                lambda m, a, out: setattr(out, "logits", out.logits + torch.as_tensor(by).to(out.logits))
            )
            try:
                yield
            finally:
                hook.remove()

        return on

    texts = ["w1 w2 w3 w4", "w5"]
    sums, counts = text_divergences(llama, texts, shifted(0.0))
    assert sums == pytest.approx(0, abs=1e-5) and counts.tolist() == [
        len(tokenize(llama, [text]).input_ids[0]) - 1 for text in texts
    ]
    bias = torch.randn(llama.hf.config.vocab_size, generator=torch.Generator().manual_seed(0))
    sums, counts = text_divergences(llama, texts, shifted(bias.to(llama.device)))
    p = log_probabilities(llama, tokenize(llama, texts[:1])).cpu()
    q = (p + bias).log_softmax(-1)
    assert sums[0] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)
    with pytest.raises(ModelError, match="at least one"):
        text_divergences(llama, [], nullcontext)
