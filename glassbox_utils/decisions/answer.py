"""The answer: why was this case decided so, by any model of any decision? Measured; ``answer_page`` writes it down.

Everything causal compares decisions of one model on edited cases, in logits of the favourable minus the unfavourable
answer. Principal reasons come from fields that may count; protected groups and free text are measured apart and are
never reasons; attention is only looked at. What a decision does not hold (a merit rule, protected fields, a second
template, cases) is not made up: ``unsaid`` names what can't be said.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from glassbox_utils.core.arguments import whole
from glassbox_utils.core.evidence import Control, Finding, Side, Verdict
from glassbox_utils.core.models import Model, ModelError
from glassbox_utils.decisions import asking, counterfactual, impact, influence, reasons
from glassbox_utils.decisions.asking import Ask, Memory, Scorer
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.counterfactual import Search
from glassbox_utils.decisions.decision import Decision, groups, margin, parse_case, truth
from glassbox_utils.decisions.fields import DecisionError, Number, Text, Value
from glassbox_utils.decisions.impact import FOUR_FIFTHS, Impact
from glassbox_utils.decisions.influence import Swap, TextTest
from glassbox_utils.decisions.observed import attention_to_fields
from glassbox_utils.decisions.reasons import FieldTest, Together

N, N_PAIRED, N_WORDED = 200, 30, 12
"""other cases: for usual values and rates of answers, put into every group, asked in every template"""


@dataclass(frozen=True)
class Sizes:
    """What was used, for whoever wants to repeat it."""

    cases: int
    worded: int
    seed: int
    prompts: int
    """different ones, each asked once"""
    batch_size: int = 32


@dataclass(frozen=True)
class Answer:
    """All that page and letter say about one case."""

    decision: str
    title: str
    answers: tuple[str, str]
    case: str
    values: dict[str, Value]
    template: str
    score: float
    scores: dict[str, float]
    """template -> score, where the model decides"""
    silent: dict[str, str]
    """template -> why not"""
    truth: bool | None
    """what should have been decided, where that is known"""
    truth_from: str
    fields: tuple[FieldTest, ...]
    """every field that may count, mended alone"""
    reasons: tuple[FieldTest, ...]
    """those of them that are named"""
    typical_from: int
    """other cases with the other answer, whose values are the typical ones"""
    typical_by: str
    """whose answer that is: the model's, or what should have been decided, where too few have the model's"""
    together: Together | None
    rest: Together | None
    """as many of the other fields, mended"""
    attention: dict[str, float] | None
    search: Search | None
    swaps: tuple[Swap, ...]
    noise: float | None
    texts: tuple[TextTest, ...]
    impacts: tuple[Impact, ...]
    sizes: Sizes
    unsaid: tuple[str, ...] = ()
    groups: dict[str, str | None] = field(default_factory=dict)
    """protected attribute -> the case's own group, None if it is not known"""
    units: dict[str, str] = field(default_factory=dict)
    """of the numbers that have one"""

    @property
    def favourable(self) -> bool:
        return self.score > 0

    @property
    def answer(self) -> str:
        """What was answered, as a word."""
        return self.answers[not self.favourable].strip()

    @property
    def opposite(self) -> str:
        return self.answers[self.favourable].strip()

    @property
    def probability(self) -> float:
        """Of the favourable answer, given that it is one of the two."""
        return 1 / (1 + math.exp(-min(max(self.score, -700.0), 700.0)))

    @property
    def alike(self) -> int:
        """Templates in which the answer is this one."""
        return sum((x > 0) == self.favourable for x in self.scores.values())

    @property
    def turned_by_text(self) -> tuple[TextTest, ...]:
        """Free texts that, in usual words, would have led to the other answer; all together, if none does it alone."""
        found = [t for t in self.texts if t.turns]
        return tuple([t for t in found if len(t.fields) == 1] or found)

    @property
    def decided_by_text(self) -> tuple[TextTest, ...]:
        """Those of them that decide it; the others turn a case that lies at the line."""
        return tuple(t for t in self.turned_by_text if t.decides)

    @property
    def turned_by_group(self) -> tuple[Swap, ...]:
        """Groups as whose member the same case would have had the other answer, by more than noise."""
        return tuple(s for s in self.swaps if s.turns_this and s.beyond_noise)


