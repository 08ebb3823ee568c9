"""Exercises of notebook 06: patch a head, take a share, draw a fair control, hold at the mean, resample, judge."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glassbox_utils.core.statistics import Interval
from glassbox_utils.decisions import locate
from glassbox_utils.lab.exercises import WrongError, answer, checker, near, number, tensor, wrong_if

Answer = Callable[..., Any]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- 1: one head's output from another run ------------------------------------------------------------


@checker
def check_head_patch(function: Answer) -> None:
    """``head_patch(z, donor, head, d_head)``: [batch, pos, heads * d_head], one head's numbers from the donor."""
    z, donor, d_head = _random(2, 3, 12), _random(2, 3, 12, seed=1), 4
    for head in (1, 2, 0):
        found = tensor(answer(function, z, donor, head, d_head), z.shape)
        columns = slice(head * d_head, (head + 1) * d_head)
        wanted = z.clone()
        wanted[..., columns] = donor[..., columns]
        other = donor.clone()
        other[..., columns] = z[..., columns]
        single = z.clone()
        single[..., head] = donor[..., head]
        last = z.clone()
        last[:, -1, columns] = donor[:, -1, columns]
        wrong_if(near(found, z), f"nothing is changed: head {head} should hold the donor's numbers.")
        wrong_if(near(found, donor), "all heads are the donor's. Only one should be.")
        wrong_if(near(found, other), "it is the wrong way round: one head should be the donor's, the others z's.")
        wrong_if(near(found, single), f"one number is replaced. A head is {d_head} numbers, from head * d_head on.")
        wrong_if(near(found, last), "only the last position is replaced. Here every position is.")
        right = (found - wanted).abs().amax((0, 1)) < 1e-4
        if not right.all():
            raise WrongError(f"columns {(~right).nonzero().flatten().tolist()} are not what they should be for head "
                             f"{head}, whose columns are {columns.start} to {columns.stop - 1}.")  # fmt: skip


def solve_head_patch(z: Tensor, donor: Tensor, head: int, d_head: int) -> Tensor:
    out = z.clone()
    columns = slice(head * d_head, (head + 1) * d_head)
    out[..., columns] = donor[..., columns]
    return out


# --- 2: the share of a gap ----------------------------------------------------------------------------


@checker
def check_carried(function: Answer) -> None:
    """``carried(own, donor, patched)``: [n] logits each; the share of the mean gap that the patch brings."""
    own = torch.tensor([-2.0, 0.5, 1.0, -1.0])
    donor = own + torch.tensor([2.0, 0.1, 3.0, 1.0])  # a pair with hardly a gap is among them
    patched = own + torch.tensor([1.5, 0.3, 1.5, 0.9])
    found = number(answer(function, own, donor, patched))
    moved, gap = patched - own, donor - own
    wrong_if(near(found, (moved / gap).mean()), "this is the mean of the pairs' own shares. The second pair has "
             "hardly a gap, so that its share is 3 and rules the mean: divide mean by mean.")  # fmt: skip
    wrong_if(near(found, moved.mean()), "this is how far the patch moves the logits. Divide by the gap.")
    wrong_if(near(found, (donor - patched).mean() / gap.mean()), "this is the share that is left. Count what came.")
    wrong_if(near(found, -moved.mean() / gap.mean()), "the sign is wrong: the patch moves towards the donor.")
    wrong_if(near(found, patched.mean() / donor.mean()), "without the own logits this is a ratio of two scores, not "
             "of two changes.")  # fmt: skip
    wrong_if(not near(found, moved.mean() / gap.mean()), f"the answer is {found:.3f}, and should be "
             f"{float(moved.mean() / gap.mean()):.3f} for own {own.tolist()}, donor {donor.tolist()} and patched "
             f"{patched.tolist()}.")  # fmt: skip


def solve_carried(own: Tensor, donor: Tensor, patched: Tensor) -> Tensor:
    return (patched - own).mean() / (donor - own).mean()


# --- 3: a control that could have carried it ----------------------------------------------------------


