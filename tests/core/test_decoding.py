"""What is written with buffers of fixed size and recorded steps is what transformers writes, to the token."""

import threading
import warnings

import pytest
import taped
import tiny
import torch
from transformers import GenerationConfig
from worded import PROMPTS, WIDTH, direction, fails_at, logits, several, untouched

from glassbox_utils.core import decoding, models
from glassbox_utils.core.interventions import edit, recording
from glassbox_utils.core.models import ModelError, Site
from glassbox_utils.core.text import Batch, generate, tokenize
from glassbox_utils.steering.apply import steer

NEW = 14  # the prompts have up to 7 tokens, gemma-3's window 8


@pytest.fixture
def graphs(request, monkeypatch):
    """The recordings that were made: CUDA graphs with ``--device cuda``, tapes on the CPU."""
    device, made = request.config.getoption("--device"), []
    if device == "cpu":
        return taped.taped(monkeypatch)
    if device != "cuda":
        pytest.skip("recordings need a CPU (taped) or CUDA")
    capture = decoding._captured
    monkeypatch.setattr(decoding, "_captured", lambda *a: (made.append(capture(*a)), made[-1])[1])
    return made


@torch.inference_mode()
def by_transformers(model, prompts, n=NEW, temperature=0.0):
    return decoding.by_transformers(model, *tokenize(model, prompts), n, temperature)


@torch.inference_mode()
def written(model, prompts, n=NEW, temperature=0.0):
    return decoding.write(model, *tokenize(model, prompts), n, temperature)


def rows(model):
    """Different vectors and strengths, of one layer, of several and of none."""
    return steer(model, [direction(model), None, several(model), direction(model, 2, 5)], [4.0, None, 2.0, -3.0])


# --- the same tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[1:2], [PROMPTS[2]] * 3], ids=["padded", "one", "equal"])
def test_greedy_tokens_are_those_of_transformers(model, graphs, prompts):
    for n in (1, 2, 3, decoding.WORTH_IT - 1, NEW):
        assert torch.equal(written(model, prompts, n), by_transformers(model, prompts, n))
    assert len(graphs) == 1, "only the long one is worth a recording"


@pytest.mark.parametrize(
    "mode, scope",
    [("add", "all"), ("add", "prompt"), ("add", "generated"), ("project_out", "all"), ("affine", "generated")],
)
def test_steered_rows_write_what_they_write_with_transformers(model, graphs, mode, scope):
    plain, vectors = by_transformers(model, PROMPTS), [direction(model), None, several(model), direction(model, 2, 5)]
    with steer(model, vectors, [4.0, None, 2.0, -3.0], mode, scope):
        want = by_transformers(model, PROMPTS)
        assert torch.equal(written(model, PROMPTS), want)
    assert torch.equal(want[1], plain[1]) and torch.equal(written(model, PROMPTS), plain)
    assert len(graphs) == 2


def test_edits_of_every_site_are_recorded(model, graphs):
    for kind in models.KINDS:
        with edit(model, Site(kind, 1), lambda x: x * 1.5 + 0.1):
            assert torch.equal(written(model, PROMPTS), by_transformers(model, PROMPTS)), kind


def test_rows_end_with_their_end_token(model, graphs, monkeypatch):
    free = by_transformers(model, PROMPTS)
    for ends in (int(free[0, 4]), [int(free[1, 2]), int(free[2, 9])], sorted({int(row[6]) for row in free})):
        monkeypatch.setattr(model.hf.generation_config, "eos_token_id", ends)
        want = by_transformers(model, PROMPTS)
        assert torch.equal(written(model, PROMPTS), want)
        assert generate(model, PROMPTS, NEW) == model.tokenizer.batch_decode(want, skip_special_tokens=True)
    assert want.shape[1] < NEW, "every row ended before the last token"


