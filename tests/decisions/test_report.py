"""The regulator's page: what it measures, what it says, and what it must never do."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import chromium
import matplotlib
import pytest
import torch

from glassbox_utils import cli
from glassbox_utils.core import assets, evidence, figures, models
from glassbox_utils.decisions import cycle, explain, loans, report, report_plots, study

ROOT = Path(__file__).resolve().parents[2]
APPLICANT = ROOT / "data" / "examples" / "applicant.json"


def clerk(model, people, layout="line", batch_size=32):
    """A clerk who follows the merit rule, with a penalty for women's names and for the East: the known answer."""
    return torch.tensor([loans.points(a) - 3.4 - loans.penalty(a, "gender") for a in people])


@pytest.fixture(scope="module")
def found(smol):
    with mock.patch.object(loans, "decide", clerk):
        return explain.explain(smol, loans.parse_applicant(APPLICANT), n=12)


@pytest.fixture(scope="module")
def page(smol, found):
    return report.render(found, report.provenance(smol, found, 0, None), "glassbox explain --applicant a.json")


def test_it_finds_the_planted_bias_and_no_other(found):
    gaps = {g.attribute: g for g in found.gaps}
    assert gaps["gender"].logits.value == pytest.approx(-1) and gaps["district"].logits.value == pytest.approx(-0.5)
    assert gaps["age"].logits.value == gaps["nationality"].logits.value == found.control.logits.value == 0
    assert [g.attribute for g in report.biased(found)] == ["gender", "district"]


def test_the_nearest_changes_flip_the_decision_and_come_in_order(found):
    assert not found.approved and found.nearest
    for change in found.nearest:
        changed = replace(found.applicant, **change.changes)
        assert float(clerk(None, [changed])[0]) == pytest.approx(change.logit)
        assert (change.logit > 0) != found.approved
    assert [c.distance for c in found.nearest] == sorted(c.distance for c in found.nearest)


def test_fields_that_nobody_reads_have_no_effect(found):
    effects = {f.field: f for f in found.effects}
    assert all(effects[name].effect.value == 0 for name in ("age", "occupation", "purpose"))
    assert effects["name"].effect.value < 0 and effects["history"].effect.value < 0
    assert sum(f.attention for f in found.effects) == pytest.approx(1)


@pytest.mark.parametrize("layout", loans.LAYOUTS)
def test_spans_are_where_the_values_stand(layout):
    for applicant in loans.applications(5, seed=3):
        text = loans.as_text(applicant, layout)
        for name, (start, end) in cycle.spans(applicant, layout).items():
            assert text[start:end] == str(getattr(applicant, name))


def test_findings_carry_rungs_and_controls(found):
    findings = explain.findings(found)
    assert {f.rung for f in findings} == {1, 3, 4}
    assert all(f.control for f in findings if f.rung > 1)
    assert len(evidence.ladder(findings)) == len(findings)


def test_the_page_says_what_was_measured(found, page):
    for words in ("rejected", "percentage points", "women's", "Evidence, not proof", "glassbox explain"):
        assert words in html.unescape(page), words
    for rung in (1, 3, 4):
        assert f"{rung} {evidence.RUNGS[rung]}" in page
    assert f"{found.probability:.0%}" in page


def test_the_page_needs_nothing_and_has_no_date(page):
    names = r"https?://(?!www\.w3\.org/(?:2000/svg|1999/xlink)\")"  # of SVG's vocabulary, not addresses
    outside = re.findall(rf"(?:src|href)=(?!\"#)|url\(|{names}", page)
    assert outside == [] and "<script" not in page
    assert not re.search(r"20\d\d-\d\d-\d\d", page)


DRAWN = [getattr(report_plots, name) for name in dir(report_plots) if name.startswith("figure_")]


