"""Principal reasons: which permissible fields, mended alone, move this decision towards the other answer.

A reason is a field of the role merit. It is *mended*: its value is replaced by one that is typical of other cases with
the other answer, and all else stays. It counts if the decision moves towards the other answer in (nearly) every
template, by more than other words for the same facts do, and not by a trifle. Protected fields and fields of the role
other are never looked at here.

Values are chosen on other cases than the one that is explained. The official commentary to Regulation B, 1002.9(b)(2),
compares with applicants at or slightly above the line, or with all; that a reason was "actually considered" is what the
causal test is for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from glassbox_utils.core.statistics import Interval, bootstrap_ci
from glassbox_utils.decisions.asking import Ask, across
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import Decision
from glassbox_utils.decisions.fields import Number, Value

MOST = 4
"""reasons that are named; the commentary to Regulation B, 1002.9(b)(2), 1, calls more of little help"""
STABLE = 0.9
"""share of the templates in which mending must move the decision the same way"""
TRIFLE = 0.1
"""of the strongest reason's effect: a field that moves the decision by less is not a principal reason"""
FEWEST = 5
"""other cases with the other answer, for a typical value"""


@dataclass(frozen=True)
class FieldTest:
    """What mending one field alone did to the decision."""

    field: str
    value: Value
    typical: Value
    """of other cases with the other answer"""
    effects: dict[str, float]
    """template -> change of the score in logits"""
    effect: Interval | None
    """mean over the templates, which are what is resampled; None if no template answers"""
    agree: int
    """templates in which the decision moves towards the other answer"""
    towards: float
    """mean move towards the other answer, in logits"""

    @property
    def stable(self) -> bool:
        """The same way in nearly all templates; of one template nothing is known, and nothing is held against it."""
        return self.agree >= STABLE * len(self.effects) > 0

    @property
    def counts(self) -> bool:
        """Does mending it move the decision towards the other answer, whatever the words?"""
        return self.stable and self.towards > 0 and (self.effect is None or self.effect.n < 2 or self.effect.excludes())


def merit_fields(decision: Decision) -> list[str]:
    """Fields that may count."""
    return [name for name, rule in decision.fields.items() if rule.role == "merit"]


def others(case: Case, cases: Sequence[Case]) -> list[Case]:
    """Cases that are not this one: another id and other values."""
    return [c for c in cases if c.id != case.id and dict(c.values) != dict(case.values)]


def typical(decision: Decision, cases: Sequence[Case], names: Sequence[str]) -> dict[str, Value]:
    """The usual value of each field: the median that occurs of a number, the most frequent of other values."""
    found: dict[str, Value] = {}
    for name in names:
        values = [case.values[name] for case in cases]
        if isinstance(decision.fields[name], Number):
            found[name] = sorted(values)[(len(values) - 1) // 2]
        else:
            found[name] = max(dict.fromkeys(values), key=values.count)
    return found


def mended(case: Case, changes: Mapping[str, Value]) -> Case:
    """The case with other values; what really happened is not known of it."""
    return replace(case, values={**case.values, **changes}, outcome=None)


def field_tests(
    ask: Ask, case: Case, values: Mapping[str, Value], base: Mapping[str, float], favourable: bool
) -> list[FieldTest]:
    """Each field mended alone, in every template of ``base`` (template -> score of the case); strongest first.

    ``favourable``: the answer that is explained. A field that holds the typical value already is left out.
    """
    names = [name for name, value in values.items() if value != case.values[name]]
    if not names or not base:
        return []
    changed = [mended(case, {name: values[name]}) for name in names]
    moved = across(ask, changed, list(base)) - np.array(list(base.values()))
    found = [
        _test(case, name, values[name], list(base), row, favourable) for name, row in zip(names, moved, strict=True)
    ]
    return sorted(found, key=lambda t: -t.towards)


def _test(case: Case, name: str, value: Value, templates: Sequence[str], moved: NDArray, favourable: bool) -> FieldTest:
    effects = {t: float(x) for t, x in zip(templates, moved, strict=True) if np.isfinite(x)}
    rows = np.array(list(effects.values()))
    side = -rows if favourable else rows
    return FieldTest(
        name,
        case.values[name],
        value,
        effects,
        over_templates(rows),
        int((side > 0).sum()),
        float(side.mean()) if len(side) else 0.0,
    )


def over_templates(rows: NDArray) -> Interval | None:
    """Mean over templates with its bootstrap interval; of one template the number alone."""
    if len(rows) < 2:
        return Interval(float(rows[0]), float(rows[0]), float(rows[0]), 1) if len(rows) else None
    return bootstrap_ci(rows)


def principal(tests: Sequence[FieldTest], most: int = MOST, noise: float | None = None) -> list[FieldTest]:
    """The reasons that are named: those that count, strongest first, without trifles, at most ``most``.

    ``noise``: how far other words for the same facts move a case (``asking.wording_noise``), in logits. What moves the
    decision by no more is no reason; None if it is not known.
    """
    counted = sorted((t for t in tests if t.counts and t.towards > (noise or 0.0)), key=lambda t: -t.towards)
    return [t for t in counted if t.towards >= TRIFLE * counted[0].towards][:most]


@dataclass(frozen=True)
class Together:
    """Several fields mended at once: does the decision turn?"""

    fields: tuple[str, ...]
    scores: dict[str, float]
    """template -> score; without templates that do not answer"""
    turned: int
    """templates in which the answer is another than before"""


def together(
    ask: Ask, case: Case, values: Mapping[str, Value], names: Sequence[str], base: Mapping[str, float]
) -> Together:
    """The named fields mended at once, in every template."""
    row = across(ask, [mended(case, {name: values[name] for name in names})], list(base))[0]
    scores = {t: float(x) for t, x in zip(base, row, strict=True) if np.isfinite(x)}
    return Together(tuple(names), scores, sum((scores[t] > 0) != (base[t] > 0) for t in scores))
