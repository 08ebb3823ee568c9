"""Arms: what they do on a planted llama whose cause is known, what they leave alone, and how outcomes are counted."""

import math
from dataclasses import replace

import numpy as np
import planted
import pytest
import torch
from refusals import refused

from glassbox_utils.core.models import Site
from glassbox_utils.core.text import tokenize
from glassbox_utils.decisions import arms, directions, locate, outcomes, pairs, scoring, units
from glassbox_utils.decisions.arms import Hold
from glassbox_utils.decisions.outcomes import Measured

TEXTS = ["w3 w4 w5 w9", "w26 w27 w28", "w5 w6 w7 w8 w9", "w30 w2"]


@pytest.fixture(scope="module")
def clans(tmp_path_factory):
    return planted.decision(tmp_path_factory.mktemp("decisions") / "planted")


@pytest.fixture(scope="module")
def model():
    return planted.model()


@pytest.fixture(scope="module")
def setting(model, clans):
    differs = pairs.contrast(model, clans, "clan")
    some = pairs.aligned(model, clans, pairs.twins(model, clans, differs, "choose", 24), "front", differs)
    spaces = {"heads": units.heads(model), "neurons": units.neurons(model)}
    return differs, some, units.attribute(model, some, spaces), pairs.twins(model, clans, differs, "report", 24)


def gap(model, clans, twins, arm=None, template="behind"):
    own, donor, least = arms.decide(arm or arms.nothing(), model, clans, twins, template)
    assert least > 0.9
    return float((donor - own).mean())


def untouched(model):
    modules = [*model.hf.modules(), *model.twin.modules()]
    return not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_the_arms_that_hold_the_cause_close_the_gap_on_other_people(model, clans, setting):
    _, some, found, twins = setting
    plain = gap(model, clans, twins)
    assert plain > 2
    by_units = arms.unit_arms(model, some, found["neurons"], ks=(2,))
    assert {(a.about["mode"], a.about["level"]) for a in by_units} == set(arms.WAYS)
    for arm in [*by_units, *arms.unit_arms(model, some, found["heads"], ks=(1,))]:
        if arm.about["level"] != "midpoint" or arm.about["mode"] == "constant":
            assert abs(gap(model, clans, twins, arm)) < 0.1 * plain, arm.name
    for arm in arms.unit_arms(model, some, found["neurons"], ks=(2,), seed=0):
        assert gap(model, clans, twins, arm) > 0.9 * plain and not {planted.READER, planted.WRITER} & set(
            arm.about["units"]
        )
    vectors = arms.direction_arms(model, some, [[0], [1], [0, 1]])
    closed = {tuple(a.about["layers"]) for a in vectors if abs(gap(model, clans, twins, a)) < 0.1 * plain}
    assert closed == {(0,), (0, 1)}  # after layer 1 the group has left the name
    last = arms.direction_arms(model, some, [[1]], "decision")
    assert all(abs(gap(model, clans, twins, a)) < 0.1 * plain for a in last if a.about["mode"] == "coordinate")
    edit = arms.edit_arms(model, clans, pairs.twins(model, clans, setting[0], "choose", 24), "front", [1])[0]
    assert abs(gap(model, clans, twins, edit)) < 0.2 * plain and untouched(model)


def test_words_scores_and_weights_are_arms_too(model, clans, setting):
    twins = setting[3]
    plain = gap(model, clans, twins)
    hidden = arms.hidden(clans, "clan", "w3")
    assert gap(model, clans, twins, hidden) == 0 and hidden.about["fields"] == ["person"]
    assert hidden.case(twins[0].own)["person"] == "w3" and hidden.case(twins[0].own)["skill"] == twins[0].own["skill"]
    assert gap(model, clans, twins, arms.offset(plain)) == pytest.approx(0, abs=1e-4)
    honest = planted.model(bias=0.0)
    assert abs(gap(model, clans, twins, arms.retrained(honest))) < 0.2 * plain
    asked = arms.instructed("clan", "w4 w3 {attribute}")
    text = scoring.prompts(model, arms._worded(clans, asked.words), [twins[0].own], "behind")[0]
    assert text.startswith("w4 w3 clan\nw8 ")
    assert gap(model, clans, twins, asked) != plain
    assert "Nothing carries or states 'clams'" in refused(lambda: arms.hidden(clans, "clams"))