@pytest.mark.parametrize("draw", DRAWN, ids=lambda f: f.__name__)
def test_a_figure_is_the_same_whatever_matplotlib_is_set_to(draw, found):
    with matplotlib.rc_context():
        once = draw(found)
        matplotlib.rcParams.update({"font.size": 30, "svg.fonttype": "path", "figure.constrained_layout.use": True})
        before = dict(matplotlib.rcParams)
        assert draw(found) == once and dict(matplotlib.rcParams) == before
    svg = ElementTree.fromstring(once)
    assert svg.get("role") == "img" and svg.get("aria-label") and svg.get("viewBox") and not svg.get("width")
    assert not list(svg.iter("{http://www.w3.org/2000/svg}style"))  # a rule in it would hold for the whole page


def test_no_two_parts_of_the_page_have_one_name(page):
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))


def test_page_and_figures_have_the_same_colours(page):
    for colour in (figures.BLUE, figures.ORANGE, figures.GREEN, figures.SKY, figures.RED, figures.GREY):
        assert colour in page  # as the style sheet writes it; the figures write it in small letters
    for colour in (report_plots.INK, report_plots.FAINT, report_plots.LINE):
        assert f": {colour};" in page


@pytest.mark.parametrize("words", ["a $x^2$ & $y_", "\"'<b>", "100 % of </text>"])
def test_words_in_a_figure_are_words(words, found):
    bad = replace(found, groups=[replace(g, group=words, kind=words) for g in found.groups])
    bad = replace(bad, effects=[replace(f, value=words) for f in bad.effects])
    bad = replace(bad, gaps=[replace(g, label=words) for g in bad.gaps])
    for draw in (report_plots.figure_fields, report_plots.figure_groups, report_plots.figure_gaps):
        assert words in "".join(ElementTree.fromstring(draw(bad)).itertext())


def test_text_from_outside_is_escaped(smol, found):
    evil = "<script>alert(1)</script>"
    bad = replace(found, applicant=replace(found.applicant, name=evil, district=evil, occupation=evil))
    bad = replace(bad, effects=[replace(f, value=evil) for f in bad.effects])
    bad = replace(bad, groups=[replace(g, shown=evil, group=evil) for g in bad.groups], outside=["name"])
    page = report.render(bad, {evil: evil}, evil)
    assert "<script" not in page and "&lt;script&gt;" in page


def test_an_approval_is_explained_too(smol):
    good = replace(loans.parse_applicant(APPLICANT), credit_score=780, income=75, debt=12, history="clean")
    with mock.patch.object(loans, "decide", clerk):
        found = explain.explain(smol, good, n=4)
    page = report.render(found, {}, "x")
    assert found.approved and "It would have been rejected with" in page


def test_a_mitigation_is_shown_with_its_side_effects(found):
    from glassbox_utils.core.statistics import Interval

    lines = [report.Measure("gap <b>", Interval(-9, -12, -6, 50), Interval(-1, -2, 0.5, 50))]
    page = report.render(found, {}, "x", report.Mitigation("One direction was taken out.", lines, "a study"))
    assert "One direction was taken out." in page and "gap &lt;b&gt;" in page and "−12.00 to −6.00" in page


def test_the_mitigation_reads_the_studies():
    rng = torch.Generator().manual_seed(0)
    better = torch.randn(20, generator=rng)
    arms = {"none": [(better - 1).tolist(), better.tolist()], "edit": [better.tolist(), better.tolist()]}
    table = {"logits": {"gender": arms, "district": arms}, "chosen": {"edit": "affine 26"}}
    off, on = [[30.0, 40.0], [10, 10]], [[31.0, 41.0], [10, 10]]
    right = {"deployed": [1.0, 0.0, 1.0], "edit": [1.0, 0.0, 1.0], "no gate": [1.0, 0.0, 0.0]}
    rest = {"losses": {"deployed": off, "edit": off, "no gate": on}, "choices": right}
    found = {m.name.split(":")[0] + m.name.split(" ")[-1]: m for m in study.mitigation_of(table, rest).measures}
    score = next(m for k, m in found.items() if k.startswith("men") and k.endswith("score"))
    assert score.before.value == pytest.approx(1, abs=1e-5) and score.after.value == 0
    cost = [m for m in study.mitigation_of(table, rest).measures if m.name.startswith("perplexity")]
    assert [m.before.value for m in cost] == [1, 1]
    assert [m.after.value for m in cost] == [1, pytest.approx(2.718281828**0.1)]


