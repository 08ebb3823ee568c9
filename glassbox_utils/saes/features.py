"""Features of a sparse autoencoder: find them, describe them, test the description, show them on a page.

Everything starts from ``scan``, which runs model and SAE over packed rows once and keeps only what is active.
A description is a claim like any other: labels come with an enrichment p-value from one half of the text and a
detection score from the other half.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from glassbox_utils.core import coding, readout
from glassbox_utils.core.arguments import shown, whole
from glassbox_utils.core.corpora import Document, Rows
from glassbox_utils.core.devices import beside, like, result
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.models import Model, Site, check_site
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import str_tokens
from glassbox_utils.saes import reading
from glassbox_utils.saes.harvest import activations, ordinary
from glassbox_utils.saes.reading import site_of_sae as site_of_sae


class FeatureError(GlassboxError, ValueError):
    """A feature that does not exist or never fires; the message names the allowed range."""


@dataclass(frozen=True, eq=False)
class Scan:
    """What every feature did on some rows, kept sparsely and sorted by feature."""

    rows: Rows
    documents: Sequence[Document]
    features: Int[Tensor, " active"]
    positions: Int[Tensor, " active"]
    """index into the flattened rows"""
    values: Float[Tensor, " active"]
    starts: Int[Tensor, " d_sae_and_one"]
    """entries of feature f are starts[f] to starts[f + 1]"""
    usual: Float[Tensor, "row pos"]
    """boolean: neither first token nor outlier; features are kept only there"""

    @property
    def d_sae(self) -> int:
        return len(self.starts) - 1

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Fraction of ordinary tokens on which each feature fires."""
        return self.starts.diff() / int(self.usual.sum())


@torch.inference_mode()
def scan(model: Model, sae: Any, rows: Rows, documents: Sequence[Document], rows_per_batch: int = 8) -> Scan:
    """Run model and SAE over packed rows (``corpora.token_rows``) and keep every activation above zero.

    SaeError for an SAE of another model, and for no rows.
    """
    site = reading.check_fits(model, sae)
    _check_rows(rows, documents)
    whole("rows_per_batch", rows_per_batch, 1, FeatureError)
    median = reading.median_norm(model, sae)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    usual = torch.zeros_like(rows.tokens, dtype=torch.bool)
    width = rows.tokens.shape[1]
    for start in progress(range(0, len(rows.tokens), rows_per_batch), "scan"):
        x = activations(model, rows.tokens[start : start + rows_per_batch].long(), [site])[site].float()
        keep = ordinary(x, median)
        usual[start : start + rows_per_batch] = result(keep)
        code = coding.encode(sae, x[keep])
        where = keep.flatten().nonzero()[:, 0] + start * width
        token, feature = code.nonzero(as_tuple=True)
        found.append((result(feature), result(where[token]), result(code[token, feature])))
    features, positions, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = features.argsort(stable=True)
    starts = torch.zeros(sae.cfg.d_sae + 1, dtype=torch.long)
    starts[1:] = torch.bincount(features, minlength=sae.cfg.d_sae).cumsum(0)
    return Scan(rows, documents, features[order], positions[order], values[order], starts, usual)


@torch.inference_mode()
def scan_neurons(model: Model, layer: int, rows: Rows, documents: Sequence[Document], usual: Tensor) -> Scan:
    """The same for the neurons of one MLP: what enters its output projection, positive values only.

    ``usual``: the positions to keep, as in a scan of the same rows.
    """
    _check_rows(rows, documents)
    if usual.shape != rows.tokens.shape:
        raise FeatureError(f"usual has shape {tuple(usual.shape)}, the rows {tuple(rows.tokens.shape)}. Give a scan's.")
    module = model.sites[check_site(model, Site("mlp_out", layer))][0]
    store: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: store.append(result(args[0].float().relu())))
    try:
        for start in range(0, len(rows.tokens), 8):
            activations(model, rows.tokens[start : start + 8].long(), [Site("mlp_out", layer)])
    finally:
        handle.remove()
    values = torch.cat(store).flatten(0, 1) * usual.flatten()[:, None]
    features, positions = values.t().nonzero(as_tuple=True)
    starts = torch.zeros(values.shape[1] + 1, dtype=torch.long)
    starts[1:] = torch.bincount(features, minlength=values.shape[1]).cumsum(0)
    return Scan(rows, documents, features, positions, values[positions, features], starts, usual)


def _check_rows(rows: Rows, documents: Sequence[Document]) -> None:
    if not isinstance(rows, Rows) or rows.tokens.ndim != 2 or not rows.tokens.numel():
        raise FeatureError(f"The rows are {shown(rows)}. Give what corpora.token_rows returns.")
    if int(rows.documents.max()) >= len(documents):
        raise FeatureError(
            f"The rows come from {int(rows.documents.max()) + 1} documents, {len(documents)} were given. Give those "
            "that the rows were made of."
        )


