"""Train a vector: by gradient descent on texts with and without a trait, or on the model's own answers."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from glassbox_utils.attention.attribution import resume
from glassbox_utils.core import checkpoints
from glassbox_utils.core.arguments import items, number, shown, whole
from glassbox_utils.core.devices import beside, like
from glassbox_utils.core.interventions import capture, edits
from glassbox_utils.core.losses import answer_nats, frozen_weights
from glassbox_utils.core.models import Model, Site
from glassbox_utils.core.session import progress
from glassbox_utils.core.text import Batch
from glassbox_utils.steering import contrast, style
from glassbox_utils.steering.apply import check_direction, continuations
from glassbox_utils.steering.contrast import Text, answer_batch
from glassbox_utils.steering.vectors import ControlVector, Direction, SteeringError, Vector, fingerprint, parts_of


def train_direction(
    model: Model,
    positive: Sequence[contrast.Text],
    negative: Sequence[contrast.Text],
    start: Direction,
    alpha: float,
    *,
    epochs: int = 4,
    learning_rate: float = 0.005,
    batch_size: int = 26,
    system: str | None = None,
    seed: int = 0,
) -> Direction:
    """Train a direction by gradient descent, from ``start``, for a push of ``alpha`` of its layer's typical norm.

    Minimised is the loss of the positive texts under +alpha and of the negative ones under -alpha (nats per
    token), with Adam on the unit vector; the weights stay as they are. What helps both kinds of text alike cancels,
    to first order, since the same vector has both signs. In the spirit of arXiv 2205.05124 and 2406.00045.
    Only the layers above run in each step. Raises SteeringError for a direction after the last layer.
    """
    positive, negative = (contrast.check_texts(n, t) for n, t in (("positive", positive), ("negative", negative)))
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        whole(name, value, least, SteeringError)
    number("alpha", alpha, SteeringError, above=0)
    number("learning_rate", learning_rate, SteeringError, above=0)
    check_direction(model, start)
    if start.layer + 1 >= model.n_layers:
        raise SteeringError(f"A direction after the last layer ({start.layer}) has nothing above it to be trained by.")
    half = max(batch_size // 2, 1)
    pieces = []
    for first in progress(range(0, max(len(positive), len(negative)), half), "reading"):
        texts = [*positive[first : first + half], *negative[first : first + half]]
        sign = torch.tensor([1.0] * len(positive[first : first + half]) + [-1.0] * len(negative[first : first + half]))
        batch, mask = contrast.answer_batch(model, texts, system)
        resid = capture(model, batch, [Site("resid_post", start.layer)])[Site("resid_post", start.layer)]
        pieces.append((batch, mask, resid, beside(sign, resid)[:, None, None]))
    vector = beside(start.vector.detach().float(), resid).clone().requires_grad_()
    optimiser = torch.optim.Adam([vector], lr=learning_rate)
    rng = np.random.default_rng(seed)
    with frozen_weights(model), torch.enable_grad():
        order = [int(i) for _ in range(epochs) for i in rng.permutation(len(pieces))]
        for i in progress(order, "training a direction"):
            batch, mask, resid, sign = pieces[i]
            push = alpha * start.scale * sign * torch.nn.functional.normalize(vector, dim=0)
            with resume(model, start.layer + 1, resid + push):
                answer_nats(model, batch, mask).mean().backward()
            optimiser.step()
            optimiser.zero_grad()
    trained = torch.nn.functional.normalize(vector.detach(), dim=0)
    means: dict[float, list[float]] = {-1.0: [], 1.0: []}  # mean coordinate of each text's tokens
    for _, mask, resid, sign in pieces:
        along = ((resid.float() @ trained) * mask).sum(-1) / mask.sum(-1).clamp(min=1) / start.scale
        for side, value in zip(sign.flatten().tolist(), along.tolist(), strict=True):
            means[side].append(value)
    where = (float(np.mean(means[-1.0])), float(np.mean(means[1.0])))
    return replace(start, vector=like(trained, start.vector), method="trained", stability=None, coordinates=where)


MOST_LOGITS = 2**25
"""of one backward pass of ``train_vector``: with a wide vocabulary answers are read a few at a time"""
SQUASH = 15.0
"""VADER's: a text's compound score is s / sqrt(s² + 15), for the sum s of its words' valences"""


