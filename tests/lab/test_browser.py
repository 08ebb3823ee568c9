"""What a person sees: the exported page without any network, and a live JupyterLab.

Needs Debian's chromium: apt-get install chromium
"""

import ast
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import chromium
import nbformat
import psutil
import pytest

from glassbox_utils.lab import notebooks

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.browser, chromium.NEEDED]


def watched(browser, **options):
    """A page, and the list of everything that goes wrong on it."""
    page = browser.new_context(viewport={"width": 1300, "height": 1000}, **options).new_page()
    wrong = []
    page.on("requestfailed", lambda request: wrong.append(f"failed request {request.url[:100]}"))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    return page, wrong


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_exported_page_draws_without_a_network(browser, path, tmp_path):
    notebook = nbformat.read(path, 4)
    figures = path.read_text().count('class=\\"glassbox-figure\\"')
    file = tmp_path / "page.html"
    file.write_text(notebooks.to_html(notebook), encoding="utf-8")
    page, wrong = watched(browser, offline=True)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    if figures:
        page.wait_for_function(
            "n => document.querySelectorAll('.glassbox-figure[data-drawn]').length === n", arg=figures, timeout=30_000
        )
    page.wait_for_timeout(1000)
    if path.name.startswith("01"):
        every_head = 30 * 9  # all heads of the embedded model, in one figure
        assert page.locator(".glassbox-figure canvas").count() > every_head
        assert page.get_by_text("17.3", exact=False).count() > 0
        drawn = page.evaluate(PAINTED)
        assert drawn > every_head, f"only {drawn} canvases show anything"
    outside = [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
    assert outside == [] and wrong == []


# counts the canvases that have more than one colour
PAINTED = """() => [...document.querySelectorAll('.glassbox-figure canvas')].filter(c => {
  const d = c.getContext('2d')?.getImageData(0, 0, c.width, c.height).data;
  return d && d.some((v, i) => v !== d[i % 4]);
}).length"""


# the first head inside the widget, as drawn (circuitsvis paints its labels too: there is no text to read)
WIDGET = "() => document.querySelector('.jupyter-widgets canvas')?.toDataURL()"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture()
def lab(tmp_path):
    """A live JupyterLab on an empty folder; yields (folder, address of a file)."""
    port, folder = free_port(), tmp_path / "lab"
    folder.mkdir()
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--ServerApp.token=glassbox", "--ServerApp.ip=127.0.0.1", f"--notebook-dir={folder}"]
    environment = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "GLASSBOX_QUIET": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=glassbox", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield folder, lambda name: f"http://127.0.0.1:{port}/lab/tree/{name}?token=glassbox"
    finally:
        # a kernel in the middle of a long computation holds up a polite shutdown for longer than a test should wait
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        server.terminate()
        for process in psutil.wait_procs(processes, timeout=10)[1]:
            process.kill()
        server.wait(20)


def run_all(page, url):
    """Open a notebook in the live JupyterLab and run all of its cells."""
    page.goto(url)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.wait_for_timeout(2000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def test_a_live_jupyterlab_draws_and_answers(browser, lab):
    """The first cells of notebook 01, and its panel: type a sentence, see its heads."""
    folder, address = lab
    first = nbformat.read(ROOT / "notebooks" / "01_attention_heads.ipynb", 4)
    code = [c for c in first.cells if c.cell_type == "code"]
    panel = next(i for i, c in enumerate(code) if "attention_panel" in c.source)
    wanted = [c for c in code[: panel + 1] if "all_heads" not in c.source and "thumbnails" not in c.source]
    first.cells = [nbformat.v4.new_code_cell(c.source) for c in wanted]
    nbformat.write(first, folder / "live.ipynb")
    page, wrong = watched(browser)
    run_all(page, address("live.ipynb"))
    page.wait_for_selector(".widget-text input", timeout=240_000)
    page.wait_for_function("() => document.querySelectorAll('.glassbox-figure canvas').length >= 18", timeout=120_000)
    shown = page.evaluate(WIDGET)
    sentence = page.locator(".widget-text input").first
    sentence.fill("A quick brown fox sleeps.")
    sentence.press("Enter")
    page.wait_for_function(f"before => {{ const now = ({WIDGET})(); return now && now !== before; }}", arg=shown)
    assert page.evaluate(PAINTED) >= 18
    assert not [w for w in wrong if re.search(r"https?://(?!127\.0\.0\.1)", w)], wrong


def slice_of(code, last):
    """The cells that bind what cell `last` reads, what those read, and so on: the shortest notebook that runs it."""
    trees = [[n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Name, ast.alias))] for source in code]
    bound = [
        {
            (n.asname or n.name) if isinstance(n, ast.alias) else n.id
            for n in tree
            if not isinstance(vars(n).get("ctx"), ast.Load)
        }
        for tree in trees
    ]
    wanted, open_names = {last}, {n.id for n in trees[last] if isinstance(n, ast.Name)} - bound[last]
    for i in reversed(range(last)):
        if bound[i] & open_names:
            wanted.add(i)
            open_names = (open_names - bound[i]) | {n.id for n in trees[i] if isinstance(n, ast.Name)} - bound[i]
    return [code[i] for i in sorted(wanted)]


