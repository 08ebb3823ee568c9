"""Tables about stereotypes: jobs that share sentences are told apart, dealt by lot, and counted as what varies."""

import numpy as np
import pytest

from glassbox_utils.attention import bias, bias_tables, heads_figures, study

PAIRS = [(man, woman) for man in "abcdef" for woman in "uvwxyz"]


def planted(strength=1.0, noise=0.0, seed=0):
    """Gaps of 36 pairs for 5 x 4 heads; head 0 looks with the stereotype, the last against it, others at single jobs.
    Which jobs pull is the same for all splits, or drawn by ``seed``."""
    rng = np.random.default_rng(seed)
    own = 0.1 * rng.normal(size=(12, 20))
    own -= np.repeat([own[:6].mean(0), own[6:].mean(0)], 6, axis=0)
    own[:6, 0] += strength
    own[:6, 19] -= strength
    gaps = np.array([own["abcdef".index(a)] - own[6 + "uvwxyz".index(b)] for a, b in PAIRS])
    return (gaps + noise * rng.normal(size=gaps.shape)).reshape(36, 5, 4)


def test_a_gap_is_one_jobs_part_minus_the_others():
    gaps = planted()
    men, women, parts = bias.job_parts(gaps, PAIRS)
    assert men == list("abcdef") and women == list("uvwxyz") and parts.shape == (12, 5, 4)
    for (a, b), gap in zip(PAIRS, gaps, strict=True):
        assert np.allclose(parts[men.index(a)] - parts[6 + women.index(b)], gap)
    some = PAIRS[::5]  # not all pairs were asked: what was is still explained
    men, women, parts = bias.job_parts(gaps[::5], some)
    again = [parts[men.index(a)] - parts[len(men) + women.index(b)] for a, b in some]
    assert np.allclose(again, gaps[::5])


def crossed_of(*gaps):
    of = {}
    for split, x in zip(("selection", "report"), gaps, strict=True):
        men, women, parts = bias.job_parts(x, PAIRS)
        of[split] = {"men": men, "women": women, "parts": parts.tolist(), "explained": 1.0}
    return {"looks": of}


def bias_of(selection, report):
    men, women = zip(*PAIRS, strict=True)
    looks = {"report": study.as_map(report, men, women)}
    looks |= {"ranking": study.leading(selection.mean(0), 2), "against": study.leading(-selection.mean(0), 2)}
    return {"looks": looks}


@pytest.mark.parametrize(("strength", "verdict"), [(1.0, "held"), (0.0, "null")])
def test_a_gap_is_held_only_beyond_what_lots_give(strength, verdict):
    gaps = planted(strength, 0.01), planted(strength, 0.01, seed=1)
    said, found = bias_tables.found_lookers(bias_of(*gaps), crossed_of(*gaps))
    assert [f.verdict for f in found] == [verdict] * 2 and all(f.control.can_fail for f in found)
    assert "the largest gap of all 20 heads, by lot" in said and (
        ("0.0 +" in said and "4.3 -" in said) == (verdict == "held")
    )


def test_lots_take_half_of_the_men_and_half_of_the_women_to_each_side():
    parts = np.zeros((12, 1, 2))
    parts[:6, 0, 0] = 1.0  # men against women: no deal can see it
    parts[0, 0, 1] = 1.0  # one job: every deal does
    lots = bias.by_lot(parts, parts, 6, 50)
    assert all(len(x) == 50 for x in lots) and np.allclose(lots.largest, 1 / 6)
    assert (abs(lots.first) < 0.17).all() and lots.first.min() < 0 < lots.first.max(), (
        "no more than one job, either way"
    )
    again = bias.by_lot(parts, parts, 6, 50)
    assert np.array_equal(again.first, lots.first)


