"""Cases of a decision from a table: a CSV file in its folder, or a member of a pinned package.

Every cell is checked against the rule of its field; the first wrong one ends the reading, with file, line and column.
Nothing is skipped, filled in or converted: a row is a case as it stands, or there are no cases.
"""

import csv
import io
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field as Rule

from glassbox_utils.core import assets, schema
from glassbox_utils.core.arguments import shown
from glassbox_utils.decisions.fields import DecisionError, Field, Plain, Value, checked, from_cell

LARGEST = 50_000_000
"""bytes of a table"""


@dataclass(frozen=True)
class Case:
    """One case: a value for each field, and what really happened, where that is known."""

    id: str
    values: Mapping[str, Value]
    outcome: bool | None = None
    """True: the favourable answer would have been right"""

    def __getitem__(self, name: str) -> Value:
        return self.values[name]


@dataclass(frozen=True)
class Column:
    """A column that holds a field, and what its cells mean where they are not the words of the prompt."""

    column: Plain
    values: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        schema.check(self, DecisionError)


@dataclass(frozen=True)
class Outcome:
    """The column that says what really happened: cells for which the favourable answer was right, and the others."""

    column: Plain
    favourable: Annotated[tuple[Plain, ...], Rule(min_length=1)]
    unfavourable: Annotated[tuple[Plain, ...], Rule(min_length=1)]

    def __post_init__(self) -> None:
        schema.check(self, DecisionError)
        if both := set(self.favourable) & set(self.unfavourable):
            raise DecisionError(
                f"favourable is {list(self.favourable)}, but {min(both)!r} is in `unfavourable` too. Allowed: each "
                "cell in one of them. Remove it from the other."
            )


@dataclass(frozen=True)
class Table:
    """Where the cases are, as ``decision.yaml`` says it under ``cases``."""

    file: Plain | None = None
    package: Plain | None = None
    member: Plain | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    """field -> Column; a field that is not named here is read from the column of its own name"""
    id: Plain | None = None
    """a column with a name for each case; without: the rows are numbered from 1"""
    outcome: Any = None
    unused: tuple[Plain, ...] = ()
    """columns that are left out on purpose"""
    delimiter: Literal[",", ";", "\t"] = ","

    def __post_init__(self) -> None:
        schema.check(self, DecisionError)
        if (self.file is None) == (self.package is None) or (self.package is None) != (self.member is None):
            raise DecisionError(
                "file, package and member are not as they should be. Allowed: `file:` alone (a CSV file in the folder),"
                " or `package:` with `member:` (a file of a pinned package). Correct them."
            )
        if self.file is not None and (Path(self.file).name != self.file or self.file.startswith(".")):
            raise DecisionError(f"file is {self.file!r}. Allowed: the name of a file that lies in the folder itself.")


