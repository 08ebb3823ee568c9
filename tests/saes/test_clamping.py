"""Clamping on tiny random models: what is held, what is not, what is left afterwards, and which mistakes are named."""

import json
import re

import numpy as np
import pytest
import taped
import torch
from worded import LAYERS, PROMPTS, WIDTH, fails_at, logits, record, untouched

from glassbox_utils import cli
from glassbox_utils.core.assets import DATA
from glassbox_utils.core.devices import result
from glassbox_utils.core.interventions import edit
from glassbox_utils.core.models import ModelError, Site, load_model
from glassbox_utils.core.text import chat, generate, tokenize
from glassbox_utils.lab import panels
from glassbox_utils.saes import (
    clamping,
    clamping_choice_study,
    clamping_report_study,
    clamping_study,
    detection,
    learning,
    read_write,
)
from glassbox_utils.saes.clamping import ClampError, Feature, Group
from glassbox_utils.saes.store import load_sae, shipped

D_SAE, K = 64, 8


def make_sae(model, layer=1, seed=0, width=WIDTH, model_hash=None):
    """A random TopK SAE as sae_lens makes it."""
    from sae_lens import TopKSAE, TopKSAEConfig

    torch.manual_seed(seed)
    sae = TopKSAE(TopKSAEConfig(d_in=width, d_sae=D_SAE, k=K, rescale_acts_by_decoder_norm=False))
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(D_SAE, width), dim=-1))
        sae.W_enc.copy_(sae.W_dec.t())
        sae.b_enc.zero_()
        sae.b_dec.copy_(0.1 * torch.randn(width))
    sae.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    sae.cfg.metadata.model_hash = model.hash if model_hash is None else model_hash
    sae.cfg.metadata.model_name = model.name
    sae.cfg.metadata.median_norm = 1e6  # a tiny random model has no massive activations; see the test about them
    return sae.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sae(model):
    return make_sae(model)


def feature(model, sae, index=3, unit=2.0):
    return clamping.feature(model, sae, index, unit)


# --- what is held -----------------------------------------------------------------------------------------


