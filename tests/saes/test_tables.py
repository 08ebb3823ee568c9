"""What notebook 03 says of its numbers: on made-up ones whose verdict is known, and where parts are missing."""

import numpy as np
import pytest
import torch

from glassbox_utils.saes import comparing, figures, meaning, tables, toys


def made_study(shift=0.2, n=30):
    """A study in which the features of both sizes are ahead of everything by a shift."""
    draw = np.random.default_rng(0)

    def part(mean):
        return [{s: float(mean + 0.05 * draw.normal()) for s in meaning.SCORES} for _ in range(n)]

    of = {"main": 0.6 + shift, "trained": 0.6 + shift}
    kinds = ("main", "trained", "frozen", "pca", "random_sae", "random", "coordinates", "neurons")
    return {
        "seeds": [0, 1],
        "sae": "one",
        "small_saes": {"d_sae": 64, "samples": 1000, "tokens": 100},
        "explained": {key: [0.5, 0.7] for key in ("main", "trained", "frozen", "random_sae")},
        "units": {kind: [part(of.get(kind, 0.6)) for _ in range(2)] for kind in kinds},
    }


def test_arrows_are_dropped_kept_and_opposite():
    square = torch.tensor([[1.0, -1.0, 0.0, 0.0, 0.1], [0.0, 0.0, 1.0, -1.0, 0.0]])
    star = torch.stack([torch.tensor([np.cos(a), np.sin(a)]) for a in 2 * np.pi * np.arange(5) / 5], dim=1).float()
    found = toys.geometry(torch.stack([square, star])[None])
    assert found.dropped.tolist() == [[1, 0]] and found.kept.tolist() == [[4, 5]]
    assert found.opposite.tolist() == [[2, 0]]
    assert tables.arrows(found, [0.2, 0.05])["opposite pairs (each seed)"].tolist() == ["2", "0"]


def test_letters_of_arrows_that_lie_on_each_other_stand_side_by_side():
    squeeze = torch.tensor([[[1.0, 0.98, 0.0, 0.0], [0.0, 0.02, 1.0, 0.0]]])
    figure = figures.arrows(squeeze, [0.5])
    assert [t.get_text() for t in figure.axes[0].texts if t.get_text()] == ["A, B", "C", "D"]


@pytest.mark.parametrize(("gap", "verdict"), [(0.3, "held"), (0.0, "null"), (-0.3, "refuted")])
def test_concepts_found_again(gap, verdict):
    others = (torch.full((5, 2), 0.5) + 0.01 * torch.arange(5.0)[:, None])[..., None].repeat(1, 1, 4)
    sides = {"SAE": others + gap, "before": others, "random": others - 0.2}
    rare, often, *trained = tables.found_again([0.3, 0.01], sides)
    assert "p = 0.01" in rare.claim and "p = 0.3" in often.claim and rare.control.value == pytest.approx(0.32)
    assert [f.verdict for f in trained] == [verdict] * 2 and all("before training" in f.claim for f in trained)
    figure = figures.recovered([0.3, 0.01], sides)
    assert f"{gap:+.2f} at 0.01, {gap:+.2f} at 0.3" in figure.get_suptitle() and len(figure.axes[0].lines) == 18
    kept = torch.ones(5, 2, 4, dtype=torch.bool)
    kept[:, 0, 0], sides["random"][:, 0, 0] = False, 0.0
    shown = tables.recovered([0.3, 0.01], sides, kept)
    assert shown["dropped by the squeeze"].tolist() == ["5 of 20", "0 of 20"]
    assert shown.loc["0.3", "random, kept ones"] == "0.32" and shown.loc["0.3", "random"].startswith("0.24 [")


