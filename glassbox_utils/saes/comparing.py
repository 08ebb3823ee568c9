"""Which kind of unit is ahead of another, by what varies: units, and where several dictionaries gave them, those first.

A kind of which every seed has a dictionary of its own (``DICTIONARIES``) varies twice: its intervals draw dictionaries,
then units of each that was drawn. The main SAE is one training run: its intervals say how other *features of it* would
do, and nothing of another run. Many comparisons are made at once; ``Gap.holm`` is the p-value after Holm over all.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glassbox_utils.core.statistics import Interval, adjust

DICTIONARIES = ("trained", "frozen", "random_sae")
"""kinds of units with a dictionary of each seed; those of one seed share data and start, and are drawn together"""
ONCE = "pca"
"""a kind whose units are the same ones under every seed, and count once"""
DRAWS = 20_000
Units = Sequence[Mapping[str, float]]
Kinds = Mapping[str, Sequence[Units]]
"""kind -> seed -> unit -> scores, as the table ``sae_meaning`` keeps them"""


class Gap(NamedTuple):
    """By how much one kind is ahead of another."""

    interval: Interval
    p: float
    """two-sided, from the same draws as the interval"""
    holm: float
    """after Holm over all that were asked together"""

    @property
    def clear(self) -> bool:
        """Does it survive the correction?"""
        return self.holm < 0.05


def parts(kinds: Kinds, kind: str, score: str) -> list[NDArray]:
    """A score of a kind's units, seed by seed; seeds without a unit are left out."""
    chosen = kinds.get(kind, ())[: 1 if kind == ONCE else None]
    return [np.array([u[score] for u in part]) for part in chosen if part]


def pooled(kinds: Kinds, kind: str, score: str) -> NDArray:
    """The same of all seeds."""
    return np.concatenate([np.zeros(0), *parts(kinds, kind, score)])


def draws(kinds: Kinds, kind: str, score: str, seed: int = 0, n: int = DRAWS) -> NDArray:
    """Means of ``n`` resamples of a kind: of its units, or of its dictionaries and then of their units."""
    of_dictionaries, of_units = np.random.default_rng(seed), np.random.default_rng([seed, *f"{kind} {score}".encode()])
    mine = parts(kinds, kind, score)
    if kind not in DICTIONARIES or len(mine) < 2:
        units = np.concatenate(mine)
        return units[of_units.integers(0, len(units), (n, len(units)))].mean(1)
    picked = of_dictionaries.integers(0, len(mine), (n, len(mine)))  # the same in every kind: drawn together
    found = np.zeros((n, len(mine)))
    for i, part in enumerate(mine):
        where = np.nonzero(picked == i)
        found[where] = part[of_units.integers(0, len(part), (len(where[0]), len(part)))].mean(1)
    return found.mean(1)


def interval(kinds: Kinds, kind: str, score: str, seed: int = 0) -> Interval | None:
    """Mean of a kind with its interval, None of fewer than two units; ``n``: how many of ``unit_of`` were drawn."""
    values = pooled(kinds, kind, score)
    if len(values) < 2:
        return None
    low, high = np.quantile(draws(kinds, kind, score, seed), [0.025, 0.975])
    n = len(parts(kinds, kind, score)) if kind in DICTIONARIES else len(values)
    return Interval(float(values.mean()), float(low), float(high), n)


def unit_of(kind: str) -> str:
    """What was resampled for a kind, in the plural."""
    return "dictionaries, then units" if kind in DICTIONARIES else "units of one SAE" if kind == "main" else "units"


def gaps(
    kinds: Kinds, sides: Sequence[tuple[str, str]], scores: Sequence[str], seed: int = 0
) -> dict[tuple[str, str], dict[str, Gap]]:
    """By how much the first kind of each pair is ahead of the second, score by score; pairs without units left out."""
    known = {kind for side in sides for kind in side if len(pooled(kinds, kind, scores[0])) > 1}
    asked = [(a, b, s) for a, b in sides if {a, b} <= known for s in scores]
    drawn = {(kind, s): draws(kinds, kind, s, seed) for kind in known for s in scores}
    rows: list[tuple[Interval, float]] = []
    for a, b, s in asked:
        x, y = pooled(kinds, a, s), pooled(kinds, b, s)
        gap = drawn[a, s] - drawn[b, s]
        low, high = np.quantile(gap, [0.025, 0.975])
        less = min((gap <= 0).sum(), (gap >= 0).sum())
        rows.append((Interval(float(x.mean() - y.mean()), float(low), float(high), min(len(x), len(y))),
                     min(1.0, float(2 * (less + 1) / (len(gap) + 1)))))  # fmt: skip
    found: dict[tuple[str, str], dict[str, Gap]] = {}
    for (a, b, s), (ci, p), holm in zip(asked, rows, adjust([p for _, p in rows], "holm") if rows else (), strict=True):
        found.setdefault((a, b), {})[s] = Gap(ci, p, float(holm))
    return found


def off_by(live: Mapping[str, Units], kinds: Kinds, a: str, b: str, score: str, seed: int = 0) -> float:
    """By how many standard errors the lead of one kind over another, among a few units measured elsewhere, is off the
    study's. (Less text lowers the scores of both kinds, so means by themselves are not comparable.)"""
    lead, error = 0.0, 0.0
    for kind, sign in ((a, 1), (b, -1)):
        mine, theirs = np.array([u[score] for u in live[kind]]), pooled(kinds, kind, score)
        lead += sign * float(mine.mean() - theirs.mean())
        error += float(mine.var(ddof=1)) / len(mine) + float(draws(kinds, kind, score, seed, 2000).var())
    return lead / max(float(np.sqrt(error)), 1e-9)


def row_of(kinds: Kinds, kind: str, score: str) -> dict[str, Any]:
    """A line of the table ``sae_meaning``: a kind's mean, its seeds' means, and the main SAE's lead over it."""
    mine, mean = pooled(kinds, kind, score), interval(kinds, kind, score)
    ahead = gaps(kinds, [("main", kind)], [score]).get(("main", kind)) if kind != "main" else None
    return {
        "kind": kind,
        "score": score,
        "n": len(mine),
        "mean": mean and _three(mean),
        "seeds": [round(float(np.mean([u[score] for u in part])), 4) if part else None for part in kinds[kind]],
        "ahead": ahead and _three(ahead[score].interval),
    }


def _three(interval: Interval) -> list[float]:
    return [round(v, 4) for v in (interval.value, interval.low, interval.high)]
