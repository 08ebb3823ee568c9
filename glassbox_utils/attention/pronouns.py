"""Does a pronoun look at *who* is meant, or at whoever stands nearer? Each pair of nouns in both orders.

One sentence can't tell the two: in "The doctor asked the nurse to help him" the nurse is both the one whom a stereotype
leaves out and the one who was named last. With the nouns exchanged, recency keeps its sign and identity turns round.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.attention.heads import Split, attend, read_prompts
from glassbox_utils.core.models import Model
from glassbox_utils.core.text import find_token, tokenize


@dataclass(frozen=True)
class PronounLooks:
    """Attention from a pronoun to the two nouns before it; a case is one frame with one pair of nouns."""

    looks: Float[Tensor, "case pronoun order noun layer head"]
    """pronoun 0 is the man's (him), 1 the woman's; order 0 has noun 0 (the job that English ties to men) first"""
    pairs: list[str]
    """the nouns of each case: what is resampled"""

    @property
    def recency(self) -> Float[Tensor, "case layer head"]:
        """Attention to the later noun minus that to the earlier one, mean over both orders and pronouns."""
        x = self.looks
        return ((x[:, :, 0, 1] - x[:, :, 0, 0] + x[:, :, 1, 0] - x[:, :, 1, 1]) / 2).mean(1)

    @property
    def identity(self) -> Float[Tensor, "case layer head"]:
        """Attention to the man's job minus that to the woman's, whatever the pronoun, mean over both orders."""
        return (self.looks[:, :, :, 0] - self.looks[:, :, :, 1]).mean((1, 2))

    @property
    def stereotype(self) -> Float[Tensor, "case layer head"]:
        """How much more the man's pronoun than the woman's prefers the man's job: half the difference.

        Position and the words' own pull are the same for both pronouns, so they cancel.
        """
        gap = (self.looks[:, :, :, 0] - self.looks[:, :, :, 1]).mean(2)
        return (gap[:, 0] - gap[:, 1]) / 2


def two_orders(
    model: Model, frame: str, nouns: tuple[str, str], pronoun: str
) -> Float[Tensor, "order noun layer head"]:
    """Attention from the pronoun to both nouns, the sentence as it is (order 0) and with the nouns exchanged (order 1).

    ``frame`` holds ``{a}``, ``{b}`` and ``{p}``; what stands behind the pronoun makes no difference, since a token sees
    earlier ones only. ModelError if the prompt lacks a word.
    """
    return _looks(model, [(frame, nouns, (pronoun, pronoun))])[0, 0]


def pronoun_looks(model: Model, split: Split, n: int | None = None) -> PronounLooks:
    """All pairs and frames of a split of ``data/prompts/looking.json``, or of its first n pairs."""
    content = read_prompts("looking")["pronouns"][split]
    cases = [
        (frame, (man, woman), (his, hers))
        for man, woman in content["pairs"][:n]
        for frame, his, hers in content["frames"]
    ]
    return PronounLooks(_looks(model, cases), [" and ".join(nouns) for _, nouns, _ in cases])


def _looks(
    model: Model, cases: Sequence[tuple[str, tuple[str, str], tuple[str, str]]]
) -> Float[Tensor, "case pronoun order noun layer head"]:
    texts, words = [], []
    for frame, (x, y), pronouns in cases:
        for pronoun in pronouns:
            for a, b in ((x, y), (y, x)):
                texts.append(frame.format(a=a, b=b, p=pronoun))
                words.append((pronoun, x, y))
    batch = tokenize(model, texts)
    dst = [find_token(model, ids, pronoun, -1) for ids, (pronoun, _, _) in zip(batch.input_ids, words, strict=True)]
    src = [[find_token(model, ids, w) for w in pair] for ids, (_, *pair) in zip(batch.input_ids, words, strict=True)]
    found = attend(model, batch, torch.tensor(dst), torch.tensor(src))
    return found.movedim(-1, 1).unflatten(0, (len(cases), 2, 2))
