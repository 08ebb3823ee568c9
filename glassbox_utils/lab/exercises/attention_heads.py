"""Exercises of notebook 01: attention by hand, a sink removed, a head ablated, an answer read, a ceiling, recency."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.lab.exercises import answer, checker, near, number, tensor, wrong_if

Function = Callable[..., Any]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- A: the pattern -----------------------------------------------------------------------------------


def solve_pattern(q: Float[Tensor, "pos d_head"], k: Float[Tensor, "pos d_head"]) -> Float[Tensor, "pos pos"]:
    """Attention of one head: scores, scaled, masked, softmax over what is looked at."""
    scores = q @ k.T / q.shape[-1] ** 0.5
    later = torch.ones_like(scores).triu(1).bool()
    return scores.masked_fill(later, float("-inf")).softmax(-1)


@checker
def check_pattern(function: Function) -> None:
    """Mask before the softmax, scale by the root of the width, softmax over the keys."""
    q, k = 2 * _random(6, 16, seed=1), 2 * _random(6, 16, seed=2)
    found, wanted = tensor(answer(function, q, k), (6, 6)), solve_pattern(q, k)
    wrong_if(near(found, wanted.T), "rows and columns are exchanged: rows are queries. Multiply q @ k.T, not k @ q.T.")
    ahead = bool((found.triu(1).abs() > 1e-6).any())
    scores = q @ k.T
    wrong_if(
        ahead and not near(found.sum(-1), torch.ones(6)),
        "a row does not add up to 1: the softmax runs over what is looked at, the last dimension.",
    )
    wrong_if(ahead, "a token looks at later ones: everything right of the diagonal has to be 0.")
    wrong_if(
        not near(found.sum(-1), torch.ones(6)),
        "the rows do not add up to 1: put minus infinity in place of the masked scores *before* the softmax, not 0 "
        "in place of the weights after it.",
    )
    unscaled = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf")).softmax(-1)
    wrong_if(near(found, unscaled), "the scores are not scaled: divide them by the square root of d_head.")
    wrong_if(not near(found, wanted), "the weights differ from softmax(q · k / √d_head) over the tokens so far.")


# --- B: without the sink ------------------------------------------------------------------------------


def solve_without_first(pattern: Float[Tensor, "*place dst src"]) -> Float[Tensor, "*place dst src"]:
    """The first column set to zero, the rows after the first scaled to 1 again."""
    rest = pattern.clone()
    rest[..., 0] = 0
    return rest / rest.sum(-1, keepdim=True).clamp_min(1e-9)


@checker
def check_without_first(function: Function) -> None:
    """The column goes, the rest keeps its proportions, rows are whole again."""
    pattern = _random(2, 3, 5, 5, seed=3).masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf")).softmax(-1)
    found = tensor(answer(function, pattern), pattern.shape)
    rest = found[..., 1:, :]
    wrong_if(
        bool(found[..., 0, :].abs().max() == 0 and rest[..., 0].abs().max() > 0),
        "the first token is still looked at: zero the first *column* (what is looked at), [..., 0], not the first row.",
    )
    wrong_if(bool(found[..., 0].abs().max() > 0), "the first column is not zero everywhere: set [..., 0] to 0.")
    wrong_if(
        not near(rest.sum(-1), torch.ones(2, 3, 4)),
        "the rows after the first do not add up to 1: divide each by what is left of it.",
    )
    wrong_if(
        not near(found, solve_without_first(pattern)),
        "what is left has other proportions than before: divide by the sum of the row, no second softmax.",
    )


# --- C: mean ablation ---------------------------------------------------------------------------------


def solve_mean_ablated(
    z: Float[Tensor, "batch pos head d_head"], means: Float[Tensor, "head d_head"], head: int
) -> Float[Tensor, "batch pos head d_head"]:
    """One head's output at the last position replaced by its mean; everything else as it was."""
    z = z.clone()
    z[:, -1, head] = means[head]
    return z


@checker
def check_mean_ablated(function: Function) -> None:
    """One head, one position, its own mean."""
    z, means, head = _random(2, 4, 3, 5, seed=4), _random(3, 5, seed=5), 1
    found = tensor(answer(function, z, means, head), z.shape)
    here, other_heads = found[:, -1, head], [h for h in range(3) if h != head]
    wrong_if(near(here, torch.zeros(2, 5)), "the head is set to zero, and should be set to its mean: means[head].")
    wrong_if(near(found, z), "nothing has changed: the head's output is what it was.")
    wrong_if(
        not near(found[:, -1, other_heads], z[:, -1, other_heads]),
        "other heads have changed too: replace z[..., head, :] alone.",
    )
    wrong_if(
        not near(found[:, :-1], z[:, :-1]),
        "earlier positions have changed too: the answer is read off at the last one, z[:, -1].",
    )
    wrong_if(
        near(here, z[:, -1].mean(1)) or near(here, z[:, :, head].mean((0, 1)).expand(2, -1)),
        "the mean was taken over this very prompt: use `means`, which comes from other prompts.",
    )
    wrong_if(not near(here, means[head].expand(2, -1)), "the head's output at the last position is not means[head].")


