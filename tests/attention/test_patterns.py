"""Attention scores against patterns whose scores are known."""

import pytest
import torch

from glassbox_utils.attention import patterns
from glassbox_utils.attention.patterns import _five_scores
from glassbox_utils.core.devices import result
from glassbox_utils.core.interventions import capture
from glassbox_utils.core.models import ModelError, Site, hook_name
from glassbox_utils.core.text import Batch, find_token, tokenize

TEXTS = ["The doctor asked the nurse to help him with the patient.", "The key is in the box and the key is old."]


def made(pattern, ids):
    """Scores of one head with a given [dst, src] pattern, as a dict."""
    batch = Batch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
    values = _five_scores(pattern[None, None], batch)[0, 0]
    return dict(zip(patterns.SCORES, values.tolist(), strict=True))


def test_each_family_is_recognised():
    n, ids = 6, [0, 5, 6, 5, 7, 6]
    previous = torch.diag(torch.ones(n - 1), -1)
    previous[0, 0] = 1
    assert made(previous, ids) == pytest.approx(dict(previous=1, current=0, first=0.2, duplicate=0, entropy=0))
    assert made(torch.eye(n), ids) == pytest.approx(dict(previous=0, current=1, first=0, duplicate=0, entropy=0))
    first = torch.zeros(n, n)
    first[:, 0] = 1
    assert made(first, ids)["first"] == 1
    copies = torch.eye(n)
    copies[3], copies[5] = torch.eye(n)[1], torch.eye(n)[2]
    assert made(copies, ids)["duplicate"] == 1
    even = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    assert made(even, ids)["entropy"] == pytest.approx(torch.log2(torch.arange(2.0, n + 1)).mean().item())


def test_no_copy_no_duplicate_score():
    assert made(torch.eye(4), [0, 1, 2, 3])["duplicate"] != made(torch.eye(4), [0, 1, 2, 3])["duplicate"]  # NaN


def test_padding_does_not_change_scores(tiny_model):
    together = patterns.head_scores(tiny_model, tokenize(tiny_model, TEXTS))
    alone = [patterns.head_scores(tiny_model, tokenize(tiny_model, t)) for t in TEXTS]
    for name in patterns.SCORES:
        for row, single in enumerate(alone):
            assert torch.allclose(getattr(together, name)[row], getattr(single, name)[0], atol=1e-4, equal_nan=True)


def test_patterns_are_those_of_the_bridge(tiny_model):
    _, pattern = patterns.attention(tiny_model, TEXTS[0])
    ids = tokenize(tiny_model, TEXTS[0]).input_ids
    name = hook_name(tiny_model, "attn.hook_pattern", 1)
    _, cache = tiny_model.bridge.run_with_cache(ids, names_filter=[name])
    assert (result(cache[name][0]) - pattern[1]).abs().max() < 1e-5
    assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-5)


def test_the_fast_kernel_is_back_afterwards(tiny_llama):
    before = tiny_llama.hf.config._attn_implementation
    patterns.attention(tiny_llama, TEXTS[0])
    with pytest.raises(RuntimeError, match="stop"):
        patterns.over_patterns(tiny_llama, tokenize(tiny_llama, TEXTS[0]), _stop)
    assert tiny_llama.hf.config._attn_implementation == before != "eager"
    assert all(not m._forward_hooks for m in tiny_llama.hf.modules())


def _stop(pattern, where):
    raise RuntimeError("stop")


def test_from_word_to_word_reads_one_entry(tiny_model):
    _, pattern = patterns.attention(tiny_model, TEXTS[0])
    ids = tokenize(tiny_model, TEXTS[0]).input_ids[0]
    dst, src = (find_token(tiny_model, ids, w) for w in ("patient", "doctor"))
    looked = patterns.from_word_to_word(tiny_model, [TEXTS[0], TEXTS[0]], "patient", "doctor")
    assert torch.allclose(looked[1], pattern[:, :, dst, src], atol=1e-5)
    with pytest.raises(ModelError, match="'lawyer'"):
        patterns.from_word_to_word(tiny_model, TEXTS[:1], "patient", "lawyer")
    with pytest.raises(ModelError, match="sees only itself and earlier ones"):
        patterns.from_to(tiny_model, tokenize(tiny_model, TEXTS[0]), torch.tensor([2]), torch.tensor([5]))


def test_value_weighting_follows_the_values(tiny_model):
    """Values are worked out from the heads' outputs: z[0] = v[0], z[1] = A[1, 0] v[0] + A[1, 1] v[1]."""
    weighted = patterns.value_weighted(tiny_model, TEXTS[0])
    _, pattern = patterns.attention(tiny_model, TEXTS[0])
    assert torch.allclose(weighted.sum(-1), torch.ones(()), atol=1e-4)
    site, head = Site("z", 1), 3
    z = result(capture(tiny_model, tokenize(tiny_model, TEXTS[0]), [site])[site])[0].unflatten(-1, (6, -1))[:, head]
    to_first, to_itself = pattern[1, head, 1, :2]
    values = torch.stack([z[0], (z[1] - to_first * z[0]) / to_itself])
    moved = (values @ result(patterns.output_weights(tiny_model, 1)[head])).norm(dim=-1) * pattern[1, head, 1, :2]
    assert torch.allclose(weighted[1, head, 1, :2], moved / moved.sum(), atol=1e-3)


def test_rollout_rows_are_distributions(tiny_llama):
    _, pattern = patterns.attention(tiny_llama, TEXTS[0])
    rolled = patterns.rollout(pattern)
    assert torch.allclose(rolled.sum(-1), torch.ones(len(rolled)), atol=1e-4)
    assert rolled.triu(1).abs().max() == 0
    assert torch.allclose(patterns.rollout(torch.eye(4).expand(2, 3, 4, 4)), torch.eye(4))


def test_top_heads():
    scores = torch.tensor([[0.1, float("nan")], [0.9, 0.5]])
    assert patterns.top_heads(scores, 2) == [(1, 0), (1, 1)]
    with pytest.raises(ModelError, match="Choose 1 to 4"):
        patterns.top_heads(scores, 5)
