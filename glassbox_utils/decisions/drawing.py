"""Figures for pages: matplotlib in pixels, as SVG that stands in the page.

Text stays text, whoever wrote it: nothing is read as markup or as a formula. No date and no random name is in them, and
what a notebook has set matplotlib to makes no difference: the same numbers give the same figure.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.dom import minidom

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scour import scour  # type: ignore[import-untyped]

INK, FAINT, LINE, UNSURE = "#1d2733", "#5c6670", "#d5dae0", "#b9c0c7"
WIDTH = 720
LOOK: list[str | Path | dict[str, Any]] = [
    "default",
    {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "text.color": INK,
        "font.size": 10,
        "font.sans-serif": ["DejaVu Sans"],
        "xtick.bottom": False,
        "xtick.labelsize": 10,
        "xtick.labelcolor": FAINT,
        "ytick.left": False,
        "ytick.labelsize": 10,
        "ytick.labelcolor": FAINT,
        "lines.markersize": 9,
        "lines.markeredgewidth": 0,
    },
]
SMALL = scour.sanitizeOptions(
    SimpleNamespace(
        **dict.fromkeys(("strip_ids", "strip_comments", "remove_metadata", "strip_xml_prolog", "quiet"), True),
        indent_type="none",
        newlines=False,
        digits=4,
    )
)
_FAMILY = re.compile("font-family:[^;]*;?")


def number(value: float, digits: int = 2, sign: bool = True) -> str:
    """A number with a true minus sign, and none on zero."""
    shown = f"{value:{'+' if sign else ''}.{digits}f}"
    return shown.replace("-", "−") if float(shown) else shown.lstrip("+-")


# --- matplotlib, in pixels ----------------------------------------------------------------------------


def blank(height: float) -> Figure:
    """A unit of the SVG is a point of matplotlib, which is a pixel where the page is as wide as the figure."""
    return Figure(figsize=(WIDTH / 72, height / 72), frameon=False)


def axes_at(figure: Figure, left: float, top: float, width: float, height: float, **options: Any) -> Axes:
    """Axes at pixels from the upper left corner."""
    full = figure.get_figheight() * 72
    box = (left / WIDTH, 1 - (top + height) / full, width / WIDTH, height / full)
    return figure.add_axes(box, frameon=False, **options)


def note(figure: Figure, x: float, y: float, words: str, align: str = "left", **options: Any) -> None:
    """Words on a base line at pixels from the upper left corner."""
    figure.text(x / WIDTH, 1 - y / (figure.get_figheight() * 72), words, ha=align, va="baseline", **options)


def inline(figure: Figure, alternative: str) -> str:
    """The figure as a small ``<svg>`` that takes the width and the font of the page around it."""
    for artist in figure.findobj():
        artist.set_clip_on(False)  # all is inside; a clip costs more letters than what it clips
    file = io.StringIO()
    with rc_context({"svg.hashsalt": alternative}):  # ids are those of this figure, whatever else is on the page
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg: Any = minidom.parseString(file.getvalue()).documentElement
    for text in svg.getElementsByTagName("text"):
        text.removeAttribute("transform")  # a turn by nothing
        text.setAttribute("style", _FAMILY.sub("", text.getAttribute("style")))
        for side in ("x", "y"):
            text.setAttribute(side, f"{float(text.getAttribute(side)):.1f}")
    for rule in svg.getElementsByTagName("style"):
        rule.parentNode.removeChild(rule)  # it would hold for the whole page
    for name in ("width", "height"):
        svg.removeAttribute(name)
    for name, value in (("role", "img"), ("aria-label", alternative)):
        svg.setAttribute(name, value)
    return scour.scourString(svg.toxml(), SMALL)


def padded(values: Sequence[float], share: float) -> tuple[float, float, float]:
    """Lowest and highest of the values with room on both sides, and the room."""
    pad = share * (max(values) - min(values) or 1)
    return min(values) - pad, max(values) + pad, pad