# --- D: the answer ------------------------------------------------------------------------------------


def solve_logit_difference(
    logits: Float[Tensor, "batch pos vocab"], right: Float[Tensor, " batch"], wrong: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Right minus wrong, after the last token of each prompt."""
    rows = torch.arange(len(logits))
    return logits[rows, -1, right] - logits[rows, -1, wrong]


@checker
def check_logit_difference(function: Function) -> None:
    """Last position, right minus wrong, logits and not probabilities, a prompt's own answer."""
    logits = 2 * _random(3, 4, 7, seed=6)
    right, wrong = torch.tensor([1, 5, 2]), torch.tensor([3, 0, 6])
    found = answer(function, logits, right, wrong)
    every = logits[:, -1][:, right] - logits[:, -1][:, wrong]
    shape = tuple(getattr(found, "shape", ()))
    wrong_if(
        shape == (3, 3) and near(found, every),
        "each prompt got the answers of all: index rows and tokens together, logits[torch.arange(n), -1, right].",
    )
    value, wanted = tensor(found, (3,)), solve_logit_difference(logits, right, wrong)
    rows, p = torch.arange(3), logits.softmax(-1)
    wrong_if(near(value, -wanted), "the sign is turned round: it is right minus wrong.")
    wrong_if(
        near(value, p[rows, -1, right] - p[rows, -1, wrong]),
        "these are probabilities: they hardly move where the model is sure. Subtract the logits themselves.",
    )
    wrong_if(
        near(value, logits[rows, 0, right] - logits[rows, 0, wrong]),
        "these are the logits after the first token: the answer comes after the last, logits[:, -1].",
    )
    wrong_if(not near(value, wanted), "the values differ from logit(right) − logit(wrong) after the last token.")


# --- E: the ceiling -----------------------------------------------------------------------------------


def solve_ceiling(r_half: float) -> float:
    """Halves to all prompts (Spearman-Brown), then from reliability to the highest correlation (the square root)."""
    return (2 * r_half / (1 + r_half)) ** 0.5


@checker
def check_ceiling(function: Function) -> None:
    """Both steps, in this order."""
    for r in (0.75, 0.3):
        value = number(answer(function, r))
        wrong_if(near(value, r), "that is the reliability of *half* of the prompts: step it up to all of them first.")
        wrong_if(
            near(value, 2 * r / (1 + r)),
            "that is the reliability of all prompts: two noisy copies agree so well. A predictor without noise does "
            "better: take the square root.",
        )
        wrong_if(near(value, r**0.5), "the step from half of the prompts to all of them is missing: 2r / (1 + r).")
        wrong_if(
            near(value, 2 * r**0.5 / (1 + r**0.5)), "the steps are in the wrong order: first 2r / (1 + r), then root."
        )
        wrong_if(not near(value, solve_ceiling(r)), f"for halves that agree at {r} it is not {value:.3f}.")


# --- F: recency or identity ---------------------------------------------------------------------------


def solve_recency_and_identity(table: Float[Tensor, "order noun"]) -> tuple[Tensor, Tensor]:
    """Later minus earlier noun, and doctor minus nurse; each averaged over both orders."""
    (doctor_first, nurse_second), (doctor_second, nurse_first) = table
    recency = ((nurse_second - doctor_first) + (doctor_second - nurse_first)) / 2
    identity = ((doctor_first - nurse_second) + (doctor_second - nurse_first)) / 2
    return recency, identity


@checker
def check_recency_and_identity(function: Function) -> None:
    """Each contrast keeps its own sign in both orders, so that the other one cancels."""
    for seed in (7, 8):
        table = _random(2, 2, seed=seed).abs() / 4
        found = answer(function, table)
        wrong_if(
            (not isinstance(found, tuple | list) and tuple(getattr(found, "shape", ())) != (2,)) or len(found) != 2,
            "return two numbers: recency, identity.",
        )
        recency, identity = (number(x) for x in found)
        r, i = (number(x) for x in solve_recency_and_identity(table))
        wrong_if(near(recency, i) and near(identity, r), "the two are exchanged: recency comes first.")
        wrong_if(
            near(identity, number(table[0, 0] - table[0, 1])),
            "identity was read off one order, where it can't be told from position: average over both.",
        )
        wrong_if(near(recency, 2 * r) and near(identity, 2 * i), "these are sums over the two orders: divide by 2.")
        wrong_if(near(recency, -r), "recency has the wrong sign: later minus earlier noun.")
        wrong_if(near(identity, -i), "identity has the wrong sign: doctor minus nurse.")
        wrong_if(
            not near(recency, r),
            "recency is wrong: in the second row the nurse stands first, so it is doctor minus nurse there.",
        )
        wrong_if(not near(identity, i), "identity is wrong: it is doctor minus nurse in both rows.")
