"""Notebooks are committed executed, are lessons, and their numbers are really compared."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bs4
import nbformat
import pytest

from glassbox_utils import cli
from glassbox_utils.lab import notebooks
from glassbox_utils.lab.notebooks import NotebookError

ROOT = Path(__file__).resolve().parents[2]
ALL = sorted((ROOT / "notebooks").glob("*.ipynb"))
SANITIZE = ROOT / "tests" / "nbval_sanitize.cfg"


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_committed_form(path):
    notebook = nbformat.read(path, 4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    text = path.read_text()
    assert all(c.execution_count for c in code), "a cell was not executed: nbval would pass it unseen"
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1)), "not run top to bottom"
    assert not any(o.output_type == "error" for c in code for o in c.outputs)
    assert path.stat().st_size <= 1_500_000
    assert not re.search(r"unpkg\.com|jsdelivr|cdnjs", text)
    assert not re.search(r'"(/tmp|/work|/root|/home)/', text)
    assert "widget-state" not in text and "Warning:" not in text
    assert "image/png" in text, "a reader on GitHub sees no figure"
    assert notebooks.normalise(notebook) == nbformat.read(path, 4), "not in the committed form: glassbox execute"


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_it_is_a_lesson(path):
    notebook = nbformat.read(path, 4)
    prose = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    source = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    assert "**Claim.**" in notebook.cells[0].source and "**Time and memory.**" in prose
    assert {"MODEL", "DEVICE", "SEED"} <= set(notebooks.parameters_of(notebook))
    assert prose.count("falsify") >= 2 and "<summary>Solution</summary>" in prose and "arXiv" in prose
    sections = [int(n) for n in re.findall(r"^## (\d+)", prose, re.M)]
    assert sections == list(range(1, len(sections) + 1)) and sections, "a section's heading is lost or out of order"
    assert re.search(r"^\s*assert ", source, re.M) and "ladder(" in source  # which takes nothing but findings


def nbval(path):
    command = [sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider"]
    command += ["--nbval-sanitize-with", str(SANITIZE), "--override-ini", "addopts=", "-rf", str(path)]
    return subprocess.run(command, capture_output=True, text=True, cwd=path if path.is_dir() else path.parent)


def small(
    folder,
    source="from glassbox_utils.core.statistics import bootstrap_ci\nprint(f'{bootstrap_ci([1, 2, 4]).value:.2f}')",
):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    notebook.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path = folder / "small.ipynb"
    nbformat.write(notebook, path)
    notebooks.execute_in_place(path)
    return path


COPIES = {
    "untouched": ([], "2.33", True),
    "one unit": ([], "2.34", False),
    "one unit, tagged": (["rank-statistic"], "2.34", True),
    "two units, tagged": (["rank-statistic"], "2.35", False),
}
"""name -> tags of the cell, the number that is expected of it, and whether that passes"""


def test_nbval_compares_numbers_and_a_last_digit_may_flicker_in_tagged_cells_only(tmp_path):
    """A changed expected value in a copy of a notebook fails. What notebooks/conftest.py adds, for other CPUs: one unit
    in the last printed digit of a tagged cell; two units fail."""
    shutil.copy(ROOT / "notebooks" / "conftest.py", tmp_path)
    path = small(tmp_path)
    notebook = nbformat.read(path, 4)
    path.unlink()
    for name, (tags, expected, _) in COPIES.items():
        notebook.cells[0].metadata["tags"] = tags
        text = nbformat.writes(notebook)
        assert "2.33" in text
        (tmp_path / f"{name}.ipynb").write_text(text.replace("2.33", expected))
    result = nbval(tmp_path)
    failed = set(re.findall(r"^FAILED (?:.*/)?([^/]+)\.ipynb", result.stdout, re.M))
    assert failed == {name for name, (_, _, passes) in COPIES.items() if not passes}, result.stdout[-3000:]
    assert "2 failed, 2 passed" in result.stdout and "2.34" in result.stdout


def test_one_cell_of_all_notebooks_is_tagged():
    tagged = [c for p in ALL for c in nbformat.read(p, 4).cells if "rank-statistic" in c.metadata.get("tags", [])]
    assert len(tagged) == 1 and "comparison(" in tagged[0].source


def test_only_decimals_may_flicker():
    spec = importlib.util.spec_from_file_location("notebooks_conftest", ROOT / "notebooks" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.close("a +0.01 [-0.03, 0.05]", "a +0.02 [-0.03, 0.04]") and module.close("-0.00", "+0.01")
    assert module.close("n = 12, 1.5", "n = 12, 1.5") and module.close("−0.4", "−0.5")
    for other in ("n = 13, 1.5", "n = 12, 1.7", "n = 12, 1.50", "m = 12, 1.5", "n = 12, 1.5, 1.5", "n = 12, -1.5"):
        assert not module.close("n = 12, 1.5", other)


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_every_printed_number_is_compared(path):
    """Cells that print results are not exempt: only set-up, timing, panels and exercises may be."""
    for cell in nbformat.read(path, 4).cells:
        if "nbval-ignore-output" in cell.metadata.get("tags", []):
            printed = "".join(o.get("text", "") for o in cell.outputs if o.output_type == "stream")
            assert not re.search(r"\[[-+\d.]+, [-+\d.]+\]", printed), "an interval is printed in an unchecked cell"
        assert "NBVAL_SKIP" not in cell.source and "nbval-skip" not in cell.metadata.get("tags", [])


def test_parameters_are_passed_and_checked(tmp_path):
    source = "WORD = 'x'  # a word\nN: int = 3"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})])
    notebook.cells.append(nbformat.v4.new_code_cell("print(WORD, N)"))
    notebook.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path = tmp_path / "p.ipynb"
    nbformat.write(notebook, path)
    assert notebooks.parameters_of(notebook) == ["WORD", "N"]
    done, seconds, peak = notebooks.execute(path, None, {"WORD": "y"})
    assert done.cells[-1].outputs[0].text == "y 3\n" and seconds > 0 and peak > 0
    with pytest.raises(NotebookError, match=r"no parameter 'WRD'. Allowed: WORD, N"):
        notebooks.execute(path, None, {"WRD": "y"})


def test_a_large_widget_output_does_not_hang(tmp_path):
    source = (
        "import ipywidgets\nfrom IPython.display import HTML, display\nout = ipywidgets.Output()\ndisplay(out)\n"
        "with out:\n    display(HTML('x' * 300_000))"
    )
    notebook = nbformat.read(small(tmp_path, source), 4)
    assert notebook.cells[0].execution_count == 1


def test_the_site_is_built_once(tmp_path, monkeypatch, capsys):
    shutil.copy(small(tmp_path), tmp_path / "07_small.ipynb")
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    (first,) = notebooks.build_site(tmp_path / "site")
    assert "2.33" in (tmp_path / "site" / first.page).read_text()
    assert "2.33" in notebooks.executed_path(tmp_path / "site", "07_small").read_text()
    capsys.readouterr()
    notebooks.build_site(tmp_path / "site")
    assert "unchanged" in capsys.readouterr().out
    assert "07_small.html" in (tmp_path / "site" / "index.html").read_text()


def made(path, *cells):
    """A notebook of (type, source, tags); not executed."""
    notebook = nbformat.v4.new_notebook()
    for kind, source, *tags in cells:
        new = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        notebook.cells.append(new(source, metadata={"tags": tags}))
    notebook.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(notebook, path)
    return path


def test_a_plot_of_a_page_says_in_words_what_it_shows(tmp_path):
    """The words that ``core.figures.alt_text`` writes while the notebook runs, escaped; without them its section."""
    draw = "plt.gcf().suptitle('Heads & \"tails\" < {n}'); plt.plot([1, 2]); plt.xlabel('layer'); plt.show()"
    path = made(
        tmp_path / "plots.ipynb",
        ("markdown", "# Coins"),
        ("code", "import matplotlib.pyplot as plt\nimport glassbox_utils as gb\ngb.setup(0)"),
        ("code", "\n".join(draw.format(n=n) for n in (5, 6))),
    )
    done, *_ = notebooks.execute(path, None)
    del done.cells[-1].outputs[1].metadata["image/png"]["alt"]
    soup = bs4.BeautifulSoup(notebooks.to_html(done), "html.parser")
    assert [image["alt"] for image in soup.find_all("img")] == [
        'Heads & "tails" < 5; across: layer',
        "Plot of the section “Coins”; the text around it says what it shows.",
    ]


def test_a_notebook_that_stops_keeps_what_it_computed(tmp_path, monkeypatch, capsys):
    cells = [("md", "# Title"), ("code", "x = 6 * 7\nprint(x)"), ("code", "print('so far')\nmissing_name<3")]
    path = made(tmp_path / "07_small.ipynb", *cells, ("code", "print('never', 'reached')"))
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    site = tmp_path / "site"
    with pytest.raises(NotebookError, match=r"stopped.*\n07_small.ipynb, cell 2: NameError: name 'missing_name'"):
        notebooks.build_site(site)
    page, index = (site / "07_small.html").read_text(), (site / "index.html").read_text()
    assert "42" in page and "so far" in page and "Stopped here." in page and "Traceback" not in page
    assert "papermill" not in page
    assert "Title" in index and "in cell 2: NameError" in index and "Not all of them came to their end" in index
    assert notebooks.runs_of(site)["07_small"]["stopped"].startswith("in cell 2: NameError")
    made(path, *cells[:2])
    notebooks.build_site(site)
    assert "stopped" not in (site / "index.html").read_text().lower()
    assert "stopped" not in notebooks.runs_of(site)["07_small"]
    capsys.readouterr()


def test_the_command_says_by_its_status_whether_there_is_a_page(tmp_path, monkeypatch, capsys):
    """1: notebooks stopped, a site can be made of their pages; 2: nothing was run, and `make run` stops there."""
    made(tmp_path / "07_small.ipynb", ("code", "missing_name"))
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    assert cli.main(["run", "--site", str(tmp_path / "site")]) == 1
    assert "These notebooks stopped" in capsys.readouterr().err
    assert cli.main(["run", "9", "--site", str(tmp_path / "site")]) == 2


def test_an_interrupted_run_says_what_is_kept(tmp_path, monkeypatch, capsys):
    for name in ("06_first", "07_second"):
        made(tmp_path / f"{name}.ipynb", ("code", "1"))
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    whole = notebooks.execute

    def interrupted(path, *rest):
        if path.stem == "07_second":
            raise KeyboardInterrupt
        return whole(path, *rest)

    monkeypatch.setattr(notebooks, "execute", interrupted)
    assert cli.main(["run", "--site", str(tmp_path / "site")]) == 130
    assert "07_second: interrupted, it begins again next time. Kept: 06_first" in capsys.readouterr().out


def test_one_that_stopped_is_run_again_though_nothing_changed(tmp_path, monkeypatch):
    source = "import pathlib\nassert pathlib.Path('there').exists(), 'not there yet'"
    made(tmp_path / "07_small.ipynb", ("code", source))
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    with pytest.raises(NotebookError, match="not there yet"):
        notebooks.build_site(tmp_path / "site")
    (tmp_path / "there").touch()
    assert notebooks.build_site(tmp_path / "site")


def test_a_cell_that_takes_too_long_is_named_in_words(tmp_path):
    path = made(tmp_path / "slow.ipynb", ("code", "print('before')"), ("code", "import time\ntime.sleep(60)"))
    with pytest.raises(
        notebooks.StoppedError, match=r"slow.ipynb, cell 2: it took more than 0.02 min.*--cell-minutes"
    ) as e:
        notebooks.execute(path, None, cell_minutes=0.02)
    assert "\n" not in str(e.value) and e.value.notebook.cells[0].outputs[0].text == "before\n"
    assert "Stopped here" in e.value.notebook.cells[1].outputs[-1].data["text/html"]


@pytest.mark.parametrize("name", ["99", "0", "00", "", "_", "attention", "ipynb", "5_", "../05_steering_vectors.ipynb"])
def test_unknown_notebook(name):
    """Among them what used to be taken for all notebooks, or for one with the same name in another folder."""
    with pytest.raises(NotebookError, match=rf"{re.escape(repr(name))}.*01_attention_heads"):
        notebooks.find([name])


def test_a_notebook_has_many_names_and_is_run_once(monkeypatch):
    five = ROOT / "notebooks" / "05_steering_vectors.ipynb"
    monkeypatch.chdir(ROOT)
    names = ["5", "05", "05_st", five.stem, five.name, f"notebooks/{five.name}", str(five)]
    for name in names:
        assert notebooks.find([name]) == [five], name
    assert notebooks.find(names) == [five] and notebooks.find() == ALL and len(notebooks.find(["1", "5"])) == 2


def test_a_notebook_whose_process_is_killed_is_named(tmp_path):
    path = small(tmp_path)
    path.write_text(
        path.read_text().replace("from glassbox_utils", "import os; os.kill(os.getpid(), 9)\\nfrom glassbox_utils")
    )
    before = path.read_bytes()
    with pytest.raises(NotebookError, match=r"small\.ipynb, cell 1: its process was killed.*memory"):
        notebooks.execute_in_place(path)
    assert path.read_bytes() == before


def test_a_broken_list_of_runs_is_named_and_left_alone(tmp_path):
    (tmp_path / "runs.json").write_text('{"05_steering_vectors": {"stamp": 3}}')
    with pytest.raises(NotebookError, match=r"runs\.json is damaged: the entry '05_steering_vectors'.*Delete the file"):
        notebooks.build_site(tmp_path, ["5"])
    assert [p.name for p in tmp_path.iterdir()] == ["runs.json"]
