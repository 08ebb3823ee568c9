"""The checkers of notebook 07: right answers pass, typical wrong ones are told what they did."""

import numpy as np
import pytest
import torch
from scipy import stats

from glassbox_utils.lab.exercises import BLANK, RIGHT
from glassbox_utils.lab.exercises import your_own_decision as exercises

CHECKS = {
    "decide": exercises.check_decide,
    "two_parts": exercises.check_two_parts,
    "auc": exercises.check_auc,
    "impact_ratio": exercises.check_impact_ratio,
    "smallest": exercises.check_smallest,
    "wording": exercises.check_wording,
}


def both(difference, share):
    return lambda logits, yes, no: (difference(logits, yes, no), share(logits, yes, no))


def gap(logits, yes, no):
    return logits[:, yes] - logits[:, no]


def of_all(logits, yes, no):
    return logits.softmax(-1)[:, [yes, no]].sum(-1)


def rates(scores, groups, f=lambda x: (x > 0).mean()):
    return [f(scores[groups == g]) for g in np.unique(groups)]


def pairs(scores, right):
    return scores[right == 1][:, None] - scores[right == 0][None]


def error(x):
    return x.std(ddof=1) / len(x) ** 0.5


Z = stats.norm.ppf(0.975) + stats.norm.ppf(0.9)
WORDS = "{customer}, {amount} euros, {days} days, receipt {receipt}: "
THERE = (
    "{customer} wants {amount} euros back, {days} days after buying. Receipt: {receipt}. Is this refund accepted or "
    "rejected?"
)
RIGHT_ONES = [
    ("decide", both(gap, of_all)),
    ("decide", lambda logits, yes, no: [list(gap(logits, yes, no).numpy()), of_all(logits, yes, no).tolist()]),
    ("two_parts", lambda a, b: ((a + b) / 2, (a - b).mean() / 2)),
    ("auc", lambda x, y: (pairs(x, y) > 0).mean() + (pairs(x, y) == 0).mean() / 2),
    ("impact_ratio", lambda x, g: min(rates(x, g)) / max(rates(x, g))),
    ("smallest", lambda x: Z * error(x)),
    ("smallest", lambda x: 3.24 * error(x)),
    ("wording", lambda: {"chat": WORDS + "accepted or rejected?", "opening": "It is"}),
    ("wording", lambda: {"system": "Say accepted or rejected.", "chat": WORDS + "what now?", "opening": "It is"}),
]
WRONG_ONES = [
    ("decide", lambda *_: 3, "two things"),
    ("decide", both(lambda *a: -gap(*a), of_all), "sign is turned round"),
    ("decide", both(lambda x, y, n: gap(x.softmax(-1), y, n), of_all), "one of probabilities"),
    ("decide", both(lambda x, y, n: torch.tanh((x[:, y] - x[:, n]) / 2), of_all), "of the two probabilities alone"),
    ("decide", both(lambda *a: gap(*a)[0], of_all), "the shape of one number, expected [5]"),
    ("decide", both(lambda *a: "yes", of_all), "no number"),
    ("decide", both(gap, lambda x, y, n: x[:, [y, n]].softmax(-1).sum(-1)), "over the whole vocabulary"),
    ("decide", both(gap, lambda x, y, n: x.softmax(-1)[:, y]), "favourable answer only"),
    ("decide", both(gap, lambda x, y, n: x[:, y] + x[:, n]), "softmax first"),
    ("decide", both(gap, lambda x, y, n: x[:, 0]), "expected"),
    ("two_parts", lambda a, b: a + b, "two things"),
    ("two_parts", lambda a, b: ((a + b) / 2, (a - b) / 2), "mean over them"),
    ("two_parts", lambda a, b: ((a + b) / 2, (a - b).mean()), "twice too large"),
    ("two_parts", lambda a, b: ((a + b) / 2, (b - a).mean() / 2), "sign of the order's part"),
    ("two_parts", lambda a, b: ((a + b) / 2, (a + b).mean() / 2), "only what differs"),
    ("two_parts", lambda a, b: (a, (a - b).mean() / 2), "first wording's score alone"),
    ("two_parts", lambda a, b: (b, (a - b).mean() / 2), "second wording's score alone"),
    ("two_parts", lambda a, b: (a + b, (a - b).mean() / 2), "take their mean"),
    ("two_parts", lambda a, b: ((a - b) / 2, (a - b).mean() / 2), "which is the order's"),
    ("auc", lambda x, y: (pairs(x, y) > 0).mean(), "count as nothing"),
    ("auc", lambda x, y: (pairs(x, y) >= 0).mean(), "full win"),
    ("auc", lambda x, y: (pairs(x, y) < 0).mean() + (pairs(x, y) == 0).mean() / 2, "turned round"),
    ("auc", lambda x, y: ((x > 0) == (y > 0)).mean(), "knows no threshold"),
    ("auc", lambda x, y: np.corrcoef(x, y)[0, 1], "count pairs"),
    ("impact_ratio", lambda x, g: max(rates(x, g)) / min(rates(x, g)), "upside down"),
    ("impact_ratio", lambda x, g: max(rates(x, g)) - min(rates(x, g)), "about their ratio"),
    ("impact_ratio", lambda x, g: min(rates(x, g, np.mean)) / max(rates(x, g, np.mean)), "mean scores"),
    ("impact_ratio", lambda x, g: min(rates(x, g, lambda v: (v > 0).sum())) / max(rates(x, g, lambda v: (v > 0).sum())),
     "numbers of people"),
    ("impact_ratio", lambda x, g: min(rates(x, g)), "lowest rate alone"),
    ("smallest", lambda x: 3.24 * x.std() / len(x) ** 0.5, "`ddof=1`"),
    ("smallest", lambda x: 1.96 * error(x), "half of the samples"),
    ("smallest", lambda x: Z * x.std(ddof=1), "standard error is missing"),
    ("smallest", lambda x: Z * x.std(ddof=1) / len(x), "root of n, not by n"),
    ("smallest", lambda x: (1.645 + 1.282) * error(x), "one-sided"),
    ("smallest", lambda x: x.mean(), "mean that was seen"),
    ("wording", lambda: "accepted or rejected?", "a dictionary with `chat`"),
    ("wording", lambda: {"chat": "{customer}, {amount}, {days}: accepted or rejected?"}, "the field 'receipt'"),
    ("wording", lambda: {"chat": WORDS.replace("days}", "day}") + "accepted or rejected?"}, "Did you mean {days}?"),
    ("wording", lambda: {"chat": WORDS + "accepted or rejected? "}, "ends in a space or a line break"),
    ("wording", lambda: {"chat": WORDS + "accepted or rejected?", "opening": "It is "}, "opening ends in a space"),
    ("wording", lambda: {"chat": WORDS + "is it accepted?", "opening": "It is"}, "accepted alone"),
    ("wording", lambda: {"chat": WORDS + "what do you say?", "opening": "It is"}, "names no answer"),
    ("wording", lambda: {"chat": WORDS + "acceptedness or rejectedness?", "opening": "It is"}, "names no answer"),
    ("wording", lambda: {"chat": WORDS + "accepted, or unrejected?", "opening": "It is"}, "accepted alone"),
    ("wording", lambda: {"chat": WORDS + "accepted or rejected?"}, "without an opening"),
    ("wording", lambda: {"chat": THERE, "opening": "This refund is"}, "two that are there"),
]  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_a_stub_is_not_done_yet(name):
    assert CHECKS[name](lambda *_: None) == BLANK


@pytest.mark.parametrize("name", CHECKS)
def test_the_solution_is_right(name):
    assert CHECKS[name](getattr(exercises, f"solve_{name}")) == RIGHT


@pytest.mark.parametrize(("name", "answer"), RIGHT_ONES)
def test_other_ways_to_the_same_answer_are_right(name, answer):
    assert CHECKS[name](answer) == RIGHT


@pytest.mark.parametrize(("name", "answer", "said"), WRONG_ONES)
def test_typical_wrong_answers_are_told_what_they_did(name, answer, said):
    words = CHECKS[name](answer)
    assert said in words and words.startswith("not yet: "), words
    assert "/tmp" not in words and "\n" not in words
