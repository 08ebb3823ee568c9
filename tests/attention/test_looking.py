"""Looking and doing: prompts that were never looked at, predictors that are what they are called, a comparison that
finds what was planted, and the study on a model that nobody has seen."""

import json

import matplotlib
import numpy as np
import pytest
import tiny
import torch

from glassbox_utils.attention import figures, heads, looking_study, looking_tables, patterns, pronouns, semantic
from glassbox_utils.attention.ablation import head_means
from glassbox_utils.attention.looking import (
    KINDS,
    OPPONENTS,
    PREDICTORS,
    Looking,
    agreement,
    ahead,
    both_sides,
    by_word,
    comparison,
    lines,
    lookers,
    looking,
    looks,
    pooled,
    push,
    without_strongest,
)
from glassbox_utils.attention.prompts import FAMILIES, PROMPTS, decisive_prompts, to_batch
from glassbox_utils.core import prepared, studies
from glassbox_utils.core.devices import result
from glassbox_utils.core.figures import alt_text
from glassbox_utils.core.models import ModelError, load_model
from glassbox_utils.core.statistics import Interval
from glassbox_utils.core.studies import read_table
from glassbox_utils.core.text import tokenize


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A random GPT-2 with the embedded model's tokenizer."""
    return load_model(tiny.save_gpt2_shaped(tmp_path_factory.mktemp("looking"), 128, 6.0))


# --- prompts ------------------------------------------------------------------------------------------


def flat(x):
    return {x} if isinstance(x, str) else set().union(*map(flat, x))


@pytest.mark.parametrize("family", FAMILIES)
def test_report_prompts_share_no_word_and_no_template_with_what_was_looked_at(family):
    old, new = (
        json.loads((PROMPTS / f"decisive_{name}.json").read_text(encoding="utf-8"))[family]
        for name in ("tokens", "report")
    )
    for part, items in new.items():
        assert not flat(items) & flat(old[part]), part
    report, select = (decisive_prompts(family, split, None) for split in ("report", "select"))
    assert len(report) >= looking_study.PROMPTS and len({p.text for p in report}) == len(report)
    assert not {p.decisive for p in report} & {p.decisive for p in select}
    assert all(p.answer != p.foil and p.text.count(p.decisive) == 1 for p in report)


def test_the_other_prompts_of_notebook_01_are_parted_too():
    content = heads.read_prompts("looking")
    meaning, said = content["meaning"], content["pronouns"]
    assert not set(meaning["selection"]) & set(meaning["report"])
    jobs = {split: flat(said[split]["pairs"]) for split in said}
    frames = {split: {f[0] for f in said[split]["frames"]} for split in said}
    assert not jobs["selection"] & jobs["report"] and not frames["selection"] & frames["report"]
    old = json.loads((PROMPTS / "sentences.json").read_text(encoding="utf-8"))["sentences"]
    assert not set(old) & set(content["sentences"])
    gendered = "man woman wife husband girl boy king queen mother father lady"
    assert not [job for job in flat(list(jobs.values())) if any(job.endswith(word) for word in gendered.split())]


# --- predictors ---------------------------------------------------------------------------------------


def test_predictors_are_what_they_are_called(words):
    prompts = decisive_prompts("capital", "report", 4)
    batch = to_batch(words, prompts)
    found = looks(words, batch, rows=3)
    assert set(found) == set(PREDICTORS) and all(x.shape == (4, 6, 8) for x in found.values())
    for row, prompt in enumerate(prompts):
        _, pattern = patterns.attention(words, prompt.text)
        moved = patterns.value_weighted(words, prompt.text, whole=False)
        start = batch.batch.input_ids.shape[1] - pattern.shape[-1]
        place = int(batch.decisive[row]) - start
        assert torch.allclose(found["decisive"][row], pattern[:, :, -1, place], atol=1e-4)
        assert torch.allclose(found["awake"][row], 1 - pattern[:, :, -1, 0], atol=1e-4)
        assert torch.allclose(found["weighted"][row], moved[:, :, -1, place], atol=1e-3, rtol=1e-3)
    alone = heads.output_norms(words, tokenize(words, prompts[0].text))
    assert found["length"][0].shape == alone.shape and (found["length"] > 0).all()