def test_sampling_draws_what_transformers_draws(model, graphs):
    for temperature in (0.7, 1.5):
        drawn = []
        for write in (written, by_transformers):
            torch.manual_seed(3)
            drawn.append(write(model, PROMPTS, NEW, temperature))
        assert torch.equal(*drawn)
    texts = [generate(model, PROMPTS, NEW, 1.0, seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_draws_have_the_probabilities_of_the_softmax():
    scores = torch.tensor([[0.0, 1.0, 2.0, -3.0]])
    torch.manual_seed(0)
    share = decoding.choose(scores.expand(40000, 4), 0.8).bincount(minlength=4) / 40000
    torch.testing.assert_close(share, (scores[0] / 0.8).softmax(-1), atol=0.01, rtol=0)


# --- a recording ends with its call ---------------------------------------------------------------------------


def test_no_recording_meets_other_hooks(model, graphs):
    before, plain = logits(model), written(model, PROMPTS)
    with rows(model):
        steered = written(model, PROMPTS)
        with steer(model, direction(model, 0, 3), 2.0):
            assert torch.equal(written(model, PROMPTS), by_transformers(model, PROMPTS))
        assert torch.equal(written(model, PROMPTS), steered)
    assert torch.equal(written(model, PROMPTS), plain) and not torch.equal(steered, plain)
    assert len(graphs) == 5
    untouched(model, before)


def test_an_error_in_a_hook_comes_through_and_leaves_nothing(model, graphs):
    before = logits(model)
    for n in (1, 3):  # in the prompt, in the step before the recording
        with pytest.raises(RuntimeError, match="middle"), edit(model, Site("resid_post", 1), fails_at(n)):
            written(model, PROMPTS)
    with pytest.raises(ModelError, match="returned None"), edit(model, Site("resid_post", 1), lambda x: None):
        written(model, PROMPTS)
    assert not decoding._recording.locked()
    untouched(model, before)


def test_python_in_a_hook_runs_for_every_token_only_where_it_must(llama, graphs):
    seen = []

    def look(x):
        seen.append(x.shape[1])
        return x

    with edit(llama, Site("resid_post", 1), look):
        written(llama, PROMPTS)
        assert seen == [7, 1, 1, 1]  # the prompt, two steps, the recording
        seen.clear()
        with decoding.unrecorded():
            written(llama, PROMPTS)
    assert seen == [7] + [1] * (NEW - 1)
    with recording(llama, [Site("resid_post", 1)], keep=lambda x: seen.append(0) or x.clone()) as store:
        seen.clear()
        written(llama, PROMPTS)
    assert len(seen) == NEW and store[Site("resid_post", 1)].shape == (4, 1, WIDTH)


# --- what can't be recorded -------------------------------------------------------------------------------------


def test_a_step_that_hands_numbers_to_python_is_not_recorded(llama, graphs):
    def waits(x):
        return x * 2.0 if x.abs().amax().item() > 2.0 else x

    with edit(llama, Site("resid_post", 1), waits):
        want = by_transformers(llama, PROMPTS)
        with pytest.warns(UserWarning, match=r"Tokens are written all the same, more slowly") as caught:
            got = written(llama, PROMPTS)
    assert torch.equal(got, want) and len(caught) == 1 and not graphs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(written(llama, PROMPTS), by_transformers(llama, PROMPTS))
    assert len(graphs) == 1, "the next call records again"


def test_what_waited_for_the_device_is_named(llama, graphs, monkeypatch):
    if llama.device.type != "cpu":
        pytest.skip("the CPU never waits")
    monkeypatch.setattr(decoding, "_warm", lambda device, step: (step(), ["hooks.py, line 7"])[1])
    with pytest.warns(UserWarning, match=r"waits for the device .*hooks.py, line 7"):
        assert torch.equal(written(llama, PROMPTS), by_transformers(llama, PROMPTS))
    assert not graphs


def test_a_model_without_a_step_of_fixed_shape_is_left_to_transformers(llama, graphs, monkeypatch):
    want = by_transformers(llama, PROMPTS)
    with monkeypatch.context() as patch:
        patch.setattr(type(llama.hf), "_can_compile_fullgraph", False)
        assert torch.equal(written(llama, PROMPTS), want)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "DynamicLayer", int)  # a cache of another kind
        assert torch.equal(written(llama, PROMPTS), want)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match=r"llama can't be run .* fixed size: no masks"):
        patch.setattr(decoding, "_masks", lambda *_: (_ for _ in ()).throw(TypeError("no masks")))
        assert torch.equal(written(llama, PROMPTS), want)
    assert not graphs