def read_cases(
    source: schema.Marked, folder: Path, fields: Mapping[str, Field], refused: Collection[str] = ()
) -> tuple[Case, ...]:
    """The cases that a ``decision.yaml`` names; DecisionError, AssetError for a package that can't be fetched.

    ``refused``: what no free text may hold (``fields.checked``).
    """
    table = schema.build(Table, source.values["cases"], source.under("cases"), DecisionError)
    columns, outcome = _columns(table, source, fields), None
    if table.outcome is not None:
        outcome = schema.build(Outcome, table.outcome, source.under("cases", "outcome"), DecisionError)
    wanted = [c.column for c in columns.values()] + ([table.id] if table.id else [])
    wanted += [outcome.column] if outcome else []
    if twice := next((name for name in wanted if wanted.count(name) > 1), None):
        raise DecisionError(
            f"{source.place('cases')}: the column {twice!r} is read twice. Allowed: each column once, as a field, as "
            "the id or as the outcome (a field that is the outcome would give the answer away). Correct the columns."
        )
    where, raw = _bytes(table, folder, source)
    rows = _rows(where, raw, table.delimiter)
    header_line, header = next(rows, (1, []))
    _check_header(f"{where}, line {header_line}", header, wanted, table)
    found: dict[str, Case] = {}
    lines: dict[str, int] = {}
    for number, (line, cells) in enumerate(rows, 1):
        place = f"{where}, line {line}"
        if len(cells) != len(header):
            what = "is empty" if not cells else f"has {len(cells)} cells"
            raise DecisionError(
                f"{place} {what}, and the table has {len(header)} columns ({', '.join(header)[:120]}). Allowed: as many"
                f" cells as columns, in quotes where a cell holds {table.delimiter!r}. Correct the row, or remove it."
            )
        row = dict(zip(header, cells, strict=True))
        name = row[table.id] if table.id else str(number)
        if not 1 <= len(name) <= 60 or not name.isprintable():
            raise DecisionError(f"{place}, column {table.id!r} is {shown(name)}. Allowed: 1 to 60 printed characters.")
        if name in found:
            raise DecisionError(
                f"{place}, column {table.id!r} is {name!r}, as in line {lines[name]}. Allowed: a name of its own for "
                "each case. Correct one of them."
            )
        values = {key: _value(key, rule, columns[key], row, refused, place) for key, rule in fields.items()}
        found[name], lines[name] = Case(name, values, _outcome(outcome, row, place)), line
    if not found:
        raise DecisionError(f"{where} holds no cases. Allowed: one row or more below the names of the columns.")
    return tuple(found.values())


def _columns(table: Table, source: schema.Marked, fields: Mapping[str, Field]) -> dict[str, Column]:
    """field -> its column; the words that cells stand for are checked by the field's rule."""
    if unknown := [name for name in table.columns if name not in fields]:
        near = get_close_matches(unknown[0], fields, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DecisionError(
            f"{source.place('cases', 'columns', unknown[0])}: there is no field {unknown[0]!r}.{hint} Allowed: "
            f"{', '.join(fields)}. Correct the name (the field stands left, the column right)."
        )
    found = {}
    for name, rule in fields.items():
        given = table.columns.get(name, name)
        given = {"column": given} if isinstance(given, str) else given
        keys = ("cases", "columns", name)
        found[name] = schema.build(Column, given, source.under(*keys), DecisionError)
        for cell, word in found[name].values.items():
            checked(name, rule, word, (), source.place(*keys, "values", cell))
    return found


def _bytes(table: Table, folder: Path, source: schema.Marked) -> tuple[str, bytes]:
    """What the table is called in messages, and its bytes."""
    if table.file is None:
        assert table.package is not None and table.member is not None  # of Table's own check
        try:
            pinned = assets.package(table.package)
        except assets.AssetError as reason:
            raise DecisionError(f"{source.place('cases', 'package')}: {reason}") from reason
        return f"{pinned.name}=={pinned.version}: {table.member}", assets.read(table.package, table.member)
    path = folder / table.file
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST + 1)
    except OSError as reason:
        raise DecisionError(
            f"{source.place('cases', 'file')}: {path} can't be read ({reason.strerror or reason}). Allowed: the name "
            "of a CSV file in the folder. Put it there, or correct the name."
        ) from reason
    if len(raw) > LARGEST:
        raise DecisionError(f"{path} has more than {LARGEST:,} bytes. Allowed: at most that. Leave rows out.")
    return str(path), raw


def _rows(where: str, raw: bytes, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row. A byte-order mark in front is no part of the table, and empty lines at its end."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        line = raw[: reason.start].count(b"\n") + 1
        raise DecisionError(
            f"{where}, line {line} is not text in UTF-8 (byte {reason.start} of the file). Save the table as UTF-8: "
            "spreadsheets call it `CSV UTF-8`."
        ) from reason
    if "\0" in text:
        raise DecisionError(f"{where}, line {text[: text.index(chr(0))].count(chr(10)) + 1} holds a byte 0, which is "
                            "no text. Save the table as CSV in UTF-8.")  # fmt: skip
    if not text.strip():
        raise DecisionError(
            f"{where} is empty. Allowed: a line with the names of the columns, and a row for each case."
        )
    reader, begins = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""), delimiter=delimiter, strict=True), 1
    try:
        for cells in reader:
            yield begins, cells
            begins = reader.line_num + 1
    except csv.Error as reason:
        raise DecisionError(
            f"{where}, line {begins} can't be read as CSV ({reason}). Allowed: cells between {delimiter!r}, in double "
            "quotes where they hold one; a quote inside is written twice. Correct the row."
        ) from reason