def test_whole_rows_are_the_lengths_scaled(words):
    lengths, shares = (patterns.value_weighted(words, "The cat sat.", whole=whole) for whole in (False, True))
    assert torch.allclose(lengths / lengths.sum(-1, keepdim=True), shares, atol=1e-5)
    assert lengths.sum(-1).std() > 0


def test_a_shuffled_text_has_the_same_tokens_and_begins_the_same(words):
    batch = tokenize(words, ["one two three four five six seven", "eight nine"])
    other, again = (patterns.shuffled_order(batch, seed) for seed in (1, 1))
    assert torch.equal(other.input_ids, again.input_ids) and not torch.equal(other.input_ids, batch.input_ids)
    assert torch.equal(result(other.input_ids).sort(1).values, result(batch.input_ids).sort(1).values)
    for mask, ids, old in zip(
        *(result(x) for x in (batch.attention_mask, other.input_ids, batch.input_ids)), strict=True
    ):
        start = int(mask.argmax())
        assert torch.equal(ids[: start + 1], old[: start + 1])


# --- the comparison -----------------------------------------------------------------------------------


def planted(n=40, shape=(5, 6), sign=1.0, noise=0.3, seed=0):
    """Effects that follow the attention to the decisive word, with a sign of each head's own or with one sign."""
    draw = torch.Generator().manual_seed(seed)
    look = torch.rand(shape, generator=draw)
    signs = sign if sign else torch.where(torch.rand(shape, generator=draw) > 0.5, 1.0, -1.0)
    rest = {name: torch.rand(n, *shape, generator=draw) for name in PREDICTORS}
    effect = look * signs + noise * torch.randn(n, *shape, generator=draw)
    return Looking(
        [f"w{i % 10}" for i in range(n)], torch.ones(n), effect, {**rest, "decisive": look.expand(n, *shape)}
    )


def test_what_was_planted_is_found_and_its_sign_only_where_there_is_one():
    table = comparison({"one": planted(), "two": planted(seed=1)}, 200)
    for name in ("one", "two", "mean"):
        assert table[name]["decisive"]["size, ranks"].value > 0.8
        assert table[name]["decisive"]["sign, values"].value > 0.8
        assert all(table[name][f"decisive - {p}"]["size, ranks"].low > 0 for p in OPPONENTS)
        assert table[name]["decisive"]["size, ranks"].n == (20 if name == "mean" else 10)
        assert 0.8 < table[name]["half"]["sign, ranks"].value < table[name]["ceiling"]["sign, ranks"].value <= 1
    mixed = comparison({"one": planted(sign=0.0)}, 200)["one"]["decisive"]
    assert mixed["size, ranks"].value > 0.6 and abs(mixed["sign, ranks"].value) < 0.5
    none = planted()
    flat_one = Looking(none.words, none.base, none.effect, {**none.predictors, "decisive": torch.ones(40, 5, 6)})
    assert agreement(flat_one, 20)["decisive"]["size, ranks"][0] == 0
    with pytest.raises(ModelError, match=r"1 decisive words.*at least 3"):
        agreement(Looking(["a"] * 40, none.base, none.effect, none.predictors), 20)


def test_words_count_alike_however_many_prompts_they_have():
    values = torch.tensor([1.0, 1.0, 1.0, 4.0])
    assert by_word(values, ["b", "b", "b", "a"]).tolist() == [4.0, 1.0]
    assert pooled([torch.tensor([0.0, 2.0]), torch.tensor([3.0, 3.0, 3.0])]).value == 2.0