def check_feature(scanned: Scan, feature: int) -> int:
    """The feature's number; FeatureError for one that is none, negative ones and booleans included."""
    return reading.check_index(feature, scanned.d_sae, FeatureError)


def firing(scanned: Scan, feature: int) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Flat positions and values where one feature is active."""
    start, end = scanned.starts[check_feature(scanned, feature) :][:2].tolist()
    return scanned.positions[start:end], scanned.values[start:end]


def dense(scanned: Scan, feature: int) -> Float[Tensor, "row pos"]:
    """One feature's activation at every token of the scan, zero where it is silent."""
    positions, values = firing(scanned, feature)
    out = torch.zeros(scanned.rows.tokens.numel())
    out[positions] = values
    return out.view(scanned.rows.tokens.shape)


# --- examples and effects -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A stretch of text around one activation."""

    tokens: list[str]
    values: list[float]
    peak: int
    """index of the token that was chosen"""
    quantile: float
    """rank of its activation among all activations of the feature: 1 is the strongest"""
    source: str
    licence: str


def examples(
    model: Model, scanned: Scan, feature: int, n: int = 8, spread: bool = True, context: int = 12
) -> list[Example]:
    """Stretches of text on which a feature fires, at most one from a document.

    ``spread``: from the strongest activation down to the weakest in even steps, because the strongest alone make any
    feature look cleaner than it is; False: the strongest only. Raises FeatureError for a silent feature.
    """
    whole("n", n, 1, FeatureError), whole("context", context, 0, FeatureError)
    positions, values = firing(scanned, feature)
    if not len(positions):
        raise FeatureError(f"Feature {feature} never fires on these {int(scanned.usual.sum()):,} tokens.")
    order = values.argsort(descending=True)
    wanted = torch.linspace(0, len(order) - 1, n).round().int().tolist() if spread else range(len(order))
    activation, width = dense(scanned, feature), scanned.rows.tokens.shape[1]
    chosen: list[Example] = []
    used: set[int] = set()
    for rank in wanted:
        row, pos = divmod(int(positions[order[rank]]), width)
        owner = int(scanned.rows.documents[row, pos])
        if owner in used:
            continue
        used.add(owner)
        span = slice(max(0, pos - context), min(width, pos + context + 1))
        document = scanned.documents[owner]
        chosen.append(
            Example(
                tokens=str_tokens(model, scanned.rows.tokens[row, span]),
                values=activation[row, span].tolist(),
                peak=pos - span.start,
                quantile=1 - rank / len(order),
                source=document.source,
                licence=document.licence,
            )
        )
        if len(chosen) == n:
            break
    return chosen


@dataclass(frozen=True)
class LogitEffect:
    """Tokens that a feature's decoder row pushes up and down, seen straight from its layer."""

    up: list[tuple[str, float]]
    down: list[tuple[str, float]]


def logit_effect(model: Model, sae: Any, feature: int, n: int = 10) -> LogitEffect:
    """Decoder row through final-norm weights and unembedding: direct effects only, later layers ignored.

    A row of ``z`` goes through the heads' output projection first. SaeError for an SAE of another model, FeatureError
    for a feature or a number of tokens that is none.
    """
    site = reading.check_fits(model, sae)
    reading.check_index(feature, sae.cfg.d_sae, FeatureError), whole("n", n, 1, FeatureError)
    unembedding = model.hf.get_output_embeddings().weight.detach()[: len(model.tokenizer)]  # the rest is padding
    direction = beside(sae.W_dec[feature].detach().float(), unembedding)
    if site.kind == "z":
        project = cast(Any, model.sites[site][0])
        with torch.no_grad():
            one = like(direction, unembedding)[None, None]
            direction = (project(one) - project(torch.zeros_like(one)))[0, 0].float()
    logits = result(unembedding.float() @ readout.through_weights(readout.final_norm(model), direction[None])[0])
    logits = logits - logits.mean()

    def listed(indices: Tensor) -> list[tuple[str, float]]:
        return [(model.tokenizer.decode([int(i)]), float(logits[i])) for i in indices]

    n = min(n, len(logits))
    return LogitEffect(listed(logits.topk(n).indices), listed((-logits).topk(n).indices))


def neighbours(sae: Any, feature: int, n: int = 5) -> list[tuple[int, float]]:
    """Features with the most similar decoder rows, with their cosines. FeatureError for one that is none."""
    reading.check_index(feature, len(sae.W_dec), FeatureError), whole("n", n, 1, FeatureError)
    rows = F.normalize(sae.W_dec.detach().float(), dim=-1)
    cosines = rows @ rows[feature]
    cosines[feature] = -1
    top = cosines.topk(min(n, len(cosines) - 1))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
