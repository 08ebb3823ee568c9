"""What the full cycle claims of one model and one gap, as findings: each with its unit and what could have sunk it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from glassbox_utils.core.devices import array
from glassbox_utils.core.evidence import Control, Finding
from glassbox_utils.core.statistics import Interval, bootstrap_ci, cluster_bootstrap, rank_agreement
from glassbox_utils.decisions import locate, outcomes
from glassbox_utils.decisions.fidelity import ATTENTION, CAUSE, HELPFUL, RANDOM
from glassbox_utils.decisions.locate import Link, Point, Specificity
from glassbox_utils.decisions.outcomes import Measured

UNIT = "pairs of names"
KS = (1, 10)
"""numbers of units for which a claim is made"""
WEAK = 0.7
"""random units that change less than this many times as much could hardly have carried as much"""
FEW = 5
"""an interval over fewer clusters is hardly more than the range of what was seen: nothing is specific by it alone"""
SAID = {ATTENTION: "looked at most", RANDOM: "drawn at random"}


def behaviour(total: Interval, same: Interval, source: str = "") -> Finding:
    """``total``: the gap between two groups; ``same``: how far another name of the own group moves it, either way; both
    in logits. (With its sign the control would be nothing by construction, whatever names do.)"""
    claim = "the same case is decided less favourably under a name of the other group (logits)"
    control = Control.measured("base rate", "another name of the same group, either way", same)
    return Finding.measured(claim, 4, total, UNIT, control, side="above", source=source)


def carried(points: Sequence[Point], source: str = "") -> list[Finding]:
    """The first units of each basis against random ones of like activity."""
    found = []
    for p in (p for p in points if p.k in KS and len(p.random_carried) > 1):
        weak = ": a weak control" if p.likeness < WEAK else ""
        like = f"sets of {p.k} {p.basis}, the nearest in activity ({p.likeness:.1f} times{weak})"
        control = Control.drawn("random units", like, p.random_carried)
        which = f"a single located {p.basis.removesuffix('s')}" if p.k == 1 else f"{p.k} located {p.basis}"
        claim = f"{which} alone carry a share of the gap".replace("carry", "carries" if p.k == 1 else "carry")
        found.append(Finding.measured(claim, 3, p.carried, UNIT, control, side="above", source=source))
    return found


def specific(
    own: Sequence[Specificity], rows: Sequence[Specificity], attribute: str, source: str = "", unit: str = UNIT
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
        claim = f"{r.k} located {r.basis} carry little of the gap in {attribute}: they are specific (share, either way)"
        one = Finding.measured(claim, 3, either_way(r.carried), unit, half, side="below", null=None, source=source)
        if one.verdict == "held" and r.carried.n < FEW:
            one = replace(one, claim=f"{claim}; {r.carried.n} {unit} are too few to tell", declared="null")
        found.append(one)
    return found


def either_way(x: Interval) -> Interval:
    """The size of a share: units that work as far *against* an effect are no more specific than those that carry it."""
    ends = sorted((abs(x.low), abs(x.high)))
    return replace(x, value=abs(x.value), low=0.0 if x.low < 0 < x.high else ends[0], high=ends[1])


def shuffled(looked: Tensor, moved: Tensor, seed: int = 0, n: int = 2000) -> NDArray:
    """Rank correlations of two mean scores, [person, field] each, with the fields of the second dealt out anew."""
    rng = np.random.default_rng(seed)
    x, y = (rankdata(array(part).mean(0)) for part in (looked, moved))
    return np.array([np.corrcoef(x, rng.permutation(y))[0, 1] for _ in range(n)])


def ranked(looked: Tensor, moved: Tensor, most: int, seed: int = 0) -> tuple[Interval, NDArray, str]:
    """Rank agreement of attention and effect over all fields, ``shuffled``, and both in words, with the agreement over
    all but the field ``most``. ``looked``, ``moved``: [person, field]."""
    rest = [i for i in range(looked.shape[1]) if i != most]
    agreement, without = (rank_agreement(looked[:, i], moved[:, i]) for i in (slice(None), rest))
    chance = shuffled(looked, moved, seed)
    asked = (("all fields", agreement), ("all but the one that is looked at most", without))
    lines = [f"rank agreement over {what}: {x.value:.2f} [{x.low:.2f}, {x.high:.2f}]" for what, x in asked]
    share = (chance >= agreement.value).mean()
    lines += [f"of shuffles of the {len(rest) + 1} fields {share:.0%} agree as much over all of them"]
    return agreement, chance, "\n".join(lines)


def ranks(agreement: Interval, chance: NDArray, people: str = "applicants", source: str = "") -> Finding:
    """Does attention rank the fields as they move the decision? ``chance``: of ``shuffled``. People are resampled; the
    fields, which are few, are what the control deals out."""
    low, high = np.quantile(chance, [0.025, 0.975])
    control = Control("shuffled labels", "95 % of shuffles of the fields", float(chance.mean()), (low, high))
    claim = "attention ranks the fields as they move the decision (rank correlation)"
    return Finding.measured(claim, 3, agreement, people, control, side="above", source=source)


def looked_at(moved: Tensor, most: int, people: str = "applicants", source: str = "") -> Finding:
    """Does the field that is looked at most move the decision more than the others do? ``moved``: [person, field]."""
    rest = [i for i in range(moved.shape[1]) if i != most]
    claim = "the field that is looked at most moves the decision further than the other fields do (logits)"
    control = Control.measured("base rate", "the other fields, mean", bootstrap_ci(moved[:, rest].mean(1)))
    return Finding.measured(claim, 3, bootstrap_ci(moved[:, most]), people, control, side="above", source=source)


def path(links: Sequence[Link], source: str = "") -> list[Finding]:
    """Do the neurons where the groups differ act through the located heads? Control: as many random heads frozen."""
    frozen = {x.frozen: x.carried for x in links if x.what == "neurons" and x.place == "carrier" and x.frozen}
    ours, other = frozen.get("heads at decision"), frozen.get("random heads at decision")
    if ours is None or other is None:
        return []
    control = Control.measured("random units", "as many random heads frozen there", other)
    claim = (
        "located neurons where the groups differ carry less while the located heads are frozen at the decision (share)"
    )
    return [Finding.measured(claim, 3, ours, UNIT, control, side="below", null=None, source=source)]


def closed(measured: Sequence[Measured], arm: str, random: str, plain: str = "as it is") -> tuple[Interval, Interval]:
    """Share of the gap in logits that an arm closes, and that as many random units close, each in the wordings in which
    it was measured; whole clusters are drawn."""
    by_arm = outcomes.by(measured, "arm")
    before = {m.template: m for m in by_arm[plain]}

    def share(name: str) -> Interval:
        after = by_arm[name]
        was, left = (
            np.concatenate([np.subtract(m.donor, m.own) for m in some])
            for some in ([before[m.template] for m in after], after)
        )
        return locate.share(was - left, was, [c for m in after for c in m.clusters])

    return share(arm), share(random)


def mended(
    measured: Sequence[Measured], moved: Mapping[str, Interval], arm: str, random: str, source: str = ""
) -> list[Finding]:
    """What holding the located units does to the gap, and how far it moves ordinary text (``arms.prices``; perplexity,
    which a damage may lower, claims nothing)."""
    ours, other = closed(measured, arm, random)
    control = Control.measured("random units", "as many neurons of like activity, held alike", other)
    claim = "located neurons held at their mean close a share of the gap"
    also = Control.measured("random units", "as many neurons of like activity, held alike", moved[random])
    changed = "holding them changes what is foreseen of ordinary text (KL to the officer as it is, nats a token)"
    return [
        Finding.measured(claim, 3, ours, UNIT, control, side="above", source=source),
        Finding.measured(changed, 5, moved[arm], "texts", also, side="above", source=source),
    ]


def pushed_back(
    moves: Mapping[tuple[str, str, float], Tensor], arm: str, random: str, clusters: Sequence[Any], source: str = "",
    plain: str = "as it is",
) -> Finding:  # fmt: skip
    """How much less the same push moves decisions after the mend, and after ``random`` units were held alike. (A random
    *vector* would be no control: it moves nothing before the mend either.) ``moves``: (arm, vector, strength) -> logits
    of each."""

    def less(name: str) -> Interval:
        before, after = (moves[one, "difference", 1.0].abs() for one in (plain, name))
        return cluster_bootstrap(before - after, clusters)

    control = Control.measured("random units", "the same push while as many random neurons are held", less(random))
    claim = "pushed back in after the mend, the groups' difference moves decisions less than before it (logits)"
    return Finding.measured(claim, 3, less(arm), UNIT, control, side="above", source=source)


def reasons_turn(table: Mapping[str, Any], source: str = "study explain-fidelity") -> list[Finding]:
    """From the stored study, decision by decision: named reasons against as many fields that are looked at most, and
    against those of their strongest rival. Control: as many fields that were drawn among those that help."""
    flips = {m["name"]: m["flips"]["value"] for m in table["summary"]["methods"]}
    rivals = (ATTENTION, max(flips.keys() - {CAUSE, HELPFUL}, key=flips.__getitem__))
    counted = [r for r in table["rows"] if r.get(CAUSE, {}).get("flips") is not None]
    clusters = [r["cluster"] for r in counted]
    unit = table["summary"].get("unit", "cases")

    def more(name: str, rival: str) -> Interval:
        return cluster_bootstrap([r[name]["flips"] - r[rival]["flips"] for r in counted], clusters)

    claims = list[Finding]()
    for rival in dict.fromkeys(rivals):
        claim = (
            "mending the two named reasons turns more decisions than mending the two that are "
            f"{SAID.get(rival, rival)} (difference of shares, decision by decision)"
        )
        what = "two fields drawn among those that help, less the same rival"
        control = Control.measured("base rate", what, more(HELPFUL, rival))
        of = f"groups of {unit}" if " " in unit else unit
        claims.append(Finding.measured(claim, 4, more(CAUSE, rival), of, control, side="above", source=source))
    return claims
