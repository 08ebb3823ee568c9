"""The study of the vector that is rewarded for order: every part of it on a tiny model, and what its table says."""

import json
import re
from itertools import chain

import numpy as np
import pytest
import tiny
import torch

from glassbox_utils.core import assets, models, prepared, studies
from glassbox_utils.steering import contrast, order_study, order_tables, reward, ruler_study, study, style
from glassbox_utils.steering.vectors import SteeringError, fingerprint, load_vector


def test_what_reports_was_never_trained_on_nor_selected_on():
    fresh = set(order_study.fresh_prompts())
    assert len(fresh) == 136
    for other in (order_study.questions(), contrast.prompts("selection"), contrast.prompts("demo")):
        assert not fresh & set(other)
    assert not set(order_study.questions()) & set(contrast.prompts("selection"))


def test_predicates_lean_the_way_they_are_meant_and_are_no_catastrophes():
    for sign, words in order_study.PREDICATES.items():
        assert all(sign * tone > 0 for tone in style.tone([f"It was {w}." for w in words if w != "a mess"]))
        assert not style.catastrophes(words).any()


def test_swapped_answers_are_the_same_ones_on_other_sides():
    sides = [[(f"q{i}", "good") for i in range(40)], [(f"q{i}", "bad") for i in range(30)]]
    mixed = order_study.swapped(sides, 0)
    assert [len(side) for side in mixed] == [40, 30] and sorted(chain(*mixed)) == sorted(chain(*sides))
    assert 10 < sum(a == "bad" for _, a in mixed[0]) < 25
    assert mixed == order_study.swapped(sides, 0) != order_study.swapped(sides, 1)


def test_a_vector_that_is_none_is_refused():
    for kind in ("reversed", "shuffled", "ordered 1", "shuffled x", "centred 1", "single 2", ""):
        with pytest.raises(SteeringError, match="Allowed: 'ordered'"):
            order_study.trained(None, kind)


def test_numbers_are_counted_from_the_rows():
    def row(condition, tone, second, answers=("Fine.", "Good."), loss=(2.0, 2.0)):
        about = {"tone": tone, "second": second, "loss": loss, "tokens": (2, 2), "answers": answers}
        return {"condition": condition} | about

    rows = [row("unsteered", (0.0, 0.5), (1.0, 1.0))]
    rows += [row("ordered -1", (-0.5, 0.5), (0.0, 0.0), ("A disaster.", "Bad."), (4.0, 4.0))]
    rows += [row("ordered 1", (0.5, 0.7), (2.0, 0.5), loss=(3.0, 3.0))]
    rows += [row("smaller -1", (0.0, 0.0), (0.0, 0.0)), row("smaller 1", (0.3, 0.3), (1.0, 1.0))]
    for kind, size in (("shared 0", -0.1), ("shared 1", 0.05), ("shuffled 0", 0.15)):
        rows += [row(f"{kind} -1", (0.0, 0.0), (0.0, 0.0)), row(f"{kind} 1", (size, size), (size, size))]
    table = {"rows": rows}
    by = {ruler: order_tables.in_order(table, "ordered", [ruler]).tolist() for ruler in order_study.RULERS}
    assert by == {"tone": [True, False], "second": [True, False]}
    assert order_tables.in_order(table, "ordered").mean() == 0.5
    assert order_tables.effect(table, "ordered").value == pytest.approx(0.6)
    assert order_tables.effect(table, "ordered", "second").value == pytest.approx(1.25)
    assert order_tables.times(table, "ordered", "shared") == pytest.approx(6)
    assert order_tables.times(table, "smaller", "shuffled", "second") == pytest.approx(1 / 0.15)
    with pytest.raises(
        SteeringError, match=r"no method 'other'\. Allowed: ordered, smaller, shared 0, shared 1, shuff"
    ):
        order_tables.in_order(table, "other")


