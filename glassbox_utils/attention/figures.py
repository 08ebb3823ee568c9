"""Pictures of notebook 01: each takes what was measured and a title that says what it shows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.attention.looking import PREDICTORS, Lookers, Looking
from glassbox_utils.attention.patterns import head_name, top_heads
from glassbox_utils.core.devices import array
from glassbox_utils.core.figures import BLUE, GREY, ORANGE, SKY, titled
from glassbox_utils.core.interventions import Head
from glassbox_utils.core.statistics import Interval


def _error(axis: Any, place: float, value: Interval, colour: str, marker: str = "o", **options: Any) -> None:
    """A dot with its interval, lying."""
    axis.errorbar(
        value.value,
        place,
        xerr=[[max(0.0, value.value - value.low)], [max(0.0, value.high - value.value)]],
        color=colour,
        marker=marker,
        markersize=5,
        lw=1.2,
        linestyle="none",
        **options,
    )


def both_orders(
    looks: Float[Tensor, "order noun"], nouns: tuple[str, str], pronoun: str, others: Float[Tensor, "2 layer head"],
    title: str,
) -> Any:  # fmt: skip
    """Left: mean over heads for one sentence and with its nouns exchanged. Right: every head on other pairs of nouns,
    how much it follows the order (recency) and how much the word (identity)."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.2), width_ratios=(1, 1.2))
    for i, (noun, colour) in enumerate(zip(nouns, (BLUE, ORANGE), strict=True)):
        places = [1.5 - 3 * order + (0.42 if (order == 0) == (i == 0) else -0.42) for order in (0, 1)]
        left.barh(places, looks[:, i].tolist(), height=0.75, color=colour, label=noun)
    orders = [(nouns[0], nouns[1]), (nouns[1], nouns[0])]
    left.set_yticks([1.5, -1.5], [f"… {a} …\n… {b} …\n… {pronoun}" for a, b in orders])
    left.set_xlabel(f"attention from “{pronoun}”, mean over heads")
    left.set_title("one sentence, and its nouns exchanged")
    left.legend()
    recency, identity = (array(x).ravel() for x in others)
    limit = 1.05 * max(np.abs(recency).max(), np.abs(identity).max(), 1e-3)
    right.scatter(recency, identity, s=12, alpha=0.6, color=BLUE, linewidths=0)
    right.axhline(0, color=GREY, lw=0.6)
    right.axvline(0, color=GREY, lw=0.6)
    right.set(xlim=(-limit, limit), ylim=(-limit, limit))
    right.set_xlabel("recency: later minus earlier noun")
    right.set_ylabel("identity: man's minus woman's job")
    right.set_title("every head, other pairs of nouns")
    return titled(figure, title)


def before_and_after(rows: Mapping[str, tuple[Interval, Interval]], names: tuple[str, str], title: str) -> Any:
    """One line for each row from its first to its second number (a score in order and shuffled)."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 0.9 + 0.42 * len(rows)))
    for place, (first, second) in enumerate(reversed(list(rows.values()))):
        axis.plot([first.value, second.value], [place + 0.1, place - 0.1], color=GREY, lw=0.8)
        for shift, value, colour, name in ((0.1, first, BLUE, names[0]), (-0.1, second, ORANGE, names[1])):
            _error(axis, place + shift, value, colour, label=None if place else name)
    axis.set_yticks(range(len(rows)), list(reversed(list(rows))))
    axis.set_xlim(0, 1.02)
    axis.set_xlabel("score, mean and 95 % interval over sentences")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return titled(figure, title)


def against_others(gaps: Mapping[str, tuple[Interval, Interval]], what: tuple[str, str], title: str) -> Any:
    """How much more a head looks at one word than at each other, from two words; an interval for each."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 0.9 + 0.3 * len(gaps)))
    for place, pair in enumerate(reversed(list(gaps.values()))):
        for shift, value, colour, name in ((0.12, pair[0], BLUE, what[0]), (-0.12, pair[1], GREY, what[1])):
            _error(axis, place + shift, value, colour, label=None if place else f"from “{name}”")
    axis.axvline(0, color=GREY, lw=0.6)
    axis.set_yticks(range(len(gaps)), [f"than at {name}" for name in reversed(list(gaps))])
    axis.set_xlabel("attention more, mean and 95 % interval over sentences")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return titled(figure, title)


