"""Train sparse autoencoders on harvested shards, with sae_lens's classes and our own loop.

The activation stream, the loop and the history are our own: exactly resumable, without a tracking service, sparse
where the arithmetic is sparse, and without a step that waits for the device.
"""

import csv
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core import assets, devices, distributed, files
from glassbox_utils.core.devices import beside
from glassbox_utils.core.models import EMBEDDED, Model, load_model
from glassbox_utils.core.packing import START, Place, Rows, place_after
from glassbox_utils.core.pipeline import ahead, download, memory, upload
from glassbox_utils.core.session import progress
from glassbox_utils.saes.config import SaeError, TrainConfig, check_training, read_config, site_of, width_of
from glassbox_utils.saes.gradients import Auxiliary, StepResult, library_gradients, topk_gradients
from glassbox_utils.saes.harvest import (
    Scaling,
    compute_type,
    harvest,
    measure_scaling,
    ordinary,
    read_shard,
    shard_path,
    shuffled_model,
    streamed,
)
from glassbox_utils.saes.quality import write_card
from glassbox_utils.saes.store import Checkpoint, read_checkpoint, restore, save_sae, write_checkpoint

__all__ = ["StepResult", "library_gradients", "topk_gradients"]

SILENT = 500_000
"""samples without a single activation after which a feature counts as dead"""
FREE = ("samples", "decay", "checkpoint_every")
"""settings that a run may change on its way"""
OVER_BATCH = ("batchtopk", "matryoshka_batchtopk")
"""architectures that choose over the whole batch, which ranks therefore can't divide"""
Read = Callable[[Sequence[int]], list[Float[Tensor, "row pos d_model"]]]
"""the activations of some shards"""


def reading_order(config: TrainConfig) -> Iterator[int]:
    """Shard numbers without end: the first pass in order, each later one permuted anew (streaming: each in order)."""
    for number in itertools.count():
        size = config.growth[number] if number < len(config.growth) else config.n_shards
        generator = torch.Generator().manual_seed(config.seed * 10_007 + number)
        yield from torch.randperm(size, generator=generator).tolist() if number and not config.stream else range(size)


def training_batches(
    config: TrainConfig,
    scaling: Scaling,
    block: int = 0,
    offset: int = 0,
    read: Read | None = None,
    device: torch.device | None = None,
) -> Iterator[tuple[Float[Tensor, "batch d_model"], int, int]]:
    """Scaled, shuffled batches, each with the (block, offset) to continue from after it.

    A block is ``shards_mixed`` shards whose ordinary positions are shuffled together; documents were shuffled before
    the harvest, and later passes combine other shards. Waits for shards that a running harvest has yet to write.
    ``read``: where shards come from, if not from the folder. On CUDA the next block is read while this one is used.
    """
    device = device or torch.device("cpu")
    blocks = _blocks(config, scaling, block, read or read_shards(config), device)
    for number, x, shuffled in ahead(blocks, 1) if device.type == "cuda" else blocks:
        last = len(x) // config.batch
        if not last:
            raise SaeError(
                f"batch is {config.batch:,}, but a block of {config.shards_mixed} shards holds {len(x):,} ordinary "
                "positions. Allowed: at most that many; or mix more shards (shards_mixed)."
            )
        for index in range(offset, last):
            rows = shuffled[index * config.batch : (index + 1) * config.batch]
            after = (number, index + 1) if index + 1 < last else (number + 1, 0)
            yield scaled(x[rows].float(), config, scaling), *after
        del x  # before the next block is made
        offset = 0


def _blocks(
    config: TrainConfig, scaling: Scaling, block: int, read: Read, device: torch.device
) -> Iterator[tuple[int, Float[Tensor, "position d_model"], Tensor]]:
    """Ordinary positions of ``shards_mixed`` shards on the device, and the order in which they are used."""
    order = reading_order(config)
    chosen = iter(lambda: [next(order) for _ in range(config.shards_mixed)], None)
    for number, shards in enumerate(itertools.islice(chosen, block, None), start=block):
        parts = [upload(part, device) for part in read(shards)]
        x = torch.cat([part[used(part, config, scaling.median_norm)] for part in parts])
        del parts
        generator = torch.Generator().manual_seed(config.seed * 10_007 + number)
        yield number, x, upload(torch.randperm(len(x), generator=generator), device)
        del x


