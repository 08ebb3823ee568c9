"""What heads look at: patterns, and scores for every head from one forward pass.

An attention weight is *observed* evidence, the lowest rung: see ``ablation`` and ``attribution`` for what
a head does. Weights come from the plain model with eager attention; each layer's pattern is reduced as soon
as it exists, so scoring all heads needs the memory of one layer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from glassbox_utils.core import readout
from glassbox_utils.core.devices import beside, like, result
from glassbox_utils.core.interventions import not_first, recording
from glassbox_utils.core.models import Model, ModelError, Site, check_heads, check_layer, find_part, hook_name, is_whole
from glassbox_utils.core.text import Batch, find_token, first_token, str_tokens, tokenize

Pattern = Float[Tensor, "batch head dst src"]
Reduce = Callable[[Tensor, slice], Tensor]


@contextmanager
def eager(model: Model) -> Iterator[None]:
    """Fast attention kernels never build the pattern: use the eager ones inside the block."""
    before = model.hf.config._attn_implementation
    model.hf.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.hf.set_attn_implementation(before)


def attention_modules(model: Model) -> list[nn.Module]:
    """The module of each layer that returns (output, pattern): the parent of the output projection."""
    names = {id(module): name for name, module in model.hf.named_modules()}
    projections = [model.sites[Site("z", layer)][0] for layer in range(model.n_layers)]
    return [model.hf.get_submodule(names[id(p)].rpartition(".")[0]) for p in projections]


@torch.no_grad()
def over_patterns(model: Model, batch: Batch, reduce: Reduce, rows: int = 32) -> Tensor:
    """``reduce(pattern, where)`` of every layer's pattern (float32), stacked as [batch, layer, ...] on the CPU.

    ``rows`` prompts are run at a time; ``where`` is the slice of the batch that the pattern belongs to.
    """
    found: list[Tensor] = []
    where = slice(0)

    def look(module: Any, args: tuple, output: Any) -> None:
        found.append(reduce(_checked(model, module, output), where))

    chunks = []
    handles = [layer.register_forward_hook(look) for layer in attention_modules(model)]
    try:
        with eager(model):
            for start in range(0, len(batch.input_ids), rows):
                where = slice(start, start + rows)
                model.hf(**Batch(*(t[where] for t in batch)).inputs, logits_to_keep=1, use_cache=False)
                chunks.append(result(torch.stack(found, dim=1)))
                found.clear()
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(chunks)


def _checked(model: Model, module: nn.Module, output: Any) -> Pattern:
    """The pattern of a layer; ModelError if it has none, or if its rows are no whole (gpt-oss keeps a part for a
    sink that is no token: entropy, chance and shares would be of something else than one thinks)."""
    if not isinstance(output, tuple) or not isinstance(output[1], Tensor):
        raise ModelError(f"{type(module).__name__} of {model.name} gives no attention pattern: it is not supported.")
    pattern = output[1].float()
    gap = 0.0 if pattern.is_meta else float((pattern.sum(-1) - 1).abs().max())
    if not gap <= (1e-3 if output[1].dtype == torch.float32 else 5e-2):
        raise ModelError(
            f"The attention of {type(module).__name__} in {model.name} does not add up to 1 over the tokens (it "
            f"is off by {gap:.2g}), so its patterns can't be scored or drawn as shares. Use ablation or patching of "
            "its heads."
        )
    return pattern


def attention(model: Model, text: str) -> tuple[list[str], Float[Tensor, "layer head dst src"]]:
    """Tokens and patterns of one prompt, ready for ``figures.attention_heads``."""
    batch = tokenize(model, text)
    return str_tokens(model, batch.input_ids[0]), over_patterns(model, batch, lambda pattern, where: pattern)[0]


@dataclass(frozen=True)
class HeadScores:
    """Scores of every head on every prompt, each [prompt, layer, head]; see ``head_scores``.

    ``chance`` holds, under the same names, what a head would score that spreads its attention evenly over the tokens
    that it sees: one number if all layers see equally far, else (sliding windows) one for each layer, [layer, 1].
    """

    previous: Float[Tensor, "prompt layer head"]
    current: Float[Tensor, "prompt layer head"]
    first: Float[Tensor, "prompt layer head"]
    duplicate: Float[Tensor, "prompt layer head"]
    entropy: Float[Tensor, "prompt layer head"]
    chance: dict[str, float | Float[Tensor, "layer 1"]]

    def chance_of(self, name: str, layer: int) -> float:
        """The chance of a head of this layer."""
        by_layer = self.chance[name]
        return float(by_layer[layer, 0]) if isinstance(by_layer, Tensor) else by_layer

    def mean(self, name: str) -> Float[Tensor, "layer head"]:
        """One score averaged over the prompts that have it (no duplicate token: no duplicate score)."""
        return getattr(self, name).nanmean(0)


SCORES = ("previous", "current", "first", "duplicate", "entropy")


def head_scores(model: Model, batch: Batch) -> HeadScores:
    """Five scores for every head in one call, averaged over the real tokens of each prompt but its first.

    ``previous``, ``current``, ``first``: attention from a token to the one before it, to itself, to the
    prompt's first token (the usual sink). ``duplicate``: total attention to earlier copies of the same
    token, over tokens that have one (NaN for a prompt without any). ``entropy``: bits, of the pattern's row.
    """

    def score(pattern: Pattern, where: slice) -> Float[Tensor, "batch head score"]:
        rows = Batch(*(t[where] for t in batch))
        # Even attention over what the layer sees goes through the same code: chance is measured, not guessed.
        return torch.cat([_five_scores(pattern, rows), _five_scores(_even(pattern, rows), rows)], 1)

    scores = over_patterns(model, batch, score)
    by_layer = scores[:, :, -1].nanmean(0)
    alike = bool((by_layer == by_layer[:1]).logical_or(by_layer.isnan()).all())
    chance = {n: float(by_layer[0, i]) if alike else by_layer[:, i : i + 1] for i, n in enumerate(SCORES)}
    return HeadScores(**dict(zip(SCORES, scores[:, :, :-1].unbind(-1), strict=True)), chance=chance)


def shuffled_order(batch: Batch, seed: int = 0) -> Batch:
    """The same tokens in random order, the first one of each row in its place: what follows positions alone is left."""
    rows, generator = [], torch.Generator().manual_seed(seed)
    for ids, start in zip(batch.input_ids, batch.attention_mask.int().argmax(-1).tolist(), strict=True):
        order = torch.arange(len(ids))
        order[start + 1 :] = start + 1 + torch.randperm(len(ids) - start - 1, generator=generator)
        rows.append(ids[beside(order, ids)])
    return Batch(torch.stack(rows), batch.attention_mask)


def _even(pattern: Pattern, batch: Batch) -> Float[Tensor, "batch 1 dst src"]:
    """The pattern of a head that looks at all tokens alike that this layer lets it see.

    How far that is shows in the patterns themselves: behind a window every head's weights are exactly zero. An
    architecture may say it in its mask, in its configuration, or in the attention's own code.
    """
    mask, n = batch.attention_mask, pattern.shape[-1]
    real = (mask[:, :, None] * mask[:, None, :]).bool()[:, None]
    place = torch.arange(n, device=pattern.device)
    back = (place[:, None] - place).expand_as(pattern)
    window = 1 + int(back[(pattern > 0) & real].max())
    even = mask[:, None, None, :].expand(-1, 1, n, -1).tril().triu(1 - window).float()
    return even / even.sum(-1, keepdim=True).clamp_min(1)


def _five_scores(pattern: Pattern, batch: Batch) -> Float[Tensor, "batch head score"]:
    ids, mask = batch.input_ids, batch.attention_mask.bool()
    real = not_first(batch)
    start = mask.int().argmax(-1)
    rows = torch.arange(len(ids), device=ids.device)
    previous = nn.functional.pad(pattern.diagonal(-1, -2, -1), (1, 0))
    twins = (ids[:, :, None] == ids[:, None, :]) & mask[:, None, :] & mask[:, :, None]
    twins = twins.tril(-1)
    entropy = -torch.special.xlogy(pattern, pattern).sum(-1) / math.log(2)
    columns = [
        _average(previous, real),
        _average(pattern.diagonal(0, -2, -1), real),
        _average(pattern[rows, :, :, start], real),
        _average(torch.einsum("bhds,bds->bhd", pattern, twins.float()), real & twins.any(-1)),
        _average(entropy, real),
    ]
    return torch.stack(columns, -1)


def _average(values: Float[Tensor, "batch head dst"], where: Bool[Tensor, "batch dst"]) -> Float[Tensor, "batch head"]:
    """Mean over the chosen positions; NaN if there are none."""
    return torch.einsum("bhd,bd->bh", values, where.float()) / where.sum(-1)[:, None]


def from_to(
    model: Model, batch: Batch, dst: Int[Tensor, " batch"], src: Int[Tensor, " batch"]
) -> Float[Tensor, "batch layer head"]:
    """Attention of every head from one position to another, given for each prompt of the batch."""
    for row, (d, s) in enumerate(zip(dst.tolist(), src.tolist(), strict=True)):
        if not 0 <= s <= d < batch.input_ids.shape[1]:
            raise ModelError(
                f"Prompt {row}: attention from position {d} to position {s} does not exist. Positions are 0 to "
                f"{batch.input_ids.shape[1] - 1}, and a token sees only itself and earlier ones."
            )
    index = torch.stack([beside(x, batch.input_ids) for x in (dst, src)], -1)

    def pick(pattern: Tensor, where: slice) -> Tensor:
        d, s = index[where].unbind(-1)
        return pattern[torch.arange(len(pattern), device=pattern.device), :, d, s]

    return over_patterns(model, batch, pick)


def from_word_to_word(
    model: Model, prompts: Sequence[str], from_word: str, to_word: str
) -> Float[Tensor, "batch layer head"]:
    """Attention of every head from the last ``from_word`` to the first ``to_word`` of each prompt.

    Words of several tokens count by their last one. ModelError if a prompt lacks one of them.
    """
    batch = tokenize(model, prompts)
    dst = torch.tensor([find_token(model, ids, from_word, -1) for ids in batch.input_ids])
    src = torch.tensor([find_token(model, ids, to_word, 0) for ids in batch.input_ids])
    return from_to(model, batch, dst, src)


def rollout(pattern: Float[Tensor, "layer head dst src"]) -> Float[Tensor, "dst src"]:
    """Attention rollout: head-averaged patterns, half residual, multiplied through the layers.

    Abnar & Zuidema, arXiv 2005.00928. It assumes that values mix like probabilities, which they do not:
    one more picture of looking, not a cause.
    """
    identity = torch.eye(pattern.shape[-1])
    total = identity
    for layer in result(pattern).mean(1):
        total = (0.5 * layer + 0.5 * identity) @ total
    return total


@torch.no_grad()
def value_weighted(model: Model, text: str, whole: bool = True) -> Float[Tensor, "layer head dst src"]:
    """Attention times the length of what it moves: ``A[dst, src] * ||v[src] W_O||``.

    With ``whole``, rows are scaled to sum to 1, which hides that an idle head moves little; without it they are lengths
    in the residual stream. A head that parks its attention on the first token usually moves almost nothing from there.
    Kobayashi et al., arXiv 2004.10102.
    """
    batch = tokenize(model, text)
    names = [
        hook_name(model, f"attn.hook_{kind}", layer) for layer in range(model.n_layers) for kind in ("pattern", "v")
    ]
    _, cache = model.bridge.run_with_cache(batch.input_ids, names_filter=names, logits_to_keep=1)
    weighted = []
    for layer in range(model.n_layers):
        value = cache[hook_name(model, "attn.hook_v", layer)][0]
        value = value.unflatten(-1, (-1, model.d_head)) if value.ndim == 2 else value
        value = value.repeat_interleave(model.n_heads // value.shape[1], dim=1)  # grouped queries share a value
        moved = torch.einsum("phd,hdm->hpm", value, output_weights(model, layer)).norm(dim=-1)
        pattern = cache[hook_name(model, "attn.hook_pattern", layer)][0] * moved[:, None, :]
        weighted.append(result(pattern / pattern.sum(-1, keepdim=True).clamp_min(1e-9) if whole else pattern))
    return torch.stack(weighted)


def output_weights(model: Model, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """W_O of every head of a layer, read from the output projection (Linear or GPT-2's Conv1D).

    A factor on the way into the residual stream (Granite) is part of it; a norm there (Gemma-2, OLMo-2) can't be.
    ModelError for a projection that is no matrix of the heads, such as a quantised one.
    """
    site = Site("z", check_layer(model, layer))
    projection: Any = model.sites[site][0]
    weight = projection.weight.detach()
    flat = weight if type(projection).__name__ == "Conv1D" else weight.T
    if flat.shape != (model.n_heads * model.d_head, model.d_model) or not flat.is_floating_point():
        raise ModelError(
            f"The output projection of layer {layer} of {model.name} is a {type(projection).__name__} of shape "
            f"{tuple(weight.shape)}, not a matrix from {model.n_heads} heads of {model.d_head} to "
            f"{model.d_model}: this architecture is not supported there."
        )
    factor = model.factor(Site("attn_out", site.layer))
    return (flat if factor == 1 else flat * factor).unflatten(0, (model.n_heads, model.d_head))


def head_name(head: tuple[int, int]) -> str:
    """``(5, 8)`` -> ``5.8``: layer 5, head 8."""
    return f"{head[0]}.{head[1]}"


def top_heads(scores: Float[Tensor, "layer head"], k: int, model: Model | None = None) -> list[tuple[int, int]]:
    """The k heads with the largest scores, largest first; NaN counts as smallest."""
    if not is_whole(k) or not 0 < k <= scores.numel():
        raise ModelError(f"k is {k!r}, but there are {scores.numel()} heads. Choose 1 to {scores.numel()}.")
    order = scores.nan_to_num(float("-inf")).flatten().argsort(descending=True)[:k]
    heads = [divmod(int(i), scores.shape[1]) for i in order]
    return check_heads(model, heads) if model else heads


# --- heads that copy ----------------------------------------------------------------------------------


def repeated_tokens(model: Model, n: int, length: int = 50, seed: int = 0) -> Batch:
    """n rows of [BOS, ``length`` random tokens, the same tokens again]; without BOS if the model has none.

    Row i depends on (seed, i) alone, so a subset of rows is the same wherever it is drawn. Tokens do not
    repeat inside a half, and special tokens do not occur: nothing but the repetition helps to predict.
    """
    special = set(model.tokenizer.all_special_ids)
    known = min(len(model.tokenizer), model.hf.get_input_embeddings().weight.shape[0])
    allowed = torch.tensor([i for i in range(known) if i not in special])
    if not is_whole(n) or n < 1 or not is_whole(length):
        raise ModelError(f"{n!r} rows of {length!r} tokens can't be drawn. Give whole numbers, at least one row.")
    if not 2 <= length <= min(len(allowed), (model.n_context - 1) // 2):
        raise ModelError(
            f"Repeats of {length} tokens do not fit {model.name}, which has {len(allowed)} ordinary tokens and "
            f"{model.n_context} positions. Choose a length of 2 to {min(len(allowed), (model.n_context - 1) // 2)}."
        )
    halves = []
    for row in range(n):
        generator = torch.Generator().manual_seed(1_000_003 * seed + row)
        halves.append(allowed[torch.randperm(len(allowed), generator=generator)[:length]])
    half = torch.stack(halves)
    start = first_token(model)
    bos = torch.full((n, 1), start) if start is not None else half[:, :0]
    ids = beside(torch.cat([bos, half, half], dim=1), model.device)
    return Batch(ids, torch.ones_like(ids))


def induction_targets(batch: Batch) -> Bool[Tensor, "batch dst src"]:
    """Where an induction head looks: from a token to the tokens that followed its earlier copies."""
    ids, mask = batch.input_ids, batch.attention_mask.bool()
    same = (ids[:, :, None] == ids[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    after = nn.functional.pad(same, (1, 0))[..., :-1]  # one to the right: the token after the copy
    return after.tril(-1) & mask[:, None, :]


def induction_scores(model: Model, batch: Batch) -> Float[Tensor, "prompt layer head"]:
    """Prefix matching of every head: attention to the tokens that followed earlier copies of the current one.

    Mean over the tokens that have such a copy; NaN for a prompt without any. On ``repeated_tokens`` this
    is the usual induction score. Olsson et al., arXiv 2209.11895.
    """
    targets = induction_targets(batch)

    def score(pattern: Pattern, where: slice) -> Float[Tensor, "batch head"]:
        wanted = targets[where]
        return _average(torch.einsum("bhds,bds->bhd", pattern, wanted.float()), wanted.any(-1))

    return over_patterns(model, batch, score)


class Projections(NamedTuple):
    """Queries, keys and values of a layer, before any rotation; grouped heads have fewer keys and values."""

    q: Float[Tensor, "*place head d_head"]
    k: Float[Tensor, "*place kv_head d_head"]
    v: Float[Tensor, "*place kv_head d_head"]


def project(model: Model, layer: int, resid: Float[Tensor, "*place d_model"]) -> Projections:
    """What a layer's attention makes of a residual stream: its input norm, then its projections.

    Knows the three layouts that decoders use: separate projections, GPT-2's ``c_attn`` (q, k, v side by
    side) and GPT-NeoX's ``query_key_value`` (q, k, v of one head side by side).
    """
    layer = check_layer(model, layer)
    block = model.sites[Site("resid_pre", layer)][0]
    x, reads = like(resid, next(block.parameters())), model.anatomy[layer].reads
    if reads is None:
        raise ModelError(
            f"What the attention of layer {layer} of {model.name} reads is not one norm of the residual stream: this "
            "architecture is not supported."
        )
    x = block.get_submodule(reads)(x) if reads else x
    attention = attention_modules(model)[layer]
    if hasattr(attention, "k_proj"):
        flat = [find_part(attention, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    elif hasattr(attention, "c_attn"):
        flat = list(find_part(attention, "c_attn")(x).chunk(3, dim=-1))
    else:
        fused = find_part(attention, "query_key_value")(x)
        by_head = (
            fused.unflatten(-1, (-1, 3, model.d_head)) if fused.shape[-1] % (3 * model.d_head) == 0 else fused[None]
        )
        flat = [part.flatten(-2) for part in by_head.unbind(-2)][:3]
    widths = [part.shape[-1] for part in flat]
    if (
        widths[0] != model.n_heads * model.d_head
        or widths[1] != widths[-1]
        or widths[1] % model.d_head
        or model.n_heads % (widths[1] // model.d_head)
    ):
        raise ModelError(
            f"{type(attention).__name__} of {model.name} does not lay out queries, keys and values in one of the three "
            f"known ways: their widths are {widths}, for {model.n_heads} heads of {model.d_head}. It is refused."
        )
    parts = [part.unflatten(-1, (-1, model.d_head)) for part in flat]
    return Projections(*parts)


@torch.no_grad()
def copying_scores(model: Model, batch: Batch) -> Float[Tensor, "layer head"]:
    """OV copying: does moving a token by this head raise that same token's own logit?

    Each token of the batch (first ones left out) is pushed alone through a head's value and output weights,
    from the residual stream that the head really reads there, then through the final norm and the
    unembedding. Score: the share of the batch's other tokens whose logit it beats, 0.5 by chance. Grouped
    heads use the value head of their group. After Elhage et al. 2021, with real inputs instead of embeddings.
    """
    keep = not_first(batch)
    ids = batch.input_ids[keep]
    sites = [Site("resid_pre", layer) for layer in range(model.n_layers)]
    with recording(model, sites, keep=lambda x: x[keep]) as resid:
        model.hf(**batch.inputs, logits_to_keep=1)
    norm = readout.final_norm(model)
    unembed = model.hf.get_output_embeddings().weight[ids]
    different = ids[:, None] != ids[None, :]
    scores = []
    for layer, site in enumerate(sites):
        v = project(model, layer, resid[site]).v
        v = v.repeat_interleave(model.n_heads // v.shape[1], dim=1)
        moved = torch.einsum("thd,hdm->htm", v, output_weights(model, layer))
        if (after := model.anatomy[layer].attention.norm) is not None:
            moved = readout.part(model, layer, after)(moved)
        logits = (norm(moved) - norm(torch.zeros_like(moved))) @ unembed.T  # the final norm's bias says nothing here
        beats = (logits.diagonal(0, -2, -1)[..., None] > logits) & different
        scores.append(result(beats.sum((-2, -1)) / different.sum()))
    return torch.stack(scores)
