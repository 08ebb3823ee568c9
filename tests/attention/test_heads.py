"""Head scores must find exactly the heads that were wired by hand, in a GPT-2-shaped model."""

import csv

import pytest
import torch
from wired import DUPLICATE, INDUCTION, PREVIOUS, copying_llama, wired_gpt2

from glassbox_utils.attention import bias, heads, induction
from glassbox_utils.attention.patterns import (
    copying_scores,
    head_scores,
    induction_scores,
    induction_targets,
    over_patterns,
    repeated_tokens,
)
from glassbox_utils.core.assets import DATA
from glassbox_utils.core.models import ModelError
from glassbox_utils.core.text import Batch, tokenize


@pytest.fixture(scope="module")
def model():
    return wired_gpt2()


@pytest.fixture(scope="module")
def repeats(model):
    return repeated_tokens(model, 20, length=12, seed=3)


def found(scores, threshold=0.5):
    """All heads whose mean score exceeds the threshold."""
    return [tuple(i.tolist()) for i in (scores.nanmean(0) > threshold).nonzero()]


def test_induction_score_finds_exactly_the_wired_head(model, repeats):
    scores = induction_scores(model, repeats)
    assert scores.shape == (20, 2, 4)
    assert found(scores) == [INDUCTION]
    assert scores[:, *INDUCTION].min() > 0.95
    others = scores.mean(0).flatten()[[i for i in range(8) if divmod(i, 4) != INDUCTION]]
    assert others.max() < 0.1  # even attention scores about 1 in 19


def test_previous_and_duplicate_scores_find_exactly_the_wired_heads(model, repeats):
    scores = head_scores(model, repeats)
    assert found(scores.previous) == [PREVIOUS]
    assert found(scores.duplicate) == [DUPLICATE]


def test_the_wired_circuit_predicts_the_repetition(model, repeats):
    ids = repeats.input_ids
    predicted = model.hf(ids).logits.argmax(-1)
    assert (predicted[:, 13:-1] == ids[:, 14:]).all()  # whole second half
    assert (predicted[:, 1:12] != ids[:, 2:13]).float().mean() > 0.9  # nothing to copy in the first


def test_copying_score_finds_the_induction_head(model, repeats):
    scores = copying_scores(model, repeats)
    assert [tuple(i.tolist()) for i in (scores > 0.9).nonzero()] == [INDUCTION]


