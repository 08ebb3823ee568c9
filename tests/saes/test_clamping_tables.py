"""Tables and findings of notebook 04, from answers that are made up."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from glassbox_utils.saes import clamping_fit_tables, clamping_report_study, clamping_study, clamping_tables

N = 8
PLAIN = [f"answer number {i} speaks of tea and of nothing else" for i in range(N)]
BRIDGE = [f"{w} likes {w} tea and the bridge near {w}" for w in ("ann", "ben", "cy", "dee", "eve", "flo", "gus", "hal")]


def row(method, strength, answers, loss=10.0, relevance=1.0):
    return {
        "method": method, "strength": strength, "answers": answers, "later": answers,
        "loss": [loss + 0.1 * i for i in range(N)], "tokens": [10] * N, "relevance": [relevance] * N,
    }  # fmt: skip


@pytest.fixture
def report():
    rows = [row("none", None, PLAIN), row("one feature", 0.4, BRIDGE, 15.0, 0.6)]
    rows += [row(f"random push {k}", 0.4, PLAIN, 14.0 + k, 0.9 + 0.01 * k) for k in range(3)]
    rows += [row("learned features", 1.0, BRIDGE, 18.0, 0.2)]
    rows += [row(f"{clamping_study.TWIN} {k}", 1.0, PLAIN[:4] + BRIDGE[4:], 19.0 + k, 0.2) for k in range(3)]
    rows += [{k: v[::4] if isinstance(v, list) else v for k, v in row("one feature", 0.6, BRIDGE).items()}]
    forbid = [{"method": m, "strength": None, "answers": a, "later": a} for m, a in (
        ("none", PLAIN), ("one feature", BRIDGE))]  # fmt: skip
    return {"rows": rows, "prompts": [f"question {i}?" for i in range(N)], "adversarial": forbid}


@pytest.fixture
def choice():
    reads = [{"feature": i, "auc": 0.9, "on_name": 0.1 * i, "gain": float(i), "rank": 45 + i // 2} for i in range(20)]
    drawn = [{"feature": 100 + i, "auc": 0.5, "on_name": 0.0, "gain": 0.5, "rank": 49 + i} for i in range(20)]
    tried = [{"method": "one feature", "features": [19], "strength": 0.4, "mention": 0.5, "perplexity": 2.0}]
    asked = [f"question {i}?" for i in range(N)]
    return {
        "candidates": reads, "writers": reads[:2], "random": drawn, "rows": tried, "d_sae": 1000, "prompts": asked
    }  # fmt: skip


@pytest.fixture
def more():
    """Four of twenty features that are as active are among the fifty best writers; one more fit on each side."""
    active = [{"feature": 200 + i, "auc": 0.5, "on_name": 0.0, "gain": 0.5, "rank": 46 + i} for i in range(20)]
    fits = [row("learned features", 1.0, BRIDGE, 18.0, 0.2), row(f"{clamping_study.TWIN} 3", 1.0, PLAIN, 19.0, 0.2)]
    return {"active": active, "d_sae": 1000, "fits": fits}


def test_draws_of_one_control_share_a_line_and_the_goal_stands_first(report):
    found = clamping_tables.at_selected(report)
    assert list(found)[:2] == ["none", "one feature"] and found["one feature"]["mentions"].value == 1
    table = clamping_tables.compared(found, report, {"one feature": 0.5, "random push 0": 1.0, "random push 1": 2.0})
    assert table.loc["one feature", "push"] == "20%" and table.loc["random push (3 draws)", "push"] == "60%"
    assert table.loc["learned features", "push"] == ""
    assert next(iter(table.index)) == "**goal**" and "random push (3 draws)" in table.index
    assert clamping_tables.reached(found["one feature"]) and not clamping_tables.reached(found["learned features"])
    assert table.loc["random push (3 draws)", "relevance ×"] == "0.91 [0.90, 0.92]"


def test_findings_hold_by_their_controls_and_fall_without_them(report, choice, more):
    found = clamping_tables.at_selected(report)
    claims = {f.claim: f for f in clamping_tables.findings(choice, report, more, found, "one feature")}
    verdicts = {claim.split(":")[-1].strip()[:24]: f.verdict for claim, f in claims.items()}
    assert verdicts["share among the 5 % that"] == "held"
    assert (
        claims["the clamp on the bridge: share of answers with a late mention where the prompt forbids it"].verdict
        == "held"
    )
    active = [r | {"rank": c["rank"]} for r, c in zip(more["active"], choice["candidates"], strict=True)]
    (share, *_) = clamping_tables.findings(choice, report, more | {"active": active}, found, "one feature")
    assert share.verdict == "null"  # whatever is active there writes as well


def test_one_feature_alone_is_counted_over_all_that_was_tried(choice):
    one = choice["rows"][0]
    assert (clamping_tables.alone(choice).value, clamping_tables.alone(choice).n) == (0.5, N)
    again = [one | {"method": "one writer"}, one | {"strength": 0.6, "mention": 0.0}]  # the first is the same push
    pairs = one | {"method": "two features", "features": [3, 4], "mention": 1.0}
    x = clamping_tables.alone(choice | {"rows": [one, *again, pairs]})
    assert (x.value, x.n) == (0.25, 2 * N)


def test_what_is_bent_mentions_it_and_still_answers(report):
    half = row("readers", 1.0, BRIDGE[:4] + PLAIN[4:])
    half["relevance"] = [0.6, 0.4, 0.1, 0.9] + [1.0] * 4
    m = clamping_report_study.measures(half, report["rows"][0])
    assert m["mentions"].value == 0.5 and m["mentions and keeps half"].value == 0.25
    assert m["relevance of mentions ×"].value == pytest.approx(0.5)
    assert "relevance of mentions ×" not in clamping_report_study.measures(report["rows"][0], report["rows"][0])


def test_one_fit_can_not_tell_what_the_rows_are_worth(report, more):
    claims = clamping_fit_tables.fit_claims(report, more | {"fits": []})
    assert len(claims) == 2 and {f.verdict for f in claims} == {"not testable"}
    mention, *others = clamping_fit_tables.fit_claims(report, more)
    assert mention.verdict == "held" and mention.n == 2 + 4 and len(others) == 3
    same = [row("learned features", 1.0, PLAIN, 18.0, 0.2)]  # a second fit that mentions nothing: the fit varies
    mention, *_ = clamping_fit_tables.fit_claims(report, more | {"fits": [*same, more["fits"][1]]})
    assert mention.verdict == "null"
    assert len(clamping_fit_tables.fitted_twice(report, more)) == 2 + 4
    wide = clamping_fit_tables.over_fits(np.array([[1.0, 1], [0, 0]]), np.zeros((3, 2)))
    assert (wide.value, wide.low, wide.high) == (0.5, 0.0, 1.0)


def test_random_draws_are_pushed_as_far_as_what_they_control():
    chosen = {m: {"strength": s, "mention": 0.5, "perplexity": 2.0, "distinct": 0.8, "relevance": 0.7} for m, s in (
        ("one feature", 0.4), ("learned features", 1.0), ("learned vector", 1.0))}  # fmt: skip
    sizes = {"one feature": 1.0, "learned features": 0.4, "learned vector": 0.5, "random features 0": 0.32}
    sizes |= {"random push 0": 1.0, "random direction": 0.5}
    tried = [{"method": "learned vector", "strength": 0.8}]
    settings = clamping_report_study.report_settings(chosen, tried, sizes)
    at = {m: s for m, s, n in settings if n == clamping_report_study.N_REPORT}
    assert at["random features 0"] == pytest.approx(1.25) and at["random push 0"] == 0.4
    assert {s for m, s, _ in settings if m == "learned vector"} == {0.8, 1.0, 1.35, 1.8}


def test_what_is_taken_away_stands_beside_draws_that_are_as_active():
    kinds = {"facts": [1.0] * 8, "other_facts": [1.0] * 8}
    rise = {"facts": [2.0] * 8, "other_facts": [1.25] * 8}
    shared = {"n": 2, "features": [1, 2], "fires": {"facts": 8, "other_facts": 5}}
    table = {"ablation": [{"ablated": "nothing", "n": 0} | kinds, {"ablated": "the name's features"} | shared | rise]}
    table["ablation"] += [
        {"ablated": f"features as active {k}"} | shared | {"facts": [1.0 + 0.1 * k] * 8, "other_facts": [1.0] * 8}
        for k in range(3)
    ]
    shown, lost = clamping_tables.ablation(table, 0)
    assert shown.loc["the name's features", "fires in (of 8 and 8)"] == "8 and 5"
    assert shown.loc["features as active (3 draws)", clamping_tables.BRIDGE] == "0.10 [0.00, 0.20]"
    assert lost["the name's features"][clamping_tables.UNSPELLED][0].n == 5
    verdicts = [f.verdict for f in clamping_tables.side_effects({}, lost, "learned features")]
    assert verdicts == ["held", "held"]


def test_what_was_tried_stands_at_its_best_push(choice):
    row = {"method": "two features", "features": [3, 4], "distinct": 0.6, "relevance": 0.7}
    choice["rows"] = [row | {"strength": s, "mention": m, "perplexity": p} for s, m, p in ((0.2, 0.3, 2), (0.4, 1, 30))]
    choice["rows"] += [row | {"method": "learned features", "strength": 1, "mention": 1, "perplexity": 1}]
    (one,) = clamping_tables.tried(choice).reset_index().to_dict("records")
    assert (one["features"], one["push"], one["mentions"], one["most mentions"]) == ("3, 4", "20%", "0.30", "1.00")


def test_topics_stand_beside_random_features_and_the_shown_one_is_chosen_on_selection_prompts():
    def topic(name, mention, selection, drawn=0.0):
        shared = {"feature": 3, "strength": 0.3, "distinct": 0.7, "answers": ["a"] * N, "related": [0.6] * N}
        said = lambda rate: [float(i < rate * N) for i in range(N)]  # noqa: E731
        held = {"mentioned": said(mention), "unclamped": [0.0] * N, "others": {"tea": 0.1, "ice": 0.1, "dogs": 0.1}}
        scores = {"mention": selection, "perplexity": 2.0, "distinct": 0.7, "relevance": 0.6}
        random = shared | {
            "mentioned": said(drawn),
            "mention": drawn,
            "perplexity": 1.5 + 0.1 * mention,
            "relevance": 0.9 + 0.02 * mention,
        }
        return shared | held | {
            "concept": name, "selection": scores, "candidate": {"feature": 3, "auc": 0.9, "rank": 4}, "random": random,
            "perplexity": 3.0 + mention, "relevance": 0.5 - 0.1 * mention,
        }  # fmt: skip

    def all_of(*rows):
        return {"rows": list(rows), "unclamped_related": [1.0] * N}

    rows = [topic("tea", 1.0, 0.2), topic("ice", 0.5, 0.8), topic("dogs", 0.75, 0.4)]
    assert clamping_tables.star({"rows": rows})["concept"] == "ice"
    table, found = clamping_tables.concepts(all_of(*rows), 0)
    assert list(table["mentions"]) == ["1.00", "0.50", "0.75"] and list(table["random feature"]) == ["0.00"] * 3
    assert list(table["other topics' features"]) == ["0.10"] * 3
    assert list(table[clamping_tables.BENT[1]]) == list(table["mentions"])  # all keep .6 of 1
    assert [f.verdict for f in found] == ["held"] * 4 and found[0].effect == pytest.approx(0.75)
    replaced = [r | {"related": [0.4] * N} for r in rows]
    _, found = clamping_tables.concepts(all_of(*replaced), 0)
    assert found[1].effect == 0 and found[1].verdict == "null"
    _, found = clamping_tables.concepts(all_of(topic("tea", 0.5, 0.2, 0.5), topic("ice", 0.5, 0.2, 0.5)), 0)
    assert found[0].verdict != "held"
    _, found = clamping_tables.concepts(all_of(topic("tea", 1.0, 0.2) | {"random": None}), 0)
    assert found == []


def test_a_mention_is_not_yet_the_name(report, choice, more):
    """Answers about any bridge count as mentions; the column beside it counts those that say which one."""
    words = clamping_study.prompts()["golden_gate"]["words"]
    assert words[0] == "golden gate" and "bridge" in words
    found = clamping_tables.at_selected(report)
    assert found["one feature"]["mentions"].value == 1 and found["one feature"]["names it"].value == 0
    table = clamping_tables.compared(found, report, {})
    assert table.loc["one feature", "names it"].startswith("0.00")
    named = next(
        f for f in clamping_tables.findings(choice, report, more, found, "one feature") if "that name the" in f.claim
    )
    assert named.verdict == "null"


def test_pictures_say_what_they_show(report, choice, more):
    figure = clamping_tables.readers_and_writers(choice, more)
    said = " ".join(figure.get_suptitle().split())
    assert said == (
        "10 of 20 features that read the bridge are among the 5% that write it best; as active, blind: 4 of 20; "
        "random: 1 of 20"
    )
    figure = clamping_tables.frontier(report)
    assert "settings, the same 2 prompts each" in " ".join(figure.get_suptitle().split())
    plt.close("all")


def test_what_is_turned_up_stands_at_its_largest_strength(report):
    report["rows"] += [
        {k: v[::4] if isinstance(v, list) else v for k, v in row("learned features", 1.8, PLAIN).items()}
    ]
    table = clamping_tables.turned_up(report)
    assert list(table.index) == ["learned features", *(f"{clamping_study.TWIN} {k}" for k in range(3))]
    assert list(table["strength"]) == ["1.8", "1", "1", "1"] and list(table["mentions"]) == ["0.00"] + ["0.50"] * 3


def test_each_clamp_has_random_draws_of_its_own_size(report, choice, more):
    report["rows"] += [row(f"random features {k}", 1.0, PLAIN, 17.0, 0.8) for k in range(3)]
    found = clamping_tables.at_selected(report)
    for shown, family, size in (("one feature", "random push", 0.9), ("learned features", "random features", 0.8)):
        claims = clamping_tables.findings(choice, report, more, found, shown)
        relevance = next(f for f in claims if "relevance of its answers" in f.claim)
        assert {clamping_study.family(m) for m in found if clamping_tables.controls(m, shown)} == {family}
        assert relevance.control.value == pytest.approx(size, abs=0.02)
    selected = {m: {"strength": 1, "mention": 0.5, "perplexity": 1, "distinct": 1, "relevance": 1} for m in found}
    like = clamping_study.imitated(selected)
    assert like["random push"] == "one feature" and like["random features"] == "learned features"
    assert "random push" not in clamping_study.imitated({"learned features": selected["learned features"]})


def test_answers_are_drawn_by_the_seed(report):
    text = clamping_tables.some_answers(report, report["rows"][1], 1, 3)
    assert text == clamping_tables.some_answers(report, report["rows"][1], 1, 3) and text.count("question") == 3
    assert text != clamping_tables.some_answers(report, report["rows"][1], 2, 3)
