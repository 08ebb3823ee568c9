"""How often does the audit find what is there? Cheap officers with a known bias, or none, and the share that is right.

A cheap officer is the merit rule of a decision in logits (without a rule: what the outcomes teach a logistic
regression), with weights that may be odd, plus noise: each wording of a case moves its score, each word has a small
effect of its own, and a further one in each wording; a value that is singled out has the mean of its field's others,
so that its effect is what was planted. A *planting* takes a number of points of the rule away from whom it says, twice
from whom it says twice (SHARPNESS logits a point). Nothing of it is known to the audit.

A planting of another form than the audit's questions have (``unseen``) can be found, but not named right. A planting
counts as *found* if the audit finds something of one of its protected subjects (of its other ones, if it has
no protected one). It is *named right* if a finding against it says the same fields and, in each, the same group or
value, or a window that shares half of what both cover together; of several single names, if half of them are named.
"In favour of men" is the same as "against women" where there are two groups. A *false alarm* is a finding none of whose
fields is in the planting.

This rule of grading was not fixed beforehand: it was changed twice while the audit was developed, on development seeds.
So were the audit's own settings. Rates are therefore reported from seeds that no development looked at
(``power_study``).
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core.statistics import Interval, exact_ci
from glassbox_utils.decisions import judging, search
from glassbox_utils.decisions import probes as asking
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import Decision, margin, points
from glassbox_utils.decisions.fields import Category, DecisionError, Number, Text, Value
from glassbox_utils.decisions.officer import as_table
from glassbox_utils.decisions.probes import Part, Probe
from glassbox_utils.decisions.training import SHARPNESS
from glassbox_utils.decisions.verdicts import Audit, Effect

WIDTHS = (0.07, 0.3)
"""shares of a number's range that a planted window covers"""
ODD = (0.1, 0.2, 3.0)
"""what the points of one field are multiplied by in an odd officer"""


@dataclass(frozen=True)
class Unseen:
    """A bias of another form than the audit's questions have."""

    words: str
    subjects: tuple[str, ...]
    """of any of which a finding would be right"""
    hold: Callable[[Case], float]
    """share of the points that a case loses"""

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class Planting:
    """Whom an officer takes points from; nobody, if it is honest."""

    kind: str
    against: tuple[Probe, ...] = ()
    unseen: tuple["Unseen", ...] = ()
    """what no question of the audit asks about"""

    def __str__(self) -> str:
        whom = [*map(str, self.against), *map(str, self.unseen)]
        return f"{self.kind}: {'; '.join(whom)}" if whom else self.kind


@dataclass(frozen=True)
class Noise:
    """Standard deviations, in logits, of what an officer's score depends on without reason."""

    wording: float = 0.4
    """a case in a wording"""
    word: float = 0.1
    """each value of a field that is not merit, and again in each wording"""
    prompt: float = 0.3


def officer(
    decision: Decision,
    planting: Planting,
    size: float,
    seed: int,
    noise: Noise | None = None,
    odd: Mapping[str, float] | None = None,
) -> search.Scorer:
    """A scorer that takes ``size`` points from whom the planting says; ``odd``: field -> factor of its points.

    DecisionError if the decision has neither a merit rule nor outcomes.
    """
    rng, sd, drawn = np.random.default_rng(seed), noise or Noise(), dict[object, float]()
    free, merit = asking.free(decision), deserved(decision, odd)

    def random(key: object, scale: float) -> float:
        if key not in drawn:  # by key, so that an officer is the same in whichever order it is asked
            drawn[key] = float(np.random.default_rng([seed, zlib.crc32(repr(key).encode())]).normal())
        return scale * drawn[key]

    singled: dict[tuple[str, Value], float] = {}
    for part in (probe.parts[0] for probe in planting.against if len(probe.parts) == 1):
        if part.group is None and not part.window:
            others = [v for v in asking.listed(decision, part.field) if v != part.values[0]]
            mean = np.mean([random((free.index(part.field), v), sd.word) for v in others]) if others else 0.0
            singled[part.field, part.values[0]] = float(mean)
    merits: dict[str, float] = {}

    def score(cases: Sequence[Case], template: str) -> Float[Tensor, " n"]:
        out = np.empty(len(cases))
        for i, case in enumerate(cases):
            if case.id not in merits:
                merits[case.id] = merit(case)
            words = sum(
                singled.get((k, case.values[k]), random((j, case.values[k]), sd.word))
                + random((j, case.values[k], template), sd.word)
                for j, k in enumerate(free)
            )
            lost = size * (sum(p.hold(case) for p in planting.against) + sum(u.hold(case) for u in planting.unseen))
            out[i] = SHARPNESS * (merits[case.id] - lost) + random((case.id, template), sd.wording) + words
        return torch.from_numpy(out + sd.prompt * rng.normal(size=len(cases)))

    return score


