"""How sure, how large, at what cost: intervals, tests, corrections, and losses on text.

All statistics go through scipy.stats; this module only fixes the choices (95 %, percentile or BCa
bootstrap, a seed) in one place, and says them in one small result type. Units: losses are nats per token.

What is resampled is the unit that varies: name pairs, templates, seeds (``cluster_bootstrap``, ``cluster_sign_flip_p``
where cases share one, ``clustered_ci`` where they share two). A share of few cases gets an exact interval
(``exact_ci``), an overlap its base rate (``enrichment``), a score its reliability and the ceiling that follows from it
(``reliability``). Every function raises StatisticsError for values that are not finite, too few, or of unequal length.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from torch import Tensor

from glassbox_utils.core.errors import GlassboxError


class StatisticsError(GlassboxError, ValueError):
    """Values from which the statistic can't be computed; the message says which, and what is allowed."""


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
    ``f(x, y)``. Resample the unit that was drawn: prompts, not tokens. Raises StatisticsError below 2 values.
    Source: Efron & Tibshirani 1993, through scipy.stats.bootstrap.
    """
    _check_resampling(level, n_resamples, seed)
    samples = tuple(_sample(v) for v in (values if isinstance(values, tuple) else (values,)))
    n = len(samples[0])
    if len({len(s) for s in samples}) > 1:
        raise StatisticsError(f"Paired samples need one length, these have {[len(s) for s in samples]}.")
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
    _check_resampling(level, n_resamples, seed)
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
    _check_resampling(level, n_resamples, seed)
    x = _rows(values)
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
    _check_resampling(0.95, n_resamples, seed)
    x = _sample(a)
    if b is not None and paired and len(_sample(b)) != len(x):
        raise StatisticsError(f"Paired samples need one length, these have {[len(x), len(_sample(b))]}.")
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
    _check_resampling(0.95, n_resamples, seed)
    x = _rows(values)
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
    if not p.size or not ((p >= 0) & (p <= 1)).all():
        wrong = p[~((p >= 0) & (p <= 1))][:3].tolist()
        raise StatisticsError(f"These are no p-values: {wrong}. Allowed: at least one number, each from 0 to 1.")
    if method in ("bh", "by"):
        return stats.false_discovery_control(p.ravel(), method=method).reshape(p.shape)
    if method != "holm":
        raise StatisticsError(f"There is no correction {method!r}. Allowed: bh, by, holm.")
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
    a, b = _sample(_array(x).ravel()), _sample(_array(y).ravel())
    if len(a) != len(b):
        raise StatisticsError(f"Two scores of the same items need one length, these have {[len(a), len(b)]}.")
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
    a, b = _rows(x).reshape(len(x), -1), _rows(y).reshape(len(y), -1)
    if a.shape != b.shape:
        raise StatisticsError(f"The scores have shapes {tuple(x.shape)} and {tuple(y.shape)}. Allowed: the same.")
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

    It is a number about half as many prompts, and no ceiling: ``reliability`` steps it up. ``magnitude`` compares
    absolute means.
    """
    values = _rows(y).reshape(len(y), -1)
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(n_splits):
        order = rng.permutation(len(values))
        halves = [values[part].mean(0) for part in (order[::2], order[1::2])]
        ranks = [stats.rankdata(np.abs(h) if magnitude else h) for h in halves]
        draws.append(float(np.corrcoef(*ranks)[0, 1]))
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(np.median(draws)), float(low), float(high), len(values))


@dataclass(frozen=True)
class Reliability:
    """How well a score of all prompts would repeat itself, and what another score could reach at most against it."""

    half: Interval
    """correlation of random halves"""
    whole: Interval
    """that of two sets as large as this one (Spearman-Brown)"""
    ceiling: Interval
    """the highest correlation that an error-free predictor can be expected to reach: the root of ``whole``"""


def reliability(
    y: Float[Tensor, "prompt ..."], magnitude: bool = False, n_splits: int = 200, seed: int = 0
) -> Reliability:
    """Reliability of a mean over prompts, stepped up from halves to all of them, and the ceiling that follows.

    Source: Spearman 1910, Brown 1910; the ceiling is the correction for attenuation (Spearman 1904).
    """
    half = split_half(y, magnitude, n_splits, seed)

    def each(f: Callable[[float], float]) -> Interval:
        return Interval(f(half.value), f(half.low), f(half.high), half.n, half.level)

    return Reliability(half, each(_stepped_up), each(lambda r: float(np.sqrt(max(_stepped_up(r), 0.0)))))


def _stepped_up(r: float) -> float:
    """Spearman-Brown for twice the length; halves that disagree have no reliability to step up."""
    return 2 * r / (1 + r) if r > 0 else r


# --- shares, overlaps, clusters -----------------------------------------------------------------------


