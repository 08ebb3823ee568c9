"""Steering on tiny random models of three architectures: what is steered, what is not, and what is left afterwards."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from wired import VOCABULARY, tokenizer

from glassbox_utils import steering, steering_figures, steering_studies, style
from glassbox_utils.interventions import capture, edit, not_first
from glassbox_utils.models import ModelError, Site, chat, generate, load_model, tokenize, wrap_model
from glassbox_utils.steering import SteeringError

WIDTH, LAYERS = 32, 3
ROWS = [
    {"alpha": 0, "kl": 0.0, "perplexity": 2.0, "effect": 0.0},
    {"alpha": 1, "kl": 0.5, "perplexity": 3.0, "effect": 0.4},
    {"alpha": 2, "kl": 0.9, "perplexity": 3.5, "effect": 0.6},
    {"alpha": 3, "kl": 0.9, "perplexity": 9.0, "effect": 0.9},
]
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w11 w12"]
COMMON = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
COMMON |= {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64, "bos_token_id": 0}


def build(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=4, bos_token_id=0
        )
        hf = GPT2LMHeadModel(config)
    elif kind == "gemma3":
        hf = Gemma3ForCausalLM(Gemma3TextConfig(**COMMON, head_dim=8, sliding_window=8, eos_token_id=None))
    else:
        hf = LlamaForCausalLM(LlamaConfig(**COMMON, eos_token_id=None))
    hf.generation_config.eos_token_id = None  # tiny random models would stop anywhere
    with torch.no_grad():  # initial weights are so small that every token looks alike
        for parameter in hf.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return wrap_model(hf, tokenizer(), name=kind)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def llama():
    return build("llama")


def direction(model, layer=1, seed=0, scale=3.0):
    blank = steering.Direction(torch.ones(WIDTH), layer, scale, model_hash=model.hash, model_name=model.name)
    return steering.random_direction(blank, seed)


def several(model, seed=0):
    """A control vector after the layers 0 and 2."""
    return steering.ControlVector((direction(model, 0, seed), direction(model, 2, seed + 1, scale=2.0)))


def logits(model, texts=PROMPTS):
    with torch.no_grad():
        return model.hf(**tokenize(model, texts)._asdict()).logits


def record(model, layer, run):
    """Residual stream after ``layer`` in every forward pass of ``run``, as the later layers see it."""
    seen = []

    def look(x):
        seen.append(x.clone())
        return x

    with edit(model, Site("resid_post", layer), look):
        run()
    return seen


# --- steering -------------------------------------------------------------------------------------------


def test_adds_in_units_of_the_typical_norm_to_prompt_and_generated_tokens(model):
    d = direction(model, scale=2.0)

    def run():
        generate(model, PROMPTS, 3)

    plain = record(model, 1, run)
    with steering.steer(model, d, 0.5):
        steered = record(model, 1, run)
    assert [x.shape[1] for x in steered] == [7, 1, 1]  # the prompt with its BOS, then one token at a time
    for before, after in zip(plain[:1], steered[:1], strict=True):
        torch.testing.assert_close(after - before, (0.5 * 2.0 * d.vector).expand_as(before), atol=1e-5, rtol=1e-4)
    # Later passes see other tokens; a second hook in front of the steering sees what the layer itself wrote.
    inner = []
    with edit(model, Site("resid_post", 1), lambda x: (inner.append(x.clone()), x)[1]), steering.steer(model, d, 0.5):
        outer = record(model, 1, run)
    for before, after in zip(inner, outer, strict=True):
        torch.testing.assert_close(after - before, (d.vector).expand_as(before), atol=1e-5, rtol=1e-4)


def test_logits_are_bit_identical_afterwards(model):
    before = logits(model)
    d = direction(model)
    with steering.steer(model, d, 2.0):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    with pytest.raises(KeyboardInterrupt), steering.steer(model, [d, None, d, d], 2.0, scope="generated"):
        generate(model, PROMPTS, 2)
        raise KeyboardInterrupt
    assert torch.equal(logits(model), before)
    for tree in (model.hf, model.twin):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in tree.modules())


def test_an_exception_in_the_middle_of_generation_leaves_nothing(model):
    before = logits(model)
    passes = 0

    def fail(x):
        nonlocal passes
        passes += 1
        if passes == 3:
            raise RuntimeError("in the middle")
        return x

    steered = steering.steer(model, direction(model), 1.0)
    with pytest.raises(RuntimeError, match="middle"), steered, edit(model, Site("resid_post", 2), fail):
        generate(model, PROMPTS, 6)
    assert torch.equal(logits(model), before)


def test_unsteered_rows_of_a_mixed_batch_are_token_identical(model):
    d, other = direction(model, 1), direction(model, 2, seed=5)
    plain = generate(model, PROMPTS, 12)
    with steering.steer(model, [d, None, other, None], [2.0, None, -1.5, 1.0]):
        mixed = generate(model, PROMPTS, 12)
    with steering.steer(model, d, [2.0, 0.0, 0.0, 0.0]):
        first = generate(model, PROMPTS, 12)
    with steering.steer(model, other, -1.5):
        third = generate(model, PROMPTS, 12)
    assert (mixed[1], mixed[3]) == (plain[1], plain[3])
    assert mixed[0] == first[0] != plain[0] and first[1:] == plain[1:]
    assert mixed[2] == third[2] != plain[2]


def test_unsteered_rows_have_bit_identical_logits_in_every_mode(model):
    plain = logits(model)
    for mode in ("add", "project_out", "affine"):
        with steering.steer(model, direction(model), [1.5, None, 0.7, None], mode):
            mixed = logits(model)
        assert torch.equal(mixed[[1, 3]], plain[[1, 3]])
        assert not torch.allclose(mixed[0], plain[0]) and not torch.allclose(mixed[2], plain[2])


def test_a_steered_row_does_not_depend_on_its_batch(model):
    d = direction(model)
    equal = ["w1 w2", "w3 w4", "w5 w6", "w7 w8"]  # GPT-2 counts padding as positions unless it generates
    with steering.steer(model, d, [0.0, 1.0, 0.0, -1.0]):
        together = logits(model, equal)
    with steering.steer(model, d, 1.0):
        alone = logits(model, equal[1:2])
    torch.testing.assert_close(together[1, -1], alone[0, -1], atol=1e-4, rtol=1e-3)


def test_project_out_and_affine(model):
    d = direction(model, scale=2.0)
    batch = tokenize(model, PROMPTS)
    site = Site("resid_post", 1)

    def coordinate():
        return capture(model, batch, [site])[site] @ d.vector

    plain = coordinate()
    with steering.steer(model, d, 1.0, "project_out"):
        torch.testing.assert_close(coordinate(), torch.zeros_like(plain), atol=1e-4, rtol=0)
    with steering.steer(model, d, 0.25, "project_out"):
        torch.testing.assert_close(coordinate(), 0.75 * plain, atol=1e-4, rtol=1e-4)
    with steering.steer(model, d, -0.5, "affine"):
        torch.testing.assert_close(coordinate(), torch.full_like(plain, -1.0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scope", ["all", "prompt", "generated"])
def test_scope(model, scope):
    d = direction(model, scale=1.0)
    for prompts in (PROMPTS, "w4"):  # also a prompt as short as a generated token
        inner = []
        look = edit(model, Site("resid_post", 1), lambda x, inner=inner: (inner.append(x.clone()), x)[1])
        with look, steering.steer(model, d, 1.0, scope=scope):
            outer = record(model, 1, lambda prompts=prompts: generate(model, prompts, 4))
        moved = [not torch.equal(a, b) for a, b in zip(inner, outer, strict=True)]
        assert moved == [scope != "generated"] + [scope != "prompt"] * 3


def test_scope_generated_without_a_cache_is_refused(llama):
    batch = tokenize(llama, PROMPTS)
    with pytest.raises(ModelError, match="use_cache=True"), steering.steer(llama, direction(llama), scope="generated"):
        llama.hf(**batch._asdict(), use_cache=False)


def test_a_bridge_sees_the_same_steering(llama, tmp_path):
    llama.hf.save_pretrained(tmp_path)
    llama.tokenizer.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    batch = tokenize(model, PROMPTS[:1])
    with torch.no_grad(), steering.steer(model, direction(model), 1.0):
        torch.testing.assert_close(
            model.bridge(batch.input_ids), model.hf(**batch._asdict()).logits, atol=1e-3, rtol=1e-3
        )


def test_two_vectors_compose(model):
    a, b = direction(model, 1, 1), direction(model, 1, 2)
    both = steering.Direction((a.vector + b.vector) / (a.vector + b.vector).norm(), 1, 1.0)
    with steering.steer(model, a, 1.0), steering.steer(model, b, 1.0):
        nested = logits(model)
    with steering.steer(model, both, 3.0 * float((a.vector + b.vector).norm())):
        torch.testing.assert_close(logits(model), nested, atol=1e-3, rtol=1e-3)


def test_several_layers_by_one_dial_are_the_sum_of_their_parts(model):
    many = several(model)
    for mode in ("add", "project_out", "affine"):
        with steering.steer(model, many, -0.7, mode):
            together = logits(model)
        with steering.steer(model, many.parts[0], -0.7, mode), steering.steer(model, many.parts[1], -0.7, mode):
            torch.testing.assert_close(logits(model), together)
    assert many.layers == [0, 2] and "layers [0, 2]" in repr(many)


def test_rows_of_one_layer_of_several_and_of_none_share_a_batch(model):
    many, one = several(model), direction(model, 1, seed=7)
    plain = logits(model)
    with steering.steer(model, [many, None, one, many], [1.0, 1.0, -2.0, None]):
        mixed = logits(model)
    assert torch.equal(mixed[[1, 3]], plain[[1, 3]])
    with steering.steer(model, many, 1.0):
        torch.testing.assert_close(logits(model)[0], mixed[0])
    with steering.steer(model, one, -2.0):
        torch.testing.assert_close(logits(model)[2], mixed[2])
    assert torch.equal(logits(model), plain)
    written = generate(model, PROMPTS, 8)
    with steering.steer(model, [many, None, one, many], [2.0, 1.0, -2.0, None]):
        again = generate(model, PROMPTS, 8)
    assert (again[1], again[3]) == (written[1], written[3])
    assert not torch.allclose(mixed[0], plain[0]) and not torch.allclose(mixed[2], plain[2])


def test_random_vectors_of_several_layers_are_apart_or_shared(llama):
    many = several(llama)
    apart, shared = (steering.random_vector(many, 3, kind) for kind in (False, True))
    for found in (apart, shared):
        assert [(d.layer, d.scale) for d in found.parts] == [(d.layer, d.scale) for d in many.parts]
        assert all(float(d.vector.norm()) == pytest.approx(1, abs=1e-5) for d in found.parts)
    assert torch.equal(shared.parts[0].vector, shared.parts[1].vector)
    assert abs(float(apart.parts[0].vector @ apart.parts[1].vector)) < 0.9
    assert torch.equal(steering.random_vector(many, 3).parts[0].vector, apart.parts[0].vector)
    single = steering.random_vector(many.parts[0], 3)
    assert torch.equal(single.vector, steering.random_direction(many.parts[0], 3).vector)


def test_zero_strength_changes_nothing(model):
    before = logits(model)
    with steering.steer(model, direction(model), 0.0), steering.steer(model, direction(model), None):
        assert torch.equal(logits(model), before)


def test_generate_with_steering_on_plain_models(model):
    d = direction(model)
    plain = generate(model, PROMPTS, 8)
    asked = [model.tokenizer, "w1 w2 w3"]
    one = steering.generate_with_steering(model.hf, *asked, d, 2.0, max_new_tokens=8)
    bare = steering.generate_with_steering(model.hf, *asked, d.vector * d.scale, 2.0, layer=1, max_new_tokens=8)
    assert one == bare != plain[0]
    many = steering.generate_with_steering(model.hf, model.tokenizer, PROMPTS, d, [2.0, 0, None, 2.0], max_new_tokens=8)
    assert many[0] == one and many[1:3] == plain[1:3] and len(many) == 4
    assert steering.generate_with_steering(model.hf, *asked, d, 0.0, max_new_tokens=8) == plain[0]
    layered = steering.generate_with_steering(model.hf, *asked, several(model), 1.0, max_new_tokens=8)
    with steering.steer(model, several(model), 1.0):
        assert layered == generate(model, PROMPTS[0], 8)[0]


# --- fitting --------------------------------------------------------------------------------------------


def clouds(n=60, shift=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.zeros(WIDTH)
    truth[4] = 1.0
    noise = torch.randn(2, n, WIDTH, generator=generator)
    return noise[0] + shift * truth, noise[1] - shift * truth, truth


@pytest.mark.parametrize("method", ["mean_difference", "pca", "probe", "mean_centred"])
def test_methods_find_a_planted_direction(method):
    positive, negative, truth = clouds()
    found = steering.direction_of(positive, negative, method)
    least = 0.7 if method == "probe" else 0.95  # where classes are far apart, a probe may lean on any noise
    assert found @ truth > least and abs(float(found.norm()) - 1) < 1e-5
    assert steering.direction_of(negative, positive, method) @ truth < -least


def test_probe_agrees_with_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    positive, negative, _ = clouds(shift=0.5)
    x = torch.cat([positive, negative]).double().numpy()
    std = x.std(0, ddof=1)
    z = (x - x.mean(0)) / std
    reference = LogisticRegression(C=1.0, max_iter=2000, tol=1e-8).fit(z, [1] * 60 + [0] * 60).coef_[0] / std
    found = steering.direction_of(positive, negative, "probe").numpy()
    assert found @ reference / np.linalg.norm(reference) > 0.999


def test_stability_tells_a_direction_from_noise(llama):
    texts = [" ".join(f"w{1 + (7 * i + 3 * j) % 30}" for j in range(5)) for i in range(40)]
    marked = [t + " w31 w31" for t in texts]
    real = steering.fit_direction(llama, marked, texts, layer=1)
    shuffled = texts[1::2] + texts[::2]
    noise = steering.fit_direction(llama, texts[:20], shuffled[:20], layer=1)
    assert real.stability.low > 0.95 and noise.stability.value < 0.85
    assert real.stability.n == 100 and real.coordinates[0] < real.coordinates[1]


def test_fitting_leaves_out_the_first_token_and_outliers(llama):
    vectors, scale = steering.pooled(llama, ["w1 w2 w3", "w4 w5"], [1])
    batch = tokenize(llama, ["w1 w2 w3", "w4 w5"])
    x = capture(llama, batch, [Site("resid_post", 1)])[Site("resid_post", 1)]
    torch.testing.assert_close(vectors[0, 0], x[0, 1:].mean(0))
    torch.testing.assert_close(vectors[0, 1], x[1, 2:].mean(0))
    norms = torch.cat([x[0, 1:], x[1, 2:]]).norm(dim=-1)
    assert float(scale[0]) == pytest.approx(float(norms.median()))
    last, _ = steering.pooled(llama, ["w1 w2 w3", "w4 w5"], [1], pool="last")
    torch.testing.assert_close(last[0], x[:, -1])


def test_of_a_prompt_with_an_answer_only_the_answer_is_read(llama):
    vectors, _ = steering.pooled(llama, [("w1 w2", " w5 w6")], [0])
    batch, mask = steering.answer_batch(llama, [("w1 w2", " w5 w6"), "w3 w4"])
    x = capture(llama, batch, [Site("resid_post", 0)])[Site("resid_post", 0)]
    assert mask.sum(-1).tolist() == [2, 2]
    torch.testing.assert_close(vectors[0, 0], x[0, -2:].mean(0), atol=1e-5, rtol=1e-4)


def test_the_selected_setting_is_the_strongest_within_both_budgets():
    assert steering.select(ROWS, 1.0, 2.0)["alpha"] == 2
    assert steering.select(ROWS, 0.6, 9.0)["alpha"] == 1
    assert steering.select(ROWS, 1.0, 9.0)["alpha"] == 3


def test_sweep_starts_from_the_unsteered_model(llama):
    rows = steering.sweep(llama, direction(llama), [0.5, 1.5], PROMPTS, PROMPTS, max_new_tokens=4)
    assert [row["alpha"] for row in rows] == [0, 0.5, 1.5]
    assert rows[0]["kl"] == rows[0]["effect"] == 0 < rows[1]["kl"] < rows[2]["kl"]
    assert rows[0]["perplexity"] < rows[2]["perplexity"]


# --- files ----------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path, llama):
    texts = [f"w{i} w{i + 1}" for i in range(1, 20)]
    d = steering.fit_direction(llama, texts, [t + " w30" for t in texts], layer=1, n_resamples=5, name="ends")
    card = json.loads(steering.save_direction(d, tmp_path / "ends").read_text())
    assert card["model_hash"] == llama.hash and card["layer"] == 1 and "typical residual norm" in card["units"]
    loaded = steering.load_direction(tmp_path / "ends")
    assert torch.equal(loaded.vector, d.vector)
    card = {k: v for k, v in vars(d).items() if k != "vector"}
    assert {k: v for k, v in vars(loaded).items() if k != "vector"} == card
    bare = replace(d, stability=None)
    steering.save_direction(bare, tmp_path / "bare")
    assert steering.load_direction(tmp_path / "bare").stability is None
    assert torch.equal(steering.load_vector(tmp_path / "ends").vector, d.vector)


def test_several_layers_are_one_file(tmp_path, llama):
    texts = [f"w{i} w{i + 1}" for i in range(1, 20)]
    found = steering.fit_directions(llama, texts, [t + " w30" for t in texts], layers=[0, 2], n_resamples=5)
    many = steering.ControlVector(tuple(found.values()))
    card = json.loads(steering.save_direction(many, tmp_path / "many").read_text())
    assert [part["layer"] for part in card["parts"]] == [0, 2] and "typical residual norm" in card["units"]
    back = steering.load_vector(tmp_path / "many")
    for a, b in zip(back.parts, many.parts, strict=True):
        assert torch.equal(a.vector, b.vector)
        assert {k: v for k, v in vars(a).items() if k != "vector"} == {
            k: v for k, v in vars(b).items() if k != "vector"
        }
    with pytest.raises(SteeringError, match=r"layers \[0, 2\].*load_vector"):
        steering.load_direction(tmp_path / "many")


def test_control_vector_has_what_llama_cpp_expects(tmp_path, llama):
    from gguf import GGMLQuantizationType, GGUFReader

    many = steering.ControlVector((direction(llama, 1, 1), direction(llama, 2, 2, scale=5.0)))
    path = steering.export_gguf(many, tmp_path / "tone.gguf", alpha=0.5)
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama" and fields["controlvector.layer_count"] == 2
    tensors = {t.name: t for t in reader.tensors}
    assert set(tensors) == {"direction.1", "direction.2"}
    for d in many.parts:
        tensor = tensors[f"direction.{d.layer}"]
        assert tensor.tensor_type == GGMLQuantizationType.F32 and tensor.shape.tolist() == [WIDTH]
        np.testing.assert_allclose(tensor.data, 0.5 * d.scale * d.vector.numpy(), rtol=1e-6)
    back = steering.import_gguf(path)
    assert [d.layer for d in back] == [1, 2]
    with steering.steer(llama, many, 0.5):
        expected = logits(llama)
    with steering.steer(llama, steering.ControlVector(tuple(back)), 1.0):
        torch.testing.assert_close(logits(llama), expected, atol=1e-4, rtol=1e-4)


# --- what a user can get wrong --------------------------------------------------------------------------


def test_errors_name_the_value_and_the_fix(tmp_path, llama):
    d = direction(llama)
    cases = [
        (lambda: steering.steer(llama, d, 1.0, "multiply"), "multiply.*add, project_out, affine"),
        (lambda: steering.steer(llama, d, 1.0, scope="half"), "half.*all, prompt, generated"),
        (lambda: steering.steer(llama, d, float("nan")), "finite"),
        (lambda: steering.steer(llama, [d, d], [1.0]), "2 directions and 1 strengths"),
        (lambda: steering.steer(llama, replace(d, vector=torch.ones(7))), "7 numbers.*32"),
        (lambda: steering.steer(llama, replace(d, layer=9)), "no layer 9"),
        (lambda: steering.steer(llama, replace(d, model_hash="0" * 16)), "fitted on llama \\(0000"),
    ]
    for context, message in cases:
        with pytest.raises((SteeringError, ModelError), match=message), context():
            pass
    with pytest.raises(ModelError, match="2 rows, this batch has 4"), steering.steer(llama, d, [1.0, 2.0]):
        logits(llama)
    two = ["w1 w2", "w3"]
    for call, message in [
        (lambda: steering.fit_direction(llama, two, two[:1]), "2 positive and 1 negative"),
        (lambda: steering.fit_direction(llama, two, two), "same mean"),
        (lambda: steering.fit_direction(llama, two, two[::-1], "svm"), "svm.*mean_difference, pca, probe"),
        (lambda: steering.fit_direction(llama, two, two, "sae"), "needs sae="),
        (lambda: steering.fit_direction(llama, two, [*two, "w5"], "pca"), "2 positive and 3 negative"),
        (lambda: steering.fit_direction(llama, two, two, pool="max"), "max.*mean, last"),
        (lambda: steering.pairs("irony", "train"), "irony.*formality, gender, honesty, refusal, tone"),
        (lambda: steering.pairs("tone", "dev"), "dev.*train, selection, report"),
        (lambda: steering.load_direction("nowhere"), "nowhere"),
        (lambda: steering.import_gguf(tmp_path / "none.gguf"), "no file"),
        (lambda: steering.export_gguf(direction(llama, 0), tmp_path / "x.gguf"), "layer 0"),
        (lambda: steering.generate_with_steering(llama.hf, llama.tokenizer, "w1", torch.ones(WIDTH)), "layer="),
        (lambda: steering.ControlVector((direction(llama, 2), direction(llama, 1))), r"\[2, 1\]. Sort them"),
        (lambda: steering.ControlVector(()), "one direction for each"),
        (lambda: steering.generate_with_steering(llama.hf, llama.tokenizer, "w1", d, layer=0), "knows its layer"),
        (lambda: steering.select(ROWS, 0.1, 2), "smallest are 0.500 and 1.50"),
        (lambda: style.human_ratings("songs"), "movies, products"),
    ]:
        with pytest.raises((SteeringError, style.GlassboxError), match=message):
            call()


# --- data and lexicons ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tone", "formality", "honesty", "refusal", "gender"])
def test_pairs_are_many_and_varied(name):
    splits = {split: steering.pairs(name, split) for split in ("train", "selection", "report")}
    everything = [t for p, n in splits.values() for t in (*p, *n)]
    assert sum(len(p) for p, _ in splits.values()) >= 100
    assert len(set(everything)) == len(everything)  # so no text is in two splits either
    texts = [t if isinstance(t, str) else t[1] for t in everything]
    openings = {" ".join(t.split()[:3]) for t in texts}
    assert len(openings) > 0.5 * len(texts)
    if name == "refusal":
        asked = [{prompt for prompt, _ in p} for p, _ in splits.values()]
        assert not asked[0] & asked[1] and not asked[0] & asked[2] and not asked[1] & asked[2]


def test_selection_and_report_prompts_are_disjoint():
    groups = {split: steering.prompts(split) for split in ("demo", "train", "selection", "report", "spare")}
    assert len(groups["report"]) == 200 and len(groups["selection"]) == 60
    everything = [p for g in groups.values() for p in g]
    assert len(set(everything)) == len(everything)


def test_lexicons():
    assert style.tone(["A wonderful day.", "A horrible day.", "A day."]).tolist() == pytest.approx(
        [0.57, -0.54, 0], abs=0.05
    )
    assert style.gender_words(["She saw her.", "He saw him.", "It rains."]).tolist() == pytest.approx(
        [66.7, -66.7, 0], abs=0.1
    )
    assert style.formality(["Dear Sir, we regret this."])[0] > 0 > style.formality(["Hey dude, it's cool!"])[0]
    assert style.distinct(["a b a b a b", "a b c d"]).tolist() == pytest.approx([0.4, 1.0])
    assert style.length(["one two three", ""]).tolist() == [3, 0]


def test_answer_losses_are_those_of_the_answer_alone(llama):
    asked, answers = ["w1 w2", "w3"], [" w5 w6 w7", " w8"]
    losses, counts = steering.answer_losses(llama, asked, answers)
    for i in range(2):
        batch = tokenize(llama, chat(llama, asked[i]) + answers[i])
        n = len(answers[i].split())
        assert counts[i] == n
        with torch.no_grad():
            scores = llama.hf(**batch._asdict()).logits[0].log_softmax(-1)
        expected = -sum(float(scores[j - 1, batch.input_ids[0, j]]) for j in range(-n, 0))
        assert losses[i] == pytest.approx(expected, abs=1e-3)


def test_padded_rows_are_measured_like_unpadded_ones(model):
    """Rows of different lengths share a batch; GPT-2 counts positions, so its padding must not shift them."""
    asked = ["w1", "w2 w3 w4 w5", "w6 w7 w8 w9 w10 w11 w12"]
    answers = [" w13 w14", " w15", " w16 w17 w18"]
    together, counts = steering.answer_losses(model, asked, answers, batch_size=3)
    alone, single = steering.answer_losses(model, asked, answers, batch_size=1)
    assert counts.tolist() == single.tolist()
    np.testing.assert_allclose(together, alone, atol=1e-3, rtol=1e-4)
    batch = tokenize(model, asked)
    rows = torch.cat([steering.log_probabilities(model, tokenize(model, text)) for text in asked])
    torch.testing.assert_close(steering.log_probabilities(model, batch), rows, atol=1e-3, rtol=1e-3)
    if model.name == "gpt2":  # the same without positions is wrong: the test above can fail
        with torch.no_grad():
            shifted = model.hf(**batch._asdict()).logits[not_first(batch)].log_softmax(-1)
        assert not torch.allclose(shifted, rows, atol=1e-2)


# --- with a sparse autoencoder --------------------------------------------------------------------------


def small_sae(layer=1, hook="hook_resid_post", width=WIDTH):
    from sae_lens import TopKSAE, TopKSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(0)
    metadata = SAEMetadata(hook_name=f"blocks.{layer}.{hook}")
    sae = TopKSAE(TopKSAEConfig(d_in=width, d_sae=64, k=8, apply_b_dec_to_input=True, metadata=metadata))
    with torch.no_grad():
        decoder = torch.nn.functional.normalize(torch.randn(64, width), dim=-1)
        sae.W_dec.copy_(decoder), sae.W_enc.copy_(decoder.T), sae.b_dec.normal_()
    return sae.eval()


@pytest.mark.parametrize("hook", ["hook_resid_post", "hook_out"])
def test_a_direction_from_the_features_of_an_sae(llama, hook):
    sae = small_sae(hook=hook)
    texts = [" ".join(f"w{1 + (7 * i + 3 * j) % 30}" for j in range(5)) for i in range(40)]
    marked = [t + " w31 w31" for t in texts]
    d = steering.fit_direction(llama, marked, texts, "sae", layer=1, sae=sae)
    assert d.method == "sae" and float(d.vector.norm()) == pytest.approx(1, abs=1e-5) and d.stability.low > 0.8
    features = []
    for group in (marked, texts):  # by hand: encode every token, average over each text's tokens, then over texts
        batch = tokenize(llama, group)
        x = capture(llama, batch, [Site("resid_post", 1)])[Site("resid_post", 1)]
        mask = not_first(batch)[..., None]
        with torch.no_grad():
            features.append(((sae.encode(x) * mask).sum(1) / mask.sum(1)).mean(0))
    change = features[0] - features[1]
    top = change.abs().topk(10).indices
    expected = change[top] @ sae.W_dec[top]
    torch.testing.assert_close(d.vector, expected / expected.norm(), atol=1e-4, rtol=1e-3)
    assert d.coordinates[1] > d.coordinates[0]


def test_an_sae_of_another_place_is_refused(llama):
    for sae, message in [
        (small_sae(2), "blocks.2.hook_resid_post.*layer 1 of llama.*Use layer=2"),
        (small_sae(1, "hook_mlp_out"), "hook_mlp_out.*residual stream after a layer"),
        (small_sae(1, width=16), "reads 16 numbers.*has 32"),
    ]:
        with pytest.raises(SteeringError, match=message):
            steering.fit_direction(llama, PROMPTS[:2], PROMPTS[2:], "sae", layer=1, sae=sae)


# --- gradients ------------------------------------------------------------------------------------------


def test_the_gradient_is_the_slope_that_steering_has(model):
    """Against finite differences: how fast an answer's log-probability grows along a direction."""
    if model.name == "gemma3":
        pytest.skip("this tiny model's first token is zero, and the normalised value of nothing has no usable slope")
    asked, answers = ["w1", "w2 w3 w4 w5"], [" w13 w14", " w15 w16 w17"]
    slopes = steering.gradients(model, list(zip(asked, answers, strict=True)), [1, 2])
    assert slopes.shape == (2, 2, WIDTH)
    step = 1e-2
    for i, layer in enumerate([1, 2]):
        d = direction(model, layer, seed=3, scale=1.0)
        values = []
        for alpha in (step, -step):
            with steering.steer(model, d, alpha):
                losses, counts = steering.answer_losses(model, asked, answers)
            values.append(-losses / counts)
        measured = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose((slopes[i] @ d.vector).numpy(), measured, atol=2e-2, rtol=5e-2)
    assert all(p.requires_grad and p.grad is None for p in model.hf.parameters())


