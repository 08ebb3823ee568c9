"""The figures of the regulator's page: plain SVG drawn from an ``explain.Explanation``, every text escaped."""

import html
from collections.abc import Sequence
from typing import Any

from glassbox_utils.core.figures import BLUE, GREEN, GREY, RED
from glassbox_utils.decisions.explain import Explanation, Group

INK, FAINT, LINE = "#1d2733", "#5c6670", "#d5dae0"
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


e = html.escape


def number(value: float, digits: int = 2, sign: bool = True) -> str:
    """A number with a true minus sign, and none on zero."""
    shown = f"{value:{'+' if sign else ''}.{digits}f}"
    return shown.replace("-", "−") if float(shown) else shown.lstrip("+-")


def with_unit(field: str, value: Any) -> str:
    """A field's value as words."""
    return f"{value}{UNITS.get(field, '')}"


def _text(
    x: float, y: float, words: str, anchor: str = "start", size: float = 11, fill: str = INK, weight: int = 400
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}" '
        f'font-weight="{weight}">{e(words)}</text>'
    )


def _rect(x: float, y: float, width: float, height: float, fill: str, opacity: float = 1) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" fill="{fill}" '
        f'fill-opacity="{opacity}"/>'
    )


def _dot(x: float, y: float, fill: str, stroke: str = "none") -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" stroke="{stroke}" stroke-width="2"/>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = LINE, width: float = 1, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"{dashed}/>'
    )


