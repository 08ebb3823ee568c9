"""What may not be a reason: who is asking, and how it is put. For one case, each by a paired swap.

*Protected attributes*: the same case as a member of another group, all else as it is (treatment). Beside it stands what
another value of the own group does, where a field carries the group (another first name).
*Free text*: each text replaced by usual ones. What an applicant words, and nobody checked, should not turn a decision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from glassbox_utils.core.evidence import Control
from glassbox_utils.core.statistics import Interval
from glassbox_utils.decisions.asking import Ask, across, turned
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import Carrier, Decision, GroupList, groups
from glassbox_utils.decisions.fields import Category, Number, Text, Value, band_of, bands
from glassbox_utils.decisions.reasons import mended, others, over_templates

VALUES = 4
"""values of each group, and usual texts, that are put in"""


@dataclass(frozen=True)
class Swap:
    """The case as a member of another group."""

    attribute: str
    group: str
    own: str | None
    """the case's own group; None if its values are in no list"""
    put_in: tuple[str, ...]
    effect: Interval | None
    """logits: as a member of the group minus as it is, values of one rank with each other; both values and templates
    are resampled, and ``n`` counts the values where a field carries the group, else the templates"""
    unit: str
    """what ``n`` counts"""
    same: Control | None
    """a value of the own group against the mean of its others, in the same unit"""
    turned: int
    """of ``asked`` pairs (value, template) how many decisions are others"""
    asked: int
    turns_this: bool
    """does the first value turn the decision in the template that is explained?"""
    noise: float | None = None
    """what other words for the same facts do (standard deviation, logits), where no other value of the own group says
    what chance does"""

    @property
    def beyond_noise(self) -> bool:
        """Is the effect more than chance, and more than what another value of the own group does, or other words for
        the same facts? Where nothing was resampled there is no such question, and nothing is held against it."""
        if self.effect is None or self.effect.n < 2:
            return self.effect is not None
        spread = (-self.noise, self.noise) if self.noise is not None else None
        spread = self.same.ci if self.same is not None else spread
        return self.effect.excludes() and (spread is None or not spread[0] <= self.effect.value <= spread[1])


def swaps(
    ask: Ask,
    decision: Decision,
    case: Case,
    template: str,
    base: Mapping[str, float],
    cases: Sequence[Case] = (),
    n_values: int = VALUES,
) -> list[Swap]:
    """Every other group of every protected attribute, in every template of ``base`` (template -> score of the case).

    ``cases``: where the usual number of a band comes from. A value that carries a group is exchanged for those of the
    same rank, split and other groups; of a case whose group is not known, values of all groups are put in.
    """
    mine, found = groups(decision, case), []
    names = list(base)
    for attribute, all_groups in decision.protected().items():
        own = mine[attribute]
        own_versions = [case]
        if own is not None:
            own_versions += versions(decision, case, attribute, own, cases, n_values)[1:]
        here = across(ask, own_versions, names)
        same = _same(here) if len(own_versions) > 1 else None
        for group in (g for g in all_groups if g != own):
            there = versions(decision, case, attribute, group, cases, n_values)
            if not there:
                continue
            scores = across(ask, there, names)
            pairs = here[np.arange(len(there)) % len(here)]  # of one rank, where there are as many
            other = turned(scores, pairs)
            moved = (scores - pairs)[:, np.isfinite(scores - pairs).all(0)]
            carried = attribute not in decision.fields and len(moved) > 1
            found.append(
                Swap(
                    attribute,
                    group,
                    own,
                    tuple(_put_in(decision, case, one, attribute) for one in there),
                    crossed(moved) if carried else over_templates(moved.mean(0)),
                    "pairs of values" if carried else "templates",
                    same,
                    int(other.sum()),
                    int((np.isfinite(scores) & np.isfinite(pairs)).sum()),
                    bool(turned(scores[0], np.array(list(base.values())))[names.index(template)]),
                )
            )
    return found


