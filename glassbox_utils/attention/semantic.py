"""Semantic heads: attention to an earlier word because it is of the same category."""

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glassbox_utils.attention import attribution
from glassbox_utils.attention.ablation import ablated, head_means
from glassbox_utils.attention.heads import Split, attend, read_prompts
from glassbox_utils.core.interventions import Head
from glassbox_utils.core.models import Model, ModelError
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import Batch, find_token, following, tokenize


class WordLists(NamedTuple):
    """Pairs of word lists that differ in one earlier word: of the last word's category, or of another."""

    same: Batch
    control: Batch
    position: Int[Tensor, " pair"]
    category: list[str]
    texts: list[tuple[str, str]]


def _vocabulary(model: Model, split: Split) -> dict[str, list[tuple[str, int]]]:
    """Category -> its words that are one token after a space, with their token."""
    known: dict[str, list[tuple[str, int]]] = {}
    for name, entry in read_prompts("semantic")["categories"].items():
        tokens = [(w, following(model, " " + w)) for w in entry["words"]]
        words = [(w, ids[0]) for w, ids in tokens if len(ids) == 1]
        if entry["split"] == split and len(words) >= 5:
            known[name] = words
    if len(known) < 3:
        raise ModelError(
            f"{model.name} writes too few of our words as one token: {len(known)} categories remain, 3 needed."
        )
    return known


def word_lists(model: Model, split: Split, n: int = 120, seed: int = 0) -> WordLists:
    """n pairs of lists of six words; the pair differs in one word, at one place, matched in frequency.

    Token ids of a byte-pair vocabulary are in order of merging, close to order of frequency: the control
    word is drawn from the five words of other categories whose id is nearest.
    """
    known, frames = _vocabulary(model, split), read_prompts("semantic")["frames"]
    same: list[str] = []
    control: list[str] = []
    categories, slots = [], []
    for index in range(n):
        rng = random.Random(f"{split}{seed}{index}")
        category = sorted(known)[index % len(known)]
        (target, _), (friend, friend_id) = rng.sample(known[category], 2)
        others = [w for c, words in known.items() if c != category for w in words]
        near = sorted(others, key=lambda w: abs(w[1] - friend_id))[:5]
        stranger = rng.choice(near)[0]
        fill = rng.sample([w for w, _ in others if w != stranger], 4)
        slot = rng.randrange(5)
        frame = rng.choice(frames)
        for chosen, texts in ((friend, same), (stranger, control)):
            words = [*fill[:slot], chosen, *fill[slot:], target]
            texts.append(frame.format(words=", ".join(words)))
        categories.append(category)
        slots.append(friend)
    pair = tokenize(model, same + control)
    first, second = Batch(*(t[:n] for t in pair)), Batch(*(t[n:] for t in pair))
    where = torch.tensor([find_token(model, ids, word) for ids, word in zip(first.input_ids, slots, strict=True)])
    return WordLists(first, second, where, categories, list(zip(same, control, strict=True)))


def categories(model: Model, split: Split, n: int) -> list[str]:
    """Which category each of n lists is of: what they share."""
    known = sorted(_vocabulary(model, split))
    return [known[i % len(known)] for i in range(n)]


def semantic_scores(model: Model, lists: WordLists) -> Float[Tensor, "pair layer head"]:
    """Extra attention from a word to an earlier word because it is of the same category."""
    dst = torch.full_like(lists.position, lists.same.input_ids.shape[1] - 1)
    parts = [attend(model, batch, dst, lists.position[:, None])[..., 0] for batch in (lists.same, lists.control)]
    return parts[0] - parts[1]


def frame_looks(
    model: Model, frames: Sequence[str], whats: Sequence[str], whos: Sequence[str]
) -> Float[Tensor, "frame what who layer head"]:
    """Attention from the last word of a sentence to a noun before it, for all pairs of two lists.

    ``frames`` hold ``{who}`` and end in ``{what}``; every word of one list meets every word of the other in each frame,
    so what comes of the frame, of the place, or of either word alone can be told from what comes of the pair.
    """
    cells = [(f, what, who) for f in frames for what in whats for who in whos]
    batch = tokenize(model, [f.format(who=who, what=what) for f, what, who in cells])
    where = [
        (find_token(model, ids, what, -1), find_token(model, ids, who))
        for ids, (_, what, who) in zip(batch.input_ids, cells, strict=True)
    ]
    dst, src = torch.tensor(where).unbind(-1)
    return attend(model, batch, dst, src[:, None])[..., 0].unflatten(0, (len(frames), len(whats), len(whos)))


@torch.no_grad()
def category_preference(
    model: Model, split: Split, sets: Sequence[Sequence[Head]], n: int = 64, seed: int = 1
) -> Float[Tensor, "set list"]:
    """After four words of one category, how much more likely is a fifth of it than matched other words?

    log P(unused words of the category) - log P(as many frequency-matched words of others), nats, with each
    set of heads mean-ablated.
    """
    known, frames = _vocabulary(model, split), read_prompts("semantic")["frames"]
    texts, inside, outside = [], [], []
    for index in range(n):
        rng = random.Random(f"{split}{seed}{index}")
        category = sorted(known)[index % len(known)]
        words = rng.sample(known[category], len(known[category]))
        others = [w for c, group in known.items() if c != category for w in group]
        texts.append(rng.choice(frames).format(words=", ".join(w for w, _ in words[:4])) + ",")
        rest, matched = words[4:], []
        for _, token in rest:
            matched.append(min((w for w in others if w[1] not in matched), key=lambda w: abs(w[1] - token))[1])
        inside.append([token for _, token in rest])
        outside.append(matched)
    batch = tokenize(model, texts)
    reference = head_means(model, [word_lists(model, split, 24, seed + 7).control])
    result = []
    for heads in progress(sets, "lists"):
        with ablated(model, heads, reference):
            logits = attribution.last_logits(model, batch)
        result.append(
            torch.stack(
                [row[i].logsumexp(0) - row[o].logsumexp(0) for row, i, o in zip(logits, inside, outside, strict=True)]
            )
        )
    return torch.stack(result)
