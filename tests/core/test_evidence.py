import pytest

from glassbox_utils.core.evidence import EvidenceError, Finding, ladder


def test_a_claim_above_rung_one_needs_a_control():
    Finding("a head looks", 1, 0.5, (0.4, 0.6), 10)
    with pytest.raises(EvidenceError, match="without a control"):
        Finding("a head acts", 3, 0.5, (0.4, 0.6), 10)


@pytest.mark.parametrize("change", [{"rung": 6}, {"n": 0}, {"ci": (1.0, 0.0)}])
def test_malformed_findings_are_refused(change):
    fields = {"claim": "c", "rung": 1, "effect": 0.5, "ci": (0.0, 1.0), "n": 5} | change
    with pytest.raises(EvidenceError):
        Finding(**fields)


def test_the_ladder_orders_by_rung_and_keeps_refuted_claims():
    table = ladder(
        [
            Finding("acts", 3, 1.0, (0.5, 1.5), 9, "random heads", 0.01),
            Finding("looks", 1, 0.5, (0.4, 0.6), 9, refuted=True),
        ]
    )
    assert table["rung"].tolist() == ["1 observed", "3 causal"]
    assert table["claim"][0] == "looks (refuted)"
