"""Exercises of notebook 03: a blank is no answer, the solution is right, and typical wrong answers are told apart."""

import pytest
import torch
import wrong_answers

from glassbox_utils.lab.exercises import RIGHT, features


def kept(hidden, k, relu=True, dim=-1):
    values, chosen = hidden.topk(k, dim=dim)
    return torch.zeros_like(hidden).scatter(dim, chosen, values.relu() if relu else values)


def by_size(hidden, k):
    chosen = hidden.abs().topk(k, dim=-1).indices
    return torch.zeros_like(hidden).scatter(-1, chosen, hidden.gather(-1, chosen))


def error(x, code, rows, bias):
    return code @ rows + bias - x


def spliced(x, rebuilt, keep, first=True):
    keep = keep.clone()
    keep[:, 0] |= first
    return torch.where(keep[..., None], x, rebuilt)


def massive(x, median):
    return x.norm(dim=-1) > 3 * median


WRONG = {
    "topk": [
        (lambda h, k: h.topk(k, dim=-1).values, "put them back"),
        (lambda h, k: kept(h, k, relu=False), "negative value"),
        (by_size, "negative value"),
        (lambda h, k: kept(h, k, dim=0), "best k tokens"),
        (lambda h, k: (h * (h >= h.flatten().topk(9 * k).values[-1])).relu(), "BatchTopK"),
        (lambda h, k: (kept(h, k) > 0).float(), "other values"),
        (lambda h, k: h.relu(), "active features, and may have 3"),
        (lambda h, k: kept(h, k - 1), "not the k largest"),
        (lambda h, k: kept(h, k)[:, :5], r"shape \(9, 5\)"),
    ],
    "sae_loss": [
        (lambda x, c, w, b: (c @ w - x).square().sum(-1).mean(), "bias is missing"),
        (lambda x, c, w, b: error(x, c, w, b).square().mean(), "averaged over dimensions"),
        (lambda x, c, w, b: error(x, c, w, b).square().sum(), "sum over all tokens"),
        (lambda x, c, w, b: error(x, c, w, b).norm(dim=-1).mean(), "no root"),
        (lambda x, c, w, b: error(x, c, w, b).abs().sum(-1).mean(), "absolute errors"),
        (lambda x, c, w, b: error(x, c, w, b).square().sum(-1).mean().item(), "nothing can be learnt"),
        (lambda x, c, w, b: (c @ w.T - x).sum(), "raises RuntimeError"),
    ],
    "spliced": [
        (lambda x, r, m: r, "everything was replaced"),
        (lambda x, r, m: x, "nothing was replaced"),
        (lambda x, r, m: spliced(x, r, massive(x, m), first=False), "first token"),
        (lambda x, r, m: spliced(x, r, massive(r, m)), "massive position was replaced"),
        (lambda x, r, m: spliced(x, r, massive(x, m) | massive(r, m)), r"\*reconstruction\*"),
        (lambda x, r, m: spliced(r, x, massive(x, m)), "exchanged"),
        (lambda x, r, m: spliced(x, r, x.norm(dim=-1) > 0.9 * m), "other positions"),
    ],
    "loss_recovered": [
        (lambda ce, s, m: (s - ce) / (m - ce), r"\*lost\*"),
        (lambda ce, s, m: ce / s, "flatters"),
        (lambda ce, s, m: (m - s) / m, "ends at a loss of 0"),
        (lambda ce, s, m: max(0.0, (m - s) / (m - ce)), "cut off at 0"),
        (lambda ce, s, m: 100 * (m - s) / (m - ce), "per cent"),
        (lambda ce, s, m: "most of it", "should be one number"),
    ],
    "dead_features": [
        (lambda c: int((c == 0).all(0).all(0).sum()), "a count"),
        (lambda c: (c == 0).flatten(0, 1).all(0), "a mask"),
        (lambda c: (c == 0).flatten(0, 1).any(0).nonzero()[:, 0], "silent at some token"),
        (lambda c: (c < 1e-3).flatten(0, 1).all(0).nonzero()[:, 0], "rare or weak"),
        (lambda c: (c > 0).flatten(0, 1).any(0).nonzero()[:, 0], "that live"),
        (lambda c: [1, 2], "not \\[1, 2\\]"),
    ],
    "detection": [
        (lambda a, s: float((a[:, None] > s[None]).float().mean()), "ties count half"),
        (lambda a, s: float((a[:, None] >= s[None]).float().mean()), "ties count fully"),
        (lambda a, s: 1 - features.solve_detection(a, s), "exchanged"),
        (lambda a, s: float(a.mean() - s.mean()), "means are compared"),
        (lambda a, s: 0.7, "same score"),
    ],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_blank_the_solution_and_typical_wrong_answers(name):
    wrong_answers.held_to(features, name, WRONG[name])


def test_every_exercise_has_wrong_answers():
    assert {n.removeprefix("solve_") for n in dir(features) if n.startswith("solve_")} == set(WRONG)


def test_another_way_to_the_same_answer_is_right():
    def by_threshold(hidden, k):
        return (hidden * (hidden >= hidden.topk(k, -1).values[:, -1:])).clamp(min=0)

    assert features.check_topk(by_threshold) == RIGHT
    assert features.check_dead_features(lambda code: [i for i in range(10) if not code[..., i].any()]) == RIGHT
    assert features.check_loss_recovered(lambda ce, s, m: 1 - (s - ce) / (m - ce)) == RIGHT


def test_the_solutions_are_what_the_library_computes(small_sae):
    from glassbox_utils.core import coding
    from glassbox_utils.saes.harvest import ordinary

    sae, x = small_sae
    hidden = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    code = features.solve_topk(hidden, sae.cfg.k)
    torch.testing.assert_close(code, coding.encode(sae, x))
    loss = features.solve_sae_loss(x, code, sae.W_dec, sae.b_dec)
    torch.testing.assert_close(loss, (coding.decode(sae, code) - x).square().sum(-1).mean())
    rows = torch.stack([x[:8], x[8:16]])
    rows[0, 3] *= 50
    keep = ordinary(rows, float(x.norm(dim=-1).median()))
    found = features.solve_spliced(rows, torch.zeros_like(rows), float(x.norm(dim=-1).median()))
    assert torch.equal(found == 0, keep[..., None].expand_as(found))


@pytest.fixture
def small_sae():
    from sae_lens import TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=12, d_sae=40, k=4, metadata={}))
    sae.W_dec.data = torch.nn.functional.normalize(torch.randn(40, 12), dim=-1)
    sae.W_enc.data = sae.W_dec.data.t().clone()
    sae.b_enc.data += 0.1 * torch.randn(40)
    return sae.requires_grad_(False), torch.randn(32, 12)
