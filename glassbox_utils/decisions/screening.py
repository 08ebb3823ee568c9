"""The arithmetic of an audit: choose on one half of the base cases, confirm on the other; arrays in, arrays out.

**Screen.** Stepwise regression of the scores on one column for each question, within blocks of one case in one
template: the question that explains most is taken, what it explains is taken out of the scores *and* of all other
questions, and so on; after each step, an earlier one may be exchanged for a better one, or dropped. So a question that
only overlaps with a stronger one is dropped, and a second bias is not hidden by a first. A question pays for the number
of its kind: chi-square minus 2 log k (the risk inflation criterion; Foster & George 1994, doi:10.1214/aos/1176325766),
so that a pair must beat the groups it is made of by what looking at all pairs is worth.

**Confirm.** Chosen questions are asked together in one regression on the other half. An effect's variance has one part
for each thing that was drawn (Cameron, Gelbach & Miller 2011, doi:10.1198/jbes.2010.07136): base cases; wordings, so
that an effect must generalise over templates; and the names, places or numbers that stand for a group. Four wordings
say little about the variance between wordings, so that of like questions is mixed in (moderated variance: Smyth 2004,
doi:10.2202/1544-6115.1027): an effect that is no larger than its bar varies as much as those of the others. The test is
of "at most ``bar``", not of 0, and all of them share one Holm correction: unlike the maximum over sign flips it needs
no joint symmetry, which several crossed clusters and a null that is not 0 do not give.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy import stats

Weights = tuple[Float[NDArray, " cases"], Float[NDArray, " wordings"]]
"""how often each base case and each wording counts"""

STOP = 6.0
"""a question is worth confirming if its chi-square is above 2 log k by this much"""
AT_MOST, EACH = 16, 5
"""questions that are confirmed, in all and of the same fields"""
DISTINCT = 0.05
"""share of a column's square that must be left after the chosen ones are taken out"""
OF_MEDIAN = 0.37
"""of the degrees of freedom that a median absolute deviation has, beside a standard deviation"""
PRIOR = 9
"""degrees of freedom that the wording variance of like questions counts beside a question's own"""


def choose(
    y: Float[NDArray, " asked"],
    x: Float[NDArray, "asked probe"],
    price: Float[NDArray, " probe"],
    kinds: Int[NDArray, " probe"],
    simple: Bool[NDArray, " probe"],
    weights: Float[NDArray, " asked"],
    freedom: float,
) -> list[int]:
    """Indices of the questions worth confirming; ``x`` and ``y`` without their blocks' means, which leave the scores so
    much ``freedom``.

    ``kinds``: probes of the same fields share a number, and at most EACH of them are taken. Two biases can look like
    one pair, so the search is made twice, once with ``simple`` questions first, and the better outcome is taken.
    """
    norms, pull = weights @ (x * x), x.T @ (weights * y).astype(x.dtype)
    total = float(weights @ (y * y))
    both: dict[int, NDArray] = {}
    """of those that were ever chosen: their products with all"""

    def gains(given: list[int], taken: list[int]) -> tuple[NDArray, float]:
        """How much each explains beside those given, and what these leave of the scores. ``taken``: are not free."""
        free = np.ones(len(price), dtype=bool)
        free[taken] = False
        for kind in {int(k) for k in kinds[taken] if (kinds[taken] == k).sum() >= EACH}:
            free[kinds == kind] = False
        mine, left, size = pull.astype(float), total, norms.astype(float)
        if given:
            products = np.stack([both[i] for i in given], 1).astype(float)
            solved = np.linalg.pinv(products[given], hermitian=True)
            mine = mine - products @ (solved @ pull[given])
            size = size - ((products @ solved) * products).sum(1)
            left = total - float(pull[given] @ solved @ pull[given])
        enough = free & (size > DISTINCT * norms + 1e-9)
        return np.where(enough, mine**2 / np.where(enough, size, 1), -np.inf), left

    def product(i: int) -> None:
        if i not in both:
            both[i] = x.T @ (weights * x[:, i]).astype(x.dtype)

    def path(*stages: NDArray) -> list[int]:
        """What is chosen if each stage may add certain questions only."""
        chosen: list[int] = []
        for may in stages:
            for _ in range(2 * AT_MOST):
                gain, left = gains(chosen, chosen)
                spread = max(left / max(freedom - len(chosen), 1), 1e-9 * total + 1e-18)
                worth = np.where(may, gain / spread - price, -np.inf)
                best = int(np.argmax(worth))
                if len(chosen) == AT_MOST or not worth[best] > STOP:
                    break
                chosen.append(best)
                product(best)
                for i in chosen[:-1]:  # what was chosen before may be said better by another now, or be needless
                    others = [k for k in chosen if k != i]
                    worth = gains(others, others)[0] / spread - price
                    better = int(np.argmax(np.where(may, worth, -np.inf)))
                    if worth[better] <= max(worth[i], STOP):
                        better = i
                    product(better)
                    chosen = [better if k == i else k for k in chosen] if worth[better] > STOP else others
            chosen = merged(chosen, spread)
        return chosen

    def merged(chosen: list[int], spread: float) -> list[int]:
        """Two questions are one if another explains about as much as both, at its price."""
        for i, k in ((i, k) for i in chosen for k in chosen if i < k):
            if i in chosen and k in chosen:
                others = [one for one in chosen if one not in (i, k)]
                gain, left = gains(others, others)
                two = (left - gains(chosen, chosen)[1]) / spread - price[i] - price[k] - STOP
                best = int(np.argmax(gain / spread - price))
                if gain[best] / spread - price[best] > two:
                    chosen = [*others, best]
                    product(best)
        return chosen

    anything = np.ones(len(price), dtype=bool)
    paths = path(anything), path(simple, anything)
    left = [gains(chosen, chosen)[1] for chosen in paths]
    noise = min(left) / max(freedom - AT_MOST, 1)
    costs = [_criterion(one, noise, price[chosen]) for one, chosen in zip(left, paths, strict=True)]
    return paths[int(np.argmin(costs))]


