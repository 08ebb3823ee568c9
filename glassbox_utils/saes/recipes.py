"""The SAE that ``glassbox prepare`` trains for a role of a model: where it reads, how it is called, how it learns."""

from typing import Any

from glassbox_utils.core import prepared
from glassbox_utils.core.models import Model, Site
from glassbox_utils.saes.config import SaeError, TrainConfig, hook_of

PASSES = 3
"""times that each harvested activation is seen, as the embedded model's SAEs saw theirs"""
ACTIVE = 50
"""features that are active at a position; of fewer than 800 the 16th part"""


def layer_of(model: Model, role: str) -> int:
    """The layer after which the SAE of a role reads: half of the depth (``main``) or two thirds (``late``)."""
    if role not in prepared.ROLES:
        raise SaeError(f"There is no role {role!r}. Allowed: {', '.join(prepared.ROLES)}.")
    return max(0, model.n_layers // 2 - 1 if role == "main" else 2 * model.n_layers // 3 - 1)


def recipe(
    model: Model,
    role: str,
    tokens: int,
    d_sae: int = 8192,
    samples: int | None = None,
    source: str | None = None,
    corpus: str = "mix",
) -> TrainConfig:
    """The configuration of a TopK SAE on the residual stream at the relative depth of a role.

    ``tokens`` are harvested and each seen ``PASSES`` times, unless ``samples`` says how many activations are seen.
    ``source`` is what ``load_model`` takes (its name if None), ``corpus`` as in a ``config.yaml``. Small sizes give
    smaller shards and batches, so that a few thousand tokens are a harvest too.
    """
    layer, context = layer_of(model, role), min(256, model.n_context)
    rows = max(1, min(256, tokens // context))
    mixed = min(4, max(1, tokens // (context * rows)))
    samples = PASSES * tokens if samples is None else samples
    batch = max(1, min(2048, samples, mixed * rows * (context - 1) // 2))  # outliers leave a part of a block
    sizes: dict[str, Any] = {"context": context, "rows_per_shard": rows, "shards_mixed": mixed, "batch": batch}
    return TrainConfig(
        name=f"topk-{d_sae}-l{layer}",
        hook=hook_of(Site("resid_post", layer)),
        architecture="topk",
        d_sae=d_sae,
        samples=samples,
        tokens=tokens,
        options={"k": min(ACTIVE, max(1, d_sae // 16))},
        corpus=corpus,
        model=source or model.name,
        lr=2e-3,
        warmup=min(100, samples // batch // 10),
        decay=0.5,
        auxiliary=1 / 32,
        normalize="constant_norm_rescale",  # so that plain sae_lens may splice it in at massive positions too
        unit_rows=True,
        **sizes,
    )
