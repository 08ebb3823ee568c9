"""The figures of the regulator's page: matplotlib from an ``explain.Explanation``, as SVG that stands in the page."""

from collections.abc import Sequence
from typing import Any

from matplotlib import style

from glassbox_utils.core.figures import BLUE, GREEN, GREY, RED
from glassbox_utils.decisions.drawing import (
    FAINT,
    INK,
    LINE,
    LOOK,
    UNSURE,
    WIDTH,
    axes_at,
    blank,
    inline,
    note,
    number,
    padded,
)
from glassbox_utils.decisions.explain import Explanation, Group

NAMES = {
    "name": "first name",
    "age": "age",
    "occupation": "occupation",
    "income": "income",
    "credit_score": "credit score",
    "debt": "debt",
    "history": "payment history",
    "district": "district",
    "purpose": "purpose of the loan",
    "amount": "size of the loan",
}
UNITS = {"income": " thousand a year", "debt": " % of income", "amount": " thousand", "age": " years"}


def with_unit(field: str, value: Any) -> str:
    """A field's value as words."""
    return f"{value}{UNITS.get(field, '')}"


# --- the five figures ---------------------------------------------------------------------------------


@style.context(LOOK)
def figure_fields(found: Explanation) -> str:
    """Causal effect of each field with its interval, and beside it how much it was looked at."""
    rows = sorted(found.effects, key=lambda f: f.effect.value)
    places, step, top = range(len(rows)), 24, 40
    reach = max(0.5, *(max(abs(f.effect.low), abs(f.effect.high)) for f in rows))
    figure = blank(top + step * len(rows) + 26)
    causal = axes_at(figure, 265, top, 330, step * len(rows), xlim=(-reach, reach), ylim=(len(rows) - 0.5, -0.5))
    sure = [(GREEN if f.effect.value > 0 else RED) if f.effect.excludes(0) else UNSURE for f in rows]
    causal.axvline(0, color=FAINT, lw=1)
    causal.barh(places, [f.effect.value for f in rows], 14 / step, color=sure)
    causal.hlines(places, [f.effect.low for f in rows], [f.effect.high for f in rows], color=INK, lw=1.2)
    named = [f"{NAMES[f.field]}: {with_unit(f.field, f.value)}" for f in rows]
    causal.set_yticks(places, named, fontsize=11.5, color=INK)
    ticks = (-0.8 * reach, 0, 0.8 * reach)
    causal.set_xticks(ticks, [number(x, 1) for x in ticks])
    looked = axes_at(figure, 625, top, 66, step * len(rows), sharey=causal, xlim=(0, max(f.attention for f in rows)))
    bars = looked.barh(places, [f.attention for f in rows], 10 / step, color=GREY, alpha=0.55)
    looked.bar_label(bars, [f"{f.attention:.0%}" for f in rows], padding=4, color=FAINT)
    looked.tick_params(labelleft=False, labelbottom=False)
    note(figure, 430, 16, "what it did to the decision (causal)", "center", color=BLUE, size=11, weight=700)
    note(figure, 416, 30, "← towards rejection", "right", color=FAINT)
    note(figure, 444, 30, "towards approval →", color=FAINT)
    note(figure, 625, 16, "looked at", color=FAINT, size=11, weight=700)
    note(figure, 625, 30, "(observed)", color=FAINT, size=11, weight=700)
    return inline(figure, "Effect of each field on the decision, and attention to it")


