"""Corpora by name and share: ``50 % mix + 50 % own:long`` is half the one, half the other, by characters."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

_Text = TypeVar("_Text")
_PART = re.compile(r"\s*(\d{1,3}(?:\.\d+)?)\s*%\s*(\S+)\s*")


@dataclass(frozen=True)
class Part:
    """A corpus and its share of the characters, between 0 and 1."""

    name: str
    share: float


def parts_of(name: Any) -> list[Part]:
    """The parts of a blend; of any other name itself with the share 1. Shares that do not add up to 100 % give []."""
    if not isinstance(name, str) or "%" not in name:
        return [Part(name, 1.0)]
    found = [_PART.fullmatch(piece) for piece in name.split(" + ")]
    parts = [Part(match[2], float(match[1]) / 100) for match in found if match]
    good = len(parts) == len(found) == len({p.name for p in parts}) and all(p.share > 0 for p in parts)
    return parts if good and abs(sum(p.share for p in parts) - 1) < 1e-6 else []


def real_part(name: str) -> str:
    """The first part of a blend that no model wrote, which is what an SAE is evaluated on; the first if all are."""
    names = [part.name for part in parts_of(name)] or [name]
    return next((n for n in names if not n.startswith("own:")), names[0])


def has(name: str, part: str) -> bool:
    """Is this corpus that one, or a blend with a part of it?"""
    return part in [p.name for p in parts_of(name)]


def blended(parts: Sequence[tuple[Sequence[_Text], float]]) -> list[_Text]:
    """Documents (with a ``text``) of several corpora in their own orders, so that any beginning has about the shares.

    It ends where the first of them does: what is left of the others would be a part without its share.
    """
    taken, used, out = [0] * len(parts), [0.0] * len(parts), list[_Text]()
    while True:
        turn = min(range(len(parts)), key=lambda i: used[i] / parts[i][1])
        documents, _ = parts[turn]
        if taken[turn] == len(documents):
            return out
        document: Any = documents[taken[turn]]
        out.append(document)
        taken[turn] += 1
        used[turn] += len(document.text)
