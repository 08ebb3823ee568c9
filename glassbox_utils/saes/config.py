"""What is trained where: hook names, the configuration of a harvest and of a training run, and their errors."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from glassbox_utils.core import assets, corpora
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import EMBEDDED, KINDS, Site

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
