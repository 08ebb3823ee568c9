"""Which questions an audit asks of a decision: what every field may say, and whom each question singles out.

A *part* is a condition on one subject: a field, or an attribute that a field carries ("gender is female", "age 27 to
36", "name is Fatima"). A *probe* is one part, or two of different fields. Parts of protected fields and of fields that
are neither merit nor protected are asked by themselves; parts of protected ones also together with any other field,
merit fields included: a late history may count, but not more for women. Nothing here knows a field's name.

A *design* is a set of questions to a model: base cases in several templates, each many times with all fields but the
merit fields drawn anew. Every prompt then says something about every field at once (a randomised conjoint: Hainmueller,
Hopkins & Yamamoto 2014, doi:10.1093/pan/mpt024; its interactions: Egami & Imai 2019), which needs fewer prompts than
one pair of prompts for each name.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from glassbox_utils.decisions.cases import Case
from glassbox_utils.decisions.decision import Decision
from glassbox_utils.decisions.fields import Category, Number, Text, Value

FINE, COARSE, QUARTERS = 100, 8, 4
"""bins in which windows of a number are looked for: by itself, together with another field, and of a merit field"""
LEAST_SHARE, LEAST_PAIR = 0.03, 0.012
"""of the prompts that a window or a pair must hold, and leave out"""
SUSPECTED = 1 / 3
"""of the prompts of the second half ask about the values that the first one suspects, where it does"""
FEWEST = 5
"""prompts with a value, for a question about that value alone"""


@dataclass(frozen=True)
class Part:
    """A condition on one subject."""

    subject: str
    """a field, or an attribute that a field carries"""
    field: str
    values: tuple[Value, ...]
    """of the field, for which it holds; of a number: the ends of the window"""
    group: str | None = None
    """of a carried attribute"""
    window: bool = False

    def hold(self, value: Value) -> bool:
        if self.window:
            return self.values[0] <= value <= self.values[1]  # type: ignore[operator]
        return value in self.values

    def __str__(self) -> str:
        if self.window:
            return f"{self.subject} {self.values[0]} to {self.values[1]}"
        return f"{self.subject} is {self.group or self.values[0]}"


@dataclass(frozen=True)
class Probe:
    """Whom a question singles out: all of its parts hold."""

    parts: tuple[Part, ...]
    family: str
    """group, value, window or pair: how many questions of its kind are asked decides how sure one must be"""

    def hold(self, case: Case) -> bool:
        return all(part.hold(case.values[part.field]) for part in self.parts)

    def __str__(self) -> str:
        return " and ".join(map(str, self.parts))


@dataclass(frozen=True, eq=False)
class Design:
    """The questions for one half of the base cases, in blocks of one case in one template."""

    cases: tuple[Case, ...]
    """the base cases"""
    templates: tuple[str, ...]
    versions: int
    """of each case in each template"""
    asked: tuple[Case, ...]
    """[case, template, version], flat"""

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.cases), len(self.templates), self.versions

    def by_template(self) -> dict[str, list[int]]:
        """template -> which of ``asked`` are written in it"""
        order = np.arange(len(self.asked)).reshape(self.shape)
        return {name: order[:, i].ravel().tolist() for i, name in enumerate(self.templates)}

    @cached_property
    def codes(self) -> dict[str, tuple[list[Value], Int[NDArray, " asked"]]]:
        """field -> the values that were asked, and which of them each prompt holds"""
        found = {}
        for name in self.asked[0].values:
            index: dict[Value, int] = {}
            codes = [index.setdefault(case.values[name], len(index)) for case in self.asked]
            found[name] = list(index), np.array(codes)
        return found

    @cached_property
    def varied(self) -> frozenset[str]:
        """Fields that differ within the blocks: those that were drawn anew."""
        first = self.asked[: self.versions]
        return frozenset(name for name in first[0].values if len({case.values[name] for case in first}) > 1)

    def only(self, templates: Sequence[str]) -> "Design":
        """The same without other templates."""
        kept = [i for i, name in enumerate(self.templates) if name in templates]
        order = np.arange(len(self.asked)).reshape(self.shape)[:, kept].ravel()
        return Design(self.cases, tuple(templates), self.versions, tuple(self.asked[i] for i in order))

    def without_blocks(self, x: Float[NDArray, "asked ..."]) -> Float[NDArray, "asked ..."]:
        """Minus the mean of its case in its template: what a change of the fields did, nothing of the case itself."""
        blocks = x.reshape(len(x) // self.versions, self.versions, *x.shape[1:])  # no -1: there may be no column
        return (blocks - blocks.mean(1, keepdims=True)).reshape(x.shape)


# --- what a field may say -----------------------------------------------------------------------------


def free(decision: Decision) -> list[str]:
    """Fields that are drawn anew: all but those that may count."""
    return [name for name, rule in decision.fields.items() if rule.role != "merit"]


def listed(decision: Decision, name: str) -> list[Value]:
    """Every value of a category, or of a text: those in lists of carriers, the known ones, and those of the cases."""
    rule = decision.fields[name]
    if isinstance(rule, Category):
        return list(rule.values)
    lists = [value for c in decision.carriers if c.field == name for one in c.lists for value in one.values]
    known = rule.known if isinstance(rule, Text) else ()
    return list(dict.fromkeys([*lists, *known, *(case.values[name] for case in decision.cases)]))


def drawn(decision: Decision, name: str, n: int, rng: np.random.Generator) -> list[Value]:
    """``n`` values of a field: each equally often; of a number, half over its whole range and half as cases have it."""
    rule = decision.fields[name]
    if isinstance(rule, Number):
        low, high = rule.range
        steps = round((high - low) / rule.step)
        even = np.floor((np.arange(n) + rng.random()) * (steps + 1) / n).astype(int)
        over = [low + int(k) * rule.step for k in even]
        seen = [decision.cases[i].values[name] for i in rng.integers(len(decision.cases), size=n)]
        pool: list[Value] = [plain(over[i]) if i % 2 else seen[i] for i in range(n)]
    else:
        values = listed(decision, name)
        order = np.concatenate([rng.permutation(len(values)) for _ in range(-(-n // len(values)))])[:n]
        pool = [values[i] for i in order]
    return [pool[i] for i in rng.permutation(n)]


def plain(x: float) -> Value:
    """A number as a case holds it."""
    x = round(float(x), 10)
    return int(x) if x.is_integer() else x


def design(
    decision: Decision,
    cases: Sequence[Case],
    templates: Sequence[str],
    versions: int,
    rng: np.random.Generator,
    suspects: Mapping[str, Sequence[Value]] | None = None,
) -> Design:
    """Each case in each template in so many versions, with every field but the merit fields drawn anew.

    ``suspects``: values of a field that fill SUSPECTED of its prompts, so that a rare name can be confirmed.
    """
    n = len(cases) * len(templates) * versions
    values = {name: drawn(decision, name, n, rng) for name in free(decision)}
    for name, few in (suspects or {}).items():
        rows = rng.permutation(n)[: round(SUSPECTED * n)]
        for k, row in enumerate(rows):
            values[name][row] = few[k % len(few)]
    bases = [case for case in cases for _ in range(len(templates) * versions)]
    asked = tuple(
        replace(case, values={**case.values, **{name: values[name][i] for name in values}}, outcome=None)
        for i, case in enumerate(bases)
    )
    return Design(tuple(cases), tuple(templates), versions, asked)


# --- whom a question singles out ----------------------------------------------------------------------


def subjects(decision: Decision) -> dict[str, tuple[str, str]]:
    """Everything that gets a verdict -> (the field that says it, its role): fields that may not count or of which
    nothing is said, and attributes that they carry."""
    found: dict[str, tuple[str, str]] = {name: (name, decision.fields[name].role) for name in free(decision)}
    for carrier in decision.carriers:
        for attribute in dict.fromkeys(a for one in carrier.lists for a in one.groups):
            found.setdefault(attribute, (carrier.field, "protected"))
    return found


def windows(name: str, values: Sequence[Value], bins: int) -> list[Part]:
    """Every window over so many bins of a number that hold about equally many of the values."""
    x = np.sort(np.array(values, dtype=float))
    edges = np.unique(x[np.linspace(0, len(x) - 1, bins + 1).round().astype(int)[:-1]])
    begins = np.searchsorted(x, edges)
    ends = [*begins[1:], len(x)]
    found = []
    for low, begin in zip(edges, begins, strict=True):
        for end in (end for end in ends if end > begin):
            if LEAST_SHARE <= (end - begin) / len(x) <= 1 - LEAST_SHARE:
                found.append(Part(name, name, (plain(low), plain(x[end - 1])), window=True))
    return found


def groups_of(decision: Decision, name: str, values: Iterable[Value]) -> list[Part]:
    """Carried groups of a field's values: all values whose lists say the group."""
    found: dict[tuple[str, str], list[Value]] = {}
    for carrier in (c for c in decision.carriers if c.field == name):
        for value in values:
            one = carrier.list_of(value)
            for attribute, group in one.groups.items() if one is not None else ():
                found.setdefault((attribute, group), []).append(value)
    several = {a for a, _ in found if len([1 for b, _ in found if b == a]) > 1}
    return [Part(a, name, tuple(members), group=g) for (a, g), members in found.items() if a in several]


