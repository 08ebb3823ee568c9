"""The template for a decision of one's own: copied, never over something, and a decision like the others."""

import pytest
from refusals import refused

from glassbox_utils import cli
from glassbox_utils.decisions import reading
from glassbox_utils.decisions.decision import groups, render, truth
from glassbox_utils.decisions.reading import load_decision, new_decision
from glassbox_utils.decisions.search import LEAST


def test_the_template_is_a_decision_that_every_step_takes(tmp_path):
    mine = load_decision(new_decision(tmp_path / "refunds"))
    assert (
        mine.name == "refunds" and len(mine.cases) == 24 >= LEAST and mine.protected() == {"gender": ("female", "male")}
    )
    assert 8 <= sum(truth(mine, c) for c in mine.cases) <= 16
    assert {groups(mine, c)["gender"] for c in mine.cases} == {"female", "male"}
    first, second = (render(mine, mine.cases[0], name) for name in mine.templates)
    assert first == second.replace("rejected or accepted", "accepted or rejected") != second  # the order alone differs


def test_nothing_is_overwritten(tmp_path):
    place = new_decision(tmp_path / "a" / "b")
    before = (place / "cases.csv").read_bytes()
    (place / "decision.yaml").unlink()
    said = refused(lambda: new_decision(place))
    assert "holds cases.csv already" in said and not (place / "decision.yaml").exists()
    assert (place / "cases.csv").read_bytes() == before
    assert "Allowed: the path of a new folder" in refused(lambda: new_decision(3))


def test_the_command_says_where_it_is(tmp_path, capsys):
    assert cli.main(["new-decision", str(tmp_path / "x")]) == 0
    assert str(tmp_path / "x" / "decision.yaml") in capsys.readouterr().out
    assert cli.main(["new-decision", str(tmp_path / "x")]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert cli.main(["new-decision", str(tmp_path / "file")]) == 2


@pytest.mark.parametrize("name", reading.TEMPLATE)
def test_what_is_copied_ships(name):
    assert (reading.DECISIONS / "template" / name).exists()