def used(x: Float[Tensor, "row pos d_model"], config: TrainConfig, median_norm: float) -> Tensor:
    """Boolean [row, pos]: the positions that a run learns from; all where each is divided by its own norm."""
    if config.normalize == "constant_norm_rescale":
        return x.float().norm(dim=-1) > 0
    return ordinary(x, median_norm)


def scaled(x: Float[Tensor, "*batch width"], config: TrainConfig, scaling: Scaling) -> Float[Tensor, "*batch width"]:
    """Activations in the units that a run learns in: of the mean norm sqrt(d_model), or each of that norm."""
    if config.normalize == "constant_norm_rescale":
        return x * (x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True))
    return x * scaling.scale


def read_shards(config: TrainConfig) -> Read:
    """Shards from the harvest's folder, waiting for those that a running harvest has yet to write."""
    folder = config.harvest.folder
    return lambda shards: [read_shard(_wait(shard_path(folder, i)), config.hook).x for i in shards]


@contextmanager
def streamed_shards(
    config: TrainConfig, model: Model, compute: str, block: int, start: Place | None
) -> Iterator[tuple[Read, dict[int, Place]]]:
    """Shards from the model itself, in the order of ``reading_order``, and where each block begins in the text.

    Ranks compute shards in turn and send them to each other.
    """
    first, n = block * config.shards_mixed, config.n_shards
    places = {block: start} if start else {}
    with streamed(config.harvest, model, compute, first, start) as found:
        turns = itertools.count(first)

        def read(shards: Sequence[int]) -> list[Tensor]:
            numbers = list(itertools.islice(turns, len(shards)))
            mine = {i: next(found) for i in numbers if i % distributed.world() == distributed.rank()}
            parts, block = [], numbers[-1] // config.shards_mixed
            place = places.pop(block, START if numbers[0] == 0 else None)
            for i in numbers:
                owners, x = _shared(config, model, i, mine.pop(i, None))
                place = START if i % n == 0 else place
                place = place and place_after(place, Rows(owners, owners))
                parts.append(x)
            if end := START if numbers[-1] % n == n - 1 else place:
                places[block + 1] = end
            return parts

        yield read, places


def _shared(
    config: TrainConfig, model: Model, number: int, mine: tuple[Rows, dict[str, Tensor]] | None
) -> tuple[Tensor, Tensor]:
    """Owners and activations of one streamed shard, from the rank that computed it."""
    if mine:
        owners, x = mine[0].documents, mine[1][config.hook]
    else:
        owners = torch.empty(config.rows_per_shard, config.context, dtype=torch.int64)
        width = width_of(model, site_of(config.hook))
        empty = torch.empty(config.rows_per_shard, config.context, width, dtype=torch.bfloat16)
        x = beside(empty, model.device)
    distributed.broadcast([owners, x.view(torch.uint8)], number % distributed.world())
    return owners, x


def _wait(path: Path, patience: float = 1800) -> Path:
    """The path, as soon as the file is there; SaeError at once if no harvest is at work on it, or after a while."""
    start = time.monotonic()
    while not path.exists():
        _check_coming(path)
        if time.monotonic() - start > patience:
            raise SaeError(f"{path} did not appear within {patience / 60:.0f} minutes. Is the harvest still running?")
        time.sleep(2)
    return path


def _check_coming(path: Path) -> None:
    """SaeError for a shard that is not there, and that no running harvest may yet write."""
    if not (path.exists() or _is_locked(path.with_name(".harvest.lock")) or path.exists()):
        raise SaeError(
            f"There is no {path}, and no harvest is running that would write it. Run `glassbox harvest CONFIG` "
            "first or beside this one, and ask for no more tokens than the corpus has."
        )


def _is_locked(path: Path) -> bool:
    """Does another process hold this lock?"""
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


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
    sae.W_dec.requires_grad_(not config.frozen_decoder)
    # One feature's encoder weights side by side, as the sparse gradients arrive; the shape stays sae_lens's.
    sae.W_enc.data = sae.W_enc.data.t().contiguous().t()
    return sae


