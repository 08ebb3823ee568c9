"""Pictures of notebook 01. Each takes what was measured and says in its title what these numbers show, on any model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.attention.looking import OPPONENTS, PREDICTORS, BothSides, Lookers, Looking, ahead
from glassbox_utils.attention.patterns import head_name
from glassbox_utils.core.devices import array
from glassbox_utils.core.figures import BLUE, GREY, ORANGE, SKY, titled
from glassbox_utils.core.interventions import Head
from glassbox_utils.core.labels import name_points
from glassbox_utils.core.statistics import Interval, bootstrap_ci


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
    looks: Float[Tensor, "order noun"],
    nouns: tuple[str, str],
    pronoun: str,
    others: Mapping[str, Float[Tensor, "pair layer head"]],
) -> Any:
    """Left: mean over heads for one sentence and with its nouns exchanged. Right: every head on other pairs of nouns,
    how much it follows the order (``recency``) and how much the word (``identity``), both in hundredths."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.2), width_ratios=(1, 1.2))
    for i, (noun, colour) in enumerate(zip(nouns, (BLUE, ORANGE), strict=True)):
        places = [1.5 - 3 * order + (0.42 if (order == 0) == (i == 0) else -0.42) for order in (0, 1)]
        left.barh(places, looks[:, i].tolist(), height=0.75, color=colour, label=noun)
    orders = [(nouns[0], nouns[1]), (nouns[1], nouns[0])]
    left.set_yticks([1.5, -1.5], [f"… {a} …\n… {b} …\n… {pronoun}" for a, b in orders])
    left.set_xlabel(f"attention from “{pronoun}”, mean over heads")
    left.set_title("one sentence, and its nouns exchanged")
    left.set_xlim(0, 1.45 * max(float(looks.max()), 1e-3))  # room for the legend
    left.legend(loc="upper right")
    recency, identity = (array(others[name].mean(0)).ravel() for name in ("recency", "identity"))
    limit = 1.05 * max(np.abs(recency).max(), np.abs(identity).max(), 0.1)
    right.scatter(recency, identity, s=12, alpha=0.6, color=BLUE, linewidths=0)
    right.axhline(0, color=GREY, lw=0.6)
    right.axvline(0, color=GREY, lw=0.6)
    right.set(xlim=(-limit, limit), ylim=(-limit, limit))
    right.set_xlabel("recency: later minus earlier noun (hundredths)")
    right.set_ylabel("identity: man's minus\nwoman's job (hundredths)")
    right.set_title(f"each of {recency.size} heads, {len(others['recency'])} other pairs of nouns")
    later = sum(bool(looks[i, 1 - i] > looks[i, i]) for i in (0, 1))
    return titled(
        figure,
        f"The later noun gets more in {later} of 2 orders of the sentence; over other pairs, the order moves the mean "
        f"of the heads by {recency.mean():+.1f} hundredths, who it is by {identity.mean():+.1f}",
    )


