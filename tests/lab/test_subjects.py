"""Notebooks on another model: what is missing is skipped in words, with all that needs it; prose says whose it is."""

import json

import nbformat
import pytest
import tiny

from glassbox_utils import cli
from glassbox_utils.core import assets, prepared
from glassbox_utils.core.models import EMBEDDED, load_model
from glassbox_utils.core.prepared import Card, write_card
from glassbox_utils.lab import notebooks, subjects
from glassbox_utils.lab.subjects import Subject, adapt, has, names_of, subject_of, why_not

CODE, PROSE = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell


def code(source, *tags):
    return CODE(source, metadata={"tags": list(tags)})


@pytest.fixture()
def other(tmp_path):
    """A model for which one study and one vector were made, and no SAE."""
    write_card(Card("some/other-model", "0" * 16), tmp_path)
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "there.json").write_text("{}")
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors" / "tone-single.safetensors").touch()
    return Subject("some/other-model", "0" * 16, tmp_path)


def run(subject, *cells):
    notebook = nbformat.v4.new_notebook(cells=list(cells))
    return notebook, adapt(notebook, subject)


def test_what_is_there_is_found_whatever_its_ending(other):
    assert has(other, "studies/there") and has(other, "studies/there.json") and has(other, "vectors/tone-single")
    assert not has(other, "vectors/tone") and not has(other, "saes") and not has(other, "loans/deployed")
    ours = subject_of()
    for need in ("saes", "studies/saes", "vectors/tone", "loans/deployed"):
        assert has(ours, need), need
    assert ours == subject_of(EMBEDDED) and ours.is_embedded and ours.folder == assets.DATA


def test_a_skipped_cell_takes_along_what_uses_it_and_nothing_else(other):
    cells = [
        code("import numpy as np\nx = 1"),
        code("import json\ntable = [1]", "needs:studies/missing"),
        code("print(json.dumps(x))"),  # its import stayed
        code("mean = np.mean(table)"),
        code("def f():\n    return mean"),
        code("table = [2]"),
        code("print(table)"),
        code("kept = [table for table in [1]]\nfor mean in kept:\n    print(mean)"),
        code("read = 3", "needs:studies/there"),
        code("print(f())"),
    ]
    notebook, skipped = run(other, *cells)
    left = [i for i, c in enumerate(notebook.cells) if "Skipped" in c.source]
    assert left == [1, 3, 4, 9] and len(skipped) == 4
    assert "uses what was skipped (table)" in skipped[1] and "(f)" in skipped[3]
    assert (
        notebook.cells[1].source.startswith("import json\nprint(")
        and "`glassbox prepare some/other-model`" in skipped[0]
    )


def test_a_name_that_a_skipped_cell_would_have_made_anew_is_not_taken_from_before(other):
    _, skipped = run(
        other, code("study = 1"), code("study = 2", "needs:studies/no"), code("study"), code("study = 3"), code("study")
    )
    assert len(skipped) == 2


def test_what_a_skipped_cell_only_adds_to_goes_on(other):
    _, skipped = run(other, code("claims = [1]"), code("claims += [2]", "needs:saes"), code("print(claims)"))
    assert len(skipped) == 1
    _, skipped = run(other, code("claims += [2]", "needs:saes"), code("print(claims)"))
    assert len(skipped) == 2


@pytest.mark.parametrize(
    ("source", "read", "bound"),
    [
        ("a = b", "b", "a"),
        ("a = a + 1", "a", "a"),
        ("a = 1\nprint(a)", "", "a"),
        ("for a, b in c:\n    d = a", "c", "abd"),
        ("[a for a in b if c]", "bc", ""),
        ("{a: d for a, d in b.items()}", "b", ""),
        ("f = lambda a, *b, c=d: a + e", "de", "f"),
        ("def f(a, b=c):\n    d = a\n    return d, e", "ce", "f"),
        ("with a as b, c(b) as d:\n    e = d", "ac", "bde"),
        ("a[b] = c\nd.e = f", "abcdf", ""),
        ("if (a := b) > 1:\n    c", "bc", "a"),
        ("a: int = b", "b", "a"),
        ("try:\n    a\nexcept c as d:\n    d", "ac", "d"),
        ("class a(b):\n    c = 1\n    d = c + e", "be", "a"),
        ("import a.b as c, d.e\nfrom f import g as h", "", "cdh"),
        ("%matplotlib inline", "", ""),
    ],
)
def test_names_are_read_before_they_are_bound(source, read, bound):
    found = names_of(source)
    assert found[0] - {"int"} == set(read) and found[1] == set(bound)


