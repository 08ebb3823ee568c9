"""Heads as a population: how much each attends and writes, and which other heads are a fair control."""

import json
import random
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from glassbox_utils.attention import patterns
from glassbox_utils.core.assets import DATA
from glassbox_utils.core.devices import beside, result
from glassbox_utils.core.interventions import Head, capture, not_first
from glassbox_utils.core.models import Model, ModelError, Site
from glassbox_utils.core.text import Batch, following

Split = Literal["selection", "report"]


def read_prompts(name: str) -> Any:
    return json.loads((DATA / "prompts" / f"{name}.json").read_text(encoding="utf-8"))


def attend(
    model: Model, batch: Batch, dst: Int[Tensor, " batch"], src: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch layer head k"]:
    """Attention of every head from one position of each prompt to k others, in one streaming pass."""

    def pick(pattern: Tensor, where: slice) -> Tensor:
        rows = torch.arange(len(pattern), device=pattern.device)[:, None]
        d, s = (beside(x[where], pattern) for x in (dst, src))
        return pattern[rows, :, d[:, None], s].movedim(1, -1)

    return patterns.over_patterns(model, batch, pick)


def random_heads(model: Model, heads: Sequence[Head], seed: int, avoid: Sequence[Head] = ()) -> list[Head]:
    """As many other heads, each from the same layer as the one it stands for: the control of every ablation."""
    rng, taken = random.Random(seed), {*heads, *avoid}
    chosen = []
    for layer, _ in heads:
        free = [(layer, h) for h in range(model.n_heads) if (layer, h) not in taken]
        # A layer that is used up lends from its neighbours: still similar depth.
        near = sorted(range(model.n_layers), key=lambda other: abs(other - layer))
        free = free or [(i, h) for i in near for h in range(model.n_heads) if (i, h) not in taken][: model.n_heads]
        if not free:
            raise ModelError(f"{model.name} has too few heads for {len(heads)} random ones besides {len(taken)} taken.")
        chosen.append(rng.choice(free))
        taken.add(chosen[-1])
    return chosen


def with_groups(model: Model, heads: Sequence[Head]) -> list[Head]:
    """The heads, and all that share a key-value head with one of them (grouped queries; else the heads alone)."""
    found = set()
    for layer, head in heads:
        size = group_size(model, layer)
        found |= {(layer, h) for h in range(head - head % size, head - head % size + size)}
    return sorted(found)


@torch.no_grad()
def group_size(model: Model, layer: int) -> int:
    """How many query heads of a layer share a key-value head: 1 without grouped queries."""
    one = beside(torch.zeros(1, model.d_model), model.device)
    return model.n_heads // patterns.project(model, layer, one).k.shape[-2]


def control_sets(
    model: Model, heads: Sequence[Head], avoid: Sequence[Head], draws: int, seed: int = 0
) -> list[list[Head]]:
    """``draws`` random sets that stand for ``heads``, layer by layer.

    None holds one of them, one to ``avoid``, or one that shares a key-value head with either. Where too few are left
    for that (a small model), heads that only share a key-value head are let in again.
    """
    keep_out = with_groups(model, [*heads, *avoid])
    try:
        return [random_heads(model, heads, seed + i, keep_out) for i in range(draws)]
    except ModelError:
        return [random_heads(model, heads, seed + i, avoid) for i in range(draws)]


@torch.no_grad()
def output_norms(model: Model, batch: Batch) -> Float[Tensor, "layer head"]:
    """Mean length of what each head adds to the residual stream, over all tokens but the first of each row.

    Before the norm that some architectures have there (Gemma-2, OLMo-2).
    """
    real = not_first(batch)
    z = capture(model, batch, [Site("z", layer) for layer in range(model.n_layers)])
    norms = []
    for layer in range(model.n_layers):
        heads = z[Site("z", layer)][:, 1:].unflatten(-1, (model.n_heads, model.d_head))
        lengths = torch.einsum("bphd,hdm->bphm", heads, patterns.output_weights(model, layer)).norm(dim=-1)
        norms.append(result(lengths[real[:, 1:]]))
    return torch.stack([n.mean(0) for n in norms])


def norm_matched(
    norms: Float[Tensor, "layer head"], heads: Sequence[Head], avoid: Sequence[Head], seed: int = 0, among: int = 12
) -> list[Head]:
    """For each head another one of similar output norm: drawn from the ``among`` nearest.

    From any layer, and none that is to be avoided.
    """
    rng, taken, chosen = random.Random(seed), {*heads, *avoid}, []
    for head in heads:
        order = [divmod(int(i), norms.shape[1]) for i in (norms - norms[head]).abs().flatten().argsort()]
        free = [h for h in order if h not in taken]
        if not free:
            raise ModelError(
                f"There are too few heads: {norms.numel()}, of which {len(taken)} are taken or to be avoided."
            )
        chosen.append(rng.choice(free[:among]))
        taken.add(chosen[-1])
    return chosen


def shuffled(items: Sequence[Any], n: int, seed: int) -> list[Any]:
    """n different items drawn by a seed (all of them, in random order, if n is larger)."""
    return random.Random(seed).sample(list(items), min(n, len(items)))


def first_id(model: Model, word: str) -> int:
    """The first token of a word inside of a text."""
    return following(model, " " + word)[0]
