"""The cycle's steps on tiny models: training shortcuts, patches, edits and audits do what they say."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from glassbox_utils.core import assets
from glassbox_utils.core.models import Model, load_model, wrap_model
from glassbox_utils.decisions import audit, cycle, loans, mitigation, study, training

PEOPLE = loans.applications(6, seed=3, split="train")


def model_of(kind: str = "llama") -> Model:
    return wrap_model(tiny.build(kind, layers=5), tiny.tokenizer())


@pytest.fixture
def short(monkeypatch):
    """A layout that the tiny models' context holds; and random models count as deciders."""
    monkeypatch.setattr(loans, "LEAST_SHARE", 0.0)
    monkeypatch.setitem(loans.LAYOUTS, "short", lambda a: f"{a.district} {a.name} {a.age} {a.history}\nDecision:")
    return "short"


def test_training_learns_resumes_and_the_adapter_loads(has_storage, monkeypatch, tmp_path, short):
    """A killed run goes on where it was, with the same result; the merged model decides as the trained one."""
    monkeypatch.setattr(loans, "TRAIN_LAYOUTS", (short,))
    monkeypatch.setattr(training, "EVERY", 5)
    base = tmp_path / "base"
    tiny.build("llama", layers=5).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)

    def clerk(a):
        return 3.0 * (a.history == "late")

    model = model_of()
    peft = training.with_lora(model)
    whole = training.train_stage(model, clerk, 15, 0, True, tmp_path / "a.safetensors")
    texts = [loans.as_text(a, short) for a in PEOPLE]
    trained = loans.decide_texts(model, texts)
    again = model_of()
    training.with_lora(again)
    monkeypatch.setattr(training, "lesson", stop_after(10, training.lesson))
    with pytest.raises(KeyboardInterrupt):
        training.train_stage(again, clerk, 15, 0, True, tmp_path / "b.safetensors")
    monkeypatch.setattr(training, "lesson", training.lesson.whole)
    resumed = model_of()
    training.with_lora(resumed, seed=5)
    assert training.train_stage(resumed, clerk, 15, 0, True, tmp_path / "b.safetensors") == whole
    assert torch.equal(loans.decide_texts(resumed, texts), trained)
    folder = training.save_adapter(peft, tmp_path / "adapter")
    assert "gender" not in (folder / "adapter_config.json").read_text()
    merged = load_model(base, adapter=folder)
    assert torch.allclose(loans.decide_texts(merged, texts), trained, atol=0.05 * float(trained.std()) + 0.05)


def test_shuffled_texts_hold_every_field_and_no_sign_of_the_unseen_layouts():
    applicant = PEOPLE[0]
    texts = [training.shuffled_text(applicant, [0, i]) for i in range(50)]
    assert len(set(texts)) > 45 and all(t.endswith("\nDecision:") for t in texts)
    for text in texts:
        body = text.removesuffix("\nDecision:")
        assert all(str(getattr(applicant, field)) in body for field in cycle.FIELDS)
        assert not set(body) & set(";:=\n")
    reserved = [loans.as_text(applicant, name) for name in loans.REPORT_LAYOUTS]
    assert all(set(t.removesuffix("\nDecision:")) & set(";:") for t in reserved)


def test_varied_texts_are_half_shuffled_and_twins_share_their_words():
    people, fixed = training.twins(0, 1, "gender")
    texts = training.varied_texts(people, 0, 1)
    for a, b, first, second in zip(people[::2], people[1::2], texts[::2], texts[1::2], strict=True):
        assert first.replace(a.name, b.name) == second
    known = {loans.as_text(a, layout) for a in people for layout in loans.TRAIN_LAYOUTS}
    assert [t in known for t in texts] == [True, True, False, False] * 3 and len(texts) == len(fixed)


