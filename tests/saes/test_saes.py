"""Harvest, training, evaluation and file format on tiny models: to the bit, also after kill -9."""

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from small import small_model

from glassbox_utils.core import corpora, fast_forward
from glassbox_utils.core.models import ModelError, Site
from glassbox_utils.core.text import tokenize
from glassbox_utils.saes import harvest as saes_harvest
from glassbox_utils.saes.config import SAES, HarvestConfig, SaeError, TrainConfig, hook_of, read_config, site_of
from glassbox_utils.saes.harvest import (
    activations,
    harvest,
    measure_scaling,
    ordinary,
    read_shard,
    shard_path,
    stream_activations,
)
from glassbox_utils.saes.quality import baselines, evaluate_again, evaluate_sae
from glassbox_utils.saes.store import load_sae, shipped
from glassbox_utils.saes.training import build_sae, export, reading_order, topk_gradients, train, training_batches

HOOK = "blocks.1.hook_resid_post"
SITE = Site("resid_post", 1)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def harvest_config(folder, model="small", **changes):
    config = HarvestConfig(folder, (HOOK,), 4 * 8 * 32, "landmarks", "train", str(model), 32, 8, 4)
    return replace(config, **changes)


def train_config(shards, model="small", **changes):
    base = TrainConfig(
        name="tiny", hook=HOOK, architecture="topk", d_sae=64, samples=64 * 60, tokens=4 * 8 * 32, options={"k": 8},
        shards=str(shards), corpus="landmarks", model=str(model), context=32, rows_per_shard=8, shards_mixed=2,
        batch=64, lr=3e-3, warmup=5, reseed_every=20, checkpoint_every=10,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.fixture(scope="module")
def shards(model, tmp_path_factory):
    return harvest(harvest_config(tmp_path_factory.mktemp("shards") / "acts"), model)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir()) if not p.name.startswith(".")}


def die_in(call, target, moment, arguments):
    """Run ``call`` in a process whose ``target`` writes half a file at its ``moment``-th call and is then killed."""
    script = f"""
import os, signal, torch
from pathlib import Path
from glassbox_utils.saes import harvest, training
from glassbox_utils.saes.config import HarvestConfig, TrainConfig
calls = 0
def fatal(what, path, *rest, real={target}):
    global calls
    calls += 1
    if calls == {moment}:
        Path(path).write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(what, path, *rest)
{target} = fatal
torch.set_num_threads(1)
{call.format(*map(repr, arguments))}
"""
    environment = os.environ | {"GLASSBOX_QUIET": "1", "OMP_NUM_THREADS": "1", "GLASSBOX_DTYPE": "bfloat16"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)


# --- harvest ------------------------------------------------------------------------------------------


def test_hook_names_go_both_ways():
    for kind in ("resid_pre", "resid_post", "z", "attn_out", "mlp_out"):
        assert site_of(hook_of(Site(kind, 3))) == Site(kind, 3)
    with pytest.raises(SaeError, match=r"no hook 'blocks.3.hook_resid_psot'.*hook_resid_post"):
        site_of("blocks.3.hook_resid_psot")


def test_stopping_early_changes_nothing(model):
    tokens = corpora.token_rows(model, corpora.load_corpus("landmarks"), 4, 32).tokens
    full = model.hf(tokens, output_hidden_states=True).hidden_states
    got = activations(model, tokens, [SITE, Site("resid_pre", 1)])
    torch.testing.assert_close(got[SITE], full[2])
    torch.testing.assert_close(got[Site("resid_pre", 1)], full[1])
    with pytest.raises(ModelError, match="no layer 9"):
        activations(model, tokens, [Site("resid_post", 9)])


def test_harvest_holds_every_row_once(model, shards):
    parts = [read_shard(path, HOOK) for path in saes_harvest.shards(shards)]
    assert len(parts) == 4
    rows = corpora.token_rows(model, corpora.load_corpus("landmarks"), 32, 32)
    assert torch.equal(torch.cat([p.rows.tokens for p in parts]).long(), rows.tokens)
    assert torch.equal(torch.cat([p.rows.documents for p in parts]).long(), rows.documents)
    assert parts[0].x.dtype == torch.bfloat16 and parts[0].x.shape == (8, 32, model.d_model)
    exact = activations(model, rows.tokens[:8], [SITE])[SITE]
    assert (parts[0].x.float() - exact).norm() / exact.norm() < 0.05
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["model_hash"] == model.hash and manifest["hooks"] == [HOOK]
    with pytest.raises(SaeError, match=r"no hook 'blocks.0.hook_mlp_out'.*resid_post"):
        read_shard(shard_path(shards, 0), "blocks.0.hook_mlp_out")