def exact_ci(k: int, n: int, level: float = 0.95, method: Literal["exact", "wilson"] = "exact") -> Interval:
    """The share k / n with its exact binomial (Clopper-Pearson 1934) or Wilson (1927) interval, also for 0 of n."""
    if isinstance(k, bool) or int(k) != k or isinstance(n, bool) or int(n) != n or not 0 <= k <= n or n < 1:
        raise StatisticsError(f"{k!r} of {n!r} is no share. Allowed: whole numbers, 0 <= k <= n, n at least 1.")
    if method not in ("exact", "wilson"):
        raise StatisticsError(f"There is no interval {method!r}. Allowed: exact, wilson.")
    _check_resampling(level, 1, 0)
    found = stats.binomtest(int(k), int(n)).proportion_ci(level, method)
    return Interval(k / n, float(found.low), float(found.high), int(n), level)


def cluster_bootstrap(
    values: ArrayLike | Tensor,
    clusters: Sequence[Hashable] | NDArray,
    statistic: Callable[[NDArray], float] = np.mean,
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval where cases share what varies: whole clusters are drawn. ``n`` is the number of clusters.

    ``clusters`` names the cluster of each value (its name pair, template, seed). Raises StatisticsError below 2.
    A plain percentile interval of few clusters is too narrow (of four it leaves a true 0 outside in a fifth of all
    samples), so the ends are taken further out, as a t-interval's are; below six even that is too near: read it with
    ``n``. Sources: Davison & Hinkley 1997, section 3.8; the expanded interval of Hesterberg, arXiv 1411.5279.
    """
    _check_resampling(level, n_resamples, seed)
    groups = list(_grouped(values, clusters).values())
    rng, k = np.random.default_rng(seed), len(groups)
    draws = [float(statistic(np.concatenate([groups[i] for i in rng.integers(0, k, k)]))) for _ in range(n_resamples)]
    tail = float(stats.norm.cdf(np.sqrt(k / (k - 1)) * stats.t.ppf((1 - level) / 2, k - 1)))
    between: Any = "linear" if np.isfinite(draws).all() else "nearest"  # a ratio over nothing is no number to mix with
    low, high = np.quantile(draws, [tail, 1 - tail], method=between)
    return Interval(float(statistic(np.concatenate(groups))), float(low), float(high), k, level)


def cluster_sign_flip_p(
    differences: ArrayLike | Tensor, clusters: Sequence[Hashable] | NDArray, n_resamples: int = 9999, seed: int = 0
) -> float:
    """Two-sided p-value of "the mean of paired differences is zero" where whole clusters change their sign together."""
    sums = np.array([group.sum() for group in _grouped(differences, clusters).values()])
    return permutation_test(sums, n_resamples=n_resamples, seed=seed)


class Clustered(NamedTuple):
    """Mean of every entry with interval and two-sided p-value, which agree: p < 0.05 where 95 % leaves 0 outside."""

    mean: NDArray
    low: NDArray
    high: NDArray
    p: NDArray


def clustered_ci(values: ArrayLike | Tensor, *clusters: Sequence[Hashable] | NDArray, level: float = 0.95) -> Clustered:
    """Mean over axis 0 of every entry where cases share what varies in one way or two, crossed: [n, ...] -> [...] each.

    ``clusters``: for one way or two, the cluster of each case. 36 pairs of 6 men's and 6 women's jobs share both, and
    are no 36 independent cases. A t-interval with the cluster-robust standard error, its degrees of freedom the smaller
    number of clusters less one. Of two ways' variance and either way's the largest counts. Raises StatisticsError for
    less than 2 clusters. Source: Cameron, Gelbach & Miller 2011 (doi 10.1198/jbes.2010.07136).
    """
    _check_resampling(level, 1, 0)
    x = _rows(values)
    if len(clusters) not in (1, 2):
        raise StatisticsError(f"There are {len(clusters)} ways of clustering. Allowed: one or two.")
    of = [_codes(names, len(x)) for names in clusters]
    error = (x - x.mean(0)).reshape(len(x), -1)

    def variance(codes: NDArray) -> NDArray:
        k = int(codes.max()) + 1
        sums = np.zeros((k, error.shape[1]))
        np.add.at(sums, codes, error)
        return k / (k - 1) * (sums**2).sum(0) / len(x) ** 2

    each = [variance(codes) for codes in of]
    if len(of) == 2:
        both = _codes(list(zip(*(codes.tolist() for codes in of), strict=True)), len(x))
        each.append(each[0] + each[1] - variance(both))
    se = np.sqrt(np.max(each, axis=0)).reshape(x.shape[1:])
    df, mean = min(int(codes.max()) for codes in of), x.mean(0)
    reach = stats.t.ppf((1 + level) / 2, df) * se
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(se > 0, 2 * stats.t.sf(np.abs(mean) / se, df), np.where(mean == 0, 1.0, 0.0))
    return Clustered(mean, mean - reach, mean + reach, p)


def _codes(names: Sequence[Hashable] | NDArray, n: int) -> NDArray:
    """Clusters as numbers from 0 on."""
    names = list(names)
    if len(names) != n:
        raise StatisticsError(f"There are {n} values and {len(names)} names of clusters. Give one name a value.")
    known = {name: i for i, name in enumerate(dict.fromkeys(names))}
    if len(known) < 2:
        raise StatisticsError(f"All {n} values are of one cluster ({names[0]!r}). Allowed: at least 2 clusters.")
    return np.array([known[name] for name in names])


def _grouped(values: ArrayLike | Tensor, clusters: Sequence[Hashable] | NDArray) -> dict[Hashable, NDArray]:
    x, names = _sample(values), list(clusters)
    if len(names) != len(x):
        raise StatisticsError(f"There are {len(x)} values and {len(names)} names of clusters. Give one name a value.")
    groups: dict[Hashable, list[float]] = {}
    for name, value in zip(names, x.tolist(), strict=True):
        groups.setdefault(name, []).append(value)
    if len(groups) < 2:
        raise StatisticsError(f"All {len(x)} values are of one cluster ({names[0]!r}). Allowed: at least 2 clusters.")
    return {name: np.array(group) for name, group in groups.items()}


@dataclass(frozen=True)
class Enrichment:
    """How much more often marked units were chosen than the base rate says."""

    overlap: int
    chosen: int
    base_rate: float
    """share of marked units among those that could be chosen"""
    ratio: Interval
    """share of marked units among the chosen, over the base rate (exact binomial interval)"""
    p_value: float
    """two-sided, hypergeometric"""

    def __str__(self) -> str:
        return f"{self.overlap} of {self.chosen} against {self.base_rate:.2%}: {self.ratio.value:.3g} times"


def enrichment(chosen: Iterable[Hashable], marked: Iterable[Hashable], admissible: Iterable[Hashable]) -> Enrichment:
    """Are units that one rule chose marked by another more often than chance? Only ``admissible`` ones count as chance.

    What a selection excludes is no evidence about what was excluded: units outside ``admissible`` are refused among the
    chosen and ignored among the marked. Raises StatisticsError if nothing is chosen, or nothing admissible is marked.
    """
    allowed, picked = set(admissible), set(chosen)
    hits = set(marked) & allowed
    if outside := sorted(map(repr, picked - allowed)):
        raise StatisticsError(
            f"Chosen units are not admissible: {', '.join(outside[:5])}. Give all that could be chosen."
        )
    if not picked or not hits:
        raise StatisticsError(
            f"{len(picked)} units are chosen and {len(hits)} admissible ones marked. Allowed: 1 or more."
        )
    both, base = len(picked & hits), len(hits) / len(allowed)
    share = exact_ci(both, len(picked))
    table = [[both, len(picked) - both], [len(hits) - both, len(allowed) - len(picked) - len(hits) + both]]
    p = float(stats.fisher_exact(table).pvalue)
    ratio = Interval(share.value / base, share.low / base, share.high / base, len(picked))
    return Enrichment(both, len(picked), base, ratio, p)


# --- checks -------------------------------------------------------------------------------------------


def _check_resampling(level: float, n_resamples: int, seed: int) -> None:
    if isinstance(level, bool | str) or not 0 < level < 1:
        raise StatisticsError(f"The level is {level!r}. Allowed: a number between 0 and 1, such as 0.95.")
    if isinstance(n_resamples, bool) or not isinstance(n_resamples, Integral) or n_resamples < 1:
        raise StatisticsError(f"n_resamples is {n_resamples!r}. Allowed: a whole number from 1 on.")
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise StatisticsError(f"The seed is {seed!r}. Allowed: a whole number from 0 on.")


def _array(values: ArrayLike | Tensor) -> NDArray:
    if isinstance(values, Tensor):
        return values.detach().cpu().double().numpy()
    try:
        return np.asarray(values, dtype=float)
    except (TypeError, ValueError) as error:
        raise StatisticsError(f"These are no numbers: {values!r:.80}. Give numbers in rows of one length.") from error


def _rows(values: ArrayLike | Tensor) -> NDArray:
    array = _array(values)
    if array.ndim < 1 or len(array) < 2 or not array.size:
        raise StatisticsError(f"Resampling needs at least 2 rows, got the shape {array.shape}.")
    return _finite(array)


def _sample(values: Any) -> NDArray:
    array = _array(values)
    if array.ndim != 1 or len(array) < 2:
        raise StatisticsError(f"A sample is a list of at least 2 numbers, got shape {array.shape}.")
    return _finite(array)


def _finite(array: NDArray) -> NDArray:
    if not np.isfinite(array).all():
        count = (~np.isfinite(array)).sum()
        raise StatisticsError(f"The sample holds {count} values that are not finite: drop them first.")
    return array