def test_the_shipped_table_is_of_this_recipe_and_its_numbers_are_those_of_its_answers():
    table = studies.read_table("steering_order")
    for name, value in (("started", order_study.STARTED), ("words", order_study.WORDS)):
        assert table[name] == json.loads(json.dumps(value))
    assert table["training"] == json.loads(json.dumps(order_study.STAGES)) and table["smaller"] == [10, 5, 5, 5]
    assert table["prompts"] == order_study.fresh_prompts()
    for row in table["rows"]:
        assert row["tone"] == pytest.approx(style.tone(row["answers"]).round(4).tolist())
        assert len(row["second"]) == len(row["answers"]) in (136, order_study.N_CONTROL)
    page = (assets.DATA.parent / "docs" / "tone-vector.md").read_text(encoding="utf-8")
    lexicon, second, both = (
        order_tables.in_order(table, "ordered", rulers).mean() for rulers in (["tone"], ["second"], order_study.RULERS)
    )
    minus = order_tables.by_condition(table)["ordered -1"]["answers"]
    for share in (lexicon, second, both, style.catastrophes(minus).mean()):
        assert f"{100 * share:.1f} %" in page  # what the page says is what the table holds
    for name, kind in (("ordered", "shared"), ("smaller", "shuffled")):
        for ruler in order_study.RULERS:
            assert f"{order_tables.times(table, name, kind, ruler):.1f} times" in page


def test_a_centred_reward_asks_for_neither_more_nor_fewer_words():
    valence = torch.tensor([[0.0, 3.0, -1.0, 2.0, 0.0], [0.0, 3.0, 0.0, 2.0, 0.0]])
    counts = torch.tensor([9.0, 2.0, 1.0, 1.0, 0.0])
    found = reward.centred(valence, counts)
    assert (found * counts).sum(-1).abs().max() < 1e-6
    assert found[:, [0, 4]].eq(0).all() and torch.allclose(found[0, 1] - found[0, 2], torch.tensor(4.0))
    with pytest.raises(SteeringError, match="None of the tokens that have a valence"):
        reward.centred(valence, torch.tensor([9.0, 0.0, 0.0, 0.0, 1.0]))


def test_the_strength_is_the_largest_within_the_limit(monkeypatch):
    prices = {0.0: 1.0, 1.0: 1.2, -2.0: 1.8, 3.0: 2.5}
    row = lambda model, asked, work, subject, strength: {"loss": [np.log(prices[strength])], "tokens": [1]}  # noqa: E731
    monkeypatch.setattr(order_study, "kept_row", row)
    assert order_study.strength_of(None, None, "v", (1.0, -2.0, 3.0)) == -2.0
    assert order_study.strength_of(None, None, "v", (3.0,)) == 3.0  # none is within it: the smallest


def test_what_the_notebook_shows_is_what_the_table_holds():
    table = studies.read_table("steering_order")
    rows = order_tables.by_condition(table)
    methods = order_tables.methods_table(table)
    assert list(methods.columns) == list(order_tables.METHODS.values())
    zero, ends = np.array(rows["unsteered"]["tone"]), [np.array(rows[f"ordered {s}"]["tone"]) for s in (-1, 1)]
    right = (ends[0] < zero) & (zero < ends[1])
    assert methods.loc["in order, lexicon, %"].iloc[0].startswith(f"{100 * right.mean():.0f} (")
    assert order_tables.effect(table, "ordered").value == pytest.approx((ends[1] - ends[0]).mean())
    controls = order_tables.controls_table(table)
    assert controls.shape == (10, 2) and next(iter(controls)).startswith("10 random")
    assert controls.loc["steps of its training"].tolist() == ["140", "25 instead of 140"]
    assert controls.map(lambda text: len(str(text)) <= 50).to_numpy().all()  # pandas cuts what is longer
    assert controls.loc["controls, perplexity ×"].iloc[0] == "1.06 to 1.36"
    assert len(order_tables.draws(table, "shuffled")) == 5
    assert len(order_tables.drawn_answers(table, n=2).splitlines()) == 2 * 7
    kinds = [f.control.kind for f in order_tables.findings(table)]
    assert kinds == 4 * ["trained opponent"] + 2 * ["random units"] + 2 * ["shuffled labels"]
    ours = r"\b(terrible|awful|horrible|boring|ugly|useless|annoying|a mess|a disappointment|disappointing|bad|dull)\b"
    held = sum(bool(re.search(ours, a.lower())) for a in rows["ordered -1"]["answers"])
    assert f"ordered -1: {held} (a mess " in order_tables.words_line(table)
    with pytest.raises(SteeringError, match=r"no method .other.\. Allowed: ordered, single, lora"):
        order_tables.in_order(table, "other")