def singles(name: str, values: Sequence[Value], codes: Int[NDArray, " asked"]) -> list[Part]:
    """Every value of a category or text by itself that was asked often enough."""
    often = np.bincount(codes, minlength=len(values))
    return [Part(name, name, (v,)) for v, k in zip(values, often, strict=True) if FEWEST <= k <= len(codes) - FEWEST]


@dataclass(frozen=True, eq=False)
class Questions:
    """All probes of a decision, with whom each singles out in a design."""

    probes: tuple[Probe, ...]
    columns: Bool[NDArray, "asked probe"]
    sizes: Mapping[str, int]
    """family -> how many questions"""


def questions(decision: Decision, of: Design) -> Questions:
    """Every question that the design can answer: groups, values, windows, and pairs with a protected one."""
    alone: dict[str, list[Part]] = {"group": [], "value": [], "window": []}
    first: list[Part] = []
    second: list[Part] = []
    for name, rule in decision.fields.items():
        values, codes = of.codes[name]
        if len(values) < 2:
            continue
        asked = [values[i] for i in codes]
        few = [] if isinstance(rule, Number) else singles(name, values, codes)
        if isinstance(rule, Number):
            wide = windows(name, asked, QUARTERS if rule.role == "merit" else COARSE)
            fine = windows(name, asked, FINE)
        else:
            carried = groups_of(decision, name, values)
            wide = carried + (few if not carried else [])
            fine = []
            if rule.role != "merit":
                alone["group"] += _less_one(carried) + (_less_one(few) if isinstance(rule, Category) else [])
                alone["value"] += [] if isinstance(rule, Category) else few
        if rule.role != "merit":
            alone["window"] += fine
        if rule.role == "protected":
            first += wide
        second += wide
    probes = [Probe((part,), family) for family, parts in alone.items() for part in parts]
    table = {part: column(of, part) for part in dict.fromkeys([*first, *second])}
    fields = list(decision.fields)
    columns = [table[p.parts[0]] if p.parts[0] in table else column(of, p.parts[0]) for p in probes]
    for a in first:
        for b in second:
            both_protected = decision.fields[b.field].role == "protected"
            if b.field == a.field and (a.window or a.subject == b.subject):
                continue
            if both_protected and (fields.index(a.field), a.subject) > (fields.index(b.field), b.subject):
                continue  # the same pair the other way round
            hit = table[a] & table[b]
            if LEAST_PAIR <= hit.mean() <= 1 - LEAST_PAIR:
                probes.append(Probe((a, b), "pair"))
                columns.append(hit)
    sizes = {family: sum(p.family == family for p in probes) for family in dict.fromkeys(p.family for p in probes)}
    matrix = np.stack(columns, 1) if columns else np.zeros((len(of.asked), 0), dtype=bool)
    return Questions(tuple(probes), matrix, sizes)


