"""Tables as notebooks show them: rows with words for columns, and how an interval is written."""

from collections.abc import Mapping, Sequence
from typing import Any

from glassbox_utils.core.statistics import Interval


def shown(x: Interval, form: str = ".2f") -> str:
    """``0.31 [0.22, 0.40]``."""
    return f"{x.value:{form}} [{x.low:{form}}, {x.high:{form}}]"


class Folded:
    """A large table: the part that is ``open`` is shown, the whole on a click; as plain text the whole."""

    def __init__(self, whole: Any, part: Any, what: str) -> None:
        self.whole, self.open, self.what = whole, part, what

    def __repr__(self) -> str:
        return repr(self.whole)

    def _repr_html_(self) -> str:
        return f"{self.open.to_html()}<details><summary>{self.what}</summary>{self.whole.to_html()}</details>"


def folded(table: Any, rows: Any = None, columns: int | None = None) -> Folded:
    """The table with some rows (a mask) or its first columns open."""
    if rows is not None:
        return Folded(table, table[rows], f"All {len(table)} rows")
    return Folded(table, table.iloc[:, :columns], f"All {table.shape[1]} columns")


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The rows as a pandas table without its running numbers."""
    import pandas as pd

    pd.set_option("display.max_colwidth", None)
    table = pd.DataFrame(rows)
    return table.set_index(table.columns[0]) if rows else table