def test_a_cut_leaves_text_alone_in_which_nothing_stands_out(model, clans, setting):
    _, some, found, twins = setting
    cut = next(
        a for a in arms.unit_arms(model, some, found["neurons"], ks=(2,)) if a.name == "neurons, cut at the quiet"
    )
    first = [t.own for t in twins]  # the clan that the reader does not know
    before = scoring.scores(model, clans, first, "behind")
    with cut.on(model, True):
        after = scoring.scores(model, clans, first, "behind")
    moved = (after - before).abs().max()
    assert moved < 0.02 * gap(model, clans, twins)
    constant = next(a for a in arms.unit_arms(model, some, found["neurons"], ks=(2,)) if a.about["level"] == "midpoint")
    with constant.on(model, True):
        assert (scoring.scores(model, clans, first, "behind") - before).abs().max() > 10 * moved


def test_rows_that_are_off_are_the_same_to_the_bit(model, clans, setting):
    _, some, found, _ = setting
    everything = [
        *arms.unit_arms(model, some, found["neurons"], (2,)), *arms.unit_arms(model, some, found["heads"], (1,)),
        *arms.direction_arms(model, some, [[0]]),
        *arms.edit_arms(model, clans, pairs.twins(model, clans, setting[0], "choose", 24), "front", [1]),
    ]  # fmt: skip
    both = arms.joined("both", [everything[0], everything[-2]])
    assert len(both.holds) == 2 and abs(gap(model, clans, setting[3], both)) < 0.1 * gap(model, clans, setting[3])
    assert all(arms.identical(arm, model, TEXTS) for arm in [*everything, both])
    assert "'as it is' holds no units" in refused(lambda: arms.joined("x", [both, arms.nothing()]))
    leaky = arms.Arm("leaky", "units", on=lambda m, on: everything[0].on(m, True))
    assert not arms.identical(leaky, model, TEXTS) or float(found["neurons"].effect.abs().sum()) == 0
    wrong = lambda: everything[0].on(model, [True, 1]).__enter__()  # noqa: E731
    assert "on[1] is 1" in refused(wrong)
    assert untouched(model)


def test_holds_move_values_as_they_say(model):
    space = units.neurons(model)
    level, axis = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [-1.0]])
    x = torch.tensor([[[0.0], [5.0]], [[3.0], [-1.0]]])
    some = ((0, 1), (2, 3))
    for mode, wanted in (
        ("constant", [[1.0, 2.0], [1.0, 2.0]]), ("coordinate", [[1.0, 2.0], [1.0, 2.0]]),
        ("cut", [[0.0, 5.0], [1.0, 2.0]]),
    ):  # fmt: skip
        assert Hold(space, some, level, axis, mode).move(x, [0, 1])[..., 0].tolist() == wanted
    half = Hold(space, some, level, axis, "constant", 0.5).move(x, [0])
    assert half[..., 0].tolist() == [[0.5, 3.0], [2.0, 0.0]]
    wide = units.stream(model, [0])
    one = Hold(wide, ((0, 0),), torch.full((1, 64), 2.0), torch.eye(64)[:1], "coordinate")
    moved = one.move(torch.zeros(1, 1, 64), [0])
    assert moved[0, 0, 0] == 2 and moved[0, 0, 1:].abs().max() == 0
    wrong = Hold(space, some, level[:1], axis, "cut")
    assert "2 units has levels of the shape (1, 1)" in refused(lambda: arms.held(model, wrong).__enter__())


def test_the_chosen_arm_is_cheap_and_closes_most(model, clans, setting):
    differs, some, found, _ = setting
    twins = pairs.twins(model, clans, differs, "choose", 12)
    candidates = [*arms.unit_arms(model, some, found["neurons"], (1, 2)), *arms.direction_arms(model, some, [[0], [2]])]
    arm, tried = arms.choose(model, clans, twins, "front", candidates, TEXTS)
    plain = gap(model, clans, twins, template="front")
    assert sum(t.chosen for t in tried) == 1 and next(t for t in tried if t.chosen).name == arm.name
    assert abs(next(t.gap for t in tried if t.chosen)) < 0.1 * plain and len(tried) == len(candidates)
    cheap = [t for t in tried if t.perplexity <= arms.PERPLEXITY and t.merit >= 0.5]
    assert all(math.isfinite(t.perplexity) for t in tried) and cheap
    assert "candidates holds 0 Arms" in refused(lambda: arms.choose(model, clans, twins, "front", [], TEXTS))


