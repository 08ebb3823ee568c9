"""What was measured about one case, as tables: reasons, nearest changes, the same case in other groups."""

from collections.abc import Mapping, Sequence
from typing import Any

from glassbox_utils.core.statistics import Interval
from glassbox_utils.core.tables import frame
from glassbox_utils.decisions.answer import Answer, plain, printed
from glassbox_utils.decisions.letter import with_unit


def said(x: Interval | None, digits: int = 2) -> str:
    """``+0.31 [+0.22, +0.40]``; a dash where nothing was measured."""
    if x is None:
        return "–"
    return f"{x.value + 0.0:+.{digits}f} [{x.low + 0.0:+.{digits}f}, {x.high + 0.0:+.{digits}f}]"


def reasons(found: Answer) -> Any:
    """The principal reasons in their order: what is typical of the other answer, and what mending the field does."""
    rows = [
        {
            "reason": plain(test.field),
            "of this case": with_unit(found, test.field, test.value),
            f"typical of {found.opposite}": with_unit(found, test.field, test.typical),
            f"mended: logits towards {found.opposite}": f"{test.towards:+.1f}",
            "in wordings": f"{test.agree} of {len(test.effects)}",
        }
        for test in found.reasons
    ]
    return _table(rows, "no reason holds in every wording")


def swaps(found: Answer) -> Any:
    """The same case as a member of every other protected group; never a reason."""
    rows = [
        {
            "the same case as": f"{plain(swap.attribute)}: {printed(swap.group)}",
            "logits": said(swap.effect),
            "beyond noise": "yes" if swap.beyond_noise else "no",
            "the answer": "turns" if swap.turns_this else "stays",
        }
        for swap in found.swaps
    ]
    return _table(rows, "no protected group to put this case in")


def changes(found: Answer) -> Any:
    """The nearest changes of fields that may count which turn the answer, smallest first."""
    rows = [
        {
            "changed": " and ".join(
                f"{plain(name)}: {with_unit(found, name, found.values[name])} → {with_unit(found, name, value)}"
                for name, value in one.changes.items()
            ),
            "score then": f"{one.score:+.2f}",
            "turns in wordings": f"{one.turned} of {one.templates}",
        }
        for one in (found.search.nearest if found.search else ())
    ]
    return _table(rows, "no change that was tried turns the answer")


def rivals(summary: Mapping[str, Any]) -> Any:
    """Of the study ``explain-fidelity``: how often what each rule names turns the decision when it is mended, and by
    how much the measured reasons turn more."""
    import pandas as pd

    rows = []
    for m in summary["methods"]:
        more = said(Interval(**m["better"])) if m["better"] else ""
        rows.append({"two fields named by": m["name"], "mended, turn": said(Interval(**m["flips"])),
                     "cause turns more by": more})  # fmt: skip
    return pd.DataFrame(rows)


def _table(rows: Sequence[Mapping[str, Any]], none: str) -> Any:
    if rows:
        return frame(rows)
    import pandas as pd

    return pd.DataFrame({"": [none]}, index=[""])
