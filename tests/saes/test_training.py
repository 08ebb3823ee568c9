"""Training on a tiny model: to the bit after kill -9, on any device, from a stream, and in ranks."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from shards import HOOK, contents, die_in, train_config, two_ranks, written

from glassbox_utils.core.devices import beside, result
from glassbox_utils.saes import config as configs
from glassbox_utils.saes import gradients, training
from glassbox_utils.saes.config import SaeError, read_config
from glassbox_utils.saes.harvest import measure_scaling, ordinary, read_shard, shard_path
from glassbox_utils.saes.store import load_sae, read_checkpoint
from glassbox_utils.saes.training import build_sae, export, reading_order, topk_gradients, train, training_batches


@pytest.fixture(scope="module")
def model(small):
    return small


def history(folder):
    rows = csv.DictReader((Path(folder) / "history.csv").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


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
        found = topk_gradients(sae, x, compute)
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    out = sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))
    out.loss.backward()
    assert float(found.error) == pytest.approx(float(out.loss.detach()), rel=1e-6)
    assert float(found.fired.sum()) == pytest.approx(float((out.feature_acts > 0).sum()), rel=1e-4)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-3 * float(parameter.grad.std()))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d_sae", "k", "batch"), [(64, 8, 64), (300, 4, 1500)])
@torch.no_grad()
def test_other_devices_compute_the_gradients_of_the_cpu(compute, d_sae, k, batch):
    """One path sorts with numpy; the other is torch only, and divides features that fire everywhere into pieces."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*shape, generator=generator) for shape in ((batch, 24), (24,), (d_sae, 1), (d_sae,))]
    config = train_config("x", d_sae=d_sae, options={"k": k})
    sae = build_sae(config, training.Scaling(1.0, 1.0, drawn[1]))
    sae.W_dec *= drawn[2].abs() + 0.5  # rows of any length
    sae.b_enc += 0.1 * drawn[3]
    x = drawn[0] + 2 * drawn[1]
    near = gradients._on_cpu(sae, x, compute)
    grads = {name: p.grad.clone() for name, p in sae.named_parameters()}
    strides = {name: p.grad.stride() for name, p in sae.named_parameters()}
    there = gradients.on_device(sae, x, compute)
    assert torch.equal(near.fired, there.fired) and float(near.fired.max()) > (
        2 * gradients.PIECE if batch > 100 else 0
    )
    torch.testing.assert_close(near.error, there.error, rtol=1e-6, atol=0)
    for name, parameter in sae.named_parameters():
        assert parameter.grad.stride() == strides[name]
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-5 * float(grads[name].std()))


def test_groups_lose_and_double_nothing():
    generator = torch.Generator().manual_seed(0)
    features = torch.cat([torch.full((1000,), 7), torch.randint(0, 20, (77,), generator=generator) * 2])
    values = torch.randint(0, 5, (len(features), 3), generator=generator).float()
    mixed = torch.randperm(len(features), generator=generator)
    groups = gradients.group(features[mixed], 41)
    expected = torch.zeros(41, 3).index_add_(0, features[mixed], values[mixed])
    assert torch.equal(gradients.grouped_sum(groups, values[mixed]), expected)
    sizes = groups.pieces.diff()
    assert int(sizes.min()) >= 0 and int(sizes.max()) == gradients.PIECE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.no_grad()
def test_a_step_does_not_wait_for_the_gpu():
    config = train_config("x", d_sae=512, options={"k": 8})
    sae = beside(build_sae(config, training.Scaling(1.0, 1.0, torch.randn(64))), torch.device("cuda"))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, fused=True)
    x = torch.randn(256, 64, device="cuda")
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            topk_gradients(sae, x)
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


OPTIONS = {
    "topk": {"k": 8}, "batchtopk": {"k": 8}, "standard": {"l1_coefficient": 0.5}, "gated": {"l1_coefficient": 0.5},
    "jumprelu": {"l0_coefficient": 0.3}, "matryoshka_batchtopk": {"k": 8, "matryoshka_widths": [16, 64]},
}  # fmt: skip


