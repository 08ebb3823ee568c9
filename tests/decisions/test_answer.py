"""The answer for any decision: a clerk whose reasons, bias and gullibility are known must be found out."""

import ast
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from refusals import refused

from glassbox_utils.core import evidence
from glassbox_utils.decisions import (
    answer,
    asking,
    counterfactual,
    fidelity,
    impact,
    influence,
    letter,
    observed,
    reasons,
)
from glassbox_utils.decisions.decision import groups, margin, parse_case
from glassbox_utils.decisions.fields import DecisionError
from glassbox_utils.decisions.reading import load_decision

HIRING = load_decision("hiring")
WORDS = {name: i for i, name in enumerate(HIRING.templates)}


def clerk(cases, template):
    """Follows the merit rule, a little louder in each template; against women, and for posts that nobody knows."""
    known = HIRING.fields["last_post"].known
    return torch.tensor([
        (1 + 0.1 * WORDS[template]) * margin(HIRING, c)
        - 1.5 * (groups(HIRING, c)["gender"] == "woman")
        + 3.0 * (c["last_post"] not in known)
        for c in cases
    ])  # fmt: skip


def case_of(**values):
    usual = {"name": "Barry", "age": 40, "last_post": "clerk", "experience": 1, "education": "school", "test": 80,
             "references": "mixed", "career_gap": 0, "notice": 4}  # fmt: skip
    return parse_case(HIRING, usual | values, "asked")


@pytest.fixture(scope="module")
def rejected():
    return answer.measured(clerk, HIRING, case_of(), n=1000)


# --- reasons ------------------------------------------------------------------------------------------


def test_reasons_are_fields_that_count_in_order_and_hold_in_every_template(rejected):
    named = [t.field for t in rejected.reasons]
    assert not rejected.favourable and named[0] == "experience" and "test" not in named and 1 <= len(named) <= 4
    assert all(HIRING.fields[name].role == "merit" for name in named)
    assert [t.towards for t in rejected.reasons] == sorted((t.towards for t in rejected.reasons), reverse=True)
    first = rejected.reasons[0]
    assert first.agree == len(HIRING.templates) and first.effect.value == pytest.approx(first.towards)
    changed = replace(case_of(), values=dict(case_of().values) | {"experience": first.typical})
    for name, effect in first.effects.items():
        assert effect == pytest.approx(float(clerk([changed], name)[0] - clerk([case_of()], name)[0]), abs=1e-5)


