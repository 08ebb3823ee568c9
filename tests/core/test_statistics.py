"""Intervals, tests and corrections against closed forms and against scipy."""

import numpy as np
import pytest
from scipy import stats

from glassbox_utils.core.losses import perplexity, text_losses, token_losses
from glassbox_utils.core.statistics import (
    StatisticsError,
    adjust,
    bootstrap_ci,
    cluster_bootstrap,
    cluster_sign_flip_p,
    clustered_ci,
    enrichment,
    exact_ci,
    mean_ci,
    permutation_test,
    rank_agreement,
    reliability,
    sign_flip_p,
    spearman,
)


def test_bootstrap_interval_covers_the_mean():
    covered = 0
    for trial in range(100):
        x = np.random.default_rng(trial).normal(3, 2, size=40)
        interval = bootstrap_ci(x, n_resamples=500, seed=trial)
        covered += interval.low <= 3 <= interval.high
    assert covered >= 88  # nominal 95, percentile bootstrap at n = 40 is a little narrow


def test_bootstrap_is_seeded_and_paired():
    x = np.random.default_rng(0).normal(size=50)
    assert bootstrap_ci(x, seed=1) == bootstrap_ci(x, seed=1)
    ratio = bootstrap_ci((x, 2 * x), statistic=lambda a, b: float(b.sum() / a.sum()))
    assert ratio.low == pytest.approx(2) and ratio.high == pytest.approx(2)


def test_bootstrap_of_constant_and_bad_samples():
    assert bootstrap_ci([2.0, 2.0, 2.0]).high == 2
    with pytest.raises(ValueError, match="at least 2"):
        bootstrap_ci([1.0])
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_ci([1.0, float("nan")])


def test_mean_ci_agrees_with_scipy():
    x = np.random.default_rng(0).exponential(size=(60, 3, 2))
    mean, low, high = mean_ci(x, n_resamples=5000)
    one = bootstrap_ci(x[:, 1, 1], n_resamples=5000)
    assert mean.shape == (3, 2)
    assert mean[1, 1] == pytest.approx(one.value)
    assert low[1, 1] == pytest.approx(one.low, abs=0.03) and high[1, 1] == pytest.approx(one.high, abs=0.03)


def test_permutation_tests():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 60), rng.normal(1, 1, 60)
    assert permutation_test(a, b) < 0.01
    assert permutation_test(a, a + 0.01 * rng.normal(size=60), paired=True) > 0.05
    table = np.stack([a, b], axis=1)
    p = sign_flip_p(table, n_resamples=2000)
    assert p.shape == (2,) and p[0] > 0.05 > p[1]
    assert p[0] == pytest.approx(permutation_test(a, n_resamples=2000), abs=0.05)


def test_corrections_match_their_definitions():
    p = np.array([[0.01, 0.04], [0.03, 0.005]])
    assert adjust(p, "holm") == pytest.approx(np.array([[0.03, 0.06], [0.06, 0.02]]))
    assert adjust(p, "bh").ravel() == pytest.approx(stats.false_discovery_control(p.ravel()))
    with pytest.raises(ValueError, match="Allowed: bh, by, holm"):
        adjust(p, "fdr")  # type: ignore[arg-type]


def test_spearman():
    x = np.arange(30.0)
    found = spearman(x, x**3)
    assert found.rho.value == pytest.approx(1)
    shuffled = spearman(x, np.random.default_rng(1).permutation(x))
    assert not shuffled.rho.excludes(0)


def test_token_losses_are_transformers_own_loss():
    import torch
    from wired import wired_gpt2

    from glassbox_utils.core.text import tokenize

    model = wired_gpt2()
    text = "w1 w2 w3 w1 w2 w3"
    loss = token_losses(model, tokenize(model, text))
    ids = tokenize(model, text).input_ids
    with torch.no_grad():
        assert loss.nanmean() == pytest.approx(float(model.hf(ids, labels=ids).loss), abs=1e-4)
    assert loss[0, 0].isnan() and not loss[0, 1:].isnan().any()


def test_text_losses_ignore_padding_and_cut():
    import torch
    from wired import wired_gpt2

    model = wired_gpt2()
    texts = ["w1 w2 w3 w4 w5 w6", "w7 w8"]
    with torch.no_grad():
        together, counts = text_losses(model, texts)
        alone = [text_losses(model, [t])[0][0] for t in texts]
        _, cut = text_losses(model, texts, max_tokens=3)
    assert together == pytest.approx(alone, abs=1e-3) and counts.tolist() == [6, 2]
    assert cut.tolist() == [2, 2]
    assert perplexity(model, texts).value == pytest.approx(np.exp(together.sum() / counts.sum()))


