"""Decisions of other fields, from their YAML and CSV alone: every command ends in an answer or in one paragraph."""

import json

import numpy as np
import pytest
import tiny
import torch

from glassbox_utils import cli
from glassbox_utils.core import assets, models
from glassbox_utils.core.models import wrap_model
from glassbox_utils.decisions import locate_study, officer, scoring
from glassbox_utils.decisions.locate_study import Size
from glassbox_utils.decisions.reading import load_decision

SCHOOL = """\
title: Admission
answers: [" admit", " refuse"]
templates:
  sheet: "{pupil} ({age}), grade {grade}, {track}. Why: {essay}\\nSchool:"
  note: "{track}, grade {grade}. {pupil} is {age} and says: {essay}\\nSchool:"
  list: "grade {grade} / {essay} / {age} / {pupil} / {track}\\nSchool:"
fields:
  pupil: {kind: text, role: protected}
  age: {kind: number, role: protected, range: [9, 15], bands: [11, 13]}
  grade: {kind: number, role: merit, range: [1, 6], step: 0.1}
  track: {kind: category, role: merit, values: [arts, science, sport]}
  essay: {kind: text, role: other, characters: sentence, max_length: 60}
groups: {family: [north, south, coast]}
carriers:
  - field: pupil
    lists:
      - {groups: {family: north}, values: [Ada, Bo, Kim, Lee]}
      - {groups: {family: south}, values: [Eva, Ito, Max, Zoe]}
      - {groups: {family: coast}, values: [Ina, Jon, Lou, Uri]}
merit:
  threshold: 1.5
  points:
    - {field: grade, at_least: 3.5, points: 1}
    - {field: grade, at_least: 4.5, points: 1}
    - {field: track, equals: science, points: 0.5}
cases: {file: pupils.csv, id: nr}
"""
CLAIM = """\
title: Insurance claim
answers: [" pay", " deny"]
templates:
  file: {text: "Claim {amount} euros, {cover}. {what}. Holder: {sex}.\\nClaim:", split: train}
  call: {text: "{sex} called about {cover}: {what}, {amount} euros.\\nClaim:", split: report}
fields:
  sex: {kind: category, role: protected, values: [woman, man]}
  amount: {kind: number, role: merit, range: [0, 100000], unit: euros}
  cover: {kind: category, role: merit, values: [house, car, "boat, small"]}
  what: {kind: text, role: other, characters: sentence, max_length: 80}
cases:
  file: claims.csv
  delimiter: ";"
  unused: [clerk]
  outcome: {column: paid, favourable: ["1"], unfavourable: ["0"]}
"""
MAIL = """\
title: Mail triage
answers: [" top", " low"]
templates:
  only: "From {sender}, {hour} h: {subject}\\nAnswer it:"
fields:
  sender: {kind: category, role: other, values: [customer, supplier, unknown]}
  hour: {kind: number, role: other, range: [0, 23]}
  subject: {kind: text, role: other, characters: sentence, max_length: 90}
cases: {file: mails.csv}
"""
WORDS = [
    "I like maps",
    "the roof leaks; again!",
    "Hello? (urgent)",
    "déjà vu, naïve Zoë",
    "50% off",
    "it's mine; yours",
]
COMMANDS = ("audit", "locate", pytest.param("mitigate", marks=pytest.mark.long), "explain", "train-officer")


def rows_of(name, rng):
    pick = lambda *items: items[rng.integers(len(items))]  # noqa: E731
    text = WORDS[rng.integers(len(WORDS))]
    if name == "school":
        who = pick("Ada", "Bo", "Kim", "Lee", "Eva", "Ito", "Max", "Zoe", "Ina", "Jon", "Lou", "Uri")
        return [
            f"{who}",
            rng.integers(9, 16),
            round(rng.integers(10, 61) / 10, 1),
            pick("arts", "science"),
            f'"{text}"',
        ]
    if name == "claim":
        return [pick("woman", "man"), rng.integers(0, 90000), pick("house", "car", '"boat, small"'),
                '"' + text.replace("deny", "") + '"', rng.integers(2), "x"]  # fmt: skip
    return [pick("customer", "supplier"), rng.integers(24), f'"{text}"']