def _check_header(place: str, header: list[str], wanted: list[str], table: Table) -> None:
    if len(header) == 1 and (other := next((d for d in (";", "\t", ",") if d in header[0]), None)):
        raise DecisionError(
            f"{place} has one column, {shown(header[0])}: its cells are separated by {other!r}, not by "
            f"{table.delimiter!r}. Write `delimiter: {other!r}` below `cases:`, or save the table with commas."
        )
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise DecisionError(f"{place} names the column {shown(twice)} twice. Allowed: each column once. Rename one.")
    if missing := [name for name in wanted if name not in header]:
        near = get_close_matches(missing[0], header, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise DecisionError(
            f"{place}: the column {missing[0]!r} is missing.{hint} There are: {shown(', '.join(header))}. Add it, or "
            "say below `cases: columns:` which column holds the field."
        )
    if absent := [name for name in table.unused if name not in header]:
        raise DecisionError(f"{place} has no column {absent[0]!r}, which `unused` names. Take it out of the list.")
    if more := [name for name in header if name not in wanted and name not in table.unused]:
        raise DecisionError(
            f"{place}: the column {shown(more[0])} belongs to no field. Allowed: {', '.join(wanted)}. Remove it, or "
            f"name it below `cases:` as `unused: [{more[0][:40]}]`."
        )
    if both := [name for name in table.unused if name in wanted]:
        raise DecisionError(f"{place}: the column {both[0]!r} is used, and `unused` names it. Take it out of the list.")


def _value(
    name: str, rule: Field, column: Column, row: Mapping[str, str], refused: Collection[str], place: str
) -> Value:
    cell, place = row[column.column], f"{place}, column {column.column!r}"
    if not column.values:
        return from_cell(name, rule, cell, refused, place)
    if cell not in column.values:
        raise DecisionError(
            f"{place} is {shown(cell)}. Allowed: {', '.join(map(repr, list(column.values)[:12]))}, to which "
            f"`cases: columns: {name}: values:` gives words. Add it there, or correct the cell."
        )
    return checked(name, rule, column.values[cell], refused, place)


def _outcome(outcome: Outcome | None, row: Mapping[str, str], place: str) -> bool | None:
    if outcome is None:
        return None
    cell = row[outcome.column]
    if cell not in outcome.favourable + outcome.unfavourable:
        raise DecisionError(
            f"{place}, column {outcome.column!r} is {shown(cell)}, which is no outcome. Allowed: "
            f"{', '.join(map(repr, outcome.favourable + outcome.unfavourable))}. Correct it, or leave the row out."
        )
    return cell in outcome.favourable


def parse_values(
    given: Any, fields: Mapping[str, Field], refused: Collection[str] = (), where: str = "The case"
) -> dict[str, Value]:
    """A value for every field from a mapping of somebody outside; DecisionError names what is wrong, and the fix."""
    if not isinstance(given, Mapping):
        raise DecisionError(f"{where} is {shown(given)}. Allowed: a value for each of {', '.join(fields)}.")
    for name in given:
        if name not in fields:
            near = get_close_matches(str(name), fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DecisionError(
                f"{where} has a field {shown(name)}.{hint} Allowed: {', '.join(fields)}. Rename or remove it."
            )
    if missing := [name for name in fields if name not in given]:
        raise DecisionError(f"{where} lacks the field {missing[0]!r}. Needed are {', '.join(fields)}. Add it.")
    return {name: checked(name, rule, given[name], refused, where) for name, rule in fields.items()}