def test_heads_that_write_as_much_do_not_look_hard():
    found = planted(shape=(10, 9))
    length = found.mean("decisive") * 3 + torch.rand(10, 9, generator=torch.Generator().manual_seed(3))
    found = Looking(found.words, found.base, found.effect, {**found.predictors, "length": length.expand(40, 10, 9)})
    chosen = lookers(found.predictors, 4, draws=20)
    look = found.mean("decisive")
    assert [look[h].item() for h in chosen.heads] == sorted(look.flatten().tolist())[-1:-5:-1]
    for draw in chosen.alike:
        assert len(set(draw)) == 4 and not set(draw) & set(chosen.heads)
        assert all(look[h] <= look.quantile(0.9) for h in draw)
        assert any(look[h] > look.median() for h in draw), "who looks more than the typical head is no longer barred"
    assert len({h for draw in chosen.alike for h in draw}) > 6, "the draws are the same few heads"
    table = looking_tables.pushes({"one": found}, {"one": chosen})
    assert table.index.tolist() == ["one", "mean"] and table["look most"].nunique() == 1
    assert float(table["they write"].iloc[0]) > float(length.mean())
    assert torch.allclose(
        push(found, chosen.heads).mean(), torch.stack([found.mean("effect")[h] for h in chosen.heads]).mean()
    )


def test_both_sides_are_counted_and_who_acts_is_told_on_other_words():
    found = planted(sign=-1.0, noise=0.05)
    look = found.mean("decisive")
    heads_ = lookers(found.predictors, 4).heads
    side = both_sides(found, heads_)
    assert side.place == 30 and [x.value < 0 for x in side.lookers] == [True] * 4 and side.base_rate < 0.2
    assert "the first 2 in each family: 0 of 2 help" in looking_tables.helping({"one": side})
    assert set(side.actors) == set(heads_) and not side.idle and not side.blind
    assert torch.allclose(side.effect, by_word(found.effect, found.words)[1::2].mean(0))
    turned = Looking(found.words, found.base, -found.effect * 0 + (1 - look) + 0.01 * found.effect, found.predictors)
    side = both_sides(turned, heads_)
    assert side.idle == heads_ and len(side.blind) == 4 and side.base_rate == 1
    assert side.sure[0] > 0.9 and side.sure[1] == 0, "with the whole interval"
    table = comparison({"one": planted(), "two": found}, 50)
    assert ahead(table, "another", "size, ranks") == 2 and ahead(table, "another", "sign, values") == 1
    shown = lines(table["mean"])
    assert len(shown) == 1 + len(PREDICTORS) + len(OPPONENTS) + 1 + 2 and len(set(map(len, shown[:6]))) == 1


def test_what_one_head_carries_is_gone_without_it():
    found = planted(noise=0.01)
    effect, look = 0.01 * torch.rand(40, 5, 6, generator=torch.Generator().manual_seed(5)), found.mean("decisive")
    (best,) = [divmod(int(look.argmax()), 6)]
    effect[:, *best] = 9.0
    found = Looking(found.words, found.base, effect, found.predictors)
    rest, head = without_strongest(found)
    assert head == best and rest.effect.shape == (40, 1, 29) and rest.mean("decisive").max() < look.max()
    table, less = comparison({"one": found}, 50), comparison({"one": rest}, 50)
    assert less["one"]["decisive"]["size, values"].value < 0.3 < table["one"]["decisive"]["size, values"].value + 0.1
    said = looking_tables.without_one(table, less, {"one": head})
    assert said.index.tolist()[:2] == ["one, all heads", f"one, without {patterns.head_name(head)}"]


# --- pronouns and meaning -----------------------------------------------------------------------------


def test_exchanged_nouns_are_the_other_order(words):
    frame = "The {a} asked the {b} to help {p}"
    one = pronouns.two_orders(words, frame, ("doctor", "nurse"), "him")
    two = pronouns.two_orders(words, frame, ("nurse", "doctor"), "him")
    assert one.shape == (2, 2, 6, 8) and torch.allclose(one.flip(0).flip(1), two, atol=1e-6)
    text = frame.format(a="doctor", b="nurse", p="him")
    assert torch.allclose(one[0, 0], patterns.from_word_to_word(words, [text], "him", "doctor")[0], atol=1e-6)
    found = pronouns.pronoun_looks(words, "report", 2)
    assert found.looks.shape[:4] == (12, 2, 2, 2) and len(set(found.pairs)) == 2


