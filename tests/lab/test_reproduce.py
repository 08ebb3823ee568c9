"""What is stated is read from the files, and a number that is not computed again, or differs, is seen."""

import json

import pytest

from glassbox_utils import cli
from glassbox_utils.lab import reproduce
from glassbox_utils.lab.reproduce import Number, ReproduceError, Row, Source

FINDING = {
    "claim": "a|b", "effect": 0.53, "ci": [0.5, 0.55], "control": {"value": -1.0}, "source": "study clamp-choose",
}  # fmt: skip


def test_a_finding_states_four_numbers_and_the_study_it_was_read_from():
    numbers = reproduce.numbers_of([FINDING, {"claim": "c", "effect": None, "ci": None, "control": None}], "nb")
    assert {n.what: n.stated for n in numbers} == {
        "a|b: effect": 0.53, "a|b: control": -1.0, "a|b: low": 0.5, "a|b: high": 0.55,
    }  # fmt: skip
    assert {n.read_from for n in numbers} == {"clamp-choose"}


@pytest.mark.parametrize(
    ("number", "now", "inside"),
    [
        (Number("w", "x", 1.0, 0.01), 1.009, True),
        (Number("w", "x", 1.0, 0.01), 1.02, False),
        (Number("w", "x", 1.0, 0.01), None, False),
        (Number("w", "x", 1.0, 0.01), float("nan"), False),
        (Number("w", "s", 100.0, 3.0, machine=True), 290.0, True),
        (Number("w", "s", 100.0, 3.0, machine=True), 20.0, False),
    ],
)
def test_inside_or_outside(number, now, inside):
    row = Row(number, now, 1.0)
    assert row.inside is inside
    assert ("OUTSIDE" in reproduce.as_text([row])) is not inside


def test_the_sources_state_what_the_files_state():
    known = {s.name: s for s in reproduce.sources()}
    assert {"readme", "notebook:01", "sae:own-8192-l14"} <= set(known)
    facts = {n.what: n.stated for n in known["readme"].numbers}
    assert facts["heads of the embedded model"] == facts["layers of the embedded model"] * facts["heads of a layer"]
    card = {n.what: n for n in known["sae:own-8192-l14"].numbers}
    assert card["sae: explained_variance"].tolerance == 0.01
    for source in known.values():
        assert source.numbers, f"{source.name} states nothing"
        assert len({n.what for n in source.numbers}) == len(source.numbers), f"{source.name}: two of one name"


def test_the_readmes_times_are_read():
    text = "| [01](notebooks/x.ipynb) | Why? | 119 s | 1.4 GiB |\n| [02](y) | a | b |\n"
    assert reproduce.readme_times(text) == {"01": (119.0, 1.4)}
    assert reproduce.uncovered("In 2024, 3 of 7 `9`\n```\n11\n```", []) == 3


def test_the_readmes_facts_hold(tmp_path, capsys):
    """The command on what it can compute in seconds: the reduced size that every test run does."""
    assert cli.main(["reproduce", "readme", "--out", str(tmp_path)]) == 0
    assert "| heads of the embedded model | 270 | 270 | ± 0 |" in capsys.readouterr().out


def fakes(n=12):
    return [Source(f"s{i}", (Number("w", f"x{i}", float(i), 0.1),), lambda i=i: {f"x{i}": float(i)}) for i in range(n)]


def test_a_tenth_is_random_seeded_and_large_enough():
    known = fakes(40)
    first = reproduce.a_tenth(known, 0)
    assert len(first) == 4 and first == reproduce.a_tenth(known, 0)
    assert len({tuple(s.name for s in reproduce.a_tenth(known, seed)) for seed in range(5)}) > 1


def test_a_run_that_was_stopped_goes_on_and_a_changed_statement_is_computed_anew(tmp_path):
    source, path = fakes(1)[0], tmp_path / "rows.json"
    rows = reproduce.compute(source)
    reproduce.keep(path, source, rows)
    assert reproduce.kept(path, source) == rows
    changed = Source("s0", (Number("w", "x0", 5.0, 0.1),), source.compute)
    assert reproduce.kept(path, changed) is None and not reproduce.compute(changed)[0].inside
    path.write_text("no json")
    assert reproduce.kept(path, source) is None


def test_a_wrong_name_lists_what_there_is():
    with pytest.raises(ReproduceError, match=r"no source 'sea:x'.*s0, s1"):
        reproduce.named(fakes(2), ["sea:x"])


@pytest.mark.parametrize(("change", "code"), [(0.0, 0), (1.0, 1)])
def test_the_command_ends_with_1_if_a_number_is_outside(tmp_path, monkeypatch, capsys, change, code):
    wrong = Source(
        "s0", (Number("w", "x", 1.0, 0.1), Number("w", "s", 1.0, 2.0, True)), lambda: {"x": 1 + change, "s": 9}
    )
    monkeypatch.setattr(reproduce, "sources", lambda officer: [wrong])
    assert cli.main(["reproduce", "--out", str(tmp_path)]) == code
    assert "1 outside" in capsys.readouterr().out or code
    assert json.loads((tmp_path / "rows.json").read_text())["s0"][0]["recomputed"] == 1 + change
    assert "| w | x | 1 |" in (tmp_path / "reproduced.md").read_text()


def test_a_source_that_cant_be_computed_here_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def refuse():
        raise ReproduceError("There is no text. `glassbox write-text` writes it.")

    first = Source("s0", (Number("w", "x", 1.0, 0.1),), refuse)
    second = Source("s1", (Number("w", "y", 2.0, 0.1),), lambda: {"y": 2.0})
    monkeypatch.setattr(reproduce, "sources", lambda officer: [first, second])
    assert cli.main(["reproduce", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "s0 can't be computed here: There is no text." in said.err and "2 numbers, 1 outside" in said.out
    assert list(json.loads((tmp_path / "rows.json").read_text())) == ["s1"]  # the other is tried again with --go-on