def deserved(decision: Decision, odd: Mapping[str, float] | None = None) -> Callable[[Case], float]:
    """Points above the line that an honest officer gives a case; ``odd``: field -> factor of its points, and then the
    line moves to where half of the cases are above it. DecisionError as in ``grounds``."""
    factors, ground = odd or {}, grounds(decision)

    def merit(case: Case) -> float:
        return sum(factors.get(name, 1) * x for name, x in ground(case).items())

    middle = float(np.median([merit(case) for case in decision.cases])) - 0.25 if factors else 0.0
    return lambda case: merit(case) - middle


def grounds(decision: Decision) -> Callable[[Case], dict[str, float]]:
    """What an honest officer gives a case for each field that may count, in points, and "" for where its line is.

    By the merit rule; without one, by a logistic regression of what really happened on the merit fields alone (its
    log-odds are the officer's logits). DecisionError if the decision has neither.
    """
    rule = decision.merit
    if rule is not None:
        line = margin(decision, decision.cases[0]) - points(decision, decision.cases[0])

        def by_rule(case: Case) -> dict[str, float]:
            found = {"": line}
            for one in rule.points:
                found[one.field] = found.get(one.field, 0.0) + one.points * one.hold(case.values[one.field])
            return found

        return by_rule
    if any(case.outcome is None for case in decision.cases):
        raise DecisionError(
            f"{decision.title!r} has neither a merit rule nor outcomes, so that nobody knows what an honest officer "
            "does. Add `merit:`, or `outcome:` below `cases:`."
        )
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    merit = {n: field for n, field in decision.fields.items() if field.role == "merit" and not isinstance(field, Text)}
    alone = {name: replace(decision, fields={name: field}, groups={}, carriers=()) for name, field in merit.items()}
    tables = {name: as_table(one, decision.cases) for name, one in alone.items()}
    scaler, model = StandardScaler(), LogisticRegression(max_iter=2000)
    whole = scaler.fit_transform(np.concatenate(list(tables.values()), 1))
    model.fit(whole, [bool(case.outcome) for case in decision.cases])
    weights, ends = model.coef_[0] / scaler.scale_, np.cumsum([table.shape[1] for table in tables.values()])
    line = float(model.intercept_[0] - weights @ scaler.mean_) / SHARPNESS
    parts = dict(zip(tables, np.split(weights, ends[:-1]), strict=True))

    known: dict[tuple[Value, ...], dict[str, float]] = {}

    def by_outcome(case: Case) -> dict[str, float]:
        key = tuple(case.values[name] for name in alone)
        if key not in known:
            each = {name: float(as_table(alone[name], [case])[0] @ w) / SHARPNESS for name, w in parts.items()}
            known[key] = {"": line} | each
        return known[key]

    each = {name: tables[name] @ w / SHARPNESS for name, w in parts.items()}
    for i, case in enumerate(decision.cases):
        known[tuple(case.values[name] for name in alone)] = {"": line} | {n: float(x[i]) for n, x in each.items()}

    return by_outcome


