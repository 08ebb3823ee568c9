"""The loan studies' selection rule, and what is shipped under data/loans."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from glassbox_utils.core.studies import StudyError, read_table
from glassbox_utils.decisions import figures, loans, study


def row(name, index, gap, merit):
    values = {"edit": name, "index": index}
    for attribute in study.ATTRIBUTES:
        values |= {f"{attribute} logits": gap, f"{attribute} merit": merit}
    return values


def test_the_smallest_gap_wins_unless_it_costs_merit():
    none, deaf, good, weak = (
        row("none", -1, 2, 0.9),
        row("deaf", 0, 0.0, 0.6),
        row("good", 1, -0.2, 0.9),
        row("weak", 2, 1, 1),
    )
    assert study.choose([none, deaf, good, weak])["edit"] == "good"
    assert study.choose([none, deaf])["edit"] == "deaf"


def test_pairs_of_a_split_use_its_layouts_and_differ_in_one_field():
    worse, better, merit = study.pair_texts(10, "report", "gender")
    assert len(worse) == len(better) == len(merit) == 10 and all(a != b for a, b in zip(worse, better, strict=True))
    assert any(";" in t for t in worse)


def test_the_edit_is_fitted_on_texts_of_the_train_split_only():
    worse, better = study.fit_texts(8, "gender")
    assert len(worse) == len(better) == 8 and not any(";" in t for t in worse)
    reserved = {n for g in loans.GENDERS for o in loans.ORIGINS for s in loans.SPLITS[1:] for n in loans.names(g, o, s)}
    assert not any(name in text.replace(",", " ").split() for name in reserved for text in worse + better)


def test_held_out_applications_are_of_the_report_split():
    for kind, layouts in study.HELD_OUT.items():
        texts, labels = study.held_out(kind, 10)
        assert len(texts) == len(labels) == 10 and len({t[:3] for t in texts}) > 1 and layouts
        assert any(place in texts[0] for place in loans.vocabulary()["places"]["report"])


def test_agreement_counts_both_members():
    found = study.agreement(np.array([-1.0, 1]), np.array([1.0, 1]), ([False, True], [False, True]))
    assert found.value == 0.75


def test_what_is_shipped_is_small_and_tells_nothing():
    shipped = loans.loan_models()
    if not shipped:
        pytest.skip("no adapter is shipped yet")
    assert shipped[0] == "deployed"
    for name in shipped:
        folder = loans.officers() / name
        assert sum(p.stat().st_size for p in folder.iterdir()) < 10_000_000
        config = (folder / "adapter_config.json").read_text()
        assert not any(f'"{bias}"' in config for bias in loans.BIASES if bias != "none")  # peft has a bias of its own
    configs = {(loans.officers() / name / "adapter_config.json").read_text() for name in shipped}
    assert len(configs) == 1, "the adapters' metadata tell the models apart"
    assert set(shipped) <= set(json.loads((loans.officers() / "key.json").read_text())["models"])


@pytest.mark.parametrize("name", ["loans_mitigation", "loans_cause", "loans_audit", "loans_rest"])
def test_the_tables_say_where_they_come_from(name):
    try:
        table = read_table(name)
    except FileNotFoundError:
        pytest.skip("not computed yet")
    assert table["provenance"]["command"] == f"glassbox study {name.replace('_', '-')}"


# --- what the notebook shows of them ------------------------------------------------------------------


def test_a_table_of_another_officer_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("GLASSBOX_PREPARED", str(tmp_path))
    model = SimpleNamespace(name="officer", hash="0123456789abcdef")
    with pytest.raises(StudyError, match="glassbox study loans-rest"):
        figures.table_of("loans_rest", model)
    (tmp_path / "studies").mkdir()
    table = {"provenance": {"model_hash": "f" * 16}}
    (tmp_path / "studies" / "loans_rest.json").write_text(json.dumps(table))
    with pytest.raises(StudyError, match=r"not made with officer.*glassbox study loans-rest"):
        figures.table_of("loans_rest", model)


def test_where_no_edit_closes_the_gaps_the_best_is_taken_and_marked():
    none, weak = row("none", -1, 2, 0.9), row("weak", 0, 1, 1)
    table = {"selection": [none, weak], "chosen": study.choose([none, weak])}
    assert table["chosen"] is weak and figures.verdict_on_edit(table).startswith("NO edit")
    unbiased = row("none", -1, 0.0, 0.9)
    assert study.choose([unbiased, weak, row("still", 1, 0.0, 0.9)])["edit"] == "still"


def test_the_case_is_one_that_flips_or_else_the_widest_pair():
    assert figures.chosen_case(np.array([1.0, -1.0]), np.array([3.0, 1.0])) == (1, True)
    assert figures.chosen_case(np.array([1.0, 1.0]), np.array([3.0, 1.5])) == (0, False)


def test_the_confusion_table_counts_models():
    found = figures.confusion({"a": None, "b": "age", "c": "age"}, {"a": "none", "b": "age", "c": "district"})
    assert found.loc["planted none", "found none"] == found.loc["planted age", "found age"] == 1
    assert found.loc["planted district", "found age"] == 1 and found.to_numpy().sum() == 3


def tables():
    """Made-up tables: a gap of 2 logits, which the edit closes."""
    rng = np.random.default_rng(0)
    arms = ["none", "edit", "projected out", "steered against", "gender alone", "random 0", "random 1", "random 2"]
    logits = {}
    for attribute, (n, _) in study.REPORTED.items():
        x, gap = rng.normal(size=n), 2.0 * (attribute == "gender")
        logits[attribute] = {a: [(x - gap * (a != "edit")).tolist(), x.tolist()] for a in arms}
    held = {kind: (np.array(study.held_out(kind)[1]) * 2.0 - 1).tolist() for kind in study.HELD_OUT}
    losses = {which: [[30.0, 40.0 + (which == "no gate")], [10, 10]] for which in figures.COST_OF.values()}
    rest = {"losses": losses, "choices": {key: [1.0, 0.0, 1.0] for key in losses}}
    rest["logits"] = {"name removed": [logits["gender"]["edit"][0][:100]] * 2}
    return {"held_out": held, "logits": logits}, rest


def test_the_notebooks_tables_show_what_the_studies_hold():
    table, rest = tables()
    assert all(x.value == 1 for x in figures.held_out_table(table)["agrees with its history"])
    assert figures.held_out(table, "unseen layouts").value == 1
    ends = {"n": 3, "lowest": -0.2, "highest": 0.4, "opened": 0.0}
    table["gate"] = {name: ends for name in ("text", "decisions", "held-out text", "report decisions")}
    assert (figures.gate_table(table)["let through"] == "0.00%").all()
    gaps = figures.gap_table(table).set_index("identical but for")["gap, logits"]
    assert gaps["gender"].value == pytest.approx(2) and gaps["age"].value == 0
    shown = figures.before_after(table, rest).set_index("condition")
    assert shown.loc["none", "logits"].startswith("2.00") and shown.loc["edit", "logits"].startswith("0.00")
    assert shown.loc["edit", "perplexity, times"].startswith("1.00")
    assert shown.loc["edit without its gate", "perplexity, times"].startswith("1.05")
    assert shown.loc["random 0", "perplexity, times"] == ""  # not measured, not guessed
    assert figures.others_table(table)["logit gap changes by"][0].value == 0