def test_clamps_prompt_and_generated_tokens_and_keeps_the_error(model, sae):
    one = feature(model, sae)
    inner = []
    with edit(model, one.site, lambda x: (inner.append(result(x)), x)[1]), clamping.clamp(model, one, 1.5):
        outer = [result(x) for x in record(model, 1, lambda: generate(model, PROMPTS, 4))]
    assert [x.shape[1] for x in outer] == [7, 1, 1, 1]  # left-padded prompts, then single tokens from the cache
    for before, after in zip(inner, outer, strict=True):
        activation = sae.encode(before)[..., one.index]
        wanted = before + (1.5 * one.unit - activation)[..., None] * sae.W_dec[one.index]
        torch.testing.assert_close(after, wanted, atol=1e-4, rtol=1e-4)
        # everything but the one direction is untouched: the error term is kept
        rest = torch.eye(WIDTH) - torch.outer(sae.W_dec[one.index], sae.W_dec[one.index])
        torch.testing.assert_close(after @ rest, before @ rest, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", clamping.MODES)
def test_modes_are_what_they_say(llama, mode):
    sae = make_sae(llama)
    x = torch.randn(2, 3, WIDTH)
    on, amount = torch.ones(2, 1, 1, dtype=torch.bool), torch.full((2, 1, 1), 1.5)
    before = sae.encode(x)[..., [5]]
    after = clamping.apply(x, sae, [5], mode, amount, on)
    change = {
        "clamp": 1.5 - before,
        "add": torch.full_like(before, 1.5),
        "scale": 0.5 * before,
        "ablate": -1.5 * before,
    }
    torch.testing.assert_close(after - x, change[mode] * sae.W_dec[5], atol=1e-5, rtol=1e-4)
    off = clamping.apply(x, sae, [5], mode, amount, ~on)
    assert torch.equal(off, x)


def test_ablating_everything_that_fires_leaves_bias_and_error(llama):
    sae = make_sae(llama)
    x = torch.randn(1, 4, WIDTH)
    code = sae.encode(x)
    on, amount = torch.ones(1, 1, D_SAE, dtype=torch.bool), torch.ones(1, 1, D_SAE)
    after = clamping.apply(x, sae, range(D_SAE), "ablate", amount, on)
    torch.testing.assert_close(after, x - sae.decode(code) + sae.b_dec, atol=1e-4, rtol=1e-4)


def test_positions_of_massive_norm_are_left_alone(llama):
    sae = make_sae(llama)
    sae.cfg.metadata.median_norm = 1.0
    x = torch.nn.functional.normalize(torch.randn(1, 3, WIDTH), dim=-1)
    x[0, 0] *= 50
    after = clamping.apply(x, sae, [1], "clamp", torch.ones(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool))
    assert torch.equal(after[0, 0], x[0, 0]) and not torch.equal(after[0, 1:], x[0, 1:])


def test_groups_over_layers_and_features(model, sae):
    other = make_sae(model, layer=0, seed=1)
    group = Group((feature(model, sae, 3), feature(model, sae, 9), feature(model, other, 4, 1.0)))
    with clamping.clamp(model, group, 2.0):
        both = logits(model)
    with (
        clamping.clamp(model, feature(model, other, 4, 1.0), 2.0),
        clamping.clamp(model, Group(group.features[:2]), 2.0),
    ):
        nested = logits(model)
    torch.testing.assert_close(both, nested, atol=1e-4, rtol=1e-4)


def make_elementwise(model, kind, layer=1):
    """A random SAE whose features do not compete."""
    import sae_lens

    torch.manual_seed(4)
    make, config = getattr(sae_lens, f"{kind}SAE"), getattr(sae_lens, f"{kind}SAEConfig")
    sae = make(config(d_in=WIDTH, d_sae=D_SAE, normalize_activations="layer_norm"))
    donor = make_sae(model, layer)
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_dec"):
            getattr(sae, name).copy_(getattr(donor, name))
        sae.b_enc.copy_(0.1 * torch.randn(D_SAE))
        if kind == "JumpReLU":
            sae.threshold.copy_(torch.rand(D_SAE))
    sae.cfg.metadata = donor.cfg.metadata
    return sae.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["Standard", "JumpReLU"])
@pytest.mark.parametrize("mode", clamping.MODES)
def test_only_the_chosen_features_are_encoded_where_they_do_not_compete(llama, kind, mode, monkeypatch):
    sae = make_elementwise(llama, kind)
    x, chosen = 3 * torch.randn(4, 7, WIDTH), [60, 3, 17]
    code = sae.encode(x)[..., chosen]
    assert 0 < float((code > 0).float().mean()) < 1
    on, amount = torch.rand(4, 1, 3) > 0.3, torch.rand(4, 1, 3)
    delta = torch.where(on, clamping.changed(code, mode, amount), 0.0) @ sae.W_dec[chosen]
    want = x + delta * x.std(-1, keepdim=True)  # the SAE undoes its layer norm when it decodes
    monkeypatch.setattr(sae, "encode", None)  # all features at once
    after = clamping.apply(x, sae, chosen, mode, amount, on)
    torch.testing.assert_close(after, torch.where(on.any(-1, keepdim=True), want, x), atol=1e-5, rtol=1e-5)


def test_what_is_held_is_held_in_recorded_steps(model, sae, monkeypatch, request):
    if request.config.getoption("--device") != "cpu":
        pytest.skip("of the tape")
    here, other = feature(model, sae), make_elementwise(model, "JumpReLU", 0)
    group = Group((here, feature(model, sae, 9), feature(model, other, 5, 1.0)))
    for mode in clamping.MODES:
        for scope in ("all", "prompt", "generated"):
            with clamping.clamp(model, [here, None, group, here], [20.0, None, 10.0, -5.0], mode, scope):
                want = generate(model, PROMPTS, 10)
                with monkeypatch.context() as patch:
                    made = taped.taped(patch)
                    assert generate(model, PROMPTS, 10) == want
                    assert len(made) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_take_a_float32_sae(dtype):
    from worded import build

    model = build("llama")
    sae, other = make_sae(model), make_elementwise(model, "Standard", 0)
    model.hf.to(dtype)
    plain, one = logits(model), Feature(sae, 3, 2.0)
    for what in (one, Group((one, Feature(other, 5, 1.0)))):
        for mode in clamping.MODES:
            with clamping.clamp(model, [what, None, what, None], [2.0, None, -1.0, None], mode):
                seen = record(model, 1, lambda: generate(model, PROMPTS, 3))
                mixed = logits(model)
            assert {x.dtype for x in seen} == {dtype} and mixed.dtype == dtype
            assert torch.equal(mixed[[1, 3]], plain[[1, 3]])
            assert mode in ("scale", "ablate") or not torch.equal(mixed, plain)  # these need a feature that fires