def test_the_combined_direction_is_half_way(llama):
    texts = [" ".join(f"w{1 + (7 * i + 3 * j) % 30}" for j in range(5)) for i in range(12)]
    marked = [t + " w31 w31" for t in texts]
    fits = {
        method: steering.fit_direction(llama, marked, texts, method, layer=1, n_resamples=5)
        for method in ("mean_difference", "gradient", "combined")
    }
    read, moves, both = (d.vector for d in fits.values())
    assert float(both @ read) == pytest.approx(float(both @ moves), abs=1e-4)
    assert float(both @ read) > float(read @ moves) and float(both.norm()) == pytest.approx(1, abs=1e-5)
    # pushed by the same amount, the gradient's direction makes the marked texts likelier than the other one does
    means = {}
    for method in ("mean_difference", "gradient"):
        slope = steering.gradients(llama, marked, [1])[0].mean(0) - steering.gradients(llama, texts, [1])[0].mean(0)
        means[method] = float(slope @ fits[method].vector)
    assert means["gradient"] > means["mean_difference"]


# --- at equal effect ------------------------------------------------------------------------------------


def test_costs_at_equal_effect_are_interpolated_between_measured_strengths():
    points = [(0.0, np.zeros(2)), (0.4, np.array([1.0, 2.0])), (0.8, np.array([5.0, 2.0]))]
    assert steering_studies.at_effect(points, 0.2).tolist() == [0.5, 1.0]
    assert steering_studies.at_effect(points, 0.6).tolist() == pytest.approx([3.0, 2.0])
    assert steering_studies.at_effect(points, 0.8).tolist() == pytest.approx([5.0, 2.0])
    with pytest.raises(SteeringError, match=r"effect 0\.90.*0\.00, 0\.40, 0\.80"):
        steering_studies.at_effect(points, 0.9)
    rows = {
        "steer 0": {"text_loss": [2.0, 4.0], "text_tokens": [2, 4]},
        "lora -": {"text_loss": [4.0, 4.0], "text_tokens": [2, 4]},
        "lora +": {"text_loss": [2.0, 6.0], "text_tokens": [2, 4]},
    }
    assert steering_studies.extra(rows, ("lora -", "lora +"), "text").tolist() == [0.5, 0.25]