@torch.no_grad()
def train(
    config: TrainConfig,
    folder: Path,
    stop_after: int | None = None,
    device: str | torch.device | None = None,
    model: Model | None = None,
) -> Any:
    """Train one SAE on harvested shards; returns the sae_lens training SAE in scaled units, on ``device``.

    ``folder`` gets ``checkpoint.safetensors`` (weights, optimiser, place in the data, random state, history), from
    which the same call continues to the same bits, and ``history.csv``. Only ``samples`` and ``decay`` may differ from
    the checkpoint's configuration. ``device``: the fastest one if None. ``model``: what a streaming run
    (``config.stream``) reads its activations from; loaded if None. ``stop_after``: steps after which to stop early,
    for tests. Under torchrun every rank takes its part of each batch and rank 0 writes.
    SaeError for a run that diverges: nothing of it is kept.
    """
    check_training(config)
    folder = files.check_output(folder, "The folder of the training", folder=True)
    place, saved = devices.choose(device), read_checkpoint(folder)
    if saved:
        _same_run(config, saved.config, Path(folder))
    state: dict[str, Any] = {"step": 0, "block": 0, "offset": 0, "seconds": 0.0, "history": [], "place": None}
    state |= saved.state if saved else {"compute": compute_type(place)}  # a continued run keeps the type it began with
    if not config.stream:
        for path in (shard_path(config.harvest.folder, i) for i in range(config.n_shards)):
            _check_coming(path)
        return _train(config, Path(folder), stop_after, place, state, saved, read_shards(config), {})
    model = model or model_of(config)
    start = Place(*state["place"]) if state["place"] else None
    with streamed_shards(config, model, state["compute"], state["block"], start) as (read, places):
        return _train(config, Path(folder), stop_after, place, state, saved, read, places)


def _train(
    config: TrainConfig,
    folder: Path,
    stop_after: int | None,
    device: torch.device,
    state: dict[str, Any],
    saved: Checkpoint | None,
    read: Read,
    places: dict[int, Place],
) -> Any:
    scaling = saved.scaling if saved else None
    if scaling is None:
        first = list(range(config.shards_mixed if config.stream else 1))
        shards = read(first)
        scaling, state["variance"] = _measure(download(shards[0])(), config)
        if config.stream:  # what was computed is used: the first block is handed out again
            read = _with_first(shards, read)
        del shards
    _check_memory(config, len(scaling.mean), device)
    sae = beside(build_sae(config, scaling), device)
    fast, compute = config.architecture == "topk", getattr(torch, state["compute"])
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr, betas=(0.9, 0.999), fused=True)
    silent = torch.zeros(config.d_sae, device=device)
    if saved:
        restore(saved, sae, optimizer)
        silent.copy_(saved.tensors["silent"])
        torch.set_rng_state(saved.tensors["rng"])
    data = training_batches(config, scaling, state["block"], state["offset"], read, device)
    end = min(config.steps, stop_after or config.steps)
    started, done, written, cost = time.perf_counter(), state["seconds"], time.perf_counter(), 0.0
    window: list[StepResult] = []
    for step in progress(range(state["step"], end), f"train {config.name}"):
        x, state["block"], state["offset"] = next(data)
        rate = _learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        mine = _my_part(config, x)
        if fast:  # with an auxiliary loss the device is asked once a step which features are dead
            dead = Auxiliary((silent > SILENT).nonzero()[:, 0], config.auxiliary) if config.auxiliary else None
            result = topk_gradients(sae, mine, compute, dead)
        else:
            result = library_gradients(sae, mine, step, silent > SILENT, compute)
        if config.frozen_decoder:
            sae.W_dec.grad = None
        if len(mine) < len(x):
            distributed.all_reduce_mean(p.grad for p in sae.parameters() if p.grad is not None)
            distributed.all_reduce_sum([result.fired])
        if fast and config.unit_rows and not config.frozen_decoder:
            sae.W_dec.grad -= (sae.W_dec.grad * sae.W_dec).sum(-1, keepdim=True) * sae.W_dec
        else:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if fast and config.unit_rows and not config.frozen_decoder:
            sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True)
        silent += config.batch
        silent.masked_fill_(result.fired > 0, 0)
        reseeded = fast and not config.auxiliary and not config.frozen_decoder
        if reseeded and (step + 1) % config.reseed_every == 0 and step < 0.6 * config.steps:
            _reseed(sae, optimizer, x, silent, seed=config.seed + step)
        window.append(StepResult(result.error, result.fired.sum()))
        state["step"], state["seconds"] = step + 1, done + time.perf_counter() - started
        if (step + 1) % 20 == 0 or step + 1 == end:
            error, l0 = _read_window(config, window)
            window.clear()
            _check_finite(config, sae, step, error)
            row = {"step": step + 1, "samples": (step + 1) * config.batch}
            row |= {"explained_variance": 1 - error / state["variance"], "l0": l0}
            row |= {"dead": int((silent > SILENT).sum()), "lr": rate, "seconds": state["seconds"]}
            state["history"].append(row)
        due = (step + 1) % config.checkpoint_every == 0 and (
            device.type == "cpu" or time.perf_counter() - written > 20 * cost  # steps may be quicker than the disk
        )
        if (due or step + 1 == end) and distributed.is_main():
            begun = time.perf_counter()
            _check_finite(config, sae, step, float(result.error))
            state["place"] = places.get(state["block"])
            write_checkpoint(folder, config, sae, optimizer, silent, state, scaling)
            _write_history(folder / "history.csv", state["history"])
            written = time.perf_counter()
            cost = written - begun
    distributed.barrier()
    return sae