# --- rows ---------------------------------------------------------------------------------------------------


def test_unclamped_rows_of_a_mixed_batch_give_the_tokens_they_give_alone(model, sae):
    a, b = feature(model, sae, 3), feature(model, make_sae(model, layer=2, seed=2), 7)
    alone = [generate(model, [p], 10)[0] for p in PROMPTS]
    with clamping.clamp(model, [a, None, b, a], [20.0, None, 20.0, None]):
        mixed = generate(model, PROMPTS, 10)
    with clamping.clamp(model, a, 20.0):
        first = generate(model, PROMPTS, 10)
    with clamping.clamp(model, b, 20.0):
        third = generate(model, PROMPTS, 10)
    assert mixed[1] == alone[1] and mixed[3] == alone[3]
    assert mixed[0] == first[0] and mixed[2] == third[2]
    assert mixed[0] != alone[0] and mixed[2] != alone[2]


def test_a_batch_of_another_size_is_refused(llama):
    one = feature(llama, make_sae(llama))
    with pytest.raises(ModelError, match="2 rows, this batch has 4"), clamping.clamp(llama, one, [1.0, None]):
        logits(llama)
    with pytest.raises(ClampError, match="2 features and 3 strengths"), clamping.clamp(llama, [one, None], [1, 2, 3]):
        pass


def test_scope(model, sae):
    one = feature(model, sae)
    plain = record(model, 1, lambda: generate(model, PROMPTS, 3))
    for scope, touched in (("prompt", True), ("generated", False)):
        with clamping.clamp(model, one, 2.0, scope=scope):
            seen = record(model, 1, lambda: generate(model, PROMPTS, 3))
        assert torch.equal(seen[0], plain[0]) != touched


def test_stream_writes_what_generate_writes_and_leaves_nothing_between_tokens(model, sae):
    one, before = feature(model, sae), logits(model)
    with clamping.clamp(model, [one, None, one, None], [2.0, None, -1.0, None]):
        whole = generate(model, PROMPTS, 6)
    ids = []
    for step in clamping.stream(model, PROMPTS, [one, None, one, None], [2.0, None, -1.0, None], 6):
        assert torch.equal(logits(model), before)
        ids = step
    assert [text.strip() for text in model.tokenizer.batch_decode(ids)] == [text.strip() for text in whole]
    next(clamping.stream(model, PROMPTS, one, 2.0, 6))  # broken off after one token
    assert torch.equal(logits(model), before)


def test_the_panel_answers_to_its_slider(llama):
    one = feature(llama, make_sae(llama))
    panel = panels.clamp_panel(llama, {"w": one}, "w1 w2", 2.0, 40.0, 5)
    (_, (dial, _, state), view) = panel.children[0], panel.children[1].children, panel.children[2]
    first = view.value
    assert state.value == "done" and "unclamped" in first and "2 x its natural size" in first
    dial.value = 40.0
    assert "40 x its natural size" in view.value
    assert view.value.split("clamp-answer")[2] != first.split("clamp-answer")[2]
    shown = [page.split("clamp-answer")[1].split("</div>")[0] for page in (first, view.value)]
    assert shown[0] == shown[1]  # the unclamped answer stays
    dial.value = 0
    left, right = view.value.split('clamp-answer" style="white-space:pre-wrap">')[1:]
    assert left.split("</div>")[0] == right.split("</div>")[0]  # strength 0 leaves the model alone


# --- what is left afterwards ----------------------------------------------------------------------------------


