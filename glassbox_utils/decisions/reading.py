"""A folder with ``decision.yaml`` becomes a ``Decision``, or is refused in one paragraph.

The paragraph names the file, the line, the key, its value, what is allowed and the fix; nothing is accepted in silence.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field as Rule

from glassbox_utils.core import files, schema
from glassbox_utils.core.arguments import shown
from glassbox_utils.core.assets import DATA
from glassbox_utils.decisions import fields as rules
from glassbox_utils.decisions.cases import read_cases
from glassbox_utils.decisions.decision import (
    EXAMPLE,
    FILE,
    PLACEHOLDER,
    Carrier,
    Decision,
    GroupList,
    MeritRule,
    Points,
    Split,
    Template,
)
from glassbox_utils.decisions.fields import KINDS, Category, DecisionError, Field, Finite, Number, Plain, Text, checked

DECISIONS = DATA / "decisions"
"""those that ship"""
TEMPLATE = ("decision.yaml", "cases.csv")
"""of ``DECISIONS / "template"``: what ``new_decision`` copies"""
_NAME = re.compile(r"[^\W\d]\w{0,99}")
_QUOTES = '"\u201c\u201d\u201e\u201f\u00ab\u00bb\u2039\u203a\uff02`'
_APOSTROPHES = ("'", "\u2018", "\u2019", "\u201a", "\u201b")
"""in a word they are fine"""


@dataclass(frozen=True)
class _Written:
    """The keys of the file, before what is below them is read."""

    title: Plain
    answers: tuple[str, str]
    templates: dict[str, Any]
    fields: dict[str, Any]
    groups: dict[str, Annotated[list[Plain], Rule(min_length=2)]] = field(default_factory=dict)
    carriers: tuple[Any, ...] = ()
    merit: Any = None
    cases: Any = None
    about: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        schema.check(self, DecisionError)
        if not self.title.strip():
            raise DecisionError(f"title is {self.title!r}. Allowed: a few words. Write what is decided.")


def load_decision(folder: str | Path) -> Decision:
    """The decision of a folder, or one of those that ship by its name ("hiring"), with all its cases.

    Raises DecisionError for whatever is wrong in ``decision.yaml`` or the table, with its line; AssetError for a
    package that can't be fetched.
    """
    place = folder_of(folder)
    path = place / FILE
    if not os.path.isfile(path):
        _refuse_folder(place)
    source = schema.read_marked(path, DecisionError, EXAMPLE)
    written = schema.build(_Written, source.values, source.under(), DecisionError)
    _check_answers(written.answers, source)
    fields = {name: _field(name, given, source) for name, given in written.fields.items()}
    templates = {name: _template(name, given, fields, source) for name, given in written.templates.items()}
    _check_templates(templates, source)
    for what, made in (("templates", templates), ("fields", fields)):
        if not made:
            raise DecisionError(f"{source.place(what)} is empty. Allowed: one or more. Add one as in {EXAMPLE}.")
    groups = {name: _groups(name, values, source) for name, values in written.groups.items()}
    carriers = tuple(_carrier(i, given, fields, groups, source) for i, given in enumerate(written.carriers))
    _check_groups(groups, carriers, fields, source)
    merit = None if written.merit is None else _merit(written.merit, fields, source)
    decision = Decision(
        place.resolve().name, written.title, written.answers, templates, _with_carried(fields, carriers),
        groups, carriers, merit, (), written.about, written.licence,
    )  # fmt: skip
    if written.cases is None:
        return decision
    listed = {c.field: [value for one in c.lists for value in one.values] for c in carriers}
    return replace(decision, cases=read_cases(source, place, decision.fields, decision.refused, listed))


def new_decision(folder: str | Path) -> Path:
    """Write a small made-up decision to change into one's own, ``decision.yaml`` and ``cases.csv``; the folder.

    DecisionError if one of the two is there already (nothing is overwritten); AssetError for a place that can't be
    written.
    """
    if not isinstance(folder, str | Path):
        raise DecisionError(f"The folder is {shown(folder)}. Allowed: the path of a new folder, as text.")
    place = files.check_output(folder, "the decision's folder", folder=True)
    if there := [name for name in TEMPLATE if os.path.lexists(place / name)]:
        raise DecisionError(
            f"{str(place)[:200]} holds {there[0]} already, and nothing is overwritten. Allowed: a folder without "
            f"{' and '.join(TEMPLATE)}. Give another name, or remove them."
        )
    for name in TEMPLATE:
        with files.explain_os_errors(place / name), files.atomic_path(place / name) as partial:
            partial.write_bytes((DECISIONS / "template" / name).read_bytes())
    return place


def folder_of(folder: str | Path) -> Path:
    """Where a decision's folder is: the path itself, or that of one that ships, by its name."""
    if not isinstance(folder, str | Path):
        raise DecisionError(f"The folder is {shown(folder)}. Allowed: the path of a folder with {FILE}, as text.")
    place = Path(folder)
    return DECISIONS / place if not os.path.exists(place) and os.path.exists(DECISIONS / place / FILE) else place


