"""What is trained where: hook names, the configuration of a harvest and of a training run, and their errors."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from glassbox_utils.core import assets, corpora, distributed
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import EMBEDDED, KINDS, Model, Site, check_site

SAES = assets.DATA / "saes"

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
    """rows of a forward pass on a CPU; a GPU takes as many as its memory holds"""

    @property
    def n_shards(self) -> int:
        return max(1, self.n_tokens // (self.context * self.rows_per_shard))


def check_harvest(config: HarvestConfig, model: Model) -> None:
    """SaeError for a harvest that can't be done with this model, ModelError for a layer that it has not."""
    numbers = ("n_tokens", "context", "rows_per_shard", "rows_per_batch")
    _check_positive({name: getattr(config, name) for name in numbers}, "harvest")
    if not 2 <= config.context <= model.n_context:
        raise SaeError(f"context is {config.context}. Allowed with {model.name}: 2 to {model.n_context} tokens.")
    if not config.hooks:
        raise SaeError(
            f"hooks is empty. Give at least one, such as {hook_of(Site('resid_post', model.n_layers // 2))}."
        )
    for hook in config.hooks:
        check_site(model, site_of(hook))


def _check_positive(values: dict[str, Any], where: str) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            hint = (
                " Write it without quotes, dots or an exponent, such as 1000000." if not isinstance(value, int) else ""
            )
            raise SaeError(f"{name} is {value!r} in {where}. Allowed: a whole number from 1.{hint}")


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
    """train on the same architecture with its weights permuted: a baseline (``shuffled_model``)"""
    stream: bool = False
    """read activations from the model while training, pass after pass in order, and write no shards: memory and disk
    stay the same however many tokens there are"""

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
    check_training(config)
    return config


def check_training(config: TrainConfig) -> None:
    """SaeError for a run that could not begin or would never end; it names the field, what is allowed, and the fix."""
    where = f"the configuration {config.name!r}"
    whole = ("d_sae", "samples", "tokens", "context", "rows_per_shard", "shards_mixed", "batch", "warmup")
    _check_positive({k: getattr(config, k) for k in (*whole, "reseed_every", "checkpoint_every")}, where)
    for name, low, high in (("lr", 0.0, 1.0), ("decay", 0.0, 1.0)):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
            raise SaeError(f"{name} is {value!r} in {where}. Allowed: a number above {low:g}, at most {high:g}.")
    site_of(config.hook)
    block = config.shards_mixed * config.rows_per_shard * (config.context - 1)
    if config.batch > block:
        raise SaeError(
            f"batch is {config.batch:,} in {where}, but {config.shards_mixed} shards that are shuffled together hold "
            f"{block:,} positions. Allowed: at most that many, or mix more shards (shards_mixed)."
        )
    if config.batch > config.samples:
        raise SaeError(f"samples is {config.samples:,} in {where}. Allowed: at least one batch ({config.batch:,}).")
    world = distributed.world()
    if config.batch % world:
        raise SaeError(f"batch is {config.batch:,} in {where}. Allowed with {world} ranks: a multiple of {world}.")
    if large := [size for size in config.growth if not 1 <= size <= config.n_shards]:
        raise SaeError(f"growth has {large} in {where}. Allowed: 1 to {config.n_shards}, the shards of `tokens`.")
    if config.stream and config.growth:
        raise SaeError(f"growth is {list(config.growth)} in {where}. With stream, leave it out: no shards are written.")
