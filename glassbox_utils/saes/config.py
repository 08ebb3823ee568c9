"""What is trained where: hook names, the configuration of a harvest and of a training run, and their errors.

A configuration is checked when it is made, whether by a ``config.yaml`` or in Python: types and ranges by ``schema``,
from the annotations, and what several fields must agree on here.
"""

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from glassbox_utils.core import assets, corpora, distributed, prepared, schema
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import EMBEDDED, KINDS, Model, Site, check_site


def saes_folder() -> Path:
    """Where the SAEs of the prepared folder lie, each in a folder of sae_lens format."""
    return prepared.path("saes")


_HOOKS = {kind: {"z": "attn.hook_z", "mlp_post": "mlp.hook_post"}.get(kind, f"hook_{kind}") for kind in KINDS}
_ALSO = {"hook_in": "resid_pre", "hook_out": "resid_post", "attn.o.hook_in": "z"} | {
    "attn.hook_out": "attn_out", "mlp.hook_out": "mlp_out", "mlp.out.hook_in": "mlp_post"
}  # fmt: skip
"""how TransformerLens 3 calls the same places"""


class SaeError(GlassboxError, ValueError):
    """A hook, shard folder, configuration or SAE that does not fit; the message says what does."""


def hook_of(site: Site) -> str:
    """TransformerLens's name of a site: ``Site("resid_post", 14)`` -> ``blocks.14.hook_resid_post``."""
    return f"blocks.{site.layer}.{_HOOKS[site.kind]}"


def site_of(hook: str) -> Site:
    """The site of a TransformerLens hook name, old or new; SaeError lists the allowed ones."""
    if isinstance(hook, str) and (match := re.fullmatch(r"blocks\.(\d{1,9})\.(.+)", hook, re.ASCII)):
        kinds: dict[str, Any] = {name: kind for kind, name in _HOOKS.items()} | _ALSO
        if match[2] in kinds:
            return Site(kinds[match[2]], int(match[1]))
    raise SaeError(f"There is no hook {hook!r}. Allowed: " + ", ".join(f"blocks.L.{h}" for h in _HOOKS.values()) + ".")


# --- harvest ------------------------------------------------------------------------------------------

Count = Annotated[int, Field(ge=1)]
MOST_SHARDS = 100_000
"""what the names of shards have digits for; of the default size they hold six thousand million tokens"""
Name = Annotated[str, Field(pattern=r"^[^\n\r\x00]{1,400}$", description="a name or folder of one to 400 characters")]