def outcomes_of(rng, fall):
    """Every outcome of ten units with a gap of 1 that falls without the acting heads; six pairs of report jobs."""
    sets = {"none": [], "acting": [(0, 1)], "looking": [(0, 2)]}
    sets |= {f"random as {g} {i}": [(1, i)] for g in ("acting", "looking") for i in range(3)}
    sizes = {name: 6 if name == "report" else 10 for name in heads_figures.OUTCOMES}
    of = {}
    for name, n in sizes.items():
        whole = 1 + 0.1 * rng.normal(size=n)
        rows = [whole - (fall if s == "acting" else 0) + 0.01 * rng.normal(size=n) for s in sets]
        of[name] = np.stack([whole, *rows[1:]]).tolist()
    return {"sets": sets, "outcomes": of, "units": dict.fromkeys(sizes, "jobs")}


def sentences_of(rng, whole, fall, n=60):
    jobs = [f"j{i}" for i in range(10)]
    referent, other = [jobs[i % 10] for i in range(n)], [jobs[(i // 3) % 10] for i in range(n)]
    values = whole + 0.1 * rng.normal(size=(3, n))
    values[1] -= fall
    return {"referent": referent, "other": other, "values": values.tolist()}


def test_outcomes_that_cannot_lose_are_not_testable():
    rng = np.random.default_rng(0)
    after = outcomes_of(rng, 0.5)
    crossed = {"sets": {"none": [], "acting": [(0, 1)], "looking": [(0, 2)]}}
    crossed |= {"winobias 1": sentences_of(rng, 0.0, 0.5), "winobias 2": sentences_of(rng, 1.0, 0.5)}
    table, found = bias_tables.carried(after, crossed)
    verdicts = dict(zip(heads_figures.OUTCOMES, [f.verdict for f in found[:6]], strict=True))
    assert verdicts["report"] == "not testable", "six pairs can't stand after the correction"
    assert verdicts["winobias 1"] == "not testable", "a gap that may be zero has nothing to lose"
    assert {verdicts[name] for name in ("fresh", "winogender", "winobias 2", "stereoset")} == {"held"}
    assert {f.verdict for f in found[6:]} == {"null", "not testable"}
    assert table["falls in"].iloc[0] == "6 of 6 jobs" and "60 sentences of 10 × 10 jobs" in set(table["resampled"])
    whole, moved, p, _ = bias_tables.by_sentence(crossed, "winobias 2", "acting")
    assert abs(whole.value - 1) < 0.1 and moved.high < -0.3 and p < 0.01


def test_jobs_that_are_meant_count_alike_however_many_sentences_they_have():
    crossed = {"sets": {"none": [], "acting": [(0, 1)]}}
    crossed["winobias 2"] = {
        "referent": ["a", "a", "a", "b"],
        "other": ["b", "c", "c", "a"],
        "values": [[1.0, 1.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0]],
    }
    whole, moved, *_ = bias_tables.by_sentence(crossed, "winobias 2", "acting")
    assert whole.value == 2 and moved.value == -2 and whole.low < 2 < whole.high


def test_who_looks_is_set_beside_all_heads():
    gaps = planted(1.0, 0.01)
    effect = np.random.default_rng(2).uniform(0, 0.04, (5, 4))
    effect[0, 0], effect[1] = 0.5, 0.2
    q = np.zeros((5, 4)).tolist()
    acts = {"gap": [1.0, 1.0], "ablation": {"mean": effect.tolist(), "q": q}}
    refers = {"report": {"total": [1.0], "effect": {"mean": (-effect).tolist(), "q": q}}}
    table = bias_of(gaps, gaps) | {"acts": acts, "refers": refers}
    found = bias_tables.looking_acts(table)
    k = sum(h == (0, 0) or h[0] == 1 for h in bias_tables.looking_heads(table))
    assert [f.verdict for f in found[::2]] == ["null", "null"] and found[0].n == 4 and found[0].effect == k / 4
    assert found[0].control.value == 0.25 and k < 3
    assert all(f.control.kind == "shuffled labels" for f in found[1::2])
    shown = bias_tables.overlaps(table, (0.05,))
    assert shown["heads"].tolist() == ["5 (5 with it, 0 against)", "5 (0 with it, 5 against)"]
    said = bias_tables.back_goes_too(table, {"previous": {"mean": effect.tolist()}})
    assert "(a) pronoun choice 1.00" in said
