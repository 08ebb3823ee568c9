"""Exercises of notebook 02: a duplicate head, a patched head, composed keys, controls, a balanced gap, a leaning."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.lab.exercises import answer, checker, near, number, tensor, wrong_if

Function = Callable[..., Any]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- A: heads that look at their own copy ---------------------------------------------------------------


def solve_duplicate_score(pattern: Float[Tensor, "row head dst src"], n: int) -> Float[Tensor, "row head"]:
    """The n-th diagonal below the main one, without its entry at BOS."""
    return pattern.diagonal(-n, -2, -1)[..., 1:].mean(-1)


@checker
def check_duplicate_score(function: Function) -> None:
    """Rows of [BOS, n tokens, the same n]: place n + i holds the copy of place i."""
    n = 4
    pattern = _random(2, 3, 2 * n + 1, 2 * n + 1, seed=1).abs().tril()
    found, wanted = tensor(answer(function, pattern, n), (2, 3)), solve_duplicate_score(pattern, n)
    wrong_if(
        any(near(found, pattern.diagonal(-(n - 1), -2, -1)[..., skip:].mean(-1)) for skip in range(3)),
        "that is the induction score: it looks at the token *after* the earlier copy. Here it is the copy itself, "
        "n places back.",
    )
    wrong_if(
        near(found, pattern.diagonal(-n, -2, -1).mean(-1)),
        "BOS is counted too: the first entry of this diagonal is the attention from place n to BOS, which is no copy.",
    )
    wrong_if(near(found, pattern.diagonal(-1, -2, -1)[..., 1:].mean(-1)), "that is the previous-token score.")
    wrong_if(
        near(found, pattern.diagonal(n, -2, -1).mean(-1)) or near(found, torch.zeros(2, 3)),
        "that diagonal is above the main one, where a causal pattern is zero: use offset -n.",
    )
    wrong_if(
        near(found, pattern.diagonal(-n, -2, -1)[..., 1:].sum(-1)), "that is the sum over the places: take the mean."
    )
    wrong_if(not near(found, wanted), "the values differ from the mean attention of the second copies to the first.")


# --- B: one head's output from another run --------------------------------------------------------------


def solve_patched(
    z: Float[Tensor, "row pos width"], donor: Float[Tensor, "row pos width"], head: int, d_head: int
) -> Float[Tensor, "row pos width"]:
    """The head's own d_head numbers come from the donor, at every place; the others stay."""
    z = z.clone()
    mine = slice(head * d_head, (head + 1) * d_head)
    z[..., mine] = donor[..., mine]
    return z


@checker
def check_patched(function: Function) -> None:
    """The heads stand side by side in the last dimension."""
    z, donor, head, d = _random(2, 5, 12, seed=2), _random(2, 5, 12, seed=3), 2, 4
    found, wanted = tensor(answer(function, z, donor, head, d), z.shape), solve_patched(z, donor, head, d)
    mine = slice(head * d, (head + 1) * d)
    wrong_if(near(found, z), "nothing has changed: z is returned as it was.")
    wrong_if(near(found, donor), "all heads come from the donor: replace the numbers of one head only.")
    wrong_if(
        near(found, solve_patched(donor, z, head, d)),
        "the two runs are exchanged: the head comes from the donor, everything else from z.",
    )
    wrong_if(
        near(found[..., mine], torch.zeros(2, 5, d)), "the head is set to zero: that is an ablation. Copy the donor's."
    )
    wrong_if(
        near(found[..., mine], donor[..., mine].mean((0, 1)).expand(2, 5, d)),
        "that is mean ablation: patching takes the donor's output place by place.",
    )
    wrong_if(
        near(found[:, -1], wanted[:, -1]) and near(found[:, :-1], z[:, :-1]),
        "only the last place is patched: an induction head reads keys at earlier places, so patch all.",
    )
    wrong_if(
        not near(found, wanted),
        "other numbers have changed: head h owns the last dimension from h * d_head up to (h + 1) * d_head.",
    )


# --- C: whom the keys come from -------------------------------------------------------------------------


def solve_keys_without(
    resid: Float[Tensor, "pos d_model"],
    z: Float[Tensor, "pos d_head"],
    other: Float[Tensor, "pos d_head"],
    w_out: Float[Tensor, "d_head d_model"],
    w_key: Float[Tensor, "d_model d_key"],
) -> Float[Tensor, "pos d_key"]:
    """The stream without what the sender wrote and with what it writes in the other run, read by the keys."""
    return (resid + (other - z) @ w_out) @ w_key


@checker
def check_keys_without(function: Function) -> None:
    """Path patching: the sender's write changes on the way into these keys alone."""
    resid, z, other = _random(5, 8, seed=4), _random(5, 3, seed=5), _random(5, 3, seed=6)
    w_out, w_key = _random(3, 8, seed=7), _random(8, 2, seed=8)
    found = tensor(answer(function, resid, z, other, w_out, w_key), (5, 2))
    wrong_if(near(found, resid @ w_key), "these are the clean keys: the sender still says what it said.")
    wrong_if(
        near(found, (resid + other @ w_out) @ w_key),
        "the sender speaks twice: take away what it wrote in this run, z @ w_out, before you add the other.",
    )
    wrong_if(
        near(found, (resid - z @ w_out) @ w_key),
        "the sender is silent: that is zero ablation of the path. Add what it writes in the other run.",
    )
    wrong_if(near(found, (resid + (z - other) @ w_out) @ w_key), "the sign is turned round: out with z, in with other.")
    wrong_if(near(found, (other - z) @ w_out @ w_key), "that is the *change* of the keys: add it to the clean ones.")
    wanted = solve_keys_without(resid, z, other, w_out, w_key)
    wrong_if(not near(found, wanted), "the keys differ from (resid + (other − z) @ w_out) @ w_key.")


