"""Contrast pairs and prompts that we wrote, and what counts as a token of an answer."""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from glassbox_utils.core.arguments import items, shown
from glassbox_utils.core.assets import DATA
from glassbox_utils.core.interventions import not_first
from glassbox_utils.core.models import Model
from glassbox_utils.core.text import Batch, answered, chat, padded, tokenize
from glassbox_utils.steering.vectors import SteeringError

Text = str | tuple[str, str]
"""A text, or a user's prompt with the answer to it: of the latter only the answer's tokens are read."""


def pairs(name: str, split: Literal["train", "selection", "report"]) -> tuple[list[Text], list[Text]]:
    """Positive and negative texts of one of the shipped contrast sets, in the same order.

    Sets: tone, formality, honesty, refusal (answers to prompts), gender. SteeringError for another.
    """
    folder = DATA / "pairs"
    known = sorted(p.stem for p in folder.glob("*.json"))
    if name not in known:
        raise SteeringError(f"There are no contrast pairs {name!r}. Allowed: {', '.join(known)}.")
    rows = [
        row
        for row in json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["pairs"]
        if row["split"] == split
    ]
    if not rows:
        raise SteeringError(f"The pairs {name!r} have no split {split!r}. Allowed: train, selection, report.")

    def text(row: Mapping[str, str], side: str) -> Text:
        return (row["prompt"], row[side]) if "prompt" in row else row[side]

    return [text(r, "positive") for r in rows], [text(r, "negative") for r in rows]


def prompts(split: Literal["demo", "train", "selection", "report", "neutral", "spare", "fresh"]) -> list[str]:
    """Everyday prompts that we wrote (demo 1, train 75, selection 60, report 200), or 48 neutral sentences.

    ``fresh``: 136 more, on topics of their own. They reported on ``tone-ordered`` and what it is compared with, so that
    the next vector needs others.

    SteeringError for another split.
    """
    known = json.loads((DATA / "prompts" / "steering.json").read_text(encoding="utf-8"))
    if not isinstance(split, str) or not isinstance(known.get(split), list):
        named = ", ".join(name for name, rows in known.items() if isinstance(rows, list))
        raise SteeringError(f"There are no prompts {shown(split)}. Allowed: {named}.")
    return known[split]


def check_texts(name: str, texts: Sequence[Text], least: int = 1) -> list[Text]:
    """A list of texts, or of pairs of a prompt and its answer. SteeringError for anything else."""
    found = items(name, texts, SteeringError, (str, tuple), least, "texts or pairs")
    for i, text in enumerate(found):
        parts = [text] if isinstance(text, str) else text
        if not all(isinstance(part, str) for part in parts) or (not isinstance(text, str) and len(text) != 2):
            raise SteeringError(
                f"{name}[{i}] is {shown(text)}. Allowed: a text, or a tuple of a prompt and its answer."
            )
    return found


def answer_batch(model: Model, texts: Sequence[Text], system: str | None = None) -> tuple[Batch, Tensor]:
    """Tokens, and which of them count: all but the first, or those of the answer.

    SteeringError for no text, or for what is neither a text nor a prompt with its answer.
    """
    texts = check_texts("texts", texts)
    if all(isinstance(t, str) for t in texts):
        batch = tokenize(model, [str(t) for t in texts])
        return batch, not_first(batch)
    rows, counted = [], []
    for text in texts:  # a prompt is tokenised apart from its answer, whose beginning could merge with its end
        one, mask = _alone(model, text, system)
        rows.append(one.input_ids[0].tolist())
        counted.append(mask[0])
    batch = padded(model, rows)
    mask = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    for row, own in enumerate(counted):
        mask[row, mask.shape[1] - len(own) :] = own
    return batch, mask & not_first(batch)


def _alone(model: Model, text: Text, system: str | None) -> tuple[Batch, Tensor]:
    if isinstance(text, str):
        batch = tokenize(model, text)
        return batch, not_first(batch)
    return answered(model, [chat(model, text[0], system)], [text[1]])
