"""Exercises of notebook 04: a blank is no answer, the solution is right, and typical wrong answers are told apart."""

from itertools import pairwise

import pytest
import wrong_answers

from glassbox_utils.lab.exercises import RIGHT
from glassbox_utils.lab.exercises import feature_clamping as clamping


def spliced(x, code, rows, feature, target):
    code = code.clone()
    code[:, feature] = target
    return code @ rows


def last_only(x, code, rows, feature, target):
    x = x.clone()
    x[-1] += (target - code[-1, feature]) * rows[feature]
    return x


def in_place(x, code, rows, feature, target):
    x += (target - code[:, feature, None]) * rows[feature]
    return x


def logs(logits, tokens):
    return logits.log_softmax(-1)[:, tokens]


def pairs(words):
    return list(pairwise(words))


def share(found):
    return len(set(found)) / len(found)


def low(texts):
    return [text.lower().split() for text in texts]


def stands(ids, phrase, starts):
    return any(list(ids)[i : i + len(phrase)] == list(phrase) for i in starts if i >= 0)


WRONG = {
    "clamped": [
        (lambda x, c, w, f, t: x + t * w[f], r"\*adds\* the target"),
        (spliced, "is lost"),
        (lambda x, c, w, f, t: x + (t - c[:, f, None]) * w[f] / w[f].norm(), "not to be normalised"),
        (lambda x, c, w, f, t: x - (t - c[:, f, None]) * w[f], "sign is turned"),
        (last_only, "only the last position"),
        (in_place, "changes its input in place"),
        (lambda x, c, w, f, t: x, "nothing has changed"),
        (lambda x, c, w, f, t: x + (t - c[:, f, None]) * w[f].flip(0), r"not x \+"),
    ],
    "target_for": [
        (lambda s, r, n: s * n, "length 1 only"),
        (lambda s, r, n: s * n * r.norm(), r"needs \*less\*"),
        (lambda s, r, n: s * n / r.norm() ** 2, "squared length"),
        (lambda s, r, n: s * n / r.sum(), "sum of the entries"),
        (lambda s, r, n: n / r.norm(), "push has the size 50"),
    ],
    "output_score": [
        (lambda a, b, t: (logs(a, t).logsumexp(-1) - logs(b, t).logsumexp(-1)).mean(), "sign is turned"),
        (lambda a, b, t: (b[:, t] - a[:, t]).mean(), "logits rise"),
        (lambda a, b, t: (b[:, t].logsumexp(-1) - a[:, t].logsumexp(-1)).mean(), "logits rise"),
        (lambda a, b, t: (logs(b, t) - logs(a, t)).mean(), "mean over words"),
        (lambda a, b, t: (logs(b, t).exp().sum(-1) - logs(a, t).exp().sum(-1)).mean(), "difference of probabilities"),
        (lambda a, b, t: (logs(b, t).exp().sum(-1).mean() / logs(a, t).exp().sum(-1).mean()).log(), "comes last"),
        (lambda a, b, t: logs(b, t).logsumexp(-1).mean(), "the score is"),
    ],
    "distinct_2": [
        (lambda t: sum(share(pairs(w)) for w in low(t) if len(w) > 1) / 3, "by itself repeats nothing"),
        (lambda t: share(pairs([w for words in low(t) for w in words])), "into the next"),
        (lambda t: share([w for words in low(t) for w in words]), "single words"),
        (lambda t: share([p for text in t for p in pairs(text.split())]), "lower the case"),
        (lambda t: 0.5, "seven of ten"),
    ],
    "mentioned_later": [
        (lambda ids, p, s: stands(ids, p, range(len(ids))), "learned by heart"),
        (lambda ids, p, s: stands(ids, p, range(s + 1, len(ids))), "begins right at token"),
        (lambda ids, p, s: stands(ids, p, range(s - 1, len(ids))), "begins before `start`"),
        (lambda ids, p, s: set(p) <= set(ids[s:]), "another order"),
        (lambda ids, p, s: all(x in ids[s:] for x in p) and ids[s:].index(5) < ids[s:].index(6), "not side by side"),
        (lambda ids, p, s: False, "was missed"),
        (lambda ids, p, s: len(ids) < s or stands(ids, p, range(s, len(ids))), "shorter than `start`"),
    ],
    "enrichment": [
        (lambda r, w, m: r[m & w].float().mean(), "without the base rate"),
        (lambda r, w, m: r[m & w].float().mean() / r.float().mean(), "of all features"),
        (lambda r, w, m: r[w].float().mean() / r.float().mean(), "that the rule excluded"),
        (lambda r, w, m: r[m].float().mean() / r[m & w].float().mean(), "upside down"),
        (lambda r, w, m: 1.0, "the enrichment is 1"),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_blank_the_solution_and_typical_wrong_answers(name):
    wrong_answers.held_to(clamping, name, WRONG[name])


def test_another_way_to_the_same_answer_is_right():
    assert clamping.check_target_for(lambda s, r, n: s * n / float((r**2).sum() ** 0.5)) == RIGHT
    assert clamping.check_clamped(lambda x, c, w, f, t: x - c[:, [f]] * w[[f]] + t * w[f]) == RIGHT
