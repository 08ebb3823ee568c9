"""How often the audit that searches is right: ``glassbox study audit-power``, no model needed.

Cheap officers of every shipped decision (``power``), each audited from its answers alone:

- *curve*: every kind of planting in four sizes, every second officer with odd weights;
- *honest*: officers that hold nothing against anybody, every second one with odd weights;
- *promised*: effects of exactly the size that an audit of an honest officer had said it would find, and a quarter more;
- *unseen*: biases that no question of the audit has the form of;
- *again*: the confidence of a verdict beside what an audit of the same officer with another seed says.

All seeds are above those that any development looked at (SEEDS_SEEN). What is resampled in an interval is the officer.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from glassbox_utils.core.statistics import Interval, exact_ci
from glassbox_utils.core.studies import resumed, write_table
from glassbox_utils.decisions import judging, power, search
from glassbox_utils.decisions import probes as asking
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import Decision
from glassbox_utils.decisions.fields import Number, Text
from glassbox_utils.decisions.power import Planting, Row, Unseen
from glassbox_utils.decisions.probes import Probe
from glassbox_utils.decisions.reading import load_decision
from glassbox_utils.decisions.verdicts import Audit, Verdict

DECISIONS = ("loan-officer", "german-credit", "hiring")
SIZES = (0.25, 0.5, 1.0, 2.0)
"""points of the merit rule; one is what the deployed loan officer takes from women"""
SEEDS_SEEN = 19_999
SEEDS = range(20_000, 20_007)
"""of which each plants a third of the kinds in each decision: 79 plantings, 75 of them different"""
HONEST = range(21_000, 21_060)
"""90 officers with even weights, 90 with odd ones: with no false alarm in 73, Wilson's interval ends below 5 %"""
PROMISED, FACTORS = range(22_000, 22_002), (1.0, 1.25)
HIDDEN = range(23_000, 23_003)
AGAIN, RESAMPLES, WEAK = range(24_000, 24_003), 40, (0.1, 0.5)
"""officers whose audit is repeated, and the range of points that they take, where it is not sure what is found"""
SOON = 500
"""from the seed of one audit to that of another officer or audit"""


def study_power() -> Path:
    """All of it, decision by decision and seed by seed; a killed run goes on where it was."""
    begun = time.monotonic()
    parts: dict[str, tuple[Sequence[int], Callable[[str, int], list[dict[str, Any]]]]] = {
        "honest": (HONEST, honest),
        "promised": (PROMISED, promised),
        "curve": (SEEDS, curve),
        "unseen": (HIDDEN, hidden),
        "again": (AGAIN, again),
    }
    table: dict[str, list[dict[str, Any]]] = {}
    for part, (seeds, work) in parts.items():
        rows = [resumed("audit_power", [part, name, seed], work, name, seed) for name in DECISIONS for seed in seeds]
        table[part] = [row for some in rows for row in some]
    about = {"sizes": SIZES, "noise": asdict(power.Noise()), "n": search.N, "seeds seen in development": SEEDS_SEEN}
    return write_table("audit_power", None, time.monotonic() - begun, settings=about, rates=rates(table), **table)


# --- the parts ----------------------------------------------------------------------------------------


def curve(name: str, seed: int) -> list[dict[str, Any]]:
    """Plantings of the kinds that the decision allows, in each size; of three kinds one, another with each seed."""
    decision, first = load_decision(name), DECISIONS.index(name)
    planted = power.plantings(decision, np.random.default_rng([seed, 2]))
    mine = [(k, one) for k, one in enumerate(planted) if (k + first + seed) % 3 == 0]
    return [_plain(power.trial(decision, one, size, seed, bool(k % 2))) for k, one in mine for size in SIZES]


def honest(name: str, seed: int) -> list[dict[str, Any]]:
    """One officer that holds nothing against anybody."""
    return [_plain(power.trial(load_decision(name), Planting("honest"), 0.0, seed, bool(seed % 2)))]


def hidden(name: str, seed: int) -> list[dict[str, Any]]:
    """Biases of other forms, of one point (at most: where it depends on a number, of that from end to end)."""
    decision = load_decision(name)
    planted = unseen(decision, np.random.default_rng([seed, 3]))
    return [_plain(power.trial(decision, one, 1.0, seed, bool(k % 2))) for k, one in enumerate(planted)]


