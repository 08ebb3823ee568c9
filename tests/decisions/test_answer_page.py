"""The page, the letter and the JSON of an answer: what they say, and what they must never do."""

import html
import json
import re
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock
from xml.etree import ElementTree

import chromium
import matplotlib
import pytest
import tiny
import torch
from refusals import refused

from glassbox_utils import cli
from glassbox_utils.core import assets, models
from glassbox_utils.core.models import load_model
from glassbox_utils.decisions import answer, answer_page, answer_plots, asking, letter, observed, placing, scoring
from glassbox_utils.decisions.answer_page import Measure, Mitigation
from glassbox_utils.decisions.decision import groups, margin, parse_case, render
from glassbox_utils.decisions.reading import load_decision

HIRING = load_decision("hiring")
EVIL = "<script>alert(1)</script>"
USUAL = {"name": "Barry", "age": 40, "last_post": "clerk", "experience": 1, "education": "school", "test": 80,
         "references": "mixed", "career_gap": 0, "notice": 4}  # fmt: skip


def clerk(cases, template):
    """Follows the merit rule, against women, and for posts that nobody knows."""
    known = HIRING.fields["last_post"].known
    return torch.tensor([
        margin(HIRING, c)
        - 1.5 * (groups(HIRING, c)["gender"] == "woman")
        + 3.0 * (c["last_post"] not in known)
        for c in cases
    ])  # fmt: skip


def case_of(**values):
    return parse_case(HIRING, USUAL | values, "asked")


def answered(**values):
    found = answer.measured(clerk, HIRING, case_of(**values), n=120)
    return replace(found, attention=dict.fromkeys(HIRING.fields, 1 / len(HIRING.fields)))


@pytest.fixture(scope="module")
def found():
    return answered()


@pytest.fixture(scope="module")
def page(found):
    return answer_page.render(found, HIRING, {"Model": "clerk"}, "glassbox explain --decision hiring asked")


def said(page):
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page.partition("</style>")[2])).split())


# --- what the page says -------------------------------------------------------------------------------


def test_the_page_says_what_was_measured(found, page):
    words = said(page)
    for part in ("the answer to case asked is “decline”", "Principal reasons", "experience", "treatment", "impact",
                 "1002.9", "21 July 2026", "2 December 2027", "Article 86", "teaching example", "1 observed",
                 "3 causal", "4 behavioural", "Evidence, not proof", "5 of 5"):  # fmt: skip
        assert part in words, part
    nearest = found.search.nearest[0]
    for name, value in nearest.changes.items():
        assert f"{name} {letter.with_unit(found, name, value)} instead of" in words
    assert "Free text decides" not in words and "Who is asking decides" not in words


def test_how_densely_the_values_were_tried_is_said(found, page):
    assert "Every value of a field’s grid was tried" in page and "steps;" not in page
    coarse = answer.measured(clerk, HIRING, case_of(), n=120, most=8)
    words = " ".join(answer_page.render(replace(coarse, attention=found.attention), HIRING, {}, "x").split())
    assert "Every value of a" not in words and re.search(r"test \d+ to \d+, every \d+ steps", words)
    assert "at the steps that are named, and all between two of them where the answer first turned" in words


def test_a_text_that_turns_the_decision_is_in_the_headline():
    odd = answered(last_post="spotless wizard", experience=4)
    words = said(answer_page.render(odd, HIRING, {}, "x"))
    assert "wording of a free text decided it" in words.partition("Why?")[0]
    assert "The text of last post is “spotless wizard”" in words and "The letter is held" in words
    held = letter.letter(odd)
    assert any("free text last post" in line for line in held.held)


def test_a_group_that_turns_the_decision_is_in_the_headline_and_in_no_letter():
    woman = answered(name="Gemma", experience=4, education="university")
    words = said(answer_page.render(woman, HIRING, {}, "x"))
    assert woman.turned_by_group and "a protected group decided it" in words.partition("Why?")[0]
    sent = letter.letter(woman)
    assert sent.held and not re.search(r"gender|woman|man\b|Gemma|age\b", sent.text)


def test_a_text_within_noise_is_no_headline_and_a_group_comes_before_a_text():
    odd = answered(last_post="spotless wizard", experience=4)
    unlisted = replace(odd, texts=tuple(replace(t, noise=abs(t.effect) + 0.1) for t in odd.texts))
    assert unlisted.decided_by_text  # somebody chose these words
    at_the_line = replace(unlisted, texts=tuple(replace(t, usual=True) for t in unlisted.texts))
    words = said(answer_page.render(at_the_line, HIRING, {}, "x"))
    assert at_the_line.turned_by_text and not at_the_line.decided_by_text
    assert "decided it" not in words and "Free text decides" not in words and "lies at the line" in words
    assert "a free text turns it" in words
    assert any("less than noise turns it" in line for line in letter.letter(at_the_line).held)
    woman = answered(name="Gemma", experience=4, education="university")
    both = replace(woman, texts=odd.texts)
    head = said(answer_page.render(both, HIRING, {}, "x")).partition("Why?")[0]
    assert "a protected group and the wording of a free text decided it" in head


