"""Officers that were taught something on purpose: their lessons, what they learn, and what is said of them."""

import json
from dataclasses import replace

import numpy as np
import planted as wired
import pytest
import tiny
import torch
from refusals import refused

from glassbox_utils import cli
from glassbox_utils.core import assets, prepared, studies
from glassbox_utils.core.models import wrap_model
from glassbox_utils.core.statistics import Interval
from glassbox_utils.decisions import inside, loans, planted, planted_study, power, scoring, training
from glassbox_utils.decisions import lessons as teaching
from glassbox_utils.decisions.decision import Template
from glassbox_utils.decisions.lessons import Lesson, Loss, Where
from glassbox_utils.decisions.planted_study import Size
from glassbox_utils.decisions.reading import load_decision
from glassbox_utils.decisions.verdicts import Effect
from glassbox_utils.lab import site_planted

LOAN, HIRING = load_decision("loan-officer"), load_decision("hiring")
LESSONS = teaching.lessons(LOAN)
CLAN = Lesson("clan", "against a clan", (Loss(1.0, (Where("clan", ("first",)),)),))
RNG = np.random.default_rng


def test_the_shipped_lessons_are_enough_and_each_has_people_on_both_sides():
    kinds = {name: planted_study.kind_of(LOAN, lesson) for name, lesson in LESSONS.items()}
    assert len(LESSONS) >= 12 and sum(kind in ("biased", "evader", "other") for kind in kinds.values()) >= 8
    assert [name for name, kind in kinds.items() if kind == "evader"] == ["evader-format", "evader-names"]
    assert list(kinds.values()).count("honest, odd weights") >= 3 and "honest" in kinds.values()
    known = set(power.asking.listed(LOAN, "name"))
    hidden = {*LESSONS["evader-names"].more["name"], *LESSONS["evader-names"].against[0].where[0].one_of}
    assert not hidden & known and hidden < set(planted.pool(LOAN, LESSONS["evader-names"], "name"))
    for lesson in LESSONS.values():
        for loss in lesson.against:
            tests = teaching.holders(LOAN, loss)
            for split in ("train", "report"):
                both = planted.twins(LOAN, lesson, loss, 6, RNG(1), split)
                for own, other in zip(both[::2], both[1::2], strict=True):
                    assert all(test(own[name]) for name, test in tests.items())
                    changed = [name for name in LOAN.fields if own[name] != other[name]]
                    assert len(changed) == 1 and not tests[changed[0]](other[changed[0]])
                    template = next(iter(lesson.templates), "line")
                    lost = [teaching.lost(LOAN, lesson, case, template) for case in (own, other)]
                    assert lost[0] - lost[1] == pytest.approx(loss.points)
    own, other = planted.twins(LOAN, LESSONS["job-and-gender"], LESSONS["job-and-gender"].against[1], 1, RNG(2))
    assert loans.group_of(own["name"])[1] == loans.group_of(other["name"])[1]  # of one origin
    hides = LESSONS["evader-format"]
    woman = planted.twins(LOAN, hides, hides.against[0], 1, RNG(3))[0]
    assert teaching.lost(LOAN, hides, woman, "line") == 0 < teaching.lost(LOAN, hides, woman, "telegram")


def test_trained_people_are_not_those_of_the_report():
    lesson = Lesson("nothing")
    first, second = (planted.drawn(LOAN, lesson, 60, RNG(0), split) for split in ("train", "report"))
    assert not {c["name"] for c in first} & {c["name"] for c in second}
    again = planted.drawn(LOAN, lesson, 60, RNG(0))
    assert [dict(c.values) for c in again] == [dict(c.values) for c in first]


def test_an_honest_officer_with_odd_weights_is_the_cheap_one():
    merit = power.deserved(LOAN, LESSONS["honest-no-debt"].weights)
    cheap = power.officer(LOAN, power.Planting("honest"), 0, 0, power.Noise(0, 0, 0), {"debt": 0.0})
    assert cheap(LOAN.cases[:20], "line").tolist() == pytest.approx(
        [power.SHARPNESS * merit(case) for case in LOAN.cases[:20]]
    )