def explain(
    model: Model,
    decision: Decision,
    case: Case,
    template: str | None = None,
    n: int = N,
    seed: int = 0,
    batch_size: int = 32,
    most: int = counterfactual.LONGEST,
) -> Answer:
    """Measure all of it: some 2,500 short forward passes for the loan officer.

    ``template``: in which the decision was made; without one the first that the model decides in. ``n``: other cases
    that usual values and rates come from. ``most``: values of a number that are tried for the nearest change; fewer
    are faster and coarser. Raises DecisionError for a case that ``parse_case`` would refuse, a template
    that does not exist, a model that does not decide the case, and numbers that are none.
    """
    whole("batch_size", batch_size, 1, DecisionError)
    found = measured(asking.scorer(model, decision, batch_size), decision, case, template, n, seed, batch_size, most)
    try:
        looked = attention_to_fields(model, decision, [case], found.template)[0].tolist()
    except ModelError as reason:
        return replace(found, unsaid=(*found.unsaid, f"What the model looked at can't be shown: {reason}"))
    return replace(found, attention=dict(zip(decision.fields, looked, strict=True)))


def measured(
    score: Scorer,
    decision: Decision,
    case: Case,
    template: str | None = None,
    n: int = N,
    seed: int = 0,
    batch_size: int = 32,
    most: int = counterfactual.LONGEST,
) -> Answer:
    """``explain`` for whatever gives scores, without attention. Scores may be NaN where there is no answer."""
    if not isinstance(case, Case):
        raise DecisionError(f"{case!r:.80} is no Case. Make one with parse_case, or take one of decision.cases.")
    case = Case(case.id, parse_case(decision, case.values, case.id).values, case.outcome)
    rng = np.random.default_rng(whole("seed", seed, 0, DecisionError))
    whole("n", n, 0, DecisionError)
    whole("most", most, 1, DecisionError)
    memory: Memory = {}
    ask = asking.remembered(score, memory)
    scores, silent = asking.answering(ask, decision, case)
    reason = next(iter(silent.values()), "it has no template") if template is None else silent.get(template, "")
    name = asking.chosen_template(decision, scores, template, reason)
    favourable = scores[name] > 0
    pool = reasons.others(case, decision.cases)
    cases = [pool[i] for i in sorted(rng.permutation(len(pool))[:n].tolist())]
    reference, by = _with_answer(ask, decision, cases, name, not favourable)
    may_count = reasons.merit_fields(decision)
    values = reasons.typical(decision, reference, may_count) if reference else {}
    tests = reasons.field_tests(ask, case, values, scores, favourable)
    worded = [cases[i] for i in rng.permutation(len(cases))[:N_WORDED]]
    noise = asking.wording_noise(asking.across(ask, worded, list(scores))) if len(scores) > 1 and worded else None
    named = reasons.principal(tests, noise=noise)
    rest = [t.field for t in tests if t not in named][: len(named)]
    found = Answer(
        decision.name,
        decision.title,
        decision.answers,
        case.id,
        dict(case.values),
        name,
        scores[name],
        scores,
        silent,
        *_deserved(decision, case),
        tuple(tests),
        tuple(named),
        len(reference),
        by,
        reasons.together(ask, case, values, [t.field for t in named], scores) if named else None,
        reasons.together(ask, case, values, rest, scores) if rest else None,
        None,
        counterfactual.search(ask, decision, case, name, scores, cases, most) if may_count else None,
        tuple(influence.swaps(ask, decision, case, name, scores, cases)),
        noise,
        tuple(influence.text_tests(ask, decision, case, name, cases)),
        tuple(impact.impacts(ask, decision, cases, name, N_PAIRED, seed)) if cases else (),
        Sizes(len(cases), len(worded), seed, 0, batch_size),
        (),
        groups(decision, case),
        {name: rule.unit for name, rule in decision.fields.items() if isinstance(rule, Number) and rule.unit},
    )
    sizes = Sizes(len(cases), len(worded), seed, len(memory), batch_size)
    by_swap = tuple(replace(swap, noise=found.noise) for swap in found.swaps)
    by_text = tuple(replace(test, noise=found.noise) for test in found.texts)
    return replace(found, sizes=sizes, swaps=by_swap, texts=by_text, unsaid=tuple(_unsaid(decision, found)))


