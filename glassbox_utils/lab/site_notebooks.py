"""An executed notebook as a page of the site: alt texts, tables that a phone and a keyboard can scroll, links inside.

What the notebook computed stays as it is; only what surrounds it is changed, in a copy.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from glassbox_utils.core.assets import ROOT
from glassbox_utils.core.evidence import MIMETYPE
from glassbox_utils.lab import subjects

FIGURE = "glassbox-figure"
SHADE = re.compile(r"background:\s*rgba\(0,\s*114,\s*178,\s*(?P<much>[\d.]+)\)")
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<to>\.\.?/[^)\s]+)\)")
DRAWS = '<script src="../_static/figures.js"></script>'
"""at the end of a page with interactive figures"""


@dataclass(frozen=True)
class Picture:
    """One static figure of a notebook."""

    png: str
    """base64, as the notebook keeps it"""
    alt: str
    section: str
    """heading under which it stands"""


@dataclass(frozen=True)
class Lesson:
    """One executed notebook, and what the other pages say about it."""

    name: str
    """file name without its ending"""
    notebook: Any
    run: Mapping[str, Any] | None = None
    """what ``runs.json`` says; None for the committed outputs"""

    @property
    def title(self) -> str:
        return next(_headings(self.notebook), (0, self.name))[1]

    @property
    def findings(self) -> list[dict[str, Any]]:
        return subjects.findings_of(self.notebook)

    @property
    def origin(self) -> str:
        """Where its outputs come from, in a sentence."""
        if self.run is None:
            return "The outputs are those that the repository ships, executed when this notebook was last changed."
        took = f"in {self.run['seconds']:.0f} s, at most {self.run['peak_gib']:.1f} GiB"
        model = f"on {self.run['model']}, " if "model" in self.run else ""
        if "stopped" in self.run:
            return f"**This run stopped** {self.run['stopped']} Run on this machine {model}{took}."
        return f"Run on this machine {model}{took}."


def read(path: Path, run: Mapping[str, Any] | None = None) -> Lesson:
    """The executed notebook in a file."""
    return Lesson(path.stem, nbformat.read(path, 4), run)


def _headings(notebook: Any) -> Iterator[tuple[int, str]]:
    """(index of the cell, heading) in their order, without Markdown's marks."""
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            for line in re.findall(r"^#{1,4} +(.+?) *#*$", cell.source, re.M):
                yield index, line


def sections(notebook: Any) -> list[str]:
    """For each cell: the last heading above it or in it."""
    found, current, named = [], "", dict(_headings(notebook))
    for index, _ in enumerate(notebook.cells):
        current = named.get(index, current)
        found.append(current)
    return found


def pictures(lesson: Lesson) -> list[Picture]:
    """Every static figure, in the order of the page."""
    found = []
    for cell, section in zip(lesson.notebook.cells, sections(lesson.notebook), strict=True):
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                found.append(Picture("".join(output.data["image/png"]), alt_of(output, section), section))
    return found


def alt_of(output: Any, section: str) -> str:
    """What the figure shows, as its drawing wrote it; without that, where it stands."""
    written = output.get("metadata", {}).get("image/png", {}).get("alt")
    return written or f"Plot of the section “{section}”; the text around it says what it shows."


def page(lesson: Lesson, modules: Iterable[str]) -> Any:
    """A copy of the notebook for the site. ``modules``: which have a page of their own (``core.text``)."""
    notebook = nbformat.from_dict(lesson.notebook)
    interactive = False
    for cell, section in zip(notebook.cells, sections(notebook), strict=True):
        if cell.cell_type == "markdown":
            cell.source = relinked(cell.source, ROOT / "notebooks", "../", modules)
            continue
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                cell.metadata.setdefault("mystnb", {})["image"] = {"alt": alt_of(output, section)}
            if "text/html" in data:
                markup = "".join(data["text/html"])
                interactive |= FIGURE in markup
                data["text/html"] = accessible(markup, section, MIMETYPE in data)
            data.pop(MIMETYPE, None)
    first = next((c for c in notebook.cells if c.cell_type == "markdown"), None)
    if first is not None:
        link = f"{{download}}`The notebook <{lesson.name}.ipynb>` opens in Jupyter."
        note = f"\n\n:::{{admonition}} Where the outputs come from\n{lesson.origin} {link}\n:::\n"
        head, _, rest = first.source.partition("\n")
        first.source = head + note + rest
    if interactive:
        notebook.cells.append(nbformat.v4.new_markdown_cell(DRAWS))
    return notebook


PAGES = {"data/studies/audit_power.json": "power.md", "data/studies/locate.json": "located.md"}
"""files that the site shows as a page of its own"""


def relinked(text: str, base: Path, up: str, modules: Iterable[str]) -> str:
    """Markdown whose links to files of the repository lead to their pages; plain text where the site has none.

    ``base``: folder that the links start from; ``up``: from the page to the top of the site, such as ``../``.
    """
    known = set(modules)

    def page_of(found: re.Match[str]) -> str:
        to, _, anchor = found["to"].partition("#")
        path = (base / to).resolve()
        place = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
        end = f"#{anchor}" if anchor else ""
        if re.fullmatch(r"docs/[^/]+\.md|notebooks/[^/]+\.ipynb", place):
            return f"[{found['text']}]({up}{place.removeprefix('docs/')}{end})"
        if place in PAGES:
            return f"[{found['text']}]({up}{PAGES[place]}{end})"
        module = place.removeprefix("glassbox_utils/").removesuffix(".py").replace("/", ".")
        if place.startswith("glassbox_utils/") and module in known:
            return f"[{found['text']}]({up}api/{module.replace('.', '/')}.md)"
        return f"{found['text']} (`{place or found['to']}`)"

    return LINK.sub(page_of, text)


def accessible(markup: str, section: str, is_ladder: bool = False) -> str:
    """HTML of an output with headers that say what they head, and tables that scroll by themselves, by keyboard too."""
    import bs4

    if FIGURE in markup:
        name = f"Interactive figure of the section “{section}”".replace('"', "'")
        return markup.replace(f'class="{FIGURE}"', f'class="{FIGURE}" role="figure" aria-label="{name}"')
    markup = SHADE.sub(lambda found: f"--shade:{float(found['much']) / 0.8:.2f}", markup)  # the page's own colours
    soup = bs4.BeautifulSoup(markup, "html.parser")
    for small in soup.find_all("small", style=True):
        del small["style"]  # a grey that is too pale on a dark page
    for style in soup.find_all("style", attrs={"scoped": True}):
        style.decompose()
    for table in soup.find_all("table"):
        del table["border"]
        for header in table.find_all("th"):
            if not header.get_text(strip=True):
                header.name = "td"
            elif not header.get("scope"):
                header["scope"] = "col" if header.find_parent("thead") else "row"
        label = "Ladder of findings" if is_ladder else f"Table of the section {section}"
        frame = soup.new_tag("div", attrs={"class": "scrolls", "tabindex": "0", "role": "group", "aria-label": label})
        if is_ladder:
            frame["id"] = "findings"
        table.wrap(frame)
    return str(soup)
