"""Everything that people write by hand is checked here, by pydantic: a dataclass's annotations are its schema.

A field may say more with ``Annotated``: ``k: Annotated[int, Field(ge=1, description="features kept for a token")]``.
``check`` goes into ``__post_init__``, so that Python callers and files meet the same rules; ``build`` makes an instance
of what was read from a file; ``read_mapping`` reads the file, ``read_marked`` one that is long enough for its lines to
be named. Nothing is converted in silence: ``"3"`` is no 3 and ``True`` no 1. Numbers are finite; text becomes a
``Path`` and a list a tuple where the annotation says so.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from glassbox_utils.core.arguments import shown
from glassbox_utils.core.errors import GlassboxError

T = TypeVar("T")


def build(kind: type[T], values: Any, where: str | Callable[[str], str], error: type[GlassboxError]) -> T:
    """An instance of a dataclass from a mapping, as a file holds it; ``error`` names the field, the value, what is
    allowed and the fix. ``where`` says whose values they are: a path, or what gives the place of a field by its name,
    such as ``groups.gender`` or ``values[2]`` ("" for all of them)."""
    place = where if callable(where) else lambda _: where
    if not isinstance(values, Mapping):
        raise error(f"{place('')} holds {shown(values)}. Allowed: fields with values, one a line, such as `seed: 0`.")
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in known]:
        near = get_close_matches(str(unknown[0]), known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        names = ", ".join(map(shown, unknown[:3])) + more
        raise error(f"{place(str(unknown[0]))} has unknown fields: {names}.{hint} Allowed: {', '.join(known)}.")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    if missing := [name for name in needed if name not in values]:
        names = ", ".join(missing)
        raise error(f"{place('')} is incomplete: {names} is missing. Add it; needed are {', '.join(needed)}.")
    try:
        return kind(**values)
    except GlassboxError as reason:
        named = re.match(r"(\w*)[\w.\[\]]*", str(reason))  # messages of ``check`` begin with the name of the field
        raise error(f"{place(named[0] if named and named[1] in values else '')}: {reason}") from reason


def check(instance: Any, error: type[GlassboxError]) -> None:
    """Every field of a dataclass against its annotation; to be called in ``__post_init__``.

    Lists become tuples, and texts paths, where the annotation says so.
    """
    import pydantic

    twin = _twin(type(instance))  # type: ignore[arg-type]
    values = {f.name: getattr(instance, f.name) for f in fields(instance)}
    try:
        checked = twin.model_validate(values)
    except pydantic.ValidationError as found:
        raise error(_worded(found, twin)) from None
    for name in values:
        object.__setattr__(instance, name, getattr(checked, name))


@cache
def _twin(kind: type) -> Any:
    """A pydantic model with the same fields."""
    import pydantic

    hints = get_type_hints(kind, include_extras=True)
    lax = pydantic.Field(strict=False)
    made: dict[str, Any] = {}
    for f in fields(kind):
        hint = hints[f.name]
        bare = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
        loose = bare is Path or get_origin(bare) is tuple or Path in get_args(bare)
        made[f.name] = (hint, lax) if loose else hint
        made[f.name] = made[f.name] if isinstance(made[f.name], tuple) else (hint, ...)
    rules = pydantic.ConfigDict(
        strict=True, allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=(), extra="forbid"
    )
    return pydantic.create_model(kind.__name__, __config__=rules, **made)


def _worded(found: Any, twin: Any) -> str:
    """pydantic's list of errors as one paragraph; a field's own description says more than a pattern."""
    said = []
    for e in found.errors(include_url=False)[:3]:
        name = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" if i else str(p) for i, p in enumerate(e["loc"]))
        name = name if name.isprintable() else str(e["loc"][0])
        described = twin.model_fields[e["loc"][0]].description if e["type"] == "string_pattern_mismatch" else None
        rule = (
            f"Allowed: {described}"
            if described
            else (
                e["msg"]
                .removeprefix("Value error, ")
                .replace("Input should be", "Allowed:")
                .replace("Allowed: a valid", "Allowed: a")
                .replace("a integer", "a whole number")
                .replace("a tuple", "a list")
                .replace("a dictionary", "fields with values")
            )
        )
        hint = " Write it without quotes, and with a dot before an exponent: 1.0e-3." if _is_number(e["input"]) else ""
        if e["type"] == "string_type" and isinstance(e["input"], bool | int | float):
            hint = " Write it in quotes" + (": YAML reads yes, no, on and off as True and False." if
                                            isinstance(e["input"], bool) else ".")  # fmt: skip
        said.append(f"{name} is {shown(e['input'])}. {rule}.{hint}")
    more = len(found.errors()) - len(said)
    return " ".join(said) + (f" {more} more fields are wrong." if more > 0 else "")


def _is_number(value: Any) -> bool:
    """Is it a number that was written as text? YAML takes 1e-3 for one."""
    try:
        return isinstance(value, str) and float(value) is not None
    except ValueError:
        return False


def read_mapping(path: Path, error: type[GlassboxError], example: str, largest: int = 1_000_000) -> dict[str, Any]:
    """The mapping of a YAML or JSON file; ``error`` says what is wrong, in which line. Objects are never made from
    tags, a field that is given twice is refused, and a file of more than ``largest`` bytes is not read. ``example`` is
    what the file should be."""
    return _read(path, error, example, largest, lambda text: None)


@dataclass(frozen=True)
class Marked:
    """What a YAML file holds, and the line in which each of its keys and entries stands."""

    path: Path
    values: dict[str, Any]
    lines: dict[tuple[str | int, ...], int]

    def place(self, *keys: str | int) -> str:
        """``decision.yaml, line 7 (fields.age.range)``: where a key stands, for messages; one that the file does not
        write out stands where its parent does."""
        n = next(n for n in range(len(keys), -1, -1) if keys[:n] in self.lines)
        name = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in keys).lstrip(".")
        named = f" ({name})" if name and len(name) < 80 and name.isprintable() else ""
        return f"{self.path}, line {self.lines[keys[:n]]}{named}"

    def under(self, *keys: str | int) -> Callable[[str], str]:
        """``place`` of the keys below some, as ``build`` takes it."""
        number = re.compile(r"[0-9]{1,9}")
        return lambda part: self.place(
            *keys, *(int(k) if number.fullmatch(k) else k for k in re.findall(r"[^.\[\]]+", part))
        )


def read_marked(path: Path, error: type[GlassboxError], example: str, largest: int = 1_000_000) -> Marked:
    """As ``read_mapping`` for a YAML file, with the line of each key; one that is given twice is refused."""
    lines: dict[tuple[str | int, ...], int] = {}

    def note(text: str) -> None:
        import yaml

        _note_lines(yaml.compose(text, yaml.SafeLoader), (), lines, set())

    return Marked(path, _read(path, error, example, largest, note), lines)


def _note_lines(node: Any, keys: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int], seen: set) -> None:
    """The line of every key below a node of PyYAML. What an alias repeats is noted where it is written."""
    import yaml

    lines.setdefault(keys, node.start_mark.line + 1 if node is not None else 1)
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if node.tag in _NUMBERS and (len(node.value) > 100 or not re.search(r"\d|inf|nan", node.value, re.IGNORECASE)):
        raise ValueError(f"{shown(node.value)} in line {lines[keys]} is no number that can be read; write one of "
                         "fewer digits, or text in quotes")  # fmt: skip
    if node.tag == _DATE:
        raise ValueError(f"{shown(node.value)} in line {lines[keys]} would be read as a date; write it in quotes")
    if node.tag in _NUMBERS and not _PLAIN_NUMBER.fullmatch(node.value):
        raise ValueError(
            f"{shown(node.value)} in line {lines[keys]} would be read as another number; write it in plain digits, or "
            "in quotes if it is text"
        )
    if isinstance(node, yaml.SequenceNode):
        for i, part in enumerate(node.value):
            _note_lines(part, (*keys, i), lines, seen)
    if isinstance(node, yaml.MappingNode):
        for key, part in node.value:
            line, below = key.start_mark.line + 1, (*keys, str(key.value))
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"the name of a field is a list or a mapping in line {line}; write a word before the "
                                 "colon, and a value with [ ], { } or ? in quotes")  # fmt: skip
            if not keys and key.tag not in (_TEXT, _MERGE):
                raise ValueError(f"{shown(key.value)} in line {line} is the name of a field, and would not be read as "
                                 "text; write another name, or this one in quotes")  # fmt: skip
            if below in lines and key.tag != _MERGE:
                raise ValueError(
                    f"{shown(key.value)} is given twice, in line {lines[below]} and in line {line}; remove one of them"
                )
            lines[below] = line
            _note_lines(part, below, lines, seen)


def _read(
    path: Path, error: type[GlassboxError], example: str, largest: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """The mapping of a file; ``note`` gets the text first."""
    import yaml

    try:
        with open(path, "rb") as file:  # a device has no size, and no end
            raw = file.read(largest + 1)
        if len(raw) > largest:
            size = max(len(raw), path.stat().st_size)
            raise error(f"{path} has {size:,} bytes or more. Allowed: at most {largest:,}. Give {example}.")
        text = raw.decode("utf-8-sig")
        if "\0" in text and path.suffix != ".json":
            raise error(f"{path}, line {text.count(chr(10), 0, text.index(chr(0))) + 1} is not valid YAML: it holds a "
                        f"byte 0. Save the file as plain text in UTF-8. Give {example}.")  # fmt: skip
        note(text)
        values = (
            json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else yaml.load(text, _strict_yaml())
        )
    except OSError as reason:
        raise error(f"{path} can't be read: {reason.strerror or reason}. Give {example}.") from reason
    except UnicodeDecodeError as reason:
        line = raw[: reason.start].count(b"\n") + 1
        raise error(f"{path}, line {line} is not text in UTF-8 (byte {reason.start}). Save the file as UTF-8 in your "
                    f"editor. Give {example}.") from reason  # fmt: skip
    except json.JSONDecodeError as reason:
        raise error(f"{path} is not valid JSON: {reason.msg} in line {reason.lineno}. Give {example}.") from reason
    except RecursionError as reason:
        raise error(f"{path} is nested too deeply. Give {example}.") from reason
    except GlassboxError:
        raise
    except (yaml.MarkedYAMLError, yaml.reader.ReaderError) as reason:
        line, said = _explained(reason, text)
        raise error(f"{path}, line {line} is not valid YAML: {said} Give {example}.") from reason
    except (yaml.YAMLError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as reason:
        # TypeError: a list as the name of a field; the last ones: PyYAML on `!!int ''` and the like
        words, kind = (
            " ".join(str(reason).replace(' in "<unicode string>",', " in").split())[:200],
            "JSON" if path.suffix == ".json" else "YAML",
        )
        raise error(f"{path} is not valid {kind}: {words}. Give {example}.") from reason
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        where, why = (", line 1: the file", ", it is empty or all remarks") if values is None else ("", "")
        raise error(f"{path}{where} holds {shown(values)} instead of fields with values{why}. Give {example}.")
    return values


def _explained(reason: Any, text: str) -> tuple[int, str]:
    """The line of a YAML file that can't be read, what is wrong there, and the fix."""
    if not hasattr(reason, "problem_mark"):  # a character that YAML does not take
        line = text.count("\n", 0, reason.position) + 1
        return line, f"it holds the character U+{reason.character:04X}, which is not printed. Remove it."
    rows, problem = text.splitlines(), reason.problem or ""
    mark = reason.problem_mark or reason.context_mark
    at = mark.line if mark else 0
    begin = reason.context_mark.line if reason.context_mark else at
    above = next((n for n in range(min(at, len(rows)) - 1, -1, -1) if rows[n].strip()), at)
    for n in (at, above):
        lead = re.match(r"\s*", rows[n])[0].strip(" ") if n < len(rows) else ""  # type: ignore[index]
        if lead and (n == at or lead[0] != "\t"):
            sign = "a tab" if lead[0] == "\t" else f"a space of another kind (U+{ord(lead[0]):04X})"
            return n + 1, f"it begins with {sign}. Indent it with plain spaces, two for each level."
        if n < len(rows) and re.match(r"\s*-[^\s\d.-]", rows[n]):
            return n + 1, "a space is missing behind `-`. Write `- ` before an entry of a list."
    if problem == "mapping values are not allowed here":
        row = rows[at] if at < len(rows) else ""
        key = re.match(r"\s*(?:- +)*([^\s:][^:]*):\s", row)
        if key and mark.column >= key.end():
            return (
                at + 1,
                f"the value of {shown(key[1])} holds a colon with a space behind it. Put the value in quotes.",
            )
        if not re.search(r":(\s|$)", rows[above]):
            return above + 1, "it has no colon with a space behind the name. Write it as `name: value`."
        return at + 1, "its indentation fits no line above it. Indent it like the other fields of its level."
    if "could not find expected ':'" in problem:
        return begin + 1, ("it has no colon with a space behind the name. Write it as `name: value`, or indent it if it"
                           " belongs to a text above.")  # fmt: skip
    if problem.startswith("expected ',' or"):
        return at + 1, (f"the bracket that line {begin + 1} opens is not closed, or a comma or a quote is missing. Add "
                        "it; text with [ ] { } or a comma belongs in quotes.")  # fmt: skip
    if problem.startswith("expected <block end>"):
        return at + 1, (f"it does not fit what begins in line {begin + 1}: it is indented otherwise, or a quote above "
                        "is not closed. Indent it like its neighbours, or mend the quote.")  # fmt: skip
    if "end of stream" in problem and "quoted" in (reason.context or ""):
        return begin + 1, "a quote is opened and not closed. Close it."
    if "found another document" in problem:
        return at + 1, "`---` begins a second document. Remove that line."
    said = " ".join(problem.split())[:120]
    if "constructor" in said:
        return at + 1, f"{said}. Remove what begins with `!`, or put the value in quotes."
    return at + 1, f"{said}. Put a value with signs such as : # * & ! % @ ` in quotes."


def _once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping, unless one of its fields is there twice: of two values one would be lost."""
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the field {shown(name)} is given twice")
        found[name] = value
    return found


@cache
def _strict_yaml() -> Any:
    """YAML's safe loader, which makes no objects, with ``_once`` for mappings."""
    import yaml

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        _once((loader.construct_object(key, deep=True), None) for key, _ in node.value if key.tag != _MERGE)
        loader.flatten_mapping(node)
        return dict(loader.construct_pairs(node, deep=True))

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Strict


_MERGE, _TEXT, _DATE = (f"tag:yaml.org,2002:{kind}" for kind in ("merge", "str", "timestamp"))
_PLAIN_NUMBER = re.compile(r"[-+]?(0|[1-9]\d*)?(\.\d*)?([eE][-+]\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
"""of YAML 1.1's numbers those that mean what they look like: 010 is 8, 1:30 is 90, 0x1F is 31, 1_0 is 10"""
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
