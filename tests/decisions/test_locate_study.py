"""The study of the located gap and its arms, on the planted llama: every part, as plain values, and its pictures."""

import json
from dataclasses import replace

import matplotlib.pyplot as plt
import planted
import pytest

from glassbox_utils.core.statistics import Interval
from glassbox_utils.decisions import locate_figures as drawn
from glassbox_utils.decisions import locate_study as study
from glassbox_utils.decisions import locate_tables as told
from glassbox_utils.decisions import outcomes, pairs
from glassbox_utils.decisions.locate_study import Size
from glassbox_utils.decisions.reading import load_decision

SIZE = Size(12, 12, 6, 12, 4, 6, 2, 2, 1, 3, (1, 2), (2,))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    def work(_name, key, function, *args):
        json.dumps(key)
        return json.loads(json.dumps(function(*args)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "resumed", work)
        decision, model = planted.decision(tmp_path_factory.mktemp("decisions") / "planted"), planted.model()
        differs = study.oriented(model, decision, pairs.contrast(model, decision, "clan", "second", "first"))
        assert (differs.own, differs.donor) == ("first", "second")
        found, chosen_on = study.attributed(model, decision, differs, study.spaces_of(model, ["topk-2048-l14"]), SIZE)
        located = study.located(model, decision, differs, SIZE, found, chosen_on)
        base = study.skills(model, SIZE)
        fixed = planted.model(bias=0.0)
        mended = study.mended(model, decision, differs, SIZE, found, chosen_on, retrained=fixed, base=base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    return located, mended


def test_the_study_finds_the_planted_units_and_what_closes_the_gap(tables):
    located, mended = tables
    assert (
        located["first"]["heads"][0]["unit"] == list(planted.MOVER) and "features topk-2048-l14" not in located["first"]
    )
    assert {tuple(x["unit"]) for x in located["first"]["neurons"][:2]} == {planted.READER, planted.WRITER}
    assert {p["template"] for p in located["points"]} == {"front", "behind"} == set(located["gaps"])
    assert {s["verdict"] for s in located["specificity"]} == {"specific"} and len(located["specificity"]) == 2
    assert any(x["frozen"] == "heads at decision" for x in located["chain"])
    found = drawn.outcomes_of([drawn.measured_of(m) for m in mended["measured"]], mended["contrast"])
    plain, hidden = found["as it is"], found["carrier hidden"]
    neurons = next(o for name, o in found.items() if name.startswith("2 neurons"))
    random = next(o for name, o in found.items() if name.startswith("2 random neurons"))
    assert plain.logits.low > 1 and abs(hidden.logits.value) < 1e-3
    assert abs(neurons.logits.value) < 0.1 * plain.logits.value < random.logits.value
    assert all(e["identical when off"] for name, e in mended["effects"].items() if name != "retrained")
    assert mended["effects"]["retrained"]["identical when off"] is None  # other weights can't be switched off
    assert all(e["perplexity over the base"] == e["perplexity ratio"] for e in mended["effects"].values())
    divergence = {name: e["divergence"]["value"] for name, e in mended["effects"].items()}
    assert mended["effects"]["affine edit"]["perplexity ratio"]["value"] < 0.5 < 1 < divergence["affine edit"]
    assert all(sum(row["chosen"] for row in rows) == 1 for rows in mended["tried"].values())
    rows = mended["reactivation"]["rows"]
    assert {r["vector"] for r in rows} == {"difference", "random"} and all("turned" in r for r in rows)
    assert "retrained" in {r["arm"] for r in rows} and not any("random" in r["arm"] for r in rows)
    met = {name: {x["demand"]: x for x in some} for name, some in mended["met"].items()}
    assert set(met) == set(found) and "perplexity" not in met["carrier hidden"]
    assert met["retrained"]["perplexity"]["worst"] == mended["effects"]["retrained"]["perplexity ratio"]["value"]
    assert met["carrier hidden"]["gap, points"]["worst"] == 0 and met["as it is"]["merit lost, points"]["holds"]
    assert met["as it is"]["gap, points"]["holds"] == (met["as it is"]["gap, points"]["worst"] <= 2.5)


def title(figure):
    """What stands over the first axes, wherever the looks put it."""
    return "".join(figure.axes[0].get_title(side) for side in ("left", "center"))


def test_tables_and_pictures_say_what_was_found(tables):
    located, mended = tables
    points = [drawn.point_of(p) for p in located["points"]]
    assert drawn.ks_table(points).loc["behind", "heads"] == "1"
    figure = drawn.draw_curve(points, "behind")
    assert "80% of the gap: 1 head, 1 neuron" in figure._suptitle.get_text() and len(figure.axes) == 2
    chain = drawn.draw_chain(located["chain"], "person")
    assert "after layer 1" in chain.get_suptitle() and len(chain.axes) == 3
    found = drawn.outcomes_of([drawn.measured_of(m) for m in mended["measured"]], mended["contrast"])
    frontier = drawn.draw_frontier(found)
    assert f"of {len(found) - 1} arms" in title(frontier)
    table = drawn.arms_table(found, mended["effects"])
    assert len(table) == len(found) and table["impact ratio"].str.contains("[", regex=False).all()
    demands = drawn.met_table(mended["met"])
    assert len(demands) == len(found) and {"gap, points", "perplexity", "all met"} <= set(demands)
    assert list(drawn.specificity_table(located["specificity"])["verdict"]) == ["specific", "specific"]
    plt.close("all")


def test_templates_that_chose_come_last():
    officer = load_decision("loan-officer")
    names = study.templates_of(officer, "gender", 99)
    assert set(names[-2:]) == {"memo", "slashes"} and len(names) == 12 and names[0] in ("loan first", "semicolons")


def test_no_template_chooses_that_opens_with_what_differs():
    """Its first positions hold massive activations, in which an SAE's features mean nothing."""
    officer, german = load_decision("loan-officer"), load_decision("german-credit")
    assert pairs.choosing_templates(officer, "gender") == ["memo", "slashes"]  # "prose" and "line" open with the name
    assert pairs.choosing_templates(officer, "side") == pairs.choosing_templates(officer, "income") == ["prose"]
    for what in [*german.groups, *german.fields]:
        assert pairs.choosing_templates(german, what)
    only = replace(officer, templates={"prose": officer.templates["prose"]})
    assert pairs.choosing_templates(only, "gender") == ["prose"]


def test_sizes_shrink():
    from glassbox_utils.core import prepared

    with prepared.at_size(0.01):
        assert study.sized() == study.SMALL
    with prepared.at_size(1.0):
        assert study.sized() == Size()


@pytest.fixture(scope="module")
def stored(tables):
    """The table of the study as it would be stored, of one officer that was mended and one that was not."""
    located, mended = tables
    made = {"command": "glassbox study locate", "seed": 0, "finished": "today"}
    packed = mended | outcomes.packed(mended["measured"])
    officers = {"first": {"located": located, "mended": packed}, "second": {"located": located}}
    return {"provenance": made, "size": list(SIZE), "officers": json.loads(json.dumps(officers))}


def test_the_stored_study_as_tables(stored):
    counts = told.counts_table(stored["officers"])
    assert list(counts["officer"]) == ["first", "second"] and counts["heads for 80%"][0].startswith("1 [1, 1]")
    assert counts["heads, all wordings"][0] == "1 to at most 2" and counts["gap"][0].startswith("clan:")
    shares = told.shares_table(stored["officers"])
    assert list(shares["units"][:2]) == ["1 heads", "1 neurons"] and "their activity, times" in shares
    assert shares["random units carry"].str.len().all()
    again = [drawn.point_of(p) for p in stored["officers"]["first"]["located"]["points"]]
    assert set(told.apart(stored["officers"]["first"], again)) == {0.0}
    assert told.apart(stored["officers"]["first"], [replace(again[0], template="nowhere")]) == []
    whose = told.whose_table(stored["officers"])
    assert set(whose["verdict"]) == {"specific to what was tested"} and not whose["not specific: move much of"].any()
    mended = stored["officers"]["first"]["mended"]
    wordings = told.wordings_table(mended, ["as it is", "carrier hidden"])
    assert set(wordings["wording"]) == {"front", "behind"} and wordings["carrier hidden"][0].startswith("0.0 [")
    assert set(told.pushed_table(mended)["arm"]) >= {"as it is", "affine edit"}
    assert told.best(mended) in mended["arms"] and set(told.holding(mended["met"])) < set(mended["arms"])
    pooled = told.together(mended)
    assert {x["where"] for x in pooled["as it is"]} == {"all"} and set(pooled) <= set(mended["arms"])
    one = outcomes.outcome([m for m in outcomes.unpacked(mended) if m.arm == "carrier hidden"])
    assert pooled["carrier hidden"][0]["worst"] == pytest.approx(abs(one.gap.value))


def test_an_officer_without_a_gap_is_said_to_have_none(stored):
    nothing = {"located": stored["officers"]["second"]["located"] | {"gaps": {"front": {"skipped": "no gap"}},
                                                                    "points": [], "specificity": []}}  # fmt: skip
    counts = told.counts_table({"none": nothing, "second": stored["officers"]["second"]}).set_index("officer")
    assert counts.loc["none", "logits"] == "none that could be located" and not counts.loc["none", "heads for 80%"]
    assert counts.loc["second", "heads for 80%"] and told.whose_table({"none": nothing}).empty
    assert told.findings({"officers": {"none": nothing}}) == []


def test_units_that_carry_another_gap_are_called_so(stored):
    changed = json.loads(json.dumps(stored["officers"]))
    row = changed["first"]["located"]["specificity"][0]
    row["verdict"] = "not specific"
    whose = told.whose_table(changed)
    said = whose.set_index(["officer", "units"])["verdict"].to_dict()
    assert [v for (name, _), v in said.items() if name == "first"].count("not specific") == 1
    assert "not specific" not in [v for (name, _), v in said.items() if name == "second"]


def test_k_has_ends_and_may_not_be_reached(stored):
    some = [drawn.point_of(p) for p in stored["officers"]["first"]["located"]["points"] if p["basis"] == "heads"]
    one = replace(some[0], carried=Interval(0.5, 0.3, 0.9, 5))
    assert told.k_range([one]) == (None, 1.0, None)
    assert told.k_range([one, replace(one, k=10, carried=Interval(0.9, 0.85, 0.95, 5))])[0] == pytest.approx(
        5.6, abs=0.1
    )


def test_findings_of_the_study_have_their_control(stored):
    found = told.findings(stored, k=2)
    assert all(f.source == "study locate" and f.control is not None for f in found)
    neurons = next(f for f in found if "officer second" in f.claim and "2 located neurons alone carry" in f.claim)
    assert ", wording " in neurons.claim and "in clan" in neurons.claim
    assert neurons.effect > 0.8 and neurons.verdict == "not testable"  # the planted model's other neurons are silent
    assert next(f for f in found if "closes a share" in f.claim).verdict == "held"
