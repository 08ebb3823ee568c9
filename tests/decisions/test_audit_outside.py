"""What was tried on the first audit from outside, and slipped through: each is found and named on the loan officer."""

from dataclasses import replace

import pytest

from glassbox_utils.decisions import power, search
from glassbox_utils.decisions.power import Planting
from glassbox_utils.decisions.probes import Part, Probe
from glassbox_utils.decisions.reading import load_decision

LOAN = load_decision("loan-officer")
GROUPS = {part.group: part for field in ("name", "district") for part in power.coarse(LOAN, field)}


def value(field, word):
    return Part(field, field, (word,))


def ages(low, high):
    return Part("age", "age", (low, high), window=True)


def audited(planting, seed, decision=LOAN, odd=None):
    scorer = power.officer(decision, planting, 1.0, seed, odd=odd)  # a point: what the deployed officer takes
    return search.search(scorer, decision, seed=seed, resamples=0)


AGAINST = {
    "a job": [[value("occupation", "cook")]],
    "loans for a wedding": [[value("purpose", "wedding")]],
    "under 25": [[ages(18, 24)]],
    "27 to 36": [[ages(27, 36)]],
    "40 to 50": [[ages(40, 50)]],
    "54 to 64": [[ages(54, 64)]],
    "over 65": [[ages(66, 99)]],
    "East Mill": [[value("district", "East Mill")]],
    "four first names": [[value("name", name)] for name in ("Emma", "Khadija", "Igor", "Pablo")],
    "women of the East": [[GROUPS["female"], GROUPS["East"]]],
    "women, beside a dependence on the job": [[GROUPS["female"]], [value("occupation", "driver")]],
    "a wedding and the under 25s": [[value("purpose", "wedding")], [ages(18, 24)]],
}


@pytest.mark.parametrize("case", AGAINST)
def test_what_was_missed_is_found_and_named(case):
    planting = Planting("planted", tuple(Probe(tuple(parts), "planted") for parts in AGAINST[case]))
    audit = audited(planting, 41 + list(AGAINST).index(case))
    assert power.graded(LOAN, planting, audit) == (True, True, False), audit.as_text()


def test_a_place_in_no_list_is_found_if_a_case_holds_it():
    cases = tuple(
        replace(c, values={**c.values, "district": "Old Quay"}) if i < 8 else c for i, c in enumerate(LOAN.cases)
    )
    planting = Planting("planted", (Probe((value("district", "Old Quay"),), "planted"),))
    audit = audited(planting, 61, replace(LOAN, cases=cases))
    assert power.graded(LOAN, planting, audit) == (True, True, False), audit.as_text()
    honest = audited(Planting("honest"), 62)["district"]  # and of those that nobody wrote down it says so
    assert honest.outcome == "not found" and "64 values of district were asked about" in honest.reason
    assert "others are not tested" in honest.reason


@pytest.mark.parametrize("factor", [0.1, 0.2])
def test_an_officer_that_cares_little_for_the_history_is_not_accused(factor):
    audit = audited(Planting("honest"), 71, odd={"history": factor})
    assert not audit.found, audit.as_text()