def shares(rows: Mapping[str, Interval], title: str) -> Any:
    """Shares from 0 to 1 as bars with their intervals."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 0.8 + 0.36 * len(rows)))
    for place, value in enumerate(reversed(list(rows.values()))):
        axis.barh(place, value.value, color=SKY, height=0.7)
        _error(axis, place, value, BLUE, marker="")
        axis.text(value.high + 0.015, place, f"{value.value:.2f}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), list(reversed(list(rows))))
    axis.set_xlim(0, 1.08)
    axis.set_xlabel("share that comes from the first token")
    return titled(figure, title)


def looking_and_doing(families: Mapping[str, Looking], chosen: Mapping[str, Lookers], title: str) -> Any:
    """Every head of every family: attention to the decisive word against what its ablation takes away.

    Orange: the heads that were chosen on other prompts because they look most. Named: the first three of them, and the
    three that act most.
    """
    import matplotlib.pyplot as plt

    n = max(1, len(families))
    figure, axes = plt.subplots(1, n, figsize=(max(3.4 * n, 5), 4.0), squeeze=False)
    for axis, (family, found) in zip(axes.flat, families.items(), strict=False):
        x, y = found.mean("decisive"), found.mean("effect")
        axis.scatter(x.flatten(), y.flatten(), s=12, alpha=0.6, color=BLUE, linewidths=0, label="all heads")
        mine = chosen[family].heads
        axis.scatter(
            *zip(*[(x[h], y[h]) for h in mine], strict=True), s=26, color=ORANGE, label="look most, on other prompts"
        )
        for head in dict.fromkeys([*mine[:3], *top_heads(y.abs(), min(3, y.numel()))]):
            axis.annotate(head_name(head), (x[head], y[head]), (3, 3), textcoords="offset points", fontsize=7)
        axis.axhline(0, color=GREY, lw=0.6)
        axis.margins(x=0.12)
        axis.set_title(family.replace("_", " "))
        axis.set_xlabel("looking: attention to the decisive word")
    axes[0, 0].set_ylabel("effect: fall of logit(right) − logit(wrong)\nwhen the head is ablated")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return titled(figure, title)


def opponents(table: Mapping[str, Mapping[str, Mapping[str, Interval]]], kinds: tuple[str, str], title: str) -> Any:
    """Correlations over heads of each predictor with the effect, one panel a family and their mean; the ceiling is a
    grey band."""
    import matplotlib.pyplot as plt

    n = len(table)
    figure, axes = plt.subplots(1, n, figsize=(2.3 + 1.9 * n, 3.0), squeeze=False, sharex=True, sharey=True)
    for axis, (family, rows) in zip(axes.flat, table.items(), strict=True):
        for place, name in enumerate(reversed(PREDICTORS)):
            for shift, kind, colour in ((0.14, kinds[0], BLUE), (-0.14, kinds[1], ORANGE)):
                _error(axis, place + shift, rows[name][kind], colour)
        for kind, colour in zip(kinds, (BLUE, ORANGE), strict=True):
            if kind in rows.get("ceiling", {}):
                axis.axvline(rows["ceiling"][kind].value, color=colour, lw=1, linestyle=":")
        axis.axvline(0, color=GREY, lw=0.6)
        axis.set_title(family.replace("_", " "))
    axes[0, 0].set_yticks(range(len(PREDICTORS)), list(reversed(PREDICTORS.values())))
    figure.supxlabel(f"correlation over heads; blue: {kinds[0]}, orange: {kinds[1]}; dotted: ceiling", fontsize=9)
    return titled(figure, title)


def against_alike(rows: Mapping[str, tuple[Interval, Sequence[float]]], title: str) -> Any:
    """What the strongest lookers push towards the right answer, and draws of heads that write as much."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 0.9 + 0.42 * len(rows)))
    for place, (value, draws) in enumerate(reversed(list(rows.values()))):
        axis.plot(draws, [place - 0.14] * len(draws), "|", color=GREY, markersize=9, label=None if place else "alike")
        _error(axis, place + 0.1, value, ORANGE, label=None if place else "look most")
    axis.axvline(0, color=GREY, lw=0.6)
    axis.set_yticks(range(len(rows)), [name.replace("_", " ") for name in reversed(list(rows))])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xlabel("fall of the logit difference when one head is ablated, mean of the heads")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return titled(figure, title)


def names(heads: Sequence[Head]) -> str:
    """``[(5, 8), (9, 2)]`` -> ``5.8, 9.2``; none in words."""
    return ", ".join(head_name(h) for h in heads) or "none"
