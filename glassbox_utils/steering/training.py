"""Train a vector: by gradient descent on texts with and without a trait, or on the model's own answers."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

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
from glassbox_utils.steering import contrast
from glassbox_utils.steering.apply import check_direction, continuations
from glassbox_utils.steering.contrast import Text, answer_batch
from glassbox_utils.steering.reward import expected_tone, likely_order, squashed, valences
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


def train_vector(
    model: Model,
    questions: Sequence[str],
    start: ControlVector,
    alpha: float | tuple[float, float],
    *,
    steps: int = 40,
    n_questions: int = 30,
    learning_rate: float = 0.006,
    divergence: float = 0.01,
    new_tokens: int = 20,
    temperature: float = 1.0,
    system: str | None = None,
    seed: int = 0,
    valence: Float[Tensor, " vocabulary"] | Float[Tensor, "end vocabulary"] | None = None,
    order: bool | Literal["likely"] = False,
    per_token: bool = False,
    variety: float = 0.0,
    checkpoint: Path | None = None,
) -> ControlVector:
    """Train a vector, of many layers or of one, on the model's own answers, from ``start``, for pushes of ±alpha.

    Each step samples answers to some of the questions under +alpha and -alpha, and moves the unit vectors of all
    layers (Adam; the rate falls over the second half) so that ``reward.expected_tone`` grows under plus and falls
    under minus; with ``order`` each answer is compared with the unsteered one to its question; with "likely" what
    grows is ``reward.likely_order``. ``alpha``: of both ends, or of plus and of minus. ``divergence`` is the price of
    a nat of Kullback-Leibler divergence from the unsteered model, summed over an answer; ``per_token``: of its mean
    over the answer's tokens times ``new_tokens``, so that short answers are no cheaper. ``valence``: of each token,
    or of each token at the ends plus and minus; ``reward.valences`` if not given. The weights stay as they are.
    ``variety``: a word that stands in a share of an end's answers, on average over the last steps, counts exp(-variety
    times the share) of its valence there, so that one word in every answer is worth little. ``checkpoint``: a file that
    is written every ten steps, and that an interrupted run goes on from.

    Raises SteeringError if no token has a valence or a number makes no sense. On-policy training of a vector, in the
    spirit of BiPO (arXiv 2406.00045).
    """
    valence = beside(valences(model.tokenizer) if valence is None else valence, model.device)
    if not valence.any():
        raise SteeringError("No token of this tokenizer has a valence: give `valence`, a number for each token.")
    ends = valence if valence.ndim == 2 else torch.stack([valence, valence])
    for name, value, least in (
        ("steps", steps, 1), ("n_questions", n_questions, 1), ("new_tokens", new_tokens, 1), ("seed", seed, 0),
    ):  # fmt: skip
        whole(name, value, least, SteeringError)
    pushes = alpha if isinstance(alpha, tuple) and len(alpha) == 2 else (alpha, alpha)
    for push in pushes:
        number("alpha", push, SteeringError, above=0)
    if order not in (True, False, "likely"):
        raise SteeringError(f"order is {shown(order)}. Allowed: False, True, or 'likely'.")
    number("learning_rate", learning_rate, SteeringError, above=0)
    number("divergence", divergence, SteeringError, least=0)
    number("variety", variety, SteeringError, least=0)
    number("temperature", temperature, SteeringError, least=0)
    questions = items("questions", questions, SteeringError)
    if not isinstance(start, Vector):
        raise SteeringError(f"{shown(start)} is no steering vector. Give a ControlVector, or a Direction.")
    parts = parts_of(start)
    for part in parts:
        check_direction(model, part)
    vector = beside(torch.stack([part.vector for part in parts]).float(), model.device).clone().requires_grad_()
    optimiser, done = torch.optim.Adam([vector], lr=learning_rate, betas=(0.9, 0.99)), 0
    run: dict[str, Any] = {
        "model": model.hash,
        "alpha": alpha,
        "steps": steps,
        "n_questions": n_questions,
        "seed": seed,
    }
    run |= {"learning_rate": learning_rate, "divergence": divergence, "new_tokens": new_tokens, "system": system}
    run |= {"temperature": temperature, "start": fingerprint(start), "valence": _digest(ends.tolist())}
    run |= {"questions": _digest(list(questions)), "order": order} | ({"per_token": True} if per_token else {})
    kept = {"vector": vector}
    usual = torch.zeros_like(ends)
    if variety:
        run, kept = run | {"variety": variety}, kept | {"usual": usual}
    if checkpoint and (saved := checkpoints.resume(checkpoint, run, kept, optimiser, SteeringError)):
        done = saved.step

    def trained() -> ControlVector:
        return _as_trained(parts, vector, "own answers")

    unsteered: dict[str, str] = {}
    for step in progress(range(done, steps), "training a vector on its own answers"):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1.0, 2 * (1 - step / steps))
        rng, now = np.random.default_rng([seed, step]), trained()
        asked = [questions[i] for i in rng.permutation(len(questions))[:n_questions]]
        settings = [(now, push) for push in (pushes[0], -pushes[1]) for _ in asked]
        answers = continuations(
            model, asked * 2, settings, new_tokens, 100, temperature, int(rng.integers(2**31)), system, "answers"
        )
        new = [q for q in asked if order and q not in unsteered]  # answered once, in the run's own number type
        plain = continuations(model, new, [None] * len(new), new_tokens, 100, system=system, label="unsteered")
        unsteered |= dict(zip(new, plain, strict=True))
        for sign, said in ((1, answers[: len(asked)]), (-1, answers[len(asked) :])):
            rows = [
                (q, a, unsteered.get(q))
                for q, a in zip(asked, said, strict=True)
                if a.strip() and unsteered.get(q, "-").strip()
            ]
            pushed = partial(_pushed, model, parts, vector, pushes[0] if sign > 0 else -pushes[1])
            mine = usual[0 if sign > 0 else 1]
            mine += (said_by(model, [a for _, a, _ in rows], mine) - mine) * (
                1 / (step + 1) if step < MEMORY else 1 / MEMORY
            )
            with frozen_weights(model):
                options: dict[str, Any] = {"system": system, "weight": 0.5 / len(asked), "likely": order == "likely"}
                options["per"] = new_tokens if per_token else None
                worth = ends * (-variety * usual).exp()
                backward(model, rows, worth, sign, divergence, pushed, **options)
        optimiser.step()
        optimiser.zero_grad()
        if checkpoint and ((step + 1) % 10 == 0 or step + 1 == steps):
            checkpoints.write(checkpoint, run, kept, optimiser, step + 1)
    return trained()


MEMORY = 6
"""steps over which it is averaged how usual a word is"""


def said_by(model: Model, answers: Sequence[str], like: Tensor) -> Float[Tensor, " vocabulary"]:
    """In which share of some answers each token stands; zeros for none."""
    share = torch.zeros_like(like)
    for answer in answers:
        share[list(set(model.tokenizer(answer)["input_ids"]))] += 1 / len(answers)
    return share


def train_on_answers(
    model: Model,
    plus: Sequence[Text],
    minus: Sequence[Text],
    start: ControlVector,
    alpha: tuple[float, float],
    *,
    steps: int = 40,
    n_texts: int = 12,
    learning_rate: float = 0.01,
    system: str | None = None,
    seed: int = 0,
) -> ControlVector:
    """Train the unit vectors of all layers together on given answers, from ``start``, for pushes of +alpha and -alpha.

    Each step reads ``n_texts`` answers of either side and lowers their loss (nats a token), of ``plus`` under
    ``alpha[0]`` and of ``minus`` under ``-alpha[1]``; Adam, and the rate falls over the second half. As
    ``train_direction``, of several layers. SteeringError for no text, or a number that makes no sense.
    """
    sides = [contrast.check_texts(name, texts) for name, texts in (("plus", plus), ("minus", minus))]
    for name, value in (("steps", steps), ("n_texts", n_texts)):
        whole(name, value, 1, SteeringError)
    for push in alpha:
        number("alpha", push, SteeringError, above=0)
    number("learning_rate", learning_rate, SteeringError, above=0)
    parts = parts_of(start)
    for part in parts:
        check_direction(model, part)
    vector = beside(torch.stack([part.vector for part in parts]).float(), model.device).clone().requires_grad_()
    optimiser = torch.optim.Adam([vector], lr=learning_rate, betas=(0.9, 0.99))
    for step in progress(range(steps), "training a vector on given answers"):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1.0, 2 * (1 - step / steps))
        rng = np.random.default_rng([seed, step])
        for texts, push in zip(sides, (alpha[0], -alpha[1]), strict=True):
            here = [texts[i] for i in rng.permutation(len(texts))[:n_texts]]
            batch, mask = answer_batch(model, here, system)
            with frozen_weights(model), torch.enable_grad(), _pushed(model, parts, vector, push):
                answer_nats(model, batch, mask).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    return _as_trained(parts, vector, "answers")


def _as_trained(parts: Sequence[Direction], vector: Tensor, method: str) -> ControlVector:
    """The vector of trained rows: what was known of the start's directions (stability, coordinates) is gone."""
    unit = like(torch.nn.functional.normalize(vector.detach(), dim=-1), parts[0].vector)
    about: dict[str, Any] = {"method": method, "stability": None, "coordinates": (0.0, 0.0)}
    return ControlVector(tuple(replace(part, vector=u, **about) for part, u in zip(parts, unit, strict=True)))