@style.context(LOOK)
def figure_curves(found: Explanation) -> str:
    """Score against income, credit score and debt, all else as it is; the border of approval is at 0."""
    every = [x for curve in found.curves.values() for _, x in curve] + [found.logit, 0.0]
    low, high, pad = padded(every, 0.08)
    left, gap = 34, 24
    width = (WIDTH - left) / len(found.curves) - gap * (1 - 1 / len(found.curves))
    figure = blank(190)
    for i, (field, curve) in enumerate(found.curves.items()):
        at, (values, scores) = left + i * (width + gap), zip(*curve, strict=True)
        axes = axes_at(figure, at, 24, width, 126, xlim=(values[0], values[-1]), ylim=(low, high))
        axes.axhspan(0, high, color=GREEN, alpha=0.07, lw=0)
        axes.axhspan(low, 0, color=RED, alpha=0.07, lw=0)
        axes.axhline(0, color=FAINT, lw=1, dashes=(4, 3))
        axes.plot(values, scores, color=BLUE, lw=2)
        own = min(max(float(getattr(found.applicant, field)), values[0]), values[-1])
        axes.plot(own, found.logit, "o", color="white", mec=INK, mew=2)
        axes.set_xticks((values[0], values[-1]), [f"{x:g}" for x in (values[0], values[-1])])
        for label, align in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
            label.set(horizontalalignment=align)
        ticks = [0.0, *(x for x in (low + pad, high - pad) if abs(x) > 0.1 * (high - low))]
        axes.set_yticks(ticks if i == 0 else [], [number(x, 0) for x in ticks] if i == 0 else [])
        unit = f" ({UNITS[field].strip()})" if field in UNITS else ""
        note(figure, at, 14, NAMES[field] + unit, size=11.5, weight=700)
    room = 16 * (high - low) / 126
    if high > room:
        note(figure, left + 5, 36, "approved", color=GREEN)
    if low < -room:
        note(figure, left + width - 5, 145, "rejected", "right", color=RED)
    words = "circle: this application · dashed: the border between rejection and approval"
    note(figure, left, 184, words, color=FAINT)
    return inline(figure, "Score against income, credit score and debt")


@style.context(LOOK)
def figure_groups(found: Explanation) -> str:
    """The same application in every group: one row of dots for each attribute."""
    kinds = list(dict.fromkeys(g.kind for g in found.groups))
    low, high, _ = padded([g.logit for g in found.groups] + [0.0, found.logit], 0.1)
    left, top, width, step = 150, 22, 540, 54
    pixel = (high - low) / width
    rows, height = [32 + step * i for i in range(len(kinds))], 8 + step * len(kinds)
    figure = blank(height + 46)
    axes = axes_at(figure, left, top, width, height, xlim=(low, high), ylim=(height, 0))
    axes.axvspan(low, 0, color=RED, alpha=0.06, lw=0)
    axes.axvspan(0, high, color=GREEN, alpha=0.06, lw=0)
    axes.axvline(0, color=FAINT, lw=1, dashes=(4, 3))
    axes.axvline(found.logit, color=INK, lw=1, dashes=(1, 3))
    axes.hlines(rows, low, high, color=LINE, lw=1)
    for y, kind in zip(rows, kinds, strict=True):
        free = dict.fromkeys((-9, 17, 28), low)  # lines of labels above and below the dots, and where each is free
        for cluster in _clusters([g for g in found.groups if g.kind == kind], 30 * pixel):
            for g in cluster:
                axes.plot(g.logit, y, "o", color=INK if g.own else BLUE)
            look: dict[str, Any] = {"color": INK, "weight": 700} if any(g.own for g in cluster) else {"color": BLUE}
            words = ", ".join(g.group for g in cluster)
            label = axes.text(0, 0, words, ha="center", va="baseline", size=9.5, **look)
            half = label.get_window_extent().transformed(axes.transData.inverted()).width / 2
            at = min(max(sum(g.logit for g in cluster) / len(cluster), low + half), high - half)
            line = next((x for x in free if free[x] <= at - half), min(free, key=free.__getitem__))
            label.set_position((at, y + line))
            free[line] = at + half + 6 * pixel
    axes.set_yticks(rows, kinds, fontsize=11.5, color=INK)
    axes.set_xticks([])
    note(figure, left + 4, 16, "rejected", color=RED)
    note(figure, left + width - 4, 16, "approved", "right", color=GREEN)
    words = "score; dotted: this application as it is · dark: the applicant’s own group"
    note(figure, left, height + 40, words, color=FAINT)
    return inline(figure, "The same application with the name, district or age of another group")


