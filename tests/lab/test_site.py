"""What the site says of the notebooks: nothing is typed, nothing lost, nothing replaced that is no site."""

import html
import json
import re
from dataclasses import replace

import bs4
import nbformat
import pytest

from glassbox_utils.core import assets
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.lab import formulas, notebooks, site, site_located, site_notebooks, site_pages

PNG = "iVBORw0KGgo="
LADDER = {
    "verdict": "null", "rung": 3, "claim": "A <head> does nothing", "effect": 0.1, "ci": [-0.2, 0.4], "n": 12,
    "unit": "prompts", "p": "0.4", "source": "",
    "control": {"kind": "random units", "what": "8 heads", "value": 0.05, "ci": [-0.1, 0.2]},
}  # fmt: skip


def notebook(*outputs, source="## 1. Heads\n\nThe residual stream, and [a term](../docs/glossary.md#dead-feature)."):
    cells = [
        nbformat.v4.new_markdown_cell("# 09 · A test\n\nWords."),
        nbformat.v4.new_markdown_cell(source),
        nbformat.v4.new_code_cell("1", outputs=list(outputs)),
    ]
    return nbformat.v4.new_notebook(cells=cells)


def shown(data, **metadata):
    return nbformat.v4.new_output("display_data", data, metadata=metadata)


def lesson(*outputs, run=None, **rest):
    return site_notebooks.Lesson("09_a_test", notebook(*outputs, **rest), run)


def words_of(page):
    return html.unescape(re.sub(r"<[^>]+>", " ", page))


def test_the_results_page_holds_every_finding_of_every_committed_notebook():
    lessons = site.lessons_of()
    page = words_of(site_pages.results(lessons))
    found = [f for one in lessons for f in one.findings]
    assert len(lessons) >= 6 and f"state {len(found)} findings" in page
    for f in found:
        assert (
            f["claim"] in page and f"{f['n']} {f['unit']}" in page and f"{f['ci'][0]:.2f} to {f['ci'][1]:.2f}" in page
        )
        assert f["control"] is None or f["control"]["what"] in page


def test_what_a_notebook_finds_anew_is_what_the_page_says():
    one = lesson(shown({site_notebooks.MIMETYPE: [LADDER], "text/html": "<table></table>"}))
    page = site_pages.results([one])
    row = bs4.BeautifulSoup(page, "html.parser").find("tbody").find_all("td")
    said = [cell.get_text() for cell in row]
    assert said == ["null", "0.10", "-0.20 to 0.40", "A <head> does nothing",
                    "random units: 8 heads: 0.05 [-0.10, 0.20]", "3 causal", "12 prompts", "0.4"]  # fmt: skip
    assert "1 null" in page
    other = lesson(shown({site_notebooks.MIMETYPE: [LADDER | {"verdict": "held"}], "text/html": ""}))
    assert "1 held" in site_pages.results([other])


def test_a_figure_says_what_it_shows_or_where_it_stands():
    told = shown({"image/png": PNG}, **{"image/png": {"alt": "One goes up"}})
    one = lesson(told, shown({"image/png": PNG}))
    told_one, other = (picture.alt for picture in site_notebooks.pictures(one))
    assert told_one == "One goes up" and "1. Heads" in other
    first = lesson(told)
    cell = site_notebooks.page(first, [])["cells"][2]
    assert cell.metadata["mystnb"]["image"]["alt"] == "One goes up"
    assert "mystnb" not in first.notebook.cells[2].metadata, "the notebook itself must stay as it is"


def test_tables_scroll_by_keyboard_and_their_headers_head_something():
    table = '<div><style scoped>x</style><table border="1"><thead><tr><th></th><th>a</th></tr></thead>'
    table += "<tbody><tr><th>b</th><td>1</td></tr></tbody></table></div>"
    soup = bs4.BeautifulSoup(site_notebooks.accessible(table, "1. Heads"), "html.parser")
    frame = soup.find("div", class_="scrolls")
    assert frame["tabindex"] == "0" and frame["aria-label"] and frame.find("table") and not soup.find("style")
    assert [(h.get_text(), h["scope"]) for h in soup.find_all("th")] == [("a", "col"), ("b", "row")]


def test_a_link_into_the_repository_leads_to_its_page_or_is_no_link():
    source = (
        "[term](../docs/glossary.md#dead-feature) [code](../glassbox_utils/core/text.py) "
        "[next](../notebooks/02_x.ipynb) "
        "[data](../data/README.md) [power](../data/studies/audit_power.json) [paper](https://arxiv.org/abs/2309.17453)"
    )
    text = site_notebooks.page(lesson(source=source), ["core.text"])["cells"][1].source
    assert "[term](../glossary.md#dead-feature)" in text and "[code](../api/core/text.md)" in text
    assert "[next](../notebooks/02_x.ipynb)" in text and "data (`data/README.md`)" in text
    assert "[power](../power.md)" in text and "[paper](https://arxiv.org/abs/2309.17453)" in text


