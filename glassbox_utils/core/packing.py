"""Texts become rows of tokens: every row full, nothing padded, the same rows wherever one begins to cut them."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from glassbox_utils.core.models import Model
from glassbox_utils.core.text import first_token


class Rows(NamedTuple):
    """Packed tokens: every row is full, nothing is padded."""

    tokens: Int[Tensor, "row pos"]
    documents: Int[Tensor, "row pos"]
    """index of the document that each token comes from; -1 for the BOS in front of a row"""


class Place(NamedTuple):
    """A place in the stream of tokens that rows are cut from."""

    document: int = 0
    skipped: int = 0
    """tokens of that document, its lead included, that went before"""


START = Place()


def encode(model: Model, texts: list[str]) -> list[list[int]]:
    """The tokens of each text as they are packed: led by the first token (BOS; a chat prompt brings its own).

    A fast tokenizer works on them in threads of its own (unless TOKENIZERS_PARALLELISM is false), lets others run
    meanwhile, and is not asked for masks and offsets.
    """
    inner = getattr(model.tokenizer, "backend_tokenizer", None)
    if inner is None:
        encoded = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    else:
        inner.no_padding()  # an earlier call may have set these; the next one sets what it needs
        inner.no_truncation()
        inner.encode_special_tokens = model.tokenizer.split_special_tokens
        encoded = [encoding.ids for encoding in inner.encode_batch_fast(texts, add_special_tokens=False)]
    bos = first_token(model)
    lead = [] if bos is None else [bos]
    return [row if row[:1] == lead else [*lead, *row] for row in encoded]


def row_width(model: Model, context: int) -> int:
    """Tokens of the texts that fit into a row: all but the BOS in front of it."""
    return context - (first_token(model) is not None)


def packed(model: Model, texts: Iterable[str], context: int = 256, start: Place = START) -> Iterator[Rows]:
    """Texts -> full rows of ``context`` tokens, some at a time: [row, context].

    Texts follow one another, each led by the first token, and are cut where a row is full. Every row starts with BOS
    as well, so that position 0 is always the attention sink. The unfinished last row is dropped. ``start``: where the
    first row begins; texts before it have been left out already.
    """
    width, skipped, number = row_width(model, context), start.skipped, start.document
    ids = owners = np.empty(0, np.int64)
    unread = iter(texts)
    while batch := list(itertools.islice(unread, 200)):
        encoded = encode(model, batch)
        lengths = [len(row) for row in encoded]
        new = np.fromiter(itertools.chain.from_iterable(encoded), np.int64, sum(lengths))
        ids = np.concatenate([ids, new[skipped:]])
        owners = np.concatenate([owners, np.repeat(np.arange(number, number + len(batch)), lengths)[skipped:]])
        skipped, number = max(0, skipped - len(new)), number + len(batch)
        n = len(ids) // width
        if n:
            front = first_token(model) or 0
            yield Rows(_rows(ids[: n * width], width, context, front), _rows(owners[: n * width], width, context, -1))
            ids, owners = ids[n * width :], owners[n * width :]


def _rows(values: np.ndarray, width: int, context: int, front: int) -> Int[Tensor, "row pos"]:
    """Values cut into rows of ``width``, each filled up to ``context`` with ``front`` before it."""
    rows = np.full((len(values) // width, context), front, np.int64)
    rows[:, context - width :] = values.reshape(-1, width)
    return torch.from_numpy(rows)


def place_after(place: Place, rows: Rows) -> Place:
    """Where the row after these begins, if they begin at ``place``."""
    owners = rows.documents[rows.documents >= 0]
    last = int(owners[-1])
    count = int((owners == last).sum())
    return Place(last, count + (place.skipped if last == place.document else 0))


def regrouped(rows: Iterable[Rows], size: int) -> Iterator[Rows]:
    """The same rows, ``size`` at a time; what is left at the end is dropped."""
    held: list[Rows] = []
    for some in rows:
        held.append(some)
        if (n := sum(len(r.tokens) for r in held)) >= size:
            whole, left = joined(held), n % size
            yield from (Rows(*(t[i : i + size] for t in whole)) for i in range(0, n - left, size))
            held = [Rows(*(t[n - left :] for t in whole))]


def joined(rows: Iterable[Rows]) -> Rows:
    """Rows one below the other."""
    return Rows(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
