"""Pictures and tables of the full cycle: twins whose answers differ, looked at against moved, the path of a gap, the
arms. Each is drawn from what was measured; its title is computed."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from torch import Tensor

from glassbox_utils.core.figures import BLUE, GREEN, GREY, ORANGE, PALETTE, RED
from glassbox_utils.core.labels import name_points
from glassbox_utils.core.statistics import Interval
from glassbox_utils.decisions import arms, units
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.locate import Link, Point, Specificity
from glassbox_utils.decisions.outcomes import Outcome
from glassbox_utils.decisions.pairs import PLACES, Pairs
from glassbox_utils.decisions.units import Attribution


def shown(figure: Any, alt: str) -> None:
    """Display a figure once, with a text for those who do not see it."""
    import matplotlib.pyplot as plt
    from IPython.display import display

    display(figure, metadata={"image/png": {"alt": alt}})
    plt.close(figure)


def goes_on(why: str) -> bool:
    """Nothing stands against the next step (``why`` is empty); else say what does."""
    if why:
        print(why)
    return not why


def framed(page: str) -> dict[str, str]:
    """A page inside the notebook's page, as what ``display(..., raw=True)`` takes."""
    frame = f'<iframe title="The page for the file" style="width:100%;height:520px" srcdoc="{escape(page)}"></iframe>'
    return {"text/html": frame, "text/plain": "the page for the file"}


def carriers(own: Case, donor: Case) -> tuple[str, str]:
    """What twins differ in, as words: two names, or two districts."""
    names = [name for name in own.values if own[name] != donor[name]]
    first, second = (" / ".join(str(one[name]) for name in names) or own.id for one in (own, donor))
    return first, second


def twins_table(some: Pairs, own: Tensor, donor: Tensor, seed: int, n: int = 8) -> Any:
    """Some pairs of names, drawn at random: what either is answered, with the score in logits."""
    import pandas as pd

    said = lambda x: f"{some.answers[int(x < 0)].strip()} ({x:+.1f})"  # noqa: E731
    drawn = np.random.default_rng(seed).permutation(len(some))[:n].tolist()
    rows = [(*carriers(some.twins[i].own, some.twins[i].donor), said(own[i]), said(donor[i])) for i in drawn]
    return pd.DataFrame(rows, columns=["her name", "his", "she", "he"])


def draw_twins(
    some: Sequence[tuple[Case, Case]], own: Tensor, donor: Tensor, which: int, answers: tuple[str, str]
) -> Any:
    """Each case as itself and as its twin: two dots on one line, the decision between them at 0; one in bold."""
    import matplotlib.pyplot as plt

    names, a, b = [carriers(*pair) for pair in some], np.array(own), np.array(donor)
    order = list(np.argsort(a))
    figure, axis = plt.subplots(figsize=(7.0, 0.9 + 0.17 * len(order)))
    for y, i in enumerate(order):
        axis.plot([a[i], b[i]], [y, y], color="black" if i == which else GREY, lw=3 if i == which else 1, zorder=1)
    turned = int(((a > 0) != (b > 0)).sum())
    axis.scatter(a[order], range(len(order)), color=BLUE, s=16, zorder=2, label="as it is")
    axis.scatter(
        b[order], range(len(order)), color=ORANGE, s=16, zorder=2, label="under the other name, all else the same"
    )
    axis.set_yticks(range(len(order)), [" → ".join(names[i]) for i in order], fontsize=6.5)
    axis.get_yticklabels()[order.index(which)].set_fontweight("bold")
    axis.axvline(0, color="black", lw=0.8)
    good, bad = (word.strip() for word in answers)
    axis.set_xlabel(f"← {bad}      logit({good}) - logit({bad})      {good} →")
    axis.set_title(f"{turned} of {len(order)} decisions turn under the other name; {names[which][0]} in bold")
    axis.legend(loc="lower right")
    return figure


