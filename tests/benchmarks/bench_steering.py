"""Steered against plain generation, and against the bridge with the same hook. Run with ``make bench``."""

import time

import pytest
import torch
from turns import best_times, noted, per_token

from glassbox_utils.core.interventions import edits
from glassbox_utils.core.models import hook_name, load_model
from glassbox_utils.core.text import chat, generate, tokenize
from glassbox_utils.steering import contrast
from glassbox_utils.steering.apply import functions_of, steer
from glassbox_utils.steering.vectors import load_vector

NEW_TOKENS, ROUNDS, ALPHA = 32, 7, 0.016


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def tone():
    """Sixteen layers: the dearest vector that is shipped."""
    return load_vector("tone")


@pytest.mark.parametrize("rows", [1, 16])
def test_steered_generation_costs_at_most_five_percent(model, tone, rows):
    prompts = [chat(model, p) for p in contrast.prompts("selection")[:rows]]
    a, b = per_token(model, prompts, lambda: steer(model, tone, [ALPHA] * rows), NEW_TOKENS, ROUNDS)
    values = {"steered": b, "plain": a}
    assert noted(f"steered generation, batch {rows}", "ms/token", values, b / a, "at most 1.05 x") <= 1.05


def test_faster_than_the_bridge_with_the_same_hook(model, tone):
    prompt = chat(model, "How was the concert?")
    ids = tokenize(model, prompt).input_ids
    hooks = []
    for part in tone.parts:
        delta = ALPHA * part.scale * part.vector
        hooks.append((hook_name(model, "hook_out", part.layer), lambda x, hook, delta=delta: x + delta))

    def ours():
        with steer(model, tone, ALPHA), torch.inference_mode():
            model.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS,
                              min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)  # fmt: skip

    def bridge():
        with model.bridge.hooks(fwd_hooks=hooks), torch.inference_mode():
            model.bridge.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, stop_at_eos=False, verbose=False)

    ours(), bridge()
    a, b = best_times(ours, bridge, rounds=ROUNDS)
    values = {"glassbox": 1e3 * a / NEW_TOKENS, "bridge": 1e3 * b / NEW_TOKENS}
    assert noted("steered generation against the bridge", "ms/token", values, a / b, "below 1 x") < 1


def test_the_hook_itself_is_small_change(model, tone):
    """Time inside the hook, as a share of a token's time: free of the noise of a busy machine."""
    spent = 0.0

    def timed(function):
        def run(x):
            nonlocal spent
            start = time.perf_counter()
            y = function(x)
            spent += time.perf_counter() - start
            return y

        return run

    prompts = [chat(model, p) for p in contrast.prompts("selection")[:16]]
    start = time.perf_counter()
    functions, _ = functions_of(model, tone, [ALPHA] * 16, "add")
    with edits(model, {site: timed(function) for site, function in functions.items()}):
        generate(model, prompts, NEW_TOKENS)
    share = spent / (time.perf_counter() - start)
    values = {"share": share, "hooks": len(tone.parts)}
    assert noted("inside the hooks of steering", "of a token's time", values, share, "below 0.02") < 0.02
