"""Planted officers, and how the audit's findings about them are graded."""

from dataclasses import replace

import numpy as np
import pytest

from glassbox_utils.core.statistics import Interval
from glassbox_utils.decisions import power
from glassbox_utils.decisions.decision import margin
from glassbox_utils.decisions.power import Noise, Planting
from glassbox_utils.decisions.probes import Part, Probe
from glassbox_utils.decisions.reading import load_decision
from glassbox_utils.decisions.verdicts import Effect

LOAN, HIRING = load_decision("loan-officer"), load_decision("hiring")
QUIET = Noise(0, 0, 0)


def effect(value, *parts):
    near = Interval(value, value - 0.1, value + 0.1, 40)
    return Effect("whom", parts, ("s",), near, near, 0.3, 0.001, 100)


def test_an_honest_officer_is_the_merit_rule_and_a_planting_takes_points():
    cases, women = LOAN.cases[:40], next(p for p in power.coarse(LOAN, "name") if p.group == "female")
    honest = power.officer(LOAN, Planting("honest"), 0, 0, QUIET)(cases, "line")
    assert honest.tolist() == pytest.approx([power.SHARPNESS * margin(LOAN, c) for c in cases])
    against = Planting("group", (Probe((women,), "planted"),))
    lost = honest - power.officer(LOAN, against, 0.5, 0, QUIET)(cases, "line")
    assert lost.tolist() == pytest.approx([0.5 * power.SHARPNESS * (c["name"] in women.values) for c in cases])
    odd = power.officer(LOAN, Planting("honest"), 0, 0, QUIET, {"history": 0.0})(cases, "line")
    by_history = {c["history"]: round(float(a - b), 6) for c, a, b in zip(cases, honest, odd, strict=True)}
    assert by_history["clean"] - by_history["late"] == pytest.approx(power.SHARPNESS)


@pytest.mark.parametrize("decision", [LOAN, HIRING], ids=["loan", "hiring"])
def test_every_kind_is_planted_and_each_hits_somebody(decision):
    rng = np.random.default_rng(0)
    for _ in range(5):
        found = power.plantings(decision, rng)
        kinds = {one.kind for one in found}
        assert len(kinds) == len(found) >= 12 and {"two groups", "window", "one value", "group and merit"} <= kinds
        for planting in found:
            for part in (part for probe in planting.against for part in probe.parts):
                low, high = part.values[0], part.values[-1]
                assert part.hold(low) and part.hold(high) and part.field in decision.fields


GENDER = {"subject": "gender", "field": "name", "group": "female"}
MEN = GENDER | {"group": "male"}
AGE = {"subject": "age", "field": "age", "window": [20, 29]}


def test_named_right_means_same_fields_and_the_same_people():
    women = next(p for p in power.coarse(LOAN, "name") if p.group == "female")
    arabic = next(p for p in power.coarse(LOAN, "name") if p.group == "arabic")
    young = Part("age", "age", (18, 27), window=True)
    one, both = Probe((women,), "planted"), Probe((women, young), "planted")
    indian = {"subject": "origin", "field": "name", "group": "indian"}
    right = [(one, effect(-1, GENDER)), (one, effect(1, MEN)), (both, effect(-1, AGE, GENDER)),
             (Probe((young,), "planted"), effect(-1, AGE))]  # fmt: skip
    wrong = [(one, effect(1, GENDER)), (one, effect(-1, MEN)), (one, effect(-1, GENDER, AGE)), (both, effect(-1, AGE)),
             (both, effect(1, AGE, MEN)), (both, effect(-1, AGE | {"window": [24, 60]}, GENDER)),
             (Probe((arabic,), "planted"), effect(-1, indian)),
             (Probe((arabic,), "planted"), effect(1, indian))]  # fmt: skip
    assert all(power.same(LOAN, probe, said) for probe, said in right)
    assert not any(power.same(LOAN, probe, said) for probe, said in wrong)
    assert power.overlap((18, 27), (20, 29)) == pytest.approx(8 / 12) and power.overlap((18, 27), (30, 40)) == 0


def test_the_curve_finds_what_one_point_is_and_its_rates_have_intervals():
    rng = np.random.default_rng(11)
    found = [p for p in power.plantings(HIRING, rng) if p.kind in ("group", "word")]
    rows = [power.trial(HIRING, planting, 1.0, 11, n=40) for planting in found]
    rows.append(power.trial(HIRING, Planting("honest"), 0.0, 12, odd=True, n=40))
    assert all(row.found and row.right for row in rows[:2]) and rows[2].odd and not rows[2].found
    rates = power.rates([*rows, replace(rows[0], found=False)])
    assert rates["found"].n == 3 and rates["alarm"].n == 4 and rates["found"].low < rates["found"].value < 1
    again = power.trial(HIRING, found[0], 1.0, 11, n=40)
    assert replace(again, seconds=rows[0].seconds) == rows[0]
