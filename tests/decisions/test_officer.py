"""Officers for any decision: the split, the lesson, the opponents, the measures of a scorer, and the card."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from refusals import refused
from sklearn.metrics import roc_auc_score

from glassbox_utils import cli
from glassbox_utils.core.models import load_model, wrap_model
from glassbox_utils.decisions import officer, scoring, training
from glassbox_utils.decisions.decision import parse_case, truth
from glassbox_utils.decisions.reading import load_decision

YAML = """\
title: Shelf
answers: [" top", " low"]
templates:
  plain: {text: "weight {weight}, {kind}, {owner}.\\nShelf:", split: train}
  turned: {text: "{owner}: {kind}, weight {weight}.\\nShelf:", split: report}
fields:
  weight: {kind: number, role: merit, range: [0, 9]}
  kind: {kind: category, role: merit, values: [soft, hard]}
  owner: {kind: text, role: protected}
groups: {side: [left, right]}
carriers: [{field: owner, lists: [{groups: {side: left}, values: [Bo]}, {groups: {side: right}, values: [Cy]}]}]
merit: {threshold: 2, points: [{field: weight, at_most: 4, points: 1}, {field: kind, equals: soft, points: 1}]}
cases: {file: cases.csv}
"""


@pytest.fixture
def shelf(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        f"{rng.integers(10)},{('soft', 'hard')[rng.integers(2)]},{('Bo', 'Cy')[rng.integers(2)]}" for _ in range(400)
    ]
    folder = tmp_path / "shelf"
    folder.mkdir()
    (folder / "decision.yaml").write_text(YAML)
    (folder / "cases.csv").write_text("weight,kind,owner\n" + "\n".join(rows) + "\n")
    return load_decision(folder)


def model_of():
    return wrap_model(tiny.network("llama", len(tiny.tokenizer()), 4, positions=256), tiny.tokenizer(), "random")


def test_cases_are_divided_by_seed_with_the_answers_in_their_shares(shelf):
    train, held = officer.divided(shelf, 1)
    assert not {c.id for c in train} & {c.id for c in held} and len(train) + len(held) == 400
    share = [np.mean([truth(shelf, c) for c in part]) for part in (train, held)]
    assert abs(share[0] - share[1]) < 0.02 and abs(len(held) / 400 - officer.HELD) < 0.01
    assert officer.divided(shelf, 1) == (train, held) != officer.divided(shelf, 2)
    few = replace(shelf, cases=shelf.cases[:100])
    assert "at least 20 for each answer" in refused(lambda: officer.divided(few))
    assert "no merit rule" in refused(lambda: officer.divided(replace(shelf, merit=None)))


def test_every_case_is_seen_once_in_each_round():
    seen = [i for step in range(10) for i in officer._batch(40, step, 3)]
    assert all(sorted(seen[k : k + 40]) == list(range(40)) for k in (0, 40, 80)) and seen[:40] != seen[40:80]


def test_measures_agree_with_those_of_others_and_with_what_is_known():
    rng = np.random.default_rng(0)
    p = rng.integers(0, 20, 500) / 20 + 0.01  # with ties
    y = rng.random(500) < p
    assert officer.auc(p, y.astype(float)) == pytest.approx(roc_auc_score(y, p))
    assert officer.auc(p, np.ones(500)) == 0.5
    good = officer.quality(p, y)
    assert good.calibration.value < good.floor * 2 and good.auc.low < good.auc.value < good.auc.high
    bad = officer.quality(p**4, y)
    assert bad.calibration.low > bad.floor * 2 and bad.brier.value > good.brier.value
    assert good.brier.value == pytest.approx(np.mean((p - y) ** 2)) and good.brier.value < good.constant
    assert officer.calibration_error(np.full(100, 0.3), np.ones(100)) == pytest.approx(0.7)


def test_opponents_see_the_table_with_its_groups_and_find_the_rule(shelf):
    train, held = officer.divided(shelf)
    table = officer.as_table(shelf, held)
    assert table.shape == (len(held), 5)  # weight, two kinds, two sides
    stranger = parse_case(shelf, {"weight": 3, "kind": "soft", "owner": "Di"})
    assert officer.as_table(shelf, [stranger]).tolist() == [[3, 1, 0, 0, 0]]
    right = np.array([truth(shelf, c) for c in held])
    for name, p in officer.opponents(shelf, train, held).items():
        assert officer.quality(p, right).auc.value > 0.95, name


@pytest.mark.parametrize("real", [False, True])
def test_an_officer_learns_and_a_killed_run_goes_on(shelf, real, tmp_path, monkeypatch):
    if real:
        shelf = replace(shelf, cases=tuple(replace(c, outcome=truth(shelf, c)) for c in shelf.cases), merit=None)
    monkeypatch.setattr(training, "EVERY", 10)
    train, held = officer.divided(shelf)
    model = model_of()
    training.with_lora(model)
    whole = officer.teach(model, shelf, train, 30, checkpoint=tmp_path / "a.safetensors")
    assert len(whole) == 30 and np.mean(whole[-5:]) < 0.8 * np.mean(whole[:5])
    scores = scoring.scores(model, shelf, held, check=False)
    update, done = officer.update, []

    def killed(*args):
        if len(done) == 14:
            raise KeyboardInterrupt
        done.append(1)
        return update(*args)

    monkeypatch.setattr(officer, "update", killed)
    again = model_of()
    training.with_lora(again)
    with pytest.raises(KeyboardInterrupt):
        officer.teach(again, shelf, train, 30, checkpoint=tmp_path / "b.safetensors")
    monkeypatch.setattr(officer, "update", update)
    resumed = model_of()
    training.with_lora(resumed)
    assert officer.teach(resumed, shelf, train, 30, checkpoint=tmp_path / "b.safetensors") == whole
    assert torch.equal(scoring.scores(resumed, shelf, held, check=False), scores)
    other = lambda: officer.teach(resumed, shelf, train, 31, checkpoint=tmp_path / "b.safetensors")  # noqa: E731
    assert "b.safetensors" in refused(other)


def test_the_command_writes_an_adapter_that_loads_and_a_card(has_storage, shelf, tmp_path, monkeypatch, capsys):
    base = tmp_path / "base"
    tiny.network("llama", len(tiny.tokenizer()), 4, positions=256).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    monkeypatch.setattr(officer, "load_subject", lambda: load_model(base))
    monkeypatch.setenv("GLASSBOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train-officer", "shelf", "--steps", "20", "--seed", "2"]) == 0
    said, out = capsys.readouterr().out, tmp_path / "build" / "officers" / "shelf"
    card = json.loads((out / officer.CARD).read_text())
    assert [(r["scorer"], r.get("template"), r.get("trained on")) for r in card["quality"]] == [
        ("officer", "plain", True), ("officer", "turned", False),
        ("logistic regression", None, None), ("gradient boosting", None, None),
    ]  # fmt: skip
    assert card["taught by"] == "the merit rule" and card["cases"]["held out"] == 120 and card["seed"] == 2
    assert card["model_hash"] == load_model(base).hash and "logistic regression" in said
    row = card["quality"][0]
    assert row["auc"]["low"] <= row["auc"]["value"] <= row["auc"]["high"] and row["floor"] >= 0
    assert 0 < row["least share"] <= 1
    _, held = officer.divided(shelf, 2)
    p = torch.sigmoid(scoring.scores(load_model(base, adapter=out), shelf, held, check=False)).double().numpy()
    assert officer.auc(p, np.array([truth(shelf, c) for c in held], float)) == pytest.approx(
        row["auc"]["value"], abs=0.02
    )


@pytest.mark.parametrize(
    "command",
    [
        "train-officer", "train-officer ''", "train-officer nosuch", "train-officer shelf --steps 0",
        "train-officer shelf --steps 1e3", "train-officer shelf --seed -1", "train-officer shelf --out shelf/cases.csv",
        "train-officer shelf/cases.csv",
    ],
)  # fmt: skip
def test_a_wrong_command_ends_in_one_paragraph(command, shelf, tmp_path, monkeypatch, capsys):
    import shlex

    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    try:
        code = cli.main(shlex.split(command))
    except SystemExit as end:  # argparse's own
        code = end.code
    assert code == 2 and "Traceback" not in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before
