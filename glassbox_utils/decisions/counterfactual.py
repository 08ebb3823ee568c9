"""The nearest counterfactual: which small change of permissible fields would have led to the other answer?

Single fields are searched on their true grid from the case's own value outwards, every value, up to the first that
turns the decision: without assuming that more is better. Pairs are searched within a budget, then each of the two
changes is made as small as the other allows. Distances are in standard deviations of the field among the cases (a
change of a category counts 1), after Wachter, Mittelstadt & Russell (arXiv 1711.00399). Numbers stay in the range that
the cases have: an income that nobody has is no advice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import combinations, product

import numpy as np

from glassbox_utils.decisions.asking import Ask, across
from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import Decision
from glassbox_utils.decisions.fields import Category, Number, Text, Value
from glassbox_utils.decisions.reasons import mended, merit_fields

LONGEST = 600
"""values of one field that are all tried; of a longer grid every k-th, and all beside the first that turns"""
CHUNK = 64
DRAWN = 25
"""points of a curve"""
PAIRS = 400
"""prompts for pairs of changes"""
EACH = 6
"""changes of each field that pairs are made of"""
SHRUNK, COARSE = 3, 24
"""pairs whose changes are made smaller, and values of a field that are tried for it before the last step"""
SHOWN = 5


@dataclass(frozen=True)
class Change:
    """With these values the decision would have been the other one."""

    changes: dict[str, Value]
    score: float
    distance: float
    """sum over the fields, in standard deviations of the cases"""
    turned: int
    """templates in which the decision turns, when the case is asked anew"""
    templates: int
    """in which it was asked"""
    exact: bool
    """was every smaller change of this field tried? Never of two fields"""


@dataclass(frozen=True)
class Search:
    """What was found, and where was looked."""

    nearest: tuple[Change, ...]
    """smallest first, one for each set of fields"""
    ranges: dict[str, tuple[Value, ...]]
    """field -> first and last value tried of a number, the values tried of others"""
    strides: dict[str, int]
    """field -> steps of its grid between two tried values: 1 is every value"""
    curves: dict[str, tuple[tuple[float, float], ...]]
    """number -> (value, score), to draw"""
    tried: int
    """changed cases"""


@dataclass(frozen=True)
class _Move:
    value: Value
    distance: float
    score: float


def search(
    ask: Ask, decision: Decision, case: Case, template: str, base: Mapping[str, float], cases: Sequence[Case],
    most: int = LONGEST,
) -> Search:  # fmt: skip
    """The smallest changes of one field, and of two, that turn the decision in ``template``.

    ``base``: template -> score of the case; each change that is found is asked anew in all of them. ``cases``: whose
    ranges and spreads count; without any, the whole range of a field does. ``most``: values of a number that are tried.
    """
    favourable = base[template] > 0
    names, tried = merit_fields(decision), 0
    scales = {name: spread(decision, name, cases) for name in names}
    ranges: dict[str, tuple[Value, ...]] = {}
    strides: dict[str, int] = {}
    curves: dict[str, tuple[tuple[float, float], ...]] = {}
    singles: dict[str, _Move] = {}
    moves: dict[str, list[_Move]] = {}
    for name in names:
        values, strides[name] = grid(decision, name, case.values[name], cases, most)
        rule = decision.fields[name]
        every = [*values, case.values[name]]
        ranges[name] = (min(every), max(every)) if isinstance(rule, Number) else tuple(values)
        found, asked = first_turn(ask, case, name, values, strides[name], template, favourable, rule, most)
        tried += asked
        if found is not None:
            singles[name] = _move(decision, case, name, *found, scales[name])
        sample = drawn(values, case.values[name]) if isinstance(rule, Number) else values
        scores = ask([mended(case, {name: v}) for v in sample], template)
        if isinstance(rule, Number):
            curves[name] = tuple((float(v), float(x)) for v, x in zip(sample, scores, strict=True) if np.isfinite(x))
        moves[name] = [
            _move(decision, case, name, v, float(x), scales[name])
            for v, x in zip(sample, scores, strict=True)
            if v != case.values[name] and np.isfinite(x)
        ]
    flips = [({name: m.value}, m.score, m.distance, strides[name] == 1) for name, m in singles.items()]
    best = min((m.distance for m in singles.values()), default=float("inf"))
    both, asked = _pairs(ask, case, template, base[template], moves, best)
    tried += asked
    for changes in sorted(both, key=lambda c: distance(decision, case, c, scales))[:SHRUNK]:
        small, more = shrunk(ask, decision, case, changes, template, favourable)
        tried += more
        score = float(ask([mended(case, small)], template)[0])
        flips.append((small, score, distance(decision, case, small, scales), False))
    nearest: dict[tuple[str, ...], Change] = {}
    for changes, score, far, exact in sorted(flips, key=lambda f: f[2]):
        if any(set(known) < set(changes) and nearest[known].distance <= far for known in nearest):
            continue  # one of the two alone does it, with less
        row = across(ask, [mended(case, changes)], list(base))[0]
        heard = [(x > 0) != (b > 0) for x, b in zip(row, base.values(), strict=True) if np.isfinite(x)]
        nearest.setdefault(tuple(sorted(changes)), Change(changes, score, far, int(sum(heard)), len(heard), exact))
    return Search(tuple(nearest.values())[:SHOWN], ranges, strides, curves, tried)


# --- the grid of a field ------------------------------------------------------------------------------


def grid(
    decision: Decision, name: str, own: Value, cases: Sequence[Case], most: int = LONGEST
) -> tuple[list[Value], int]:
    """Values that a field may be changed to, the nearest to its own first, and the stride between them in steps.

    Of a number: every step in the range of the cases (of the field, without cases), at most ``most``; of a category all
    others; of free text the known ones.
    """
    rule = decision.fields[name]
    if isinstance(rule, Category):
        return [v for v in rule.values if v != own], 1
    if isinstance(rule, Text):
        known: list[Value] = [v for v in rule.known if v != own]
        return known[:LONGEST], 1
    seen = [*(case.values[name] for case in cases), own] if cases else list(rule.range)
    low, step = Decimal(str(rule.range[0])), Decimal(str(rule.step))
    first, last = (int((Decimal(str(end)) - low) / step) for end in (min(seen), max(seen)))
    stride = max(1, -(-(last - first) // most))
    mine = int((Decimal(str(own)) - low) / step)
    places = [mine + k for k in range(-((mine - first) // stride) * stride, last - mine + 1, stride) if k]
    places += [end for end in (first, last) if end not in places and end != mine]
    return [_number(low + k * step) for k in sorted(places, key=lambda k: abs(k - mine))], stride


def _number(x: Decimal) -> Value:
    return int(x) if x == int(x) else float(x)


def drawn(values: Sequence[Value], own: Value) -> list[Value]:
    """Some of the values in order, for a curve, with the case's own and both ends."""
    order = sorted([*values, own])
    kept = np.unique(np.linspace(0, len(order) - 1, DRAWN).round().astype(int))
    return sorted({order[i] for i in kept} | {own})