def before_and_after(rows: Mapping[str, tuple[Interval, Interval, float]]) -> Any:
    """One line a kind of head: its score on sentences in order and shuffled, and what chance gives (a grey stroke)."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 0.9 + 0.42 * len(rows)))
    for place, (first, second, chance) in enumerate(reversed(list(rows.values()))):
        axis.plot([first.value, second.value], [place + 0.1, place - 0.1], color=GREY, lw=0.8)
        for shift, value, colour, name in ((0.1, first, BLUE, "in order"), (-0.1, second, ORANGE, "shuffled")):
            _error(axis, place + shift, value, colour, label=None if place else name)
        axis.plot(chance, place, "|", color=GREY, markersize=14, label=None if place else "chance")
    axis.set_yticks(range(len(rows)), list(reversed(list(rows))))
    axis.set_xlim(0, 1.02)
    axis.set_xlabel("score, mean and 95 % interval over sentences")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    kept = sum(second.value > 0.8 * first.value for first, second, _ in rows.values())
    return titled(figure, f"{kept} of {len(rows)} heads keep more than four fifths of their score in shuffled text")


def against_others(
    leads: Float[Tensor, "frame what other"], head: Head, people: Sequence[str], whats: Sequence[str], seed: int = 0
) -> Any:
    """How much more one head looks at a person than at each other, from two words; an interval over frames for each.

    ``people``: the one who is preferred, then the others.
    """
    import matplotlib.pyplot as plt

    others = people[1:]
    figure, axis = plt.subplots(figsize=(6.4, 0.9 + 0.3 * len(others)))
    above = 0
    for i, name in enumerate(others):
        pair = [bootstrap_ci(leads[:, what, i], seed=seed) for what in (0, 1)]
        above += pair[0].low > pair[1].high
        for shift, value, colour, what in zip((0.12, -0.12), pair, (BLUE, GREY), whats, strict=True):
            last = name == others[-1]
            _error(axis, len(others) - 1 - i + shift, value, colour, label=f"from “{what}”" if last else None)
    axis.axvline(0, color=GREY, lw=0.6)
    axis.set_yticks(range(len(others)), [f"than to {name}" for name in reversed(others)])
    axis.set_xlabel(f"more attention to {people[0]}, mean and 95 % interval over sentences")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return titled(
        figure,
        f"Head {head_name(head)} prefers {people[0]} more from {whats[0]} than from {whats[1]}, "
        f"against {above} of {len(others)} other people",
    )


def shares(rows: Mapping[str, Interval], seen: str, moved: str) -> Any:
    """Shares of the first token, from 0 to 1, as bars with their intervals; two of the rows are put into the title."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 0.8 + 0.36 * len(rows)))
    for place, value in enumerate(reversed(list(rows.values()))):
        axis.barh(place, value.value, color=SKY, height=0.7)
        _error(axis, place, value, BLUE, marker="")
        axis.text(value.high + 0.015, place, f"{value.value:.2f}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), list(reversed(list(rows))))
    axis.set_xlim(0, 1.08)
    axis.set_xlabel("share of the first token")
    return titled(
        figure,
        f"In {rows[seen].n} sentences the first token gets {rows[seen].value:.0%} of all attention and gives "
        f"{rows[moved].value:.0%} of what is moved",
    )


def looking_and_doing(
    families: Mapping[str, Looking], chosen: Mapping[str, Lookers], sides: Mapping[str, BothSides]
) -> Any:
    """Every head of every family: attention to the decisive word against what its ablation takes away.

    Orange: the heads that were chosen on other prompts because they look most. Named: the first three of them, and the
    three that act most on half of the words (``BothSides.actors``).
    """
    import matplotlib.pyplot as plt

    n = max(1, len(families))
    figure, axes = plt.subplots(1, n, figsize=(max(3.4 * n, 5), 4.0), squeeze=False, sharex=True, sharey=True)
    for axis, (family, found) in zip(axes.flat, families.items(), strict=False):
        x, y = found.mean("decisive"), found.mean("effect")
        axis.scatter(x.flatten(), y.flatten(), s=12, alpha=0.6, color=BLUE, linewidths=0, label="all heads")
        mine = chosen[family].heads
        axis.scatter(
            *zip(*[(x[h], y[h]) for h in mine], strict=True), s=26, color=ORANGE, label="look most, on other prompts"
        )
        axis.axhline(0, color=GREY, lw=0.6)
        axis.margins(x=0.12)
        axis.set_title(family.replace("_", " "))
        axis.set_xlabel("looking: attention to the decisive word")
    for axis, (family, found) in zip(axes.flat, families.items(), strict=False):  # the shared limits are final now
        x, y = found.mean("decisive"), found.mean("effect")
        named = list(dict.fromkeys([*chosen[family].heads[:3], *sides[family].actors[:3]]))
        name_points(axis, [(float(x[h]), float(y[h])) for h in named], [head_name(h) for h in named], 2)
    axes[0, 0].set_ylabel("effect: fall of logit(right) − logit(wrong)\nwhen the head is ablated")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    listed, first = sum(len(c.heads) for c in chosen.values()), [x for s in sides.values() for x in s.lookers[:3]]
    helping, against = sum(x.low > 0 for x in first), sum(x.high < 0 for x in first)
    idle, blind = sum(len(s.idle) for s in sides.values()), sum(len(s.blind) for s in sides.values())
    return titled(
        figure,
        f"Of the three heads that look most in each family, {helping} of {len(first)} help the right answer with the "
        f"whole interval and {against} work against it; {idle} of the {listed} that look most act less than the "
        f"typical head, and {blind} of the {listed} that act most look less than it",
    )


def opponents(table: Mapping[str, Mapping[str, Mapping[str, Interval]]], kinds: tuple[str, str]) -> Any:
    """Correlations over heads of each predictor with the effect, one panel a family and their mean; the ceiling is a
    dotted line, where there is one."""
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
    figure.supxlabel(
        f"correlation over heads; blue: {kinds[0]}, orange: {kinds[1]}; dotted: ceiling by ranks", fontsize=9
    )
    won = {kind: ", ".join(str(ahead(table, name, kind)) for name in OPPONENTS) for kind in kinds}
    return titled(
        figure,
        f"Attention to the decisive word leads attention to another token, to anything but the first token, and the "
        f"length written in {won[kinds[0]]} of {n - 1} families by {kinds[0].split()[-1]}, in {won[kinds[1]]} by "
        f"{kinds[1].split()[-1]}",
    )


def against_alike(
    strong: Mapping[str, Float[Tensor, " word"]],
    rest: Mapping[str, Float[Tensor, " word"]],
    alike: Mapping[str, Sequence[Float[Tensor, " word"]]],
    seed: int = 0,
) -> Any:
    """What the strongest lookers push towards the right answer, the ``rest`` of them without the first two (hollow),
    and draws of heads that write as much."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 0.9 + 0.42 * len(strong)))
    more = left = 0
    for place, family in enumerate(reversed(list(strong))):
        value = bootstrap_ci(strong[family], seed=seed)
        draws = [float(draw.mean()) for draw in alike[family]]
        more += value.low > max(draws)
        axis.plot(draws, [place - 0.14] * len(draws), "|", color=GREY, markersize=9, label=None if place else "alike")
        _error(axis, place + 0.1, value, ORANGE, label=None if place else "look most")
        other = bootstrap_ci(rest[family], seed=seed)
        left += other.low > max(draws)
        _error(axis, place + 0.28, other, ORANGE, mfc="white", label=None if place else "without the first two")
    axis.axvline(0, color=GREY, lw=0.6)
    axis.set_yticks(range(len(strong)), [name.replace("_", " ") for name in reversed(list(strong))])
    axis.set_ylim(-0.6, len(strong) - 0.4)
    axis.set_xlabel("fall of the logit difference when one head is ablated, mean of the heads")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return titled(
        figure,
        f"In {more} of {len(strong)} families the heads that look most help more than every draw of heads that write "
        f"as much; without the first two of them in {left}",
    )
