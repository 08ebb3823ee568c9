"""Any yes-or-no decision of a language model, as data: a folder with ``decision.yaml`` and its cases.

The file says how a case is written for the model (``templates``), between which two answers it chooses, what a case
holds (``fields``, each with a rule and a role), what values say about protected groups without stating them
(``carriers``: first names, places), which cases there are, and by which rule they should be decided, if by any. Nothing
here knows a field's name. ``data/decisions`` holds three; ``scoring`` asks a model.

``reading.load_decision`` reads such a folder.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fractions import Fraction
from functools import cached_property
from math import gcd, lcm
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field as Rule

from glassbox_utils.core import schema
from glassbox_utils.core.arguments import shown
from glassbox_utils.decisions import fields as rules
from glassbox_utils.decisions.cases import Case, parse_values
from glassbox_utils.decisions.fields import Category, DecisionError, Field, Finite, Number, Plain, Text, Value, checked

FILE = "decision.yaml"
EXAMPLE = f"a {FILE} such as data/decisions/hiring/{FILE}"
Split = Literal["train", "selection", "report", "far"]
"""what a template or a list of names is for; far: in another manner than what is trained on, reported apart"""
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}\n]*)\}|[{}]")


@dataclass(frozen=True)
class Template:
    """A case in words, up to the position where the decision is made: raw text, or the user's words in a chat."""

    text: Annotated[str | None, Rule(min_length=1)] = None
    chat: Annotated[str | None, Rule(min_length=1)] = None
    system: str | None = None
    """of a chat; None: the model's own"""
    opening: str = ""
    """what the answer of a chat begins with, in front of the decision"""
    split: Split | None = None

    def __post_init__(self) -> None:
        schema.check(self, DecisionError)
        if (self.text is None) == (self.chat is None):
            raise DecisionError("text and chat: exactly one of them is needed. Raw text goes below `text:`, a user's "
                                "words in a chat below `chat:`.")  # fmt: skip
        if self.text is not None and (self.system is not None or self.opening):
            raise DecisionError("system and opening belong to a chat. Leave them out, or write `chat:` for `text:`.")
        for name in ("text", "chat", "system", "opening"):
            if odd := re.search(r"[^\S\n\t ]|[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]", getattr(self, name) or ""):
                raise DecisionError(f"{name} holds {odd[0]!a}, which is no printed character. Remove it.")
            if name != "system" and (given := getattr(self, name) or "") != given.rstrip():
                raise DecisionError(
                    f"{name} ends in a space or a line break, and the next token is the answer. Allowed: it ends in a "
                    "word or a sign; in YAML, `|-` in place of `|` leaves the last line break out. Remove it."
                )

    @property
    def words(self) -> str:
        return self.text if self.text is not None else self.chat or ""


@dataclass(frozen=True)
class GroupList:
    """Values of one field that stand for the same groups: first names of women of one origin."""

    groups: Mapping[str, str]
    values: tuple[Plain, ...]
    split: Split | None = None


@dataclass(frozen=True)
class Carrier:
    """A field whose values carry groups that no field states."""

    field: str
    lists: tuple[GroupList, ...]

    def list_of(self, value: Value) -> GroupList | None:
        """The list that holds a value, if one does."""
        return next((one for one in self.lists if value in one.values), None)


@dataclass(frozen=True)
class Points:
    """A line of the merit rule: so many points for one value, or for a number in a range (both ends belong to it)."""

    field: Plain
    points: Finite
    equals: str | None = None
    at_least: Finite | None = None
    at_most: Finite | None = None

    def __post_init__(self) -> None:
        schema.check(self, DecisionError)
        if not self.points:
            raise DecisionError("points is 0. Allowed: a number that counts. Change it, or remove the line.")
        for name in ("points", "at_least", "at_most"):
            rules.check_size(name, getattr(self, name) or 0)

    def hold(self, value: Any) -> bool:
        if self.equals is not None:
            return value == self.equals
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True)
class MeritRule:
    """Cases with at least ``threshold`` points deserve the favourable answer."""

    threshold: Finite
    points: tuple[Points, ...]


@dataclass(frozen=True, eq=False)
class Decision:
    """A checked decision; made by ``load_decision``."""

    name: str
    title: str
    answers: tuple[str, str]
    """favourable, unfavourable"""
    templates: Mapping[str, Template]
    fields: Mapping[str, Field]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """protected attributes that no field states, with their groups"""
    carriers: tuple[Carrier, ...] = ()
    merit: MeritRule | None = None
    cases: tuple[Case, ...] = ()
    about: str = ""
    licence: str = ""

    @cached_property
    def refused(self) -> tuple[str, ...]:
        """What no free text may hold: the answers, names of merit fields and their categories."""
        found = [answer.strip() for answer in self.answers]
        for name, one in self.fields.items():
            if one.role == "merit":
                found += [*name.split("_"), *(one.values if isinstance(one, Category) else ())]
        return tuple(dict.fromkeys(word for word in found if len(word) > 2))  # "no" and "of" are everybody's

    def protected(self) -> dict[str, tuple[str, ...]]:
        """Every protected attribute with its groups: stated by a field (a number's in bands), or carried."""
        stated = {k: rules.bands(f) if isinstance(f, Number) else f.values for k, f in self.fields.items()
                  if f.role == "protected" and not isinstance(f, Text)}  # fmt: skip
        return stated | dict(self.groups)

    def template(self, name: str | None = None) -> Template:
        """A template, the first one without a name. DecisionError names those there are."""
        if name is None:
            return next(iter(self.templates.values()))
        if name not in self.templates:
            raise DecisionError(f"There is no template {shown(name)}. Allowed: {', '.join(self.templates)}.")
        return self.templates[name]

    def templates_for(self, split: Split) -> list[str]:
        """Names of the templates for one split; those that name none are for every split."""
        return [name for name, t in self.templates.items() if t.split in (None, split)]