Row = tuple[str, str, str | None]
"""a question, an answer to it, and the unsteered answer that it is compared with (None: with nothing)"""


def backward(
    model: Model,
    rows: Sequence[Row],
    ends: Float[Tensor, "end vocabulary"],
    sign: int,
    divergence: float,
    changed: Callable[[], AbstractContextManager[Any]],
    *,
    system: str | None,
    weight: float,
    likely: bool = False,
    per: int | None = None,
    unchanged: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Add the gradient of the reward of some answers, at one end of the dial, to whatever ``changed`` trains.

    The loss, times ``weight``: ``divergence`` times the Kullback-Leibler divergence of each answer's words from the
    unsteered model, nats, minus ``sign`` times ``reward.expected_tone``; or minus ``reward.likely_order``
    where ``likely``. ``per``: the divergence is the tokens' mean, times so many. ``unchanged``: in which the model is
    the unsteered one, for an adapter that has to be switched off for that.
    """
    valence = ends[0 if sign > 0 else 1]
    longest_answer = max((len(model.tokenizer(answer)["input_ids"]) for _, answer, _ in rows), default=0)
    together = max(1, MOST_LOGITS // ((longest_answer + 1) * len(valence)))
    for first in range(0, len(rows), together):
        here = rows[first : first + together]
        compared: list[Text] = [(q, plain) for q, _, plain in here if plain is not None]
        plain = _compound(model, compared, valence, system) if compared else None
        texts: list[Text] = [(q, answer) for q, answer, _ in here]
        batch, mask = answer_batch(model, texts, system)
        longest = int(mask.sum(-1).max())
        written, counted = batch.input_ids[:, -longest:], mask[:, -longest:]
        with torch.no_grad(), unchanged():
            before = _log_probs(model, batch, longest)
        with torch.enable_grad(), changed():
            log_probs = _log_probs(model, batch, longest)
            nats = ((log_probs.exp() * (log_probs - before)).sum(-1) * counted).sum(-1)
            if per is not None:  # short answers are no cheaper: what counts is a token's mean, of so many
                nats = per * nats / counted.sum(-1)
            if likely and plain is not None:
                gained = likely_order(log_probs, written, counted, valence, plain, sign)
            else:
                gained = sign * expected_tone(log_probs, written, counted, valence, plain, sign)
            (weight * (divergence * nats - gained).sum()).backward()


def _compound(
    model: Model, texts: Sequence[Text], valence: Float[Tensor, " vocabulary"], system: str | None
) -> Float[Tensor, " batch"]:
    batch, mask = answer_batch(model, texts, system)
    return squashed((valence[batch.input_ids] * mask).sum(-1))


@contextmanager
def _pushed(model: Model, parts: Sequence[Direction], vector: Tensor, alpha: float) -> Iterator[None]:
    unit = torch.nn.functional.normalize(vector, dim=-1)
    pushes = {
        p.layer: like(alpha * p.scale * u, model.hf.get_input_embeddings().weight)
        for p, u in zip(parts, unit, strict=True)
    }
    with edits(model, {Site("resid_post", k): partial(torch.add, other=push) for k, push in pushes.items()}):
        yield


def _log_probs(model: Model, batch: Batch, longest: int) -> Float[Tensor, "batch token vocabulary"]:
    head = model.hf.get_output_embeddings()  # the last places are a view: without a copy torch copies the weights
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        logits = model.hf(**batch.inputs, logits_to_keep=longest + 1, use_cache=False).logits[:, :-1]
    finally:
        hook.remove()
    return logits.float().log_softmax(-1)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
