"""Harvest: tokens of a corpus in, shards of activations out, resumable to the bit.

Two exclusions hold for training and for every metric, unless a name says otherwise. The first token of a row and a
few *outlier* positions (some punctuation, some role markers) have residual norms tens of times the median
(Sun et al., "Massive activations", arXiv 2402.17762); one of them outweighs hundreds of ordinary tokens in any
squared error. Positions with more than ``OUTLIER`` times the median norm are therefore left out, and every
explained variance is reported with them as well.
"""

import copy
import itertools
import json
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glassbox_utils.core import corpora, distributed, files, schema
from glassbox_utils.core.arguments import shown
from glassbox_utils.core.corpora import Document
from glassbox_utils.core.fast_forward import fast_dtype, quick
from glassbox_utils.core.interventions import edits
from glassbox_utils.core.models import Model, Site, check_site, load_model, wrap_model
from glassbox_utils.core.packing import START, Place, Rows, encode, joined, place_after, regrouped, row_width
from glassbox_utils.core.pipeline import ahead, download, in_order, lanes, memory, upload
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import Batch
from glassbox_utils.saes.config import HarvestConfig, SaeError, TrainConfig, check_harvest, site_of, width_of

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


@contextmanager
def tapped(model: Model, sites: Sequence[Site]) -> Iterator[Callable[..., dict[Site, Float[Tensor, "row pos width"]]]]:
    """A function tokens -> activations, whose forward pass stops after the last needed module.

    Hooks stay in place inside the block, and several threads may call the function at once.
    """
    checked = [check_site(model, site) for site in sites]
    if not checked:
        raise SaeError("There is no site to read. Give at least one, such as Site('resid_post', 1).")
    deepest = {site for site in checked if site.layer == max(s.layer for s in checked)}
    last = model.sites[deepest.pop() if len(deepest) == 1 else Site("resid_post", deepest.pop().layer)][0]
    mine = threading.local()

    def reader(site: Site) -> Callable[[Tensor], Tensor]:
        def look(x: Tensor) -> Tensor:
            mine.store[site] = x
            return x

        return look

    def stop(*_: Any) -> None:
        raise _Stop

    @torch.inference_mode()
    def run(tokens: Tensor, mask: Tensor | None = None) -> dict[Site, Tensor]:
        mine.store = {}
        try:
            batch = {"input_ids": upload(tokens, model.device)}
            if mask is not None:  # positions count from each row's first real token
                batch = Batch(batch["input_ids"], mask).inputs
            model.hf(**batch, use_cache=False, logits_to_keep=1)
        except _Stop:
            pass
        found, mine.store = mine.store, {}
        return found

    with edits(model, {site: reader(site) for site in checked}):
        handle = last.register_forward_hook(stop)
        try:
            yield run
        finally:
            handle.remove()


def activations(
    model: Model, tokens: Int[Tensor, "row pos"], sites: Sequence[Site], mask: Int[Tensor, "row pos"] | None = None
) -> dict[Site, Float[Tensor, "row pos width"]]:
    """Activations from a forward pass that stops after the last needed module; ``mask`` if rows are padded."""
    with tapped(model, sites) as run:
        return run(tokens, mask)


def stream_activations(
    model: Model, rows: Iterator[Rows], sites: Sequence[Site], rows_per_batch: int = 16
) -> Iterator[tuple[Rows, dict[Site, Float[Tensor, "row pos width"]]]]:
    """Activations of packed rows, batch by batch, that are never written to disk."""
    while batch := [row for _, row in zip(range(rows_per_batch), rows, strict=False)]:
        some = joined(batch)
        yield some, activations(model, some.tokens, sites)


