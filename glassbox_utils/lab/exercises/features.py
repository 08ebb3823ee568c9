"""Exercises of notebook 03: BatchTopK, a gradient by hand, splicing, loss recovered, dead features, a test of words."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glassbox_utils.lab.exercises import answer, checker, near, number, tensor, wrong_if

Function = Callable[..., Any]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- A: BatchTopK -------------------------------------------------------------------------------------


def solve_batch_topk(hidden: Float[Tensor, "token d_sae"], k: int) -> Float[Tensor, "token d_sae"]:
    """The k largest values for each token *on average*, wherever they stand, none below zero; zero elsewhere."""
    values, chosen = hidden.flatten().topk(k * len(hidden))
    return torch.zeros_like(hidden.flatten()).scatter(0, chosen, values.relu()).view_as(hidden)


@checker
def check_batch_topk(function: Function) -> None:
    """k times the number of tokens over the whole batch, in their places, by value, and never below zero."""
    hidden, k = _random(9, 12, seed=1), 3
    hidden[8] = -hidden[8].abs()  # a token to which nothing applies
    hidden[0] = hidden[0].abs() + 1.5  # and one to which nearly all does
    hidden[0, 5] = -9.0
    found = answer(function, hidden, k)
    shape = tuple(getattr(found, "shape", ()))
    wrong_if(shape in ((9, k), (9 * k,)), "these are the values alone: put them back where they were, zero elsewhere.")
    value, wanted = tensor(found, (9, 12)), solve_batch_topk(hidden, k)
    by_token = torch.zeros_like(hidden).scatter(1, hidden.topk(k, dim=1).indices, hidden.topk(k, dim=1).values.relu())
    wrong_if(
        near(value, by_token),
        "each token has k of its own (that is TopK): here a token may have more, if another one has fewer.",
    )
    over_all = hidden * (hidden >= hidden.flatten().topk(k).values[-1])
    wrong_if(
        near(value, over_all), f"only {k} are left in the whole batch: k for each token on average, k * len(hidden)."
    )
    by_feature = torch.zeros_like(hidden).scatter(0, hidden.topk(k, dim=0).indices, hidden.topk(k, dim=0).values.relu())
    wrong_if(near(value, by_feature), "each feature kept its best k tokens: choose among all numbers of the batch.")
    wrong_if(bool((value < -1).any()), "the largest by size were kept: a strong negative number is no activity.")
    short = _random(4, 6, seed=9) - 2.0
    wrong_if(
        bool((tensor(answer(function, short, k), (4, 6)) < 0).any()),
        "a negative value came through: where few numbers are positive, the k-th largest is below zero. Apply relu.",
    )
    wrong_if(
        near(value.bool().float(), wanted.bool().float()) and not near(value, wanted),
        "the right places, with other values: those that are kept stay what they were.",
    )
    wrong_if(not near(value, wanted), f"these are not the {k * 9} largest values of the batch in their own places.")


# --- B: a gradient by hand ----------------------------------------------------------------------------


def solve_decoder_gradient(
    x: Float[Tensor, "token d_model"],
    code: Float[Tensor, "token d_sae"],
    W_dec: Float[Tensor, "d_sae d_model"],
    b_dec: Float[Tensor, " d_model"],
) -> Float[Tensor, "d_sae d_model"]:
    """Gradient of the loss (squared error, summed over dimensions, averaged over tokens) by the decoder's rows."""
    return 2 / len(x) * code.mT @ (code @ W_dec + b_dec - x)


