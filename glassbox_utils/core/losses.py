"""What a text costs a model: losses and perplexity in nats per token, of whole texts and of answers to chats.

Interventions that are active apply."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from glassbox_utils.core.devices import array, exact, result
from glassbox_utils.core.interventions import not_first
from glassbox_utils.core.models import Model, ModelError, is_whole
from glassbox_utils.core.session import progress
from glassbox_utils.core.statistics import Interval, bootstrap_ci
from glassbox_utils.core.text import Batch, answered, chat, tokenize


@torch.no_grad()
def token_losses(model: Model, batch: Batch) -> Float[Tensor, "batch pos"]:
    """Cross-entropy of each token given those before it, nats; NaN at padding and at the first token."""
    logits = model.hf(**batch.inputs).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch.input_ids[:, 1:].flatten(), reduction="none"
    ).view(batch.input_ids.shape[0], -1)
    mask = batch.attention_mask.bool()
    out = torch.full_like(loss, float("nan"))
    out = torch.where(mask[:, 1:] & mask[:, :-1], loss, out)
    return result(torch.nn.functional.pad(out, (1, 0), value=float("nan")))


def text_losses(
    model: Model, texts: Sequence[str], max_tokens: int = 256, batch_size: int = 8
) -> tuple[NDArray, NDArray]:
    """Summed loss (nats) and number of predicted tokens of each text, cut at ``max_tokens`` or the context.

    Mean loss is ``losses.sum() / counts.sum()``, perplexity its exponential, and the unit to bootstrap is
    the text. Interventions that are active apply.
    """
    if not texts:
        raise ModelError("There is no text to score. Give at least one.")
    for name, value, least in (("max_tokens", max_tokens, 2), ("batch_size", batch_size, 1)):
        if not is_whole(value) or value < least:
            raise ModelError(f"{name} is {value!r}. Allowed: a whole number from {least} on.")
    longest = min(max_tokens, model.n_context)
    losses, counts = np.zeros(len(texts)), np.zeros(len(texts), dtype=int)
    length = {i: len(t) for i, t in enumerate(texts)}
    order = sorted(length, key=lambda i: length[i])  # texts of similar length share a batch: little padding
    for start in progress(range(0, len(order), batch_size), "loss"):
        rows = order[start : start + batch_size]
        loss = token_losses(model, tokenize(model, [texts[i] for i in rows], max_tokens=longest))
        losses[rows] = array(loss.nansum(-1))
        counts[rows] = (~loss.isnan()).sum(-1).numpy()
    return losses, counts


def perplexity(model: Model, texts: Sequence[str], max_tokens: int = 256, batch_size: int = 8) -> Interval:
    """Perplexity per token over the texts, with a bootstrap interval over texts."""
    losses, counts = text_losses(model, texts, max_tokens, batch_size)
    if not counts.sum():
        raise ModelError(
            f"{len(texts)} texts have no token that {model.name} predicts: a text needs at least two tokens, the "
            "first one included. Give longer texts."
        )
    if len(texts) < 2:
        value = float(np.exp(losses.sum() / counts.sum()))
        return Interval(value, value, value, len(texts))
    return bootstrap_ci((losses, counts), lambda a, b: float(np.exp(a.sum() / b.sum())))


def perplexity_ratio(losses: NDArray, counts: NDArray, others: NDArray, other_counts: NDArray) -> float:
    """Perplexity of the second pair of ``text_losses`` over that of the first: what an intervention costs.

    A statistic of four paired samples: ``bootstrap_ci((*plain, *changed), perplexity_ratio)`` resamples the texts.
    """
    return float(np.exp(others.sum() / other_counts.sum() - losses.sum() / counts.sum()))


@torch.no_grad()
def text_divergences(
    model: Model,
    texts: Sequence[str],
    changed: Callable[[], AbstractContextManager[Any]],
    max_tokens: int = 256,
    other: Model | None = None,
) -> tuple[NDArray, NDArray]:
    """Summed KL(as it is || inside ``changed()``) in nats, and number of positions, of each text.

    Unlike a ratio of perplexities it grows with *every* change of what is foreseen, also of a model that reads a text
    badly: damage can't pass for a gain. The first token is left out. ``other``: the model that is inside, if not the
    same one.
    """
    if not texts:
        raise ModelError("There is no text to compare on. Give at least one.")
    sums, counts = np.zeros(len(texts)), np.zeros(len(texts), dtype=int)
    for i, text in enumerate(progress(list(texts), "divergence")):
        batch = tokenize(model, [text], max_tokens=min(max_tokens, model.n_context))
        plain = log_probabilities(model, batch)
        with changed():
            moved = log_probabilities(other or model, batch)
        kl = (plain.exp() * (plain - moved)).sum(-1)
        sums[i], counts[i] = float(exact(kl).sum()), len(kl)
    return sums, counts


@contextmanager
def frozen_weights(model: Model) -> Iterator[None]:
    """No gradients for the weights inside the block."""
    weights = [p for p in model.hf.parameters() if p.requires_grad]
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)


def answer_nats(model: Model, batch: Batch, mask: Tensor) -> Float[Tensor, " batch"]:
    """Mean loss of each row's tokens under ``mask``, which are its last ones."""
    longest = int(mask.sum(-1).max())
    logits = model.hf(**batch.inputs, logits_to_keep=longest + 1, use_cache=False).logits[:, :-1].float()
    target, counted = batch.input_ids[:, -longest:], mask[:, -longest:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return (loss.view_as(target) * counted).sum(-1) / counted.sum(-1).clamp(min=1)


@torch.no_grad()
def answer_losses(
    model: Model, questions: Sequence[Any], answers: Sequence[str], batch_size: int = 25, system: str | None = None
) -> tuple[NDArray, NDArray]:
    """Summed loss (nats) and number of tokens of each answer, given its chat prompt; interventions apply.

    A question is a user's turn, or a list of turns; ``system`` as in ``text.chat``. Empty answers have 0 tokens. Prompt
    and answer are tokenised apart (``text.answered``). ModelError for unequally many, or none.
    """
    if not answers or len(questions) != len(answers):
        raise ModelError(
            f"There are {len(questions)} questions and {len(answers)} answers. Give one answer for each question, "
            "and at least one."
        )
    losses, counts = np.zeros(len(answers)), np.zeros(len(answers), dtype=int)
    order = sorted(range(len(answers)), key=lambda i: len(answers[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        before = [chat(model, questions[i], system) for i in rows]
        batch, counted = answered(model, before, [answers[i] for i in rows])
        mask = counted.cpu()
        longest = int(mask.sum(-1).max())
        if longest == 0:
            continue
        # Only the answers' logits are computed: the prompt is longer, and a vocabulary is wide.
        logits = model.hf(**batch.inputs, logits_to_keep=longest + 1).logits[:, :-1].float()
        target = batch.input_ids[:, -longest:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").cpu()
        loss = torch.where(mask[:, -longest:], loss.view(len(rows), longest), 0)
        losses[rows] = loss.double().sum(-1).numpy()
        counts[rows] = mask.sum(-1).numpy()
    return losses, counts


@torch.no_grad()
def log_probabilities(model: Model, batch: Batch) -> Float[Tensor, "token vocabulary"]:
    """Log-probabilities of the next token at every real position but the first; interventions apply."""
    return model.hf(**batch.inputs).logits[not_first(batch)].float().log_softmax(-1)
