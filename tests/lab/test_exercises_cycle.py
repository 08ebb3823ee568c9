"""Exercises of notebook 06: blanks and typical wrong answers are refused in the right words, solutions accepted."""

import numpy as np
import pytest
import torch

from glassbox_utils.lab import exercises
from glassbox_utils.lab.exercises import cycle

NAMES = ("head_patch", "carried", "like_units", "hold_at_mean", "interval", "specific")


def check(name):
    return getattr(cycle, f"check_{name}")


@pytest.mark.parametrize("name", NAMES)
def test_blanks_are_refused_and_solutions_accepted(name):
    for blank in (lambda *_: None, lambda *_: ...):
        assert check(name)(blank) == exercises.BLANK
    assert check(name)(getattr(cycle, f"solve_{name}")) == exercises.RIGHT
    assert "raises ZeroDivisionError" in check(name)(lambda *_: 1 / 0)


def put(z, columns, values):
    out = z.clone()
    out[..., columns] = values[..., columns]
    return out


def in_place(z, donor, head, d_head):
    z[..., head * d_head : (head + 1) * d_head] = donor[..., head * d_head : (head + 1) * d_head]
    return z


def last_only(z, donor, head, d_head):
    out = z.clone()
    columns = slice(head * d_head, (head + 1) * d_head)
    out[:, -1, columns] = donor[:, -1, columns]
    return out


def mean_of(level):
    def hold(x, index, mean):
        out = x.clone()
        out[..., index] = level(x, index, mean)
        return out

    return hold


def bootstrap(draw):
    def interval(values, clusters, rng):
        means = [draw(values, clusters, rng) for _ in range(400)]
        return np.quantile(means, 0.025), np.quantile(means, 0.975)

    return interval


def by_case(values, clusters, rng):
    return rng.choice(values, len(values)).mean()


def one_pair(values, clusters, rng):
    name = rng.choice(sorted(set(clusters)))
    return values[np.array(clusters) == name].mean()


def first_of_each(values, clusters, rng):
    first = np.array([values[clusters.index(name)] for name in dict.fromkeys(clusters)])
    return rng.choice(first, 4).mean()


def by_value(low, high, own):
    return "specific" if (low + high) / 2 < own / 2 else "not specific"


def one_sided(low, high, own):
    return "specific" if high < own / 2 else "not specific" if low > own / 2 else "undecided"


WRONG = [
    ("head_patch", in_place, "changes its input in place"),
    ("head_patch", lambda z, d, h, n: z, "nothing is changed"),
    ("head_patch", lambda z, d, h, n: d, "all heads are the donor's"),
    ("head_patch", lambda z, d, h, n: put(z, [h], d), "one number is replaced"),
    ("head_patch", lambda z, d, h, n: put(d, slice(h * n, (h + 1) * n), z), "the wrong way round"),
    ("head_patch", last_only, "only the last position"),
    ("head_patch", lambda z, d, h, n: put(z, slice(h, h + n), d), "whose columns are 4 to 7"),
    ("head_patch", lambda z, d, h, n: z[0], "has shape"),
    ("carried", lambda o, d, p: ((p - o) / (d - o)).mean(), "divide mean by mean"),
    ("carried", lambda o, d, p: (p - o).mean(), "Divide by the gap"),
    ("carried", lambda o, d, p: (d - p).mean() / (d - o).mean(), "the share that is left"),
    ("carried", lambda o, d, p: (o - p).mean() / (d - o).mean(), "the sign is wrong"),
    ("carried", lambda o, d, p: p.mean() / d.mean(), "a ratio of two scores"),
    ("carried", lambda o, d, p: 0.5, "should be 0.689"),
    ("like_units", lambda a, c, r: c, "a chosen unit is among"),
    ("like_units", lambda a, c, r: r.choice([i for i in range(400) if i not in c], 5, False), "could not have carried"),
    ("like_units", lambda a, c, r: r.choice([i for i in range(400, 430) if i not in c], 5, False), "Match each one"),
    ("like_units", lambda a, c, r: [401, 402, 403, 4, 5], "the same for every seed"),
    ("like_units", lambda a, c, r: [401] * 5, "drawn twice"),
    ("like_units", lambda a, c, r: [401], "1 units are drawn for 5"),
    ("like_units", lambda a, c, r: 7, "a list of numbers"),
    ("hold_at_mean", mean_of(lambda x, i, m: 0.0), "zero ablation"),
    ("hold_at_mean", mean_of(lambda x, i, m: x[..., i].mean((0, 1))), "this very batch"),
    ("hold_at_mean", mean_of(lambda x, i, m: m.flip(0)), "in the order of index"),
    ("hold_at_mean", mean_of(lambda x, i, m: x[..., i] + m), "in its place"),
    ("hold_at_mean", lambda x, i, m: torch.full_like(x, 7.0), "all others as they were"),
    ("interval", bootstrap(by_case), "draw whole pairs of names"),
    ("interval", bootstrap(one_pair), "not of their mean"),
    ("interval", bootstrap(first_of_each), "draw as many pairs as there are"),
    ("interval", lambda v, c, r: v.mean(), "two numbers"),
    ("interval", lambda v, c, r: (5.0, 6.0), "is not between"),
    ("specific", lambda low, high, own: "yes", "Allowed: specific"),
    ("specific", by_value, "settles nothing"),
    ("specific", one_sided, "*backwards*"),
    ("specific", lambda low, high, own: cycle.solve_specific(low, high, 0.8), "not a fixed number"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wrong", "words"), WRONG, ids=[f"{n} {w[:20]}" for n, _, w in WRONG])
def test_what_people_typically_write_is_refused_in_the_right_words(name, wrong, words):
    said = check(name)(wrong)
    assert said.startswith("not yet: ") and words in said, said
