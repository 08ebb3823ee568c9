"""Sparse autoencoders: harvest activations, train with sae_lens's classes, evaluate, load and save.

The classes and the file format are sae_lens's, so that ``SAE.load_from_disk`` opens everywhere what is trained
here. The activation stream, the loop and the history are our own: exactly resumable, without a tracking service,
and sparse where the arithmetic is sparse.

Two exclusions hold for training and for every metric, unless a name says otherwise. The first token of a row and a
few *outlier* positions (some punctuation, some role markers) have residual norms tens of times the median
(Sun et al., "Massive activations", arXiv 2402.17762); one of them outweighs hundreds of ordinary tokens in any
squared error. Positions with more than ``OUTLIER`` times the median norm are therefore left out, and every
explained variance is reported with them as well.
"""

import copy
import csv
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from glassbox_utils import GlassboxError, assets, corpora
from glassbox_utils.attribution import resume
from glassbox_utils.corpora import Rows
from glassbox_utils.interventions import edit, recording
from glassbox_utils.models import (
    EMBEDDED,
    KINDS,
    Model,
    Site,
    check_site,
    first_token,
    load_model,
    progress,
    wrap_model,
)
from glassbox_utils.speed import fast_dtype, quick

OUTLIER = 3.0
"""times the median norm: residual norms of ordinary tokens stay within a factor of two"""

SAES = Path(__file__).parents[1] / "data" / "saes"

_HOOKS = {"resid_pre": "hook_resid_pre", "resid_post": "hook_resid_post", "z": "attn.hook_z"} | {
    kind: f"hook_{kind}" for kind in ("attn_out", "mlp_out")
}


class SaeError(GlassboxError, ValueError):
    """A hook, shard folder, configuration or SAE that does not fit; the message says what does."""


def hook_of(site: Site) -> str:
    """TransformerLens's name of a site: ``Site("resid_post", 14)`` -> ``blocks.14.hook_resid_post``."""
    return f"blocks.{site.layer}.{_HOOKS[site.kind]}"


def site_of(hook: str) -> Site:
    """The site of a TransformerLens hook name; SaeError lists the allowed ones."""
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", hook):
        for kind in KINDS:
            if _HOOKS[kind] == match[2]:
                return Site(kind, int(match[1]))
    raise SaeError(f"There is no hook {hook!r}. Allowed: " + ", ".join(f"blocks.L.{h}" for h in _HOOKS.values()) + ".")


# --- harvest ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HarvestConfig:
    """What to harvest, and into which folder."""

    folder: Path
    hooks: tuple[str, ...]
    n_tokens: int
    corpus: str = "mix"
    split: corpora.Split = "train"
    model: str = EMBEDDED
    context: int = 256
    rows_per_shard: int = 256
    """65,536 tokens with the default context: 75 MB for each hook at d_model 576"""
    rows_per_batch: int = 16


class _Stop(Exception):
    """Ends a forward pass after the last layer that is needed."""


def shuffled(model: Model, seed: int = 0) -> Model:
    """The same architecture with the entries of every weight matrix permuted: norms stay, what was learnt goes.

    A baseline after Heap et al., arXiv 2501.17727: what an SAE finds here, it does not owe to the model's training.
    """
    generator = torch.Generator().manual_seed(seed)
    net = copy.deepcopy(model.hf)
    with torch.no_grad():
        for parameter in net.parameters():  # tied matrices are listed once
            if parameter.ndim == 2:
                mixed = parameter.flatten()[torch.randperm(parameter.numel(), generator=generator)]
                parameter.copy_(mixed.view_as(parameter))
    return wrap_model(net, model.tokenizer, f"{model.name} (shuffled)")


@torch.inference_mode()
def activations(
    model: Model, tokens: Int[Tensor, "row pos"], sites: Sequence[Site], mask: Int[Tensor, "row pos"] | None = None
) -> dict[Site, Float[Tensor, "row pos width"]]:
    """Activations from a forward pass that stops after the last needed module; ``mask`` if rows are padded."""
    checked = [check_site(model, site) for site in sites]
    last = model.sites[max(checked, key=lambda s: (s.layer, s.kind == "resid_post"))][0]

    def stop(*_: Any) -> None:
        raise _Stop

    with recording(model, checked) as store:
        handle = last.register_forward_hook(stop)
        try:
            model.hf(input_ids=tokens.to(model.device), attention_mask=mask, use_cache=False, logits_to_keep=1)
        except _Stop:
            pass
        finally:
            handle.remove()
    return store


def stream_activations(
    model: Model, rows: Iterator[Rows], sites: Sequence[Site], rows_per_batch: int = 16
) -> Iterator[tuple[Rows, dict[Site, Float[Tensor, "row pos width"]]]]:
    """Activations of packed rows, batch by batch, that are never written to disk."""
    while batch := [row for _, row in zip(range(rows_per_batch), rows, strict=False)]:
        joined = Rows(torch.cat([r.tokens for r in batch]), torch.cat([r.documents for r in batch]))
        yield joined, activations(model, joined.tokens, sites)


