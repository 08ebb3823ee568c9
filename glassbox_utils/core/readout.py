"""From the residual stream to the logits, the way the model itself goes it: final norm, unembedding, and all that an
architecture does afterwards (Cohere's and Granite's scale, Gemma-2's soft cap).

``logits_of`` runs exactly that. ``through_norm`` and ``through_head`` give its linear account, in which parts of the
stream have their own share; both are checked against the model's numbers and raise ModelError where they don't fit.
"""

import copy
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from glassbox_utils.core import anatomy
from glassbox_utils.core.devices import exact, like
from glassbox_utils.core.models import Model, ModelError, Site, find_part


def final_norm(model: Model) -> nn.Module:
    """The norm after the last layer of the text model."""
    holder = anatomy.text_stack(model.hf)[0]
    return find_part(holder, "norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


def part(model: Model, layer: int, name: str) -> nn.Module:
    """A part of a layer by the name that ``Layer`` has of it."""
    return model.sites[Site("resid_pre", layer)][0].get_submodule(name)


def written(model: Model, layer: int, kind: str, output: Float[Tensor, "*place d_model"]) -> Tensor:
    """What the stream gets of a sublayer's raw output (``attention`` or ``mlp``)."""
    way: anatomy.Way = getattr(model.anatomy[layer], kind)
    normed = output if way.norm is None else part(model, layer, way.norm)(output)
    return normed if way.factor == 1 else normed * way.factor


def require(model: Model, layers: Iterable[int], what: str) -> None:
    """ModelError unless attention and MLP of these layers add up to what the layer writes."""
    limit = anatomy.TOLERANCE.get(model.dtype, 1e-3)
    for i in layers:
        if not (gap := model.anatomy[i].gap) <= limit:
            raise ModelError(
                f"{what} can't be computed for {model.name} ({type(model.hf).__name__}): what attention and MLP of "
                f"layer {i} write does not add up to what the layer changes in the residual stream (a relative gap of "
                f"{gap:.2g}, allowed {limit:g}). Use ablation or patching there: they need no parts that add up."
            )


@torch.no_grad()
def logits_of(model: Model, stream: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
    """Logits that the model makes of a residual stream after its last layer.

    A copy of its modules is run (the tensors are shared) whose layers return the stream, so that nothing after them is
    left out, and hooks that are active in the layers do not act a second time.
    """
    memo: dict[int, Any] = {}
    returned: Any = stream[:, None]
    for i in range(model.n_layers):
        layer = model.sites[Site("resid_pre", i)][0]
        stub = copy.copy(layer)
        for name in [n for n in vars(stub) if n.startswith("_forward_") and "hooks" in n]:
            stub.__dict__[name] = OrderedDict()
        given = (returned, None) if model.anatomy[i].returns_tuple else returned
        stub.__dict__["forward"] = lambda *_, _given=given, **__: _given
        memo[id(layer)] = stub
    hf = anatomy.bare_copy(model.hf, memo)
    ids = torch.full((len(stream), 1), model.tokenizer.bos_token_id or 0, device=stream.device)
    return hf(input_ids=ids, use_cache=False).logits[:, -1]


def check_same(model: Model, found: Tensor, own: Tensor, what: str) -> None:
    """ModelError unless what was found is the model's own, up to rounding."""
    gap = float((found.float() - own.float()).abs().max() / own.float().abs().max().clamp_min(1e-30))
    limit = anatomy.TOLERANCE.get(model.dtype, 1e-3)
    if not gap <= limit:
        raise ModelError(
            f"{what} does not fit {model.name} ({type(model.hf).__name__}): it differs from the model's own number by "
            f"{gap:.2g} of the largest one, allowed is {limit:g}. Something between the residual stream and the "
            "logits of this architecture is not known here. Use ablation or patching instead: they read the model's "
            "own logits."
        )


def through_norm(
    model: Model, norm: nn.Module, x: Float[Tensor, "row d_model"], direction: Float[Tensor, "row d_model"]
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, " row"]]:
    """(gain, offset) with ``direction . norm(x) = gain . x + offset``, the norm's scale at ``x`` held fixed.

    For any norm that divides by a length, with or without centring, whatever its parametrisation: gain, bias and scale
    are read off its outputs. ModelError if it is something else.
    """
    gain, bias, centres = _weights(norm, x)
    out, shaped = norm(x).float() - bias, _centred(x.float(), centres) * gain
    wide = exact(shaped)  # a least-squares fit: float64, and therefore on the CPU
    scale = like((exact(out) * wide).sum(-1) / wide.pow(2).sum(-1).clamp_min(1e-300), shaped)
    check_same(model, shaped * scale[:, None], out, f"The linear account of {type(norm).__name__}")
    back = _centred(direction * gain, centres)  # centring is linear: move it into the direction
    return back * scale[:, None], (direction * bias).sum(-1)


@torch.no_grad()
def through_weights(norm: nn.Module, x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
    """What a norm makes of ``x`` but for its division by a length and its bias: centred if it centres, and its gain."""
    gain, _, centres = _weights(norm, x)
    return _centred(x.float(), centres) * gain


def _weights(norm: nn.Module, x: Float[Tensor, "row d_model"]) -> tuple[Tensor, Tensor, bool]:
    """Gain and bias of a norm, whatever its parametrisation, and whether it centres: read off its outputs."""
    flat = like(torch.ones(1, x.shape[-1]), next(norm.parameters(), x))
    bias = norm(torch.zeros_like(flat)).float()
    gain = norm(flat).float() - bias
    if centres := bool((gain.abs() <= 1e-6).all()):  # ones without their mean are nothing
        probe = _balanced(flat)
        gain = (norm(probe).float() - bias) / probe.float()
    return gain, bias, centres


def _centred(x: Tensor, centres: bool) -> Tensor:
    return x - x.mean(-1, keepdim=True) if centres else x


def _balanced(flat: Tensor) -> Tensor:
    """Numbers of mean 0 and none of them 0."""
    probe = flat.clone()
    probe[..., 1::2] = -1
    if probe.shape[-1] % 2:
        probe[..., -1] = -1
        probe[..., -3:-1] = torch.tensor([2.0, -1.0]).to(probe) if probe.shape[-1] > 1 else 0
    return probe


def through_head(
    model: Model,
    raw: Float[Tensor, "row vocab"],
    own: Float[Tensor, "row vocab"],
    target: Int[Tensor, " row"],
    other: Int[Tensor, " row"],
) -> Float[Tensor, " row"]:
    """What is left of ``raw(target) - raw(other)`` in the model's own logits: a factor for each row.

    1 for most models; the scale where logits are scaled; where they are bent (soft cap) the ratio of the two
    differences, so that every part keeps the same share. ModelError if the model's logits are no increasing function of
    the raw ones.
    """
    raw, own = raw.float(), own.float()
    if raw.shape == own.shape:
        limit = anatomy.TOLERANCE.get(model.dtype, 1e-3)
        rounding = 16 * torch.finfo(model.dtype).eps
        if float((raw - own).abs().max()) <= rounding * float(own.abs().max()):
            return torch.ones_like(raw[:, 0])
        x, y = (t - t.mean(-1, keepdim=True) for t in (raw, own))
        slope = (x * y).sum() / x.pow(2).sum()
        if float((y - slope * x).norm()) <= rounding * float(y.norm()) and slope > 0:
            return slope.expand(len(raw))
        ordered = own.gather(-1, raw.argsort(-1)).diff(dim=-1)
        if float(-ordered.min()) <= limit * float(own.abs().max()):
            rows = torch.arange(len(raw), device=raw.device)
            before, after = (t[rows, target] - t[rows, other] for t in (raw, own))
            near = before.abs() <= 1e-6 * raw.abs().amax(-1)
            return torch.where(near, slope, after / torch.where(near, 1, before))
    raise ModelError(
        f"The logits of {model.name} ({type(model.hf).__name__}) are no increasing function of what its final norm and "
        "unembedding give, so there is no direct attribution. Use ablation or patching: they read the "
        "model's own logits."
    )