@pytest.mark.parametrize("architecture", OPTIONS)
def test_every_architecture_learns_and_is_opened_by_sae_lens(model, shards, tmp_path, architecture):
    from sae_lens import SAE

    config = train_config(shards, architecture=architecture, options=OPTIONS[architecture])
    train(config, tmp_path)
    explained = [float(row["explained_variance"]) for row in history(tmp_path)]
    assert explained[-1] > explained[0]
    export(config, tmp_path, tmp_path / "out", model)
    plain = SAE.load_from_disk(tmp_path / "out")
    assert plain.cfg.metadata.hook_name == HOOK and plain.cfg.metadata.model_hash == model.hash
    assert plain.W_dec.dtype == torch.float16
    x = read_shard(shard_path(shards, 1), HOOK).x.float()
    usual = ordinary(x, plain.cfg.metadata.median_norm)
    rebuilt = load_sae(tmp_path / "out", model)(x)
    error = ((rebuilt - x)[usual].square().sum() / (x[usual] - x[usual].mean(0)).square().sum()).item()
    # In the model's own units, with the scaling folded in: about as good as in training.
    assert 1 - error == pytest.approx(explained[-1], abs=0.15)


@pytest.mark.slow
def test_training_after_kill_is_bit_identical(shards, tmp_path):
    config = train_config(shards)
    call = "training.train(TrainConfig(**{0}), Path({1}))"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert die_in(call, "checkpoints.save_file", 0, [vars(config), str(whole)]).returncode == 0
    for moment in (1, 3):
        assert die_in(call, "checkpoints.save_file", moment, [vars(config), str(broken)]).returncode == -signal.SIGKILL
    assert die_in(call, "checkpoints.save_file", 0, [vars(config), str(broken)]).returncode == 0
    a, b = read_checkpoint(whole), read_checkpoint(broken)
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors) and len(a.tensors) == 19
    assert [{**r, "seconds": 0} for r in a.state["history"]] == [{**r, "seconds": 0} for r in b.state["history"]]


def test_checkpoints_are_read_without_pickle(shards, tmp_path, monkeypatch):
    """And bring back every bit: weights, the optimiser in the encoder's memory layout, places, floats."""
    config = train_config(shards)
    train(config, tmp_path / "whole")
    monkeypatch.setattr("pickle.Unpickler", None)
    monkeypatch.setattr(torch, "load", None)
    train(config, tmp_path / "parts", stop_after=25)
    sae = train(config, tmp_path / "parts")
    saved = read_checkpoint(tmp_path / "parts")
    assert all(torch.equal(t, saved.tensors[n]) for n, t in read_checkpoint(tmp_path / "whole").tensors.items())
    assert all(torch.equal(result(t), saved.tensors[f"sae.{n}"]) for n, t in sae.state_dict().items())
    assert sae.W_enc.t().is_contiguous()
    json.dumps(saved.state)


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
    with pytest.raises(SaeError, match=r"unknown fields: 'width'\..* Allowed: name, hook"):
        read_config(path)
    path.write_text("name: a\nhook: b\n")
    with pytest.raises(SaeError, match=r"is incomplete: architecture, d_sae"):
        read_config(path)
    path.write_text("{name: a, hook: b, architecture: relu, d_sae: 4, samples: 4, tokens: 4}")
    with pytest.raises(SaeError, match=r"architecture is 'relu'\. Allowed: 'topk', 'batchtopk'"):
        read_config(path)
    base = vars(train_config("x")) | {"growth": []}
    for changes, message in [
        ({"batch": 500}, r"batch is 500 in .*'tiny'.*hold 496 positions\. Allowed: at most that many.*shards_mixed"),
        ({"batch": "2e3"}, r"batch is '2e3'\. Allowed: a whole number\. Write it without quotes"),
        ({"samples": 10}, r"samples is 10 .*at least one batch \(64\)"),
        ({"tokens": -1}, r"tokens is -1"),
        ({"lr": "fast"}, r"lr is 'fast'\. Allowed: a number"),
        ({"growth": [2, 9]}, r"growth has \[9\].*Allowed: 1 to 4"),
        ({"stream": True, "growth": [2]}, r"With stream, leave it out"),
        ({"hook": "blocks.1.hook_x"}, r"no hook 'blocks.1.hook_x'"),
    ]:
        path.write_text(json.dumps(base | {"options": {"k": 8}} | changes))
        with pytest.raises(SaeError, match=message):
            read_config(path)