@pytest.fixture(scope="module", params=["school", "claim", "mail"])
def unseen(request, tmp_path_factory):
    """A folder of another field, and a random model that answers with its two words only."""
    name, rng = request.param, np.random.default_rng(0)
    yaml, file, head, n, joint = {
        "school": (SCHOOL, "pupils.csv", "nr,pupil,age,grade,track,essay", 200, ","),
        "claim": (CLAIM, "claims.csv", "sex;amount;cover;what;paid;clerk", 200, ";"),
        "mail": (MAIL, "mails.csv", "sender,hour,subject", 20, ","),
    }[name]
    folder = tmp_path_factory.mktemp("unseen") / name
    folder.mkdir()
    (folder / "decision.yaml").write_text(yaml, encoding="utf-8")
    lines = [rows_of(name, rng) for _ in range(n)]
    lines = [[f"p{i}", *row] for i, row in enumerate(lines)] if name == "school" else lines
    (folder / file).write_text(
        "\n".join([head, *(joint.join(map(str, row)) for row in lines)]) + "\n", encoding="utf-8"
    )
    decision = load_decision(folder)

    def model(*_, **__):
        hf = tiny.network("llama", len(tiny.tokenizer()), positions=256)
        found = wrap_model(hf, tiny.tokenizer(), "random")
        keep = list(scoring.answer_tokens(found, decision, scoring.prompts(found, decision, decision.cases[:1])[0]))
        head = torch.nn.Linear(hf.config.hidden_size, hf.config.vocab_size)
        with torch.no_grad():
            head.weight.copy_(hf.lm_head.weight.cpu() * 0.3)
            head.bias.fill_(-1e4)
            head.bias[keep] = 0.0
        hf.lm_head = head.to(found.device)
        return found

    return folder, decision, model


@pytest.mark.parametrize("command", COMMANDS)
def test_no_step_stops_with_a_traceback(has_storage, unseen, command, tmp_path, monkeypatch, capsys):
    folder, decision, model = unseen
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLASSBOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(models, "load_model", model)
    monkeypatch.setattr(officer, "load_subject", model)
    monkeypatch.setattr(locate_study, "COMMAND", Size(6, 6, 3, 6, 3, 4, 1, 2, 1, 1, (1, 3), (3,)))
    monkeypatch.setattr(locate_study, "CHOOSE_TEXTS", 2)
    monkeypatch.setattr(locate_study, "skills", lambda *_: [[3.0, 2.0], [2, 1], [1.0, 0.0]])
    case = decision.cases[3].id
    words = {
        "audit": ["--decision", str(folder), "--n", "16", "--out", "out.json"],
        "explain": ["--decision", str(folder), case, "--out", "out.html"],
        "train-officer": [str(folder), "--steps", "2", "--out", "adapter"],
    }.get(command, ["--decision", str(folder), "--model", "tiny", "--out", "out.json"])
    code = cli.main([command, *words])
    said = capsys.readouterr()
    assert code in (0, 2) and "Traceback" not in said.err and "not foreseen" not in said.err, said.err
    if code == 2:  # says what is missing, and how to mend it
        assert "\n" not in said.err.strip() and said.err.startswith("glassbox: ") and len(said.err) > 60
    assert (code == 0) == ((folder.name, command) not in REFUSED), said.err + said.out
    if code == 0 and command in ("locate", "mitigate", "audit"):
        told = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
        assert told and said.out.strip()
    if code == 0 and command == "mitigate":
        page = ["--decision", str(folder), case, "--mitigation", "out.json", "--out", "page.html"]
        assert cli.main(["explain", *page]) == 0 and "points" in (tmp_path / "page.html").read_text(encoding="utf-8")


REFUSED = {
    ("claim", "locate"): "this tokenizer has no two values of equally many tokens",
    ("claim", "mitigate"): "the same",
    ("mail", "locate"): "nothing is protected",
    ("mail", "mitigate"): "nothing is protected",
    ("mail", "train-officer"): "nobody says what is right",
}
"""what can't be done with a folder that does not say enough"""
