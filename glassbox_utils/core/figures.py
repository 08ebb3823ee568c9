"""Figures: circuitsvis without a network, a static twin for each interactive view, one plot style.

circuitsvis asks the network at every display and then either points at a CDN or inlines 1.3 MB per figure.
Here its script is unpacked once per page from the installed wheel, and a figure is a small block of JSON with
a static picture in it: GitHub, untrusted notebooks and printed pages show the picture, a trusted or exported
page replaces it by the interactive view. Opening a page makes no request.
"""

import base64
import functools
import gzip
import html
import importlib
import io
import itertools
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core import session
from glassbox_utils.core.arguments import number
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.statistics import Interval

NDIGITS = 3
LABELLED = 12
"""up to so many heads, the static picture of each has its tokens at the axes"""
SHEET = 18
"""above that they are miniatures on one sheet, so many in a row"""
LOADER_MARK = "__glassboxLoading"

# Okabe & Ito: distinguishable with every common colour blindness, and in print.
BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F"
PALETTE = (BLUE, ORANGE, GREEN, PINK, SKY, RED, GREY)

_CALL = re.compile(r'render\(\s*"circuits-vis-[^"]+",\s*(?P<name>\w+),\s*(?P<props>\{.*\})\s*\)\s*</script>\s*$', re.S)

_LOADER = """<script>(() => {
  const w = window;
  w.__glassboxMount = () => {
    if (!w.CircuitsVis) return;                       // not unpacked yet: the loader calls again
    for (const el of document.querySelectorAll('div.glassbox-figure:not([data-drawn])')) {
      const spec = el.querySelector('script[type="application/json"]');
      if (!spec) continue;                            // a sanitised (untrusted) output keeps its picture
      el.setAttribute('data-drawn', '1');
      const {element, props} = JSON.parse(spec.textContent);
      const host = document.createElement('div');
      host.id = 'glassbox-' + Math.random().toString(36).slice(2);
      el.replaceChildren(host);
      w.CircuitsVis.render(host.id, w.CircuitsVis[element], props);
    }
  };
  if (w.CircuitsVis) { w.__glassboxMount(); return; }
  if (w.@MARK@) return;
  const css = document.createElement('style');        // else a chart drawn while hidden stays 0 px wide
  css.textContent = '.glassbox-figure div[style*="aspect-ratio"]{width:100% !important}'
    + '.glassbox-figure h4{font-size:10px !important;line-height:1.2 !important}';
  document.head.append(css);
  w.@MARK@ = (async () => {
    const bytes = Uint8Array.from(atob("@SCRIPT@"), c => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
    const tag = document.createElement('script');
    tag.textContent = await new Response(stream).text();
    document.head.append(tag);
    w.__glassboxMount();
  })();
})();</script>"""


class FigureError(GlassboxError, ValueError):
    """Tokens and numbers that do not fit each other; the message says what fits."""


# --- circuitsvis, offline -----------------------------------------------------------------------------


@functools.cache
def loader_html() -> str:
    """The script that draws every figure of a page: 0.5 MB, once per page."""
    script = (resources.files("circuitsvis") / "dist" / "cdn" / "iife.js").read_bytes()
    script = script.replace(b"//# sourceMappingURL=iife.js.map", b"").strip()
    packed = base64.b64encode(gzip.compress(script, 9, mtime=0)).decode()
    return _LOADER.replace("@MARK@", LOADER_MARK).replace("@SCRIPT@", packed)


def setup(seed: int = 0, threads: int | None = None) -> None:
    """First line of a notebook: seeds, quiet libraries, versions, plot style, circuitsvis without a network."""
    from circuitsvis.utils.render import RenderedHTML
    from IPython.core.getipython import get_ipython
    from IPython.display import HTML, display

    session.setup(seed, threads)
    style()
    shell: Any = get_ipython()
    if shell is None:
        return
    formatters = shell.display_formatter.formatters
    formatters["text/html"].for_type(RenderedHTML, figure_html)
    formatters["text/plain"].for_type(
        RenderedHTML, lambda fig, printer, cycle: printer.text(f"<circuitsvis {spec(fig)['element']}>")
    )
    _describe_plots(formatters["image/png"])
    display(HTML(loader_html()))