@dataclass(frozen=True)
class HarvestConfig:
    """What to harvest, and into which folder. Raises SaeError for what can't be harvested from any model."""

    folder: Path
    hooks: tuple[str, ...]
    n_tokens: Count
    corpus: str = "mix"
    split: corpora.Split = "train"
    model: Name = EMBEDDED
    context: Annotated[int, Field(ge=2)] = 256
    rows_per_shard: Count = 256
    """65,536 tokens with the default context: 75 MB for each hook at d_model 576"""
    rows_per_batch: Count = 16
    """rows of a forward pass on a CPU; a GPU takes as many as its memory holds"""

    def __post_init__(self) -> None:
        schema.check(self, SaeError)
        _check_text(self.corpus, self.split)
        if not self.hooks:
            raise SaeError(f"hooks is empty. Give at least one, such as {hook_of(Site('resid_post', 1))}.")
        for hook in self.hooks:
            site_of(hook)
        if len(set(self.hooks)) < len(self.hooks):
            raise SaeError(f"hooks is {list(self.hooks)}. Allowed: each hook once.")
        _check_shards("n_tokens", self.n_tokens, self.context * self.rows_per_shard)

    @property
    def n_shards(self) -> int:
        return max(1, self.n_tokens // (self.context * self.rows_per_shard))


def check_harvest(config: HarvestConfig, model: Model) -> None:
    """SaeError for a context that this model has not, ModelError for a layer that it has not."""
    if config.context > model.n_context:
        raise SaeError(f"context is {config.context}. Allowed with {model.name}: 2 to {model.n_context} tokens.")
    for hook in config.hooks:
        check_site(model, site_of(hook))


def width_of(model: Model, site: Site) -> int:
    """Numbers at each position of a site: d_model, those of all heads side by side, or d_mlp."""
    if site.kind == "mlp_post":
        return model.sites[site][0].get_parameter("weight").numel() // model.d_model
    return model.n_heads * model.d_head if site.kind == "z" else model.d_model


def _check_text(corpus: str, split: str = "train") -> None:
    try:
        corpora.check_corpus(corpus, split)
    except corpora.CorpusError as reason:
        raise SaeError(str(reason)) from reason


def _check_shards(name: str, tokens: int, size: int) -> None:
    if tokens // size > MOST_SHARDS:
        raise SaeError(
            f"{name} is {tokens:,}, that is {tokens // size:,} shards of {size:,} tokens. Allowed: at most "
            f"{MOST_SHARDS:,} shards; ask for fewer tokens, or give a shard more rows (rows_per_shard)."
        )


# --- training -----------------------------------------------------------------------------------------

LONGEST = 180
"""characters of a folder's name in the cache"""
Share = Annotated[float, Field(ge=0)]
Size = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class _TopK:
    """What may stand in ``options`` for each architecture, with sae_lens's own names and defaults."""

    k: Count = 100
    decoder_init_norm: Size = 1.0

    def __post_init__(self) -> None:
        schema.check(self, SaeError)


@dataclass(frozen=True)
class _BatchTopK(_TopK):
    k: Annotated[float, Field(ge=1)] = 100  # type: ignore[assignment]
    aux_loss_coefficient: Share = 1.0
    rescale_acts_by_decoder_norm: bool = True
    topk_threshold_lr: Annotated[float, Field(gt=0, le=1)] = 0.01
    apply_b_dec_to_input: bool = True


@dataclass(frozen=True)
class _Matryoshka(_BatchTopK):
    matryoshka_widths: tuple[Count, ...] = ()
    use_matryoshka_aux_loss: bool = False


@dataclass(frozen=True)
class _Gated:
    l1_coefficient: Share = 1.0
    l1_warm_up_steps: Annotated[int, Field(ge=0)] = 0
    decoder_init_norm: Size = 1.0
    apply_b_dec_to_input: bool = True

    def __post_init__(self) -> None:
        schema.check(self, SaeError)


@dataclass(frozen=True)
class _Standard(_Gated):
    lp_norm: Size = 1.0


@dataclass(frozen=True)
class _JumpReLU:
    l0_coefficient: Share = 1.0
    l0_warm_up_steps: Annotated[int, Field(ge=0)] = 0
    jumprelu_init_threshold: Size = 0.01
    jumprelu_bandwidth: Size = 0.05
    jumprelu_sparsity_loss_mode: Literal["step", "tanh", "quadratic"] = "step"
    jumprelu_tanh_scale: Size = 4.0
    jumprelu_ste_to_input: bool = False
    pre_act_loss_coefficient: Share | None = None
    target_l0: Size | None = None
    decoder_init_norm: Size = 1.0
    apply_b_dec_to_input: bool = True

    def __post_init__(self) -> None:
        schema.check(self, SaeError)


OPTIONS: dict[str, type[Any]] = {
    "topk": _TopK, "batchtopk": _BatchTopK, "standard": _Standard, "jumprelu": _JumpReLU, "gated": _Gated,
    "matryoshka_batchtopk": _Matryoshka,
}  # fmt: skip
Architecture = Literal["topk", "batchtopk", "standard", "jumprelu", "gated", "matryoshka_batchtopk"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run, as written in a ``config.yaml``. Raises SaeError for a run that could not begin or never end,
    with the field, its value, what is allowed, and the fix."""

    name: Annotated[str, Field(pattern=r"^\w[\w.+-]{0,99}$", description="letters, digits, dots and dashes")]
    hook: str
    architecture: Architecture
    d_sae: Annotated[int, Field(ge=1, le=2**24)]
    samples: Annotated[int, Field(ge=1, le=10**13)]
    """activations seen in all, repeats included"""
    tokens: Count
    """tokens to harvest; they become whole shards"""
    options: dict[str, Any] = field(default_factory=dict)
    """further arguments of sae_lens's training configuration: k, l1_coefficient, l0_coefficient, ... (``OPTIONS``)"""
    shards: Annotated[str, Field(pattern=r"^[^\n\r\x00]{0,400}$", description="a folder, or nothing")] = ""
    """folder of the harvest; empty: in the cache"""
    growth: tuple[Count, ...] = ()
    """how many shards the first passes read (later ones read all), so that training can begin during the harvest"""
    corpus: str = "mix"
    model: Name = EMBEDDED
    context: Annotated[int, Field(ge=2)] = 256
    rows_per_shard: Count = 256
    shards_mixed: Count = 4
    """shards that are read and shuffled together"""
    batch: Count = 2048
    lr: Annotated[float, Field(gt=0, le=1)] = 8e-4
    warmup: Annotated[int, Field(ge=0)] = 100
    """steps; 0: the full learning rate from the first step on"""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.3
    """fraction of the steps over which the learning rate falls to zero at the end"""
    reseed_every: Count = 500
    """steps between re-seedings of dead features (TopK only)"""
    checkpoint_every: Count = 100
    """steps"""
    seed: Annotated[int, Field(ge=0, lt=2**40)] = 0
    unit_rows: bool = False
    """TopK only: decoder rows of unit length and gradients as they are, as the shipped ones were trained, instead of
    learning the rows' norms as gains and clipping gradients, which learns faster in the first hundreds of steps"""
    auxiliary: Share = 0.0
    """TopK only: weight of the loss by which dead features learn what the others leave over (1/32 in Gao et al., arXiv
    2406.04093), instead of being re-seeded"""
    frozen_decoder: bool = False
    """decoder rows stay the random unit vectors that they began as, and only what reads is learnt: the opponent that a
    dictionary of concepts has to beat (arXiv 2602.14111)"""
    normalize: Literal["mean_norm", "constant_norm_rescale"] = "mean_norm"
    """what brings activations to the norm sqrt(d_model): one number for all, massive positions left out; or each
    position's own norm, which sae_lens divides out too, massive positions among the rest"""
    shuffle_weights: bool = False
    """train on the same architecture with its weights permuted: a baseline (``shuffled_model``)"""
    stream: bool = False
    """read activations from the model while training, pass after pass in order, and write no shards: memory and disk
    stay the same however many tokens there are"""

    def __post_init__(self) -> None:
        schema.check(self, SaeError)
        site_of(self.hook)
        _check_text(self.corpus)
        _check_options(self)
        _check_sizes(self)

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
        name = re.sub(r"[^\w.+-]+", "-", name.replace("/", "--"))  # of a blend only what every disk takes
        if len(name) > LONGEST:  # the model is a folder far down
            name = f"{hashlib.sha256(name.encode()).hexdigest()[:16]}{name[-LONGEST + 16 :]}"
        folder = Path(self.shards) if self.shards else assets.cache_dir() / "activations" / name
        shard = {"context": self.context, "rows_per_shard": self.rows_per_shard}
        return HarvestConfig(folder, (self.hook,), self.tokens, self.corpus, "train", self.model, **shard)


def _check_options(config: TrainConfig) -> None:
    """What sae_lens would take without a word, or not notice before the first step."""
    where = f"options of the architecture {config.architecture!r}"
    given: Any = schema.build(OPTIONS[config.architecture], config.options, where, SaeError)
    if (k := getattr(given, "k", 1)) > config.d_sae:
        raise SaeError(
            f"k is {k} in options, of {config.d_sae:,} features (d_sae). Allowed: at most as many as there are; give k "
            "(the default is 100)."
        )
    widths = getattr(given, "matryoshka_widths", None)
    if widths is not None and (list(widths) != sorted(set(widths)) or not widths or widths[-1] != config.d_sae):
        raise SaeError(
            f"matryoshka_widths is {list(widths)} in options. Allowed: whole numbers, each larger than the one before, "
            f"the last one d_sae, such as {[max(1, config.d_sae // 4), config.d_sae]}."
        )
    for name in ("unit_rows", "auxiliary"):
        if (value := getattr(config, name)) and config.architecture != "topk":
            raise SaeError(
                f"{name} is {value!r} for the architecture {config.architecture!r}. Allowed with topk only."
                + (" Others have aux_loss_coefficient among their options." if name == "auxiliary" else "")
            )


def _check_sizes(config: TrainConfig) -> None:
    """What must fit into each other: batch, block, samples, shards."""
    where = f"the configuration {config.name!r}"
    _check_shards("tokens", config.tokens, config.context * config.rows_per_shard)
    block = config.shards_mixed * config.rows_per_shard * (config.context - 1)
    if config.batch > block:
        raise SaeError(
            f"batch is {config.batch:,} in {where}, but {config.shards_mixed} shards that are shuffled together hold "
            f"{block:,} positions. Allowed: at most that many, or mix more shards (shards_mixed)."
        )
    if config.batch > config.samples:
        raise SaeError(f"samples is {config.samples:,} in {where}. Allowed: at least one batch ({config.batch:,}).")
    if large := [size for size in config.growth if size > config.n_shards]:
        raise SaeError(f"growth has {large} in {where}. Allowed: 1 to {config.n_shards}, the shards of `tokens`.")
    if config.stream and config.growth:
        raise SaeError(f"growth is {list(config.growth)} in {where}. With stream, leave it out: no shards are written.")


EXAMPLE = "the config.yaml of a folder in data/saes, or one like it"


def read_config(path: str | Path) -> TrainConfig:
    """A ``config.yaml``, or that of a folder; SaeError names the field, its value, what is allowed, and the fix."""
    path = Path(path) / "config.yaml" if Path(path).is_dir() else Path(path)
    if not path.exists():
        raise SaeError(f"There is no file {path}. Give the config.yaml of a folder in data/saes.")
    return schema.build(TrainConfig, schema.read_mapping(path, SaeError, EXAMPLE), str(path), SaeError)


def check_training(config: TrainConfig) -> None:
    """SaeError for a batch that the ranks of this run can't divide."""
    if config.batch % (world := distributed.world()):
        raise SaeError(
            f"batch is {config.batch:,} in the configuration {config.name!r}. Allowed with {world} ranks: a multiple "
            f"of {world}."
        )