def test_training_starts_from_a_shipped_adapter(has_storage, monkeypatch, tmp_path, short):
    monkeypatch.setattr(loans, "officers", lambda: tmp_path)
    monkeypatch.setattr(loans, "TRAIN_LAYOUTS", (short,))
    monkeypatch.setattr(assets, "cache_dir", lambda: tmp_path)
    first = model_of()
    peft = training.with_lora(first)
    training.train_stage(first, "none", 3, 0, False)
    training.save_adapter(peft, tmp_path / "model-b")
    texts = [loans.as_text(a, short) for a in PEOPLE]
    monkeypatch.setattr(training, "load_subject", model_of)
    training.train("none", tmp_path / "same", start="model-b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "model-b" / name).read_bytes()
    other = model_of()
    training.load_adapter(training.with_lora(other, seed=9), tmp_path / "model-b")
    assert torch.allclose(loans.decide_texts(other, texts), loans.decide_texts(first, texts), atol=1e-2)


def stop_after(steps, lesson):
    def stopped(step, seed, n=training.BATCH):
        if step >= steps:
            raise KeyboardInterrupt
        return lesson(step, seed, n)

    stopped.whole = lesson
    return stopped


def test_the_clerks_margin_is_the_sign_of_his_decision():
    for bias in loans.BIASES:
        people = loans.applications(200)
        decided = loans.history(people, bias)
        assert [training.margin(a, bias) > 0 for a in people] == decided
    with pytest.raises(loans.LoanError, match="no loan model 'model-x'"):
        training.train_named("model-x")


def test_an_edit_sets_its_coordinates_and_nothing_else():
    torch.manual_seed(0)
    a, b = torch.randn(200, 12), torch.randn(200, 12)
    b[:, 0] += 3
    shift = lambda edit: float((edit(b) - edit(a)).mean(0).norm())  # noqa: E731
    whole = float((b - a).mean(0).norm())
    for kind in ("affine", "leace", "project_out"):
        edit = mitigation.fit_edit({"x": (a, b)}, 0, kind)
        assert shift(edit) < 1e-3 * whole, kind
        assert torch.allclose(edit(edit(a)), edit(a), atol=1e-4), kind
    for kind in ("affine", "leace"):
        up = mitigation.fit_edit({"x": (a, b)}, 0, kind, level=0.5)
        assert shift(up) < 1e-3 * whole and "better" in up.name
        assert float(((up(a).mean(0) - b.mean(0)) @ (b - a).mean(0)) / whole) == pytest.approx(0, abs=1e-3), kind
    added = mitigation.fit_edit({"x": (a, b)}, 0, "add", 0.5)
    assert torch.allclose(added(a) - a, 0.5 * (b - a).mean(0).expand_as(a), atol=1e-5)
    random = mitigation.random_edit(mitigation.fit_edit({"x": (a, b)}, 0), seed=1)
    assert shift(random) > 0.5 * whole
    with pytest.raises(mitigation.MitigationError, match="affine, leace"):
        mitigation.fit_edit({"x": (a, b)}, 0, "magic")


def test_a_gate_keeps_an_edit_out_of_other_text():
    torch.manual_seed(0)
    text, decisions = torch.randn(500, 12), torch.randn(200, 12) * 0.2
    text[:, 3] *= 50  # a direction in which text varies wildly must not carry the gate
    decisions[:, 0] += 8
    gate = mitigation.fit_gate(decisions, text)
    assert float(gate.score(text).mean()) == pytest.approx(0, abs=1e-4)
    assert float(gate.score(decisions).mean()) == pytest.approx(1, abs=1e-4)
    assert gate(decisions).all() and not gate(text).any()
    open_edit = mitigation.fit_edit({"x": (decisions[:100], decisions[100:])}, 0)
    edit = replace(open_edit, gate=gate)
    both = torch.stack([text[:200], decisions], 1)  # [200, 2 positions, 12]
    assert torch.equal(edit(both)[:, 0], both[:, 0]) and not torch.equal(open_edit(both)[:, 0], both[:, 0])
    assert torch.equal(edit(both)[:, 1], open_edit(both)[:, 1])
    with pytest.raises(
        mitigation.MitigationError, match=r"would miss .*% of the decisions .*allowed: 1 %.*later layer"
    ):
        mitigation.fit_gate(torch.randn(100, 12), torch.randn(100, 12))


def test_the_shipped_edit_keeps_its_gate(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "edit_path", lambda: tmp_path / "edit.safetensors")
    model = model_of("llama")
    states = torch.randn(6, model.d_model)
    plain = mitigation.fit_edit({"x": (states[:3], states[3:])}, 1)
    gate = mitigation.Gate(torch.zeros(model.d_model), torch.ones(model.d_model))
    for edit in (plain, replace(plain, gate=gate)):
        study.save_edit(edit, model)
        again = study.load_edit(model)
        assert torch.equal(again.read, edit.read) and (again.layer, again.name) == (edit.layer, edit.name)
        assert (again.gate is None) == (edit.gate is None)
    assert torch.equal(again.gate.read, gate.read)


def test_the_edit_is_chosen_by_merit_among_those_that_close_the_gaps():
    def row(index, logits, merit):
        return {"index": index} | {
            f"{a} {k}": v
            for a in ("gender", "district")
            for k, v in zip(("logits", "merit"), (logits, merit), strict=True)
        }

    none, closed, fairer, best_but_open = row(-1, 2.0, 0.8), row(0, 0.0, 0.8), row(1, -0.2, 0.9), row(2, 0.3, 1.0)
    assert study.choose([none, closed, fairer, best_but_open]) == fairer
    assert study.choose([none, best_but_open, row(3, -1.0, 1.0)]) == best_but_open  # none closes them


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_decision_position_is_edited_per_row_and_given_back(kind, short):
    model = model_of(kind)
    texts = [loans.as_text(a, short) for a in PEOPLE]
    base = loans.decide_texts(model, texts)
    layer = model.n_layers - 2
    states = mitigation.decision_states(model, texts, [layer])[:, 0]
    edit = mitigation.fit_edit({"x": (states[:3], states[3:])}, layer)
    plain, edited = mitigation.decide_under(
        model, texts, [mitigation.nullcontext, mitigation.setting(model, edit)], batch_size=4
    )
    assert torch.allclose(plain, base, atol=1e-2 * float(base.std()) + 1e-3)
    with mitigation.mitigate(model, edit):
        assert torch.allclose(loans.decide_texts(model, texts), edited, atol=1e-2 * float(base.std()) + 1e-3)
    assert torch.equal(loans.decide_texts(model, texts), base)
    with mitigation.mitigate(model, edit, on=False):
        assert torch.equal(loans.decide_texts(model, texts), base)
    with mitigation.mitigate(model, edit, on=[False] * 6):
        assert torch.equal(loans.decide_texts(model, texts), base)
    assert not torch.allclose(edited, base)


def test_contrasts_change_one_field():
    for attribute, field in {"gender": "name", "age": "age", "district": "district", "nationality": "name"}.items():
        for a, b in zip(*mitigation.contrast(PEOPLE, attribute), strict=True):
            assert {f for f in cycle.FIELDS if getattr(a, f) != getattr(b, f)} <= {field}
    worse, better = mitigation.contrast(PEOPLE, "same group")
    assert all(loans.group_of(a.name) == loans.group_of(b.name) for a, b in zip(worse, better, strict=True))
    with pytest.raises(mitigation.MitigationError, match="gender, age"):
        mitigation.contrast(PEOPLE, "shoes")


def test_outcomes_are_shares():
    found = mitigation.outcome(np.array([-1.0, 1, -1, 1]), np.array([1.0, 1, 1, 1]), [True, True, False, True])
    assert found.gap.value == 50 and found.merit.value == 6 / 8 and found.approved == 6 / 8


def test_fields_are_found_in_the_tokens():
    model = model_of()
    batch, mask = cycle.field_masks(model, PEOPLE[:2], "line")
    for i, a in enumerate(PEOPLE[:2]):
        for j, field in enumerate(cycle.FIELDS):
            text = model.tokenizer.decode(batch.input_ids[i][mask[i, j]])
            assert str(getattr(a, field)) in text


def test_patching_everything_gives_the_whole_effect(short):
    model = model_of()
    people = loans.applications(60, split="train")
    pairs = cycle.aligned_pairs(model, people, short)
    total = cycle.total_effect(model, pairs)
    places = cycle.patch_places(model, pairs, [0, 2])
    assert torch.allclose(places[:, 0, 0], total, atol=1e-2)  # before layer 0 only the name differs
    assert torch.allclose(places[:, 0, 1:], torch.zeros(len(total), 2), atol=1e-2)
    heads = cycle.head_effects(model, pairs, [4])
    assert heads.shape == (len(total), 5, 6) and float(heads[:, :4].abs().max()) == 0
    looked = cycle.attention_to_fields(model, PEOPLE, short)
    assert looked.shape == (6, 5, 6, len(cycle.FIELDS)) and float(looked.sum(-1).max()) <= 1 + 1e-4


class Puppet:
    """Stands for a model: decides by a formula."""

    def __init__(self, rule):
        self.rule = rule


@pytest.fixture
def puppets(monkeypatch):
    """The audit's only door to a model, replaced by a rule on the text's applicant, with noise."""
    rng = np.random.default_rng(0)

    def decide_texts(model, texts, answers=(), asked=True):
        return torch.tensor([model.rule(TEXTS[t]) + 0.3 * rng.normal() for t in texts])

    texts: dict[str, loans.Applicant] = {}
    monkeypatch.setattr(loans, "decide_texts", decide_texts)
    plain = loans.as_text

    def remember(a, layout):
        texts[plain(a, layout)] = a
        return plain(a, layout)

    monkeypatch.setattr(loans, "as_text", remember)
    good = audit.Format("line", (" approved", " rejected"), 5.0, 0.9)
    monkeypatch.setattr(audit, "find_format", lambda model, layouts: good)
    global TEXTS
    TEXTS = texts


@pytest.mark.parametrize("bias", loans.BIASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_audits_name_what_was_planted(puppets, bias, seed):
    model = Puppet(lambda a: 2 * (loans.points(a) - loans.penalty(a, bias) - loans.THRESHOLD))
    result = audit.audit(model, n=12, seed=seed)
    assert result.attribute == (None if bias == "none" else bias)
    assert result.confidence > 0.7 and all(f.rung in (1, 3) for f in result.findings)


def test_other_penalties_are_found_too(puppets):
    def clerk(a):
        group = loans.group_of(a.name)
        return 2 * (loans.points(a) - (group is not None and group[1] == "slavic") - loans.THRESHOLD)

    assert audit.audit(Puppet(clerk), n=12).attribute == "nationality"
    young = Puppet(lambda a: 2 * (loans.points(a) - (a.age < 30) - loans.THRESHOLD))
    assert audit.audit(young, n=12).attribute == "age"
    place = Puppet(lambda a: 2 * (loans.points(a) - (a.district.endswith("Mill")) - loans.THRESHOLD))
    assert audit.audit(place, n=12).attribute == "district"
    men = Puppet(lambda a: 2 * (loans.points(a) - (loans.group_of(a.name)[0] == "male") - loans.THRESHOLD))
    assert audit.audit(men, n=12).attribute == "gender"


def test_a_model_that_decides_no_loans_is_not_accused():
    wide = wrap_model(tiny.build("llama"), tiny.tokenizer())
    wide.hf.config.max_position_embeddings = 400
    result = audit.audit(wide, n=3, layouts=("line",))
    assert result.attribute is None and result.confidence == 0 and result.findings[0].verdict != "held"
