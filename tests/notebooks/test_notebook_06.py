"""Notebook 06: its solutions are the ones that are checked, and an officer without a gap does not stop it."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import planted
import pytest

from glassbox_utils.lab import exercises
from glassbox_utils.lab.exercises import cycle

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "06_full_cycle.ipynb"
NAMES = ("head_patch", "carried", "like_units", "hold_at_mean", "interval", "specific")
CELLS = nbformat.read(NOTEBOOK, 4).cells
CODE = [c.source for c in CELLS if c.cell_type == "code"]
PROSE = "\n".join(c.source for c in CELLS if c.cell_type == "markdown")


@pytest.mark.parametrize("name", NAMES)
def test_the_stub_is_blank_and_the_folded_solution_right(name, capsys):
    stub = next(source for source in CODE if source.startswith(f"def {name}("))
    space = {"cycle": cycle}
    exec(stub, space)
    assert capsys.readouterr().out.strip() == exercises.BLANK
    blocks = re.findall(r"<summary>Solution</summary>\s*```python\n(.*?)\n```", PROSE, re.S)
    solution = next(block for block in blocks if block.startswith(f"def {name}("))
    assert solution == exercises.source(getattr(cycle, f"solve_{name}"), name)
    space |= {"np": cycle.np, "torch": cycle.torch}
    exec(solution, space)
    assert getattr(cycle, f"check_{name}")(space[name]) == exercises.RIGHT


def test_it_has_the_form_of_a_lesson():
    assert subprocess.run([sys.executable, "-m", "ruff", "format", "--check", NOTEBOOK]).returncode == 0
    lines = [line for source in CODE for line in source.splitlines()]
    assert len(lines) <= 300 and max(map(len, lines)) <= 120 and not [x for x in lines if "noqa" in x or "fmt: " in x]
    assert PROSE.count("**Predict") >= 7 and PROSE.count("<summary>Hint</summary>") == len(NAMES)
    assert PROSE.count("falsify") >= 5 and "**To discuss.**" in PROSE
    pictures = [o for c in CELLS for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 6 and all(o.metadata["image/png"]["alt"] for o in pictures)
    assert "image/png" in str(CELLS[[c.cell_type for c in CELLS].index("code") + 2].outputs), "no picture up front"
    glossary = ROOT / "docs" / "glossary.md"
    if glossary.exists():
        known = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-")
                 for h in re.findall(r"^#+ (.+)$", glossary.read_text(encoding="utf-8"), re.M)}  # fmt: skip
        assert not set(re.findall(r"glossary\.md#([\w-]+)", PROSE)) - known
    for place in re.findall(r"\]\((\.\./[^)#]+|\d\d_[^)#]+)", PROSE):
        assert (NOTEBOOK.parent / place).exists() or place.endswith("glossary.md"), place


AS_PLANTED = {
    "gb.setup(SEED)\n": "", "prepared.choose(gb.load_model(MODEL, device=DEVICE))\n": "",
    "ours = prepared.folder() == assets.DATA": "ours = False",
    'loans.load_loan_model("deployed", device=DEVICE), gb.decisions.load_decision("loan-officer")': "PLANTED",
    '"gender"': '"clan"', '"female"': '"first"', '"male"': '"second"', '"side"': '"skill"', '"semicolons"': '"behind"',
    '"loan first", "form"': '"front"', '"loan first"': '"front"', '["name"]': '["person"]', "['name']": "['person']",
    'case, "name"': 'case, "person"', "studies.has_table(": "(lambda *_: False)(",
    "ks=(10, 30, 100)": "ks=(2, 10)",
}  # fmt: skip
"""the same cells about the planted llama, whose decision has other fields and wordings"""


def on_planted(model, folder, upto="## 9"):
    """Run the cells in front of a heading on another model and decision; the names that they made."""
    space = {"PLANTED": (model, planted.decision(folder / "planted", 4)), "display": lambda *_: None}
    for cell in CELLS:
        if cell.cell_type == "markdown" and re.search(rf"^{upto}", cell.source, re.M):
            break
        if cell.cell_type == "code":
            source = cell.source
            for old, new in AS_PLANTED.items():
                source = source.replace(old, new)
            exec(compile(source, cell.id, "exec"), space)
            plt.close("all")
    return space


def test_an_officer_without_a_gap_is_skipped_in_words(tmp_path, capsys):
    space = on_planted(planted.model(bias=0.0), tmp_path)
    said = capsys.readouterr().out
    assert space["why"].startswith("Skipped: In the template 'behind' there is no gap to locate")
    assert said.count("Skipped: ") >= 7 and "found" not in space


def test_an_officer_with_a_planted_gap_is_followed_to_what_was_planted(tmp_path, capsys):
    space = on_planted(planted.model(), tmp_path)
    said = capsys.readouterr().out
    assert not space["why"] and f"head {planted.MOVER[0]}.{planted.MOVER[1]} by hand" in said
    first = {tuple(unit) for unit in space["units"].ranked(space["found"]["neurons"], 2)}
    assert first == {planted.READER, planted.WRITER}
    assert space["by_hand"] == pytest.approx(space["library"], abs=1e-3)