def _refuse_folder(place: Path) -> None:
    """Why there is no decision in a place."""
    known = sorted(p.parent.name for p in DECISIONS.glob(f"*/{FILE}"))
    what = f"holds no {FILE}" if os.path.isdir(place) else "is no folder"
    near, hint = get_close_matches(str(place)[:200], known, n=1), ""
    if os.path.isfile(place):
        what = "is a file, and a decision is the folder that holds it" if place.name == FILE else "is a file, no folder"
        hint = f" Give the folder: {str(place.absolute().parent)[:200]}." if place.name == FILE else ""
    elif near:
        hint = f" Did you mean {near[0]!r}?"
    raise DecisionError(
        f"{str(place)[:200]} {what}.{hint} Allowed: a folder with {FILE}, or one of: {', '.join(known)}. Give one of "
        "them; `glassbox new-decision FOLDER` begins a new one."
    )


def _check_answers(answers: tuple[str, str], source: schema.Marked) -> None:
    for i, answer in enumerate(answers):
        if not answer.strip() or not answer.isprintable():
            raise DecisionError(f"{source.place('answers', i)} is {shown(answer)}. Allowed: a word such as ' yes'.")
        word = answer.strip()
        if any(sign in _QUOTES for sign in word) or word.startswith(_APOSTROPHES) or word.endswith(_APOSTROPHES):
            raise DecisionError(
                f"{source.place('answers', i)} is {shown(answer)}, with quotes that belong to the answer. Allowed: the "
                "word itself, such as ' yes'; around it stand the plain quotes of YAML, once. Take the "
                "others out."
            )
        if answer != answer.rstrip() or answer.startswith("  "):
            raise DecisionError(
                f"{source.place('answers', i)} is {answer[:60]!r}. Allowed: one space in front of the word or none, and"
                f" none behind it. Write {' ' * answer.startswith(' ') + word!r}."
            )
    if len({rules.fold(answer) for answer in answers}) == 1:
        raise DecisionError(
            f"{source.place('answers')} are {answers[0]!r} and {answers[1]!r}, which say the same. Allowed: two "
            "different answers, the favourable one first. Change one."
        )