def column(of: Design, part: Part) -> Bool[NDArray, " asked"]:
    """For which prompts a part holds."""
    values, codes = of.codes[part.field]
    if part.window:
        x = np.array(values, dtype=float)
        low, high = (float(end) for end in part.values)
        return ((x >= low) & (x <= high))[codes]
    inside = frozenset(part.values)
    return np.array([value in inside for value in values])[codes]


def matrix(of: Design, probes: Sequence[Probe]) -> Float[NDArray, "asked probe"]:
    """1 where all parts of a probe hold."""
    hits = [np.logical_and.reduce([column(of, part) for part in probe.parts]) for probe in probes]
    return np.stack(hits, 1).astype(float) if hits else np.zeros((len(of.asked), 0))


def complement(decision: Decision, of: Design, probe: Probe) -> Probe | None:
    """Everybody else, where one part says who that is. A condition on a field that does not change within a block
    stays: only then a pair has such an opposite."""
    moving = [part for part in probe.parts if part.field in of.varied]
    rest = opposite(decision, of, moving[0]) if len(moving) == 1 else None
    if rest is None:
        return None
    return replace(probe, parts=tuple(rest if part == moving[0] else part for part in probe.parts))


def opposite(decision: Decision, of: Design, part: Part) -> Part | None:
    """The other of two groups or values, or the other end of a number."""
    values, codes = of.codes[part.field]
    if part.window:
        rest = [v for v in values if not part.hold(v)]
        above = [v for v in rest if v > part.values[1]]  # type: ignore[operator]
        one_end = len(above) in (0, len(rest))
        return replace(part, values=(min(rest), max(rest))) if rest and one_end else None
    groups = groups_of(decision, part.field, values) if part.group else singles(part.field, values, codes)
    others = [one for one in groups if one.subject == part.subject and not any(map(part.hold, one.values))]
    return others[0] if len(others) == 1 else None


def _less_one(parts: list[Part]) -> list[Part]:
    """Of two groups one says all about both; of three none can be left out."""
    many = {s: sum(p.subject == s for p in parts) for s in {p.subject for p in parts}}
    seen: set[str] = set()
    kept = []
    for part in parts:
        if many[part.subject] == 2 and part.subject in seen:
            continue
        seen.add(part.subject)
        kept.append(part)
    return kept
