"""What a case may hold: numbers, categories and free text, each with a rule and a role; and what is refused, in words.

The rules are written in a ``decision.yaml`` (see ``decision``). Free text is the one place where somebody else's words
reach a prompt, so its characters are an allowed set (no line breaks, braces, colons or marks of a chat), and it may not
say what the decision rests on: the answers, the names of merit fields, or their values ("teacher with clean history").
"""

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal
from math import ceil
from numbers import Integral
from typing import Annotated, Any, Literal

from pydantic import AfterValidator
from pydantic import Field as Rule

from glassbox_utils.core import schema
from glassbox_utils.core.arguments import shown
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.decisions.applicants import is_words

Role = Literal["merit", "protected", "other"]
"""may count, must not count, or neither is said"""
Value = int | float | str
Finite = Annotated[float, AfterValidator(lambda x: int(x) if x.is_integer() else x)]
"""a number as people write it: 18, not 18.0"""
Plain = Annotated[str, Rule(min_length=1, max_length=200)]
LARGEST, FINEST = 10**12, 9
"""of a number: its size, and its digits behind the point"""


class DecisionError(GlassboxError, ValueError):
    """A decision's folder, a case, field, template or answer that is wrong; the message names the place, the value,
    what is allowed and the fix."""


@dataclass(frozen=True)
class Number:
    """A number in a range; ``step`` 1 means whole numbers."""

    role: Role
    range: tuple[Finite, Finite]
    step: Annotated[Finite, Rule(gt=0)] = 1
    unit: str = ""
    bands: tuple[Finite, ...] = ()
    """where the groups of a protected number part: [30, 50] makes three"""

    def __post_init__(self) -> None:
        schema.check(self, DecisionError)
        low, high = self.range
        for name, x in (("range[0]", low), ("range[1]", high), ("step", self.step)):
            check_size(name, x)
        if (high - low) / self.step > LARGEST:
            raise DecisionError(
                f"step is {self.step}, which is too small for a range from {low} to {high}. Allowed: at most "
                f"{LARGEST:,} steps. Take a larger step or a smaller range."
            )
        if low >= high:
            raise DecisionError(f"range is [{low}, {high}]. Allowed: the smaller number first. Turn it round.")
        if not _on_grid(high, low, self.step):
            raise DecisionError(
                f"step is {self.step}, and {high} lies on no step from {low} on. Allowed: a step that leads from one "
                "end of the range to the other. Correct one of them."
            )
        if list(self.bands) != sorted(set(self.bands)) or not all(low < b <= high for b in self.bands):
            raise DecisionError(
                f"bands is {shown(list(self.bands))}. Allowed: rising numbers above {low} and up to {high}, each the "
                "first one of the next group."
            )
        if _is_whole(self) and (odd := [b for b in self.bands if not float(b).is_integer()]):
            raise DecisionError(
                f"bands holds {odd[0]}, and the field holds whole numbers only. Allowed: whole numbers, each the first "
                f"one of the next group. Write {ceil(odd[0])} for it."
            )
        if self.role == "protected" and not self.bands:
            raise DecisionError(
                "bands is missing. Allowed: the numbers at which a protected number passes from one group to the "
                f"next, such as `bands: [{_middle(low, high, self.step)}]`. Add them."
            )
        if self.role != "protected" and self.bands:
            raise DecisionError(f"bands is {list(self.bands)}, but the role is {self.role!r}. Only protected numbers "
                                "have groups: leave bands out, or correct the role.")  # fmt: skip


@dataclass(frozen=True)
class Category:
    """One of a few values, as the prompt writes them."""

    role: Role
    values: Annotated[tuple[Plain, ...], Rule(min_length=2)]

    def __post_init__(self) -> None:
        schema.check(self, DecisionError)
        check_words("values", self.values)