def test_recency_identity_and_stereotype_are_told_apart():
    """Head 0 looks at the later noun, head 1 at the man's job, head 2 at the job of the pronoun's stereotype."""
    looks_ = torch.zeros(1, 2, 2, 2, 1, 3)
    for pronoun in (0, 1):
        for order in (0, 1):
            looks_[0, pronoun, order, 1 - order, 0, 0] = 1
            looks_[0, pronoun, order, 0, 0, 1] = 1
            looks_[0, pronoun, order, pronoun, 0, 2] = 1
    found = pronouns.PronounLooks(looks_, ["a and b"])
    assert found.recency.flatten().tolist() == [1, 0, 0]
    assert found.identity.flatten().tolist() == [0, 1, 0]
    assert found.stereotype.flatten().tolist() == [0, 0, 1]


def test_frames_cross_both_lists(words):
    found = semantic.frame_looks(
        words, ["The {who} saw the {what}.", "A {who} met the {what}."], ["cat", "dog"], ["man"]
    )
    assert found.shape == (2, 2, 1, 6, 8)
    alone = patterns.from_word_to_word(words, ["A man met the dog."], "dog", "man")[0]
    assert torch.allclose(found[1, 1, 0], alone, atol=1e-5)


# --- study and pictures -------------------------------------------------------------------------------