def valences(tokenizer: Any) -> Float[Tensor, " vocabulary"]:
    """The lexicon's valence (-4 to 4) of each token that is a whole word of it after a space; 0 for the others."""
    lexicon = style.lexicon()
    ids = range(len(tokenizer))
    words, pieces = tokenizer.batch_decode([[i] for i in ids]), tokenizer.convert_ids_to_tokens(ids)
    # SentencePiece drops a token's space where it stands alone: the piece still has it
    words = [p.replace("▁", " ") if p and p.startswith("▁") else w for p, w in zip(pieces, words, strict=True)]
    return torch.tensor([lexicon.get(w[1:].lower(), 0.0) if w.startswith(" ") else 0.0 for w in words])


def expected_tone(
    log_probs: Float[Tensor, "batch token vocabulary"],
    written: Float[Tensor, "batch token"],
    counted: Float[Tensor, "batch token"],
    valence: Float[Tensor, " vocabulary"],
) -> Float[Tensor, " batch"]:
    """How much the tone of each answer would change if one of its words were drawn again: summed over the words.

    ``log_probs``: of the tokens at each place of the answers ``written`` (token ids; ``counted``: the answers' own
    tokens). Its gradient is that of the expected tone, without what a word does to the words after it (a policy
    gradient would have it, at far more noise). The lexicon's rules for negation and emphasis are left out.
    """
    there = valence[written] * counted
    others = (there.sum(-1, keepdim=True) - there)[..., None]  # sum of the answer's other words

    def squashed(total: Tensor) -> Tensor:
        return total * torch.rsqrt(total * total + SQUASH)

    toned = valence.nonzero().squeeze(-1)  # not a mask: logits may be wider than the tokenizer's vocabulary
    gain = squashed(others + valence[toned]) - squashed(others)
    return ((log_probs[..., toned].exp() * gain).sum(-1) * counted).sum(-1)