@dataclass(frozen=True)
class Text:
    """Free text of one line."""

    role: Role
    max_length: Annotated[int, Rule(ge=1, le=500)] = 40
    characters: Literal["letters", "sentence"] = "letters"
    """letters: of any script, with spaces, hyphens and apostrophes; sentence: digits and PUNCTUATION too"""
    known: tuple[Plain, ...] = ()
    """values that are certainly fine, to try and to draw from"""
    refuse: tuple[Plain, ...] = ()
    """words that may not stand in it, beside those that decide"""

    def __post_init__(self) -> None:
        schema.check(self, DecisionError)
        check_words("known", self.known)
        for i, value in enumerate(self.known):
            if not fits(self, value):
                raise DecisionError(f"known[{i}] is {shown(value)}. Allowed: {allowed(self)}. Correct it.")


Field = Number | Category | Text
KINDS: dict[str, type[Number] | type[Category] | type[Text]] = {"number": Number, "category": Category, "text": Text}
PUNCTUATION = ".,;'\u2019()/&+%#!?\"-"
"""what a sentence may hold beside letters, digits and spaces: nothing that marks a turn, a key or a placeholder"""


def check_words(name: str, values: tuple[str, ...]) -> None:
    """Values of the decision's owner: each once, in one line."""
    seen: dict[str, str] = {}
    for i, value in enumerate(values):
        if value != value.strip() or not value.isprintable():
            raise DecisionError(
                f"{name}[{i}] is {shown(value)}. Allowed: text of one line without spaces around it. Correct it."
            )
        if (before := seen.get(fold(value))) is not None:
            raise DecisionError(f"{name}[{i}] is {shown(value)}, {repeated(value, before)}. Remove one of them.")
        seen[fold(value)] = value


def allowed(rule: Field) -> str:
    """What a field may hold, in words."""
    if isinstance(rule, Number):
        kind = "a whole number" if _is_whole(rule) else f"a number in steps of {rule.step}"
        return f"{kind} from {rule.range[0]} to {rule.range[1]}{f' ({rule.unit})' if rule.unit else ''}"
    if isinstance(rule, Category):
        more = f" and {len(rule.values) - 12} more" if len(rule.values) > 12 else ""
        return f"one of {', '.join(map(repr, rule.values[:12]))}{more}"
    marks = "spaces, hyphens and apostrophes"
    marks = f"digits, {marks} and {PUNCTUATION}" if rule.characters == "sentence" else marks
    known = next((value for value in rule.known if fits(rule, value)), None)
    example = f", such as {known!r}" if known else ""
    return f"a text of 1 to {rule.max_length} letters, {marks} in one line{example}"


def checked(name: str, rule: Field, value: Any, refused: Collection[str] = (), place: str = "") -> Value:
    """A value as the prompt will show it: whole numbers as such, letters composed (NFC), no spaces around a text.

    ``refused``: words that no free text may hold, unless it is a known value. DecisionError with ``place``, the field,
    the value, what is allowed and the fix.
    """
    start = f"{place}{': t' if place else 'T'}he field {name!r} is {shown(value)}."
    end = f" Allowed: {allowed(rule)}. Correct it."
    if isinstance(rule, Number):
        low, high = rule.range
        number = isinstance(value, Integral | float) and not isinstance(value, bool)
        if not number or not low <= value <= high or not _on_grid(value, low, rule.step):  # NaN is in no range
            raise DecisionError(start + end)
        return int(value) if value == int(value) else float(value)
    if not isinstance(value, str):
        raise DecisionError(start + end)
    if isinstance(rule, Category):
        if value not in rule.values:
            raise DecisionError(start + end)
        return value
    text = unicodedata.normalize("NFC", value).strip(" ")
    if not fits(rule, text):
        raise DecisionError(start + end)
    if text in rule.known:
        return text
    said = next((w for w in (*rule.refuse, *refused) if phrase(w) in phrase(text)), None)
    if said is not None:
        raise DecisionError(
            f"{start} It holds {said!r}, and free text may not say what the decision rests on. Allowed: {allowed(rule)}"
            " without such words. Correct it, or add the whole value to `known` of this field."
        )
    return text


