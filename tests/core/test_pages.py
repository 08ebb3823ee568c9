"""Templates: what comes from outside is text, what is missing is an error, and the files that ship are whole."""

import re
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest

import glassbox_utils
from glassbox_utils.core import pages

PACKAGE = Path(glassbox_utils.__file__).parent
SHIPPED = sorted(PACKAGE.glob("*/templates/*.html"))


@pytest.fixture()
def template(tmp_path):
    file = tmp_path / "page.html"
    file.write_text('{% for word in words %}\n<p title="{{ word }}">{{ word }}</p>\n{% endfor %}\n', encoding="utf-8")
    return file


def test_text_from_outside_is_escaped(template):
    page = pages.render(template, words=['<b>"it\'s" & more', "⏎"])
    assert (
        page == '<p title="X">X</p>\n'.replace("X", "&lt;b&gt;&#34;it&#39;s&#34; &amp; more") + '<p title="⏎">⏎</p>\n'
    )


def test_a_name_that_is_not_given_is_an_error(template):
    with pytest.raises(jinja2.UndefinedError, match="words"):
        pages.render(template)


EVIL = '<script>alert("1")</script>'
RUN = {"title": EVIL, "seconds": 1.0, "peak_gib": 1.0, "parameters": {EVIL: EVIL}}
FILLED = {
    "lab/templates/comparison.html": {"prompt": EVIL, "answers": [{"title": EVIL, "tokens": [(EVIL, 0.5)]}]},
    "lab/templates/writing.html": {"texts": [EVIL]},
    "lab/templates/steering.html": {"answers": [(0.1, EVIL)]},
    "lab/templates/index.html": {"runs": {"01": RUN}},
    "saes/templates/example.html": {
        "example": SimpleNamespace(tokens=[EVIL], values=[1.0], peak=0, source=EVIL, licence=EVIL),
        "maximum": 1.0,
    },
}


@pytest.mark.parametrize("name", FILLED)
def test_a_shipped_template_escapes_what_it_is_given(name):
    page = pages.render(PACKAGE / name, **FILLED[name])
    assert "<script" not in page and "&lt;script&gt;alert(&#34;1&#34;)" in page


@pytest.mark.parametrize("file", SHIPPED, ids=lambda p: f"{p.parent.parent.name}/{p.name}")
def test_a_shipped_template_loads_nothing_and_is_used(file):
    source = file.read_text(encoding="utf-8")
    jinja2.Environment().parse(source)
    assert not re.search(r"<script|https?://|url\(|@import|src=", source)
    users = [*file.parent.parent.glob("*.py"), *(p for p in file.parent.glob("*.html") if p != file)]
    assert any(f'"{file.name}"' in p.read_text(encoding="utf-8") for p in users)


def test_what_is_marked_as_markup_is_made_here():
    marked = {(p.name, name) for p in SHIPPED for name in re.findall(r"\{\{ *([^}]*?) *\| *safe", p.read_text("utf-8"))}
    drawn = {
        "report.html": ("fields", "curves", "groups", "gaps", "arrival"),
        "answer.html": ("reasons", "curves", "swaps"),
    }
    assert marked == {(page, f"figures.{name}") for page, names in drawn.items() for name in names}
