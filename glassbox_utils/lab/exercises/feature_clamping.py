"""Exercises of notebook 04: the clamp, the size of a push, output score, repetition, late mentions, enrichment."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from glassbox_utils.lab.exercises import answer, checker, near, number, tensor, wrong_if

Function = Callable[..., Any]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- A: the clamp -------------------------------------------------------------------------------------


def solve_clamped(
    x: Float[Tensor, "pos d_model"],
    code: Float[Tensor, "pos d_sae"],
    W_dec: Float[Tensor, "d_sae d_model"],
    feature: int,
    target: float,
) -> Float[Tensor, "pos d_model"]:
    """The stream with one feature's activity set to ``target``; what the SAE does not explain stays."""
    return x + (target - code[:, feature, None]) * W_dec[feature]


@checker
def check_clamped(function: Function) -> None:
    """What is there is taken away, what is wanted is put in, along one row, and nothing else is touched."""
    x, code, rows = _random(5, 8, seed=1), _random(5, 12, seed=2).relu(), _random(12, 8, seed=3)
    value, wanted = tensor(answer(function, x, code, rows, 7, 2.5), (5, 8)), solve_clamped(x, code, rows, 7, 2.5)
    wrong_if(
        near(value, x + 2.5 * rows[7]),
        "this *adds* the target to what is there: where the feature fires already, it now has more. Subtract code.",
    )
    spliced = code.clone()
    spliced[:, 7] = 2.5
    wrong_if(
        near(value, spliced @ rows),
        "this is the reconstruction with the feature set: what the SAE does not explain is lost. Change x instead.",
    )
    wrong_if(near(value, x + (2.5 - code[:, 7, None]) * rows[7] / rows[7].norm()), "the row is not to be normalised.")
    wrong_if(near(value, 2 * x - wanted), "the sign is turned: target minus activity.")
    wrong_if(near(value, x), "nothing has changed: the answer is the stream *with* the clamp.")
    wrong_if(near(value[:-1], x[:-1]), "only the last position has changed: a clamp holds the feature at all of them.")
    wrong_if(not near(value, wanted), "the stream is not x + (target - activity) * row.")


# --- B: the size of a push ----------------------------------------------------------------------------


def solve_target_for(share: float, row: Float[Tensor, " d_model"], norm: float) -> float:
    """The activity that adds ``share`` of a position's norm along a decoder row of any length."""
    return share * norm / row.norm()


@checker
def check_target_for(function: Function) -> None:
    """Share times norm, divided by the row's length."""
    row = torch.tensor([3.0, 4.0, 0.0])
    value = number(answer(function, 0.4, row, 50.0))
    wrong_if(near(value, 20.0), "this is right for rows of length 1 only: this row is 5 long.")
    wrong_if(near(value, 100.0), "multiplied by the row's length: a long row needs *less* activity.")
    wrong_if(near(value, 0.4 * 50 / 25), "divided by the squared length: take the square root (row.norm()).")
    wrong_if(near(value, 0.4 * 50 / 7), "divided by the sum of the entries: the length is row.norm().")
    wrong_if(not near(value, 4.0), f"the push has the size {value * 5:.3g}, and should have .4 of 50, which is 20.")


# --- C: output score ----------------------------------------------------------------------------------


def solve_output_score(
    before: Float[Tensor, "prompt vocab"], after: Float[Tensor, "prompt vocab"], tokens: Sequence[int]
) -> Float[Tensor, ""]:
    """Rise of the log-probability that the next token is one of these, nats, mean over prompts; logits in."""
    mass = [x.log_softmax(-1)[:, tokens].logsumexp(-1) for x in (before, after)]
    return (mass[1] - mass[0]).mean()


@checker
def check_output_score(function: Function) -> None:
    """Probabilities of the words are added before the logarithm, and the softmax is over the whole vocabulary."""
    before, after, words = _random(4, 30, seed=4), 3 * _random(4, 30, seed=5), [2, 7, 21]
    value = number(answer(function, before, after, words))
    logs = [x.log_softmax(-1)[:, words] for x in (before, after)]
    wanted = float(solve_output_score(before, after, words))
    wrong_if(near(value, -wanted), "the sign is turned: after minus before.")
    raw = (after[:, words] - before[:, words]).mean()
    wrong_if(
        near(value, raw) or near(value, (after[:, words].logsumexp(-1) - before[:, words].logsumexp(-1)).mean()),
        "logits rise when all others rise too: apply log_softmax over the vocabulary first.",
    )
    wrong_if(near(value, (logs[1] - logs[0]).mean()), "this is the mean over words: *add* their probabilities first.")
    wrong_if(
        near(value, (logs[1].exp().sum(-1) - logs[0].exp().sum(-1)).mean()),
        "this is a difference of probabilities: from .001 to .01 is a large step, and would hardly count.",
    )
    ratio = (logs[1].exp().sum(-1).mean() / logs[0].exp().sum(-1).mean()).log()
    wrong_if(near(value, ratio), "the mean over prompts comes last: first the rise for each prompt.")
    wrong_if(not near(value, wanted), f"the score is {value:.3f}, and should be {wanted:.3f}.")


