"""Harvest on a tiny model: every row once, to the bit, also after kill -9, in ranks, and whatever the batch."""

import itertools
import json
import signal
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from shards import HOOK, SITE, contents, die_in, fatal, harvest_config, train_config, two_ranks, written

from glassbox_utils.core import corpora, fast_forward, packing
from glassbox_utils.core.corpora import Document
from glassbox_utils.core.devices import beside, result
from glassbox_utils.core.models import ModelError, Site
from glassbox_utils.saes import harvest as saes_harvest
from glassbox_utils.saes.config import SaeError, hook_of, site_of
from glassbox_utils.saes.harvest import activations, harvest, read_shard, shard_path, stream_activations


@pytest.fixture(scope="module")
def model(small):
    return small


def test_hook_names_go_both_ways():
    for kind in ("resid_pre", "resid_post", "z", "attn_out", "mlp_out"):
        assert site_of(hook_of(Site(kind, 3))) == Site(kind, 3)
    with pytest.raises(SaeError, match=r"no hook 'blocks.3.hook_resid_psot'.*hook_resid_post"):
        site_of("blocks.3.hook_resid_psot")


def test_stopping_early_changes_nothing(model):
    tokens = corpora.token_rows(model, corpora.load_corpus("landmarks"), 4, 32).tokens
    full = model.hf(beside(tokens, model.device), output_hidden_states=True).hidden_states
    got = activations(model, tokens, [SITE, Site("resid_pre", 1)])
    torch.testing.assert_close(result(got[SITE]), result(full[2]))
    torch.testing.assert_close(result(got[Site("resid_pre", 1)]), result(full[1]))
    with pytest.raises(ModelError, match="no layer 9"):
        activations(model, tokens, [Site("resid_post", 9)])


def test_harvest_holds_every_row_once(model, shards):
    parts = [read_shard(path, HOOK) for path in saes_harvest.shards(shards)]
    assert len(parts) == 4
    rows = corpora.token_rows(model, corpora.load_corpus("landmarks"), 32, 32)
    assert torch.equal(torch.cat([p.rows.tokens for p in parts]).long(), rows.tokens)
    assert torch.equal(torch.cat([p.rows.documents for p in parts]).long(), rows.documents)
    assert parts[0].x.dtype == torch.bfloat16 and parts[0].x.shape == (8, 32, model.d_model)
    exact = result(activations(model, rows.tokens[:8], [SITE])[SITE])
    assert (parts[0].x.float() - exact).norm() / exact.norm() < 0.05
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["model_hash"] == model.hash and manifest["hooks"] == [HOOK]
    with pytest.raises(SaeError, match=r"no hook 'blocks.0.hook_mlp_out'.*resid_post"):
        read_shard(shard_path(shards, 0), "blocks.0.hook_mlp_out")


def test_streaming_gives_the_same_without_a_file(model, shards):
    rows = corpora.pack(model, corpora.load_corpus("landmarks"), 32)
    _, first = next(stream_activations(fast_forward.quick(model), rows, [SITE], 4))
    assert torch.equal(result(first[SITE]).bfloat16(), read_shard(shard_path(shards, 0), HOOK).x[:4])


