"""What a model knows of groups where it decides, and what it would do with it: white-box probes, beside an audit.

An audit asks; a model that behaves on what is asked is acquitted. A probe looks inside, at the same prompts:

- *told*: does the residual stream at the decision position say the group? The groups' mean difference is fitted on one
  half of names and cases; told is the share of other pairs that it orders rightly (chance: a half). Not to decide by
  the group does not mean not to know it, so that an honest officer is the yardstick, not chance.
- *woken*: the groups' mean difference at the carrier's tokens, a third of the way through the layers, is added several
  times over. Does it move the decision, beyond random vectors of the same length? What a gate holds back may answer to
  more than a name usually is.

Neither was known to find anything; ``planted_study`` measures what they are worth on officers with a known lesson.
"""

from dataclasses import dataclass

import numpy as np

from glassbox_utils.core import prepared
from glassbox_utils.core.arguments import whole
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import Model
from glassbox_utils.core.statistics import Interval, cluster_bootstrap
from glassbox_utils.decisions import arms, mitigation, pairs, scoring
from glassbox_utils.decisions.decision import Decision
from glassbox_utils.decisions.directions import pushes, reactivated
from glassbox_utils.decisions.fields import Category, DecisionError, Number, band_of
from glassbox_utils.decisions.pairs import Contrast

TIMES = (1.0, 3.0)
"""how often the difference is added"""
DRAWS = 4
"""random vectors"""
LATE = 26
"""of 30 layers: after the one at this depth what is told is read"""


@dataclass(frozen=True)
class Inside:
    """One group against another, inside a model."""

    what: str
    """an attribute or a field"""
    group: str
    other: str
    told: Interval
    """share of pairs; unit: what carries the group"""
    moved: tuple[float, ...]
    """logits by which the difference of the groups, each of TIMES as long, moves decisions about the other group"""
    by_chance: tuple[float, ...]
    """root mean square of the same for random vectors of those lengths"""
    template: str

    @property
    def woken(self) -> float:
        """Logits beyond twice what random vectors of the length do, at the length where that is most; at least 0."""
        return max(0.0, *(abs(x) - 2 * other for x, other in zip(self.moved, self.by_chance, strict=True)))


def comparisons(model: Model, decision: Decision) -> list[Contrast]:
    """Each group of every protected attribute against the first of the others; of a number one value of each band."""
    found = []
    for what, groups in decision.protected().items():
        rule = decision.fields.get(what)
        values: list[str | int | float] = list(groups)
        if isinstance(rule, Number):
            by_band: dict[str, list[float]] = {}
            for case in decision.cases:
                by_band.setdefault(band_of(rule, float(case.values[what])), []).append(case.values[what])  # type: ignore[arg-type]
            values = [sorted(some)[len(some) // 2] for some in by_band.values()]
        if len(values) > 1:
            later = values[1:] if len(values) > 2 or isinstance(rule, Number | Category) else values[:1]
            found += [Contrast(what, one, next(v for v in values if v != one)) for one in later]
    return found


def look(
    model: Model, decision: Decision, n: int = 16, draws: int = DRAWS, seed: int = 0, template: str | None = None
) -> tuple[list[Inside], dict[str, str]]:
    """Every comparison that can be made, and why others can't. ``n``: pairs of each half, with some 20
    prompts for each in a comparison.

    By default in the first template that ``pairs`` chooses in. DecisionError for numbers or a template that are none.
    """
    whole("n", n, 4, DecisionError)
    whole("draws", draws, 1, DecisionError)
    if template is not None:
        decision.template(template)
    found, skipped = [], {}
    for differs in comparisons(model, decision):
        name = template or pairs.choosing_templates(decision, differs.what)[0]
        try:
            found.append(_one(model, decision, differs, name, n, draws, seed))
        except GlassboxError as reason:
            skipped[str(differs)] = " ".join(str(reason).split())
    return found, skipped


def _one(model: Model, decision: Decision, differs: Contrast, name: str, n: int, draws: int, seed: int) -> Inside:
    chosen, held = (
        pairs.aligned(model, decision, pairs.twins(model, decision, differs, part, n, seed), name, differs)
        for part in ("choose", "report")
    )
    late = prepared.depth(model, LATE)
    states = []
    for some in (chosen, held):
        texts = [scoring.prompts(model, decision, cases, name) for cases in arms.sides(some.twins)]
        states.append([mitigation.decision_states(model, one, [late])[:, 0] for one in texts])
    line = (states[0][0] - states[0][1]).mean(0)
    right = ((states[1][0] - states[1][1]) @ line > 0).float()
    layer = (model.n_layers - 1) // 3
    vectors = pushes(model, chosen, layer, seed, draws)
    logits = reactivated(model, held, [arms.nothing()], layer, vectors, (0.0, *TIMES))
    by = {
        key: [float((logits["as it is", key, times] - logits["as it is", key, 0.0]).mean()) for times in TIMES]
        for key in vectors
    }
    random = np.array([by[key] for key in vectors if key != "difference"])
    return Inside(
        differs.what, str(differs.own), str(differs.donor), cluster_bootstrap(right, held.clusters, seed=seed),
        tuple(by["difference"]), tuple(np.sqrt((random**2).mean(0)).tolist()), name,
    )  # fmt: skip