def harvest(config: HarvestConfig, model: Model | None = None) -> Path:
    """Run the model over a corpus and keep activations as bfloat16 shards; returns the folder.

    Each shard is written beside its name and renamed, holds the same rows in every run, and is skipped if it is
    there: after a kill at any point the same call continues, and the result is bit-identical (on one machine; under
    torchrun too, where ranks take shards by number). Asking for more tokens later extends the folder. Text is packed
    ahead of the model and shards are written behind it. How many rows share a forward pass is decided by the device
    and leaves activations the same up to the order of sums (a relative error of 0.01 in bfloat16, 1e-5 in float32).
    A shard that is damaged (cut short) is made again. Raises SaeError if the folder was made with another model,
    corpus, hook or packing, or if the corpus is too small, and AssetError for a folder that can't be written.
    """
    files.check_output(config.folder, "The folder of the shards", folder=True)
    model = model or load_model(config.model)
    check_harvest(config, model)
    documents = corpora.open_corpus(config.corpus, config.split)
    known = documents if isinstance(documents, Sequence) else itertools.islice(documents, 1000)
    manifest = {
        "model": model.name,
        "model_hash": model.hash,
        "hooks": list(config.hooks),
        "dtype": "bfloat16",
        "corpus": config.corpus,
        "split": config.split,
        "corpus_hash": corpora.corpus_hash(known),
        "context": config.context,
        "rows_per_shard": config.rows_per_shard,
        "rows_per_batch": config.rows_per_batch,
        "d_model": model.d_model,
    }
    folder = Path(config.folder)
    lock = files.locked(folder / "harvest") if distributed.is_main() else nullcontext()
    with files.explain_os_errors(folder), lock:
        if distributed.is_main():
            _agree(folder, manifest, model.device)
            _discard_damaged(config, model)
        distributed.barrier()
        small = quick(model, getattr(torch, _agree(folder, manifest, model.device)))
        finished = set(shards(folder))
        places = places_if_counted(config, model, documents) if len(finished) < config.n_shards else {}
        missing = [i for i in range(config.n_shards) if shard_path(folder, i) not in finished]
        distributed.barrier()  # every rank has seen the same shards before one writes another
        wanted = [index for index in missing if index % distributed.world() == distributed.rank()]
        places = places or places_on_disk(folder, wanted)

        def write(pieces: list[Piece]) -> None:
            with files.atomic_path(shard_path(folder, pieces[0].shard)) as partly:
                save_file(assembled(pieces), partly)

        rows = shard_rows(config, model, documents, wanted, places)
        n_writers = 1 if model.device.type == "cpu" else 4
        with ThreadPoolExecutor(n_writers) as pool, computed(config, small, rows) as found:
            for _ in progress(in_order(pool, write, found, n_writers + 1), "harvest", total=len(wanted)):
                pass
        distributed.barrier()
    return folder


# --- which rows ---------------------------------------------------------------------------------------


def shard_rows(
    config: HarvestConfig, model: Model, documents: Iterable[Document], wanted: Iterable[int], places: dict[int, Place]
) -> Iterator[tuple[int, Rows]]:
    """The rows of each wanted shard (ascending), cut from the same stream of tokens whatever else is wanted.

    ``places``: where shards begin, as far as it is known; what lies before the nearest one is not tokenised again.
    SaeError if the documents end too early.
    """
    at, rows = -1, iter(list[Rows]())
    for index in wanted:
        known = max((i for i in places if at < i <= index), default=max(at, 0))
        if known > at:
            start, at = places.get(known, START), known
            rows = regrouped(corpora.packed(model, documents, config.context, start), config.rows_per_shard)
        shard = next(itertools.islice(rows, index - at, None), None)
        if shard is None:
            raise too_small(config, index)
        yield index, shard
        at = index + 1


def places_if_counted(config: HarvestConfig, model: Model, documents: Iterable[Document]) -> dict[int, Place]:
    """Where each shard begins, if several ranks need to know it or the documents may be too few (SaeError); else {}."""
    doubtful = distributed.world() > 1 or _doubtful(config, model, documents)
    return count_places(config, model, documents) if doubtful else {}