def _check_finite(config: TrainConfig, sae: Any, step: int, error: float) -> None:
    """SaeError once a run has left the numbers: it never comes back, and a checkpoint of it would be of no use."""
    if math.isfinite(error) and all(bool(p.isfinite().all()) for p in sae.parameters()):
        return
    raise SaeError(
        f"The training {config.name!r} diverged: its error at step {step + 1} is {error:.3g}. Nothing of these steps "
        f"was kept. Lower lr (it is {config.lr:g}), raise warmup (it is {config.warmup}), or lower the coefficients in "
        "options; then train anew in another folder, or go on from the last checkpoint with another decay."
    )


def _measure(first: Float[Tensor, "row pos d_model"], config: TrainConfig) -> tuple[Scaling, float]:
    """Scaling of a run, and the variance of the scaled activations that it learns from."""
    scaling = measure_scaling(first)
    x = first[used(first, config, scaling.median_norm)].float()
    if config.normalize == "constant_norm_rescale":
        x = scaled(x, config, scaling)
        scaling = Scaling(scaling.median_norm, 1.0, x.mean(0))
    variance = float((x - scaling.mean).square().sum(-1).mean())
    if not 0 < variance < math.inf:
        raise SaeError(f"The variance of the activations is {variance}: there is nothing to learn. Use another hook.")
    return scaling, variance * scaling.scale**2


def _check_memory(config: TrainConfig, width: int, device: torch.device) -> None:
    """SaeError for an SAE that this device can't hold, with its gradients and Adam's two memories."""
    needed, there = 4 * 4 * 2 * width * config.d_sae, memory(device)
    if needed > there:
        raise SaeError(
            f"d_sae is {config.d_sae:,}: training takes at least {needed / 1e9:,.0f} GB on {device}, which has "
            f"{there / 1e9:,.0f}. Allowed here: at most {there // (32 * width):,}."
        )


def _with_first(shards: list[Tensor], read: Read) -> Read:
    """The reader with its first answer put back."""
    waiting = [shards]
    return lambda numbers: waiting.pop() if waiting else read(numbers)


def _my_part(config: TrainConfig, x: Float[Tensor, "batch d_model"]) -> Float[Tensor, "part d_model"]:
    """This rank's rows of a batch; the whole batch where the architecture chooses over all of it."""
    if distributed.world() == 1 or config.architecture in OVER_BATCH:
        return x
    return x.chunk(distributed.world())[distributed.rank()]


def _read_window(config: TrainConfig, window: list[StepResult]) -> tuple[float, float]:
    """Mean error and number of active features of the last steps: the only moment at which the device is waited for."""
    errors, fired = (torch.stack(list(parts)) for parts in zip(*[(r.error, r.fired) for r in window], strict=True))
    distributed.all_reduce_mean([errors])
    counts = [count / config.batch for count in fired.tolist()]
    return sum(errors.tolist()) / len(window), sum(counts) / len(window)


