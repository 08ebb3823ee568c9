"""Are the named reasons the reasons? Over many cases: does mending what was named turn the decision?

Reasons are named in some templates and judged in others, with typical values of cases that are not explained. The same
number of fields is mended for every opponent: those that the decision position looks at most, those furthest from what
is typical, any, and any that help by themselves. Fields that hold the typical value already can't be mended and are
nobody's choice, and a case without a choice is not counted: there no method could fail.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from glassbox_utils.core.arguments import items, whole
from glassbox_utils.core.models import Model
from glassbox_utils.core.session import progress
from glassbox_utils.core.statistics import Interval, cluster_bootstrap
from glassbox_utils.decisions import asking, reasons
from glassbox_utils.decisions.asking import Ask, across
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.counterfactual import spread
from glassbox_utils.decisions.decision import Decision
from glassbox_utils.decisions.fields import DecisionError, Number, Value
from glassbox_utils.decisions.observed import attention_to_fields
from glassbox_utils.decisions.reasons import mended

K = 2
"""reasons that are named and mended"""
CAUSE, ATTENTION, FURTHEST, RANDOM, HELPFUL = (
    "cause",
    "attention",
    "furthest from typical",
    "random",
    "random that help",
)
METHODS = (CAUSE, ATTENTION, FURTHEST, RANDOM, HELPFUL)
SUBSETS = 3
"""draws of random fields for each case"""
CHOSEN = 100
"""cases that typical values come from, at most"""
NAMED, JUDGED = 2, 2
"""templates to name in, and to judge in, at most"""
LEAST = 10
"""explained cases, for an interval"""
WORDED = 12
"""cases whose wordings say what noise is"""


@dataclass(frozen=True)
class Plan:
    """What is the same for every case."""

    named_in: tuple[str, ...]
    judged_in: tuple[str, ...]
    """other templates; the same ones if the model decides in no others"""
    typical: dict[str, Value]
    scales: dict[str, float]
    chosen_on: int
    """cases whose values are the typical ones"""
    cases: tuple[Case, ...]
    """those to explain: the unfavourable answer in the first of ``named_in``"""
    noise: float | None = None
    """how far other words for the same facts move a case, by the templates that name; a reason moves it further"""

    @property
    def held_out(self) -> bool:
        return not set(self.named_in) & set(self.judged_in)


@dataclass(frozen=True)
class Method:
    """What mending the fields that one method names does."""

    name: str
    flips: Interval
    """share of decisions that turn"""
    moves: Interval
    """logits towards the favourable answer"""
    better: Interval | None
    """flips by cause minus those of this method, paired; None for cause itself"""


@dataclass(frozen=True)
class Fidelity:
    """The comparison."""

    methods: tuple[Method, ...]
    same_first: Interval
    """share of cases whose strongest reason is the strongest in the other templates too"""
    same_sign: Interval
    """share of named reasons that move the decision the same way there"""
    explained: int
    without_reason: int
    without_choice: int
    """cases where the named reasons are all that could be mended; not in the comparison"""
    named_in: tuple[str, ...]
    judged_in: tuple[str, ...]
    unit: str


def fidelity(
    model: Model,
    decision: Decision,
    cases: Sequence[Case] | None = None,
    n: int = 100,
    k: int = K,
    seed: int = 0,
    batch_size: int = 32,
    named_in: Sequence[str] | None = None,
) -> Fidelity:
    """Over up to ``n`` cases with the unfavourable answer, of ``cases`` (of the decision's own).

    Raises DecisionError if too few are left, no field may count, or the model decides nowhere.
    """
    ask = asking.remembered(asking.scorer(model, decision, batch_size))
    made = plan(ask, decision, cases, n, seed, named_in)
    looked = attention(model, decision, made.cases, made.named_in[0])
    rows = [
        row(ask, decision, case, made, look, k, seed)
        for case, look in zip(progress(made.cases, "reasons"), looked, strict=True)
    ]
    return summary(rows, made)


def plan(
    ask: Ask,
    decision: Decision,
    cases: Sequence[Case] | None = None,
    n: int = 100,
    seed: int = 0,
    named_in: Sequence[str] | None = None,
) -> Plan:
    """Templates to name and to judge in, and a third of the cases to take typical values from; of the others up to
    ``n`` with the unfavourable answer are explained."""
    whole("n", n, 1, DecisionError)
    given = decision.cases if cases is None else items("cases", cases, DecisionError, Case, word="Cases")
    names = reasons.merit_fields(decision)
    if not names:
        raise DecisionError(f"{decision.title!r} has no field of the role merit: nothing could be a reason. Give one.")
    if len(given) < 3 * LEAST:
        raise DecisionError(f"There are {len(given)} cases. Allowed: at least {3 * LEAST}. Give more.")
    rng = np.random.default_rng(whole("seed", seed, 0, DecisionError))
    pool = [given[i] for i in rng.permutation(len(given))]
    scores, silent = asking.answering(ask, decision, pool[0])
    asking.chosen_template(decision, scores, None, next(iter(silent.values()), "it has no template"))
    first = [t for t in scores if t in named_in] if named_in is not None else list(scores)[::2]
    if not first:
        raise DecisionError(f"The model decides in none of {', '.join(map(str, named_in or ()))}. It decides in: "
                            f"{', '.join(scores)}.")  # fmt: skip
    rest = [t for t in scores if t not in first][:JUDGED] or first[:NAMED]
    first = first[:NAMED]
    third = len(pool) // 3
    chosen, explained = pool[: min(third, CHOSEN)], pool[third:]
    answers = ask(chosen, first[0])
    reference = [c for c, x in zip(chosen, answers, strict=True) if x > 0]
    rejected: list[Case] = []
    for start in range(0, len(explained), 32):
        part = explained[start : start + 32] if len(rejected) < n else []
        rejected += [c for c, x in zip(part, ask(part, first[0]), strict=True) if x < 0]
    rejected = rejected[:n]
    if len(reference) < reasons.FEWEST or len(rejected) < LEAST:
        raise DecisionError(
            f"Of {len(pool)} cases {len(reference)} give typical values (favourable answer) and {len(rejected)} can be "
            f"explained (unfavourable). Allowed: at least {reasons.FEWEST} and {LEAST}. Give more cases."
        )
    typical = reasons.typical(decision, reference, names)
    scales = {name: spread(decision, name, reference) for name in names}
    noise = asking.wording_noise(across(ask, chosen[:WORDED], first))
    return Plan(tuple(first), tuple(rest), typical, scales, len(reference), tuple(rejected), noise)


def attention(model: Model, decision: Decision, cases: Sequence[Case], template: str) -> list[dict[str, float]]:
    """Share of attention to each field, for each case."""
    return [
        dict(zip(decision.fields, shares, strict=True))
        for start in range(0, len(cases), 32)
        for shares in attention_to_fields(model, decision, cases[start : start + 32], template).tolist()
    ]


def row(
    ask: Ask, decision: Decision, case: Case, made: Plan, looked: Mapping[str, float], k: int = K, seed: int = 0
) -> dict[str, Any]:
    """One case: what each method names, and what mending it does in the other templates. Plain values, for a table."""
    base = dict(zip(made.named_in, across(ask, [case], made.named_in)[0].tolist(), strict=True))
    base = {t: x for t, x in base.items() if np.isfinite(x)}
    tests = {t.field: t for t in reasons.field_tests(ask, case, made.typical, base, favourable=False)}
    named = [t.field for t in reasons.principal(list(tests.values()), whole("k", k, 1, DecisionError), made.noise)]
    cluster = next((str(case.values[c.field]) for c in decision.carriers), case.id)
    found: dict[str, Any] = {"case": case.id, "cluster": cluster, "named": named, "can be mended": len(tests)}
    if not 0 < len(named) < len(tests):
        return found
    judge = across(ask, [case], made.judged_in)[0]
    subsets = list(combinations(tests, len(named)))
    rng = np.random.default_rng([seed, *case.id.encode()])  # each case its own draws
    helpful = [s for s in subsets if all(tests[name].towards > 0 for name in s)]
    far = {name: _far(decision, case, name, made) for name in tests}
    choices = {
        CAUSE: [tuple(named)],
        ATTENTION: [_top(tests, looked, len(named))],
        FURTHEST: [_top(tests, far, len(named))],
        RANDOM: _drawn(subsets, SUBSETS, rng),
        HELPFUL: _drawn(helpful, 1, rng),
    }
    for method, sets in choices.items():
        changed = [mended(case, {name: made.typical[name] for name in one}) for one in sets]
        scores = across(ask, changed, made.judged_in)
        counted = np.isfinite(scores) & (judge < 0)
        found[method] = {
            "fields": [list(one) for one in sets] if method in (CAUSE, ATTENTION, FURTHEST) else len(sets),
            "flips": float((scores > 0)[counted].mean()) if counted.any() else None,
            "move": float((scores - judge)[counted].mean()) if counted.any() else None,
        }
    singles = across(ask, [mended(case, {name: made.typical[name]}) for name in tests], made.judged_in) - judge
    means = dict(zip(tests, np.nanmean(np.where(np.isfinite(singles), singles, np.nan), 1).tolist(), strict=True))
    found["same first"] = max(means, key=lambda name: means[name]) == named[0]
    found["same sign"] = float(np.mean([means[name] > 0 for name in named]))
    return found


def _drawn(sets: Sequence[tuple[str, ...]], n: int, rng: np.random.Generator) -> list[tuple[str, ...]]:
    return [sets[i] for i in rng.choice(len(sets), min(n, len(sets)), replace=False)]


def _top(tests: Mapping[str, Any], values: Mapping[str, float], k: int) -> tuple[str, ...]:
    return tuple(sorted(tests, key=lambda name: -values[name])[:k])


def _far(decision: Decision, case: Case, name: str, made: Plan) -> float:
    own, value = case.values[name], made.typical[name]
    number = isinstance(decision.fields[name], Number)
    return abs(float(own) - float(value)) / made.scales[name] if number else float(own != value)


def summary(rows: Sequence[Mapping[str, Any]], made: Plan) -> Fidelity:
    """Means over cases with intervals; whole clusters (cases that share the value that carries a group) are drawn."""
    counted = [r for r in rows if CAUSE in r and r[CAUSE]["flips"] is not None]
    if len(counted) < 2 or len({r["cluster"] for r in counted}) < 2:
        raise DecisionError(
            f"{len(counted)} of {len(rows)} cases have a reason and a choice between fields. Allowed: at least 2. Give "
            "more cases, or fields that may count."
        )
    clusters = [r["cluster"] for r in counted]
    values = {m: {key: np.array([r[m][key] for r in counted]) for key in ("flips", "move")} for m in METHODS}
    return Fidelity(
        tuple(
            Method(
                m,
                cluster_bootstrap(values[m]["flips"], clusters),
                cluster_bootstrap(values[m]["move"], clusters),
                None if m == CAUSE else cluster_bootstrap(values[CAUSE]["flips"] - values[m]["flips"], clusters),
            )
            for m in METHODS
        ),
        cluster_bootstrap([float(r["same first"]) for r in counted], clusters),
        cluster_bootstrap([r["same sign"] for r in counted], clusters),
        len(counted),
        sum(not r["named"] for r in rows),
        sum(len(r["named"]) == r["can be mended"] > 0 for r in rows),
        made.named_in,
        made.judged_in,
        "cases that share a value that carries a group" if len(set(clusters)) < len(clusters) else "cases",
    )