def test_terms_lead_back_to_where_they_are_used():
    text = "# Glossary\n\n## Residual stream\n\nIt carries.\n\n## Dead feature\n\nSilent.\n\n## Zebra\n\nNowhere.\n"
    page = site_pages.glossary(text, [lesson()])
    parts = re.split(r"^## ", page, flags=re.M)[1:]
    assert "notebooks/09_a_test.ipynb#1-heads" in parts[0] and "Used in" in parts[1] and "Used in" not in parts[2]


def test_the_power_page_is_the_study(tmp_path):
    table = site_pages.load_table(assets.DATA / "studies" / "audit_power.json")
    page = site_pages.power(table, tmp_path / "power.png")
    assert (tmp_path / "power.png").stat().st_size > 1000
    assert page.count("<tr>") == len(table["rates"]) + 1 + len(table["settings"]["sizes"]) + 1
    changed = table | {"rates": [r | {"value": 0.123, "low": 0.1, "high": 0.2} for r in table["rates"]]}
    other = site_pages.power(changed, tmp_path / "power.png")
    assert "12% at 0.25" in other
    assert "<td>0.25</td><td>10 of 79</td><td>88%</td><td>80% to 90%</td>" in other


def test_the_page_of_where_the_gaps_are_is_the_study(tmp_path):
    table = site_pages.load_table(assets.DATA / "studies" / "locate.json")
    page = site_located.located(table, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} >= {f"curve-{name}.png" for name in table["officers"]}
    carried = table["officers"]["deployed"]["located"]["points"][0]["carried"]["value"]
    assert f"{carried:.2f} [" in page and page.count("```{figure}") == 2 * len(table["officers"]) + 1
    assert "All demands are met by" in page or "No arm meets all" in page
    table["officers"]["deployed"]["located"]["points"][0]["carried"]["value"] = 7.77
    assert "7.77 [" in site_located.located(table, tmp_path) and "7.77 [" not in page
    kept = table["officers"]["deployed"]["mended"]["met"]["carrier hidden"]
    for one in kept:
        one["holds"] = True
    assert "All demands are met by: carrier hidden." in site_located.located(table, tmp_path)


def test_a_formula_is_drawn_by_the_browser_and_a_broken_one_stays_readable():
    pytest.importorskip("latex2mathml")
    drawn = formulas.mathml(r"x' = x + (\text{target} - a_f)\, W_\text{dec}[f]")
    assert drawn.startswith("<math") and "<msub>" in drawn and "aria-label" in drawn
    assert 'display="block"' in formulas.mathml("x", block=True)
    assert "&lt;" in formulas.mathml(r"\frac{a < b")


def test_every_module_has_a_page():
    found = site_pages.modules(assets.ROOT / "glassbox_utils")
    pages = site_pages.module_indexes(found)
    assert "core.text" in found and "lab.site" in found and all(found.values())
    assert all(f"{name.replace('.', '/')}.md" in pages[f"{name.split('.')[0]}.md"] for name in found)


def test_runs_replace_the_committed_outputs_and_models_are_not_mixed(tmp_path):
    run = {"stamp": "x", "seconds": 12.3, "peak_gib": 1.5, "parameters": {}, "title": "t", "model": "m", "findings": [],
           "size": 1.0, "skipped": []}  # fmt: skip
    own = site.prepared.card(assets.DATA).model_hash

    def wrote(**runs):
        for name in runs:
            path = notebooks.executed_path(tmp_path, name)
            path.parent.mkdir(exist_ok=True)
            nbformat.write(notebook(), path)
        (tmp_path / "runs.json").write_text(json.dumps(runs))
        return site.lessons_of(tmp_path)

    mine = {one.name: one for one in wrote(**{"05_steering_vectors": run | {"model_hash": own}})}
    assert len(mine) >= 6 and mine["05_steering_vectors"].title == "09 · A test"
    assert "12 s" in mine["05_steering_vectors"].origin and mine["01_attention_heads"].run is None
    assert site.of_embedded(list(mine.values()))
    theirs = wrote(**{"05_steering_vectors": run | {"model_hash": "other"}})
    assert [one.name for one in theirs] == ["05_steering_vectors"] and not site.of_embedded(theirs)
    with pytest.raises(GlassboxError, match="2 models"):
        wrote(**{"04_feature_clamping": run | {"model_hash": "a"}, "05_steering_vectors": run | {"model_hash": "b"}})
    stopped = replace(theirs[0], run={**run, "stopped": "in cell 3: ValueError: no."})
    assert "stopped" in stopped.origin and "cell 3" in stopped.origin


def test_a_folder_that_is_no_site_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(GlassboxError, match="other files"):
        site.check_target(tmp_path)
    assert site.check_target(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "runs.json").write_text("{}")
    (tmp_path / "old" / "index.html").write_text("")
    site.check_target(tmp_path / "old")


def test_without_the_tools_it_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(site, "NEEDED", {"no_such_module": "no-such-package"})
    with pytest.raises(GlassboxError, match=r"no-such-package.*requirements-more\.lock"):
        site.check_tools()
