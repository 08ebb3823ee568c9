"""Loss and gradients of an SAE, without waiting for the device: TopK in sparse arithmetic, others as sae_lens does.

With k of d_sae features active, only the encoder's forward product need be dense: the reconstruction is a weighted bag
of k decoder rows, and both weight gradients are bags of batch rows, grouped by feature.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

PIECE = 64
"""rows that one thread of a GPU adds up: a feature that fires everywhere is divided into many pieces"""

_dots = torch.ops.aten._embedding_bag_per_sample_weights_backward
"""the dot products of bags with their rows"""


class StepResult(NamedTuple):
    """What one step says about itself, on the device where it was computed."""

    error: Float[Tensor, ""]
    """mean squared error summed over dimensions, in scaled units"""
    fired: Float[Tensor, " d_sae"]
    """how often each feature was active in the batch"""
    left: Float[Tensor, "batch d_model"] | None = None
    """activations less what was decoded, for the auxiliary loss"""


class Auxiliary(NamedTuple):
    """The loss by which dead features learn what the others leave over (Gao et al., arXiv 2406.04093, A.2)."""

    dead: Int[Tensor, " n_dead"]
    """which features those are"""
    coefficient: float


def topk_gradients(
    sae: Any,
    x: Float[Tensor, "batch d_model"],
    compute: torch.dtype = torch.bfloat16,
    auxiliary: Auxiliary | None = None,
) -> StepResult:
    """Loss and gradients of sae_lens's TopK SAE, written into ``.grad``.

    The same mathematics as sae_lens's TopK loss (mean over the batch of the squared error; decoder rows of any length,
    which scale what the encoder sees and not what is decoded). The dense product runs in ``compute``; if that is not
    float32 it only nominates half as many features again, whose values are then computed in float32 before the k are
    chosen. Everything stays on the device of ``x`` and nothing waits for it. ``auxiliary``: adds the gradients of that
    loss; what is reported stays the squared error of all that is decoded.
    """
    found = _on_cpu(sae, x, compute) if x.device.type == "cpu" else on_device(sae, x, compute)
    if auxiliary is not None and found.left is not None and len(auxiliary.dead):
        _add_auxiliary(sae, x - sae.b_dec, found.left, auxiliary)
    return found


def _add_auxiliary(
    sae: Any, centred: Float[Tensor, "batch d_model"], left: Float[Tensor, "batch d_model"], auxiliary: Auxiliary
) -> None:
    """Gradients of the squared error with which half of d_model dead features, the most active ones of each row,
    rebuild what is left over. What is left over is a target, and b_dec is part of it: neither gets a gradient.

    As in sae_lens, fewer dead features than that give a smaller loss, and their values may be negative (the paper's
    ReLU would leave a dead feature without a gradient).
    """
    dead, k = auxiliary.dead, centred.shape[1] // 2
    scale = auxiliary.coefficient * min(len(dead) / k, 1.0)
    with torch.enable_grad():
        rows, bias, written = (p.detach().requires_grad_() for p in (sae.W_enc.t()[dead], sae.b_enc[dead],
                                                                     sae.W_dec[dead]))  # fmt: skip
        norm = written.norm(dim=-1)
        hidden = F.linear(centred, rows, bias) * norm
        top = hidden.topk(min(k, len(dead)), dim=-1, sorted=False)
        code = torch.zeros_like(hidden).scatter(-1, top.indices, top.values)
        loss = scale * ((code / norm) @ written - left).square().sum(-1).mean()
        gradients = torch.autograd.grad(loss, (rows, bias, written))
    for whole, part in zip((sae.W_enc.grad.t(), sae.b_enc.grad, sae.W_dec.grad), gradients, strict=True):
        whole.index_add_(0, dead, part)


def _on_cpu(sae: Any, x: Tensor, compute: torch.dtype) -> StepResult:
    k, batch = sae.cfg.k, len(x)
    norm = sae.W_dec.norm(dim=-1)
    unit = sae.W_dec / norm[:, None]
    centred = x - sae.b_dec
    rows = sae.W_enc.t()
    hidden = F.linear(centred.type(compute), rows.type(compute), sae.b_enc.type(compute)) * norm.type(compute)
    values, chosen = _choose(sae, hidden, centred, norm)
    flat = chosen.flatten()
    offsets = torch.arange(0, batch * k, k)
    error = F.embedding_bag(flat, unit, offsets, mode="sum", per_sample_weights=values.flatten())
    error += sae.b_dec - x
    loss = error.square().sum(-1).mean()

    error *= 2 / batch
    owner = torch.arange(batch).repeat_interleave(k)
    to_value = _dots(error, unit, flat, offsets, owner, 0) * (values.flatten() > 0)
    # A stable radix sort of small integers is ten times faster in numpy than in torch.
    small = flat.numpy().astype(np.uint16 if sae.cfg.d_sae < 2**16 else np.uint32)
    order = torch.from_numpy(np.argsort(small, kind="stable"))
    counts = torch.bincount(flat, minlength=sae.cfg.d_sae)
    starts, grouped = counts.cumsum(0) - counts, owner[order]

    def gather(source: Tensor, weights: Tensor) -> Tensor:
        return F.embedding_bag(grouped, source, starts, mode="sum", per_sample_weights=weights[order])

    # A row's direction is what is decoded, its length a gain on the value: the gradient has a part for each.
    turn = gather(error, values.flatten())
    gain = torch.zeros_like(norm).index_add_(0, flat, to_value * values.flatten())
    turn -= (turn * unit).sum(-1, keepdim=True) * unit
    sae.W_dec.grad = (turn + gain[:, None] * unit) / norm[:, None]
    to_hidden = to_value * norm[flat]
    sae.W_enc.grad = gather(centred, to_hidden).t()
    sae.b_enc.grad = torch.zeros_like(sae.b_enc).index_add_(0, flat, to_hidden)
    sae.b_dec.grad = error.sum(0) - sae.W_enc @ sae.b_enc.grad
    return StepResult(loss, _fired(sae, flat, values), error * (-batch / 2))


def on_device(sae: Any, x: Float[Tensor, "batch d_model"], compute: torch.dtype = torch.bfloat16) -> StepResult:
    """The same in torch's own operations, none of which waits for the device or adds in a varying order.

    Norms go into the encoder's rows before the product and into the weights of the bags, which saves passes over
    [batch, d_sae] and [d_sae, d_model].
    """
    k, batch, d_sae = sae.cfg.k, len(x), sae.cfg.d_sae
    norm = sae.W_dec.norm(dim=-1)
    centred = x - sae.b_dec
    rows = sae.W_enc.t()
    scaled = (rows * norm[:, None]).type(compute)
    hidden = F.linear(centred.type(compute), scaled, (sae.b_enc * norm).type(compute))
    values, chosen = _choose(sae, hidden, centred, norm)
    flat, value = chosen.flatten(), values.flatten()
    offsets = torch.arange(0, batch * k, k, device=x.device)
    length = norm[flat]
    error = F.embedding_bag(flat, sae.W_dec, offsets, mode="sum", per_sample_weights=value / length)
    error += sae.b_dec - x
    loss = error.square().sum(-1).mean()

    error *= 2 / batch
    owner = torch.arange(batch, device=x.device).repeat_interleave(k)
    to_value = _dots(error, sae.W_dec, flat, offsets, owner, 0) / length * (value > 0)
    to_hidden = to_value * length
    groups = group(flat, d_sae)
    turn = grouped_sum(groups, error, owner, value)
    gain, bias = grouped_sum(groups, torch.stack([to_value * value, to_hidden], -1)).unbind(-1)
    across = (turn * sae.W_dec).sum(-1) / norm
    sae.W_dec.grad = (turn / norm[:, None]).addcmul_(sae.W_dec, ((gain - across) / norm.square())[:, None])
    sae.W_enc.grad = grouped_sum(groups, centred, owner, to_hidden).t()
    sae.b_enc.grad = bias.contiguous()
    sae.b_dec.grad = error.sum(0) - sae.W_enc @ bias
    return StepResult(loss, _fired(sae, flat, values), error * (-batch / 2))


def _choose(
    sae: Any, hidden: Float[Tensor, "batch d_sae"], centred: Float[Tensor, "batch d_model"], norm: Tensor
) -> tuple[Float[Tensor, "batch k"], Int[Tensor, "batch k"]]:
    """The k largest features of each row, their values in float32 and not below zero."""
    k, batch, device = sae.cfg.k, len(hidden), hidden.device
    if hidden.dtype == torch.float32:
        values, chosen = hidden.topk(k, dim=-1, sorted=False)
        return values.relu(), chosen
    some = min(k + k // 2, sae.cfg.d_sae)
    nominated = hidden.topk(some, dim=-1, sorted=False).indices
    flat, owner = nominated.flatten(), torch.arange(batch, device=device).repeat_interleave(some)
    bags = torch.arange(0, batch * some, some, device=device)
    exact = _dots(centred, sae.W_enc.t().contiguous(), flat, bags, owner, 0)
    exact = ((exact + sae.b_enc[flat]) * norm[flat]).view(batch, some)
    values, best = exact.topk(k, dim=-1, sorted=False)
    return values.relu(), nominated.gather(1, best)


def _fired(sae: Any, flat: Tensor, values: Tensor) -> Float[Tensor, " d_sae"]:
    active = (values.flatten() > 0).float()
    return torch.zeros(sae.cfg.d_sae, device=flat.device).index_add_(0, flat, active)


class Groups(NamedTuple):
    """Entries of a list grouped by feature, each group cut into pieces of at most ``PIECE``."""

    order: Int[Tensor, " entry"]
    pieces: Int[Tensor, " piece"]
    """where each piece begins in that order; more than are needed, since their number is known to the device only"""
    firsts: Int[Tensor, " d_sae_and_one"]
    """the first piece of each feature, and behind the last one the number of pieces"""


def group(features: Int[Tensor, " entry"], n: int) -> Groups:
    """Group a list of features below ``n``, in their order in the list."""
    entries, device = len(features), features.device
    found, order = torch.sort(features, stable=True)
    bounds = torch.searchsorted(found, torch.arange(n + 1, device=device))
    needed = (bounds.diff() + PIECE - 1) // PIECE
    firsts = F.pad(needed.cumsum(0), (1, 0))
    piece = torch.arange(n + entries // PIECE, device=device)
    owner = torch.searchsorted(firsts, piece, right=True).sub_(1).clamp_(max=n - 1)
    begins = bounds[owner] + (piece - firsts[owner]) * PIECE
    return Groups(order, begins.clamp_(max=entries), firsts)


def grouped_sum(
    groups: Groups, source: Float[Tensor, "row width"], rows: Tensor | None = None, weights: Tensor | None = None
) -> Float[Tensor, "d_sae width"]:
    """For each feature the (weighted) sum of the entries' rows of ``source``; without ``rows`` entries are rows."""
    index = groups.order if rows is None else rows[groups.order]
    scale = None if weights is None else weights[groups.order]
    parts = F.embedding_bag(index, source, groups.pieces, mode="sum", per_sample_weights=scale)
    every = torch.arange(len(parts), device=source.device)
    return F.embedding_bag(every, parts, groups.firsts, mode="sum", include_last_offset=True)


def library_gradients(
    sae: Any, x: Float[Tensor, "batch d_model"], step: int, dead: Tensor, compute: torch.dtype = torch.bfloat16
) -> StepResult:
    """Loss and gradients of any sae_lens architecture: its own forward pass, with autocast if ``compute`` is half."""
    from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput

    coefficients = {}
    for name, value in sae.get_coefficients().items():
        full, warm = (value.value, value.warm_up_steps) if isinstance(value, TrainCoefficientConfig) else (value, 0)
        coefficients[name] = full * min(1.0, (step + 1) / warm) if warm else full
    with torch.enable_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=compute == torch.bfloat16):
        out = sae.training_forward_pass(TrainStepInput(x, coefficients, dead, step, False))
    out.loss.backward()
    error = (out.sae_out.detach().float() - x).square().sum(-1).mean()
    return StepResult(error, (out.feature_acts > 0).sum(0).float())