def test_streaming_gives_the_same_without_a_file(model, shards):
    rows = corpora.pack(model, corpora.load_corpus("landmarks"), 32)
    _, first = next(stream_activations(fast_forward.quick(model), rows, [SITE], 4))
    assert torch.equal(first[SITE].bfloat16(), read_shard(shard_path(shards, 0), HOOK).x[:4])


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
    monkeypatch.setattr(saes_harvest, "fast_dtype", lambda: getattr(torch, dtype))
    harvest(config, model)
    assert json.loads((config.folder / "manifest.json").read_text())["compute"] == dtype
    monkeypatch.setattr(saes_harvest, "fast_dtype", lambda: pytest.fail("measured again"))
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


# --- training -----------------------------------------------------------------------------------------


def test_batches_use_each_ordinary_position_once_in_a_pass(tmp_path):
    generator = torch.Generator().manual_seed(0)
    every = torch.randn(4, 8, 32, 16, generator=generator).bfloat16()
    every[1, 2, 3] *= 100  # an outlier
    for index, x in enumerate(every):
        none = torch.zeros(8, 32, dtype=torch.int32)
        save_file({HOOK: x, "tokens": none, "documents": none.clone()}, shard_path(tmp_path, index))
    config, scaling = train_config(tmp_path, batch=16), measure_scaling(every[0])
    seen = []
    for batch, block, _ in training_batches(config, scaling):
        seen.append(batch)
        if block == 2:  # both blocks of the first pass are used up
            break
    rows = torch.cat(seen)
    assert 4 * 8 * 31 - 1 - 2 * config.batch < len(rows) <= 4 * 8 * 31 - 1
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert float(rows.norm(dim=-1).mean()) == pytest.approx(4, rel=0.02) and float(rows.norm(dim=-1).max()) < 12


def test_passes_grow_over_a_running_harvest():
    order = reading_order(train_config("x", growth=(1, 2)))
    assert next(order) == 0
    assert sorted(next(order) for _ in range(2)) == [0, 1]
    third, fourth = ([next(order) for _ in range(4)] for _ in range(2))
    assert sorted(third) == sorted(fourth) == [0, 1, 2, 3] and third != fourth


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_sparse_gradients_are_the_dense_ones(shards, compute):
    from sae_lens.saes.sae import TrainStepInput

    config = train_config(shards)
    scaling = measure_scaling(read_shard(shard_path(shards, 0), HOOK).x)
    x, _, _ = next(training_batches(config, scaling))
    sae = build_sae(config, scaling)
    with torch.no_grad():
        result = topk_gradients(sae, x, compute)
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    out = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
    out.loss.backward()
    assert result.error == pytest.approx(float(out.loss.detach()), rel=1e-6)
    assert result.fired.sum() == pytest.approx(float((out.feature_acts > 0).sum()), rel=1e-4)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-3 * float(parameter.grad.std()))


OPTIONS = {
    "topk": {"k": 8}, "batchtopk": {"k": 8}, "standard": {"l1_coefficient": 0.5}, "gated": {"l1_coefficient": 0.5},
    "jumprelu": {"l0_coefficient": 0.3}, "matryoshka_batchtopk": {"k": 8, "matryoshka_widths": [16, 64]},
}  # fmt: skip


