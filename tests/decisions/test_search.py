"""The audit that searches: planted biases are named, honest officers acquitted, what was not asked is not tested."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from refusals import refused

from glassbox_utils import cli
from glassbox_utils.core import models
from glassbox_utils.core.models import wrap_model
from glassbox_utils.decisions import judging, power, probes, scoring, screening, search
from glassbox_utils.decisions.fields import DecisionError, Text
from glassbox_utils.decisions.power import Planting
from glassbox_utils.decisions.probes import Part, Probe
from glassbox_utils.decisions.reading import load_decision
from glassbox_utils.decisions.search import LEAST

NAMES = {
    ("left", "hill"): ["Bo", "Bea", "Bim", "Bud", "Bix", "Bel"],
    ("right", "hill"): ["Cy", "Cleo", "Cam", "Cob", "Cat", "Con"],
    ("left", "lake"): ["Di", "Dot", "Dag", "Dov", "Den", "Dub"],
    ("right", "lake"): ["Ed", "Eve", "Eli", "Ema", "Eno", "Eva"],
}
YAML = """\
title: Crates
answers: [" top", " low"]
templates:
  plain: {{text: "{{{owner}}}, {{{rings}}}, {{{kind}}}, {{{weight}}}, {{{seal}}}.\\nShelf:"}}
  turned: {{text: "{{{weight}}}: {{{kind}}} {{{owner}}} {{{rings}}} {{{seal}}}\\nShelf:"}}
  list: {{text: "{{{seal}}} / {{{rings}}} / {{{weight}}} / {{{owner}}} / {{{kind}}}\\nShelf:"}}
  words: {{text: "{{{owner}}} has {{{rings}}} rings, {{{kind}}}, {{{seal}}}, weighs {{{weight}}}.\\nShelf:"}}
fields:
  {owner}: {{kind: text, role: protected}}
  {rings}: {{kind: number, role: protected, range: [0, 59], bands: [30]}}
  {kind}: {{kind: category, role: other, values: [oak, elm, fir, ash, yew, box]}}
  {weight}: {{kind: number, role: merit, range: [0, 9]}}
  {seal}: {{kind: category, role: merit, values: [whole, cracked]}}
groups: {{{side}: [left, right], {home}: [hill, lake]}}
carriers: [{{field: {owner}, lists: [{lists}]}}]
merit: {{threshold: 2, points: [{{field: {weight}, at_most: 6, points: 1}}, {{field: {weight}, at_most: 3, points: 1}},
  {{field: {seal}, equals: whole, points: 1}}]}}
