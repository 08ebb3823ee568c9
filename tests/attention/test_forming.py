"""Induction in training: the rows, the small model, its scores; and what the shipped table says."""

import pytest
import torch
from wired import INDUCTION, PREVIOUS, wired_gpt2

from glassbox_utils.attention import forming, forming_study
from glassbox_utils.attention.patterns import induction_targets, repeated_tokens
from glassbox_utils.core import studies
from glassbox_utils.core.models import ModelError
from glassbox_utils.core.studies import read_table


def rows(n=6, seed=0, **changes):
    setup = forming.Setup(**changes)
    return setup, forming.repeating_rows(setup, n, torch.Generator().manual_seed(seed))


def test_rows_repeat_at_a_distance_of_their_own():
    setup, tokens = rows(200)
    assert tokens.shape == (200, setup.n_context) and tokens.max() < setup.vocabulary
    distances = {next(d for d in range(1, 40) if torch.equal(row[d:], row[:-d])) for row in tokens}
    assert distances == set(range(setup.shortest, setup.longest + 1))
    _, fixed = rows(20, shortest=12, longest=12)
    assert torch.equal(fixed[:, 12:], fixed[:, :-12])
    assert all(len(set(row[:8].tolist())) == 8 for row in tokens), "nothing but the repeat helps"


def test_induction_looks_where_the_library_says():
    batch = repeated_tokens(wired_gpt2(), 4, length=12)
    assert torch.equal(forming.where_induction_looks(batch.input_ids), induction_targets(batch))
    assert INDUCTION != PREVIOUS


def test_a_fresh_model_is_causal_and_knows_nothing():
    setup, tokens = rows()
    torch.manual_seed(0)
    model = forming.SmallModel(setup)
    logits, pattern = model(tokens)
    assert logits.shape == (6, 40, 64) and pattern.shape == (6, 2, 2, 40, 40)
    assert torch.allclose(pattern.sum(-1), torch.ones(()), atol=1e-5) and pattern.triu(1).abs().max() == 0
    other = tokens.clone()
    other[:, 20:] = 0
    assert torch.allclose(model(other)[0][:, :20], logits[:, :20], atol=1e-5)
    scores = forming.scores(model, tokens)
    assert scores.loss > 3.5 and scores.induction.max() < 0.2


def test_scores_of_a_head_that_is_perfect():
    """A stand-in model whose one head looks exactly where induction does."""
    setup, tokens = rows(n_layers=1, n_heads=1)
    wanted = forming.where_induction_looks(tokens)

    def model(x):
        pattern = wanted.float() / wanted.sum(-1, keepdim=True).clamp_min(1)
        return torch.zeros(*x.shape, setup.vocabulary), pattern[:, None, None]

    found = forming.scores(model, tokens)
    assert found.induction.item() == pytest.approx(1) and found.loss == pytest.approx(4.159, abs=1e-3)


@pytest.mark.parametrize("changes", [{"shortest": 30, "longest": 20}, {"longest": 40}, {"d_model": 63}, {"steps": 0}])
def test_sizes_that_do_not_fit_are_refused(changes):
    with pytest.raises(ModelError, match=r"Allowed|Choose"):
        forming.Setup(**changes)


def test_the_study_trains_every_arm(tmp_path, monkeypatch):
    monkeypatch.setattr(studies.assets, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(studies, "table_path", lambda name: tmp_path / f"{name}.json")
    threads = torch.get_num_threads()
    forming_study.study_forming(seeds=1, steps=10, rows=4)
    assert torch.get_num_threads() == threads
    table = read_table("heads_forming")
    assert (
        set(table["arms"]) == set(forming_study.ARMS)
        and table["provenance"]["command"] == "glassbox study heads-forming"
    )
    assert all(run["steps"] == [0, 10] and not run["formed"] for arm in table["arms"].values() for run in arm["runs"])


def test_the_shipped_table_says_that_the_phase_change_is_the_rule():
    arms = forming_study.forming_table()["arms"]
    formed = {name: sum(run["formed"] for run in arm["runs"]) for name, arm in arms.items()}
    assert {len(arm["runs"]) for arm in arms.values()} == {forming_study.SEEDS}
    assert formed["two layers"] == forming_study.SEEDS and formed["one layer"] == 0