def test_another_harvest_is_refused_and_a_longer_one_extends(model, tmp_path):
    config = harvest_config(tmp_path / "acts", n_tokens=8 * 32)
    harvest(config, model)
    before = contents(config.folder)
    harvest(replace(config, n_tokens=2 * 8 * 32), model)
    after = contents(config.folder)
    assert len(after) == len(before) + 1 and all(after[name] == data for name, data in before.items())
    with pytest.raises(SaeError, match="another harvest: hooks is"):
        harvest(replace(config, hooks=("blocks.0.hook_mlp_out",)), model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_harvest_goes_on_in_the_type_it_began_with(model, tmp_path, monkeypatch, dtype):
    config = harvest_config(tmp_path / "acts", n_tokens=8 * 32)
    monkeypatch.setattr(saes_harvest, "fast_dtype", lambda *_: getattr(torch, dtype))
    harvest(config, model)
    assert json.loads((config.folder / "manifest.json").read_text())["compute"] == dtype
    monkeypatch.setattr(saes_harvest, "fast_dtype", lambda *_: pytest.fail("measured again"))
    harvest(replace(config, n_tokens=2 * 8 * 32), model)
    assert len(saes_harvest.shards(config.folder)) == 2


@pytest.mark.slow
def test_harvest_after_kill_is_bit_identical(saved, tmp_path):
    call = "harvest.harvest(HarvestConfig(Path({0}), ({1},), 1024, 'landmarks', 'train', {2}, 32, 8, 4))"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert die_in(call, "harvest.save_file", 0, [str(whole), HOOK, str(saved)]).returncode == 0
    for moment, finished in ((1, 0), (3, 2)):
        run = die_in(call, "harvest.save_file", moment, [str(broken), HOOK, str(saved)])
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert len(saes_harvest.shards(broken)) == finished
    assert die_in(call, "harvest.save_file", 0, [str(broken), HOOK, str(saved)]).returncode == 0
    assert contents(broken) == contents(whole) and len(contents(whole)) == 5


def plain(model, config):
    """What the harvest is a faster form of: rows packed one by one, batch after batch, in the caller's thread."""
    rows = corpora.pack(model, corpora.load_corpus(config.corpus), config.context)
    for some, x in itertools.islice(stream_activations(model, rows, [SITE], 4), config.n_tokens // config.context // 4):
        yield some, result(x[SITE]).bfloat16()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_lanes_and_packing_ahead_change_no_bit(model, shards, tmp_path, monkeypatch, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    monkeypatch.setattr(saes_harvest, "fast_dtype", lambda *_: torch.float32)
    try:
        config = harvest_config(tmp_path / "acts")
        parts = [read_shard(path, HOOK) for path in saes_harvest.shards(harvest(config, model))]
        rows, x = zip(*plain(model, config), strict=True)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat([p.x for p in parts]), torch.cat(x))
    assert torch.equal(torch.cat([p.rows.tokens for p in parts]).long(), torch.cat([r.tokens for r in rows]))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.01)])
def test_the_same_shards_whatever_the_batch(model, tmp_path, monkeypatch, dtype, tolerance):
    """Relative error, of what bfloat16 shards keep: equal sums in float32 may still round to neighbours."""
    monkeypatch.setattr(saes_harvest, "fast_dtype", lambda *_: getattr(torch, dtype))
    found = {}
    for rows in (1, 3, 8):
        monkeypatch.setattr(saes_harvest, "rows_at_hand", lambda *_, rows=rows: rows)
        folder = harvest(harvest_config(tmp_path / str(rows)), model)
        found[rows] = torch.cat([read_shard(path, HOOK).x for path in saes_harvest.shards(folder)]).float()
    for rows in (3, 8):
        error = (found[rows] - found[1]).norm() / found[1].norm()
        assert error <= tolerance


def test_a_full_device_halves_the_batch(model):
    tokens = corpora.token_rows(model, corpora.load_corpus("landmarks"), 8, 32).tokens
    sizes = []

    def run(some):
        sizes.append(len(some))
        if len(some) > 2:
            raise torch.OutOfMemoryError
        return activations(model, some, [SITE])

    x = saes_harvest._within_memory(run, tokens)[SITE]
    assert max(sizes[1:]) == 4 and x.shape[0] == 8
    torch.testing.assert_close(result(x), result(activations(model, tokens, [SITE])[SITE]))


def test_what_is_finished_is_not_tokenised_again(model, tmp_path, monkeypatch):
    config = harvest_config(tmp_path / "acts")
    whole = contents(harvest(config, model))
    texts, encode = [], packing.encode
    monkeypatch.setattr(packing, "encode", lambda model, some: texts.extend(some) or encode(model, some))
    shard_path(config.folder, 3).unlink()
    harvest(config, model)
    with safe_open(shard_path(config.folder, 2), "pt") as file:
        last = int(file.get_tensor("documents")[-1, -1])
    assert contents(config.folder) == whole
    assert last > 0 and texts[0] == corpora.load_corpus("landmarks")[last].text
    texts.clear()
    harvest(config, model)
    assert not texts, "nothing is missing"


def test_a_document_longer_than_a_shard_is_taken_up_in_its_middle(model, tmp_path, monkeypatch):
    documents = [Document("A gate. " * n, "s", "l") for n in (20, 900, 3, 700)]
    monkeypatch.setattr(corpora, "open_corpus", lambda *_: documents)
    monkeypatch.setattr(saes_harvest, "_doubtful", lambda *_: False)
    config = harvest_config(tmp_path / "acts", n_tokens=16 * 8 * 32)
    whole = contents(harvest(config, model))
    counted = saes_harvest.count_places(config, model, documents)
    assert counted == saes_harvest.places_on_disk(config.folder, range(16))
    for gone in ([7], [0, 3, 4, 15], [2, 9]):
        for index in gone:
            shard_path(config.folder, index).unlink()
        assert contents(harvest(config, model)) == whole