def harvest(config: HarvestConfig, model: Model | None = None) -> Path:
    """Run the model over a corpus and keep activations as bfloat16 shards; returns the folder.

    Each shard is written beside its name and renamed, holds the same rows in every run, and is skipped if it is
    there: after a kill at any point the same call continues, and the result is bit-identical (on one machine with
    one number of threads). Asking for more tokens later extends the folder. An incomplete last shard is dropped.
    Raises SaeError if the folder was made with another model, corpus, hook or packing.
    """
    model = model or load_model(config.model)
    documents = corpora.load_corpus(config.corpus, config.split)
    manifest = {
        "model": model.name,
        "model_hash": model.hash,
        "hooks": list(config.hooks),
        "dtype": "bfloat16",
        "corpus": config.corpus,
        "split": config.split,
        "corpus_hash": corpora.corpus_hash(documents),
        "context": config.context,
        "rows_per_shard": config.rows_per_shard,
        "rows_per_batch": config.rows_per_batch,
        "d_model": model.d_model,
    }
    folder = Path(config.folder)
    n_shards = max(1, config.n_tokens // (config.context * config.rows_per_shard))
    sites = [check_site(model, site_of(hook)) for hook in config.hooks]
    with assets.explain_os_errors(folder), assets.locked(folder / "harvest"):
        compute = _agree(folder, manifest)
        small = quick(model, getattr(torch, compute))
        rows = corpora.pack(model, documents, config.context)
        for index in progress(range(n_shards), "harvest"):
            mine = [row for _, row in zip(range(config.rows_per_shard), rows, strict=False)]
            if len(mine) < config.rows_per_shard:
                break
            path = shard_path(folder, index)
            if path.exists():
                continue
            parts = list(stream_activations(small, iter(mine), sites, config.rows_per_batch))
            tensors = {
                hook: torch.cat([a[site].bfloat16() for _, a in parts])
                for hook, site in zip(config.hooks, sites, strict=True)
            }
            tensors["tokens"] = torch.cat([r.tokens for r, _ in parts]).int()
            tensors["documents"] = torch.cat([r.documents for r, _ in parts]).int()
            with assets.atomic_path(path) as partial:
                save_file(tensors, partial)
    return folder


def _agree(folder: Path, manifest: dict[str, Any]) -> str:
    """Write the manifest of a new folder, or insist that the old one says the same; the type that it computes in.

    The type is this machine's fastest when a folder is begun, and stays what it was when one is continued.
    """
    path = folder / "manifest.json"
    if not path.exists():
        compute = str(fast_dtype()).removeprefix("torch.")
        with assets.atomic_path(path) as partial:
            partial.write_text(json.dumps(manifest | {"compute": compute}, indent=1))
        return compute
    old = json.loads(path.read_text())
    different = [f"{k} is {old.get(k)!r}, asked for {v!r}" for k, v in manifest.items() if old.get(k) != v]
    if different:
        raise SaeError(f"{folder} holds another harvest: {'; '.join(different)}. Choose another folder or delete it.")
    return old.get("compute", "bfloat16")


def shard_path(folder: Path, index: int) -> Path:
    return Path(folder) / f"shard-{index:05d}.safetensors"


def shards(folder: Path) -> list[Path]:
    """The finished shards of a harvest, in order."""
    return sorted(Path(folder).glob("shard-*.safetensors"))


class Shard(NamedTuple):
    """One shard: activations, and which token of which document each belongs to."""

    x: Float[Tensor, "row pos d_model"]
    rows: Rows


def read_shard(path: Path, hook: str) -> Shard:
    """Read one shard; SaeError lists the hooks that it holds."""
    with safe_open(path, "pt") as file:
        if hook not in file.keys():  # noqa: SIM118 (not a dict)
            held = sorted(set(file.keys()) - {"tokens", "documents"})
            raise SaeError(f"{path} has no hook {hook!r}. It holds {', '.join(held)}.")
        return Shard(file.get_tensor(hook), Rows(file.get_tensor("tokens"), file.get_tensor("documents")))


# --- training -----------------------------------------------------------------------------------------

ARCHITECTURES = ("topk", "batchtopk", "standard", "jumprelu", "gated", "matryoshka_batchtopk")


@dataclass(frozen=True)
class TrainConfig:
    """One training run, as written in a ``config.yaml``."""

    name: str
    hook: str
    architecture: str
    d_sae: int
    samples: int
    """activations seen in all, repeats included"""
    tokens: int
    """tokens to harvest; they become whole shards"""
    options: dict[str, Any] = field(default_factory=dict)
    """further arguments of sae_lens's training configuration: k, l1_coefficient, l0_coefficient, ..."""
    shards: str = ""
    """folder of the harvest; empty: in the cache"""
    growth: tuple[int, ...] = ()
    """how many shards the first passes read (later ones read all), so that training can begin during the harvest"""
    corpus: str = "mix"
    model: str = EMBEDDED
    context: int = 256
    rows_per_shard: int = 256
    shards_mixed: int = 4
    """shards that are read and shuffled together"""
    batch: int = 2048
    lr: float = 8e-4
    warmup: int = 100
    """steps"""
    decay: float = 0.3
    """fraction of the steps over which the learning rate falls to zero at the end"""
    reseed_every: int = 500
    """steps between re-seedings of dead features (TopK only)"""
    checkpoint_every: int = 100
    """steps"""
    seed: int = 0
    unit_rows: bool = False
    """TopK only: decoder rows of unit length and gradients as they are, as the shipped ones were trained, instead of
    learning the rows' norms as gains and clipping gradients, which learns faster in the first hundreds of steps"""
    shuffle_weights: bool = False
    """train on the same architecture with its weights permuted: a baseline (``shuffled``)"""

    @property
    def steps(self) -> int:
        return self.samples // self.batch

    @property
    def n_shards(self) -> int:
        return max(1, self.tokens // (self.context * self.rows_per_shard))

    @property
    def harvest(self) -> HarvestConfig:
        weights = "-shuffled" if self.shuffle_weights else ""
        name = f"{self.model}{weights}-{self.corpus}-{self.hook}-{self.context}x{self.rows_per_shard}"
        name = name.replace("/", "--")
        folder = Path(self.shards) if self.shards else assets.cache_dir() / "activations" / name
        shard = {"context": self.context, "rows_per_shard": self.rows_per_shard}
        return HarvestConfig(folder, (self.hook,), self.tokens, self.corpus, "train", self.model, **shard)


def read_config(path: str | Path) -> TrainConfig:
    """A ``config.yaml``; SaeError names unknown keys and what is missing."""
    path = Path(path) / "config.yaml" if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise SaeError(f"There is no file {path}. Give the config.yaml of a folder in data/saes.")
    values = yaml.safe_load(path.read_text())
    allowed = [f.name for f in fields(TrainConfig)]
    if unknown := sorted(set(values) - set(allowed)):
        raise SaeError(f"{path} has unknown keys {', '.join(unknown)}. Allowed: {', '.join(allowed)}.")
    try:
        config = TrainConfig(**values | {"growth": tuple(values.get("growth", ()))})
    except TypeError as error:
        raise SaeError(f"{path} is incomplete: {error}.") from error
    if config.architecture not in ARCHITECTURES:
        raise SaeError(f"There is no architecture {config.architecture!r}. Allowed: {', '.join(ARCHITECTURES)}.")
    return config


class Scaling(NamedTuple):
    """What the first shard says about the activations; used for all of a training run."""

    median_norm: float
    scale: float
    """activations times this have a mean norm of sqrt(d_model)"""
    mean: Float[Tensor, " d_model"]


def ordinary(x: Float[Tensor, "row pos d_model"], median_norm: float) -> Float[Tensor, "row pos"]:
    """Boolean: neither the first token of its row nor an outlier (norm above OUTLIER times the median)."""
    keep = x.float().norm(dim=-1) <= OUTLIER * median_norm
    keep[:, 0] = False
    return keep


def measure_scaling(x: Float[Tensor, "row pos d_model"]) -> Scaling:
    """Median norm, scale and mean of the ordinary positions of some rows."""
    median = float(x[:, 1:].float().norm(dim=-1).median())
    kept = x[ordinary(x, median)].float()
    return Scaling(median, kept.shape[-1] ** 0.5 / float(kept.norm(dim=-1).mean()), kept.mean(0))


def reading_order(config: TrainConfig) -> Iterator[int]:
    """Shard numbers without end: the first pass in order, each later one permuted anew."""
    for number in itertools.count():
        size = config.growth[number] if number < len(config.growth) else config.n_shards
        generator = torch.Generator().manual_seed(config.seed * 10_007 + number)
        yield from torch.randperm(size, generator=generator).tolist() if number else range(size)


def training_batches(
    config: TrainConfig, scaling: Scaling, block: int = 0, offset: int = 0
) -> Iterator[tuple[Float[Tensor, "batch d_model"], int, int]]:
    """Scaled, shuffled batches, each with the (block, offset) to continue from after it.

    A block is ``shards_mixed`` shards whose ordinary positions are shuffled together; documents were shuffled before
    the harvest, and later passes combine other shards. Waits for shards that a running harvest has yet to write.
    """
    folder = config.harvest.folder
    order = reading_order(config)
    blocks = iter(lambda: [next(order) for _ in range(config.shards_mixed)], None)
    for number, chosen in enumerate(itertools.islice(blocks, block, None), start=block):
        parts = [read_shard(_wait(shard_path(folder, i)), config.hook).x for i in chosen]
        x = torch.cat([part[ordinary(part, scaling.median_norm)] for part in parts])
        generator = torch.Generator().manual_seed(config.seed * 10_007 + number)
        shuffled = torch.randperm(len(x), generator=generator)
        last = len(x) // config.batch
        for index in range(offset, last):
            rows = shuffled[index * config.batch : (index + 1) * config.batch]
            after = (number, index + 1) if index + 1 < last else (number + 1, 0)
            yield x[rows].float() * scaling.scale, *after
        offset = 0


def _wait(path: Path, patience: float = 1800) -> Path:
    """The path, as soon as the file is there; SaeError after ``patience`` seconds."""
    start = time.monotonic()
    while not path.exists():
        if time.monotonic() - start > patience:
            raise SaeError(f"{path} did not appear within {patience / 60:.0f} minutes. Is the harvest still running?")
        time.sleep(2)
    return path


def build_sae(config: TrainConfig, scaling: Scaling) -> Any:
    """A fresh sae_lens training SAE: decoder rows of unit length, tied encoder, decoder bias at the mean."""
    from sae_lens.saes.sae import TrainingSAEConfig

    values = {"apply_b_dec_to_input": True, "decoder_init_norm": 1.0} | config.options
    values |= {"architecture": config.architecture, "d_in": len(scaling.mean), "d_sae": config.d_sae}
    torch.manual_seed(config.seed)
    cfg = TrainingSAEConfig.from_dict(values)
    from sae_lens.registry import get_sae_training_class

    sae = get_sae_training_class(config.architecture)[0](cfg)
    sae.b_dec.data = scaling.mean * scaling.scale
    # One feature's encoder weights side by side, as the sparse gradients arrive; the shape stays sae_lens's.
    sae.W_enc.data = sae.W_enc.data.t().contiguous().t()
    return sae


class StepResult(NamedTuple):
    """What one step says about itself."""

    error: float
    """mean squared error summed over dimensions, in scaled units"""
    fired: Float[Tensor, " d_sae"]
    """how often each feature was active in the batch"""


def topk_gradients(sae: Any, x: Float[Tensor, "batch d_model"], compute: torch.dtype = torch.bfloat16) -> StepResult:
    """Loss and gradients of sae_lens's TopK SAE, written into ``.grad``.

    The same mathematics as sae_lens's TopK loss (mean over the batch of the squared error; decoder rows of any length,
    which scale what the encoder sees and not what is decoded), but only the encoder's forward product is dense. With
    k of d_sae features active, the reconstruction is a weighted bag of k decoder rows, and both weight gradients are
    bags of batch rows, grouped by feature. The dense product runs in ``compute``; if that is not float32 it only
    nominates half as many features again, whose values are then computed in float32 before the k are chosen.
    """
    k, batch = sae.cfg.k, len(x)
    norm = sae.W_dec.norm(dim=-1)
    unit = sae.W_dec / norm[:, None]
    centred = x - sae.b_dec
    rows = sae.W_enc.t()
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward  # the dot products of bags with their rows
    hidden = F.linear(centred.to(compute), rows.to(compute), sae.b_enc.to(compute)) * norm.to(compute)
    if compute == torch.float32:
        values, chosen = hidden.topk(k, dim=-1, sorted=False)
    else:
        some = min(k + k // 2, sae.cfg.d_sae)
        nominated = hidden.topk(some, dim=-1, sorted=False).indices
        flat, owner = nominated.flatten(), torch.arange(batch).repeat_interleave(some)
        exact = backward(centred, rows.contiguous(), flat, torch.arange(0, batch * some, some), owner, 0)
        exact = ((exact + sae.b_enc[flat]) * norm[flat]).view(batch, some)
        values, best = exact.topk(k, dim=-1, sorted=False)
        chosen = nominated.gather(1, best)
    values = values.relu()
    flat = chosen.flatten()
    offsets = torch.arange(0, batch * k, k)
    error = F.embedding_bag(flat, unit, offsets, mode="sum", per_sample_weights=values.flatten())
    error += sae.b_dec - x
    loss = float(error.square().sum(-1).mean())

    error *= 2 / batch
    owner = torch.arange(batch).repeat_interleave(k)
    to_value = backward(error, unit, flat, offsets, owner, 0) * (values.flatten() > 0)
    # A stable radix sort of small integers is ten times faster in numpy than in torch.
    small = flat.numpy().astype(np.uint16 if sae.cfg.d_sae < 2**16 else np.uint32)
    order = torch.from_numpy(np.argsort(small, kind="stable"))
    counts = torch.bincount(flat, minlength=sae.cfg.d_sae)
    starts, grouped = counts.cumsum(0) - counts, owner[order]

    def gather(source: Tensor, weights: Tensor) -> Tensor:
        return F.embedding_bag(grouped, source, starts, mode="sum", per_sample_weights=weights[order])

    # A row's direction is what is decoded, its length a gain on the value: the gradient has a part for each.
    turn = gather(error, values.flatten())
    gain = torch.zeros_like(norm).index_add_(0, flat, to_value * values.flatten())
    turn -= (turn * unit).sum(-1, keepdim=True) * unit
    sae.W_dec.grad = (turn + gain[:, None] * unit) / norm[:, None]
    to_hidden = to_value * norm[flat]
    sae.W_enc.grad = gather(centred, to_hidden).t()
    sae.b_enc.grad = torch.zeros_like(sae.b_enc).index_add_(0, flat, to_hidden)
    sae.b_dec.grad = error.sum(0) - sae.W_enc @ sae.b_enc.grad
    active = torch.zeros(sae.cfg.d_sae).index_add_(0, flat, (values.flatten() > 0).float())
    return StepResult(loss, active)


def library_gradients(
    sae: Any, x: Float[Tensor, "batch d_model"], step: int, dead: Tensor, compute: torch.dtype = torch.bfloat16
) -> StepResult:
    """Loss and gradients of any sae_lens architecture: its own forward pass, with autocast if ``compute`` is half."""
    from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput

    coefficients = {}
    for name, value in sae.get_coefficients().items():
        full, warm = (value.value, value.warm_up_steps) if isinstance(value, TrainCoefficientConfig) else (value, 0)
        coefficients[name] = full * min(1.0, (step + 1) / warm) if warm else full
    with torch.enable_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=compute == torch.bfloat16):
        out = sae.training_forward_pass(TrainStepInput(x, coefficients, dead, step, False))
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    error = float((out.sae_out.float() - x).square().sum(-1).mean())
    return StepResult(error, (out.feature_acts > 0).sum(0).float())


@torch.no_grad()
def train(config: TrainConfig, folder: Path, stop_after: int | None = None) -> Any:
    """Train one SAE on harvested shards; returns the sae_lens training SAE in scaled units.

    ``folder`` gets ``checkpoint.pt`` (weights, optimiser, place in the data, random state, history), from which the
    same call continues to the same bits, and ``history.csv``. Only ``samples`` and ``decay`` may differ from the
    checkpoint's configuration. ``stop_after``: steps after which to stop early, for tests.
    """
    first = read_shard(_wait(shard_path(config.harvest.folder, 0)), config.hook).x
    scaling = measure_scaling(first)
    variance = float((first[ordinary(first, scaling.median_norm)].float() - scaling.mean).square().sum(-1).mean())
    variance *= scaling.scale**2
    sae = build_sae(config, scaling)
    fast = config.architecture == "topk"
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr, betas=(0.9, 0.999), fused=True)
    state: dict[str, Any] = {"step": 0, "block": 0, "offset": 0, "seconds": 0.0, "history": []}
    state["compute"] = fast_dtype()  # a continued run keeps the type that it began with
    silent = torch.zeros(config.d_sae)
    checkpoint = Path(folder) / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        _same_run(config, saved["config"], checkpoint)
        for name, tensor in saved["sae"].items():  # in place: keeps the encoder's memory layout
            sae.state_dict()[name].copy_(tensor)
        optimizer.load_state_dict(saved["optimizer"])
        silent, state = saved["silent"], {"compute": torch.bfloat16} | saved["state"]
        torch.set_rng_state(saved["rng"])
    data = training_batches(config, scaling, state["block"], state["offset"])
    end = min(config.steps, stop_after or config.steps)
    started, done = time.perf_counter(), state["seconds"]
    window: list[tuple[float, float]] = []
    for step in progress(range(state["step"], end), f"train {config.name}"):
        x, state["block"], state["offset"] = next(data)
        rate = _learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if fast:
            result = topk_gradients(sae, x, state["compute"])
        else:
            result = library_gradients(sae, x, step, silent > 500_000, state["compute"])
        if fast and config.unit_rows:
            sae.W_dec.grad -= (sae.W_dec.grad * sae.W_dec).sum(-1, keepdim=True) * sae.W_dec
        elif fast:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if fast and config.unit_rows:
            sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True)
        silent += config.batch
        silent[result.fired > 0] = 0
        if fast and (step + 1) % config.reseed_every == 0 and step < 0.6 * config.steps:
            _reseed(sae, optimizer, x, silent, seed=config.seed + step)
        window.append((result.error, float(result.fired.sum()) / config.batch))
        state["step"], state["seconds"] = step + 1, done + time.perf_counter() - started
        if (step + 1) % 20 == 0 or step + 1 == end:
            error, l0 = (sum(v) / len(window) for v in zip(*window, strict=True))
            window.clear()
            row = {"step": step + 1, "samples": (step + 1) * config.batch, "explained_variance": 1 - error / variance}
            row |= {"l0": l0, "dead": int((silent > 500_000).sum()), "lr": rate, "seconds": state["seconds"]}
            state["history"].append(row)
        if (step + 1) % config.checkpoint_every == 0 or step + 1 == end:
            parts = {"config": asdict(config), "sae": sae.state_dict(), "optimizer": optimizer.state_dict()}
            parts |= {"silent": silent, "state": state, "rng": torch.get_rng_state(), "scaling": scaling._asdict()}
            with assets.explain_os_errors(checkpoint), assets.atomic_path(checkpoint) as partial:
                torch.save(parts, partial)
            _write_history(Path(folder) / "history.csv", state["history"])
    return sae


