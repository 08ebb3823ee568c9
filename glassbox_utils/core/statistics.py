"""How sure, how large, at what cost: intervals, tests, corrections, and losses on text.

All statistics go through scipy.stats; this module only fixes the choices (95 %, percentile or BCa
bootstrap, a seed) in one place, and says them in one small result type. Units: losses are nats per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A number with its bootstrap interval: ``0.31 [0.22, 0.40] (n = 200)``."""

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}] (n = {self.n})"

    def excludes(self, value: float = 0.0) -> bool:
        """Does the interval leave ``value`` outside?"""
        return not self.low <= value <= self.high


# --- intervals and tests ------------------------------------------------------------------------------


def bootstrap_ci(
    values: ArrayLike | tuple[ArrayLike, ...],
    statistic: Callable[..., Any] = np.mean,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
    method: Literal["percentile", "basic", "bca"] = "percentile",
) -> Interval:
    """Bootstrap interval of a statistic of one sample, or of several *paired* samples given as a tuple.

    ``bootstrap_ci(x)`` is the mean; ``bootstrap_ci((x, y), statistic=f)`` resamples the pairs and calls
    ``f(x, y)``. Resample the unit that was drawn: prompts, not tokens. Raises ValueError below 2 values.
    Source: Efron & Tibshirani 1993, through scipy.stats.bootstrap.
    """
    samples = tuple(_sample(v) for v in (values if isinstance(values, tuple) else (values,)))
    n = len(samples[0])
    if len({len(s) for s in samples}) > 1:
        raise ValueError(f"Paired samples need one length, these have {[len(s) for s in samples]}.")
    value = float(statistic(*samples))
    if all(np.ptp(s) == 0 for s in samples):  # nothing to resample: scipy would return NaN
        return Interval(value, value, value, n, level)
    result = stats.bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        vectorized="axis" in getattr(getattr(statistic, "__code__", None), "co_varnames", ()) or statistic is np.mean,
        confidence_level=level,
        n_resamples=n_resamples,
        method=method,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(result.low), float(result.high), n, level)


