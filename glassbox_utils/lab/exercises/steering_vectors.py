"""Exercises of notebook 05: a mean difference, a push for each row, a push with a cache, a price, an order, dials."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from glassbox_utils.lab.exercises import answer, checker, near, number, tensor, wrong_if

Function = Callable[..., Any]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- A: difference of means -----------------------------------------------------------------------------


def solve_difference_of_means(
    positive: Float[Tensor, "text pos d_model"],
    real: Bool[Tensor, "text pos"],
    negative: Float[Tensor, "text pos d_model"],
    real_too: Bool[Tensor, "text pos"],
) -> Float[Tensor, " d_model"]:
    """A mean over the real tokens of each text, then over texts; the difference, at length 1."""
    means = []
    for resid, mask in ((positive, real), (negative, real_too)):
        each = (resid * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        means.append(each.mean(0))
    v = means[0] - means[1]
    return v / v.norm()


@checker
def check_difference_of_means(function: Function) -> None:
    """Texts of unequal length, padded with large numbers."""
    a, b = _random(6, 9, 8, seed=1) + 1, _random(6, 9, 8, seed=2)
    lengths, others = torch.tensor([2, 9, 4, 3, 8, 2]), torch.tensor([9, 2, 2, 5, 3, 7])
    at = torch.arange(9)
    masks = at < lengths[:, None], at < others[:, None]
    a, b = (torch.where(m[..., None], x, 20 + x) for m, x in zip(masks, (a, b), strict=True))
    found = tensor(answer(function, a, masks[0], b, masks[1]), (8,))
    wanted = solve_difference_of_means(a, masks[0], b, masks[1])

    def unit(v: Tensor) -> Tensor:
        return v / v.norm()

    wrong_if(near(unit(found), unit(a.mean((0, 1)) - b.mean((0, 1)))), "padding is counted: use the masks.")
    pooled = a[masks[0]].mean(0) - b[masks[1]].mean(0)
    wrong_if(
        near(unit(found), unit(pooled)),
        "long texts count more than short ones: take the mean of each text first, then the mean over the texts.",
    )
    wrong_if(near(unit(found), -wanted), "the sign is turned round: positive minus negative.")
    wrong_if(not near(found, wanted) and near(unit(found), wanted), "the direction is right, its length is not 1.")
    first = unit(a[:, 0].mean(0) - b[:, 0].mean(0))
    wrong_if(near(unit(found), first), "only the first token of each text is read.")
    wrong_if(not near(found, wanted), "the direction differs from the difference of the two means of the texts' means.")


# --- B: a dial for each row -----------------------------------------------------------------------------


def solve_pushed(
    x: Float[Tensor, "row pos d_model"], unit: Float[Tensor, " d_model"], scale: float, alphas: Float[Tensor, " row"]
) -> Float[Tensor, "row pos d_model"]:
    """Each row gets its own strength, at every place, in units of the typical norm."""
    return x + alphas[:, None, None] * scale * unit


@checker
def check_pushed(function: Function) -> None:
    """As many rows as places, so that a wrong axis gives no error."""
    x, scale = _random(4, 4, 6, seed=3), 12.5
    unit, alphas = _random(6, seed=4), torch.tensor([-0.2, 0.0, 0.1, 0.3])
    unit = unit / unit.norm()
    found, push = tensor(answer(function, x, unit, scale, alphas), (4, 4, 6)), alphas[:, None, None] * unit
    wrong_if(near(found, x), "nothing has changed: x is returned as it was.")
    wrong_if(near(found, x + push), "the unit is missing: α counts typical norms, so multiply by scale too.")
    wrong_if(
        near(found, x + alphas[None, :, None] * scale * unit),
        "the strengths run along the places: give each *row* its own, alphas[:, None, None].",
    )
    wrong_if(near(found, x + alphas.mean() * scale * unit), "all rows get the same strength.")
    last = torch.zeros(4, 1)
    last[-1] = 1
    wrong_if(near(found, x + scale * push * last), "only the last place is pushed: here all of them are.")
    wrong_if(near(found, x - scale * push), "the sign is turned round.")
    wrong_if(not near(found, x + scale * push), "the rows differ from x + α · scale · unit.")


# --- C: with a key-value cache --------------------------------------------------------------------------


def solve_push_generated(
    x: Float[Tensor, "row pos d_model"], push: Float[Tensor, " d_model"], past: int, prompt: int
) -> Float[Tensor, "row pos d_model"]:
    """Places are counted from the beginning of the text, not of the pass."""
    place = past + torch.arange(x.shape[1])
    return x + (place >= prompt)[:, None] * push


@checker
def check_push_generated(function: Function) -> None:
    """Passes with and without a cache, prompts of one token and of many."""
    push = _random(5, seed=5)
    for past, length, prompt in ((0, 6, 6), (6, 1, 6), (8, 1, 6), (0, 9, 6), (0, 1, 1), (4, 3, 6)):
        x = _random(2, length, 5, seed=past + length)
        found = tensor(answer(function, x, push, past, prompt), x.shape)
        wanted = solve_push_generated(x, push, past, prompt)
        case = f"a pass of {length} after {past} in the cache, prompt of {prompt}"
        wrong_if(near(found, x) and not near(wanted, x), f"{case}: generated tokens are not pushed. Count `past` too.")
        wrong_if(
            near(found, x + push) and not near(wanted, x + push),
            f"{case}: tokens of the prompt are pushed. The length of a pass does not tell what was generated.",
        )
        wrong_if(not near(found, wanted), f"{case}: other places are pushed than those from {prompt} on.")


# --- D: the price ---------------------------------------------------------------------------------------


def solve_price(plain: Float[Tensor, "pos vocabulary"], steered: Float[Tensor, "pos vocabulary"]) -> Any:
    """KL(plain || steered), in nats, mean over the places."""
    p, q = plain.log_softmax(-1), steered.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


@checker
def check_price(function: Function) -> None:
    """Logits with a constant added to each place: only softmax takes it away."""
    plain = _random(7, 11, seed=6) + torch.arange(7.0)[:, None]
    steered = plain + 0.8 * _random(7, 11, seed=7) + 3
    found, wanted = number(answer(function, plain, steered)), float(solve_price(plain, steered))
    p, q = plain.log_softmax(-1), steered.log_softmax(-1)
    wrong_if(
        near(found, solve_price(steered, plain)), "that is KL(steered || plain): weigh by what the *plain* model says."
    )
    wrong_if(near(found, (p.exp() * (p - q)).sum()), "that is the sum over the places: take the mean.")
    wrong_if(near(found, wanted / 0.6931472, 1e-3), "that is in bits: nats need the natural logarithm.")
    wrong_if(near(found, (p.exp() * (p - q)).mean()), "that is averaged over the vocabulary too: sum there.")
    wrong_if(
        near(found, (p.exp() * (plain - steered)).sum(-1).mean()), "logits are no log-probabilities: log_softmax first."
    )
    wrong_if(near(found, -wanted), "the sign is turned round: a divergence is never negative.")
    wrong_if(not near(found, wanted), "that is not the mean of KL(plain || steered) over the places.")


# --- E: prompt by prompt --------------------------------------------------------------------------------


def solve_ordered(
    minus: Float[Tensor, " prompt"], zero: Float[Tensor, " prompt"], plus: Float[Tensor, " prompt"]
) -> Any:
    """Strictly ordered prompts, as a share."""
    return ((minus < zero) & (zero < plus)).float().mean()


@checker
def check_ordered(function: Function) -> None:
    """Means in order, but only some prompts; some with equal tones."""
    minus = torch.tensor([-0.8, 0.0, -0.5, 0.9, -0.9, 0.0, -0.2, 0.5, -0.7, 0.3])
    zero = torch.tensor([0.2, 0.0, 0.6, 0.1, -0.3, 0.5, 0.4, 0.3, 0.9, 0.0])
    plus = torch.tensor([0.7, 0.6, 0.6, 0.4, 0.5, 0.8, 0.1, 0.3, 0.4, 0.2])
    found, wanted = number(answer(function, minus, zero, plus)), float(solve_ordered(minus, zero, plus))
    wrong_if(near(found, 10 * wanted), "that is the number of prompts: give the share.")
    wrong_if(near(found, ((minus <= zero) & (zero <= plus)).float().mean()), "equal tones are no order: use <, not <=.")
    wrong_if(
        near(found, (minus < plus).float().mean()), "only the ends are compared: the middle has to lie between them."
    )
    wrong_if(near(found, ((minus < zero) | (zero < plus)).float().mean()), "one step is not enough: both must go up.")
    wrong_if(near(found, 1.0), "the *means* are in order: ask each prompt.")
    wrong_if(not near(found, wanted), "that is not the share of prompts with minus < zero < plus.")


# --- F: orthogonal dials --------------------------------------------------------------------------------


def solve_without(a: Float[Tensor, " d_model"], b: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """What remains of a without its part along b, at length 1."""
    rest = a - (a @ b) * b
    return rest / rest.norm()


@checker
def check_without(function: Function) -> None:
    """Two unit vectors with a cosine between 0 and 1."""
    a, b = _random(16, seed=8), _random(16, seed=9)
    a, b = a / a.norm(), (b + a) / (b + a).norm()
    found, wanted = tensor(answer(function, a, b), (16,)), solve_without(a, b)
    wrong_if(near(found, a), "nothing was removed.")
    wrong_if(abs(float(found @ b)) > 1e-4, "there is still a part along b.")
    wrong_if(near(found / found.norm(), wanted) and not near(found, wanted), "the result must have length 1.")
    wrong_if(near(found, -wanted), "the sign is turned round.")
    wrong_if(not near(found, wanted), "that is orthogonal to b, but it is not what remains of a.")
