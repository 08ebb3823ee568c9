"""Steered against plain generation, and against the bridge with the same hook. Run with ``make bench``."""

import time

import pytest
import torch
from turns import best_times

from glassbox_utils import steering
from glassbox_utils.interventions import edit
from glassbox_utils.models import Site, chat, generate, hook_name, load_model, tokenize

NEW_TOKENS, ROUNDS = 32, 7


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def tone():
    return steering.load_direction("tone")


@pytest.mark.parametrize("rows", [1, 16])
def test_steered_generation_costs_at_most_five_percent(model, tone, rows):
    prompts = [chat(model, p) for p in steering.prompts("selection")[:rows]]
    batch = tokenize(model, prompts)
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}

    def plain():
        with torch.inference_mode():
            model.hf.generate(**batch._asdict(), **options)

    def steered():
        with steering.steer(model, tone, [0.12] * rows):
            plain()

    generate(model, prompts, 2)
    a, b = best_times(plain, steered, rounds=ROUNDS)
    print(
        f"\nbatch {rows}: plain {1e3 * a / NEW_TOKENS:.1f} ms/token, steered {1e3 * b / NEW_TOKENS:.1f}, {b / a:.3f} x"
    )
    assert b / a <= 1.05


def test_faster_than_the_bridge_with_the_same_hook(model, tone):
    prompt = chat(model, "How was the concert?")
    ids = tokenize(model, prompt).input_ids
    name = hook_name(model, "hook_out", tone.layer)
    delta = 0.12 * tone.scale * tone.vector

    def ours():
        with steering.steer(model, tone, 0.12), torch.inference_mode():
            model.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS,
                              min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)  # fmt: skip

    def bridge():
        with model.bridge.hooks(fwd_hooks=[(name, lambda x, hook: x + delta)]), torch.inference_mode():
            model.bridge.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, stop_at_eos=False, verbose=False)

    ours(), bridge()
    a, b = best_times(ours, bridge, rounds=ROUNDS)
    print(f"\nours {1e3 * a / NEW_TOKENS:.1f} ms/token, bridge {1e3 * b / NEW_TOKENS:.1f}, {b / a:.2f} x")
    assert a < b


def test_the_hook_itself_is_small_change(model, tone):
    """Time inside the hook, as a share of a token's time: free of the noise of a busy machine."""
    spent = 0.0
    [(layer, function)] = steering._edits(model, tone, [0.12] * 16, "add").items()

    def timed(x):
        nonlocal spent
        start = time.perf_counter()
        y = function(x)
        spent += time.perf_counter() - start
        return y

    prompts = [chat(model, p) for p in steering.prompts("selection")[:16]]
    start = time.perf_counter()
    with edit(model, Site("resid_post", layer), timed):
        generate(model, prompts, NEW_TOKENS)
    share = spent / (time.perf_counter() - start)
    print(f"\nthe hook takes {100 * share:.2f} % of generation")
    assert share < 0.02