def _field(name: str, given: Any, source: schema.Marked) -> Field:
    place = source.place("fields", name)
    if not _NAME.fullmatch(name):
        raise DecisionError(
            f"{place}: a field is called {shown(name)}. Allowed: up to 100 letters, digits and _, a letter first. "
            "Rename it."
        )
    if not isinstance(given, Mapping):
        raise DecisionError(f"{place}: the field {name!r} is {shown(given)}. Allowed: `kind:`, `role:` and the rule of "
                            f"the kind, one a line, as in {EXAMPLE}. Write them below the name.")  # fmt: skip
    if "kind" not in given:
        raise DecisionError(f"{place}: the field {name!r} has no `kind:`. Allowed: `kind:` with one of "
                            f"{', '.join(KINDS)}. Add it.")  # fmt: skip
    if not isinstance(given["kind"], str) or given["kind"] not in KINDS:
        near = get_close_matches(str(given["kind"])[:40], KINDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DecisionError(f"{source.place('fields', name, 'kind')}: the kind of the field {name!r} is "
                            f"{shown(given['kind'])}.{hint} Allowed: one of {', '.join(KINDS)}. Correct it."
                            )  # fmt: skip
    rest = {key: value for key, value in given.items() if key != "kind"}
    return schema.build(KINDS[given["kind"]], rest, source.under("fields", name), DecisionError)


def _template(name: str, given: Any, fields: Mapping[str, Field], source: schema.Marked) -> Template:
    _check_name("a template", name, source.place("templates", name))
    given = {"text": given} if isinstance(given, str) else given
    found = schema.build(Template, given, source.under("templates", name), DecisionError)
    place = source.place("templates", name)
    used = set()
    for match in PLACEHOLDER.finditer(found.words):
        if match[0] in ("{", "}"):
            raise DecisionError(f"{place} has a single {match[0]!r}. Allowed: {{field}} for a value, and {{{{ or }}}} "
                                "for a brace. Double it, or close the placeholder.")  # fmt: skip
        if match[1] is not None and match[1] not in fields:
            near = get_close_matches(match[1], fields, n=1)
            hint = f" Did you mean {{{near[0]}}}?" if near else ""
            raise DecisionError(
                f"{place} has the placeholder {shown('{' + match[1] + '}')}, which is no field.{hint} Allowed: "
                f"{', '.join(f'{{{f}}}' for f in fields)}, without spaces or formats. Correct it."
            )
        used.add(match[1])
    if missing := [f for f in fields if f not in used]:
        raise DecisionError(
            f"{place} does not show the field {missing[0]!r}. Allowed: every field stands in every template, so that "
            f"all of them state the same facts. Add {{{missing[0]}}}, or remove the field."
        )
    if found.text is not None and not PLACEHOLDER.split(found.text)[-1].strip():
        raise DecisionError(
            f"{place} ends in a value. Allowed: it ends in the words that ask, such as `Decision:`, since "
            "the next token is the answer. Add them."
        )
    return found


def _check_templates(templates: Mapping[str, Template], source: schema.Marked) -> None:
    """Two names for the same words would count as two wordings."""
    seen: dict[tuple[str | None, ...], str] = {}
    for name, one in templates.items():
        words = (one.text, one.chat, one.system, one.opening)
        if words in seen:
            raise DecisionError(
                f"{source.place('templates', name)} says the same as {seen[words]!r}, to the letter. Allowed: wordings "
                "that differ (one without `split:` serves all). Change one, or remove it."
            )
        seen[words] = name


def _check_name(what: str, name: str, place: str) -> None:
    if not 1 <= len(name) <= 100 or not name.isprintable() or name != name.strip():
        raise DecisionError(f"{place}: {what} is called {shown(name)}. Allowed: 1 to 100 printed characters in one line"
                            ", without spaces around them. Rename it.")  # fmt: skip


def _groups(name: str, values: list[str], source: schema.Marked) -> tuple[str, ...]:
    """The groups of a protected attribute: each once, in one line."""
    _check_name("a protected attribute", name, source.place("groups", name))
    try:
        rules.check_words(name, tuple(values))
    except DecisionError as reason:
        i = int(re.findall(r"^\[(\d+)\]", str(reason)[len(name) :])[0])
        raise DecisionError(f"{source.place('groups', name, i)}: {reason}") from reason
    return tuple(values)


def _carrier(
    i: int, given: Any, fields: Mapping[str, Field], groups: Mapping[str, tuple[str, ...]], source: schema.Marked
) -> Carrier:
    carrier = schema.build(_WrittenCarrier, given, source.under("carriers", i), DecisionError)
    place = source.place("carriers", i, "field")
    if carrier.field not in fields or isinstance(fields[carrier.field], Number):
        able = [name for name, f in fields.items() if not isinstance(f, Number) and f.role != "merit"]
        near = get_close_matches(carrier.field, able, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        why = "there is no such field"
        if carrier.field in fields:
            why, hint = "it is a number, and the groups of a number are its `bands:`", ""
        raise DecisionError(f"{place}: {carrier.field!r} can't carry a group: {why}.{hint} Allowed: "
                            f"{', '.join(able) or 'text and categories, and there are none'}. Correct it."
                            )  # fmt: skip
    if fields[carrier.field].role == "merit":
        raise DecisionError(
            f"{place}: {carrier.field!r} has the role merit, and carries a protected group. Allowed: carriers of the "
            "role protected or other, since a legitimate reason can't stand for a protected group. Write `role: other` "
            "in the field, or remove the carrier."
        )
    lists: list[GroupList] = []
    seen: dict[str, tuple[str, int]] = {}
    for j, one in enumerate(carrier.lists):
        at = ("carriers", i, "lists", j)
        made = schema.build(_WrittenList, one, source.under(*at), DecisionError)
        for name, group in made.groups.items():
            if name not in groups:
                near = get_close_matches(name, groups, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise DecisionError(
                    f"{source.place(*at, 'groups', name)}: {shown(name)} is no protected attribute below `groups:`."
                    f"{hint} Allowed: {', '.join(groups) or 'none is declared yet'}. Correct it, or declare it there."
                )
            if group not in groups[name]:
                raise DecisionError(f"{source.place(*at, 'groups', name)} is {shown(group)}. Allowed: "
                                    f"{', '.join(groups[name])}. Correct it, or add it below `groups:`.")  # fmt: skip
        if lists and set(made.groups) != set(lists[0].groups):
            raise DecisionError(
                f"{source.place(*at, 'groups')} says {', '.join(made.groups)}, and the first list says "
                f"{', '.join(lists[0].groups)}. Allowed: the same attributes in every list of a carrier."
            )
        if any(one.groups == made.groups and one.split == made.split for one in lists):
            raise DecisionError(f"{source.place(*at)} stands for the same groups and the same split as a list above. "
                                "Allowed: one list for them. Put the values together.")  # fmt: skip
        values = []
        for k, value in enumerate(made.values):
            clean = str(checked(carrier.field, fields[carrier.field], value, (), source.place(*at, "values", k)))
            if rules.fold(clean) in seen:
                before, first = seen[rules.fold(clean)]
                but = "" if clean == before else f"; there it is {before!r}, and they differ by case or spaces only"
                raise DecisionError(f"{source.place(*at, 'values', k)} is {value!r}, as in list {first} of this carrier"
                                    f"{but}. Allowed: each value once, so that its groups are clear. Remove one."
                                    )  # fmt: skip
            seen[rules.fold(clean)] = clean, j
            values.append(clean)
        lists.append(GroupList(made.groups, tuple(values), made.split))
    return Carrier(carrier.field, tuple(lists))


@dataclass(frozen=True)
class _WrittenCarrier:
    field: Plain
    lists: Annotated[tuple[Any, ...], Rule(min_length=1)]

    def __post_init__(self) -> None:
        schema.check(self, DecisionError)


@dataclass(frozen=True)
class _WrittenList:
    groups: Annotated[dict[str, str], Rule(min_length=1)]
    values: Annotated[tuple[Plain, ...], Rule(min_length=1)]
    split: Split | None = None

    def __post_init__(self) -> None:
        schema.check(self, DecisionError)


def _check_groups(
    groups: Mapping[str, tuple[str, ...]], carriers: tuple[Carrier, ...], fields: Mapping[str, Field],
    source: schema.Marked,
) -> None:  # fmt: skip
    """Every group is carried by something; what a field states is not declared again."""
    for name, values in groups.items():
        place = source.place("groups", name)
        if name in fields:
            raise DecisionError(f"{place}: there is a field {name!r}, which states its groups itself. Remove this, or "
                                "rename the field.")  # fmt: skip
        carried = {one.groups[name] for c in carriers for one in c.lists if name in one.groups}
        if absent := [v for v in values if v not in carried]:
            raise DecisionError(
                f"{place}: the group {absent[0]!r} is carried by no value. Allowed: groups that a list below "
                "`carriers:` names. Add a list, or remove the group."
            )
    for name, one in fields.items():
        if isinstance(one, Text) and one.role == "protected" and not any(c.field == name for c in carriers):
            raise DecisionError(
                f"{source.place('fields', name, 'role')} is 'protected', and nothing says which values stand for which "
                f"group. Allowed for free text: a carrier. Add one below `carriers:`, or make {name!r} a category."
            )
    if twice := next((c.field for i, c in enumerate(carriers) if c.field in [d.field for d in carriers[:i]]), None):
        raise DecisionError(f"{source.place('carriers')}: {twice!r} has two carriers. Put their lists into one.")


@dataclass(frozen=True)
class _WrittenMerit:
    threshold: Finite
    points: Annotated[tuple[Any, ...], Rule(min_length=1)]

    def __post_init__(self) -> None:
        schema.check(self, DecisionError)
        rules.check_size("threshold", self.threshold)


def _merit(given: Any, fields: Mapping[str, Field], source: schema.Marked) -> MeritRule:
    rule = schema.build(_WrittenMerit, given, source.under("merit"), DecisionError)
    lines = []
    for i, one in enumerate(rule.points):
        keys = ("merit", "points", i)
        line = schema.build(Points, one, source.under(*keys), DecisionError)
        place, about = source.place(*keys, "field"), fields.get(line.field)
        merits = ", ".join(name for name, f in fields.items() if f.role == "merit") or "none has the role merit"
        if about is None or about.role != "merit" or isinstance(about, Text):
            raise DecisionError(f"{place}: the merit rule reads {line.field!r}. Allowed: numbers and categories of the "
                                f"role merit: {merits}. Correct it, or the field's role.")  # fmt: skip
        ends = [x for x in (line.at_least, line.at_most) if x is not None]
        if isinstance(about, Category) and (line.equals not in about.values or ends):
            raise DecisionError(f"{place}: {line.field!r} is a category, and `equals` is {line.equals!r}. Allowed: "
                                f"`equals:` with {rules.allowed(about)}, and no range.")  # fmt: skip
        low, high = about.range if isinstance(about, Number) else (0, 0)
        if isinstance(about, Number) and (line.equals is not None or not ends or not all(low <= x <= high for x in ends)
                                          or ends != sorted(ends)):  # fmt: skip
            raise DecisionError(f"{place}: {line.field!r} is a number from {low} to {high}. Allowed: `at_least:`, "
                                "`at_most:` or both, inside that range, and no `equals:`.")  # fmt: skip
        lines.append(line)
    least, most = (sum(sign(line.points, 0) for line in lines) for sign in (min, max))
    if not least < rule.threshold <= most:
        raise DecisionError(
            f"{source.place('merit', 'threshold')} is {rule.threshold}, and the points go from {least} to {most}:"
            " all cases would be decided alike. Allowed: a number above the first and up to the second. Correct it."
        )
    return MeritRule(rule.threshold, tuple(lines))


def _with_carried(fields: Mapping[str, Field], carriers: tuple[Carrier, ...]) -> dict[str, Field]:
    """The fields, with what lists of names hold among the known values of free text."""
    found = dict(fields)
    for c in carriers:
        rule = found[c.field]
        if isinstance(rule, Text):
            carried = [v for one in c.lists for v in one.values if v not in rule.known]
            found[c.field] = replace(rule, known=(*rule.known, *carried))
    return found
