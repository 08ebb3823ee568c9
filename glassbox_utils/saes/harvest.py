"""Harvest: tokens of a corpus in, shards of activations out, resumable to the bit.

Two exclusions hold for training and for every metric, unless a name says otherwise. The first token of a row and a
few *outlier* positions (some punctuation, some role markers) have residual norms tens of times the median
(Sun et al., "Massive activations", arXiv 2402.17762); one of them outweighs hundreds of ordinary tokens in any
squared error. Positions with more than ``OUTLIER`` times the median norm are therefore left out, and every
explained variance is reported with them as well.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from glassbox_utils.core import assets, corpora
from glassbox_utils.core.corpora import Rows
from glassbox_utils.core.fast_forward import fast_dtype, quick
from glassbox_utils.core.interventions import recording
from glassbox_utils.core.models import Model, Site, check_site, load_model, wrap_model
from glassbox_utils.core.session import progress
from glassbox_utils.saes.config import HarvestConfig, SaeError, site_of

OUTLIER = 3.0
"""times the median norm: residual norms of ordinary tokens stay within a factor of two"""


class _Stop(Exception):
    """Ends a forward pass after the last layer that is needed."""


def shuffled_model(model: Model, seed: int = 0) -> Model:
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