@style.context(LOOK)
def figure_gaps(found: Explanation) -> str:
    """Gaps over many applicants with their intervals: score on the left, approval rate on the right."""
    rows = [*found.gaps, found.control]
    top, height, step = 22, 30 * len(rows) + 12, 30
    figure = blank(height + 46)
    for left, title, unit, least, digits in (
        (255, "score (log-odds)", "logits", 0.5, 2),
        (500, "approval rate (points)", "points", 5, 0),
    ):
        intervals = [getattr(r, unit) for r in rows]
        most = max(least, *(max(abs(v.low), abs(v.high)) for v in intervals))
        axes = axes_at(figure, left, top, 215, height, xlim=(-1.1 * most, 1.1 * most), ylim=(height, 0))
        axes.axvline(0, color=FAINT, lw=1)
        for i, (row, v) in enumerate(zip(rows, intervals, strict=True)):
            colour, y = RED if row is not found.control and v.excludes(0) else GREY, 22 + step * i
            axes.plot((v.low, v.high), (y, y), color=colour, lw=2)
            axes.plot(v.value, y, "o", color=colour)
            axes.text(v.value, y - 8, number(v.value, digits), ha="center", va="baseline", size=9.5, color=colour)
        axes.set_xticks((-most, 0, most), [number(x, digits and 1) if x else "0" for x in (-most, 0, most)])
        axes.set_yticks([])
        note(figure, left + 107.5, 14, title, "center", size=11, weight=700)
    for i, row in enumerate(rows):
        words = f"control: {row.label}" if row is found.control else row.label
        note(figure, 0, top + 26 + step * i, words, size=11, color=FAINT if row is found.control else INK)
    return inline(figure, "Difference between groups over many applicants")


@style.context(LOOK)
def figure_arrival(found: Explanation) -> str:
    """Share of the name's effect that has reached the decision position, layer by layer."""
    layers, *shares = zip(*found.arrival, strict=True)
    values = [v for share in shares for v in share]
    low, high = min(-0.1, *values), max(1.1, *values)
    left, right, top, height = 40, 560, 12, 106
    ends = [top + height * (high - share[-1]) / (high - low) for share in shares]
    apart = 6 if abs(ends[0] - ends[1]) < 12 else 0  # two labels on one line can't be read
    shifts = (-apart, apart) if ends[0] <= ends[1] else (apart, -apart)
    figure = blank(150)
    axes = axes_at(figure, left, top, right - left, height, xlim=(layers[0], layers[-1]), ylim=(low, high))
    axes.axhline(0, color=LINE, lw=1)
    axes.axhline(1, color=LINE, lw=1, dashes=(4, 3))
    labels = ((BLUE, "name of the other gender"), (GREY, "control: own group"))
    for share, end, shift, (colour, words) in zip(shares, ends, shifts, labels, strict=True):
        axes.plot(layers, share, color=colour, lw=2)
        note(figure, right + 8, end + 4 + shift, words, color=colour)
    axes.set_yticks((0, 1), ("0%", "100%"))
    shown = layers[:: max(1, len(layers) // 8)]
    axes.set_xticks(shown, map(str, shown))
    note(figure, (left + right) / 2, 147, "layer", "center", color=FAINT)
    return inline(figure, "Where the name reaches the decision")


def _clusters(groups: Sequence[Group], near: float) -> list[list[Group]]:
    """Groups whose labels would overlap, together."""
    clusters: list[list[Group]] = []
    for g in sorted(groups, key=lambda g: g.logit):
        if clusters and g.logit - clusters[-1][0].logit < near:
            clusters[-1].append(g)
        else:
            clusters.append([g])
    return clusters
