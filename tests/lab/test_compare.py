"""Claims of two models side by side: matched by their words, and counted by what held."""

import json
import shutil
from pathlib import Path

import nbformat
import pytest

import glassbox_utils as gb
from glassbox_utils.core.evidence import MIMETYPE, Control, Finding
from glassbox_utils.lab import compare, notebooks
from glassbox_utils.lab.compare import CompareError, normalised, read_side, write_page

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


def finding(claim, effect=1.0, control=0.0):
    ci = (effect - 0.1, effect + 0.1)
    return Finding(claim, 2, effect, ci, 9, Control("other group", "<elsewhere>", control), unit="prompts")


def site(folder, findings, model="m", hash="0" * 16, **more):
    """A folder of pages as ``build_site`` leaves it."""
    entries = gb.ladder(findings)._repr_mimebundle_()[MIMETYPE]
    run = {"stamp": "s", "seconds": 1.0, "peak_gib": 1.0, "parameters": {}, "title": "t"}
    run |= {"model": model, "model_hash": hash, "size": 1.0, "findings": entries, "skipped": []} | more
    folder.mkdir(exist_ok=True)
    (folder / notebooks.RUNS).write_text(json.dumps({"01_a": run}))
    return folder


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("18.6 attends to what followed", "2.11 attends to what followed"),
        ("without six heads (of 3.41 logits)", "without the heads".replace("the", "12") + " (of −0.2 logits)"),
        ("which heads carry it, layers [25, 27, 28 and 29]", "which heads carry it, layers [3]"),
        ("Steering at 50 % of it", "steering  at 7% of it"),
    ],
)
def test_claims_are_the_same_but_for_a_models_own_numbers(one, other):
    assert normalised(one) == normalised(other)
    assert normalised("the edit shrinks the gap") != normalised("the edit widens the gap")


def test_a_page_says_what_held_on_both(tmp_path):
    same, mine = finding("head 3.1 copies"), finding("the gap is <wide>")
    first = site(tmp_path / "a", [same, mine, finding("x leads to y"), finding("only here")], "one")
    second = [finding("head 5.0 copies", 2.0), finding("the gap is <wide>", 0.05), finding("x leads to y", -1.0)]
    second = site(tmp_path / "b", second, "two", "1" * 16, size=0.1, stopped="in cell 3: no memory")
    rows = write_page(first, second, tmp_path / "compare.html")
    assert [r.outcome for r in rows] == ["both", "first", "both", "unmatched"]
    page = (tmp_path / "compare.html").read_text()
    assert "Of 3 claims that both made, 2 held on both,\n1 on one only, 0 on two only, 0 on neither" in page
    assert "two (studies at 10% of their full size)" in page and "stopped before their end: 01_a" in page
    assert "2.00 [1.90, 2.10]" in page and "head 5.0 copies" in page and "only here" in page
    assert "<wide>" not in page and "&lt;wide&gt;" in page and "<elsewhere>" not in page
    write_page(first, second, tmp_path / "compare.md")
    lines = (tmp_path / "compare.md").read_text().splitlines()
    assert "Of 3 claims that both made, **2 held on both**," in " ".join(lines)
    assert len([x for x in lines if x.startswith("| ") and x.count("|") == 5]) == 4 and any(
        "&lt;wide&gt;" in x for x in lines
    )


def test_word_for_word_goes_before_alike(tmp_path):
    first = site(tmp_path / "a", [finding("type 1 moves", 1.0), finding("type 2 moves", 2.0)])
    second = site(tmp_path / "b", [finding("type 2 moves", 2.0), finding("type 1 moves", 1.0)])
    rows = write_page(first, second, tmp_path / "c.html")
    assert all(r.first["effect"] == r.second["effect"] for r in rows) and len(rows) == 2


def test_executed_notebooks_are_a_side_too(tmp_path):
    """The committed ones, against one of them in which a claim became null."""
    shutil.copy(NOTEBOOKS / "04_feature_clamping.ipynb", tmp_path)
    path = tmp_path / "04_feature_clamping.ipynb"
    notebook = nbformat.read(path, 4)
    found = next(
        o["data"][MIMETYPE] for c in notebook.cells for o in c.get("outputs", []) if MIMETYPE in o.get("data", {})
    )
    held = next(f for f in found if f["verdict"] == "held")
    held["verdict"] = "null"
    notebook.cells.append(nbformat.v4.new_code_cell('MODEL = "a/other"', metadata={"tags": ["injected-parameters"]}))
    nbformat.write(notebook, path)
    one, two = read_side(NOTEBOOKS), read_side(tmp_path)
    assert (one.model, two.model) == ("SmolLM2-135M-Instruct", "other") and len(one.findings) == len(
        list(NOTEBOOKS.glob("0*.ipynb"))
    )
    rows = [r for r in compare.matched(one, two) if r.outcome != "unmatched"]
    assert len(rows) == len(found) and [r.first["claim"] for r in rows if r.outcome == "first"] == [held["claim"]]


def test_folders_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(CompareError, match=r"no folder.*--site"):
        read_side(tmp_path / "no")
    with pytest.raises(CompareError, match=r"holds no findings.*glassbox run --site"):
        read_side(tmp_path)
    folder = site(tmp_path / "two", [finding("a")])
    runs = json.loads((folder / notebooks.RUNS).read_text())
    runs["02_b"] = runs["01_a"] | {"model": "n", "model_hash": "1" * 16}
    (folder / notebooks.RUNS).write_text(json.dumps(runs))
    with pytest.raises(CompareError, match=r"several models: m, n\. Give each a --site"):
        read_side(folder)