ANSWERS = "() => [...document.querySelectorAll('.steering-answers td:last-child')].map(cell => cell.textContent)"


def test_the_steering_panel_answers_when_its_slider_moves(browser, lab):
    """Notebook 05's panel: three answers differ at full strength, and are one and the same with the dial at zero."""
    folder, address = lab
    notebook = nbformat.read(ROOT / "notebooks" / "05_steering_vectors.ipynb", 4)
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    panel = next(i for i, source in enumerate(code) if "FloatSlider" in source)
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in slice_of(code, panel)]
    nbformat.write(notebook, folder / "live.ipynb")
    page, wrong = watched(browser)
    run_all(page, address("live.ipynb"))
    page.wait_for_function(f"() => ({ANSWERS})().length === 3", timeout=300_000)
    shown = page.evaluate(ANSWERS)
    assert all(shown) and len(set(shown)) == 3
    page.locator(".noUi-handle").first.focus()
    page.keyboard.press("Home")  # the slider's smallest value: zero
    page.wait_for_function(f"() => new Set(({ANSWERS})()).size === 1 && ({ANSWERS})().length === 3", timeout=120_000)
    assert page.evaluate(ANSWERS) == [shown[1]] * 3
    assert not [w for w in wrong if re.search(r"https?://(?!127\.0\.0\.1)", w)], wrong


def test_the_clamping_panel_answers_to_its_slider(browser, lab):
    """Notebook 04's panel in a live JupyterLab: drag the strength, read another text; stop while it writes."""
    folder, address = lab
    source = (
        "import glassbox_utils as gb\nfrom glassbox_utils.saes import clamping_study\n"
        "model = gb.load_model()\ntools, selected = clamping_study.chosen(model)\n"
        "gb.clamp_panel(model, {'bridge': tools.found['readers']}, 'Who are you?', 0.5, 3.0, 24)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    notebook.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nbformat.write(notebook, folder / "clamp.ipynb")
    page, _ = watched(browser)
    run_all(page, address("clamp.ipynb"))
    page.wait_for_selector(".clamp-answer", timeout=240_000)
    answers = page.locator(".clamp-answer")
    before = answers.all_inner_texts()
    handle = page.locator(".widget-slider .noUi-handle").first
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + box["height"] / 2, steps=8)
    page.mouse.up()
    page.wait_for_function(
        "old => { const a = document.querySelectorAll('.clamp-answer')[1]; return a && a.innerText !== old; }",
        arg=before[1],
        timeout=120_000,
    )
    after = answers.all_inner_texts()
    assert after[0] == before[0] and after[1] != before[1]
    # stop at any time: change the prompt, press stop while it writes, and it says so
    sentence = page.locator(".widget-text input").first
    sentence.fill("What do you like?")
    sentence.press("Enter")
    page.get_by_text("writing, token", exact=False).first.wait_for(timeout=60_000)
    page.get_by_role("button", name="stop", exact=True).click()
    page.get_by_text("stopped", exact=True).first.wait_for(timeout=60_000)
