"""Decisions as data: the three that ship, what can be asked of them, and the loan officer's prompts."""

import ast
import importlib.util
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
import torch

from glassbox_utils.core.models import wrap_model
from glassbox_utils.decisions import decision as decisions
from glassbox_utils.decisions import loans, reading, scoring, training
from glassbox_utils.decisions.decision import groups, margin, merit, parse_case, points, render, swapped, truth
from glassbox_utils.decisions.fields import DecisionError, Text, checked
from glassbox_utils.decisions.reading import DECISIONS, load_decision

LOAN, HIRING, GERMAN = (load_decision(name) for name in ("loan-officer", "hiring", "german-credit"))
PEOPLE = [a for split in loans.SPLITS for a in loans.applications(60, seed=3, split=split)]
CASES = [parse_case(LOAN, asdict(a)) for a in PEOPLE]


def deciding(decision, template=None):
    """A random model that answers with the two words only."""
    hf = tiny.network("llama", len(tiny.tokenizer()), positions=1024)
    model = wrap_model(hf, tiny.tokenizer(), "random")
    prompt = scoring.prompts(model, decision, decision.cases[:1], template)[0]
    keep = list(scoring.answer_tokens(model, decision, prompt))
    head = torch.nn.Linear(hf.config.hidden_size, hf.config.vocab_size)
    with torch.no_grad():
        head.weight.copy_(hf.lm_head.weight.cpu() * 0.3)
        head.bias.fill_(-1e4)
        head.bias[keep] = 0.0
    hf.lm_head = head.to(model.device)
    return model


# --- the loan officer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", loans.LAYOUTS)
def test_the_loan_officers_prompts_are_the_same_to_the_byte(layout):
    assert list(LOAN.templates) == list(loans.LAYOUTS)
    for a, case in zip(PEOPLE, CASES, strict=True):
        assert render(LOAN, case, layout).encode() == loans.as_text(a, layout).encode()


def test_the_loan_officers_rule_groups_and_twins_are_the_same():
    for a, case in zip(PEOPLE, CASES, strict=True):
        assert points(LOAN, case) == loans.points(a) and merit(LOAN, case) == loans.merit(a) == truth(LOAN, case)
        assert margin(LOAN, case) == training.margin(a, "none")
        mine = groups(LOAN, case)
        assert (mine["gender"], mine["origin"]) == loans.group_of(a.name) and mine["side"] == a.district.split()[0]
        for gender in loans.GENDERS:
            other = loans.counterfactual(a, gender=gender)
            assert dict(swapped(LOAN, case, "gender", gender).values) == asdict(other)
        for origin in loans.ORIGINS:
            other = loans.counterfactual(a, origin=origin)
            assert dict(swapped(LOAN, case, "origin", origin).values) == asdict(other)


def test_the_loan_officers_layouts_names_and_places_have_the_same_splits():
    for split, layouts in (
        ("train", loans.TRAIN_LAYOUTS),
        ("selection", loans.SELECTION_LAYOUTS),
        ("report", loans.REPORT_LAYOUTS),
        ("far", loans.FAR_LAYOUTS),
    ):
        assert sorted(LOAN.templates_for(split)) == sorted(layouts)
    by_name, by_place = LOAN.carriers
    for one in by_name.lists:
        assert one.values == loans.names(one.groups["gender"], one.groups["origin"], one.split)
    for split in loans.SPLITS:
        assert [v for one in by_place.lists if one.split == split for v in one.values] == list(loans.districts(split))
    assert LOAN.fields["occupation"].known == tuple(loans.vocabulary()["occupations"])
    assert [c.values for c in LOAN.cases] == [asdict(a) for a in loans.applications(400, seed=17, split="report")]


def test_the_loan_officers_logits_are_the_same():
    model = deciding(LOAN)
    for layout in ("line", "record"):
        old, new = loans.decide(model, PEOPLE[:40], layout), scoring.scores(model, LOAN, CASES[:40], layout)
        assert torch.equal(old, new) and old.std() > 0 and new.dtype == torch.float32
        assert torch.equal(scoring.decided(model, LOAN, CASES[:40], layout), old > 0)


def test_the_deployed_officer_decides_the_same_through_the_folder():
    model = loans.load_loan_model("deployed")
    old, new = loans.decide(model, PEOPLE[:6], "line"), scoring.scores(model, LOAN, CASES[:6], "line")
    assert torch.equal(old, new)


# --- the others ---------------------------------------------------------------------------------------


def test_german_credit_is_all_there_and_its_outcomes_are_the_truth():
    assert len(GERMAN.cases) == 1000 and sum(truth(GERMAN, c) for c in GERMAN.cases) == 700
    for template in GERMAN.templates:
        texts = [render(GERMAN, case, template) for case in GERMAN.cases]
        assert all("{" not in text and text.endswith("\nDecision:") for text in texts)
        assert len(set(texts)) == len({tuple(c.values.values()) for c in GERMAN.cases})
    first = GERMAN.cases[0]
    assert render(GERMAN, first).startswith("male, 67. Work: skilled. Housing: own. Savings: unknown or none. Checking "
                                            "account: little. Loan: 1169 marks over 6 months for a radio")  # fmt: skip
    assert groups(GERMAN, first) == {"sex": "male", "age": "62 to 90"} and first.outcome is True
    with pytest.raises(DecisionError, match="no merit rule"):
        merit(GERMAN, first)
    assert swapped(GERMAN, first, "sex", "female").outcome is None


