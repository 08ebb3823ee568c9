"""The site as a reader meets it, from a folder without a server or network: links, figures, search, keyboard, axe.

A few pages of a site with one module in `make test`; every page, at two widths and in the dark, by command:
`pytest tests/lab/test_site_browser.py -m long`. Needs Debian's chromium, and npm for axe-core.
"""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

import axe
import bs4
import chromium
import pytest
from chromium import DESKTOP, PHONE

pytest.importorskip("myst_nb", reason="SITE TESTS SKIPPED: pip install -r requirements-more.lock")

from glassbox_utils.lab import site, site_features

LARGEST = 60_000_000  # bytes of a whole site: it should fit on any stick

pytestmark = [
    pytest.mark.browser,
    pytest.mark.timeout(14_400),
    chromium.NEEDED,
]

EXAMPLE = (
    '<div style="margin:.3em 0"><span style="white-space:pre-wrap;background:rgba(0,114,178,0.80);" title="9">ab</span>'
    '<small style="color:#666"> [wiki, CC-BY-SA-4.0]</small></div>'
)
FEATURE = {
    "feature": 7, "density": 0.01, "up": [(" <b>", 1.0)], "down": [("\n", -1.0)], "near": [(3, 0.5)],
    "texts": [EXAMPLE],
    "label": {"kind": "token", "text": "a", "share": 0.5, "base_rate": 0.01, "p_value": 0.001, "detection": 0.8},
}  # fmt: skip
CARD = {
    "architecture": "topk", "d_sae": 8, "hook": "blocks.0.hook_resid_post", "command": "train it", "seed": 0,
    "metrics": {"sae": {"l0": 2.0, "explained_variance": 0.5, "explained_variance_all": 0.4}},
}  # fmt: skip
INDEX = "# Features\n\n```{toctree}\n\ntoy\n```\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The site with one module and a toy feature page, without the model."""
    found = {
        "tokens": 100,
        "alive": 8,
        "sample": 8,
        "best": [FEATURE],
        "drawn": [FEATURE | {"feature": 5, "label": None}],
    }
    pages = {"features/index.md": INDEX, "features/toy.md": site_features.page("toy", CARD, found)}
    folder = tmp_path_factory.mktemp("a stick") / "größe site"  # spaces and letters beyond ASCII in its path
    first, warnings = site.build(folder, only=["core.text"], features=pages)
    assert warnings == []
    return first.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """GLASSBOX_SITE, or a site built with all modules."""
    if given := os.environ.get("GLASSBOX_SITE"):
        return Path(given)
    first, warnings = site.build(tmp_path_factory.mktemp("whole") / "site")
    assert warnings == []
    return first.parent


def pages_of(folder):
    return sorted(path for path in folder.rglob("*.html"))


def broken_links(folder):
    """Every href and src that leads nowhere, to another host, or to an anchor that its page has not."""
    soups = {
        path.resolve(): bs4.BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in pages_of(folder)
    }
    anchors = {path: {e["id"] for e in soup.find_all(id=True)} for path, soup in soups.items()}
    wrong = []
    for path, soup in soups.items():
        for element in soup.find_all(href=True) + soup.find_all(src=True):
            url = element.get("href") or element["src"]
            parts = urlsplit(url)
            loads = element.name in ("script", "img", "iframe", "source") or (
                element.name == "link" and "stylesheet" in element.get("rel", [])
            )
            if parts.scheme in ("http", "https", "mailto", "") and parts.netloc:
                wrong += [f"{path.name}: loads {url}"] if loads else []
                continue
            if parts.scheme == "data" or url == "#":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                wrong.append(f"{path.name}: {url} is not there")
            elif parts.fragment and target in anchors and unquote(parts.fragment) not in anchors[target]:
                wrong.append(f"{path.name}: {url} has no such anchor")
    return wrong