def count_places(config: HarvestConfig, model: Model, documents: Iterable[Document]) -> dict[int, Place]:
    """Where each shard begins, from the lengths of all documents, of which each rank counts a part."""
    size, some, rank = config.rows_per_shard * row_width(model, config.context), 1000, distributed.rank()
    unread, total = iter(documents), 0
    counted: list[Tensor] = []
    while total < config.n_shards * size and (batch := list(itertools.islice(unread, some * distributed.world()))):
        mine = [corpora.as_text(model, d) for d in batch[rank * some : (rank + 1) * some]]
        lengths = [len(ids) for ids in encode(model, mine)]
        padded = torch.tensor(lengths + [0] * (some - len(lengths)))
        counted.append(torch.cat(distributed.gathered(padded))[: len(batch)])
        total += int(counted[-1].sum())
    if total < config.n_shards * size:
        raise too_small(config, total // size)
    ends = torch.cat(counted).cumsum(0)
    begin = torch.arange(config.n_shards) * size
    owner = torch.searchsorted(ends, begin, right=True)
    skipped = begin - (ends[owner] - torch.cat(counted)[owner])
    return {i: Place(*pair) for i, pair in enumerate(zip(owner.tolist(), skipped.tolist(), strict=True))}


def _doubtful(config: HarvestConfig, model: Model, documents: Iterable[Document]) -> bool:
    """May these documents have too few tokens? By their characters; False for a stream, whose end nobody knows."""
    if not isinstance(documents, Sequence):
        return False
    characters = sum(len(d.text) for d in documents)
    wanted = config.n_shards * config.rows_per_shard * config.context
    if characters > 20 * wanted:
        return False
    sample = documents[:500]
    tokens = sum(map(len, encode(model, [corpora.as_text(model, d) for d in sample])))
    return wanted > 0.8 * characters * tokens / max(1, sum(len(d.text) for d in sample))


def too_small(config: HarvestConfig, shards: int) -> SaeError:
    size = config.context * config.rows_per_shard
    return SaeError(
        f"tokens is {config.n_tokens:,}, that is {config.n_shards} shards of {size:,}, but the corpus "
        f"{config.corpus!r} ({config.split}) fills only {shards}. Allowed: at most {shards * size:,}; or choose a "
        "larger corpus, or a smaller rows_per_shard."
    )


def places_on_disk(folder: Path, missing: Iterable[int]) -> dict[int, Place]:
    """Where missing shards begin, of those whose predecessor is finished."""
    begins = {index: _begins(folder, index) for index in missing}
    return {index: place for index, place in begins.items() if place is not None}


def _begins(folder: Path, index: int) -> Place | None:
    """Where a shard's first row begins, from the one before it; None if that is not finished."""
    if index == 0:
        return START
    path = shard_path(folder, index - 1)
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        owners = file.get_tensor("documents")
    one = bool((owners[owners >= 0] == owners.flatten()[-1]).all())  # a document that may begin before the shard
    before = _begins(folder, index - 1) if one else Place(-1)
    return before and place_after(before, Rows(owners, owners))


# --- how they are run ---------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A part of a shard: some of its rows, gone through the model."""

    shard: int
    rows: Rows
    """those of the whole shard"""
    x: dict[str, Callable[[], Float[Tensor, "row pos d_model"]]]
    """hook -> activations of these rows in bfloat16, when their copy has arrived"""


@contextmanager
def computed(
    config: HarvestConfig, model: Model, rows: Iterable[tuple[int, Rows]], keep: bool = False
) -> Iterator[Iterator[list[Piece]]]:
    """Shard after shard through the model, each in pieces; its rows are packed ahead.

    ``keep``: leave activations on the model's device, instead of copying them to the CPU.
    """
    sites = {hook: check_site(model, site_of(hook)) for hook in config.hooks}
    size = rows_at_hand(model, config)

    with tapped(model, list(sites.values())) as run, lanes(model.device) as (pool, n), closing(ahead(rows)) as packed:

        def work(part: tuple[int, Rows, Tensor]) -> Piece:
            x = _within_memory(run, part[2])
            halves = {hook: x[site].bfloat16() for hook, site in sites.items()}
            fetched = {hook: (lambda h=h: h) if keep else download(h) for hook, h in halves.items()}
            return Piece(part[0], part[1], fetched)

        parts = ((index, some, tokens) for index, some in packed for tokens in some.tokens.split(size))
        pieces = in_order(pool, work, parts, 2 * n)
        yield (list(group) for _, group in itertools.groupby(pieces, lambda piece: piece.shard))


@contextmanager
def streamed(
    config: HarvestConfig, model: Model, compute: str, first: int = 0, start: Place | None = None
) -> Iterator[Iterator[tuple[Rows, dict[str, Tensor]]]]:
    """Shards that are never written, one pass over the corpus after the other: rows, and activations by hook.

    Activations are bfloat16 and stay on the model's device; only one shard and what is in work are held.
    ``first``: the shard to begin with, counted over all passes, and ``start``: where it begins, if that is known.
    Under torchrun ranks take shards by number.
    """
    documents, n = corpora.open_corpus(config.corpus, config.split), config.n_shards
    places = places_if_counted(config, model, documents) | ({first % n: start} if start else {})

    def rows() -> Iterator[tuple[int, Rows]]:
        for turn in itertools.count(first // n):
            begin = max(first - turn * n, 0)
            wanted = [i for i in range(begin, n) if (turn * n + i) % distributed.world() == distributed.rank()]
            yield from shard_rows(config, model, documents, wanted, places)

    with computed(config, quick(model, getattr(torch, compute)), rows(), keep=True) as shards:
        yield ((pieces[0].rows, _together(pieces)) for pieces in shards)


def _together(pieces: Sequence[Piece]) -> dict[str, Tensor]:
    return {hook: torch.cat([piece.x[hook]() for piece in pieces]) for hook in pieces[0].x}


def assembled(pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """The tensors of a shard as they are written: activations by hook, tokens and documents."""
    return _together(pieces) | {"tokens": pieces[0].rows.tokens.int(), "documents": pieces[0].rows.documents.int()}


def _within_memory(run: Callable[[Tensor], dict[Site, Tensor]], tokens: Tensor) -> dict[Site, Tensor]:
    """The pass in one, or in halves where the device has not enough memory left."""
    try:
        return run(tokens)
    except torch.OutOfMemoryError:
        if len(tokens) == 1:
            raise
    halves = [_within_memory(run, half) for half in tokens.chunk(2)]
    return {site: torch.cat([half[site] for half in halves]) for site in halves[0]}


def rows_at_hand(model: Model, config: HarvestConfig) -> int:
    """Rows that share a forward pass: on a GPU as many of a shard's as fill half of its memory beside the weights.

    The same number in every run on one machine, so that a harvest goes on to the same bits. On a CPU
    ``rows_per_batch``, of which four at a time in float32: more only leave the cache.
    """
    if model.device.type == "cpu":
        return min(config.rows_per_batch, 4) if model.dtype == torch.float32 else config.rows_per_batch
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    inner = getattr(model.config, "intermediate_size", None) or 4 * model.d_model
    row = config.context * (8 * model.d_model + 4 * inner) * model.dtype.itemsize
    rows = config.rows_per_shard
    while rows > 1 and 2 * rows * row > memory(model.device) - weights:
        rows = (rows + 1) // 2
    return rows


# --- shards -------------------------------------------------------------------------------------------


def _agree(folder: Path, manifest: dict[str, Any], device: torch.device) -> str:
    """Write the manifest of a new folder, or insist that the old one says the same; the type that it computes in.

    The type is this machine's fastest when a folder is begun, and stays what it was when one is continued.
    """
    path = folder / "manifest.json"
    if not path.exists():
        compute = compute_type(device)
        with files.atomic_path(path) as partly:
            partly.write_text(json.dumps(manifest | {"compute": compute}, indent=1), encoding="utf-8")
        return compute
    old = schema.read_mapping(path, SaeError, "another folder, or delete this one, and it is made again")
    different = [f"{k} is {old.get(k)!r}, asked for {v!r}" for k, v in manifest.items() if old.get(k) != v]
    if different:
        raise SaeError(f"{folder} holds another harvest: {'; '.join(different)}. Choose another folder or delete it.")
    if (compute := old.get("compute", "bfloat16")) not in ("float32", "bfloat16", "float16"):
        raise SaeError(f"compute is {shown(compute)} in {path}. Delete the folder, and it is made again.")
    return compute


def compute_type(device: torch.device) -> str:
    """The type that a device multiplies fastest, by name: bfloat16 on a GPU, on a CPU what was measured."""
    return str(fast_dtype() if device.type == "cpu" else fast_dtype(device)).removeprefix("torch.")


def shard_path(folder: Path, index: int) -> Path:
    return Path(folder) / f"shard-{index:05d}.safetensors"


def shards(folder: Path) -> list[Path]:
    """The finished shards of a harvest, in order."""
    return sorted(Path(folder).glob("shard-*.safetensors"))


def _discard_damaged(config: HarvestConfig, model: Model) -> None:
    """Remove shards that are cut short or hold something else: they count as missing."""
    expected = {"tokens": [config.rows_per_shard, config.context], "documents": [config.rows_per_shard, config.context]}
    for hook in config.hooks:
        expected[hook] = [*expected["tokens"], width_of(model, site_of(hook))]
    for path in shards(config.folder):
        if _shapes(path) != expected:
            warnings.warn(f"{path} is damaged (cut short, or of other shapes). It is made again.", stacklevel=3)
            path.unlink()


def _shapes(path: Path) -> dict[str, list[int]] | None:
    """Name -> shape of a shard's tensors, from its head; None if the file is not as long as that says."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


class Shard(NamedTuple):
    """One shard: activations, and which token of which document each belongs to."""

    x: Float[Tensor, "row pos d_model"]
    rows: Rows


def read_shard(path: Path, hook: str) -> Shard:
    """Read one shard; SaeError for one that is damaged, and for a hook that it does not hold."""
    try:
        with safe_open(path, "pt") as file:
            if hook not in file.keys():  # noqa: SIM118 (not a dict)
                held = sorted(set(file.keys()) - {"tokens", "documents"})
                raise SaeError(f"{path} has no hook {hook!r}. It holds {', '.join(held)}.")
            return Shard(file.get_tensor(hook), Rows(file.get_tensor("tokens"), file.get_tensor("documents")))
    except (SafetensorError, OSError) as error:
        raise SaeError(
            f"{path} is damaged ({error}). `glassbox harvest CONFIG` makes it again: a shard that is cut short counts "
            "as missing."
        ) from error


def first_shard(config: TrainConfig, model: Model) -> Float[Tensor, "row pos d_model"]:
    """Activations of a run's first shard on the CPU: read, or computed again if the run streams."""
    if not config.stream:
        return read_shard(shard_path(config.harvest.folder, 0), config.hook).x
    with streamed(config.harvest, model, compute_type(model.device)) as shards:
        return download(next(shards)[1][config.hook])()


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
    """Median norm, scale and mean of the ordinary positions of some rows; SaeError for what is no activation."""
    median = float(x[:, 1:].float().norm(dim=-1).median()) if x.shape[1] > 1 and len(x) else math.nan
    kept = x[ordinary(x, median)].float()
    if not 0 < median < math.inf or not len(kept):
        raise SaeError(
            f"The activations have norms with the median {median}: they are all zero, or no numbers. Harvest again "
            "with a model that computes in float32, or from another hook."
        )
    return Scaling(median, kept.shape[-1] ** 0.5 / float(kept.norm(dim=-1).mean()), kept.mean(0))