def test_few_cases_get_a_t_interval():
    found = tables.few(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert (found.value, found.n) == (1.5, 4)
    assert found.high - found.value == pytest.approx(3.182 * np.sqrt(5 / 3 / 4), abs=1e-3)


def test_what_a_reconstruction_costs():
    base = torch.tensor([2.0, 3.0, 4.0, 5.0])
    cost = {("SAE", "ordinary positions"): base + 0.1, ("SAE", "everywhere"): base + 4}
    cost |= {("PCA", "ordinary positions"): base + 1, ("PCA", "everywhere"): base + 4}
    usual, everywhere = tables.spliced(cost, base, 8)
    assert (usual.verdict, everywhere.verdict) == ("held", "null") and usual.effect == pytest.approx(0.1)
    better = cost | {(tables.WHOLE_PCA, "everywhere"): base + 0.5}
    assert tables.spliced(better, base, 8)[1].verdict == "refuted"
    for added, verdict in ((5.0, "held"), (0.1, "refuted")):  # the SAE's own massive positions add 3.9
        more = {
            (tables.ORDINARY, "ordinary positions"): base + 0.2,
            (tables.ORDINARY, "everywhere"): base + 0.2 + added,
        }
        assert tables.spliced(cost | more, base, 8)[2].verdict == verdict
    shown = tables.costs({"SAE": (0.9, 0.4), "PCA": (0.5, 0.7)}, cost)
    assert shown.loc["SAE", "loss: everywhere"] == "7.50" and shown.loc["PCA", "explained: all"] == "0.70"
    numbers = {"explained_variance": 0.9, "ce": 3.5, "ce_spliced": 3.6, "ce_spliced_all": 7.4}
    beside, gap = tables.beside_card(0.9, base, cost, {"wiki_held_out": numbers, "metrics": {"sae": numbers}})
    assert gap == pytest.approx(0.1) and beside.loc["loss with the SAE everywhere"].tolist() == ["7.50", "7.40", "7.40"]
    beside, gap = tables.beside_card(0.9, base, cost, {})  # an SAE of somebody else
    assert np.isnan(gap) and set(beside["library, same rows"]) == {"nan"}
    title = figures.losses(cost, 3.5, 9.0).get_suptitle()
    assert "costs 0.10 nats, everywhere 4.00" in title


def test_who_is_ahead_of_whom():
    study = made_study()
    assert [f.verdict for f in tables.one_meaning(study)] == ["held"] * 20
    small = [f for f in tables.one_meaning(study) if "small SAEs" in f.claim]
    assert {(f.n, f.unit) for f in small} == {(2, "dictionaries, then units")}
    differences = tables.differences(study)
    assert all(gap.clear and gap.interval.low > 0 for scores in differences.values() for gap in scores.values())
    assert set(differences) == set(tables.SIDES) and "*" in tables.gaps(differences).iloc[0, 0]
    assert {f.verdict for f in tables.one_meaning(made_study(-0.2))} == {"refuted"}
    assert {f.verdict for f in tables.one_meaning(made_study(0.0))} == {"null"}
    here = {"main": study["units"]["main"][0], "pca": []}
    here["random"] = [{s: 0.89 + 0.01 * (i % 3) for s in tables.SCORES} for i in range(24)]
    words, far = tables.near_study(here, study)
    assert words.startswith(("4 of 8", "5 of 8", "6 of 8")) and far > tables.NEAR
    near = {kind: study["units"][kind][1] for kind in ("main", "random", "neurons")}
    assert tables.near_study(near, study)[1] < tables.NEAR
    less = {kind: [{s: u[s] - 0.2 for s in tables.SCORES} for u in units] for kind, units in near.items()}
    words, far = tables.near_study(less, study)
    assert words.startswith("12 of 12") and far < tables.NEAR, "less text lowers all of them alike"
    assert np.isnan(tables.near_study({}, study)[1])
    assert tables.scores(here).index.tolist() == [tables.KINDS["main"], tables.KINDS["random"]]
    assert "0.60 of the variance" in tables.setup(study) and "of 60" in tables.setup(study)
    assert "any activity -0." in tables.lead(here, "main", "random") and "too few" in tables.lead(here, "main", "pca")
    title = figures.meanings(study, here, differences).get_suptitle().replace("\n", " ")
    assert "ahead of neurons in 4, random directions in 4" in title and "components in 0" in title
    old = {**study, "units": {k: v for k, v in study["units"].items() if k != "neurons"}}
    assert len(tables.one_meaning(old)) == 16, "a table from before neurons were asked"


def test_dictionaries_are_drawn_before_their_units():
    """Units of one dictionary are alike: forty of each of five are five cases, and no two hundred."""
    draw = np.random.default_rng(0)
    units = [[{"sense": float(mean + 0.01 * draw.normal())} for _ in range(40)] for mean in draw.normal(0.6, 0.1, 5)]
    of_dictionaries, of_units = (comparing.interval({kind: units}, kind, "sense") for kind in ("trained", "random"))
    assert of_dictionaries.n == 5 and of_units.n == 200
    assert of_dictionaries.high - of_dictionaries.low > 4 * (of_units.high - of_units.low)
    assert comparing.interval({"main": [[]]}, "main", "sense") is None
    assert len(comparing.pooled({"pca": units}, "pca", "sense")) == 40, "the same ones under every seed"
    twins = {"trained": units, "frozen": [[{"sense": u["sense"] - 0.05} for u in part] for part in units]}
    gap = comparing.gaps(twins, [("trained", "frozen")], ["sense"])["trained", "frozen"]["sense"]
    assert gap.clear and gap.interval.low > 0.04, "those of one seed are drawn together"


def test_many_comparisons_are_corrected():
    draw = np.random.default_rng(1)
    kinds = {
        k: [[{"sense": float(draw.normal(m, 0.1))} for _ in range(50)]] for k, m in (("main", 0.04), ("random", 0))
    }
    alone = comparing.gaps(kinds, [("main", "random")], ["sense"])["main", "random"]["sense"]
    kinds |= {name: kinds["main"] for name in "abcdefghijkl"}
    many = comparing.gaps(kinds, [("main", "random")] + [("main", x) for x in "abcdefghijkl"], ["sense"])
    one = many["main", "random"]["sense"]
    assert alone.p == alone.holm == one.p < 0.05 and one.holm == pytest.approx(13 * one.p)


def test_letters_and_the_bridge():
    report = {"letter": "a", "n_split": 1, "probe_f1": 0.6, "f1": (0.3, 0.4), "control_f1": 0.0}
    shown = tables.letters({"one": [report, report | {"n_split": 2}], "none": []})
    assert shown.index.tolist() == ["one"] and shown.loc["one", "exactly one feature"].startswith("0.50 [")
    assert shown.loc["one", "more than .03 by five"] == "2 of 2"
    found = {"n_positive": 8, "n_negative": 51, "false_alarms": ("a", "b"), "missed": ("c",)}
    table, finding = tables.bridge(found)
    assert table["fires on"].tolist() == ["7 of 8", "2 of 51"] and finding.verdict == "held"
    counted, _ = tables.bridge(found | {"false_alarms": 2, "missed": 1})
    assert counted.equals(table)


def test_a_model_without_a_single_unit_gives_an_empty_table():
    assert len(tables.scores({"main": [], "pca": []})) == 0 and len(tables.letters({})) == 0
