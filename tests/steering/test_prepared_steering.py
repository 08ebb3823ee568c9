"""Every study of the room on tiny random models of other shapes, and how strengths find a model's own size."""

import hashlib
import json

import pytest
import tiny
import torch
from worded import build, direction

from glassbox_utils.core import models, prepared, studies
from glassbox_utils.steering import figures, prompt_figures, report_study, selection, study, style
from glassbox_utils.steering.vectors import load_vector, save_direction

SIZE = 0.02
TEXTS = [f"w{i} w{i + 1} w{i + 2} w{i + 3}" for i in range(1, 9)]


def prepared_folder(kind, place):
    """A tiny model's folder and an empty prepared one beside it, of the smallest size."""
    words = tiny.tokenizer()
    tiny.network(kind, len(words), 4, positions=512).save_pretrained(place / "model")
    words.save_pretrained(place / "model")
    model = models.load_model(place / "model")
    prepared.write_card(prepared.Card(str(place / "model"), model.hash, "mine", size=SIZE), place / "made")
    return place / "made"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_study_runs_on_another_model_and_its_tables_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(
        studies, "_chunks", lambda name, key: tmp_path / hashlib.sha256(f"{name}{key}".encode()).hexdigest()
    )
    monkeypatch.setattr(style, "RATED", {"tweets": style.RATED["tweets"]})  # a quarter of the ruler's sentences
    for module in (study, figures):
        monkeypatch.setattr(module, "N_RANDOM", 3)
    with prepared.using(prepared_folder("gpt2", tmp_path)) as made:
        model = prepared.load_subject()
        for name, run in report_study.STUDIES_OF_STEERING.items():
            table = json.loads(run().read_text())
            assert table["provenance"]["model_hash"] == model.hash and table["provenance"]["size"] == SIZE, name
        found = sorted(p.stem for p in (made / "vectors").glob("*.json"))
        assert found == ["formality", "gender", "honesty", "refusal", "tone", "tone-sharper", "tone-single"]
        assert {json.loads((made / "vectors" / f"{n}.json").read_text())["licence"] for n in found} == {"mine"}
        dial = study.dial(model)
        assert dial.prepared and dial.kl <= study.KL_BUDGET and dial.vector.layers[-1] < model.n_layers
        directions, strength = study.attributes(model)
        assert list(directions) == list(study.ATTRIBUTES) and strength > 0
        there = [name for name in report_study.TABLES if studies.has_table(f"steering_{name}")]
        assert not {"alone", "order", "controls", "plain"} & set(there)  # test_order's, test_layers'
        draw({name: studies.read_table(f"steering_{name}") for name in there})


def draw(tables):
    """Everything that notebook 05 draws from the tables."""
    figures.heat_maps(tables["sweep"], "layer", tables["sweep"]["selected"])
    figures.heat_maps(tables["layers"], "recipe", tables["layers"]["selected"])
    report = figures.Report(tables["tone"])
    for show in (figures.dial_figure, figures.control_table, figures.methods_table, figures.frontier_figure):
        show(report)
    figures.rulers_table(report, tables["layers"]["turn"])
    prompt_figures.prompts_figure(report)
    prompt_figures.shares_table(report)
    assert len(prompt_figures.random_answers(report, 4, 0).splitlines()) == 16
    figures.words_table(figures.telling_words(report))
    figures.seeds_table(tables["seeds"])
    figures.costs_table(tables["costs"])
    table = figures.equal_effect_table(report, tables["costs"])
    assert ("as far as system prompt", "steering") in table.index


def test_strengths_are_halved_where_they_cost_too_much_and_doubled_where_they_cost_nothing():
    model = build("llama")
    vector, grid, kl = direction(model), [0.5, 1.0], 0.05
    plain = selection.costs(model, vector, [0.5], TEXTS)[0]
    assert plain > kl
    found = selection.fitting_strengths(model, vector, grid, TEXTS, kl)
    assert found[1] == 2 * found[0] and selection.costs(model, vector, found[:1], TEXTS)[0] <= kl
    assert selection.costs(model, vector, [2 * found[0]], TEXTS)[0] > kl  # not smaller than it must be
    small = selection.fitting_strengths(model, vector, [a / 64 for a in grid], TEXTS, kl)
    assert small[0] > grid[0] / 64 and selection.costs(model, vector, small[1:], TEXTS)[0] >= 0.1 * kl
    assert selection.fitting_strengths(model, vector, found, TEXTS, kl) == found


def test_weaker_strengths_are_swept_while_all_cost_too_much():
    plain = {"alpha": 0.0, "kl": 0.0, "perplexity": 2.0, "effect": 0.0}

    def measured(divisor):
        return [plain, {"alpha": 1 / divisor, "kl": 4 / divisor, "perplexity": 2.0, "effect": 1 / divisor}]

    rows, best = study.searched(measured)
    assert best["alpha"] == 1 / 16 and len(rows) == 6


def test_a_model_without_a_prepared_folder_gets_a_dial_of_its_own_strength(tmp_path):
    tiny.save("llama", tmp_path / "model")
    model = models.load_model(tmp_path / "model")
    with prepared.using(tmp_path / "none"):
        dial = study.dial(model)
        assert not dial.prepared and dial.kl <= study.KL_BUDGET and "word salad" not in str(dial)
    salad = study.Dial(dial.vector, dial.alpha, 8.5, False)
    assert "8.50 nats" in str(salad) and "word salad" in str(salad)


def test_the_licence_of_a_vector_is_that_of_the_weights_it_was_made_from(tmp_path):
    vector = direction(build("llama"))
    for licence, weights in (("gemma", vector.model_hash), ("that of the model it was made from", "another")):
        prepared.write_card(prepared.Card("somewhere", weights, "gemma"), tmp_path)
        with prepared.using(tmp_path):
            card = save_direction(vector, tmp_path / "vectors" / "calm")
            assert json.loads(card.read_text())["licence"] == licence
            assert torch.equal(load_vector("calm").vector, vector.vector)


def test_titles_say_what_the_numbers_say():
    rising, falling = [-0.4, 0.0, 0.4], [0.1, 0.0, 0.4]
    assert "; none of 2 random directions moves it a fifth as far" in figures.dial_title(rising, 1.0, [0.1, 0.19])
    assert "; 2 of 3 random directions move it a fifth as far" in figures.dial_title(rising, 1.0, [0.3, 0.4, 0.1])
    assert figures.dial_title(falling, 1.0, []) == "The tone does not go step by step with the dial"
