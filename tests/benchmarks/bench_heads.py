"""Speed of the head scores against plain forward passes that keep the patterns. Run alone: make bench."""

import time

import torch
from turns import noted, wait

from glassbox_utils.attention import induction, patterns
from glassbox_utils.core.models import load_model
from glassbox_utils.core.text import Batch


@torch.no_grad()
def test_all_heads_on_100_rows_against_plain_passes_with_patterns():
    """Three scores of every head on 100 x 101 tokens, alternating with transformers' own output_attentions."""
    lm = load_model()
    batch = patterns.repeated_tokens(lm, 100, 50)
    mine, theirs = 0.0, 0.0
    for start in range(0, 100, 20):
        part = Batch(*(t[start : start + 20] for t in batch))
        wait(lm.device)
        begin = time.perf_counter()
        induction.circuit_scores(lm, part)
        wait(lm.device)
        middle = time.perf_counter()
        with patterns.eager(lm):
            lm.hf(input_ids=part.input_ids, attention_mask=part.attention_mask, output_attentions=True, use_cache=False)
        wait(lm.device)
        mine, theirs = mine + middle - begin, theirs + time.perf_counter() - middle
    values = {"glassbox": mine, "output_attentions": theirs}
    assert noted("scores of all heads, 100 x 101 tokens", "s", values, mine / theirs, "at most 1.3 x") <= 1.3
