"""Tables as notebooks show them: rows with words for columns, and how an interval is written."""

from collections.abc import Mapping, Sequence
from typing import Any

from glassbox_utils.core.statistics import Interval


def shown(x: Interval, form: str = ".2f") -> str:
    """``0.31 [0.22, 0.40]``."""
    return f"{x.value:{form}} [{x.low:{form}}, {x.high:{form}}]"


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The rows as a pandas table without its running numbers."""
    import pandas as pd

    pd.set_option("display.max_colwidth", None)
    table = pd.DataFrame(rows)
    return table.set_index(table.columns[0]) if rows else table