cases: {{file: cases.csv}}
"""
WORDS = {w: w for w in ("owner", "rings", "kind", "weight", "seal", "side", "home")}
OTHERS = {"owner": "gender", "rings": "income", "kind": "history", "weight": "age", "seal": "name", "side": "merit_x",
          "home": "debt"}  # fmt: skip


def crates(folder, words=WORDS):
    """A made-up decision, with fields and groups called as one likes."""
    rng = np.random.default_rng(0)
    lists = ", ".join(
        f"{{groups: {{{words['side']}: {s}, {words['home']}: {h}}}, values: [{', '.join(names)}]}}"
        for (s, h), names in NAMES.items()
    )
    folder.mkdir(exist_ok=True)
    (folder / "decision.yaml").write_text(YAML.format(**words, lists=lists))
    everybody = [name for names in NAMES.values() for name in names]
    rows = [
        f"{rng.choice(everybody)},{rng.integers(10, 50)},{rng.choice(['oak', 'elm', 'fir'])},{rng.integers(10)},"
        f"{rng.choice(['whole', 'cracked'])}"
        for _ in range(120)
    ]
    header = ",".join(words[w] for w in ("owner", "rings", "kind", "weight", "seal"))
    (folder / "cases.csv").write_text(header + "\n" + "\n".join(rows) + "\n")
    return load_decision(folder)


def deciding(decision):
    """A random model that answers with the two words only."""
    hf = tiny.network("llama", len(tiny.tokenizer()), positions=256)
    model = wrap_model(hf, tiny.tokenizer(), "random")
    keep = list(scoring.answer_tokens(model, decision, scoring.prompts(model, decision, decision.cases[:1])[0]))
    head = torch.nn.Linear(hf.config.hidden_size, hf.config.vocab_size)
    with torch.no_grad():
        head.weight.copy_(hf.lm_head.weight.cpu() * 0.3)
        head.bias.fill_(-1e4)
        head.bias[keep] = 0.0
    hf.lm_head = head.to(model.device)
    return model


@pytest.fixture(scope="module")
def crate(tmp_path_factory):
    return crates(tmp_path_factory.mktemp("crates"))


def side(group, words=WORDS):
    names = [n for (s, _), some in NAMES.items() if s == group for n in some]
    return Part(words["side"], words["owner"], tuple(names), group=group)


def home(group):
    return Part("home", "owner", tuple(n for (_, h), some in NAMES.items() if h == group for n in some), group=group)


def value(field, word):
    return Part(field, field, (word,))


def window(field, low, high):
    return Part(field, field, (low, high), window=True)


def planting(*against):
    return Planting("planted", tuple(Probe(tuple(parts), "planted") for parts in against))


def audited(decision, against, size=1.0, seed=0, n=48, odd=None, **more):
    return search.search(power.officer(decision, against, size, seed, odd=odd), decision, n, seed, resamples=0, **more)


# --- what is found ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        [side("left")],
        [value("owner", "Dot")],
        [window("rings", 41, 52)],
        [window("rings", 0, 6)],
        [value("kind", "yew")],
        [side("right"), home("lake")],
        [side("left"), value("kind", "elm")],
        [window("rings", 20, 34), value("kind", "oak")],
        [home("hill"), value("seal", "cracked")],
    ],
    ids=lambda parts: str(Probe(tuple(parts), "")),
)
def test_a_planted_bias_is_found_and_named(crate, parts):
    wanted = planting(parts)
    audit = audited(crate, wanted)
    found, right, alarm = power.graded(crate, wanted, audit)
    assert found and right and not alarm, audit.as_text()
    effect = next(e for e in audit.found if power.same(crate, wanted.against[0], e))
    assert effect.logits.low < -power.SHARPNESS * 0.8 and abs(effect.logits.value) < power.SHARPNESS * 1.2
    assert effect.points.low < effect.points.value < 0.5 and effect.logits.n == 24
    assert all(str(part.group or part.values[0]) in effect.whom or part.window for part in parts)


def test_two_biases_and_a_legitimate_dependence_are_told_apart(crate):
    wanted = planting([side("left")], [window("rings", 30, 59)], [value("kind", "ash")])
    audit = audited(crate, wanted)
    assert all(any(power.same(crate, one, e) for e in audit.found) for one in wanted.against), audit.as_text()
    assert len(audit.found) == 3
    assert [audit[s].outcome for s in ("side", "rings", "kind", "home", "owner")] == ["found"] * 3 + ["not found"] * 2


def test_a_merit_field_is_not_accused_and_its_weight_is_no_yardstick(crate):
    for seed, (field, factor) in enumerate([("seal", 0.1), ("seal", 0.2), ("weight", 3.0), ("seal", 0.0)]):
        audit = audited(crate, Planting("honest"), seed=seed, odd={field: factor})
        assert not audit.found and "weight" not in [v.subject for v in audit.verdicts], audit.as_text()
        for verdict in audit.verdicts:
            assert verdict.outcome == "not found"
            limits = [verdict.smallest, verdict.smallest_single, verdict.smallest_pair]
            assert all(judging.BAR < x < 2 for x in limits if x is not None) and any(limits)
        assert "would have been found with 90 % power: " in audit.as_text()


def test_what_would_have_been_found_is_found(crate):
    least = audited(crate, Planting("honest"))["side"].smallest
    hits = [
        audited(crate, planting([side("left")]), least / power.SHARPNESS, seed)["side"].outcome for seed in range(1, 6)
    ]
    assert hits.count("found") >= 4  # of 5, at 90 % power


def test_an_effect_in_one_wording_only_does_not_count(crate):
    honest = power.officer(crate, Planting("honest"), 0, 0)
    left = side("left").values

    def scorer(cases, template):
        return honest(cases, template) - 3.0 * (template == "turned") * torch.tensor(
            [c["owner"] in left for c in cases]
        )

    assert search.search(scorer, crate, 48, resamples=0)["side"].outcome == "not found"


def test_names_of_fields_mean_nothing(crate, tmp_path):
    other = crates(tmp_path / "renamed", OTHERS)
    mine = audited(crate, planting([side("left"), value("kind", "elm")]))
    theirs = audited(other, planting([side("left", OTHERS), value("history", "elm")]))
    back = {new: old for old, new in OTHERS.items()}
    assert [(back[v.subject], v.outcome) for v in theirs.verdicts] == [(v.subject, v.outcome) for v in mine.verdicts]
    assert [e.logits for e in theirs.found] == [e.logits for e in mine.found] != []


# --- how it is done -----------------------------------------------------------------------------------


def test_no_case_chooses_and_confirms_and_calls_are_counted(crate):
    asked, honest = [], power.officer(crate, Planting("honest"), 0, 0)

    def scorer(cases, template):
        asked.extend((case.id, template) for case in cases)
        return honest(cases, template)

    audit = search.search(scorer, crate, 48, resamples=0)
    first, second = map(set, audit.halves)
    assert not first & second and len(first) == len(second) == 24 and audit.calls == len(asked)
    order = [case in second for case, _ in asked[4 * search.TRIED :]]  # after the look at whether it decides
    assert order == sorted(order) and len(order) == 48 * 4 * search.VERSIONS
    assert audit.confirmed <= screening.AT_MOST < sum(audit.hypotheses.values())


def test_same_seed_same_audit_and_confidence_is_of_the_whole_search(crate):
    def run(seed):
        audit = search.search(power.officer(crate, planting([side("left")]), 1, 3), crate, 48, seed, resamples=3)
        return replace(audit, seconds=0.0)

    first = run(0)
    assert first == run(0) and first != run(1)
    assert first["side"].confidence == 1.0 and all(0 <= v.confidence <= 1 for v in first.verdicts)
    told = json.loads(first.as_json())
    assert told["verdicts"][[v.subject for v in first.verdicts].index("side")]["outcome"] == "found"
    assert "against side is left" in first.as_text() and "100% of resamples agree" in first.as_text()
    missed = next(v for v in first.verdicts if v.outcome == "not found")
    assert missed.confidence is not None and "agree" not in str(missed) and "90 % power" in str(missed)


def test_a_scorer_without_any_noise_gets_verdicts_and_limits(crate):
    def flat(cases, template):
        return torch.zeros(len(cases))

    audit = search.search(flat, crate, 24, resamples=2)  # nothing is chosen
    assert audit.confirmed == 0 and {v.outcome for v in audit.verdicts} == {"not found"}, audit.as_text()
    left = side("left").values
    faint = lambda cases, _: torch.tensor([0.05 * (c["owner"] in left) for c in cases])  # noqa: E731
    verdict = search.search(faint, crate, 24, resamples=0)["side"]  # chosen, and below the bar
    assert verdict.outcome == "not found" and judging.BAR <= verdict.smallest < 2 * judging.BAR


def test_suspects_are_asked_about_more_often_in_the_second_half_only(crate):
    rng = np.random.default_rng(0)
    plain = probes.design(crate, crate.cases[:8], ["plain", "list"], 12, rng)
    more = probes.design(crate, crate.cases[:8], ["plain", "list"], 12, rng, {"owner": ["Dot"]})
    share = [probes.column(one, value("owner", "Dot")).mean() for one in (plain, more)]
    assert share[0] < 0.06 and share[1] > 0.3 and plain.shape == (8, 2, 12)
    assert all(a["weight"] == crate.cases[i // 24]["weight"] for i, a in enumerate(plain.asked))  # merit stays


def test_the_screen_takes_what_overlaps_less():
    rng = np.random.default_rng(0)
    truth = rng.random((960, 3)) < 0.4
    near = truth[:, :1] ^ (rng.random((960, 1)) < 0.1)
    x = np.concatenate([near, truth, rng.random((960, 200)) < 0.3], 1).astype(float)
    x = x - x.mean(0)
    y = x[:, 1] - x[:, 2] + rng.normal(size=960) * 0.3
    chosen = screening.choose(
        y, x, np.full(204, 2 * np.log(204)), np.arange(204), np.ones(204, dtype=bool), np.ones(960), 880
    )
    assert sorted(chosen) == [1, 2]
    again = screening.fit(y, x[:, chosen], (20, 4, 12), [None, None], screening.once((20, 4, 12)))
    assert (np.abs(np.abs(again.effects) - 1) < 3 * again.errors).all() and (again.errors >= again.plain).all()


# --- what is not tested -------------------------------------------------------------------------------


def reasons(audit):
    assert all(v.outcome == "not tested" and v.confidence is None for v in audit.verdicts)
    (reason,) = {v.reason for v in audit.verdicts}
    return reason


@pytest.mark.parametrize("n", [1, 8, 9, LEAST - 1])
def test_few_cases_say_nothing(crate, n):
    audit = search.search(power.officer(crate, planting([side("left")]), 3, 0), crate, n)
    assert f"too few cases: {n}, and {LEAST} are needed" in reasons(audit) and audit.calls == 0
    assert "not tested" in audit.as_text()


def test_a_model_that_does_not_answer_is_not_tested(crate):
    def silent(cases, template):
        raise DecisionError("It does not decide here.")

    assert "does not answer the question. " in reasons(search.search(silent, crate, 20))
    honest = power.officer(crate, planting([side("left")]), 1, 0)

    def partly(cases, template):
        return silent(cases, template) if template in ("plain", "list") else honest(cases, template)

    audit = search.search(partly, crate, 48, resamples=0)
    assert audit.templates == ("turned", "words") and audit["side"].outcome == "found"
    nan = refused(lambda: search.search(lambda cases, _: torch.full((len(cases),), float("nan")), crate, 20))
    assert "240" in nan or "not finite" in nan


def test_without_a_counterpart_nothing_is_said(crate):
    only = replace(crate.carriers[0], lists=tuple(o for o in crate.carriers[0].lists if o.groups["side"] == "left"))
    cases = tuple(replace(c, values={**c.values, "owner": "Bo"}) for c in crate.cases)
    audit = audited(replace(crate, carriers=(only,), cases=cases), Planting("honest"), n=24)
    assert audit["side"].outcome == "not tested" and "there is no counterpart" in audit["side"].reason
    assert audit["home"].outcome == "not found"
    fields = {**crate.fields, "owner": Text(role="protected", known=("Bo",))}
    alone = audited(replace(crate, carriers=(), groups={}, cases=cases, fields=fields), Planting("honest"), n=24)
    assert alone["owner"].outcome == "not tested" and "one value only" in alone["owner"].reason


@pytest.mark.parametrize(
    "more", [{"n": 0}, {"n": 2.0}, {"seed": -1}, {"resamples": -1}, {"templates": ["nosuch"]}, {"n": True}]
)
def test_wrong_arguments_are_refused(crate, more):
    words = refused(lambda: search.search(power.officer(crate, Planting("honest"), 0, 0), crate, **more))
    assert "Allowed:" in words


# --- the command --------------------------------------------------------------------------------------


def test_the_command_prints_verdicts_and_writes_json(crate, tmp_path, monkeypatch, capsys):
    model = deciding(crate)
    monkeypatch.setattr(models, "load_model", lambda *a, **k: model)
    monkeypatch.chdir(tmp_path)
    folder = crates(tmp_path / "crates") and "crates"
    assert cli.main(["audit", "--decision", folder, "--n", "16", "--seed", "2", "--out", "audit.json"]) == 0
    said, told = capsys.readouterr().out, json.loads((tmp_path / "audit.json").read_text())
    assert "Audit of Crates" in said and "side (protected): " in said
    assert told["seed"] == 2 and told["n"] == 16 and {v["subject"] for v in told["verdicts"]} >= {"side", "rings"}
    assert told["calls"] == 16 * 48 + 16


def test_the_command_says_that_a_model_does_not_decide(tmp_path, monkeypatch, capsys):
    model = wrap_model(tiny.network("llama", len(tiny.tokenizer()), positions=256), tiny.tokenizer(), "random")
    monkeypatch.setattr(models, "load_model", lambda *a, **k: model)
    crates(tmp_path / "crates")
    assert cli.main(["audit", "--decision", str(tmp_path / "crates"), "--n", "16"]) == 0
    assert "not tested" in (said := capsys.readouterr().out) and "does not decide here" in said


@pytest.mark.parametrize(
    "rest",
    ["", "--decision nosuch", "--decision hiring --n 0", "--decision hiring --seed -1", "--decision hiring --n x"],
)
def test_the_command_refuses_what_is_wrong(rest, capsys):
    try:
        code = cli.main(["audit", *rest.split()])
    except SystemExit as end:
        code = end.code
    assert code == 2 and capsys.readouterr().err.strip()
