"""The figures of an answer: what mending each field does, where the border runs, and the case in other groups."""

from typing import Any

from matplotlib import style

from glassbox_utils.core.figures import BLUE, GREEN, GREY, RED
from glassbox_utils.decisions.answer import Answer, plain, printed
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

LONGEST = 30
"""letters of a label"""
MOST_CURVES = 6


def short(words: str, most: int = LONGEST) -> str:
    """Words as a label: printable, and not too long."""
    clean = printed(words)
    return clean if len(clean) <= most else f"{clean[: most - 1]}…"


def _sides(found: Answer) -> tuple[str, str]:
    """The unfavourable and the favourable answer, as labels."""
    good, bad = (short(answer.strip(), 16) for answer in found.answers)
    return bad, good


@style.context(LOOK)
def figure_reasons(found: Answer) -> str:
    """What mending each field alone does: the mean as a bar, every template as a dot, and what was looked at."""
    rows, step, top = found.fields, 26, 40
    named = {t.field for t in found.reasons}
    values = [x for t in rows for x in t.effects.values()] + [0.0]
    low, high, pad = padded(values, 0.06)
    low, high = min(low, -pad), max(high, pad)
    figure = blank(top + step * len(rows) + 24)
    axes = axes_at(figure, 290, top, 300, step * len(rows), xlim=(low, high), ylim=(len(rows) - 0.5, -0.5))
    axes.axvline(0, color=FAINT, lw=1)
    for i, test in enumerate(rows):
        mean = sum(test.effects.values()) / max(1, len(test.effects))
        colour = (GREEN if mean > 0 else RED) if test.field in named else UNSURE
        axes.barh(i, mean, 14 / step, color=colour)
        axes.plot([*test.effects.values()], [i] * len(test.effects), "o", ms=4, color=INK, alpha=0.55)
    labels = [short(f"{plain(t.field)}: {t.value} → {t.typical}", 38) for t in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=11, color=INK)
    axes.set_xticks([0], ["0"])
    if found.attention is not None:
        shares = [found.attention[t.field] for t in rows]
        looked = axes_at(figure, 625, top, 60, step * len(rows), sharey=axes, xlim=(0, max(shares) or 1))
        bars = looked.barh(range(len(rows)), shares, 10 / step, color=GREY, alpha=0.55)
        looked.bar_label(bars, [f"{x:.0%}" for x in shares], padding=4, color=FAINT)
        looked.tick_params(labelleft=False, labelbottom=False)
        note(figure, 625, 16, "looked at", color=FAINT, size=11, weight=700)
        note(figure, 625, 30, "(observed)", color=FAINT, size=11, weight=700)
    zero = 290 + 300 * (0 - low) / (high - low)
    bad, good = _sides(found)
    note(figure, 440, 16, "what mending it does (causal)", "center", color=BLUE, size=11, weight=700)
    if zero > 400:
        note(figure, zero - 8, 30, f"← towards “{bad}”", "right", color=FAINT)
    if zero < 470:
        note(figure, zero + 8, 30, f"towards “{good}” →", color=FAINT)
    return inline(figure, "What mending each field alone does to the decision")


