"""Prompt by prompt: orders, the rule of the demonstration, shares, and the picture that shows every prompt."""

import numpy as np
import pytest

from glassbox_utils.core import studies
from glassbox_utils.core.figures import alt_text
from glassbox_utils.core.statistics import Interval, exact_ci
from glassbox_utils.steering import prompt_figures, style
from glassbox_utils.steering.figures import Report


def report():
    """Three prompts: in order by both rulers, by the lexicon alone, and by neither."""
    lexicon = {"steer -1": [-0.5, -0.2, 0.3], "steer 0": [0.0, 0.1, 0.3], "steer 1": [0.5, 0.4, 0.2]}
    second = {"steer -1": [-1.0, 0.2, 0.3], "steer 0": [0.0, 0.1, 0.2], "steer 1": [1.5, 0.4, 0.2]}
    said = {"steer -1": "A disaster.", "steer 0": "A day.", "steer 1": "A good  day."}
    rows = [
        {"condition": k, "tone": lexicon[k], "second": second[k], "answers": [said[k], "Dull.", said["steer 0"]]}
        for k in lexicon
    ]
    return Report({"alpha": 0.1, "prompts": ["a", "b", "c"], "rows": rows})


def test_a_prompt_is_in_order_only_if_every_step_goes_up():
    tones = np.array([[0.0, 0.0, 0.2, -1.0], [0.1, 0.0, 0.1, 0.0], [0.2, 0.1, 0.3, 0.1]])
    assert prompt_figures.in_order(tones).tolist() == [True, False, False, True]


def test_the_demonstration_is_the_first_that_the_rule_accepts_and_never_a_better_one():
    lexicon = np.array([[0.2, -0.1, -0.3, -0.9], [0.3, 0.02, 0.0, 0.0], [0.1, 0.04, 0.4, 0.9]])
    second = np.array([[0.0, 0.0, -1.0, -3.0], [1.0, 1.0, 0.0, 0.0], [2.0, 2.0, 1.0, 3.0]])
    assert prompt_figures.demonstration(lexicon, second) == 2  # 1 is in order, but not positive at plus; 3 comes later
    assert prompt_figures.demonstration(lexicon[:, :2], second[:, :2]) == 1
    assert prompt_figures.demonstration(lexicon[:, :1], second[:, :1]) == 0  # nothing in order: the first is shown


def test_shares_have_wilson_intervals_by_each_ruler_and_by_both():
    table = prompt_figures.shares_table(report())
    expected = exact_ci(2, 3, method="wilson")
    assert table.loc["minus < zero < plus", "lexicon"] == f"0.67 ({expected.low:.2f} to {expected.high:.2f})"
    assert table.loc["minus < zero < plus", "second ruler"].startswith("0.33")
    assert table.loc["minus < zero < plus", "both"].startswith("0.33")
    assert table.loc["a catastrophe at full minus", "lexicon"].startswith("0.33")
    assert table.loc["a catastrophe unsteered", "lexicon"].startswith("0.00")
    assert table.loc["still above -0.3 at full minus", "lexicon"].startswith("0.67")


def test_the_picture_shows_every_prompt_and_says_how_many_are_in_order():
    figure = prompt_figures.prompts_figure(report())
    assert "lexicon: 66.7% of 3 prompts in order" in alt_text(figure) and "second ruler: 33.3%" in alt_text(figure)
    assert all(len(dots.get_offsets()) == 3 for axis in figure.axes for dots in axis.collections[1:])


def test_random_answers_show_all_three_turns_of_each_prompt_in_one_line_each():
    shown = prompt_figures.random_answers(report(), 2, 0).splitlines()
    assert len(shown) == 8 and shown[1].startswith("  − ") and shown[3].startswith("  + ")
    assert prompt_figures.random_answers(report(), 2, 0) == "\n".join(shown)


def test_the_ladder_says_what_the_tables_of_the_embedded_model_say():
    tables = {name: studies.read_table(f"steering_{name}") for name in ("tone", "layers", "costs")}
    fit = Interval(0.96, 0.94, 0.97, 65), Interval(0.71, 0.63, 0.81, 200)
    found = prompt_figures.findings(tables, *fit, 65)
    assert [f.verdict for f in found] == ["held", "held", "held", "null"]
    assert [f.verdict for f in prompt_figures.findings({}, *fit, 65)] == ["held"]
    told = Report(tables["tone"])
    assert all(prompt_figures.bar(told, tables["layers"]["turn"]).values())
    assert found[1].effect == pytest.approx(np.diff([np.mean(told.rows[f"steer {s}"]["tone"]) for s in (-1, 1)])[0])


def test_a_catastrophe_is_a_whole_word_of_the_list():
    texts = ["A disaster!", "Disastrously dull.", "They DIED.", "A diet.", ""]
    assert style.catastrophes(texts).tolist() == [True, False, True, False, False]
    assert all(word == word.lower() and word.isalpha() for word in style.CATASTROPHES)
