"""Exercises of notebook 05: a blank is no answer, the solution is right, and typical wrong answers are told apart."""

import pytest
import torch
import wrong_answers

from glassbox_utils.lab.exercises import RIGHT, steering_vectors


def unit(v):
    return v / v.norm()


def places(x, push, here):
    return x + here[:, None] * push


def kl(p, q):
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return p.exp() * (p - q)


WRONG = {
    "difference_of_means": [
        (lambda a, m, b, n: unit(a.mean((0, 1)) - b.mean((0, 1))), "padding is counted"),
        (lambda a, m, b, n: unit(a[m].mean(0) - b[n].mean(0)), "long texts count more"),
        (lambda a, m, b, n: -steering_vectors.solve_difference_of_means(a, m, b, n), "sign"),
        (lambda a, m, b, n: 3 * steering_vectors.solve_difference_of_means(a, m, b, n), "length is not 1"),
        (lambda a, m, b, n: unit(a[:, 0].mean(0) - b[:, 0].mean(0)), "first token"),
        (lambda a, m, b, n: unit(a[0, 0]), "differs from"),
        (lambda a, m, b, n: a.mean(0) - b.mean(0), r"shape \(9, 8\)"),
    ],
    "pushed": [
        (lambda x, u, s, a: x, "nothing has changed"),
        (lambda x, u, s, a: x + a[:, None, None] * u, "unit is missing"),
        (lambda x, u, s, a: x + a[:, None] * s * u, "along the places"),
        (lambda x, u, s, a: x + a.mean() * s * u, "same strength"),
        (lambda x, u, s, a: torch.cat([x[:, :-1], x[:, -1:] + a[:, None, None] * s * u], 1), "only the last place"),
        (lambda x, u, s, a: x - a[:, None, None] * s * u, "sign"),
        (lambda x, u, s, a: x.add_(a[:, None, None] * s * u), "in place"),
        (lambda x, u, s, a: x + a * s * u, "raises RuntimeError"),
    ],
    "push_generated": [
        (lambda x, v, past, n: x + v if x.shape[1] > 1 else x, "tokens of the prompt are pushed"),
        (lambda x, v, past, n: x + v if x.shape[1] == 1 else x, "generated tokens are not pushed|tokens of the prompt"),
        (lambda x, v, past, n: places(x, v, torch.arange(x.shape[1]) >= n), "Count `past` too"),
        (lambda x, v, past, n: x + v, "tokens of the prompt are pushed"),
        (lambda x, v, past, n: places(x, v, past + torch.arange(x.shape[1]) > n), "not pushed"),
        (lambda x, v, past, n: x + v if past + x.shape[1] > n else x, "tokens of the prompt are pushed"),
    ],
    "price": [
        (lambda p, q: kl(q, p).sum(-1).mean(), r"KL\(steered"),
        (lambda p, q: kl(p, q).sum(), "sum over the places"),
        (lambda p, q: kl(p, q).sum(-1).mean() / torch.log(torch.tensor(2.0)), "bits"),
        (lambda p, q: kl(p, q).mean(), "averaged over the vocabulary"),
        (lambda p, q: (p.softmax(-1) * (p - q)).sum(-1).mean(), "log_softmax first"),
        (lambda p, q: -kl(p, q).sum(-1).mean(), "never negative"),
        (lambda p, q: kl(p, q).sum(-1), "one number"),
    ],
    "ordered": [
        (lambda m, z, p: ((m < z) & (z < p)).sum(), "number of prompts"),
        (lambda m, z, p: ((m <= z) & (z <= p)).float().mean(), "use <"),
        (lambda m, z, p: (m < p).float().mean(), "only the ends"),
        (lambda m, z, p: ((m < z) | (z < p)).float().mean(), "one step"),
        (lambda m, z, p: float(m.mean() < z.mean() < p.mean()), "ask each prompt"),
    ],
    "without": [
        (lambda a, b: a, "nothing was removed"),
        (lambda a, b: a - (a @ b) * b, "length 1"),
        (lambda a, b: unit(a - b), "still a part along b"),
        (lambda a, b: unit(b - (a @ b) * a), "still a part along b"),
        (lambda a, b: -steering_vectors.solve_without(a, b), "sign"),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_blank_the_solution_and_typical_wrong_answers(name):
    wrong_answers.held_to(steering_vectors, name, WRONG[name])


def test_another_way_to_the_same_answer_is_right():
    def by_loop(x, push, past, prompt):
        x = x.clone()
        for i in range(x.shape[1]):
            if past + i >= prompt:
                x[:, i] += push
        return x

    assert steering_vectors.check_push_generated(by_loop) == RIGHT
    assert (
        steering_vectors.check_price(
            lambda p, q: torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean")
        )
        == RIGHT
    )
