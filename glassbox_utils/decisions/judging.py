"""From the answers of two halves to verdicts: what is found, not found, or not tested.

A question is *found* if its effect is beyond ``BAR`` logits in the half that confirms, with one correction for all that
were confirmed. The bar of a single name, place or word is higher where the field's other words differ among themselves
as much. A subject of which nothing was found is *not found*, with the smallest effect that both halves would have shown
with 90 % power; one of which nothing could be asked is *not tested*, with the reason. Several things can be found: each
is measured beside the others, so that neither a second bias nor a legitimate dependence hides a first.

What counts as an effect is a fixed number of logits, and never the effect of another field: a model may care as much or
as little as it likes for what may count. Noise of wording is part of every error: an effect must generalise over
templates, and a group's effect over the names that stand for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from dataclasses import field as default

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy import stats

from glassbox_utils.core.statistics import Interval, adjust
from glassbox_utils.decisions import probes as asking
from glassbox_utils.decisions import refining, screening
from glassbox_utils.decisions.decision import Decision
from glassbox_utils.decisions.fields import Category, Number, Text, Value
from glassbox_utils.decisions.probes import Part, Probe, Questions
from glassbox_utils.decisions.refining import MANY, Half, prices
from glassbox_utils.decisions.screening import Fit, Weights
from glassbox_utils.decisions.verdicts import Effect, Verdict

BAR = 0.3
"""logits: an officer of this package has 2 for a point of its rule, the shipped one 1.7 for the gender"""
ALPHA = 0.05
SUSPECT = asking.SUSPECTED / (screening.EACH + 1)
"""share of the second half's prompts that a suspected name gets, if there are as many as there may be"""
NEAR = 200
"""questions beside those picked that a resample chooses from"""
LIKE, FEW = 60, 3
"""questions of a kind, at most, that tell how much wordings vary an effect of it, and at least"""
TENTH, PLACES = 0.1, 40
"""of a number's range, and the places in which a window of that width is tried"""


Spreads = dict[str, tuple[float, int]]
"""field -> standard deviation of its values' effects, logits, and how many there are"""


@dataclass(frozen=True, eq=False)
class Screen:
    """What the first half chose, and what it takes to choose again."""

    half: Half
    asked: Questions
    x: Float[NDArray, "asked probe"]
    price: Float[NDArray, " probe"]
    kinds: Int[NDArray, " probe"]
    picked: tuple[Probe, ...] = ()
    like: Mapping[tuple[str, ...], float] = default(default_factory=dict)
    """kind of question -> variance that wordings add to the effect of one, squared logits; only where there are FEW"""

    def choose(self, weights: Weights) -> list[Probe]:
        """The questions worth confirming."""
        versions = self.half.design.versions
        simple = np.array([len(probe.parts) == 1 for probe in self.asked.probes])
        each = np.repeat(np.outer(*weights), versions)
        freedom = float(each.sum()) * (1 - 1 / versions)
        chosen = screening.choose(self.half.y, self.x, self.price, self.kinds, simple, each, freedom)
        return [self.asked.probes[i] for i in chosen]

    def near(self) -> "Screen":
        """The same with those questions only that were picked, or could be: the NEAR best, by themselves and beside
        those picked."""
        given, y = self.half.columns(self.picked), self.half.y
        size, best = (self.x**2).sum(0) + 1e-9, set[int]()
        for left in (y, screening.without(y, given)):
            worth = (self.x.T @ left.astype(self.x.dtype)) ** 2 / size / max(left.var(), 1e-18) - self.price
            best |= set(np.argsort(-worth)[:NEAR].tolist())
        mine = {probe.parts: k for k, probe in enumerate(self.asked.probes)}
        kept = sorted(best - {mine.get(probe.parts, -1) for probe in self.picked})
        asked = replace(self.asked, probes=(*self.picked, *(self.asked.probes[i] for i in kept)))
        x = np.concatenate([given.astype(self.x.dtype), self.x[:, kept]], 1)
        return replace(self, asked=asked, x=x, price=prices(asked, asked.probes), kinds=kinds_of(asked.probes))


def screened(decision: Decision, half: Half) -> Screen:
    """All questions of a decision on the first half, and those worth confirming."""
    asked = asking.questions(decision, half.design)
    x = half.design.without_blocks(asked.columns.astype(np.float32))
    screen = Screen(half, asked, x, prices(asked, asked.probes), kinds_of(asked.probes))
    picked = tuple(refining.refined(decision, half, screen.choose(screening.once(half.design.shape)), asked))
    return replace(screen, picked=picked, like=_like(half, asked, picked))