def _with_answer(
    ask: Ask, decision: Decision, cases: Sequence[Case], template: str, wanted: bool
) -> tuple[list[Case], str]:
    """The cases that the model gives the wanted answer; too few of them: those that deserve it, if that is known."""
    if not cases:
        return [], "nobody"
    scores = ask(cases, template)
    found = [c for c, x in zip(cases, scores, strict=True) if np.isfinite(x) and (x > 0) == wanted]
    if len(found) >= reasons.FEWEST:
        return found, "this model"
    if decision.merit is None and any(c.outcome is None for c in cases):
        return [], "nobody"
    found = [c for c in cases if truth(decision, c) == wanted]
    return (found, "what should have been decided") if len(found) >= reasons.FEWEST else ([], "nobody")


def _deserved(decision: Decision, case: Case) -> tuple[bool | None, str]:
    if case.outcome is not None:
        return case.outcome, "what really happened"
    if decision.merit is not None:
        return truth(decision, case), f"the merit rule ({margin(decision, case):+g} points from its line)"
    return None, ""


def _unsaid(decision: Decision, found: Answer) -> list[str]:
    """What this decision or this model leaves open, in words."""
    out = []
    may_count = reasons.merit_fields(decision)
    if not may_count:
        out.append("No field has the role merit, so no permissible reason and no counterfactual can be named.")
    elif not found.typical_from:
        out.append(
            f"Fewer than {reasons.FEWEST} other cases have the answer {found.opposite!r}, so it is not known what is "
            "typical for it, and no reason can be tested."
        )
    elif not found.reasons:
        out.append("No field that may count moves this decision towards the other answer in every wording, and by more "
                   "than other words for the same facts do.")  # fmt: skip
    if len(found.scores) == 1:
        out.append("The case is decided in one wording only, so it is not known whether reasons hold in other words.")
    if not decision.protected():
        out.append("The decision names no protected attribute, so treatment and impact were not measured.")
    for name, group in found.groups.items():
        if group is None:
            out.append(f"The group of this case in {plain(name)!r} is not known: its values are in no list.")
    absent = [name for name in decision.protected() if name not in {i.attribute for i in found.impacts}]
    if absent:
        out.append(
            f"Impact was not measured for {', '.join(map(plain, absent))}: fewer than two groups with {impact.LEAST} "
            "cases."
        )
    if found.truth is None:
        out.append("Neither a merit rule nor an outcome says what should have been decided.")
    texts = [name for name, rule in decision.fields.items() if isinstance(rule, Text)]
    if untested := [name for name in texts if not any(name in t.fields for t in found.texts)]:
        out.append(f"No usual value is known for the free text {', '.join(map(plain, untested))}.")
    return out


def plain(name: str) -> str:
    """A field's or group's name in words."""
    return printed(name.replace("_", " "))


def printed(words: str) -> str:
    """Somebody's words in one line; what can't be printed (or turns the writing round) is shown as such."""
    return "".join(c if c.isprintable() else "\ufffd" for c in words)


# --- findings -----------------------------------------------------------------------------------------