def test_logits_are_bit_identical_afterwards(model, sae):
    before, one = logits(model), feature(model, sae)
    with clamping.clamp(model, one, 2.0):
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    clamped = clamping.clamp(model, [one, None, one, one], 1.0)
    with pytest.raises(RuntimeError, match="middle"), clamped, edit(model, Site("resid_post", LAYERS - 1), fails_at(3)):
        generate(model, PROMPTS, 8)
    untouched(model, before)


# --- learning ---------------------------------------------------------------------------------------------------


def test_learning_finds_features_that_make_the_answers_likelier(model, monkeypatch):
    monkeypatch.setattr(learning, "QUIET", 0.5)  # a random SAE has few rare features
    sae, before = make_sae(model), logits(model)
    wants_gradient = [p.requires_grad for p in model.hf.parameters()]
    given = learning.lessons(model, 1, ["w1 w2", "w3", "w4 w5 w6"], [" w7 w8 w9"] * 3, batch_size=2)
    assert [int(x.answer.sum()) for x in given] == [6, 3]
    group, control, loss = learning.learn_group(model, sae, given, n=4, steps=24, rate=0.2)
    again, _, same = learning.learn_group(model, sae, given, n=4, steps=24, rate=0.2)
    assert loss == same and [vars(f) for f in group.features] == [vars(f) for f in again.features]
    assert 1 <= len(group.features) <= 4 and all(f.unit > 0 for f in group.features)
    assert [f.unit for f in control.features] == [f.unit for f in group.features]
    held = []
    for what in (None, control, group):
        with clamping.clamp(model, [what] * 2), torch.no_grad():
            held.append(float(learning.taught_loss(model, given[0])))
    assert held[2] < min(held[:2])  # clamping itself does what learning promised
    vector, loss = learning.learn_vector(model, 1, given, steps=24, rate=0.1)
    assert vector.shape == (WIDTH,) and min(loss[-2:]) < min(loss[:2])
    assert torch.equal(logits(model), before)
    assert [p.requires_grad for p in model.hf.parameters()] == wants_gradient
    assert all(p.grad is None for p in model.hf.parameters())


def test_learning_needs_features_that_are_quiet(llama):
    given = learning.lessons(llama, 1, ["w1 w2"], [" w3 w4"])
    with pytest.raises(ClampError, match=r"Only \d+ features are quiet.*too few to learn 33"):
        learning.learn_group(llama, make_sae(llama), given, n=33)


# --- mistakes ---------------------------------------------------------------------------------------------------


def test_mistakes_name_value_allowed_and_fix(llama):
    sae = make_sae(llama)
    one = feature(llama, sae)
    for wrong in (0, 0.0, [1.0, 0, None, None]):
        with pytest.raises(ClampError, match=r"strength of 0.*mode='ablate'.*None"), clamping.clamp(llama, one, wrong):
            pass
    with pytest.raises(ClampError, match=r"no mode 'hold'\. Allowed: clamp, add, scale, ablate"):
        clamping.clamp(llama, one, 1.0, mode="hold").__enter__()
    for wrong in (float("nan"), float("inf"), True, "2", [1.0, "2", None, None]):
        with pytest.raises(ClampError, match=r"is no finite number"), clamping.clamp(llama, one, wrong):
            pass
    with pytest.raises(ClampError, match=r"is 2e\+38, more than llama can hold.*Useful"):
        clamping.clamp(llama, Feature(sae, 3, 2e19), 1e19).__enter__()
    for what, words in (([], "list is empty"), (Group(()), "holds no feature"), ("bridge", "'bridge' is no feature"),
                        ([one, 3], "3 is no feature.*gb.feature")):  # fmt: skip
        with pytest.raises(ClampError, match=words), clamping.clamp(llama, what, 1.0):
            pass
    for index in (-1, D_SAE, "bridge"):
        with pytest.raises(ClampError, match=rf"no feature {index!r}.*0 to {D_SAE - 1}"):
            feature(llama, sae, index)
    with pytest.raises(ClampError, match=r"unit of feature 3 is given as 0.*natural_maxima"):
        feature(llama, sae, 3, 0.0)
    with pytest.raises(ClampError, match=r"no SAE for layer 2 .*Layers with one: 1.*train"):
        clamping.sae_at(llama, {1: sae}, 2)
    assert clamping.sae_at(llama, {1: sae}, 1) is sae