def test_reasons_come_from_the_record_of_refusals(other):
    (other.folder / subjects.REFUSED).write_text(
        json.dumps({"clamp-choose": "no feature reads the bridge.", "loans": "no chat"})
    )
    assert why_not(other, ["studies/clamp_choose"]) == (
        "studies/clamp_choose can't be made for other-model: no feature reads the bridge."
    )
    assert "no chat" in why_not(other, ["studies/there", "loans/deployed"])
    assert "glassbox prepare" in why_not(other, ["studies/clamp_report"])


def test_prose_about_the_embedded_model_says_so_on_another(other):
    cells = [
        PROSE("## 3. Heads\n\nNine of ten.", metadata={"tags": ["about-embedded"]}),
        PROSE("Nine of ten.", metadata={"tags": ["about-embedded"]}),
        PROSE("Plain."),
    ]
    notebook, _ = run(other, *cells)
    first, second, third = (c.source for c in notebook.cells)
    assert first.startswith("## 3. Heads\n\n> *The sentences below were written about SmolLM2-135M-Instruct.")
    assert second.startswith("> *") and second.endswith("\n\nNine of ten.") and "other-model" in second
    assert third == "Plain."
    ours, _ = run(subject_of(), PROSE("Nine.", metadata={"tags": ["about-embedded"]}))
    assert ours.cells[0].source == "Nine."


def test_the_kernel_works_with_the_folder_of_the_model(tmp_path, monkeypatch):
    """Found by the hash, in the place of all prepared folders; a relative path is the caller's."""
    tiny.save("llama", tmp_path / "model")
    monkeypatch.setenv(prepared.PLACE, str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    write_card(Card("model", load_model(tmp_path / "model").hash), tmp_path / "models" / "any-name")
    show = "import os\nprint(os.environ['GLASSBOX_PREPARED'], MODEL)"
    notebook = nbformat.v4.new_notebook(
        cells=[code("MODEL = 'x'", "parameters"), code(show), code("y = 1", "needs:saes")]
    )
    notebook.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    (tmp_path / "folder").mkdir()
    nbformat.write(notebook, tmp_path / "folder" / "n.ipynb")
    done, _, _ = notebooks.execute(tmp_path / "folder" / "n.ipynb", None, {"MODEL": "model"})
    assert done.cells[-2].outputs[0].text == f"{tmp_path}/models/any-name {tmp_path}/model\n"
    assert done.cells[-1].outputs[0].text.startswith("Skipped: saes was not prepared for model.")


def test_a_page_is_made_anew_when_more_was_prepared(tmp_path, monkeypatch, capsys):
    subject = Subject("m", "0" * 16, tmp_path / "m")
    monkeypatch.setattr(subjects, "subject_of", lambda model=None: subject)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    notebook = nbformat.v4.new_notebook(cells=[code("print('made')", "needs:studies/a")])
    nbformat.write(notebook, tmp_path / "07_a.ipynb")
    notebooks.build_site(tmp_path / "site")
    assert "1 cell skipped" in (tmp_path / "site" / "index.html").read_text()
    write_card(Card("m", "0" * 16), tmp_path / "m")
    (tmp_path / "m" / "studies").mkdir()
    (tmp_path / "m" / "studies" / "a.json").write_text("{}")
    notebooks.build_site(tmp_path / "site")
    assert "skipped" not in (tmp_path / "site" / "index.html").read_text()
    assert notebooks.runs_of(tmp_path / "site")["07_a"]["model_hash"] == "0" * 16
    capsys.readouterr()
    notebooks.build_site(tmp_path / "site")
    assert "unchanged" in capsys.readouterr().out


def test_another_folder_that_was_prepared_for_the_embedded_model_can_be_named(other, monkeypatch):
    monkeypatch.setenv(prepared.VARIABLE, str(other.folder))
    assert subject_of().folder == assets.DATA  # it belongs to other weights
    write_card(Card(EMBEDDED, subject_of().hash, size=0.1), other.folder)
    assert subject_of().folder == other.folder and subject_of().is_embedded


def test_prepare_makes_every_table_that_a_notebook_reads(other):
    """So what `why_not` says of a missing one is true."""
    needs = {
        tag.removeprefix(subjects.NEEDS)
        for path in (assets.ROOT / "notebooks").glob("*.ipynb")
        for cell in nbformat.read(path, 4).cells
        for tag in cell.metadata.get("tags", [])
        if tag.startswith("needs:studies/")
    }
    assert needs and needs <= {f"studies/{name.replace('-', '_')}" for name in cli.studies()}
    assert "`glassbox prepare" in why_not(other, ["studies/sae_meaning"])