def _describe_plots(formatter: Any) -> None:
    """Every plot of the notebook is light, and takes its description along as the ``alt`` of its output's metadata."""
    import matplotlib.pyplot as plt
    from matplotlib.figure import Figure

    if "inline" in plt.get_backend():  # the notebook's backend registers its printer when it is first imported
        importlib.import_module("matplotlib_inline.backend_inline")
    draw = formatter.for_type(Figure)
    if draw is None or getattr(draw, "describes", False):
        return

    def described(figure: Any) -> Any:
        png = draw(figure)
        if not isinstance(png, str | bytes):
            return png
        small = light(base64.b64decode(png) if isinstance(png, str) else png)
        return base64.b64encode(small).decode() if isinstance(png, str) else small, {"alt": alt_text(figure)}

    described.describes = True  # type: ignore[attr-defined]
    formatter.for_type(Figure, described)


def light(png: bytes) -> bytes:
    """The same picture from a palette of 256 colours, no channel off by more than a few of 255: 40 % of the bytes."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    buffer = io.BytesIO()
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def alt_text(figure: Any) -> str:
    """A plot in words, for those who do not see it: its titles, what its axes measure, what its lines are called."""
    axes = [axis for axis in figure.axes if axis.axison]
    titles = [figure.get_suptitle(), *(axis.get_title(loc) for axis in axes for loc in ("left", "center", "right"))]
    parts = {
        "": titles,
        "across: ": [axis.get_xlabel() for axis in axes],
        "up: ": [axis.get_ylabel() for axis in axes],
        "lines: ": [words for axis in axes for words in axis.get_legend_handles_labels()[1]],
    }
    said = [
        name + ", ".join(dict.fromkeys(x for x in words if x.strip())) for name, words in parts.items() if any(words)
    ]
    return " ".join("; ".join(said).split()) or "A plot without a title."


def titled(figure: Any, title: str) -> Any:
    """Put the message above a plot, wrapped to its width; returns the plot."""
    figure.suptitle(
        "\n".join(textwrap.wrap(title, round(13.5 * figure.get_figwidth()))), fontsize=10, x=0.01, ha="left"
    )
    return figure


def spec(figure: Any) -> dict[str, Any]:
    """The element and the rounded numbers of a circuitsvis figure: what a test compares."""
    found = _CALL.search(figure.cdn_src)
    if found is None:
        raise FigureError("This is not a circuitsvis figure, or circuitsvis changed how it renders (1.43.3 is known).")
    return {"element": found["name"], "props": _rounded(json.loads(found["props"]))}


def _rounded(x: Any) -> Any:
    if isinstance(x, float):
        return round(x, NDIGITS) + 0.0 if np.isfinite(x) else None  # JSON has no NaN; + 0.0 turns -0.0 into 0.0
    if isinstance(x, list):
        return [_rounded(v) for v in x]
    if isinstance(x, dict):
        return {k: _rounded(v) for k, v in x.items()}
    return x


def figure_html(figure: Any) -> str:
    """A circuitsvis figure as deterministic HTML: its data, its static picture, and a call to the loader.

    Raises FigureError where circuitsvis would silently draw nothing (a batch dimension, a wrong length).
    """
    content = spec(figure)
    element, props = content["element"], content["props"]
    _check(element, props)
    picture = _picture(element, props)
    if element not in ("AttentionHeads", "AttentionPattern"):  # the others put tokens into the page as HTML
        props = {k: _escaped(v) if k in ("tokens", "prompt", "topKTokens") else v for k, v in props.items()}
    data = json.dumps({"element": element, "props": props}, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<div class="glassbox-figure" style="margin:12px 0"><script type="application/json">{data}</script>\n'
        f"{picture}\n</div>\n<script>window.__glassboxMount && window.__glassboxMount()</script>"
    )


def page(*figures: Any, title: str = "Glassbox") -> str:
    """Circuitsvis figures as one self-contained HTML page."""
    body = "".join(map(figure_html, figures))
    return f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>{body}{loader_html()}'


def _escaped(x: Any) -> Any:
    return [_escaped(y) for y in x] if isinstance(x, list) else html.escape(x, quote=False)


def _check(element: str, props: Mapping[str, Any]) -> None:
    if element == "AttentionHeads":
        n = len(props["tokens"])
        for head in props["attention"]:
            if np.shape(head) != (n, n):
                raise FigureError(
                    f"attention has shape {np.shape(props['attention'])}, but {n} tokens need [heads, {n}, {n}]: "
                    "remove the batch dimension (attention[0]) or pass the tokens of the same prompt."
                )
    if element == "ColoredTokens" and len(props["tokens"]) != len(props["values"]):
        raise FigureError(f"{len(props['tokens'])} tokens but {len(props['values'])} values: give one value per token.")


def _picture(element: str, props: Mapping[str, Any]) -> str:
    """The static twin inside the figure's HTML."""
    if element == "ColoredTokens":
        spans = zip(props["tokens"], _colours(props["values"], props), strict=True)
        return (
            '<div style="white-space:pre-wrap">' + "".join(_span(token, colour) for token, colour in spans) + "</div>"
        )
    if element == "AttentionHeads":
        heads, tokens = props["attention"], props["tokens"]
        names = props.get("attentionHeadNames") or [f"Head {i}" for i in range(len(heads))]
        if len(heads) > LABELLED:
            said = f"attention of {len(heads)} heads from {names[0]} to {names[-1]}, {SHEET} in a row"
            return (
                f"Rows and columns: {html.escape(' '.join(_label(t) for t in tokens))}<br>"
                f'<img alt="{html.escape(said)}, rows look at columns" src="{_sheet_png(heads)}"><br>'
                + html.escape(said)
            )
        return "".join(
            '<div style="display:inline-block;margin:2px;text-align:center;font-size:10px">'
            f'<img alt="attention of {html.escape(name)}, rows look at columns" src="{_labelled_png(tokens, head)}">'
            f"<br>{html.escape(name)}</div>"
            for name, head in zip(names, heads, strict=True)
        )
    return f"<em>{element}: an interactive circuitsvis figure; run or trust this notebook to see it.</em>"