def test_an_sae_of_another_model_is_refused_by_width_and_by_hash(llama):
    with pytest.raises(ClampError, match=rf"reads 48 dimensions.*has {WIDTH}"):
        feature(llama, make_sae(llama, width=48))
    with pytest.raises(ClampError, match=rf"weights 0123.*{llama.hash}"):
        feature(llama, make_sae(llama, model_hash="0123"))
    with pytest.raises(ClampError, match=rf"blocks.7.*layers 0 to {LAYERS - 1}"):
        feature(llama, make_sae(llama, layer=7))
    stolen = Feature(make_sae(llama, model_hash="0123"), 3, 1.0)  # built without the check
    with pytest.raises(ClampError, match="0123"), clamping.clamp(llama, stolen, 1.0):
        pass


# --- measures ---------------------------------------------------------------------------------------------------


def test_natural_maxima_are_the_largest_activations(llama):
    sae = make_sae(llama)
    texts = ["w1 w2 w3", "w7 w8 w9 w10"]
    top = clamping.natural_maxima(llama, sae, texts, batch_size=1)
    one = int(top.argmax())
    seen = []
    for text in texts:
        tokens, values = clamping.activations_in(llama, Feature(sae, one, 1.0), text)
        assert len(tokens) == len(values) and values[0] == 0
        seen.append(float(values.max()))
    assert float(top[one]) == pytest.approx(max(seen), rel=1e-4) and float(top[one]) > 0


def test_a_group_is_made_of_what_fires_on_the_name(llama):
    sae = make_sae(llama)
    texts = ["We saw the old bridge in the fog.", "No such thing here.", "Bridges!", "And two bridges."]
    assert clamping.name_cuts(texts, ["bridge", "bridges"]) == ["We saw the old bridge", "And two bridges"]
    assert all(text.startswith(cut) for text, cut in zip(texts, clamping.random_cuts(texts), strict=True))
    here = clamping.last_codes(llama, sae, ["w1 w2 w3", "w4 w3"])
    there = clamping.last_codes(llama, sae, ["w9 w8", "w7 w6 w5"])
    group = clamping.name_group(llama, sae, here, there, 4, "w3")
    mean, other = here.mean(0), there.mean(0)
    clean = [i for i in mean.argsort(descending=True).tolist() if mean[i] > 0 and other[i] <= mean[i] / 5]
    assert [f.index for f in group.features] == clean[:4]
    assert group.features[0].unit == pytest.approx(float(here[:, group.features[0].index].mean()))
    with pytest.raises(ClampError, match="No feature fires on the name 'x'"):
        clamping.name_group(llama, sae, there[:0].new_zeros(1, D_SAE), there, 4, "x")


def test_mentions_and_identification():
    words = ["golden gate", "bridge"]
    texts = ["The Golden Gate is red.", "I am the bridge.", "A gate of gold; bridgehead.", "I'm a cat. The bridge!"]
    assert clamping.mentions(texts, words) == [True, True, False, True]
    assert clamping.identifies(texts, words) == [False, True, False, False]


def test_the_choice_is_the_setting_nearest_to_the_goal():
    goal = clamping_study.GOAL
    best = {"mention": 0.9, "perplexity": 3.0, "distinct": 0.4, "relevance": 0.5}
    rows = [
        best | {"mention": 1.0, "perplexity": 9.0},
        best | {"distinct": 0.1},
        best | {"mention": 0.6},
        best | {"mention": 0.6, "perplexity": 1.5},
        best | {"mention": 0.0, "perplexity": 1.0},
    ]
    assert [round(clamping_study.reached(row), 3) for row in (best, *rows)] == [1, 0.333, 0.25, 0.667, 0.667, 0]
    assert clamping_choice_study.choose(rows) == rows[3] and set(goal) == set(best)