def spread(decision: Decision, name: str, cases: Sequence[Case]) -> float:
    """Standard deviation of a number among the cases; of an even draw from its range, without cases. 1 of others."""
    rule = decision.fields[name]
    if not isinstance(rule, Number):
        return 1.0
    found = float(np.std([float(case.values[name]) for case in cases])) if cases else 0.0
    return found or float(rule.range[1] - rule.range[0]) / 12**0.5


def distance(decision: Decision, case: Case, changes: Mapping[str, Value], scales: Mapping[str, float]) -> float:
    """How far a case is changed: the sum over its fields, in standard deviations."""
    return sum(_far(decision, name, case.values[name], v) / scales[name] for name, v in changes.items())


def _far(decision: Decision, name: str, own: Value, value: Value) -> float:
    number = isinstance(decision.fields[name], Number)
    return abs(float(value) - float(own)) if number else float(value != own)


def _move(decision: Decision, case: Case, name: str, value: Value, score: float, scale: float) -> _Move:
    return _Move(value, _far(decision, name, case.values[name], value) / scale, score)


# --- one field ----------------------------------------------------------------------------------------


def first_turn(
    ask: Ask,
    case: Case,
    name: str,
    values: Sequence[Value],
    stride: int,
    template: str,
    favourable: bool,
    rule: Number | Category | Text,
    most: int = LONGEST,
) -> tuple[tuple[Value, float] | None, int]:
    """The first of some values, in their order, with which the decision is the other one, its score, and how many were
    asked. With a stride, the grid between it and the case is asked too, value by value."""
    asked = 0
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK]
        scores = ask([mended(case, {name: v}) for v in part], template)
        asked += len(part)
        hit = next((i for i, x in enumerate(scores) if _other(x, favourable)), None)
        if hit is None:
            continue
        found = part[hit], float(scores[hit])
        while stride > 1 and isinstance(rule, Number):  # what the stride left out between this value and the case
            finer = max(1, stride // most)
            between = _between(rule, case.values[name], found[0], stride, finer)
            row = ask([mended(case, {name: v}) for v in between], template)
            asked += len(between)
            found = next(((v, float(x)) for v, x in zip(between, row, strict=True) if _other(x, favourable)), found)
            stride = finer
        return found, asked
    return None, asked


def _between(rule: Number, own: Value, value: Value, stride: int, finer: int) -> list[Value]:
    """Every ``finer``-th step from a value towards the case's own, less than ``stride`` away, nearest to the case
    first."""
    step, end, mine = Decimal(str(rule.step)), Decimal(str(value)), Decimal(str(own))
    back = step if end < mine else -step
    on_the_way = [end + k * back for k in reversed(range(finer, stride, finer))]
    return [_number(x) for x in on_the_way if (x - mine) * (end - mine) > 0]


def _other(score: float, favourable: bool) -> bool:
    return bool(np.isfinite(score)) and (score > 0) != favourable


# --- two fields ---------------------------------------------------------------------------------------


def _pairs(
    ask: Ask, case: Case, template: str, base: float, moves: Mapping[str, Sequence[_Move]], best: float
) -> tuple[list[dict[str, Value]], int]:
    """Of each pair of fields the first two moves that turn the decision with less than ``best``, and how many were
    asked: at most PAIRS, first those whose effects add up to enough, the nearest first, then those that come near."""
    towards = -1 if base > 0 else 1
    useful = {name: _front(rows, base, towards) for name, rows in moves.items()}
    options = []
    for first, second in combinations(useful, 2):
        for a, b in product(useful[first], useful[second]):
            gain, far = towards * (a.score + b.score - 2 * base), a.distance + b.distance
            if far < best:
                order = (0, far) if gain > abs(base) else (1, -gain)
                options.append((order, (first, second), {first: a.value, second: b.value}))
    options = sorted(options, key=lambda o: o[0])[:PAIRS]
    found: dict[tuple[str, str], dict[str, Value]] = {}
    asked = 0
    for start in range(0, len(options), CHUNK):
        part = [o for o in options[start : start + CHUNK] if o[1] not in found]
        scores = ask([mended(case, changes) for _, _, changes in part], template)
        asked += len(part)
        for (_, names, changes), score in zip(part, scores, strict=True):
            if _other(score, base > 0):
                found.setdefault(names, changes)
    return list(found.values()), asked


def _front(rows: Sequence[_Move], base: float, towards: int) -> list[_Move]:
    """Moves in the right direction of which none nearer does as much, at most EACH."""
    found: list[_Move] = []
    for move in sorted(rows, key=lambda m: m.distance):
        gain = towards * (move.score - base)
        if gain > 0 and (not found or gain > towards * (found[-1].score - base)):
            found.append(move)
    kept = np.linspace(0, len(found) - 1, EACH).round().astype(int) if found else np.zeros(0, int)
    return [found[i] for i in np.unique(kept)]


def shrunk(
    ask: Ask,
    decision: Decision,
    case: Case,
    changes: Mapping[str, Value],
    template: str,
    favourable: bool,
) -> tuple[dict[str, Value], int]:
    """Two changes, each made as small as the other allows, and how many changed cases that took.

    Each by COARSE values between its own and the change, then by every value beside the first that turns.
    """
    small, asked = dict(changes), 0
    for _ in range(2):
        before = dict(small)
        for name in changes:
            own = case.values[name]
            other = mended(case, {k: v for k, v in small.items() if k != name})
            far = _far(decision, name, own, small[name])
            values, stride = grid(decision, name, own, [case, mended(case, {name: small[name]})], COARSE)
            near = [v for v in values if _far(decision, name, own, v) <= far]
            found, more = first_turn(ask, other, name, near, stride, template, favourable, decision.fields[name])
            asked += more
            if found is not None:
                small[name] = found[0]
        if small == before:
            break
    return small, asked