def test_two_threads_write_at_once(llama, graphs):
    want, got = written(llama, PROMPTS), {}
    with decoding.recorder(llama.device, NEW) as first, decoding.recorder(llama.device, NEW) as second:
        assert first is not None and second is None
        thread = threading.Thread(target=lambda: got.update(tokens=written(llama, PROMPTS)))
        thread.start()
        thread.join()
    assert torch.equal(got["tokens"], want) and len(graphs) == 1


def test_a_tape_freezes_what_python_decided(llama, request):
    """What the tests above stand on: a step that changes with Python's state is caught."""
    if request.config.getoption("--device") != "cpu":
        pytest.skip("of the tape")
    total, count = torch.zeros(1), 0

    def step():
        nonlocal count
        count += 1
        total.add_(count)

    replay = taped.captured(total.device, step)
    assert count == 1 and float(total) == 0, "recording changes nothing"
    for _ in range(3):
        replay()
    assert count == 1 and float(total) == 3


# --- plain, whatever a checkpoint asks for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 20, "min_new_tokens": 12},
        {"suppress_tokens": [5, 6], "bad_words_ids": [[7]], "forced_eos_token_id": 3},
        {"max_length": 4, "use_cache": False, "return_dict_in_generate": True},
        {"num_return_sequences": 2, "do_sample": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_greedy_is_the_likeliest_token_whatever_the_checkpoint_says(options, tmp_path):
    folder = tiny.save("llama", tmp_path)
    prompts = ["The doctor", "The key is", "The doctor asked the nurse to help him with the patient."]
    plain = models.load_model(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1, **options).save_pretrained(folder)
    asks = models.load_model(folder)
    kept = asks.hf.generation_config.to_dict()
    assert generate(asks, prompts, 12) == generate(plain, prompts, 12)
    assert generate(asks, prompts[:1], 12, 0.8, 5) == generate(plain, prompts[:1], 12, 0.8, 5)
    assert asks.hf.generation_config.to_dict() == kept
    ids = tokenize(asks, prompts[0]).input_ids
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + 12 and int(ids[0, -1]) != 1:
            ids = torch.cat([ids, asks.hf(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert generate(asks, prompts[0], 12) == [asks.tokenizer.decode(ids[0, start:], skip_special_tokens=True)]


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf"), "hot", None, True])
def test_a_temperature_that_is_none_is_named(llama, temperature):
    with pytest.raises(ModelError, match=rf"temperature is {temperature!r}\. Allowed: 0 .*finite"):
        generate(llama, "w1", 2, temperature)


@pytest.mark.parametrize("n", [0, -3, 1.5, "ten", None, True])
def test_a_number_of_tokens_that_is_none_is_named(llama, n):
    with pytest.raises(ModelError, match=rf"max_new_tokens is {n!r}\. Allowed: a whole number from 1 on"):
        generate(llama, "w1", n)


def test_one_token_and_one_row(model, graphs):
    batch = tokenize(model, "w4")
    with torch.inference_mode():
        best = model.hf(**batch.inputs).logits[:, -1].argmax(-1)
        assert decoding.write(model, *Batch(*batch), 1).tolist() == [best.tolist()]
    assert len(generate(model, "w4", 1)) == 1
