"""What the full cycle claims of one model and one gap, as findings: each with its unit and what could have sunk it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from glassbox_utils.core.evidence import Control, Finding
from glassbox_utils.core.statistics import Interval, cluster_bootstrap
from glassbox_utils.decisions import locate, outcomes
from glassbox_utils.decisions.locate import Point, Specificity
from glassbox_utils.decisions.outcomes import Measured

UNIT = "pairs of names"
KS = (1, 10)
"""numbers of units for which a claim is made"""


def behaviour(total: Interval, same: Interval, source: str = "") -> Finding:
    """``total``: the gap between two groups; ``same``: what another name of the own group does, both in logits."""
    claim = "the same case is decided less favourably under a name of the other group (logits)"
    control = Control.measured("other group", "another name of the same group", same)
    return Finding.measured(claim, 4, total, UNIT, control, side="above", source=source)


def carried(points: Sequence[Point], source: str = "") -> list[Finding]:
    """The first units of each basis against random ones of like activity."""
    found = []
    for p in (p for p in points if p.k in KS and len(p.random_carried) > 1):
        control = Control.drawn("random units", f"sets of {p.k} {p.basis} of like activity", p.random_carried)
        which = f"a single located {p.basis.removesuffix('s')}" if p.k == 1 else f"{p.k} located {p.basis}"
        claim = f"{which} alone carry a share of the gap".replace("carry", "carries" if p.k == 1 else "carry")
        found.append(Finding.measured(claim, 3, p.carried, UNIT, control, side="above", source=source))
    return found


def specific(
    own: Sequence[Specificity], rows: Sequence[Specificity], attribute: str, source: str = ""
) -> list[Finding]:
    """Do the units of each basis carry less than half as much of another attribute's gap as of their own?

    ``own``: what they carry of theirs, in the same wording, one row a basis.
    """
    mine, found = {r.basis: r.carried for r in own}, []
    for r in (r for r in rows if r.what.startswith(f"{attribute}:")):
        bar = mine.get(r.basis)
        if r.carried is None or bar is None:
            continue
        half = Control("other group", "half of the share that they carry of their own gap", bar.value / 2,
                       (bar.low / 2, bar.high / 2))  # fmt: skip
        claim = f"{r.k} located {r.basis} carry little of the gap in {attribute}: they are specific (share)"
        found.append(Finding.measured(claim, 3, r.carried, UNIT, half, side="below", null=None, source=source))
    return found


def closed(measured: Sequence[Measured], arm: str, random: str, plain: str = "as it is") -> tuple[Interval, Interval]:
    """Share of the gap in logits that an arm closes, and that as many random units close; whole clusters are drawn."""
    by_arm = outcomes.by(measured, "arm")
    left = {name: np.concatenate([np.subtract(m.donor, m.own) for m in by_arm[name]]) for name in (plain, arm, random)}
    clusters = [c for m in by_arm[plain] for c in m.clusters]
    ours, other = (locate.share(left[plain] - left[name], left[plain], clusters) for name in (arm, random))
    return ours, other


def mended(
    measured: Sequence[Measured], costs: Mapping[str, Interval], arm: str, random: str, source: str = ""
) -> list[Finding]:
    """What holding the located units does to the gap, and what it costs ordinary text."""
    ours, other = closed(measured, arm, random)
    control = Control.measured("random units", "as many neurons of like activity, held alike", other)
    claim = "located neurons held at their mean close a share of the gap"
    cost = Control.measured("random units", "as many neurons of like activity, held alike", costs[random])
    paid = "holding them costs ordinary text, without any gate (perplexity, times)"
    return [
        Finding.measured(claim, 3, ours, UNIT, control, side="above", source=source),
        Finding.measured(paid, 5, costs[arm], "texts", cost, side="above", null=1.0, source=source),
    ]


def pushed_back(
    moves: Mapping[tuple[str, str, float], Tensor], arm: str, clusters: Sequence[Any], source: str = "",
    plain: str = "as it is",
) -> Finding:  # fmt: skip
    """How much less a push moves decisions after the mend; ``moves``: (arm, vector, strength) -> logits of each."""
    less = cluster_bootstrap(moves[plain, "difference", 1.0].abs() - moves[arm, "difference", 1.0].abs(), clusters)
    random = cluster_bootstrap(moves[plain, "random", 1.0].abs() - moves[arm, "random", 1.0].abs(), clusters)
    control = Control.measured("random units", "a random vector of the same length", random)
    claim = "pushed back in after the mend, the groups' difference moves decisions less than before it (logits)"
    return Finding.measured(claim, 3, less, UNIT, control, side="above", source=source)


def reasons_turn(summary: Mapping[str, Any], source: str = "study explain-fidelity") -> Finding:
    """From the stored study: named reasons against as many fields that attention names."""
    flips = {m["name"]: Interval(**m["flips"]) for m in summary["methods"]}
    control = Control.measured("trained opponent", "as many fields that attention names", flips["attention"])
    claim = "mending the two named reasons turns the decision (share)"
    return Finding.measured(claim, 4, flips["cause"], summary.get("unit", "cases"), control, side="above",
                            source=source)  # fmt: skip