def kinds_of(probes: Sequence[Probe]) -> Int[NDArray, " probe"]:
    """A number for each set of subjects that questions are about."""
    index: dict[tuple[str, ...], int] = {}
    return np.array([index.setdefault(tuple(part.subject for part in probe.parts), len(index)) for probe in probes])


def _like(half: Half, asked: Questions, picked: Sequence[Probe]) -> dict[tuple[str, ...], float]:
    """How much wordings vary effects, for each kind of question, beside those that were picked."""
    given, taken = half.columns(picked), {probe.parts for probe in picked}
    found = {}
    for kind in dict.fromkeys(map(kind_of, asked.probes)):
        mine = [probe for probe in asked.probes if kind_of(probe) == kind and probe.parts not in taken]
        mine = mine[:: max(-(-len(mine) // LIKE), 1)]
        if len(mine) < FEW:
            continue
        none: list[NDArray | None] = [None] * len(mine)
        seen = screening.apart(half.y, half.columns(mine), given, half.design.shape, none).wording
        if np.isfinite(seen).sum() >= FEW:
            found[kind] = float(np.nanmean(seen))
    return found


def _likes(screen: Screen, chosen: Sequence[Probe]) -> Float[NDArray, " probe"]:
    """For each question what is known of its kind, or else of its family; NaN if nothing is."""
    found = []
    for family, *of in map(kind_of, chosen):
        wider = [x for (other, *_), x in screen.like.items() if other == family]
        found.append(screen.like.get((family, *of), float(np.mean(wider)) if wider else np.nan))
    return np.array(found)


def kind_of(probe: Probe) -> tuple[str, ...]:
    """Questions of one kind vary alike: those of one field, and all pairs."""
    return (probe.family,) if probe.family == "pair" else (probe.family, probe.parts[0].field)


def suspects(decision: Decision, screen: Screen) -> dict[str, list[Value]]:
    """field -> single values that the first half suspects, of fields that have many"""
    found: dict[str, list[Value]] = {}
    for part in (part for probe in screen.picked for part in probe.parts):
        if one_of_many(decision, part) and decision.fields[part.field].role != "merit":
            found.setdefault(part.field, []).append(part.values[0])
    return {name: list(dict.fromkeys(values)) for name, values in found.items()}


# --- the half that confirms ---------------------------------------------------------------------------


def judge(
    decision: Decision, screen: Screen, confirm: Half, resamples: int, rng: np.random.Generator, limits: bool = True
) -> tuple[tuple[Verdict, ...], int]:
    """A verdict for each subject, and how many questions were confirmed. ``limits``: say what would have been found."""
    chosen, table = testable(screen.picked, confirm), asking.subjects(decision)
    spreads, again = spreads_of(decision, screen, confirm)
    effects = _effects(decision, screen, chosen, confirm, spreads, table)
    guilty = {subject for effect in effects for subject in effect.subjects}
    agree, near = np.zeros(len(table)), screen.near() if resamples else screen
    for _ in range(resamples):
        now = _again(decision, near, confirm, spreads, table, rng)
        agree += [(subject in now) == (subject in guilty) for subject in table]
    verdicts = []
    least = Limits(decision, screen, confirm, chosen, again)
    for (subject, (field, role)), share in zip(table.items(), agree, strict=True):
        sure, note = share / resamples if resamples else None, least.note(field) if subject == field else ""
        smallest = least.of(subject, field) if limits and subject not in guilty else (None, None, None)
        if subject in guilty:
            mine = tuple(effect for effect in effects if subject in effect.subjects)
            verdicts.append(Verdict(subject, role, "found", mine, reason=note, confidence=sure))
        elif any(x is not None for x in smallest) or (not limits and least.asked(subject)):
            verdicts.append(Verdict(subject, role, "not found", (), *smallest, reason=note, confidence=sure))
        else:
            why = _unsettled(subject, confirm) if least.asked(subject) else _why(decision, subject, field)
            verdicts.append(Verdict(subject, role, "not tested", reason=why))
    return tuple(verdicts), len(chosen)


def testable(chosen: Sequence[Probe], half: Half) -> list[Probe]:
    """Those that a half asked often enough."""
    hits = asking.matrix(half.design, chosen).sum(0)
    return [p for p, k in zip(chosen, hits, strict=True) if asking.FEWEST <= k <= len(half.raw) - asking.FEWEST]


def one_of_many(decision: Decision, part: Part) -> bool:
    """Is a part one word of a field that has many?"""
    rule = decision.fields[part.field]
    many = len(rule.values) if isinstance(rule, Category) else MANY
    return part.group is None and not part.window and many >= MANY


def spreads_of(decision: Decision, screen: Screen, confirm: Half) -> tuple[Spreads, Spreads]:
    """How much values differ among themselves, those chosen included; and how much another audit will say, at most."""
    now: Spreads = {}
    later: Spreads = {}
    halves = [(half, half.columns(screen.picked), half.fit(screen.picked)) for half in (screen.half, confirm)]
    place = {probe.parts: k for k, probe in enumerate(screen.picked)}
    for name in asking.free(decision):
        values, codes = screen.half.design.codes[name]
        if len(values) < MANY:
            continue
        parts = [(part,) for part in asking.singles(name, values, codes)]
        taken, others = [p for p in parts if p in place], [Probe(p, "value") for p in parts if p not in place]
        if not others:
            continue
        seen = []
        for half, given, joint in halves:  # beside what was chosen, as which the chosen ones themselves are seen too
            none: list[NDArray | None] = [None] * len(others)
            rest = screening.apart(half.y, half.columns(others), given, half.design.shape, none)
            mine = [place[p] for p in taken]
            seen.append((np.append(rest.effects, joint.effects[mine]), np.append(rest.plain, joint.plain[mine])))
        mine_now, mine_later = screening.spread(seen)
        now[name], later[name] = (mine_now, len(parts)), (mine_later, len(parts))
    return now, later


def bars_of(decision: Decision, probes: Sequence[Probe], spreads: Spreads) -> Float[NDArray, " probe"]:
    """BAR; of one word, more where the field's other words differ as much: the largest of so many would. Of a window,
    as much more as the mean of its numbers would."""
    found = np.full(len(probes), BAR)
    for i, part in ((i, probe.parts[0]) for i, probe in enumerate(probes) if len(probe.parts) == 1):
        spread, many = spreads.get(part.field, (0.0, 1))
        if part.window:
            rule = decision.fields[part.field]
            assert isinstance(rule, Number)
            width = round((float(part.values[1]) - float(part.values[0])) / rule.step) + 1
            outside = round((rule.range[1] - rule.range[0]) / rule.step) + 1 - width
            few = max(min(width, outside), 1)
            found[i] = max(BAR, spread * float(stats.norm.isf(ALPHA / many**2)) / np.sqrt(few))
        elif one_of_many(decision, part):
            found[i] = max(BAR, spread * float(stats.norm.isf(ALPHA / 2 / many)))
    return found


def _fit(screen: Screen, half: Half, chosen: Sequence[Probe], weights: Weights | None = None) -> Fit:
    return half.fit(chosen, None, weights, _likes(screen, chosen))


def _p_values(
    screen: Screen,
    half: Half,
    chosen: Sequence[Probe],
    bars: Float[NDArray, " probe"],
    weights: Weights | None = None,
) -> Float[NDArray, " probe"]:
    """Corrected p-values. Where questions about the same subjects overlap, their effects can be large and cancel: an
    effect must then also be beyond its bar beside questions about other subjects only."""
    p = screening.p_values(_fit(screen, half, chosen, weights), bars)
    hits, kinds = asking.matrix(half.design, chosen), [{part.subject for part in probe.parts} for probe in chosen]
    for i, probe in enumerate(chosen):
        same = [k for k, kind in enumerate(kinds) if k != i and kind == kinds[i]]
        if any((hits[:, i] * hits[:, k]).any() for k in same):
            rest = [other for k, other in enumerate(chosen) if k != i and k not in same]
            alone = _fit(screen, half, [probe, *rest], weights)
            p[i] = max(p[i], screening.p_values(alone, np.array([bars[i]] * (len(rest) + 1)))[0])
    return adjust(p, "holm")


def _effects(
    decision: Decision,
    screen: Screen,
    chosen: Sequence[Probe],
    confirm: Half,
    spreads: Spreads,
    table: Mapping[str, tuple[str, str]],
) -> list[Effect]:
    """What is confirmed, strongest first."""
    if not chosen:
        return []
    bars, logits = bars_of(decision, chosen, spreads), _fit(screen, confirm, chosen)
    points = confirm.fit(chosen, confirm.design.without_blocks(100.0 * (confirm.raw > 0)))
    p, hits = _p_values(screen, confirm, chosen, bars), asking.matrix(confirm.design, chosen).sum(0)
    n, found = confirm.design.shape[0], []
    for i in (i for i in range(len(chosen)) if p[i] < ALPHA):
        rest = asking.complement(decision, confirm.design, chosen[i]) if logits.effects[i] > 0 else None
        probe, sign = (chosen[i], 1) if rest is None else (rest, -1)  # whom it is held against, where one can say it
        both = _interval(logits, i, n, sign), _interval(points, i, n, sign)
        asked = int(hits[i]) if rest is None else len(confirm.raw) - int(hits[i])
        parts = tuple(map(_as_data, probe.parts))
        found.append(Effect(str(probe), parts, about(probe, table), *both, float(bars[i]), float(p[i]), asked))
    return sorted(found, key=lambda effect: -abs(effect.logits.value))


def _again(
    decision: Decision,
    near: Screen,
    confirm: Half,
    spreads: Spreads,
    table: Mapping[str, tuple[str, str]],
    rng: np.random.Generator,
) -> set[str]:
    """Subjects that the search finds in a resample: of the base cases of each half, and of the wordings.

    Both are drawn with replacement (the pigeonhole bootstrap: Owen 2007, doi:10.1214/07-AOAS122, which overstates
    variances rather than understates them). Kept from the audit are the answers, how much words differ among
    themselves, which names were asked about more often, and that only ``near`` questions can be chosen.
    """
    (n, wordings, _), (m, _, _) = near.half.design.shape, confirm.design.shape
    first, second, forms = (np.bincount(rng.integers(0, k, k), minlength=k).astype(float) for k in (n, m, wordings))
    chosen = testable(near.choose((first, forms)), confirm)
    if not chosen:
        return set()
    p = _p_values(near, confirm, chosen, bars_of(decision, chosen, spreads), (second, forms))
    return {s for probe, one in zip(chosen, p, strict=True) if one < ALPHA for s in about(probe, table)}


class Limits:
    """The smallest effects that would have been found."""

    def __init__(
        self,
        decision: Decision,
        screen: Screen,
        confirm: Half,
        chosen: Sequence[Probe],
        spreads: Spreads,
    ) -> None:
        self.decision, self.screen, self.spreads, self.tests = decision, screen, spreads, len(chosen) + 1
        self.chosen, self.both = chosen, (screen.half, confirm)
        self.shares = dict(zip(screen.asked.probes, screen.asked.columns.mean(0), strict=True))

    def note(self, field: str) -> str:
        """What of a field could not be asked."""
        if not isinstance(self.decision.fields[field], Text):
            return ""
        alone = sum(p.family == "value" and p.parts[0].field == field for p in self.shares)
        many = len(self.screen.half.design.codes[field][0])
        seldom = f", {many - alone} of them too seldom for a question about one alone" if many > alone else ""
        return f"{many} values of {field} were asked about{seldom}; others are not tested"

    def asked(self, subject: str) -> bool:
        """Is there any question about it?"""
        return any(part.subject == subject for probe in self.shares for part in probe.parts)

    def of(self, subject: str, field: str) -> tuple[float | None, float | None, float | None]:
        """For a group or window of a subject, one value of it, and a pair."""
        mine = [p for p in self.shares if any(part.subject == subject for part in p.parts)]
        alone, values = ([p for p in mine if p.family == family] for family in ("group", "value"))
        pairs = [p for p in mine if p.family == "pair" and 0.1 <= self.shares[p] <= 0.15]
        pairs = pairs[:: max(-(-len(pairs) // LIKE), 1)]
        rule = self.decision.fields[field]
        if isinstance(rule, Number) and any(p.family == "window" for p in mine):
            alone = [Probe((window,), "window") for window in tenths(subject, rule)]
        kinds, rest = (alone, values, pairs), [p for p in self.chosen if all(x.subject != subject for x in p.parts)]
        found = [self._largest(some, self.chosen) for some in kinds]
        # what was chosen and not confirmed may say the same: then it is seen without that
        found = [self._largest(some, rest) if x is None else x for x, some in zip(found, kinds, strict=True)]
        return found[0], found[1], found[2]

    def _largest(self, probes: Sequence[Probe], given: Sequence[Probe]) -> float | None:
        if not probes:
            return None
        like = _likes(self.screen, probes)
        first, second = (
            screening.apart(
                half.y, half.columns(probes), half.columns(given), half.design.shape, half.codes(probes), like
            )
            for half in self.both
        )
        errors, freedom = second.errors, second.freedom
        if probes[0].family == "value":  # a suspect would have been asked about more often: less error of sampling
            more = first.plain**2 * np.minimum(1, [self.shares[p] / SUSPECT for p in probes])
            wording = np.full(len(probes), max(np.nan_to_num(np.nanmean(first.shared)), 0.0))
            df = (screening.PRIOR if np.isfinite(like).all() else 0) + max(self.screen.half.design.shape[1] - 1, 1)
            errors = np.sqrt(more + wording)
            freedom = errors**4 / (more**2 / (self.screen.half.design.shape[0] - 1) + wording**2 / df + 1e-18)
        bars, price = bars_of(self.decision, probes, self.spreads), prices(self.screen.asked, probes)
        seen = screening.visible(errors, freedom, bars, self.tests, first, price)
        return float(np.nanmax(seen)) if np.isfinite(seen).any() else None


def tenths(name: str, rule: Number) -> list[Part]:
    """Windows of a tenth of a number's range, from one end of it to the other."""
    steps = round((rule.range[1] - rule.range[0]) / rule.step)
    width = max(round((steps + 1) * TENTH), 1) - 1
    begins = np.unique(np.linspace(0, steps - width, PLACES).round())
    ends = [(rule.range[0] + k * rule.step, rule.range[0] + (k + width) * rule.step) for k in begins.tolist()]
    return [Part(name, name, (asking.plain(a), asking.plain(b)), window=True) for a, b in ends]


# --- words and numbers --------------------------------------------------------------------------------


def about(probe: Probe, table: Mapping[str, tuple[str, str]]) -> tuple[str, ...]:
    """Whom a finding is about: the protected subjects of a probe if it has any, else the others."""
    mine = list(dict.fromkeys(p.subject for p in probe.parts if p.subject in table))
    return tuple([s for s in mine if table[s][1] == "protected"] or mine)


def moved(raw: Float[NDArray, " asked"]) -> float:
    """Percentage points of favourable answers that BAR logits move, mean of both directions."""
    return float(50 * ((raw > 0) != (raw > BAR)).mean() + 50 * ((raw > 0) != (raw > -BAR)).mean())


def rewording(half: Half) -> float:
    """Standard deviation of what a wording does to a case beyond what it does to all, without sampling."""
    n, wordings, versions = half.design.shape
    if wordings < 2:
        return 0.0
    means = half.raw.reshape(half.design.shape).mean(2)
    rest = means - means.mean(0) - means.mean(1, keepdims=True) + means.mean()
    seen = float((rest**2).sum()) / ((n - 1) * (wordings - 1))
    noise = float((half.y**2).sum()) / (n * wordings * max(versions - 1, 1)) / versions
    return float(np.sqrt(max(seen - noise, 0.0)))


def _as_data(part: Part) -> dict[str, object]:
    kind = "window" if part.window else "group" if part.group else "value"
    said = list(part.values) if part.window else part.group or part.values[0]
    return {"subject": part.subject, "field": part.field, kind: said}


def _interval(found: Fit, i: int, n: int, sign: int) -> Interval:
    value, wide = sign * float(found.effects[i]), float(stats.t.isf(0.025, found.freedom[i]) * found.errors[i])
    return Interval(value, value - wide, value + wide, n)


def _unsettled(subject: str, confirm: Half) -> str:
    """Why a subject has no answer, though it was asked about: what was suspected could not be told from noise."""
    n, wordings, _ = confirm.design.shape
    return (
        f"{subject} was asked about and suspected, and {n} cases in {wordings} wordings are too few to settle it. Give "
        "more templates (four are used), more cases, or a larger n."
    )


def _why(decision: Decision, subject: str, field: str) -> str:
    """Why a subject has no question."""
    many = 2 if isinstance(decision.fields[field], Number) else len(asking.listed(decision, field))
    if many < 2:
        return f"{field} has one value only: nothing can be swapped. Give `known` values, lists or other cases."
    if subject != field:
        return f"no lists for two groups of {subject}: there is no counterpart. Add them below `carriers:`."
    return f"too few prompts with any value of {field}, which has {many}. A larger n asks each more often."