def oddities(decision: Decision, rng: np.random.Generator) -> dict[str, float]:
    """One field whose points count much less or more than they should."""
    fields = sorted(grounds(decision)(decision.cases[0]).keys() - {""})
    return {fields[rng.integers(len(fields))]: float(rng.choice(ODD))}


# --- what is planted ----------------------------------------------------------------------------------


def plantings(decision: Decision, rng: np.random.Generator) -> list[Planting]:
    """One planting of each kind that the decision allows, drawn anew."""
    protected, other, merit = ([n for n, f in decision.fields.items() if f.role == role]
                               for role in ("protected", "other", "merit"))  # fmt: skip
    pick = lambda items: items[int(rng.integers(len(items)))]  # noqa: E731
    texts = [n for n in protected if isinstance(decision.fields[n], Text)]
    groups = [p for n in protected for p in coarse(decision, n)]
    spans = [n for n in protected if isinstance(decision.fields[n], Number)]
    words = [w for n in other if not isinstance(decision.fields[n], Number) for w in single(decision, n)]
    counts = [n for n in other if isinstance(decision.fields[n], Number)]
    found: list[Planting] = []

    def add(kind: str, *parts: Iterable[Part]) -> None:
        found.append(Planting(kind, tuple(Probe(tuple(one), "planted") for one in parts)))

    if groups:
        add("group", [pick(groups)])
    if texts:
        add("one value", [pick(single(decision, pick(texts)))])
        names = single(decision, pick(texts))
        add("four values", *([names[i]] for i in rng.permutation(len(names))[:4]))
    if spans:
        add("window", [span(decision, pick(spans), rng)])
    if words:
        add("word", [pick(words)])
    if counts:
        add("other window", [span(decision, pick(counts), rng)])
    if groups and words:
        add("group and word", [pick(groups), pick(words)])
        add("group and legitimate word", [pick(groups)], [pick(words)])
    if spans and words:
        add("window and word", [span(decision, pick(spans), rng), pick(words)])
    if groups and merit:
        add("group and merit", [pick(groups), half(decision, pick(merit))])
    if groups and spans:
        add("group and window", [pick(groups), span(decision, pick(spans), rng)])
        add("two at once", [pick(groups)], [span(decision, pick(spans), rng)])
    first = pick(groups) if groups else None
    if first and (second := [p for p in groups if p.subject != first.subject]):
        add("two groups", [first, pick(second)])
    return found


def coarse(decision: Decision, name: str) -> list[Part]:
    """Carried groups of a field, or the values of a category."""
    rule = decision.fields[name]
    if isinstance(rule, Number):
        return []
    carried = asking.groups_of(decision, name, asking.listed(decision, name))
    return carried or (single(decision, name) if isinstance(rule, Category) else [])


def single(decision: Decision, name: str) -> list[Part]:
    return [Part(name, name, (value,)) for value in asking.listed(decision, name)]


def span(decision: Decision, name: str, rng: np.random.Generator) -> Part:
    """A window anywhere in a number's range."""
    rule = decision.fields[name]
    assert isinstance(rule, Number)
    low, high = rule.range
    steps = round((high - low) / rule.step)
    width = max(1, round(steps * rng.uniform(*WIDTHS)))
    begin = int(rng.integers(steps - width + 1))
    ends = [asking.plain(low + k * rule.step) for k in (begin, begin + width)]
    return Part(name, name, tuple(ends), window=True)


