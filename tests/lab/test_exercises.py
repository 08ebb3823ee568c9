"""Exercises: a blank is no answer, the solution is right, and what people typically write is told what is wrong."""

from pathlib import Path

import nbformat
import pytest
import torch
import wrong_answers

from glassbox_utils.lab import exercises
from glassbox_utils.lab.exercises import RIGHT
from glassbox_utils.lab.exercises import attention_heads as heads

INF = float("-inf")


def causal(scores):
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), INF)


def in_place(pattern):
    pattern[..., 0] = 0
    return pattern / pattern.sum(-1, keepdim=True).clamp_min(1e-9)


def row_instead(pattern):
    pattern = pattern.clone()
    pattern[..., 0, :] = 0
    return pattern


def zeroed(pattern):
    pattern = pattern.clone()
    pattern[..., 0] = 0
    return pattern


def put(z, value, head=slice(None), place=-1):
    z = z.clone()
    z[:, place, head] = value
    return z


def pick(x, tokens, place=-1):
    return x[torch.arange(len(x)), place, tokens]


def contrasts(table):
    return (
        table[0, 1] - table[0, 0] + table[1, 0] - table[1, 1],
        table[0, 0] - table[0, 1] + table[1, 0] - table[1, 1],
    )


WRONG = {
    "causal_pattern": [
        (lambda q, k: (q @ k.T / 4).softmax(-1), "looks at later ones"),
        (lambda q, k: (q @ k.T / 4).softmax(-1).tril(), r"before\* the softmax"),
        (lambda q, k: causal(q @ k.T).softmax(-1), "not scaled"),
        (lambda q, k: causal(q @ k.T / 4).T.softmax(0).T[:, :5], r"has shape \(6, 5\)"),
        (lambda q, k: (q @ k.T / 4).softmax(0), "does not add up to 1"),
        (lambda q, k: causal(k @ q.T / 4).softmax(-1), "weights differ"),
        (lambda q, k: causal(q @ k.T / 16).softmax(-1), "weights differ"),
        (lambda q, k: causal(q @ k / 4), "raises RuntimeError"),
    ],
    "without_first": [
        (in_place, "changes its input in place"),
        (row_instead, r"first \*column"),
        (zeroed, "do not add up to 1"),
        (lambda p: zeroed(p).masked_fill(zeroed(p) == 0, INF).softmax(-1).nan_to_num(0), "other proportions"),
        (lambda p: p, "first column is not zero"),
    ],
    "mean_ablated": [
        (lambda z, m, h: put(z, 0, h), "set to zero"),
        (lambda z, m, h: put(z, m), "other heads have changed"),
        (lambda z, m, h: put(z, m[h], h, slice(None)), "earlier positions have changed"),
        (lambda z, m, h: put(z, z[:, :, h].mean((0, 1)), h), "over this very prompt"),
        (lambda z, m, h: put(z, m[0], h), r"not means\[head\]"),
        (lambda z, m, h: z, "nothing has changed"),
    ],
    "logit_difference": [
        (lambda x, r, w: pick(x, w) - pick(x, r), "sign"),
        (lambda x, r, w: pick(x.softmax(-1), r) - pick(x.softmax(-1), w), "probabilities"),
        (lambda x, r, w: pick(x, r, 0) - pick(x, w, 0), "first token"),
        (lambda x, r, w: x[:, -1][:, r] - x[:, -1][:, w], "answers of all"),
        (lambda x, r, w: (pick(x, r) - pick(x, w)).mean(), r"shape \(\)"),
    ],
    "ceiling": [
        (lambda r: r, r"\*half\*"),
        (lambda r: 2 * r / (1 + r), "square root"),
        (lambda r: r**0.5, "2r / "),
        (lambda r: 2 * r**0.5 / (1 + r**0.5), "wrong order"),
        (lambda r: "0.93 or so", "should be one number"),
    ],
    "recency_and_identity": [
        (lambda t: contrasts(t), "divide by 2"),
        (lambda t: (contrasts(t)[1] / 2, contrasts(t)[0] / 2), "exchanged"),
        (lambda t: (t[0, 1] - t[0, 0], t[0, 0] - t[0, 1]), "off one order"),
        (lambda t: ((t[:, 1] - t[:, 0]).mean(), contrasts(t)[1] / 2), "recency is wrong"),
        (lambda t: t.mean(), "two numbers"),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_blank_the_solution_and_typical_wrong_answers(name):
    wrong_answers.held_to(heads, name, WRONG[name])


def test_another_way_to_the_same_answer_is_right():
    assert (
        heads.check_logit_difference(lambda x, r, w: pick(x.log_softmax(-1), r) - pick(x.log_softmax(-1), w)) == RIGHT
    )
    assert heads.check_ceiling(lambda r: torch.tensor(2 * r / (1 + r)).sqrt()) == RIGHT


def test_a_tensor_instead_of_a_number_is_named_in_one_line():
    with pytest.raises(exercises.WrongError, match=r"^the answer is tensor\(\[\[.*, and should be one number\.$"):
        exercises.number(torch.eye(3))


def modules():
    """Notebook -> its module of exercises."""
    names = {p.stem for p in Path(exercises.__file__).parent.glob("[a-z]*.py")}
    found = {p: p.stem.split("_", 1)[1] for p in (Path(__file__).parents[2] / "notebooks").glob("0*.ipynb")}
    return {path: name for path, name in found.items() if name in names}


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_the_notebook_shows_the_solutions_word_for_word(path):
    module = __import__(f"{exercises.__name__}.{modules()[path]}", fromlist=["x"])
    cells = nbformat.read(path, 4).cells
    prose = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    code = "\n".join(c.source for c in cells if c.cell_type == "code")
    names = [n.removeprefix("solve_") for n in dir(module) if n.startswith("solve_")]
    assert len(names) >= 5
    for name in names:
        assert f"```python\n{exercises.source(getattr(module, f'solve_{name}'), name)}\n```" in prose, name
        assert f"check_{name}({name})" in code and f"def {name}(" in code, name
    assert prose.count("<summary>Solution</summary>") >= len(names) <= prose.count("<summary>Hint</summary>")
