"""What a caller of a function gives: whole numbers, numbers and texts, or an error of the room that says what they are.

What people write into files is checked by ``schema``; this is for arguments, which have no annotations at run time.
"""

import math
import reprlib
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from glassbox_utils.core.errors import GlassboxError

LARGEST = 2**63 - 1


def whole(name: str, value: Any, least: int, error: type[GlassboxError], most: int = LARGEST) -> int:
    """A whole number from ``least`` to ``most``, for sizes and seeds. True is none, and neither is 3.0."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        end = f" to {most}" if most < LARGEST else " on (below 2^63)"
        raise error(f"{name} is {shown(value)}. Allowed: a whole number from {least}{end}.")
    return int(value)


def number(
    name: str, value: Any, error: type[GlassboxError], above: float = -math.inf, least: float = -math.inf
) -> float:
    """A finite number, larger than ``above`` and at least ``least``."""
    fine = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not fine or not least <= float(value) > above:
        end = f" above {above:g}" if above > -math.inf else f" from {least:g} on" if least > -math.inf else ""
        raise error(f"{name} is {shown(value)}. Allowed: a finite number{end}.")
    return float(value)


def items(
    name: str, value: Any, error: type[GlassboxError], kind: Any = str, least: int = 1, word: str = "texts"
) -> list[Any]:
    """A list of things of one ``kind`` (``word`` says which), at least ``least`` of them. One text is no list."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise error(f"{name} is {shown(value)}. Allowed: a list of {word}.")
    found = list(value)
    if wrong := [i for i, one in enumerate(found) if not isinstance(one, kind)]:
        raise error(f"{name}[{wrong[0]}] is {shown(found[wrong[0]])}. Allowed: a list of {word}.")
    if len(found) < least:
        raise error(f"{name} holds {len(found)} {word}. Allowed: a list of at least {least}.")
    return found


def some_texts(name: str, value: Any, error: type[GlassboxError]) -> list[str]:
    """A list of at least one text, none of them empty."""
    found = items(name, value, error)
    if empty := [i for i, text in enumerate(found) if not text]:
        raise error(f"{name}[{empty[0]}] is empty. Allowed: texts of at least one character.")
    return found


_words = reprlib.Repr()
_words.maxlevel, _words.maxdict, _words.maxstring, _words.maxother = 3, 3, 70, 70


def shown(value: Any) -> str:
    """A value in a message, in some words however large or deep it is."""
    try:
        text = " ".join(_words.repr(value).split())
    except (ValueError, RecursionError):  # a number of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
