"""Tables as notebooks show them."""

from glassbox_utils.core import tables


def test_a_folded_table_shows_a_part_and_holds_the_whole():
    import pandas as pd

    table = pd.DataFrame({"a": [1, 2], "b": [3, 4], "c": [5, 6]}, index=["x", "y"])
    few, narrow = tables.folded(table, rows=[True, False]), tables.folded(table, columns=1)
    assert repr(few) == repr(narrow) == repr(table)
    for one, line in ((few, "All 2 rows"), (narrow, "All 3 columns")):
        shown, _, rest = one._repr_html_().partition(f"<details><summary>{line}</summary>")
        assert rest == table.to_html() + "</details>" and shown == one.open.to_html() != table.to_html()
