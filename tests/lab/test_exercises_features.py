"""Exercises of notebook 03: a blank is no answer, the solution is right, and typical wrong answers are told apart."""

import pytest
import torch
import wrong_answers

from glassbox_utils.lab.exercises import RIGHT, features


def kept(hidden, k, dim=-1):
    values, chosen = hidden.topk(k, dim=dim)
    return torch.zeros_like(hidden).scatter(dim, chosen, values.relu())


def over_batch(hidden, n, relu=True, by_size=False):
    flat = hidden.flatten()
    chosen = (flat.abs() if by_size else flat).topk(n).indices
    values = flat[chosen].relu() if relu else flat[chosen]
    return torch.zeros_like(flat).scatter(0, chosen, values).view_as(hidden)


def error(x, code, rows, bias):
    return code @ rows + bias - x


def spliced(x, rebuilt, keep, first=True):
    keep = keep.clone()
    keep[:, 0] |= first
    return torch.where(keep[..., None], x, rebuilt)


def massive(x, median):
    return x.norm(dim=-1) > 3 * median


WRONG = {
    "batch_topk": [
        (lambda h, k: h.flatten().topk(k * len(h)).values, "put them back"),
        (kept, "that is TopK"),
        (lambda h, k: over_batch(h, k), "only 3 are left"),
        (lambda h, k: kept(h, k, dim=0), "best k tokens"),
        (lambda h, k: over_batch(h, k * len(h), relu=False, by_size=True), "by size"),
        (lambda h, k: over_batch(h, k * len(h), relu=False), "negative value"),
        (lambda h, k: (over_batch(h, k * len(h)) > 0).float(), "other values"),
        (lambda h, k: over_batch(h, k * len(h) - 1), "not the 27 largest"),
        (lambda h, k: over_batch(h, k * len(h))[:, :5], r"shape \(9, 5\)"),
    ],
    "decoder_gradient": [
        (lambda x, c, w, b: features.solve_decoder_gradient(x, c, w, b).T, "transposed"),
        (lambda x, c, w, b: -features.solve_decoder_gradient(x, c, w, b), "sign"),
        (lambda x, c, w, b: c.T @ error(x, c, w, b) / len(x), "the 2 of the square"),
        (lambda x, c, w, b: 2 * c.T @ error(x, c, w, b), "sum over tokens"),
        (lambda x, c, w, b: 2 * c.T @ error(x, c, w, b) / x.numel(), "averaged over dimensions"),
        (lambda x, c, w, b: 2 * c.T @ (c @ w - x) / len(x), "bias is missing"),
        (lambda x, c, w, b: torch.ones_like(w), "silent at every token"),
        (lambda x, c, w, b: torch.zeros_like(w), "not the gradient"),
        (lambda x, c, w, b: c @ w.T, "raises RuntimeError"),
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
    "detection_score": [
        (lambda a, s: float((a[:, None] > s[None]).float().mean()), "ties count half"),
        (lambda a, s: float((a[:, None] >= s[None]).float().mean()), "ties count fully"),
        (lambda a, s: 1 - features.solve_detection_score(a, s), "exchanged"),
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
        return (hidden * (hidden >= hidden.flatten().topk(k * len(hidden)).values[-1])).clamp(min=0)

    def by_autograd(x, code, rows, bias):
        with torch.enable_grad():
            leaf = rows.clone().requires_grad_()
            error(x, code, leaf, bias).square().sum(-1).mean().backward()
        return leaf.grad

    assert features.check_batch_topk(by_threshold) == RIGHT
    assert features.check_decoder_gradient(by_autograd) == RIGHT
    assert features.check_dead_features(lambda code: [i for i in range(10) if not code[..., i].any()]) == RIGHT
    assert features.check_loss_recovered(lambda ce, s, m: 1 - (s - ce) / (m - ce)) == RIGHT


def test_the_solutions_are_what_the_library_computes(small_sae):
    from glassbox_utils.core import coding
    from glassbox_utils.saes import meaning
    from glassbox_utils.saes.gradients import topk_gradients
    from glassbox_utils.saes.harvest import ordinary

    sae, x = small_sae
    topk_gradients(sae.requires_grad_(True), x, torch.float32)
    ours = features.solve_decoder_gradient(x, coding.encode(sae, x).detach(), sae.W_dec.detach(), sae.b_dec.detach())

    def across(gradient):  # the library's loss has the length of the rows in it, which stays 1
        return gradient - (gradient * sae.W_dec).sum(-1, keepdim=True) * sae.W_dec

    torch.testing.assert_close(across(ours), across(sae.W_dec.grad))
    rows = torch.stack([x[:8], x[8:16]])
    rows[0, 3] *= 50
    keep = ordinary(rows, float(x.norm(dim=-1).median()))
    found = features.solve_spliced(rows, torch.zeros_like(rows), float(x.norm(dim=-1).median()))
    assert torch.equal(found == 0, keep[..., None].expand_as(found))
    yes, no = torch.randn(20).round(), torch.randn(30).round()
    assert features.solve_detection_score(yes, no) == pytest.approx(meaning.auc(yes.numpy(), no.numpy()), abs=1e-6)


@pytest.fixture
def small_sae():
    from sae_lens import TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=12, d_sae=40, k=4, metadata={}))
    sae.W_dec.data = torch.nn.functional.normalize(torch.randn(40, 12), dim=-1)
    sae.W_enc.data = sae.W_dec.data.t().clone()
    sae.b_enc.data += 0.1 * torch.randn(40)
    return sae, torch.randn(32, 12)