def train_vector(
    model: Model,
    questions: Sequence[str],
    start: ControlVector,
    alpha: float,
    *,
    steps: int = 40,
    n_questions: int = 30,
    learning_rate: float = 0.006,
    divergence: float = 0.01,
    new_tokens: int = 20,
    system: str | None = None,
    seed: int = 0,
    valence: Float[Tensor, " vocabulary"] | None = None,
    checkpoint: Path | None = None,
) -> ControlVector:
    """Train a many-layer vector on the model's own answers, from ``start``, for pushes of ±alpha.

    Each step samples answers (temperature 1) to some of the questions under +alpha and -alpha, and moves the unit
    vectors of all layers (Adam; the rate falls over the second half) so that ``expected_tone`` grows under plus and
    falls under minus. ``divergence`` is the price of a nat of Kullback-Leibler divergence from the unsteered model,
    summed over an answer. ``valence``: of each token, from the lexicon if not given. The weights stay as they are.
    ``checkpoint``: a file that is written every ten steps, and that an interrupted run goes on from.

    Raises SteeringError if no token has a valence or a number makes no sense. On-policy training of a vector, in the
    spirit of BiPO (arXiv 2406.00045).
    """
    valence = beside(valences(model.tokenizer) if valence is None else valence, model.device)
    if not valence.any():
        raise SteeringError("No token of this tokenizer has a valence: give `valence`, a number for each token.")
    for name, value, least in (
        ("steps", steps, 1), ("n_questions", n_questions, 1), ("new_tokens", new_tokens, 1), ("seed", seed, 0),
    ):  # fmt: skip
        whole(name, value, least, SteeringError)
    number("alpha", alpha, SteeringError, above=0)
    number("learning_rate", learning_rate, SteeringError, above=0)
    number("divergence", divergence, SteeringError, least=0)
    questions = items("questions", questions, SteeringError)
    if not isinstance(start, Vector):
        raise SteeringError(f"{shown(start)} is no steering vector. Give a ControlVector, or a Direction.")
    parts = parts_of(start)
    for part in parts:
        check_direction(model, part)
    vector = beside(torch.stack([part.vector for part in parts]).float(), model.device).clone().requires_grad_()
    optimiser, done = torch.optim.Adam([vector], lr=learning_rate, betas=(0.9, 0.99)), 0
    run = {"model": model.hash, "alpha": alpha, "steps": steps, "n_questions": n_questions, "seed": seed}
    run |= {"learning_rate": learning_rate, "divergence": divergence, "new_tokens": new_tokens, "system": system}
    run |= {"start": fingerprint(start), "valence": int((valence != 0).sum())}
    run |= {"questions": hashlib.sha256(json.dumps(list(questions)).encode()).hexdigest()[:16]}
    if checkpoint and (saved := checkpoints.resume(checkpoint, run, {"vector": vector}, optimiser, SteeringError)):
        done = saved.step

    def trained() -> ControlVector:
        unit = like(torch.nn.functional.normalize(vector.detach(), dim=-1), parts[0].vector)
        about: dict[str, Any] = {"method": "own answers", "stability": None, "coordinates": (0.0, 0.0)}
        return ControlVector(tuple(replace(part, vector=u, **about) for part, u in zip(parts, unit, strict=True)))

    together = max(1, MOST_LOGITS // ((new_tokens + 1) * len(valence)))
    for step in progress(range(done, steps), "training a vector on its own answers"):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1.0, 2 * (1 - step / steps))
        rng, now = np.random.default_rng([seed, step]), trained()
        asked = [questions[i] for i in rng.permutation(len(questions))[:n_questions]]
        settings = [(now, s * alpha) for s in (1, -1) for _ in asked]
        answers = continuations(
            model, asked * 2, settings, new_tokens, 100, 1.0, int(rng.integers(2**31)), system, "answers"
        )
        for sign, said in ((1, answers[: len(asked)]), (-1, answers[len(asked) :])):
            texts: list[Text] = [(q, a) for q, a in zip(asked, said, strict=True) if a.strip()]
            for first in range(0, len(texts), together):
                batch, mask = answer_batch(model, texts[first : first + together], system)
                longest = int(mask.sum(-1).max())
                written, counted = batch.input_ids[:, -longest:], mask[:, -longest:]
                with torch.no_grad():
                    plain = _log_probs(model, batch, longest)
                with frozen_weights(model), torch.enable_grad(), _pushed(model, parts, vector, sign * alpha):
                    log_probs = _log_probs(model, batch, longest)
                    nats = ((log_probs.exp() * (log_probs - plain)).sum(-1) * counted).sum(-1)
                    loss = divergence * nats - sign * expected_tone(log_probs, written, counted, valence)
                    loss.sum().div(2 * len(asked)).backward()
        optimiser.step()
        optimiser.zero_grad()
        if checkpoint and ((step + 1) % 10 == 0 or step + 1 == steps):
            checkpoints.write(checkpoint, run, {"vector": vector}, optimiser, step + 1)
    return trained()


@contextmanager
def _pushed(model: Model, parts: Sequence[Direction], vector: Tensor, alpha: float) -> Iterator[None]:
    unit = torch.nn.functional.normalize(vector, dim=-1)
    pushes = {p.layer: alpha * p.scale * u for p, u in zip(parts, unit, strict=True)}
    with edits(model, {Site("resid_post", k): partial(torch.add, other=push) for k, push in pushes.items()}):
        yield


def _log_probs(model: Model, batch: Batch, longest: int) -> Float[Tensor, "batch token vocabulary"]:
    logits = model.hf(**batch.inputs, logits_to_keep=longest + 1, use_cache=False).logits[:, :-1]
    return logits.float().log_softmax(-1)