# --- what can be asked of a decision ------------------------------------------------------------------


def parse_case(decision: Decision, given: Mapping[str, Any] | str | Path, name: str = "case") -> Case:
    """A case from outside, from a mapping or a YAML or JSON file; DecisionError names the field and the fix."""
    where = "The case"
    if isinstance(given, str | Path):
        example = f"a file with the fields {', '.join(decision.fields)}"
        given, where = schema.read_mapping(Path(given), DecisionError, example, 100_000), str(given)[:200]
    return Case(name, parse_values(given, decision.fields, decision.refused, where))


def render(decision: Decision, case: Case, template: str | None = None) -> str:
    """The case in the words of a template (of the first one): raw text, or what the user says in a chat.

    ``scoring.prompts`` makes of it what a model reads. DecisionError for a template that does not exist.
    """
    return PLACEHOLDER.sub(
        lambda m: m[0][0] if m[1] is None else str(case.values[m[1]]), decision.template(template).words
    )


def groups(decision: Decision, case: Case) -> dict[str, str | None]:
    """The group of a case in every protected attribute; None where no list knows its values, or lists disagree."""
    found: dict[str, str | None] = {}
    for name in decision.protected():
        rule = decision.fields.get(name)
        if rule is not None:
            value: Any = case.values[name]
            found[name] = rules.band_of(rule, value) if isinstance(rule, Number) else value
            continue
        lists = [one for c in decision.carriers if (one := c.list_of(case.values[c.field])) and name in one.groups]
        said = {one.groups[name] for one in lists}
        found[name] = said.pop() if len(said) == 1 else None
    return found


def swapped(decision: Decision, case: Case, name: str, value: Any) -> Case:
    """The same case with another value of a field, or of another group: then the values that carry the group change.

    A carrier's new value has the old one's rank in the list of the other group, of the same split and with the same
    other groups. What really happened is not known of the new case. DecisionError for a field, value or group that
    does not exist, or a case whose group is not known.
    """
    if not isinstance(name, str):
        raise DecisionError(f"{shown(name)} is no name of a field or group. Allowed: a text.")
    if name in decision.fields:
        new = {name: checked(name, decision.fields[name], value, decision.refused)}
        return replace(case, values=dict(case.values) | new, outcome=None)
    if name not in decision.groups:
        known = [*decision.fields, *decision.groups]
        near = get_close_matches(str(name), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DecisionError(f"There is no field or group {shown(name)}.{hint} Allowed: {', '.join(known)}.")
    if value not in decision.groups[name]:
        raise DecisionError(f"{name} is {shown(value)}. Allowed: {', '.join(decision.groups[name])}.")
    new = {}
    for carrier in decision.carriers:
        mine = carrier.list_of(case.values[carrier.field])
        if mine is None or name not in mine.groups:
            continue
        wanted = {**mine.groups, name: value}
        other = next((one for one in carrier.lists if one.groups == wanted and one.split == mine.split), None)
        if other is None:
            raise DecisionError(
                f"No list of {carrier.field!r} stands for {', '.join(wanted.values())} like the one that holds "
                f"{shown(case.values[carrier.field])}. Add it below `carriers:`, or change the field itself."
            )
        rank = mine.values.index(str(case.values[carrier.field]))
        new[carrier.field] = other.values[rank % len(other.values)]
    if not new:
        values = ", ".join(shown(case.values[c.field]) for c in decision.carriers)
        raise DecisionError(f"The group of this case in {name!r} is not known: no list holds {values}. Change a field "
                            "itself instead.")  # fmt: skip
    return replace(case, values=dict(case.values) | new, outcome=None)


def points(decision: Decision, case: Case) -> float:
    """Points of the merit rule. DecisionError if the decision has none."""
    return sum(line.points for line in _rule(decision).points if line.hold(case.values[line.field]))


def margin(decision: Decision, case: Case) -> float:
    """Points above the line between the two answers, which runs half a grain below the threshold: never 0."""
    rule = _rule(decision)
    parts = [Fraction(str(x)) for x in (rule.threshold, *(line.points for line in rule.points))]
    unit = lcm(*(part.denominator for part in parts))
    grain = gcd(*(int(part * unit) for part in parts)) / unit
    return points(decision, case) - rule.threshold + grain / 2


def merit(decision: Decision, case: Case) -> bool:
    """Does the merit rule give the favourable answer? DecisionError if the decision has no rule."""
    return margin(decision, case) > 0


def truth(decision: Decision, case: Case) -> bool:
    """What should have been decided: what really happened if that is known, else what the merit rule says."""
    if case.outcome is not None:
        return case.outcome
    return merit(decision, case)


def _rule(decision: Decision) -> MeritRule:
    if decision.merit is None:
        raise DecisionError(f"{decision.title!r} has no merit rule. Add `merit:` to its {FILE}, as in {EXAMPLE}.")
    return decision.merit
