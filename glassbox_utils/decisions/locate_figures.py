"""What ``locate`` and the arms found, as tables and pictures: the curve in three bases, the chain, the frontier.

Everything is drawn from plain values (rows of ``locate_study``, or ``asdict`` of the results). A title says what the
picture shows, with the number that it rests on; what contradicts it is drawn too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glassbox_utils.core.figures import BLUE, GREY, ORANGE, PALETTE, RED
from glassbox_utils.core.labels import name_points
from glassbox_utils.core.statistics import Interval
from glassbox_utils.decisions import outcomes
from glassbox_utils.decisions.locate import TARGET, Point, k_for
from glassbox_utils.decisions.outcomes import Measured, Outcome
from glassbox_utils.decisions.pairs import PLACES

Row = Mapping[str, Any]
MARKERS = "osD^vPX"
TICKS = 6
"""numbers of units that an axis names one by one"""


def point_of(row: Row) -> Point:
    """A point of the curve from its plain values."""
    return Point(**{**row, "carried": Interval(**row["carried"]), "left": Interval(**row["left"])})


def measured_of(row: Row) -> Measured:
    """What was measured, from its plain values."""
    return outcomes.measured(row)


# --- the curve ----------------------------------------------------------------------------------------


def ks_table(points: Sequence[Point], target: float = TARGET) -> Any:
    """Basis by template: how many units carry the target share (``not reached`` with the largest share)."""
    import pandas as pd

    rows: dict[str, dict[str, str]] = {}
    for template in dict.fromkeys(p.template for p in points):
        for basis in dict.fromkeys(p.basis for p in points):
            some = [p for p in points if (p.basis, p.template) == (basis, template)]
            if some:
                k, most = k_for(some, target), max(some, key=lambda p: p.carried.value)
                said = f"{k:.0f}" if k else f"not reached ({most.carried.value:.2f} with {most.k})"
                rows.setdefault(template, {})[basis] = said
    return pd.DataFrame.from_dict(rows, orient="index")


def draw_curve(points: Sequence[Point], template: str | None = None) -> Any:
    """Carried (left) and left over (right) by the first k units of each basis: one template with its intervals, the
    others as thin lines; random units of like activity dotted."""
    import matplotlib.pyplot as plt

    template = template or points[0].template
    bases = list(dict.fromkeys(p.basis for p in points))
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.6), sharey=True)
    for axis, key in zip(axes, ("carried", "left"), strict=True):
        for i, basis in enumerate(bases):
            colour = PALETTE[i % len(PALETTE)]
            for name in dict.fromkeys(p.template for p in points):
                some = sorted((p for p in points if (p.basis, p.template) == (basis, name)), key=lambda p: p.k)
                if not some:
                    continue
                k, here = [p.k for p in some], [getattr(p, key) for p in some]
                if name != template:
                    axis.plot(k, [x.value for x in here], color=colour, lw=0.6, alpha=0.35)
                    continue
                axis.plot(k, [x.value for x in here], color=colour, marker=MARKERS[i % 7], ms=4, label=basis)
                axis.fill_between(k, [x.low for x in here], [x.high for x in here], color=colour, alpha=0.15, lw=0)
                drawn = [(p.k, x) for p in some for x in getattr(p, f"random_{key}")]
                if drawn:
                    axis.scatter(*zip(*drawn, strict=True), color=colour, s=70, lw=1.6, marker="_", zorder=3,
                                 label="as many random units" if i == len(bases) - 1 else None)  # fmt: skip
        axis.set_xscale("log")
        tried = sorted({p.k for p in points})
        if len(tried) <= TICKS:
            axis.set_xticks(tried, [str(k) for k in tried])
            axis.minorticks_off()
        axis.axhline(TARGET if key == "carried" else 1 - TARGET, color=GREY, lw=0.6, ls="--")
        axis.axhline(0, color=GREY, lw=0.5)
        axis.set_xlabel("units, the first ones of each basis")
    axes[0].set_ylabel(f"share of the gap (wording {template!r})")
    axes[0].set_title("carried by them alone")
    axes[1].set_title("left when they alone keep their values")
    axes[1].legend(*axes[0].get_legend_handles_labels(), loc="center right")  # where what is left is little
    figure.suptitle(_curve_title(points, template, bases), fontsize=10, x=0.01, ha="left")
    return figure


def _curve_title(points: Sequence[Point], template: str, bases: Sequence[str]) -> str:
    said = []
    for basis in bases:
        some = [p for p in points if (p.basis, p.template) == (basis, template)]
        k, tried = k_for(some), {p.k for p in some}
        if k is None:
            said.append(f"no number of {basis} tried")
            continue
        how = "about " if k not in tried else "at most " if k == min(tried) > 1 else ""  # fewer were not tried
        said.append(f"{how}{k:.0f} {basis if k > 1.5 else basis.removesuffix('s')}")
    thin = "; thin: other templates" if len({p.template for p in points}) > 1 else ""
    return f"{TARGET:.0%} of the gap: {', '.join(said)} (dashes: as many random units, the nearest in activity{thin})"


def specificity_table(rows: Sequence[Row]) -> Any:
    """What the located units carry of other effects, and the verdict."""
    import pandas as pd

    found = []
    for r in rows:
        carried = Interval(**r["carried"]) if r.get("carried") else None
        found.append(
            {
                "other contrast": r["what"], "units": f"{r['k']} {r['basis']}" if "k" in r else "",
                "its effect, logits": str(Interval(**r["effect"])) if "effect" in r else "",
                "share that they carry": str(carried) if carried else r.get("why", "no effect to carry"),
                "verdict": r["verdict"],
            }
        )  # fmt: skip
    return pd.DataFrame(found)


# --- the chain ----------------------------------------------------------------------------------------


def draw_chain(links: Sequence[Row], carrier: str = "carrier") -> Any:
    """Where the gap is at each depth (left), who carries it at which place (middle), what goes through whom (right).

    ``carrier``: what to call the place where the groups differ, such as the name of the field.
    """
    import matplotlib.pyplot as plt

    names = {"carrier": carrier, "between": "between", "decision": "decision", "all": "everywhere"}
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.4), width_ratios=(1.25, 1, 1))
    streams = [x for x in links if x["what"] == "stream"]
    layers = sorted({x["layer"] for x in streams})
    for place, colour, marker in zip(PLACES, PALETTE, MARKERS, strict=False):
        values = [next(x["carried"] for x in streams if (x["layer"], x["place"]) == (n, place)) for n in layers]
        axes[0].plot(layers, [v["value"] for v in values], color=colour, marker=marker, ms=4, label=names[place])
        axes[0].fill_between(
            layers, [v["low"] for v in values], [v["high"] for v in values], color=colour, alpha=0.15, lw=0
        )
    axes[0].set_xlabel("after layer")
    axes[0].set_ylabel("share of the gap, patched there")
    axes[0].legend()
    parts = [x for x in links if x["what"] != "stream" and not x["frozen"]]
    for i, what in enumerate(dict.fromkeys(x["what"] for x in parts)):
        some = [x for x in parts if x["what"] == what]
        _bars(axes[1], [names[x["place"]] for x in some], some, PALETTE[i], i, what)
    axes[1].legend()
    axes[1].set_title("who carries it where")
    frozen = [x for x in links if x["frozen"]]
    free = {x["what"]: x["carried"]["value"] for x in parts if x["place"] == "carrier"}
    labels = [f"{x['what']} at the {carrier},\n{_renamed(x['frozen'], names)} frozen" for x in frozen]
    _bars(axes[2], labels, frozen, RED, 0, "with the others frozen")
    axes[2].scatter([free[x["what"]] for x in frozen], range(len(frozen)), color=GREY, marker="|", s=90, label="free")
    axes[2].legend()
    axes[2].set_title("what goes through whom")
    at = next((n for n in layers if _at(streams, n, "decision") >= 0.5), None)
    when = f"more than half of it is there after layer {at}" if at is not None else "it never is half there"
    axes[0].set_title("where it is")
    figure.suptitle(f"From the {carrier} to the decision: {when}", fontsize=10, x=0.01, ha="left")
    return figure


def _at(streams: Sequence[Row], layer: int, place: str) -> float:
    return next(x["carried"]["value"] for x in streams if (x["layer"], x["place"]) == (layer, place))


def _renamed(text: str, names: Mapping[str, str]) -> str:
    basis, _, place = text.partition(" at ")
    return f"{basis} at {names.get(place, place)}"


def _bars(axis: Any, labels: Sequence[str], rows: Sequence[Row], colour: str, shift: int, name: str) -> None:
    y = np.arange(len(rows)) + 0.25 * shift
    value, low, high = (np.array([r["carried"][k] for r in rows]) for k in ("value", "low", "high"))
    axis.errorbar(value, y, xerr=[value - low, high - value], fmt=MARKERS[shift], ms=4, color=colour, label=name)
    axis.set_yticks(np.arange(len(rows)), labels)
    axis.invert_yaxis() if not axis.yaxis_inverted() else None
    axis.axvline(0, color=GREY, lw=0.5)
    axis.set_xlabel("share of the gap")


def located_lines(table: Row) -> list[str]:
    """What was located, for a terminal."""
    lines = [f"Where is the gap {table['contrast']}? Chosen in {table['attribution']['template']!r}, seen in others:"]
    points = [point_of(p) for p in table["points"]]
    for name, gap in table["gaps"].items():
        if "skipped" in gap:
            lines.append(f"  {name}: {gap['skipped']}")
            continue
        said = [f"  {name}: {gap['value']:+.2f} logits [{gap['low']:+.2f}, {gap['high']:+.2f}], {gap['pairs']} pairs"]
        for basis in table["first"]:
            some = [p for p in points if (p.basis, p.template) == (basis, name)]
            k = k_for(some, TARGET) if some else None
            most = max(some, key=lambda p: p.carried.value) if some else None
            reached = f"{k:.0f} {basis}" if k else f"{most.k} {basis} carry {most.carried.value:.2f}" if most else ""
            said += [f"{TARGET:.0%} of it: {reached}" if k else reached] if reached else []
        lines.append("; ".join(said))
    for basis, some in table["first"].items():
        lines.append(
            f"  first {basis}: " + ", ".join(f"{a}.{b} ({x['place']})" for x in some[:5] for a, b in [x["unit"]])
        )
    for row in table["specificity"]:
        lines.append(f"  {row.get('basis', '')} and {row['what']}: {row['verdict']}".replace("   and", "  "))
    return lines


def mended_lines(table: Row) -> list[str]:
    """What every arm does, for a terminal."""
    some = [measured_of(m) for m in table["measured"]]
    lines = [f"What closes the gap {table['contrast']}? In {len({m.template for m in some})} wordings:"]
    for name, one in outcomes_of(some, table["contrast"]).items():
        cost = table["effects"].get(name)
        spent = "" if cost is None else f", perplexity x {cost['perplexity ratio']['value']:.3f}"
        failed = [x["demand"] for x in table["met"][name] if not x["holds"]]
        ends = f"[{one.gap.low:+.1f}, {one.gap.high:+.1f}]"
        lines.append(
            f"  {name}: gap {one.gap.value:+.1f} points {ends}, right {one.merit.value:.0%}{spent}: "
            + (f"fails {', '.join(failed)}" if failed else "all demands met")
        )
    return lines


# --- the arms -----------------------------------------------------------------------------------------


def outcomes_of(measured: Sequence[Measured], contrast: str) -> dict[str, Outcome]:
    """Arm -> what it does to one contrast, over all templates."""
    some = [m for m in measured if m.contrast == contrast]
    return {name: outcomes.outcome(part) for name, part in outcomes.by(some, "arm").items()}


def arms_table(found: Mapping[str, Outcome], effects: Mapping[str, Row]) -> Any:
    """Every arm with its gap, approvals, errors by group, impact ratio, merit and costs."""
    import pandas as pd

    def show(x: Interval, digits: int) -> str:
        return f"{x.value:.{digits}f} [{x.low:.{digits}f}, {x.high:.{digits}f}]"

    def two(x: tuple[float, float]) -> str:
        return f"{100 * x[0]:.0f} / {100 * x[1]:.0f}"

    rows = []
    for name, one in found.items():
        cost = effects.get(name)
        rows.append(
            {
                "arm": name, "gap, points": show(one.gap, 1), "gap, logits": show(one.logits, 2),
                "approved, %": two(one.approved), "of the undeserving": two(one.wrongly_approved),
                "rejected of the deserving": two(one.wrongly_rejected), "impact ratio": show(one.impact_ratio, 2),
                "four fifths": one.four_fifths, "merit": show(one.merit, 3), "decides": one.decides,
                "perplexity": "" if cost is None else show(Interval(**cost["perplexity ratio"]), 3),
                "over the base": "" if not (b := cost and cost["perplexity over the base"]) else show(Interval(**b), 3),
                "KL, nats": show(Interval(**cost["divergence"]), 2) if cost and "divergence" in cost else "",
                "choices": "" if cost is None else f"{cost['choices']['value']:+.2f}",
                "off is off": "" if cost is None else cost["identical when off"],
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def met_table(met: Mapping[str, Sequence[Row]], effects: Mapping[str, Row] | None = None) -> Any:
    """Arm by demand: the worst value over all wordings, and where it fails the wording. Beside them the KL divergence
    of ``effects``, of which nothing was demanded."""
    import pandas as pd

    rows = []
    for name, some in met.items():
        said = {x["demand"]: f"{x['worst']:.3g}" + ("" if x["holds"] else f" ({x['where']})") for x in some}
        cost = (effects or {}).get(name, {}).get("divergence")
        kl = {} if effects is None else {"KL, nats": f"{cost['value']:.2f}" if cost else ""}
        rows.append({"arm": name} | said | kl | {"all met": all(x["holds"] for x in some)})
    return pd.DataFrame(rows).fillna("")


def draw_frontier(found: Mapping[str, Outcome], plain: str = "as it is") -> Any:
    """Gap against merit of every arm; those that no other beats (blue) are the less discriminatory alternatives."""
    import matplotlib.pyplot as plt

    best = outcomes.frontier({k: (o.gap.value, o.merit.value) for k, o in found.items()})
    figure, axis = plt.subplots(figsize=(7.4, 4.2))
    for i, (name, one) in enumerate(found.items(), 1):
        colour = RED if name == plain else BLUE if name in best else GREY if "random" in name else ORANGE
        x, y = one.gap, one.merit
        bars: dict[str, Any] = {k: [[v.value - v.low], [v.high - v.value]] for k, v in (("xerr", x), ("yerr", y))}
        axis.errorbar(x.value, y.value, **bars, fmt="o", color=colour, ms=5, lw=0.7, label=f"{i} {name}")
    places = [(one.gap.value, one.merit.value) for one in found.values()]
    name_points(axis, places, [str(i + 1) for i in range(len(places))], 3, fontsize=8)
    axis.axvline(0, color=GREY, lw=0.6)
    axis.set_xlabel("gap in approvals between the two groups, points (95 % interval over pairs of names)")
    axis.set_ylabel("share of decisions that are right")
    beaten = [o for k, o in found.items() if k != plain and _beats(o, found.get(plain))]
    axis.set_title(
        f"{len(beaten)} of {len(found) - 1} arms: a smaller gap at no less merit (blue: beaten by none; grey: random)"
    )
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
    return figure


def _beats(one: Outcome, plain: Outcome | None) -> bool:
    smaller = plain is not None and abs(one.gap.value) < abs(plain.gap.value)
    return smaller and plain is not None and one.merit.value >= plain.merit.value
