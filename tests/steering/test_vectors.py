"""Vectors in files, and what a user can get wrong with them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from worded import WIDTH, direction, logits, several

from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import ModelError
from glassbox_utils.steering import contrast, style
from glassbox_utils.steering.apply import generate_with_steering, steer
from glassbox_utils.steering.fit import fit_direction, fit_directions
from glassbox_utils.steering.selection import select
from glassbox_utils.steering.vectors import (
    ControlVector,
    SteeringError,
    export_gguf,
    import_gguf,
    load_direction,
    load_vector,
    random_direction,
    random_vector,
    save_direction,
)

TWO_ROWS = [
    {"alpha": 0, "kl": 0.0, "perplexity": 2.0, "effect": 0.0},
    {"alpha": 1, "kl": 0.5, "perplexity": 3.0, "effect": 0.4},
]


def test_random_vectors_of_several_layers_are_apart_or_shared(llama):
    many = several(llama)
    apart, shared = (random_vector(many, 3, kind) for kind in (False, True))
    for found in (apart, shared):
        assert [(d.layer, d.scale) for d in found.parts] == [(d.layer, d.scale) for d in many.parts]
        assert all(float(d.vector.norm()) == pytest.approx(1, abs=1e-5) for d in found.parts)
    assert torch.equal(shared.parts[0].vector, shared.parts[1].vector)
    assert abs(float(apart.parts[0].vector @ apart.parts[1].vector)) < 0.9
    assert torch.equal(random_vector(many, 3).parts[0].vector, apart.parts[0].vector)
    single = random_vector(many.parts[0], 3)
    assert torch.equal(single.vector, random_direction(many.parts[0], 3).vector)


def test_save_and_load(tmp_path, llama):
    texts = [f"w{i} w{i + 1}" for i in range(1, 20)]
    d = fit_direction(llama, texts, [t + " w30" for t in texts], layer=1, n_resamples=5, name="ends")
    card = json.loads(save_direction(d, tmp_path / "ends").read_text())
    assert card["model_hash"] == llama.hash and card["layer"] == 1 and "typical residual norm" in card["units"]
    loaded = load_direction(tmp_path / "ends")
    assert torch.equal(loaded.vector, d.vector)
    card = {k: v for k, v in vars(d).items() if k != "vector"}
    assert {k: v for k, v in vars(loaded).items() if k != "vector"} == card
    bare = replace(d, stability=None)
    save_direction(bare, tmp_path / "bare")
    assert load_direction(tmp_path / "bare").stability is None
    assert torch.equal(load_vector(tmp_path / "ends").vector, d.vector)


def test_several_layers_are_one_file(tmp_path, llama):
    texts = [f"w{i} w{i + 1}" for i in range(1, 20)]
    found = fit_directions(llama, texts, [t + " w30" for t in texts], layers=[0, 2], n_resamples=5)
    many = ControlVector(tuple(found.values()))
    card = json.loads(save_direction(many, tmp_path / "many").read_text())
    assert [part["layer"] for part in card["parts"]] == [0, 2] and "typical residual norm" in card["units"]
    back = load_vector(tmp_path / "many")
    for a, b in zip(back.parts, many.parts, strict=True):
        assert torch.equal(a.vector, b.vector)
        assert {k: v for k, v in vars(a).items() if k != "vector"} == {
            k: v for k, v in vars(b).items() if k != "vector"
        }
    with pytest.raises(SteeringError, match=r"layers \[0, 2\].*load_vector"):
        load_direction(tmp_path / "many")


def test_control_vector_has_what_llama_cpp_expects(tmp_path, llama):
    from gguf import GGMLQuantizationType, GGUFReader

    many = ControlVector((direction(llama, 1, 1), direction(llama, 2, 2, scale=5.0)))
    path = export_gguf(many, tmp_path / "tone.gguf", alpha=0.5)
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
    back = import_gguf(path)
    assert [d.layer for d in back] == [1, 2]
    with steer(llama, many, 0.5):
        expected = logits(llama)
    with steer(llama, ControlVector(tuple(back)), 1.0):
        torch.testing.assert_close(logits(llama), expected, atol=1e-4, rtol=1e-4)


def test_errors_name_the_value_and_the_fix(tmp_path, llama):
    d = direction(llama)
    cases = [
        (lambda: steer(llama, d, 1.0, "multiply"), "multiply.*add, project_out, affine"),
        (lambda: steer(llama, d, 1.0, scope="half"), "half.*all, prompt, generated"),
        (lambda: steer(llama, d, float("nan")), "finite"),
        (lambda: steer(llama, [d, d], [1.0]), "2 directions and 1 strengths"),
        (lambda: steer(llama, replace(d, vector=torch.ones(7))), "7 numbers.*32"),
        (lambda: steer(llama, replace(d, layer=9)), "no layer 9"),
        (lambda: steer(llama, replace(d, model_hash="0" * 16)), "fitted on llama \\(0000"),
    ]
    for context, message in cases:
        with pytest.raises((SteeringError, ModelError), match=message), context():
            pass
    with pytest.raises(ModelError, match="2 rows, this batch has 4"), steer(llama, d, [1.0, 2.0]):
        logits(llama)
    two = ["w1 w2", "w3"]
    for call, message in [
        (lambda: fit_direction(llama, two, two[:1]), "2 positive and 1 negative"),
        (lambda: fit_direction(llama, two, two), "same mean"),
        (lambda: fit_direction(llama, two, two[::-1], "svm"), "svm.*mean_difference, pca, probe"),
        (lambda: fit_direction(llama, two, two, "sae"), "needs sae="),
        (lambda: fit_direction(llama, two, [*two, "w5"], "pca"), "2 positive and 3 negative"),
        (lambda: fit_direction(llama, two, two, pool="max"), "max.*mean, last"),
        (lambda: contrast.pairs("irony", "train"), "irony.*formality, gender, honesty, refusal, tone"),
        (lambda: contrast.pairs("tone", "dev"), "dev.*train, selection, report"),
        (lambda: load_direction("nowhere"), "nowhere"),
        (lambda: import_gguf(tmp_path / "none.gguf"), "no file"),
        (lambda: export_gguf(direction(llama, 0), tmp_path / "x.gguf"), "layer 0"),
        (lambda: generate_with_steering(llama.hf, llama.tokenizer, "w1", torch.ones(WIDTH)), "layer="),
        (lambda: ControlVector((direction(llama, 2), direction(llama, 1))), r"\[2, 1\]. Sort them"),
        (lambda: ControlVector(()), "one direction for each"),
        (lambda: generate_with_steering(llama.hf, llama.tokenizer, "w1", d, layer=0), "knows its layer"),
        (lambda: select(TWO_ROWS, 0.1, 2), "smallest are 0.500 and 1.50"),
        (lambda: style.human_ratings("songs"), "movies, products"),
    ]:
        with pytest.raises((SteeringError, GlassboxError), match=message):
            call()
