"""Text of one's own as a corpus: files on this machine, or what a model itself wrote (``own_writing``)."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glassbox_utils.core import assets, schema
from glassbox_utils.core.arguments import shown
from glassbox_utils.core.errors import GlassboxError

KINDS = (".txt", ".md", ".jsonl")
CHARACTERS = 4_000
"""longest document: a book becomes many, so that both splits get some of it"""


OWN = "own:"
"""how a corpus is called that a model wrote: ``own:NAME``"""


class OwnTextError(GlassboxError, ValueError):
    """A file that holds no text that can be read; the message names it and what is allowed."""


def files_of(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The text files that are meant: files as they are, of folders all ``.txt``, ``.md`` and ``.jsonl`` in them."""
    given = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.suffix in KINDS and p.is_file())
        elif path.is_file() and path.suffix in KINDS:
            found.append(path)
        else:
            what = "is of another kind" if path.is_file() else "is not there"
            raise OwnTextError(f"{path} {what}. Allowed: files that end in {', '.join(KINDS)}, or folders of them.")
    if not found:
        raise OwnTextError(f"No text in {', '.join(map(str, given))}. Allowed: files that end in {', '.join(KINDS)}.")
    return list(dict.fromkeys(found))


def is_own(name: str) -> bool:
    """Does the name of a corpus mean files on this machine?"""
    path = Path(name)
    return (path.suffix in KINDS and path.is_file()) or (
        path.is_dir() and any(p.suffix in KINDS for p in path.rglob("*"))
    )


def texts(name: str) -> Iterator[tuple[str, str]]:
    """(file name, passage) of all text files of a folder, or of one file."""
    for path in files_of(name):
        yield from ((path.name, text) for text in passages(path))


def passages(path: Path) -> Iterator[str]:
    """Documents of a file: the ``text`` of each line of JSON, else paragraphs up to ``CHARACTERS`` together."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise OwnTextError(f"{path} is not text in UTF-8 (byte {reason.start}). Save it as UTF-8.") from reason
    except OSError as reason:
        raise OwnTextError(f"{path} can't be read: {reason.strerror}. Give another file.") from reason
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _line(path, number, line)
        return
    kept = ""
    for paragraph in text.split("\n\n"):
        if kept and len(kept) + len(paragraph) > CHARACTERS:
            yield kept
            kept = ""
        while len(paragraph) > CHARACTERS:
            yield paragraph[:CHARACTERS]
            paragraph = paragraph[CHARACTERS:]
        kept = f"{kept}\n\n{paragraph}" if kept else paragraph
    if kept:
        yield kept


def lines_of(text: str) -> list[str]:
    """The lines of a file of JSON: only a line feed ends one (``splitlines`` would cut inside a text that holds one of
    Unicode's other ends of line)."""
    return [line for line in text.split("\n") if line.strip()]


def _line(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as reason:
        raise OwnTextError(f"{path}, line {number} is not valid JSON: {reason}. Write one object a line.") from reason
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise OwnTextError(f'{path}, line {number} holds {shown(row)}. Allowed: an object with "text", such as '
                           '{"text": "..."}.')  # fmt: skip
    return row["text"]


# --- what a model wrote -------------------------------------------------------------------------------

MANIFEST = "manifest.json"


def folder_of(name: str) -> Path:
    """Where the text lies that ``glassbox write-text NAME`` writes."""
    return assets.cache_dir() / "own-text" / name


def parts_in(folder: Path) -> list[list[dict[str, Any]]]:
    """The finished parts of a text in their order, each a list of documents; an unfinished one is no part."""
    return [
        [json.loads(line) for line in lines_of(path.read_text(encoding="utf-8"))]
        for path in sorted(folder.glob("part-*.jsonl"))
    ]


def written(name: str) -> Iterator[tuple[str, str, str, str]]:
    """(text, question or "", kind, licence) of all that a model wrote under this name; OwnTextError if there is none.

    The licence says who wrote it, since no terms but the model's bind it.
    """
    folder = folder_of(name)
    if not (folder / MANIFEST).exists() or not any(folder.glob("part-*.jsonl")):
        raise OwnTextError(f"There is no text own:{name} on this machine. `glassbox write-text {name}` writes it.")
    manifest = schema.read_mapping(folder / MANIFEST, OwnTextError, "what `glassbox write-text` wrote")
    for part in parts_in(folder):
        for row in part:
            yield row["text"], row["question"], row["kind"], f"written by {manifest.get('model')}"
