"""Files of SAEs: what belongs to another model is refused, what is shipped opens with plain sae_lens."""

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from shards import train_config
from small import small_model

from glassbox_utils.core import corpora, files
from glassbox_utils.core.devices import result
from glassbox_utils.saes.config import SaeError, read_config, saes_folder, site_of
from glassbox_utils.saes.harvest import Scaling, activations, ordinary
from glassbox_utils.saes.quality import evaluate_again
from glassbox_utils.saes.store import SETTINGS, WEIGHTS, load_sae, save_sae, shipped
from glassbox_utils.saes.training import build_sae, export, train


@pytest.fixture(scope="module")
def model(small):
    return small


def test_an_sae_of_another_model_is_refused(model, shards, tmp_path):
    config = train_config(shards, samples=64 * 2)
    train(config, tmp_path)
    export(config, tmp_path, tmp_path / "out", model)
    with pytest.raises(SaeError, match=f"trained on small with weights {model.hash}"):
        load_sae(tmp_path / "out", small_model(seed=1))
    for function in (load_sae, evaluate_again):
        with pytest.raises(SaeError, match="no SAE 'nothing'"):
            function("nothing")


@pytest.mark.parametrize("name", shipped())
def test_shipped_saes_open_with_plain_sae_lens(name, smol):
    from sae_lens import SAE

    folder = saes_folder() / name
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 25e6
    plain, card = SAE.load_from_disk(folder), json.loads((folder / "card.json").read_text())
    assert plain.cfg.d_sae == card["d_sae"] and plain.W_dec.dtype == torch.float16
    assert plain.cfg.metadata.model_hash == smol.hash == card["model_hash"]
    config = read_config(folder)
    assert config.samples // config.batch == card["steps"]
    # What the card says holds on fresh passes: a few held-out rows, by sae_lens's own forward.
    tokens = corpora.token_rows(smol, corpora.load_corpus("wiki", "held"), 6, config.context).tokens
    x = result(activations(smol, tokens, [site_of(config.hook)])[site_of(config.hook)])
    usual = ordinary(x, plain.cfg.metadata.median_norm)
    rebuilt = load_sae(name, smol)(x)[usual]
    ev = 1 - (rebuilt - x[usual]).square().sum() / (x[usual] - x[usual].mean(0)).square().sum()
    assert float(ev) == pytest.approx(card["wiki_held_out"]["explained_variance"], abs=0.03)


# --- what was loaded is what was saved ------------------------------------------------------------------------


