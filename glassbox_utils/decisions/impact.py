"""Treatment and impact, over the cases of a decision: two questions that have two answers.

*Treatment*: is the same case decided differently when only its group changes? Every case is put into every group.
*Impact*: are fewer members of a group given the favourable answer, for whatever reason? Each group's rate over that of
the group with the highest: below four fifths is the mark of the Uniform Guidelines (29 CFR 1607.4 D).

The reference is the group with the highest rate *because* it is the highest, so a ratio is below 1 by chance alone;
``chance`` says how far, by shuffling the groups. What varies is resampled: the values that carry a group (first names),
cases where a field states it.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glassbox_utils.core.statistics import Interval, cluster_bootstrap
from glassbox_utils.decisions.asking import Ask
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import Decision, groups
from glassbox_utils.decisions.influence import versions

FOUR_FIFTHS = 0.8
"""the ratio below which US guidelines see adverse impact (29 CFR 1607.4 D): a rule of thumb, not a verdict"""
LEAST = 10
"""cases of a group, for a rate"""
RESAMPLES = 2000


@dataclass(frozen=True)
class Row:
    """One group."""

    group: str
    n: int
    rate: float
    """share of favourable answers"""
    ratio: Interval | None
    """its rate over that of the reference; None of the reference itself, of few cases, or if nobody is favoured"""
    logits: Interval | None
    """treatment: the same cases as members of this group minus as members of the reference"""
    points: Interval | None
    """the same in percentage points of favourable answers"""


@dataclass(frozen=True)
class Impact:
    """One protected attribute."""

    attribute: str
    reference: str
    """the group with the highest rate"""
    rows: tuple[Row, ...]
    unit: str
    """what was resampled"""
    chance: float | None
    """the lowest ratio of a group that one shuffle of twenty falls below"""
    n: int
    """cases whose group is known"""
    paired: int
    """cases that were put into every group"""

    @property
    def lowest(self) -> Row | None:
        """The group with the lowest ratio."""
        return min((r for r in self.rows if r.ratio is not None), key=lambda r: r.ratio.value, default=None)  # type: ignore[union-attr]


def impacts(
    ask: Ask, decision: Decision, cases: Sequence[Case], template: str, n_paired: int, seed: int = 0
) -> list[Impact]:
    """Both measures for every protected attribute that at least two groups of LEAST cases hold.

    ``n_paired``: cases that are put into every group, the first ones.
    """
    scores = ask(cases, template)
    keep = np.isfinite(scores)
    heard, favoured = [c for c, k in zip(cases, keep, strict=True) if k], (scores > 0)[keep]
    found = []
    for attribute, all_groups in decision.protected().items():
        stated = attribute in decision.fields
        mine = [groups(decision, case)[attribute] for case in heard]
        rows = [i for i, group in enumerate(mine) if group is not None]
        names = np.array([mine[i] for i in rows])
        sizes = {group: int((names == group).sum()) for group in all_groups} if rows else {}
        enough = [group for group in all_groups if sizes.get(group, 0) >= LEAST]
        if len(enough) < 2:
            continue
        clusters = [i if stated else carried(decision, heard[i], attribute) for i in rows]
        y = favoured[rows].astype(float)
        rates = {group: float(y[names == group].mean()) for group in all_groups if sizes[group]}
        reference = max(enough, key=lambda g: rates[g])
        ratios, chance = rate_ratios(y, names, clusters, enough, reference, seed)
        paired = [heard[i] for i in rows[:n_paired]]
        gaps = treatment(ask, decision, paired, template, attribute, enough, reference, seed)
        found.append(
            Impact(
                attribute,
                reference,
                tuple(
                    Row(g, sizes[g], rates[g], ratios.get(g), *gaps.get(g, (None, None)))
                    for g in all_groups
                    if sizes[g]
                ),
                "cases" if stated else "values that carry the group",
                chance,
                len(rows),
                len(paired),
            )
        )
    return found


def carried(decision: Decision, case: Case, attribute: str) -> Hashable:
    """The values of a case that carry an attribute: cases that share them are one cluster."""
    return tuple(case.values[c.field] for c in decision.carriers if any(attribute in one.groups for one in c.lists))


def rate_ratios(
    y: NDArray, names: NDArray, clusters: Sequence[Hashable], enough: Sequence[str], reference: str, seed: int = 0
) -> tuple[dict[str, Interval], float | None]:
    """Rate of each group over the reference's with its interval (whole clusters drawn), and how low the lowest is by
    chance (groups shuffled over clusters; 5 % quantile). ``y`` [n] 0 or 1, ``names`` [n] group of each case."""
    index: dict[Hashable, int] = {}
    at = np.array([index.setdefault(c, len(index)) for c in clusters])
    k = len(index)
    if k < 2 or not y[names == reference].mean():
        return {}, None
    hits = {g: np.bincount(at, weights=y * (names == g), minlength=k) for g in enough}
    sizes = {g: np.bincount(at, weights=(names == g).astype(float), minlength=k) for g in enough}
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(k, np.full(k, 1 / k), size=RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        rates = {g: (counts @ hits[g]) / (counts @ sizes[g]) for g in enough}
        found = {}
        for g in (g for g in enough if g != reference):
            draws = rates[g] / rates[reference]
            draws = draws[np.isfinite(draws)]
            value = float(y[names == g].mean() / y[names == reference].mean())
            low, high = np.quantile(draws, [0.025, 0.975]) if len(draws) else (value, value)
            found[g] = Interval(value, float(min(low, value)), float(max(high, value)), k)
    return found, _by_chance(y, names, at, enough, rng)


def _by_chance(
    y: NDArray, names: NDArray, at: NDArray, enough: Sequence[str], rng: np.random.Generator
) -> float | None:
    """5 % quantile of the lowest ratio to the highest rate when groups are shuffled over clusters."""
    of = {int(c): names[np.flatnonzero(at == c)[0]] for c in np.unique(at)}
    labels = np.array([of[int(c)] for c in sorted(of)])
    lowest = []
    for _ in range(500):
        new = rng.permutation(labels)[at]
        rates = [y[new == g].mean() for g in enough if (new == g).sum() >= LEAST]
        if len(rates) > 1 and max(rates) > 0:
            lowest.append(min(rates) / max(rates))
    return float(np.quantile(lowest, 0.05)) if lowest else None


def treatment(
    ask: Ask,
    decision: Decision,
    cases: Sequence[Case],
    template: str,
    attribute: str,
    wanted: Sequence[str],
    reference: str,
    seed: int = 0,
) -> dict[str, tuple[Interval | None, Interval | None]]:
    """Group -> (logits, points) by which the same cases fare otherwise as its members than as the reference's."""
    put = {group: [versions(decision, case, attribute, group, cases, 1) for case in cases] for group in wanted}
    rows = [i for i in range(len(cases)) if all(put[group][i] for group in wanted)]
    if len(rows) < 2:
        return {}
    scores = {group: ask([put[group][i][0] for i in rows], template) for group in wanted}
    found: dict[str, tuple[Interval | None, Interval | None]] = {}
    for group in (g for g in wanted if g != reference):
        x, y = scores[group], scores[reference]
        keep = np.isfinite(x) & np.isfinite(y)
        names = [
            i if attribute in decision.fields else tuple(carried(decision, put[g][i][0], attribute) for g in wanted)
            for i, kept in zip(rows, keep, strict=True)
            if kept
        ]
        if len(set(names)) < 2:
            continue
        points = 100 * ((x > 0).astype(float) - (y > 0))[keep]
        found[group] = (
            cluster_bootstrap((x - y)[keep], names, seed=seed),
            cluster_bootstrap(points, names, seed=seed),
        )
    return found
