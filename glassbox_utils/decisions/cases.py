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
from glassbox_utils.decisions.fields import DecisionError, Field, Plain, Value, checked, from_cell, looks

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
            raise DecisionError(f"file is {self.file!r}. Allowed: the name of a file that lies in the folder itself. "
                                "Put the table there, and write its name alone.")  # fmt: skip


def read_cases(
    source: schema.Marked, folder: Path, fields: Mapping[str, Field], refused: Collection[str] = (),
    listed: Mapping[str, Collection[str]] | None = None,
) -> tuple[Case, ...]:  # fmt: skip
    """The cases that a ``decision.yaml`` names; DecisionError, AssetError for a package that can't be fetched.

    ``refused``: what no free text may hold (``fields.checked``); ``listed``: the values of a field that carry a group.
    Others carry none, and are taken, unless they look like a listed one or no case has a listed one.
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
    carried = {name: frozenset(values) for name, values in (listed or {}).items()}
    near = {name: {look: v for v in sorted(values) for look in looks(v)} for name, values in carried.items()}
    found: dict[str, Case] = {}
    lines: dict[str, int] = {}
    for number, (line, cells) in enumerate(rows, 1):
        place = f"{where}, line {line}"
        if len(cells) != len(header):
            what = "is empty" if not cells else f"has {len(cells)} cells"
            if cells[len(header) :] and not any(cell.strip() for cell in cells[len(header) :]):
                raise DecisionError(f"{place} {what}, and the table has {len(header)} columns. The last ones are empty."
                                    f" Remove the trailing {table.delimiter!r} from the line.")  # fmt: skip
            raise DecisionError(
                f"{place} {what}, and the table has {len(header)} columns ({', '.join(header)[:120]}). Allowed: as many"
                f" cells as columns, in quotes where a cell holds {table.delimiter!r}. Correct the row, or remove it."
            )
        row = dict(zip(header, cells, strict=True))
        name = row[table.id] if table.id else str(number)
        if not 1 <= len(name) <= 60 or not name.isprintable() or name != name.strip():
            raise DecisionError(f"{place}, column {table.id!r} is {shown(name)}. Allowed: 1 to 60 printed characters, "
                                "and no spaces around them. Correct it.")  # fmt: skip
        if name in found:
            raise DecisionError(
                f"{place}, column {table.id!r} is {name!r}, as in line {lines[name]}. Allowed: a name of its own for "
                "each case. Correct one of them."
            )
        values = {key: _value(key, rule, columns[key], row, refused, place) for key, rule in fields.items()}
        for key, words in carried.items():
            if values[key] not in words:
                _check_unlisted(str(values[key]), near[key], f"{place}, column {columns[key].column!r}")
        found[name], lines[name] = Case(name, values, _outcome(outcome, row, place)), line
    if not found:
        raise DecisionError(f"{where} holds no cases. Allowed: one row or more below the names of the columns.")
    for key, words in carried.items():
        if not any(case.values[key] in words for case in found.values()):
            few = ", ".join(map(shown, list(dict.fromkeys(case.values[key] for case in found.values()))[:3]))
            raise DecisionError(
                f"{where}: no case has a value of {key!r} that a list below `carriers:` holds (there are {few}), so "
                "that all groups are unknown. Allowed: a listed value in some cases, such as "
                f"{shown(min(words))}. Add the values of the table to the lists, or correct the column."
            )
    return tuple(found.values())


def _check_unlisted(value: str, words: Mapping[str, str], place: str) -> None:
    """A value that no list holds carries no group; one that looks like a listed one was meant to."""
    if near := next((words[look] for look in looks(value) if look in words), None):
        kind = "case, spaces or the form of a letter"
        if looks(value)[0] != looks(near)[0]:
            kind = "letters of another alphabet that look the same"
        raise DecisionError(
            f"{place} is {shown(value)}, which no list below `carriers:` holds. Did you mean {shown(near)}? They "
            f"differ by {kind}. Allowed: a listed value as it is written there, or quite another one. Correct the cell."
        )


def _columns(table: Table, source: schema.Marked, fields: Mapping[str, Field]) -> dict[str, Column]:
    """field -> its column; the words that cells stand for are checked by the field's rule."""
    if unknown := [name for name in table.columns if name not in fields]:
        raise DecisionError(
            f"{source.place('cases', 'columns', unknown[0])}: there is no field {shown(unknown[0])}."
            f"{_hint(unknown[0], fields)} Allowed: "
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
        if table.package not in assets.PACKAGES:
            raise DecisionError(
                f"{source.place('cases', 'package')} is {shown(table.package)}.{_hint(table.package, assets.PACKAGES)} "
                f"Allowed: {', '.join(sorted(assets.PACKAGES))}. Correct it, or put the table into the folder as a CSV "
                "file and name it below `file:`. (Packages are pinned in glassbox_utils/core/assets.py.)"
            )
        if table.member not in (members := assets.members(table.package)):
            raise DecisionError(
                f"{source.place('cases', 'member')} is {shown(table.member)}, which is no file of the package "
                f"{table.package!r}.{_hint(table.member, members)} Allowed: the path of a CSV file in it. Correct it."
            )
        pinned = assets.package(table.package)
        return f"{pinned.name}=={pinned.version}: {table.member}", assets.read(table.package, table.member)
    path = folder / table.file
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST + 1)
    except (OSError, ValueError) as reason:  # ValueError: a name with a byte 0
        raise DecisionError(
            f"{source.place('cases', 'file')}: {str(path)!r} can't be read "
            f"({getattr(reason, 'strerror', None) or reason}). Allowed: the name "
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
    blank = [i for i, name in enumerate(header) if not name.strip()]
    if blank and blank[0] and blank == list(range(blank[0], len(header))):
        raise DecisionError(
            f"{place} ends in columns without a name ({len(blank)}). Allowed: a name for each column. Remove the "
            f"trailing {table.delimiter!r} from all lines (in a spreadsheet: delete the empty columns)."
        )
    if blank:
        raise DecisionError(f"{place}: column {blank[0] + 1} has no name. Allowed: a name for each column. Give it one,"
                            " or remove the column (pandas: `to_csv(index=False)`).")  # fmt: skip
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise DecisionError(f"{place} names the column {shown(twice)} twice. Allowed: each column once. Rename one.")
    if missing := [name for name in wanted if name not in header]:
        raise DecisionError(
            f"{place}: the column {missing[0]!r} is missing.{_hint(missing[0], header)} There are: "
            f"{shown(', '.join(header))}. Add it, or say below `cases: columns:` which column holds the field."
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


def _hint(name: str, known: Collection[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


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
            raise DecisionError(
                f"{where} has a field {shown(name)}.{_hint(str(name), fields)} Allowed: {', '.join(fields)}. "
                "Rename or remove it."
            )
    if missing := [name for name in fields if name not in given]:
        raise DecisionError(f"{where} lacks the field {missing[0]!r}. Needed are {', '.join(fields)}. Add it.")
    return {name: checked(name, rule, given[name], refused, where) for name, rule in fields.items()}