@pytest.mark.parametrize("architecture", OPTIONS)
def test_every_architecture_learns_and_is_opened_by_sae_lens(model, shards, tmp_path, architecture):
    from sae_lens import SAE

    config = train_config(shards, architecture=architecture, options=OPTIONS[architecture])
    train(config, tmp_path)
    history = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert float(history[-1]["explained_variance"]) > float(history[0]["explained_variance"])
    export(config, tmp_path, tmp_path / "out", model)
    plain = SAE.load_from_disk(tmp_path / "out")
    assert plain.cfg.metadata.hook_name == HOOK and plain.cfg.metadata.model_hash == model.hash
    assert plain.W_dec.dtype == torch.float16
    x = read_shard(shard_path(shards, 1), HOOK).x.float()
    usual = ordinary(x, plain.cfg.metadata.median_norm)
    rebuilt = load_sae(tmp_path / "out", model)(x)
    error = ((rebuilt - x)[usual].square().sum() / (x[usual] - x[usual].mean(0)).square().sum()).item()
    # In the model's own units, with the scaling folded in: about as good as in training.
    assert 1 - error == pytest.approx(float(history[-1]["explained_variance"]), abs=0.15)


@pytest.mark.slow
def test_training_after_kill_is_bit_identical(shards, tmp_path):
    config = train_config(shards)
    call = "training.train(TrainConfig(**{0}), Path({1}))"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert die_in(call, "torch.save", 0, [vars(config), str(whole)]).returncode == 0
    for moment in (1, 3):
        assert die_in(call, "torch.save", moment, [vars(config), str(broken)]).returncode == -signal.SIGKILL
    assert die_in(call, "torch.save", 0, [vars(config), str(broken)]).returncode == 0
    a, b = (torch.load(f / "checkpoint.pt", weights_only=False) for f in (whole, broken))
    assert all(torch.equal(a["sae"][name], b["sae"][name]) for name in a["sae"])
    assert [{**r, "seconds": 0} for r in a["state"]["history"]] == [{**r, "seconds": 0} for r in b["state"]["history"]]


def test_a_checkpoint_of_another_run_is_refused(shards, tmp_path):
    config = train_config(shards)
    train(config, tmp_path, stop_after=3)
    with pytest.raises(SaeError, match=r"another run \(lr: 0.003 there, 0.1 asked for\)"):
        train(replace(config, lr=0.1), tmp_path)


