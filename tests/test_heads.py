"""Head scores must find exactly the heads that were wired by hand, in a GPT-2-shaped model."""

import pytest
import torch
from wired import DUPLICATE, INDUCTION, PREVIOUS, copying_llama, wired_gpt2

from glassbox_utils import attention
from glassbox_utils.models import Batch, ModelError, tokenize


@pytest.fixture(scope="module")
def model():
    return wired_gpt2()


@pytest.fixture(scope="module")
def repeats(model):
    return attention.repeated_tokens(model, 20, length=12, seed=3)


def found(scores, threshold=0.5):
    """All heads whose mean score exceeds the threshold."""
    return [tuple(i.tolist()) for i in (scores.nanmean(0) > threshold).nonzero()]


def test_induction_score_finds_exactly_the_wired_head(model, repeats):
    scores = attention.induction_scores(model, repeats)
    assert scores.shape == (20, 2, 4)
    assert found(scores) == [INDUCTION]
    assert scores[:, *INDUCTION].min() > 0.95
    others = scores.mean(0).flatten()[[i for i in range(8) if divmod(i, 4) != INDUCTION]]
    assert others.max() < 0.1  # even attention scores about 1 in 19


def test_previous_and_duplicate_scores_find_exactly_the_wired_heads(model, repeats):
    scores = attention.head_scores(model, repeats)
    assert found(scores.previous) == [PREVIOUS]
    assert found(scores.duplicate) == [DUPLICATE]


def test_the_wired_circuit_predicts_the_repetition(model, repeats):
    ids = repeats.input_ids
    predicted = model.hf(ids).logits.argmax(-1)
    assert (predicted[:, 13:-1] == ids[:, 14:]).all()  # whole second half
    assert (predicted[:, 1:12] != ids[:, 2:13]).float().mean() > 0.9  # nothing to copy in the first


def test_copying_score_finds_the_induction_head(model, repeats):
    scores = attention.copying_scores(model, repeats)
    assert [tuple(i.tolist()) for i in (scores > 0.9).nonzero()] == [INDUCTION]


@pytest.mark.parametrize("head", range(4))
def test_copying_score_uses_the_right_value_group(head):
    """Heads 0 and 1 read key-value head 0 (a shifted token), 2 and 3 read head 1 (the token)."""
    model = copying_llama(head)
    scores = attention.copying_scores(model, attention.repeated_tokens(model, 4, length=12))[0]
    expected = [h for h in (head, 2 * (1 - head // 2)) if h // 2 == 1]
    assert (scores > 0.9).nonzero().flatten().tolist() == expected


def test_natural_text_and_padding(model):
    """``w1 w2 ... w1``: the target is the token after the copy; padded prompts score the same as alone."""
    batch = tokenize(model, ["w1 w2 w3 w4 w1", "w5 w6 w7 w8 w9 w10 w5 w6"])
    targets = attention.induction_targets(batch)
    assert targets[0].nonzero().tolist() == [[8, 5]]
    assert targets[1].nonzero().tolist() == [[7, 2], [8, 3]]
    alone = attention.induction_scores(model, tokenize(model, "w5 w6 w7 w8 w9 w10 w5 w6"))
    assert torch.allclose(attention.induction_scores(model, batch)[1], alone[0], atol=1e-4)
    assert attention.induction_scores(model, tokenize(model, "w1 w2")).isnan().all()


def test_repeats_are_seeded_row_by_row(model):
    few, many = attention.repeated_tokens(model, 3, 12, seed=5), attention.repeated_tokens(model, 9, 12, seed=5)
    assert (many.input_ids[:3] == few.input_ids).all()
    assert (few.input_ids[:, 1:13] == few.input_ids[:, 13:]).all()
    assert not (attention.repeated_tokens(model, 3, 12, seed=6).input_ids == few.input_ids)[:, 1:].all(1).any()
    assert (few.input_ids[:, 1:] != 0).all()
    with pytest.raises(ModelError, match="Choose a length of 2 to 15"):
        attention.repeated_tokens(model, 1, length=40)


def test_streaming_equals_whole_patterns(model, repeats):
    """The streamed score is the plain definition on patterns that transformers returns."""
    model.hf.set_attn_implementation("eager")
    patterns = model.hf(**repeats._asdict(), output_attentions=True).attentions
    by_hand = torch.stack([p.diagonal(-11, -2, -1)[..., 2:].mean(-1) for p in patterns], 1)
    assert torch.allclose(attention.induction_scores(model, repeats), by_hand, atol=1e-5)


def test_batches_of_rows_change_nothing(model, repeats):
    parts = [Batch(*(t[i : i + 7] for t in repeats)) for i in range(0, 20, 7)]
    joined = torch.cat([attention.induction_scores(model, part) for part in parts])
    assert torch.allclose(joined, attention.induction_scores(model, repeats), atol=1e-5)