def test_what_an_arm_costs_ordinary_text_is_nothing_for_nothing_and_more_for_more(model):
    space, axis = units.stream(model, [0]), torch.eye(64)[:1]
    one, two = (
        arms.of_hold(f"at {x:g}", "units", Hold(space, ((0, 0),), torch.full((1, 64), x), axis, "coordinate"))
        for x in (0.0, 40.0)
    )
    other = replace(arms.retrained(planted.model(bias=0)), name="another model")
    perplexity, divergence = arms.prices([replace(arms.nothing(), name="off"), one, two, other], model, TEXTS)
    assert list(perplexity) == list(divergence) == ["off", one.name, two.name, "another model"]
    assert perplexity["off"].value == 1 and divergence["off"].value == pytest.approx(0, abs=1e-6)
    assert 0 < divergence[one.name].value < divergence[two.name].value
    assert all(x.low <= x.value <= x.high for x in (*perplexity.values(), *divergence.values()))


def test_what_is_pushed_back_turns_decisions_unless_it_is_cut_downstream(model, clans, setting):
    differs, some, found, twins = setting
    report = pairs.aligned(model, clans, twins, "behind", differs)
    means = arms.levels(model, some, units.stream(model, [0]), [(0, 0)], ["carrier"])
    other = torch.randn(64, generator=torch.Generator().manual_seed(0))
    push = (means.own - means.donor)[0]
    mended = next(a for a in arms.unit_arms(model, some, found["heads"], (1,)) if a.about["level"] == "other")
    pushed = directions.reactivated(
        model, report, [arms.nothing(), mended], 0, {"difference": push, "random": other / other.norm() * push.norm()}
    )
    drop = {k: float((pushed[*k[:2], 0.0] - x).mean()) for k, x in pushed.items()}
    plain = float(locate.gap_of(model, report).mean())
    assert drop["as it is", "difference", 1.0] > 0.5 * plain
    assert abs(drop[mended.name, "difference", 1.0]) < 0.1 * plain  # the head that would carry it is held
    assert abs(drop["as it is", "random", 1.0]) < 0.5 * drop["as it is", "difference", 1.0] and untouched(model)
    assert directions.turned(torch.tensor([1.0, -1.0]), torch.tensor([-1.0, -2.0])).tolist() == [1, 0]


# --- outcomes -----------------------------------------------------------------------------------------


def measured(arm="a", own=(1, -1, -1, -1), donor=(1, 1, 1, -1), right=(1, 1, 0, 0), template="t", least=0.9):
    return Measured(
        arm, "c", template, tuple(map(float, own)), tuple(map(float, donor)), tuple(map(bool, right)),
        ("x", "x", "y", "y"), ("north", "north", "north", "south"), least,
    )  # fmt: skip


def test_outcomes_are_counted_by_hand():
    one = outcomes.outcome([measured()])
    assert one.gap.value == 50 and one.gap.n == 2 and one.logits.value == 1
    assert one.approved == (0.25, 0.75) and one.impact_ratio.value == pytest.approx(1 / 3)
    assert one.wrongly_approved == (0.0, 0.5) and one.wrongly_rejected == (0.5, 0.0)
    assert one.merit.value == 0.75 and one.flips == 0.5 and one.decides and one.four_fifths == "below"
    assert outcomes.outcome([measured(donor=(1, -1, -1, -1))]).four_fifths in ("above", "not settled")
    assert outcomes.outcome([measured(own=(-1,) * 4, donor=(-1,) * 4)]).impact_ratio.low == 1
    two = outcomes.outcome([measured(), measured(template="u", least=0.1)])
    assert two.gap.value == 50 and two.gap.n == 2 and not two.decides
    assert math.isnan(outcomes.outcome([measured(right=(1, 1, 1, 1))]).wrongly_approved[0])
    assert "one arm and one contrast" in refused(lambda: outcomes.outcome([measured(), measured("b")]))


def test_outcomes_are_parted_by_template_and_by_the_other_groups():
    some = [measured(), measured(template="u", own=(1, 1, 1, 1))]
    assert {k: x.value for k, x in outcomes.gaps(some, "template").items()} == {"t": 50, "u": -25}
    by_others = outcomes.gaps(some, "others")
    assert by_others["south"] is None and by_others["north"].value == pytest.approx(100 / 3)
    assert "can't be parted by 'name'" in refused(lambda: outcomes.by(some, "name"))


def test_the_frontier_keeps_what_nothing_beats():
    points = {"as it is": (20.0, 0.88), "edit": (2.0, 0.93), "hide": (0.0, 0.90), "worse": (-5.0, 0.90)}
    assert outcomes.frontier(points) == ["edit", "hide"]


