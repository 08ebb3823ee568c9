"""Prepared folders: whose they are, which one is used, and what is refused."""

import json

import pytest
import tiny

from glassbox_utils.core import assets, prepared, studies
from glassbox_utils.core.models import load_model
from glassbox_utils.core.prepared import Card, PreparedError


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv(prepared.PLACE, str(tmp_path / "models"))
    monkeypatch.delenv(prepared.VARIABLE, raising=False)


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    return tiny.save("llama", tmp_path_factory.mktemp("there"))


def folder_for(there, where, **more):
    model = load_model(there)
    prepared.write_card(Card(str(there), model.hash, **more), where)
    return model


def test_data_is_the_prepared_folder_of_the_embedded_model(smol):
    assert prepared.folder() == assets.DATA and prepared.is_for(smol) and prepared.found(smol.hash) == assets.DATA
    assert prepared.size() == 1 and prepared.sized(37) == 37 and prepared.sae("late").startswith("topk")
    assert all(prepared.path("saes", name).is_dir() for name in prepared.card().saes.values())


def test_the_folder_with_the_same_weights_is_found_whatever_it_is_called(there, tmp_path, capsys):
    model = folder_for(there, tmp_path / "models" / "another name", size=0.25)
    assert prepared.choose(model) == tmp_path / "models" / "another name"
    assert "25%" in capsys.readouterr().out
    assert prepared.sized(100) == 25 and prepared.sized(100, 40) == 40 and prepared.sized(3, 8) == 3


def test_without_one_nothing_of_another_model_is_read(there, capsys):
    model = load_model(there)
    where = prepared.choose(model)
    assert not where.exists() and "nothing was prepared" in capsys.readouterr().out
    with pytest.raises(studies.StudyError, match=r"no table .*saes\.json.*glassbox prepare"):
        studies.read_table("saes")
    assert not studies.has_table("saes")


def test_other_weights_in_the_same_place_are_noticed(there, tmp_path):
    prepared.write_card(Card(str(there), "0123456789abcdef"), tmp_path / "a")
    with prepared.using(tmp_path / "a"), pytest.raises(PreparedError, match="made for weights 0123456789abcdef"):
        prepared.load_subject()


def test_using_ends_with_its_block_and_sizes_too(tmp_path):
    with prepared.using(tmp_path), prepared.at_size(0.5):
        assert prepared.folder() == tmp_path and prepared.size() == 0.5
    assert prepared.folder() == assets.DATA and prepared.size() == 1


def test_kept_parts_of_one_model_are_not_those_of_another(there, tmp_path, monkeypatch):
    monkeypatch.setenv("GLASSBOX_CACHE", str(tmp_path / "cache"))
    folder_for(there, tmp_path / "a")
    assert studies.resumed("x", ["key"], lambda: 1) == 1
    with prepared.using(tmp_path / "a"):
        assert studies.resumed("x", ["key"], lambda: 2) == 2
        with prepared.at_size(0.5):
            assert studies.resumed("x", ["key"], lambda: 3) == 3
        assert studies.resumed("x", ["key"], lambda: 4) == 2
    assert studies.resumed("x", ["key"], lambda: 5) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 0}, "size"), ({"size": 2.0}, "size"), ({"size": "all"}, "size"), ({"model": ""}, "model"),
        ({"saes": {"first": "x"}}, "role 'first'"), ({"saes": ["x"]}, "saes"), ({"colour": 1}, "colour"),
        ({"minutes": -1.0}, "minutes"),
    ],
)  # fmt: skip
def test_a_damaged_card_is_refused_in_words(tmp_path, change, words):
    (tmp_path / prepared.CARD).write_text(json.dumps({"model": "x", "model_hash": "y"} | change))
    with pytest.raises(PreparedError) as refusal:
        prepared.card(tmp_path)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_folder_without_a_card_is_none(tmp_path):
    with pytest.raises(PreparedError, match="no prepared folder"):
        prepared.card(tmp_path)
    with prepared.using(tmp_path), pytest.raises(PreparedError):
        prepared.load_subject()


def test_a_missing_role_names_what_there_is(there, tmp_path):
    folder_for(there, tmp_path, saes={"main": "one"})
    with prepared.using(tmp_path), pytest.raises(PreparedError, match=r"no late SAE\. It has: main"):
        prepared.sae("late")


def test_a_grid_keeps_its_ends_when_it_is_thinned():
    grid = (1, 2, 3, 4, 5)
    assert prepared.thinned(grid) == [1, 2, 3, 4, 5]
    with prepared.at_size(0.02):
        assert prepared.thinned(grid) == [1, 5] and prepared.thinned(grid, 3) == [1, 3, 5]
        assert prepared.thinned((7,)) == [7] == prepared.thinned((7, 8), 1)
    with prepared.at_size(0.7):
        assert prepared.thinned(grid) == [1, 2, 4, 5]