def test_hiring_has_a_rule_both_answers_and_a_proxy():
    deserved = [truth(HIRING, c) for c in HIRING.cases]
    assert len(deserved) >= 200 and 0.3 < sum(deserved) / len(deserved) < 0.7
    gap = {g: [c["career_gap"] for c in HIRING.cases if groups(HIRING, c)["gender"] == g] for g in ("woman", "man")}
    assert sum(gap["woman"]) / len(gap["woman"]) > 1.3 * sum(gap["man"]) / len(gap["man"])
    known = {v for one in HIRING.carriers[0].lists for v in one.values}
    assert not known & {v for one in LOAN.carriers[0].lists for v in one.values}


@pytest.mark.parametrize("name", ["hiring", "loan-officer"])
def test_made_up_cases_are_made_again_byte_for_byte(name, tmp_path):
    spec = importlib.util.spec_from_file_location("make_cases", DECISIONS / name / "make_cases.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    made.main(tmp_path / "cases.csv")
    assert (tmp_path / "cases.csv").read_bytes() == (DECISIONS / name / "cases.csv").read_bytes()


def test_no_module_knows_a_field_or_a_group():
    """Strings of the code, docstrings aside, are no name of a field or group of the decisions that ship."""
    known = {name for d in (LOAN, HIRING, GERMAN) for name in [*d.fields, *d.groups]}
    for module in (decisions, reading, scoring, importlib.import_module("glassbox_utils.decisions.cases")):
        tree = ast.parse(Path(module.__file__).read_text())
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not strings & known


# --- what can be asked --------------------------------------------------------------------------------


def test_a_group_is_swapped_at_the_same_rank_and_nothing_else_changes():
    case = HIRING.cases[0]
    mine = HIRING.carriers[0].list_of(case["name"])
    other = swapped(HIRING, case, "gender", "man")
    assert groups(HIRING, other) == groups(HIRING, case) | {"gender": "man"}
    assert {k for k in case.values if case[k] != other[k]} == {"name"}
    assert HIRING.carriers[0].list_of(other["name"]).split == mine.split
    assert swapped(HIRING, other, "gender", groups(HIRING, case)["gender"]).values == case.values


def test_a_name_that_no_list_knows_has_no_group():
    case = swapped(HIRING, HIRING.cases[0], "name", "Xaver")
    assert groups(HIRING, case)["gender"] is None
    with pytest.raises(DecisionError, match=r"'gender' is not known: no list holds 'Xaver'"):
        swapped(HIRING, case, "gender", "man")


def test_whole_numbers_and_steps_are_written_as_people_write_them(tmp_path):
    rule = reading.KINDS["number"]("merit", [0, 2], 0.1, "", [])
    assert [checked("x", rule, v) for v in (0.3, 1.0, 2, 1.7)] == [0.3, 1, 2, 1.7]
    assert str(checked("x", rule, 1.0)) == "1"
    with pytest.raises(DecisionError, match=r"steps of 0\.1"):
        checked("x", rule, 0.35)


def test_letters_are_composed_and_known_values_are_always_fine():
    assert parse_case(HIRING, dict(HIRING.cases[0].values) | {"name": "Ays\u0327e"})["name"] == "Ayşe"
    rule = Text("other", known=["Test Driver"])
    assert checked("post", rule, "Test Driver", ("test",)) == "Test Driver"
    with pytest.raises(DecisionError, match="holds 'test'"):
        checked("post", rule, "test cook", ("test",))


# --- a model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["line", "chat"])
def test_scores_do_not_depend_on_the_batch_and_chats_end_in_their_opening(template):
    model = deciding(HIRING, template)
    cases = HIRING.cases[:6]
    together, alone = (scoring.scores(model, HIRING, cases, template, size) for size in (32, 1))
    assert together.shape == (6,) and torch.allclose(together, alone, atol=1e-3)
    text = scoring.prompts(model, HIRING, cases[:1], "chat")[0]
    assert text.startswith("System: You decide") and text.endswith("\nAssistant:Answer:")


def test_a_model_that_decides_nothing_is_refused():
    model = wrap_model(tiny.network("llama", len(tiny.tokenizer()), positions=1024), tiny.tokenizer(), "random")
    with pytest.raises(DecisionError, match=r"random does not decide here: ' invite' and ' decline' together"):
        scoring.scores(model, HIRING, HIRING.cases[:2])
    assert scoring.scores(model, HIRING, HIRING.cases[:2], check=False).shape == (2,)