def draw_fields(names: Sequence[str], looked: Sequence[float], moved: Sequence[float]) -> Any:
    """Attention to each field beside how far the decision moves when that field has another value of the sample."""
    import matplotlib.pyplot as plt

    order = list(np.argsort(moved))
    figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.9), sharey=True)
    most = names[int(np.argmax(looked))], names[int(np.argmax(moved))]
    for axis, values, label, top in zip(
        axes, (looked, moved), ("share of the attention to the fields", "logits by which another value moves it"),
        most, strict=True,
    ):  # fmt: skip
        axis.barh([names[i] for i in order], [values[i] for i in order],
                  color=[RED if names[i] == top else BLUE for i in order])  # fmt: skip
        axis.set_xlabel(label)
    axes[0].set_title(f"it looks at {most[0]} most")
    axes[1].set_title(f"{most[1]} moves it most")
    return figure


def draw_parts(layers: Sequence[float], heads: Sequence[float], layer: int) -> Any:
    """Share of one pair's gap that the heads of each layer carry together, and those of one layer one by one."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7.4, 2.6), sharey=True, width_ratios=(2.2, 1))
    axes[0].bar(range(len(layers)), layers, color=[RED if i == layer else BLUE for i in range(len(layers))])
    axes[0].set_xlabel("layer (all its heads patched)")
    axes[0].set_ylabel("share of this pair's gap")
    best = int(np.argmax(heads))
    axes[1].bar(range(len(heads)), heads, color=[RED if i == best else BLUE for i in range(len(heads))])
    axes[1].set_xlabel(f"head of layer {layer} (patched alone)")
    axes[0].set_title(f"the heads of layer {layer} bring {layers[layer]:.0%} of it")
    axes[1].set_title(f"head {layer}.{best}: {heads[best]:.0%}")
    for axis in axes:
        axis.axhline(0, color=GREY, lw=0.5)
    return figure


def carried_table(points: Sequence[Point], ks: Sequence[int] = (1, 10)) -> Any:
    """What the first k units of each basis carry, what is left without them, and each draw of as many random ones."""
    import pandas as pd

    rows = [
        {
            "units": f"{p.k} {p.basis if p.k > 1 else p.basis.removesuffix('s')}",
            "carried": _said(p.carried, 2),
            "left": _said(p.left, 2),
            "carried by random ones": " and ".join(f"{x + 0.0:.2f}" for x in p.random_carried),
            "their activity, times": f"{p.likeness:.1f}",
        }
        for p in points
        if p.k in ks
    ]
    return pd.DataFrame(rows, columns=None if rows else ["units"]).set_index("units")


# --- the path -----------------------------------------------------------------------------------------


def draw_path(links: Sequence[Link], found: Mapping[str, Attribution], carrier: str, k: int = 10) -> Any:
    """The way of a gap from the changed value to the decision: places from left to right, depth upwards.

    Bands: the share that the residual stream carries at each place after each layer. Signs: the first k heads and
    neurons where each does most, as large as its effect by attribution (a guess); an arrow for each head that acts at a
    later place, from layers where a quarter of the gap is still at the first.
    """
    import matplotlib.pyplot as plt

    columns = {place: i for i, place in enumerate(PLACES)}
    names = {"carrier": f"the {carrier}'s tokens", "between": "tokens between", "decision": "decision"}
    figure, axis = plt.subplots(figsize=(7.0, 4.6))
    streams = [x for x in links if x.what == "stream"]
    layers = sorted({x.layer for x in streams if x.layer is not None})
    share = {(x.layer, x.place): x.carried.value for x in streams}
    for place, x in columns.items():
        width = [max(0.0, share[layer, place]) * 0.32 for layer in layers]
        axis.fill_betweenx(layers, [x - w for w in width], [x + w for w in width], color=BLUE, alpha=0.22, lw=0)
        axis.plot([x, x], [layers[0], layers[-1]], color=GREY, lw=0.5)
    named: list[tuple[tuple[float, float], str, float]] = []
    markers, arrows = list[tuple[tuple[float, float], float]](), list[tuple[tuple[float, float], tuple[float, float]]]()
    for name, colour, marker, side in (("heads", RED, "s", -1), ("neurons", GREEN, "o", 1)):
        order = units.ranked(found[name], k) if name in found else []
        for i, (unit, place) in enumerate(zip(order, arms.places_of(found[name], order) if order else (), strict=True)):
            at = list(found[name].space.layers).index(unit[0])
            effect = float(found[name].effect[:, at, unit[1]].sum()) / found[name].gap
            across = columns[place] + side * (0.09 + 0.075 * (i % 5))
            label, area = f"{len(order)} {name}" if i == 0 else None, 22 + 320 * abs(effect)
            axis.scatter(across, unit[0], s=area, color=colour, marker=marker, label=label, alpha=0.7,
                         zorder=3, edgecolor="white")  # fmt: skip
            markers.append(((across, unit[0]), area**0.5 / 2))
            named += [((across, unit[0]), f"{unit[0]}.{unit[1]}", area**0.5 / 2)] if i < 3 else []
            below = share[max([x for x in layers if x < unit[0]] or layers[:1]), "carrier"]
            if (
                name == "heads" and columns[place] > 0 and abs(effect) > 0.03 and below >= 0.25
            ):  # else what would it read?
                arrow = {"arrowstyle": "->", "color": colour, "lw": 0.8 + 5 * abs(effect)}
                axis.annotate("", (across, unit[0]), (0.04, unit[0]), zorder=2, arrowprops=arrow)
                arrows.append(((0.04, unit[0]), (across, unit[0])))
    axis.set_xticks(range(len(PLACES)), [names[place] for place in PLACES])
    axis.set_xlim(-0.6, len(PLACES) - 0.4)
    places, labels, radii = [at for at, _, _ in named], [name for _, name, _ in named], [r for *_, r in named]
    name_points(axis, places, labels, radii, 7.5, markers, arrows)
    axis.set_ylabel("layer")
    axis.set_title(_path_title(share, layers, carrier))
    axis.legend(loc="lower right", markerscale=0.5, title="band: share of the gap in the stream", title_fontsize=8)
    return figure


def _path_title(share: Mapping[Any, float], layers: Sequence[int], carrier: str) -> str:
    late = [layer for layer in layers if share[layer, "carrier"] >= 0.5]
    there = [layer for layer in layers if share[layer, "decision"] >= 0.5]
    stays = f"most of the gap is at the {carrier} up to layer {late[-1]}" if late else f"little is at the {carrier}"
    return f"{stays}, " + (f"at the decision from layer {there[0]} on" if there else "and never half at the decision")


def frozen_table(links: Sequence[Link]) -> Any:
    """What units carry that are patched at the carrier, and what they still carry while later units are frozen."""
    import pandas as pd

    free = {x.what: x.carried for x in links if x.frozen is None and x.place == "carrier" and x.what != "stream"}
    rows = [
        {
            "patched at the name": x.what,
            "carries": _said(free[x.what], 2),
            "frozen meanwhile": x.frozen,
            "carries then": _said(x.carried, 2),
        }
        for x in links
        if x.frozen
    ]
    return pd.DataFrame(rows)


def specificity_table(own: Sequence[Specificity], rows: Sequence[Specificity]) -> Any:
    """What the units of each basis carry of their own gap (first row), and of every other effect, with the verdict.

    *clusters*: what was resampled, such as pairs of names.
    """
    import pandas as pd

    found: dict[str, dict[str, str]] = {}
    for r in [*own, *rows]:
        said = "no effect to carry" if r.carried is None else _said(r.carried, 2)
        said += "" if r in own or r.carried is None else f" {r.verdict}"
        effect = {"effect, logits": f"{r.effect.value:+.1f}", "clusters": str(r.effect.n)}
        found.setdefault(r.what, effect)[f"{r.k} {r.basis} carry"] = said
    return pd.DataFrame.from_dict(found, orient="index")


# --- the arms -----------------------------------------------------------------------------------------


def arms_table(found: Mapping[str, Outcome], costs: Mapping[str, Interval], moved: Mapping[str, Interval]) -> Any:
    """What each arm does to decisions and to ordinary text; two numbers are those of the two groups. ``costs``,
    ``moved``: as ``arms.prices`` gives them."""
    import pandas as pd

    rows = []
    for name, one in found.items():
        cost = costs.get(name)
        rows.append({
            "arm": name,
            "gap, points": _said(one.gap, 0), "gap, logits": _said(one.logits, 2),
            "approved %": _two(one.approved), "of the undeserving": _two(one.wrongly_approved),
            "right": f"{one.merit.value:.2f}", "perplexity ×": "–" if cost is None else _said(cost, 2),
            "KL, nats": _said(moved[name], 2) if name in moved else "–",
        } | ({} if one.decides else {"decides": "no"}))  # fmt: skip
    return pd.DataFrame(rows).set_index("arm")


def _said(x: Interval, digits: int) -> str:
    return f"{x.value + 0.0:.{digits}f} [{x.low + 0.0:.{digits}f}, {x.high + 0.0:.{digits}f}]"


def _two(shares: tuple[float, float]) -> str:
    return " / ".join("–" if np.isnan(x) else f"{100 * x:.0f}" for x in shares)


def draw_arms(found: Mapping[str, Outcome], moved: Mapping[str, Interval], plain: str = "as it is") -> Any:
    """The gap that each arm leaves, and how much it changes on ordinary text when it is left on (``arms.prices``)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7.8, 0.9 + 0.32 * len(found)), sharey=True, width_ratios=(1.4, 1))
    for y, (name, one) in enumerate(found.items()):
        colour = RED if name == plain else GREY if "random" in name else BLUE
        for axis, x in zip(axes, (one.logits, moved.get(name)), strict=True):
            if x is not None:
                bar = [[max(0.0, x.value - x.low)], [max(0.0, x.high - x.value)]]
                axis.errorbar(x.value, y, xerr=bar, fmt="o", color=colour, ms=5)
    axes[0].set_yticks(range(len(found)), list(found))
    axes[0].invert_yaxis()
    axes[0].axvline(0, color="black", lw=0.7)
    axes[1].axvline(0, color="black", lw=0.7)
    axes[0].set_xlabel("gap that is left, logits")
    axes[1].set_xlabel("KL on ordinary text, nats a token")
    quarter = abs(found[plain].logits.value) / 4
    closing = [name for name, one in found.items() if abs(one.logits.value) < quarter and name != plain]
    axes[0].set_title(f"{len(closing)} of {len(found) - 1} arms leave less than a quarter of the gap (grey: random)")
    return figure


