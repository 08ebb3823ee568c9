"""The study of how often the audit is right: what it plants, what its table says of it, and the figure."""

import json

import numpy as np
import pytest

from glassbox_utils import cli
from glassbox_utils.core import assets, prepared, studies
from glassbox_utils.decisions import figures, power, power_study, search
from glassbox_utils.decisions.power import Planting
from glassbox_utils.decisions.reading import load_decision
from glassbox_utils.decisions.verdicts import Audit, Verdict

LOAN, CREDIT = load_decision("loan-officer"), load_decision("german-credit")


@pytest.mark.parametrize("decision", [LOAN, CREDIT], ids=["loan", "credit"])
def test_unseen_biases_hit_some_and_spare_some(decision):
    planted = power_study.unseen(decision, np.random.default_rng(1))
    assert len({one.kind for one in planted}) == len(planted) >= 3
    for planting in planted:
        lost = [planting.unseen[0].hold(case) for case in decision.cases]
        assert 0 <= min(lost) < max(lost) <= 1 and set(planting.unseen[0].subjects) <= set(
            power.asking.subjects(decision)
        )
        scorers = [power.officer(decision, one, 1.0, 3, power.Noise(0, 0, 0)) for one in (planting, Planting("honest"))]
        hurt, honest = (scorer(decision.cases, next(iter(decision.templates))) for scorer in scorers)
        assert (honest - hurt).tolist() == pytest.approx([power.SHARPNESS * x for x in lost])


def test_promises_are_what_a_verdict_states():
    rng = np.random.default_rng(0)
    age = Verdict("age", "protected", "not found", (), 0.9, None, None)
    ((kind, logits, probe),) = power_study.promises(LOAN, age, [], rng)
    low, high = probe.parts[0].values
    assert (kind, logits, high - low + 1) == ("group or window", 0.9, 8) and 18 <= low < high <= 99
    side = Verdict("side", "protected", "not found", (), 0.5, None, 0.8)
    assert [x[0] for x in power_study.promises(LOAN, side, [], rng)] == ["group or window"]


def verdicts(outcome, confidence=None):
    return tuple(
        Verdict(s, role, outcome, (), 0.5, 0.9, 1.0, confidence=confidence)
        for s, (_, role) in power.asking.subjects(CREDIT).items()
    )


@pytest.fixture
def short(monkeypatch, tmp_path):
    """The study on one decision, with audits that find nothing."""
    asked = []

    def nothing(scorer, decision, n=80, seed=0, templates=None, resamples=40, limits=True):
        asked.append(seed)
        sure = 0.97 if resamples else None
        return Audit(
            decision.title, verdicts("not found", sure), n, ("line",), 0, 0.0, 0.3, None, None, None, seed=seed
        )

    monkeypatch.setattr(search, "search", nothing)
    monkeypatch.setattr(power_study, "DECISIONS", ("german-credit",))
    monkeypatch.setattr(assets, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(prepared, "path", lambda *parts: tmp_path.joinpath("data", *parts))
    return asked


def test_the_command_writes_a_table_of_rates_goes_on_and_uses_fresh_seeds(short, capsys):
    assert cli.main(["study", "audit-power"]) == 0
    table, first = studies.read_table("audit_power"), len(short)
    assert "audit_power.json" in capsys.readouterr().out and min(short) > power_study.SEEDS_SEEN
    assert table["provenance"]["command"] == "glassbox study audit-power" and "model" not in table["provenance"]
    kinds = {row["kind"] for row in table["curve"]}
    nobody = power_study.rate(table, "curve", "all", 1.0, "found")
    assert len(table["curve"]) == nobody.n * len(power_study.SIZES) and len(table["honest"]) == len(power_study.HONEST)
    assert nobody.value == 0 and nobody.n >= len(kinds) and 0 < nobody.high < 0.3
    assert power_study.rate(table, "promised", "all", 1.25, "found").value == 0
    assert power_study.rate(table, "again", "not found, confidence 0.95 to 1", None, "again").value == 1
    assert cli.main(["study", "audit-power"]) == 0 and len(short) == first  # nothing is computed twice
    drawn = figures.draw_power(table)
    assert drawn["found"][2] == nobody and drawn["honest"][0].n == len(power_study.HONEST)
    with pytest.raises(KeyError):
        power_study.rate(table, "curve", "nosuch", 1.0, "found")


def test_prepare_does_not_run_it():
    assert not set(power_study.STUDIES_OF_AUDITS) & set(cli.studies())


def test_the_shipped_table_keeps_its_promises():
    table = json.loads(studies.table_path("audit_power").read_text())
    assert set(table["settings"]["sizes"]) == set(power_study.SIZES)
    assert min(row["seed"] for row in table["curve"]) > table["settings"]["seeds seen in development"]
    assert power_study.rates(table) == table["rates"]