def _criterion(left: float, noise: float, prices: NDArray) -> float:
    """How badly a choice explains the scores, with what its questions cost."""
    return left / max(noise, 1e-18) + float(prices.sum()) + STOP * len(prices)


@dataclass(frozen=True, eq=False)
class Fit:
    """Effects of several questions at once, with what an interval needs."""

    effects: Float[NDArray, " probe"]
    errors: Float[NDArray, " probe"]
    freedom: Float[NDArray, " probe"]
    """Satterthwaite's degrees of freedom"""
    plain: Float[NDArray, " probe"]
    """errors if all prompts were alike, as the screen sees them"""
    wording: Float[NDArray, " probe"]
    """of the variance, what wordings add, by this question's own answers: may be below 0"""
    shared: Float[NDArray, " probe"]
    """the same with what like questions say"""


def fit(
    y: Float[NDArray, " asked"],
    x: Float[NDArray, "asked probe"],
    shape: tuple[int, int, int],
    codes: Sequence[Int[NDArray, " asked"] | None],
    weights: Weights,
    like: Float[NDArray, " probe"] | None = None,
) -> Fit:
    """Least squares within blocks, and errors over cases, templates and (``codes``: one for each question, or None)
    the values that stand for a group. ``like``: variance that wordings add in like questions, NaN where there are none.
    """
    w = np.repeat(np.outer(*weights), shape[2])
    inverse = np.linalg.pinv(x.T @ (w[:, None] * x))
    effects = inverse @ (x.T @ (w * y))
    rest = y - x @ effects
    noise = _noise(rest, w, shape) * np.diag(inverse)
    return _errors(effects, (x @ inverse) * rest[:, None], noise, shape, codes, weights, like)


def apart(
    y: Float[NDArray, " asked"],
    x: Float[NDArray, "asked probe"],
    given: Float[NDArray, "asked chosen"],
    shape: tuple[int, int, int],
    codes: Sequence[Int[NDArray, " asked"] | None],
    like: Float[NDArray, " probe"] | None = None,
) -> Fit:
    """Each question by itself beside those that were ``given``: what would have been seen of it.

    Where a given one says nearly the same, there is nothing to be seen, and the errors are NaN.
    """
    before = (x * x).sum(0)
    x, y = without(x, given), without(y, given)
    norms = (x * x).sum(0)
    norms = np.where(norms > DISTINCT * before, norms, np.nan)
    effects = (x.T @ y) / norms
    noise = _noise(y, np.ones(len(y)), shape) / norms
    pull = x / norms * (y[:, None] - x * effects)
    return _errors(effects, pull, noise, shape, codes, once(shape), like)


def once(shape: tuple[int, int, int]) -> Weights:
    """Each case and each wording counts once."""
    return np.ones(shape[0]), np.ones(shape[1])


def without(x: Float[NDArray, "asked ..."], given: Float[NDArray, "asked chosen"]) -> Float[NDArray, "asked ..."]:
    """What the given columns do not explain of others."""
    if not given.shape[1]:
        return x
    q, _ = np.linalg.qr(given)
    return x - q @ (q.T @ x)