def fits(rule: Text, text: str) -> bool:
    """Has a text the length and the characters of its rule?"""
    if not 1 <= len(text) <= rule.max_length:
        return False
    if rule.characters == "sentence":  # the letters must be words all the same
        text = "".join(" " if s in PUNCTUATION or (s.isascii() and s.isdigit()) else s for s in text)
    return is_words(text)


def fold(text: str) -> str:
    """What stays the same when a text is written in other case, with other spaces or in another form of its letters."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


def looks(text: str) -> tuple[str, str]:
    """What a text looks like: two texts with one of them in common are hard to tell apart by eye."""
    text = " ".join(unicodedata.normalize("NFKC", text).replace("\u2019", "'").split())
    return text.casefold(), text.translate(_LATIN).casefold()


def repeated(value: str, before: str) -> str:
    """How a value repeats an earlier one, in words."""
    if value == before:
        return "which is in the list twice"
    return f"which differs from {shown(before)} by case or spaces only"


def check_size(name: str, x: float) -> None:
    """Numbers as people write them, of which sums and steps are exact."""
    size = Decimal(str(x))
    if abs(size) > LARGEST or size != round(size, FINEST):
        raise DecisionError(
            f"{name} is {shown(x)}. Allowed: numbers from -{LARGEST:,} to {LARGEST:,} with at most {FINEST} digits "
            "behind the point. Write a smaller or rounder one, perhaps in another unit."
        )


def phrase(text: str) -> str:
    """Words alone, between spaces, to look for one text inside another."""
    words = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text)).casefold()
    return f" {' '.join(words.split())} "


def from_cell(name: str, rule: Field, cell: str, refused: Collection[str] = (), place: str = "") -> Value:
    """A value from a cell of a CSV file: numbers as digits with a point. DecisionError as in ``checked``."""
    if not isinstance(rule, Number):
        return checked(name, rule, cell, refused, place)
    if not re.fullmatch(r"-?[0-9]{1,15}(\.[0-9]{1,15})?", cell):
        raise DecisionError(
            f"{place}{': t' if place else 'T'}he field {name!r} is {shown(cell)}, which is no number. Allowed: "
            f"{allowed(rule)}, in digits with a point before decimals, and nothing else in the cell. Correct it, or "
            "leave the row out."
        )
    return checked(name, rule, float(cell) if "." in cell else int(cell), refused, place)


def band_of(rule: Number, value: float) -> str:
    """The group of a protected number: ``30 to 49``."""
    edges = [rule.range[0], *rule.bands]
    i = max(i for i, edge in enumerate(edges) if edge <= value)
    return _band(rule, i)


def bands(rule: Number) -> tuple[str, ...]:
    """All groups of a protected number, in order."""
    return tuple(_band(rule, i) for i in range(len(rule.bands) + 1))


def _band(rule: Number, i: int) -> str:
    edges = [rule.range[0], *rule.bands]
    if i + 1 == len(edges):
        return f"{edges[i]} to {rule.range[1]}"
    return f"{edges[i]} to {edges[i + 1] - 1}" if _is_whole(rule) else f"{edges[i]} to below {edges[i + 1]}"


_LATIN = str.maketrans(
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425\u0406\u0408\u0405"
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455",
    "ABEKMHOPCTYXIJSaeopcyxijs",
)
"""Cyrillic letters that look like Latin ones"""


def _is_whole(rule: Number) -> bool:
    return all(float(x).is_integer() for x in (*rule.range, rule.step))


def _on_grid(value: Any, low: float, step: float) -> bool:
    """Is it a whole number of steps from the range's low end? In decimals: 0.3 is three steps of 0.1."""
    return (Decimal(str(value)) - Decimal(str(low))) % Decimal(str(step)) == 0


def _middle(low: float, high: float, step: float) -> float:
    return low + max(1, round((high - low) / step / 2)) * step
