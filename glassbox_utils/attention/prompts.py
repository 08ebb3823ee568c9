"""Prompts with a known decisive token, written for this project, in two disjoint sets.

Selection prompts choose something (a head, a reference, a threshold), report prompts measure it; no name, country, noun
or template stands in both. Report prompts are those of ``decisive_report.json``: the other half of
``decisive_tokens.json`` was for reporting until results on it had been looked at.
"""

import itertools
import json
import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from glassbox_utils.core.assets import DATA
from glassbox_utils.core.devices import beside
from glassbox_utils.core.models import Model, ModelError, is_whole
from glassbox_utils.core.text import Batch, find_token, following, tokenize

PROMPTS = DATA / "prompts"
FAMILIES = ("indirect_object", "capital", "agreement")

Split = Literal["select", "report"]


class Decisive(NamedTuple):
    """A prompt, the word that its answer hangs on, the right next word and the wrong one."""

    text: str
    decisive: str
    answer: str
    foil: str


class DecisiveBatch(NamedTuple):
    """Prompts of one family as tensors: positions of the decisive token, ids of answer and foil."""

    batch: Batch
    decisive: Int[Tensor, " batch"]
    answer: Int[Tensor, " batch"]
    foil: Int[Tensor, " batch"]
    texts: list[str]


def decisive_prompts(family: str, split: Split, n: int | None, seed: int = 0) -> list[Decisive]:
    """n different prompts (None: all) of a family (``indirect_object``, ``capital``, ``agreement``), shuffled by
    ``seed``.

    Raises ModelError for an unknown family, split, or more prompts than there are.
    """
    if family not in FAMILIES:
        raise ModelError(f"There is no family of prompts {family!r}. Allowed: {', '.join(FAMILIES)}.")
    if split not in ("select", "report"):
        raise ModelError(f"There is no split {split!r}. Allowed: select, report.")
    file = "decisive_tokens.json" if split == "select" else "decisive_report.json"
    content = json.loads((PROMPTS / file).read_text(encoding="utf-8"))[family]
    if split == "select":
        content = {key: part if key == "templates" else part[::2] for key, part in content.items()}
    rng = random.Random(f"{family}{split}{seed}")
    found = {"indirect_object": _indirect_object, "capital": _capital, "agreement": _agreement}[family](content)
    unique = sorted(set(found))
    n = len(unique) if n is None else n
    if not is_whole(n) or not 1 <= n <= len(unique):
        raise ModelError(
            f"{family} has {len(unique)} {split} prompts, {n!r} were asked for. Choose 1 to {len(unique)}."
        )
    return rng.sample(unique, n)


def _indirect_object(content: dict) -> list[Decisive]:
    rng, made = random.Random(0), []
    for a, b in itertools.permutations(content["names"], 2):
        place, thing = rng.choice(content["places"]), rng.choice(content["objects"])
        text = rng.choice(content["templates"]).format(A=a, B=b, place=place, object=thing)
        made.append(Decisive(text, a, " " + a, " " + b))
    return made


def _capital(content: dict) -> list[Decisive]:
    pairs, rng, made = content["pairs"], random.Random(0), []
    for (country, city), template in itertools.product(pairs, content["templates"]):
        wrong = rng.choice([c for _, c in pairs if c != city])
        made.append(Decisive(template.format(country=country), country, " " + city, " " + wrong))
    return made


def _agreement(content: dict) -> list[Decisive]:
    made = []
    for nouns, others, template in itertools.product(content["nouns"], content["others"], content["templates"]):
        for number, verbs in enumerate(((" is", " are"), (" are", " is"))):
            text = template.format(noun=nouns[number], other=others[1 - number])  # the nearer noun misleads
            made.append(Decisive(text, nouns[number], *verbs))
    return made


def measurable(model: Model, prompts: Sequence[Decisive]) -> list[Decisive]:
    """The prompts whose answer and foil begin with different tokens for this model's tokenizer."""
    first = [[following(model, w)[0] for w in p[2:]] for p in prompts]
    return [p for p, (answer, foil) in zip(prompts, first, strict=True) if answer != foil]


def to_batch(model: Model, prompts: Sequence[Decisive]) -> DecisiveBatch:
    """Tokenise; answers and foils count by their first token, decisive words by their last."""
    batch = tokenize(model, [p.text for p in prompts])
    where = [find_token(model, ids, p.decisive) for ids, p in zip(batch.input_ids, prompts, strict=True)]
    first = [[following(model, w)[0] for w in p[2:]] for p in prompts]
    answer, foil = beside(torch.tensor(first), model.device).unbind(-1)
    return DecisiveBatch(batch, torch.tensor(where), answer, foil, [p.text for p in prompts])


def another_position(prompts: DecisiveBatch, seed: int = 0) -> Int[Tensor, " batch"]:
    """For each prompt a random position that is neither its first token, nor decisive, nor the last: a control."""
    rng = random.Random(seed)
    chosen = []
    for mask, decisive in zip(prompts.batch.attention_mask, prompts.decisive.tolist(), strict=True):
        start = int(mask.argmax()) + 1
        free = [p for p in range(start, len(mask) - 1) if p != decisive]
        if not free:
            raise ModelError(f"A prompt of {int(mask.sum())} tokens has no other position: give longer prompts.")
        chosen.append(rng.choice(free))
    return torch.tensor(chosen)