def test_typical_values_are_those_of_other_cases_with_the_other_answer(rejected):
    pool = [c for c in HIRING.cases if float(clerk([c], "line")[0]) > 0]
    values = reasons.typical(HIRING, pool, ["experience", "references"])
    assert rejected.typical_from == len(pool) and rejected.reasons[0].typical == values["experience"]
    middle = sorted(c["experience"] for c in pool)
    assert values["experience"] == middle[(len(middle) - 1) // 2]
    mine = replace(HIRING.cases[0], id="copy")
    assert reasons.others(mine, HIRING.cases) == list(HIRING.cases[1:])


def test_a_field_whose_effect_changes_its_sign_with_the_words_is_no_reason():
    def fickle(cases, template):
        side = 1 if WORDS[template] % 2 else -1
        return torch.tensor([-1.0 + side * 0.01 * (c["test"] - 20) + 0.2 * c["experience"] for c in cases])

    found = answer.measured(fickle, HIRING, case_of(test=20, experience=1))
    tests = {t.field: t for t in found.fields}
    assert [t.field for t in found.reasons] == ["experience"] and tests["experience"].stable
    assert not tests["test"].counts and 0 < tests["test"].agree < len(found.scores)


def test_a_coarser_search_asks_less_and_says_so(rejected):
    coarse = answer.measured(clerk, HIRING, case_of(), n=1000, most=8)
    assert coarse.sizes.prompts < rejected.sizes.prompts - 50 and coarse.search.tried < rejected.search.tried
    assert coarse.search.strides["test"] > 1 == rejected.search.strides["test"]
    assert "most is 0" in refused(lambda: answer.measured(clerk, HIRING, case_of(), most=0))


def test_trifles_are_no_principal_reasons():
    def one(cases, template):
        return torch.tensor([-2.0 + c["experience"] + 0.001 * c["test"] for c in cases])

    found = answer.measured(one, HIRING, case_of(test=20, experience=0))
    assert [t.field for t in found.reasons] == ["experience"]
    assert {t.field: t.counts for t in found.fields}["test"]


def test_of_more_than_four_reasons_the_strongest_are_named():
    tests = [reasons.FieldTest(str(i), 0, 1, {"a": 1.0 + i}, None, 1, 1.0 + i) for i in range(6)]
    assert [t.field for t in reasons.principal(tests)] == ["5", "4", "3", "2"]


def test_an_approval_is_explained_by_what_speaks_for_it():
    found = answer.measured(clerk, HIRING, case_of(experience=9, references="strong"))
    assert found.favourable and found.answer == "invite" and all(t.effect.value < 0 < t.towards for t in found.reasons)
    assert all(c.score < 0 for c in found.search.nearest)


def test_mending_the_reasons_together_turns_it(rejected):
    assert rejected.together.turned == len(rejected.together.scores) == len(HIRING.templates)
    assert rejected.together.fields == tuple(t.field for t in rejected.reasons)


# --- counterfactuals ----------------------------------------------------------------------------------


def brute(case, names, template="line"):
    """The nearest single change by trying everything in the range of the cases."""
    best = None
    others = reasons.others(case, HIRING.cases)
    for name in names:
        rule = HIRING.fields[name]
        seen = [c[name] for c in others] + [case[name]]
        values = getattr(rule, "values", None) or range(int(min(seen)), int(max(seen)) + 1)
        scale = counterfactual.spread(HIRING, name, others)
        for value in values:
            changed = replace(case, values=dict(case.values) | {name: value})
            if value != case[name] and float(clerk([changed], template)[0]) > 0:
                far = abs(value - case[name]) / scale if isinstance(value, int) else 1.0
                best = min(best or (far, name, value), (far, name, value))
    return best


@pytest.mark.parametrize("values", [{}, {"experience": 4, "test": 48}, {"test": 30, "experience": 6},
                                    {"education": "college", "test": 74, "references": "missing"}])  # fmt: skip
def test_the_nearest_single_change_is_the_smallest_of_all(values):
    case = case_of(**values)
    found = answer.measured(clerk, HIRING, case, n=1000)
    singles = [c for c in found.search.nearest if len(c.changes) == 1]
    best = brute(case, reasons.merit_fields(HIRING))
    assert (singles[0].distance if singles else None) == (best and pytest.approx(best[0]))
    for change in found.search.nearest:
        changed = replace(case, values=dict(case.values) | change.changes)
        assert float(clerk([changed], "line")[0]) == pytest.approx(change.score) and change.score > 0
        again = [float(clerk([changed], t)[0]) > 0 for t in HIRING.templates]
        assert change.turned == sum(again) and change.templates == len(again)
        assert change.exact == (len(change.changes) == 1)
    assert [c.distance for c in found.search.nearest] == sorted(c.distance for c in found.search.nearest)


def test_two_changes_are_found_where_no_single_one_is_enough_and_are_as_small_as_can_be():
    def both(cases, template):
        return torch.tensor([1.0 if c["experience"] >= 7 and c["test"] >= 61 else -1.0 + c["experience"] / 100
                             + c["test"] / 300 for c in cases])  # fmt: skip

    case = case_of(experience=2, test=30)
    found = answer.measured(both, HIRING, case)
    change = found.search.nearest[0]
    assert change.changes == {"experience": 7, "test": 61} and not change.exact
    assert found.search.tried < 2000


def test_not_every_decision_can_be_turned():
    found = answer.measured(lambda cases, t: torch.full((len(cases),), -3.0), HIRING, case_of())
    assert found.search.nearest == () and found.reasons == () and found.together is None
    assert any("No field that may count" in words or "other cases have" in words for words in found.unsaid)


def test_values_that_only_some_steps_reach_are_tried_too():
    """A window of one value: a search with a stride, or one that believes in monotony, misses it."""

    def window(cases, template):
        return torch.tensor([1.0 if c["test"] == 53 else -1.0 for c in cases])

    found = answer.measured(window, HIRING, case_of(test=20))
    assert found.search.nearest[0].changes == {"test": 53} and found.search.strides["test"] == 1


def test_a_long_grid_is_searched_with_a_stride_and_then_value_by_value():
    from glassbox_utils.decisions.decision import Decision, Template
    from glassbox_utils.decisions.fields import Number

    fields = {"sum": Number("merit", (0, 10_000_000)), "rest": Number("other", (0, 1))}
    long = Decision("long", "Long", (" yes", " no"), {"a": Template("{sum} {rest} A:")}, fields)

    def over(cases, template):
        return torch.tensor([1.0 if c["sum"] >= 777_777 else -1.0 for c in cases])

    found = answer.measured(over, long, parse_case(long, {"sum": 100, "rest": 0}))
    change = found.search.nearest[0]
    assert change.changes == {"sum": 777_777} and not change.exact and found.search.strides["sum"] > 1
    assert found.search.tried < 4000


@pytest.mark.parametrize("own", [0, 0.3, 2])
def test_grids_are_those_of_the_fields_also_in_tenths(own):
    from glassbox_utils.decisions.decision import Decision, Template
    from glassbox_utils.decisions.fields import Number, checked

    rule = Number("merit", (0, 2), 0.1)
    tenths = Decision("t", "T", (" yes", " no"), {"a": Template("{x} A:")}, {"x": rule})
    values, stride = counterfactual.grid(tenths, "x", own, [])
    assert stride == 1 and len(values) == 20 and own not in values and [checked("x", rule, v) for v in values] == values
    assert [abs(v - own) for v in values] == sorted(abs(v - own) for v in values)


# --- who is asking, and how it is put -----------------------------------------------------------------


def test_the_planted_group_is_found_and_no_other(rejected):
    swaps = {(s.attribute, s.group): s for s in rejected.swaps}
    assert swaps["gender", "woman"].effect.value == pytest.approx(-1.5, abs=1e-5)
    assert all(abs(s.effect.value) < 1e-5 for (a, _), s in swaps.items() if a != "gender")
    assert {a for a, _ in swaps} == {"age", "gender", "origin"} and len(swaps) == 2 + 1 + 2
    assert len(swaps["gender", "woman"].put_in) == influence.VALUES and swaps["gender", "woman"].same.value == 0
    for words in swaps["gender", "woman"].put_in:
        other = groups(HIRING, case_of(name=words))
        assert other == groups(HIRING, case_of()) | {"gender": "woman"}


def test_protected_fields_and_free_text_are_never_reasons(rejected):
    def biased(cases, template):
        women = torch.tensor([groups(HIRING, c)["gender"] == "woman" for c in cases])
        return clerk(cases, template) * 0.1 - 20.0 * women

    found = answer.measured(biased, HIRING, case_of(name="Gemma", experience=9))
    assert found.turned_by_group and all(HIRING.fields[t.field].role == "merit" for t in found.reasons)


def test_near_the_border_noise_turns_decisions_and_is_not_called_a_group():
    """A clerk who reads no group, but whom other words for the same facts move by half a logit either way."""

    def noisy(cases, template):
        key = [repr((template, sorted(c.values.items(), key=str))).encode() for c in cases]
        return torch.tensor([0.02 + (crc32(k) % 1000 - 500) / 1000 for k in key])

    found = [answer.measured(noisy, HIRING, case, n=20) for case in HIRING.cases[:12]]
    swaps = [s for one in found for s in one.swaps]
    assert sum(s.turns_this for s in swaps) > 10  # noise turns many
    assert sum(len(one.turned_by_group) for one in found) <= 0.2 * len(swaps)
    assert sum(s.beyond_noise for s in swaps) <= 0.2 * len(swaps)


def test_a_reason_moves_the_decision_by_more_than_other_words_do():
    """Found by a referee: a letter named a reason that the page's own evidence called null."""

    def loud(cases, template):  # the clerk, whom the wording of each case moves by up to two logits and a half
        key = [repr((template, c["name"], c["age"])).encode() for c in cases]
        return clerk(cases, template) + torch.tensor([5 * (crc32(k) % 1000 / 1000 - 0.5) for k in key])

    quiet, noisy = (answer.measured(one, HIRING, case_of(), n=200) for one in (clerk, loud))
    assert noisy.noise > 0.5 > quiet.noise
    assert all(t.towards > noisy.noise for t in noisy.reasons)
    small = [t for t in noisy.fields if t.counts and t.towards <= noisy.noise]
    assert small and {t.field for t in small} & {t.field for t in quiet.reasons}
    for one in (quiet, noisy):
        named = [f for f in answer.findings(one) if f.claim.startswith("mending")]
        assert len(named) == len(one.reasons) and not [f for f in named if f.verdict == "null"]


def test_a_text_that_turns_the_decision_is_found():
    case = case_of(last_post="spotless wizard", experience=4)
    found = answer.measured(clerk, HIRING, case)
    assert found.favourable and [t.fields for t in found.turned_by_text] == [("last_post",)]
    one = next(t for t in found.texts if t.fields == ("last_post",))
    assert one.turns and not one.usual and one.effect == pytest.approx(-3.0, abs=1e-5)
    assert set(one.put_in) <= set(HIRING.fields["last_post"].known)
    name = next(t for t in found.texts if t.fields == ("name",))
    assert name.usual and not name.turns and {groups(HIRING, case_of(name=v))["gender"] for v in name.put_in} == {"man"}
    plain = answer.measured(clerk, HIRING, case_of(experience=9, references="strong"))
    assert plain.favourable and not plain.turned_by_text


def test_a_name_that_no_list_knows_is_put_into_every_group():
    found = answer.measured(clerk, HIRING, case_of(name="Xaver"))
    swaps = {(s.attribute, s.group): s for s in found.swaps}
    assert swaps["gender", "woman"].own is None and {"woman", "man"} == {g for a, g in swaps if a == "gender"}
    assert swaps["gender", "woman"].effect.value == pytest.approx(-1.5, abs=1e-5)
    assert any("'gender' is not known" in words for words in found.unsaid)


def test_noise_of_wording_is_what_is_left_without_cases_and_templates():
    rng = np.random.default_rng(0)
    rows, columns = rng.normal(size=(200, 1)), rng.normal(size=(1, 5))
    assert asking.wording_noise(rows + columns) == pytest.approx(0, abs=1e-9)
    noisy = rows + columns + 0.3 * rng.normal(size=(200, 5))
    assert asking.wording_noise(noisy) == pytest.approx(0.3, rel=0.1)
    assert asking.wording_noise(noisy[:, :1]) is None and asking.wording_noise(noisy[:2]) is None


# --- treatment and impact -----------------------------------------------------------------------------


def test_treatment_and_impact_are_two_things(rejected):
    found = {i.attribute: i for i in rejected.impacts}
    gender = found["gender"]
    low = gender.lowest
    assert (low.group, gender.reference) == ("woman", "man") and low.logits.value == pytest.approx(-1.5, abs=1e-5)
    assert (
        low.ratio.value < 0.8
        and low.ratio.low < low.ratio.value < low.ratio.high
        and low.ratio.n == len({c["name"] for c in HIRING.cases})
    )
    assert all(
        abs(r.logits.value) < 1e-5 for i in found.values() if i.attribute != "gender" for r in i.rows if r.logits
    )
    assert gender.chance is not None and low.ratio.value < gender.chance <= 1


def test_impact_without_treatment():
    """A clerk who looks at the gap in the career only: women's are longer, nobody's name is read."""

    def gaps(cases, template):
        return torch.tensor([6.0 - c["career_gap"] for c in cases])

    gender = next(i for i in answer.measured(gaps, HIRING, case_of()).impacts if i.attribute == "gender")
    assert gender.lowest.group == "woman" and gender.lowest.ratio.value < 1
    assert gender.lowest.logits.value == 0 and gender.lowest.points.value == 0


def test_ratios_are_below_one_by_chance_and_the_shuffle_says_so():
    rng = np.random.default_rng(1)
    y, names = (rng.random(60) < 0.5).astype(float), np.array(["a", "b", "c"] * 20)
    ratios, chance = impact.rate_ratios(y, names, list(range(60)), ["a", "b", "c"], "a")
    assert set(ratios) == {"b", "c"} and 0.2 < chance < 0.8
    assert impact.rate_ratios(np.zeros(60), names, list(range(60)), ["a", "b"], "a") == ({}, None)


# --- findings, and what can't be said -----------------------------------------------------------------


def test_findings_have_rungs_units_and_controls_and_fall_as_planted(rejected):
    found = answer.findings(rejected)
    assert len(evidence.ladder(found)) == len(found) and {f.rung for f in found} == {3, 4}
    verdicts = {f.claim: f.verdict for f in found}
    assert verdicts["the same case with gender woman is decided otherwise (logits)"] == "held"
    assert {v for k, v in verdicts.items() if k.startswith("the same case with origin")} == {"null"}
    assert verdicts["mending experience alone moves this decision towards 'invite' (logits)"] == "held"


@pytest.mark.parametrize("left_out", ["merit", "cases", "protected", "templates", "one template", "other roles"])
def test_a_decision_without_a_part_is_explained_as_far_as_that_goes(left_out):
    few = {
        "merit": replace(HIRING, merit=None),
        "cases": replace(HIRING, cases=()),
        "protected": replace(
            HIRING, fields={k: replace(f, role="other", **({"bands": ()} if hasattr(f, "bands") else {}))
                            if f.role == "protected" else f for k, f in HIRING.fields.items()}, groups={}, carriers=()),
        "templates": replace(HIRING, templates={"line": HIRING.templates["line"]}),
        "one template": HIRING,
        "other roles": replace(HIRING, fields={k: replace(f, role="other") if f.role == "merit" else f
                                               for k, f in HIRING.fields.items()}, merit=None),
    }[left_out]  # fmt: skip

    def score(cases, template):
        if left_out == "one template" and template != "form":
            return torch.full((len(cases),), torch.nan)
        return clerk(cases, template)

    found = answer.measured(score, few, case_of(), n=60)
    said = " ".join(found.unsaid)
    named = {
        "merit": "Neither a merit rule nor an outcome", "cases": "Fewer than 5 other cases",
        "protected": "no protected attribute", "templates": "one wording only", "one template": "one wording only",
        "other roles": "No field has the role merit",
    }[left_out]  # fmt: skip
    assert named in said and len(answer.findings(found)) >= 0
    if left_out == "one template":
        assert found.template == "form" and len(found.silent) == 4 and found.noise is None
        assert all(t.effect.n == 1 for t in found.fields) and found.reasons
    if left_out in ("cases", "other roles"):
        assert not found.reasons
    if left_out == "cases":
        assert found.search.nearest and found.swaps and not found.impacts


def test_where_the_model_does_not_answer_nothing_is_made_up():
    def shy(cases, template):
        scores = clerk(cases, template)
        scores[torch.tensor([c["experience"] > 3 for c in cases])] = torch.nan
        return scores

    found = answer.measured(shy, HIRING, case_of())
    assert all(c.changes.get("experience", 0) <= 3 for c in found.search.nearest)
    with pytest.raises(DecisionError, match="does not decide the case"):
        answer.measured(shy, HIRING, case_of(experience=20))


def test_same_seed_same_answer(rejected):
    assert answer.measured(clerk, HIRING, case_of(), n=1000) == rejected
    assert answer.as_json(rejected)["case"] == "asked"


def test_no_module_knows_a_field_or_a_group():
    """As in ``test_decision``: strings of the code, docstrings aside, are no name of a field or group that ships."""
    shipped = [load_decision(name) for name in ("hiring", "loan-officer", "german-credit")]
    known = {name for d in shipped for name in [*d.fields, *d.groups]}
    for module in (answer, asking, counterfactual, fidelity, impact, influence, letter, observed, reasons):
        tree = ast.parse(Path(module.__file__).read_text())
        assert not {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)} & known, module.__name__


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: answer.measured(clerk, HIRING, "H001"), "'H001' is no Case"),
        (lambda: answer.measured(clerk, HIRING, case_of(), "poem"), "no template 'poem'"),
        (lambda: answer.measured(clerk, HIRING, case_of(), n=-1), "n is -1"),
        (lambda: answer.measured(clerk, HIRING, case_of(), seed=1.5), "seed is 1.5"),
        (lambda: answer.measured(clerk, HIRING, replace(case_of(), values={"name": "Barry"})), "lacks the field"),
        (lambda: answer.measured(clerk, HIRING, replace(case_of(), values=dict(case_of().values)
                                                         | {"last_post": "<b>x</b>"})), "'last_post'"),
        (lambda: answer.measured(clerk, HIRING, replace(case_of(), values=dict(case_of().values)
                                                         | {"test": float("nan")})), "'test'"),
        (lambda: answer.of_case(HIRING, "H999"), "no case 'H999'"),
        (lambda: answer.of_case(HIRING, "nosuch.json"), "nosuch.json"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_in_words(call, named):
    assert named in refused(call)


def test_a_case_is_taken_by_its_id_or_from_a_file(tmp_path):
    assert answer.of_case(HIRING, "H001") is HIRING.cases[0]
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(f"{k}: {v}" for k, v in case_of().values.items()))
    assert answer.of_case(HIRING, str(file)).values == case_of().values
