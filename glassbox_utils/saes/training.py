"""Train sparse autoencoders on harvested shards, with sae_lens's classes and our own loop.

The activation stream, the loop and the history are our own: exactly resumable, without a tracking service, and
sparse where the arithmetic is sparse.
"""

import csv
import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core import assets
from glassbox_utils.core.fast_forward import fast_dtype
from glassbox_utils.core.models import Model, load_model
from glassbox_utils.core.session import progress
from glassbox_utils.saes.config import SaeError, TrainConfig, read_config
from glassbox_utils.saes.harvest import (
    Scaling,
    harvest,
    measure_scaling,
    ordinary,
    read_shard,
    shard_path,
    shuffled_model,
)
from glassbox_utils.saes.quality import write_card
from glassbox_utils.saes.store import save_sae


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
        model = shuffled_model(model, config.seed)
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
