"""Tables and findings of notebook 04, from answers that are made up."""

import copy

import matplotlib.pyplot as plt
import pytest

from glassbox_utils.saes import clamping_study, clamping_tables

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
    return {"candidates": reads, "writers": reads[:2], "random": drawn, "rows": tried, "d_sae": 1000}


def test_draws_of_one_control_share_a_line_and_the_goal_stands_first(report):
    found = clamping_tables.at_selected(report)
    assert list(found)[:2] == ["none", "one feature"] and found["one feature"]["mentions"].value == 1
    table = clamping_tables.compared(found, report, {"one feature": 0.5, "random push 0": 1.0, "random push 1": 2.0})
    assert table.loc["one feature", "push"] == "20%" and table.loc["random push (3 draws)", "push"] == "60%"
    assert table.loc["learned features", "push"] == ""
    assert next(iter(table.index)) == "**goal**" and "random push (3 draws)" in table.index
    assert table.loc["one feature", "all four"] == "yes" and table.loc["learned features", "all four"] == "no"
    assert table.loc["random push (3 draws)", "relevance ×"] == "0.91 [0.90, 0.92]"


def test_findings_hold_by_their_controls_and_fall_without_them(report, choice):
    found = clamping_tables.at_selected(report)
    claims = {f.claim: f for f in clamping_tables.findings(choice, report, found, "one feature")}
    verdicts = {claim.split(":")[-1].strip()[:24]: f.verdict for claim, f in claims.items()}
    assert verdicts["share among the 5 % that"] == "held"
    assert (
        claims["the clamp on the bridge: share of answers with a late mention where the prompt forbids it"].verdict
        == "held"
    )
    same = copy.deepcopy(choice)
    for i, (a, b) in enumerate(zip(same["candidates"], same["random"], strict=True)):
        a["rank"] = b["rank"] = 49 * (1 + i % 2)
    (share, *_) = clamping_tables.findings(same, report, found, "one feature")
    assert share.verdict == "null"


def test_what_was_tried_stands_at_its_best_push(choice):
    row = {"method": "two features", "features": [3, 4], "distinct": 0.6, "relevance": 0.7}
    choice["rows"] = [row | {"strength": s, "mention": m, "perplexity": p} for s, m, p in ((0.2, 0.3, 2), (0.4, 1, 30))]
    choice["rows"] += [row | {"method": "learned features", "strength": 1, "mention": 1, "perplexity": 1}]
    (one,) = clamping_tables.tried(choice).reset_index().to_dict("records")
    assert (one["features"], one["push"], one["mentions"], one["most mentions"]) == ("3, 4", "20%", "0.30", "1.00")


def test_topics_stand_beside_random_features_and_the_shown_one_is_chosen_on_selection_prompts():
    def topic(name, mention, selection, drawn=0.0):
        shared = {"feature": 3, "strength": 0.3, "distinct": 0.7, "answers": ["a"] * N}
        held = {"mentioned": [float(i < mention * N) for i in range(N)], "unclamped": [0.0] * N}
        scores = {"mention": selection, "perplexity": 2.0, "distinct": 0.7, "relevance": 0.6}
        random = shared | {"mention": drawn, "perplexity": 1.5 + 0.1 * mention, "relevance": 0.9 + 0.02 * mention}
        return shared | held | {
            "concept": name, "selection": scores, "candidate": {"feature": 3, "auc": 0.9, "rank": 4}, "random": random,
            "perplexity": 3.0 + mention, "relevance": 0.5 - 0.1 * mention,
        }  # fmt: skip

    rows = [topic("tea", 1.0, 0.2), topic("ice", 0.5, 0.8), topic("dogs", 0.75, 0.4)]
    assert clamping_tables.star({"rows": rows})["concept"] == "ice"
    table, found = clamping_tables.concepts({"rows": rows}, 0)
    assert list(table["mentions"]) == ["1.00", "0.50", "0.75"] and list(table["random feature"]) == ["0.00"] * 3
    assert [f.verdict for f in found] == ["held", "held", "held"] and found[0].effect == pytest.approx(0.75)
    _, found = clamping_tables.concepts({"rows": [topic("tea", 0.5, 0.2, 0.5), topic("ice", 0.5, 0.2, 0.5)]}, 0)
    assert found[0].verdict != "held"
    _, found = clamping_tables.concepts({"rows": [topic("tea", 1.0, 0.2) | {"random": None}]}, 0)
    assert found == []


def test_a_mention_is_not_yet_the_name(report, choice):
    """Answers about any bridge count as mentions; the column beside it counts those that say which one."""
    words = clamping_study.prompts()["golden_gate"]["words"]
    assert words[0] == "golden gate" and "bridge" in words
    found = clamping_tables.at_selected(report)
    assert found["one feature"]["mentions"].value == 1 and found["one feature"]["names it"].value == 0
    table = clamping_tables.compared(found, report, {})
    assert table.loc["one feature", "names it"].startswith("0.00")
    named = next(
        f for f in clamping_tables.findings(choice, report, found, "one feature") if "that name the" in f.claim
    )
    assert named.verdict == "null"


def test_pictures_say_what_they_show(report, choice):
    figure = clamping_tables.readers_and_writers(choice)
    said = " ".join(figure.get_suptitle().split())
    assert said == "10 of 20 features that read the bridge are among the 5% that write it best, 1 of 20 random ones"
    figure = clamping_tables.frontier(report)
    assert "settings, 2 prompts each" in " ".join(figure.get_suptitle().split())
    plt.close("all")


def test_each_clamp_has_random_draws_of_its_own_size(report, choice):
    report["rows"] += [row(f"random features {k}", 1.0, PLAIN, 17.0, 0.8) for k in range(3)]
    found = clamping_tables.at_selected(report)
    for shown, family, size in (("one feature", "random push", 0.9), ("learned features", "random features", 0.8)):
        relevance = next(f for f in clamping_tables.findings(choice, report, found, shown) if "relevance" in f.claim)
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
