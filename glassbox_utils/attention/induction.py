"""Induction heads: scores on repeated tokens, what their loss costs, and who they compose with."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.attention import attribution, patterns
from glassbox_utils.attention.ablation import HeadMeans, ablated, head_means
from glassbox_utils.attention.heads import control_sets, norm_matched, output_norms
from glassbox_utils.core import corpora
from glassbox_utils.core.devices import beside, result
from glassbox_utils.core.interventions import Head, capture
from glassbox_utils.core.losses import token_losses
from glassbox_utils.core.models import Model, ModelError, Site
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import Batch, first_token

LOGITS = 40_000_000
"""at once, in the loss of texts: a few hundred MB of memory, whatever the vocabulary"""


class CircuitScores(NamedTuple):
    """Three scores of every head on every row of repeated random tokens."""

    induction: Float[Tensor, "row layer head"]
    previous: Float[Tensor, "row layer head"]
    duplicate: Float[Tensor, "row layer head"]


def circuit_scores(model: Model, batch: Batch) -> CircuitScores:
    """Induction, previous-token and duplicate-token scores of all heads in one streaming pass.

    As in ``attention``, except that the token right after BOS is left out of the previous-token score: its
    previous token is the attention sink.
    """
    ids = batch.input_ids
    if not batch.attention_mask.all():
        raise ModelError("Circuit scores are for rows of equal length without padding, such as repeated_tokens gives.")
    after = patterns.induction_targets(batch)
    same = (ids[:, :, None] == ids[:, None, :]).tril(-1)

    def score(pattern: Tensor, where: slice) -> Tensor:
        columns = [pattern.diagonal(-1, -2, -1)[..., 1:].mean(-1)]  # the token after BOS would find the sink
        for wanted in (after[where], same[where]):
            weight = wanted.float() / wanted.any(-1).sum(-1)[:, None, None]
            columns.append(torch.einsum("bhds,bds->bh", pattern, weight))
        return torch.stack(columns, -1)

    previous, induction, duplicate = patterns.over_patterns(model, batch, score).unbind(-1)
    return CircuitScores(induction, previous, duplicate)


def natural_repeats(model: Model, n: int = 24, tokens: int = 40, skip: int = 0) -> Batch:
    """n rows of [BOS, the beginning of a held-out encyclopedia entry, the same again]."""
    rows = _held_out(model, n, tokens, skip)
    start = first_token(model)
    ids = beside(torch.tensor([([start] if start is not None else []) + row + row for row in rows]), model.device)
    return Batch(ids, torch.ones_like(ids))


@cache
def _entries() -> list[str]:
    return [d.text for d in corpora.load_corpus("wiki", "held")]


def _held_out(model: Model, n: int, tokens: int, skip: int = 0) -> list[list[int]]:
    """The first ``tokens`` tokens of n held-out entries that are long enough."""
    rows: list[list[int]] = []
    for text in _entries():
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
        if len(ids) == tokens:
            rows.append(ids)
        if len(rows) == n + skip:
            return rows[skip:]
    raise ModelError(f"Only {len(rows)} held-out entries have {tokens} tokens, {n + skip} were asked for.")


def _text_rows(model: Model, n: int, tokens: int, skip: int = 0) -> Batch:
    """n held-out texts of ``tokens`` tokens each, BOS included."""
    start = first_token(model)
    bos = [start] if start is not None else []
    rows = [(bos + row)[:tokens] for row in _held_out(model, n, tokens, skip)]
    ids = beside(torch.tensor(rows), model.device)
    return Batch(ids, torch.ones_like(ids))


@torch.no_grad()
def repeat_losses(
    model: Model, batch: Batch, sets: Sequence[Sequence[Head]], reference: HeadMeans
) -> Float[Tensor, "set row"]:
    """Mean loss on the repeated half (its first token left out) with each set of heads mean-ablated."""
    length = (batch.input_ids.shape[1]) // 2
    start = min((layer for heads in sets for layer, _ in heads), default=0)
    resid = capture(model, batch, [Site("resid_pre", start)])[Site("resid_pre", start)]
    losses = []
    with attribution.resume(model, start, resid):
        for heads in progress(sets, "ablation"):
            with ablated(model, heads, reference):
                logits = model.hf(**batch.inputs, logits_to_keep=length, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), batch.input_ids[:, -length + 1 :].flatten(), reduction="none"
            )
            losses.append(result(loss.view(len(logits), -1).mean(-1)))
    return torch.stack(losses)


class AblationCurve(NamedTuple):
    """Loss on the repeated half for each k and each kind of set, one value a row."""

    ks: list[int]
    clean: Float[Tensor, " row"]
    top: Float[Tensor, "k row"]
    random: Float[Tensor, "k draw row"]
    """heads of the same layers"""
    matched: Float[Tensor, "k draw row"]
    """heads of similar output norm, from any layer"""


def ablation_curve(
    model: Model,
    ranking: Sequence[Head],
    ks: Sequence[int] = (1, 2, 4, 6, 10),
    n: int = 12,
    length: int = 50,
    draws: int = 20,
    seed: int = 12,
    avoid: Sequence[Head] = (),
    matched: bool = True,
) -> AblationCurve:
    """What losing the top k heads costs on repeated tokens, against random heads of the same layers and of equal norm.

    ``ranking`` must come from other rows. ``avoid``: heads that no control may contain, with those that share their
    keys. ``matched``: draw the second kind of control too.
    """
    batch = patterns.repeated_tokens(model, n, length, seed)
    other = patterns.repeated_tokens(model, 8, length, seed + 1000)
    reference, norms = head_means(model, [other]), output_norms(model, Batch(*(t[:2] for t in other)))
    keep_out = [*ranking[: max(ks)], *avoid]
    sets: list[list[Head]] = [[]]
    for k in ks:
        sets.append(list(ranking[:k]))
        sets += control_sets(model, ranking[:k], keep_out, draws, 100 * seed)
        sets += [norm_matched(norms, ranking[:k], keep_out, 100 * seed + d) for d in range(draws if matched else 0)]
    losses = repeat_losses(model, batch, sets, reference)
    by_k = losses[1:].view(len(ks), -1, losses.shape[1])
    return AblationCurve(list(ks), losses[0], by_k[:, 0], by_k[:, 1 : 1 + draws], by_k[:, 1 + draws :])


def cost_of_each(model: Model, found: Sequence[Head], n: int = 12, length: int = 50, seed: int = 12) -> Tensor:
    """Extra loss on the rows of ``ablation_curve`` without one head at a time, [head, row], nats."""
    batch = patterns.repeated_tokens(model, n, length, seed)
    reference = head_means(model, [patterns.repeated_tokens(model, 8, length, seed + 1000)])
    losses = repeat_losses(model, batch, [[], *([h] for h in found)], reference)
    return losses[1:] - losses[0]


@torch.no_grad()
def in_context_score(
    model: Model, sets: Sequence[Sequence[Head]], n: int = 16, tokens: int = 200, skip: int = 0
) -> tuple[Float[Tensor, "set text"], Float[Tensor, "set text"]]:
    """Real text with sets of heads ablated: (in-context learning score, mean loss), nats per token.

    The score is the loss on the last quarter of the tokens minus the loss on tokens 10 to 50: the more
    negative, the more the context helps. After Olsson et al., arXiv 2209.11895, on shorter texts.
    """
    batch = _text_rows(model, n, tokens, skip)
    other = _text_rows(model, 6, tokens, skip + n)
    reference = head_means(model, [other])
    scores, means = [], []
    rows = max(1, min(4, LOGITS // (tokens * model.hf.get_input_embeddings().weight.shape[0])))
    for heads in progress(sets, "text"):
        with ablated(model, heads, reference):
            loss = torch.cat([token_losses(model, Batch(*(t[i : i + rows] for t in batch))) for i in range(0, n, rows)])
        scores.append(loss[:, -tokens // 4 :].nanmean(-1) - loss[:, 10:50].nanmean(-1))
        means.append(loss.nanmean(-1))
    return torch.stack(scores), torch.stack(means)


def composition(
    model: Model, senders: Sequence[Head], receiver: Head, n: int = 4, length: int = 25, seed: int = 13
) -> tuple[Float[Tensor, " row"], Float[Tensor, "sender row"]]:
    """K-composition by path patching: the receiver's induction score, clean and with each sender cut from its keys.

    The sender's output comes from other repeated tokens, on the direct path into the receiver's keys only.
    """
    clean = patterns.repeated_tokens(model, n, length, seed)
    donor = patterns.repeated_tokens(model, n, length, seed + 1000)
    targets = patterns.induction_targets(clean)

    def score(pattern: Tensor) -> Tensor:
        return (pattern * targets).sum((1, 2)) / targets.any(-1).sum(1)

    return attribution.path_patch_keys(model, clean, donor, senders, receiver, score, rows=8 * n)