def test_more_tokens_than_there_are_is_said_at_once(model, tmp_path, monkeypatch):
    monkeypatch.setattr(saes_harvest, "tapped", lambda *_: pytest.fail("the model was run"))
    for n_tokens in (10**6, 10**7):
        with pytest.raises(
            SaeError, match=r"tokens is [\d,]+, that.*'landmarks' \(train\) fills only \d+\. Allowed: at most"
        ):
            harvest(harvest_config(tmp_path / "acts", n_tokens=n_tokens), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_tokens": 0}, r"n_tokens is 0\. Allowed: greater than or equal to 1"),
        ({"n_tokens": 10**12}, r"n_tokens is 1,000,000,000,000, .*at most 100,000 shards"),
        ({"rows_per_shard": 2.5}, r"rows_per_shard is 2.5\. Allowed: a whole number"),
        ({"context": 1}, r"context is 1\. Allowed: greater than or equal to 2"),
        ({"context": 1000}, r"context is 1000\. Allowed with small: 2 to 256"),
        ({"hooks": ()}, r"hooks is empty"),
        ({"hooks": ("blocks.1.hook_outt",)}, r"no hook 'blocks.1.hook_outt'"),
        ({"corpus": "landmark"}, r"no corpus 'landmark'\. Did you mean 'landmarks'"),
        ({"split": "test"}, r"split is 'test'\. Allowed: 'train', 'held' or 'golden_gate'"),
    ],
)
def test_a_harvest_that_cannot_be_done_is_refused(model, tmp_path, changes, message):
    with pytest.raises(SaeError, match=message):
        harvest(harvest_config(tmp_path / "acts", **changes), model)


@pytest.mark.parametrize("hold", [0, 100, 3000, -1])
def test_a_shard_that_was_cut_short_is_made_again(model, tmp_path, hold):
    config = harvest_config(tmp_path / "acts")
    whole = contents(harvest(config, model))
    for index in (1, 2):
        path = shard_path(config.folder, index)
        path.write_bytes(path.read_bytes()[:hold])
    with pytest.raises(SaeError, match=r"shard-00001.safetensors is damaged .*makes it again"):
        read_shard(shard_path(config.folder, 1), HOOK)
    with pytest.warns(UserWarning, match=r"shard-0000[12].safetensors is damaged.*made again"):
        harvest(config, model)
    assert contents(config.folder) == whole


def test_a_shard_of_another_shape_is_made_again(model, tmp_path):
    config = harvest_config(tmp_path / "acts")
    whole = contents(harvest(config, model))
    none = torch.zeros(8, 32).int()
    save_file({HOOK: torch.zeros(8, 32, 7), "tokens": none, "documents": none.clone()}, shard_path(config.folder, 0))
    with pytest.warns(UserWarning, match=r"of other shapes"):
        harvest(config, model)
    assert contents(config.folder) == whole


@pytest.mark.parametrize("kinds", itertools.permutations(["attn_out", "mlp_out", "z"], 2))
def test_several_sites_of_the_deepest_layer_are_all_read(model, kinds):
    tokens = corpora.token_rows(model, corpora.load_corpus("landmarks"), 2, 32).tokens
    sites = [Site(kind, 1) for kind in kinds]
    got = activations(model, tokens, sites)
    for site in sites:
        assert torch.equal(got[site], activations(model, tokens, [site])[site])


@pytest.mark.slow
def test_two_ranks_write_the_shards_of_one_process(saved, tmp_path):
    """Also when one is killed in the middle and the same command is given again, and by one process afterwards."""
    one, two = (train_config(tmp_path / name, saved) for name in ("one", "two"))
    path = written(two, tmp_path / "config")
    call = "harvest.harvest(training.read_config({0}).harvest, load_model({1}))"
    assert die_in(call, "harvest.save_file", 0, [str(written(one, tmp_path / "a")), str(saved)]).returncode == 0
    script = tmp_path / "dies.py"
    call = "with distributed.ranks(): " + call
    script.write_text(fatal(call, "harvest.save_file", 2, [str(path), str(saved)]))
    assert two_ranks(script, GLASSBOX_DTYPE="bfloat16").returncode != 0
    done = saes_harvest.shards(tmp_path / "two")
    assert len(done) < 4 and shard_path(tmp_path / "two", 1) in done and shard_path(tmp_path / "two", 3) not in done
    run = two_ranks("-m", "glassbox_utils.cli", "harvest", path, GLASSBOX_DTYPE="bfloat16")
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("4 shards in") == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
