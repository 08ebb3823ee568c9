"""A tiny model and its harvest, for the tests of this room."""

import pytest
from shards import harvest_config
from small import small_model

from glassbox_utils.saes.harvest import harvest


@pytest.fixture(scope="session")
def small():
    return small_model()


@pytest.fixture(scope="session")
def saved(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small.hf.save_pretrained(folder)
    small.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shards(small, tmp_path_factory):
    return harvest(harvest_config(tmp_path_factory.mktemp("shards") / "acts"), small)
