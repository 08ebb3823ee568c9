"""Long runs behind notebook 03: ``glassbox study sae-meaning`` and ``sae-architectures``.

``sae-meaning``: are the features of the main SAE nearer to one meaning each than other units of the same space? Beside
it five small SAEs, each with a twin whose decoder was frozen at random, units that know nothing of concepts, and the
neurons of the same layer's MLP. How they are compared: ``saes/comparing.py``.
``sae-architectures``: five architectures under the same conditions (data, steps, learning rate, clipped gradients, no
re-seeding), several seeds of each.
The small SAEs are small indeed (below): the first study is sized for about ten minutes of one core. What they lose to
one that was trained for long stands beside their scores as explained variance.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassbox_utils.core import assets, coding, corpora, prepared
from glassbox_utils.core.devices import exact
from glassbox_utils.core.models import Model, Site
from glassbox_utils.core.prepared import load_subject
from glassbox_utils.core.studies import resumed, write_table
from glassbox_utils.saes import comparing, meaning, quality, reading
from glassbox_utils.saes.config import TrainConfig, hook_of
from glassbox_utils.saes.features import site_of_sae
from glassbox_utils.saes.harvest import harvest, measure_scaling, ordinary, read_shard, shard_path
from glassbox_utils.saes.store import identity_of, load_sae
from glassbox_utils.saes.training import export, train

SEEDS = 5
ROWS, UNITS = 192, 40
"""held-out rows that are read, and units of each kind and seed"""
STEPS, TOKENS, BATCH, D_SAE = 300, 65_536, 1024, 1024
"""of each small training"""
TRAINED, FROZEN, MAIN, UNTRAINED = "trained", "frozen", "main", "random_sae"
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {}, "batchtopk": {}, "matryoshka_batchtopk": {},
    "standard": {"l1_coefficient": 1.5, "l1_warm_up_steps": 100},
    "jumprelu": {"l0_coefficient": 4.0, "l0_warm_up_steps": 100, "jumprelu_init_threshold": 0.5,
                 "jumprelu_bandwidth": 1.0},
}  # fmt: skip
"""options beside the number of active features; the coefficients are those that gave the shipped ones about 32"""


def small_run(model: Model, hook: str, seed: int, architecture: str = "topk", frozen: bool = False) -> TrainConfig:
    """A small training, at the size of the prepared folder; the same but for what is named."""
    context, tokens = min(256, model.n_context), prepared.sized(TOKENS, 8192)
    d_sae = min(D_SAE, 4 * model.d_model)
    options = dict(ARCHITECTURES[architecture])
    if "topk" in architecture:
        options["k"] = min(32, max(1, d_sae // 16))
    if architecture.startswith("matryoshka"):
        options["matryoshka_widths"] = [d_sae // 16, d_sae // 4, d_sae]
    return TrainConfig(
        name=f"{architecture}-{'frozen-' if frozen else ''}{seed}-{model.hash}",
        hook=hook,
        architecture=architecture,  # type: ignore[arg-type]
        d_sae=d_sae,
        samples=prepared.sized(STEPS, 60) * BATCH,
        tokens=tokens,
        options=options,
        model=prepared.card().model,
        context=context,
        rows_per_shard=min(256, max(1, tokens // context)),
        batch=BATCH,
        lr=1e-3,
        warmup=50,
        decay=0.4,
        seed=seed,
        frozen_decoder=frozen,
        auxiliary=1.0 if architecture == "topk" else 0.0,  # what sae_lens gives the others of this family
    )


def made(model: Model, config: TrainConfig) -> TrainConfig:
    """A configuration whose shards are there."""
    harvest(config.harvest, model)
    return config


def trained(model: Model, config: TrainConfig) -> Any:
    """The SAE of a small training, from the cache if it is there."""
    made(model, config)
    work = assets.cache_dir() / "training" / f"{config.name}-{config.d_sae}-{config.tokens}-{config.samples}"
    train(config, work, device=model.device)
    export(config, work, work / "out", model)
    return load_sae(work / "out", model)


def texts_for(model: Model) -> corpora.Rows:
    """Held-out rows that every kind of unit is measured on."""
    documents = corpora.load_corpus("wiki", "held")
    return corpora.token_rows(model, documents, prepared.sized(ROWS, 24), min(256, model.n_context))


def drawn(tool: Any, d_sae: int, seen: meaning.Seen, n: int, seed: int) -> tuple[list[int], torch.Tensor]:
    """Features of a tool drawn among those that are active in enough places, and how often each is active."""
    everything = meaning.of_sae(tool, range(d_sae))
    fired = torch.zeros(d_sae)
    for x, usual in zip(seen.x.split(2048), seen.usual.flatten().split(2048), strict=True):
        fired += (meaning.values_of(meaning.Seen(x, usual), everything) > 0).sum(0)
    density = fired / int(seen.usual.sum())
    enough = ((fired >= 2 * meaning.FITTED) & (density < 0.1)).nonzero()[:, 0]
    if len(enough) < n:  # a small text: the most active ones that are not on everywhere
        enough = (fired * (density < 0.5)).topk(min(n, len(fired))).indices
    chosen = enough[torch.randperm(len(enough), generator=torch.Generator().manual_seed(seed))[:n]]
    return chosen.tolist(), density[chosen]


@torch.inference_mode()
def explained(tool: Any, seen: meaning.Seen) -> float:
    """Share of the variance at ordinary positions that a tool's reconstruction keeps."""
    usual, wrong = seen.x[seen.usual.flatten()], 0.0
    for x in usual.split(2048):
        wrong += float(exact(coding.decode(tool, coding.encode(tool, x)) - coding.seen(tool, x)).square().sum())
    return 1 - wrong / float(exact(usual - usual.mean(0)).square().sum())