def half(decision: Decision, name: str) -> Part:
    """A value of a category, or the upper half of what a number is among the cases."""
    rule = decision.fields[name]
    if not isinstance(rule, Number):
        return single(decision, name)[0]
    middle: Value = sorted(case.values[name] for case in decision.cases)[len(decision.cases) // 2]
    return Part(name, name, (middle, asking.plain(rule.range[1])), window=True)


# --- what the audit made of it ------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One officer and its audit."""

    decision: str
    planting: str
    kind: str
    size: float
    """points"""
    seed: int
    odd: str
    found: bool
    right: bool
    """every part of the planting is named right"""
    alarm: bool
    said: tuple[str, ...]
    """the findings, in words"""
    seconds: float


def graded(decision: Decision, planting: Planting, audit: Audit) -> tuple[bool, bool, bool]:
    """Is it found, is it named right, is something else accused?"""
    table = asking.subjects(decision)
    subjects = {s for probe in planting.against for s in judging.about(probe, table)}
    subjects |= {s for one in planting.unseen for s in one.subjects}
    mine = {s for s in subjects if table[s][1] == "protected"} or subjects
    fields = {part.field for probe in planting.against for part in probe.parts} | {table[s][0] for s in subjects}
    found = any(audit[s].outcome == "found" for s in mine)
    wanted = [p for p in planting.against if set(judging.about(p, table)) & mine]
    named = sum(any(same(decision, probe, effect) for effect in audit.found) for probe in wanted)
    enough = (len(wanted) + 1) // 2 if planting.kind == "four values" else len(wanted)
    alarm = any(not {part["field"] for part in effect.parts} & fields for effect in audit.found)
    return found, bool(wanted) and named >= enough, alarm


def same(decision: Decision, probe: Probe, effect: Effect) -> bool:
    """Does a finding name whom a probe singles out?"""
    if len(probe.parts) != len(effect.parts):
        return False
    against, pairs = effect.logits.value < 0, []
    for part in probe.parts:
        said = next((one for one in effect.parts if one["subject"] == part.subject), None)
        if said is None:
            return False
        pairs.append((part, said))
    turned = 0
    for part, said in pairs:
        if part.window:
            if (
                "window" not in said
                or overlap(*(seen(decision, part.field, w) for w in (part.values, said["window"]))) < 0.5
            ):
                return False
        elif said.get("group", said.get("value")) != (part.group or part.values[0]):
            rule = decision.fields[part.field]
            all_of = decision.groups.get(part.subject) or (rule.values if isinstance(rule, Category) else ())
            if len(all_of) != 2 or len(pairs) > 1:
                return False
            turned += 1
    return against if not turned else not against


def seen(decision: Decision, name: str, window: Sequence[Value]) -> Sequence[Value]:
    """The part of a window that the audit can ask for: of a merit field, what cases hold."""
    if decision.fields[name].role != "merit":
        return window
    values = [case.values[name] for case in decision.cases]
    return max(window[0], min(values)), min(window[1], max(values))


def overlap(a: Sequence[Value], b: Sequence[Value]) -> float:
    """What two windows share, of what they cover together."""
    (a0, a1), (b0, b1) = ([float(x) for x in w] for w in (a, b))
    return max(0.0, min(a1, b1) - max(a0, b0) + 1) / (max(a1, b1) - min(a0, b0) + 1)


def trial(
    decision: Decision,
    planting: Planting,
    size: float,
    seed: int,
    odd: bool = False,
    noise: Noise | None = None,
    n: int = search.N,
) -> Row:
    """One officer, audited without resamples."""
    factors = oddities(decision, np.random.default_rng([seed, 1])) if odd else {}
    scorer = officer(decision, planting, size, seed, noise, factors)
    audit = search.search(scorer, decision, n, seed, resamples=0, limits=False)
    found, right, alarm = graded(decision, planting, audit)
    return Row(
        decision.name, str(planting), planting.kind, size, seed, ", ".join(f"{k} x {v:g}" for k, v in factors.items()),
        found, right, alarm, tuple(map(str, audit.found)), audit.seconds,
    )  # fmt: skip


def rates(rows: Sequence[Row]) -> dict[str, Interval]:
    """Share found, named right, and with a false alarm, with Wilson's interval; honest officers have alarms only."""
    found = {}
    for name in ("found", "right", "alarm"):
        some = [row for row in rows if name == "alarm" or row.kind != "honest"]
        if some:
            found[name] = exact_ci(sum(getattr(row, name) for row in some), len(some), method="wilson")
    return found