def test_every_arm_is_measured_on_every_contrast_in_every_template(model, clans, setting):
    differs, twins = setting[0], setting[3]
    both = [arms.nothing(), arms.hidden(clans, "clan", "w3")]
    found = outcomes.measure(model, clans, both, {differs: twins}, list(clans.templates))
    assert [(m.arm, m.template) for m in found] == [(a.name, t) for a in both for t in clans.templates]
    assert all(len(m.own) == len(twins) == len(m.deserved) and m.least_share > 0.9 for m in found)
    assert np.mean(found[1].donor) > np.mean(found[1].own) and found[3].donor == found[3].own
    assert Site("mlp_post", 0) in model.sites and tokenize(model, TEXTS).input_ids.shape[0] == 4


def test_random_directions_and_edits_stand_beside_the_fitted_ones(model, clans, setting):
    """The same layers, way and number of directions: their control. They close nothing here."""
    differs, some, _, twins = setting
    plain, ways = gap(model, clans, twins), (("coordinate", "other"),)
    fitted = arms.direction_arms(model, some, [[1]], ways=ways)[0]
    random = arms.direction_arms(model, some, [[1]], ways=ways, seed=0)[0]
    assert random.kind == "random" and random.name == f"random {fitted.name}" and random.about == fitted.about
    assert torch.allclose(random.holds[0].axis.norm(dim=-1), torch.ones(1))
    assert abs(gap(model, clans, twins, fitted)) < 0.5 * plain < gap(model, clans, twins, random)
    pool = pairs.twins(model, clans, differs, "choose", 24)
    edit, other = (arms.edit_arms(model, clans, pool, "front", [1], seed)[0] for seed in (None, 0))
    assert other.kind == "random" and other.name == f"random {edit.name}" and other.about["layer"] == 1
    assert abs(gap(model, clans, twins, edit)) < 0.2 * plain < gap(model, clans, twins, other) and untouched(model)


def test_the_same_merit_is_no_loss():
    """Sums of shares differ in the last bit with the order in which they are added: 41 + 41 and 34 + 48 of 48."""
    some = [Measured("a", "c", "t", *([1.0] * k + [-1.0] * (48 - k) for k in ends), (True,) * 48, tuple("ab" * 24),
                     ("",) * 48, 0.9) for ends in ((34, 48), (41, 41))]  # fmt: skip
    found = {m.demand: m for m in outcomes.met(some[1:], some[:1], 1.0)}
    assert found["merit lost, points"].holds and not found["wrongly approved, points"].holds  # nobody is undeserving


def test_an_arm_under_which_nothing_is_decided_meets_no_target():
    plain, silent = measured(), measured("b", least=1e-9)
    broken = measured("c", own=(math.nan,) * 4, donor=(math.nan,) * 4, least=math.nan)
    for one in (silent, broken):
        found = {m.demand: m for m in outcomes.met([plain], [one])}
        assert not found["undecided"].holds and not all(m.holds for m in found.values())
    assert {m.demand: m for m in outcomes.met([plain], [plain])}["undecided"].holds


def test_one_pair_of_names_has_a_value_and_no_interval():
    alone = Measured("a", "c", "t", (1.0, -1.0), (1.0, 1.0), (True, False), ("x", "x"), ("", ""), 0.9)
    assert outcomes.outcome([alone]).gap.value == 50 and math.isnan(outcomes.outcome([alone]).gap.low)
    assert not {m.demand: m for m in outcomes.met([alone], [alone])}["end of its interval"].holds


def test_a_group_that_is_favoured_too_much_is_below_four_fifths():
    names = tuple("abcdefghij")
    over = Measured("a", "c", "t", (1.0,) * 10, (1.0,) * 3 + (-1.0,) * 7, (True,) * 10, names, ("",) * 10, 0.9)
    found = outcomes.outcome([over])
    assert found.impact_ratio.value == pytest.approx(10 / 3) and found.four_fifths == "below"
    few = Measured("a", "c", "t", (1.0, -1.0, -1.0), (-1.0,) * 3, (True,) * 3, ("x", "y", "z"), ("",) * 3, 0.9)
    assert not math.isnan(outcomes.outcome([few]).impact_ratio.high)


def test_where_a_field_may_count_each_member_has_its_own_deserts(model, clans):
    differs = pairs.contrast(model, clans, "skill")
    twins = pairs.twins(model, clans, differs, "report", 12)
    own, donor = outcomes.deserts(clans, differs, twins)
    assert set(own) != set(donor) or own != donor
    assert outcomes.deserts(clans, pairs.contrast(model, clans, "clan"), twins)[1] == ()
    one = outcomes.one(model, clans, arms.nothing(), differs, twins, "front")
    assert one.deserved == own and one.donor_deserved == donor