def read_text(model: Model, site: Site, median: float) -> tuple[meaning.Texts, meaning.Seen]:
    """The held-out rows as words, and what the model does at a site while it reads them."""
    rows = texts_for(model)
    seen = meaning.see(model, site, rows, median)
    return meaning.texts_of(model, rows, seen.usual), seen


def sample_of(model: Model, config: TrainConfig) -> torch.Tensor:
    """Activations at ordinary positions of training text, to which principal components are fitted."""
    x = read_shard(shard_path(made(model, config).harvest.folder, 0), config.hook).x
    return x[ordinary(x, measure_scaling(x).median_norm)].float()[:65_536]


def one_seed(model: Model, hook: str, seed: int, read: Callable[[], tuple[meaning.Texts, meaning.Seen]]) -> Any:
    """All kinds of units under one seed, on the same texts, and what the four dictionaries among them explain."""
    (texts, seen), n = read(), min(prepared.sized(UNITS, 8), 2 * model.d_model)
    config = small_run(model, hook, seed)
    main = load_sae(prepared.sae("main"), model)
    sample = sample_of(model, config)
    d_sae, k = main.cfg.d_sae, getattr(main.cfg, "k", 32)
    tools: dict[str, Any] = {
        MAIN: main,
        TRAINED: trained(model, config),
        FROZEN: trained(model, small_run(model, hook, seed, frozen=True)),
        UNTRAINED: quality.baselines(sample, k, d_sae, seed)["random"],
    }
    encoders: dict[str, meaning.Encoder] = {}
    densities: dict[str, torch.Tensor] = {}
    for name, tool in tools.items():
        width = config.d_sae if name in (TRAINED, FROZEN) else d_sae
        chosen, density = drawn(tool, width, seen, n, seed)
        encoders[name] = meaning.of_sae(tool, chosen)
        if name == MAIN:
            densities = dict.fromkeys(("coordinates", "pca", "random"), density)
    n = min(n, *(len(d) for d in densities.values()))
    encoders = meaning.opponents(sample, n, k, d_sae, seed) | encoders
    units = meaning.compared(texts, seen, encoders, densities, seed)
    return {"units": units, "explained": {name: round(explained(tool, seen), 4) for name, tool in tools.items()}}


def more_of_seed(
    model: Model,
    hook: str,
    seed: int,
    read: Callable[[], tuple[meaning.Texts, meaning.Seen]],
    neurons: Callable[[], torch.Tensor],
) -> Any:
    """Two kinds that came later, under one seed: neurons of the layer's MLP (positive values) and components of any
    rank, active as often as the features that this seed drew."""
    (texts, seen), n = read(), min(prepared.sized(UNITS, 8), 2 * model.d_model)
    main, draw = load_sae(prepared.sae("main"), model), torch.Generator().manual_seed(seed)
    _, density = drawn(main, main.cfg.d_sae, seen, n, seed)
    sample = sample_of(model, small_run(model, hook, seed))
    kinds: dict[str, Any] = {"pca_any": meaning.of_any_rank(sample, min(n, len(density), model.d_model), draw)}
    values = neurons()
    if values.shape[1]:  # the experts of a mixture share none
        kinds["neurons"] = values[:, torch.randperm(values.shape[1], generator=draw)[: min(n, len(density))]]
    return meaning.compared(texts, seen, kinds, dict.fromkeys(kinds, density), seed)