# --- D: repetition over a set -------------------------------------------------------------------------


def solve_distinct_2(answers: Sequence[str]) -> float:
    """Share of different word pairs among the pairs of all answers together; pairs never cross two answers."""
    pairs: list[tuple[str, ...]] = []
    for text in answers:
        words = text.lower().split()
        pairs += [tuple(words[i : i + 2]) for i in range(len(words) - 1)]
    return len(set(pairs)) / len(pairs)


@checker
def check_distinct_2(function: Function) -> None:
    """A set whose answers are the same sentence scores low, though each by itself repeats nothing."""
    texts = ["I am the bridge", "i am the bridge of fog", "Fog", "tea is hot"]
    value = number(answer(function, texts))
    words = [text.lower().split() for text in texts]
    each = [len(set(pairwise(w))) / (len(w) - 1) for w in words if len(w) > 1]
    wrong_if(near(value, sum(each) / len(each)), "each answer by itself repeats nothing: pool the pairs of all.")
    flat = [word for w in words for word in w]
    crossed = list(pairwise(flat))
    wrong_if(
        near(value, len(set(crossed)) / len(crossed)),
        "pairs run from the end of one answer into the next: take the pairs of each answer, then pool.",
    )
    wrong_if(near(value, len(set(flat)) / len(flat)), "these are single words, not pairs.")
    cased = [pair for text in texts for w in [text.split()] for pair in pairwise(w)]
    wrong_if(near(value, len(set(cased)) / len(cased)), "'I am' and 'i am' are one pair: lower the case.")
    wrong_if(not near(value, 7 / 10), f"seven of ten pairs are different; you have {value:.3f}.")


# --- E: late mentions ---------------------------------------------------------------------------------


def solve_mentioned_later(ids: Sequence[int], phrase: Sequence[int], start: int) -> bool:
    """Does the whole phrase stand in a text from token ``start`` on?"""
    later = list(ids)[start:]
    return any(later[i : i + len(phrase)] == list(phrase) for i in range(len(later)))


@checker
def check_mentioned_later(function: Function) -> None:
    """The phrase counts as a whole, in order, and only if all of it comes after the beginning."""
    cases: list[tuple[list[int], bool, str]] = [
        ([5, 6, 1, 2, 3, 4, 8, 9, 7], False, "the phrase stands at the very beginning: that may be learned by heart."),
        ([1, 2, 3, 4, 8, 5, 6, 7], True, "the phrase that begins right at `start` + 1 was missed."),
        ([1, 2, 3, 4, 5, 6], True, "the phrase that begins right at token `start` is late enough, and was missed."),
        ([1, 2, 3, 5, 6, 9], False, "the phrase begins before `start`: all of it has to come later."),
        ([1, 2, 3, 4, 6, 5], False, "its tokens are there in another order: that is no mention."),
        ([1, 2, 3, 4, 5, 9, 6], False, "its tokens are there, and not side by side."),
        ([1, 2], False, "a text that is shorter than `start` mentions nothing later."),
    ]
    for ids, wanted, words in cases:
        found = answer(function, ids, [5, 6], 4)
        wrong_if(bool(found) is not wanted, f"{ids}, phrase [5, 6], start 4: {words}")


# --- F: enrichment ------------------------------------------------------------------------------------


def solve_enrichment(
    reads: Bool[Tensor, " d_sae"], writes: Bool[Tensor, " d_sae"], may: Bool[Tensor, " d_sae"]
) -> Float[Tensor, ""]:
    """How many times as often as by chance the writers are readers, among the features that could be chosen."""
    share = reads[may & writes].float().mean()
    return share / reads[may].float().mean()


@checker
def check_enrichment(function: Function) -> None:
    """The base rate is that of the features which the rule could choose, not of all."""
    draw = torch.Generator().manual_seed(6)
    reads = torch.rand(400, generator=draw) < 0.1
    may = torch.rand(400, generator=draw) < torch.where(reads, 0.3, 0.9)  # readers were mostly excluded
    writes = torch.rand(400, generator=draw) < torch.where(reads, 0.5, 0.1)
    value, wanted = number(answer(function, reads, writes, may)), float(solve_enrichment(reads, writes, may))
    among = reads[may & writes].float().mean()
    wrong_if(near(value, among), "this is a share, without the base rate: divide by the readers' share.")
    wrong_if(
        near(value, among / reads.float().mean()),
        "the base rate is that of all features, the excluded ones too: take it among those that may be chosen.",
    )
    wrong_if(
        near(value, reads[writes].float().mean() / reads.float().mean()),
        "writers that the rule excluded are counted: only those that may be chosen.",
    )
    wrong_if(near(value, 1 / wanted), "this is upside down: the writers' share over the base rate.")
    wrong_if(not near(value, wanted), f"the enrichment is {value:.3f}, and should be {wanted:.3f}.")
