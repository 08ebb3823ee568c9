"""What ``glassbox study locate`` says of several officers, as tables and findings: how many units, whose, what mends;
and what ``glassbox mitigate`` hands on to ``explain``.

Everything is read from the stored table: ``officers`` -> name -> ``located`` (and ``mended`` for some).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from glassbox_utils.core.evidence import Control, Finding
from glassbox_utils.core.statistics import Interval
from glassbox_utils.decisions import cycle_claims, locate_figures, locate_study, outcomes
from glassbox_utils.decisions.arms import PERPLEXITY, nothing
from glassbox_utils.decisions.locate import TARGET, Point, k_for
from glassbox_utils.decisions.outcomes import Measured

Row = Mapping[str, Any]
SOURCE = "study locate"
UNIT = "pairs of names or places"
"""what is drawn with all its cases; which of them, says the officer"""
SIZE_NAMES = locate_study.Size._fields


def short(basis: str) -> str:
    """``heads``, ``neurons`` or ``features``, without the SAE's name."""
    return basis.split()[0]


def first_wording(located: Row) -> str:
    """The wording in which every k and the random units were measured; empty if there is a gap in none."""
    return next((name for name, gap in located["gaps"].items() if "skipped" not in gap), "")


def k_range(points: Sequence[Point], target: float = TARGET) -> tuple[float | None, float | None, float | None]:
    """How many units carry the target share, and by the upper and lower ends of the shares' intervals: (k, fewest,
    most). None: not reached with as many as were tried."""
    ends = [[replace(p, carried=replace(p.carried, value=getattr(p.carried, end))) for p in points]
            for end in ("value", "high", "low")]  # fmt: skip
    k, fewest, most = (k_for(some, target) for some in ends)
    return k, fewest, most


def _number(k: float | None, points: Sequence[Point]) -> str:
    tried = [p.k for p in points]
    if k is None:
        return f"over {max(tried)}"
    return f"at most {k:.0f}" if k == min(tried) > 1 else f"{k:.0f}"  # fewer were not tried


def counts_table(officers: Mapping[str, Row]) -> Any:
    """Officer by basis: how many units carry TARGET of the gap, in one wording with its interval and over all."""
    import pandas as pd

    rows = []
    for name, one in officers.items():
        located, first = one["located"], first_wording(one["located"])
        if not first:
            rows.append({"officer": name, "gap": located["contrast"], "logits": "none that could be located"})
            continue
        points = [locate_figures.point_of(p) for p in located["points"]]
        gap, wordings = Interval(**_ends(located["gaps"][first])), list(dict.fromkeys(p.template for p in points))
        row = {
            "officer": name,
            "gap": located["contrast"],
            "pairs of values": str(gap.n),
            "wordings": str(len(wordings)),
            "logits": f"{gap.value:.2f} [{gap.low:.2f}, {gap.high:.2f}]",
        }
        for basis in located["first"]:
            some = [p for p in points if (p.basis, p.template) == (basis, first)]
            k, fewest, most = (_number(x, some) for x in k_range(some))
            row[f"{short(basis)} for {TARGET:.0%}"] = f"{k} [{fewest}, {most}]"
            row[f"{short(basis)}, all wordings"] = _span(points, basis, wordings)
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _span(points: Sequence[Point], basis: str, wordings: Sequence[str]) -> str:
    """Fewest and most units that carry TARGET in any wording."""
    every = [[p for p in points if (p.basis, p.template) == (basis, w)] for w in wordings]
    ordered = sorted(every, key=lambda some: k_for(some, TARGET) or float("inf"))
    ends = [_number(k_for(some, TARGET), some) for some in (ordered[0], ordered[-1])]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def _ends(gap: Row) -> dict[str, Any]:
    return {key: gap[key] for key in ("value", "low", "high", "n", "level") if key in gap}


def shares_table(officers: Mapping[str, Row], ks: Sequence[int] = (1, 10)) -> Any:
    """Officer by basis: what the first k carry and what is left, beside random units of like activity."""
    import pandas as pd

    rows = []
    for name, one in officers.items():
        first = first_wording(one["located"])
        for p in (locate_figures.point_of(p) for p in one["located"]["points"]):
            if p.template == first and p.k in ks:
                rows.append({
                    "officer": name, "units": f"{p.k} {short(p.basis)}",
                    "carried": f"{p.carried.value:.2f} [{p.carried.low:.2f}, {p.carried.high:.2f}]",
                    "left": f"{p.left.value:.2f} [{p.left.low:.2f}, {p.left.high:.2f}]",
                    "random units carry": ", ".join(f"{x:.2f}" for x in p.random_carried),
                    "their activity, times": f"{p.likeness:.2f}",
                })  # fmt: skip
    return pd.DataFrame(rows)