def neurons_of(model: Model, layer: int, usual: torch.Tensor) -> torch.Tensor:
    """Positive values of a layer's MLP neurons at every token of the held-out rows, flat; zero where it is not
    ``usual``, and without a column where the model has none that its tokens share."""
    site = Site("mlp_post", layer)
    if site not in model.sites:
        return torch.zeros(usual.numel(), 0)
    values = meaning.see(model, site, texts_for(model), float("inf")).x.relu()
    return values * usual.flatten()[:, None]


def study_meaning() -> Path:
    """How far units of nine kinds have one meaning each, five seeds."""
    start, model = time.time(), load_subject()
    main = load_sae(prepared.sae("main"), model)
    site = site_of_sae(main)
    hook, seeds = hook_of(site), list(range(prepared.sized(SEEDS, 2)))
    read = cache(lambda: read_text(model, site, reading.median_norm(model, main)))
    neurons = cache(lambda: neurons_of(model, site.layer, read()[1].usual))
    kinds: dict[str, list[list[dict[str, float]]]] = {}
    explained_by: dict[str, list[float]] = {}
    for seed in seeds:
        config = asdict(small_run(model, hook, seed))
        key = ["meaning", identity_of(prepared.sae("main")), config, prepared.sized(ROWS, 24), prepared.sized(UNITS, 8)]
        found = resumed("sae_meaning", key, one_seed, model, hook, seed, read)
        more = resumed("sae_meaning", ["more", *key], more_of_seed, model, hook, seed, read, neurons)
        for kind, units in (found["units"] | more).items():
            kinds.setdefault(kind, []).append(units)
        for kind, value in found["explained"].items():
            explained_by.setdefault(kind, []).append(value)
    rows = [comparing.row_of(kinds, kind, score) for kind in kinds for score in meaning.SCORES]
    small = {k: config[k] for k in ("d_sae", "options", "samples", "tokens", "lr", "batch")}
    sizes = {"rows": prepared.sized(ROWS, 24), "units_of_each_seed": prepared.sized(UNITS, 8), "small_saes": small}
    seconds = time.time() - start
    content: dict[str, Any] = {"seeds": seeds, "hook": hook, "sae": prepared.sae("main")} | sizes
    return write_table("sae_meaning", model, seconds, **content, explained=explained_by, summary=rows, units=kinds)


# --- architectures ------------------------------------------------------------------------------------


def one_architecture(model: Model, hook: str, architecture: str, seed: int) -> dict[str, Any]:
    """One small SAE: what it rebuilds, and how far its features have one meaning each."""
    config = small_run(model, hook, seed, architecture)
    sae, rows = trained(model, config), texts_for(model)
    x = read_shard(shard_path(config.harvest.folder, 0), hook).x
    scaling = measure_scaling(x)
    tokens = quality.held_out(model, config, prepared.sized(quality.HELD_ROWS, 8))
    measure: dict[str, Any] = {
        "median_norm": scaling.median_norm,
        "mean": scaling.mean,
        "ce_rows": prepared.sized(16, 2),
    }
    report = quality.evaluate_sae(model, sae, tokens, site_of_sae(sae), **measure)
    seen = meaning.see(model, site_of_sae(sae), rows, scaling.median_norm)
    chosen, _ = drawn(sae, config.d_sae, seen, prepared.sized(UNITS, 8), seed)
    texts, encoders = meaning.texts_of(model, rows, seen.usual), {architecture: meaning.of_sae(sae, chosen)}
    units = meaning.compared(texts, seen, encoders, {}, seed)[architecture]
    numbers = {k: round(v, 4) for k, v in report.numbers.items()}
    scores = {s: round(float(np.mean([u[s] for u in units])), 4) if units else None for s in meaning.SCORES}
    return {"architecture": architecture, "seed": seed, **numbers, **scores, "n_units": len(units)}


def study_architectures() -> Path:
    """Five architectures under the same conditions, several seeds: reconstruction and meaning."""
    start, model = time.time(), load_subject()
    hook = hook_of(site_of_sae(load_sae(prepared.sae("main"), model)))
    rows = []
    for architecture in ARCHITECTURES:
        for seed in range(prepared.sized(SEEDS, 2)):
            key = ["architecture", asdict(small_run(model, hook, seed, architecture)), prepared.sized(ROWS, 24)]
            rows.append(resumed("sae_architectures", key, one_architecture, model, hook, architecture, seed))
    shared = asdict(small_run(model, hook, 0))
    same = {k: shared[k] for k in ("d_sae", "samples", "tokens", "lr", "batch", "warmup", "decay")}
    seconds = time.time() - start
    return write_table(
        "sae_architectures", model, seconds, hook=hook, conditions=same, options=ARCHITECTURES, rows=rows
    )


STUDIES_OF_MEANING = {"sae-meaning": study_meaning}
STUDIES_OF_ARCHITECTURES = {"sae-architectures": study_architectures}