def _same_run(config: TrainConfig, saved: dict[str, Any], path: Path) -> None:
    free = {"samples", "decay", "checkpoint_every"}
    default = {f.name: f.default for f in fields(TrainConfig)}  # a setting that an older checkpoint did not know yet
    saved = default | saved
    different = [
        f"{k}: {saved[k]!r} there, {v!r} asked for"
        for k, v in asdict(config).items()
        if saved[k] != v and k not in free
    ]
    if different:
        raise SaeError(f"{path} belongs to another run ({'; '.join(different)}). Delete it or choose another folder.")


def _learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, plateau, linear decay to zero."""
    left = (config.steps - step) / max(1.0, config.decay * config.steps)
    return config.lr * min(1.0, (step + 1) / config.warmup, left)


def _reseed(sae: Any, optimizer: Any, x: Tensor, silent: Tensor, seed: int) -> None:
    """Point dead features at badly reconstructed samples of this batch (after Bricken et al. 2023)."""
    dead = torch.where(silent > 500_000)[0][: len(x)]
    if not len(dead):
        return
    errors = x - sae.decode(sae.encode(x))
    chance = errors.square().sum(-1)
    chosen = torch.multinomial(chance, len(dead), generator=torch.Generator().manual_seed(seed))
    directions = F.normalize(errors[chosen], dim=-1)
    sae.W_dec[dead] = directions
    sae.W_enc.t()[dead] = directions
    sae.b_enc[dead] = 0
    silent[dead] = 0
    for parameter, index in ((sae.W_dec, 0), (sae.W_enc, 1), (sae.b_enc, 0)):
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][name].index_fill_(index, dead, 0)


def _write_history(path: Path, history: list[dict[str, float]]) -> None:
    with assets.atomic_path(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, history[0] if history else [])
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in history)


# --- saving and loading -------------------------------------------------------------------------------


def save_sae(config: TrainConfig, sae: Any, scaling: Scaling, folder: Path, model: Model) -> None:
    """Write the SAE in sae_lens format, float16, for activations in the model's own units.

    The metadata hold what is needed to use it rightly: the hook, the model's hash, the context and the first token.
    """
    folder = Path(folder)
    final = copy.deepcopy(sae)
    final.fold_activation_norm_scaling_factor(scaling.scale)
    final.W_enc.data = final.W_enc.data.contiguous()  # the file format knows no other layout
    final.cfg.metadata.model_name = config.model
    final.cfg.metadata.model_hash = model.hash
    final.cfg.metadata.hook_name = config.hook
    final.cfg.metadata.context_size = config.context
    final.cfg.metadata.prepend_bos = first_token(model) is not None
    final.cfg.metadata.median_norm = scaling.median_norm
    final.cfg.metadata.excluded = f"first token; residual norm above {OUTLIER} times the median"
    final.cfg.metadata.corpus = config.corpus
    weights, settings = final.save_inference_model(folder)
    with safe_open(weights, "pt") as file:
        tensors = {name: file.get_tensor(name).half().contiguous() for name in file.keys()}  # noqa: SIM118
    values = json.loads(Path(settings).read_text()) | {"dtype": "float16", "device": "cpu"}
    with assets.atomic_path(Path(weights)) as partial:
        save_file(tensors, partial)
    with assets.atomic_path(Path(settings)) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n")


def shipped() -> list[str]:
    """Names of the SAEs in data/saes."""
    return sorted(path.parent.name for path in SAES.glob("*/cfg.json"))


def load_sae(name_or_path: str | Path, model: Model | None = None) -> Any:
    """A shipped SAE by name, or any folder in sae_lens format, in float32.

    With a model given, raises SaeError if the SAE was trained on other weights (by hash) or another width.
    """
    path = Path(name_or_path) if Path(name_or_path).exists() else SAES / str(name_or_path)
    if not (path / "cfg.json").exists():
        near = get_close_matches(str(name_or_path), shipped(), n=2, cutoff=0.3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise SaeError(
            f"There is no SAE {str(name_or_path)!r}.{hint} Shipped: {', '.join(shipped()) or 'none'}; or give a folder "
            "that holds cfg.json and sae_weights.safetensors."
        )
    from sae_lens import SAE

    sae = SAE.load_from_disk(path, dtype="float32")
    sae.eval()
    trained_on = sae.cfg.metadata.get("model_hash")
    if model is not None and trained_on is not None and trained_on != model.hash:
        raise SaeError(
            f"The SAE {path.name} was trained on {sae.cfg.metadata.model_name} with hash {trained_on}, this model is "
            f"{model.name} with {model.hash}. Load the model that the card names, or train an SAE for this one."
        )
    if model is not None and sae.cfg.d_in != model.d_model:
        raise SaeError(f"The SAE {path.name} reads {sae.cfg.d_in} dimensions, {model.name} has {model.d_model}.")
    return sae


# --- evaluation ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SaeReport:
    """Quality of an SAE (or of a baseline) on held-out text. Cross-entropies are in nats per token."""

    l0: float
    explained_variance: float
    """first token and outliers left out"""
    explained_variance_all: float
    """every position; a few positions of huge norm dominate it"""
    relative_norm: float
    """norm of the reconstruction over the norm of the activation, both about the mean: below 1 is shrinkage"""
    dead: float
    """fraction of features that never fired on n_tokens"""
    density: Float[Tensor, " d_sae"]
    """fraction of tokens on which each feature fires"""
    n_tokens: int
    ce: float
    ce_spliced: float
    ce_mean: float
    ce_zero: float
    kl: float
    """from the unchanged model's next-token distribution to the spliced one's"""
    ce_spliced_all: float
    """first token and outliers replaced too"""
    n_ce_tokens: int

    @property
    def recovered_mean(self) -> float:
        """Share of the loss by mean ablation that splicing avoids: 1 is perfect, 0 no better than the mean."""
        return (self.ce_mean - self.ce_spliced) / (self.ce_mean - self.ce)

    @property
    def recovered_zero(self) -> float:
        """The same against zero ablation, which is far off any activation and therefore flatters."""
        return (self.ce_zero - self.ce_spliced) / (self.ce_zero - self.ce)

    @property
    def numbers(self) -> dict[str, float]:
        """All scalar metrics, for cards and tables."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "density"}
        return plain | {"recovered_mean": self.recovered_mean, "recovered_zero": self.recovered_zero}


