"""One application, taken apart: what was decided, what it rested on, what would have changed it, and for whom.

``explain`` measures, ``report`` writes the page. Everything here is a comparison of decisions of one model on edited
applications (``logit(approved) - logit(rejected)`` at the decision position; positive is approved), except attention,
which is only looked at. Nothing is told which attribute is biased, if any.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glassbox_utils.core import arguments
from glassbox_utils.core.evidence import Control, Finding, Side
from glassbox_utils.core.interventions import capture, edit
from glassbox_utils.core.models import Model, Site
from glassbox_utils.core.statistics import (
    Interval,
    adjust,
    bootstrap_ci,
    cluster_bootstrap,
    cluster_sign_flip_p,
    spearman,
)
from glassbox_utils.core.text import tokenize
from glassbox_utils.decisions import cycle, loans
from glassbox_utils.decisions.loans import Applicant

MERIT = ("income", "credit_score", "debt", "history", "amount")
"""what the merit rule reads, and what a person can change"""
STEPS = {"income": 5, "credit_score": 20, "debt": 5}
"""grid of the counterfactual search, inside the ranges that the model was trained on"""
AMOUNTS = (4, 6, 8, 15, 18, 25)
N_DONORS = 12


@dataclass(frozen=True)
class FieldEffect:
    """What one field did to the decision, and how much it was looked at."""

    field: str
    value: Any
    effect: Interval
    """logits, causal: this decision minus that with the field of another applicant; positive speaks for approval"""
    attention: float
    """observed: share of the attention that the decision position pays to the fields"""


@dataclass(frozen=True)
class Change:
    """A counterfactual: these fields would have had to be different."""

    changes: dict[str, Any]
    logit: float
    distance: float
    """sum over fields of the change divided by the trained range; 1 for another history"""


@dataclass(frozen=True)
class Group:
    """The same application with another group's name, district or age."""

    kind: str
    group: str
    shown: str
    """which names or values were put in"""
    logit: float
    spread: float
    """standard deviation over the values that were put in; 0 for one value"""
    n: int
    own: bool
    """the applicant's own group"""


@dataclass(frozen=True)
class Gap:
    """Paired difference between two groups over many applicants."""

    attribute: str
    label: str
    logits: Interval
    points: Interval
    """approval rate, percentage points"""
    p_value: float
    """sign flips over applicants, Holm over the attributes; of the control uncorrected"""


@dataclass(frozen=True)
class Explanation:
    """All that the page says about one application."""

    applicant: Applicant
    layout: str
    logit: float
    merit: bool
    points: float
    layouts: dict[str, float]
    effects: list[FieldEffect]
    agreement: Interval
    """Spearman correlation of attention share with the size of the causal effect, over the fields"""
    curves: dict[str, list[tuple[float, float]]]
    """field -> (value, logit)"""
    nearest: list[Change]
    """changes that flip the decision, the smallest of each kind first; empty if the search found none"""
    n_searched: int
    groups: list[Group]
    arrival: list[tuple[int, float, float]]
    """layer, share of the name's effect that arrives at the decision position up to it, same for the control name"""
    gaps: list[Gap]
    control: Gap
    n_applicants: int
    outside: list[str]
    """fields whose value the model never saw in training"""

    @property
    def approved(self) -> bool:
        return self.logit > 0

    @property
    def probability(self) -> float:
        """Of approved, given that the answer is approved or rejected."""
        return 1 / (1 + math.exp(-self.logit))


