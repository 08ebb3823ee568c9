"""Exercises of notebook 07: a decision from logits, person and order, ranking, impact, what would be found, a wording.

Typical mistakes are recognised by the numbers that they lead to. No model is needed.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from glassbox_utils.core.devices import array
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.decisions import officer, reading
from glassbox_utils.decisions.fields import phrase
from glassbox_utils.lab.exercises import WrongError, answer, checker, wrong_if

Function = Callable[..., Any]


# --- A -------------------------------------------------------------------------------------------------


def solve_decide(logits: Float[Tensor, "n vocab"], yes: int, no: int) -> tuple[Tensor, Tensor]:
    """The softmax runs over the whole vocabulary."""
    share = logits.softmax(-1)[:, [yes, no]].sum(-1)
    return logits[:, yes] - logits[:, no], share


@checker
def check_decide(function: Function) -> None:
    """A: ``decide(logits [n, vocab], yes, no)`` gives (difference [n] in logits, share [n] of the probability)."""
    logits, yes, no = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0)), 7, 12
    got = answer(function, logits, yes, no)
    wrong_if(
        not isinstance(got, tuple | list) or len(got) != 2,
        f"give two things, (difference, share); this is {type(got).__name__}",
    )
    p = array(logits.softmax(-1))
    difference, two = array(logits[:, yes] - logits[:, no]), array(logits[:, [yes, no]].softmax(-1))
    _compare(
        got[0], difference,
        {
            "the sign is turned round: favourable minus unfavourable, so that a positive number is the favourable one":
                -difference,
            "the difference is one of probabilities; take the logits, before the softmax": p[:, yes] - p[:, no],
            "the difference is one of the two probabilities alone; take the logits": two[:, 0] - two[:, 1],
        },
        "the difference",
    )  # fmt: skip
    _compare(
        got[1], p[:, yes] + p[:, no],
        {
            "the share is always 1: the softmax runs over the two answers alone. It has to run over the whole "
            "vocabulary, or nobody sees that the model would have said something else": np.ones(5),
            "the share is that of the favourable answer only; add the other one": p[:, yes],
            "the share adds logits, which are no probabilities: softmax first": array(logits[:, [yes, no]].sum(-1)),
        },
        "the share",
    )  # fmt: skip


# --- B -------------------------------------------------------------------------------------------------


def solve_two_parts(first: Float[NDArray, " n"], second: Float[NDArray, " n"]) -> tuple[Float[NDArray, " n"], float]:
    """first = person + order, second = person - order."""
    return (first + second) / 2, (first - second).mean() / 2


@checker
def check_two_parts(function: Function) -> None:
    """B: ``two_parts(first, second)`` gives (what the person adds [n], what being named first adds, a number)."""
    rng = np.random.default_rng(0)
    person, order = rng.normal(size=30), 0.8
    a, b = person + order + 0.1 * rng.normal(size=30), person - order + 0.1 * rng.normal(size=30)
    got = answer(function, a, b)
    wrong_if(
        not isinstance(got, tuple | list) or len(got) != 2,
        f"give two things, (person, order); this is {type(got).__name__}",
    )
    wrong_if(np.ndim(got[1]) > 0, "the order's part is one number for all people: take the mean over them")
    half = float((a - b).mean() / 2)
    _compare(
        got[1], half,
        {
            "the order's part is twice too large: being named first adds it, being named second takes it away, and the "
            "difference holds both": 2 * half,
            "the sign of the order's part is turned round: first minus second": -half,
            "the order's part is that of all scores; only what differs between the two wordings is the order's":
                float((a + b).mean() / 2),
        },
        "the order's part",
    )  # fmt: skip
    _compare(
        got[0], (a + b) / 2,
        {
            "the person's part still holds the order: that is the first wording's score alone": a,
            "the person's part still holds the order: that is the second wording's score alone": b,
            "the person's part is a sum of two scores; take their mean": a + b,
            "the person's part is what differs between the wordings, which is the order's": (a - b) / 2,
        },
        "the person's part",
    )  # fmt: skip


# --- C -------------------------------------------------------------------------------------------------


def solve_auc(scores: Float[NDArray, " n"], right: Float[NDArray, " n"]) -> float:
    """Every pair is compared."""
    apart = scores[right == 1][:, None] - scores[right == 0][None]
    return (apart > 0).mean() + (apart == 0).mean() / 2


@checker
def check_auc(function: Function) -> None:
    """C: ``auc(scores [n], right [n] of 0 and 1)``, with ties in half."""
    rng = np.random.default_rng(0)
    right = np.arange(40) % 4 != 0
    scores = np.round(rng.normal(size=40) + 0.7 * right + 0.5, 0)  # whole numbers: many ties
    got = answer(function, scores, right.astype(float))
    above = scores[right][:, None] - scores[~right][None]
    wanted = float(officer.auc(scores, right.astype(float)))
    _compare(
        got, wanted,
        {
            "people with the same score count as nothing; they are half a win": float((above > 0).mean()),
            "people with the same score count as a full win; they are half of one": float((above >= 0).mean()),
            "it is turned round: one minus the right number. Whoever paid back should stand above": 1 - wanted,
            "that is the share of right decisions at the threshold 0; this measure knows no threshold: compare every "
            "person who paid back with every one who did not": float(((scores > 0) == right).mean()),
            "that is a correlation; count pairs": float(np.corrcoef(scores, right)[0, 1]),
        },
        "the number",
    )  # fmt: skip


# --- D -------------------------------------------------------------------------------------------------


def solve_impact_ratio(scores: Float[NDArray, " n"], groups: NDArray) -> float:
    """A rate is the mean of yes and no within a group."""
    rates = [(scores[groups == g] > 0).mean() for g in sorted(set(groups))]
    return min(rates) / max(rates)


@checker
def check_impact_ratio(function: Function) -> None:
    """D: ``impact_ratio(scores [n], groups [n])``: the lowest rate of favourable answers over the highest."""
    rng = np.random.default_rng(0)
    groups = np.array(["a"] * 50 + ["b"] * 20 + ["c"] * 30)
    scores = rng.normal(size=100) + np.where(groups == "a", 0.9, np.where(groups == "b", 0.4, -0.1))
    got = answer(function, scores, groups)
    names = np.unique(groups)
    rate, mean, count = ([f(scores[groups == g]) for g in names] for f in (_rate, np.mean, lambda x: (x > 0).sum()))
    _compare(
        got, min(rate) / max(rate),
        {
            "it is upside down: the lowest rate over the highest, so that it is at most 1": max(rate) / min(rate),
            "that is the difference of the rates; the four-fifths mark is about their ratio": max(rate) - min(rate),
            "that is a ratio of mean scores; count answers (scores above 0) first": min(mean) / max(mean),
            "that is a ratio of numbers of people; groups differ in size: divide by each group's own":
                min(count) / max(count),
            "that is the lowest rate alone; divide it by the highest": min(rate),
        },
        "the ratio",
    )  # fmt: skip


# --- E -------------------------------------------------------------------------------------------------


def solve_smallest(differences: Float[NDArray, " n"]) -> float:
    """1.96 standard errors are found in half of the samples, 1.28 more in nine of ten."""
    return (1.96 + 1.28) * differences.std(ddof=1) / len(differences) ** 0.5


@checker
def check_smallest(function: Function) -> None:
    """E: ``smallest(differences [n])``: the mean difference that a two-sided test at 5 % finds in 90 % of samples."""
    x = 0.3 + 1.7 * np.random.default_rng(0).normal(size=7)  # so few that n and n - 1 differ
    got = answer(function, x)
    error = float(x.std(ddof=1) / math.sqrt(len(x)))
    half, power, one = (float(stats.norm.ppf(q)) for q in (0.975, 0.9, 0.95))
    _compare(
        got, (half + power) * error,
        {
            "the standard deviation is that of these few numbers alone; of a sample it is divided by n - 1: `ddof=1`":
                (half + power) * float(x.std()) / math.sqrt(len(x)),
            "that would be found in half of the samples only: add the 1.28 standard errors for a power of 90 %":
                half * error,
            "the standard error is missing: divide the standard deviation by the root of n":
                (half + power) * error * math.sqrt(len(x)),
            "divide by the root of n, not by n": (half + power) * error / math.sqrt(len(x)),
            "that is the one-sided test; nobody knew beforehand in which direction: 1.96, not 1.64":
                (one + power) * error,
            "that is the mean that was seen; what could have been seen depends on the spread and on n": float(x.mean()),
        },
        "the effect",
        tolerance=0.005,  # 1.28 or 1.2816
    )  # fmt: skip


# --- F -------------------------------------------------------------------------------------------------


def solve_wording() -> dict[str, str]:
    """Every field, both answers, and an opening without a space at its end."""
    facts = "Receipt: {receipt}. Bought {days} days ago for {amount} euros by {customer}."
    return {"chat": f"{facts} Is the money back accepted or rejected?", "opening": "It is"}


@checker
def check_wording(function: Function) -> None:
    """F: ``wording()`` gives a third wording for the template's refunds, as ``chat`` and ``opening`` of a template."""
    import yaml

    got = answer(function)
    wrong_if(
        not isinstance(got, Mapping) or "chat" not in got,
        "give a dictionary with `chat` and `opening`, as in decision.yaml",
    )
    source = yaml.safe_load((reading.DECISIONS / "template" / reading.FILE).read_text(encoding="utf-8"))
    old = [form["chat"] for form in source["templates"].values()]
    source["templates"]["yours"] = dict(got)
    with tempfile.TemporaryDirectory() as room:
        folder = reading.new_decision(Path(room) / "refunds")
        (folder / reading.FILE).write_text(yaml.safe_dump(source, sort_keys=False), encoding="utf-8")
        try:
            form = reading.load_decision(folder).templates["yours"]
        except GlassboxError as reason:
            raise WrongError(" ".join(str(reason).replace(f"{folder}/", "").split())) from None
    words = phrase(f"{form.system or ''} {form.words} {form.opening}")
    named = [one.strip() for one in source["answers"] if phrase(one) in words]  # as words, not as parts of words
    lead = f"it names {named[0]} alone, which puts the answer into its mouth" if named else "it names no answer"
    wrong_if(len(named) < 2, f"{lead}. Name both, so that the model knows what it may say")
    wrong_if(
        not form.opening,
        "without an opening the answer begins a line of its own, and ' accepted' begins none. Say `opening:`",
    )
    wrong_if(form.words in old, "that is one of the two that are there; say the same facts in other words")


