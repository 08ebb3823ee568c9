"""Threads that share one model: each is steered by its own blocks."""

import threading

import pytest
import torch
from worded import PROMPTS, direction, logits

from glassbox_utils.core.text import generate
from glassbox_utils.steering.apply import generate_with_steering, steer


def together(*works):
    """Run them at once; each gets a function that waits for all of them."""
    barrier, found = threading.Barrier(len(works), timeout=30), {}
    threads = [
        threading.Thread(target=lambda i=i, w=w: found.update({i: w(barrier.wait)})) for i, w in enumerate(works)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[i] for i in range(len(works))]


def test_threads_with_blocks_of_their_own_are_steered_apart(llama):
    settings = [(direction(llama, 1, 1), 2.0), (direction(llama, 2, 5), -1.5), (None, 1.0)]
    alone = []
    for vector, alpha in settings:
        with steer(llama, vector, alpha):
            alone.append(generate(llama, PROMPTS, 8))

    def work(vector, alpha):
        def run(wait):
            with steer(llama, vector, alpha):
                wait()
                said = generate(llama, PROMPTS, 8)
                wait()
            return said

        return run

    before = logits(llama)
    assert together(*(work(*s) for s in settings)) == alone
    assert len({str(a) for a in alone}) == 3 and torch.equal(logits(llama), before)


def test_a_worker_without_blocks_works_for_the_thread_that_opened_one(llama):
    with steer(llama, direction(llama), 2.0):
        here = generate(llama, PROMPTS, 8)
        [there] = together(lambda wait: generate(llama, PROMPTS, 8))
    assert here == there != generate(llama, PROMPTS, 8)


@pytest.mark.parametrize("fails", [False, True])
def test_a_callers_model_and_tokenizer_are_given_back_as_they_were(fails, llama):
    hf, words = llama.hf, llama.tokenizer
    hf.train()
    hf.lm_head.eval()  # some parts may have been set apart
    words.padding_side, pad = "right", words.pad_token
    try:
        modes = [m.training for m in hf.modules()]
        if fails:
            with pytest.raises(ValueError):
                generate_with_steering(hf, words, "w1", direction(llama), float("nan"))
        else:
            generate_with_steering(hf, words, "w1", direction(llama), 0.5, max_new_tokens=2)
        assert [m.training for m in hf.modules()] == modes
        assert (words.padding_side, words.pad_token) == ("right", pad)
    finally:
        hf.eval()
        words.padding_side = "left"
