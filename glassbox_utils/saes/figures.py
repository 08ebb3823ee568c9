"""Pictures of notebook 03. Each takes what was measured and says in its title what that shows, on any model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.core.corpora import Document, Rows
from glassbox_utils.core.devices import array
from glassbox_utils.core.figures import BLUE, GREY, ORANGE, SKY, titled
from glassbox_utils.core.labels import name_points
from glassbox_utils.core.models import Model
from glassbox_utils.core.tables import frame
from glassbox_utils.core.text import str_tokens
from glassbox_utils.saes.comparing import Gap, interval
from glassbox_utils.saes.dashboard import example_html
from glassbox_utils.saes.features import Example
from glassbox_utils.saes.tables import KINDS, SCORES
from glassbox_utils.saes.toys import geometry


def arrows(squeeze: Float[Tensor, "toy 2 concept"], presence: Sequence[float]) -> Any:
    """Concepts as arrows in two dimensions, one panel for each probability of presence."""
    import matplotlib.pyplot as plt

    found = geometry(squeeze[None])
    figure, axes = plt.subplots(1, len(squeeze), figsize=(2.3 * len(squeeze), 2.7), squeeze=False)
    limit = 1.25 * float(squeeze.norm(dim=1).max())
    kept, opposite = found.kept[0].tolist(), found.opposite[0].tolist()
    for axis, mine, p, long, against in zip(axes.flat, squeeze, presence, kept, opposite, strict=True):
        tips = array(mine).T
        for x, y in tips:
            axis.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": BLUE, "lw": 1.8})
        axis.plot([0], [0], ".", color=GREY)
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[], aspect="equal")
        groups = _together(tips, 0.12 * limit)
        ends = [tuple(tips[near].mean(0).tolist()) for near in groups]
        names = [", ".join("ABCDEFGHIJKLMNOPQRST"[i] for i in near) for near in groups]
        name_points(axis, ends, names, 2, 8, arrows=[((0.0, 0.0), tuple(tip)) for tip in tips.tolist()])
        axis.set_title(f"p = {p:g}: {long} long,\n{against} pair{'s' if against != 1 else ''} opposite", fontsize=9)
        axis.set_xlabel("first number")
    axes[0, 0].set_ylabel("second number")
    every = ", ".join(f"{p:g}" for p, long in zip(presence, kept, strict=True) if long == squeeze.shape[2])
    return titled(figure, f"{squeeze.shape[2]} concepts in two numbers: all have a long arrow at p = {every or 'none'}")


def _together(points: NDArray, distance: float) -> list[list[int]]:
    """Numbers of the points, those that lie near the first of a group in one group."""
    groups: list[list[int]] = []
    for i, point in enumerate(points):
        mine = next((g for g in groups if np.linalg.norm(points[g[0]] - point) < distance), None)
        if mine is None:
            groups.append([i])
        else:
            mine.append(i)
    return groups


def recovered(presence: Sequence[float], found: Mapping[str, Float[Tensor, "seed toy concept"]]) -> Any:
    """How well concepts are found again for each probability of presence: mean, and every seed.

    ``found``: the one that the title is about comes first, then its opponent, then others.
    """
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.0))
    means = {name: values.mean(-1) for name, values in found.items()}
    for (name, values), colour in zip(means.items(), (BLUE, ORANGE, GREY), strict=False):
        axis.plot(presence, values.mean(0).tolist(), "-o", color=colour, label=name)
        for row in values.tolist():
            axis.plot(presence, row, ".", color=colour, alpha=0.4)
    axis.set_xscale("log")
    axis.set_xticks(list(presence), [f"{p:g}" for p in presence], minor=False)
    axis.minorticks_off()
    axis.set(xlabel="probability that a concept is present", ylabel="correlation with the best unit", ylim=(0, 1.03))
    axis.legend(loc="lower left")
    (mine, ours), (other, theirs) = list(means.items())[:2]
    gaps = (ours - theirs).mean(0).tolist()
    said = ", ".join(f"{gap:+.2f} at {p:g}" for p, gap in sorted(zip(presence, gaps, strict=True)))
    return titled(figure, f"Correlation of the {mine} minus that of {other}, by p: {said}")


def training(history: Sequence[tuple[int, float]], others: Mapping[str, float]) -> Any:
    """Explained variance on text that is not trained on, step by step, with what others reach as lines."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 2.8))
    axis.plot(*zip(*history, strict=True), "-o", color=BLUE, markersize=3, label="SAE, trained here")
    for (name, value), colour in zip(others.items(), (ORANGE, GREY), strict=True):
        axis.axhline(value, color=colour, linestyle="--", label=name)
    axis.set(xlabel="step", ylabel="explained variance", ylim=(min(0, history[0][1]), 1))
    axis.legend(loc="lower right")
    said = ", ".join(f"{name} {value:.2f}" for name, value in others.items())
    return titled(
        figure, f"Held-out text after {history[-1][0]} steps: {history[-1][1]:.2f} of the variance explained; {said}"
    )


