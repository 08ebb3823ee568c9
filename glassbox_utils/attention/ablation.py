"""Take heads out of the computation: put zero, their mean, or their output on another prompt in their place."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.core.devices import exact, like
from glassbox_utils.core.interventions import Head, Positions, capture, edits, not_first, position_mask
from glassbox_utils.core.models import Model, ModelError, Site, check_heads
from glassbox_utils.core.text import Batch

Mode = Literal["zero", "mean", "resample"]


@dataclass(frozen=True)
class HeadMeans:
    """Mean output of every head over a reference set: what mean ablation puts in a head's place."""

    z: Float[Tensor, "layer head d_head"]
    n_tokens: int


@torch.no_grad()
def head_means(model: Model, batches: Sequence[Batch]) -> HeadMeans:
    """Average ``z`` of all heads over all unpadded positions of the batches, the first token left out.

    The first token is an attention sink with untypical activations, so it would bias the mean.
    """
    total = torch.zeros(model.n_layers, model.n_heads * model.d_head, dtype=torch.float64)
    count = 0
    sites = [Site("z", layer) for layer in range(model.n_layers)]
    for batch in batches:
        mask = not_first(batch)
        if not mask.any():
            continue
        for site, z in capture(model, batch, sites).items():
            total[site.layer] += exact(z[mask]).sum(0)
        count += int(mask.sum())
    if not count:
        raise ModelError("There is no token to average over. Give batches with prompts of at least two tokens.")
    mean = (total / count).float().view(model.n_layers, model.n_heads, model.d_head)
    return HeadMeans(like(mean, next(model.hf.parameters())), count)


@contextmanager
def ablate_heads(
    model: Model,
    heads: Sequence[Head],
    mode: Mode = "mean",
    reference: HeadMeans | Batch | None = None,
    positions: Positions = None,
    seed: int = 0,
) -> Iterator[None]:
    """Take heads out of the computation inside the block.

    ``zero`` puts 0 in place of the head's output; ``mean`` its average over a reference set (a
    ``HeadMeans``, see ``head_means``); ``resample`` its output on another prompt: a reference ``Batch``
    with as many positions, its rows drawn by ``seed``. Mean ablation is the default: zero is far from
    anything that the model ever sees. Raises ModelError for unknown heads or none, or a missing reference.
    """
    checked = check_heads(model, heads)
    if not checked:
        raise ModelError(
            "There is no head to ablate: the list is empty. Give pairs of layer and head, such as [(5, 3)]."
        )
    by_layer: dict[int, list[int]] = {}
    for layer, head in checked:
        by_layer.setdefault(layer, []).append(head)
    if mode == "mean" and not isinstance(reference, HeadMeans):
        raise ModelError("Mean ablation needs reference=head_means(model, batches), the averages to put in place.")
    if mode == "resample" and not isinstance(reference, Batch):
        raise ModelError("Resample ablation needs reference=tokenize(model, other_prompts), the prompts to draw from.")
    if mode not in ("zero", "mean", "resample"):
        raise ModelError(f"There is no ablation mode {mode!r}. Allowed: zero, mean, resample.")
    other = None
    if mode == "resample" and isinstance(reference, Batch):
        other = capture(model, reference, [Site("z", layer) for layer in by_layer])

    def replacement(layer: int, z: Tensor) -> Tensor:
        if mode == "mean" and isinstance(reference, HeadMeans):
            return like(reference.z[layer], z).expand(*z.shape[:2], -1, -1)
        if other is None:
            return torch.zeros_like(z)
        source = other[Site("z", layer)].unflatten(-1, (model.n_heads, model.d_head))
        if source.shape[1] != z.shape[1]:
            raise ModelError(
                f"Resample ablation needs prompts of one length: the reference has {source.shape[1]} positions, "
                f"this pass {z.shape[1]}. Use mode='mean' for generation and for prompts of other lengths."
            )
        rows = torch.randint(len(source), (len(z),), generator=torch.Generator().manual_seed(seed))
        return source[rows]

    def ablation(layer: int, chosen: list[int]) -> Callable[[Tensor], Tensor]:
        def function(flat: Tensor) -> Tensor:
            z = flat.unflatten(-1, (model.n_heads, model.d_head))
            where = position_mask(z, positions)
            only = torch.zeros(model.n_heads, dtype=torch.bool, device=z.device)
            only[chosen] = True
            return torch.where(where[..., None, None] & only[:, None], replacement(layer, z), z).flatten(-2)

        return function

    with edits(model, {Site("z", layer): ablation(layer, chosen) for layer, chosen in by_layer.items()}):
        yield


def ablated(model: Model, heads: Sequence[Head], reference: HeadMeans) -> AbstractContextManager[None]:
    """Mean ablation of a set of heads; of the empty set, the control of a series, nothing."""
    return ablate_heads(model, heads, reference=reference) if heads else nullcontext()