def findings(found: Answer, command: str = "glassbox explain") -> list[Finding]:
    """The statements with rung, interval and control; what has no control stays on rung 1 or is left out."""
    out = []
    if found.attention:
        looked = max(found.attention, key=lambda name: found.attention[name])  # type: ignore[index]
        share = found.attention[looked]
        claim = f"the decision position looks at {plain(looked)} most (share of its attention to the fields)"
        out.append(Finding(claim, 1, share, (share, share), 1, source=command, unit="case"))
    for test in found.reasons:
        side: Side = "below" if found.favourable else "above"
        control = _rewording(found) or _unnamed(found)
        if control is not None and test.effect is not None:
            claim = f"mending {plain(test.field)} alone moves this decision towards {found.opposite!r} (logits)"
            alone: Verdict | None = "not testable" if test.effect.n < 2 else None  # one template has no spread
            claimed = Finding.measured(claim, 3, test.effect, "templates", control, source=command, side=side)
            out.append(replace(claimed, declared=alone))
    for swap in found.swaps:
        control = swap.same or _rewording(found)
        if control is not None and swap.effect is not None and swap.effect.n > 1:
            claim = f"the same case with {plain(swap.attribute)} {plain(swap.group)} is decided otherwise (logits)"
            out.append(Finding.measured(claim, 3, swap.effect, swap.unit, control, source=command))
    for one in found.impacts:
        low = one.lowest
        if low is not None and low.ratio is not None and one.chance is not None:
            claim = f"{plain(one.attribute)}: the answer is {found.answers[0].strip()!r} less often for " \
                    f"{plain(low.group)} than for {plain(one.reference)} (ratio of rates)"  # fmt: skip
            chance = Control("shuffled labels", "the lowest ratio in one of twenty shuffles of the groups", one.chance,
                             (one.chance, 1.0))  # fmt: skip
            out.append(Finding.measured(claim, 4, low.ratio, one.unit, chance, source=command, side="below", null=1.0))
    return out


def _unnamed(found: Answer) -> Control | None:
    """The fields that may count and are no reasons, mended alike: what a reason is compared with in one wording."""
    rest = [t.effect.value for t in found.fields if t not in found.reasons and t.effect is not None]
    return (
        Control("base rate", "fields that are no reasons, mended alike (mean)", sum(rest) / len(rest)) if rest else None
    )


def _rewording(found: Answer) -> Control | None:
    if found.noise is None:
        return None
    return Control("base rate", "the same facts in other words (one standard deviation about no change)", 0.0,
                   (-found.noise, found.noise))  # fmt: skip


def below_four_fifths(one: Impact) -> bool:
    """Is a group's ratio below the mark, with its whole interval?"""
    return any(row.ratio is not None and row.ratio.high < FOUR_FIFTHS for row in one.rows)


def as_json(found: Answer) -> dict[str, Any]:
    """The measurements as plain values: everything, for the audit file."""
    values = asdict(found)
    for name in ("answer", "opposite", "favourable", "probability"):
        values[name] = getattr(found, name)
    return values


def of_case(decision: Decision, given: str) -> Case:
    """A case of the decision by its id, or from a YAML or JSON file; DecisionError names what is allowed."""
    known = {case.id: case for case in decision.cases}
    if given in known:
        return known[given]
    if len(given) <= 500 and (Path(given).suffix in (".json", ".yaml", ".yml") or "/" in given):
        return parse_case(decision, given, name=Path(given).stem[:60])
    raise DecisionError(
        f"{decision.title!r} has no case {given[:60]!r}. Allowed: an id such as "
        f"{', '.join(list(known)[:3]) or '(it has no cases)'}, or the path of a .json or .yaml file with its fields."
    )


def agreement(found: Answer) -> float | None:
    """Rank correlation of attention and causal effect over the fields that may count; None for fewer than three."""
    if found.attention is None or len(found.fields) < 3:
        return None
    from scipy.stats import spearmanr

    looked, moved = zip(*((found.attention[t.field], abs(t.towards)) for t in found.fields), strict=True)
    if len(set(looked)) < 2 or len(set(moved)) < 2:
        return None
    return float(spearmanr(looked, moved).statistic)