def report_of(tones, losses=1.0):
    """A report table with constant tones: condition -> tone, and the loss of a token."""
    rows = [{"condition": name, "tone": [tone] * 5} for name, tone in tones.items()]
    for row in rows:
        moved = losses if row["condition"] != "steer 0" else 1.0
        row |= {"loss": [2 * moved] * 5, "tokens": [2] * 5, "relevance": [0.5] * 5, "answers": ["a b"] * 5}
    return steering_figures.Report({"alpha": 0.1, "prompts": ["w"] * 5, "rows": rows})


def test_the_bar_is_counted_against_the_strongest_random_direction_of_either_sign():
    tones = {"steer -1": -0.4, "steer 0": 0.1, "steer 1": 0.4, "single -1": -0.2, "single 1": 0.2}
    for kind in (*steering_studies.KINDS, "single-random"):
        tones |= {f"{kind} {k} {s}": 0.01 * k * -s / 2 for k in range(10) for s in (-1, 1)}
    report = report_of(tones, losses=1.0 + np.log(1.5))
    assert report.steps == ["steer -1", "steer 0", "steer 1"]
    assert report.effect("steer").value == pytest.approx(0.8)
    assert [i.value for i in report.random("shared")] == pytest.approx([-0.01 * k for k in range(10)])
    assert report.perplexity("steer 1") == pytest.approx(1.5) and report.perplexity("steer 0") == 1
    report.rows["steer 1"]["loss"][0] += 1.0
    moved = report.perplexity_ci("steer 1")
    assert moved.value == pytest.approx(1.5 * np.exp(0.1)) and moved.low < moved.value < moved.high and moved.n == 5
    report.rows["steer 1"]["loss"][0] -= 1.0
    table = steering_figures.control_table(report)
    assert table["times the strongest"].tolist() == ["8.9", "8.9", "4.4"]
    assert table["perplexity × − / +"].tolist() == ["1.50 / 1.50"] * 3
    halves = {"steer -0.5": 0.0, "steer 0.5": 0.2}
    halves |= {f"shared {k} {s}": 0.01 * k * s for k in range(10) for s in (-0.5, 0.5)}
    table = steering_figures.control_table(report_of(tones | halves, losses=1.0 + np.log(1.5)))
    assert table["times the strongest"].tolist()[0] == "2.2" and table.index[0] == ("many layers, half turn", "shared")