def test_the_search_goes_on_only_where_the_grid_ends_too_early():
    def rows(*given, distinct=0.5):
        return [{"strength": s, "perplexity": p, "mention": m, "distinct": distinct} for s, p, m in given]

    assert clamping_choice_study.further(rows((0.2, 4.0, 0.1), (0.4, 9.0, 0.5)), (0.2, 0.4)) == 0.14
    assert clamping_choice_study.further(rows((0.2, 1.0, 0.0), (0.4, 1.1, 0.0)), (0.2, 0.4)) == 0.56
    assert clamping_choice_study.further(rows((0.2, 1.0, 0.0), (0.4, 1.1, 0.1)), (0.2, 0.4)) is None
    assert clamping_choice_study.further(rows((0.2, 1.0, 0.0), (0.4, 1.1, 0.0), distinct=0.2), (0.2, 0.4)) == 0.14
    assert clamping_choice_study.further(rows(*[(0.1 * i, 5.0, 0.0) for i in range(1, 6)]), (0.2, 0.4)) is None


def test_mentions_count_after_the_first_tokens_and_a_set_that_repeats_itself_scores_low(model):
    texts = ["w1 w2 w3 w4 w5", "w1"]
    assert [t.split() for t in clamping_study.later(model, texts, 3)] == [["w4", "w5"], []]
    plain = {"loss": [10.0, 10.0], "tokens": [10, 10], "relevance": [1.0, 1.0], "later": ["", ""]}
    plain |= {"answers": ["a b c", "d e f"]}
    row = plain | {"relevance": [0.5, 0.1], "answers": ["a b c", "a b c"], "later": ["the bridge", "c"]}
    found = clamping_study.summary(row, plain, ["bridge"])
    assert found == {"mention": 0.5, "perplexity": 1.0, "distinct": 0.5, "relevance": 0.3}
    measures = clamping_report_study.measures(row, plain)
    assert measures["distinct-2 of the set"].value == 0.5 and measures["relevance ×"].value == pytest.approx(0.3)


def test_a_push_is_a_share_of_a_typical_norm_whatever_the_dictionary_normalises(llama):
    for normalize in ("none", "constant_norm_rescale"):
        sae = make_sae(llama)
        sae.cfg.normalize_activations = normalize
        sae.cfg.metadata.median_norm = 5.0
        with torch.no_grad():
            sae.W_dec[7] *= 3
        x = 5 * torch.nn.functional.normalize(torch.randn(1, 6, WIDTH), dim=-1)
        for indices in ([7], [2, 7, 9]):
            what = read_write.pushed(llama, sae, indices)
            parts = what.features if isinstance(what, Group) else (what,)
            amount = torch.tensor([0.4 * f.unit for f in parts]).view(1, 1, -1)
            moved = clamping.apply(x, sae, indices, "add", amount, torch.ones(1, 1, len(indices)).bool()) - x
            each = [0.4 * f.unit * float(sae.W_dec[f.index].norm()) for f in parts]
            size = 5.0 if normalize == "none" else WIDTH**0.5
            assert np.allclose(each, 0.4 * size * len(indices) ** -0.5, rtol=1e-4)
            assert len(indices) > 1 or float(moved.norm(dim=-1).mean()) == pytest.approx(2.0, rel=1e-4)
            assert read_write.push_size(llama, what) == pytest.approx(1, rel=1e-3 if len(indices) == 1 else 0.6)
    with torch.no_grad():
        sae.W_dec[7] = 0
    with pytest.raises(ClampError, match="Feature 7 writes nothing"):
        read_write.push_unit(llama, sae, 7)


def test_candidates_read_the_concept_and_come_in_the_order_of_what_they_write(model, sae):
    here, there = ["w1 w2 w3", "w5 w3", "w8 w3"], ["w9 w8", "w7 w6 w5", "w2 w4"]
    codes = read_write.Concept(
        *(detection.text_scores(model, sae, texts) for texts in (here, there)),
        *(clamping.last_codes(model, sae, texts) for texts in (here, there)),
    )
    writes = read_write.written(model, sae, here, PROMPTS)
    found = read_write.candidates(model, sae, codes, ["w3"], PROMPTS, writes)
    assert found and [float(writes[c.feature]) for c in found] == sorted(float(writes[c.feature]) for c in found)[::-1]
    assert {c.feature for c in found} == set(read_write.readers(model, sae, codes))
    assert found[0].rank == int((writes > writes[found[0].feature]).sum())
    token = read_write.concept_tokens(model, ["w3"])
    one = read_write.pushed(model, sae, [found[0].feature])
    before = read_write.word_mass(model, PROMPTS, token)
    with clamping.clamp(model, one, read_write.PROBE):
        gain = (read_write.word_mass(model, PROMPTS, token) - before).mean()
    assert found[0].gain == pytest.approx(float(gain), abs=1e-3)