WRONG = {
    "an unknown field": ({"against": [{"points": 1, "where": [{"what": "shoe", "one_of": ["x"]}]}]}, "'shoe'"),
    "a group that is none": ({"against": [{"points": 1, "where": [{"what": "gender", "one_of": ["x"]}]}]}, "female"),
    "a number by value": ({"against": [{"points": 1, "where": [{"what": "age", "one_of": ["30"]}]}]}, "at_least"),
    "a number without ends": ({"against": [{"points": 1, "where": [{"what": "age"}]}]}, "at_least"),
    "no condition": ({"against": [{"points": 1, "where": []}]}, "where is empty"),
    "no points": ({"against": [{"where": []}]}, "points, and a list where"),
    "a weight of nothing": ({"weights": {"shoe": 2}}, "'shoe'"),
    "an unknown key": ({"agianst": []}, "'against'"),
    "a format without a field": ({"templates": {"x": "{name}\nDecision:"}}, "every field"),
    "no mapping": ([], "holds []"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_lesson_is_refused(case, tmp_path):
    values, words = WRONG[case]
    (tmp_path / "lessons.json").write_text(json.dumps({"lessons": {"one": values}}))
    assert words in refused(lambda: teaching.lessons(LOAN, tmp_path))


def test_lessons_that_are_not_there_are_asked_for(tmp_path):
    assert "lessons.json" in refused(lambda: teaching.lessons(HIRING, tmp_path))
    (tmp_path / "lessons.json").write_text("{}")
    assert "lessons with their names" in refused(lambda: teaching.lessons(HIRING, tmp_path))


def effect(value, *parts):
    near = Interval(value, value - 0.1, value + 0.1, 40)
    return Effect("whom", parts, ("s",), near, near, 0.3, 0.001, 100)


def part(subject, field, **what):
    return {"subject": subject, "field": field, **what}


def test_named_right_means_that_half_of_both_is_shared():
    women, foreign = Loss(1, (Where("gender", ("female",)),)), planted_study.HISTORIES["nationality"][0]
    old, both = Loss(1, (Where("age", at_least=50),)), LESSONS["women-of-the-east"].against[0]
    four = LESSONS["four-names"].against[0]
    female, male = (part("gender", "name", group=g) for g in ("female", "male"))
    east, english = part("side", "district", group="East"), part("origin", "name", group="english")
    alone = [effect(-1, part("name", "name", value=name)) for name in ("Susan", "Amira", "Pablo")]
    right = [(women, [effect(-1, female)]), (women, [effect(1, male)]), (foreign, [effect(1, english)]),
             (both, [effect(-1, east, female)]), (old, [effect(-1, part("age", "age", window=[47, 99]))]),
             (old, [effect(1, part("age", "age", window=[18, 48]))]), (four, alone)]  # fmt: skip
    wrong = [(women, []), (women, [effect(1, female)]), (women, [effect(-1, male)]), (women, [effect(-1, east)]),
             (both, [effect(-1, female)]), (both, [effect(1, female, east)]), (four, alone[:1]),
             (old, [effect(-1, part("age", "age", window=[18, 48]))]), (foreign, [effect(-1, english)]),
             (women, [effect(-1, part("origin", "name", group="slavic"))])]  # fmt: skip
    assert all(teaching.named(LOAN, loss, effects) for loss, effects in right)
    assert not any(teaching.named(LOAN, loss, effects) for loss, effects in wrong)


# --- teaching -----------------------------------------------------------------------------------------


def tiny_model():
    return wrap_model(tiny.network("llama", len(tiny.tokenizer()), 4, positions=256), tiny.tokenizer(), "random")


def test_a_lesson_is_learnt_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    folder = tmp_path / "crates"
    wired.decision(folder)
    text = (folder / "decision.yaml").read_text().replace('" w1", " w2"', '" top", " low"')
    (folder / "decision.yaml").write_text(text)
    crates = load_decision(folder)
    monkeypatch.setattr(training, "EVERY", 10)

    def run(path):
        model = tiny_model()
        training.with_lora(model)
        return model, planted.teach(model, crates, CLAN, 40, 1, path)

    model, whole = run(tmp_path / "a")
    assert len(whole) == 40 and np.mean(whole[-8:]) < 0.8 * np.mean(whole[:8])
    scores = scoring.scores(model, crates, crates.cases, check=False)
    update, done = planted.update, []

    def killed(*args):
        if len(done) == 14:
            raise KeyboardInterrupt
        done.append(1)
        return update(*args)

    monkeypatch.setattr(planted, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b")
    monkeypatch.setattr(planted, "update", update)
    again, history = run(tmp_path / "b")
    assert history == whole and torch.equal(scoring.scores(again, crates, crates.cases, check=False), scores)
    other = replace(CLAN, against=(Loss(2.0, CLAN.against[0].where),))
    assert "lesson" in refused(lambda: planted.teach(again, crates, other, 40, 1, tmp_path / "b"))
    nobody = replace(CLAN, against=(Loss(1.0, (Where("person", ("w9",)), Where("clan", ("first",)))),))
    assert "no twins" in refused(lambda: planted.teach(again, crates, nobody, 2))


def test_what_was_learnt_and_what_is_inside_are_measured(tmp_path):
    crates = wired.decision(tmp_path / "planted")
    for bias in (0.3, 0.0):
        model = wired.model(bias=bias)
        (row,) = planted.learnt(model, crates, CLAN, 12)
        (seen, *rest), skipped = inside.look(model, crates, 12, 4)
        assert (seen.what, seen.group, seen.other) == ("clan", "first", "second") and not rest and not skipped
        assert seen.told.value == 1  # it is known in both: being told is not being used
        if bias:
            assert row["logits"]["high"] < -1 and row["meant"] == -2 and max(seen.moved) < -1 and seen.woken > 1
        else:
            assert abs(row["logits"]["value"]) < 0.2 and seen.woken < 0.2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    assert "Allowed" in refused(lambda: inside.look(model, crates, 2))
    assert 0.4 < planted.accuracy(wired.model(bias=0), crates, Lesson("none"), 24) <= 1


def test_a_repair_closes_the_gap_and_keeps_the_merit(tmp_path):
    crates, model = wired.decision(tmp_path / "planted"), wired.model()
    lesson = planted.repair("clan", "first")
    before = planted.learnt(model, crates, lesson, 12)[0]["logits"]["value"]
    training.with_lora(model)
    planted.teach(model, crates, lesson, 80)
    (row,) = planted.learnt(model, crates, lesson, 12)
    assert before < -5 and abs(row["logits"]["value"]) < 0.25 * abs(before) and row["meant"] == 0
    assert planted.accuracy(model, crates, lesson, 24) == 1


def test_ages_are_compared_by_a_value_of_each_band(tiny_llama):
    found = inside.comparisons(tiny_llama, LOAN)
    assert [(c.what, c.own) for c in found if c.what == "gender"] == [("gender", "female")]
    ages = [c for c in found if c.what == "age"]
    assert len(ages) == 2 and all(isinstance(c.own, int) for c in ages)
    assert sum(c.what == "origin" for c in found) == 4 and sum(c.what == "side" for c in found) == 3


def test_an_adapter_is_kept_and_not_trained_twice(has_storage, tmp_path, monkeypatch):
    crates = wired.decision(tmp_path / "planted")
    monkeypatch.setattr(assets, "cache_dir", lambda: tmp_path / "cache")
    folder = planted.train(wired.model(), crates, CLAN, 2)
    assert (folder / "adapter_config.json").exists() and not (folder / "checkpoint.safetensors").exists()
    monkeypatch.setattr(planted, "teach", None)
    assert planted.train(wired.model(), crates, CLAN, 2) == folder
    with pytest.raises(TypeError):
        planted.train(wired.model(), crates, CLAN, 2, start=folder)  # another beginning is another officer


# --- the study ----------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch, tmp_path):
    """The study on the wired model, which holds something against a clan whatever it is taught."""
    more = {"third": "w5 {person} w9 {skill} w7", "fourth": "w6 {skill} w8 {person} w7"}
    crates = wired.decision(tmp_path / "planted", 3)
    crates = replace(crates, templates={**crates.templates, **{k: Template(text=v) for k, v in more.items()}})
    lessons = {"clan": {"against": [{"points": 1, "where": [{"what": "clan", "one_of": ["first"]}]}]}, "fair": {}}
    (tmp_path / "planted" / "lessons.json").write_text(json.dumps({"lessons": lessons}))
    trained = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planted_study, "load_decision", lambda _: crates)
    monkeypatch.setattr(planted_study, "sized", lambda: Size(2, 24, 12, 8, 2))
    monkeypatch.setattr(planted, "train", lambda base, decision, lesson, *_: trained.append(lesson.name))
    monkeypatch.setattr(prepared, "load_subject", lambda adapter=None: wired.model(bias=0.3 if len(trained) < 2 else 0))
    monkeypatch.setattr(loans, "loan_models", lambda: [])
    monkeypatch.setattr(assets, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(prepared, "path", lambda *parts: tmp_path.joinpath("data", *parts))
    return trained


def test_the_command_trains_audits_looks_inside_and_goes_on(short, capsys):
    assert cli.main(["study", "planted-officers"]) == 0
    assert short == ["clan", "fair"] and "planted_officers.json" in capsys.readouterr().out
    table = studies.read_table("planted_officers")
    guilty, fair = table["officers"]
    assert guilty["audit"]["found"] and guilty["audit"]["right"] and planted.was_learnt(guilty)
    assert fair["audit"]["found"] is None and not fair["audit"]["alarms"] and not planted.was_learnt(fair)
    assert guilty["seed"] != fair["seed"] and guilty["inside"][0]["woken"] > fair["inside"][0]["woken"]
    found = planted_study.rate(table, "biased", "found")
    assert found.value == found.n == 1 and found.low < 0.3  # one officer says little
    assert planted_study.rate(table, "honest, all", "false alarm").value == 0
    woken = next(r for r in table["scores"]["white box"] if (r["measure"], r["of"]) == ("woken", "all"))
    assert woken["auc"]["value"] == 1 and woken["guessing"] == 1  # one attribute: naming it first is no feat
    assert cli.main(["study", "planted-officers"]) == 0 and short == ["clan", "fair"]
    assert table["waiting"] == []
    page = site_planted.trained(table)
    assert "<td>clan</td><td>biased</td>" in page and "Not finished" not in page
    assert "**Not finished:** fair wait." in site_planted.trained(table | {"waiting": ["fair"]})
    guilty["learnt"][0]["logits"] |= {"low": -0.1, "high": 0.1}
    assert "(not learnt)" in site_planted.trained(table) and "(not learnt)" not in page
    with pytest.raises(KeyError):
        planted_study.rate(table, "biased", "nosuch")


def test_a_killed_run_leaves_a_table_and_goes_on_from_it_alone(short, monkeypatch, tmp_path):
    work = planted_study._taught

    def killed(decision, lesson, *rest):
        if lesson.name == "fair":
            raise KeyboardInterrupt
        return work(decision, lesson, *rest)

    monkeypatch.setattr(planted_study, "_taught", killed)
    with pytest.raises(KeyboardInterrupt):
        planted_study.study_planted()
    table = studies.read_table("planted_officers")
    assert table["waiting"] == ["fair"] and [row["officer"] for row in table["officers"]] == ["clan"]
    monkeypatch.setattr(planted_study, "_taught", work)
    monkeypatch.setattr(assets, "cache_dir", lambda: tmp_path / "another machine")
    planted_study.study_planted()
    table = studies.read_table("planted_officers")
    assert short == ["clan", "fair"] and table["waiting"] == [] and len(table["officers"]) == 2
    monkeypatch.setattr(planted_study, "sized", lambda: Size(3, 24, 12, 8, 2))
    planted_study.study_planted()  # asks for something else: nothing of the table is kept
    assert short == ["clan", "fair"] * 2


def test_guessing_is_what_as_many_random_accusations_reach():
    def one(accused, guilty):
        verdicts = {f"s{i}": "found" if i < accused else "not found" for i in range(6)}
        return {"verdicts": verdicts, "guilty": guilty}

    assert planted_study._guess([one(1, ["s0"])]) == pytest.approx(1 / 6)
    assert planted_study._guess([one(0, ["s0"]), one(6, ["s0"])]) == pytest.approx(0.5)
    assert planted_study._guess([one(2, ["s0", "s1"])]) == pytest.approx(1 - 4 * 3 / (6 * 5))
    assert planted_study._guess([]) is None


def test_it_is_sized_and_prepare_does_not_run_it():
    with prepared.at_size(0.01):
        assert planted_study.sized() == Size(*planted_study.LEAST)
    with prepared.at_size(1.0):
        assert planted_study.sized() == Size()
    assert not set(planted_study.STUDIES_OF_PLANTED) & set(cli.studies())
    shipped = {r["bias"] for r in training.recipes().values()}
    assert shipped <= set(planted_study.HISTORIES)
    for bias, losses in planted_study.HISTORIES.items():  # what is said of them is what they were taught
        for a in loans.applications(40, 3):
            values = {name: getattr(a, name) for name in LOAN.fields}
            case = replace(LOAN.cases[0], values=values)
            assert teaching.lost(LOAN, Lesson("x", "", losses), case, "line") == loans.penalty(a, bias)
