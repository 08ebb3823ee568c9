"""The tables of notebook 05 say what the studies measured."""

import numpy as np
import pytest

from glassbox_utils.steering import figures, report_study, study
from glassbox_utils.steering.vectors import (
    SteeringError,
)


def test_costs_at_equal_effect_are_interpolated_between_measured_strengths():
    points = [(0.0, np.zeros(2)), (0.4, np.array([1.0, 2.0])), (0.8, np.array([5.0, 2.0]))]
    assert report_study.at_effect(points, 0.2).tolist() == [0.5, 1.0]
    assert report_study.at_effect(points, 0.6).tolist() == pytest.approx([3.0, 2.0])
    assert report_study.at_effect(points, 0.8).tolist() == pytest.approx([5.0, 2.0])
    with pytest.raises(SteeringError, match=r"effect 0\.90.*0\.00, 0\.40, 0\.80"):
        report_study.at_effect(points, 0.9)
    rows = {
        "steer 0": {"text_loss": [2.0, 4.0], "text_tokens": [2, 4]},
        "lora -": {"text_loss": [4.0, 4.0], "text_tokens": [2, 4]},
        "lora +": {"text_loss": [2.0, 6.0], "text_tokens": [2, 4]},
    }
    assert report_study.extra(rows, ("lora -", "lora +"), "text").tolist() == [0.5, 0.25]


def report_of(tones, losses=1.0):
    """A report table with constant tones: condition -> tone, and the loss of a token."""
    rows = [{"condition": name, "tone": [tone] * 5} for name, tone in tones.items()]
    for row in rows:
        moved = losses if row["condition"] != "steer 0" else 1.0
        row |= {"loss": [2 * moved] * 5, "tokens": [2] * 5, "relevance": [0.5] * 5, "answers": ["a b"] * 5}
    return figures.Report({"alpha": 0.1, "prompts": ["w"] * 5, "rows": rows})


def test_the_bar_is_counted_against_the_strongest_random_direction_of_either_sign():
    tones = {"steer -1": -0.4, "steer 0": 0.1, "steer 1": 0.4, "single -1": -0.2, "single 1": 0.2}
    for kind in (*study.KINDS, "single-random"):
        tones |= {f"{kind} {k} {s}": 0.01 * k * -s / 2 for k in range(10) for s in (-1, 1)}
    report = report_of(tones, losses=1.0 + np.log(1.5))
    assert report.steps == ["steer -1", "steer 0", "steer 1"]
    assert report.effect("steer").value == pytest.approx(0.8)
    assert [i.value for i in report.random("shared")] == pytest.approx([-0.01 * k for k in range(10)])
    assert report.perplexity("steer 1") == pytest.approx(1.5) and report.perplexity("steer 0") == 1
    report.rows["steer 1"]["loss"][0] += 1.0
    moved = report.perplexity_ci("steer 1")
    assert moved.value == pytest.approx(1.5 * np.exp(0.1)) and moved.low < moved.value < moved.high and moved.n == 5
    report.rows["steer 1"]["loss"][0] -= 1.0
    table = figures.control_table(report)
    assert table["times the strongest"].tolist() == ["8.9", "8.9", "4.4"]
    assert table["perplexity × − / +"].tolist() == ["1.50 / 1.50"] * 3
    halves = {"steer -0.5": 0.0, "steer 0.5": 0.2}
    halves |= {f"shared {k} {s}": 0.01 * k * s for k in range(10) for s in (-0.5, 0.5)}
    table = figures.control_table(report_of(tones | halves, losses=1.0 + np.log(1.5)))
    assert table["times the strongest"].tolist()[0] == "2.2" and table.index[0] == ("many layers, half turn", "shared")


def test_the_bar_is_counted_at_the_turn_that_stands_out_on_selection_prompts(monkeypatch):
    assert study.standing_out(0.6, [0.1, -0.3]) == pytest.approx(0.6 / 0.05**0.5)
    for turn in (0.5, 1.0):
        monkeypatch.setattr(study, "turn", lambda turn=turn: turn)
        found = report_study.random_conditions()
        assert {found[f"shared 9 {s * turn:g}"] for s in (-1, 1)} == {2}  # on all the prompts
        assert f"apart 0 {turn:g}" in found and f"apart 0 {1.5 - turn:g}" not in found
        assert found["shared 0 1"] == (2 if turn == 1 else 1) and found["single-random 0 -1"] == 2


def test_prices_are_read_at_the_same_effect_and_missing_ones_named():
    tones = {"steer -1": -0.4, "steer -0.5": -0.2, "steer 0": 0.0, "steer 0.5": 0.2, "steer 1": 0.4}
    report = report_of(tones | {"system -": -0.1, "system +": 0.2}, losses=1.0 + np.log(2))
    losses = {"steer 0": 2.0, "steer -0.5": 3.0, "steer 0.5": 3.0, "steer -1": 4.0, "steer 1": 4.0}
    rows = [{"condition": n, "text_loss": [v] * 3, "text_tokens": [2] * 3} for n, v in losses.items()]
    for row in rows:
        row |= {"reply_loss": row["text_loss"], "reply_tokens": row["text_tokens"], "choice": [1.0, 0.0, 1.0]}
    rows.append({"condition": "system -", "reply_loss": [2.5] * 3, "reply_tokens": [2] * 3})
    rows.append(rows[-1] | {"condition": "system +"})
    costs = {"rows": rows}
    found = figures.priced(report, costs, "steering", 0.2)
    assert found["held-out text, nats"].startswith("+0.25 ") and found["answers' perplexity ×"].startswith("1.41 ")
    asked = figures.priced(report, costs, "system prompt", 0.3)
    assert asked["held-out text, nats"] == "no prompt there"
    assert asked["unrelated replies, nats"].startswith("+0.25 ")
    assert figures.more_loss(costs, "steer 1", "text").value == pytest.approx(1.0)
    shown = figures.costs_table(costs)
    assert shown.loc["system prompt −", "held-out text, nats"] == "no prompt there"
    assert shown.loc["steering, full +", "multiple choice, share right"].startswith("+0.00 ")
