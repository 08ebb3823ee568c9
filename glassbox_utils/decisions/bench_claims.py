"""What notebook 07 claims of a model and a decision, as findings: each with its unit and what could have sunk it."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from glassbox_utils.core.evidence import Control, Finding, Side
from glassbox_utils.core.statistics import Interval, bootstrap_ci
from glassbox_utils.decisions import answer_page, locate, outcomes
from glassbox_utils.decisions.answer_page import Mitigation
from glassbox_utils.decisions.locate import Point
from glassbox_utils.decisions.outcomes import Measured, Outcome
from glassbox_utils.decisions.pairs import Contrast

UNIT = "people"
PLAIN, HELD, LIKE = "as it is", "10 located neurons held", "10 random neurons held"
"""names of the arms that claims are about"""
COUNTS = {10: "ten"}
"""numbers of units for which a claim is made"""


def order(scores: Mapping[str, NDArray], source: str, seed: int = 0) -> Finding:
    """``scores``: three wordings -> logits of each person: the first, its answers in the other order, its facts so."""
    first, answers, facts = scores
    turned = bootstrap_ci(scores[first] - scores[answers], seed=seed)
    control, side = _words(turned, f"{first!r} minus {facts!r}, either way", scores[first] - scores[facts], seed)
    claim = f"the order of the answers moves the decision ({first!r} minus {answers!r}, logits)"
    return Finding.measured(claim, 3, turned, UNIT, control, source=source, side=side)


def _words(effect: Interval, what: str, moves: NDArray, seed: int) -> tuple[Control, Side]:
    """How far other words move a score, either way (moves that cancel are moves), on the side of the effect: what is
    smaller than that is no effect."""
    sign = 1 if effect.value >= 0 else -1
    return Control.measured("base rate", what, bootstrap_ci(sign * np.abs(moves), seed=seed)), (
        "above" if sign > 0 else "below"
    )


def ranking(areas: Mapping[str, Interval], model: str, opponent: str, source: str) -> Finding:
    """Does the model (the scorer of that name) rank people better than an opponent who has a table of their facts?"""
    control = Control.measured("trained opponent", opponent, areas[opponent])
    claim = "the model ranks people better than a table of their facts does (AUC, mean of its wordings)"
    return Finding.measured(claim, 4, areas[model], UNIT, control, null=0.5, side="above", source=source)


def moved(differs: Contrast, gap: Interval, scores: Sequence[NDArray], source: str, seed: int = 0) -> list[Finding]:
    """``gap``: the same people with the other value, logits; beside it how far the same facts in other words move a
    score (``scores``: of some people in two wordings). Nothing is claimed where there is one wording."""
    if len(scores) < 2:
        return []
    control, side = _words(gap, "the same facts in other words, either way", scores[0] - scores[1], seed)
    claim = f"the same person with {differs.what} {differs.donor} instead of {differs.own} gets another score (logits)"
    return [Finding.measured(claim, 3, gap, UNIT, control, source=source, side=side)]


def carried(points: Sequence[Point], source: str) -> list[Finding]:
    """The first ten units of each basis against random ones of like activity."""
    found = []
    for p in (p for p in points if p.k in COUNTS and p.random_carried):
        what = f"{COUNTS[p.k]} {p.basis}"
        like = f"sets of {what}, the nearest in activity ({p.likeness:.1f} times)"
        control = Control.drawn("random units", like, p.random_carried)
        claim = f"{COUNTS[p.k]} located {p.basis} carry the gap to other people and words (share)"
        found.append(Finding.measured(claim, 3, p.carried, UNIT, control, side="above", source=source))
    return found


def held(differs: Contrast, measured: Sequence[Measured], source: str, seed: int = 0) -> Finding:
    """The share of the gap that located neurons take away when they are held, and as many random ones."""
    by_arm = outcomes.by(measured, "arm")
    gaps = {name: np.concatenate([np.subtract(m.donor, m.own) for m in by_arm[name]]) for name in (PLAIN, HELD, LIKE)}
    clusters = [c for m in by_arm[PLAIN] for c in m.clusters]
    ours, other = (locate.share(gaps[PLAIN] - gaps[name], gaps[PLAIN], clusters, seed) for name in (HELD, LIKE))
    control = Control.measured("random units", "ten others of like activity held", other)
    claim = f"ten located neurons held take away this share of what {differs.what} does"
    return Finding.measured(claim, 4, ours, UNIT, control, side="above", source=source)


def mitigation(
    differs: Contrast,
    found: Mapping[str, Outcome],
    source: str,
    elsewhere: Interval | None = None,
    may_count: bool = False,
) -> Mitigation:
    """What holding the located neurons did to the gap, and to the rest, for the page of one person. ``may_count``: the
    field that differs is no protected one."""
    said = "Ten neurons held at the middle between the groups."
    if may_count:
        said += f" {differs.what} may count: nothing that is protected is mended by this."
    return answer_page.mitigation(said, differs, found[PLAIN], found[HELD], source, elsewhere)