# --- what the numbers are -----------------------------------------------------------------------------


def _rate(x: NDArray) -> float:
    return float((x > 0).mean())


def _compare(
    got: Any, wanted: ArrayLike, mistakes: Mapping[str, ArrayLike], what: str, tolerance: float = 1e-3
) -> None:
    """WrongError unless these are the right numbers: with the mistake that leads to them, or the numbers."""
    try:
        x = array(got) if isinstance(got, Tensor) else np.asarray(got, dtype=float)
    except (TypeError, ValueError):
        raise WrongError(f"{what} is {type(got).__name__}, which is no number") from None
    right = np.asarray(wanted, dtype=float)
    wrong_if(x.shape != right.shape, f"{what} has the shape {_shape(x.shape)}, expected {_shape(right.shape)}")
    if np.allclose(x, right, rtol=tolerance, atol=1e-4):
        return
    for words, value in mistakes.items():
        wrong_if(np.allclose(x, np.asarray(value, dtype=float), rtol=tolerance, atol=1e-4), words)
    raise WrongError(f"{what} is {_few(x)}, expected {_few(right)}")


def _shape(shape: Sequence[int]) -> str:
    return str(list(shape)) if shape else "of one number"


def _few(x: NDArray) -> str:
    return ", ".join(f"{v:.3f}" for v in np.ravel(x)[:3]) + (", ..." if x.size > 3 else "")