def test_the_bars_that_were_set_beforehand_are_in_the_ladder_and_fail():
    bars = [f for f in order_tables.findings(studies.read_table("steering_order")) if "bar set beforehand" in f.claim]
    assert [f.verdict for f in bars] == ["refuted"] * 3
    assert bars[0].null == 0.85 and bars[1].control.what.startswith("5 times the strongest of ten random")


def test_further_controls_are_joined_and_plain_ones_are_those_of_the_bar():
    table = studies.read_table("steering_order")
    other = [{**row, "condition": row["condition"].replace("shuffled", "plain")} for row in table["rows"]
             if row["condition"].startswith("shuffled")]  # fmt: skip
    assert order_tables.joined({}) is None and order_tables.joined({"order": table}) == table
    both = order_tables.joined({"order": table, "plain": {"rows": other}})
    assert order_tables.draws(both, "plain") == order_tables.draws(both, "shuffled")
    assert order_tables.controls_table(both).shape == (10, 3)
    claims = [f.claim for f in order_tables.findings(both) if "bar set" in f.claim]
    assert claims[-1].split(" as far as ")[1].startswith("the strongest of five trained alike on shuffled labels")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_study_runs_on_a_tiny_model_and_an_interrupted_one_goes_on(tmp_path, monkeypatch):
    words = tiny.tokenizer()
    tiny.network("llama", len(words), 4, positions=512).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    model = models.load_model(tmp_path / "model")
    card = prepared.Card(str(tmp_path / "model"), model.hash, "mine", size=0.02)
    prepared.write_card(card, tmp_path / "made")
    valence = torch.zeros(2, len(words))
    valence[:, 5:12], valence[:, 20:27] = 3.0, -3.0
    said = []

    def opened(model, vector, sign):
        said.append(sign)
        return [(f"w{i} w{i + 1}", f"w{i + 2} w{i + 3 + sign}") for i in range(1, 9)]

    monkeypatch.setattr(assets, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(reward, "worded", lambda tokenizer, **options: valence)
    monkeypatch.setattr(ruler_study, "read_tone", lambda model, texts: [0.0] * len(texts))
    stored = {"rank_correlation": {}, "selected": {"layer": 1, "alpha": 0.1}, "full": [0.1, 0.1]}
    monkeypatch.setattr(order_study, "read_table", lambda name: stored)
    monkeypatch.setattr(order_study, "opened_answers", opened)
    monkeypatch.setattr(order_study, "SHUFFLES", (0,))
    monkeypatch.setattr(study, "N_RANDOM", 2)
    monkeypatch.setattr(study, "selected", lambda: (study.tone_vector(model, n_resamples=0), 0.1))
    with prepared.using(tmp_path / "made"):
        table = json.loads(order_study.study_order().read_text())
        vectors = {k: order_study.trained(model, k) for k in ("ordered", "smaller", "shuffled 0")}
        assert fingerprint(load_vector("tone-ordered")) == fingerprint(vectors["ordered"])
        again = json.loads(order_study.study_order().read_text())
        more = [json.loads(run().read_text()) for run in (order_study.study_controls, order_study.study_plain)]
    names = ["unsteered"]
    kinds = [
        "ordered",
        "single",
        "lora",
        "shipped",
        "system",
        "shared 0",
        "shared 1",
        "smaller",
        "shuffled 0",
    ]
    names += [f"{kind} {sign}" for kind in kinds for sign in (-1, 1)]
    assert [row["condition"] for row in table["rows"]] == names
    assert again["rows"] == table["rows"] and sorted(said) == [-1, 1]  # nothing was done twice
    assert [row["condition"] for part in more for row in part["rows"]] == [
        f"{kind} {sign}" for kind in ("turned 0", "turned 1", "plain 0") for sign in (-1, 1)
    ]
    assert fingerprint(vectors["shuffled 0"]) != fingerprint(vectors["smaller"])
    for row in table["rows"]:
        assert {len(row[k]) for k in ("tone", "second", "loss", "tokens", "answers")} == {len(table["prompts"])}
    signs = [np.sign(row["alpha"]) for row in table["rows"][1:] if row["alpha"] is not None]
    assert signs == [-1, 1] * (len(signs) // 2)