def _svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{e(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def figure_fields(found: Explanation) -> str:
    """Causal effect of each field with its interval, and beside it how much it was looked at."""
    rows = sorted(found.effects, key=lambda f: f.effect.value)
    top, step, left, middle, width = 40, 24, 250, 430, 720
    reach = max(0.5, *(max(abs(f.effect.low), abs(f.effect.high)) for f in rows))
    scale, height = 165 / reach, top + step * len(rows) + 26
    looked_left, looked_scale = 625, 66 / max(f.attention for f in rows)
    parts = [
        _text(middle, 16, "what it did to the decision (causal)", "middle", 11, BLUE, 600),
        _text(middle - 14, 30, "← towards rejection", "end", 10, FAINT),
        _text(middle + 14, 30, "towards approval →", "start", 10, FAINT),
        _text(looked_left, 16, "looked at", "start", 11, FAINT, 600),
        _text(looked_left, 30, "(observed)", "start", 11, FAINT, 600),
        _line(middle, top - 4, middle, height - 22, FAINT),
    ]
    for i, f in enumerate(rows):
        y, x = top + step * i + 12, middle + f.effect.value * scale
        sure = f.effect.excludes(0)
        colour = (GREEN if f.effect.value > 0 else RED) if sure else "#b9c0c7"
        parts += [
            _text(left - 8, y + 4, f"{NAMES[f.field]}: {with_unit(f.field, f.value)}", "end", 11.5),
            _rect(min(x, middle), y - 7, abs(x - middle), 14, colour),
            _line(middle + f.effect.low * scale, y, middle + f.effect.high * scale, y, INK, 1.2),
            _rect(looked_left, y - 5, f.attention * looked_scale, 10, GREY, 0.55),
            _text(looked_left + f.attention * looked_scale + 4, y + 4, f"{f.attention:.0%}", "start", 10, FAINT),
        ]
    parts += [
        _text(middle + v * scale, height - 6, number(v, 1), "middle", 10, FAINT) for v in (-reach * 0.8, 0, reach * 0.8)
    ]
    return _svg(width, height, parts, "Effect of each field on the decision, and attention to it")


def figure_curves(found: Explanation) -> str:
    """Score against income, credit score and debt, all else as it is; the border of approval is at 0."""
    width, height, gap = 720, 190, 24
    each = (width - 2 * gap - 34) / 3
    every = [x for curve in found.curves.values() for _, x in curve] + [found.logit, 0.0]
    low, high = min(every), max(every)
    pad = 0.08 * (high - low or 1)
    low, high = low - pad, high + pad

    def y(x: float) -> float:
        return 150 - (x - low) / (high - low) * 126

    parts = []
    for i, (field, curve) in enumerate(found.curves.items()):
        x0 = 34 + i * (each + gap)
        first, last = curve[0][0], curve[-1][0]

        def x(v: float, x0: float = x0, first: float = first, last: float = last) -> float:
            return x0 + (min(max(v, first), last) - first) / (last - first) * each

        own = float(getattr(found.applicant, field))
        points = " ".join(f"{x(v):.1f},{y(s):.1f}" for v, s in curve)
        parts += [
            _rect(x0, 24, each, y(0) - 24, GREEN, 0.07),
            _rect(x0, y(0), each, 150 - y(0), RED, 0.07),
            _line(x0, y(0), x0 + each, y(0), FAINT, 1, "4 3"),
            f'<polyline points="{points}" fill="none" stroke="{BLUE}" stroke-width="2"/>',
            _dot(x(own), y(found.logit), "white", INK),
            _text(
                x0,
                14,
                f"{NAMES[field]}{' (' + UNITS[field].strip() + ')' if field in UNITS else ''}",
                size=11.5,
                weight=600,
            ),
            _text(x(first), 165, f"{first:g}", "start", 10, FAINT),
            _text(x(last), 165, f"{last:g}", "end", 10, FAINT),
        ]
        if i == 0:
            parts += [
                _text(x0 + 5, 36, "approved", size=10, fill=GREEN),
                _text(x0 + 5, 145, "rejected", size=10, fill=RED),
            ]
            parts += [_text(x0 - 5, y(v) + 3.5, number(v, 0), "end", 10, FAINT) for v in (low + pad, 0.0, high - pad)]
    parts.append(
        _text(
            34, 184, "circle: this application · dashed: the border between rejection and approval", size=10, fill=FAINT
        )
    )
    return _svg(width, height, parts, "Score against income, credit score and debt")


def figure_groups(found: Explanation) -> str:
    """The same application in every group: one row of dots for each attribute."""
    kinds = list(dict.fromkeys(g.kind for g in found.groups))
    width, left, right, step = 720, 150, 690, 54
    every = [g.logit for g in found.groups] + [0.0, found.logit]
    low, high = min(every), max(every)
    pad = 0.1 * (high - low or 1)
    low, high = low - pad, high + pad
    height = 34 + step * len(kinds) + 20

    def x(v: float) -> float:
        return left + (v - low) / (high - low) * (right - left)

    parts = [
        _rect(left, 22, x(0) - left, height - 46, RED, 0.06),
        _rect(x(0), 22, right - x(0), height - 46, GREEN, 0.06),
        _line(x(0), 22, x(0), height - 24, FAINT, 1, "4 3"),
        _line(x(found.logit), 22, x(found.logit), height - 24, INK, 1, "1 3"),
        _text(left + 4, 16, "rejected", size=10, fill=RED),
        _text(right - 4, 16, "approved", "end", 10, GREEN),
    ]
    for i, kind in enumerate(kinds):
        y = 34 + step * i + 20
        parts += [_text(left - 12, y + 4, kind, "end", 11.5), _line(left, y, right, y)]
        clusters: list[list[Group]] = []
        for g in sorted((g for g in found.groups if g.kind == kind), key=lambda g: g.logit):
            if clusters and x(g.logit) - x(clusters[-1][0].logit) < 30:  # their labels would overlap
                clusters[-1].append(g)
            else:
                clusters.append([g])
        for j, cluster in enumerate(clusters):
            parts += [_dot(x(g.logit), y, INK if g.own else BLUE) for g in cluster]
            own = any(g.own for g in cluster)
            label, at = ", ".join(g.group for g in cluster), sum(x(g.logit) for g in cluster) / len(cluster)
            at = min(max(at, left + 2.6 * len(label)), right - 2.6 * len(label))
            place = y - 9 if j % 2 == 0 else y + 17
            parts.append(_text(at, place, label, "middle", 9.5, INK if own else BLUE, 600 if own else 400))
    parts.append(
        _text(
            left,
            height - 6,
            "score; dotted: this application as it is · dark: the applicant’s own group",
            size=10,
            fill=FAINT,
        )
    )
    return _svg(width, height, parts, "The same application with the name, district or age of another group")


def figure_gaps(found: Explanation) -> str:
    """Gaps over many applicants with their intervals: score on the left, approval rate on the right."""
    rows = [*found.gaps, found.control]
    width, step, top = 720, 30, 34
    height = top + step * len(rows) + 24
    parts = []
    for x0, x1, title, unit in (
        (255, 470, "score (log-odds)", "logits"),
        (500, 715, "approval rate (points)", "points"),
    ):
        intervals = [getattr(r, unit) for r in rows]
        reach = 1.1 * max(0.5 if unit == "logits" else 5, *(max(abs(v.low), abs(v.high)) for v in intervals))
        middle, scale = (x0 + x1) / 2, (x1 - x0) / 2 / reach
        parts += [_text(middle, 14, title, "middle", 11, INK, 600), _line(middle, 22, middle, height - 22, FAINT)]
        for i, v in enumerate(intervals):
            y = top + step * i + 10
            last = i == len(rows) - 1
            colour = GREY if last or not v.excludes(0) else RED
            parts += [
                _line(middle + v.low * scale, y, middle + v.high * scale, y, colour, 2),
                _dot(middle + v.value * scale, y, colour),
                _text(
                    middle + v.value * scale,
                    y - 8,
                    number(v.value, 2 if unit == "logits" else 0),
                    "middle",
                    9.5,
                    colour,
                ),
            ]
        for at in (-reach / 1.1, 0, reach / 1.1):
            shown = number(at, 1 if unit == "logits" else 0) if at else "0"
            parts.append(_text(middle + at * scale, height - 7, shown, "middle", 10, FAINT))
    for i, r in enumerate(rows):
        y = top + step * i + 14
        words = f"control: {r.label}" if r.attribute == "control" else r.label
        parts.append(_text(0, y, words, size=11, fill=FAINT if r.attribute == "control" else INK))
    return _svg(width, height, parts, "Difference between groups over many applicants")


def figure_arrival(found: Explanation) -> str:
    """Share of the name's effect that has reached the decision position, layer by layer."""
    width, height, left, right = 720, 150, 40, 560
    layers = [row[0] for row in found.arrival]
    values = [v for row in found.arrival for v in row[1:]]
    low, high = min(-0.1, *values), max(1.1, *values)

    def x(layer: float) -> float:
        return left + (layer - layers[0]) / max(layers[-1] - layers[0], 1) * (right - left)

    def y(v: float) -> float:
        return 118 - (v - low) / (high - low) * 106

    parts = [_line(left, y(0), right, y(0)), _line(left, y(1), right, y(1), LINE, 1, "4 3")]
    for index, colour, label in ((1, BLUE, "name of the other gender"), (2, GREY, "control: own group")):
        points = " ".join(f"{x(row[0]):.1f},{y(row[index]):.1f}" for row in found.arrival)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        ends = [y(v) for v in found.arrival[-1][1:]]
        apart = 6 if abs(ends[0] - ends[1]) < 12 else 0  # two labels on one line can't be read
        above = ends[index - 1] <= ends[2 - index] if ends[0] != ends[1] else index == 1
        place = ends[index - 1] + 4 + (-apart if above else apart)
        parts.append(_text(right + 8, place, label, size=10, fill=colour))
    parts += [_text(left - 6, y(v) + 4, f"{v:.0%}", "end", 10, FAINT) for v in (0.0, 1.0)]
    parts += [_text(x(layer), 134, str(layer), "middle", 10, FAINT) for layer in layers[:: max(1, len(layers) // 8)]]
    parts.append(_text((left + right) / 2, 147, "layer", "middle", 10, FAINT))
    return _svg(width, height, parts, "Where the name reaches the decision")