def test_what_readers_are_compared_with_is_as_active_and_blind(model, sae):
    here, there = ["w1 w2 w3", "w5 w3", "w8 w3", "w3 w2"], ["w9 w8", "w7 w6 w5", "w2 w4", "w1 w9"]
    codes = read_write.codes(model, sae, here, there, ["w3"])
    reads = read_write.readers(model, sae, codes)[:3]
    found = read_write.as_active(codes, reads)
    areas = detection.areas(codes.sentences, codes.others)
    assert found and len(set(found)) == len(found) <= len(reads) and not set(found) & set(reads)
    assert all(abs(float(areas[i]) - 0.5) <= read_write.BLIND and codes.sentences[:, i].mean() > 0 for i in found)
    size = codes.sentences.mean(0)
    others = set(range(D_SAE)) - set(reads)
    may = [i for i in others if abs(float(areas[i]) - 0.5) <= read_write.BLIND and size[i] > 0
           and codes.name[:, i].mean() <= 2 * codes.elsewhere[:, i].mean()]  # fmt: skip
    assert found[0] == min(may, key=lambda i: float((size[i] - size[reads[0]]).abs()))


def test_one_call_finds_what_to_hold(model, sae):
    here, there = ["w1 w2 w3", "w5 w3"], ["w9 w8", "w7 w6 w5"]
    found = read_write.search(model, sae, here, there, ["w3"])
    assert found and [c.rank for c in found] == sorted(c.rank for c in found)
    with pytest.raises(ClampError, match="None of the 2 sentences names 'w4'"):
        read_write.search(model, sae, here, there, ["w4"])
    with pytest.raises(ClampError, match="there"):
        read_write.search(model, sae, here, [], ["w3"])


def test_a_random_dictionary_keeps_shapes_and_norms_and_nothing_else(llama):
    sae = make_sae(llama)
    with torch.no_grad():
        sae.W_dec *= torch.rand(D_SAE, 1) + 0.5
    twin, other = learning.random_dictionary(sae, 0), learning.random_dictionary(sae, 1)
    for name, dim in (("W_dec", -1), ("W_enc", 0)):
        a, b = getattr(sae, name), getattr(twin, name)
        torch.testing.assert_close(a.norm(dim=dim), b.norm(dim=dim))
        assert not torch.allclose(a, b, atol=0.1) and not torch.equal(b, getattr(other, name))
    cos = torch.nn.functional.cosine_similarity(twin.W_enc.T, twin.W_dec)
    other = torch.nn.functional.cosine_similarity(sae.W_dec, twin.W_dec)
    assert (cos > 0.999).all() and float(other.mean().abs()) < 0.2


def test_what_is_quiet_is_asked_of_other_answers(model, sae):
    """A feature that fires on the lessons, as what reads the concept does, can be learned if it is quiet elsewhere."""
    given = learning.lessons(model, 1, ["w1 w2", "w3"], [" w7 w8 w9"] * 2)
    usual = learning.lessons(model, 1, ["w1 w2", "w3"], [" w4 w11 w12"] * 2)
    fires = learning.firing(model, sae, given)
    elsewhere = learning.firing(model, sae, usual)
    only = {i for i in range(D_SAE) if fires[i] > learning.QUIET >= elsewhere[i]}
    assert only
    group, _, _ = learning.learn_group(model, sae, given, n=4, steps=6, usual=usual)
    assert all(elsewhere[f.index] <= learning.QUIET for f in group.features)
    alone, _, _ = learning.learn_group(model, sae, given, n=4, steps=6)
    assert all(fires[f.index] <= learning.QUIET for f in alone.features)