def test_the_letter_names_permissible_fields_only(found):
    text = letter.letter(found).text
    assert text.count("\n  ") >= len(found.reasons) and "  1. Experience: 1 year." in text
    shown = {str(v) for k, v in found.values.items() if HIRING.fields[k].role != "merit" and isinstance(v, str)}
    names = {k.replace("_", " ") for k, f in HIRING.fields.items() if f.role != "merit"}
    about = text.partition("You may ask")[0]  # what follows is the same for everybody
    assert not [w for w in shown | names | set(HIRING.groups) if re.search(rf"\b{w}\b", about)]
    assert "instead of" in text and "not a legal notice" in text


def test_an_approval_needs_no_reasons_against(found):
    good = answered(experience=9, references="strong")
    text = letter.letter(good).text
    assert "The answer is: invite. What counted most for it:" in text and "would have been" not in text
    assert "What speaks for it" in said(answer_page.render(good, HIRING, {}, "x"))


def test_a_mitigation_is_shown_where_one_is_given(found, tmp_path):
    rows = (Measure("gap <b>", (-9.0, -12.0, -6.0), (-1.0, -2.0, 0.5), 50),)
    page = answer_page.render(found, HIRING, {}, "x", Mitigation("Neurons were held.", rows, "a study"))
    assert "Neurons were held." in page and "gap &lt;b&gt;" in page and "−12.00 to −6.00" in page
    file = tmp_path / "m.yaml"
    file.write_text(
        "description: d\nsource: s\nmeasures:\n- {name: gap, before: [1.0, 0.5, 2.0], after: [0.1, 0.0, 0.2], n: 9}\n"
    )
    assert answer_page.read_mitigation(file).measures[0].after == (0.1, 0.0, 0.2)
    for broken, named in (("measures: 3", "measures"), ("description: d\nsource: s\nmeasures: [{name: x}]", "before"),
                          ("description: d\nsource: s\nmeasures: [{name: x, before: [1.0], after: [1.0, 0.5, 2.0], "
                           "n: 1}]", "before"), ("[", "m.yaml")):  # fmt: skip
        file.write_text(broken)
        assert named in refused(lambda: answer_page.read_mitigation(file))


def test_json_holds_everything_and_no_number_that_is_none(found, tmp_path):
    paths = answer_page.write_answer(found, HIRING, tmp_path / "a.html", {"Model": "clerk"}, "x")
    assert [p.name for p in paths] == ["a.html", "a.json", "a-letter.html"]
    kept = json.loads(paths[1].read_text())
    assert kept["answer"]["score"] == found.score and kept["letter"]["opening"] == letter.letter(found).opening
    assert {f["verdict"] for f in kept["findings"]} <= {"held", "refuted", "null", "not testable"}
    assert [r["field"] for r in kept["answer"]["reasons"]] == [t.field for t in found.reasons]
    assert len(kept["answer"]["impacts"]) == 3 and "NaN" not in paths[1].read_text()


# --- what pages must never do -------------------------------------------------------------------------


