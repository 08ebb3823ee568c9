"""What an SAE reads and writes: its own hook, in its own units, at the positions that it was made for.

Whatever uses an SAE comes here first (the code itself: ``core.coding``). An SAE that somebody else trained
may lack what ours record: its *hook* is needed; its *median norm* (which says what an outlier is) and the scale of its
inputs, if it wants one and its file does not hold it, are measured; and of which *weights* it was made nobody can know.
Refused are tools whose output stands at another place than their input (transcoders), whose features have a sign or
depend on other positions, and whose inputs are whitened by a matrix that is not stored with them.
"""

import math
import weakref
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core import corpora, packing
from glassbox_utils.core.arguments import shown
from glassbox_utils.core.devices import result
from glassbox_utils.core.errors import GlassboxError
from glassbox_utils.core.identity import difference
from glassbox_utils.core.models import Model, Site
from glassbox_utils.saes.config import SaeError, site_of, width_of
from glassbox_utils.saes.harvest import activations

READ = (
    "standard", "gated", "topk", "batchtopk", "jumprelu", "matryoshka_batchtopk", "matching_pursuit",
)  # fmt: skip
"""architectures whose features are not negative and depend on one position"""
SCALED = ("expected_average_only_in", "covariance_whitening")
"""normalisations by numbers of the training text, which sae_lens folds into the weights and does not store"""


def check_kind(sae: Any) -> None:
    """SaeError for what can't be read as an SAE at one place: see the head of this module."""
    cfg, meta = sae.cfg, sae.cfg.metadata
    hook, out = meta.get("hook_name"), meta.get("hook_name_out")
    kind = cfg.architecture() if callable(getattr(cfg, "architecture", None)) else None
    if "transcoder" in str(kind) or (out and out != hook):
        raise SaeError(
            f"This is a {kind or 'tool'} that reads {hook or 'at one place'} and writes {out or 'at another'}: its "
            "rows mean nothing where it reads. Allowed: sparse autoencoders, which read and write at one place."
        )
    if kind is not None and kind not in READ:
        raise SaeError(f"SAEs of the architecture {kind!r} can't be used here. Allowed: {', '.join(READ)}.")
    if (scaled := getattr(cfg, "normalize_activations", "none")) in SCALED:
        raise SaeError(
            f"This SAE expects activations scaled by its training text ({scaled}), and that scale is not stored with "
            "it. gb.load_sae(NAME, MODEL) measures a scale (not a whitening); or fold the known one into the weights "
            "(sae.fold_activation_norm_scaling_factor of sae_lens), save and load again."
        )
    stored_median(sae)


def site_of_sae(sae: Any) -> Site:
    """Where an SAE reads and writes, from its metadata; SaeError if they name no place, or two."""
    check_kind(sae)
    if not (hook := sae.cfg.metadata.get("hook_name")):
        raise SaeError(
            "This SAE does not say where it reads: its metadata have no hook_name. Set it to the place that it was "
            "trained on, such as sae.cfg.metadata.hook_name = 'blocks.1.hook_resid_post'."
        )
    return site_of(hook)


def check_fits(model: Model, sae: Any, error: type[GlassboxError] = SaeError) -> Site:
    """The SAE's site, if it can be used with this model; else ``error`` says what differs."""
    if not hasattr(sae, "cfg") or not hasattr(sae, "encode"):
        raise error(f"{shown(sae)} is no SAE. Give what gb.load_sae returns.")
    meta = sae.cfg.metadata
    try:
        site = site_of_sae(sae)
    except SaeError as reason:
        raise error(str(reason)) from reason
    if sae.cfg.d_in != (width := width_of(model, site)):
        raise error(
            f"This SAE reads {sae.cfg.d_in} dimensions (it was made for {meta.get('model_name') or 'another model'}), "
            f"{meta.hook_name} of {model.name} has {width}. Load one that was trained on this model."
        )
    if why := difference(meta.get("model_hash"), model.hash):
        raise error(
            f"This SAE was trained on {meta.get('model_name')} with weights {meta.model_hash}, this model is "
            f"{model.name} with hash {model.hash}, so its features mean nothing here: {why}. Load the model that its "
            "card names, or train an SAE for this one."
        )
    if site not in model.sites:
        raise error(
            f"This SAE reads {meta.hook_name}, but {model.name} has layers 0 to {model.n_layers - 1} only. Use an SAE "
            "of one of these layers."
        )
    return site


# --- what is usual ------------------------------------------------------------------------------------

TEXTS, CONTEXT = 64, 128
"""passages, and tokens to a row, on which an unknown median norm is measured"""
_measured: weakref.WeakKeyDictionary[Any, dict[str, float]] = weakref.WeakKeyDictionary()


def stored_median(sae: Any) -> float | None:
    """The median norm that the metadata name, if they do; SaeError if it is none."""
    value = sae.cfg.metadata.get("median_norm")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise SaeError(f"median_norm is {shown(value)} in this SAE's metadata. Allowed: a number above 0, or none.")
    return float(value)


def median_norm(model: Model, sae: Any) -> float:
    """The median norm of the activations that an SAE reads: as stored, else measured once on passages that we wrote.

    Positions of many times this norm are left out or left alone.
    """
    if (known := stored_median(sae)) is not None:
        return known
    found = _measured.setdefault(sae, {})
    if model.hash not in found:
        found[model.hash] = measured_median(model, site_of_sae(sae))
    return found[model.hash]


def measured_median(model: Model, site: Site) -> float:
    """The median norm at a site, first tokens left out."""
    median = float(norms_at(model, site)[:, 1:].median())
    if not 0 < median < math.inf:
        raise SaeError(f"The norms of {site.kind} of layer {site.layer} of {model.name} have the median {median}.")
    return median


def measured_scale(model: Model, sae: Any) -> float:
    """The factor of sae_lens's ``expected_average_only_in``: it brings the mean norm, first tokens included, to the
    root of the width. Ours is measured on passages that we wrote, in rows of the SAE's own context."""
    context = sae.cfg.metadata.get("context_size")
    usual = context if isinstance(context, int) and context > 1 else CONTEXT
    mean = float(norms_at(model, site_of(sae.cfg.metadata.hook_name), usual).mean())
    if not 0 < mean < math.inf:
        raise SaeError(f"The norms at {sae.cfg.metadata.hook_name} of {model.name} have the mean {mean}.")
    return sae.cfg.d_in**0.5 / mean


@torch.inference_mode()
def norms_at(model: Model, site: Site, context: int = CONTEXT) -> Float[Tensor, "row pos"]:
    """Norms of the activations at a site, on passages that we wrote."""
    texts = (text for text, _, _ in corpora.landmark_passages(TEXTS))
    norms = []
    for some in packing.packed(model, texts, min(context, model.n_context)):
        for part in some.tokens.split(8):
            norms.append(result(activations(model, part, [site])[site].float().norm(dim=-1)))
    if not norms:
        raise SaeError(f"Our passages give no row of {min(context, model.n_context)} tokens of {model.name}.")
    return torch.cat(norms)


# --- arguments ----------------------------------------------------------------------------------------


def check_index(index: Any, d_sae: int, error: type[GlassboxError]) -> int:
    """A feature's number; ``error`` for another, negative ones and booleans included."""
    if isinstance(index, bool) or not isinstance(index, Integral) or not 0 <= int(index) < d_sae:
        raise error(
            f"There is no feature {shown(index)}. Allowed: 0 to {d_sae - 1}; gb.search finds the one that you mean."
        )
    return int(index)
