"""Pictures of notebook 03: each takes what was measured and a title that says what it shows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core.corpora import Document, Rows
from glassbox_utils.core.devices import array
from glassbox_utils.core.figures import BLUE, GREY, ORANGE, SKY, titled
from glassbox_utils.core.models import Model
from glassbox_utils.core.statistics import bootstrap_ci
from glassbox_utils.core.text import str_tokens
from glassbox_utils.saes.dashboard import example_html
from glassbox_utils.saes.features import Example

KINDS = {
    "main": "features of the SAE", "trained": "features of small SAEs",
    "frozen": "small SAEs, decoder frozen at random",
    "pca": "strongest principal components", "random_sae": "SAE that was never trained",
    "random": "random directions", "coordinates": "coordinates of the stream",
    "pca_any": "principal components of any rank", "neurons": "neurons of the MLP (another space)",
}  # fmt: skip
"""how the notebook's and the studies' kinds of units are called, in the order in which they are drawn"""


def arrows(weights: Float[Tensor, "model 2 concept"], names: Sequence[str], title: str) -> Any:
    """Concepts as arrows in two dimensions, one panel a model."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(weights), figsize=(2.3 * len(weights), 2.7), squeeze=False)
    limit = 1.15 * float(weights.norm(dim=1).max())
    for axis, mine, name in zip(axes.flat, weights, names, strict=True):
        for i, (x, y) in enumerate(array(mine).T):
            axis.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": BLUE, "lw": 1.8})
            axis.text(1.1 * x, 1.1 * y, "ABCDEFGHIJKLMNOPQRST"[i], fontsize=8, ha="center", va="center")
        axis.plot([0], [0], ".", color=GREY)
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal", title=name)
        axis.set_xlabel("first number")
    axes[0, 0].set_ylabel("second number")
    return titled(figure, title)


def recovered(presence: Sequence[float], found: Mapping[str, Float[Tensor, "seed model"]], title: str) -> Any:
    """How well concepts are found again for each probability of presence: mean, and every seed."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.0))
    for (name, values), colour in zip(found.items(), (BLUE, ORANGE, GREY), strict=False):
        axis.plot(presence, values.mean(0).tolist(), "-o", color=colour, label=name)
        for row in values.tolist():
            axis.plot(presence, row, ".", color=colour, alpha=0.4)
    axis.set_xscale("log")
    axis.set_xticks(list(presence), [f"{p:g}" for p in presence], minor=False)
    axis.minorticks_off()
    axis.set(xlabel="probability that a concept is present", ylabel="correlation with the best unit", ylim=(0, 1.03))
    axis.legend(loc="lower left")
    return titled(figure, title)


def training(history: Sequence[tuple[int, float]], others: Mapping[str, float], title: str) -> Any:
    """Explained variance on text that is not trained on, step by step, with what others reach as lines."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 2.8))
    axis.plot(*zip(*history, strict=True), "-o", color=BLUE, markersize=3, label="SAE, trained here")
    for (name, value), colour in zip(others.items(), (ORANGE, GREY), strict=False):
        axis.axhline(value, color=colour, linestyle="--", label=name)
    axis.set(xlabel="step", ylabel="explained variance, held-out text", ylim=(min(0, history[0][1]), 1))
    axis.legend(loc="lower right")
    return titled(figure, title)