@checker
def check_like_units(function: Answer) -> None:
    """``like_units(activity, chosen, rng)``: as many other units, of about the same activity, drawn at random."""
    activity = torch.cat([_random(400).abs(), 20 + _random(30, seed=1).abs()])  # most are quiet, thirty are loud
    chosen = [400, 407, 415, 3, 9]
    draws = []
    for seed in range(8):
        found = answer(function, activity, chosen, np.random.default_rng(seed))
        try:
            drawn = [int(i) for i in found]
        except (TypeError, ValueError):
            raise WrongError(f"the answer is {found!r:.80}, and should be a list of numbers of units.") from None
        wrong_if(len(drawn) != len(chosen), f"{len(drawn)} units are drawn for {len(chosen)} chosen ones.")
        wrong_if(not all(0 <= i < len(activity) for i in drawn), f"there are units 0 to {len(activity) - 1} only.")
        wrong_if(bool(set(drawn) & set(chosen)), "a chosen unit is among the random ones: a control holds nothing of "
                 "what it excludes.")  # fmt: skip
        wrong_if(len(set(drawn)) < len(drawn), "a unit is drawn twice, so that fewer units are compared.")
        draws.append(drawn)
    loud = float(np.mean([[float(activity[i]) > 10 for i in drawn] for drawn in draws]))
    wrong_if(loud < 0.5, "three of the five chosen units are loud, and hardly any of yours: quiet units could not "
             "have carried anything. Draw from those of about the same activity.")  # fmt: skip
    wrong_if(loud > 0.7, "two of the five chosen units are quiet, and hardly any of yours. Match each one.")
    wrong_if(all(sorted(d) == sorted(draws[0]) for d in draws), "the units are the same for every seed: draw them "
             "with rng, so that the control has a spread.")  # fmt: skip


def solve_like_units(activity: Tensor, chosen: Sequence[int], rng: np.random.Generator) -> list[int]:
    drawn: list[int] = []
    for unit in chosen:
        nearest = (activity - activity[unit]).abs().argsort().tolist()
        free = [i for i in nearest if i not in chosen and i not in drawn]
        drawn.append(free[rng.integers(10)])
    return drawn


# --- 4: mean ablation ---------------------------------------------------------------------------------


@checker
def check_hold_at_mean(function: Answer) -> None:
    """``hold_at_mean(x, index, mean)``: [batch, pos, neurons] with some neurons at their mean over other texts."""
    x, index, mean = _random(2, 3, 6), [4, 1], torch.tensor([7.0, -5.0])
    found = tensor(answer(function, x, index, mean), x.shape)
    wanted = x.clone()
    wanted[..., index] = mean
    zero = x.clone()
    zero[..., index] = 0.0
    inside = x.clone()
    inside[..., index] = x[..., index].mean((0, 1))
    swapped = x.clone()
    swapped[..., sorted(index)] = mean
    added = x.clone()
    added[..., index] += mean
    last = x.clone()
    last[:, -1, index] = mean
    wrong_if(near(found, x), "nothing is changed.")
    wrong_if(near(found, zero), "this is zero ablation. A neuron may never be 0 in real text; its mean is what it is "
             "when nothing is known.")  # fmt: skip
    wrong_if(near(found, inside), "this is the mean over this very batch, which tells of the people in it. Use the "
             "one that is given: it comes from other people.")  # fmt: skip
    wrong_if(near(found, swapped), "the means are given in the order of index, which is [4, 1] here.")
    wrong_if(near(found, added), "the mean is added to the value. It should stand in its place.")
    wrong_if(near(found, last), "only the last position is held. Hold every one: the name stands earlier.")
    wrong_if(not near(found, wanted), "the neurons of index should be at their means, and all others as they were.")


def solve_hold_at_mean(x: Tensor, index: Sequence[int], mean: Tensor) -> Tensor:
    out = x.clone()
    out[..., list(index)] = mean.type_as(x)
    return out


# --- 5: what is resampled -----------------------------------------------------------------------------


