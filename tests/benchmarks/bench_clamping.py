"""Clamped against plain generation. Run with ``make bench``."""

import pytest
from turns import noted, per_token

from glassbox_utils.core.models import load_model
from glassbox_utils.core.text import chat
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
    a, b = per_token(model, prompts, lambda: clamping.clamp(model, one, [strength] * rows), NEW_TOKENS, ROUNDS)
    values = {"clamped": b, "plain": a}
    assert noted(f"clamped generation, batch {rows}", "ms/token", values, b / a, "at most 1.15 x") <= 1.15
