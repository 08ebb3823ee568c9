"""Text of one's own as a corpus: files on this machine, or what the model itself writes.

Text that a model wrote is free of licences and on its distribution; what it would not write by itself (code, rare
words, another language, a user's questions) is missing, and an SAE trained on it does not see that either.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from glassbox_utils.core import decoding, files
from glassbox_utils.core.arguments import shown
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import Model
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import first_token, padded

KINDS = (".txt", ".md", ".jsonl")
CHARACTERS = 4_000
"""longest document: a book becomes many, so that both splits get some of it"""


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
        for number, line in enumerate(text.splitlines(), 1):
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


def _line(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as reason:
        raise OwnTextError(f"{path}, line {number} is not valid JSON: {reason}. Write one object a line.") from reason
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise OwnTextError(f'{path}, line {number} holds {shown(row)}. Allowed: an object with "text", such as '
                           '{"text": "..."}.')  # fmt: skip
    return row["text"]


def sample(model: Model, path: Path, documents: int, tokens: int = 200, batch: int = 32, seed: int = 0) -> Path:
    """Let the model write a corpus: ``documents`` texts from its beginning of text on, sampled at temperature 1.

    Written to ``path`` as lines of JSON, batch by batch, so that a killed run goes on where it was.
    """
    there = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    first = first_token(model)
    start = padded(model, [[0 if first is None else first]] * batch)
    length = max(1, min(tokens, model.n_context - 1))
    for part in progress(range(len(there) // batch, -(-documents // batch)), "sampling text"):
        with torch.random.fork_rng(range(torch.cuda.device_count())), torch.inference_mode():
            torch.manual_seed(seed + part)
            new = decoding.write(model, *start, length, 1.0)
        texts = model.tokenizer.batch_decode(new, skip_special_tokens=True)
        there += [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        with files.atomic_path(path) as partial:
            partial.write_text("\n".join(there) + "\n", encoding="utf-8")
    return path