@pytest.mark.parametrize("architecture", OPTIONS)
def test_options_are_those_of_sae_lens(architecture):
    """Every option that a configuration may hold is one that sae_lens knows, with sae_lens's own default."""
    from sae_lens.registry import get_sae_training_class

    theirs = {f.name: f for f in dataclasses.fields(get_sae_training_class(architecture)[1])}
    for ours in dataclasses.fields(configs.OPTIONS[architecture]):
        default = theirs[ours.name].default_factory() if ours.name == "matryoshka_widths" else theirs[ours.name].default
        if ours.name != "decoder_init_norm":  # ours is 1
            assert ours.default == (tuple(default) if isinstance(default, list) else default)


@pytest.mark.parametrize("changes", [{"lr": 0.5}, {"d_sae": True}, {"options": {"k": 8, "kk": 1}}, {"context": 1}])
def test_python_and_files_meet_the_same_rules(tmp_path, changes):
    """What is refused in a file is refused in Python, and what is made is what is read."""
    fine = train_config("x", growth=(1, 2))
    assert read_config(written(fine, tmp_path)) == fine
    (tmp_path / "config.yaml").write_text("\ufeff" + (tmp_path / "config.yaml").read_text(), encoding="utf-8")
    assert read_config(tmp_path) == fine
    values = vars(fine) | {"growth": [1, 2]} | changes
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    if changes == {"lr": 0.5}:
        assert read_config(tmp_path) == replace(fine, **changes)
        return
    with pytest.raises(SaeError) as here:
        replace(fine, **changes)
    with pytest.raises(SaeError) as there:
        read_config(tmp_path)
    assert str(there.value) == f"{tmp_path / 'config.yaml'}: {here.value}"


def test_no_warmup_begins_at_the_full_rate(shards, tmp_path):
    run = train_config(shards, warmup=0, decay=0.0, samples=64 * 20)
    train(run, tmp_path)
    assert float(history(tmp_path)[0]["lr"]) == run.lr and training._learning_rate(run, 0) == run.lr


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(shards, tmp_path, monkeypatch):
    run = train_config(shards)
    train(run, tmp_path, stop_after=10)
    before = contents(tmp_path)

    def explode(sae, x, compute, auxiliary, real=topk_gradients):
        found = real(sae, x, compute)
        sae.W_enc.grad[0, 0] = torch.nan
        return found

    monkeypatch.setattr(training, "topk_gradients", explode)
    with pytest.raises(SaeError, match=r"'tiny' diverged: its error at step 20 .*Lower lr \(it is 0.003\)"):
        train(run, tmp_path)
    assert contents(tmp_path) == before


def test_an_sae_that_no_memory_holds_is_refused(shards, tmp_path):
    with pytest.raises(SaeError, match=r"d_sae is 16,777,216: .*Allowed here: at most"):
        training._check_memory(train_config(shards, d_sae=2**24), 10**6, torch.device("cpu"))


def test_what_would_never_end_is_refused_at_once(model, shards, tmp_path):
    start = time.monotonic()
    with pytest.raises(SaeError, match=r"no harvest is running that would write it"):
        train(train_config(tmp_path / "nothing"), tmp_path)
    with pytest.raises(SaeError, match=r"shard-00004.*ask for no more tokens than the corpus has"):
        train(train_config(shards, tokens=5 * 8 * 32), tmp_path / "more")
    few = {HOOK: torch.ones(8, 32, 16).bfloat16(), **{n: torch.zeros(8, 32).int() for n in ("tokens", "documents")}}
    few[HOOK][:, 4:] *= 100  # hardly an ordinary position in the later shards
    (tmp_path / "few").mkdir()
    ones = {**few, HOOK: torch.randn(8, 32, 16).bfloat16()}
    for index in range(4):
        save_file(few if index % 2 else ones, shard_path(tmp_path / "few", index))
    with pytest.raises(SaeError, match=r"batch is 400, but a block of 2 shards holds \d+ ordinary positions"):
        train(train_config(tmp_path / "few", batch=400, samples=4000), tmp_path / "work")
    assert time.monotonic() - start < 60


# --- streaming ----------------------------------------------------------------------------------------


