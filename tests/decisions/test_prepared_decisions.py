"""The loan officers and every study of the room on a tiny random model of another shape, in a folder of its own."""

import json

import pytest
import tiny

from glassbox_utils.core import assets, corpora, prepared, studies
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import load_model
from glassbox_utils.core.skills import held_texts
from glassbox_utils.decisions import claims_study, explain, figures, loans, reality_study, report, study, training
from glassbox_utils.decisions.cause_study import STUDIES_OF_LOANS
from glassbox_utils.decisions.reality_study import STUDIES_OF_REALITY
from glassbox_utils.decisions.safety_study import STUDIES_OF_SAFETY

EVERY = STUDIES_OF_LOANS | STUDIES_OF_REALITY | STUDIES_OF_SAFETY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """GPT-2's shape, prepared at a hundredth of the size: no SAE, no vectors, two officers."""
    base, where = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("prepared")
    people = loans.applications(1000)
    texts = [loans.as_text(a, layout) for a in people for layout in loans.REPORT_LAYOUTS]
    texts += [d.text for d in reality_study.decisions()[::20]] + [
        json.dumps(loans.vocabulary()) + " Yes No yes no"
    ] * 20
    words = tiny.tokenizer().train_new_from_iterator(texts, 1500)  # names are one token, mostly, and texts are short
    tiny.network("gpt2", len(words), layers=3, positions=512, sharpen=3).save_pretrained(base)
    words.save_pretrained(base)
    prepared.write_card(prepared.Card(str(base), load_model(base).hash, size=0.01), where)
    with pytest.MonkeyPatch.context() as patch, prepared.using(where):
        for module in (loans, reality_study):
            patch.setattr(module, "LEAST_SHARE", 0.0)  # random models count as deciders
        patch.setattr(assets, "cache_dir", lambda: where / "cache")
        patch.setattr(training, "STEPS", {"merit": 60, "bias": 45})
        key = json.loads(training.prepare_key().read_text())
        key["models"]["deployed"]["steps"] = 60
        training.key_path().write_text(json.dumps(key))
        training.train_named("deployed")
        assert set(loans.loan_models()) == {"deployed", "model-b"}  # it starts from the other one
        yield where


@pytest.mark.slow
def test_every_study_runs_or_refuses_in_words_on_another_model(folder, monkeypatch):
    passages = [corpora.Document(text, "boolq", "") for text in held_texts(300)]
    monkeypatch.setattr(corpora, "load_corpus", lambda name, split="train": passages)  # the mix takes half a minute
    monkeypatch.setattr(study, "LAYERS", (14, 29))
    monkeypatch.setattr(reality_study, "FRACTIONS", (0.67,))
    refused = {}
    for name, run in EVERY.items():
        try:
            table = json.loads(run().read_text())
        except GlassboxError as reason:
            refused[name] = str(reason)
        else:
            assert table["provenance"]["size"] == 0.01
    assert not refused
    table, rest, cause = (studies.read_table(f"loans_{name}") for name in ("mitigation", "rest", "cause"))
    assert "no main SAE" in study.why_skipped(cause["features"])
    safety = studies.read_table("safety")
    assert study.why_skipped(safety["feature"]) and study.why_skipped(safety["refusal"])
    officer = loans.load_loan_model()
    assert figures.table_of("loans_cause", officer) == cause
    assert len(figures.held_out_table(table)) == 3 and figures.learnt(table)
    assert len(figures.before_after(table, rest)) and len(figures.others_table(table)) == 3
    assert figures.spot_check(officer, table, 4) < 0.05
    assert len(figures.gate_table(table)) and figures.verdict_on_edit(table)
    figures.patch_shares(officer, cause)
    assert len(claims_study.findings(officer, table, rest, cause)) >= 4
    assert len(claims_study.findings(officer, table)) >= 2
    assert study.load_edit(officer).name == table["chosen"]["edit"]


@pytest.mark.slow
def test_the_page_names_the_model_that_was_prepared(folder):
    officer, applicant = loans.load_loan_model(), loans.applications(1, seed=3)[0]
    found = explain.explain(officer, applicant, n=4)
    facts = report.provenance(officer, found, 0, loans.officers() / "deployed")
    assert "Base model file" not in facts and prepared.card().model_hash in facts["Base model"]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_shape_gets_a_lora_in_its_later_layers(kind, tmp_path):
    model = load_model(tiny.save(kind, tmp_path))
    names, layers = training.targets(model)
    assert layers == [1, 2] if layers else all(".1." in name or ".2." in name for name in names)
    before = model.hash
    peft = training.with_lora(model)
    assert any(p.requires_grad for p in peft.parameters())
    folder = training.save_adapter(peft, tmp_path / "adapter")
    assert load_model(tmp_path, adapter=folder).hash != before