def test_configurations_are_checked(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(SaeError, match="no file"):
        read_config(path)
    path.write_text("name: a\nwidth: 3\n")
    with pytest.raises(SaeError, match=r"unknown keys width\. Allowed: name, hook"):
        read_config(path)
    path.write_text("name: a\nhook: b\n")
    with pytest.raises(SaeError, match=r"is incomplete: .*architecture"):
        read_config(path)
    path.write_text("{name: a, hook: b, architecture: relu, d_sae: 4, samples: 4, tokens: 4}")
    with pytest.raises(SaeError, match=r"no architecture 'relu'\. Allowed: topk, batchtopk"):
        read_config(path)


# --- evaluation and loading ---------------------------------------------------------------------------


class Exact:
    """Loses nothing."""

    def encode(self, x):
        return x

    def decode(self, code):
        return code


class Nothing(Exact):
    """Explains nothing: the mean, whatever comes in."""

    def __init__(self, mean):
        self.mean = mean

    def decode(self, code):
        return self.mean.expand_as(code)


def test_metrics_at_their_ends(model, shards):
    scaling = measure_scaling(read_shard(shard_path(shards, 0), HOOK).x)
    tokens = corpora.token_rows(model, corpora.load_corpus("landmarks", "held"), 8, 32).tokens
    measure = (tokens, SITE, scaling.median_norm, scaling.mean, 8)
    best = evaluate_sae(model, Exact(), *measure)
    assert best.explained_variance == pytest.approx(1) and best.recovered_mean == pytest.approx(1, abs=1e-4)
    assert best.kl == pytest.approx(0, abs=1e-5) and best.l0 == model.d_model
    worst = evaluate_sae(model, Nothing(scaling.mean), *measure)
    assert worst.explained_variance == pytest.approx(0, abs=1e-4)
    assert worst.recovered_mean == pytest.approx(0, abs=1e-4)
    assert worst.ce_mean == pytest.approx(best.ce_mean) and worst.relative_norm == pytest.approx(0, abs=1e-4)


def test_pca_beats_random_directions(model, shards):
    x = read_shard(shard_path(shards, 0), HOOK).x
    scaling = measure_scaling(x)
    sample = x[ordinary(x, scaling.median_norm)].float()
    both = baselines(sample, 8, 64)
    errors = {name: (code.decode(code.encode(sample)) - sample).square().sum() for name, code in both.items()}
    assert errors["pca"] < errors["random"] < (sample - sample.mean(0)).square().sum()


def test_an_sae_of_another_model_is_refused(model, shards, tmp_path):
    config = train_config(shards, samples=64 * 2)
    train(config, tmp_path)
    export(config, tmp_path, tmp_path / "out", model)
    with pytest.raises(SaeError, match=f"hash {model.hash}"):
        load_sae(tmp_path / "out", small_model(seed=1))
    for function in (load_sae, evaluate_again):
        with pytest.raises(SaeError, match="no SAE 'nothing'"):
            function("nothing")


@pytest.mark.parametrize("name", shipped())
def test_shipped_saes_open_with_plain_sae_lens(name, smol):
    from sae_lens import SAE

    folder = SAES / name
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 25e6
    plain, card = SAE.load_from_disk(folder), json.loads((folder / "card.json").read_text())
    assert plain.cfg.d_sae == card["d_sae"] and plain.W_dec.dtype == torch.float16
    assert plain.cfg.metadata.model_hash == smol.hash == card["model_hash"]
    config = read_config(folder)
    assert config.samples // config.batch == card["steps"]
    # What the card says holds on fresh passes: a few held-out rows, by sae_lens's own forward.
    tokens = corpora.token_rows(smol, corpora.load_corpus("wiki", "held"), 6, config.context).tokens
    x = activations(smol, tokens, [site_of(config.hook)])[site_of(config.hook)]
    usual = ordinary(x, plain.cfg.metadata.median_norm)
    rebuilt = load_sae(name, smol)(x)[usual]
    ev = 1 - (rebuilt - x[usual]).square().sum() / (x[usual] - x[usual].mean(0)).square().sum()
    assert float(ev) == pytest.approx(card["wiki_held_out"]["explained_variance"], abs=0.03)


def test_sae_lens_evaluates_the_main_sae_to_our_numbers(smol):
    """Its own evaluation knows no outliers, so on rows whose only one is the first token both must say the same."""
    from sae_lens import SAE
    from sae_lens.evals import get_recons_loss, get_sparsity_and_variance_metrics
    from sae_lens.training.activation_scaler import ActivationScaler

    plain = SAE.load_from_disk(SAES / "topk-8192-l14", dtype="float32")
    hook, median = plain.cfg.metadata.hook_name, plain.cfg.metadata.median_norm
    site = site_of(hook)
    documents = corpora.load_corpus("wiki", "held", 60)
    ids = [tokenize(smol, d.text).input_ids[0] for d in documents]
    rows = torch.stack([i[:96] for i in ids if len(i) >= 96])
    x = activations(smol, rows, [site])[site]
    tokens = rows[ordinary(x, median)[:, 1:].all(1)][:8]
    assert len(tokens) == 8
    x = activations(smol, tokens, [site])[site]
    ours = evaluate_sae(smol, plain, tokens, site, median, x[:, 1:].flatten(0, 1).mean(0), ce_rows=8)

    first = [int(tokens[0, 0])]
    scaler = ActivationScaler()
    theirs = get_recons_loss(
        plain, smol.bridge, scaler, tokens, compute_kl=True, compute_ce_loss=True, ignore_tokens=first
    )
    assert float(theirs["ce_loss_without_sae"].mean()) == pytest.approx(ours.ce, abs=1e-3)
    assert float(theirs["ce_loss_with_sae"].mean()) == pytest.approx(ours.ce_spliced, abs=2e-3)
    assert float(theirs["kl_div_with_sae"][:, :-1].mean()) == pytest.approx(ours.kl, abs=2e-3)
    store = SimpleNamespace(get_batch_tokens=lambda _: tokens)
    wanted = {f"compute_{what}": True for what in ("l2_norms", "sparsity_metrics", "variance_metrics")}
    found, _ = get_sparsity_and_variance_metrics(
        plain, smol.bridge, store, scaler, 1, compute_featurewise_density_statistics=False, eval_batch_size_prompts=8,
        model_kwargs={}, ignore_tokens=first, **wanted,
    )  # fmt: skip
    assert found["l0"] == pytest.approx(ours.l0)
    assert found["explained_variance"] == pytest.approx(ours.explained_variance, abs=1e-3)