def test_the_bar_is_counted_at_the_turn_that_stands_out_on_selection_prompts(monkeypatch):
    assert steering_studies.standing_out(0.6, [0.1, -0.3]) == pytest.approx(0.6 / 0.05**0.5)
    for turn in (0.5, 1.0):
        monkeypatch.setattr(steering_studies, "turn", lambda turn=turn: turn)
        found = steering_studies.random_conditions()
        assert {found[f"shared 9 {s * turn:g}"] for s in (-1, 1)} == {2}  # on all the prompts
        assert f"apart 0 {turn:g}" in found and f"apart 0 {1.5 - turn:g}" not in found
        assert found["shared 0 1"] == (2 if turn == 1 else 1) and found["single-random 0 -1"] == 2


def test_prices_are_read_at_the_same_effect_and_missing_ones_named():
    tones = {"steer -1": -0.4, "steer -0.5": -0.2, "steer 0": 0.0, "steer 0.5": 0.2, "steer 1": 0.4}
    report = report_of(tones | {"system -": -0.1, "system +": 0.2}, losses=1.0 + np.log(2))
    losses = {"steer 0": 2.0, "steer -0.5": 3.0, "steer 0.5": 3.0, "steer -1": 4.0, "steer 1": 4.0}
    rows = [{"condition": n, "text_loss": [v] * 3, "text_tokens": [2] * 3} for n, v in losses.items()]
    for row in rows:
        row |= {"reply_loss": row["text_loss"], "reply_tokens": row["text_tokens"], "choice": [1.0, 0.0, 1.0]}
    rows.append({"condition": "system -", "reply_loss": [2.5] * 3, "reply_tokens": [2] * 3})
    rows.append(rows[-1] | {"condition": "system +"})
    costs = {"rows": rows}
    found = steering_figures.priced(report, costs, "steering", 0.2)
    assert found["held-out text, nats"].startswith("+0.25 ") and found["answers' perplexity ×"].startswith("1.41 ")
    asked = steering_figures.priced(report, costs, "system prompt", 0.3)
    assert asked["held-out text, nats"] == "no prompt there"
    assert asked["unrelated replies, nats"].startswith("+0.25 ")
    assert steering_figures.more_loss(costs, "steer 1", "text").value == pytest.approx(1.0)
    shown = steering_figures.costs_table(costs)
    assert shown.loc["system prompt −", "held-out text, nats"] == "no prompt there"
    assert shown.loc["steering, full +", "multiple choice, share right"].startswith("+0.00 ")


