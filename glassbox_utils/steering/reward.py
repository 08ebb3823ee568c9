"""What a vector is rewarded for when it is trained on the model's own answers: tone as people word it, per prompt.

A complaint is worded as people complain, not as news of a catastrophe; and each answer is compared with the unsteered
answer to the same question, so that what counts is the order minus < zero < plus, not the mean.
"""

from collections import Counter
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.steering import style
from glassbox_utils.steering.vectors import SteeringError

SQUASH = 15.0
"""VADER's: a text's compound score is s / sqrt(s² + 15), for the sum s of its words' valences"""
DARK, BRIGHT = -0.5, 0.5
"""mean ratings (-4 to 4) below and above which a sentence is a complaint, or praise"""
LEAST, RATIO = 4, 2.0
"""a word that people complain with: in at least so many complaints, and so many times as common as in praise"""
CHARGE = 4.0
"""valence that a catastrophe counts with at either end: the lexicon's largest, always the wrong way"""
FLOOR = 0.05
"""an answer with less of a chance to be in order counts as if it had this one"""
TONE, STEP = 0.25, 0.15
"""beside the chance: what a point of the compound score is worth, and how soft the step is"""
MARGIN, WIDTH, ORDER = 0.2, 0.1, 1.0
"""an answer is in order from MARGIN beyond the unsteered one on; how soft that step is; what it is worth, where a
point of the compound score is worth 1"""


def valences(tokenizer: Any) -> Float[Tensor, " vocabulary"]:
    """The lexicon's valence (-4 to 4) of each token that is a whole word of it after a space; 0 for the others."""
    lexicon = style.lexicon()
    return torch.tensor([lexicon.get(word, 0.0) for word in whole_words(tokenizer)])


def whole_words(tokenizer: Any) -> list[str]:
    """The word, in lower case, that each token is after a space; an empty text for a token that is none."""
    ids = range(len(tokenizer))
    words, pieces = tokenizer.batch_decode([[i] for i in ids]), tokenizer.convert_ids_to_tokens(ids)
    # SentencePiece drops a token's space where it stands alone: the piece still has it
    words = [p.replace("▁", " ") if p and p.startswith("▁") else w for p, w in zip(pieces, words, strict=True)]
    return [w[1:].lower() if w.startswith(" ") else "" for w in words]


@cache
def complaining_words(least: int = LEAST, ratio: float = RATIO, clear: float = 0.0) -> frozenset[str]:
    """The lexicon's dark words that people complain with in rated sentences on products and films.

    In at least ``least`` sentences that people rated below DARK, and ``ratio`` times as common there as in those above
    BRIGHT; of a valence of at most ``clear`` (below -1.2 leaves out "no", which a loop of noes would live on); no
    catastrophe. Only which words occur is read of the sentences, of which the second ruler read a part.
    """
    lexicon = style.lexicon()
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    n = Counter[bool]()
    for source in ("products", "movies"):
        for text, rating in zip(*style.human_ratings(source), strict=True):
            if not DARK <= rating <= BRIGHT:
                dark = bool(rating < DARK)
                n[dark] += 1
                counts[dark].update({w for w in style.words(text) if lexicon.get(w, 0.0) < 0})
    often = {w for w, k in counts[True].items() if k >= least and k / n[True] >= ratio * counts[False][w] / n[False]}
    return frozenset({w for w in often if lexicon[w] <= clear} - style.CATASTROPHES)


def worded(
    tokenizer: Any, least: int = LEAST, ratio: float = RATIO, clear: float = 0.0, charge: float = CHARGE
) -> Float[Tensor, "end vocabulary"]:
    """What each token counts at the two ends, plus and minus.

    Plus: the lexicon's valence. Minus: that of bright words and of the ``complaining_words`` that the
    other options choose; nothing for other dark words. A catastrophe counts ``charge`` the wrong way at both ends.
    """
    words, valence = whole_words(tokenizer), valences(tokenizer)
    catastrophe = torch.tensor([w in style.CATASTROPHES for w in words])
    complaining = complaining_words(least, ratio, clear)
    other = torch.tensor([w not in complaining for w in words]) & (valence < 0)
    plus, minus = valence.clone(), valence.masked_fill(other, 0.0)
    plus[catastrophe], minus[catastrophe] = -charge, charge
    return torch.stack([plus, minus])