def _span(token: str, colour: tuple[int, int, int]) -> str:
    ink = "#fff" if sum(colour) < 360 else "#000"
    return f'<span style="background-color:rgb{colour};color:{ink};white-space:pre">{html.escape(token)}</span>'


def _colours(values: Sequence[float | None], props: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    seen = [v for v in values if v is not None] or [0.0]
    high = props.get("maxValue") or max(*seen, 1e-9)
    low = props.get("minValue") or min(*seen, -1e-9)
    fade = [0.0 if v is None else max(-1.0, min(1.0, v / high if v >= 0 else -v / low)) for v in values]
    return [(round(255 * (1 - max(f, 0))), round(255 * (1 - abs(f))), round(255 * (1 + min(f, 0)))) for f in fade]


def _label(token: str) -> str:
    """A token as an axis shows it."""
    return token.strip() or repr(token)[1:-1]


def _labelled_png(tokens: Sequence[str], rows: Sequence[Sequence[float | None]]) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = 1.2 + 0.11 * len(tokens)
    figure = Figure(figsize=(size, size), dpi=96, layout="constrained")  # not pyplot's: nothing else shall show it
    axis = figure.add_subplot()
    axis.imshow(np.array([[0.0 if v is None else v for v in row] for row in rows]), cmap="Blues", vmin=0, vmax=1)
    labels = [_label(t).replace("$", r"\$") for t in tokens]
    axis.set_xticks(range(len(tokens)), labels, rotation=90, fontsize=6)
    axis.set_yticks(range(len(tokens)), labels, fontsize=6)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(light(buffer.getvalue())).decode()


def _sheet_png(heads: Sequence[Sequence[Sequence[float | None]]]) -> str:
    """Many patterns in miniature, from left to right and from top to bottom, ``SHEET`` in a row."""
    import matplotlib.image

    size = len(heads[0]) + 2
    values = np.full((-(-len(heads) // SHEET) * size, SHEET * size), 0.35)
    for i, head in enumerate(heads):
        y, x = i // SHEET * size, i % SHEET * size
        values[y : y + size - 2, x : x + size - 2] = [[0.0 if v is None else v for v in row] for row in head]
    scale = max(1, 960 // values.shape[1])  # Lab's sanitiser drops CSS scaling, so the pixels are real
    buffer = io.BytesIO()
    shades = np.clip(values, 0, 1).repeat(scale, 0).repeat(scale, 1)
    matplotlib.image.imsave(buffer, shades, cmap="Blues", vmin=0, vmax=1, format="png")
    return "data:image/png;base64," + base64.b64encode(light(buffer.getvalue())).decode()


def _fits(tokens: Sequence[str], pattern: Tensor, before: str, names: Sequence[str] | None = None) -> list[str]:
    """The tokens as a list; FigureError if the pattern is not [before, token, token], or has not a name for each head.

    ``before``: the dimensions in front, in words.
    """
    listed = [] if isinstance(tokens, str) else list(tokens)
    if not listed or not all(isinstance(token, str) for token in listed):
        raise FigureError(
            f"tokens is {tokens!r:.80}. Allowed: a list of at least one text, such as gb.attention gives."
        )
    shape, n, dims = tuple(getattr(pattern, "shape", ())), len(listed), len(before.split(", "))
    if len(shape) != dims + 2 or shape[-2:] != (n, n) or 0 in shape:
        raise FigureError(
            f"The pattern has shape {list(shape)}, but {n} tokens need [{before}, {n}, {n}]: remove a batch dimension "
            "(pattern[0]), choose one layer, or pass the tokens of the same prompt."
        )
    if names is not None and len(names) != shape[0]:
        raise FigureError(f"There are {len(names)} names for {shape[0]} heads. Give one for each.")
    return listed


def attention_heads(
    tokens: Sequence[str], pattern: Float[Tensor, "head dst src"], names: Sequence[str] | None = None
) -> Any:
    """circuitsvis' view of several heads: hover to zoom, click to lock. Scale 0 to 1.

    Raises FigureError if tokens, pattern and names do not fit.
    """
    from circuitsvis.attention import attention_heads as draw

    return draw(
        tokens=_fits(tokens, pattern, "heads", names),
        attention=pattern.detach().float().cpu(),
        attention_head_names=list(names) if names is not None else None,
        min_value=0.0,
        max_value=1.0,
    )


def all_heads(tokens: Sequence[str], pattern: Float[Tensor, "layer head dst src"]) -> Any:
    """Every head of the model in one circuitsvis figure, named layer.head. FigureError if the tokens do not fit.

    Two decimals of each weight: more can't be seen, and the figure would be a fifth heavier.
    """
    _fits(tokens, pattern, "layers, heads")
    layers, heads = pattern.shape[:2]
    names = [f"{layer}.{head}" for layer in range(layers) for head in range(heads)]
    return attention_heads(tokens, pattern.flatten(0, 1).float().round(decimals=2), names)


def colored_tokens(tokens: Sequence[str], values: Float[Tensor, " pos"], maximum: float | None = None) -> Any:
    """One value per token as background colour (blue positive, red negative).

    ``maximum``: the value of full colour; the largest without. FigureError if there is not a value for each token.
    """
    from circuitsvis.tokens import colored_tokens as draw

    if tuple(values.shape) != (len(tokens),) or len(tokens) == 0:
        raise FigureError(f"{len(tokens)} tokens but values of shape {list(values.shape)}: give one value per token.")
    if maximum is not None:
        number("maximum", maximum, FigureError, above=0)
    return draw(tokens=list(tokens), values=values.detach().float().cpu(), max_value=maximum)


# --- plots --------------------------------------------------------------------------------------------


def style() -> None:
    """The one look of all plots: small, light, colour-blind-safe, message in the title."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 3.6),
            "figure.dpi": 96,
            "savefig.dpi": 96,
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": cycler(color=PALETTE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.labelsize": 9,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "image.cmap": "viridis",
        }
    )


def forest(rows: Sequence[tuple[str, Interval | float, str]], label: str, title: str, at: float = 0.0) -> None:
    """One row a (name, interval, colour): a dot with its interval; for a plain number a grey bar on both sides of 0.

    ``at``: where the dashed line stands that the rows are compared with.
    """
    import matplotlib.pyplot as plt

    _, axis = plt.subplots(figsize=(7.5, 0.35 * len(rows) + 1.3))
    for i, (_, x, colour) in enumerate(rows):
        if isinstance(x, float):
            axis.barh(i, 2 * x, left=-x, color=colour, alpha=0.35, height=0.5)
        else:
            axis.errorbar(x.value, i, xerr=[[x.value - x.low], [x.high - x.value]], fmt="o", color=colour)
    axis.use_sticky_edges = False  # else a bar ends where the picture does
    axis.axvline(at, color="black", lw=0.8, ls="--")
    axis.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.set_title(title)
    plt.show()


def pattern_grid(
    tokens: Sequence[str], pattern: Float[Tensor, "head dst src"], names: Sequence[str], title: str, columns: int = 3
) -> Any:
    """Static twin of ``attention_heads``: one labelled heat map a head (query down, key across).

    Raises FigureError if tokens, pattern and names do not fit.
    """
    import matplotlib.pyplot as plt

    tokens = _fits(tokens, pattern, "heads", names)
    columns = min(columns, len(pattern))
    rows = -(-len(pattern) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 3.0 * rows), squeeze=False)
    ticks = range(len(tokens))
    labels = [_label(t).replace("$", r"\$") for t in tokens]
    for axis in axes.flat[len(pattern) :]:
        axis.axis("off")
    for axis, head, name in zip(axes.flat, pattern.detach().float().cpu(), names, strict=False):  # axes are left over
        axis.imshow(head, cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(ticks, labels, rotation=90, fontsize=6)
        axis.set_yticks(ticks, labels, fontsize=6)
        axis.set_title(name, fontsize=9)
    return titled(figure, title)


def thumbnails(pattern: Float[Tensor, "layer head dst src"], title: str) -> Any:
    """Static twin of ``all_heads``: every pattern in miniature, layers from top to bottom, heads left to right."""
    import matplotlib.pyplot as plt

    layers, heads, size = pattern.shape[:3]
    framed = np.full((layers * (size + 2), heads * (size + 2)), 0.35)
    for layer, head in itertools.product(range(layers), range(heads)):
        y, x = layer * (size + 2), head * (size + 2)
        framed[y : y + size, x : x + size] = pattern[layer, head].detach().float().cpu()
    figure, axis = plt.subplots(figsize=(5.2, 5.2 * min(layers / heads, 2.2) + 0.4))
    axis.imshow(framed, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axis.set_xticks((np.arange(heads) + 0.5) * (size + 2), [str(i) for i in range(heads)])
    shown = range(0, layers, max(1, layers // 10))
    axis.set_yticks((np.array(shown) + 0.5) * (size + 2), [str(i) for i in shown])
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    axis.set_title(title)
    return figure


def mosaic(
    values: Mapping[str, Float[Tensor, "layer head"]],
    title: str,
    label: str,
    diverging: bool = False,
    limit: float | None = None,
) -> Any:
    """Layer x head heat maps side by side, one for each named score: an atlas of the model's heads.

    ``limit``: the value of the last colour in every map, so that they can be compared; without, each has its own.
    """
    import matplotlib.pyplot as plt

    if not values or any(scores.ndim != 2 or 0 in scores.shape for scores in values.values()):
        shapes = {name: list(scores.shape) for name, scores in values.items()}
        raise FigureError(f"There are scores of shape {shapes}. Allowed: at least one table [layers, heads].")
    if limit is not None:
        number("limit", limit, FigureError, above=0)
    figure, axes = plt.subplots(1, len(values), figsize=(1.0 + 1.75 * len(values), 4.8), squeeze=False, sharey=True)
    for axis, (name, scores) in zip(axes.flat, values.items(), strict=True):
        array = scores.detach().float().cpu().numpy()
        top = float(np.nanmax(np.abs(array))) if limit is None else limit
        colours, low = ("RdBu_r", -top) if diverging else ("viridis", 0.0)
        image = axis.imshow(array, aspect="auto", origin="upper", cmap=colours, vmin=low, vmax=top)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("head")
        axis.set_xticks(range(0, array.shape[1], max(1, array.shape[1] // 6)))
        bar = figure.colorbar(image, ax=axis, orientation="horizontal", pad=0.02, shrink=0.9)
        bar.ax.tick_params(labelsize=6)
        bar.set_label(label, fontsize=7)
    axes[0, 0].set_ylabel("layer")
    return titled(figure, title)