def saved_sae(folder, model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    config, scaling = train_config("x", seed=seed), Scaling(5.0, 0.9, torch.randn(model.d_model, generator=generator))
    save_sae(config, build_sae(config, scaling), scaling, folder, model)
    return folder


@pytest.mark.parametrize("name", shipped())
def test_shipped_weights_are_those_whose_hash_is_stored(name):
    settings = json.loads((saes_folder() / name / SETTINGS).read_text())
    assert settings["weights_sha256"] == files.sha256_of(saes_folder() / name / WEIGHTS)


def test_weights_with_flipped_bits_are_refused(model, tmp_path):
    folder = saved_sae(tmp_path / "sae", model)
    load_sae(folder, model)
    whole = (folder / WEIGHTS).read_bytes()
    for at, length in ((len(whole) // 2, 1), (len(whole) - 1, 1), (len(whole) // 3, 200)):
        flipped = bytearray(whole)
        flipped[at : at + length] = bytes(b ^ 1 for b in flipped[at : at + length])
        (folder / WEIGHTS).write_bytes(flipped)
        with pytest.raises(SaeError, match=r"is damaged: its sha256 is not the one that cfg.json holds\. Restore"):
            load_sae(folder)
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps({k: v for k, v in settings.items() if k != "weights_sha256"}))
    for damaged in (whole[: len(whole) // 2], b"", b"no tensors"):
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(SaeError, match=r"can't be read as an SAE"):
            load_sae(folder)
    (folder / WEIGHTS).write_bytes(whole)
    load_sae(folder, model)  # a folder of somebody else, without the hash
    (folder / WEIGHTS).unlink()
    with pytest.raises(SaeError, match=r"has no sae_weights.safetensors"):
        load_sae(folder)


def test_copies_of_an_sae_are_whole(model, tmp_path):
    folder = saved_sae(tmp_path / "sae", model)
    shutil.copytree(folder, tmp_path / "copy")
    a, b = load_sae(folder), load_sae(tmp_path / "copy")
    assert all(torch.equal(t, b.state_dict()[n]) for n, t in a.state_dict().items())
    copy.deepcopy(a).save_model(tmp_path / "again")  # by sae_lens, in float32: a stored hash would be wrong
    assert torch.equal(load_sae(tmp_path / "again").W_enc, a.W_enc)


def test_saving_keeps_what_else_is_in_the_folder(model, tmp_path, monkeypatch):
    folder = tmp_path / "v1.5"
    (folder / "notes").mkdir(parents=True)
    for name in ("config.yaml", "notes/a.txt", ".hidden"):
        (folder / name).write_text(name)
    monkeypatch.chdir(folder)
    saved_sae(folder, model)
    assert sorted(p.name for p in folder.iterdir()) == [".hidden", SETTINGS, "config.yaml", "notes", WEIGHTS]
    assert (folder / "notes" / "a.txt").read_text() == "notes/a.txt"
    assert sorted(os.listdir()) == sorted(p.name for p in folder.iterdir())  # a process in the folder is in the new one
    assert [p.name for p in tmp_path.iterdir()] == ["v1.5"]


KILLED = """
import os, signal, sys, torch
from pathlib import Path
sys.path[:0] = {paths}
torch.set_num_threads(1)
from small import small_model
from test_store import WEIGHTS, load_sae, saved_sae

STEPS = "rename replace mkdir serialize_file write rmdir unlink scandir open chdir fsync".split()
folder, model = Path(sys.argv[1]), small_model()
weights = [(Path(f) / WEIGHTS).read_bytes() for f in sys.argv[1:]]
found = []
for moment in range(1, 10_000, int(os.environ.get("EVERY", 6))):
    child, calls = os.fork(), 0
    if not child:
        def trace(frame, event, argument):
            global calls
            calls += event == "c_call" and argument.__name__ in STEPS
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(trace)
        saved_sae(folder, model, seed=1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    load_sae(folder, model)
    now = (folder / WEIGHTS).read_bytes()
    assert now in weights
    found.append(weights.index(now))
    if status == 0:
        break
    if found[-1]:  # the old one again
        saved_sae(folder, model, seed=0)
print(len(found), sum(found))
"""


@pytest.mark.slow
def test_a_kill_leaves_the_old_sae_or_the_new_one(model, tmp_path):
    old, new = (saved_sae(tmp_path / name, model, seed) for seed, name in enumerate(("old", "new")))
    here = os.path.dirname(__file__)
    script = KILLED.replace("{paths}", repr([here, os.path.dirname(here)]))
    run = subprocess.run([sys.executable, "-c", script, str(old), str(new)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    moments, finished = map(int, run.stdout.split())
    assert moments >= 5 and 1 <= finished < moments
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"], "nothing half-written is left"


def test_weights_that_float16_has_not_are_not_written(model, tmp_path):
    folder = saved_sae(tmp_path / "sae", model)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    config, scaling = train_config("x"), Scaling(5.0, 0.9, torch.zeros(model.d_model))
    for wrong in (float("nan"), 1e6):
        sae = build_sae(config, scaling)
        sae.b_enc.data[3] = wrong
        with pytest.raises(SaeError, match=r"b_enc of the SAE 'tiny' hold values that float16 has not"):
            save_sae(config, sae, scaling, folder, model)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]
    assert load_file(folder / WEIGHTS)["W_enc"].dtype == torch.float16
