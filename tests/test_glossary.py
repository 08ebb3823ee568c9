"""The glossary: every link to it leads to a term, every term stands in its list once, every paper has a number."""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "glossary.md"
TEXT = PAGE.read_text(encoding="utf-8")


def anchor(heading):
    """As GitHub and nbconvert make it: small letters, no punctuation, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


TERMS = re.findall(r"^### (.+)$", TEXT, re.M)
ANCHORS = [anchor(term) for term in TERMS]


def test_terms_are_many_unique_in_order_and_listed_once():
    assert len(TERMS) >= 60 and len(set(ANCHORS)) == len(ANCHORS)
    assert sorted(TERMS, key=str.lower) == TERMS
    head = TEXT[: TEXT.index("\n### ")]
    assert sorted(re.findall(r"\(#([\w-]+)\)", head)) == sorted(ANCHORS)


def test_every_term_is_short_and_names_a_notebook():
    for entry in re.split(r"^### ", TEXT, flags=re.M)[1:]:
        term, _, body = entry.partition("\n")
        assert re.search(r"\[0\d\]\(\.\./notebooks/0\d_\w+\.ipynb\)", body), term
        words = re.sub(r"```.*?```|\(http\S+\)|\(\.\./\S+\)", "", body, flags=re.S).split()
        assert len(words) <= 90, f"{term} takes {len(words)} words"


def test_links_inside_the_page_lead_somewhere():
    for target in re.findall(r"\]\(#([^)]+)\)", TEXT):
        assert target in ANCHORS, target
    for target in re.findall(r"\]\((\.\./[^)#]+)", TEXT):
        assert (PAGE.parent / target).exists(), target
    for shown, linked in re.findall(r"\[(\d{4}\.\d{5})\]\(https://arxiv\.org/abs/([^)]+)\)", TEXT):
        assert shown == linked
    assert len(re.findall(r"arxiv\.org/abs/", TEXT)) == len(re.findall(r"\[\d{4}\.\d{5}\]\(https://arxiv", TEXT)) >= 40


def test_links_from_notebooks_and_pages_lead_to_a_term():
    pages = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md"]
    texts = {path: path.read_text(encoding="utf-8") for path in pages}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        texts[path] = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
    for path, text in texts.items():
        for place, target in re.findall(r"\]\((?!http)([^)#\s]*glossary\.md)(?:#([^)]*))?\)", text):
            assert (path.parent / place).resolve() == PAGE.resolve(), f"{path.name}: {place}"
            assert not target or target in ANCHORS, f"{path.name}: there is no term {target}"