@pytest.mark.parametrize("head", range(4))
def test_copying_score_uses_the_right_value_group(head):
    """Heads 0 and 1 read key-value head 0 (a shifted token), 2 and 3 read head 1 (the token)."""
    model = copying_llama(head)
    scores = copying_scores(model, repeated_tokens(model, 4, length=12))[0]
    expected = [h for h in (head, 2 * (1 - head // 2)) if h // 2 == 1]
    assert (scores > 0.9).nonzero().flatten().tolist() == expected


def test_natural_text_and_padding(model):
    """``w1 w2 ... w1``: the target is the token after the copy; padded prompts score the same as alone."""
    batch = tokenize(model, ["w1 w2 w3 w4 w1", "w5 w6 w7 w8 w9 w10 w5 w6"])
    targets = induction_targets(batch)
    assert targets[0].nonzero().tolist() == [[8, 5]]
    assert targets[1].nonzero().tolist() == [[7, 2], [8, 3]]
    alone = induction_scores(model, tokenize(model, "w5 w6 w7 w8 w9 w10 w5 w6"))
    assert torch.allclose(induction_scores(model, batch)[1], alone[0], atol=1e-4)
    assert induction_scores(model, tokenize(model, "w1 w2")).isnan().all()


def test_repeats_are_seeded_row_by_row(model):
    few, many = repeated_tokens(model, 3, 12, seed=5), repeated_tokens(model, 9, 12, seed=5)
    assert (many.input_ids[:3] == few.input_ids).all()
    assert (few.input_ids[:, 1:13] == few.input_ids[:, 13:]).all()
    assert not (repeated_tokens(model, 3, 12, seed=6).input_ids == few.input_ids)[:, 1:].all(1).any()
    assert (few.input_ids[:, 1:] != 0).all()
    with pytest.raises(ModelError, match="Choose a length of 2 to 15"):
        repeated_tokens(model, 1, length=40)


def test_streaming_equals_whole_patterns(model, repeats):
    """The streamed score is the plain definition on patterns that transformers returns."""
    model.hf.set_attn_implementation("eager")
    patterns = model.hf(**repeats._asdict(), output_attentions=True).attentions
    by_hand = torch.stack([p.diagonal(-11, -2, -1)[..., 2:].mean(-1) for p in patterns], 1)
    assert torch.allclose(induction_scores(model, repeats), by_hand, atol=1e-5)


def test_batches_of_rows_change_nothing(model, repeats):
    parts = [Batch(*(t[i : i + 7] for t in repeats)) for i in range(0, 20, 7)]
    joined = torch.cat([induction_scores(model, part) for part in parts])
    assert torch.allclose(joined, induction_scores(model, repeats), atol=1e-5)


# --- prompts and sets of heads ------------------------------------------------------------------------


def test_selection_and_report_prompts_share_nothing():
    content = heads.read_prompts("occupations")
    for group in ("male", "female"):
        splits = [content[group][s] for s in ("selection", "report", "fresh", "defined")]
        assert len({job for split in splits for job in split}) == sum(map(len, splits))
    assert not set(content["fresh_templates"]) & set(content["single_templates"])
    assert not {p.full for p in bias.swaps("selection")} & {p.full for p in bias.swaps("report")}
    words = heads.read_prompts("semantic")["categories"].values()
    split = {s: {w for c in words if c["split"] == s for w in c["words"]} for s in ("selection", "report")}
    assert not split["selection"] & split["report"]


def test_swaps_are_balanced_minimal_pairs():
    pairs = bias.swaps("report")
    assert len(pairs) == 432
    for pair in pairs:
        male, female = (text.split() for text in pair.texts)
        assert [m != f for m, f in zip(male, female, strict=True)] == [False] * (len(male) - 1) + [True]
    first = [p.texts[0].index(p.male) < p.texts[0].index(p.female) for p in pairs]
    assert sum(first) == len(pairs) // 2


def test_random_heads_keep_layers_and_avoid():
    model = wired_gpt2()
    chosen = heads.random_heads(model, [(0, 1), (1, 3)], seed=0, avoid=[(0, 0), (1, 0)])
    assert [layer for layer, _ in chosen] == [0, 1]
    assert not {*chosen} & {(0, 1), (1, 3), (0, 0), (1, 0)}
    with pytest.raises(ModelError, match="too few heads"):
        heads.random_heads(model, [(0, h) for h in range(4)] + [(1, 0)], seed=0)


def test_controls_hold_no_group_mate_and_differ(monkeypatch):
    model = copying_llama()  # 4 query heads in one layer, two to a key head
    assert heads.group_size(model, 0) == 2 and heads.with_groups(model, [(0, 2)]) == [(0, 2), (0, 3)]
    drawn = heads.control_sets(model, [(0, 2)], [], draws=12)
    assert {h for found in drawn for h in found} == {(0, 0), (0, 1)}
    crowded = heads.control_sets(model, [(0, 0)], [(0, 2)], draws=4)  # only group mates are left
    assert {h for found in crowded for h in found} <= {(0, 1), (0, 3)}
    assert heads.group_size(wired_gpt2(), 1) == 1


def test_norm_matched_draws_among_the_nearest():
    norms = torch.tensor([[1.0, 2.0, 3.0], [10.0, 11.0, 2.1]])
    assert heads.norm_matched(norms, [(0, 1)], [], among=1) == [(1, 2)]
    two = {heads.norm_matched(norms, [(0, 1)], [(1, 2)], seed, among=2)[0] for seed in range(20)}
    assert two == {(0, 0), (0, 2)}


def test_ablating_the_wired_head_ends_copying(model):
    """At k = 1 the loss on the repetition rises to that of guessing; heads that do nothing cost nothing."""
    curve = induction.ablation_curve(model, [INDUCTION], ks=[1], n=6, length=12, draws=2, avoid=[PREVIOUS])
    assert (curve.top[0] - curve.clean).min() > 1
    assert (curve.random - curve.clean).abs().max() < 0.05 and curve.matched.shape == (1, 2, 6)
    alone = induction.cost_of_each(model, [PREVIOUS, DUPLICATE], n=6, length=12)
    assert alone[0].min() > 1 and alone[1].abs().max() < 0.05
    assert torch.allclose(induction.cost_of_each(model, [INDUCTION], n=6, length=12)[0], curve.top[0] - curve.clean)


def test_the_averages_of_an_ablation_do_not_depend_on_the_number_of_rows(tiny_llama):
    """A study of few rows and a notebook of others measure the same: their mean outputs come from the same rows."""
    few, many = (
        induction.ablation_curve(tiny_llama, [(1, 0)], ks=[1], n=n, length=8, draws=1, matched=False) for n in (2, 12)
    )
    assert torch.allclose(few.top, many.top[:, :2], atol=1e-5)
    cost = [induction.cost_of_each(tiny_llama, [(1, 0)], n=n, length=8) for n in (2, 12)]
    assert torch.allclose(cost[0], cost[1][:, :2], atol=1e-5)


def test_circuit_scores_agree_with_the_single_ones(model, repeats):
    scores = induction.circuit_scores(model, repeats)
    assert torch.allclose(scores.induction, induction_scores(model, repeats), atol=1e-5)
    previous = over_patterns(model, repeats, lambda p, _: p.diagonal(-1, -2, -1)[..., 1:].mean(-1))
    assert torch.allclose(scores.previous, previous, atol=1e-5)
    assert torch.allclose(scores.duplicate, head_scores(model, repeats).duplicate, atol=1e-5)


def test_composition_names_the_wired_pair(model):
    base, patched = induction.composition(model, [(0, h) for h in range(4)], INDUCTION, n=4, length=12)
    assert (base - patched).mean(1).argmax() == PREVIOUS[1] and base.min() > 0.9


def test_table_covers_every_head_of_the_embedded_model():
    with open(DATA / "heads" / "heads.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 270
    for row in rows:
        for name in ("induction", "semantic", "bias_attention", "pronoun_ablation"):
            assert float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"])