def test_a_failure_leaves_nothing_behind(smol, tmp_path, found):
    target = tmp_path / "report.html"
    with (
        mock.patch.object(explain, "explain", lambda *a: found),
        mock.patch.object(Path, "write_text", side_effect=OSError(28, "No space left on device")),
        pytest.raises(assets.AssetError),
    ):
        report.write_report(smol, found.applicant, target)
    assert list(tmp_path.iterdir()) == []


BROKEN = {
    "missing": ({"income": None}, "'income'"),
    "number": ({"credit_score": 9000}, "300 to 850"),
    "text": ({"age": "forty"}, "'age'"),
    "choice": ({"history": "fine"}, "'clean'"),
    "markup": ({"district": "<b>East</b>"}, "'district'"),
    "unknown": ({"colour": "red"}, "'colour'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_malformed_application_is_refused_before_the_model_is_loaded(case, tmp_path, capsys, monkeypatch):

    monkeypatch.setattr(models, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    changes, named = BROKEN[case]
    values = json.loads(APPLICANT.read_text()) | changes
    file, out = tmp_path / "applicant.json", tmp_path / "report.html"
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    assert cli.main(["explain", "--applicant", str(file), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert named in message and not out.exists()


def test_what_is_not_json_and_what_is_not_there(tmp_path, capsys):
    file = tmp_path / "applicant.json"
    file.write_text("{not json")
    assert cli.main(["explain", "--applicant", str(file)]) == 2 and "JSON" in capsys.readouterr().err
    assert cli.main(["explain", "--applicant", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    assert cli.main(["explain", "--applicant", str(APPLICANT), "--layout", "poem"]) == 2
    assert "letter" in capsys.readouterr().err


def test_an_unknown_model_is_named(capsys):
    assert cli.main(["explain", "--applicant", str(APPLICANT), "--model", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err


# pairs of texts of one figure whose boxes, made a little smaller, have something in common
OVERLAPS = """() => [...document.querySelectorAll('svg')].flatMap(s => {
    const boxes = [...s.querySelectorAll('text')].map(t => [t.textContent, t.getBBox()]);
    return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
        p.x + 1 < q.x + q.width && q.x + 1 < p.x + p.width && p.y + 3 < q.y + q.height && q.y + 3 < p.y + p.height
    ).map(([b, q]) => a + ' / ' + b)); })"""


@pytest.mark.browser
@chromium.NEEDED
def test_the_page_opens_offline_and_prints(page, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    with chromium.launched() as browser:
        tab = browser.new_context(offline=True, viewport={"width": 1000, "height": 900}).new_page()
        asked, wrong = [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(file.as_uri())
        assert tab.locator("svg").count() >= 4
        assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        boxes = """() => [...document.querySelectorAll('svg')].every(s => [...s.querySelectorAll('text')].every(t => {
            const b = t.getBBox(), v = s.viewBox.baseVal;
            return b.x > -2 && b.x + b.width < v.width + 2 && b.y + b.height < v.height + 2; }))"""
        assert tab.evaluate(boxes), "a label is cut off at the edge of its figure"
        assert not tab.evaluate(OVERLAPS), "two labels of a figure lie on each other"
        tab.set_viewport_size({"width": 390, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        pdf = tab.pdf(format="A4", prefer_css_page_size=True)
    pages = len(re.findall(rb"/Type\s*/Page[^s]", pdf))
    assert pdf.startswith(b"%PDF") and 2 <= pages <= 7
    assert asked == [file.as_uri()] and wrong == []


@pytest.mark.slow
@pytest.mark.skipif("deployed" not in loans.loan_models(), reason="the loan officer is not trained yet")
def test_the_command_writes_a_page_about_the_deployed_model(tmp_path, monkeypatch):
    plain, out = report.explain.explain, tmp_path / "report.html"
    monkeypatch.setattr(report.explain, "explain", lambda *given: plain(*given[:3], 4, *given[4:]))  # not 32 people
    assert cli.main(["explain", "--applicant", str(APPLICANT), "--out", str(out)]) == 0
    page = out.read_text()
    assert "loan officer (deployed)" in page and loans.load_loan_model().hash in page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
