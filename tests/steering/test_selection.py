"""The strongest setting within the budgets is chosen, against random directions."""

from worded import PROMPTS, direction

from glassbox_utils.steering import study
from glassbox_utils.steering.selection import select, sweep

ROWS = [
    {"alpha": 0, "kl": 0.0, "perplexity": 2.0, "effect": 0.0},
    {"alpha": 1, "kl": 0.5, "perplexity": 3.0, "effect": 0.4},
    {"alpha": 2, "kl": 0.9, "perplexity": 3.5, "effect": 0.6},
    {"alpha": 3, "kl": 0.9, "perplexity": 9.0, "effect": 0.9},
]


def test_the_selected_setting_is_the_strongest_within_both_budgets():
    assert select(ROWS, 1.0, 2.0)["alpha"] == 2
    assert select(ROWS, 0.6, 9.0)["alpha"] == 1
    assert select(ROWS, 1.0, 9.0)["alpha"] == 3


def test_sweep_starts_from_the_unsteered_model(llama):
    rows = sweep(llama, direction(llama), [0.5, 1.5], PROMPTS, PROMPTS, max_new_tokens=4)
    assert [row["alpha"] for row in rows] == [0, 0.5, 1.5]
    assert rows[0]["kl"] == rows[0]["effect"] == 0 < rows[1]["kl"] < rows[2]["kl"]
    assert rows[0]["perplexity"] < rows[2]["perplexity"]


def test_the_layer_is_chosen_against_random_directions_and_the_strength_within_budgets():
    rows = [
        {"layer": layer, "alpha": alpha, "effect": effect, "kl": kl, "perplexity": 2.0}
        for layer, effects, kl in ((3, (0, 0.5, 0.9), 0.1), (5, (0, 0.4, 0.8), 0.1), (7, (0, 0.9, 2.0), 9.0))
        for alpha, effect in zip((0, 1, 2), effects, strict=True)
    ]
    control = {3: [0.3, -0.3], 5: [0.1, -0.1], 7: [0.1, 0.1]}
    best = study.choose(rows, control)  # 7 is over budget; 3 has the larger effect, 5 the larger ratio
    assert (best["layer"], best["alpha"]) == (5, 2)
