"""Clamped against plain generation. Run with ``make bench``."""

import pytest
import torch
from turns import best_times

from glassbox_utils.core.models import load_model
from glassbox_utils.core.text import chat, generate, tokenize
from glassbox_utils.saes import clamping, clamping_study

NEW_TOKENS, ROUNDS = 24, 7


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.mark.parametrize("rows", [1, 16])
def test_clamped_generation_costs_at_most_fifteen_percent(model, rows):
    """The demonstrated group, all tokens: the SAE's whole encoder runs, because TopK needs all of it."""
    tools, selected = clamping_study.chosen(model)
    shown = clamping_study.demonstrated(selected)
    one, strength = tools.found[shown], selected[shown]["strength"]
    prompts = [chat(model, p, "") for p in clamping_study.prompts()["selection"][:rows]]
    batch = tokenize(model, prompts)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}

    def plain():
        with torch.inference_mode():
            model.hf.generate(**batch._asdict(), **options)

    def clamped():
        with clamping.clamp(model, one, [strength] * rows):
            plain()

    generate(model, prompts, 2)
    a, b = best_times(plain, clamped, rounds=ROUNDS)
    ms = 1e3 / NEW_TOKENS
    print(f"\nbatch {rows}: plain {a * ms:.1f} ms/token, clamped {b * ms:.1f}, {b / a:.3f} x")
    assert b / a <= 1.15