def apart(officer: Row, points: Sequence[Point]) -> list[float]:
    """How far shares that were measured again are from the stored ones of the same basis, k and template."""
    stored = {(short(p["basis"]), p["k"], p["template"]): p["carried"]["value"] for p in officer["located"]["points"]}
    keys = [(p, (short(p.basis), p.k, p.template)) for p in points]
    return [abs(p.carried.value - stored[key]) for p, key in keys if key in stored]


def whose_table(officers: Mapping[str, Row]) -> Any:
    """Officer by basis: of which other effects its located units carry little, much, or nobody can say."""
    import pandas as pd

    rows = []
    for name, one in officers.items():
        tested = [r for r in one["located"]["specificity"] if "basis" in r]
        skipped = [_what(r) for r in one["located"]["specificity"] if "basis" not in r]
        for basis in dict.fromkeys(r["basis"] for r in tested):
            mine = [r for r in tested if r["basis"] == basis]
            said = {v: [_carries(r) for r in mine if r["verdict"] == v] for v in
                    ("specific", "not specific", "undecided", "not tested")}  # fmt: skip
            said["not tested"] += skipped
            bad = bool(said["not specific"])
            verdict = "not specific" if bad else "undecided" if said["undecided"] else "specific to what was tested"
            rows.append({
                "officer": name, "units": f"{mine[0]['k']} {short(basis)}", "verdict": verdict,
                "not specific: move much of": ", ".join(said["not specific"]),
                "undecided": ", ".join(said["undecided"]),
                "carry little of": ", ".join(said["specific"]), "nothing to carry": ", ".join(said["not tested"]),
            })  # fmt: skip
    return pd.DataFrame(rows)


def _what(row: Row) -> str:
    return row["what"].split(":")[0]


def _carries(row: Row) -> str:
    return _what(row) + (f" ({row['carried']['value']:.2f})" if row.get("carried") else "")


def wordings_table(mended: Row, arms: Sequence[str]) -> Any:
    """Wording by arm: the gap in points."""
    import pandas as pd

    some = outcomes.by([m for m in outcomes.unpacked(mended) if m.contrast == mended["contrast"]], "arm")
    rows: dict[str, dict[str, str]] = {}
    for arm in arms:
        for wording, gap in outcomes.gaps(some[arm], "template").items():
            rows.setdefault(wording, {})[arm] = _said(gap)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("wording").reset_index()


def attributes_table(mended: Row, arms: Sequence[str]) -> Any:
    """Contrast by arm: what a mend does to other gaps, in logits."""
    import pandas as pd

    some = outcomes.unpacked(mended)
    first = next(m.template for m in some)
    rows: dict[str, dict[str, str]] = {}
    for m in some:
        if m.template == first and m.arm in arms:
            x = outcomes.outcome([m]).logits
            rows.setdefault(m.contrast, {})[m.arm] = f"{x.value:.2f} [{x.low:.2f}, {x.high:.2f}]"
    return pd.DataFrame.from_dict(rows, orient="index").fillna("").rename_axis("contrast").reset_index()


def other_gaps_table(mended: Row) -> Any:
    """Arm by contrast: what every arm that was also measured on other gaps leaves of each, in logits (in the first of
    the wordings, the only one in which other gaps were measured)."""
    some = [m for m in outcomes.unpacked(mended) if m.contrast != mended["contrast"]]
    arms = list(dict.fromkeys(m.arm for m in some))
    return attributes_table(mended, arms).set_index("contrast").T.rename_axis("arm").rename_axis(None, axis=1)


def pushed_table(mended: Row) -> Any:
    """Arm: the logits and the share of decisions that turn when the difference, or a random one, is pushed back in."""
    import pandas as pd

    rows: dict[str, dict[str, str]] = {}
    for r in mended["reactivation"]["rows"]:
        turned, logits = Interval(**r["turned"]), Interval(**r["logits"])
        said = f"{logits.value:+.2f} [{logits.low:+.2f}, {logits.high:+.2f}], {turned.value:.0%} turn"
        rows.setdefault(r["arm"], {})[f"{r['vector']}, times {r['strength']:g}"] = said
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("arm").reset_index()


def _said(gap: Interval | None) -> str:
    return "one pair of names" if gap is None else f"{gap.value:.1f} [{gap.low:.1f}, {gap.high:.1f}]"


def best(mended: Row) -> str:
    """The arm that the choose part preferred over all families; what is reported of it chose nothing."""
    return best_of(mended["tried"])


def best_of(tried: Mapping[str, Sequence[Any]]) -> str:
    """The arm that the choose part prefers over all families: of those that cost no merit and at most PERPLEXITY the
    smallest gap, else the cheapest. Chosen there, so that what is reported of it chose nothing."""
    rows = [(family, row) for family, some in tried.items() for row in some if row["chosen"]]
    cheap = [(f, row) for f, row in rows if row["perplexity"] <= PERPLEXITY and row["keeps_merit"]]
    family, row = min(cheap, key=lambda x: abs(x[1]["gap"])) if cheap else min(rows, key=lambda x: x[1]["perplexity"])
    about = row["about"]
    return f"{about['k']} {family}, {about['mode']} at the {about['level']}" if "basis" in about else row["name"]