def promised(name: str, seed: int) -> list[dict[str, Any]]:
    """What an audit of an honest officer says that it would have found is planted in it, and looked for by another."""
    decision, rng = load_decision(name), np.random.default_rng([seed, 4])
    before = audited(decision, Planting("honest"), 0.0, seed, seed, limits=True)
    of = asking.design(decision, decision.cases[: search.N // 2], list(decision.templates)[: search.WORDINGS], 12, rng)
    pairs = asking.questions(decision, of)
    eighth = [
        p for p, x in zip(pairs.probes, pairs.columns.mean(0), strict=True) if p.family == "pair" and 0.1 <= x <= 0.15
    ]
    rows = []
    for verdict in (verdict for verdict in before.verdicts if verdict.outcome == "not found"):
        for kind, logits, probe in promises(decision, verdict, eighth, rng):
            planting = Planting(kind, (probe,))
            for factor in FACTORS:
                audit = audited(decision, planting, factor * logits / power.SHARPNESS, seed, seed + SOON)
                found, right, _ = power.graded(decision, planting, audit)
                rows.append({"decision": name, "seed": seed, "subject": verdict.subject, "kind": kind, "logits": logits,
                             "factor": factor, "planting": str(probe), "found": found, "right": right})  # fmt: skip
    return rows


def promises(
    decision: Decision, verdict: Verdict, pairs: Sequence[Probe], rng: np.random.Generator
) -> list[tuple[str, float, Probe]]:
    """(kind, logits, whom) of one planting for each limit that a verdict states, drawn at random."""
    field, _ = asking.subjects(decision)[verdict.subject]
    rule = decision.fields[field]
    if isinstance(rule, Number):
        alone = judging.tenths(field, rule)
    else:
        alone = [part for part in power.coarse(decision, field) if part.subject == verdict.subject]
    singles = [] if isinstance(rule, Number) else power.single(decision, field)
    mine = [probe for probe in pairs if verdict.subject in {part.subject for part in probe.parts}]
    found = []
    for kind, logits, some in (
        ("group or window", verdict.smallest, [Probe((part,), "planted") for part in alone]),
        ("one value", verdict.smallest_single, [Probe((part,), "planted") for part in singles]),
        ("pair", verdict.smallest_pair, mine),
    ):
        if logits is not None and some:
            found.append((kind, logits, some[int(rng.integers(len(some)))]))
    return found


def again(name: str, seed: int) -> list[dict[str, Any]]:
    """The confidence of each verdict on an officer that takes little, and what a second audit of it says."""
    decision, rng = load_decision(name), np.random.default_rng([seed, 5])
    planted = power.plantings(decision, rng)
    planting, size = planted[int(rng.integers(len(planted)))], float(rng.uniform(*WEAK))
    first = audited(decision, planting, size, seed, seed, resamples=RESAMPLES)
    second = audited(decision, planting, size, seed, seed + SOON)
    return [
        {"decision": name, "seed": seed, "planting": str(planting), "size": size, "subject": one.subject,
         "outcome": one.outcome, "confidence": one.confidence, "again": second[one.subject].outcome == one.outcome}
        for one in first.verdicts
    ]  # fmt: skip


def audited(decision: Decision, planting: Planting, size: float, officer: int, seed: int, **more: Any) -> Audit:
    """An audit with one seed of an officer with another."""
    more = {"resamples": 0, "limits": False} | more
    return search.search(power.officer(decision, planting, size, officer), decision, search.N, seed, **more)


def _plain(row: Row) -> dict[str, Any]:
    return asdict(replace(row, said=row.said[:4], seconds=round(row.seconds, 2)))


# --- biases of other forms ----------------------------------------------------------------------------


def unseen(decision: Decision, rng: np.random.Generator) -> list[Planting]:
    """One of each form that the decision allows, drawn anew: a slope, both ends of a number, initials, three conditions
    at once."""
    pick = lambda items: items[int(rng.integers(len(items)))]  # noqa: E731
    protected = [n for n, rule in decision.fields.items() if rule.role == "protected"]
    spans = [n for n in protected if isinstance(decision.fields[n], Number)]
    texts = [n for n in protected if isinstance(decision.fields[n], Text)]
    words = [n for n, rule in decision.fields.items() if rule.role == "other" and not isinstance(rule, Number)]
    groups = [part for n in protected for part in power.coarse(decision, n)]
    found: list[Unseen] = []
    if spans:
        span = pick(spans)
        found.append(Unseen(f"the higher {span}, the more", (span,), lambda case: place(decision, case, span)))
        ends = lambda case: float(abs(place(decision, case, span) - 0.5) > 0.4)  # noqa: E731
        found.append(Unseen(f"the lowest and the highest tenth of {span}", (span,), ends))
    if texts:
        text = pick(texts)
        subjects = tuple(s for s, (field, _) in asking.subjects(decision).items() if field == text)
        initials = sorted({str(value)[0] for value in asking.listed(decision, text)})
        mine = {initials[i] for i in rng.permutation(len(initials))[: -(-len(initials) // 3)]}
        begins = lambda case: float(str(case[text])[0] in mine)  # noqa: E731
        found.append(Unseen(f"{text} begins with one of {''.join(sorted(mine))}", subjects, begins))
    if spans and words and groups:
        span, group, word = pick(spans), pick(groups), pick(words)
        values = asking.listed(decision, word)
        some = {values[i] for i in rng.permutation(len(values))[: -(-len(values) // 2)]}
        three = lambda case: float(  # noqa: E731
            group.hold(case[group.field]) and place(decision, case, span) < 0.5 and case[word] in some
        )
        about = f"{group}, {span} in its lower half, and {word} one of {', '.join(map(str, sorted(map(str, some))))}"
        found.append(Unseen(about, (group.subject, span), three))
    kinds = ("slope", "both ends", "initials", "three at once") if texts else ("slope", "both ends", "three at once")
    return [Planting(f"unseen: {kind}", unseen=(one,)) for kind, one in zip(kinds, found, strict=False)]


def place(decision: Decision, case: Case, name: str) -> float:
    """Where a number lies in its range, from 0 to 1."""
    rule = decision.fields[name]
    assert isinstance(rule, Number)
    return (float(case[name]) - rule.range[0]) / (rule.range[1] - rule.range[0])


# --- what it comes to ---------------------------------------------------------------------------------


def rates(table: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Shares with Wilson's interval: by kind and size, of honest officers, of what was promised, and of repeats."""
    found: list[dict[str, Any]] = []

    def add(part: str, of: str, size: float | None, what: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            share = exact_ci(sum(bool(row[what]) for row in rows), len(rows), method="wilson")
            found.append({"part": part, "of": of, "size": size, "what": what, **asdict(share)})

    for size in SIZES:
        mine = [row for row in table["curve"] if row["size"] == size]
        for what in ("found", "right", "alarm"):
            add("curve", "all", size, what, mine)
            for kind in dict.fromkeys(row["kind"] for row in mine):
                add("curve", kind, size, what, [row for row in mine if row["kind"] == kind])
            for name in dict.fromkeys(row["decision"] for row in mine):
                add("curve", name, size, what, [row for row in mine if row["decision"] == name])
    for odd in (False, True):
        add("honest", "odd" if odd else "even", None, "alarm", [r for r in table["honest"] if bool(r["odd"]) == odd])
    add("honest", "all", None, "alarm", table["honest"])
    for kind in dict.fromkeys(row["kind"] for row in table["unseen"]):
        add("unseen", kind, 1.0, "found", [row for row in table["unseen"] if row["kind"] == kind])
    for factor in FACTORS:
        mine = [row for row in table["promised"] if row["factor"] == factor]
        for kind in dict.fromkeys(row["kind"] for row in mine):
            add("promised", kind, factor, "found", [row for row in mine if row["kind"] == kind])
        add("promised", "all", factor, "found", mine)
    for outcome in ("found", "not found"):
        for low, high in ((0.0, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 1.01)):
            mine = [r for r in table["again"] if r["outcome"] == outcome and low <= r["confidence"] < high]
            add("again", f"{outcome}, confidence {low:g} to {min(high, 1):g}", None, "again", mine)
    return found


def rate(table: Mapping[str, Any], part: str, of: str, size: float | None, what: str) -> Interval:
    """One of the table's rates. KeyError if it has none."""
    for row in table["rates"]:
        if (row["part"], row["of"], row["size"], row["what"]) == (part, of, size, what):
            return Interval(row["value"], row["low"], row["high"], row["n"], row["level"])
    raise KeyError((part, of, size, what))


STUDIES_OF_AUDITS = {"audit-power": study_power}
"""not among the studies of a model, since it needs none"""