def versions(
    decision: Decision, case: Case, attribute: str, group: str, cases: Sequence[Case] = (), n: int = VALUES
) -> list[Case]:
    """The case as a member of a group: up to ``n`` versions where fields carry it, one where a field states it.

    Of the own group the case itself comes first. Empty if no list stands for the group beside the case's other ones.
    """
    rule = decision.fields.get(attribute)
    if isinstance(rule, Category):
        return [mended(case, {attribute: group})]
    if isinstance(rule, Number):
        own = case.values[attribute]
        value = own if band_of(rule, float(own)) == group else usual_number(rule, attribute, group, cases)
        return [mended(case, {attribute: value})]
    changes: list[dict[str, Value]] = [{} for _ in range(n)]
    for carrier in decision.carriers:
        if any(attribute in one.groups for one in carrier.lists):
            values = _carried(carrier, str(case.values[carrier.field]), attribute, group)
            if not values:
                return []
            for i, change in enumerate(changes):
                change[carrier.field] = values[i % len(values)]
    unique = {tuple(c.items()): c for c in changes if c}
    return [mended(case, change) for change in unique.values()]


def _carried(carrier: Carrier, own: str, attribute: str, group: str) -> list[str]:
    """Values of a carrier that stand for the group: of the rank, split and other groups of the own value first."""
    mine = carrier.list_of(own)
    if mine is None or attribute not in mine.groups:
        lists = [one for one in carrier.lists if one.groups.get(attribute) == group]
        return [one.values[i] for i in range(max(len(x.values) for x in lists)) for one in lists if i < len(one.values)
                ] if lists else []  # fmt: skip
    wanted = {**mine.groups, attribute: group}
    fitting = [one for one in carrier.lists if one.groups == wanted]
    chosen: GroupList | None = next((one for one in fitting if one.split == mine.split), next(iter(fitting), None))
    if chosen is None:
        return []
    rank = mine.values.index(own)
    return [chosen.values[(rank + i) % len(chosen.values)] for i in range(len(chosen.values))]


