"""What every notebook's ladder says, read from the committed outputs: unit named, control typed and able to fail."""

import json
from pathlib import Path
from typing import get_args

import pytest

from glassbox_utils.core.evidence import MIMETYPE, Control, Finding, Kind, Verdict

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))


def findings_of(notebook):
    """All findings that the notebook's ladders wrote."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in cells if c["cell_type"] == "code" for o in c["outputs"] if MIMETYPE in o.get("data", {})]
    return [f for o in outputs for f in o["data"][MIMETYPE]]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_finding_has_a_verdict_a_unit_and_a_control_that_can_fail(notebook):
    found = findings_of(notebook)
    assert len(found) >= 3, "a notebook ends with its findings"
    for f in found:
        where = f"{notebook.stem}: {f['claim']}"
        assert f["verdict"] in get_args(Verdict), where
        assert f["unit"].strip() and f["n"] >= 1, where
        assert f["ci"][0] <= f["ci"][1], where
        control = f["control"]
        assert (control is not None) or f["rung"] == 1, where
        if control is None:
            continue
        assert control["kind"] in get_args(Kind) and control["what"].strip(), where
        if control["kind"] in ("random units", "shuffled labels"):
            assert control["ci"] and control["ci"][0] <= control["value"] <= control["ci"][1], where
        if f["verdict"] == "held":  # the same effect beside a control as large as itself must not hold
            sunk = Control("other group", "as large", f["effect"])
            again = Finding(f["claim"], f["rung"], f["effect"], tuple(f["ci"]), f["n"], sunk, unit=f["unit"], null=None)
            assert again.verdict != "held", where
            assert not f["ci"][0] < control["value"] < f["ci"][1], f"{where}: the control lies inside the interval"


def test_no_two_rows_read_alike():
    for notebook in NOTEBOOKS:
        claims = [f["claim"] for f in findings_of(notebook)]
        assert len(claims) == len(set(claims)), notebook.stem