@torch.inference_mode()
def evaluate_sae(
    model: Model,
    sae: Any,
    tokens: Int[Tensor, "row pos"],
    site: Site,
    median_norm: float,
    mean: Float[Tensor, " d_model"],
    ce_rows: int = 16,
) -> SaeReport:
    """Evaluate anything with ``encode`` and ``decode`` on packed held-out rows.

    Reconstruction is measured on all rows; cross-entropy on the first ``ce_rows``, with the reconstruction, the
    mean or zero put in place of the activation at every ordinary position (see the module's exclusions) and the
    other positions left as they are. ``mean`` is the mean of training activations.
    """
    kept, l0, fired = 0, 0.0, torch.zeros(1)
    residual, total = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    norms = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(tokens), 8):
        x = activations(model, tokens[start : start + 8], [site])[site].float()
        usual = ordinary(x, median_norm)
        features = sae.encode(x)
        out = sae.decode(features)
        wrong, spread = (out - x).square().sum(-1).double(), (x - mean).square().sum(-1).double()
        residual += torch.stack([wrong[usual].sum(), wrong.sum()])
        total += torch.stack([spread[usual].sum(), spread.sum()])
        norms += torch.stack([(out - mean)[usual].norm(dim=-1).sum(), (x - mean)[usual].norm(dim=-1).sum()]).double()
        active = (features != 0)[usual]
        kept, l0, fired = kept + int(usual.sum()), l0 + float(active.sum()), fired + active.sum(0)
    splices = _splices(model, sae, tokens[:ce_rows], site, median_norm, mean)
    ev = 1 - residual / total
    return SaeReport(
        l0=l0 / kept,
        explained_variance=float(ev[0]),
        explained_variance_all=float(ev[1]),
        relative_norm=float(norms[0] / norms[1]),
        dead=float((fired == 0).float().mean()),
        density=fired / kept,
        n_tokens=kept,
        n_ce_tokens=ce_rows * (tokens.shape[1] - 1),
        **splices,
    )


