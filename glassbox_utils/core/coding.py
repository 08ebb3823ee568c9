"""The code of a sparse autoencoder, in the units of the place that it reads: features of an activation, and back.

Any object with ``cfg``, ``encode``, ``decode`` and ``W_dec`` will do; what sae_lens's own call leaves to its hooks
(heads side by side, a centred stream, decoder rows of any length, a norm that is divided out) is done here.
"""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core.devices import beside, like

CENTRED = "center_writing_weights"
"""what GPT-2's releases declare: TransformerLens had taken the mean over the width out of all that writes"""
ROUNDING = 1e-3
"""decoder rows whose length differs from 1 by less are of length 1, but for float16"""


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
