"""Every bad input of the table is refused in one paragraph, at once, and nothing is written or left hooked."""

import shutil
import time
import warnings

import pytest
import torch
from saes.bad_inputs import CASES, Kit
from shards import train_config

from glassbox_utils.core import corpora
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.saes import features, store, training
from glassbox_utils.saes.harvest import Scaling


@pytest.fixture(scope="module")
def whole(small, shards, tmp_path_factory):
    """What the copies are made of."""
    folder = tmp_path_factory.mktemp("bad") / "sae"
    settings, scaling = train_config(shards), Scaling(5.0, 1.0, torch.zeros(small.d_model))
    store.save_sae(settings, training.build_sae(settings, scaling), scaling, folder, small)
    sae, documents = store.load_sae(folder, small), corpora.load_corpus("landmarks")[:20]
    scanned = features.scan(small, sae, corpora.token_rows(small, documents, 4, 32), documents)
    return sae, folder, scanned


@pytest.fixture
def kit(small, shards, whole, tmp_path):
    sae, folder, scanned = whole
    shutil.copytree(folder, tmp_path / "sae")
    shutil.copytree(shards, tmp_path / "acts")
    (tmp_path / "here").mkdir()
    return Kit(small, sae, tmp_path / "sae", tmp_path / "acts", scanned, tmp_path / "here")


@pytest.mark.parametrize(("name", "call"), CASES, ids=[name for name, _ in CASES])
def test_a_bad_input_is_refused_in_one_paragraph(kit, name, call):
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(GlassboxError) as caught:
            call(kit)
    said = str(caught.value)
    assert "\n" not in said and 20 < len(said) < 900 and said[-1] in ".!`)", said
    assert time.monotonic() - start < 10
    left = {p.name for p in kit.tmp.rglob("*")} - {"config.yaml", "file", "work", "w", "checkpoint.safetensors"}
    assert not left - {".harvest.lock"}, left
    for tree in (kit.model.hf, kit.model.twin):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in tree.modules())


def test_the_table_is_long_and_its_names_differ():
    names = [name for name, _ in CASES]
    assert len(set(names)) == len(names) >= 60