def _splices(model: Model, sae: Any, tokens: Tensor, site: Site, median_norm: float, mean: Tensor) -> dict[str, float]:
    """Mean cross-entropy with different things in the activation's place, and the KL divergence of the SAE's."""

    def replaced(function: Callable[[Tensor], Tensor], everywhere: bool = False) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            where = torch.ones_like(x[..., 0], dtype=torch.bool) if everywhere else ordinary(x, median_norm)
            return torch.where(where[..., None], function(x).to(x.dtype), x)

        return change

    def rebuilt(x: Tensor) -> Tensor:
        return sae.decode(sae.encode(x.float()))

    edits: dict[str, Callable[[Tensor], Tensor]] = {
        "ce": lambda x: x,
        "ce_spliced": replaced(rebuilt),
        "ce_mean": replaced(lambda x: mean.expand_as(x)),
        "ce_zero": replaced(torch.zeros_like),
        "ce_spliced_all": replaced(rebuilt, everywhere=True),
    }
    sums, kl = dict.fromkeys(edits, 0.0), 0.0
    # After a whole layer the pass can be taken up again there, which saves running the layers before it each time.
    again = site.kind == "resid_post" and site.layer + 1 < model.n_layers
    for start in range(0, len(tokens), 4):
        rows = tokens[start : start + 4].to(model.device).long()
        x = activations(model, rows, [site])[site] if again else torch.zeros(1)
        clean = torch.zeros(1)
        for name, change in edits.items():
            with resume(model, site.layer + 1, change(x)) if again else edit(model, site, change):
                logp = model.hf(input_ids=rows, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            sums[name] -= float(logp.gather(-1, rows[:, 1:, None]).sum())
            if name == "ce":
                clean = logp
            elif name == "ce_spliced":
                kl += float((clean.exp() * (clean - logp)).sum())
    n = tokens[:, 1:].numel()
    return {name: value / n for name, value in sums.items()} | {"kl": kl / n}


class Linear(NamedTuple):
    """A baseline with the interface of an SAE: a linear code about a mean."""

    directions: Float[Tensor, "k d_model"]
    mean: Float[Tensor, " d_model"]

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch k"]:
        return (x - self.mean) @ self.directions.t()

    def decode(self, code: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch d_model"]:
        return code @ self.directions + self.mean


class RandomTopK(NamedTuple):
    """A baseline: k of d_sae random unit directions, chosen and weighted by projection, times one fitted gain."""

    directions: Float[Tensor, "d_sae d_model"]
    mean: Float[Tensor, " d_model"]
    k: int
    gain: float

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        code = ((x - self.mean) @ self.directions.t()).relu()
        top = code.topk(self.k, dim=-1)
        return torch.zeros_like(code).scatter_(-1, top.indices, self.gain * top.values)

    def decode(self, code: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_model"]:
        return code @ self.directions + self.mean


def baselines(x: Float[Tensor, "sample d_model"], k: int, d_sae: int, seed: int = 0) -> dict[str, Any]:
    """What an SAE must beat, fitted on training activations: PCA of k components, k of d_sae random directions."""
    mean = x.mean(0)
    centred = x - mean
    _, vectors = torch.linalg.eigh(centred.t() @ centred)
    directions = F.normalize(torch.randn(d_sae, x.shape[1], generator=torch.Generator().manual_seed(seed)), dim=-1)
    plain = RandomTopK(directions, mean, k, 1.0)
    out = plain.decode(plain.encode(x[:4096])) - mean
    gain = float((out * centred[:4096]).sum() / out.square().sum())
    return {"pca": Linear(vectors[:, -k:].t(), mean), "random": plain._replace(gain=gain)}


# --- one command --------------------------------------------------------------------------------------


def train_from_config(path: str | Path, evaluate: bool = True) -> Path:
    """Harvest, train, save, evaluate, write the card: all that ``glassbox train-sae CONFIG`` does.

    ``path``: a config.yaml or its folder, into which the result goes. Shards and checkpoints stay in the cache, and
    every step continues where an earlier call was stopped.
    """
    config, path = read_config(path), Path(path)
    folder = path if path.is_dir() else path.parent
    model = load_model(config.model)
    if config.shuffle_weights:
        model = shuffled(model, config.seed)
    harvest(config.harvest, model)
    work = assets.cache_dir() / "training" / config.name
    train(config, work)
    export(config, work, folder, model)
    if evaluate:
        write_card(config, work, folder, model)
    return folder


def export(config: TrainConfig, work: Path, folder: Path, model: Model) -> None:
    """Save the newest checkpoint of a (running or finished) training as a shippable folder."""
    saved = torch.load(Path(work) / "checkpoint.pt", weights_only=False)
    scaling = Scaling(**saved["scaling"])
    sae = build_sae(config, scaling)
    sae.load_state_dict(saved["sae"])
    save_sae(config, sae, scaling, folder, model)
    _write_history(Path(folder) / "history.csv", saved["state"]["history"])


def held_out(model: Model, config: TrainConfig, n_rows: int = 64) -> Int[Tensor, "row pos"]:
    """The held-out rows on which every shipped SAE is evaluated."""
    return corpora.token_rows(model, corpora.load_corpus(config.corpus, "held"), n_rows, config.context).tokens


def _reports(
    model: Model, sae: Any, config: TrainConfig, x: Float[Tensor, "row pos d_model"]
) -> tuple[dict[str, SaeReport], dict[str, Any]]:
    """An SAE and its baselines on held-out text, and the scaling used; ``x``: activations of training text."""
    scaling, tokens, site = measure_scaling(x), held_out(model, config), site_of(config.hook)
    sample = x[ordinary(x, scaling.median_norm)].float()
    measure: dict[str, Any] = {"median_norm": scaling.median_norm, "mean": scaling.mean}
    reports = {"sae": evaluate_sae(model, sae, tokens, site, **measure)}
    for name, other in baselines(sample, round(reports["sae"].l0), config.d_sae).items():
        reports[name] = evaluate_sae(model, other, tokens, site, ce_rows=4, **measure)
    return reports, measure


def evaluate_again(name_or_path: str | Path, rows: int = 64) -> dict[str, dict[str, tuple[float, float]]]:
    """Metrics of a shipped SAE and of its baselines as (card, now): kind -> metric -> two numbers.

    Needs neither the harvest nor the checkpoint: mean and baselines are fitted on the first ``rows`` rows of the
    training text (the card used a whole shard, so a difference of some thousandths is no news).
    """
    load_sae(name_or_path)  # a wrong name fails here, with its message
    folder = Path(name_or_path) if Path(name_or_path).exists() else SAES / str(name_or_path)
    config = read_config(folder)
    model, site = load_model(config.model), site_of(config.hook)
    sae = load_sae(folder, model)
    packed = corpora.pack(model, corpora.load_corpus(config.corpus), config.context)
    x = torch.cat([a[site] for _, a in stream_activations(model, itertools.islice(packed, rows), [site])])
    card = json.loads((folder / "card.json").read_text())["metrics"]
    reports, _ = _reports(model, sae, config, x)
    return {kind: {k: (card[kind][k], v) for k, v in r.numbers.items()} for kind, r in reports.items()}


def write_card(config: TrainConfig, work: Path, folder: Path, model: Model) -> dict[str, Any]:
    """Evaluate a saved SAE and its baselines on held-out text, and write card.json and README.md beside it."""
    state, site = torch.load(Path(work) / "checkpoint.pt", weights_only=False)["state"], site_of(config.hook)
    sae, x = load_sae(folder, model), read_shard(shard_path(config.harvest.folder, 0), config.hook).x
    reports, measure = _reports(model, sae, config, x)
    # What notebook 03 computes again, on text that needs only one small package.
    wiki = corpora.token_rows(model, corpora.load_corpus("wiki", "held"), 24, config.context).tokens
    check = evaluate_sae(model, sae, wiki, site, ce_rows=4, **measure)
    last = state["history"][-1]
    card = {
        "name": config.name,
        "model": config.model,
        "model_hash": model.hash,
        "hook": config.hook,
        "architecture": config.architecture,
        "d_sae": config.d_sae,
        "corpus": config.corpus,
        "tokens_harvested": config.n_shards * config.rows_per_shard * config.context,
        "samples_trained": int(last["samples"]),
        "steps": int(last["step"]),
        "seed": config.seed,
        "hours": round(state["seconds"] / 3600, 3),
        "command": f"glassbox train-sae data/saes/{config.name}/config.yaml",
        "excluded": f"first token of a row, and residual norms above {OUTLIER} times the median",
        "licence": "Apache-2.0",
        "metrics": {name: {k: round(v, 5) for k, v in r.numbers.items()} for name, r in reports.items()},
        "wiki_held_out": {k: round(v, 5) for k, v in check.numbers.items()},
    }
    with assets.atomic_path(Path(folder) / "card.json") as partial:
        partial.write_text(json.dumps(card, indent=1) + "\n")
    with assets.atomic_path(Path(folder) / "README.md") as partial:
        partial.write_text(_readme(card))
    return card


def _readme(card: dict[str, Any]) -> str:
    rows = [
        ("features active per token (L0)", "l0", "{:.1f}"),
        ("explained variance, ordinary positions", "explained_variance", "{:.3f}"),
        ("explained variance, all positions", "explained_variance_all", "{:.3f}"),
        ("cross-entropy recovered, against mean ablation", "recovered_mean", "{:.3f}"),
        ("cross-entropy recovered, against zero ablation", "recovered_zero", "{:.3f}"),
        ("KL divergence when spliced in (nats)", "kl", "{:.3f}"),
        ("norm of the reconstruction (1 = no shrinkage)", "relative_norm", "{:.3f}"),
        ("features that never fired", "dead", "{:.1%}"),
    ]
    metrics = card["metrics"]
    table = "\n".join(f"| {t} | " + " | ".join(f.format(m[k]) for m in metrics.values()) + " |" for t, k, f in rows)
    return f"""# {card["name"]}

A sparse autoencoder ({card["architecture"]}, {card["d_sae"]} features) for `{card["hook"]}` of {card["model"]}
(weights {card["model_hash"]}), in sae_lens format: `SAE.load_from_disk(folder)` opens it.

Trained on {card["samples_trained"]:,} activations drawn from {card["tokens_harvested"]:,} tokens of the corpus
`{card["corpus"]}` (see data/corpus/README.md), seed {card["seed"]},
{card["hours"]:.2f} hours of wall time on two shared CPU cores.
Excluded in training and in the metrics: {card["excluded"]}. `{card["command"]}` makes it again.

Held-out text ({metrics["sae"]["n_tokens"]:,} tokens; cross-entropy on {metrics["sae"]["n_ce_tokens"]:,},
for the baselines on {metrics["pca"]["n_ce_tokens"]:,}), beside PCA
with as many components and as many random directions:

| | {" | ".join(metrics)} |
|---|{"---|" * len(metrics)}
{table}

Licence of the weights: {card["licence"]}. The text they were trained on is not part of this repository.
"""