def test_shuffled_labels_are_the_control_of_a_fit():
    positive, negative, truth = clouds(shift=1.0)
    held = clouds(20, shift=1.0, seed=5)[:2]
    stable, right = steering_figures.shuffled(positive, negative, held, n=40)
    assert stable.value < 0.85 and right.low < 10 < right.high
    assert (held[0] @ truth > held[1] @ truth).sum() >= 17


def test_the_layer_is_chosen_against_random_directions_and_the_strength_within_budgets():
    rows = [
        {"layer": layer, "alpha": alpha, "effect": effect, "kl": kl, "perplexity": 2.0}
        for layer, effects, kl in ((3, (0, 0.5, 0.9), 0.1), (5, (0, 0.4, 0.8), 0.1), (7, (0, 0.9, 2.0), 9.0))
        for alpha, effect in zip((0, 1, 2), effects, strict=True)
    ]
    control = {3: [0.3, -0.3], 5: [0.1, -0.1], 7: [0.1, 0.1]}
    best = steering_studies.choose(rows, control)  # 7 is over budget; 3 has the larger effect, 5 the larger ratio
    assert (best["layer"], best["alpha"]) == (5, 2)


def test_a_trained_direction_separates_more_and_leaves_the_weights_alone(llama):
    texts = [" ".join(f"w{1 + (7 * i + 3 * j) % 30}" for j in range(5)) for i in range(12)]
    marked = [f"{t} w31 w31" for t in texts]
    start = steering.fit_direction(llama, marked, texts, layer=1, n_resamples=0)
    before = logits(llama)
    trained = steering.train_direction(llama, marked, texts, start, 0.3, epochs=6, learning_rate=0.02)

    def loss(d):  # what training minimises, measured from outside
        total = 0.0
        for sign, group in ((1, marked), (-1, texts)):
            batch = tokenize(llama, group)
            with steering.steer(llama, d, sign * 0.3), torch.no_grad():
                scores = llama.hf(**batch.inputs).logits[:, :-1].log_softmax(-1)
            picked = scores.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
            total -= float(picked[batch.attention_mask[:, 1:].bool()].mean())
        return total

    assert loss(trained) < loss(start) - 1e-3
    assert float(trained.vector.norm()) == pytest.approx(1, abs=1e-5) and trained.method == "trained"
    assert torch.equal(logits(llama), before)
    assert all(p.requires_grad and p.grad is None for p in llama.hf.parameters())
    with pytest.raises(SteeringError, match="nothing above"):
        steering.train_direction(llama, marked, texts, replace(start, layer=2), 0.3)