def test_the_study_writes_what_was_measured_and_goes_on_where_it_was(words, tmp_path, monkeypatch):
    monkeypatch.setattr(studies.assets, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(looking_study, "SELECT", 12)
    monkeypatch.setattr(looking_study, "load_subject", lambda: words)
    monkeypatch.setattr(looking_study, "LEAST", 12)
    prepared.write_card(prepared.Card("words", words.hash, size=0.02), tmp_path)
    with prepared.using(tmp_path):
        (work,) = looking_study.STUDIES_OF_LOOKING.values()
        assert work().exists()
        table = read_table("heads_looking")
        assert list(table["families"]) == list(FAMILIES) and not table["refused"]
        assert np.shape(table["families"]["capital"]["effect"]["mean"]) == (6, 8)
        assert set(table["correlations"]["mean"]["decisive"]) == set(KINDS)
        assert len(table["families"]["capital"]["chosen"]["heads"]) == looking_study.STRONGEST
        monkeypatch.setattr(looking_study, "measure", None)  # finished parts are read, not measured
        assert work() and read_table("heads_looking")["correlations"] == table["correlations"]


def test_the_live_measure_and_its_pictures(words):
    matplotlib.use("agg")
    found, chosen = looking_study.measure(words, "agreement", 12)
    means = head_means(words, [to_batch(words, looking_study.some_prompts(words, "agreement", "select", 60)).batch])
    again = looking(words, looking_study.some_prompts(words, "agreement", "report", 12), means)
    assert torch.allclose(found.effect, again.effect, atol=1e-5)
    here, chosen, x = {"agreement": found}, {"agreement": chosen}, Interval(0.5, 0.4, 0.6, 9)
    table, sides = comparison(here, 50), {"agreement": both_sides(found, chosen["agreement"].heads)}
    strong = {"agreement": push(found, chosen["agreement"].heads)}
    fewer = {"agreement": push(found, chosen["agreement"].heads[2:])}
    alike = {"agreement": [push(found, draw) for draw in chosen["agreement"].alike]}
    people, whats, lead = ["doctor", "baker", "lawyer"], ["patient", "parcel"], torch.rand(5, 2, 2)
    lead[:, 0] += 2
    contrasts = {"recency": torch.full((4, 6, 8), 1.5), "identity": torch.zeros(4, 6, 8)}
    shares = {"attention": x, "moved": Interval(0.3, 0.2, 0.4, 9)}
    drawn = [
        figures.looking_and_doing(here, chosen, sides),
        figures.opponents(table, ("size, ranks", "sign, ranks")),
        figures.against_alike(strong, fewer, alike),
        figures.shares(shares, "attention", "moved"),
        figures.against_others(lead, (9, 2), people, whats),
        figures.before_and_after({"previous": (x, x, 0.1), "first": (x, Interval(0.1, 0, 0.2, 9), 0.1)}),
        figures.both_orders(torch.tensor([[0.1, 0.2], [0.1, 0.2]]), ("doctor", "nurse"), "him", contrasts),
    ]
    said = [alt_text(figure) for figure in drawn]
    assert "of 3 help the right answer with" in said[0] and "\n" not in said[0] and "\n" in drawn[0].get_suptitle()
    assert "of 1 families by ranks" in said[1] and "of 1 families the heads" in said[2]
    assert "In 9 sentences the first token gets 50% of all attention and gives 30%" in said[3]
    assert "Head 9.2 prefers doctor more from patient than from parcel, against 2 of 2 other people" in said[4]
    assert "1 of 2 heads keep" in said[5] and "in 1 of 2 orders" in said[6] and "+1.5 hundredths" in said[6]
    assert looking_tables.both_sides(here, chosen, sides).index.tolist() == ["agreement"]
    assert "the first 1 in each family: " in looking_tables.helping(sides) and looking_tables.leads(table).shape == (
        4,
        3,
    )
    matplotlib.pyplot.close("all")


def test_tables_say_what_was_measured_and_what_can_not_be():
    assert looking_tables.both_sides({}, {}, {}).index[0] == looking_tables.helping({}) == looking_tables.NOBODY
    pair = (Interval(0.8, 0.7, 0.9, 24), Interval(0.4, 0.3, 0.5, 24), 0.15)
    row = looking_tables.kinds({"previous, 16.0": pair}).loc["previous, 16.0"]
    assert row["in order"] == "0.80 [0.70, 0.90]" and row["chance"] == "0.15" and row["sentences"] == 24
    look = torch.zeros(4, 2, 3, 1, 1)
    look[:, 0, 0], look[:, 1, 1] = 0.5, 0.3
    row = looking_tables.meaning(look, [(0, 0)], ["doctor", "baker", "farmer"], ["patient", "parcel"]).loc["0.0"]
    assert row["patient to doctor"] == "0.50" and row["patient to others"] == "0.00"
    assert row["lead from patient"].startswith("0.50") and row["lead from parcel"].startswith("-0.15")
    table = comparison({"one": planted(), "two": planted(seed=1)}, 50)
    kept = {
        family: {row: {kind: [x.value, x.low, x.high] for kind, x in by.items()} for row, by in rows.items()}
        for family, rows in table.items()
    }
    again = looking_tables.stored(kept)
    assert looking_tables.leads(again).equals(looking_tables.leads(table))
    assert "ahead in 2, behind in 0" in looking_tables.leads(table).to_string()
    beside = looking_tables.beside_study(table["mean"], again["mean"], [("decisive", "size, ranks")])
    assert beside["here"].tolist() == beside["study"].tolist()


def test_claims_are_judged_by_their_numbers():
    high, low = Interval(0.9, 0.8, 1.0, 9), Interval(0.1, 0.0, 0.2, 9)
    found = looking_tables.findings_of_looking(
        high, low, (high, high, 0.1), {"recency": high, "identity": low}, (high, low)
    )
    assert [f.rung for f in found] == [1, 2, 2, 2, 2] and all(f.verdict == "held" for f in found)
    turned = looking_tables.findings_of_looking(
        low, high, (low, low, 0.5), {"recency": low, "identity": high}, (low, high)
    )
    assert {f.verdict for f in turned[1:]} == {"refuted"}
    table = {name: {kind: high if name in ("decisive", "weighted") else low for kind in KINDS} for name in PREDICTORS}
    most, draws = [(23, 3)], [0.1, 0.2]
    assert {f.verdict for f in looking_tables.findings_of_acting(table, table, most, high, high, draws)} == {"held"}
    tie = {name: {kind: high for kind in KINDS} for name in PREDICTORS}
    found = looking_tables.findings_of_acting(tie, tie, most, low, low, [0.1, 0.3])
    assert {f.verdict for f in found} == {"null"} and "without 23.3" in found[-1].claim
    behind = {kind: Interval(-0.1, -0.2, -0.01, 9) for kind in KINDS}
    found = looking_tables.findings_of_acting(tie | {"decisive - length": behind}, tie, most, low, low, [0.1, 0.3])
    assert [f.verdict for f in found].count("refuted") == 3, "behind draw by draw"