@checker
def check_decoder_gradient(function: Function) -> None:
    """2 over the number of tokens, times each unit's activity times the error; the bias is part of the error."""
    x, code, rows, bias = _random(7, 6, seed=2), _random(7, 9, seed=3).relu(), _random(9, 6, seed=4), _random(6, seed=5)
    code[:, 4] = 0  # a unit that is silent on all tokens
    found = answer(function, x, code, rows, bias)
    wrong_if(tuple(getattr(found, "shape", ())) == (6, 9), "this is transposed: one row for each unit, as W_dec has.")
    value, wanted = tensor(found, rows.shape), solve_decoder_gradient(x, code, rows, bias)
    error = code @ rows + bias - x
    wrong_if(near(value, -wanted), "the sign is turned: the gradient points to where the loss *rises*.")
    wrong_if(near(value, wanted / 2), "the 2 of the square is missing.")
    wrong_if(near(value, wanted * len(x)), "this is the sum over tokens: the loss is their average.")
    wrong_if(near(value, wanted / 6), "this is averaged over dimensions too: the loss sums over them.")
    wrong_if(near(value, 2 / len(x) * code.mT @ (error - bias)), "the decoder's bias is missing in the reconstruction.")
    wrong_if(
        bool((value[4] != 0).any()),
        "unit 4 is silent at every token, and its row changes nothing: its gradient is zero.",
    )
    wrong_if(not near(value, wanted), "this is not the gradient. Compare with what backward() leaves in W_dec.grad.")


# --- C: splicing --------------------------------------------------------------------------------------


def solve_spliced(
    x: Float[Tensor, "row pos d_model"], rebuilt: Float[Tensor, "row pos d_model"], median_norm: float
) -> Float[Tensor, "row pos d_model"]:
    """Reconstructions in place of activations, but for first tokens and norms above three times the median."""
    keep = x.norm(dim=-1) > 3 * median_norm
    keep[:, 0] = True
    return torch.where(keep[..., None], x, rebuilt)


@checker
def check_spliced(function: Function) -> None:
    """All but massive positions and first tokens, decided by the activation and not by its reconstruction."""
    x, rebuilt = _random(2, 5, 8, seed=6), _random(2, 5, 8, seed=7)
    x[0, 3] *= 40
    rebuilt[1, 2] *= 40
    median = float(x.norm(dim=-1).median())
    found = tensor(answer(function, x, rebuilt, median), x.shape)
    wanted = solve_spliced(x, rebuilt, median)
    wrong_if(near(found, x), "nothing was replaced: the activations are what they were.")
    wrong_if(near(found, torch.where(near_mask(wanted, x)[..., None], rebuilt, x)), "kept and replaced are exchanged.")
    wrong_if(
        near(found, rebuilt),
        "everything was replaced, massive positions too: an SAE that never met them destroys the model there.",
    )
    wrong_if(
        not near(found[:, 0], x[:, 0]) and near(found[:, 1:], wanted[:, 1:]),
        "the first token of each row was replaced: it is where attention rests, and stays as it is.",
    )
    wrong_if(
        near(found[0, 3], rebuilt[0, 3]),
        "a massive position was replaced: leave alone whatever has more than three times the median norm.",
    )
    wrong_if(
        near(found[1, 2], x[1, 2]) and near(found[0], wanted[0]),
        "a position was left alone because its *reconstruction* is long: the norm of the activation decides.",
    )
    wrong_if(not near(found, wanted), "other positions than those of first tokens and massive norms were left alone.")


def near_mask(a: Float[Tensor, "row pos d_model"], b: Float[Tensor, "row pos d_model"]) -> Tensor:
    """Boolean [row, pos]: where two activations are the same."""
    return ((a - b).abs() < 1e-5).all(-1)


# --- D: loss recovered --------------------------------------------------------------------------------


def solve_loss_recovered(ce: float, ce_spliced: float, ce_mean: float) -> float:
    """Of the loss that ablation to the mean costs, the share that splicing avoids."""
    return (ce_mean - ce_spliced) / (ce_mean - ce)


@checker
def check_loss_recovered(function: Function) -> None:
    """1 for what loses nothing, 0 for the mean, below 0 for what is worse."""
    for ce, spliced, mean in ((3.49, 3.81, 9.2), (3.0, 9.5, 7.0)):
        value, wanted = number(answer(function, ce, spliced, mean)), solve_loss_recovered(ce, spliced, mean)
        wrong_if(
            near(value, 1 - wanted),
            "that is the share that is *lost*: 1 is for an SAE that changes nothing. 1 minus it.",
        )
        wrong_if(
            near(value, ce / spliced) or near(value, 1 - (spliced - ce) / ce),
            "that compares with the model's own loss alone, which flatters: the scale runs from the mean (0) to the "
            "unchanged model (1).",
        )
        wrong_if(
            near(value, (mean - spliced) / mean),
            "the scale ends at a loss of 0, which no model reaches: divide by ce_mean - ce.",
        )
        wrong_if(
            wanted < 0 and near(value, 0.0),
            "it was cut off at 0: an SAE can be worse than the mean, and a reader should see that.",
        )
        wrong_if(near(value, 100 * wanted), "that is in per cent: give the share.")
        wrong_if(not near(value, wanted), f"for {ce}, {spliced} and {mean} it is {wanted:.3f}, not {value:.3f}.")