def as_mitigation(table: Mapping[str, Any], decision: str, command: str) -> dict[str, Any]:
    """The file that ``glassbox explain --mitigation`` takes: the preferred arm before and after, on other people."""
    name, some = best_of(table["tried"]), outcomes.unpacked(table)
    by_arm = outcomes.by([m for m in some if m.contrast == table["contrast"]], "arm")
    before, after = (outcomes.outcome(by_arm[arm]) for arm in (nothing().name, name))
    rows = []
    for what, key, scale in (("gap in approvals, points", "gap", 1), ("gap, logits", "logits", 1),
                             ("right decisions, %", "merit", 100), ("impact ratio", "impact_ratio", 1)):  # fmt: skip
        both = [getattr(one, key) for one in (before, after)]
        ends = [[scale * x for x in (one.value, one.low, one.high)] for one in both]
        if np.isfinite(ends).all():
            rows.append({"name": what, "before": ends[0], "after": ends[1], "n": both[0].n})
    reached = "reaches" if all(row["holds"] for row in table["met"][name]) else "does not reach"
    said = f"{name} ({table['contrast']}) in {decision}; it {reached} all demands in every wording that was measured."
    return {"description": said, "source": command, "measures": rows}


def holding(met: Mapping[str, Sequence[Row]]) -> list[str]:
    """Arms that meet every demand."""
    return [name for name, some in met.items() if all(x["holds"] for x in some)]


def together(mended: Row) -> dict[str, list[dict[str, Any]]]:
    """``met`` of every arm that was measured in all wordings, over all of them at once."""
    some = outcomes.by([m for m in outcomes.unpacked(mended) if m.contrast == mended["contrast"]], "arm")
    whole = {m.template for m in some[nothing().name]}
    pooled = {name: _pooled(part) for name, part in some.items() if {m.template for m in part} == whole}
    costs = {name: cost["perplexity ratio"]["value"] for name, cost in mended["effects"].items()}
    plain = pooled[nothing().name]
    return {name: [asdict(one) for one in outcomes.met([plain], [m], costs.get(name))] for name, m in pooled.items()}


def _pooled(some: Sequence[Measured]) -> Measured:
    """Several wordings as one."""
    parts: dict[str, Any] = {
        key: tuple(x for m in some for x in getattr(m, key))
        for key in ("own", "donor", "deserved", "clusters", "others", "donor_deserved")
    }
    return Measured(some[0].arm, some[0].contrast, "all", **parts, least_share=min(m.least_share for m in some))


# --- findings -----------------------------------------------------------------------------------------


def findings(table: Row, k: int = 10, but: Sequence[str] = ()) -> list[Finding]:
    """Of every officer (``but`` some, of whom somebody else claims it): what k located units of each basis carry; of
    the mended one: which share of the gap the preferred arm closes."""
    found: list[Finding] = []
    for name, one in table["officers"].items():
        first = first_wording(one["located"])
        points = [locate_figures.point_of(p) for p in one["located"]["points"]]
        for p in (p for p in points if p.template == first and p.k == k and p.random_carried and name not in but):
            weak = ": a weak control" if p.likeness < cycle_claims.WEAK else ""
            like = f"sets of {k} {short(p.basis)}, the nearest in activity ({p.likeness:.1f} times{weak})"
            control = Control.drawn("random units", like, p.random_carried)
            what = one["located"]["contrast"].split(":")[0]
            what = f"{short(p.basis)} alone carry a share of the gap in {what}"
            claim = f"officer {name}, wording {first}: {k} located {what}"
            claimed = Finding.measured(claim, 3, p.carried, UNIT, control, side="above", source=SOURCE)
            if (n := p.carried.n) < cycle_claims.FEW and claimed.verdict == "held":
                claimed = replace(claimed, claim=f"{claim}; {n} {UNIT} are too few to tell", declared="null")
            found.append(claimed)
        if "mended" in one:
            found += _mended(name, one["mended"])
    return found


def _mended(name: str, mended: Row) -> list[Finding]:
    arm = best(mended)
    some = [m for m in outcomes.unpacked(mended) if m.contrast == mended["contrast"]]
    about = mended["arms"][arm]
    random = [n for n, other in mended["arms"].items() if other["kind"] == "random"]
    like = f"{about['k']} random {about['basis']}" if "basis" in about else f"random {arm}"
    beside = next((n for n in random if n.startswith(like)), random[0])
    ours, other = cycle_claims.closed(some, arm, beside, nothing().name)
    control = Control.measured("random units", beside, other)
    claim = f"officer {name}, {len({m.template for m in some})} wordings: {arm}, closes a share of the gap"
    return [Finding.measured(claim, 3, ours, UNIT, control, side="above", source=SOURCE)]
