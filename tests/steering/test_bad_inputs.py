"""A table of what people get wrong with steering: each a GlassboxError of one paragraph, and nothing half-written."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from worded import WIDTH, build, direction, logits, several

from glassbox_utils.core.assets import DATA
from glassbox_utils.steering import apply, contrast, fit, selection, training, vectors

NAN, INF = float("nan"), float("inf")
TEXTS = ["w1 w2", "w3 w4 w5"]
M = build("llama")
D, MANY = direction(M), several(M)
VALENCE = torch.linspace(-1, 1, 32)


def enter(*args, **options):
    with apply.steer(M, *args, **options):
        logits(M)


def plain(vector, alpha=1.0, prompt="w1", **options):
    return apply.generate_with_steering(M.hf, M.tokenizer, prompt, vector, alpha, max_new_tokens=2, **options)


def fitted(positive=TEXTS, negative=("w6 w7", "w8"), **options):
    return fit.fit_direction(M, positive, negative, **{"n_resamples": 0, **options})


def swept(**options):
    given = {"direction": D, "alphas": [0.1], "questions": TEXTS, "neutral": TEXTS} | options
    return selection.sweep(M, max_new_tokens=2, **given)


def trained(**options):
    given = {"questions": TEXTS, "start": MANY, "alpha": 0.5, "valence": VALENCE, "steps": 1} | options
    return training.train_vector(M, **given)


def taught(**options):
    given = {"positive": TEXTS, "negative": TEXTS[::-1], "start": D, "alpha": 0.1, "epochs": 1} | options
    return training.train_direction(M, **given)


ROW = {"alpha": 0, "kl": 0.0, "perplexity": 2.0, "effect": 0.0}
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))

CALLS = {
    "alpha NaN": lambda: enter(D, NAN),
    "alpha inf": lambda: enter(D, INF),
    "alpha True": lambda: enter(D, True),
    "alpha text": lambda: enter(D, "1"),
    "alpha too large": lambda: enter(D, 1e38),
    "alpha NaN in one row": lambda: enter(D, [0.1, NAN]),
    "alpha too large in one row": lambda: enter([D, MANY], [0.1, -1e38], mode="affine"),
    "no alphas": lambda: enter(D, []),
    "no directions": lambda: enter([]),
    "unequally many": lambda: enter([D, D, D], [0.1, 0.2]),
    "rows of another batch": lambda: enter([D, None, D], 0.1),
    "a name for a direction": lambda: enter("tone"),
    "a tensor for a direction": lambda: enter(D.vector),
    "no unit vector": lambda: enter(replace(D, vector=3 * D.vector)),
    "zero vector": lambda: enter(replace(D, vector=torch.zeros(WIDTH))),
    "NaN vector": lambda: enter(replace(D, vector=D.vector * NAN)),
    "whole numbers": lambda: enter(replace(D, vector=torch.eye(WIDTH, dtype=torch.long)[0])),
    "a list for a vector": lambda: enter(replace(D, vector=D.vector.tolist())),
    "zero scale": lambda: enter(replace(D, scale=0.0)),
    "negative scale": lambda: enter(replace(D, scale=-1.0)),
    "NaN scale": lambda: enter(replace(D, scale=NAN)),
    "scale as text": lambda: enter(replace(D, scale="3")),
    "layer beyond": lambda: enter(replace(D, layer=3)),
    "layer True": lambda: enter(replace(D, layer=True)),
    "other width": lambda: enter(replace(D, vector=torch.eye(WIDTH + 1)[0])),
    "other model": lambda: enter(replace(D, model_hash="0123456789abcdef")),
    "mode": lambda: enter(D, 0.1, "subtract"),
    "scope": lambda: enter(D, 0.1, scope="answer"),
    "control vector of nothing": lambda: vectors.ControlVector(()),
    "control vector of tensors": lambda: vectors.ControlVector((D.vector,)),
    "control vector of a list": lambda: vectors.ControlVector([D]),
    "control vector out of order": lambda: vectors.ControlVector(MANY.parts[::-1]),
    "random seed negative": lambda: vectors.random_direction(D, -1),
    "random seed too large": lambda: vectors.random_direction(D, 10**20),
    "random seed True": lambda: vectors.random_direction(D, True),
    "random seed text": lambda: vectors.random_vector(MANY, "0"),
    "random like a tensor": lambda: vectors.random_vector(D.vector, 0),
    "export alpha NaN": lambda: vectors.export_gguf(D, "x.gguf", NAN),
    "export alpha zero": lambda: vectors.export_gguf(D, "x.gguf", 0),
    "export alpha True": lambda: vectors.export_gguf(D, "x.gguf", True),
    "export too long": lambda: vectors.export_gguf(D, "x.gguf", 1e39),
    "export NaN": lambda: vectors.export_gguf(replace(D, vector=D.vector * NAN), "x.gguf"),
    "export nothing": lambda: vectors.export_gguf([], "x.gguf"),
    "export a tensor": lambda: vectors.export_gguf(D.vector, "x.gguf"),
    "export layer 0": lambda: vectors.export_gguf(MANY, "x.gguf"),
    "export below a file": lambda: vectors.export_gguf(D, Path(__file__) / "x.gguf"),
    "save a tensor": lambda: vectors.save_direction(D.vector, "x"),
    "save NaN scale": lambda: vectors.save_direction(replace(D, scale=NAN), "x"),
    "save a layer of text": lambda: vectors.save_direction(replace(D, layer="1"), "x"),
    "save without a name": lambda: vectors.save_direction(D, ""),
    "save NUL": lambda: vectors.save_direction(D, "a\0b"),
    "save below a file": lambda: vectors.save_direction(D, Path(__file__) / "x"),
    "save a long name": lambda: vectors.save_direction(D, "x" * 300),
    "save into /proc": lambda: vectors.save_direction(D, "/proc/x/y"),
    "load nothing": lambda: vectors.load_vector("nowhere"),
    "load a long name": lambda: vectors.load_vector("x" * 5000),
    "load a number": lambda: vectors.load_vector(5),
    "plain zero tensor": lambda: plain(torch.zeros(WIDTH), layer=1),
    "plain without a layer": lambda: plain(torch.ones(WIDTH)),
    "plain list": lambda: plain([1.0] * WIDTH, layer=1),
    "plain layer beyond": lambda: plain(torch.ones(WIDTH), layer=7),
    "plain no prompts": lambda: plain(D, prompt=[]),
    "plain prompt of numbers": lambda: plain(D, prompt=[1]),
    "plain Model": lambda: apply.generate_with_steering(M, M.tokenizer, "w1", D),
    "continuations: unequally many": lambda: apply.continuations(M, TEXTS, [None]),
    "continuations: one text": lambda: apply.continuations(M, "w1", [None, None]),
    "continuations: no batch": lambda: apply.continuations(M, TEXTS, [None, None], batch_size=0),
    "continuations: seed": lambda: apply.continuations(M, TEXTS, [None, None], temperature=1.0, seed=-1),
    "continuations: bare vector": lambda: apply.continuations(M, TEXTS, [D, D]),
    "side effect of no text": lambda: selection.side_effect(M, [], [(D, 0.1)]),
    "side effect of no setting": lambda: selection.side_effect(M, TEXTS, []),
    "side effect of one text": lambda: selection.side_effect(M, "w1", [(D, 0.1)]),
    "sweep: no strength": lambda: swept(alphas=[]),
    "sweep: zero": lambda: swept(alphas=[0.1, 0.0]),
    "sweep: NaN": lambda: swept(alphas=[NAN]),
    "sweep: True": lambda: swept(alphas=[True]),
    "sweep: no question": lambda: swept(questions=[]),
    "sweep: a name": lambda: swept(direction="tone"),
    "select nothing": lambda: selection.select([], 1, 2),
    "select without alpha 0": lambda: selection.select([ROW | {"alpha": 1}] * 2, 1, 2),
    "select rows without kl": lambda: selection.select([{"alpha": 0}, {"alpha": 1}], 1, 2),
    "select NaN": lambda: selection.select([ROW, ROW | {"alpha": 1}], NAN, 2),
    "fit: one text a side": lambda: fitted(["w1"], ["w2"]),
    "fit: a text for a list": lambda: fitted("w1 w2"),
    "fit: numbers": lambda: fitted([1, 2]),
    "fit: triples": lambda: fitted([("a", "b", "c")] * 2),
    "fit: resamples": lambda: fitted(n_resamples=-1),
    "fit: resamples True": lambda: fitted(n_resamples=True),
    "fit: seed": lambda: fitted(n_resamples=2, seed=-1),
    "fit: method": lambda: fitted(method="svm"),
    "fit: pool": lambda: fitted(pool="max"),
    "fit: layer": lambda: fitted(layer=9),
    "fit: no layers": lambda: fit.fit_directions(M, TEXTS, TEXTS, layers=[]),
    "fit: one number for layers": lambda: fit.fit_directions(M, TEXTS, TEXTS, layers=1),
    "direction_of NaN": lambda: fit.direction_of(X, X * NAN),
    "direction_of nothing": lambda: fit.direction_of(X, X[:0]),
    "direction_of one row": lambda: fit.direction_of(X, X[0]),
    "direction_of widths": lambda: fit.direction_of(X, X[:, :2]),
    "direction_of method": lambda: fit.direction_of(X, X + 1, "svm"),
    "read no text": lambda: fit.pooled(M, [], [1]),
    "gradients in no batch": lambda: fit.gradients(M, TEXTS, [1], batch_size=0),
    "pairs": lambda: contrast.pairs("irony", "train"),
    "prompts": lambda: contrast.prompts("all"),
    "train: no steps": lambda: trained(steps=0),
    "train: alpha NaN": lambda: trained(alpha=NAN),
    "train: rate inf": lambda: trained(learning_rate=INF),
    "train: rate negative": lambda: trained(learning_rate=-1.0),
    "train: divergence NaN": lambda: trained(divergence=NAN),
    "train: variety below 0": lambda: trained(variety=-1.0),
    "train: no tokens": lambda: trained(new_tokens=0),
    "train: seed": lambda: trained(seed=-2),
    "train: one text": lambda: trained(questions="w1"),
    "train: start": lambda: trained(start=D.vector),
    "train: no valence": lambda: trained(valence=torch.zeros(32)),
    "teach: alpha": lambda: taught(alpha=-0.1),
    "teach: epochs": lambda: taught(epochs=0),
    "teach: no text": lambda: taught(positive=[]),
    "teach: last layer": lambda: taught(start=direction(M, 2)),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", CALLS)
def test_a_bad_call_is_refused_in_one_paragraph(case, tmp_path):
    refused(CALLS[case])
    assert list(tmp_path.iterdir()) == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in M.hf.modules())


# --- files --------------------------------------------------------------------------------------------


def edited(**changes):
    """A change of the card; ``None`` takes a field out."""

    def change(card, tensors):
        values = json.loads(card.read_text()) | changes
        card.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return change


def of_parts(**changes):
    def change(card, tensors):
        values = json.loads(card.read_text())
        values["parts"][0] |= changes
        card.write_text(json.dumps(values))

    return change


def stored(**named):
    """Other tensors, with a card that has their hash."""

    def change(card, tensors):
        save_file(named, tensors)
        edited(sha256=hashlib.sha256(tensors.read_bytes()).hexdigest())(card, tensors)

    return change


def flipped(card, tensors):
    raw = bytearray(tensors.read_bytes())
    raw[-5] ^= 1
    tensors.write_bytes(raw)


FILES = {
    "layer as text": edited(layer="1"),
    "layer negative": edited(layer=-1),
    "layer True": edited(layer=True),
    "layer with a fraction": edited(layer=1.5),
    "no layer": edited(layer=None),
    "scale NaN": edited(scale=NAN),
    "scale infinite": edited(scale=INF),
    "scale zero": edited(scale=0),
    "scale negative": edited(scale=-3.0),
    "scale as text": edited(scale="3"),
    "no scale": edited(scale=None),
    "name as number": edited(name=7),
    "coordinates of one": edited(coordinates=[0.1]),
    "coordinates NaN": edited(coordinates=[NAN, 0.0]),
    "texts as text": edited(n_texts="ab"),
    "stability without its ends": edited(stability={"value": 0.5}),
    "stability as a number": edited(stability=0.5),
    "misspelt": edited(sclae=3.0),
    "hash of others": edited(sha256="0" * 64),
    "no hash": edited(sha256=None),
    "hash as number": edited(sha256=5),
    "parts as text": edited(parts="ab"),
    "parts beside fields": edited(parts=[]),
    "a list": lambda card, tensors: card.write_text("[1]"),
    "no JSON": lambda card, tensors: card.write_text("{"),
    "deep": lambda card, tensors: card.write_text("[" * 100_000),
    "empty": lambda card, tensors: card.write_text(""),
    "binary": lambda card, tensors: card.write_bytes(b"\xff\xfe\x00"),
    "huge": lambda card, tensors: card.write_bytes(b" " * 3_000_000),
    "a folder": lambda card, tensors: (card.unlink(), card.mkdir()),
    "one bit": flipped,
    "cut off": lambda card, tensors: tensors.write_bytes(tensors.read_bytes()[:-40]),
    "no tensors": lambda card, tensors: tensors.write_bytes(b""),
    "other tensors": stored(other=D.vector),
    "one tensor more": stored(vector=D.vector, other=D.vector.clone()),
    "NaN": stored(vector=D.vector * NAN),
    "zeros": stored(vector=torch.zeros(WIDTH)),
    "too long": stored(vector=2 * D.vector),
    "a matrix": stored(vector=torch.eye(4)),
    "whole numbers": stored(vector=torch.ones(1, dtype=torch.long)),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_refused_when_it_is_loaded(case, tmp_path):
    card = vectors.save_direction(D, tmp_path / "calm-0.5")
    FILES[case](card, card.with_name("calm-0.5.safetensors"))
    refused(lambda: vectors.load_vector(tmp_path / "calm-0.5"))


SEVERAL = [of_parts(layer=1), of_parts(scale="x"), of_parts(kk=1), edited(parts=[]), edited(parts=[3])]


@pytest.mark.parametrize("change", SEVERAL)
def test_a_bad_card_of_several_layers_is_refused(change, tmp_path):
    card = vectors.save_direction(MANY, tmp_path / "many")
    change(card, card.with_suffix(".safetensors"))
    refused(lambda: vectors.load_vector(tmp_path / "many"))


def gguf(path, tensors, architecture="controlvector"):
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), architecture)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ONES = np.ones(8, dtype=np.float32)


@pytest.mark.parametrize(
    "tensors",
    [
        {"direction.1": 0 * ONES},
        {"direction.1": NAN * ONES},
        {"direction.1": ONES, "direction.2": np.ones(4, dtype=np.float32)},
        {"direction.x": ONES},
        {"direction.1": np.ones(8, dtype=np.int32)},
        {"other": ONES},
    ],
)
def test_a_bad_control_vector_is_refused(tensors, tmp_path):
    gguf(tmp_path / "x.gguf", tensors)
    refused(lambda: vectors.import_gguf(tmp_path / "x.gguf"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no vector at all" * 20, None])
def test_what_is_no_control_vector_is_refused(content, tmp_path):
    path = tmp_path / "x.gguf"
    if content is None:
        vectors.export_gguf(D, path)
        content = path.read_bytes()[:150]
    path.write_bytes(content)
    refused(lambda: vectors.import_gguf(path))
    gguf(path, {"direction.1": ONES}, "llama")
    refused(lambda: vectors.import_gguf(path))


# --- what is saved is what is loaded ------------------------------------------------------------------


@pytest.mark.parametrize("moment", [1, 2, 3, 4])
def test_a_kill_at_any_moment_of_saving_leaves_a_pair_or_an_error(moment, tmp_path, monkeypatch):
    vectors.save_direction(D, tmp_path / "calm")
    other, calls = replace(direction(M, seed=9), name="other"), []

    def watch(real):
        def stop(*args, **options):
            calls.append(1)
            if len(calls) == moment:
                raise KeyboardInterrupt
            return real(*args, **options)

        return stop

    for owner, name in ((os, "replace"), (Path, "write_bytes"), (Path, "write_text")):
        monkeypatch.setattr(owner, name, watch(getattr(owner, name)))
    with pytest.raises(KeyboardInterrupt):
        vectors.save_direction(other, tmp_path / "calm")
    monkeypatch.undo()
    if moment == 4:  # between the two renames
        assert "does not belong to calm.safetensors" in refused(lambda: vectors.load_vector(tmp_path / "calm"))
    else:
        assert torch.equal(vectors.load_direction(tmp_path / "calm").vector, D.vector)
    vectors.save_direction(other, tmp_path / "calm")
    assert torch.equal(vectors.load_direction(tmp_path / "calm").vector, other.vector)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calm.json", "calm.safetensors"]


@pytest.mark.parametrize("names", [("calm-0.5", "calm-0.8"), ("a.b.c", "a.b"), ("v1.json", "v2.json"), (".x", ".y")])
def test_names_with_dots_are_names(names, tmp_path):
    for i, name in enumerate(names):
        vectors.save_direction(direction(M, seed=i), tmp_path / name)
    for i, name in enumerate(names):
        assert torch.equal(vectors.load_direction(tmp_path / name).vector, direction(M, seed=i).vector)
    assert len(list(tmp_path.iterdir())) == 4


def test_layers_that_share_one_tensor_are_saved_and_loaded(tmp_path):
    vectors.save_direction(vectors.ControlVector((D, replace(D, layer=2))), tmp_path / "twice")
    assert all(torch.equal(part.vector, D.vector) for part in vectors.load_vector(tmp_path / "twice").parts)


@pytest.mark.parametrize("name", sorted(p.stem for p in (DATA / "vectors").glob("*.json")))
def test_shipped_vectors_are_what_their_cards_say(name):
    card = json.loads((DATA / "vectors" / f"{name}.json").read_text())
    tensors = DATA / "vectors" / f"{name}.safetensors"
    assert card["sha256"] == hashlib.sha256(tensors.read_bytes()).hexdigest()
    assert vectors.load_vector(name).name.split("-")[0]
