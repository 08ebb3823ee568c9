"""Pictures, tables and claims of notebooks 06 and 07: they say what was measured, and their titles are computed."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from glassbox_utils.core.figures import alt_text
from glassbox_utils.core.statistics import Interval
from glassbox_utils.decisions import (
    answer,
    answer_tables,
    bench_claims,
    bench_figures,
    cycle_claims,
    cycle_figures,
    letter,
    locate_figures,
)
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import groups, margin
from glassbox_utils.decisions.locate import Link, Point, Specificity
from glassbox_utils.decisions.outcomes import Measured, by, outcome
from glassbox_utils.decisions.pairs import Contrast
from glassbox_utils.decisions.reading import load_decision
from glassbox_utils.decisions.verdicts import Audit, Verdict

HIRING = load_decision("hiring")
JOB = Contrast("job", "unskilled", "skilled")


def about(value, low, high, n=6):
    return Interval(value, low, high, n)


def point(basis, k, carried, drawn=(0.0, 0.1), template="other"):
    return Point(
        basis, template, k, about(carried, carried - 0.1, carried + 0.1), about(1 - carried, 0, 1), drawn, (1.0,), 1.0
    )


@pytest.fixture
def shown(monkeypatch):
    """Alternative texts of what was shown."""
    seen = []
    monkeypatch.setattr(plt, "show", lambda: seen.append(alt_text(plt.gcf())) or plt.close("all"))
    return seen


@pytest.fixture(scope="module")
def found():
    """A woman who is turned down by a clerk that follows the merit rule, against women."""

    def clerk(cases, template):
        return torch.tensor([margin(HIRING, c) - 1.5 * (groups(HIRING, c)["gender"] == "woman") for c in cases])

    women = [c for c in HIRING.cases if groups(HIRING, c)["gender"] == "woman" and margin(HIRING, c) < 1.5]
    case = max(women, key=lambda c: margin(HIRING, c))
    return answer.measured(clerk, HIRING, case, n=120)


# --- the answer ---------------------------------------------------------------------------------------


def test_reasons_changes_and_swaps_of_an_answer(found):
    reasons, changes, swaps = answer_tables.reasons(found), answer_tables.changes(found), answer_tables.swaps(found)
    assert list(reasons.index) == [test.field for test in found.reasons] and len(reasons) > 0
    assert set(reasons["in wordings"]) <= {f"{n} of {len(found.scores)}" for n in range(len(found.scores) + 1)}
    assert len(changes) == len(found.search.nearest) and all("→" in text for text in changes.index)
    assert len(swaps) == len(found.swaps) and set(swaps["the answer"]) <= {"turns", "stays"}
    assert "gender: man" in swaps.index
    nothing = replace(found, reasons=(), search=None, swaps=())
    for table in (answer_tables.reasons, answer_tables.changes, answer_tables.swaps):
        assert table(nothing).iloc[0, 0].startswith("no ") and table(nothing).shape == (1, 1)
    assert answer_tables.said(None) == "–" and answer_tables.said(about(-0.001, -0.1, 0.2)) == "-0.00 [-0.10, +0.20]"


def test_one_reason_is_not_called_the_weightiest(found):
    one, two = (letter.letter(replace(found, reasons=found.fields[:n])).opening for n in (1, 2))
    assert "principal reason for it is:" in one and "reasons for it are, the weightiest first:" in two


# --- 06 -----------------------------------------------------------------------------------------------


def test_twins_are_named_by_what_differs():
    own, donor = Case("1", {"name": "Mary", "age": 30}), Case("1", {"name": "John", "age": 30})
    assert cycle_figures.carriers(own, donor) == ("Mary", "John") and cycle_figures.carriers(own, own) == ("1", "1")
    figure = cycle_figures.draw_twins(
        [(own, donor), (own, own)], torch.tensor([-1.0, 2]), torch.tensor([1.0, 2]), 0, ("a", "b")
    )
    assert "1 of 2 decisions turn under the other name; Mary in bold" in alt_text(figure)
    plt.close("all")


def test_units_that_carry_and_that_are_frozen():
    table = cycle_figures.carried_table([point("heads", 1, 0.5), point("heads", 3, 0.6), point("neurons", 10, 0.75)])
    assert list(table.index) == ["1 head", "10 neurons"] and table.loc["1 head", "carried"] == "0.50 [0.40, 0.60]"
    assert table.iloc[0, -2:].tolist() == ["0.00 and 0.10", "1.0"] and cycle_figures.carried_table([]).empty
    links = [
        Link("neurons", "carrier", about(0.7, 0.6, 0.8)),
        Link("neurons", "carrier", about(0.0, 0, 0), "heads at decision"),
    ]
    (row,) = cycle_figures.frozen_table(links).to_dict("records")
    assert row["carries"] == "0.70 [0.60, 0.80]" and row["carries then"] == "0.00 [0.00, 0.00]"
    other = Specificity(
        "side: a / b", "heads", 10, about(1, 0.5, 2, 4), about(1, 1, 1), about(0.9, 0.8, 1), "not specific", 6, 0
    )
    assert cycle_figures.specificity_table([], [other]).loc["side: a / b"].tolist() == [
        "+1.0",
        "4",
        "0.90 [0.80, 1.00] not specific",
    ]


def test_what_goes_through_the_located_heads_stands_beside_random_ones():
    free = Link("neurons", "carrier", about(0.7, 0.6, 0.8))
    ours = Link("neurons", "carrier", about(0.1, 0.0, 0.2), "heads at decision")
    other = Link("neurons", "carrier", about(0.7, 0.6, 0.8), "random heads at decision")
    (found,) = cycle_claims.path([free, ours, other])
    assert found.verdict == "held" and "random heads frozen" in found.control.what
    same = Link("neurons", "carrier", about(0.65, 0.5, 0.75), "heads at decision")
    assert cycle_claims.path([free, same, other])[0].verdict == "null" and cycle_claims.path([free, ours]) == []


def test_units_are_specific_if_they_carry_little_either_way_and_if_there_are_clusters_enough():
    def said(carried):
        own = Specificity(
            "gender", "heads", 10, about(2, 1, 3, 9), about(2, 1, 3), about(0.8, 0.7, 0.9), "specific", 9, 0
        )
        other = replace(own, what="origin: a / b", carried=carried)
        (found,) = cycle_claims.specific([own], [other], "origin")
        return found

    assert said(about(0.1, -0.05, 0.2, 9)).verdict == "held" and said(about(0.9, 0.8, 1.0, 9)).verdict == "refuted"
    assert said(about(-2.0, -2.2, -1.8, 9)).verdict == "refuted"  # as far against it: not specific
    few = said(about(0.1, 0.05, 0.2, 3))
    assert few.verdict == "null" and "too few to tell" in few.claim
    assert said(about(0.9, 0.8, 1.0, 3)).verdict == "refuted"  # that they carry it was seen


def test_a_push_after_the_mend_stands_beside_the_same_push_with_random_units_held():
    draw = torch.Generator().manual_seed(0)

    def moved(at):
        return torch.full((8,), -at) + 0.02 * torch.randn(8, generator=draw)

    moves = {("as it is", "difference", 1.0): moved(1.0), ("mend", "difference", 1.0): moved(0.2)}
    held = cycle_claims.pushed_back({**moves, ("random", "difference", 1.0): moved(0.95)}, "mend", "random", range(8))
    assert held.verdict == "held" and held.effect == pytest.approx(0.8, abs=0.01)
    same = cycle_claims.pushed_back({**moves, ("random", "difference", 1.0): moved(0.2)}, "mend", "random", range(8))
    assert same.verdict == "null"  # any units that are held would do


def test_the_field_that_is_looked_at_is_judged_by_the_others():
    rng = np.random.default_rng(0)
    moved = torch.tensor(np.abs(rng.normal(size=(12, 4))) + np.array([0.0, 5.0, 0.0, 0.0]))
    assert cycle_claims.looked_at(moved, 1).verdict == "held" and cycle_claims.looked_at(moved, 0).verdict == "refuted"


def test_ranks_of_few_fields_are_judged_by_shuffled_fields():
    looked = torch.rand(8, 10, generator=torch.Generator().manual_seed(0))
    chance = cycle_claims.shuffled(looked, looked.flip(1))
    assert abs(chance.mean()) < 0.05 and np.quantile(chance, 0.975) == pytest.approx(0.65, abs=0.05)
    assert cycle_claims.ranks(about(0.43, 0.41, 0.6), chance).verdict == "null"
    assert cycle_claims.ranks(about(0.9, 0.8, 0.95), chance).verdict == "held"


def test_a_title_says_which_numbers_of_units_were_tried():
    some = [point("heads", 10, 0.9), point("neurons", 10, 0.5), point("neurons", 100, 0.9), point("features", 10, 0.1)]
    title = locate_figures.draw_curve(some)._suptitle.get_text()
    assert "at most 10 heads, about 56 neurons, no number of features tried" in title
    plt.close("all")


def test_what_is_pushed_is_drawn_for_every_arm():
    moves = {(arm, v, s): torch.full((3,), s * size * (v == "difference"))
             for arm, size in (("as it is", -1.0), ("mended", -0.2)) for v in ("difference", "random")
             for s in (0.0, 1.0, 2.0)}  # fmt: skip
    figure = cycle_figures.draw_pushed(moves)
    assert "2 times the difference moves -2.00 logits before the mend, -0.40 after" in alt_text(figure)
    plt.close("all")


# --- 07 -----------------------------------------------------------------------------------------------


def test_pictures_of_any_decision_say_their_numbers(shown):
    scores = {"one": np.array([1.0, 2, -1]), "two": np.array([-1.0, 1, -2])}
    bench_figures.draw_wordings(scores, " yes")
    bench_figures.draw_areas({"model": about(0.4, 0.3, 0.5, 60), "table": about(0.7, 0.6, 0.8, 60)}, ["table"])
    bench_figures.draw_moves({JOB: about(0.5, 0.4, 0.6), Contrast("sex", "a", "b"): about(0, -1, 1)}, ["sex"], JOB)
    verdict = Verdict("sex", "protected", "not found", smallest=0.5, smallest_pair=0.9)
    bench_figures.draw_limits(Audit("d", (verdict,), 16, ("one",), 9, 0.1, 0.3, None, None, None))
    wordings, areas, moved, limits = shown
    assert "3 people and facts: 1 decisions hang on the wording" in wordings and "one: 2 of 3" in wordings
    assert "60 unseen people at 0.40 at best, methods with a table at 0.70" in areas
    assert "job: unskilled / skilled is located below: +0.50 logits" in moved and "over 6 people" in moved
    assert "0 effects found" in limits
    nothing = Audit("d", (), 16, ("one",), 9, 0.1, 0.3, None, None, None)
    bench_figures.draw_limits(nothing)
    assert len(shown) == 4, "an empty picture was shown"


def test_single_people_with_what_happened():
    some = [Case("1", {"a": 1, "b": 2, "c": 3, "d": 4}, True), Case("2", {"a": 1, "b": 2, "c": 3, "d": 4})]
    table = bench_figures.people_table(some, {"one": np.array([0.5, -1])}, ["It is yes", "It is no "])
    assert list(table) == ["a", "b", "c", "a yes was", "one", "goes on"]
    assert table.iloc[1].tolist() == [1, 2, 3, "not known", "-1.00", "It is no"]


def measured(arm, gap):
    own = (0.1, 0.2, -0.3)
    donor = tuple(x + gap + 0.01 * i for i, x in enumerate(own))
    return Measured(arm, str(JOB), "one", own, donor, (True, False, True), ("x", "y", "z"), ("", "", ""), 0.5)


def test_claims_of_any_decision_have_their_verdict_and_control():
    rng = np.random.default_rng(0)
    base = rng.normal(size=30)
    scores = {"first": base, "order": base - 1 + 0.1 * rng.normal(size=30), "facts": base + 0.1 * rng.normal(size=30)}
    turned = bench_claims.order(scores, "section 1")
    assert turned.verdict == "held" and "('first' minus 'order', logits)" in turned.claim and turned.n == 30
    assert turned.control.what == "'first' minus 'facts', either way" and turned.control.value > 0.05
    areas = {"mean": about(0.4, 0.3, 0.5, 60), "table": about(0.7, 0.6, 0.8, 60)}
    ranks = bench_claims.ranking(areas, "mean", "table", "")
    assert ranks.verdict == "refuted" and ranks.claim.endswith("does (AUC, mean of its wordings)")
    assert bench_claims.moved(JOB, about(0.5, 0.4, 0.6), [base, scores["facts"]], "")[0].verdict == "held"
    assert bench_claims.moved(JOB, about(0.5, 0.4, 0.6), [base, scores["order"]], "")[0].verdict != "held"
    assert bench_claims.moved(JOB, about(0.5, 0.4, 0.6), [base], "") == []  # one wording: there is no control
    heads, neurons = bench_claims.carried(
        [point("heads", 10, 0.8), point("neurons", 10, 0.05), point("heads", 1, 0.9)], ""
    )
    assert heads.verdict == "held" and neurons.verdict == "null" and "ten located heads" in heads.claim
    arms = (bench_claims.PLAIN, 1.0), (bench_claims.HELD, 0.4), (bench_claims.LIKE, 1.02)
    some = [measured(name, gap) for name, gap in arms]
    held = bench_claims.held(JOB, some, "")
    assert held.verdict == "held" and held.effect == pytest.approx(0.6, abs=0.01) and "what job does" in held.claim
    arms_found = {name: outcome(part) for name, part in by(some, "arm").items()}
    page = bench_claims.mitigation(JOB, arms_found, "here")
    assert page.measures[0].before[0] == pytest.approx(1.01) and page.measures[0].n == 3
    more = bench_claims.mitigation(JOB, arms_found, "here", about(0.05, 0.04, 0.06), may_count=True)
    assert more.measures[-1].after == (0.05, 0.04, 0.06) and "before" in more.measures[1].note
    assert "may count" in more.description and "may count" not in page.description