def explain(
    model: Model, applicant: Applicant, layout: str = "line", n: int = 32, seed: int = 0, batch_size: int = 32
) -> Explanation:
    """Measure all of it: about 500 short forward passes. ``n``: applicants of the group comparison.

    Raises LoanError, in the first of them, for a model that does not decide (``loans.check_decides``); before them, for
    an application that ``loans.parse_applicant`` would refuse, an unknown layout, or a number that is none.
    """
    if not isinstance(applicant, Applicant):
        raise loans.LoanError(f"{arguments.shown(applicant)} is no Applicant. Make one with parse_applicant.")
    applicant = loans.parse_applicant(asdict(applicant))
    loans.check_count("n", n, 2)
    loans.check_count("seed", seed, 0)

    def decide(people: Sequence[Applicant]) -> NDArray:
        return loans.decide(model, people, layout, batch_size).double().numpy()

    loans.as_text(applicant, layout)
    logit = float(decide([applicant])[0])
    effects = field_effects(model, applicant, layout, decide, logit, seed)
    sizes = np.array([abs(e.effect.value) for e in effects])
    looked = np.array([e.attention for e in effects])
    curves, nearest, n_searched = search(applicant, decide, logit)
    gaps, control = population(decide, n, seed)
    layouts = elsewhere(model, applicant, [name for name in loans.LAYOUTS if name != layout])
    return Explanation(
        applicant=applicant,
        layout=layout,
        logit=logit,
        merit=loans.merit(applicant),
        points=loans.points(applicant),
        layouts={layout: logit, **layouts},
        effects=effects,
        agreement=spearman(looked, sizes).rho,
        curves=curves,
        nearest=nearest,
        n_searched=n_searched,
        groups=groups(applicant, decide),
        arrival=arrival(model, applicant, layout),
        gaps=gaps,
        control=control,
        n_applicants=n,
        outside=loans.outside_training(applicant),
    )


Decide = Callable[[Sequence[Applicant]], NDArray]


def elsewhere(model: Model, applicant: Applicant, layouts: Sequence[str]) -> dict[str, float]:
    """The same application in other layouts, as logits; those in which the model decides nothing are left out."""
    found = {}
    for name in layouts:
        with suppress(loans.LoanError):
            found[name] = float(loans.decide(model, [applicant], name)[0])
    return found


# --- what it rested on --------------------------------------------------------------------------------


def field_effects(
    model: Model, applicant: Applicant, layout: str, decide: Decide, logit: float, seed: int
) -> list[FieldEffect]:
    """Each field replaced by those of other applicants (causal), and the attention that it gets (observed)."""
    donors = loans.applications(N_DONORS, seed=1000 + seed)
    changed = [replace(applicant, **{name: getattr(d, name)}) for name in cycle.FIELDS for d in donors]
    moved = logit - decide(changed).reshape(len(cycle.FIELDS), N_DONORS)
    looked = attention_by_field(model, applicant, layout)
    return [
        FieldEffect(name, getattr(applicant, name), bootstrap_ci(row, seed=seed), looked[name])
        for name, row in zip(cycle.FIELDS, moved, strict=True)
    ]


def attention_by_field(model: Model, applicant: Applicant, layout: str) -> dict[str, float]:
    """Share of the decision position's attention on each field's tokens, mean over layers and heads, sum 1."""
    looked = cycle.attention_to_fields(model, [applicant], layout)[0].mean((0, 1))
    return dict(zip(cycle.FIELDS, (looked / looked.sum()).tolist(), strict=True))


# --- what would have changed it -----------------------------------------------------------------------


def search(
    applicant: Applicant, decide: Decide, logit: float
) -> tuple[dict[str, list[tuple[float, float]]], list[Change], int]:
    """Curves over the merit fields, and the smallest changes of one field (else of two) that flip the decision."""
    grid = {name: [*range(loans.TRAINED[name][0], loans.TRAINED[name][1] + 1, step)] for name, step in STEPS.items()}
    grid |= {"amount": list(AMOUNTS), "history": list(loans.HISTORIES)}
    tried = [(name, value) for name, values in grid.items() for value in values]
    logits = decide([replace(applicant, **{name: value}) for name, value in tried])
    measured = [(name, value, float(x)) for (name, value), x in zip(tried, logits, strict=True)]
    curves = {name: [(float(v), x) for f, v, x in measured if f == name] for name in STEPS}
    changes = [
        Change({name: value}, x, _distance(applicant, {name: value}))
        for name, value, x in measured
        if value != getattr(applicant, name)
    ]
    n, flips = len(changes), [c for c in changes if (c.logit > 0) != (logit > 0)]
    if not flips:
        pairs = [
            {a: x, b: y}
            for i, a in enumerate(MERIT)
            for b in MERIT[i + 1 :]
            for x in _coarse(grid[a], getattr(applicant, a))
            for y in _coarse(grid[b], getattr(applicant, b))
        ]
        both = decide([replace(applicant, **pair) for pair in pairs])
        n += len(pairs)
        flips = [
            Change(pair, float(x), _distance(applicant, pair))
            for pair, x in zip(pairs, both, strict=True)
            if (x > 0) != (logit > 0)
        ]
    best: dict[tuple[str, ...], Change] = {}
    for change in sorted(flips, key=lambda c: c.distance):
        best.setdefault(tuple(change.changes), change)
    return curves, list(best.values())[:5], n