@style.context(LOOK)
def figure_curves(found: Answer) -> str:
    """Score against each number that may count, all else as it is; the border between the answers is at 0."""
    assert found.search is not None
    curves = [(k, v) for k, v in found.search.curves.items() if len(v) > 1][:MOST_CURVES]
    every = [x for _, curve in curves for _, x in curve] + [found.score, 0.0]
    low, high, pad = padded(every, 0.08)
    per_row, left, gap, high_of_row = min(3, len(curves)), 34, 24, 172
    n_rows = -(-len(curves) // per_row)
    width = (WIDTH - left) / per_row - gap * (1 - 1 / per_row)
    figure = blank(high_of_row * n_rows + 18)
    bad, good = _sides(found)
    for i, (name, curve) in enumerate(curves):
        at, down = left + i % per_row * (width + gap), high_of_row * (i // per_row)
        values, scores = zip(*curve, strict=True)
        axes = axes_at(figure, at, down + 24, width, 126, xlim=(values[0], values[-1]), ylim=(low, high))
        axes.axhspan(0, high, color=GREEN, alpha=0.07, lw=0)
        axes.axhspan(low, 0, color=RED, alpha=0.07, lw=0)
        axes.axhline(0, color=FAINT, lw=1, dashes=(4, 3))
        axes.plot(values, scores, color=BLUE, lw=2)
        axes.plot(float(found.values[name]), found.score, "o", color="white", mec=INK, mew=2)
        axes.set_xticks((values[0], values[-1]), [f"{x:g}" for x in (values[0], values[-1])])
        for label, align in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
            label.set(horizontalalignment=align)
        ticks = [0.0, *(x for x in (low + pad, high - pad) if abs(x) > 0.1 * (high - low))]
        first = i % per_row == 0
        axes.set_yticks(ticks if first else [], [number(x, 0) for x in ticks] if first else [])
        unit = f" ({found.units[name]})" if name in found.units else ""
        note(figure, at, down + 14, short(plain(name) + unit, round(width / 7)), size=11.5, weight=700)
    room = 16 * (high - low) / 126
    if high > room:
        note(figure, left + 5, 36, good, color=GREEN)
    if low < -room:
        note(figure, left + width - 5, 145, bad, "right", color=RED)
    words = "circle: this case · dashed: the border between the two answers"
    note(figure, left, high_of_row * n_rows + 12, words, color=FAINT)
    return inline(figure, "Score against each number that may count")


@style.context(LOOK)
def figure_swaps(found: Answer) -> str:
    """The same case as a member of other groups: change of the score with its interval, and the noise beside it."""
    rows = [s for s in found.swaps if s.effect is not None]
    step, top, left, width = 24, 34, 250, 440
    bounds = [x for s in rows for x in (s.effect.low, s.effect.high)]  # type: ignore[union-attr]
    bounds += [x for s in rows if s.same is not None and s.same.ci for x in s.same.ci]
    bounds += [-found.noise, found.noise] if found.noise is not None else []
    low, high, pad = padded([*bounds, 0.0], 0.08)
    low, high = min(low, -pad), max(high, pad)
    height = step * len(rows)
    figure = blank(top + height + 44)
    axes = axes_at(figure, left, top, width, height, xlim=(low, high), ylim=(len(rows) - 0.5, -0.5))
    if found.noise is not None:
        axes.axvspan(-found.noise, found.noise, color=GREY, alpha=0.15, lw=0)
    axes.axvline(0, color=FAINT, lw=1)
    axes.hlines(range(len(rows)), low, high, color=LINE, lw=0.7)
    for i, swap in enumerate(rows):
        x: Any = swap.effect
        if swap.same is not None and swap.same.ci:
            axes.plot(swap.same.ci, (i + 0.24, i + 0.24), color=GREY, lw=3)
        sure = x.n > 1 and x.excludes()
        colour = RED if sure else GREY
        axes.plot((x.low, x.high), (i, i), color=colour, lw=2)
        axes.plot(x.value, i, "o", color=colour, ms=7)
    labels = [short(f"{plain(s.attribute)}: {s.group}") for s in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=11, color=INK)
    ticks = [0.0, *(x for x in (low + pad, high - pad) if abs(x) > 0.1 * (high - low))]
    axes.set_xticks(ticks, [number(x, 1) if x else "0" for x in ticks])
    bad, good = _sides(found)
    note(figure, left, 16, f"← towards “{bad}”", color=FAINT)
    note(figure, left + width, 16, f"towards “{good}” →", "right", color=FAINT)
    words = ["bar: 95 %", "red: 0 lies outside"]
    words += ["grey line: other values of the own group"] if any(s.same for s in rows) else []
    words += ["grey band: other words"] if found.noise is not None else []
    note(figure, 0, top + height + 38, " · ".join(words), color=FAINT)
    return inline(figure, "The same case as a member of other groups")


def figures(found: Answer) -> dict[str, str]:
    """SVG by its name in the page; those of which there is something to draw."""
    drawn = {}
    if found.fields:
        drawn["reasons"] = figure_reasons(found)
    if found.search is not None and any(len(c) > 1 for c in found.search.curves.values()):
        drawn["curves"] = figure_curves(found)
    if any(s.effect is not None for s in found.swaps):
        drawn["swaps"] = figure_swaps(found)
    return drawn
