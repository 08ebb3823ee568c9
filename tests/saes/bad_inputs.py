"""What people give to this room by mistake: a table of names and calls, each of which must be refused in words."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from shards import HOOK, harvest_config, train_config

from glassbox_utils.core import corpora
from glassbox_utils.core.models import Site
from glassbox_utils.saes import (
    absorption,
    clamping,
    config,
    dashboard,
    detection,
    features,
    harvest,
    learning,
    quality,
    store,
    training,
)

NAN, INF = float("nan"), float("inf")
SITE = Site("resid_post", 1)


@dataclass
class Kit:
    """What the calls work with: a tiny model, an SAE of it in memory and as a folder, shards, a scan."""

    model: Any
    sae: Any
    folder: Path
    """an SAE folder, a copy for each call"""
    shards: Path
    """a harvest, a copy for each call"""
    scanned: Any
    tmp: Path


def _config_file(text: str | bytes):
    def call(kit):
        path = kit.tmp / "config.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return config.read_config(path)

    return call


def _config(**changes):
    return lambda kit: train_config(kit.shards, **changes)


def _field(**changes):
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(train_config("x")).items()}
    return _config_file(json.dumps(plain | changes))


def _harvest(**changes):
    return lambda kit: harvest.harvest(harvest_config(kit.shards, **changes), kit.model)


def _clamp(strength=1.0, what=None, mode="clamp", scope="all"):
    def call(kit):
        one = clamping.feature(kit.model, kit.sae, 3, 1.0) if what is None else what
        with clamping.clamp(kit.model, one, strength, mode, scope):
            pass

    return call


def _damaged(name, content=None, call=lambda kit: store.load_sae(kit.folder, kit.model)):
    """A file of the SAE folder with other bytes; None: half of its own."""

    def function(kit):
        path = kit.folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
        return call(kit)

    return function


def _shard(name, content=None, call=lambda kit: training.train(train_config(kit.shards), kit.tmp / "work")):
    def function(kit):
        path = kit.shards / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
        return call(kit)

    return function


def _settings(**changes):
    def call(kit):
        path = kit.folder / "cfg.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return store.load_sae(kit.folder, kit.model)

    return call


def _filled(value):
    """Train on shards that hold one value everywhere."""

    def call(kit):
        for index in range(4):
            x = torch.full((8, 32, kit.model.d_model), value).bfloat16()
            rest = {name: torch.zeros(8, 32).int() for name in ("tokens", "documents")}
            save_file({HOOK: x, **rest}, harvest.shard_path(kit.shards, index))
        return training.train(train_config(kit.shards), kit.tmp / "work")

    return call


def _diverged(kit):
    def explode(sae, x, compute=None, auxiliary=None):
        sae.zero_grad()
        for p in sae.parameters():
            p.grad = torch.full_like(p, NAN)
        return training.StepResult(torch.tensor(NAN), torch.ones(sae.cfg.d_sae))

    real, training.topk_gradients = training.topk_gradients, explode
    try:
        return training.train(train_config(kit.shards), kit.tmp / "work")
    finally:
        training.topk_gradients = real


def _unwritable(kit):
    (kit.tmp / "file").write_text("")
    return harvest.harvest(harvest_config(kit.tmp / "file" / "acts"), kit.model)


def _checkpoint(content):
    def call(kit):
        (kit.tmp / "work").mkdir()
        store.checkpoint_path(kit.tmp / "work").write_bytes(content)
        return training.train(train_config(kit.shards), kit.tmp / "work")

    return call


def _measured(**changes):
    def call(kit):
        tokens = torch.zeros(1, 8, dtype=torch.long)
        given = {"tokens": tokens, "site": SITE, "median_norm": 5.0, "mean": torch.zeros(kit.model.d_model)} | changes
        return quality.evaluate_sae(kit.model, kit.sae, **given)

    return call


def _foreign(**metadata):
    """A loaded SAE with other metadata."""

    def call(kit):
        sae = store.load_sae(kit.folder)
        for name, value in metadata.items():
            setattr(sae.cfg.metadata, name, value)
        return detection.text_scores(kit.model, sae, ["The bridge."])

    return call


def _lessons(*arguments, **options):
    return lambda kit: learning.lessons(kit.model, *arguments, **options)


BOMB = "a: &a [x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in zip(
    "abcdefgh", "bcdefghi", strict=True)) + "name: *i\n"  # fmt: skip

CASES: list[tuple[str, Any]] = [
    # --- files of configurations
    ("config: no file", lambda kit: config.read_config(kit.tmp / "none.yaml")),
    ("config: a folder without one", lambda kit: config.read_config(kit.tmp)),
    ("config: empty", _config_file("")),
    ("config: binary", _config_file(bytes(range(256)))),
    ("config: a list", _config_file("- a\n- b\n")),
    ("config: a text", _config_file("topk")),
    ("config: broken", _config_file("name: [a\nhook: b")),
    ("config: object tags", _config_file("name: !!python/object/apply:os.system ['true']")),
    ("config: nested deeply", _config_file("[" * 20_000)),
    ("config: a bomb of aliases", _config_file(BOMB)),
    ("config: a field twice", _config_file("name: a\nname: b\n")),
    ("config: a list as a field", _config_file("? [a, b]\n: 3\n")),
    ("config: incomplete", _config_file("name: a\n")),
    ("config: unknown field", _field(widht=3)),
    ("config: a byte-order mark does not hide what is wrong", _config_file(b"\xef\xbb\xbfname: 3\n")),
    # --- their values
    ("misspelt option", _field(options={"kk": 3})),
    ("option of another architecture", _field(options={"k": 8, "l1_coefficient": 3.0})),
    ("k as text", _field(options={"k": "8"})),
    ("k of zero", _field(options={"k": 0})),
    ("k above d_sae", _field(options={"k": 65})),
    ("no k for a small SAE", _field(options={})),
    ("options a list", _field(options=["k"])),
    ("an option that is NaN", _config(architecture="standard", options={"l1_coefficient": NAN})),
    ("an option below zero", _config(architecture="jumprelu", options={"l0_coefficient": -1.0})),
    ("widths that fall", _config(architecture="matryoshka_batchtopk", options={"k": 8, "matryoshka_widths": [64, 16]})),
    ("lr 1e9", _field(lr=1e9)),
    ("lr NaN", _config(lr=NAN)),
    ("lr infinite", _config(lr=INF)),
    ("lr zero", _field(lr=0)),
    ("lr as text", _field(lr="1e-3")),
    ("lr true", _field(lr=True)),
    ("warmup below zero", _field(warmup=-1)),
    ("warmup with a fraction", _field(warmup=0.5)),
    ("decay above one", _field(decay=1.5)),
    ("context of one", _field(context=1)),
    ("tokens zero", _field(tokens=0)),
    ("tokens without end", _config(tokens=10**20)),
    ("samples below a batch", _field(samples=10)),
    ("d_sae zero", _field(d_sae=0)),
    ("d_sae without end", _field(d_sae=10**12)),
    ("batch above a block", _field(batch=500)),
    ("growth zero", _field(growth=[0])),
    ("growth above the shards", _field(growth=[9])),
    ("growth a number", _field(growth=3)),
    ("growth of a stream", _field(stream=True, growth=[2])),
    ("seed below zero", _field(seed=-1)),
    ("a name that leaves the folder", _field(name="../../x")),
    ("an empty name", _field(name="")),
    ("a hook that is none", _field(hook="blocks.1.hook_x")),
    ("a hook that is a number", _field(hook=3)),
    ("an architecture that is none", _field(architecture="relu")),
    ("a corpus that is none", _field(corpus="mixx")),
    ("no model", _field(model="")),
    ("stream as text", _field(stream="yes")),
    # --- harvest and shards
    ("no hooks", _harvest(hooks=())),
    ("a hook twice", _harvest(hooks=(HOOK, HOOK))),
    ("a layer that is not there", _harvest(hooks=("blocks.9.hook_resid_post",))),
    ("a context above the model's", _harvest(context=1000)),
    ("a split that is none", _harvest(split="test")),
    ("more tokens than the corpus has", _harvest(n_tokens=10**7)),
    ("another harvest's folder", _harvest(hooks=("blocks.0.hook_mlp_out",))),
    ("shards below a file", _unwritable),
    ("manifest cut short", _shard("manifest.json", None, _harvest())),
    ("manifest a list", _shard("manifest.json", b"[]", _harvest())),
    ("manifest binary", _shard("manifest.json", b"\xff\x00", _harvest())),
    ("training from a shard cut short", _shard("shard-00001.safetensors")),
    ("training from an empty shard", _shard("shard-00000.safetensors", b"")),
    ("training from no shards", lambda kit: training.train(train_config(kit.tmp / "none"), kit.tmp / "work")),
    ("training from too few shards", lambda kit: training.train(
        train_config(kit.shards, tokens=9 * 256), kit.tmp / "w")),
    ("training from a hook not harvested", lambda kit: training.train(
        train_config(kit.shards, hook="blocks.0.hook_mlp_out"), kit.tmp / "work")),
    ("activations of zero", _filled(0.0)),
    ("activations that are NaN", _filled(NAN)),
    ("activations all alike", _filled(1.0)),
    ("a training that diverges", _diverged),
    ("a checkpoint cut short", _checkpoint(b"half")),
    ("no checkpoint to export", lambda kit: training.export(train_config("x"), kit.tmp, kit.tmp / "out", kit.model)),
    # --- SAE folders
    ("no such SAE", lambda kit: store.load_sae("topk-2048")),
    ("an SAE without a name", lambda kit: store.load_sae("")),
    ("a folder that holds none", lambda kit: store.load_sae(kit.tmp)),
    ("weights cut short", _damaged("sae_weights.safetensors")),
    ("weights of nothing", _damaged("sae_weights.safetensors", b"")),
    ("cfg.json cut short", _damaged("cfg.json")),
    ("cfg.json a list", _damaged("cfg.json", b"[1, 2]")),
    ("cfg.json of another width", _settings(d_in=7)),
    ("cfg.json of another architecture", _settings(architecture="nothing")),
    ("cfg.json whitened", _settings(normalize_activations="covariance_whitening")),
    ("another model's hash", _settings(metadata={"hook_name": HOOK, "model_hash": "0" * 16})),
    ("a hook of another kind", _settings(metadata={"hook_name": "blocks.1.attn.hook_pattern"})),
    ("a transcoder's output", _settings(metadata={"hook_name": HOOK, "hook_name_out": "blocks.1.hook_mlp_out"})),
    ("no hook", _foreign(hook_name=None)),
    ("a median norm of zero", _foreign(median_norm=0)),
    ("a median norm that is NaN", _foreign(median_norm=NAN)),
    # --- features
    ("search here empty", lambda kit: detection.search(kit.model, kit.sae, [], ["a b"])),
    ("search there empty", lambda kit: detection.search(kit.model, kit.sae, ["a b"], [])),
    ("search with a text", lambda kit: detection.search(kit.model, kit.sae, "a b", ["a b"])),
    ("search with an empty text", lambda kit: detection.search(kit.model, kit.sae, [""], ["a b"])),
    ("search for none", lambda kit: detection.search(kit.model, kit.sae, ["a b"], ["b a"], 0)),
    ("scores of nothing", lambda kit: detection.text_scores(kit.model, kit.sae, [])),
    ("scores with no SAE", lambda kit: detection.text_scores(kit.model, None, ["a"])),
    ("batches of nothing", lambda kit: detection.text_scores(kit.model, kit.sae, ["a"], 0)),
    ("scores that are NaN", lambda kit: detection.separates(torch.full((2, 4), NAN), torch.ones(2, 4))),
    ("scores of two widths", lambda kit: detection.separates(torch.ones(2, 4), torch.ones(2, 5))),
    ("a detector of nothing", lambda kit: detection.choose_detector(torch.ones(0, 4), torch.ones(2, 4))),
    ("a threshold that is NaN", lambda kit: detection.detect(kit.model, kit.sae, 3, NAN, ["a"], ["b"])),
    ("a detector of no feature", lambda kit: detection.detect(kit.model, kit.sae, -1, 1.0, ["a"], ["b"])),
    *((f"firing of feature {wrong!r}", lambda kit, wrong=wrong: features.firing(kit.scanned, wrong))
      for wrong in (-1, 64, True, 1.0, "3", None)),
    *((f"effect of feature {wrong!r}", lambda kit, wrong=wrong: features.logit_effect(kit.model, kit.sae, wrong))
      for wrong in (-1, 64, True, 1.5)),
    ("neighbours of none", lambda kit: features.neighbours(kit.sae, 64)),
    ("examples of none", lambda kit: features.examples(kit.model, kit.scanned, 3, n=0)),
    ("a scan of nothing", lambda kit: features.scan(kit.model, kit.sae, corpora.Rows(torch.zeros(0, 4).long(),
                                                    torch.zeros(0, 4).long()), [])),
    ("a scan of other documents", lambda kit: features.scan(kit.model, kit.sae, kit.scanned.rows, [])),
    ("a dashboard of none", lambda kit: dashboard.dashboard(kit.model, kit.sae, kit.scanned, 64)),
    ("dashboards, the last of none", lambda kit: dashboard.write_dashboards(
        kit.model, kit.sae, kit.scanned, [1, 64], kit.tmp / "pages")),
    ("a dashboard of another scan", lambda kit: dashboard.dashboard(
        kit.model, kit.sae, replace(kit.scanned, starts=kit.scanned.starts[:-3]), 1)),
    # --- quality
    ("measured elsewhere", _measured(site=Site("resid_pre", 1))),
    ("measured on nothing", _measured(tokens=torch.zeros(0, 8).long())),
    ("measured with a norm that is NaN", _measured(median_norm=NAN)),
    ("measured with another mean", _measured(mean=torch.zeros(3))),
    ("measured with no rows", _measured(ce_rows=0)),
    ("a baseline of k 0", lambda kit: quality.baselines(torch.randn(9, 4), 0, 8)),
    ("a baseline of NaN", lambda kit: quality.baselines(torch.full((9, 4), NAN), 2, 8)),
    ("letters elsewhere", lambda kit: absorption.first_letter_test(kit.sae, absorption.Words(
        *[torch.zeros(2, 2)] * 5, Site("resid_pre", 0)))),
    # --- clamping and learning
    *((f"a feature {wrong!r}", lambda kit, wrong=wrong: clamping.feature(kit.model, kit.sae, wrong, 1.0))
      for wrong in (-1, 64, True, 1.0, "bridge")),
    *((f"a unit {wrong!r}", lambda kit, wrong=wrong: clamping.feature(kit.model, kit.sae, 3, wrong))
      for wrong in (0, -1.0, NAN, INF, True, "1")),
    *((f"a strength {wrong!r}", _clamp(wrong)) for wrong in (0, NAN, INF, True, "2", 1e38, [])),
    ("a mode that is none", _clamp(mode="hold")),
    ("a scope that is none", _clamp(scope="answers")),
    ("clamping nothing", _clamp(what=[])),
    ("clamping an empty group", _clamp(what=clamping.Group(()))),
    ("clamping a text", _clamp(what="bridge")),
    ("clamping a group of texts", _clamp(what=clamping.Group(("bridge",)))),
    ("a feature built by hand", lambda kit: _clamp(what=clamping.Feature(kit.sae, 64, 1.0))(kit)),
    ("a unit built by hand", lambda kit: _clamp(what=clamping.Feature(kit.sae, 3, NAN))(kit)),
    ("maxima of nothing", lambda kit: clamping.natural_maxima(kit.model, kit.sae, [])),
    ("last codes of nothing", lambda kit: clamping.last_codes(kit.model, kit.sae, [])),
    ("a name of no words", lambda kit: clamping.mentions(["a"], [])),
    ("a name without texts", lambda kit: clamping.name_group(
        kit.model, kit.sae, torch.zeros(0, 64), torch.ones(1, 64), 3)),
    ("a stream of nothing", lambda kit: next(clamping.stream(
        kit.model, ["a"], clamping.feature(kit.model, kit.sae, 3, 1.0), 1.0, 0))),
    ("lessons of nothing", _lessons(1, [], [])),
    ("lessons without answers", _lessons(1, ["a"], [])),
    ("lessons at no layer", _lessons(9, ["a"], ["b"])),
    ("learning from nothing", lambda kit: learning.learn_group(kit.model, kit.sae, [])),
    ("learning elsewhere", lambda kit: learning.learn_group(
        kit.model, kit.sae, learning.lessons(kit.model, 0, ["a b"], [" c d"]))),
    # --- text
    ("a corpus that is a number", lambda kit: corpora.load_corpus(3)),
    ("a limit below zero", lambda kit: corpora.load_corpus("landmarks", limit=-1)),
    ("rows of BOS only", lambda kit: corpora.token_rows(kit.model, [], 3, 1)),
    ("no rows", lambda kit: corpora.token_rows(kit.model, [], 0, 16)),
    ("rows of nothing", lambda kit: corpora.token_rows(kit.model, [], 3, 16)),
]  # fmt: skip