def difference_ci(a: ArrayLike, b: ArrayLike, level: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> Interval:
    """Bootstrap interval of ``mean(a) - mean(b)`` for two independent samples (n is the smaller one)."""
    x, y = _sample(a), _sample(b)

    def difference(x: NDArray, y: NDArray, axis: int = -1) -> NDArray:
        return x.mean(axis=axis) - y.mean(axis=axis)

    result = stats.bootstrap(
        (x, y),
        difference,
        confidence_level=level,
        n_resamples=n_resamples,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(x.mean() - y.mean()), float(result.low), float(result.high), min(len(x), len(y)), level)


def mean_ci(
    values: ArrayLike | Tensor, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> tuple[NDArray, NDArray, NDArray]:
    """Mean over axis 0, and its bootstrap interval, for every entry at once: [n, ...] -> three [...] arrays.

    All entries share the resamples (rows are prompts), so maps of all heads cost one bootstrap.
    """
    x = _array(values)
    if len(x) < 2:
        raise ValueError(f"An interval needs at least 2 rows, got {len(x)}.")
    rng = np.random.default_rng(seed)
    flat = x.reshape(len(x), -1)
    # The bootstrap distribution of a mean is a matrix product with multinomial counts: same resamples as
    # scipy.stats.bootstrap draws in law, without n_resamples copies of the data.
    counts = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=n_resamples)
    means = counts @ flat / len(x)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    shape = x.shape[1:]
    return flat.mean(0).reshape(shape), low.reshape(shape), high.reshape(shape)


def permutation_test(
    a: ArrayLike,
    b: ArrayLike | None = None,
    paired: bool = False,
    alternative: Literal["two-sided", "greater", "less"] = "two-sided",
    n_resamples: int = 9999,
    seed: int = 0,
) -> float:
    """p-value for a difference of means by permutation (scipy.stats.permutation_test).

    One sample: signs are flipped (is the mean 0?). Two samples: labels are shuffled, or, ``paired``, the
    two members of each pair are swapped. Never 0: the smallest value is 1 / (n_resamples + 1).
    """
    x = _sample(a)
    rng = np.random.default_rng(seed)
    if b is None or paired:
        y = x if b is None else x - _sample(b)
        result = stats.permutation_test(
            (y,), _mean, permutation_type="samples", alternative=alternative, n_resamples=n_resamples, rng=rng
        )
    else:
        result = stats.permutation_test(
            (x, _sample(b)), _mean_difference, alternative=alternative, n_resamples=n_resamples, rng=rng
        )
    return float(result.pvalue)


def sign_flip_p(values: ArrayLike | Tensor, n_resamples: int = 9999, seed: int = 0) -> NDArray:
    """Two-sided sign-flip p-value of "the mean over axis 0 is zero" for every entry: [n, ...] -> [...].

    Each entry gets its own test; correct with ``adjust`` before reading any.
    """
    x = _array(values)
    flat = x.reshape(len(x), -1).T
    result = stats.permutation_test(
        (flat,),
        _mean,
        permutation_type="samples",
        vectorized=True,
        axis=-1,
        n_resamples=n_resamples,
        batch=max(1, 20_000_000 // max(flat.size, 1)),
        rng=np.random.default_rng(seed),
    )
    return np.asarray(result.pvalue).reshape(x.shape[1:])


def _mean(x: NDArray, axis: int = -1) -> NDArray:
    return np.mean(x, axis=axis)


def _mean_difference(x: NDArray, y: NDArray, axis: int = -1) -> NDArray:
    return np.mean(x, axis=axis) - np.mean(y, axis=axis)


def adjust(p_values: ArrayLike, method: Literal["bh", "by", "holm"] = "bh") -> NDArray:
    """p-values corrected for many tests, same shape.

    ``bh`` and ``by`` bound the share of false discoveries (Benjamini & Hochberg 1995, Benjamini &
    Yekutieli 2001), ``holm`` the chance of a single one (Holm 1979).
    """
    p = np.asarray(p_values, dtype=float)
    if method in ("bh", "by"):
        return stats.false_discovery_control(p.ravel(), method=method).reshape(p.shape)
    if method != "holm":
        raise ValueError(f"There is no correction {method!r}. Allowed: bh, by, holm.")
    flat = p.ravel()
    order = np.argsort(flat)
    steps = np.maximum.accumulate(flat[order] * (len(flat) - np.arange(len(flat))))
    adjusted = np.empty_like(flat)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted.reshape(p.shape)


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with a bootstrap interval over the ranked items."""

    rho: Interval
    p_value: float

    def __str__(self) -> str:
        return f"rho = {self.rho}, p = {self.p_value:.2g}"


def spearman(x: ArrayLike | Tensor, y: ArrayLike | Tensor, n_resamples: int = 2000, seed: int = 0) -> Correlation:
    """Do two scores rank the same things in the same order? Ties get average ranks."""
    a, b = _array(x).ravel(), _array(y).ravel()
    result = stats.spearmanr(a, b)

    def statistic(a: NDArray, b: NDArray) -> float:
        return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])

    return Correlation(bootstrap_ci((a, b), statistic, n_resamples=n_resamples, seed=seed), float(result.pvalue))


def rank_agreement(
    x: Float[Tensor, "prompt ..."],
    y: Float[Tensor, "prompt ..."],
    magnitude: bool = False,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Spearman correlation over items (heads) of two scores averaged over prompts; bootstrap over *prompts*.

    The prompts are what was sampled: the interval says how far the number would move with other prompts.
    With ``magnitude`` the second score counts by the size of its mean, not its sign.
    """
    a, b = _array(x).reshape(len(x), -1), _array(y).reshape(len(y), -1)
    rng = np.random.default_rng(seed)

    def correlation(rows: NDArray) -> float:
        mean = b[rows].mean(0)
        ranks = stats.rankdata(a[rows].mean(0)), stats.rankdata(np.abs(mean) if magnitude else mean)
        return float(np.corrcoef(*ranks)[0, 1])

    draws = [correlation(rng.integers(0, len(a), len(a))) for _ in range(n_resamples)]
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(correlation(np.arange(len(a))), float(low), float(high), len(a))


def split_half(y: Float[Tensor, "prompt ..."], magnitude: bool = False, n_splits: int = 200, seed: int = 0) -> Interval:
    """How well a score repeats itself: Spearman correlation over items between random halves of the prompts.

    It is the ceiling of what any other score could reach against ``y`` (for half as many prompts).
    ``magnitude`` compares absolute means.
    """
    values = _array(y).reshape(len(y), -1)
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(n_splits):
        order = rng.permutation(len(values))
        halves = [values[part].mean(0) for part in (order[::2], order[1::2])]
        ranks = [stats.rankdata(np.abs(h) if magnitude else h) for h in halves]
        draws.append(float(np.corrcoef(*ranks)[0, 1]))
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(np.median(draws)), float(low), float(high), len(values))


def _array(values: ArrayLike | Tensor) -> NDArray:
    return values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)


def _sample(values: Any) -> NDArray:
    array = _array(values)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"A sample is a list of at least 2 numbers, got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"The sample holds {(~np.isfinite(array)).sum()} values that are not finite: drop them first.")
    return array
