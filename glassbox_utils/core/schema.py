"""Everything that people write by hand is checked here, by pydantic: a dataclass's annotations are its schema.

A field may say more with ``Annotated``: ``k: Annotated[int, Field(ge=1, description="features kept for a token")]``.
``check`` goes into ``__post_init__``, so that Python callers and files meet the same rules; ``build`` makes an instance
of what was read from a file; ``read_mapping`` reads the file. Nothing is converted in silence: ``"3"`` is no 3 and
``True`` no 1. Numbers are finite; text becomes a ``Path`` and a list a tuple where the annotation says so.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from glassbox_utils.core.errors import GlassboxError

T = TypeVar("T")


def build(kind: type[T], values: Any, where: str, error: type[GlassboxError]) -> T:
    """An instance of a dataclass from a mapping, as a file holds it; ``error`` names the field, the value, what is
    allowed and the fix. ``where`` says whose values they are (a path)."""
    if not isinstance(values, Mapping):
        raise error(f"{where} holds {_shown(values)}. Allowed: fields with values, one a line, such as `seed: 0`.")
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in known]:
        near = get_close_matches(str(unknown[0]), known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        names = ", ".join(map(repr, unknown))
        raise error(f"{where} has unknown fields: {names}.{hint} Allowed: {', '.join(known)}.")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    if missing := [name for name in needed if name not in values]:
        raise error(f"{where} is incomplete: {', '.join(missing)} is missing. Add it; needed are {', '.join(needed)}.")
    try:
        return kind(**values)
    except error as reason:
        raise error(f"{where}: {reason}") from reason


def check(instance: Any, error: type[GlassboxError]) -> None:
    """Every field of a dataclass against its annotation; to be called in ``__post_init__``.

    Lists become tuples, and texts paths, where the annotation says so.
    """
    import pydantic

    kind = type(instance)
    values = {f.name: getattr(instance, f.name) for f in fields(kind)}
    try:
        checked = _twin(kind).model_validate(values)
    except pydantic.ValidationError as found:
        raise error(_worded(found)) from None
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


def _worded(found: Any) -> str:
    """pydantic's list of errors as one paragraph."""
    said = []
    for e in found.errors(include_url=False)[:3]:
        name = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" if i else str(p) for i, p in enumerate(e["loc"]))
        rule = (
            e["msg"]
            .removeprefix("Value error, ")
            .replace("Input should be", "Allowed:")
            .replace("Allowed: a valid", "Allowed: a")
        )
        said.append(f"{name} is {_shown(e['input'])}. {rule}.")
    more = len(found.errors()) - len(said)
    return " ".join(said) + (f" {more} more fields are wrong." if more > 0 else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_mapping(path: Path, error: type[GlassboxError], example: str, largest: int = 1_000_000) -> dict[str, Any]:
    """The mapping of a YAML or JSON file; ``error`` says what is wrong, in which line. Objects are never made from
    tags, and a file of more than ``largest`` bytes is not read. ``example`` is what the file should be."""
    import yaml

    try:
        if path.stat().st_size > largest:
            raise error(f"{path} has {path.stat().st_size:,} bytes. Allowed: at most {largest:,}. Give {example}.")
        text = path.read_bytes().decode("utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as reason:
        raise error(f"{path} can't be read: {reason.strerror or reason}. Give {example}.") from reason
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not text in UTF-8 (byte {reason.start}). Give {example}.") from reason
    except json.JSONDecodeError as reason:
        raise error(f"{path} is not valid JSON: {reason.msg} in line {reason.lineno}. Give {example}.") from reason
    except RecursionError as reason:
        raise error(f"{path} is nested too deeply. Give {example}.") from reason
    except (yaml.YAMLError, ValueError) as reason:
        words = " ".join(str(reason).split())[:200]
        raise error(f"{path} is not valid YAML: {words}. Give {example}.") from reason
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise error(f"{path} holds {_shown(values)} instead of fields with values. Give {example}.")
    return values