def usual_number(rule: Number, name: str, band: str, cases: Sequence[Case]) -> Value:
    """A number of a band: the median of the cases in it that occurs, else the first number of the band."""
    seen = sorted(float(c.values[name]) for c in cases if band_of(rule, float(c.values[name])) == band)
    first = [rule.range[0], *rule.bands][bands(rule).index(band)]
    value = seen[(len(seen) - 1) // 2] if seen else float(first)
    return int(value) if value == int(value) else value


def crossed(moved: Float[NDArray, "value template"], n_resamples: int = 2000, seed: int = 0) -> Interval | None:
    """Mean over pairs of values and templates with its bootstrap interval; both are drawn, since both vary."""
    values, templates = moved.shape
    if not moved.size:
        return None
    rng = np.random.default_rng(seed)
    rows = rng.multinomial(values, np.full(values, 1 / values), n_resamples) / values
    columns = rng.multinomial(templates, np.full(templates, 1 / templates), n_resamples) / templates
    low, high = np.quantile(((rows @ moved) * columns).sum(1), [0.025, 0.975])
    return Interval(float(moved.mean()), float(low), float(high), values)


def _same(own: Float[NDArray, "value template"]) -> Control | None:
    """What choosing one value of the own group does: each against the mean of the others, over the templates."""
    means = own[:, np.isfinite(own).all(0)].mean(1) if np.isfinite(own).all(0).any() else own[:0, 0]
    if len(means) < 2:
        return None
    draws = (means - means.mean()) * len(means) / (len(means) - 1)
    return Control.drawn("other group", "values of the own group, each against the others", draws)


def _put_in(decision: Decision, case: Case, other: Case, attribute: str) -> str:
    changed = [str(v) for k, v in other.values.items() if v != case.values[k]]
    return ", ".join(changed) or str(other.values.get(attribute, "as it is"))


# --- free text ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextTest:
    """One text, or all of them, replaced by usual ones."""

    fields: tuple[str, ...]
    values: tuple[str, ...]
    usual: bool
    """is the case's own value a known one?"""
    put_in: tuple[str, ...]
    effect: float
    """logits: with usual texts minus as it is; mean over the texts"""
    turned: int
    asked: int
    """texts that were put in; ``turned`` of them lead to the other answer"""
    noise: float | None = None
    """what other words for the same facts do (standard deviation, logits); None if that is not known"""

    @property
    def turns(self) -> bool:
        """Do most usual texts lead to the other answer?"""
        return 2 * self.turned > self.asked

    @property
    def beyond_noise(self) -> bool:
        """Does it move the score by more than other words for the same facts do? At the line trifles turn a case."""
        return self.noise is None or abs(self.effect) > self.noise

    @property
    def decides(self) -> bool:
        """Does it turn the decision, beyond noise or by words that no list knows? Those somebody chose."""
        return self.turns and (self.beyond_noise or not self.usual)


def text_tests(
    ask: Ask, decision: Decision, case: Case, template: str, cases: Sequence[Case] = (), n_values: int = VALUES
) -> list[TextTest]:
    """Each free text replaced by up to ``n_values`` usual ones, and all at once, in ``template``; the strongest first.

    Usual is what most of the other cases hold, or what the decision's owner knows to be fine; of a text that carries a
    group, values of the same group. Without such values a field is left out.
    """
    usual = {name: usual_texts(decision, case, name, cases)[:n_values] for name, rule in decision.fields.items()
             if isinstance(rule, Text)}  # fmt: skip
    usual = {name: values for name, values in usual.items() if values}
    tests: dict[tuple[str, ...], list[dict[str, str]]] = {
        (name,): [{name: v} for v in values] for name, values in usual.items()
    }
    if len(usual) > 1:
        n = max(map(len, usual.values()))
        tests[tuple(usual)] = [{k: v[i % len(v)] for k, v in usual.items()} for i in range(n)]
    base, found = ask([case], template), []
    for names, changes in tests.items():
        scores = ask([mended(case, change) for change in changes], template)
        moved = (scores - base)[np.isfinite(scores)]
        known = all(is_known(decision, name, case.values[name]) for name in names)
        found.append(
            TextTest(
                names,
                tuple(str(case.values[name]) for name in names),
                known,
                tuple(", ".join(map(str, change.values())) for change in changes),
                float(moved.mean()) if len(moved) else 0.0,
                int(turned(scores, base).sum()),
                int(np.isfinite(scores).sum()),
            )
        )
    return sorted(found, key=lambda t: (not t.turns, -abs(t.effect)))


def is_known(decision: Decision, name: str, value: Value) -> bool:
    """Is a text one of those that the decision's owner listed?"""
    rule = decision.fields[name]
    return isinstance(rule, Text) and value in rule.known


def usual_texts(decision: Decision, case: Case, name: str, cases: Sequence[Case]) -> list[str]:
    """Other usual values of a text: of its own group if it carries one, known ones if there are, the most frequent
    first."""
    own, rule = str(case.values[name]), decision.fields[name]
    carrier = next((c for c in decision.carriers if c.field == name), None)
    mine = carrier.list_of(own) if carrier is not None else None
    known = mine.values if mine is not None else rule.known if isinstance(rule, Text) else ()
    seen = [str(c.values[name]) for c in others(case, cases)]
    often = {value: -seen.count(value) for value in dict.fromkeys([*known, *seen])}
    pool = [v for v in known or often if v != own]
    return sorted(pool, key=lambda v: often[v])


def without_free_text(decision: Decision, case: Case, tests: Sequence[TextTest]) -> Case | None:
    """The case with all of its texts replaced by the first usual ones; None if there is none to replace."""
    changes = {t.fields[0]: t.put_in[0] for t in tests if len(t.fields) == 1}
    return replace(mended(case, changes), id=case.id) if changes else None