def losses(rows: Mapping[str, Mapping[str, float]], whole: float, mean: float, title: str) -> Any:
    """Loss of the model with each reconstruction at ordinary positions and at all, beside the model as it is."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.6, 0.9 + 0.55 * len(rows)))
    for place, values in enumerate(reversed(list(rows.values()))):
        for shift, (where, value), colour in zip((0.2, -0.2), values.items(), (SKY, ORANGE), strict=True):
            axis.barh(place + shift, value, height=0.38, color=colour, label=None if place else where)
            axis.text(value + 0.1, place + shift, f"{value:.2f}", va="center", fontsize=8)
    axis.axvline(whole, color=BLUE, lw=1.2, label=f"the model as it is, {whole:.2f}")
    axis.axvline(mean, color=GREY, lw=1.2, linestyle=":", label=f"the mean at ordinary positions, {mean:.2f}")
    axis.set_yticks(range(len(rows)), list(reversed(list(rows))))
    axis.set_xlabel("loss on held-out text, nats per token")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return titled(figure, title)


def meanings(
    units: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
    here: Mapping[str, Sequence[Mapping[str, float]]],
    scores: Mapping[str, tuple[str, float]],
    title: str,
) -> Any:
    """Each kind of unit under each score: mean and interval over units, the seeds' means, and what was measured live.

    ``units``: kind -> seed -> unit -> score, of the study. ``scores``: name -> its title, and what chance gives.
    """
    import matplotlib.pyplot as plt

    kinds = [kind for kind in KINDS if units.get(kind) or here.get(kind)]
    figure, axes = plt.subplots(1, len(scores), figsize=(2.6 + 2.2 * len(scores), 3.4), sharey=True, squeeze=False)
    for axis, (score, (name, chance)) in zip(axes.flat, scores.items(), strict=True):
        for place, kind in enumerate(reversed(kinds)):
            parts, colour = (
                [[u[score] for u in part] for part in units.get(kind, ())],
                ORANGE if kind == "main" else BLUE,
            )
            seeds = [np.mean(part) for part in parts if part]
            values = [v for part in (parts[:1] if kind == "pca" else parts) for v in part]  # the same under every seed
            axis.plot(seeds, [place] * len(seeds), "|", color=GREY, markersize=9)
            if len(values) > 1:
                ci = bootstrap_ci(values)
                axis.plot([ci.low, ci.high], [place] * 2, color=colour, lw=1.6)
                axis.plot(ci.value, place, "o", color=colour, markersize=5)
            if here.get(kind):
                axis.plot(np.mean([u[score] for u in here[kind]]), place, "x", color="black", markersize=6)
        axis.axvline(chance, color=GREY, lw=0.8, linestyle=":")
        axis.set_title(name)
    axes[0, 0].set_yticks(range(len(kinds)), [KINDS[kind] for kind in reversed(kinds)])
    figure.supxlabel("dot: study, mean and 95 % interval over units; bars: its seeds; cross: here; dotted: chance",
                     fontsize=9)  # fmt: skip
    return titled(figure, title)


def top_texts(
    model: Model, rows: Rows, documents: Sequence[Document], values: Float[Tensor, " n"], n: int = 6, context: int = 7
) -> list[Example]:
    """The texts around the strongest values of a unit (one value a token, flat), one from each document."""
    width, chosen, used = rows.tokens.shape[1], list[Example](), set[int]()
    table = values.view(rows.tokens.shape)
    order = values.argsort(descending=True)
    for rank, flat in enumerate(order[: int((values > 0).sum())].tolist()):
        row, pos = divmod(flat, width)
        owner = int(rows.documents[row, pos])
        if owner in used or owner < 0:
            continue
        used.add(owner)
        span = slice(max(1, pos - context), min(width, pos + context + 1))
        tokens, document = str_tokens(model, rows.tokens[row, span]), documents[owner]
        strength = table[row, span].tolist()
        chosen.append(
            Example(tokens, strength, pos - span.start, 1 - rank / len(order), document.source, document.licence)
        )
        if len(chosen) == n:
            break
    return chosen


def side_by_side(columns: Mapping[str, Sequence[Example]]) -> str:
    """Units beside each other with their strongest texts, as HTML: darker is stronger, the chosen token underlined."""
    cells = []
    for title, texts in columns.items():
        most = max([max(e.values) for e in texts], default=1.0)
        lines = "".join(example_html(e, most) for e in texts)
        cells.append(f'<td style="vertical-align:top;text-align:left;width:50%"><b>{title}</b>{lines}</td>')
    return f'<table style="width:100%"><tr>{"".join(cells)}</tr></table>'


def plain(example: Example) -> str:
    """A text in one line, the chosen token in brackets."""
    tokens = [f"[{t}]" if i == example.peak else t for i, t in enumerate(example.tokens)]
    return "".join(tokens).replace("\n", " ").strip()