def _coarse(values: Sequence[Any], own: Any) -> list[Any]:
    if isinstance(own, str):
        return [v for v in values if v != own]
    return [v for v in values[:: max(1, len(values) // 3)] if v != own]


def _distance(applicant: Applicant, changes: dict[str, Any]) -> float:
    total = 0.0
    for name, value in changes.items():
        low, high = loans.TRAINED.get(name, (0, 1))
        own = getattr(applicant, name)
        total += 1.0 if isinstance(own, str) else abs(value - own) / (high - low)
    return total


# --- for whom -----------------------------------------------------------------------------------------


def groups(applicant: Applicant, decide: Decide) -> list[Group]:
    """The same application with names of each group, on each side of the town, at other ages."""
    mine = loans.group_of(applicant.name)
    rows: list[tuple[str, str, str, list[Applicant], bool]] = []
    for gender in loans.GENDERS:
        chosen = [loans.names(gender, o, "report")[0] for o in loans.ORIGINS]
        people = [replace(applicant, name=name) for name in chosen]
        rows.append(("first name: gender", gender, ", ".join(chosen), people, mine is not None and mine[0] == gender))
    for origin in loans.ORIGINS:
        chosen = [loans.names(g, origin, "report")[0] for g in loans.GENDERS]
        people = [replace(applicant, name=name) for name in chosen]
        rows.append(("first name: origin", origin, ", ".join(chosen), people, mine is not None and mine[1] == origin))
    side, _, place = applicant.district.partition(" ")
    for other in loans.SIDES:
        district = f"{other} {place or applicant.district}"
        rows.append(("district", other, district, [replace(applicant, district=district)], other == side))
    for age in (25, 35, 45, 55, 65):
        near = abs(age - applicant.age) <= 5
        rows.append(("age", str(age), str(age), [replace(applicant, age=age)], near))
    logits = decide([a for row in rows for a in row[3]])
    found, start = [], 0
    for kind, group, shown, people, own in rows:
        x = logits[start : start + len(people)]
        start += len(people)
        found.append(Group(kind, group, shown, float(x.mean()), float(x.std()), len(people), own))
    return found


@torch.no_grad()
def arrival(model: Model, applicant: Applicant, layout: str) -> list[tuple[int, float, float]]:
    """Activation patching: with which layer has the other gender's name reached the decision position?

    The residual stream at the decision position is replaced by that of the same application with a name of the other
    gender, one layer at a time; 1 means that the whole difference between the two decisions arrives. Control: a name
    of the same group, in the same unit. Empty if the name is in none of our lists, or makes no difference.
    """
    mine = loans.group_of(applicant.name)
    if mine is None:
        return []
    other = loans.counterfactual(applicant, gender=next(g for g in loans.GENDERS if g != mine[0]))
    same = replace(applicant, name=next(n for n in loans.names(*mine) if n != applicant.name))
    base, target = (float(loans.decide(model, [a], layout)[0]) for a in (applicant, other))
    if abs(target - base) < 0.05:
        return []
    batch, rows = tokenize(model, loans.as_text(applicant, layout)), []
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    donors = [capture(model, tokenize(model, loans.as_text(a, layout)), sites) for a in (other, same)]
    yes, no = loans.answer_tokens(model)
    for site in sites[1::2]:
        shares = []
        for donor in donors:
            put = donor[site][:, -1:]
            with edit(model, site, lambda x, put=put: torch.cat([x[:, :-1], put], 1)):  # type: ignore[misc]
                logits = loans.final_logits(model, batch)[0]
            shares.append((float(logits[yes] - logits[no]) - base) / (target - base))
        rows.append((site.layer, shares[0], shares[1]))
    return rows


def population(decide: Decide, n: int, seed: int) -> tuple[list[Gap], Gap]:
    """Gaps over ``n`` new applicants, each compared with itself in another group, and the control.

    Names, districts and applicants of the report split. Control: another first name of the same group.
    """
    people = loans.applications(n, seed=2000 + seed)

    def district(a: Applicant, side: str) -> Applicant:
        return replace(a, district=f"{side} {a.district.partition(' ')[2]}")

    def same(a: Applicant) -> Applicant:
        group = loans.group_of(a.name)
        known = loans.names(*group, "report") if group else (a.name,)
        return replace(a, name=known[(known.index(a.name) + 1) % len(known)])

    foreign = loans.ORIGINS[1:]
    pairs: dict[tuple[str, str], tuple[list[Applicant], list[Applicant]]] = {
        ("gender", "women's against men's first names"): (
            [loans.counterfactual(a, gender="female") for a in people],
            [loans.counterfactual(a, gender="male") for a in people],
        ),
        ("nationality", "foreign against English first names"): (
            [loans.counterfactual(a, origin=foreign[i % len(foreign)]) for i, a in enumerate(people)],
            [loans.counterfactual(a, origin="english") for a in people],
        ),
        ("age", "60 against 30 years"): ([replace(a, age=60) for a in people], [replace(a, age=30) for a in people]),
        ("district", "East against West"): (
            [district(a, "East") for a in people],
            [district(a, "West") for a in people],
        ),
        ("control", "another first name of the same group"): ([same(a) for a in people], people),
    }
    flat = list({a: None for pair in pairs.values() for side in pair for a in side})
    known = dict(zip(flat, decide(flat), strict=True))
    rows = []
    for (attribute, label), (here, there) in pairs.items():
        x, y = (np.array([known[a] for a in side]) for side in (here, there))
        points = 100 * ((x > 0).astype(float) - (y > 0))
        names = [(a.name, b.name) for a, b in zip(here, there, strict=True)]  # which several applicants share
        intervals = cluster_bootstrap(x - y, names), cluster_bootstrap(points, names)
        rows.append((attribute, label, *intervals, cluster_sign_flip_p(x - y, names)))
    corrected = [*adjust([row[-1] for row in rows[:-1]], "holm"), rows[-1][-1]]
    gaps = [Gap(*row[:4], float(p)) for row, p in zip(rows, corrected, strict=True)]
    return gaps[:-1], gaps[-1]


# --- findings -----------------------------------------------------------------------------------------


def findings(found: Explanation, command: str = "glassbox explain") -> list[Finding]:
    """The page's statements with rung, interval and control."""
    neutral = max((e for e in found.effects if e.field in ("occupation", "purpose")), key=lambda e: abs(e.effect.value))
    looked = max(found.effects, key=lambda e: e.attention)
    share = looked.attention
    claim = f"the decision position looks at {_words(looked.field)} most (share of attention)"
    out = [Finding(claim, 1, share, (share, share), 1, source=command, unit="application")]
    for e in sorted(found.effects, key=lambda e: -abs(e.effect.value))[:3]:
        claim = f"{_words(e.field)} {e.value} moved this decision (logits)"
        sign = math.copysign(1, e.effect.value)
        what = f"{_words(neutral.field)}, a field that no rule uses, towards the same side"
        control = Control("other group", what, sign * abs(neutral.effect.value))
        side: Side = "above" if sign > 0 else "below"
        out.append(Finding.measured(claim, 3, e.effect, "swapped values", control, source=command, side=side))
    for gap in found.gaps:
        claim = f"{gap.label}: logit gap over many applicants"
        control = Control.measured("other group", "another name of the same group", found.control.logits)
        more = {"p_value": gap.p_value, "source": command}
        out.append(Finding.measured(claim, 4, gap.logits, "pairs of names", control, **more))
    return out


def _words(field: str) -> str:
    return field.replace("_", " ")


def as_json(found: Explanation) -> dict[str, Any]:
    """The measurements as plain values, for tests and for those who want to compute on."""
    return asdict(found)