def test_an_exact_interval_is_right_at_the_edges():
    """7 of 8 has the interval that the tables print; none and all of n are not certain."""
    seven = exact_ci(7, 8)
    assert (round(seven.low, 2), round(seven.high, 3)) == (0.47, 0.997)
    assert exact_ci(5, 5).low < 0.5 and exact_ci(0, 40).high > 0.08
    assert exact_ci(5, 5, method="wilson").low > exact_ci(5, 5).low


def test_clusters_widen_the_interval_where_cases_repeat_each_other():
    """400 pairs that are 20 pairs of names say what 20 say."""
    rng = np.random.default_rng(0)
    names = np.repeat(np.arange(20), 20)
    values = rng.normal(size=20)[names] + 0.01 * rng.normal(size=400)
    naive, clustered = bootstrap_ci(values), cluster_bootstrap(values, names)
    assert clustered.n == 20 and clustered.value == pytest.approx(naive.value)
    assert clustered.high - clustered.low > 3 * (naive.high - naive.low)
    order = rng.permutation(400)
    alike = cluster_bootstrap(values[order], names[order])
    assert alike.value == pytest.approx(clustered.value) and abs(alike.low - clustered.low) < 0.15


def test_clusters_flip_together():
    """False alarms: with the cluster as the unit 5 % of tests on nothing, with the case as the unit most of them."""
    rng, names = np.random.default_rng(1), np.repeat(np.arange(10), 30)
    worlds = [rng.normal(size=10)[names] for _ in range(60)]
    by_cluster = np.mean([cluster_sign_flip_p(x, names, n_resamples=300) < 0.05 for x in worlds])
    by_case = np.mean([permutation_test(x, n_resamples=300) < 0.05 for x in worlds])
    assert by_cluster <= 0.12 < 0.5 < by_case


def test_enrichment_counts_against_what_could_be_chosen():
    """3 of 32 chosen are readers where .29 % of the admissible ones are: 33 times as many as chance gives."""
    admissible = range(4200)
    found = enrichment(range(32), range(29, 41), admissible)
    assert found.overlap == 3 and found.base_rate == pytest.approx(12 / 4200)
    assert found.ratio.value == pytest.approx(3 / 32 * 350) and found.ratio.low > 5 and found.p_value < 1e-3
    outside = enrichment(range(32), [*range(29, 41), *range(10_000, 10_010)], admissible)
    assert outside == found, "what could not be chosen is no evidence"
    assert enrichment(range(100), range(50, 1050), range(2000)).ratio.excludes(1) is False


def test_the_ceiling_follows_from_the_reliability():
    """With noise of known size: Spearman-Brown finds the reliability of the whole, its root what the truth reaches."""
    rng = np.random.default_rng(2)
    truth = rng.normal(size=300)
    y = truth + 4 * rng.normal(size=(32, 300))
    found = reliability(y)
    assert found.half.value < found.whole.value < found.ceiling.value
    assert found.whole.value == pytest.approx(1 / (1 + 16 / 32), abs=0.07)
    assert spearman(y.mean(0), truth).rho.value == pytest.approx(found.ceiling.value, abs=0.06)
    assert reliability(rng.normal(size=(32, 300))).whole.value < 0.2


