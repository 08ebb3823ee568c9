"""How the questions that a screen chose are best said: where windows end, and of several ways to say the same the
plainest one. All of it is done on the half that chose.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from glassbox_utils.decisions import probes as asking
from glassbox_utils.decisions import screening
from glassbox_utils.decisions.decision import Decision
from glassbox_utils.decisions.probes import Design, Part, Probe, Questions
from glassbox_utils.decisions.screening import Fit, Weights

Spans = list[tuple[int, int]]
"""first and last piece of windows"""
MANY = 5
"""values from which on those of a field are a sample of words, with a spread of their own"""


@dataclass(frozen=True, eq=False)
class Half:
    """The questions and answers of one half of the base cases."""

    design: Design
    raw: Float[NDArray, " asked"]
    y: Float[NDArray, " asked"]
    """scores without the mean of their block"""

    def columns(self, probes: Sequence[Probe]) -> Float[NDArray, "asked probe"]:
        return self.design.without_blocks(asking.matrix(self.design, probes))

    def codes(self, probes: Sequence[Probe]) -> list[NDArray | None]:
        """What a carried group is a sample of: the names or places that were drawn for it."""
        found: list[NDArray | None] = []
        for probe in probes:
            many = [p for p in probe.parts if p.group]
            many = [p for p in many if p.field in self.design.varied and len(self.design.codes[p.field][0]) >= MANY]
            found.append(self.design.codes[many[0].field][1] if many else None)
        return found

    def fit(
        self,
        chosen: Sequence[Probe],
        y: Float[NDArray, " asked"] | None = None,
        weights: Weights | None = None,
        like: Float[NDArray, " probe"] | None = None,
    ) -> Fit:
        """All of them together; ``y``: other than the scores."""
        y = self.y if y is None else y
        weights = screening.once(self.design.shape) if weights is None else weights
        return screening.fit(y, self.columns(chosen), self.design.shape, self.codes(chosen), weights, like)

    def left(self, chosen: Sequence[Probe]) -> float:
        """Sum of squares that probes leave of the scores."""
        return float((screening.without(self.y, self.columns(chosen)) ** 2).sum())


def prices(asked: Questions, probes: Sequence[Probe]) -> Float[NDArray, " probe"]:
    """What a question pays for the number of its kind."""
    return np.array([2 * np.log(max(asked.sizes[probe.family], 2)) for probe in probes])


def refined(decision: Decision, half: Half, chosen: Sequence[Probe], asked: Questions) -> list[Probe]:
    """Ends of windows are looked for again, beside all that was chosen; several of one number are put side by side;
    then what is no longer worth confirming beside the others is left out, weakest first."""
    kept = list(chosen)
    for i, j in ((i, j) for i, probe in enumerate(chosen) for j, part in enumerate(probe.parts) if part.window):
        values, codes = half.design.codes[kept[i].parts[j].field]
        fine = asking.windows(kept[i].parts[j].subject, [values[k] for k in codes], asking.FINE)
        tried = [kept[i], *(_with(kept[i], j, window) for window in fine)]
        others = half.columns([probe for k, probe in enumerate(kept) if k != i])
        whole = half.columns(tried)
        x, y = screening.without(whole, others), screening.without(half.y, others)
        norms, before = (x * x).sum(0), (whole * whole).sum(0)
        gain = (x.T @ y) ** 2 / np.maximum(norms, 1)
        kept[i] = tried[int(np.argmax(np.where(norms > np.maximum(screening.DISTINCT * before, 1), gain, 0)))]
    kept = apart(half, list(dict.fromkeys(kept)), asked)
    while kept:
        joint = half.fit(kept)
        worth = (joint.effects / joint.plain) ** 2 - prices(asked, kept)
        if worth.min() > screening.STOP:
            break
        kept.pop(int(worth.argmin()))
    return plainer(decision, half, kept, asked)


def _with(probe: Probe, j: int, part: Part) -> Probe:
    """A probe with another part in one place."""
    return replace(probe, parts=(*probe.parts[:j], part, *probe.parts[j + 1 :]))


def apart(half: Half, chosen: list[Probe], asked: Questions) -> list[Probe]:
    """Several windows of one number as windows side by side: "against 13 to 15", not "for 12, against 12 to 15".

    Overlapping ones can have large effects that cancel, and each would be judged as if the others were not.
    """
    kept = list(chosen)
    for first, j in ((probe, j) for probe in chosen for j, part in enumerate(probe.parts) if part.window):
        mine = [one for one in kept if _same_but(one, first, j)]
        if len(mine) > 1:
            rest = [one for one in kept if one not in mine]
            kept = [*rest, *side_by_side(half, mine, j, rest, float(prices(asked, [first])[0]) + screening.STOP)]
    return kept


def _same_but(a: Probe, b: Probe, j: int) -> bool:
    """Do two probes ask about windows of one number, and otherwise the same?"""
    if len(a.parts) != len(b.parts) or not a.parts[j].window or a.parts[j].field != b.parts[j].field:
        return False
    return all(x == y for k, (x, y) in enumerate(zip(a.parts, b.parts, strict=True)) if k != j)


def side_by_side(half: Half, mine: list[Probe], j: int, rest: list[Probe], price: float) -> list[Probe]:
    """``mine``, which differ in the window of part ``j``, as windows that do not overlap.

    All their ends cut the number into pieces. One piece is what the others are compared with (each is tried); of those,
    one is left out, or joined with the next, as long as that explains less badly than a question costs. ``mine`` stay
    as they are if that needs two questions more.
    """
    values = sorted(half.design.codes[mine[0].parts[j].field][0])
    runs = [list(run) for _, run in groupby(values, lambda v: tuple(one.parts[j].hold(v) for one in mine))]
    given = half.columns(rest)

    def said(first: int, last: int) -> Probe:
        return _with(mine[0], j, replace(mine[0].parts[j], values=(runs[first][0], runs[last][-1])))

    x = screening.without(half.columns([said(k, k) for k in range(len(runs))]), given)
    y = screening.without(half.y, given)
    products, pull, hits = x.T @ x, x.T @ y, asking.matrix(half.design, [said(k, k) for k in range(len(runs))]).sum(0)
    noise = max(half.left([*rest, *mine]) / len(y), 1e-18)

    def cost(spans: Spans) -> tuple[float, float]:
        """What it leaves, with what its questions cost; and how many prompts it singles out, where that is the same."""
        inside = np.array([[float(a <= k <= b) for a, b in spans] for k in range(len(runs))]).reshape(len(runs), -1)
        of = inside.T @ pull
        left = float(y @ y - of @ np.linalg.pinv(inside.T @ products @ inside, hermitian=True) @ of)
        return round(left / noise + price * len(spans), 3), float((hits @ inside).sum())

    found: list[Spans] = []
    for base in range(len(runs)):
        now: Spans = [(k, k) for k in range(len(runs)) if k != base]
        while now:
            fewer = [[one for one in now if one != out] for out in now]
            for a, b in pairwise(now):
                if a[1] + 1 == b[0]:
                    fewer.append([(a[0], b[1]) if one == a else one for one in now if one != b])
            best = min(fewer, key=cost)
            if cost(best) >= cost(now):
                break
            now = best
        found.append(now)
    best = min(found, key=cost)
    return [said(*span) for span in best] if cost(best)[0] < len(y) + (len(mine) + 2) * price else mine


def plainer(decision: Decision, half: Half, chosen: list[Probe], asked: Questions) -> list[Probe]:
    """Of several ways to say the same, that with the smallest effects: "women who ask for a wedding", not "weddings,
    but not of men"; "against tenants", not "in favour of owners, and of those who live rent-free"."""

    def size(probes: Sequence[Probe]) -> tuple[float, float]:
        return half.left(probes), float(np.abs(half.fit(probes).effects).sum())

    for i, j in ((i, j) for i, probe in enumerate(chosen) for j in range(len(probe.parts))):
        part, others = chosen[i].parts[j], list[Part]()
        if len(chosen[i].parts) > 1:
            other = asking.opposite(decision, half.design, part)
            others = [other] if other is not None else []
        elif chosen[i].family == "group":
            groups = (one.parts[0] for one in asked.probes if one.family == "group")
            others = [one for one in groups if one.subject == part.subject and one != part]
        for other in others:
            turned = [*chosen]
            turned[i] = _with(chosen[i], j, other)
            if len(set(turned)) < len(turned):
                continue
            (rest, effects), (others_rest, others_effects) = size(chosen), size(turned)
            if others_rest < rest * 1.001 and others_effects < effects:
                chosen = turned
    return list(dict.fromkeys(chosen))