def draw_pushed(moves: Mapping[tuple[str, str, float], Tensor]) -> Any:
    """Logits by which a pushed-in difference moves decisions under each arm (line), and a random vector (dotted).

    ``moves``: (arm, "difference" or "random", strength) -> logits of each pair, the first arm before the mend.
    """
    import matplotlib.pyplot as plt

    names, strengths = list(dict.fromkeys(name for name, _, _ in moves)), sorted({s for _, _, s in moves})
    mean = {key: float(x.mean()) for key, x in moves.items()}
    figure, axis = plt.subplots(figsize=(6.0, 2.8))
    for name, colour in zip(names, PALETTE, strict=False):
        axis.plot(
            strengths, [mean[name, "difference", s] for s in strengths], color=colour, marker="o", ms=4, label=name
        )
        axis.plot(strengths, [mean[name, "random", s] for s in strengths], color=colour, ls=":", marker="_")
    axis.axhline(0, color="black", lw=0.6)
    axis.set_xlabel("times the groups' difference, pushed in at the name")
    axis.set_ylabel("logits")
    first, last = (mean[name, "difference", strengths[-1]] for name in (names[0], names[-1]))
    times = f"{strengths[-1]:g} times the difference"
    axis.set_title(f"{times} moves {first:+.2f} logits before the mend, {last:+.2f} after (dotted: random)")
    axis.legend()
    return figure