def test_streaming_trains_on_the_same_batches_without_a_file(model, shards, tmp_path):
    """To the bit in the first pass, also when it is stopped and goes on; later passes are in order instead of mixed."""
    one_pass = train_config(shards, samples=64 * 14)
    stream = replace(one_pass, stream=True, shards=str(tmp_path / "none"))
    sae, again = train(one_pass, tmp_path / "disk"), train(stream, tmp_path / "stream", model=model)
    assert history(tmp_path / "disk") == history(tmp_path / "stream")
    assert torch.equal(result(sae.W_dec), result(again.W_dec))
    longer = replace(stream, samples=64 * 40)
    whole = train(longer, tmp_path / "whole", model=model)
    for stop in (3, 9, 20, None):  # in the middle of a block, of the next one, of the next pass
        parts = train(longer, tmp_path / "parts", stop_after=stop, model=model)
    assert read_checkpoint(tmp_path / "parts").state["place"] == read_checkpoint(tmp_path / "whole").state["place"]
    assert torch.equal(result(parts.W_dec), result(whole.W_dec))
    assert not (tmp_path / "none").exists()


def test_one_command_streams_too(saved, tmp_path, monkeypatch):
    """All of ``glassbox train-sae`` on a configuration that writes no shards."""
    monkeypatch.setenv("GLASSBOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("glassbox_utils.saes.quality.corpora.load_corpus", landmarks())
    path = written(train_config("", saved, stream=True, samples=64 * 20), tmp_path / "sae")
    folder = training.train_from_config(path)
    card = json.loads((folder / "card.json").read_text())
    assert card["samples_trained"] == 64 * 20 and 0 < card["metrics"]["sae"]["explained_variance"] < 1
    assert not (tmp_path / "cache" / "activations").exists() and load_sae(folder).cfg.d_sae == 64


def landmarks():
    """Every corpus is the one that is shipped."""
    from glassbox_utils.core import corpora

    load = corpora.load_corpus
    return lambda name="mix", split="train", limit=None: load("landmarks", split, limit)


PEAK = """
import json, resource, sys, torch
from pathlib import Path
from glassbox_utils.core import corpora
from glassbox_utils.core.models import load_model
from glassbox_utils.saes import training
from glassbox_utils.saes.config import TrainConfig

class Texts:
    def __init__(self, name, split): pass
    def __iter__(self):
        words = "the gate of an old bridge stands in fog over the bay while ferries pass".split()
        for i in range(10**7):
            yield corpora.Document(" ".join(words[(i * j) % len(words)] for j in range(1, 60)), "s", "l")

corpora.open_corpus = Texts
config = TrainConfig(**json.loads(sys.argv[1]))
training.train(config, Path(sys.argv[2]), device="cpu", model=load_model(config.model, device="cpu"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_of_streaming_is_flat(saved, tmp_path):
    """Ten times the corpus, the activations of which would take 58 MB more: the peak stays where it was."""
    peaks = []
    for times in (1, 10):
        tokens = times * 100_000
        config = train_config(
            "", saved, stream=True, tokens=tokens, samples=tokens * 9 // 10, rows_per_shard=256, batch=1024
        )
        settings = os.environ | {"GLASSBOX_QUIET": "1", "GLASSBOX_DTYPE": "float32", "MALLOC_ARENA_MAX": "2"}
        command = [sys.executable, "-c", PEAK, json.dumps(vars(config)), str(tmp_path / str(times))]
        run = subprocess.run(command, env=settings, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        peaks.append(int(run.stdout.split()[-1]))
    print(f"peak {peaks[0]} MB, with ten times the corpus {peaks[1]} MB")
    assert peaks[1] - peaks[0] < 20


# --- ranks --------------------------------------------------------------------------------------------

RANKS = """
import sys
from pathlib import Path
from glassbox_utils.core import distributed
from glassbox_utils.saes import training
from glassbox_utils.saes.config import read_config
with distributed.ranks():
    training.train(read_config(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) or None, device="cpu")
"""


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "topk", "options": {"k": 8}},
        {"architecture": "topk", "options": {"k": 8}, "stream": True},
        {"architecture": "jumprelu", "options": {"l0_coefficient": 0.3}},
        {"architecture": "batchtopk", "options": {"k": 8}},
    ],
    ids=lambda c: c["architecture"] + "-stream" * c.get("stream", False),
)
def test_two_ranks_have_the_loss_curve_of_one_process(shards, saved, tmp_path, monkeypatch, changes):
    """At the same global batch, within 1e-4, also when they are stopped and go on."""
    monkeypatch.setattr(training, "compute_type", lambda *_: "float32")
    config = train_config(shards, saved, reseed_every=1000, **changes)
    path = written(config, tmp_path / "config")
    train(config, tmp_path / "one", device="cpu")
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    for stop in (25, 0):
        run = two_ranks(script, path, tmp_path / "two", stop)
        assert run.returncode == 0, run.stderr[-3000:]
    assert sorted(contents(tmp_path / "two")) == ["checkpoint.safetensors", "history.csv"]
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    two = [row for row in two if int(row["step"]) % 20 == 0]  # stopping wrote one row more
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"]
        if a["step"] != "40":  # its window was cut in two
            assert float(a["explained_variance"]) == pytest.approx(float(b["explained_variance"]), abs=1e-4)
            assert float(a["l0"]) == pytest.approx(float(b["l0"]), rel=1e-3)


@pytest.mark.ranks
@pytest.mark.slow
def test_a_batch_that_ranks_cannot_divide_is_refused(shards, saved, tmp_path):
    path = written(train_config(shards, saved, batch=63), tmp_path / "config")
    run = two_ranks("-m", "glassbox_utils.cli", "train-sae", path)
    assert run.returncode != 0 and "Allowed with 2 ranks: a multiple of 2" in run.stderr


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_dead", [5, 40])
def test_the_auxiliary_loss_is_that_of_sae_lens(shards, compute, n_dead):
    from sae_lens.saes.sae import TrainStepInput

    config = train_config(shards)
    scaling = measure_scaling(read_shard(shard_path(shards, 0), HOOK).x)
    x, _, _ = next(training_batches(config, scaling))
    sae = build_sae(config, scaling)
    sae.cfg.aux_loss_coefficient = 0.25
    dead = torch.zeros(64, dtype=torch.bool)
    dead[torch.randperm(64, generator=torch.Generator().manual_seed(0))[:n_dead]] = True
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.5, 2, 64)[:, None]
        plain = topk_gradients(sae, x, compute)
        without = {name: p.grad.clone() for name, p in sae.named_parameters()}
        found = topk_gradients(sae, x, compute, gradients.Auxiliary(dead.nonzero()[:, 0], 0.25))
    assert torch.equal(found.error, plain.error)
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    sae.training_forward_pass(TrainStepInput(x, {}, dead, 0, False)).loss.backward()
    for name, parameter in sae.named_parameters():
        if name == "b_dec":  # sae_lens lets the encoder's centring learn from it too
            assert torch.equal(ours[name], without[name])
        else:
            assert not torch.equal(ours[name], without[name])
            torch.testing.assert_close(ours[name], parameter.grad, rtol=2e-3, atol=1e-3 * float(parameter.grad.std()))


def test_dead_features_come_back_by_the_auxiliary_loss(shards, tmp_path, monkeypatch):
    """Features that a bias keeps silent: with the loss they fire again, without it (or re-seeding) none does."""
    monkeypatch.setattr(training, "SILENT", 128)
    real = training.build_sae

    def silenced(*given):
        sae = real(*given)
        sae.b_enc.data[:20] = -6
        return sae

    monkeypatch.setattr(training, "build_sae", silenced)
    dead = {}
    for name, changes in {"without": {"reseed_every": 10**6}, "with": {"auxiliary": 1.0}}.items():
        config = train_config(shards, lr=0.1, decay=0.0, samples=64 * 160, **changes)
        train(config, tmp_path / name)
        dead[name] = float(history(tmp_path / name)[-1]["dead"])
    assert dead["without"] >= 20 > 16 > dead["with"]


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard"])
def test_a_frozen_decoder_stays_what_it_was(model, shards, tmp_path, architecture):
    config = train_config(shards, architecture=architecture, options=OPTIONS[architecture], frozen_decoder=True)
    scaling = measure_scaling(read_shard(shard_path(shards, 0), HOOK).x)
    before = build_sae(config, scaling)
    train(config, tmp_path, stop_after=25)
    sae = train(config, tmp_path)
    assert torch.equal(sae.W_dec, before.W_dec) and not torch.equal(sae.W_enc, before.W_enc)
    torch.testing.assert_close(before.W_dec.norm(dim=-1), torch.ones(64))
    explained = [float(row["explained_variance"]) for row in history(tmp_path)]
    assert explained[-1] > explained[0]
    export(config, tmp_path, tmp_path / "out", model)
    written = torch.nn.functional.normalize(result(load_sae(tmp_path / "out", model).W_dec), dim=-1)
    torch.testing.assert_close(written, result(before.W_dec), rtol=0, atol=1e-3)  # float16 on disk


def test_a_run_with_all_that_is_new_goes_on_to_the_same_bits(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SILENT", 256)
    changes = {"auxiliary": 0.1, "normalize": "constant_norm_rescale", "unit_rows": True}
    config = train_config(shards, options={"k": 4}, **changes)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", stop_after=27)
    train(config, tmp_path / "parts")
    whole, parts = (read_checkpoint(tmp_path / name).tensors for name in ("whole", "parts"))
    assert all(torch.equal(t, parts[n]) for n, t in whole.items())
    torch.testing.assert_close(parts["sae.W_dec"].norm(dim=-1), torch.ones(64))


@pytest.mark.parametrize("changes", [{"auxiliary": 0.1}, {"unit_rows": True}])
def test_what_only_topk_has_is_refused_for_others(changes):
    with pytest.raises(SaeError, match="Allowed with topk only"):
        train_config("x", architecture="standard", options={}, **changes)


def test_norms_that_are_divided_out_are_so_in_sae_lens_and_massive_positions_are_rebuilt(model, shards, tmp_path):
    """First tokens of sixty times the norm: an SAE that never met them fails there, one of directions does not."""
    from sae_lens import SAE

    (tmp_path / "massive").mkdir()
    for i in range(4):
        x, rows = read_shard(shard_path(shards, i), HOOK)
        x = x.clone()
        x[:, 0] *= 60
        save_file({HOOK: x, "tokens": rows.tokens, "documents": rows.documents}, shard_path(tmp_path / "massive", i))
    wrong = {}
    for normalize in ("mean_norm", "constant_norm_rescale"):
        config = train_config(tmp_path / "massive", normalize=normalize, samples=64 * 100)
        train(config, tmp_path / normalize)
        export(config, tmp_path / normalize, tmp_path / normalize / "out", model)
        plain = SAE.load_from_disk(tmp_path / normalize / "out", dtype="float32")
        assert plain.cfg.normalize_activations == ("none" if normalize == "mean_norm" else normalize)
        x = read_shard(shard_path(tmp_path / "massive", 1), HOOK).x.float()
        error = (plain(x) - x).norm(dim=-1) / x.norm(dim=-1)
        wrong[normalize] = float(error[:, 0].mean()), float(error[:, 1:].mean())
        ours = load_sae(tmp_path / normalize / "out", model)
        torch.testing.assert_close(result(ours(beside(x, model.device))), plain(x), rtol=1e-4, atol=1e-4)
    assert wrong["constant_norm_rescale"][0] < 0.2 < 0.3 < wrong["mean_norm"][0], wrong
    assert wrong["constant_norm_rescale"][1] < wrong["mean_norm"][1] + 0.1, wrong


def test_the_recipes_of_the_long_runs_are_read_and_share_the_harvest_of_a_layer():
    """They lie in data/saes without weights, which are nobody's SAE until they are trained."""
    names = ("long-8192-l14", "long-16384-l14", "long-8192-l19")
    runs = {name: read_config(configs.saes_folder() / name) for name in names}
    assert all(name == run.name and run.d_sae == int(name.split("-")[1]) for name, run in runs.items())
    folders = [run.harvest.folder for run in runs.values()]
    assert folders[0] == folders[1] != folders[2]
    assert not set("%: +*?") & set(folders[0].name.replace("-+-", "-"))
    for run in runs.values():
        assert 118e6 < run.samples < 122e6 and run.samples % run.batch == 0 and run.tokens == run.n_shards * 65_536
