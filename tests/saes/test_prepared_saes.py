"""Every study of this room on a tiny random model, prepared in a folder of its own at a very small size."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import yaml

from glassbox_utils.core import assets, prepared
from glassbox_utils.core.models import load_model
from glassbox_utils.core.studies import read_table
from glassbox_utils.saes import (
    clamping_choice_study,
    clamping_report_study,
    clamping_study,
    meaning_study,
    recipes,
    study,
)
from glassbox_utils.saes.config import SaeError
from glassbox_utils.saes.store import load_sae
from glassbox_utils.saes.training import train_from_config, work_folder


def prepare(kind, folder, roles=prepared.ROLES):
    """A tiny model, its card and SAEs, as ``glassbox prepare`` lays them out."""
    source, words = folder / "model", tiny.tokenizer()
    tiny.network(kind, len(words), positions=512).save_pretrained(source)  # its tokens are short, so chats are long
    words.save_pretrained(source)
    model, saes = load_model(source), {}
    for role in roles:
        config = recipes.recipe(model, role, 4096, 128, source=str(source), corpus="wiki")
        saes[role] = config.name
        place = folder / "prepared" / "saes" / config.name
        place.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(config).items() if k != "growth"}
        (place / "config.yaml").write_text(yaml.safe_dump(settings))
    prepared.write_card(prepared.Card(str(source), model.hash, "none at all", saes, 0.01), folder / "prepared")
    with prepared.using(folder / "prepared"):
        for role, name in saes.items():
            train_from_config(prepared.path("saes", name), evaluate=role == "main")
    return model, folder / "prepared"


def own_cache(folder, monkeypatch):
    """An empty cache but for the packages that are there."""
    folder.mkdir()
    for path in assets.cache_dir().glob("*"):
        if path.name not in ("studies", "training", "activations"):
            (folder / path.name).symlink_to(path)
    monkeypatch.setenv("GLASSBOX_CACHE", str(folder))


@pytest.fixture
def small_words(monkeypatch):
    """Fewer tokens and settings: what costs time, not what decides whether a study runs."""
    monkeypatch.setattr(clamping_study, "NEW_TOKENS", 6)
    monkeypatch.setattr(clamping_study, "LEARN_STEPS", 4)
    monkeypatch.setattr(clamping_choice_study, "learn_steps", lambda: 4)
    monkeypatch.setattr(clamping_report_study, "SWEEP", (0.5, 1.0))
    monkeypatch.setattr(study, "STEPS", 60)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "roles"), [("gpt2", prepared.ROLES), ("llama", ("main",))])
def test_every_study_runs_on_another_model(kind, roles, tmp_path, monkeypatch, small_words):
    own_cache(tmp_path / "cache", monkeypatch)
    model, folder = prepare(kind, tmp_path, roles)
    with prepared.using(folder):
        if kind == "gpt2":
            study.study_saes()
            table = read_table("saes")
            assert set(table["letters"]) == {prepared.sae("main")} or table["no_letters"]
            assert set(table["shuffled"]) == {"released", "shuffled"}
        for run in (clamping_report_study.STUDIES_OF_CLAMPING).values():
            run()
        choice, report = read_table("clamp_choose"), read_table("clamp_report")
        assert choice["provenance"]["model_hash"] == model.hash
        layer = clamping_study.stream_layer(clamping_study.held_sae(model))
        assert clamping_study.vector_file(layer).with_suffix(".json").exists()
        sizes = {len(r["answers"]) for r in report["rows"]}
        assert sizes <= set(clamping_report_study.report_sizes()) and max(sizes) == len(report["prompts"])
        plain = report["rows"][0]
        for row in report["rows"]:
            assert clamping_report_study.measures(row, plain)["mentions"].n == len(row["answers"])
        tools, selected = clamping_study.chosen(model)
        assert clamping_study.demonstrated(selected) in tools.found
        card = json.loads(prepared.path("saes", prepared.sae("main"), "card.json").read_text())
        assert card["licence"] == "none at all" and str(tmp_path) not in json.dumps(card)
        meta = load_sae(prepared.sae("main"), model).cfg.metadata
        assert meta.model_name == "model"


def test_without_any_sae_the_studies_say_what_makes_one(tmp_path):
    source = tiny.save("llama", tmp_path / "model")
    prepared.write_card(prepared.Card(str(source), load_model(source).hash), tmp_path / "prepared")
    with prepared.using(tmp_path / "prepared"):
        for run in (study.study_saes, clamping_choice_study.study_choose):
            with pytest.raises(prepared.PreparedError, match=r"has no main SAE.*glassbox prepare"):
                run()


def test_the_search_goes_beyond_a_grid_that_does_not_fit():
    row = lambda strength, perplexity, mention: {  # noqa: E731
        "strength": strength, "perplexity": perplexity, "distinct": 1.0, "mention": mention,
    }  # fmt: skip
    grid = (0.5, 1.0)
    assert clamping_choice_study.further([row(0.5, 9, 0.5), row(1.0, 20, 1.0)], grid) == 0.35
    assert clamping_choice_study.further([row(0.5, 1, 0), row(1.0, 2, 0)], grid) == 1.4
    assert clamping_choice_study.further([row(0.5, 1, 0), row(1.0, 2, 0.1)], grid) is None
    assert clamping_choice_study.further([row(0.5, 1, 0), row(1.0, 9, 0)], grid) is None
    assert clamping_choice_study.further([row(s, 9, 0) for s in (0.5, 1, 0.35, 0.2, 0.1)], grid) is None


def test_a_recipe_fits_models_of_any_depth(tmp_path):
    for layers, main, late in ((1, 0, 0), (2, 0, 0), (3, 0, 1), (6, 2, 3), (12, 5, 7), (30, 14, 19)):
        model = SimpleNamespace(n_layers=layers)
        assert [recipes.layer_of(model, role) for role in prepared.ROLES] == [main, late]
    with pytest.raises(SaeError, match=r"There is no role 'early'\. Allowed: main, late"):
        recipes.layer_of(model, "early")
    config = recipes.recipe(load_model(tiny.save("gpt2", tmp_path)), "main", 2000, 32)
    assert (config.context, config.n_shards, config.options) == (128, 1, {"k": 2})
    assert config.batch <= config.samples


def test_runs_of_one_name_on_two_models_do_not_meet(tmp_path):
    one, two = (load_model(tiny.save(kind, tmp_path / kind)) for kind in ("gpt2", "llama"))
    config = recipes.recipe(one, "main", 4096, 64)
    assert work_folder(config, one) != work_folder(config, two)
    assert work_folder(replace(config, samples=2 * config.samples), one) == work_folder(config, one)
    assert work_folder(replace(config, tokens=8192), one) != work_folder(config, one)


@pytest.mark.long
def test_the_studies_of_meaning_run_on_another_model_and_go_on_where_they_were(tmp_path, monkeypatch):
    own_cache(tmp_path / "cache", monkeypatch)
    monkeypatch.setattr(meaning_study, "STEPS", 60)
    monkeypatch.setattr(meaning_study, "BATCH", 256)
    model, folder = prepare("llama", tmp_path, ("main",))
    with prepared.using(folder):
        for run in meaning_study.STUDIES_OF_MEANING.values():
            run()
        table, compared = read_table("sae_meaning"), read_table("sae_architectures")
        monkeypatch.setattr(meaning_study, "one_seed", None)
        monkeypatch.setattr(meaning_study, "more_of_seed", None)
        monkeypatch.setattr(meaning_study, "one_architecture", None)
        for run in meaning_study.STUDIES_OF_MEANING.values():
            run()  # every part is there
        assert read_table("sae_meaning")["units"] == table["units"]
    kinds = {"main", "trained", "frozen", "coordinates", "pca", "random", "random_sae", "pca_any", "neurons"}
    assert set(table["units"]) == kinds and all(len(seeds) == 2 for seeds in table["units"].values())
    assert {row["kind"] for row in table["summary"]} == kinds
    assert [row["ahead"] is None for row in table["summary"] if row["kind"] == "main"] == [True] * len(
        meaning_study.meaning.SCORES
    )
    assert {(row["architecture"], row["seed"]) for row in compared["rows"]} == {
        (a, s) for a in meaning_study.ARCHITECTURES for s in (0, 1)
    }
    assert table["provenance"]["model_hash"] == model.hash
