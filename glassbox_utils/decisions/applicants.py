"""One application from outside: which fields it has, what each may hold, and what is refused, in words."""

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from glassbox_utils.core.arguments import shown, whole
from glassbox_utils.core.errors import GlassboxError

HISTORIES = ("clean", "late")


class LoanError(GlassboxError, ValueError):
    """An application, attribute, layout or bias that does not exist; the message names the field and what does."""


@dataclass(frozen=True)
class Applicant:
    """One application. Money is in thousands; ``debt`` is in percent of the yearly income."""

    name: str
    age: int
    occupation: str
    income: int
    credit_score: int
    debt: int
    history: str
    district: str
    purpose: str
    amount: int


RANGES = {"age": (18, 99), "income": (1, 999), "credit_score": (300, 850), "debt": (0, 200), "amount": (1, 500)}
"""allowed whole numbers; the model was trained on narrower ones (``loans.TRAINED``)"""
_EXAMPLES = {"name": "Emma", "occupation": "teacher", "district": "East Mill", "purpose": "car"}


LARGEST = 100_000
"""bytes of an application's file"""


def parse_applicant(source: Mapping[str, Any] | str | Path) -> Applicant:
    """An applicant from a mapping or a JSON file; LoanError names the field, what is allowed, and the fix.

    Names may be written in any script and with either apostrophe; letters that were stored decomposed (NFD) are
    composed. A text that could pass for more than its field (a line break, ``key: value``, a special token, the words
    of a decision) is refused, and so is a field that stands in the file twice.
    """
    values: Any = source
    if not isinstance(source, Mapping):
        values = _read(source)
    if not isinstance(values, Mapping):
        raise LoanError(
            f"An application is one JSON object, not a {type(values).__name__}. Its fields: {_field_list()}."
        )
    known = [f.name for f in fields(Applicant)]
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise LoanError(
                f"There is no field {shown(key)}.{hint} Allowed fields: {', '.join(known)}. Rename or remove it."
            )
    for key in known:
        if key not in values:
            raise LoanError(f"The field {key!r} is missing. Add it: {_allowed(key)}.")
    return Applicant(**{key: _checked(key, values[key]) for key in known})


def _read(source: Any) -> Any:
    """What a JSON file holds; a byte-order mark in front is no part of it."""
    if not isinstance(source, str | Path):
        raise LoanError(f"{shown(source)} is no application. Give a mapping, or the path of a JSON file.")
    path = Path(source)
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as error:
        raise LoanError(
            f"The file {str(path)[:300]} can't be read ({error.strerror}). Give the path of a JSON file."
        ) from error
    except ValueError as error:
        raise LoanError(f"{str(path)[:300]!r} is no path ({error}). Give the path of a JSON file.") from error
    fix = f"Write one object with the fields {_field_list()}."
    if len(raw) > LARGEST:
        raise LoanError(f"{path} is larger than {LARGEST:,} bytes, which no application is. {fix}")
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_once)
    except ValueError as error:
        raise LoanError(f"{path} is not JSON ({' '.join(str(error).split())[:200]}). {fix}") from error
    except RecursionError as error:
        raise LoanError(f"{path} is nested too deeply for an application. {fix}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which every name stands once: of two values nobody knows which was meant."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        first, second = [value for name, value in pairs if name == twice][:2]
        raise LoanError(
            f"The field {shown(twice)} is given twice ({shown(first)} and {shown(second)}). Allowed: once. Remove "
            "the wrong one."
        )
    return dict(pairs)


APOSTROPHES = "'\u2019"
DECIDING = ("decision", "approved", "rejected")
"""words that end an application, and answer it"""


def _checked(key: str, value: Any) -> Any:
    if key in RANGES:
        low, high = RANGES[key]
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise LoanError(f"The field {key!r} is {shown(value)}. Allowed: {_allowed(key)}. Correct it.")
        return value
    if not isinstance(value, str) or (key == "history" and value not in HISTORIES):
        raise LoanError(f"The field {key!r} is {shown(value)}. Allowed: {_allowed(key)}. Correct it.")
    text = unicodedata.normalize("NFC", value).strip(" ")
    if not 1 <= len(text) <= 40 or not is_words(text):
        raise LoanError(f"The field {key!r} is {shown(value)}. Allowed: {_allowed(key)}. Correct it.")
    if said := next((w for w in text.casefold().replace("-", " ").split() if w in DECIDING), None):
        raise LoanError(
            f"The field {key!r} is {shown(value)}. Allowed: {_allowed(key)}, without the words that decide "
            f"({', '.join(DECIDING)}): {said!r} is one. Correct it."
        )
    return text


def is_words(text: str) -> bool:
    """Letters of any script with the marks that belong to them, joined by spaces, hyphens and apostrophes."""
    before = ""
    for sign in text:
        kind = unicodedata.category(sign)
        mark = kind in ("Mn", "Mc") and before[:1] in ("L", "M") and not 0xFE00 <= ord(sign) <= 0xFE0F
        if not (sign.isalpha() or mark or sign in " -" or sign in APOSTROPHES):
            return False
        before = kind
    return any(sign.isalpha() for sign in text)


def _allowed(key: str) -> str:
    if key in RANGES:
        unit = {"income": " (thousands a year)", "amount": " (thousands)", "debt": " (percent of the income)"}
        return f"a whole number from {RANGES[key][0]} to {RANGES[key][1]}{unit.get(key, '')}, without quotes"
    if key == "history":
        return f"one of {', '.join(map(repr, HISTORIES))}"
    return f"a text of 1 to 40 letters, spaces, hyphens and apostrophes, such as {_EXAMPLES[key]!r}"


def _field_list() -> str:
    return ", ".join(f.name for f in fields(Applicant))


def check_count(name: str, value: Any, least: int) -> int:
    """A whole number from ``least`` on. LoanError for another."""
    return whole(name, value, least, LoanError)
