"""What an SAE reads and writes: its own hook, in its own units, at the positions that it was made for.

Whatever encodes with an SAE, or adds one of its rows to a stream, comes here first. An SAE that somebody else trained
may lack what ours record: its *hook* is needed; its *median norm* (which says what an outlier is) and the scale of its
inputs, if it wants one and its file does not hold it, are measured; and of which *weights* it was made nobody can know.
Refused are tools whose output stands at another place than their input (transcoders), whose features have a sign or
depend on other positions, and whose inputs are whitened by a matrix that is not stored with them.
"""

import copy
import math
import weakref
from numbers import Integral, Real
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core import corpora, packing
from glassbox_utils.core.arguments import shown
from glassbox_utils.core.devices import beside, like, result
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
CENTRED = "center_writing_weights"
"""what GPT-2's releases declare: TransformerLens had taken the mean over the width out of all that writes"""
ROUNDING = 1e-3
"""decoder rows whose length differs from 1 by less are of length 1, but for float16"""


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


# --- the code -----------------------------------------------------------------------------------------


def tool(sae: Any, place: Tensor | torch.device) -> Any:
    """The SAE on the device of ``place``, reading sites as we shape them: the heads of z lie side by side already."""
    near = beside(sae, place)
    if getattr(near, "hook_z_reshaping_mode", False):
        near = copy.copy(near)  # the same tensors; the caller's own goes on to take heads apart
        near.turn_off_forward_pass_hook_z_reshaping()
    return near


def seen(sae: Any, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """The part of an activation that the SAE is about: all of it, or (if it declares so) all but its mean.

    An SAE of a model whose writing weights were centred knows a stream without a mean over the width. LayerNorm takes
    no notice of that mean, so the model is the same; ``z`` is no part of the stream and stays as it is.
    """
    meta = getattr(getattr(sae, "cfg", None), "metadata", None) or {}
    declared = (meta.get("model_from_pretrained_kwargs") or {}).get(CENTRED)
    if not declared or str(meta.get("hook_name")).endswith(("hook_z", "attn.o.hook_in")):
        return x
    return x - x.mean(-1, keepdim=True)


def encode(sae: Any, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch d_sae"]:
    """Features of activations as a site has them, on their device; the SAE computes in its own type."""
    near, x = tool(sae, x), seen(sae, x)
    return numbers(sae, near.encode(like(x, near.W_dec) if hasattr(near, "W_dec") else x))


def numbers(sae: Any, code: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """Features, none of them active where an activation is zero: an SAE that divides by the norm gives NaN there."""
    rescaled = getattr(getattr(sae, "cfg", None), "normalize_activations", "none") == "constant_norm_rescale"
    return code.nan_to_num(0.0) if rescaled else code


def decode(sae: Any, code: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch width"]:
    """Activations from the features that ``encode`` gave (of the same ones, if the SAE normalises)."""
    return tool(sae, code).decode(code)


def rows(sae: Any) -> Float[Tensor, "d_sae width"]:
    """What one unit of each feature adds to the reconstruction (times ``gain``)."""
    written = sae.W_dec.detach()
    if getattr(getattr(sae, "cfg", None), "rescale_acts_by_decoder_norm", False):
        length = written.norm(dim=-1, keepdim=True)
        written = written / torch.where((length - 1).abs() < ROUNDING, 1.0, length)
    return written


def gain(sae: Any, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch 1"] | float:
    """What the rows are multiplied by at each position: 1, unless the SAE normalises what it reads."""
    declared = getattr(sae.cfg, "normalize_activations", "none")
    if declared == "layer_norm":
        return x.std(-1, keepdim=True)
    if declared == "constant_norm_rescale":
        return seen(sae, x).norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return 1.0


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
