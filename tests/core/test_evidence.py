import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glassbox_utils.core.evidence import MIMETYPE, Control, EvidenceError, Finding, ladder

RANDOM = Control("random units", "ten random heads", 0.1, (0.0, 0.2))


def finding(**change):
    fields = {"claim": "acts", "rung": 3, "effect": 1.0, "ci": (0.5, 1.5), "n": 9, "control": RANDOM, "unit": "prompts"}
    return Finding(**fields | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"control": None}, "without a control"),
        ({"control": "random heads: 0.1"}, "no measured number"),
        ({"control": 0.1}, "no measured number"),
        ({"rung": 6}, "no rung 6"),
        ({"rung": True}, "no rung True"),
        ({"n": 0}, "n = 0"),
        ({"n": True}, "n = True"),
        ({"n": 2.5}, r"n = 2\.5"),
        ({"ci": (1.0, 0.0)}, r"\(low, high\)"),
        ({"ci": (math.nan, 1.0)}, "finite"),
        ({"ci": [0.5, 1.5]}, r"\(low, high\)"),
        ({"effect": math.inf}, "finite"),
        ({"unit": ""}, "names no unit"),
        ({"unit": " "}, "names no unit"),
        ({"side": "over"}, "Allowed: above, below, apart"),
        ({"declared": "proved"}, "Allowed: held, refuted, null, not testable"),
        ({"declared": "held", "ci": (-0.5, 1.5)}, "its numbers say null"),
        ({"declared": "held", "p_value": 0.2}, "its numbers say null"),
    ],
)
def test_a_finding_that_claims_too_much_is_refused(change, message):
    with pytest.raises(EvidenceError, match=message):
        finding(**change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("unclamped answers", "plain model", 0.0), "no kind of control 'unclamped answers'"),
        (("base rate", "", 0.1), "not described"),
        (("base rate", "all heads", math.nan), "measured number"),
        (("base rate", "all heads", "0.1"), "measured number"),
        (("random units", "ten heads", 0.1), "no spread"),
        (("shuffled labels", "twenty", 0.5, (0.7, 0.4)), r"not \(low, high\)"),
    ],
)
def test_a_control_is_a_measured_thing_that_can_fail(arguments, message):
    with pytest.raises(EvidenceError, match=message):
        Control(*arguments)


def test_the_verdict_comes_from_the_numbers():
    assert finding().verdict == finding(side="above").verdict == "held"
    assert finding(side="below").verdict == "refuted"
    assert finding(ci=(0.05, 1.5)).verdict == "null", "the control's number lies inside"
    assert finding(effect=0.15, ci=(0.12, 0.9)).verdict == "null", "a random draw reached the effect"
    assert finding(ci=(-0.5, -0.1), effect=-0.3, side="above").verdict == "refuted"
    assert finding(p_value=0.3).verdict == "null"
    assert finding(declared="not testable").verdict == "not testable"
    assert finding(ci=(0.6, 1.2), null=1.0).verdict == "null", "a ratio whose interval holds one"
    silent = Control("random units", "features that are never active", 0.0, (0.0, 0.0))
    assert finding(control=silent).verdict == "not testable", "it could not have sunk the claim"
    with pytest.raises(EvidenceError, match="say not testable"):
        finding(control=silent, declared="held")
    below = Control("trained opponent", "fine-tuning", 2.0)
    assert finding(control=below, side="below", null=None).verdict == "held"


numbers = st.floats(-5, 5, allow_nan=False)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(numbers, numbers, numbers, numbers, numbers, st.sampled_from(["above", "below", "apart"]))
def test_a_held_claim_never_overlaps_its_control_or_its_null(a, b, effect, c, width, side):
    ci = (min(a, b), max(a, b))
    control = Control("random units", "draws", c, (c - abs(width) - 0.01, c + abs(width) + 0.01))
    f = finding(effect=effect, ci=ci, control=control, side=side)
    if f.verdict == "held":
        assert not ci[0] <= c <= ci[1] and not ci[0] <= 0 <= ci[1]
        assert not control.ci[0] <= effect <= control.ci[1]
        # the control could have sunk it: the same effect, with a control that is as large, does not hold
        sunk = replace(control, value=effect, ci=(effect - 1, effect + 1))
        assert replace(f, control=sunk).verdict != "held"


def test_the_ladder_shows_verdicts_first_and_cuts_nothing_off():
    long = "a claim of more than eighty characters whose last words turn it into its opposite, which is why they count"
    shown = ladder([finding(claim=long, side="below"), Finding("looks", 1, 0.5, (0.4, 0.6), 9, unit="texts")])
    assert len(shown) == 2 and next(iter(shown.table)) == "verdict"
    assert shown.table["rung"].tolist() == ["1 observed", "3 causal"]
    assert shown.table["verdict"].tolist() == ["held", "refuted"]
    bundle = shown._repr_mimebundle_()
    for text in (bundle["text/plain"], bundle["text/html"]):
        assert long in text and str(RANDOM) in text and "9 prompts" in text and "..." not in text
    stored = bundle[MIMETYPE][1]
    assert stored["verdict"] == "refuted" and stored["unit"] == "prompts" and stored["claim"] == long
    assert stored["control"] == {"kind": "random units", "what": "ten random heads", "value": 0.1, "ci": [0.0, 0.2]}