# --- E: dead features ---------------------------------------------------------------------------------


def solve_dead_features(code: Float[Tensor, "row pos d_sae"]) -> Int[Tensor, " dead"]:
    """The numbers of the features that are zero at every token."""
    return (code == 0).flatten(0, -2).all(0).nonzero()[:, 0]


@checker
def check_dead_features(function: Function) -> None:
    """Never active at any token; numbers, not a mask or a count."""
    code = _random(3, 4, 10, seed=8).relu()
    code[..., [2, 7]] = 0
    code[..., 5] = 0
    code[1, 2, 5] = 1e-6  # hardly ever, hardly at all, and alive
    code[0, 0] = 0
    found = answer(function, code)
    wrong_if(
        not isinstance(found, Tensor) and not isinstance(found, list | tuple),
        "that is a count: return which features are dead, their numbers.",
    )
    listed = torch.as_tensor(found)
    wrong_if(listed.ndim == 0, "that is a count or a share: return which features are dead, their numbers.")
    wrong_if(
        listed.dtype == torch.bool or (len(listed) == 10 and int(listed.max()) < 2),
        "that is a mask: return the numbers of the features, with nonzero().",
    )
    if listed.ndim == 2 and listed.shape[1] == 1:
        listed = listed[:, 0]
    wrong_if(listed.ndim != 1, f"the answer has shape {tuple(listed.shape)}: give one number for each dead feature.")
    ours, alive = set(listed.tolist()), set(range(10)) - {2, 7}
    wrong_if(ours == alive, "these are the features that live.")
    wrong_if(
        ours >= {2, 7} and len(ours) > 3,
        "features count as dead here that are only silent at some token: dead is one that is silent at *all* of them.",
    )
    wrong_if(
        ours == {2, 5, 7},
        "feature 5 fires once, weakly: rare or weak is not dead. Compare with 0, not with a threshold.",
    )
    wrong_if(ours != {2, 7}, f"the dead ones here are 2 and 7, not {sorted(ours)}.")


# --- F: a description put to the test -----------------------------------------------------------------


def solve_detection_score(active: Float[Tensor, " text"], silent: Float[Tensor, " other"]) -> float:
    """Chance that a text on which the unit is active scores above one on which it is silent; ties count half."""
    above = (active[:, None] > silent[None]).float()
    ties = (active[:, None] == silent[None]).float()
    return float((above + 0.5 * ties).mean())


@checker
def check_detection_score(function: Function) -> None:
    """All pairs, ties half, .5 for a description that says nothing."""
    nothing = number(answer(function, torch.zeros(4), torch.zeros(6)))
    active, silent = torch.tensor([0.0, 2.0, 3.0, 0.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 0.0, 9.0, 0.0, 0.0])
    value, wanted = number(answer(function, active, silent)), solve_detection_score(active, silent)
    above = (active[:, None] > silent[None]).float()
    wrong_if(near(nothing, 0.0) and near(value, number(above.mean())), "ties count half: a description whose words "
             "stand in no text at all scores 0 everywhere, and that is chance, .5.")  # fmt: skip
    wrong_if(
        near(nothing, 1.0),
        "ties count fully here: a description that says nothing would be perfect. They count half.",
    )
    wrong_if(near(value, 1 - wanted), "the sides are exchanged: active above silent.")
    wrong_if(
        near(value, number(active.mean() - silent.mean())) or near(value, number(active.mean() > silent.mean())),
        "means are compared: one text of a huge score decides them. Compare every active text with every silent one.",
    )
    wrong_if(not near(nothing, 0.5), "a description that gives every text the same score has to come out at .5.")
    wrong_if(not near(value, wanted), f"over all pairs it is {wanted:.3f}, not {value:.3f}.")