def _same_run(config: TrainConfig, saved: dict[str, Any], path: Path) -> None:
    default = {f.name: f.default for f in fields(TrainConfig)}  # a setting that an older checkpoint did not know yet
    there, here = default | saved, json.loads(json.dumps(asdict(config)))
    changed = [k for k, v in here.items() if there[k] != v and k not in FREE]
    if changed:
        what = "; ".join(f"{k}: {there[k]!r} there, {here[k]!r} asked for" for k in changed)
        raise SaeError(f"The checkpoint in {path} belongs to another run ({what}). Delete it or choose another folder.")


def _learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, plateau, linear decay to zero."""
    left = (config.steps - step) / max(1.0, config.decay * config.steps)
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup), left)


def _reseed(sae: Any, optimizer: Any, x: Tensor, silent: Tensor, seed: int) -> None:
    """Point dead features at badly reconstructed samples of this batch (after Bricken et al. 2023).

    The draw is made on the CPU, so that the same samples are chosen on every device.
    """
    dead = torch.where(silent > SILENT)[0][: len(x)]
    if not len(dead):
        return
    errors = x - sae.decode(sae.encode(x))
    chance = devices.result(errors.square().sum(-1))
    chosen = torch.multinomial(chance, len(dead), generator=torch.Generator().manual_seed(seed))
    directions = F.normalize(errors[beside(chosen, x)], dim=-1)
    sae.W_dec[dead] = directions
    sae.W_enc.t()[dead] = directions
    sae.b_enc[dead] = 0
    silent[dead] = 0
    for parameter, index in ((sae.W_dec, 0), (sae.W_enc, 1), (sae.b_enc, 0)):
        for name in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][name].index_fill_(index, dead, 0)


def _write_history(path: Path, history: list[dict[str, float]]) -> None:
    with files.atomic_path(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, history[0] if history else [])
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in history)


# --- one command --------------------------------------------------------------------------------------


def model_of(config: TrainConfig) -> Model:
    """The model that a run is about, with its weights shuffled if that is what it is about."""
    model = load_model(config.model)
    return shuffled_model(model, config.seed) if config.shuffle_weights else model


def work_folder(config: TrainConfig, model: Model) -> Path:
    """Where the checkpoints of a run lie in the cache; runs on other models may have the same name."""
    name = config.name
    if config.model != EMBEDDED:
        fixed = {k: v for k, v in asdict(config).items() if k not in FREE}
        key = json.dumps([model.hash, fixed], sort_keys=True, default=str)
        name += f"-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    return assets.cache_dir() / "training" / name


def train_from_config(path: str | Path, evaluate: bool = True) -> Path:
    """Harvest, train, save, evaluate, write the card: all that ``glassbox train-sae CONFIG`` does.

    ``path``: a config.yaml or its folder, into which the result goes. Shards and checkpoints stay in the cache, and
    every step continues where an earlier call was stopped. Under torchrun ranks share harvest and training.
    """
    config, path = read_config(path), Path(path).resolve()
    folder = path if path.is_dir() else path.parent
    model = model_of(config)
    work = work_folder(config, model)
    for what, target in (("The folder of the SAE", folder), ("The folder of the training", work)):
        files.check_output(target, what, folder=True)  # before hours of work
    if not config.stream:
        harvest(config.harvest, model)
    train(config, work, device=model.device, model=model)
    if distributed.is_main():
        export(config, work, folder, model)
        if evaluate:
            write_card(config, work, folder, model)
    distributed.barrier()
    return folder


def export(config: TrainConfig, work: Path, folder: Path, model: Model) -> None:
    """Save the newest checkpoint of a (running or finished) training as a shippable folder."""
    saved = read_checkpoint(work)
    if saved is None:
        raise SaeError(f"There is no checkpoint in {work}. Train first: `glassbox train-sae CONFIG`.")
    sae = build_sae(config, saved.scaling)
    sae.load_state_dict({k.removeprefix("sae."): v for k, v in saved.tensors.items() if k.startswith("sae.")})
    save_sae(config, sae, saved.scaling, folder, model)
    _write_history(Path(folder) / "history.csv", saved.state["history"])