@checker
def check_interval(function: Answer) -> None:
    """``interval(values, clusters, rng)``: (low, high) of the mean, 95 %, with whole pairs of names drawn."""
    rng = np.random.default_rng(0)
    names = [f"pair {i}" for i in range(12) for _ in range(20)]
    values = np.repeat(rng.normal(1.5, 0.5, 12), 20) + rng.normal(0, 0.1, 240)  # the name decides, hardly the case
    found = answer(function, values, names, np.random.default_rng(1))
    try:
        low, high = (float(x) for x in found)
    except (TypeError, ValueError):
        raise WrongError(f"the answer is {found!r:.80}, and should be two numbers: low and high.") from None
    wanted, cases = (solve_interval(values, some, np.random.default_rng(2)) for some in (names, list(range(240))))
    wrong_if(not low <= values.mean() <= high, f"the mean {values.mean():.2f} is not between {low:.2f} and {high:.2f}.")
    width, right, narrow = high - low, wanted[1] - wanted[0], cases[1] - cases[0]
    wrong_if(width < 2 * narrow, f"the interval is {width:.2f} wide. Twenty cases share a pair of names and are no "
             f"twenty new people: draw whole pairs of names, and it is about {right:.2f}.")  # fmt: skip
    wrong_if(width > 2 * right, f"the interval is {width:.2f} wide: this is the spread of the values (or of single "
             f"names), not of their mean. It should be about {right:.2f}.")  # fmt: skip
    wrong_if(not 0.75 < width / right < 1.3, f"the interval is {width:.2f} wide, and should be about {right:.2f}: draw "
             "as many pairs as there are, with replacement, 1,000 times; take 2.5 % off at both ends.")  # fmt: skip


def solve_interval(values: Any, clusters: Sequence[Any], rng: np.random.Generator) -> tuple[float, float]:
    names = list(dict.fromkeys(clusters))
    groups = [values[np.array(clusters) == name] for name in names]
    means = []
    for _ in range(2000):
        drawn = rng.integers(0, len(groups), len(groups))
        means.append(np.concatenate([groups[i] for i in drawn]).mean())
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


# --- 6: specific? -------------------------------------------------------------------------------------

CASES: tuple[tuple[float, float, float, str], ...] = (
    (-0.05, 0.10, 0.8, "specific"), (0.55, 0.95, 0.8, "not specific"), (0.25, 0.60, 0.8, "undecided"),
    (-0.95, -0.60, 0.8, "not specific"), (-0.60, 0.05, 0.8, "undecided"), (-0.10, 0.30, 0.4, "undecided"),
)  # fmt: skip


@checker
def check_specific(function: Answer) -> None:
    """``specific(low, high, own)``: the interval of the share that units carry of another effect, and their own."""
    allowed = ("specific", "not specific", "undecided")
    for low, high, own, wanted in CASES:
        found = answer(function, low, high, own)
        wrong_if(found not in allowed, f"the answer is {found!r:.60}. Allowed: {', '.join(allowed)}.")
        if found == wanted:
            continue
        shown = f"[{low}, {high}] with an own share of {own}"
        wrong_if(low < 0 and wanted == "not specific", f"{shown} is {wanted!r}: units that carry most of another "
                 "effect *backwards* are no more specific than those that carry it forwards.")  # fmt: skip
        wrong_if(low < 0 and wanted == "undecided" and high < own / 2, f"{shown} is {wanted!r}: look at both sides "
                 "of nothing.")  # fmt: skip
        wrong_if(wanted == "undecided" and found == "specific" and own < 0.5, f"{shown} is {wanted!r}: the bar is half "
                 "of the own share, not a fixed number.")  # fmt: skip
        wrong_if(wanted == "undecided", f"{shown} is {wanted!r}: an interval that holds the bar settles nothing, "
                 "wherever its middle is.")  # fmt: skip
        raise WrongError(f"{shown} is {wanted!r}, and your function says {found!r}.")
    for low, high, own, wanted in CASES:  # the library says the same
        assert locate.verdict(Interval((low + high) / 2, low, high, 9), own) == wanted


def solve_specific(low: float, high: float, own: float) -> str:
    bar = own / 2
    if -bar < low and high < bar:
        return "specific"
    return "not specific" if low > bar or high < -bar else "undecided"
