"""Exercises of notebook 02: a blank is no answer, the solution is right, and typical wrong answers are told apart."""

import random
import re

import pytest
import torch

from glassbox_utils.lab.exercises import BLANK, RIGHT
from glassbox_utils.lab.exercises import induction as heads


def diagonal(pattern, offset, skip=0):
    return pattern.diagonal(offset, -2, -1)[..., skip:].mean(-1)


def put(z, value, head, d, place=slice(None)):
    z = z.clone()
    z[:, place, head * d : (head + 1) * d] = value
    return z


def mine(z, head, d):
    return z[..., head * d : (head + 1) * d]


def from_layer(found, avoid, n_heads, rng, shut=True):
    """A control that forgets the groups."""
    drawn = []
    for layer, _ in found:
        taken = {*found, *drawn} | ({*avoid} if shut else set())
        drawn.append(rng.choice([(layer, h) for h in range(n_heads) if (layer, h) not in taken]))
    return drawn


def anywhere(found, avoid, n_heads, group, rng):
    return rng.sample(
        [(layer, h) for layer in range(12) for h in range(n_heads) if (layer, h) not in found], len(found)
    )


WRONG = {
    "duplicate_score": [
        (lambda p, n: diagonal(p, -(n - 1), 2), "induction score"),
        (lambda p, n: diagonal(p, -n), "BOS is counted"),
        (lambda p, n: diagonal(p, n), "above the main one"),
        (lambda p, n: p.diagonal(-n, -2, -1)[..., 1:].sum(-1), "take the mean"),
        (lambda p, n: p.diagonal(-n, -2, -1)[..., 1:], r"has shape \(2, 3, 4\)"),
    ],
    "patched": [
        (lambda z, o, h, d: put(z, 0, h, d), "set to zero"),
        (lambda z, o, h, d: o, "all heads come from the donor"),
        (lambda z, o, h, d: put(o, mine(z, h, d), h, d), "exchanged"),
        (lambda z, o, h, d: put(z, mine(o, h, d).mean((0, 1)), h, d), "mean ablation"),
        (lambda z, o, h, d: put(z, mine(o, h, d)[:, -1], h, d, -1), "only the last place"),
        (lambda z, o, h, d: put(z, mine(o, 1, d), 1, d), "other numbers have changed"),
        (lambda z, o, h, d: z, "nothing has changed"),
    ],
    "keys_without": [
        (lambda r, z, o, w, k: r @ k, "clean keys"),
        (lambda r, z, o, w, k: (r + o @ w) @ k, "speaks twice"),
        (lambda r, z, o, w, k: (r - z @ w) @ k, "silent"),
        (lambda r, z, o, w, k: (r + (z - o) @ w) @ k, "sign"),
        (lambda r, z, o, w, k: (o - z) @ w @ k, r"\*change\*"),
        (lambda r, z, o, w, k: r + (o - z) @ w, r"has shape \(5, 8\)"),
    ],
    "control": [
        (anywhere, "layers differ"),
        (lambda f, a, n, g, r: f, "head that was found"),
        (lambda f, a, n, g, r: from_layer(f, a, n, r, False), "to be avoided|shares its key head"),
        (lambda f, a, n, g, r: from_layer(f, a, n, r), "shares its key head"),
        (lambda f, a, n, g, r: [(3, 6), (3, 7), (7, 3)], "always the same"),
        (lambda f, a, n, g, r: [(3, 6), (3, 6), (7, 3)], "drawn twice"),
        (lambda f, a, n, g, r: [(3, 6)], "has 1"),
    ],
    "gap": [
        (lambda t: t[0, 0] - t[0, 1], "him alone"),
        (lambda t: 2 * heads.solve_gap(t), "divide by 2"),
        (lambda t: -heads.solve_gap(t), "sign"),
        (lambda t: (t[:, 0] - t[:, 1]).mean(), r"\*both\* pronouns"),
        (lambda t: "half of it", "one number"),
    ],
    "gap_and_leaning": [
        (lambda m, w: heads.solve_gap_and_leaning(m, w)[::-1], "exchanged"),
        (lambda m, w: (m.mean() - w.mean(), torch.cat([m, w]).mean()), "longer list"),
        (lambda m, w: (w.mean() - m.mean(), (m.mean() + w.mean()) / 2), "wrong sign"),
        (lambda m, w: (m.mean() - w.mean(), (m.mean() - w.mean()) / 2), "half of the gap"),
        (lambda m, w: m.mean() - w.mean(), "two numbers"),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_blank_the_solution_and_typical_wrong_answers(name):
    check, solve = getattr(heads, f"check_{name}"), getattr(heads, f"solve_{name}")
    assert check(lambda *_: None) == BLANK and check(lambda *_: ...) == BLANK
    assert check(solve) == RIGHT
    assert len(WRONG[name]) >= 5
    for wrong, words in WRONG[name]:
        said = check(wrong)
        assert re.search(words, said) and said.startswith("not yet: ") and "\n" not in said, said


def test_another_way_to_the_same_answer_is_right():
    def by_index(pattern, n):
        places = torch.arange(n + 1, 2 * n + 1)
        return pattern[..., places, places - n].mean(-1)

    def listed(found, avoid, n_heads, group, rng):
        return [list(h) for h in heads.solve_control(found, avoid, n_heads, group, rng)]

    assert heads.check_duplicate_score(by_index) == RIGHT and heads.check_control(listed) == RIGHT
    assert heads.check_control(lambda *a: heads.solve_control(*a[:4], random.Random(a[4].random()))) == RIGHT
