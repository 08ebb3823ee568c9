"""The letter to the person who asked: the principal reasons in plain words, and nothing about protected groups.

It names fields that may count and nothing else: no name, no age, no group, no free text. What stands against sending it
(a protected group or a free text turned the decision, or no reason holds) is for whoever decides to see first: the
letter is then held, and the audit file says why.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from glassbox_utils.decisions.answer import Answer, plain, printed
from glassbox_utils.decisions.counterfactual import Change
from glassbox_utils.decisions.fields import Value


@dataclass(frozen=True)
class Letter:
    """Its parts in order, and why it should not be sent yet."""

    reference: str
    opening: str
    reasons: tuple[str, ...]
    change: str
    closing: tuple[str, ...]
    held: tuple[str, ...]
    """for the sender alone; empty if nothing stands against sending it"""

    @property
    def text(self) -> str:
        """The letter as plain text."""
        listed = [f"  {i}. {words}" for i, words in enumerate(self.reasons, 1)]
        parts = [f"Reference: {self.reference}", self.opening, "\n".join(listed), self.change, *self.closing]
        return "\n\n".join(part for part in parts if part) + "\n"


def letter(found: Answer) -> Letter:
    """The letter for one answer."""
    title, answer = printed(found.title), printed(found.answer)
    opening = f"Your case ({title}) was decided by an automated system. The answer is: {answer}."
    if found.reasons and not found.favourable:
        many = len(found.reasons) > 1
        opening += f" The principal reason{'s' if many else ''} for it {'are, the weightiest first' if many else 'is'}:"
    elif found.reasons:
        opening += " What counted most for it:"
    elif not found.favourable:
        opening += (
            " No specific reason could be established that holds however your case is worded. You may ask that a "
            "person decides it anew."
        )
    nearest = usable(found)
    change = ""
    if nearest is not None and not found.favourable:
        parts = " and ".join(
            f"{plain(name)} had been {with_unit(found, name, value)} instead of "
            f"{with_unit(found, name, found.values[name])}"
            for name, value in nearest.changes.items()
        )
        change = (
            f"With everything else as it is, the answer would have been “{printed(found.opposite)}” if {parts}. This "
            "is one possible change, not advice, and no promise about a later decision."
        )
    closing = (
        "You may ask for the information that was used, correct it, and ask that a person looks at the decision.",
        "This letter was made by a teaching example. It is not a legal notice.",
    )
    return Letter(
        printed(found.case), opening, tuple(_reason(found, i) for i in range(len(found.reasons))), change, closing,
        tuple(held(found)),
    )  # fmt: skip


def _reason(found: Answer, i: int) -> str:
    test = found.reasons[i]
    return (
        f"{plain(test.field).capitalize()}: {with_unit(found, test.field, test.value)}. Among cases with the answer "
        f"“{printed(found.opposite)}”, {with_unit(found, test.field, test.typical)} is typical."
    )


def usable(found: Answer) -> Change | None:
    """The nearest change that turns the decision in most wordings; None if there is none."""
    for change in found.search.nearest if found.search is not None else ():
        if 2 * change.turned > change.templates:
            return change
    return None


def held(found: Answer) -> list[str]:
    """Why a person should look before the letter is sent."""
    out = [
        f"As a member of another group ({plain(s.attribute)}: {printed(s.group)}) the same case would get the other "
        "answer."
        for s in found.turned_by_group
    ]
    out += [
        f"With usual words for the free text {texts(t.fields)} the case would get the other answer"
        + ("." if t.beyond_noise else ": so near to the line that less than noise turns it.")
        for t in found.turned_by_text
    ]
    if found.alike < len(found.scores):
        out.append(f"In {len(found.scores) - found.alike} of {len(found.scores)} wordings the same facts get the other "
                   "answer.")  # fmt: skip
    if not found.reasons and not found.favourable:
        out.append("No permissible reason moves this decision in every wording, by more than other words do.")
    if found.together is not None and 2 * found.together.turned <= len(found.together.scores):
        out.append(
            "Mending all named reasons together does not turn the decision in most wordings: they may not be all."
        )
    return out


def texts(names: Sequence[str]) -> str:
    """Names of fields in words."""
    return " and ".join(plain(name) for name in names)


def with_unit(found: Answer, name: str, value: Value) -> str:
    """A value as people say it."""
    words = printed(value) if isinstance(value, str) else str(value)
    if name not in found.units:
        return words
    first, *rest = printed(found.units[name]).split(" ")
    return " ".join([words, first.removesuffix("s") if value == 1 else first, *rest])