def test_one_step_of_learning_is_as_long_whatever_the_dictionary_normalises(llama):
    given = learning.lessons(llama, 1, ["w1 w2", "w3 w5"], [" w7 w8 w9"] * 2)
    norm = torch.cat([x.resid.norm(dim=-1)[x.batch.attention_mask.bool()] for x in given]).median()
    for normalize in ("none", "constant_norm_rescale"):
        sae = make_sae(llama)
        sae.cfg.normalize_activations = normalize
        sae.cfg.metadata.median_norm = float(norm)
        group, _, _ = learning.learn_group(llama, sae, given, n=4, steps=1)
        assert group.features
        for f in group.features:
            share = f.unit / read_write.push_unit(llama, sae, f.index)
            assert share == pytest.approx(learning.RATE, rel=0.2)


def test_lessons_begin_with_the_concept_or_turn_to_it(monkeypatch, llama):
    monkeypatch.setattr(clamping_study, "resumed", lambda name, key, make, *given: make(*given))
    starts = {kind: [f"w{i}", f"w{i + 1}"] for i, kind in enumerate(clamping_study.prompts()["train"])}
    questions, answers, usual = clamping_study.taught(llama, starts, [" w40", " w41"], 12)
    assert len(questions) == len(answers) == len(usual) == len(set(questions))
    for i, (answer, own) in enumerate(zip(answers, usual, strict=True)):
        if i % 2:
            words = re.split(" w40| w41", answer)[0].split()
            assert words != answer.split() and len(words) < clamping_study.TURN[1]
            assert words == [w.rstrip(",.;:") for w in own.split()[: len(words)]]
        else:
            assert answer.startswith(tuple(w for some in starts.values() for w in some))


def test_prompts_are_ours_disjoint_and_have_nothing_to_do_with_bridges():
    p = clamping_study.prompts()
    assert len(set(p["report"])) >= 100 and len(set(p["adversarial"])) >= 50 and len(p["concepts"]) == 10
    train = [q for asked in p["train"].values() for q in asked]
    assert not set(p["report"]) & set(p["selection"] + train + p["met"]) and not set(p["selection"]) & set(train)
    assert not set(p["adversarial"] + p["demo"]) & set(train)
    assert not any(clamping.mentions(p["report"] + p["selection"], [*p["golden_gate"]["words"], "river", "landmark"]))
    assert {"clamp-choose", "clamp-report", "clamp-concepts", "clamp-costs", "clamp-controls"} <= set(cli.studies())


# --- the embedded model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    model = load_model()
    return model, clamping_study.chosen(model)


def test_the_shipped_choice_holds_the_concept(real):
    """The features that the study chose, at the strength that it chose: a mixed batch, bit-identical after."""
    model, (tools, selected) = real
    shown = clamping_study.demonstrated(selected)
    one, strength = tools.found[shown], selected[shown]["strength"]
    asked = [chat(model, q, "") for q in ("Who are you?", "How do I boil an egg?", "What is a computer?")]
    ids = tokenize(model, asked)
    with torch.no_grad():
        before = model.hf(**ids.inputs).logits
    alone = [generate(model, a, 16)[0] for a in asked[1:]]
    with clamping.clamp(model, [one, None, None], [strength, None, None]):
        mixed = generate(model, asked, 16)
    assert mixed[1:] == alone
    assert mixed[0] != generate(model, asked[0], 16)[0]
    with torch.no_grad():
        assert torch.equal(model.hf(**ids.inputs).logits, before)


def test_the_shipped_sae_is_refused_by_another_model(llama):
    name = next(n for n in shipped() if n.startswith("topk"))
    with pytest.raises(ClampError, match="reads 576 dimensions"):
        clamping.feature(llama, load_sae(name), 0, 1.0)
    with pytest.raises(ClampError, match=r"chosen for SmolLM2.*this is llama.*own SAE"):
        clamping_study.chosen(llama)
    path = DATA / "studies" / "clamp_choose.json"
    assert json.loads(path.read_text())["provenance"]["command"] == "glassbox study clamp-choose"
