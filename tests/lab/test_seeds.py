"""Other seeds: what is kept, what is run again, and what the page says of a finding that changed."""

from dataclasses import replace

import nbformat
import pytest

from glassbox_utils import cli
from glassbox_utils.lab import notebooks, seeds
from glassbox_utils.lab.seeds import Seeded, SeedsError

LADDER = """
from glassbox_utils.core.evidence import Finding, ladder
ladder([Finding("draws a number", 1, float(SEED), (SEED - 1.0, SEED + 1.0), 5, unit="draws")])
"""


def _notebook(path, code=LADDER):
    first = nbformat.v4.new_code_cell("SEED = 0")
    first.metadata.tags = ["parameters"]
    cells = [first, nbformat.v4.new_code_cell(code), nbformat.v4.new_code_cell("assert SEED != 3, 'three'")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def _row(seed, *verdicts, code="a", name="01_x", effect=1.0, stopped=""):
    found = [{"claim": f"claim {i}", "rung": 2, "verdict": v, "effect": effect, "ci": [0.0, 2.0]}
             for i, v in enumerate(verdicts)]  # fmt: skip
    return Seeded(name, seed, code, stopped, found, "2026-11-29")


def test_a_notebook_is_run_with_other_seeds_and_a_failing_assertion_is_a_result(tmp_path):
    path = _notebook(tmp_path / "08_tiny.ipynb")
    two, three = seeds.try_one(path, 2), seeds.try_one(path, 3)
    assert two.stopped == "" and two.findings[0]["effect"] == 2.0 and two.findings[0]["verdict"] == "held"
    assert "three" in three.stopped and three.findings[0]["effect"] == 3.0
    assert seeds.missing([two, three], path, (1, 2, 3, 4)) == [1, 4]
    _notebook(path, LADDER + "# changed\n")
    assert seeds.missing([two, three], path, (1, 2)) == [1, 2]


def test_rows_of_earlier_code_are_dropped_and_other_notebooks_kept():
    rows = [_row(1, "held"), _row(2, "held"), _row(1, "held", name="02_y")]
    new = _row(1, "null", code="b")
    assert seeds.merged(rows, new) == [new, rows[2]]
    again = replace(rows[1], stopped="x")
    assert seeds.merged(rows, again) == [rows[0], again, rows[2]]


def test_the_page_counts_what_stayed_and_marks_what_changed(tmp_path):
    rows = [_row(0, "held", "held"), _row(1, "held", "null", effect=0.5), _row(2, "held", stopped="AssertionError: no")]
    rows.append(_row(0, "held", name="02_only_its_own"))
    page = seeds.as_text(rows)
    assert "**1 of 2 findings keep their verdict with every seed.**" in page
    assert "01_x with SEED 2: AssertionError: no" in page and "02_only" not in page
    assert "| claim 1 | 2 | held 1.00 | **null 0.50** | **none** |" in page
    assert "same throughout for 0 of 2" in page and "changed since" not in page
    later = seeds.as_text(rows, {"01_x": "another digest"})
    assert "It has changed since: claims and verdicts may be others now** (`glassbox seeds 01`)" in later
    seeds.write(rows, tmp_path / "s.md", tmp_path / "s.json")
    assert seeds.read(tmp_path / "s.json") == rows and (tmp_path / "s.md").read_text() == page


def test_the_published_page_is_the_one_of_its_table():
    if seeds.TABLE.exists():
        written = "Write it again: glassbox seeds, or seeds.write(seeds.read()) if the seeds are to be run later."
        assert seeds.PAGE.read_text() == seeds.as_text(seeds.read()), written


def test_every_notebook_has_a_seed_and_findings(tmp_path):
    for path in notebooks.find():
        assert seeds.committed(path).seed == 0
    empty = _notebook(tmp_path / "08_tiny.ipynb")
    with pytest.raises(SeedsError, match="no finding in its outputs"):
        seeds.committed(empty)
    nbformat.write(nbformat.v4.new_notebook(cells=[]), empty)
    with pytest.raises(SeedsError, match="no parameter SEED"):
        seeds.committed(empty)


def test_a_wrong_notebook_or_seed_is_refused_before_anything_runs(capsys):
    assert cli.main(["seeds", "99"]) == 2 and "no notebook '99'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["seeds", "01", "--seeds", "-1"])
    assert "'-1' is no seed" in capsys.readouterr().err