def losses(cost: Mapping[tuple[str, str], Float[Tensor, " row"]], whole: float, mean: float) -> Any:
    """Loss of the model with each reconstruction at ordinary positions and at all, beside the model as it is.

    ``cost``: (tool, place) -> loss of each row. ``whole``, ``mean``: of the unchanged model, and with the mean.
    """
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(tool for tool, _ in cost))
    places = {"ordinary positions": "at ordinary positions", "everywhere": "everywhere"}
    figure, axis = plt.subplots(figsize=(6.6, 0.9 + 0.55 * len(names)))
    for y, name in enumerate(reversed(names)):
        for shift, place, colour in zip((0.2, -0.2), places, (SKY, ORANGE), strict=True):
            value = float(cost[name, place].mean())
            axis.barh(y + shift, value, height=0.38, color=colour, label=None if y else f"put in {places[place]}")
            axis.text(value + 0.1, y + shift, f"{value:.2f}", va="center", fontsize=8)
    axis.axvline(whole, color=BLUE, lw=1.2, label=f"the model as it is, {whole:.2f}")
    axis.axvline(mean, color=GREY, lw=1.2, linestyle=":", label=f"the mean at ordinary positions, {mean:.2f}")
    axis.set_yticks(range(len(names)), list(reversed(names)))
    axis.set_xlabel("loss on held-out text, nats per token")
    axis.margins(x=0.08)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    rise = [float(cost[names[0], place].mean()) - whole for place in places]
    return titled(figure, f"At ordinary positions the {names[0]} costs {rise[0]:.2f} nats, everywhere {rise[1]:.2f}")


def meanings(
    study: Mapping[str, Any],
    here: Mapping[str, Sequence[Mapping[str, float]]],
    differences: Mapping[tuple[str, str], Mapping[str, Gap]],
) -> Any:
    """Each kind of unit under each score: mean and interval, the seeds' means, and what was measured live.

    ``study``: the table ``sae_meaning``; ``differences``: what ``tables.differences`` says of it.
    """
    import matplotlib.pyplot as plt

    units = study["units"]
    kinds = [kind for kind in KINDS if units.get(kind) or here.get(kind)]
    figure, axes = plt.subplots(1, len(SCORES), figsize=(2.6 + 2.2 * len(SCORES), 3.6), sharey=True, squeeze=False)
    for axis, (score, (name, chance)) in zip(axes.flat, SCORES.items(), strict=True):
        for place, kind in enumerate(reversed(kinds)):
            seeds = [np.mean([u[score] for u in part]) for part in units.get(kind, ()) if part]
            axis.plot(seeds, [place] * len(seeds), "|", color=GREY, markersize=9)
            if ci := interval(units, kind, score):
                colour = ORANGE if kind == "main" else BLUE
                axis.plot([ci.low, ci.high], [place] * 2, color=colour, lw=1.6)
                axis.plot(ci.value, place, "o", color=colour, markersize=5)
            if here.get(kind):
                axis.plot(np.mean([u[score] for u in here[kind]]), place, "x", color="black", markersize=6)
        axis.axvline(chance, color=GREY, lw=0.8, linestyle=":")
        axis.set_title(name)
        axis.set_xlabel("share of strangers found" if score == "intruder" else "area under the curve")
    axes[0, 0].set_yticks(range(len(kinds)), [KINDS[kind] for kind in reversed(kinds)])
    figure.supxlabel("dot: study, mean and 95 % interval; bars: its seeds; cross: here; dotted: chance",
                     fontsize=9)  # fmt: skip
    ahead = {
        pair: sum(gap.clear and gap.interval.low > 0 for gap in by_score.values())
        for pair, by_score in differences.items()
    }
    behind = sum(gap.clear and gap.interval.high < 0 for gap in differences.get(("main", "pca"), {}).values())
    others = {"neurons": "neurons", "random": "random directions", "random_sae": "an SAE never trained"}
    said = ", ".join(f"{name} in {ahead['main', kind]}" for kind, name in others.items() if ("main", kind) in ahead)
    small = ahead.get(("trained", "frozen"), 0)
    return titled(
        figure,
        f"After Holm, of {len(SCORES)} scores features are ahead of {said}, behind the strongest principal components "
        f"in {behind}; small SAEs are ahead of their frozen twins in {small}",
    )


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


def extremes(
    model: Model,
    rows: Rows,
    documents: Sequence[Document],
    units: Mapping[str, tuple[Sequence[Mapping[str, float]], Float[Tensor, "n unit"]]],
) -> str:
    """The best of the first kind of unit beside the worst of the second, and below the other way round, as HTML.

    ``units``: name -> (scores of its units, their values at every token, flat); best and worst by ``words_top``.
    """
    tables = []
    for ends in ((-1, 0), (0, -1)):
        columns = {}
        for (name, (scores, values)), end in zip(units.items(), ends, strict=True):
            if not scores:
                continue
            one = sorted(scores, key=lambda u: u["words_top"])[end]
            title = f"{'best' if end else 'worst'} {name}: {one['words_top']:.2f}"
            columns[title] = top_texts(model, rows, documents, values[:, int(one["unit"])])
        tables.append(side_by_side(columns))
    return "".join(tables)


def some(
    model: Model,
    rows: Rows,
    documents: Sequence[Document],
    units: Sequence[Mapping[str, float]],
    values: Float[Tensor, "n unit"],
    names: Sequence[int],
) -> Any:
    """The first units of a drawn list with their score and strongest text, the strongest token in brackets."""
    table = [
        {
            "feature": names[int(u["unit"])],
            "strongest activity": f"{u['words_top']:.2f}",
            "strongest text": plain(top_texts(model, rows, documents, values[:, int(u["unit"])], n=1)[0]),
        }
        for u in units
    ]
    return frame(table)


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
