"""Side by side: rivals take turns, so that a busy machine slows all of them alike."""

import time
from contextlib import nullcontext

import torch

from glassbox_utils.core.text import generate, tokenize


def best_times(*functions, rounds):
    """Best time of each function in seconds over the rounds, after one round of warm-up."""
    best = [float("inf")] * len(functions)
    for turn in range(rounds + 1):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if turn:
                best[i] = min(best[i], time.perf_counter() - start)
    return best


def per_token(model, prompts, edited, new_tokens, rounds):
    """Milliseconds for a generated token: plain, and inside the context that ``edited()`` gives."""
    batch = tokenize(model, prompts)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

    def run(context):
        with context(), torch.inference_mode():
            model.hf.generate(**batch._asdict(), **options)

    generate(model, prompts, 2)
    return [1e3 * t / new_tokens for t in best_times(lambda: run(nullcontext), lambda: run(edited), rounds=rounds)]