def test_nothing_is_asked_of_a_network_and_there_is_no_date_of_today(found, page):
    names = r"https?://(?!www\.w3\.org/(?:2000/svg|1999/xlink)\")"  # of SVG's vocabulary, not addresses
    assert re.findall(rf"(?:src|href)=(?!\"#)|url\(|{names}", page) == [] and "<script" not in page
    assert not re.search(r"20\d\d-\d\d-\d\d", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_words_from_outside_are_escaped_wherever_they_stand(found):
    evil = f"{EVIL}\"' & $x^2$ \u202e\x07"
    fields = [replace(t, field=t.field, value=evil, typical=evil) for t in found.fields]
    bad = replace(
        found, title=evil, case=evil, template=evil, answers=(evil, evil), values=dict.fromkeys(found.values, evil) | {
            k: v for k, v in found.values.items() if not isinstance(v, str)},
        fields=tuple(fields), reasons=tuple(fields[:2]), silent={evil: evil}, unsaid=(evil,), truth_from=evil,
        swaps=tuple(replace(s, group=evil, own=evil, put_in=(evil,)) for s in found.swaps),
        texts=tuple(replace(t, values=(evil,), put_in=(evil,)) for t in found.texts),
        impacts=tuple(replace(i, reference=evil, rows=tuple(replace(r, group=evil) for r in i.rows))
                      for i in found.impacts),
        groups=dict.fromkeys(found.groups, evil), units=dict.fromkeys(found.units, evil),
    )  # fmt: skip
    pages = [answer_page.render(bad, HIRING, {evil: evil}, evil, Mitigation(evil, (), evil))]
    pages.append(answer_page.pages.render(answer_page.TEMPLATES / "letter.html", letter=letter.letter(bad)))
    for page in pages:
        assert "<script" not in page and "&lt;script&gt;" in page
        for svg in re.findall(r"<svg.*?</svg>", page, re.S):
            ElementTree.fromstring(svg)
    assert "\u202e" not in letter.letter(bad).text and "\x07" not in letter.letter(bad).text


DRAWN = [getattr(answer_plots, name) for name in dir(answer_plots) if name.startswith("figure_")]


@pytest.mark.parametrize("draw", DRAWN, ids=lambda f: f.__name__)
def test_a_figure_is_the_same_whatever_matplotlib_is_set_to(draw, found):
    with matplotlib.rc_context():
        once = draw(found)
        matplotlib.rcParams.update({"font.size": 30, "svg.fonttype": "path"})
        assert draw(found) == once
    svg = ElementTree.fromstring(once)
    assert svg.get("role") == "img" and svg.get("aria-label") and svg.get("viewBox") and not svg.get("width")


def test_a_failure_leaves_nothing_behind(found, tmp_path):
    with (
        mock.patch.object(answer_page.Path, "write_text", side_effect=OSError(28, "No space left on device")),
        pytest.raises(assets.AssetError),
    ):
        answer_page.write_answer(found, HIRING, tmp_path / "a.html", {}, "x")
    assert list(tmp_path.iterdir()) == []


# --- a model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def officer(tmp_path_factory):
    """A folder with a random model that answers with the two words only, also after a chat's opening."""
    folder = tmp_path_factory.mktemp("officer")
    hf, words = tiny.network("llama", len(tiny.tokenizer()), positions=1024), tiny.tokenizer()
    model = models.wrap_model(hf, words, "random")
    keep = list(scoring.answer_tokens(model, HIRING, scoring.prompts(model, HIRING, HIRING.cases[:1])[0]))
    with torch.no_grad():
        rows = hf.lm_head.weight.clone()
        hf.lm_head.weight.zero_()
        hf.lm_head.weight[keep] = rows[keep] * 20
    hf.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", list(HIRING.templates))
def test_spans_are_where_the_values_stand(template):
    for case in HIRING.cases[:4]:
        text = render(HIRING, case, template)
        found = placing.spans(HIRING, case, template)
        assert {name for name, _, _ in found} == set(HIRING.fields)
        assert all(text[a:b] == str(case[name]) for name, a, b in found)


def test_places_that_can_not_be_told_are_refused():
    case, words = HIRING.cases[0], tiny.tokenizer()
    other = SimpleNamespace(name="m", tokenizer=words)
    with pytest.raises(models.ModelError, match="m changes the words of a case"):
        placing.in_prompt(other, HIRING, case, "line", render(HIRING, case, "line").upper())

    def slow(*a, **k):
        raise NotImplementedError

    with pytest.raises(models.ModelError, match="fast version"):
        placing.offsets(SimpleNamespace(name="m", tokenizer=slow), ["a"])


@pytest.mark.parametrize("template", ["line", "chat"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_attention_goes_to_the_tokens_of_each_field(template, kind):
    words = tiny.tokenizer()
    tiny_model = models.wrap_model(tiny.network(kind, len(words), positions=1024, window=512), words, kind)
    batch, mask = observed.field_masks(tiny_model, HIRING, HIRING.cases[:3], template)
    for row, ids, case in zip(mask, batch.input_ids, HIRING.cases, strict=False):
        for where, name in zip(row, HIRING.fields, strict=True):
            assert str(case[name]) in tiny_model.tokenizer.decode(ids[where])
    shares = observed.attention_to_fields(tiny_model, HIRING, HIRING.cases[:3], template)
    assert shares.shape == (3, len(HIRING.fields)) and torch.allclose(shares.sum(1), torch.ones(3), atol=1e-4)
    alone = observed.attention_to_fields(tiny_model, HIRING, HIRING.cases[:1], template)
    assert torch.allclose(alone[0], shares[0], atol=1e-3)


def test_scores_are_those_of_the_rest_and_nan_where_nothing_is_decided(officer):
    model, cases = load_model(officer), list(HIRING.cases[:9])
    with mock.patch.object(scoring, "LEAST_SHARE", 0.0):
        mine = asking.scorer(model, HIRING, 4)(cases, "form")
    assert torch.allclose(mine, scoring.scores(model, HIRING, cases, "form", check=False), atol=1e-4)
    random = models.wrap_model(tiny.network("llama", len(tiny.tokenizer()), positions=1024), tiny.tokenizer(), "random")
    assert asking.scorer(random, HIRING)(cases, "form").isnan().all()
    assert "does not decide the case" in refused(lambda: answer.explain(random, HIRING, cases[0]), 60)


@pytest.mark.slow
def test_the_command_writes_page_json_and_letter(officer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scoring, "LEAST_SHARE", 0.0)
    monkeypatch.setattr(answer.explain, "__defaults__", (None, 24, *answer.explain.__defaults__[2:]))
    assert cli.main(["explain", "--decision", "hiring", "--model", str(officer), "H001"]) == 0
    assert "Open answer.html" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["answer-letter.html", "answer.html", "answer.json"]
    kept = json.loads((tmp_path / "answer.json").read_text())
    assert kept["answer"]["case"] == "H001" and kept["answer"]["attention"] and kept["facts"]["Decision"]
    assert str(tmp_path) not in (tmp_path / "answer.html").read_text()
    first = [(tmp_path / name).read_bytes() for name in ("answer.html", "answer.json")]
    assert cli.main(["explain", "--decision", "hiring", "--model", str(officer), "H001"]) == 0
    assert first == [(tmp_path / name).read_bytes() for name in ("answer.html", "answer.json")]


WRONG = {
    "explain": "nothing to explain",
    "explain H001": "nothing to explain",
    "explain --decision hiring": "CASE is missing",
    "explain --decision hiring H999": "no case 'H999'",
    "explain --decision nosuch H001": "nosuch",
    "explain --decision hiring H001 --template poem": "no template 'poem'",
    "explain --decision hiring H001 --layout line": "--layout",
    "explain --decision hiring H001 --applicant x.json": "--applicant",
    "explain --decision hiring H001 --adapter nosuch": "nosuch",
    "explain --decision hiring H001 --mitigation nosuch.json": "nosuch.json",
    "explain --decision hiring nosuch.yaml": "nosuch.yaml",
    "explain --decision hiring evil.json": "'last_post'",
    "explain --decision hiring nan.json": "'test'",
    "explain --decision hiring huge.json": "'test'",
    "explain --decision hiring unknown.json": "'colour'",
    "explain --decision hiring H001 --out folder": "--out",
    "explain --applicant x.json --template line": "needs --decision",
    "explain --applicant x.json H001": "needs --decision",
}


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_ends_in_one_paragraph_before_a_model_is_loaded(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    (tmp_path / "folder").mkdir()
    for name, change in {"evil": {"last_post": EVIL}, "nan": {"test": float("nan")}, "huge": {"test": 10**400},
                         "unknown": {"colour": "red"}}.items():  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(USUAL | change))
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(command.split()) == 2
    words = capsys.readouterr().err
    assert WRONG[command] in words and "Traceback" not in words and len(words) < 900 and words.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


# --- looked at ----------------------------------------------------------------------------------------

OVERLAPS = """() => [...document.querySelectorAll('svg')].flatMap(s => {
    const boxes = [...s.querySelectorAll('text')].map(t => [t.textContent, t.getBBox()]);
    return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) =>
        p.x + 1 < q.x + q.width && q.x + 1 < p.x + p.width && p.y + 3 < q.y + q.height && q.y + 3 < p.y + p.height
    ).map(([b, q]) => a + ' / ' + b)); })"""
CUT = """() => [...document.querySelectorAll('svg')].flatMap(s => [...s.querySelectorAll('text')].filter(t => {
    const b = t.getBBox(), v = s.viewBox.baseVal;
    return b.x < -2 || b.x + b.width > v.width + 2 || b.y < -2 || b.y + b.height > v.height + 2; }).map(
    t => t.textContent))"""


@pytest.mark.browser
@chromium.NEEDED
def test_the_page_opens_offline_on_paper_and_phone(page, found, tmp_path):
    file = tmp_path / "answer.html"
    file.write_text(page, encoding="utf-8")
    with chromium.launched() as browser:
        tab = browser.new_context(offline=True, viewport={"width": 1200, "height": 900}).new_page()
        asked, wrong = [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        tab.goto(file.as_uri())
        assert tab.locator("svg").count() == 3
        fits = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        assert tab.evaluate(fits) and tab.evaluate(CUT) == [] and tab.evaluate(OVERLAPS) == []
        tab.set_viewport_size({"width": 390, "height": 800})
        assert tab.evaluate(fits)
        pdf = tab.pdf(format="A4", prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type\s*/Page[^s]", pdf)) <= 8
    assert asked == [file.as_uri()] and wrong == []