def walk(browser, pages, viewport, scheme="light", check=True):
    """What is wrong with the pages, opened one by one: errors, requests, figures not drawn, width, axe."""
    context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True)
    context.set_default_timeout(180_000)  # a busy machine is no fault of a page
    tool, wrong = axe.script().read_text(encoding="utf-8"), []
    for path in pages:
        page, here, asked = context.new_page(), [], []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.on("requestfailed", lambda request, here=here: here.append(f"failed request {request.url[:120]}"))
        page.on("console", lambda m, here=here: here.append(f"console: {m.text[:200]}") if m.type == "error" else None)
        page.on("pageerror", lambda error, here=here: here.append(f"error: {str(error)[:200]}"))
        page.goto(path.as_uri())
        figures = page.locator(".glassbox-figure").count()
        if figures:
            drawn = "n => document.querySelectorAll('.glassbox-figure[data-drawn]').length === n"
            page.wait_for_function(drawn, arg=figures, timeout=60_000)
            page.wait_for_timeout(500)
            empty = page.locator(".glassbox-figure:not(:has(canvas, span))").count()
            here += [f"{empty} figures are empty"] if empty else []
        here += [f"asks {url[:120]}" for url in asked if not url.startswith(("file:", "data:", "blob:"))]
        if page.evaluate("() => document.documentElement.scrollWidth > window.innerWidth + 1"):
            here.append(f"is wider than {viewport['width']} pixels")
        if check:
            page.evaluate(tool)
            here += page.evaluate(axe.RUN)
        wrong += [f"{path.name} ({viewport['width']}, {scheme}): {line}" for line in here]
        page.close()
    context.close()
    return wrong


LESSON, TOY = "notebooks/03_sae_training", "features/toy"
FEW = {
    "desktop": (DESKTOP, "light", ["index", "results", "api/core/text", "search", LESSON, TOY]),
    "phone": (PHONE, "dark", ["results", "gallery", "power", LESSON, TOY]),
}


def test_no_link_leads_nowhere_and_nothing_is_loaded_from_another_host(small):
    assert broken_links(small) == []


@pytest.mark.parametrize("place", FEW)
def test_a_few_pages_are_whole_quiet_and_accessible(browser, small, place):
    viewport, scheme, names = FEW[place]
    wrong = walk(browser, [small / f"{name}.html" for name in names], viewport, scheme)
    assert wrong == [], "\n".join(wrong)


def test_search_finds_induction_by_keyboard_alone(browser, small):
    page = browser.new_context(viewport=DESKTOP, offline=True).new_page()
    page.goto((small / "index.html").as_uri())
    page.keyboard.press("Control+k")
    page.keyboard.type("induction")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a", timeout=180_000)
    found = page.locator("#search-results li a").all_inner_texts()
    assert any(words.startswith("02") for words in found), found
    page.locator("#search-results li a").first.click()
    page.wait_for_load_state()
    assert page.locator("main h1").count() == 1


def test_search_puts_pages_that_explain_before_modules(browser, small):
    """``tokenize`` is the name of a function, whose page would lead without docs/site/scorer.js."""
    page = browser.new_context(viewport=DESKTOP, offline=True).new_page()
    page.goto((small / "search.html").as_uri() + "?q=tokenize")
    page.wait_for_selector("#search-results li a", timeout=180_000)
    page.wait_for_timeout(2_000)  # it shows them one by one
    links = page.locator("#search-results li a").evaluate_all("all => all.map(a => a.getAttribute('href'))")
    modules = [link.startswith("api/") for link in links]
    assert any(modules), links
    assert modules == sorted(modules), links
    assert not modules[0], links


def test_the_first_tab_leads_past_the_navigation(browser, small):
    page = browser.new_context(viewport=DESKTOP, offline=True).new_page()
    page.goto((small / "results.html").as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.textContent.trim()") == "Skip to main content"
    page.keyboard.press("Enter")
    assert page.evaluate("() => location.hash") == "#main-content"


@pytest.mark.long
@pytest.mark.parametrize(
    ("viewport", "scheme"), [(DESKTOP, "light"), (PHONE, "light"), (DESKTOP, "dark"), (PHONE, "dark")]
)
def test_every_page_is_whole_quiet_and_accessible(browser, whole, viewport, scheme):
    wrong = walk(browser, pages_of(whole), viewport, scheme)
    assert wrong == [], f"{len(wrong)} faults:\n" + "\n".join(wrong[:60])


@pytest.mark.long
def test_no_link_of_the_whole_site_leads_nowhere_and_it_fits_on_a_stick(whole):
    assert broken_links(whole) == []
    model = whole / "_static" / "ask"  # of the page that runs the model, if it was built with one: 290 MB more
    files = [path for path in whole.rglob("*") if path.is_file() and not path.is_relative_to(model)]
    assert sum(path.stat().st_size for path in files) < LARGEST
