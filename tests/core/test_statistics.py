"""Intervals, tests and corrections against closed forms and against scipy."""

import numpy as np
import pytest
from scipy import stats

from glassbox_utils.core.losses import perplexity, text_losses, token_losses
from glassbox_utils.core.statistics import adjust, bootstrap_ci, mean_ci, permutation_test, sign_flip_p, spearman


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
