"""Contrast pairs and prompts that we wrote, and what counts as a token of an answer."""

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from glassbox_utils.core.assets import DATA
from glassbox_utils.core.interventions import not_first
from glassbox_utils.core.models import Model
from glassbox_utils.core.text import Batch, chat, tokenize
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
    rows = [row for row in json.loads((folder / f"{name}.json").read_text())["pairs"] if row["split"] == split]
    if not rows:
        raise SteeringError(f"The pairs {name!r} have no split {split!r}. Allowed: train, selection, report.")

    def text(row: Mapping[str, str], side: str) -> Text:
        return (row["prompt"], row[side]) if "prompt" in row else row[side]

    return [text(r, "positive") for r in rows], [text(r, "negative") for r in rows]


def prompts(split: Literal["demo", "train", "selection", "report", "neutral", "spare"]) -> list[str]:
    """Everyday prompts that we wrote (demo 1, train 75, selection 60, report 200), or 48 neutral sentences."""
    return json.loads((DATA / "prompts" / "steering.json").read_text())[split]


def answer_batch(model: Model, texts: Sequence[Text], system: str | None = None) -> tuple[Batch, Tensor]:
    """Tokens, and which of them count: all but the first, or those of the answer."""
    asked = [None if isinstance(t, str) else chat(model, t[0], system) for t in texts]
    batch = tokenize(model, [t if isinstance(t, str) else f"{a}{t[1]}" for t, a in zip(texts, asked, strict=True)])
    mask = not_first(batch)
    for row, before in enumerate(asked):
        if before is not None:
            n_before = int(tokenize(model, before).attention_mask.sum())
            mask[row] &= batch.attention_mask[row].cumsum(-1) > n_before
    return batch, mask