NAN = float("nan")
BAD = {
    "NaN in a sign flip": lambda: sign_flip_p([[1.0], [NAN]]),
    "one row in a sign flip": lambda: sign_flip_p([[1.0]]),
    "NaN among p-values": lambda: adjust([0.1, NAN]),
    "a p-value above 1": lambda: adjust([0.1, 1.2]),
    "no p-values": lambda: adjust([]),
    "a correction that does not exist": lambda: adjust([0.1], "bonferroni"),
    "a level of 95": lambda: bootstrap_ci([1.0, 2.0], level=95),
    "no resamples": lambda: bootstrap_ci([1.0, 2.0], n_resamples=0),
    "a negative seed": lambda: bootstrap_ci([1.0, 2.0], seed=-1),
    "words": lambda: bootstrap_ci(["a", "b"]),
    "pairs of two lengths": lambda: bootstrap_ci(([1.0, 2.0], [1.0, 2.0, 3.0])),
    "paired permutation of two lengths": lambda: permutation_test([1.0, 2.0], [1.0, 2.0, 3.0], paired=True),
    "NaN in a correlation": lambda: spearman([1.0, NAN, 3.0], [1.0, 2.0, 3.0]),
    "scores of two lengths": lambda: spearman([1.0, 2.0, 3.0], [1.0, 2.0]),
    "maps of two shapes": lambda: rank_agreement(np.zeros((3, 4)), np.zeros((3, 5))),
    "NaN in a map": lambda: mean_ci([[1.0], [NAN]]),
    "more than all": lambda: exact_ci(9, 8),
    "a share of nothing": lambda: exact_ci(0, 0),
    "a yes and no": lambda: exact_ci(True, 8),
    "one cluster": lambda: cluster_bootstrap([1.0, 2.0], ["a", "a"]),
    "clusters of another length": lambda: cluster_bootstrap([1.0, 2.0], ["a"]),
    "nothing chosen": lambda: enrichment([], [1], [1, 2]),
    "a choice that was not allowed": lambda: enrichment([3], [1], [1, 2]),
    "nothing marked": lambda: enrichment([1], [5], [1, 2]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_named(name):
    with pytest.raises(StatisticsError) as found:
        BAD[name]()
    assert "\n" not in str(found.value)


def crossed(seed, rows=6, columns=6, of_rows=1.0, of_columns=1.0, noise=0.3):
    """A grid of cases whose rows and columns have effects of their own, around zero."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, of_rows, (rows, 1)) + rng.normal(0, of_columns, (1, columns))
    values = values + rng.normal(0, noise, (rows, columns))
    row, column = np.indices(values.shape)
    return values.ravel(), row.ravel(), column.ravel()


def test_an_interval_of_crossed_cases_covers_where_one_of_independent_cases_does_not():
    naive = covered = 0
    for seed in range(300):
        values, row, column = crossed(seed)
        found = clustered_ci(values, row, column)
        covered += found.low <= 0 <= found.high
        independent = bootstrap_ci(values, n_resamples=200)
        naive += independent.low <= 0 <= independent.high
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)  # they say the same
    assert covered >= 0.9 * 300 and naive < 0.7 * 300, (covered, naive)


def test_one_way_and_single_cases_are_the_usual_t_interval():
    x = np.random.default_rng(0).normal(1, 2, 30)
    expected = stats.t.interval(0.95, 29, x.mean(), x.std(ddof=1) / np.sqrt(30))
    found = clustered_ci(x, range(30))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.p == pytest.approx(stats.ttest_1samp(x, 0).pvalue)
    thrice = clustered_ci(np.repeat(x, 3), np.repeat(np.arange(30), 3))  # copies of a case tell nothing new
    assert (thrice.low, thrice.high) == pytest.approx(expected)


def test_every_entry_of_a_map_is_treated_alone_and_constants_have_no_spread():
    values, row, column = crossed(1)
    table = np.stack([values, np.zeros_like(values), values + 9, np.ones_like(values)], 1).reshape(-1, 2, 2)
    found = clustered_ci(table, row, column)
    assert found.mean.shape == (2, 2) and found.low[0, 0] == pytest.approx(clustered_ci(values, row, column).low)
    assert found.p[0, 1] == 1 and found.p[1, 1] == 0 and found.low[1, 1] == found.high[1, 1] == 1


def test_bad_clusters_are_refused_in_words():
    x = [1.0, 2.0, 3.0]
    with pytest.raises(StatisticsError, match="3 values and 2 names"):
        clustered_ci(x, [0, 1])
    with pytest.raises(StatisticsError, match=r"one cluster \('a'\)"):
        clustered_ci(x, ["a"] * 3)
    for ways in ([], [[0, 1, 2]] * 3):
        with pytest.raises(StatisticsError, match="one or two"):
            clustered_ci(x, *ways)


def test_few_clusters_have_wide_intervals():
    """A true mean of 0 lies outside in about a tenth of samples of six clusters, not in a fifth of them."""
    rng = np.random.default_rng(0)
    for k, most in ((6, 0.12), (15, 0.09)):
        outside = [cluster_bootstrap(rng.normal(size=k), range(k), n_resamples=400).excludes() for _ in range(300)]
        assert np.mean(outside) < most
    ratio = cluster_bootstrap([0.0, 0.0, 1.0], range(3), lambda x: float(np.inf if x.sum() else 1.0))
    assert not np.isnan([ratio.low, ratio.high]).any()