def shuffled(valence: Float[Tensor, "end vocabulary"], seed: int) -> Float[Tensor, "end vocabulary"]:
    """The same numbers on other words: the tokens that count are permuted, both ends alike."""
    toned = (valence != 0).any(0).nonzero().squeeze(-1)
    mixed = valence.clone()
    mixed[:, toned] = valence[:, toned[torch.randperm(len(toned), generator=torch.Generator().manual_seed(seed))]]
    return mixed


def centred(
    valence: Float[Tensor, "end vocabulary"], counts: Float[Tensor, " vocabulary"]
) -> Float[Tensor, "end vocabulary"]:
    """Shifted at each end so that the words of the model's own unsteered answers count 0 on average.

    ``counts``: how often each token stands in those answers. A reward with a mean above 0 asks one end for more words
    that count, the other for fewer; this one asks for neither. Tokens that counted nothing at both ends still do.
    SteeringError if no token that counts is ever said.
    """
    said = counts * (valence != 0).any(0)
    if said.sum() == 0:
        raise SteeringError("None of the tokens that have a valence is in the counted answers: give more answers.")
    return (valence - (valence * said).sum(-1, keepdim=True) / said.sum()) * (valence != 0).any(0)


def squashed(total: Tensor) -> Tensor:
    """The compound score, -1 to 1, of a sum of valences."""
    return total * torch.rsqrt(total * total + SQUASH)


def expected_tone(
    log_probs: Float[Tensor, "batch token vocabulary"],
    written: Float[Tensor, "batch token"],
    counted: Float[Tensor, "batch token"],
    valence: Float[Tensor, " vocabulary"],
    plain: Float[Tensor, " batch"] | None = None,
    sign: int = 1,
) -> Float[Tensor, " batch"]:
    """How much the tone of each answer would change if one of its words were drawn again: summed over the words.

    ``log_probs``: of the tokens at each place of the answers ``written`` (token ids; ``counted``: the answers' own
    tokens). Its gradient is that of the expected tone, without what a word does to the words after it (a policy
    gradient would have it, at far more noise). The lexicon's rules for negation and emphasis are left out.

    ``plain``: tone of the unsteered answer to the same question; being MARGIN beyond it, above for ``sign`` 1 and
    below for -1, is then worth ORDER on top of the tone.
    """
    there = valence[written] * counted
    others = (there.sum(-1, keepdim=True) - there)[..., None]  # sum of the answer's other words

    def worth(total: Tensor) -> Tensor:
        tone = squashed(total)
        if plain is None:
            return tone
        return tone + sign * ORDER * ((sign * (tone - plain[:, None, None]) - MARGIN) / WIDTH).sigmoid()

    toned = valence.nonzero().squeeze(-1)  # not a mask: logits may be wider than the tokenizer's vocabulary
    gain = worth(others + valence[toned]) - worth(others)
    return ((log_probs[..., toned].exp() * gain).sum(-1) * counted).sum(-1)


def likely_order(
    log_probs: Float[Tensor, "batch token vocabulary"],
    written: Float[Tensor, "batch token"],
    counted: Float[Tensor, "batch token"],
    valence: Float[Tensor, " vocabulary"],
    plain: Float[Tensor, " batch"],
    sign: int,
) -> Float[Tensor, " batch"]:
    """Like ``expected_tone``, but what grows is the logarithm of each answer's chance to be in order.

    In order: MARGIN beyond the ``plain`` answer's tone, above for ``sign`` 1 and below for -1. Because of the
    logarithm an answer that is hardly ever in order pulls up to 1 / FLOOR times as hard as one that always is: what
    counts is the share of the questions, not how far some of them go.
    """
    toned = valence.nonzero().squeeze(-1)
    said = (written[..., None] == toned) & counted.bool()[..., None]  # [batch, token, toned word]
    elsewhere = said.sum(1, keepdim=True) - said.long() > 0  # a word that is said twice counts once
    others = (elsewhere * valence[toned]).sum(-1)
    total = (said.any(1) * valence[toned]).sum(-1, keepdim=True)

    def worth(totals: Tensor) -> Tensor:
        beyond = sign * (squashed(totals) - plain.view(-1, *[1] * (totals.ndim - 1)))
        return ((beyond - MARGIN) / STEP).sigmoid() + TONE * beyond

    without = worth(others)
    gain = worth(others[..., None] + valence[toned] * ~elsewhere) - without[..., None]
    redrawn = without + (log_probs[..., toned].exp() * gain).sum(-1)  # what the answer is worth with one word redrawn
    changes = ((redrawn - worth(total)) * counted).sum(-1)
    chance = (worth(total).squeeze(-1) + changes).detach().clamp(FLOOR, 1.0)
    return (redrawn * counted).sum(-1) / chance