# --- D: a control that contains nothing of what it excludes ---------------------------------------------


def solve_control(found: Any, avoid: Any, n_heads: int, group: int, rng: Any) -> list[tuple[int, int]]:
    """For each head another one of its layer: none that was found or shut out, no group mate of those, none twice."""
    shut = {(layer, h // group) for layer, h in [*found, *avoid]}
    drawn: list[tuple[int, int]] = []
    for layer, _ in found:
        free = [(layer, h) for h in range(n_heads) if (layer, h // group) not in shut and (layer, h) not in drawn]
        drawn.append(rng.choice(free))
    return drawn


@checker
def check_control(function: Function) -> None:
    """Same layers, as many heads, nothing excluded, nothing twice, and really random."""
    found, avoid, n_heads, group = [(3, 0), (3, 1), (7, 8)], [(3, 3), (7, 0), (5, 5)], 12, 3
    sets = []
    for seed in range(60):
        drawn = answer(function, found, avoid, n_heads, group, random.Random(seed))
        fine = isinstance(drawn, Sequence) and all(isinstance(h, tuple | list) and len(h) == 2 for h in drawn)
        wrong_if(not fine, "return a list of pairs (layer, head).")
        pairs = [(int(a), int(b)) for a, b in drawn]
        wrong_if(len(pairs) != len(found), f"{len(found)} heads were found, and your control has {len(pairs)}.")
        wrong_if(
            sorted(a for a, _ in pairs) != sorted(a for a, _ in found),
            "the layers differ: each head is replaced by one of its own layer, or depth explains the difference.",
        )
        wrong_if(any(not 0 <= h < n_heads for _, h in pairs), f"a layer has heads 0 to {n_heads - 1}.")
        wrong_if(bool({*pairs} & {*found}), "the control holds a head that was found: it can't fail to do the same.")
        wrong_if(bool({*pairs} & {*avoid}), "the control holds a head that was to be avoided.")
        wrong_if(len({*pairs}) < len(pairs), "a head is drawn twice: the control ablates fewer heads than the set.")
        shut = {(a, h // group) for a, h in [*found, *avoid]}
        wrong_if(
            bool({(a, h // group) for a, h in pairs} & shut),
            "the control holds a head that shares its key head with one that is shut out: heads h // group alike.",
        )
        sets.append(tuple(pairs))
    wrong_if(len({*sets}) < 10, "the draws are (nearly) always the same: one draw says nothing. Use rng.choice.")


# --- E: look at him, look at her ------------------------------------------------------------------------


def solve_gap(table: Float[Tensor, "pronoun job"]) -> Float[Tensor, ""]:
    """Half of: him prefers the man's job, her prefers the woman's; what both pronouns do alike cancels."""
    (him_man, him_woman), (her_man, her_woman) = table
    return ((him_man - him_woman) + (her_woman - her_man)) / 2


@checker
def check_gap(function: Function) -> None:
    """A difference of differences, halved."""
    for seed in (9, 10):
        table = _random(2, 2, seed=seed).abs() / 4
        value, wanted = number(answer(function, table)), number(solve_gap(table))
        wrong_if(
            near(value, number(table[0, 0] - table[0, 1])),
            "that is him alone: a head that looks at the nearer noun, or at any doctor, would pass. Use her as well.",
        )
        wrong_if(near(value, 2 * wanted), "that is the sum over both pronouns: divide by 2.")
        wrong_if(near(value, -wanted), "the sign is turned round: positive is towards the pronoun's stereotype.")
        wrong_if(
            near(value, number((table[:, 0] - table[:, 1]).mean())),
            "that is how much more *both* pronouns look at the man's job: for her, turn the sign.",
        )
        wrong_if(not near(value, wanted), "it is not ((him→man − him→woman) + (her→woman − her→man)) / 2.")


# --- F: the gap hides the leaning -----------------------------------------------------------------------


def solve_gap_and_leaning(men: Float[Tensor, " prompt"], women: Float[Tensor, " prompt"]) -> tuple[Tensor, Tensor]:
    """How differently the model treats the jobs, and where it leans for both."""
    return men.mean() - women.mean(), (men.mean() + women.mean()) / 2


@checker
def check_gap_and_leaning(function: Function) -> None:
    """logit(he) - logit(she) after men's and after women's jobs: unequally many prompts."""
    men, women = _random(6, seed=11) + 1, _random(4, seed=12) - 0.5
    found = answer(function, men, women)
    pair = isinstance(found, tuple | list) or tuple(getattr(found, "shape", ())) == (2,)
    wrong_if(not pair or len(found) != 2, "return two numbers: gap, leaning.")
    gap, lean = (number(x) for x in found)
    g, m = (number(x) for x in solve_gap_and_leaning(men, women))
    wrong_if(near(gap, m) and near(lean, g), "the two are exchanged: the gap comes first.")
    wrong_if(near(gap, -g), "the gap has the wrong sign: men's jobs minus women's.")
    wrong_if(
        near(lean, number(torch.cat([men, women]).mean())),
        "the leaning was averaged over prompts: the longer list counts more. Average the two means.",
    )
    wrong_if(near(lean, g / 2), "half of the gap is no leaning: add the two means, do not subtract them.")
    wrong_if(not near(gap, g), "the gap is the mean after men's jobs minus the mean after women's jobs.")
    wrong_if(not near(lean, m), "the leaning is the average of the two means.")