def _noise(rest: NDArray, weights: NDArray, shape: tuple[int, int, int]) -> float:
    """Variance of what is left of a score, within blocks."""
    return float(weights @ rest**2) / max(float(weights.sum()) * (1 - 1 / shape[2]), 1.0)


def _errors(
    effects: NDArray,
    pull: NDArray,
    noise: NDArray,
    shape: tuple[int, int, int],
    codes: Sequence[NDArray | None],
    weights: Weights,
    like: NDArray | None,
) -> Fit:
    """``noise``: the variances if all prompts were alike. None may be smaller: with few prompts that have a property,
    variances over clusters are too small (MacKinnon & Webb 2017, doi:10.1002/jae.2508)."""
    n, wordings, versions = shape
    k = len(effects)
    cube = pull.reshape(n, wordings, versions, k)
    of_cases, of_wordings = weights
    alone = np.einsum("c,t,ctvk->k", of_cases, of_wordings, cube**2)
    total = max(float(of_cases.sum()), 2.0)
    cases = of_cases @ np.einsum("t,ctvk->ck", of_wordings, cube) ** 2 * total / (total - 1)
    parts = [(np.maximum(cases, np.maximum(alone, noise)), np.full(k, total - 1))]
    own = shared = np.zeros(k)
    if wordings > 1:
        each = np.einsum("c,ctvk->tk", of_cases, cube)
        own = of_wordings @ each**2 * wordings / (wordings - 1) - alone
        others = np.full(k, np.nan) if like is None else like
        prior, mine = np.where(np.isfinite(others), PRIOR, 0.0), wordings - 1.0
        shared = np.maximum((prior * np.nan_to_num(others) + mine * own) / (prior + mine), 0)
        parts.append((shared, prior + mine))
    values, freedom = np.zeros(k), np.ones(k)
    w = np.repeat(np.outer(*weights), versions)
    for j, code in enumerate(codes):
        if code is not None:
            sums = np.bincount(code, w * pull[:, j])
            values[j] = max(float((sums**2).sum()) - alone[j], 0.0)
            freedom[j] = max(len(sums) - 2, 1)
    parts.append((values, freedom))
    variance = cast(NDArray, sum(v for v, _ in parts)) + 1e-18
    df = variance**2 / (sum(v**2 / f for v, f in parts) + 1e-300) if k else np.ones(0)
    return Fit(effects, np.sqrt(variance), np.maximum(df, 1.0), np.sqrt(np.maximum(noise, 1e-18)), own, shared)


def p_values(found: Fit, bars: Float[NDArray, " probe"]) -> Float[NDArray, " probe"]:
    """Chance of an effect as large as this if the true one is at most ``bars``, on either side."""
    beyond = (np.abs(found.effects) - bars) / found.errors
    return np.minimum(2 * stats.t.sf(beyond, found.freedom), 1.0)


def visible(
    errors: NDArray, freedom: NDArray, bars: NDArray, tests: int, first: Fit, prices: NDArray, power: float = 0.9
) -> NDArray:
    """The smallest effect that both halves would have shown with ``power``: chosen by the screen (``first``), then
    confirmed with ``tests`` tests in all. Each step gets half of the chance to fail.

    The screen compares with errors as if all prompts were alike, and yet its effects vary with cases and wordings.
    """
    each = (1 - power) / 2
    confirmed = bars + (stats.t.isf(0.05 / 2 / tests, freedom) + stats.t.isf(each, freedom)) * errors
    chosen = np.sqrt(prices + STOP) * first.plain + stats.t.isf(each, first.freedom) * first.errors
    return np.maximum(confirmed, chosen)


def spread(halves: Sequence[tuple[NDArray, NDArray]]) -> tuple[float, float]:
    """How much the values of a field differ, without what sampling adds, at most: a robust standard deviation, times
    what makes it an upper 80 % bound for so few; and what another audit will get, in 95 of 100, at most.

    ``halves``: effects of the same values and their errors, seen twice.
    """
    squares, noise, many = [], [], 0
    for effects, errors in halves:
        fine = np.isfinite(effects)
        if fine.sum() < 4:
            return 0.0, 0.0
        squares.append(stats.median_abs_deviation(effects[fine], scale="normal") ** 2)
        noise.append(np.median(errors[fine] ** 2))
        many += int(fine.sum()) - 1
    freedom, known = many / len(halves), OF_MEDIAN * many
    factor = freedom / stats.chi2.ppf(0.2, freedom)
    again = np.mean(squares) * known / stats.chi2.ppf(0.05, known)
    now, later = (float(np.sqrt(max(x - np.mean(noise), 0) * factor)) for x in (np.mean(squares), again))
    return now, later
