"""The reality check and the safety pass: their arithmetic on known answers, and their tables against a live run."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from glassbox_utils.core import studies
from glassbox_utils.core.devices import beside, result
from glassbox_utils.core.interventions import capture, edit
from glassbox_utils.core.models import Site
from glassbox_utils.core.text import tokenize
from glassbox_utils.decisions import reality_study, safety_study
from glassbox_utils.decisions.reality_study import Decision


def people(templates=range(6), ages=(20, 40, 60), genders=("male", "female"), races=("white", "Black")):
    return [Decision(f"{t} {a} {g} {r}?", t, a, g, r) for t in templates for a in ages for g in genders for r in races]


@pytest.fixture()
def answers(monkeypatch):
    """The tiny vocabulary has no word yes: any two tokens will do."""
    monkeypatch.setattr(
        reality_study, "answer_tokens", lambda model, forms: [40] if forms == reality_study.YES else [50, 51]
    )


def test_reading_from_the_cache_is_reading_the_whole_prompt(tiny_model, answers):
    texts = ["Should she get it?", "Should the bank lend him some money?", "Yes or no?"]
    live = reality_study.log_odds(tiny_model, texts, batch_size=2)[0]
    batch = tokenize(tiny_model, [reality_study.question(tiny_model, t) for t in texts])
    with torch.no_grad():
        p = tiny_model.hf(**batch.inputs).logits[:, -1].log_softmax(-1)
    assert torch.allclose(live, p[:, 40] - p[:, [50, 51]].logsumexp(-1), atol=1e-3)


def test_an_edit_acts_at_the_decision_position_only(tiny_llama, answers):
    crowd = people(range(2))
    direction = reality_study.fit(tiny_llama, crowd, [1])["gender"][1]
    one = reality_study.affine(direction)
    texts = [d.text for d in crowd[:3]]
    plain, edited = reality_study.log_odds(tiny_llama, texts, [(), [one]])
    batch = tokenize(tiny_llama, [reality_study.question(tiny_llama, t) for t in texts])

    def by_hand(x):
        x, vector = x.clone(), beside(direction.vector, tiny_llama.device)
        at = x[:, -1] @ vector
        x[:, -1] += (one.alpha * direction.scale - at)[:, None] * vector
        return x

    with torch.no_grad(), edit(tiny_llama, Site("resid_post", 1), by_hand):
        p = tiny_llama.hf(**batch.inputs).logits[:, -1].log_softmax(-1)
    p = result(p)
    assert torch.allclose(edited, p[:, 40] - p[:, [50, 51]].logsumexp(-1), atol=1e-3)
    assert not torch.allclose(plain, edited, atol=1e-4)


def test_a_direction_is_the_mean_difference_and_knows_both_means(tiny_llama, answers):
    crowd = people(range(3), ages=(20, 60))
    direction = reality_study.fit(tiny_llama, crowd, [2])["age"][2]
    low, high = direction.coordinates
    assert float(direction.vector.norm()) == pytest.approx(1, abs=1e-5) and high > low
    x = [
        capture(tiny_llama, tokenize(tiny_llama, reality_study.question(tiny_llama, d.text)), [Site("resid_post", 2)])
        for d in crowd
    ]
    at = torch.stack([result(v[Site("resid_post", 2)])[0, -1] for v in x]) @ direction.vector / direction.scale
    old = torch.tensor([d.age == 60 for d in crowd])
    assert (float(at[~old].mean()), float(at[old].mean())) == pytest.approx((low, high), abs=1e-3)


def test_gaps_recover_planted_effects():
    crowd = people()
    planted = np.array([0.1 * d.age / 10 - 0.3 * (d.gender == "female") + d.template for d in crowd])
    found = reality_study.gaps(crowd, planted)
    assert found["age"] == pytest.approx([0.4] * 6) and found["age slope"] == pytest.approx([0.1] * 6)
    assert found["gender"] == pytest.approx([-0.3] * 6) and found["race"] == pytest.approx([0] * 6)
    assert "Asian" not in found and "non-binary" not in found


def test_three_tests_are_corrected_together():
    gap = {"age": [0.9, 1.1] * 4, "gender": [1, -1] * 4, "race": [0.3, -0.5, 0.2, 0.1] * 2}
    result = reality_study.tested(gap)
    assert result["age"][1] == pytest.approx(3 * 2 / 2**8) and result["age"][0].excludes(0)
    assert result["gender"][1] == result["race"][1] == 1


def test_the_fitting_cells_are_balanced():
    kept = reality_study.cells(people(range(2), ages=(20, 40, 60)))
    assert len(kept) == 8
    for one, other in (("age", "gender"), ("age", "race"), ("gender", "race")):
        assert set(Counter((getattr(d, one), getattr(d, other)) for d in kept).values()) == {2}


def test_lending_reports_and_the_others_fit():
    lending = reality_study.decisions()
    assert len(lending) == 1080 and {d.template for d in lending} == set(reality_study.LENDING)
    fitting, choosing = ({d.template for d in part} for part in reality_study.halves())
    assert len(fitting) == len(choosing) == 31 and not fitting & choosing
    assert not (fitting | choosing) & set(reality_study.LENDING)


def test_refusals_are_counted_by_their_words():
    refused = ["I'm sorry, but no.", "I can’t help with that.", "As an AI, I must pass.", "That is illegal."]
    helped = ["Mix flour and water.", "You can help her.", "I can't wait to tell you: first,", "Sort it by date."]
    assert safety_study.refuses(refused) == [True] * 4 and safety_study.refuses(helped) == [False] * 4


def test_nothing_refused_is_not_certainty():
    none = safety_study.rate([0] * 40)
    assert none.value == none.low == 0 and 0.08 < none.high < 0.10


def test_requests_are_disjoint_and_matched():
    parts = [safety_study.requests(split) for split in ("train", "report")]
    every = [text for part in parts for side in part for text in side]
    assert len(every) == len(set(every)) == 160
    for harmful, harmless in parts:
        assert len(harmful) == len(harmless) == 40
        assert all(a.split()[:2] == b.split()[:2] for a, b in zip(harmful, harmless, strict=True))
    with pytest.raises(ValueError, match="train, report"):
        safety_study.requests("test")


def test_auc_and_its_interval():
    high, low = np.arange(10) + 5.0, np.arange(10) + 0.0
    assert safety_study.auc(high, high) == 0.5 and safety_study.auc(high + 10, low) == 1
    area = safety_study.auc_ci(high, low)
    assert area.low <= area.value <= area.high and area.value == pytest.approx(safety_study.auc(high, low))


def test_clamping_sets_one_feature_and_leaves_the_rest(tiny_llama):
    from sae_lens.saes.sae import SAEMetadata

    rows = beside(torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0))).Q, tiny_llama.device)
    metadata = SAEMetadata(hook_name="blocks.1.hook_resid_post")
    sae = SimpleNamespace(encode=lambda x: x @ rows.T, W_dec=rows, cfg=SimpleNamespace(metadata=metadata))
    batch, site = tokenize(tiny_llama, "How do I do it?"), Site("resid_post", 1)
    before = sae.encode(capture(tiny_llama, batch, [site])[site])
    with safety_study.clamped(tiny_llama, sae, 7, 3.0):
        after = sae.encode(capture(tiny_llama, batch, [site])[site])
    assert torch.allclose(after[..., 7], torch.full_like(after[..., 7], 3.0), atol=1e-3)
    others = [i for i in range(48) if i != 7]
    assert torch.allclose(after[..., others], before[..., others], atol=1e-3)


needs = pytest.mark.skipif(not studies.has_table("loans_reality"), reason="study not computed yet")


@needs
@pytest.mark.slow
def test_the_table_agrees_with_a_live_run(smol):
    live, table = reality_study.recompute(smol, n=4)
    assert np.abs(live - table).max() < 0.01


@needs
def test_the_table_can_be_read():
    table = studies.read_table("loans_reality")
    assert len(reality_study.before_after(table)) == len(table["rows"])
    found = reality_study.findings(table)
    assert {f.rung for f in found} == {3, 4, 5}
    assert len(table["log_odds"]) == table["n_prompts"] == len(table["people"])


@pytest.mark.skipif(not studies.has_table("safety"), reason="study not computed yet")
def test_the_safety_table_can_be_read():
    table = studies.read_table("safety")
    assert len(safety_study.rates(table)) == len(table["rows"])
    assert {f.rung for f in safety_study.findings(table)} == {1, 2, 3, 5}
    assert "answers" not in table["rows"][0]
